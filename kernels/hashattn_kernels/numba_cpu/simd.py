"""Vectors of eight floats for numba, arrays at addresses, and prefetching.

LLVM's own vector types and intrinsics, no instruction names: the same source becomes AVX-512, AVX2
or NEON. Keys and values stay in their storage type until a load widens them: bfloat16 passes as
uint16 and float16 as int16, two types numba can tell apart.
"""

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model
from numba.np.arrayobj import populate_array

from ..quantised import CURVE
from .compiled import compiled

LANES = 8
_I8, _I16, _I32, _I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
_F16, _F32 = ir.HalfType(), ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)

# no reference counts: the arrays are the caller's, and counting them costs more than a small block
kernel = compiled(njit, nogil=True, _nrt=False, error_model="numpy", boundscheck=False)


class Float32x8(types.Type):
    """The numba type of a vector."""

    def __init__(self) -> None:
        super().__init__(name="Float32x8")


vector = Float32x8()


@register_model(Float32x8)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, numba_type) -> None:
        super().__init__(manager, numba_type, _VECTOR)


def _hardware_halves() -> bool:
    """Whether this processor widens float16 by one instruction; others do it by arithmetic."""
    if llvmlite.binding.get_process_triple().split("-")[0] in ("aarch64", "arm64"):
        return True
    return llvmlite.binding.get_host_cpu_features().get("f16c", False)


HARDWARE_HALVES = _hardware_halves()


def _constant(value: float, element: ir.Type = _F32) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, LANES), [value] * LANES)


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list) -> ir.Value:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments)


def _widen(builder: ir.IRBuilder, raw: ir.Value, storage: types.Type) -> ir.Value:
    """Vector of storage elements -> vector of float32, exactly."""
    if storage == types.float32:
        return raw
    wide = ir.VectorType(_I32, LANES)
    if storage == types.int8:
        return builder.sitofp(raw, _VECTOR)
    if storage == types.uint16:  # bfloat16 is the upper half of a float32
        bits = builder.shl(builder.zext(raw, wide), _constant(16, _I32))
        return builder.bitcast(bits, _VECTOR)
    if HARDWARE_HALVES:
        return builder.fpext(builder.bitcast(raw, ir.VectorType(_F16, LANES)), _VECTOR)
    # float16: move the fields into place, then multiply by 2**112 to move the exponent's bias;
    # exact for subnormals too. The highest exponent, of infinities and NaN, stays the highest.
    bits = builder.zext(raw, wide)
    magnitude = builder.shl(builder.and_(bits, _constant(0x7FFF, _I32)), _constant(13, _I32))
    scaled = builder.fmul(builder.bitcast(magnitude, _VECTOR), _constant(2.0**112))
    sign = builder.shl(builder.and_(bits, _constant(0x8000, _I32)), _constant(16, _I32))
    highest = _constant(0x7C00, _I32)
    special = builder.icmp_signed("==", builder.and_(bits, highest), highest)
    exponent = builder.select(special, _constant(0x7F800000, _I32), _constant(0, _I32))
    fields = builder.or_(builder.or_(builder.bitcast(scaled, wide), sign), exponent)
    return builder.bitcast(fields, _VECTOR)


def pointer_to(context, builder, array_type, array, index) -> ir.Value:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _array_at(context, builder, array_type: types.Array, address: ir.Value, size: ir.Value):
    array = context.make_array(array_type)(context, builder)
    kind = array_type.dtype
    size_of_one = kind.size if isinstance(kind, types.Record) else kind.bitwidth // 8
    itemsize = ir.Constant(_I64, size_of_one)
    populate_array(
        array,
        data=builder.inttoptr(address, array.data.type),
        shape=[size],
        strides=[itemsize],
        itemsize=itemsize,
        meminfo=None,
    )
    return array._getvalue()


@intrinsic
def at_address(typing, address, size, dtype):
    """The array of `size` elements at an address, such as a tensor's data_ptr()."""
    array_type = types.Array(dtype.dtype, 1, "C")

    def code(context, builder, signature, arguments):
        return _array_at(context, builder, array_type, *arguments[:2])

    return array_type(types.intp, types.intp, dtype), code


