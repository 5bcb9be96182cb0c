"""The CPU backend in numba: compiled at first use for the processor at hand, then kept on disk.

`backend` is what `api` calls. `simd` holds vectors and bits, `static` what is compiled into a
kernel, `attention`, `encoding` and `selection` the kernels, `threads` their division among cores.
Scores that are asked for as such and unions of lists are numpy's and torch's.
"""

from ..numpy_cpu import hamming_scores, union
from .backend import (
    attend,
    dense_decode,
    encode,
    encode_pair,
    grade_bits,
    select,
    select_by_codes,
    supports,
)

__all__ = [
    "attend",
    "dense_decode",
    "encode",
    "encode_pair",
    "grade_bits",
    "hamming_scores",
    "select",
    "select_by_codes",
    "supports",
    "union",
]
