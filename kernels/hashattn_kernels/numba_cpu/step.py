"""A layer's decode step in one region: every thread encodes, selects and attends for its lists.

A list needs nothing of another one, as the newest token is always read: its code, which a list of
its head writes, is for later steps. So no thread waits for another between the stages.
"""

import math
from functools import cache

import numpy as np
import torch

from ..coins import BLOCK, DEAREST, LARGEST, NAT, SIZE
from .attention import attend_tokens, begin, finish
from .encoding import grading_room, pack, run_map, sum_group
from .lookup import TABLES
from .passes import SCRATCH
from .regions import Region, address_of, call_type, report, share_of
from .sampling import drawing_room, sample_list
from .selection import BYTES, WORD, grade, select_list, weigh_bits
from .simd import LANES, at_address, fma, kernel, load, queries_at, splat, states_at, store
from .static import STORAGE, block_of, static_of
from .verified import read_growing

ANY = 1 << 60  # elements of an array whose size nobody asks for
CALL = call_type(
    "batch", "lists", "rows", "group", "lists_per_kv_head", "lists_per_code_head", "code_heads",
    "widest", "stages", "widths", "activation", "folds", "map_weights", "map_biases", "weights",
    "biases", "key_stages", "key_widths", "key_activation", "key_folds", "key_map_weights",
    "key_map_biases", "key_weights", "key_biases", "grades", "most", "words", "coins", "chances",
    "logarithms", "grading_size", "work_size",
    "memory", "memory_size", "verifying", "width", "tokens", "sink", "local",
    "q", "q_batch", "q_head", "k", "k_batch", "k_head", "k_token",
    "v", "v_start", "v_batch", "v_head", "v_token",
    "codes", "codes_batch", "codes_head", "key_byte", "heavy", "heavy_batch", "heavy_list", "spans",
    "indices", "out", "log_weights", "slopes", "drawn", "drawn_batch", "drawn_list", "trust",
    "state", "first_list", "fresh", "rule", "rule_levels", "start", "reached", "lengths",
    real=("scale", "softcap", "limit"),
)  # fmt: skip


