"""What is part of an attention kernel's type: compiled in, so that loops over it unroll."""

import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic, models, overload_attribute, register_model

FIELDS = ("dim", "value_dim", "block", "heads", "walking", "states", "queries")

# bytes of a block's K rows, measured: a walk keeps this block and the next in the L1 cache with V;
# scattered rows are asked for a block ahead and wait in L2, the longer the better
WALKING_BYTES, SCATTERED_BYTES = 4096, 8192
SHORTEST, LONGEST = 8, 64  # tokens of a block, a multiple of 8

# numba knows no 16-bit floats: an integer type stands for each of them (see simd.load)
STORAGE = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16}


class StaticType(types.Type):
    """A type that carries a kernel's shape.

    dim, value_dim: elements of a K and a V row, multiples of 16. block: tokens at a time. heads:
    query heads of one pass over a block, 4 or 1. walking: 1 where the rows of a list follow each
    other in memory, else 0. states, queries: element types of K and V, and of Q and the output.
    """

    def __init__(self, *values) -> None:
        for field, value in zip(FIELDS, values, strict=True):
            setattr(self, field, value)
        super().__init__(name=f"Static{values}")


register_model(StaticType)(models.OpaqueModel)


@intrinsic
def static_of(typing, dim, value_dim, block, heads, walking, states, queries):
    """The value of a StaticType, from constants."""
    literals = (dim, value_dim, block, heads, walking)
    if not all(isinstance(value, types.IntegerLiteral) for value in literals):
        return None  # numba asks again with literals
    made = StaticType(*(value.literal_value for value in literals), states.dtype, queries.dtype)

    def code(context, builder, signature, arguments):
        return context.get_dummy_value()

    return made(*literals, states, queries), code


def _attribute(field: str):
    def resolve(static):
        value = getattr(static, field)
        return lambda static: value

    return resolve


for _field in FIELDS[:5]:
    overload_attribute(StaticType, _field)(_attribute(_field))


def block_of(dim: int, value_dim: int, itemsize: int, walking: bool) -> int:
    """Tokens of a block of rows of this size."""
    size = WALKING_BYTES if walking else SCATTERED_BYTES
    rows = size // (max(dim, value_dim) * itemsize) // 8 * 8
    return min(max(rows, SHORTEST), LONGEST)
