"""Sampling: against a loop in Python, without bias over seeds, alike wherever the coins fall."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from hashattn import kernels
from hashattn.kernels import (
    NAT,
    Coins,
    grade_bits,
    hamming_scores,
    indices_to_mask,
    sample,
    unpack_bits,
)
from hashattn_kernels.coins import CHANCES, LARGEST, SIZE, SURVEYED, TABLE
from kernel_inputs import BACKENDS, random_codes
from on_device import on_device

sample_by_codes = on_device(kernels.sample_by_codes)
TRUST = 0.1


def rows_of(*shape: int) -> Iterator[tuple[int, ...]]:
    yield from np.ndindex(*shape)


def by_hand(costs: dict[int, int], certain: int, drawn: int, coins: dict[int, int]) -> dict:
    """{token: log weight} of one row's candidates, by the definition, every tau tried."""
    order = sorted(costs, key=lambda token: (costs[token], token))
    sure, rest = order[:certain], sorted(order[certain:])
    read = dict.fromkeys(sure, 0.0)
    if not drawn or not rest:
        return read
    stride = math.ceil(len(costs) / SURVEYED)
    cap = max(
        (c for c in range(LARGEST + 1) if CHANCES[c] * len(rest) >= round(TRUST * SIZE) * drawn),
        default=0,
    )
    counts = dict.fromkeys(rest, 0)
    for place, token in enumerate(sorted(costs)):
        if token in counts and sure and costs[token] == costs[sure[-1]]:
            counts[token] = 1
        elif token in counts and place % stride == 0:
            counts[token] = stride
    shown = [costs[token] for token in rest if counts[token]]
    low, tau = min(shown, default=0) - LARGEST - 1, None
    values, numbers = np.array([costs[t] for t in rest]), np.array([counts[t] for t in rest])
    for guess in range(max(shown, default=0), low - 1, -1):
        over = np.clip(values - guess, 0, cap)
        if (CHANCES[over] * numbers).sum() <= drawn * SIZE:
            tau = guess
            break
    tau = low if tau is None else tau
    for token in rest:
        over = min(max(costs[token] - tau, 0), cap)
        if coins[token] >= over:
            read[token] = math.log(SIZE / CHANCES[over])
    return read


def test_coins_are_exponential_and_chances_are_exact():
    nats = np.sort(TABLE) / NAT
    expected = -np.log((np.arange(SIZE)[::-1] + 0.5) / SIZE)
    assert np.abs(nats - expected).max() <= 0.5 / NAT + 1e-9
    for cost in (0, 1, 700, 5000, LARGEST):
        assert CHANCES[cost] == (TABLE >= cost).sum()
        assert CHANCES[cost] / SIZE == pytest.approx(math.exp(-cost / NAT), abs=3 / SIZE, rel=1e-3)


def test_a_coin_depends_on_its_counters_alone():
    places = torch.arange(9000)[None]
    steps = torch.tensor([[9000, 8999]])
    coins = Coins(seed=7, layer=3)
    made = coins.of(4, steps, places)
    assert made.shape == (1, 4, 2, 9000) and made.dtype == torch.int32
    alone = Coins(seed=7, layer=3, first_list=2).of(1, steps[:, 1:], places)
    assert torch.equal(alone[:, 0, 0], made[:, 2, 1])  # of its list and step, whoever holds them
    padded = coins.of(4, steps, (torch.arange(9100) - 100).clamp(min=0)[None])
    assert torch.equal(padded[..., 100:], made)  # places count visible tokens
    batch = coins.of(4, steps.expand(3, 2), places)
    assert torch.equal(batch, made.expand(3, -1, -1, -1))
    for other in (Coins(8, 3), Coins(7, 4), Coins(7, 3, 1), Coins(7 + 2**40, 3)):
        assert (other.of(4, steps, places) == made).float().mean() < 0.01
    assert (made[:, :, 0] == made[:, :, 1]).float().mean() < 0.01
    fixed = Coins(7, 3, fresh=False).of(4, steps, places)
    assert torch.equal(fixed[:, :, 0], fixed[:, :, 1])


