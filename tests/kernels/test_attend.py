"""Attention over listed tokens, against a float64 loop."""

import math

import pytest
import torch
from torch import Tensor

from hashattn import kernels
from kernel_inputs import BACKENDS
from on_device import on_device

attend, dense_decode, union = map(on_device, (kernels.attend, kernels.dense_decode, kernels.union))


def states(heads: int, kv_heads: int, q_len: int, n: int, dtype=torch.float32, batch: int = 2):
    generator = torch.Generator().manual_seed(heads * n + q_len)
    shapes = [(batch, heads, q_len, 16), (batch, kv_heads, n, 16), (batch, kv_heads, n, 32)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def random_lists(batch: int, lists: int, q_len: int, n: int, m: int) -> Tensor:
    """Ascending token lists of different lengths, -1 padded."""
    generator = torch.Generator().manual_seed(n)
    indices = torch.full((batch, lists, q_len, m), -1, dtype=torch.int32)
    for at in torch.cartesian_prod(*map(torch.arange, (batch, lists, q_len))).tolist():
        length = int(torch.randint(1, m + 1, (), generator=generator))
        tokens = torch.randperm(n, generator=generator)[:length].sort().values
        indices[tuple(at)][:length] = tokens.to(torch.int32)
    return indices


def attend_exactly(q, k, v, indices, scaling, softcap=None, sinks=None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, q_len, _ = q.shape
    out = torch.zeros(batch, heads, q_len, v.shape[-1], dtype=torch.float64)
    for b, h, r in torch.cartesian_prod(*map(torch.arange, (batch, heads, q_len))).tolist():
        listed = indices[b, h * indices.shape[1] // heads, r]
        tokens = listed[listed >= 0].long()
        kv = h * k.shape[1] // heads
        logits = k[b, kv, tokens] @ q[b, h, r] * scaling
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        weights = logits.exp()
        total = weights.sum() + (0 if sinks is None else math.exp(sinks[h]))
        if len(tokens):
            out[b, h, r] = (weights / total) @ v[b, kv, tokens]
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_query_head", [False, True], ids=["kv_lists", "query_lists"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "q_len", "n", "m"),
    [(4, 2, 1, 19, 5), (4, 4, 1, 1, 1), (6, 1, 3, 40, 30), (4, 2, 5, 64, 9)],
)
def test_attends_to_the_listed_tokens(backend, per_query_head, heads, kv_heads, q_len, n, m):
    q, k, v = states(heads, kv_heads, q_len, n)
    indices = random_lists(2, heads if per_query_head else kv_heads, q_len, n, m)
    actual = attend(q, k, v, indices, 0.3, backend=backend)
    expected = attend_exactly(q, k, v, indices, 0.3)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q_len", [1, 4])
def test_softcap_and_sinks(backend, q_len):
    q, k, v = states(4, 2, q_len, 23)
    indices = random_lists(2, 4, q_len, 23, 20)
    sinks = torch.tensor([0.0, 1.0, -1.0, 2.0])
    actual = attend(q, k, v, indices, 1.0, softcap=2.0, sinks=sinks, backend=backend)
    expected = attend_exactly(q, k, v, indices, 1.0, softcap=2.0, sinks=sinks.tolist())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS[:3])  # tensor cores round weights
@pytest.mark.parametrize("q_len", [1, 4])
def test_bfloat16_rounds_only_the_output(backend, q_len):
    q, k, v = states(4, 2, q_len, 30, dtype=torch.bfloat16)
    indices = random_lists(2, 2, q_len, 30, 25)
    actual = attend(q, k, v, indices, 0.25, backend=backend)
    expected = attend_exactly(q, k, v, indices, 0.25)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unlisted_values_do_not_leak(backend):
    q, k, v = states(2, 1, 3, 12)
    indices = random_lists(2, 1, 3, 12, 6)
    before = attend(q, k, v, indices, 1.0, backend=backend)
    listed = torch.zeros(2, 13, dtype=torch.bool)
    listed.scatter_(1, torch.where(indices < 0, 12, indices).long().reshape(2, -1), True)
    unlisted = ~listed[:, None, :12, None]
    assert unlisted.any()
    after = attend(
        q,
        k.masked_fill(unlisted, 50.0),
        v.masked_fill(unlisted, 1e6),
        indices,
        1.0,
        backend=backend,
    )
    assert torch.equal(before, after)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [0, 3])
@pytest.mark.parametrize("q_len", [1, 8])
def test_rows_without_tokens_give_zeros(backend, width, q_len):
    q, k, v = states(2, 2, q_len, 6)
    indices = torch.full((2, 2, q_len, width), -1, dtype=torch.int32)
    assert not attend(q, k, v, indices, 1.0, backend=backend).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_dense_decode_is_attention_over_everything(heads, kv_heads, dtype, backend):
    q, k, v = states(heads, kv_heads, 1, 33, dtype=dtype)
    everything = torch.arange(33, dtype=torch.int32).expand(2, kv_heads, 1, 33)
    expected = attend_exactly(q, k, v, everything, 0.25)
    close = {"rtol": 0, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    actual = dense_decode(q, k, v, 0.25, backend=backend)
    torch.testing.assert_close(actual.double(), expected, **close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_decode_of_spans(backend):
    """Left padding, a span inside, and a row that sees nothing."""
    q, k, v = states(4, 2, 1, 50, batch=3)
    spans = torch.tensor([[[7, 50]], [[3, 20]], [[5, 5]]])
    lists = torch.full((3, 2, 1, 43), -1, dtype=torch.int32)
    lists[0, :, 0], lists[1, :, 0, :17] = torch.arange(7, 50), torch.arange(3, 20)
    sinks = torch.tensor([0.0, 1.0, -1.0, 2.0])
    for extra in ({}, {"softcap": 2.0}, {"sinks": sinks}):
        expected = attend_exactly(q, k, v, lists, 0.3, **{k: v for k, v in extra.items()})
        out = dense_decode(q, k, v, 0.3, spans=spans, backend=backend, **extra)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 3.0, 0.0])])
