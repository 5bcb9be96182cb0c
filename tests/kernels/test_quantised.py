"""Rows of 8 and 4 bits: what is stored, and attention to them against a float64 loop."""

import math
import struct
from functools import partial

import pytest
import torch
from torch import Tensor

from hashattn import kernels
from hashattn.kernels import RowFormat, attend, dequantise, merge, quantise
from kernel_inputs import BACKENDS, normal
from on_device import on_device

attend_rows = on_device(kernels.attend_rows)
DIMS = ((64, 64), (16, 48), (80, 80), (128, 128))


def states(kv_heads: int, n: int, dims=(64, 64), dtype=torch.float32, batch: int = 2):
    """Keys whose channels differ in size and have means, as those of models do, and values."""
    keys = normal(batch, kv_heads, n, dims[0], seed=n).cpu()
    keys = keys * torch.linspace(0.2, 3, dims[0]) + torch.linspace(-1, 2, dims[0])
    return keys.to(dtype), normal(batch, kv_heads, n, dims[1], seed=n + 1).cpu().to(dtype)


def stored(kv_heads, n, dims=(64, 64), bits=8, dtype=torch.float32):
    keys, values = states(kv_heads, n, dims, dtype)
    return quantise(keys, values, bits), RowFormat(bits, *dims, dtype)


def lists_of(lists: int, q_len: int, n: int, m: int) -> Tensor:
    """Lists (2, lists, q_len, m) of different lengths, in no order, -1 padded."""
    generator = torch.Generator().manual_seed(n)
    indices = torch.full((2, lists, q_len, m), -1, dtype=torch.int32)
    for at in torch.cartesian_prod(*map(torch.arange, (2, lists, q_len))).tolist():
        length = int(torch.randint(1, m + 1, (), generator=generator))
        indices[tuple(at)][:length] = torch.randperm(n, generator=generator)[:length].int()
    return indices


def attend_exactly(q, k, v, indices, scaling, softcap=None, sinks=None, log_weights=None):
    """Output and log of the softmax sum, float64."""
    q, k, v = q.double(), k.double(), v.double()
    out, lse = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -torch.inf)
    for b, h, r in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        line = h * indices.shape[1] // q.shape[1]
        there = indices[b, line, r] >= 0
        tokens, kv = indices[b, line, r][there].long(), h * k.shape[1] // q.shape[1]
        logits = k[b, kv, tokens] @ q[b, h, r] * scaling
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if log_weights is not None:
            logits = logits + log_weights[b, line, r][there]
        total = logits.exp().sum() + (0 if sinks is None else math.exp(sinks[h]))
        if len(tokens):
            out[b, h, r], lse[b, h, r] = (logits.exp() / total) @ v[b, kv, tokens], total.log()
    return out, lse


def compiled_here_alone(*shape) -> object:
    return pytest.param(*shape, marks=pytest.mark.long)  # 10 seconds for each head size


def hadamard_sign(i: int, j: int) -> int:
    return -1 if bin(i & j).count("1") % 2 else 1


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_mean_what_the_format_says(bits):
    """Every number of a row by hand, from its bytes, and the rotation undone by a loop."""
    keys, values = states(1, 1, (16, 32), batch=1)
    row_format = RowFormat(bits, 16, 32)
    rows = quantise(keys, values, bits)
    row = rows[0, 0, 0].tolist()
    assert len(row) == row_format.width == (16 + 32) * bits // 8 + 4
    made = dequantise(rows, row_format)
    for dim, start, tail, found in ((16, 0, -4, made[0]), (32, 16, -2, made[1])):
        (scale,) = struct.unpack("<f", bytes([0, 0, *row[tail : tail + 2 or None]]))
        if bits == 8:
            codes = [byte - 256 if byte > 127 else byte for byte in row[start : start + dim]]
            numbers = [code * scale for code in codes]
        else:
            codes = []
            for chunk in range(start // 2, (start + dim) // 2, 8):
                codes += [byte % 16 for byte in row[chunk : chunk + 8]]
                codes += [byte // 16 for byte in row[chunk : chunk + 8]]
            x = [(2 * code - 15) / 16 for code in codes]
            numbers = [scale * a * (2.5 + a * a) for a in x]
        for i in range(dim):
            sign = -1 if (i + 1) * 2654435761 >> 31 & 1 else 1
            total = sum(hadamard_sign(i, j) * numbers[j] for j in range(dim))
            assert found[0, 0, 0, i] == pytest.approx(sign * total / math.sqrt(dim), abs=1e-5)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (4, 0.1)])