def test_coins_of_neighbours_lists_and_layers_are_unrelated():
    def uniform(coins: Coins) -> Tensor:
        made = coins.of(8, torch.tensor([[40_000]]), torch.arange(40_000)[None])[0, :, 0]
        return (-made / NAT).exp().double()

    u = uniform(Coins(seed=1))
    assert u.mean().item() == pytest.approx(0.5, abs=0.01)
    lags = [torch.corrcoef(torch.stack((u[:, lag:].flatten(), u[:, :-lag].flatten())))[0, 1]
            for lag in (1, 2, 3, 7, 32, 64, 4096)]  # fmt: skip
    assert max(map(abs, lags)) < 0.02
    pairs = torch.corrcoef(torch.cat((u, uniform(Coins(seed=1, layer=1)))))
    assert (pairs - torch.eye(16)).abs().max() < 0.03


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize(("certain", "drawn"), [(0, 6), (5, 7), (9, 0), (0, 0), (60, 5), (3, 60)])
def test_sample_by_hand(certain, drawn, backend):
    generator = torch.Generator().manual_seed(certain + 10 * drawn)
    shape = 2, 2, 3, 40
    costs = torch.randint(0, 6 * NAT, shape, generator=generator)
    costs[:, 1] = costs[:, 1] // NAT * NAT  # ties
    coins = Coins(seed=5).of(2, torch.tensor([[38, 39, 40]] * 2), torch.arange(40)[None])
    candidates = torch.rand(2, 1, 3, 40, generator=generator) < 0.8
    mandatory = torch.rand(2, 1, 3, 40, generator=generator) < 0.1
    made, weights = sample(
        costs, certain, drawn, TRUST, coins, candidates, mandatory, backend=backend
    )
    for b, line, row in rows_of(2, 2, 3):
        always = mandatory[b, 0, row].nonzero()[:, 0].tolist()
        free = (candidates & ~mandatory)[b, 0, row].nonzero()[:, 0].tolist()
        own = costs[b, line, row].tolist()
        flips = coins[b, line, row].tolist()
        read = by_hand({t: own[t] for t in free}, certain, drawn, {t: flips[t] for t in free})
        read |= dict.fromkeys(always, 0.0)
        listed = [t for t in made[b, line, row].tolist() if t >= 0]
        assert listed == sorted(read)
        expected = torch.tensor([read[t] for t in listed])
        torch.testing.assert_close(weights[b, line, row, : len(listed)], expected)


