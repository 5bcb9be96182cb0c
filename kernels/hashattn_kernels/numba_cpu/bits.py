"""Bits for numba: popcount, trailing zeros, and 64 comparisons at a time as the bits of a word."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .simd import pointer_to, shuffle

TOGETHER = 64  # elements of a comparison


@intrinsic
def popcount(typing, word):
    """Ones in a uint32 or uint64."""

    def code(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return word(word), code


@intrinsic
def trailing_zeros(typing, word):
    """Position of the lowest one of a uint64 that is not 0."""

    def code(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), code


def _compare(operator: str):
    @intrinsic
    def comparison(typing, levels, index, threshold):
        """uint64 whose bit i says how levels[index + i] compares with the threshold."""

        def code(context, builder, signature, arguments):
            array_type = signature.args[0]
            element = context.get_data_type(array_type.dtype)
            stored = ir.VectorType(element, TOGETHER)
            pointer = pointer_to(context, builder, array_type, *arguments[:2])
            compared = builder.load(
                builder.bitcast(pointer, ir.PointerType(stored)),
                align=array_type.dtype.bitwidth // 8,
                typ=stored,
            )
            undefined = ir.Constant(stored, ir.Undefined)
            number = builder.trunc(arguments[2], element)
            first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
            limits = shuffle(builder, first, undefined, [0] * TOGETHER)
            mask = builder.icmp_unsigned(operator, compared, limits)
            return builder.bitcast(mask, ir.IntType(64))

        return types.uint64(levels, types.intp, types.int64), code

    return comparison


below, at_most, equal = _compare("<"), _compare("<="), _compare("==")