@pytest.mark.parametrize("dims", [*DIMS, (96, 256)])
def test_what_comes_back_is_near(bits, most, dims):
    """Relative error of a vector; normal numbers at 4 bits have .097 at best (Max 1960)."""
    keys, values = states(2, 50, dims)
    found = dequantise(quantise(keys, values, bits), RowFormat(bits, *dims))
    for actual, expected in zip(found, (keys, values), strict=True):
        error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.mean() < most and error.max() < 2 * most


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_a_row_depends_on_its_own_token_alone(backend, bits, dtype):
    stored_by = partial(quantise, bits=bits, backend=backend)
    keys, values = states(2, 60, (128, 80), dtype)
    rows = stored_by(keys, values)
    single = [stored_by(keys[:, :, t : t + 1], values[:, :, t : t + 1]) for t in range(60)]
    assert torch.equal(torch.cat(single, dim=2), rows)
    pairs = torch.stack((keys[..., :80], values), dim=3)  # views, as in the growing cache
    expected = stored_by(keys[..., :80].contiguous(), values)
    assert torch.equal(stored_by(*pairs.unbind(3)), expected)
    assert dequantise(rows, RowFormat(bits, 128, 80, dtype))[0].dtype == dtype


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros_and_size_does_not_matter(bits):
    keys, values = states(1, 8)
    row_format = RowFormat(bits, 64, 64)
    zero = dequantise(quantise(keys * 0, values * 0, bits), row_format)
    assert not zero[0].any() and not zero[1].any()
    for factor in (2.0**-90, 2.0**100):  # a power of two changes nothing but scales
        made = dequantise(quantise(keys * factor, values * factor, bits), row_format)
        expected = dequantise(quantise(keys, values, bits), row_format)
        assert all(torch.equal(a, b * factor) for a, b in zip(made, expected, strict=True))
    empty = quantise(keys[:, :, :0], values[:, :, :0], bits)
    assert empty.shape == (2, 1, 0, row_format.width)
    assert dequantise(empty, row_format)[1].shape == (2, 1, 0, 64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("per_query_head", [False, True], ids=["kv_lists", "query_lists"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "q_len", "n", "m", "dims"),
    [
        (4, 2, 1, 150, 90, (64, 64)),
        (2, 2, 1, 1, 1, (64, 64)),
        compiled_here_alone(6, 2, 2, 40, 30, (16, 48)),
        compiled_here_alone(4, 2, 1, 40, 9, (80, 80)),
        (4, 1, 1, 33, 20, (128, 128)),
    ],
)
def test_attends_to_what_the_rows_hold(
    backend, bits, per_query_head, heads, kv_heads, q_len, n, m, dims
):
    rows, row_format = stored(kv_heads, n, dims, bits)
    q = normal(2, heads, q_len, dims[0], seed=3).cpu()
    indices = lists_of(heads if per_query_head else kv_heads, q_len, n, m)
    out, lse = attend_rows(q, rows, row_format, indices, 0.1, return_lse=True, backend=backend)
    expected, total = attend_exactly(q, *dequantise(rows, row_format), indices, 0.1)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4e-6)
    torch.testing.assert_close(lse.double(), total, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("per_query_head", [False, True])
def test_softcap_sinks_and_log_weights(backend, bits, per_query_head):
    rows, row_format = stored(2, 40, bits=bits)
    q = normal(2, 4, 1, 64, seed=3).cpu()
    indices = lists_of(4 if per_query_head else 2, 1, 40, 30)
    extra = {
        "softcap": 2.0,
        "sinks": torch.tensor([0.0, 1.0, -1.0, 2.0]),
        "log_weights": normal(*indices.shape, seed=4).cpu().abs(),
    }
    out, lse = attend_rows(
        q, rows, row_format, indices, 0.3, return_lse=True, backend=backend, **extra
    )
    expected, total = attend_exactly(q, *dequantise(rows, row_format), indices, 0.3, **extra)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4e-6)
    torch.testing.assert_close(lse.double(), total, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (2, 2)])
