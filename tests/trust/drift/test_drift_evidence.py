"""The sequential test: p-values, bets and detectors against loops, and what it guarantees."""

import math

import numpy as np
import pytest

from hashattn.trust.drift import evidence
from hashattn.trust.drift.evidence import BETS, BINS, EDetectors, Exponents, bins_of, log_bets

EPSILONS = (0.1, 0.3, 0.5, 0.7)


class Halves:
    """Stands in for a generator: ties are broken in the middle."""

    def random(self, shape):
        return np.full(shape, 0.5)


def counts_of(values):
    """(streams, BINS) of values (rows, streams)."""
    return np.stack([np.bincount(bins_of(column), minlength=BINS) for column in values.T])


def some(rows, streams=3, seed=0):
    values = np.random.default_rng(seed).normal(size=(rows, streams))
    values[1::3, 1] = np.nan
    return values


def p_by_loop(reference, values):
    """One stream, value by value: which share of all so far is larger, ties half."""
    seen = [int(b) for b in bins_of(np.array(reference))]
    found = []
    for value in values:
        if math.isnan(value):
            found.append(math.nan)
            continue
        (b,) = bins_of(np.array([value])).tolist()
        seen.append(b)
        found.append((sum(x > b for x in seen) + 0.5 * sum(x == b for x in seen)) / len(seen))
    return found


@pytest.mark.parametrize("pieces", [1, 4, 11])
def test_p_values_rank_among_all_that_came_before(pieces):
    reference, values = np.random.default_rng(1).normal(size=(20, 3)), some(11)
    detectors = EDetectors(counts_of(reference), Halves())
    found = np.concatenate([detectors.p_values(part) for part in np.array_split(values, pieces)])
    for stream in range(3):
        expected = p_by_loop(reference[:, stream], values[:, stream])
        np.testing.assert_allclose(found[:, stream], expected, rtol=1e-12)
    assert detectors.seen.tolist() == (~np.isnan(values)).sum(0).tolist()


@pytest.mark.parametrize("pieces", [1, 5])
def test_detectors_follow_the_recursion(pieces):
    reference, values = np.random.default_rng(1).normal(size=(30, 3)), some(40)
    values[20:] += 2
    exponents = np.random.default_rng(2).uniform(0.2, 1, size=(3, *BETS))
    detectors = EDetectors(counts_of(reference), Halves(), exponents)
    parts, first = [], 0
    for part in np.array_split(values, pieces):
        parts.append(detectors.update(part, first))
        first += len(part)
    found = np.concatenate(parts)
    for stream in range(3):
        p_values = p_by_loop(reference[:, stream], values[:, stream])
        r = {(side, i): 0.0 for side in range(2) for i in range(4)}
        sums, starts = dict.fromkeys(r, 0.0), dict.fromkeys(r, 0)
        for row, p in enumerate(p_values):
            for side, i in r:
                if math.isnan(p):
                    continue
                eps, used = EPSILONS[i], p if side == 0 else 1 - p
                bet = (eps * used ** (eps - 1)) ** exponents[stream, side, i]
                r[side, i] = (r[side, i] + 1) * bet
                if sums[side, i] <= 0:
                    starts[side, i] = row
                sums[side, i] = max(sums[side, i], 0) + math.log(bet)
            mean = sum(r.values()) / len(r)
            expected = math.log(mean) if mean else -math.inf
            assert found[row, stream] == pytest.approx(expected, rel=1e-9, abs=1e-9)
        best = max(r, key=r.get)
        assert detectors.since(stream) == starts[best]
        assert detectors.rises(stream) == (best[0] == 0)


def test_bets_have_mean_one():
    grid = (np.arange(2_000_000) + 0.5) / 2_000_000
    means = np.exp(log_bets(grid)).mean(0)
    assert means.shape == BETS
    # the mass that the finest cell misses: eps p^eps / eps at p = 1 / 2,000,000
    np.testing.assert_allclose(means[:, 2:], 1, atol=2e-3)
    assert (means <= 1 + 1e-9).all() and (log_bets(np.array([np.nan])) < 0).all()


def test_p_values_of_exchangeable_data_are_uniform():
    """With few reference values, many ties and skewed data."""
    rng = np.random.default_rng(3)
    reference, values = rng.exponential(size=(50, 1)).round(1), rng.exponential(size=(4000, 1))
    found = EDetectors(counts_of(reference), rng).p_values(values.round(1))[:, 0]
    for level in (0.01, 0.1, 0.5, 0.9):
        sd = math.sqrt(level * (1 - level) / 4000)
        assert abs((found <= level).mean() - level) < 4 * sd