@intrinsic
def states_at(typing, static, address, size):
    """The same for keys or values, whose element type `static` knows."""
    array_type = types.Array(static.states, 1, "C")

    def code(context, builder, signature, arguments):
        return _array_at(context, builder, array_type, *arguments[1:])

    return array_type(static, types.intp, types.intp), code


@intrinsic
def queries_at(typing, static, address, size):
    """The same for queries and outputs."""
    array_type = types.Array(static.queries, 1, "C")

    def code(context, builder, signature, arguments):
        return _array_at(context, builder, array_type, *arguments[1:])

    return array_type(static, types.intp, types.intp), code


@intrinsic
def load(typing, array, index):
    """array[index : index + 8] as float32."""

    def code(context, builder, signature, arguments):
        return _load(context, builder, signature.args[0], *arguments)

    return vector(array, types.intp), code


def _load(context, builder, array_type: types.Array, array: ir.Value, index: ir.Value) -> ir.Value:
    pointer = pointer_to(context, builder, array_type, array, index)
    stored = ir.VectorType(context.get_data_type(array_type.dtype), LANES)
    raw = builder.load(
        builder.bitcast(pointer, ir.PointerType(stored)),
        align=array_type.dtype.bitwidth // 8,
        typ=stored,
    )
    return _widen(builder, raw, array_type.dtype)


@intrinsic
def load_state(typing, array, row, d):
    """Elements d to d + 8 of the row that starts at array[row], as float32; scaled rows without
    their scale."""
    if array.dtype != types.uint8:

        def code(context, builder, signature, arguments):
            at = builder.add(arguments[1], arguments[2])
            return _load(context, builder, array, arguments[0], at)

    else:

        def code(context, builder, signature, arguments):
            # 16 codes in 8 bytes: the first eight in their low halves (see quantised.py)
            row, d = arguments[1:]
            pair = builder.lshr(d, ir.Constant(_I64, 4))
            at = builder.add(row, builder.shl(pair, ir.Constant(_I64, 3)))
            pointer = pointer_to(context, builder, array, arguments[0], at)
            stored = ir.VectorType(_I8, LANES)
            raw = builder.load(
                builder.bitcast(pointer, ir.PointerType(stored)), align=1, typ=stored
            )
            second = builder.icmp_signed(
                "!=", builder.and_(d, ir.Constant(_I64, 8)), ir.Constant(_I64, 0)
            )
            wide = ir.VectorType(_I32, LANES)
            raw = builder.zext(raw, wide)
            raw = builder.select(second, builder.lshr(raw, _constant(4, _I32)), raw)
            number = builder.uitofp(builder.and_(raw, _constant(15, _I32)), _VECTOR)
            x = _fma(builder, number, _constant(1 / 8), _constant(-15 / 16))
            return builder.fmul(x, _fma(builder, x, x, _constant(CURVE)))

    return vector(array, types.intp, types.intp), code


@intrinsic
def scale_at(typing, array, index):
    """The bfloat16 whose bytes begin at element `index` of an array, as float32."""

    def code(context, builder, signature, arguments):
        pointer = pointer_to(context, builder, signature.args[0], *arguments)
        raw = builder.load(builder.bitcast(pointer, ir.PointerType(_I16)), align=1, typ=_I16)
        bits = builder.shl(builder.zext(raw, _I32), ir.Constant(_I32, 16))
        return builder.bitcast(bits, _F32)

    return types.float32(array, types.intp), code


def _narrow(builder: ir.IRBuilder, value: ir.Value, storage: types.Type) -> ir.Value:
    """Vector of float32 -> vector of storage elements, rounded to nearest even."""
    if storage == types.float32:
        return value
    narrow = ir.VectorType(_I16, LANES)
    if storage == types.int16:
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(_F16, LANES)), narrow)
    bits = builder.bitcast(value, ir.VectorType(_I32, LANES))
    last_bit = builder.and_(builder.lshr(bits, _constant(16, _I32)), _constant(1, _I32))
    rounded = builder.add(builder.add(bits, _constant(0x7FFF, _I32)), last_bit)
    # the addition could carry and make a number of a NaN
    number = builder.fcmp_ordered("ord", value, value)
    rounded = builder.select(number, rounded, _constant(0x7FC00000, _I32))
    return builder.trunc(builder.lshr(rounded, _constant(16, _I32)), narrow)


