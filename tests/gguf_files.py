"""Small random models as GGUF files, written with the package gguf."""

from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, HEADS, KV_HEADS, LAYERS, INNER = 64, 4, 2, 2, 96


def write_gguf(
    path: Path, quantization: str = "Q8_0", tied: bool = True, architecture: str = "llama",
    seed: int = 0,
) -> Path:  # fmt: skip
    """A two-layer model with a byte-level vocabulary; matrices in `quantization`, norms float32."""
    tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "ab"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("small")
    writer.add_license("apache-2.0")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    generator = torch.Generator().manual_seed(seed)
    kind = gguf.GGMLQuantizationType[quantization]

    def add(name: str, *shape: int) -> None:
        weight = (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).numpy()
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
        elif quantization in ("F32", "F16"):
            writer.add_tensor(
                name, weight.astype({"F32": "float32", "F16": "float16"}[quantization])
            )
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), HIDDEN)
    if not tied:
        add("output.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    width = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        for name, *shape in (
            ("attn_q", HIDDEN, HIDDEN), ("attn_k", width, HIDDEN), ("attn_v", width, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN), ("ffn_gate", INNER, HIDDEN), ("ffn_up", INNER, HIDDEN),
            ("ffn_down", HIDDEN, INNER), ("attn_norm", HIDDEN), ("ffn_norm", HIDDEN),
        ):  # fmt: skip
            add(f"blk.{layer}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
