"""Selection, against a stable sort of Python numbers."""

import pytest
import torch
from torch import Tensor

from hashattn.kernels import select

BACKENDS = ("reference", "numpy", "numba")


def stable_choice(scores: list, k: int, candidates: list, mandatory: list) -> list[int]:
    """The definition: all `mandatory`, then the k best candidates, lowest index first on ties."""
    pool = [
        i
        for i, allowed in enumerate(candidates)
        if allowed and not mandatory[i] and scores[i] != float("-inf")
    ]
    best = sorted(pool, key=lambda i: (-scores[i], i))[:k]
    return sorted([i for i, kept in enumerate(mandatory) if kept] + best)


def expected_indices(scores: Tensor, k: Tensor, candidates: Tensor, mandatory: Tensor) -> Tensor:
    batch, lists, q_len, _ = scores.shape
    candidates, mandatory = candidates.expand_as(scores), mandatory.expand_as(scores)
    k = k.expand(batch, lists, q_len)
    rows = [
        stable_choice(
            scores[b, i, r].tolist(),
            int(k[b, i, r]),
            candidates[b, i, r].tolist(),
            mandatory[b, i, r].tolist(),
        )
        for b in range(batch)
        for i in range(lists)
        for r in range(q_len)
    ]
    width = max(map(len, rows))
    padded = [row + [-1] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int32).reshape(batch, lists, q_len, width)


def random_scores(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if kind == "few_levels":
        return torch.randint(0, 4, shape, generator=generator, dtype=torch.int32)
    if kind == "wide_integers":
        return torch.randint(-(2**62), 2**62, shape, generator=generator)
    scores = torch.randn(shape, generator=generator)
    if kind == "float_ties":
        return (scores * 2).round()
    if kind == "both_zeros":  # -0.0 equals 0.0
        return (scores * 0).where(scores.abs() < 1, scores.sign())
    if kind == "all_sizes":  # from subnormal to infinite
        return (
            scores
            * torch.tensor([1e-45, 1e-40, 1e-6, 1.0, 1e38, torch.inf])[
                torch.randint(0, 6, shape, generator=generator)
            ]
        )
    if kind == "with_minus_infinity":
        return scores.masked_fill(torch.rand(shape, generator=generator) < 0.5, -torch.inf)
    return scores.to(torch.bfloat16 if kind == "bfloat16" else torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kind",
    [
        "few_levels",
        "wide_integers",
        "float32",
        "float_ties",
        "bfloat16",
        "with_minus_infinity",
        "both_zeros",
        "all_sizes",
    ],
)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 29), (1, 2, 1, 100)])
def test_selects_what_a_stable_sort_selects(backend, kind, shape):
    generator = torch.Generator().manual_seed(len(kind) + shape[-1])
    batch, lists, q_len, n = shape
    for trial in range(5):
        scores = random_scores(kind, shape, generator)
        k = torch.randint(0, n + 3, (batch, (1, lists)[trial % 2], q_len), generator=generator)
        visible = torch.rand(batch, 1, q_len, n, generator=generator) < 0.8
        mandatory = visible & (torch.rand(batch, 1, q_len, n, generator=generator) < 0.2)
        actual = select(scores, k, visible, mandatory, backend=backend)
        assert actual.dtype == torch.int32
        assert torch.equal(actual, expected_indices(scores, k, visible, mandatory))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_take_the_lowest_indices(backend):
    scores = torch.full((1, 1, 1, 10), 7, dtype=torch.int32)
    mandatory = torch.zeros(1, 1, 1, 10, dtype=torch.bool)
    mandatory[..., -1] = True
    indices = select(scores, 3, torch.ones_like(mandatory), mandatory, backend=backend)
    assert indices.flatten().tolist() == [0, 1, 2, 9]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_select(backend):
    none = torch.zeros(1, 2, 1, 6, dtype=torch.bool)
    assert select(torch.zeros(1, 2, 1, 6), 3, none, none, backend=backend).shape == (1, 2, 1, 0)


def test_invalid_arguments():
    allowed = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    scores = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ValueError, match="NaN"):
        select(scores / 0, 1, allowed, ~allowed)
    with pytest.raises(ValueError, match="scores: expected real"):
        select(scores[0], 1, allowed, ~allowed)
    with pytest.raises(ValueError, match="k: expected"):
        select(scores, -1, allowed, ~allowed)
    with pytest.raises(ValueError, match="k: expected"):
        select(scores, 1.5, allowed, ~allowed)
