"""Sequential evidence that a stream of numbers changed: conformal Shiryaev-Roberts e-detectors.

**The p-value** of a value is its rank among the reference's values and all earlier ones of the
stream, ties broken at random. If reference and stream are exchangeable, these p-values are
independent and exactly uniform (Vovk, Nouretdinov and Gammerman 2003, "Testing exchangeability
on-line"; Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2nd edition, chapter
8), for however few values and whatever their distribution. Values are counted in fixed bins, so
that memory is bounded; equal bins are ties, which costs power and not validity.

**The evidence** of a p-value is a bet e(p) with mean 1 under uniformity: eps p^(eps - 1), for small
values and for large ones, and for several eps (the power calibrators of Vovk 1993). The
Shiryaev-Roberts e-detector sums it over all times at which a change may have begun,
R_t = (R_{t-1} + 1) e_t (Shin, Ramdas and Rinaldo 2022, "E-detectors: a nonparametric framework for
sequential change detection", section 2; with conformal p-values, Vovk et al. 2021, "Retrain or not
retrain"); a detector's R is the mean over the bets.

**The guarantee.** R_t - t is a martingale, so R is a submartingale whose mean after N values is N,
and by Doob's inequality P(max of R_1..R_N >= c) <= N / c. For several detectors
that alarm at c / w_k, weights w_k adding up to 1, the probability that any does within N values is
at most N / c, however they depend on each other (union bound), and the mean time to the first false
alarm at least c / 2. This is for values that are exchangeable with the reference's, one by one.

**Values of one sequence are not**: neighbouring tokens, and all tokens of a sequence, are alike.
So a bet is raised to an exponent of at most 1, as large as the reference's sequences allow: on
average over them, the product of a whole sequence's bets is then at most 1, so that R does not grow
from one sequence to the next, and the largest product within a sequence at most 2 (`Exponents`; the
adjustment coefficient of Lundberg's inequality, estimated: Asmussen and Albrecher 2010, "Ruin
Probabilities", chapter IV). With such an exponent a bet's mean is at most 1 (Jensen), and R at most
that of bets scaled up to mean 1, so the guarantee above stays true. That false alarms stay as rare
where sequences, not tokens, are exchangeable is measured (`drift.study`), not proved: no test can
tell from one sequence of a kind that the reference never had whether traffic changed.
"""

from __future__ import annotations

import numpy as np

BINS = 256
_EDGE = 8.0  # values are standardised; what lies farther out is counted in the last bins
_EPSILONS = np.array([0.1, 0.3, 0.5, 0.7])
_LOG_EPSILONS = np.log(_EPSILONS)
BETS = 2, len(_EPSILONS)  # on large values (small p) and on small ones, with each epsilon
_GRID = np.geomspace(1, 0.02, 24)  # exponents
# the means that the largest product of bets within a sequence, and the whole one's, may have
_LIMITS = np.array([2.0, 1.0])
MOST_OPEN = 32  # sequences that are followed at a time
_ROWS = 64
_LARGEST = 600.0  # logarithm of what is counted of a product
_SMALLEST = 1e-300  # keeps the logarithm of a p-value finite


def bins_of(values: np.ndarray) -> np.ndarray:
    """Bins int64 of standardised values; NaN goes to bin 0 and must be masked."""
    scaled = (np.nan_to_num(values) + _EDGE) * (BINS / (2 * _EDGE))
    return np.clip(scaled, 0, BINS - 1).astype(np.int64)


def log_bets(p: np.ndarray) -> np.ndarray:
    """Logarithms (..., *BETS) of all bets on p-values, 0 for NaN."""
    p = np.nan_to_num(p, nan=0.5)
    logs = np.log(np.maximum(np.stack([p, 1 - p], -1), _SMALLEST))[..., None]
    return _LOG_EPSILONS + (_EPSILONS - 1) * logs


