"""Small random models of the supported families, and inputs for them."""

import resource
import string
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import AutoConfig

from hashattn.selectors.oracle import OracleSelector

_SHAPE = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_SLIDING = ["sliding_attention", "full_attention"]

# family: (model_type, settings beside _SHAPE)
FAMILIES = {
    "llama": ("llama", {}),
    "llama_mha": ("llama", {"num_key_value_heads": 4}),
    "llama_mqa": ("llama", {"num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_sliding": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2_sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 16,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "layer_types": _SLIDING,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": _SLIDING,
        },
    ),
    "phi3": ("phi3", {}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": None}),
}
# families with at least one full-attention layer, where decoding is sparse
SPARSE_FAMILIES = [name for name in FAMILIES if name != "mistral_sliding"]

_SHARPENED = ("q_proj", "k_proj", "qkv_proj", "query_key_value")


def tiny_config(family: str) -> PreTrainedConfig:
    """Configuration of a small model of `family`, a key of FAMILIES."""
    model_type, settings = FAMILIES[family]
    return AutoConfig.for_model(model_type, **{**_SHAPE, **settings})


def tiny_model(
    family: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attention: str | None = None,
) -> PreTrainedModel:
    """A random model of `family` whose attention is far from uniform.

    Random projections attend almost uniformly, which would hide a wrong selection, so query and key
    projections are scaled up.
    """
    torch.manual_seed(seed)
    kwargs = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(tiny_config(family), **kwargs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and any(part in name for part in _SHARPENED):
                parameter.mul_(8)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model.to(dtype)


def prompt(batch: int = 1, length: int = 40, seed: int = 1) -> torch.Tensor:
    """Random token ids (batch, length) without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (batch, length), generator=generator)


def left_padded(lengths: tuple[int, ...] = (40, 33, 17)) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (batch, longest) padded on the left, and their attention mask."""
    ids = prompt(len(lengths), max(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : max(lengths) - length] = 0
        mask[row, : max(lengths) - length] = 0
    return ids, mask


def generate(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, **settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences (batch, length) and logits (batch, steps, vocabulary) in float32, seeded."""
    torch.manual_seed(7)
    settings = {"max_new_tokens": 12, "do_sample": False} | settings
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    return out.sequences, torch.stack(out.logits, dim=1).float()


class TracingOracle(OracleSelector):
    """Oracle whose index is a copy of the keys: counts encodings, checks that index and keys agree.

    encoded: keys encoded in each layer. calls: calls of `scores` in each layer.
    """

    def __init__(self, layout: str = "per_query_head") -> None:
        super().__init__(layout)
        self.encoded: Counter[int] = Counter()
        self.calls: Counter[int] = Counter()

    def encode_keys(self, layer, keys):
        self.encoded[layer] += keys.shape[2]
        return {"copy": keys.clone()}

    def scores(self, layer, queries, view, scaling):
        self.calls[layer] += 1
        assert torch.equal(view.index["copy"], view.keys)
        return super().scores(layer, queries, view, scaling)


def characters():
    """A tokenizer with one token per character."""
    letters = string.ascii_letters + string.digits + " .:=?\n"
    letters += "".join(chr(0x100 + i) for i in range(125 - len(letters)))  # every id is a letter
    vocabulary = {"<unk>": 0} | {letter: i + 3 for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files end at `size` bytes: a write beyond that is cut short, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