def test_false_alarms_of_exchangeable_data_are_as_rare_as_stated():
    """400 streams side by side: the share whose R ever reaches c within N is at most N / c."""
    rng, streams, steps = np.random.default_rng(4), 400, 300
    reference = rng.normal(size=(100, streams))
    detectors = EDetectors(counts_of(reference), rng)
    highest = np.full(streams, -np.inf)
    for _ in range(steps // 30):
        path = detectors.update(rng.normal(size=(30, streams)))
        highest = np.maximum(highest, path.max(0))
    for rate in (0.05, 0.2, 0.5):
        alarms = (highest >= math.log(steps / rate)).mean()
        assert alarms <= rate + 2 * math.sqrt(rate * (1 - rate) / streams)
    assert (highest >= math.log(steps / 0.9)).any()  # the bound is not empty


def test_a_shift_is_seen():
    rng = np.random.default_rng(5)
    for shift, rises in ((1.5, True), (-1.5, False)):
        detectors = EDetectors(counts_of(rng.normal(size=(1000, 1))), rng)
        before = detectors.update(rng.normal(size=(200, 1)))
        path = detectors.update(rng.normal(size=(40, 1)) + shift, 200)
        assert before.max() < math.log(1e5) < path.max()
        assert abs(detectors.since(0) - 200) <= 3 and detectors.rises(0) == rises


def test_state_does_not_grow():
    rng = np.random.default_rng(6)
    detectors = EDetectors(counts_of(rng.normal(size=(100, 4))), rng)
    detectors.update(rng.normal(size=(10, 4)))
    size = detectors.nbytes
    for _ in range(20):
        detectors.update(rng.normal(size=(50, 4)))
    assert detectors.nbytes == size
    detectors.reset()
    assert detectors.counts.sum() == 400 and detectors.seen.sum() == 0


def test_exponents_are_the_largest_that_the_sequences_allow():
    rng, classes = np.random.default_rng(7), np.array([1, 3])
    exponents = Exponents(classes)
    products = {0: [], 1: []}
    for sequence in range(12):
        p = rng.uniform(size=(8, 2)) ** (1 + sequence % 3)
        for row in p:
            exponents.add(sequence, row)
        for stream, stride in enumerate(classes):
            for begin in range(stride):
                products[stream].append(log_bets(p[begin::stride, stream]).cumsum(0))
    found = exponents.learned()
    grid = evidence._GRID
    for stream, paths in products.items():
        for bet in np.ndindex(BETS):
            most = [max(0.0, path[:, *bet].max()) for path in paths]
            whole = [path[-1, *bet] for path in paths]
            for exponent in grid:
                means = []
                for logs in (most, whole):
                    values = [math.exp(exponent * x) for x in logs]
                    means.append((sum(values) + max(values)) / (len(values) + 1))
                if means[0] <= 2 and means[1] <= 1:
                    break
            assert found[stream, *bet] == pytest.approx(exponent)
    assert found.min() < 1


def test_exponents_follow_few_sequences_at_a_time():
    exponents = Exponents(np.array([1]))
    for sequence in range(200):
        exponents.add(sequence, np.array([0.5]))
    assert len(exponents._open) <= 32
    assert (Exponents(np.array([1])).learned() == 1).all()


def test_damped_bets_keep_dependent_streams_quiet():
    """Sequences of 20 values with an offset each: plain bets alarm, learned exponents do not."""
    rng = np.random.default_rng(8)

    def sequence():
        return rng.normal(size=(20, 1)) + 0.7 * rng.normal()

    reference = [sequence() for _ in range(150)]
    learner = Exponents(np.array([1]))
    detectors = EDetectors(np.zeros((1, BINS), int), rng)
    for number, values in enumerate(reference):
        for p in detectors.p_values(values):
            learner.add(number, p)
    counts, highest = counts_of(np.concatenate(reference)), {}
    for name, exponents in (("plain", None), ("damped", learner.learned())):
        test = EDetectors(counts, rng, exponents)
        highest[name] = max(test.update(sequence()).max() for _ in range(150))
    assert highest["damped"] < math.log(3000 / 0.02) < highest["plain"]
