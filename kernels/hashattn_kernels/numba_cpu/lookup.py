"""Scores of packed codes by table look-ups: 32 keys at a time, a shuffle of bytes for 4 bits.

The weights of four bits of a code are the 16 entries of a table that a vector register holds; a
byte shuffle looks 32 keys up in it (FastScan: Andre et al. 2015; NoMAD-Attention, 2024). So a key
costs two shuffles for eight of its bits, whatever the number of digits that their weights have.
"""

from __future__ import annotations

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from .simd import kernel, pointer_to, shuffle

TOGETHER = 32  # keys
ENTRIES = 16  # of a table
TABLES = 2 * ENTRIES  # entries for a byte of the code: those of its low and of its high half
MOST = 255  # an entry
_I8, _I16, _I32 = (ir.IntType(width) for width in (8, 16, 32))
_BYTES = ir.VectorType(_I8, TOGETHER)
_TABLE = ir.VectorType(_I8, ENTRIES)


def _instruction() -> tuple[str, int] | None:
    """The byte shuffle of this processor, by its name in LLVM, and the bytes it takes; None where
    code is made for another processor, or there is none: the entries are then read one by one."""
    if config.CPU_NAME or config.CPU_FEATURES:
        return None
    if llvmlite.binding.get_process_triple().split("-")[0] in ("aarch64", "arm64"):
        return "llvm.aarch64.neon.tbl1.v16i8", ENTRIES
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx2"):
        return "llvm.x86.avx2.pshuf.b", TOGETHER
    return ("llvm.x86.ssse3.pshuf.b.128", ENTRIES) if features.get("ssse3") else None


INSTRUCTION = _instruction()


def _splat(value: int) -> ir.Constant:
    return ir.Constant(_BYTES, [value] * TOGETHER)


def _looked_up(builder: ir.IRBuilder, table: ir.Value, places: ir.Value) -> ir.Value:
    """table[places], all bytes; places below ENTRIES."""
    undefined = ir.Constant(_BYTES, ir.Undefined)
    if INSTRUCTION is None:
        result = undefined
        for lane in range(TOGETHER):
            number = ir.Constant(_I32, lane)
            place = builder.zext(builder.extract_element(places, number), _I32)
            result = builder.insert_element(result, builder.extract_element(table, place), number)
        return result
    name, size = INSTRUCTION
    kind = ir.VectorType(_I8, size)
    call = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind, kind]), name)
    nothing = ir.Constant(_TABLE, ir.Undefined)
    if size == TOGETHER:
        twice = shuffle(builder, table, nothing, [i % ENTRIES for i in range(TOGETHER)])
        return builder.call(call, [twice, places])
    halves = [
        builder.call(call, [table, shuffle(builder, places, undefined, list(range(at, at + size)))])
        for at in range(0, TOGETHER, size)
    ]
    return shuffle(builder, *halves, list(range(TOGETHER)))


def _load(builder: ir.IRBuilder, pointer: ir.Value, kind: ir.VectorType) -> ir.Value:
    return builder.load(builder.bitcast(pointer, ir.PointerType(kind)), align=1, typ=kind)


def _score(groups: int):
    @intrinsic
    def score_groups(typing, keys, at, stride, planes, tables, levels, to):
        """levels[to : to + 32 groups] = sums over a code's bytes of the tables' entries.

        keys: uint8, byte p of key i at at + p * stride + i. tables: uint8, TABLES for each of
        `planes` bytes. levels: uint8 or uint16, which the sums must fit into.
        """

        def code(context, builder, signature, arguments):
            keys_type, _, _, _, tables_type, levels_type, _ = signature.args
            keys, at, stride, planes, tables, levels, to = arguments
            element = context.get_data_type(levels_type.dtype)
            sums = ir.VectorType(element, TOGETHER)
            nothing = ir.Constant(sums, [0] * TOGETHER)
            totals = [cgutils.alloca_once_value(builder, nothing) for _ in range(groups)]
            first = pointer_to(context, builder, keys_type, keys, at)
            table = pointer_to(context, builder, tables_type, tables, ir.Constant(at.type, 0))

            def offset(number):
                return ir.Constant(at.type, number)

            with cgutils.for_range(builder, planes) as loop:
                line = builder.gep(first, [builder.mul(loop.index, stride)])
                low = builder.gep(table, [builder.mul(loop.index, offset(TABLES))])
                high = _load(builder, builder.gep(low, [offset(ENTRIES)]), _TABLE)
                low = _load(builder, low, _TABLE)
                for group, total in enumerate(totals):
                    raw = _load(builder, builder.gep(line, [offset(TOGETHER * group)]), _BYTES)
                    halves = (
                        _looked_up(builder, low, builder.and_(raw, _splat(15))),
                        _looked_up(builder, high, builder.lshr(raw, _splat(4))),
                    )
                    added = builder.load(total)
                    for found in halves:
                        wide = found if element == _I8 else builder.zext(found, sums)
                        added = builder.add(added, wide)
                    builder.store(added, total)
            size = levels_type.dtype.bitwidth // 8
            for group, total in enumerate(totals):
                place = builder.add(to, offset(TOGETHER * group))
                target = pointer_to(context, builder, levels_type, levels, place)
                target = builder.bitcast(target, ir.PointerType(sums))
                builder.store(builder.load(total), target, align=size)
            return context.get_dummy_value()

        return types.void(
            keys, types.intp, types.intp, types.intp, tables, levels, types.intp
        ), code

    return score_groups


GROUPS = 4  # of 32 keys, whose sums registers hold: tables are loaded once for all of them
score_many, score_together = _score(GROUPS), _score(1)


@kernel
def score(keys, at, stride, planes, tables, levels, to, size):
    """`score_groups` for any `size` of keys."""
    done = size // (GROUPS * TOGETHER) * (GROUPS * TOGETHER)
    for i in range(0, done, GROUPS * TOGETHER):
        score_many(keys, at + i, stride, planes, tables, levels, to + i)
    whole = size // TOGETHER * TOGETHER
    for i in range(done, whole, TOGETHER):
        score_together(keys, at + i, stride, planes, tables, levels, to + i)
    for i in range(whole, size):
        total = 0
        for plane in range(planes):
            byte = keys[at + plane * stride + i]
            total += tables[TABLES * plane + (byte & 15)]
            total += tables[TABLES * plane + ENTRIES + (byte >> 4)]
        levels[to + i] = total


@kernel
def fill_tables(signs, weights, first, tables, at):
    """Tables of a word's four bytes in tables[at:]: the distance that each half byte adds.

    A key's bit that differs from the query's sign adds its weight, weights[first + bit].
    """
    for half in range(8):
        base = at + ENTRIES * half
        tables[base] = 0
        for j in range(4):
            if (signs >> np.uint32(4 * half + j)) & np.uint32(1):
                tables[base] += weights[first + 4 * half + j]
        for j in range(4):
            weight = np.int64(weights[first + 4 * half + j])
            if (signs >> np.uint32(4 * half + j)) & np.uint32(1):
                weight = -weight
            for value in range(1 << j):  # bit j added to what the bits below it make
                tables[base + (1 << j) + value] = tables[base + value] + weight
