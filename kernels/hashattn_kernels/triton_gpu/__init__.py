"""Triton kernels for NVIDIA GPUs of compute capability 8.0 and later.

`backend` has the functions that the API calls; `launch` launches the kernels of `encoding`,
`scoring`, `selection`, `sampling`, `unions` and `attention`, which decodes `rows`; `step` is a
decode step with preallocated memory, for CUDA graphs; `configs` has the shipped configurations,
which `gate` compiles without a GPU. Simple versions that explain the kernels, and with which tests
compare them, are in tests/kernels/gpu.
"""

from .backend import (
    COUNTS_STEPS,
    attend,
    attend_rows,
    decode_step,
    dense_decode,
    encode,
    encode_graded,
    encode_pair,
    grade_bits,
    hamming_scores,
    quantise,
    reserve_step,
    sample,
    sample_by_codes,
    select,
    select_by_codes,
    supports,
    union,
)

__all__ = [
    "COUNTS_STEPS",
    "attend",
    "attend_rows",
    "decode_step",
    "dense_decode",
    "encode",
    "encode_graded",
    "encode_pair",
    "grade_bits",
    "hamming_scores",
    "quantise",
    "reserve_step",
    "sample",
    "sample_by_codes",
    "select",
    "select_by_codes",
    "supports",
    "union",
]
