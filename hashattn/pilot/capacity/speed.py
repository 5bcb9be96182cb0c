"""Bytes and seconds of a decode step, dense and sparse.

A step reads the weights once for the whole batch and each sequence's cache; a device that only
waits for its memory takes bytes / bandwidth. Compute, communication between devices, and (unless
measured) fixed costs are not counted; from a few hundred sequences on, where computing with the
weights takes longer than reading them, this flatters both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hashattn.attention.budget import Budget
from hashattn.base.checks import is_count, is_number, require, require_numbers
from hashattn.base.layout import check_layout
from hashattn.pilot.capacity.devices import Device
from hashattn.pilot.capacity.machine import Measurement, MeasurementError
from hashattn.pilot.capacity.shapes import ModelShape

USABLE = 0.9  # of a device's memory: the rest goes to activations, workspaces, fragmentation


@dataclass(frozen=True)
class Speed:
    """What a step costs on a device.

    budget: attended / cached tokens of a query head, in (0, 1], sink and local counted in. bits: of
    a key's code per KV head, a multiple of 32. lists: a token list for every query head (hashattn's
    default; rows that heads of a group share may be read again, which is counted as if none were
    shared) or for every KV head. measured: this machine's times, which then count instead of bytes.
    fixed_us: microseconds that each sparse layer takes beside that, where they are known.
    Raises ValueError naming the field; MeasurementError for times of other shapes, or for a device
    without a bandwidth and without times.
    """

    model: ModelShape
    device: Device
    budget: float = 1 / 16
    bits: int = 64
    lists: str = "per_query_head"
    measured: Measurement | None = None
    fixed_us: float | None = None

    def __post_init__(self) -> None:
        valid = is_number(self.budget) and 0 < self.budget <= 1
        require(valid, "budget", self.budget, "a number in (0, 1], e.g. 1/16")
        valid = is_count(self.bits, 32) and self.bits % 32 == 0
        require(valid, "bits", self.bits, "a positive multiple of 32")
        check_layout(self.lists, "lists")
        if self.fixed_us is not None:
            require_numbers({"fixed_us": self.fixed_us}, not_negative=("fixed_us",))
        if self.measured is not None:
            self.measured.check(self.model, self.budget, self.bits, self.lists)
        elif self.device.bandwidth is None:
            raise MeasurementError(f"{self.device.name} has no known bandwidth: measure it")

    def rows(self, context: int) -> int:
        """Tokens that a query head attends to."""
        return Budget(density=self.budget).total(context)

    def rows_share(self, context: int) -> float:
        """Rows of K and V that are read / cached, at most 1."""
        heads = self.model.group if self.lists == "per_query_head" else 1
        return min(1.0, self.rows(context) * heads / context)

    def dense_bytes(self, context: int, batch: int) -> float:
        """What a dense step reads."""
        return self.other_bytes(context, batch) + batch * self.model.full_bytes(context)

    def sparse_bytes(self, context: int, batch: int) -> float:
        """What a sparse step reads: of the layers with full attention all codes and some rows."""
        rows = self.model.full_bytes(context) * self.rows_share(context)
        codes = self.model.code_bytes_per_token(self.bits) * context
        return self.other_bytes(context, batch) + batch * (rows + codes)

    def other_bytes(self, context: int, batch: int) -> float:
        """What no selection saves: weights, and the cache of layers with a window."""
        return self.model.read_bytes(batch) + batch * self.model.window_bytes(context)

    def share(self, context: int, batch: int) -> float:
        """Share of a dense step's bytes that is K and V of the layers with full attention."""
        return 1 - 1 / self.ceiling(context, batch)

    def ceiling(self, context: int, batch: int) -> float:
        """How much faster a step would be if full attention took no time, on bandwidth alone:
        (weights + windows + K and V) / (weights + windows)."""
        return self.dense_bytes(context, batch) / self.other_bytes(context, batch)

    def bytes_speedup(self, context: int, batch: int) -> float:
        """Dense over sparse step, on bandwidth alone."""
        return self.dense_bytes(context, batch) / self.sparse_bytes(context, batch)

    def dense_seconds(self, context: int, batch: int) -> float:
        """Device seconds of a dense step; of several devices that share the work, their sum."""
        if self.measured is None:
            return self.dense_bytes(context, batch) / self.device.bandwidth
        full = batch * self.model.full_layers * self.measured.dense.seconds(context)
        return self._other_seconds(context, batch) + full

    def sparse_seconds(self, context: int, batch: int) -> float:
        """Device seconds of a sparse step; every device of several has the fixed costs."""
        fixed = 1e-6 * (self.fixed_us or 0.0) * self.model.full_layers
        fixed *= self.devices(context, batch)
        if self.measured is None:
            return fixed + self.sparse_bytes(context, batch) / self.device.bandwidth
        full = batch * self.model.full_layers * self.measured.sparse.seconds(context)
        return fixed + self._other_seconds(context, batch) + full

    def sparse_speedup(self, context: int, batch: int) -> float:
        """Dense over sparse step: by measured times where there are some, else by bytes."""
        return self.dense_seconds(context, batch) / self.sparse_seconds(context, batch)

    def policy_seconds(self, context: int, batch: int) -> float:
        """Device seconds of a step that stays dense where a sparse one would lose
        (attach's dense_below)."""
        return min(self.dense_seconds(context, batch), self.sparse_seconds(context, batch))

    def speedup(self, context: int, batch: int) -> float:
        """Dense step over one by this policy, which never loses."""
        return max(1.0, self.sparse_speedup(context, batch))

    def spare_us(self, context: int, batch: int) -> float:
        """Microseconds gained in each layer with full attention, the work of each being shared
        evenly by all devices that are needed: a further fixed cost that would leave nothing of it;
        negative for a loss."""
        gained = self.dense_seconds(context, batch) - self.sparse_seconds(context, batch)
        return 1e6 * gained / self.model.full_layers / self.devices(context, batch)

    def stored_bytes(self, context: int, batch: int) -> float:
        """Weights, K, V and codes: all of them stay in the device's memory."""
        sequence = self.model.full_bytes(context) + self.model.window_bytes(context)
        sequence += self.model.code_bytes_per_token(self.bits) * context
        return self.model.weight_bytes + batch * sequence

    def devices(self, context: int, batch: int) -> int:
        """How many such devices hold what is stored, USABLE of their memory being used."""
        return -int(-self.stored_bytes(context, batch) // (USABLE * self.device.memory))

    def quantised(self, bits: float) -> Speed:
        """The same with weights of so many bits, read at the bandwidth of the model's own."""
        other = replace(self.model, weight_bits=bits)
        return replace(self, model=other)

    def _other_seconds(self, context: int, batch: int) -> float:
        seconds = self.model.read_bytes(batch) / self.measured.weights_bandwidth
        windows = (min(window, context) for window in self.model.windows)
        return seconds + batch * sum(map(self.measured.dense.seconds, windows))


def least(holds: Callable[[int], bool], most: int) -> int | None:
    """The least number in 1..most for which `holds`, if it stays so once it does; None: for none.

    `holds` is asked for powers of two, then between two of them.
    """
    high = 1
    while not holds(high):
        if high == most:
            return None
        high = min(2 * high, most)
    low = high // 2  # does not hold, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
