"""The decode step with reserved memory, against the API call by call."""

import pytest
import torch

from hashattn.kernels import (
    Coins,
    Drawing,
    Grades,
    attend,
    dense_decode,
    encode,
    encode_graded,
    sample_by_codes,
    select_by_codes,
    union,
    units_of,
    unpack_bits,
)
from hashattn_kernels import reference
from hashattn_kernels.triton_gpu.step import DecodeStep, DenseStep
from kernel_inputs import normal, normal_maps
from on_device import CUDA, GPU

CAPACITY, HEADS, KV_HEADS, DIM = 5000, 4, 2, 64


def step_of(batch: int = 2, key_maps: int = KV_HEADS, **options) -> DecodeStep:
    """A step over caches filled with anything, its codes the codes of its keys."""
    query_maps, key_maps = normal_maps(HEADS, DIM, 48, 32), normal_maps(key_maps, DIM, 48, 32)
    keys, values = (normal(batch, KV_HEADS, CAPACITY, DIM, seed=seed) for seed in (3, 4))
    step = DecodeStep(query_maps, key_maps, keys, values, heavy=40, sink=4, local=8,
                      scaling=0.125, **options)  # fmt: skip
    step.codes.append(encode(keys, key_maps, backend="reference"))
    return step


GRADES = Grades(5, 255)


def drawing() -> Drawing:
    """Of four lists, with logits from hardly to well estimated; nothing is drawn yet."""
    drawn = torch.zeros(2, HEADS, 1, dtype=torch.int64, device=GPU)
    slopes = torch.tensor([0.02, 0.1, 0.5, 3.0]).to(GPU)
    return Drawing(slopes, drawn, 0.1, Coins(seed=3, layer=1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lists": HEADS},
        {"key_maps": HEADS},
        {"union": True},
        {"grades": GRADES},
        {"grades": GRADES, "lists": HEADS},
        {"grades": GRADES, "union": True},
        {"grades": GRADES, "lists": HEADS, "drawing": drawing()},
    ],
    ids=lambda options: "-".join(options),
)
def test_steps_are_calls_of_the_api(options):
    step = step_of(**options)
    lists = options.get("lists", HEADS if {"union", "key_maps"} & set(options) else KV_HEADS)
    codes = step.codes.to_tokens().clone()
    for lengths, heavy in (((4097, 34), (7, 40)), ((5000, 1), (40, 0))):
        step.spans[:, 0, 1] = torch.tensor(lengths)
        step.heavy[:, :, 0] = torch.tensor(heavy)[:, None]
        q = normal(2, HEADS, 1, DIM, seed=lengths[0])
        if "drawing" in options:  # half of what three lists read, all that the fourth does
            step.drawing.drawn.copy_(step.heavy // torch.tensor([[[2], [2], [2], [1]]], device=GPU))
        out = step(q).clone()
        most = log_weights = None
        if "grades" in options:
            most = GRADES.most
            query_codes, steps = encode_graded(q, step.query_maps, lists, *GRADES, backend="triton")
        else:
            query_codes = encode(q, step.query_maps, backend="triton")
        if "drawing" in options:
            slopes, drawn, trust, coins = step.drawing
            indices, log_weights = sample_by_codes(
                query_codes, codes, units_of(steps, slopes), step.heavy - drawn, drawn, trust,
                coins, 4, 8, spans=step.spans, width=step.indices.shape[3], most=most,
                backend="reference",
            )  # fmt: skip
            assert torch.equal(step.log_weights, log_weights)
        else:
            indices = select_by_codes(
                query_codes, codes, step.heavy, 4, 8, spans=step.spans, width=52, lists=lists,
                most=most, backend="reference",
            )  # fmt: skip
        assert torch.equal(step.indices, indices)
        if "union" in options:
            indices = union(indices, KV_HEADS, CAPACITY, backend="reference")
        expected = attend(
            q, step.keys, step.values, indices, 0.125, log_weights=log_weights, backend="reference"
        )
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_the_dense_step_is_the_dense_call():
    keys, values = (normal(2, KV_HEADS, CAPACITY, DIM, seed=seed) for seed in (3, 4))
    step, q = DenseStep(HEADS, keys, values, scaling=0.125), normal(2, HEADS, 1, DIM)
    for spans in ([[0, 5000], [0, 1]], [[70, 4097], [3, 3]]):
        step.spans[:, 0] = torch.tensor(spans)
        expected = dense_decode(q, keys, values, 0.125, spans=step.spans, backend="reference")
        torch.testing.assert_close(step(q), expected, rtol=0, atol=1e-5)


def test_the_code_of_the_newest_token_is_written_at_its_place():
    step = step_of()
    before = step.codes.to_tokens().clone()
    step.spans[:, 0, 1] = torch.tensor([4097, 33])
    key = normal(2, KV_HEADS, 1, DIM, seed=9)
    step.keys[0, :, 4096:4097], step.keys[1, :, 32:33] = key
    step(normal(2, HEADS, 1, DIM))
    after, code = step.codes.to_tokens(), encode(key, step.key_maps, backend="reference")
    sure = reference.preactivations(key, step.key_maps).abs() > 1e-4
    for row, token in enumerate((4096, 32)):
        same = unpack_bits(after[row, :, token], 32) == unpack_bits(code[row, :, 0], 32)
        assert (same | ~sure[row, :, 0]).all()
        after[row, :, token] = before[row, :, token]
    assert torch.equal(after, before)


def test_what_does_not_fit_is_refused():
    keys = torch.zeros(1, KV_HEADS, 64, DIM, device=GPU)
    sizes = {"heavy": 4, "sink": 1, "local": 1, "scaling": 1.0}
    with pytest.raises(ValueError, match="same bits"):
        DecodeStep(normal_maps(4, 64, 48, 32), normal_maps(2, 64, 48, 64), keys, keys, **sizes)
    maps = normal_maps(4, 64, 48, 32)
    with pytest.raises(ValueError, match="drawing needs graded queries"):
        DecodeStep(maps, maps, keys, keys, lists=4, drawing=drawing(), **sizes)
    with pytest.raises(ValueError, match="4 key maps and 2 lists"):
        DecodeStep(
            normal_maps(4, 64, 48, 32), normal_maps(4, 64, 48, 32), keys, keys, lists=2, **sizes
        )
    with pytest.raises(ValueError, match="2 key maps and 3 lists"):
        DecodeStep(
            normal_maps(4, 64, 48, 32), normal_maps(2, 64, 48, 32), keys, keys, lists=3, **sizes
        )


@pytest.mark.skipif(not CUDA, reason="needs a GPU: CUDA graphs")
@pytest.mark.parametrize("options", [{}, {"lists": HEADS}, {"union": True}], ids=str)
def test_a_captured_step_follows_the_sizes_in_memory(options):
    """One graph, replayed while the cache grows and budgets change; nothing synchronises."""
    step, eager = step_of(**options), step_of(**options)
    q = normal(2, HEADS, 1, DIM)
    step.spans[:, 0, 1] = 10
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(q)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(q)
    for length in (11, 4095, 4097, 5000):
        for each in (step, eager):
            each.spans[:, 0, 1] = length
            each.heavy[:] = length % 41
        q.copy_(normal(2, HEADS, 1, DIM, seed=length))
        graph.replay()
        assert torch.equal(step.out, eager(q))