class EDetectors:
    """Detectors of `streams` streams beside each other; memory does not grow with their lengths.

    counts (streams, BINS) int64: how often the reference's values fell into each bin; rng breaks
    ties. exponents (streams, *BETS): of the bets, None for 1. seen: observations of each stream.
    """

    def __init__(
        self,
        counts: np.ndarray,
        rng: np.random.Generator,
        exponents: np.ndarray | None = None,
    ) -> None:
        self._reference, self._rng = counts.astype(np.int64), rng
        shape = len(counts), *BETS
        self._exponents = np.ones(shape) if exponents is None else exponents
        self.reset()

    def reset(self) -> None:
        """Forget the evidence and all values but the reference's."""
        streams = len(self._reference)
        self._counts = self._reference.copy()
        self.seen = np.zeros(streams, np.int64)
        shape = streams, *BETS
        self._log_r = np.full(shape, -np.inf)
        self._log_cusum = np.zeros(shape)
        self._start = np.zeros(shape, np.int64)

    @property
    def counts(self) -> np.ndarray:
        """Values in each bin, the reference's and those since: int64 (streams, BINS)."""
        return self._counts

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        arrays = (self._reference, self._counts, self.seen, self._log_r, self._log_cusum,
                  self._start, self._exponents)  # fmt: skip
        return sum(array.nbytes for array in arrays)

    def p_values(self, values: np.ndarray) -> np.ndarray:
        """`_p_values` of some rows at a time, as they are compared with each other."""
        parts = [self._p_values(values[i : i + _ROWS]) for i in range(0, len(values), _ROWS)]
        return np.concatenate(parts) if parts else np.empty(values.shape)

    def _p_values(self, values: np.ndarray) -> np.ndarray:
        """Conformal p-values (rows, streams) of standardised values, row after row; each row joins
        what the next is compared with. Small where a value is larger than usual. NaN stays NaN."""
        rows = len(values)
        present = ~np.isnan(values)
        bins = bins_of(values)
        streams = np.arange(values.shape[1])
        at_least = self._counts[:, ::-1].cumsum(1)[:, ::-1]
        equal = self._counts[streams, bins]  # (rows, streams)
        above = at_least[streams, bins] - equal
        total = at_least[:, 0] + present.cumsum(0)  # itself included
        earlier = np.tri(rows, k=-1, dtype=bool)[:, :, None] & present  # [row, earlier row]
        above = above + (earlier & (bins > bins[:, None])).sum(1)
        equal = equal + (earlier & (bins == bins[:, None])).sum(1) + 1
        p = (above + self._rng.random(bins.shape) * equal) / np.maximum(total, 1)
        row, stream = present.nonzero()
        np.add.at(self._counts, (stream, bins[row, stream]), 1)
        self.seen += present.sum(0)
        return np.where(present, p, np.nan)

    def update(self, values: np.ndarray, first: int = 0) -> np.ndarray:
        """log R (rows, streams) after each row of standardised values; NaN leaves it as it was.

        first: the number of the first row, in which `since` counts.
        """
        p = self.p_values(values)
        present = ~np.isnan(p)[:, :, None, None]
        bets = np.where(present, log_bets(p) * self._exponents, 0)
        after = bets.cumsum(0)
        before = after - bets
        # R_t = exp(after_t) (R_0 + the sum over rows s up to t of exp(-before_s))
        terms = np.where(present, -before, -np.inf)
        sums = np.logaddexp.accumulate(np.concatenate([self._log_r[None], terms]))[1:]
        path = after + sums
        self._log_r = path[-1]
        self._follow(np.where(present, before, np.inf), after[-1], first)
        flat = path.reshape(*values.shape, -1)
        return np.logaddexp.reduce(flat, axis=2) - np.log(flat.shape[2])

    def _follow(self, before: np.ndarray, total: np.ndarray, first: int) -> None:
        """The CUSUM of every bet, max(W, 0) + bet, and the row at which it last began."""
        lowest = before.min(0)
        latest = len(before) - 1 - before[::-1].argmin(0)
        begins = lowest <= -self._log_cusum
        self._start = np.where(begins, first + latest, self._start)
        self._log_cusum = total - np.minimum(lowest, -self._log_cusum)

    def since(self, stream: int) -> int:
        """The row at which the change in a stream most likely began: where the product of its
        strongest bet since then is largest (the CUSUM estimate)."""
        best = self._log_r[stream].argmax()
        return int(self._start[stream].flat[best])

    def rises(self, stream: int) -> bool:
        """Whether the strongest bet is on larger values than the reference's."""
        return bool(self._log_r[stream].argmax() < len(_EPSILONS))


class Exponents:
    """Learns from sequences how much bets have to be damped, in constant memory.

    classes (streams,): a stream that the monitor sees on every so-many-th token alone is learned
    from every such part of a sequence.
    """

    def __init__(self, classes: np.ndarray) -> None:
        self._classes = classes
        shape = len(_LIMITS), len(_GRID), len(classes), *BETS
        self._total, self._largest = np.zeros((2, *shape))
        self._number = np.zeros(len(classes), np.int64)
        self._open: dict[int, tuple[int, np.ndarray, np.ndarray, np.ndarray]] = {}

    def add(self, sequence: int, p: np.ndarray) -> None:
        """The next row of p-values (streams,) of a sequence, NaN where there is none."""
        if sequence not in self._open:
            while len(self._open) >= MOST_OPEN:
                self._close(next(iter(self._open)))
            shape = self._classes.max(), len(p), *BETS
            self._open[sequence] = 0, np.zeros(shape), np.zeros(shape), np.zeros(shape[:2], bool)
        number, sums, most, seen = self._open[sequence]
        here = number % self._classes, np.arange(len(p))
        sums[here] += np.where(np.isnan(p)[:, None, None], 0, log_bets(p))
        most[here] = np.maximum(most[here], sums[here])
        seen[here] |= ~np.isnan(p)
        self._open[sequence] = number + 1, sums, most, seen

    def _close(self, sequence: int) -> None:
        _, sums, most, seen = self._open.pop(sequence)
        for logs, total, largest in zip((most, sums), self._total, self._largest, strict=True):
            for part, shown in zip(logs, seen, strict=True):
                for number, exponent in enumerate(_GRID):
                    product = np.exp(np.minimum(exponent * part, _LARGEST)) * shown[:, None, None]
                    total[number] += product
                    np.maximum(largest[number], product, out=largest[number])
        self._number += seen.sum(0)

    def learned(self) -> np.ndarray:
        """Exponents (streams, *BETS) by all sequences so far. The largest product counts twice, for
        the sequences that were not seen."""
        for sequence in list(self._open):
            self._close(sequence)
        number = self._number[:, None, None]
        means = (self._total + self._largest) / (number + 1)
        fits = (means <= _LIMITS[:, None, None, None, None]).all(0)
        first = np.where(fits.any(0), fits.argmax(0), len(_GRID) - 1)
        return _GRID[first]
