"""Kernels of hash attention: encode, score, select tokens, attend to them.

`api` checks arguments and picks a backend; `reference` defines every result in plain torch;
`numba_cpu` is the fast path for tensors in main memory, `numpy_cpu` what runs there without numba,
`triton_gpu` the one for GPUs. All backends select the same tokens, bit for bit.
"""

from .api import (
    attend,
    causal_spans,
    dense_decode,
    encode,
    encode_pair,
    grade_bits,
    hamming_scores,
    pack_bits,
    preactivations,
    select,
    select_by_codes,
    unite,
    unpack_bits,
)
from .backends import available
from .codes import Codes, layout_for, tokens_of
from .maps import ACTIVATIONS, Maps
from .memory import Growing
from .reference import compact, gather_tokens, membership

__all__ = [
    "ACTIVATIONS",
    "Codes",
    "Growing",
    "Maps",
    "attend",
    "available",
    "causal_spans",
    "compact",
    "dense_decode",
    "encode",
    "encode_pair",
    "gather_tokens",
    "grade_bits",
    "hamming_scores",
    "layout_for",
    "membership",
    "pack_bits",
    "preactivations",
    "select",
    "select_by_codes",
    "tokens_of",
    "unite",
    "unpack_bits",
]