@intrinsic
def store(typing, array, index, value):
    """array[index : index + 8] = value, rounded to the array's type."""

    def code(context, builder, signature, arguments):
        array_type = signature.args[0]
        pointer = pointer_to(context, builder, array_type, *arguments[:2])
        raw = _narrow(builder, arguments[2], array_type.dtype)
        target = builder.bitcast(pointer, ir.PointerType(raw.type))
        builder.store(raw, target, align=array_type.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), code


@intrinsic
def splat(typing, number):
    """A vector that holds `number` eight times."""

    def code(context, builder, signature, arguments):
        return _splat(builder, arguments[0])

    return vector(types.float32), code


def _splat(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(_I32, 0))
    return shuffle(builder, first, undefined, [0] * LANES)


def shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
    mask = ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)
    return builder.shuffle_vector(a, b, mask)


def _binary(emit):
    @intrinsic
    def operation(typing, a, b):
        def code(context, builder, signature, arguments):
            return emit(builder, *arguments)

        return vector(vector, vector), code

    return operation


add = _binary(lambda builder, a, b: builder.fadd(a, b))
subtract = _binary(lambda builder, a, b: builder.fsub(a, b))
multiply = _binary(lambda builder, a, b: builder.fmul(a, b))
divide = _binary(lambda builder, a, b: builder.fdiv(a, b))
# b where either is NaN: one instruction on x86, while llvm.maxnum, which drops NaN, takes three
larger = _binary(lambda builder, a, b: _choose(builder, ">", a, b))
smaller = _binary(lambda builder, a, b: _choose(builder, "<", a, b))


# 1 where a > b, else 0
above = _binary(lambda builder, a, b: builder.uitofp(builder.fcmp_ordered(">", a, b), _VECTOR))


def _choose(builder: ir.IRBuilder, relation: str, a: ir.Value, b: ir.Value) -> ir.Value:
    """a where `a relation b` holds, else b."""
    return builder.select(builder.fcmp_ordered(relation, a, b), a, b)


@intrinsic
def fma(typing, a, b, c):
    """a * b + c, in one rounding where the processor can."""

    def code(context, builder, signature, arguments):
        return _fma(builder, *arguments)

    return vector(vector, vector, vector), code


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return _call(builder, "llvm.fmuladd.v8f32", _VECTOR, [a, b, c])


@intrinsic
def sums(typing, a, b, c, d, e, f, g, h):
    """A vector of the eight vectors' sums: lane i sums the i-th argument."""

    def code(context, builder, signature, arguments):
        level = list(arguments)
        for step in (1, 2, 4):  # lanes i and i ^ step of each pair are added and interleaved
            low = [i if not i & step else i - step + LANES for i in range(LANES)]
            high = [i + step if not i & step else i + LANES for i in range(LANES)]
            level = [
                builder.fadd(shuffle(builder, x, y, low), shuffle(builder, x, y, high))
                for x, y in zip(level[::2], level[1::2], strict=True)
            ]
        return level[0]

    return vector(*[vector] * 8), code


def _swap(distance: int):
    @intrinsic
    def operation(typing, a):
        """The vector with lanes i and i ^ distance exchanged."""

        def code(context, builder, signature, arguments):
            undefined = ir.Constant(_VECTOR, ir.Undefined)
            return shuffle(builder, arguments[0], undefined, [i ^ distance for i in range(LANES)])

        return vector(vector), code

    return operation


swap_1, swap_2, swap_4 = _swap(1), _swap(2), _swap(4)


