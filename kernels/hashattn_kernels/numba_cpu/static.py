"""The shape of an attention kernel, compiled in as a type so that loops over it unroll."""

import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic, models, overload_attribute, register_model

FIELDS = ("dim", "value_dim", "block", "heads", "contiguous", "states", "queries")

# bytes of a block's K rows, measured: of contiguous rows this block and the next fit into the L1
# cache with V; scattered rows are prefetched a block ahead into L2: longer blocks are better
CONTIGUOUS_BYTES, SCATTERED_BYTES = 4096, 8192
SHORTEST, LONGEST = 8, 64  # tokens of a block, a multiple of 8

# numba knows no 16-bit floats: an integer type stands for each of them (see simd.load)
STORAGE = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16}
# and one for the codes of quantised rows: bytes, and bytes that hold two codes of 4 bits
CODES = {torch.int8: np.int8, torch.uint8: np.uint8}


class StaticType(types.Type):
    """A type that carries a kernel's shape.

    dim, value_dim: elements of a K and a V row, multiples of 16. block: tokens at a time. heads:
    query heads of one pass over a block, 4 or 1. contiguous: 1 where a unit reads a span of tokens,
    whose rows follow each other, 0 for a list. states, queries: element types of K and V, and of Q
    and the output. scaled: whether K and V are codes, whose scales lie `codes` bytes behind the
    first of a row.
    """

    def __init__(self, *values) -> None:
        for field, value in zip(FIELDS, values, strict=True):
            setattr(self, field, value)
        self.scaled = self.states in (types.int8, types.uint8)
        self.codes = (self.dim + self.value_dim) // (2 if self.states == types.uint8 else 1)
        super().__init__(name=f"Static{values}")


register_model(StaticType)(models.OpaqueModel)


@intrinsic
def static_of(typing, dim, value_dim, block, heads, contiguous, states, queries):
    """The value of a StaticType, from constants."""
    literals = (dim, value_dim, block, heads, contiguous)
    if not all(isinstance(value, types.IntegerLiteral) for value in literals):
        return None  # numba calls again with literals
    static = StaticType(*(value.literal_value for value in literals), states.dtype, queries.dtype)

    def code(context, builder, signature, arguments):
        return context.get_dummy_value()

    return static(*literals, states, queries), code


def _attribute(field: str):
    def resolve(static):
        value = getattr(static, field)
        return lambda static: value

    return resolve


for _field in (*FIELDS[:5], "scaled", "codes"):
    overload_attribute(StaticType, _field)(_attribute(_field))


def block_of(dim: int, value_dim: int, itemsize: int, contiguous: bool) -> int:
    """Tokens of a block of rows of this size."""
    size = CONTIGUOUS_BYTES if contiguous else SCATTERED_BYTES
    rows = size // (max(dim, value_dim) * itemsize) // 8 * 8
    return min(max(rows, SHORTEST), LONGEST)