@pytest.mark.parametrize("n", [31, 4096, 9000])
def test_thresholds_of_scores_are_found_alike(n):
    """Costs with ties, far outliers and rows without candidates; long rows are surveyed."""
    generator = torch.Generator().manual_seed(n)
    costs = (torch.randn(1, 2, 5, n, generator=generator) * 2 * NAT).round().long()
    costs[:, :, 1] = costs[:, :, 1] // NAT * NAT + 7 * NAT
    costs[:, :, 2, ::3] = 1 << 40
    candidates = torch.rand(1, 1, 5, n, generator=generator) < 0.9
    candidates[:, :, 3] = False
    coins = Coins(seed=5).of(2, torch.full((1, 5), n), torch.arange(n)[None])
    drawn = torch.tensor([[[n // 9, 2, n // 4, 5, n]]])
    arguments = costs, n // 20, drawn, TRUST, coins, candidates, ~candidates & False
    made, expected = (sample(*arguments, backend=name) for name in ("numba", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_sums_over_all_tokens_are_estimated_without_bias():
    """Numerator and denominator of a softmax, over seeds: within the standard error of dense's,
    though the costs are wrong by a nat and one token's is wrong by four."""
    generator = torch.Generator().manual_seed(0)
    n, seeds = 400, 3000
    true = torch.randn(n, generator=generator, dtype=torch.float64) * 1.5
    guess = true + torch.randn(n, generator=generator)
    true[17] += 4
    values = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    costs = ((guess.max() - guess) * NAT).round().long().expand(1, 1, 1, n)
    everything = torch.ones(1, 1, 1, n, dtype=torch.bool)
    sink = torch.zeros_like(everything)
    sink[..., :4] = True
    sums, counts = [], []
    for seed in range(seeds):
        coins = Coins(seed).of(1, torch.tensor([[n]]), torch.arange(n)[None])
        tokens, weights = sample(costs, 10, 30, TRUST, coins, everything, sink)
        tokens, weights = tokens.flatten().long(), weights.flatten().double()
        shares = (true[tokens] + weights).exp()
        sums.append(torch.cat((shares[None].sum(-1), shares @ values[tokens])))
        counts.append(float(len(tokens)))
    sums = torch.stack(sums)
    dense = torch.cat((true.exp()[None].sum(-1), true.exp() @ values))
    error = (sums.mean(0) - dense) / (sums.std(0) / seeds**0.5)
    assert error.abs().max() < 4
    assert np.mean(counts) == pytest.approx(44, abs=0.5)
    assert (sums[:, 0].std() / dense[0]).item() > 0.02  # or nothing was drawn


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bits", "planes", "most"), [(32, 5, 255), (128, 6, 1023)])
@pytest.mark.parametrize("budget", [(0, 20), (12, 20), (40, 0), (900, 5), (5, 900)])
def test_sample_by_codes_is_sample_by_distances(backend, bits, planes, most, budget):
    generator = torch.Generator().manual_seed(bits)
    batch, heads, code_heads, rows, n = 2, 4, 2, 2, 300
    if backend == "triton":  # its interpreter takes seconds for a row
        heads, code_heads, rows = 2, 1, 1
    keys = random_codes(batch, code_heads, n, bits // 32)
    pre = torch.randn(batch, heads, rows, bits, generator=generator)
    queries = grade_bits(pre, planes, most)
    units = torch.randint(1, 400, (batch, heads, rows), generator=generator)
    spans = torch.tensor([[[0, 298], [0, 300]], [[37, 250], [41, 300]]])[:, :rows]
    coins = Coins(seed=3, layer=2, first_list=1)
    certain, drawn = budget
    made, weights = sample_by_codes(
        queries, keys, units, certain, drawn, TRUST, coins, 4, 9, spans=spans, most=most,
        backend=backend,
    )  # fmt: skip
    weight = sum(unpack_bits(queries[..., 1 + p], bits).long() << p for p in range(planes)).sum(-1)
    costs = (weight[..., None] - hamming_scores(queries, keys, heads)) * units[..., None]
    for b, line, row in rows_of(batch, heads, rows):
        first, last = spans[b, row].tolist()
        low, high = first + 4, last - 9
        places = (torch.arange(n) - first).clamp(min=0)[None]
        flips = coins.of(heads, spans[b : b + 1, row : row + 1].diff()[..., 0], places)
        own = {t: int(costs[b, line, row, t]) for t in range(low, high)}
        flips = {t: int(flips[0, line, 0, t]) for t in own}
        read = by_hand(own, certain, drawn, flips)
        read |= dict.fromkeys((*range(first, low), *range(high, last)), 0.0)
        listed = [t for t in made[b, line, row].tolist() if t >= 0]
        assert listed == sorted(read)
        expected = torch.tensor([read[t] for t in listed])
        torch.testing.assert_close(weights[b, line, row, : len(listed)], expected)


@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_long_rows_are_surveyed_alike_by_all_backends(backend):
    """More candidates than are surveyed, several blocks of coins, padding that shifts them."""
    keys = random_codes(1, 1, 20_000, 1)
    queries = grade_bits(torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(1)))
    units = torch.tensor([[[90], [300]]])
    spans = torch.tensor([[[1234, 19_990]]])
    arguments = queries, keys, units, 300, 300, TRUST, Coins(9), 4, 28
    made = sample_by_codes(*arguments, spans=spans, most=255, backend=backend)
    expected = sample_by_codes(*arguments, spans=spans, most=255, backend="reference")
    assert all(map(torch.equal, made, expected))
    drawn = (made[0] >= 0).sum(-1) - 332
    assert (drawn - 300).abs().max() < 80
    shifted = sample_by_codes(
        queries, keys[:, :, 1234:], units, 300, 300, TRUST, Coins(9), 4, 28,
        spans=spans - 1234, most=255, backend=backend,
    )  # fmt: skip
    there = made[0] >= 0
    assert torch.equal(shifted[0][there], made[0][there] - 1234)  # as without padding
    assert torch.equal(shifted[1], made[1])


@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_lists_of_a_group_by_plain_codes(backend):
    """Matching bits summed over heads: even groups' distances are halved by the kernel."""
    keys = random_codes(1, 2, 500, 2)
    for heads in (2, 4, 6):
        queries = random_codes(1, heads, 2, 2)
        arguments = queries, keys, torch.full((1, 2, 2), 200), 20, 30, TRUST, Coins(2), 4, 5
        made = sample_by_codes(*arguments, backend=backend)
        expected = sample_by_codes(*arguments, backend="reference")
        assert all(map(torch.equal, made, expected))


def test_a_width_that_is_too_small_leaves_out_the_last_tokens():
    keys, queries = random_codes(1, 1, 300, 1), random_codes(1, 1, 1, 1)
    arguments = queries, keys, torch.full((1, 1, 1), 200), 20, 30, TRUST, Coins(2), 4, 5
    whole = sample_by_codes(*arguments)
    for backend in ("numba", "reference"):
        cut = sample_by_codes(*arguments, width=17, backend=backend)
        assert torch.equal(cut[0], whole[0][..., :17]) and torch.equal(cut[1], whole[1][..., :17])


def test_everything_is_read_where_the_budget_holds_it():
    costs = torch.arange(20)[None, None, None] * NAT
    coins = Coins().of(1, torch.tensor([[20]]), torch.arange(20)[None])
    everything = torch.ones(1, 1, 1, 20, dtype=torch.bool)
    for certain, drawn in ((20, 0), (0, 20), (7, 13), (100, 100), (0, 100)):
        tokens, weights = sample(costs, certain, drawn, 1.0, coins, everything, ~everything)
        assert indices_to_mask(tokens, 20).all() and not weights.any()


def test_bad_arguments():
    costs = torch.zeros(1, 1, 1, 5, dtype=torch.int64)
    everything = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    coins = torch.zeros(1, 1, 1, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"trust = 0: must be a number in \(0, 1\]"):
        sample(costs, 1, 1, 0, coins, everything, ~everything)
    with pytest.raises(ValueError, match="drawn: expected a non-negative integer"):
        sample(costs, 1, -1, 0.5, coins, everything, ~everything)
