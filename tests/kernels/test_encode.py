"""Encoding, against every map by hand in float64."""

import math

import pytest
import torch
from torch import Tensor

from hashattn import kernels
from hashattn.kernels import ACTIVATIONS, Maps, unpack_bits
from kernel_inputs import BACKENDS
from on_device import on_device

encode, encode_pair = map(on_device, (kernels.encode, kernels.encode_pair))
UNSURE = 1e-4  # of a pre-activation: within rounding of 0, where backends may differ


def maps(heads: int, widths: tuple[int, ...], activation="silu", seed=0, folds=0) -> Maps:
    generator = torch.Generator().manual_seed(seed)
    sizes = list(zip(widths, widths[1:], strict=False))
    weights = tuple(torch.randn(heads, a, b, generator=generator) * a**-0.5 for a, b in sizes)
    biases = tuple(torch.randn(heads, b, generator=generator) * 0.1 for _, b in sizes)
    steps = torch.rand(heads, folds, widths[-1], generator=generator) if folds else None
    return Maps(weights, biases, activation, steps)


def vectors(*shape: int, dtype=torch.float32, seed=1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def activate(x: Tensor, name: str) -> Tensor:
    return {
        "silu": lambda: x / (1 + torch.exp(-x)),
        "relu": lambda: x.clamp(min=0),
        "gelu": lambda: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
        "tanh": lambda: torch.tanh(x),
    }[name]()


def by_hand(x: Tensor, stack: Maps) -> tuple[Tensor, Tensor]:
    """Pre-activations (batch, maps, n, bits) in float64, and how far the nearest sign was from 0:
    their own, or the one that decided on a fold."""
    shared = stack.heads // x.shape[1]
    out, distance = [], []
    for head in range(stack.heads):
        y = x[:, head // shared].double()
        for stage, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
            y = activate(y, stack.activation) if stage else y
            y = y @ weight[head].double() + bias[head].double()
        nearest = y.abs()
        for fold in range(stack.folds):
            step = stack.steps[head, fold].double()
            y = torch.stack([y - step, y + step])[(y <= 0).long(), *_places(y)]
            nearest = nearest.minimum(y.abs())
        out.append(y)
        distance.append(nearest)
    return torch.stack(out, dim=1), torch.stack(distance, dim=1)


def _places(y: Tensor) -> list[Tensor]:
    return torch.meshgrid(*[torch.arange(size) for size in y.shape], indexing="ij")


def check(codes: Tensor, x: Tensor, stack: Maps) -> None:
    expected, distance = by_hand(x, stack)
    assert codes.dtype == torch.int32 and codes.shape == (*expected.shape[:3], stack.bits // 32)
    sure = distance > UNSURE
    assert sure.float().mean() > 0.99
    assert ((unpack_bits(codes, stack.bits) == (expected > 0)) | ~sure).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "widths", [(64, 32), (128, 128, 32), (80, 96, 48, 64), (96, 40, 128), (256, 64, 256), (40, 32)]
)
def test_bits_are_the_signs_of_every_map(backend, activation, widths):
    stack, x = maps(4, widths, activation), vectors(2, 4, 3, widths[0])
    check(encode(x, stack, backend=backend), x, stack)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("widths", [(64, 32), (80, 96, 64), (64, 128)])
@pytest.mark.parametrize("folds", [1, 3])
def test_folds_come_before_the_sign(backend, widths, rows, folds):
    stack, x = maps(4, widths, folds=folds), vectors(2, 4, rows, widths[0])
    check(encode(x, stack, backend=backend), x, stack)
    plain = Maps(stack.weights, stack.biases, stack.activation)
    assert not torch.equal(encode(x, stack, backend=backend), encode(x, plain, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_folded_bits_are_the_digits_of_the_nearest_level(backend):
    """8 components of 4 bits: of all 16 sums +-w1 +-w2 +-w3 +-w4 the one nearest to x."""
    levels = torch.tensor([0.83, 0.44, 0.2, 0.11])
    steps = torch.stack([torch.cat([levels[:i], torch.zeros(3 - i)]) for i in range(4)], 1)
    weights = torch.eye(8).repeat_interleave(4, 1)[None]
    stack = Maps((weights,), (torch.zeros(1, 32),), steps=steps.repeat(1, 8)[None])
    x = vectors(1, 1, 50, 8)
    bits = unpack_bits(encode(x, stack, backend=backend), 32).unflatten(-1, (8, 4))
    signs = torch.tensor([[1 - 2 * (i >> j & 1) for j in range(4)] for i in range(16)])
    sums = signs.float() @ levels
    nearest = signs[(x[..., None] - sums).abs().argmin(-1)] > 0
    assert torch.equal(bits, nearest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_dtypes_and_numbers_of_vectors(backend, dtype, rows):
    stack, x = maps(2, (64, 48, 32)), vectors(1, 2, rows, 64, dtype=dtype)
    check(encode(x, stack, backend=backend), x, stack)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [2, 50])
def test_maps_share_heads_and_vectors_may_be_strided(backend, rows):
    """A key map per query head reads its KV head; keys are views of an interleaved cache."""
    stack, cache = maps(6, (32, 32, 64)), vectors(2, 3, rows + 4, 2, 32)
    x = cache[:, :, 2 : rows + 2, 0]
    check(encode(x, stack, backend=backend), x, stack)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_batch_axis_may_be_missing(backend):
    stack, x = maps(2, (16, 32)), vectors(2, 7, 16)
    whole = encode(x[None], stack, backend=backend)
    assert torch.equal(encode(x, stack, backend=backend), whole[0])


def test_rounded_maps_are_bfloat16_numbers():
    stack = maps(2, (64, 64, 32))
    rounded = stack.rounded()
    assert not stack.half and rounded.half
    for before, after in zip(stack.weights, rounded.weights, strict=True):
        assert torch.equal(after, before.bfloat16().float())
    x = vectors(1, 2, 4, 64)
    check(encode(x, rounded, backend="numba"), x, rounded)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("key_widths", "rows", "dtype"),
    [
        ((64, 64, 32), 1, torch.float32),
        ((64, 64, 32), 20, torch.float32),  # too many for one pass
        ((64, 96, 32), 1, torch.float32),  # other widths
        ((64, 64, 32), 1, torch.bfloat16),  # another dtype
    ],
)
def test_a_pair_is_two_encodings(backend, key_widths, rows, dtype):
    query_maps, key_maps = maps(8, (64, 64, 32)), maps(2, key_widths, seed=5)
    queries = vectors(2, 8, rows, 64)
    keys = vectors(2, 2, rows, 2, 64, dtype=dtype, seed=3)[:, :, :, 0]  # rows of the growing cache
    made = encode_pair(queries, query_maps, keys, key_maps, backend=backend)
    assert torch.equal(made[0], encode(queries, query_maps, backend=backend))
    assert torch.equal(made[1], encode(keys, key_maps, backend=backend))
    check(made[0], queries, query_maps)
    check(made[1], keys, key_maps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 20])
def test_a_pair_may_share_its_maps(backend, rows):
    """As in HATA, whose queries and keys are hashed alike."""
    stack, queries, keys = (
        maps(3, (64, 32)),
        vectors(1, 3, rows, 64),
        vectors(1, 3, rows, 64, seed=3),
    )
    made = encode_pair(queries, stack, keys, stack, backend=backend)
    check(made[0], queries, stack)
    check(made[1], keys, stack)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("folds", [(0, 3), (3, 3)])
def test_a_pair_with_folds(backend, folds):
    query_maps, key_maps = (maps(2, (64, 64), seed=i, folds=n) for i, n in enumerate(folds))
    queries, keys = vectors(1, 2, 1, 64), vectors(1, 2, 1, 64, seed=3)
    made = encode_pair(queries, query_maps, keys, key_maps, backend=backend)
    check(made[0], queries, query_maps)
    check(made[1], keys, key_maps)


def test_invalid_arguments():
    stack = maps(4, (64, 32))
    with pytest.raises(ValueError, match=r"x: expected \(batch, heads, n, 64\)"):
        encode(vectors(1, 4, 2, 32), stack)
    with pytest.raises(ValueError, match="maps has 4 heads, not a multiple of the 3"):
        encode(vectors(1, 3, 2, 64), stack)
    with pytest.raises(ValueError, match="maps of 40 bits"):
        encode(vectors(1, 4, 2, 64), maps(4, (64, 40)))
    with pytest.raises(ValueError, match="keys: expected"):
        encode_pair(vectors(1, 4, 1, 64), stack, vectors(1, 4, 1, 32), stack)
