"""Bits for numba: popcount, trailing zeros, and 64 comparisons at a time as the bits of a word."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
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
    """Position of the lowest one of a uint64; 64 of 0."""

    def code(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

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


@intrinsic
def reached(typing, levels, at, coins, place, whole, farthest, unit, less, more, cap):
    """uint64 whose bit i says whether coins[place + i] is at least the cost of levels[at + i].

    The cost is that of the levels above `whole`, as if at most `farthest`, times unit, less `less`
    or 0, and `more`, but at most cap: all of them, and every product, below 2^16.
    """

    def code(context, builder, signature, arguments):
        levels_type, _, coins_type = signature.args[:3]
        levels, at, coins, place, whole, farthest, unit, less, more, cap = arguments
        level, word = context.get_data_type(levels_type.dtype), ir.IntType(16)
        of_levels, of_words = ir.VectorType(level, TOGETHER), ir.VectorType(word, TOGETHER)

        def load(array_type, array, index, kind):
            pointer = pointer_to(context, builder, array_type, array, index)
            pointer = builder.bitcast(pointer, ir.PointerType(kind))
            return builder.load(pointer, align=array_type.dtype.bitwidth // 8, typ=kind)

        def splat(number, kind):
            undefined = ir.Constant(kind, ir.Undefined)
            number = builder.trunc(number, kind.element)
            first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
            return shuffle(builder, first, undefined, [0] * TOGETHER)

        def call(name, a, b):
            name = f"llvm.{name}.v{TOGETHER}i{a.type.element.width}"
            kind = ir.FunctionType(a.type, [a.type, a.type])
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b])

        def least(a, b):
            return builder.select(builder.icmp_unsigned("<", a, b), a, b)

        beyond = call("usub.sat", load(levels_type, levels, at, of_levels), splat(whole, of_levels))
        beyond = least(beyond, splat(farthest, of_levels))
        beyond = beyond if level == word else builder.zext(beyond, of_words)
        cost = call("usub.sat", builder.mul(beyond, splat(unit, of_words)), splat(less, of_words))
        cost = least(call("uadd.sat", cost, splat(more, of_words)), splat(cap, of_words))
        mask = builder.icmp_unsigned(">=", load(coins_type, coins, place, of_words), cost)
        return builder.bitcast(mask, ir.IntType(64))

    number = types.int64
    return types.uint64(
        levels, types.intp, coins, types.intp, number, number, number, number, number, number
    ), code
