"""Kernels of hash attention: pack codes, score them, select tokens, attend to them.

`api` checks shapes and picks a backend; `reference` defines every result in plain torch; `cpu`
is the fast path for tensors in main memory. All backends select the same tokens, bit for bit.
"""

from .api import (
    attend,
    dense_decode,
    hamming_scores,
    pack_bits,
    select,
    unpack_bits,
)

__all__ = ["attend", "dense_decode", "hamming_scores", "pack_bits", "select", "unpack_bits"]
