"""The kernels (see kernels/hashattn_kernels)."""

from hashattn_kernels import (
    attend,
    dense_decode,
    hamming_scores,
    pack_bits,
    select,
    unpack_bits,
)

__all__ = ["attend", "dense_decode", "hamming_scores", "pack_bits", "select", "unpack_bits"]
