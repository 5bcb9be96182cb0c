"""The decode step with reserved memory, against the API call by call."""

import pytest
import torch

from hashattn.kernels import attend, dense_decode, encode, select_by_codes, union, unpack_bits
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


@pytest.mark.parametrize(
    "options", [{}, {"lists": HEADS}, {"key_maps": HEADS}, {"union": True}], ids=str
)
def test_steps_are_calls_of_the_api(options):
    step = step_of(**options)
    codes = step.codes.to_tokens().clone()
    for lengths, heavy in (((4096, 33), (40, 7)), ((4097, 34), (0, 40)), ((5000, 1), (40, 40))):
        step.spans[:, 0, 1] = torch.tensor(lengths)
        step.heavy[:, :, 0] = torch.tensor(heavy)[:, None]
        q = normal(2, HEADS, 1, DIM, seed=lengths[0])
        newest = torch.tensor(lengths, device=GPU)[:, None, None, None] - 1
        key = step.keys.gather(2, newest.expand(2, KV_HEADS, 1, DIM))
        out = step(q, key).clone()
        query_codes = encode(q, step.query_maps, backend="triton")
        indices = select_by_codes(
            query_codes, codes, step.heavy, 4, 8, spans=step.spans, width=52,
            lists=HEADS if options else KV_HEADS, backend="reference",
        )  # fmt: skip
        if "union" in options:
            indices = union(indices, KV_HEADS, CAPACITY, backend="reference")
        expected = attend(q, step.keys, step.values, indices, 0.125, backend="reference")
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
    step(normal(2, HEADS, 1, DIM), key)
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
    with pytest.raises(ValueError, match="same widths"):
        DecodeStep(normal_maps(4, 64, 48, 32), normal_maps(2, 64, 32, 32), keys, keys, **sizes)
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
    q, key = normal(2, HEADS, 1, DIM), normal(2, KV_HEADS, 1, DIM)
    step.spans[:, 0, 1] = 10
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(q, key)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(q, key)
    for length in (11, 4095, 4097, 5000):
        for each in (step, eager):
            each.spans[:, 0, 1] = length
            each.heavy[:] = length % 41
        q.copy_(normal(2, HEADS, 1, DIM, seed=length))
        graph.replay()
        assert torch.equal(step.out, eager(q, key))
