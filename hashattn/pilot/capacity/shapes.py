"""What a model's configuration says of its memory: weights, cached keys and values.

Nothing is loaded: parameters are counted on the model class built on torch's meta device, which
allocates no memory. Where families differ is read through hashattn.models.families.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hashattn.base.checks import is_number, require, require_numbers
from hashattn.base.errors import HashAttnError, UnsupportedModelError
from hashattn.base.files import read_json
from hashattn.models.families import (
    FULL,
    LIMITS,
    caches_latents,
    head_shapes,
    layer_kinds,
    max_positions,
)
from hashattn.models.gguf import is_gguf
from hashattn.models.structure import attention_modules

_BYTES = {"float64": 8.0, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0}  # of an element
_ROUTED = re.compile(r"\.experts\.")  # parameters of which a token uses some; shared ones differ
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_METHOD_BITS = {"fp8": 8.0, "fbgemm_fp8": 8.0, "mxfp4": 4.25}  # mxfp4: a scale for 32 weights


class ShapeError(HashAttnError, ValueError):
    """A configuration is missing, cannot be read or does not say what is needed."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes that decide what a decode step reads; the text part of a model.

    full_layers: layers that attend to every cached token. windows: for every layer with a window or
    chunk, its length in tokens. fixed_layers: layers with a state of fixed size, which is not
    counted. parameters: all of them, tied ones once; experts' (of `experts` experts a layer,
    `chosen` a token) and those kept in `dtype` where the others are quantised to weight_bits bits
    (embeddings, output, norms) are parts of them. dtype: of the cache. positions: the longest
    context, None without a limit. Raises ValueError naming the field.
    """

    name: str
    model_type: str
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    full_layers: int
    windows: tuple[int, ...]
    fixed_layers: int
    parameters: int
    kept_parameters: int
    expert_parameters: int = 0
    experts: int = 0
    chosen: int = 0
    dtype: str = "bfloat16"
    weight_bits: float = 16.0
    positions: int | None = None

    def __post_init__(self) -> None:
        require_numbers(
            vars(self),
            counts={"query_heads": 1, "kv_heads": 1, "head_dim": 1, "hidden_size": 1,
                    "full_layers": 1, "fixed_layers": 0, "parameters": 1, "kept_parameters": 0,
                    "expert_parameters": 0, "experts": 0, "chosen": 0},
        )  # fmt: skip
        require(self.dtype in _BYTES, "dtype", self.dtype, f"one of {', '.join(_BYTES)}")
        valid = is_number(self.weight_bits) and 1 <= self.weight_bits <= 64
        require(valid, "weight_bits", self.weight_bits, "a number in 1..64")

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.query_heads // self.kv_heads

    @property
    def layers(self) -> int:
        """All layers."""
        return self.full_layers + len(self.windows) + self.fixed_layers

    @property
    def row_bytes(self) -> float:
        """Bytes of one token's key and value in all KV heads of a layer: 2 x heads x head_dim."""
        return 2 * self.kv_heads * self.head_dim * _BYTES[self.dtype]

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes that each further token adds to the cache, windows being full."""
        return self.row_bytes * self.full_layers

    def full_bytes(self, tokens: int) -> float:
        """Bytes of K and V of `tokens` tokens in the layers with full attention."""
        return self.kv_bytes_per_token * tokens

    def window_bytes(self, tokens: int) -> float:
        """Bytes of K and V of `tokens` tokens in the layers with a window, which keep no more."""
        return self.row_bytes * sum(min(window, tokens) for window in self.windows)

    def code_bytes_per_token(self, bits: int) -> float:
        """Bytes of a token's codes: `bits` for every KV head of a layer with full attention."""
        return bits / 8 * self.kv_heads * self.full_layers

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights, the input embedding included."""
        return self._bytes(self.expert_parameters)

    def read_bytes(self, batch: int) -> float:
        """Bytes of weights that a decode step of `batch` sequences reads: all but those of experts
        that no sequence chose, 1 - (1 - chosen / experts)^batch being the share that some did if
        choices are independent and even.

        The input embedding counts although a step reads one row of it, unless it is tied: with it
        the figures agree with published parameter counts and err towards a smaller gain
        (Llama-3.1-8B: 1.27x at 32K, without it 1.29x).
        """
        unused = (1 - self.chosen / self.experts) ** batch if self.experts else 0.0
        return self._bytes(self.expert_parameters * (1 - unused))

    def _bytes(self, of_experts: float) -> float:
        dense = self.parameters - self.expert_parameters - self.kept_parameters
        quantised = (dense + of_experts) * self.weight_bits / 8
        return self.kept_parameters * _BYTES[self.dtype] + quantised


def read_config(model: str) -> Any:
    """The transformers configuration of a folder with config.json, of a JSON file, or of a hub id
    in the local cache; nothing is fetched and no code of the model is run.

    ShapeError saying what is wrong and how to get it.
    """
    path = Path(model).expanduser()
    if is_gguf(path):
        raise ShapeError(
            f"{model} is a GGUF file: give the folder that hashattn.models.gguf.model_from_gguf "
            "makes of it, or the config.json of the model it was made from"
        )
    if path.is_dir():
        path = path / "config.json"
    elif path.suffix != ".json":
        return _cached(model)
    content = read_json(path, ShapeError)
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ShapeError(f"{path} is no model configuration: it has no model_type")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = content["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ShapeError(
            f"{path}: transformers does not know the model type {kind!r}; models that bring their "
            "own code are not supported"
        )
    try:
        config = CONFIG_MAPPING[kind].from_dict(content)
    except Exception as problem:  # each configuration class checks its fields in its own way
        raise ShapeError(f"{path} is no valid {kind} configuration: {problem}") from problem
    config._name_or_path = str(path.parent if path.name == "config.json" else path)
    return config


def _cached(model: str) -> Any:
    if not _HUB_ID.fullmatch(model):
        raise ShapeError(f"{model} does not exist: give a folder with config.json, or a hub id")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as problem:  # ValueError: a model with code of its own
        raise ShapeError(
            f"{model}: no folder and no .json file of this name, and no such model in the local "
            f"cache of the hub, which alone is looked at. Get its configuration with\n"
            f"  hf download {model} config.json\n"
            "or give the path of a folder that holds config.json"
        ) from problem


def model_shape(
    config: Any, name: str | None = None, *, dtype: str | None = None,
    weight_bits: float | None = None,
) -> ModelShape:  # fmt: skip
    """The shape of a configuration's text part.

    dtype: of weights and cache; by default the configuration's, or bfloat16 where it states none.
    weight_bits: of quantised weights; by default what the configuration's quantization_config says.
    UnsupportedModelError for a model whose cache holds no keys and values (MLA), or without a layer
    of full attention; ShapeError for a quantisation that is not known; ValueError for a bad dtype.
    """
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{config.model_type} is an encoder-decoder: only decoders are supported"
        )
    if caches_latents(text):
        raise UnsupportedModelError(
            f"{text.model_type} caches latents instead of keys (MLA): sparse attention does not "
            "support it, and its memory is not counted here"
        )
    try:
        kinds, heads = layer_kinds(config), head_shapes(config)
    except Exception as problem:  # configurations refuse in ways of their own
        raise UnsupportedModelError(
            f"{text.model_type} has no attention heads, or not the same in all layers ({problem}): "
            "its cache is not counted here"
        ) from problem
    full = kinds.count(FULL)
    windows = tuple(getattr(text, LIMITS[kind]) for kind in kinds if kind in LIMITS)
    if not full:
        raise UnsupportedModelError(
            f"{text.model_type} has nothing to make sparse: none of its {len(kinds)} layers has "
            f"full attention ({', '.join(sorted(set(kinds)))}); use a model that has"
        )
    quantised, only_experts = _stored_bits(config)
    dtype = dtype or str(getattr(text, "dtype", None) or "bfloat16").removeprefix("torch.")
    require(dtype in _BYTES, "dtype", dtype, f"one of {', '.join(_BYTES)}")
    counts = _count(text, heads["kv_heads"] * heads["head_dim"])
    if only_experts and weight_bits is None:
        counts["kept_parameters"] = counts["parameters"] - counts["expert_parameters"]
    return ModelShape(
        name=name or Path(getattr(config, "_name_or_path", "") or text.model_type).name,
        model_type=text.model_type, **heads, hidden_size=text.hidden_size, full_layers=full,
        windows=windows, fixed_layers=len(kinds) - full - len(windows), **counts,
        experts=_first(text, _EXPERTS) if counts["expert_parameters"] else 0,
        chosen=_first(text, _CHOSEN) if counts["expert_parameters"] else 0, dtype=dtype,
        weight_bits=weight_bits or quantised or 8 * _BYTES[dtype], positions=max_positions(config),
    )  # fmt: skip


def _count(config: Any, width: int) -> dict[str, int]:
    """Parameters of the causal language model of a text configuration, tied ones once.

    ShapeError if none can be built. UnsupportedModelError for a family that cannot be attached, and
    where a layer caches keys of another width than `width` numbers a token, or those of another
    layer: such a cache would be counted wrongly.
    """
    import torch
    from transformers import AutoModelForCausalLM

    plain = copy.deepcopy(config)
    if getattr(plain, "quantization_config", None) is not None:
        del plain.quantization_config  # counted by _stored_bits; its kernels are not needed
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(plain, trust_remote_code=False)
    except Exception as problem:  # whatever a model class makes of impossible sizes
        raise ShapeError(
            f"no causal language model can be built from this {config.model_type} configuration: "
            f"{problem}"
        ) from problem
    if not attention_modules(model):
        raise UnsupportedModelError(
            f"{config.model_type} computes attention outside transformers' AttentionInterface, so "
            "it cannot be made sparse; use a family that goes through it (Llama, Mistral, Qwen ...)"
        )
    projections = (m for name, m in model.named_modules() if name.endswith(".k_proj"))
    others = {getattr(module, "out_features", width) for module in projections} - {width}
    if others or getattr(config, "num_kv_shared_layers", None):
        raise UnsupportedModelError(
            f"{config.model_type} has layers with KV heads of several sizes, or that share a "
            "cache: its memory is not counted here"
        )
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    kept = {id(p) for module in ends if module is not None for p in module.parameters()}
    parameters = dict(model.named_parameters())
    return {
        "parameters": sum(p.numel() for p in parameters.values()),
        "kept_parameters": sum(
            p.numel() for p in parameters.values() if id(p) in kept or p.dim() < 2
        ),
        "expert_parameters": sum(p.numel() for n, p in parameters.items() if _ROUTED.search(n)),
    }


def _stored_bits(config: Any) -> tuple[float | None, bool]:
    """(bits of a quantised weight, whether experts alone are quantised); (None, False) for a model
    that is not quantised. Scales are left out, 0.1 to 0.3 bits with groups of 128 and 64."""
    record = getattr(config, "quantization_config", None)
    if record is None:
        return None, False
    record = record if isinstance(record, Mapping) else record.to_dict()
    method = str(getattr(record.get("quant_method"), "value", record.get("quant_method")))
    bits = record.get("bits", record.get("w_bit", _METHOD_BITS.get(method)))
    if bits is None and method == "bitsandbytes":
        bits = 4 if record.get("load_in_4bit") else 8 if record.get("load_in_8bit") else None
    if bits is None:
        raise ShapeError(
            f"the configuration's quantisation {method!r} does not say how many bits a weight has: "
            "give them (--weight-bits 4)"
        )
    return float(bits), method == "mxfp4"


def _first(config: Any, names: tuple[str, ...]) -> int:
    """The first of some fields that a configuration has; ShapeError without one."""
    for name in names:
        if isinstance(value := getattr(config, name, None), int) and value > 0:
            return value
    raise ShapeError(
        f"{config.model_type} has experts, and its configuration none of {', '.join(names)}: what "
        "a step reads cannot be told"
    )
