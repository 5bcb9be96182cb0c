"""Each fast kernel against its simple version, on a GPU or in the interpreter."""

import math
from functools import partial

import pytest
import simple_kernels as simple
import torch
from torch import Tensor

import kernel_inputs
from hashattn.kernels import grade_bits, select_by_codes, unpack_bits
from hashattn_kernels import reference
from hashattn_kernels.codes import LANES, TILE, Tiled
from hashattn_kernels.triton_gpu import backend, configs, launch
from hashattn_kernels.triton_gpu.self_test import self_test
from kernel_inputs import normal, normal_maps
from on_device import GPU

random_codes = partial(kernel_inputs.random_codes, device=GPU)


def listed(n: int, *lengths: int) -> Tensor:
    """Ascending lists (1, lists, 1, longest) of so many of n tokens."""
    generator = torch.Generator().manual_seed(n)
    rows = torch.full((1, len(lengths), 1, max(lengths)), -1, dtype=torch.int32)
    for row, length in enumerate(lengths):
        rows[0, row, 0, :length] = torch.randperm(n, generator=generator)[:length].sort().values
    return rows.to(GPU)


def test_instructions_count_and_shift_like_python():
    assert self_test(GPU) == []


def stored_levels(space: launch.SelectSpace) -> Tensor:
    """Levels (rows, tokens) as selection leaves them: a word has some of a column's."""
    pack = space.config.pack
    words = space.levels.unflatten(2, (-1, LANES // pack, 1, TILE // LANES))
    places = torch.arange(pack, device=words.device)[:, None] * (32 // pack)
    levels = (words >> places) & (2 ** (32 // pack) - 1)
    return levels.flatten(3, 4).transpose(3, 4).flatten(1)


@pytest.mark.parametrize(
    ("group", "words"),
    [(1, 1), (2, 1), (3, 2), (4, 1), (5, 4), (6, 8), (7, 1), (8, 2), (8, 4), (1, 8), (16, 8)],
)
def test_levels_are_counted_as_distances_are(group, words):
    """Stored levels, and the threshold that counting them digit by digit finds."""
    n, sink, local = 70, 3, 5
    queries = random_codes(1, group, 1, words)
    keys = random_codes(1, 1, n, words, seed=1)
    keys[:, :, 10:20], keys[:, :, 20:30] = queries[:, :1], ~queries[:, :1]
    spans = torch.tensor([[[2, 68]]], device=GPU)
    heavy = torch.tensor([[[9]]], device=GPU)
    space = launch.SelectSpace.reserve(1, n, group, words, GPU)
    indices = torch.empty(1, 1, 1, 20, dtype=torch.int32, device=GPU)
    tiled = Tiled.from_tokens(keys)
    launch.select(queries, tiled, heavy, spans, sink, local, indices, space)
    distances = simple.distances(queries, keys, 1)[0, 0]
    choosable = torch.tensor([[5, 63]], dtype=torch.int32, device=GPU)
    counts = simple.histogram(distances, choosable, 32 * words * group + 1)[0].tolist()
    # a distance is the least there can be plus a step for each level: see scoring
    ones = unpack_bits(queries[0, :, 0], 32 * words).sum(0)
    least, step = int(torch.minimum(ones, group - ones).sum()), 2 - group % 2
    stored = stored_levels(space)[0, 5:63]
    assert torch.equal(stored * step + least, distances[0, 5:63])
    plan = simple.threshold(
        torch.tensor([counts], dtype=torch.int32, device=GPU),
        torch.tensor([9], dtype=torch.int32, device=GPU),
    )[0].tolist()
    left = counts[plan[0]] - plan[1]  # ties that were not taken
    assert space.plan[0].tolist() == [(plan[0] - least) // step, plan[1], 9, left]
    same = simple.select_by_codes(queries, keys, heavy, spans, sink, local, 1, 20)
    assert torch.equal(indices, same)
    assert space.done.tolist() == [0]  # ready for the next step


@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize("kind", ["random", "equal"])
def test_spans_at_the_edges_of_tiles_and_words(monkeypatch, kind, tiles):
    chosen = configs.Select(2, 1, tiles)
    monkeypatch.setattr(configs, "select_config", lambda *_: chosen)
    spans = torch.tensor(
        [
            [0, 4095],
            [0, 4096],
            [0, 4097],
            [31, 8193],
            [4096, 4097],
            [4064, 8192],
            [9, 9],
            [100, 103],
        ]
    )[:, None].to(GPU)
    queries, keys = random_codes(8, 2, 1, 1), random_codes(8, 1, 8200, 1, seed=1)
    if kind == "equal":
        keys[:] = keys[:, :, :1]
    heavy = torch.tensor([1, 5, 33, 8193, 4, 40, 3, 2])[:, None, None].to(GPU)
    arguments = (queries, keys, heavy, 4, 7)
    width = min(8200, 8193 + 11)
    made = select_by_codes(*arguments, spans=spans, width=width, backend="triton")
    want = select_by_codes(*arguments, spans=spans, width=width, backend="reference")
    assert torch.equal(made, want)


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("farthest", [False, True])
def test_a_chunk_of_one_level(monkeypatch, farthest, group):
    """All 128 tokens of every column at one level: the highest digit of the counters. Or at the
    highest level, for whose digit there is no counter; that of a group has a second digit."""
    chosen = configs.Select(group, 1, 4)
    monkeypatch.setattr(configs, "select_config", lambda *_: chosen)
    queries = random_codes(1, 1, 1, 1).expand(1, group, 1, 1)
    keys = ~queries[:, :1] if farthest else random_codes(1, 1, 1, 1, seed=1)
    keys = keys.expand(1, 1, 20_000, 1)
    made, want = (
        select_by_codes(queries, keys, 17_000, 0, 1, lists=1, backend=backend)
        for backend in ("triton", "reference")
    )
    assert torch.equal(made, want)


@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize(
    ("words", "planes", "most"),
    [(1, 5, 255), (1, 1, 32), (2, 5, 255), (4, 6, 1023), (2, 4, 800)],
)
def test_graded_queries_over_many_tiles(monkeypatch, words, planes, most, tiles):
    """Spans of two rows and lists of two key heads; levels of one and two digits."""
    chosen = configs.Select(1, words, tiles, planes, most)
    monkeypatch.setattr(configs, "select_config", lambda *_: chosen)
    real = torch.randn(2, 4, 2, 32 * words, generator=torch.Generator().manual_seed(0)).to(GPU)
    real[0, 0] = real[0, 0].sign()  # all bits weigh the same: many ties
    queries, keys = grade_bits(real, planes, most), random_codes(2, 2, 9000, words, seed=1)
    keys[:, :, 5000:5003] = queries[:, ::2, :1, :, 0]  # the best there are
    spans = torch.tensor([[[0, 8999], [0, 9000]], [[70, 4200], [4095, 4097]]]).to(GPU)
    heavy = torch.tensor([[700, 1], [5, 9000]])[:, None].expand(2, 4, 2).to(GPU)
    arguments = (queries, keys, heavy, 4, 7)
    made, want = (
        select_by_codes(*arguments, spans=spans, width=9000, most=most, backend=backend)
        for backend in ("triton", "reference")
    )
    assert torch.equal(made, want)


def test_chunks_agree_on_where_each_writes():
    """One row of many chunks, whose threshold falls into the middle of a run of ties."""
    queries, keys = random_codes(1, 1, 1, 1), random_codes(1, 1, 4096 * 12 + 50, 1, seed=1) & 0x7
    made = select_by_codes(queries, keys, 20_000, 16, 64, backend="triton")
    want = select_by_codes(queries, keys, 20_000, 16, 64, backend="reference")
    assert torch.equal(made, want)


@pytest.mark.parametrize(
    ("widths", "activation"),
    [((64, 32, 32), "silu"), ((80, 64, 48, 64), "gelu"), ((96, 40, 256), "tanh"),
     ((128, 128, 128), "relu")],
)  # fmt: skip
def test_codes_are_those_of_the_simple_kernel(widths, activation):
    stack, x = normal_maps(4, *widths, activation=activation), normal(2, 2, 18, widths[0], seed=5)
    unsure = reference.preactivations(x.repeat_interleave(2, 1), stack).abs() < 1e-4
    codes = [unpack_bits(made, widths[-1]) for made in (backend.encode(x, stack),
                                                        simple.encode(x, stack))]  # fmt: skip
    assert unsure.float().mean() < 0.01
    assert ((codes[0] == codes[1]) | unsure).all()
    assert 0.2 < codes[0].float().mean() < 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "lists", "dim"), [(4, 2, 4, 80), (4, 1, 1, 64)])
def test_attention_is_that_of_the_simple_kernel(heads, kv_heads, lists, dim, dtype):
    q = normal(1, heads, 1, dim, dtype=dtype)
    k, v = (normal(1, kv_heads, 400, dim, seed=seed, dtype=dtype) for seed in (1, 2))
    indices = listed(400, *(70, 1, 0, 150)[:lists])
    made = backend.attend(q, k, v, indices, dim**-0.5, None, None)
    want = simple.attend(q, k, v, indices, dim**-0.5)
    epsilon = {torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(made[0].float(), want[0].float(), rtol=0, atol=epsilon)
    torch.testing.assert_close(made[1], want[1], rtol=1e-5, atol=1e-5)


def test_unions_are_those_of_the_simple_kernel():
    indices = listed(90, 20, 7, 31, 0, 1, 2)
    assert torch.equal(backend.union(indices, 2, 90), simple.union(indices, 2, 90))


def test_unions_reach_over_many_words():
    """More words than a program writes, so that later ones count what stands before them."""
    indices = listed(100_000, 300, 17)
    made, expected = backend.union(indices, 1, 100_000), reference.union(indices, 1, 100_000)
    width = expected.shape[3]
    assert torch.equal(made[..., :width], expected) and (made[..., width:] == -1).all()


@pytest.mark.parametrize("width", [1, 63, 64, 65, 700])
def test_parts_of_a_list_merge_to_the_whole(monkeypatch, width):
    """A list split into as many parts as there are blocks, against float64."""
    monkeypatch.setattr(configs, "PROGRAMS", 10**6)
    q, k, v = normal(1, 2, 1, 64), normal(1, 2, 900, 64, seed=1), normal(1, 2, 900, 64, seed=2)
    indices = listed(900, width, max(1, width // 2))
    space = launch.AttendSpace.reserve(q, 2, width, 64, k.dtype)
    assert space.lse.shape[2] == math.ceil(width / space.config.block)
    made, _ = backend.attend(q, k, v, indices, 0.125, None, None)
    for head, row in enumerate(indices[0, :, 0]):
        tokens = row[row >= 0].long()
        weights = (k[0, head, tokens].double() @ q[0, head, 0].double() * 0.125).softmax(0)
        expected = weights @ v[0, head, tokens].double()
        torch.testing.assert_close(made[0, head, 0].double(), expected, rtol=0, atol=2e-6)