@kernel
def encode_key(call, item, head, x, weights, biases, widths, here, there, codes, word):
    """Encode the newest key of a code head and write the bytes of its code. word: room for it."""
    share = call.code_heads // (call.lists // call.lists_per_kv_head)
    at = item * call.k_batch + head // share * call.k_head + (call.tokens - 1) * call.k_token
    run_map(
        x, at, widths[0], call.key_stages, widths, call.key_activation, call.key_folds, weights,
        head * call.key_map_weights, biases, head * call.key_map_biases, here, there,
    )  # fmt: skip
    pack(here, call.words, word, 0)
    to = item * call.codes_batch + head * call.codes_head + call.tokens - 1
    for part in range(BYTES * call.words):
        shift = np.uint32(8 * (part % BYTES))
        codes[to + part * call.key_byte] = np.uint8((word[part // BYTES] >> shift) & np.uint32(255))


@kernel
def flawed(static, call, item, kv_head, keys, values, room):
    """1 if a head's newest key or value holds NaN or infinite numbers: zero times them is NaN."""
    token, zero = call.tokens - 1, splat(np.float32(0))
    total = zero
    key = item * call.k_batch + kv_head * call.k_head + token * call.k_token
    for d in range(0, static.dim, 8):
        total = fma(load(keys, key + d), zero, total)
    value = call.v_start + item * call.v_batch + kv_head * call.v_head + token * call.v_token
    for d in range(0, static.value_dim, 8):
        total = fma(load(values, value + d), zero, total)
    store(room, 0, total)
    count = 0
    for lane in range(LANES):
        count += room[lane] != 0
    return np.int64(count > 0)


@kernel
def count_query(call, widths, x, at, head, weights, biases, here, there, codes, signs, counts):
    """Signs and weights of a group's codes, whose matching bits are counted. codes: room."""
    for member in range(call.group):
        number = head + member
        run_map(
            x, at + member * call.q_head, widths[0], call.stages, widths, call.activation,
            call.folds, weights, number * call.map_weights, biases, number * call.map_biases, here,
            there,
        )  # fmt: skip
        pack(here, call.words, codes, member * call.words)
    for word in range(call.words):
        weigh_bits(codes, word, call.words, call.group, signs[word:], counts[WORD * word :])


@kernel
def unit_of(step, slope):
    """step.units_of of one list."""
    units = np.rint(np.float32(NAT) * (np.float32(2) * step) * np.float32(slope))
    if units >= np.float32(DEAREST):
        return np.int64(DEAREST)
    return np.int64(units) if units >= np.float32(1) else np.int64(1)


@kernel
def read_once(
    static, call, unit, line, item, head, first, last, heavy, price, signs, weights, codes, base,
    tables, levels, highest, begins, counts, of_level, coins, chances, logarithms, indices,
    log_weights, memory, queries, q, scale, work, keys, key, values, value, softcap, scratch,
):  # fmt: skip
    """Choose a list's tokens and attend to them; returns how many they are. price: what a unit of
    distance costs, where some are drawn."""
    at = unit * call.width
    if call.log_weights != 0:
        by_coin = at_address(call.drawn, ANY, np.int64)[
            item * call.drawn_batch + line * call.drawn_list
        ]
        length = sample_list(
            call, signs, weights, line, first, last, heavy - by_coin, by_coin, price, codes, base,
            tables, levels, highest, begins, counts, of_level, coins, chances, logarithms, indices,
            log_weights, at,
        )  # fmt: skip
    else:
        length = select_list(call, signs, weights, first, last, heavy, codes, base, tables, levels,
                             indices, at)  # fmt: skip
    begin(static, call, queries, q, scale, work)
    if length > 0:
        attend_tokens(static, call, indices, log_weights, at, 0, length, work, keys, key, values,
                      value, softcap, scratch, None)  # fmt: skip
    return length


@kernel
def step_share(static, data, weight_type, kind, highest, grows):
    """The step of this thread's units, (batch, list), the last fastest.

    data: the address of a CALL, whose parts are those of the stages' calls. grows: None
    unless lists grow by a rule, a type, so that what is not called is not compiled. Reports how
    many newest keys and values are not finite.
    """
    call = at_address(address_of(data), 1, CALL)[0]
    number, start, stop = share_of(call.thread_number, call.number, call.threads, call.units)
    lists, group, words, width = call.lists, call.group, call.words, call.width
    batch, heads, bits = call.batch, call.lists * call.group, WORD * call.words
    queries = queries_at(static, call.q, ANY)
    keys = states_at(static, call.k, ANY)
    values = states_at(static, call.v, ANY)
    widths = at_address(call.widths, call.stages + 1, np.int64)
    weights = at_address(call.weights, heads * call.map_weights, weight_type)
    biases = at_address(call.biases, heads * call.map_biases, np.float32)
    key_widths = at_address(call.key_widths, call.key_stages + 1, np.int64)
    key_weights = at_address(call.key_weights, call.code_heads * call.key_map_weights, weight_type)
    key_biases = at_address(call.key_biases, call.code_heads * call.key_map_biases, np.float32)
    codes = at_address(call.codes, ANY, np.uint8)
    heavy = at_address(call.heavy, ANY, np.int64)
    spans = at_address(call.spans, 2 * batch, np.int64)
    indices = at_address(call.indices, batch * lists * width, np.int32)
    draws = call.log_weights != 0
    weighted = batch * lists * width if draws else 0  # attention looks whether there are any
    log_weights = at_address(call.log_weights, weighted, np.float32)
    slopes = at_address(call.slopes, lists, np.float32)
    coins = at_address(call.coins, SIZE + BLOCK, np.int16)
    chances = at_address(call.chances, LARGEST + 1, np.int64)
    logarithms = at_address(call.logarithms, LARGEST + 1, np.float32)
    out = queries_at(static, call.out, batch * heads * static.value_dim)
    memory = call.memory + number * call.memory_size
    scratch = at_address(memory, SCRATCH, np.int64)
    memory += 8 * SCRATCH
    here, there, sums, shares, signs, graded = grading_room(memory, call.widest, bits)
    memory += call.grading_size
    word = at_address(memory, group * words, np.uint32)
    memory += (4 * group * words + 63) // 64 * 64
    tables = at_address(memory, BYTES * words * TABLES, np.uint8)
    memory += BYTES * words * TABLES
    work = at_address(memory, call.work_size, np.float32)
    memory += 4 * call.work_size
    lse = at_address(memory, batch * heads, np.float32)  # of no use
    memory += (4 * batch * heads + 63) // 64 * 64
    begins, counts, of_level, levels = drawing_room(memory, call.tokens, call.most, kind)
    memory += call.verifying
    scale, softcap = np.float32(call.scale), np.float32(call.softcap)
    flaws = 0
    for unit in range(start, stop):
        line, item = unit % lists, unit // lists
        first, last = spans[2 * item], spans[2 * item + 1]
        code_head, head = line // call.lists_per_code_head, line * group
        if line % call.lists_per_code_head == 0:
            flaws += flawed(static, call, item, line // call.lists_per_kv_head, keys, values, here)
            encode_key(call, item, code_head, keys, key_weights, key_biases, key_widths, here,
                       there, codes, word)  # fmt: skip
        q = item * call.q_batch + head * call.q_head
        step = np.float32(0)
        if call.grades:
            sum_group(call, widths, queries, q, head, call.q_head, weights, biases, here, there,
                      sums)  # fmt: skip
            step = grade(sums, bits, call.grades, call.most, shares, signs, graded)
        else:
            count_query(call, widths, queries, q, head, weights, biases, here, there, word, signs,
                        graded)  # fmt: skip
        base = item * call.codes_batch + code_head * call.codes_head
        chosen = heavy[item * call.heavy_batch + line * call.heavy_list]
        kv_head = line // call.lists_per_kv_head
        key = item * call.k_batch + kv_head * call.k_head
        value = call.v_start + item * call.v_batch + kv_head * call.v_head
        price = unit_of(step, slopes[line]) if draws else np.int64(0)
        if grows is None:
            length = read_once(
                static, call, unit, line, item, head, first, last, chosen, price, signs, graded,
                codes, base, tables, levels, highest, begins, counts, of_level, coins, chances,
                logarithms, indices, log_weights, memory, queries, q, scale, work, keys, key,
                values, value, softcap, scratch,
            )  # fmt: skip
        else:
            length = read_growing(
                static, call, unit, line, item, head, first, last, chosen, price, signs, graded,
                codes, base, tables, levels, highest, begins, counts, of_level, coins, chances,
                logarithms, indices, log_weights, memory, queries, q, scale, work, keys, key,
                values, value, softcap, scratch,
            )  # fmt: skip
        unweighted = np.float32(math.nan) if length > 0 else np.float32(0)
        to = item * heads + head
        finish(static, call, work, unweighted, out, to * static.value_dim, lse, to)
    report(call.results, call.threads, number, flaws)


@cache
def step_region(
    dim: int, value_dim: int, heads: int, states: torch.dtype, queries: torch.dtype, half: bool,
    wide: bool, grows: bool,
) -> tuple[Region, int]:  # fmt: skip
    """The compiled region of these heads, dtypes, maps (half: weights in bfloat16), distances
    (wide: above 255) and lists (grows: by a rule), and the tokens of its block."""
    block = block_of(dim, value_dim, states.itemsize, contiguous=False)
    state_type, query_type = STORAGE[states], STORAGE[queries]
    weight_type = np.uint16 if half else np.float32
    kind = np.uint16 if wide else np.uint8
    highest = int(np.iinfo(kind).max)

    def reading_once(data):
        static = static_of(dim, value_dim, block, heads, 0, state_type, query_type)
        step_share(static, data, weight_type, kind, highest, None)

    def growing(data):
        static = static_of(dim, value_dim, block, heads, 0, state_type, query_type)
        step_share(static, data, weight_type, kind, highest, True)

    return Region(growing if grows else reading_once), block
