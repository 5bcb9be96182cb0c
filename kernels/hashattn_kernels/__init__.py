"""Kernels of hash attention: encode, score, select tokens, attend to them.

`api` checks arguments and picks a backend; `reference` defines every result in plain torch;
`numba_cpu` is the fast path for tensors in main memory, `numpy_cpu` what runs there without numba,
`triton_gpu` the one for GPUs. All backends select the same tokens, bit for bit.
"""

from .api import (
    attend,
    attend_rows,
    causal_spans,
    dense_decode,
    encode,
    encode_graded,
    encode_pair,
    grade_bits,
    grade_step,
    hamming_scores,
    pack_bits,
    preactivations,
    quantise,
    room_for,
    sample,
    sample_by_codes,
    select,
    select_by_codes,
    union,
    unpack_bits,
)
from .backends import available
from .codes import Codes, layout_for, tokens_of
from .coins import NAT, Coins
from .counters import COUNTED, NOT_FINITE, SEVERAL, count_dense, new_counters
from .hot_set import HotSet, Placement, read_rows
from .maps import ACTIVATIONS, Maps
from .memory import GrowableBuffer
from .quantised import RowFormat, dequantise
from .reference import gather_tokens, indices_to_mask, mask_to_indices, merge
from .rule import LEAST_HEAVY, LOG_LIMIT, Rule
from .static import StaticStep, register_step, reserve_step, static_step
from .step import Drawing, Grades, decode_step, units_of, verified_step

__all__ = [
    "ACTIVATIONS",
    "COUNTED",
    "LEAST_HEAVY",
    "LOG_LIMIT",
    "NAT",
    "NOT_FINITE",
    "SEVERAL",
    "Codes",
    "Coins",
    "Drawing",
    "Grades",
    "GrowableBuffer",
    "HotSet",
    "Maps",
    "Placement",
    "RowFormat",
    "Rule",
    "StaticStep",
    "attend",
    "attend_rows",
    "available",
    "causal_spans",
    "count_dense",
    "decode_step",
    "dense_decode",
    "dequantise",
    "encode",
    "encode_graded",
    "encode_pair",
    "gather_tokens",
    "grade_bits",
    "grade_step",
    "hamming_scores",
    "indices_to_mask",
    "layout_for",
    "mask_to_indices",
    "merge",
    "new_counters",
    "pack_bits",
    "preactivations",
    "quantise",
    "read_rows",
    "register_step",
    "reserve_step",
    "room_for",
    "sample",
    "sample_by_codes",
    "select",
    "select_by_codes",
    "static_step",
    "tokens_of",
    "union",
    "units_of",
    "unpack_bits",
    "verified_step",
]
