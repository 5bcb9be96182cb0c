"""NaN and infinities: every backend lets them through exactly where torch's softmax does."""

import math

import pytest
import torch
from torch import Tensor

from hashattn import kernels
from hashattn.kernels import Maps
from kernel_inputs import BACKENDS
from on_device import on_device

# numpy tells of them where Triton's interpreter computes
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|divide by zero|overflow|All-NaN slice) encountered:RuntimeWarning"
)
NAN, INF = math.nan, math.inf
N, DIM, VALUE_DIM = 45, 16, 32
attend, dense_decode, encode, encode_pair, grade_bits, select = map(
    on_device,
    (kernels.attend, kernels.dense_decode, kernels.encode, kernels.encode_pair,
     kernels.grade_bits, kernels.select),
)  # fmt: skip


def states(heads: int, kv_heads: int, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads)
    shapes = [(2, heads, 1, DIM), (2, kv_heads, N, DIM), (2, kv_heads, N, VALUE_DIM)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def by_torch(q, k, v, tokens, scaling, softcap=None, sinks=None) -> Tensor:
    """float64 attention of each row over its tokens, a list for each sequence; sinks join in."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(q.shape[1])).tolist():
        listed = torch.tensor(tokens[b], dtype=torch.int64)
        kv = h * k.shape[1] // q.shape[1]
        logits = k[b, kv, listed].double() @ q[b, h, 0].double() * scaling
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        logits = logits if sinks is None else torch.cat([logits, sinks[h : h + 1].double()])
        if len(listed):
            out[b, h, 0] = logits.softmax(0)[: len(listed)] @ v[b, kv, listed].double()
    return out


def agrees(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert torch.equal(actual.isfinite(), expected.isfinite())
    close = {"rtol": 0, "atol": 5e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(
        actual.double().nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0), **close
    )


def check(q, k, v, backend, softcap=None, sinks=None) -> None:
    """Both kernels, over all tokens, over lists of different lengths, and over spans."""
    kv_heads, dtype, extra = k.shape[1], q.dtype, {"softcap": softcap, "sinks": sinks}
    for tokens in ([*range(N)], [*range(N)]), ([*range(1, N, 3)], [10, 44]), ([], [0, 3, 10]):
        lists = torch.full((2, kv_heads, 1, max(map(len, tokens))), -1, dtype=torch.int32)
        for b, listed in enumerate(tokens):
            lists[b, :, 0, : len(listed)] = torch.tensor(listed, dtype=torch.int32)
        expected = by_torch(q, k, v, tokens, 0.3, softcap, sinks)
        agrees(attend(q, k, v, lists, 0.3, backend=backend, **extra), expected, dtype)
    expected = by_torch(q, k, v, ([*range(N)],) * 2, 0.3, softcap, sinks)
    agrees(dense_decode(q, k, v, 0.3, backend=backend, **extra), expected, dtype)
    spans = torch.tensor([[[11, N]], [[4, 4]]])
    expected = by_torch(q, k, v, ([*range(11, N)], []), 0.3, softcap, sinks)
    out = dense_decode(q, k, v, 0.3, spans=spans, backend=backend, **extra)
    agrees(out, expected, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_token_or_query_that_is_no_number(backend, dtype, value):
    q, k, v = states(4, 2, dtype)
    spoiled = {"q": q.clone(), "k": k.clone(), "k of one channel": k.clone(), "v": v.clone()}
    spoiled["q"][0, 1] = value
    spoiled["k"][:, :, 10] = value
    spoiled["k of one channel"][:, 0, 10, 3] = value
    spoiled["v"][:, 1, 10, 3] = value
    for name, changed in spoiled.items():
        check(*(changed if name[0] == own else x for own, x in zip("qkv", (q, k, v), strict=True)),
              backend)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1)])
@pytest.mark.parametrize("token", [0, 10, N - 1])
def test_unlisted_tokens_do_not_matter_and_listed_ones_do(backend, heads, kv_heads, token):
    """Token 0 stands in for padding, the last one for what fills a block."""
    for value in (NAN, INF):
        q, k, v = states(heads, kv_heads)
        k[:, :, token], v[:, :, token] = value, value
        check(q, k, v, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_logits_of_minus_infinity_have_weight_0(backend, softcap):
    q, k, v = states(4, 2)
    q = q.abs()
    k[:, :, :40] = -INF  # 0 to 39: whole blocks of nothing before the first number
    check(q, k, v, backend, softcap)
    k[0] = -INF  # and a sequence of nothing else: 0 / 0
    check(q, k, v, backend, softcap)
    v[0, 0, 10, 5], v[1, 0, 10, 5] = NAN, INF  # whose weight is 0
    check(q, k, v, backend, softcap)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks(backend):
    q, k, v = states(4, 2)
    ordinary = torch.tensor([0.5, -1.0, 3.0, 0.0])
    for value in (NAN, INF):
        k[0, :, 10] = value
        check(q, k, v, backend, sinks=ordinary)
    k[0, :, 10] = 1.0
    out = attend(q, k, v, torch.arange(N, dtype=torch.int32).expand(2, 2, 1, N), 0.3,
                 sinks=torch.tensor([NAN, INF, -INF, 0.0]), backend=backend)  # fmt: skip
    assert out[0, :, 0].isfinite().all(dim=-1).tolist() == [False, False, True, True]
    k[:] = -INF
    check(q.abs(), k, v, backend, sinks=ordinary)  # the sinks take all the weight


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_list_are_merged_with_what_is_no_number(backend):
    """Two threads split the tokens of a sequence's only list."""
    threads = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        for value in (NAN, INF, -INF):
            q, k, v = states(3, 1)
            q = q.abs()
            k[:, :, 10] = value
            check(q, k, v, backend)
            k[:, :, 9:] = value
            check(q, k, v, backend)
            k[:] = -INF
            check(q, k, v, backend)
            check(q, k, v, backend, sinks=torch.zeros(3))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_rows_of_which_one_is_no_number(backend):
    q, k, v = states(4, 2)
    q = torch.cat([q, q + 1, q - 1], dim=2)
    v[:, :, 10], k[:, :, 0] = NAN, NAN
    lists = torch.arange(1, N, dtype=torch.int32).expand(2, 2, 3, N - 1).clone()
    lists[:, :, 1, 9:] = -1  # sees no token 10
    lists[:, :, 2] = -1
    out = attend(q, k, v, lists, 0.3, backend=backend)
    assert out[:, :, 0].isnan().all() and not out[:, :, 2].any()
    expected = by_torch(q[:, :, 1:2], k, v, ([*range(1, 10)],) * 2, 0.3)
    agrees(out[:, :, 1:2], expected, torch.float32)


def maps(heads: int, widths: tuple[int, ...], activation: str, folds: int = 0) -> Maps:
    generator = torch.Generator().manual_seed(0)
    sizes = list(zip(widths, widths[1:], strict=False))
    weights = tuple(torch.randn(heads, a, b, generator=generator) * a**-0.5 for a, b in sizes)
    biases = tuple(torch.randn(heads, b, generator=generator) * 0.1 for _, b in sizes)
    steps = torch.full((heads, folds, widths[-1]), 0.3) if folds else None
    return Maps(weights, biases, activation, steps).rounded()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize(
    ("widths", "folds"), [((16, 32), 0), ((16, 40, 32), 0), ((16, 40, 56, 64), 0), ((16, 32), 2)]
)
def test_codes_of_what_is_no_number_are_the_same(backend, activation, widths, folds):
    """An infinite channel may leave a code of numbers, NaN has no bit set; big numbers saturate."""
    stack = maps(2, widths, activation, folds)
    x = torch.randn(1, 2, 7, 16, generator=torch.Generator().manual_seed(1))
    x[0, :, 0, 3], x[0, :, 1, 3], x[0, :, 2, 3] = NAN, INF, -INF
    x[0, :, 3, :2], x[0, :, 4] = torch.tensor([INF, -INF]), NAN
    x[0, :, 5] *= 1e4  # silu of large negative numbers is 0, tanh is 1
    real = kernels.preactivations(x, stack)
    assert real[0, :, 4].isnan().all()
    sure = ~(real.abs() < 1e-4)  # within rounding of 0 backends may differ
    pair = encode_pair(x, stack, x.flip(2), stack, backend=backend)
    many = encode(x.repeat(1, 1, 3, 1), stack, backend=backend)
    for codes in (encode(x, stack, backend=backend), many[:, :, 7:14], pair[0], pair[1].flip(2)):
        bits = kernels.unpack_bits(codes, stack.bits)
        assert torch.equal(bits[sure], (real > 0)[sure])


@pytest.mark.parametrize("backend", BACKENDS)
def test_grades_of_what_is_no_number(backend):
    """Infinite units have all the weight, NaN has none."""
    real = torch.linspace(-2, 2, 32).repeat(1, 1, 6, 1)
    real[0, 0, 0, 5], real[0, 0, 1, 5], real[0, 0, 2, 5] = NAN, INF, -INF
    real[0, 0, 3], real[0, 0, 4, 20:] = NAN, INF
    real[0, 0, 5] *= 1e-40  # too small for a normal number
    signs, *digits = grade_bits(real, 3, 255, backend=backend).unbind(-1)
    assert torch.equal(signs, kernels.pack_bits(real))
    weights = sum(kernels.unpack_bits(part, 32).long() << i for i, part in enumerate(digits))
    usual = (real[0, 0, 0].abs() / 2 * 7).round().long()
    usual[5] = 0
    assert torch.equal(weights[0, 0, 0], usual)
    for row in (1, 2):
        assert weights[0, 0, row].nonzero().flatten().tolist() == [5]
        assert weights[0, 0, row, 5] == 7
    assert not weights[0, 0, 3].any()
    assert (weights[0, 0, 4, 20:] == 7).all() and not weights[0, 0, 4, :20].any()
    assert torch.equal(weights, sum(
        kernels.unpack_bits(part, 32).long() << i
        for i, part in enumerate(kernels.grade_bits(real, 3, backend="reference").unbind(-1)[1:])
    ))  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_scores_are_the_best_and_the_last(backend):
    scores = torch.tensor([0.0, -INF, INF, 3.0, INF, -1.0, INF]).expand(1, 1, 1, 7)
    seen = torch.ones(1, 1, 1, 7, dtype=torch.bool)
    for k, wanted in ((2, [2, 4]), (4, [2, 3, 4, 6]), (7, [0, 2, 3, 4, 5, 6])):
        made = select(scores, k, seen, ~seen, backend=backend)
        assert made.flatten().tolist() == wanted
    with pytest.raises(ValueError, match="NaN"):
        select(scores * 0, 2, seen, ~seen, backend=backend)
