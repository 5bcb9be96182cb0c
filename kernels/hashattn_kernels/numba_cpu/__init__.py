"""The CPU backend in numba: compiled at first use for this machine's processor, then kept on disk.

`backend` is what `api` calls. `attention` (with `passes`), `encoding`, `selection`, `sampling` and
`quantising` are the kernels, `step` is a decode step in one call, `verified` its lists that grow by
a rule (with `error_bars`), `rows` the hot set's places and reads, `regions` runs them on all cores,
`compiled` keeps their code, `static` is what is compiled in, `simd` and `bits` are vectors and
words. Hamming scores as such and unions of lists are numpy's and torch's. `roofline` reads memory
as fast as this machine can.
"""

from ..numpy_cpu import hamming_scores, union
from .backend import (
    attend,
    attend_rows,
    decode_step,
    dense_decode,
    encode,
    encode_graded,
    encode_pair,
    grade_bits,
    quantise,
    sample,
    sample_by_codes,
    select,
    select_by_codes,
    supports,
    verified_step,
)

__all__ = [
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
    "sample",
    "sample_by_codes",
    "select",
    "select_by_codes",
    "supports",
    "union",
    "verified_step",
]