def test_half_precision_queries(backend, bits, dtype, heads, kv_heads):
    """Only the output is rounded on a CPU; tensor cores round queries, levels and weights too."""
    keys, values = states(kv_heads, 50, dtype=dtype)
    rows, row_format = quantise(keys, values, bits), RowFormat(bits, 64, 64, dtype)
    q = normal(2, heads, 1, 64, seed=3).cpu().to(dtype)
    indices = lists_of(kv_heads, 1, 50, 40)
    out = attend_rows(q, rows, row_format, indices, 0.1, backend=backend)
    exact = RowFormat(bits, 64, 64)
    expected, _ = attend_exactly(q, *dequantise(rows, exact), indices, 0.1)
    assert out.dtype == dtype
    atol = 2e-2 if backend == "triton" else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=atol)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dims", [(64, 64), (128, 80)])
def test_compiled_rows_are_those_of_the_definition(bits, dims):
    """Sums in another order may change a code where a number is in the middle of two."""
    keys, values = states(2, 200, dims, torch.bfloat16)
    keys[0, 0, 5], values[0, 1, 7] = 0, 0
    keys[0, 0, 6, 3] = 1e15
    made, defined = (quantise(keys, values, bits, backend=b) for b in ("numba", "reference"))
    assert (made != defined).float().mean() < 1e-3
    row_format = RowFormat(bits, *dims)
    for actual, expected in zip(*(dequantise(x, row_format) for x in (made, defined)), strict=True):
        error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-20)
        assert error.max() < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_exact_tokens_merge_with_stored_ones(backend, bits):
    """The newest tokens as they are, the others from rows: one softmax over both."""
    keys, values = states(2, 60)
    rows, row_format = quantise(keys, values, bits), RowFormat(bits, 64, 64)
    q = normal(2, 4, 1, 64, seed=3).cpu()
    old, new = (torch.arange(*span, dtype=torch.int32).expand(2, 2, 1, -1) for span in
                ((0, 40), (40, 60)))  # fmt: skip
    both = (
        attend_rows(q, rows, row_format, old, 0.1, return_lse=True, backend=backend),
        attend(q, keys, values, new, 0.1, return_lse=True),
    )
    out, lse = merge(*map(torch.stack, zip(*both, strict=True)))
    mixed = [x.clone() for x in dequantise(rows, row_format)]
    mixed[0][:, :, 40:], mixed[1][:, :, 40:] = keys[:, :, 40:], values[:, :, 40:]
    every = torch.arange(60, dtype=torch.int32).expand(2, 2, 1, 60)
    expected, total = attend_exactly(q, *mixed, every, 0.1)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4e-6)
    torch.testing.assert_close(lse.double(), total, rtol=0, atol=1e-5)