@intrinsic
def power_of_two(typing, exponent):
    """2 ** exponent of whole numbers between -126 and 127, 0 of -127, infinity of 128.

    Of NaN any number: what its conversion to an integer gives depends on the processor.
    """

    def code(context, builder, signature, arguments):
        wide = ir.VectorType(_I32, LANES)
        whole = builder.fptosi(arguments[0], wide)
        biased = builder.add(whole, _constant(127, _I32))
        return builder.bitcast(builder.shl(biased, _constant(23, _I32)), _VECTOR)

    return vector(vector), code


@intrinsic
def nearest(typing, a):
    """Each lane rounded to a whole number."""

    def code(context, builder, signature, arguments):
        return _call(builder, "llvm.rint.v8f32", _VECTOR, list(arguments))

    return vector(vector), code


@intrinsic
def positive(typing, a):
    """uint32 whose bit i says that lane i is greater than 0."""

    def code(context, builder, signature, arguments):
        above = builder.fcmp_ordered(">", arguments[0], _constant(0.0))
        return builder.zext(builder.bitcast(above, _I8), _I32)

    return types.uint32(vector), code


@kernel
def exp(x):
    """e ** x to 2e-7 relative; 0 below e ** -87.7, infinity above e ** 88.4, NaN of NaN.

    x log2(e) is split into a whole number and a rest in [-1/2, 1/2], log2(e) into two floats so
    that the rest is exact. 2 ** rest is its Taylor series to the seventh order (remainder below
    6e-9).
    """
    x = smaller(splat(np.float32(88.5)), larger(splat(np.float32(-88.0)), x))  # NaN stays NaN
    high, low = splat(np.float32(1.44269502)), splat(np.float32(1.92596303e-8))
    whole = nearest(multiply(x, high))
    rest = fma(x, low, fma(x, high, subtract(splat(np.float32(0)), whole)))
    p = splat(np.float32(1.5252733804059841e-5))
    p = fma(p, rest, splat(np.float32(1.5403530393381609e-4)))
    p = fma(p, rest, splat(np.float32(1.3333558146428443e-3)))
    p = fma(p, rest, splat(np.float32(9.6181291076284772e-3)))
    p = fma(p, rest, splat(np.float32(5.5504108664821580e-2)))
    p = fma(p, rest, splat(np.float32(2.4022650695910072e-1)))
    p = fma(p, rest, splat(np.float32(6.9314718055994531e-1)))
    p = fma(p, rest, splat(np.float32(1.0)))
    return multiply(p, power_of_two(whole))


@intrinsic
def prefetch(typing, static, states, row, position, seen):
    """Bring 32 elements of the row that starts at states[row], from `position` on, into the caches;
    returns the new `seen`.

    Contiguous rows are really read, and folded into `seen` so that the reads are not optimised
    away; others get prefetch instructions.
    """

    def code(context, builder, signature, arguments):
        array_type = signature.args[1]
        size, row, position = array_type.dtype.bitwidth // 8, *arguments[2:4]
        if array_type.dtype == types.uint8:  # two elements a byte
            position = builder.lshr(position, ir.Constant(_I64, 1))
        index = builder.add(row, position)
        if static.contiguous:
            # a read stays inside the array; at most 16 elements are another row's
            array = context.make_array(array_type)(context, builder, arguments[1])
            last = builder.sub(array.nitems, ir.Constant(_I64, 32))
            index = builder.select(builder.icmp_signed("<", index, last), index, last)
        start = pointer_to(context, builder, array_type, arguments[1], index)
        wide, step = ir.VectorType(_I32, LANES), 32 if static.contiguous else 64
        seen = builder.bitcast(arguments[4], wide)
        for offset in range(0, 32 * size, step):
            at = builder.gep(start, [ir.Constant(_I64, offset // size)])
            if static.contiguous:
                words = builder.load(
                    builder.bitcast(at, ir.PointerType(wide)), align=size, typ=wide
                )
                seen = builder.or_(seen, words)
            else:
                byte = builder.bitcast(at, ir.PointerType(_I8))
                read, level, data = (ir.Constant(_I32, value) for value in (0, 2, 1))
                _call(builder, "llvm.prefetch.p0", ir.VoidType(), [byte, read, level, data])
        return builder.bitcast(seen, _VECTOR)

    return vector(static, states, types.intp, types.intp, vector), code