@pytest.mark.parametrize("q_len", [1, 3])
def test_the_log_of_the_sum_merges_disjoint_lists(backend, sinks, q_len):
    """Two halves of the tokens, weighed by their sums, are attention over all of them."""
    q, k, v = states(4, 2, q_len, 40)
    every = torch.arange(40, dtype=torch.int32).expand(2, 2, q_len, 40)
    parts = []
    for tokens, extra in ((every[..., :13], sinks), (every[..., 13:], None)):
        out, lse = attend(q, k, v, tokens, 0.3, sinks=extra, return_lse=True, backend=backend)
        assert lse.dtype == torch.float32 and lse.shape == (2, 4, q_len)
        parts.append((out.double(), lse.double()))
    total = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * (lse - total).exp()[..., None] for out, lse in parts)
    expected = attend_exactly(q, k, v, every, 0.3, sinks=None if sinks is None else sinks.tolist())
    torch.testing.assert_close(merged, expected, rtol=0, atol=3e-6)
    nothing = torch.full_like(every, -1)
    out, lse = attend(q, k, v, nothing, 0.3, return_lse=True, backend=backend)
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["interleaved", "sliced", "transposed"])
def test_views_are_read_where_they_lie(backend, kind):
    """K and V rows side by side as in the growing cache, a longer buffer, a foreign layout."""
    q, k, v = states(4, 2, 1, 90)
    v = v[..., :16].contiguous()
    indices = random_lists(2, 2, 1, 60, 40)
    expected = attend_exactly(q, k, v, indices, 0.3)
    if kind == "interleaved":
        both = torch.stack((k, v), dim=3)
        k, v = both[:, :, :, 0], both[:, :, :, 1]
    elif kind == "sliced":
        k, v = k[:, :, :60], v[:, :, :60]
    else:
        k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (k, v))
    actual = attend(q, k, v, indices, 0.3, backend=backend)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)
    if kind != "sliced":
        dense = dense_decode(q, k, v, 0.3, backend=backend)
        every = torch.arange(90, dtype=torch.int32).expand(2, 2, 1, 90)
        torch.testing.assert_close(
            dense.double(), attend_exactly(q, k, v, every, 0.3), rtol=0, atol=2e-6
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_unions_of_lists(backend):
    indices = random_lists(2, 6, 2, 30, 11)
    made = union(indices, 2, 30, backend=backend)
    for b, head, row in torch.cartesian_prod(*map(torch.arange, (2, 2, 2))).tolist():
        members = indices[b, 3 * head : 3 * head + 3, row].flatten().tolist()
        found = [token for token in made[b, head, row].tolist() if token >= 0]
        assert found == sorted(set(members) - {-1})
    with pytest.raises(ValueError, match="not a multiple of the 4"):
        union(indices, 4, 30)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("per_query_head", [False, True])
def test_log_weights_stand_for_copies_of_tokens(per_query_head, rows, backend):
    """A weight of log 3 is a token listed three times."""
    q, k, v = states(4, 2, rows, 20)
    indices = random_lists(2, 4 if per_query_head else 2, rows, 20, 8)
    weights = torch.zeros(indices.shape)
    weights[..., ::2] = math.log(3)
    repeated = torch.cat((indices, indices[..., ::2], indices[..., ::2]), dim=-1)
    made, lse = attend(q, k, v, indices, 0.3, softcap=2.0, log_weights=weights, return_lse=True,
                       backend=backend)  # fmt: skip
    expected = attend(q, k, v, repeated, 0.3, softcap=2.0, return_lse=True, backend="reference")
    torch.testing.assert_close(made, expected[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-5)


def test_invalid_arguments():
    q, k, v = states(4, 2, 2, 9)
    lists = torch.zeros(2, 2, 2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="log_weights: expected the shape of indices"):
        attend(q, k, v, lists, 1.0, log_weights=torch.zeros(2, 2, 2, 4))
    with pytest.raises(ValueError, match="2 or 4 lists"):
        attend(q, k, v, torch.zeros(2, 3, 2, 1, dtype=torch.int32), 1.0)
    with pytest.raises(ValueError, match="not a multiple"):
        attend(q[:, :3], k, v, torch.zeros(2, 2, 2, 1, dtype=torch.int32), 1.0)
    with pytest.raises(ValueError, match="dense_decode takes one"):
        dense_decode(q, k, v, 1.0)


@pytest.mark.parametrize("backend", BACKENDS[:3])  # a GPU is not asked what it read
def test_tokens_outside_of_the_cache_are_an_error(backend):
    q, k, v = states(4, 2, 1, 9)
    with pytest.raises(IndexError):
        attend(q, k, v, torch.tensor([3, 9], dtype=torch.int32).expand(2, 2, 1, 2), 1.0,
               backend=backend)  # fmt: skip