def test_parts_without_tokens_merge_to_zeros():
    out, lse = merge(torch.zeros(2, 1, 2, 1, 16), torch.full((2, 1, 2, 1), -torch.inf))
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_may_lie_anywhere(backend, bits):
    """The same list over rows in another order, in a longer buffer: the same bits."""
    rows, row_format = stored(2, 120, bits=bits)
    q = normal(2, 4, 1, 64, seed=3).cpu()
    indices = lists_of(4, 1, 120, 70)
    expected = attend_rows(q, rows, row_format, indices, 0.1, backend=backend)
    places = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    buffer = torch.full((2, 2, 200, row_format.width), 255, dtype=torch.uint8)
    buffer[:, :, places] = rows
    moved = torch.where(indices < 0, -1, places[indices.clamp(min=0).long()].int())
    out = attend_rows(q, buffer[:, :, :120], row_format, moved, 0.1, backend=backend)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_without_tokens_give_zeros(backend, bits):
    rows, row_format = stored(2, 6, bits=bits)
    q = normal(2, 4, 1, 64).cpu()
    for width in (0, 3):
        nothing = torch.full((2, 2, 1, width), -1, dtype=torch.int32)
        out, lse = attend_rows(q, rows, row_format, nothing, 1.0, return_lse=True, backend=backend)
        assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_compiled_backend_agrees_with_dense_rows(bits):
    """`attend` over what `dequantise` gives, the way of a prefilled chunk."""
    rows, row_format = stored(2, 90, (128, 128), bits)
    q = normal(2, 8, 1, 128, seed=3).cpu()
    indices = lists_of(2, 1, 90, 60)
    out = attend_rows(q, rows, row_format, indices, 0.1)
    dense = attend(q, *dequantise(rows, row_format), indices, 0.1)
    torch.testing.assert_close(out, dense, rtol=0, atol=4e-6)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_numbers_that_are_none_are_refused(backend, bits, number):
    keys, values = states(1, 5)
    for at in (keys, values):
        kept, at[1, 0, 3, 7] = at[1, 0, 3, 7].clone(), number
        with pytest.raises(ValueError, match="hold NaN or infinite"):
            quantise(keys, values, bits, backend=backend)
        at[1, 0, 3, 7] = kept


def test_invalid_arguments():
    keys, values = states(1, 5)
    for bits in (16, 3, 0):
        with pytest.raises(ValueError, match="must be 8 or 4"):
            quantise(keys, values, bits)
    with pytest.raises(ValueError, match="key_dim = 40: must be a positive multiple of 16"):
        quantise(keys[..., :40], values, 8)
    with pytest.raises(ValueError, match="of the same tokens"):
        quantise(keys[:, :, :4], values, 8)
    with pytest.raises(ValueError, match="must be the same"):
        quantise(keys, values.half(), 8)
    with pytest.raises(ValueError, match="must be that of keys and values, a float"):
        RowFormat(8, 64, 64, torch.int8)
    rows, row_format = stored(2, 9)
    q, lists = normal(2, 4, 1, 64).cpu(), torch.zeros(2, 2, 1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expected uint8 \(..., 68\) for 4 bits"):
        attend_rows(q, rows, RowFormat(4, 64, 64), lists, 1.0)
    with pytest.raises(ValueError, match="got torch.int8"):
        dequantise(rows.view(torch.int8), row_format)
    with pytest.raises(ValueError, match="rows .* of keys of 64"):
        attend_rows(q[..., :32], rows, row_format, lists, 1.0)
    with pytest.raises(ValueError, match="2 or 4 lists"):
        attend_rows(q, rows, row_format, lists[:, :1], 1.0)
    with pytest.raises(ValueError, match="log_weights: expected the shape"):
        attend_rows(q, rows, row_format, lists, 1.0, log_weights=torch.zeros(2, 2, 1, 2))
    with pytest.raises(ValueError, match="not a multiple of the 2 of rows"):
        attend_rows(q[:, :3], rows, row_format, lists, 1.0)


@pytest.mark.parametrize("backend", BACKENDS[:3])  # a GPU is not asked what it read
@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_outside_of_the_cache_are_an_error(backend, bits):
    rows, row_format = stored(2, 9, bits=bits)
    q = normal(2, 4, 1, 64).cpu()
    for token in (9, 2**20):
        with pytest.raises(IndexError):
            lists = torch.tensor([3, token], dtype=torch.int32).expand(2, 2, 1, 2)
            attend_rows(q, rows, row_format, lists, 1.0, backend=backend)
