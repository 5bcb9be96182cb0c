"""What a drift monitor says at one time: plain numbers, for people, JSON and Prometheus."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

OK, WARN, ALARM = STATES = ("ok", "warn", "alarm")


@dataclass(frozen=True)
class Cause:
    """What raised an alarm.

    statistic: its name. layer: where, None for the mean over all layers. rises: whether the values
    became larger. step: the token, counted from the start or the last reset, at which the alarm was
    raised; since: at which the change most likely began.
    """

    statistic: str
    layer: int | None
    rises: bool
    step: int
    since: int


@dataclass(frozen=True)
class StatisticReport:
    """One statistic of one layer, or of the mean over all layers.

    usual, spread: mean and standard deviation in the reference (0 and 1 for all layers, whose
    values are standardised). recent: mean over the last few hundred values, None before the first.
    seen: values since the start or the last reset. evidence: 1 raises an alarm.
    """

    usual: float
    spread: float
    recent: float | None
    seen: int
    evidence: float


@dataclass(frozen=True)
class LayerReport:
    """One layer, or all of them together (layer None).

    statistics: by name. evidence: the most of them. calls: tokens by "sparse" or why they were read
    dense. dense: share of tokens read dense. bits: of the codes of keys and of queries, "entropy"
    in bits per code (bits taken as independent, mean over heads), "usual_entropy" in the reference,
    and "moved", the mean distance between recent and usual rates at which a bit is 1; empty without
    codes and for all layers.
    """

    layer: int | None
    state: str
    evidence: float
    cause: Cause | None
    statistics: dict[str, StatisticReport]
    calls: dict[str, int]
    dense: float
    bits: dict[str, dict[str, float]]


@dataclass(frozen=True)
class DriftReport:
    """The monitor's state.

    steps: tokens seen since the start or the last reset. overall: the worst of all; layers: each.
    warn_at: evidence at which a state is "warn"; "alarm" is at 1. horizon, false_alarms: the
    guarantee, see DriftSettings.
    """

    steps: int
    overall: LayerReport
    layers: tuple[LayerReport, ...]
    warn_at: float
    horizon: int
    false_alarms: float

    @property
    def state(self) -> str:
        """ "ok", "warn" or "alarm"."""
        return self.overall.state

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        return asdict(self)

    def summary(self) -> str:
        """A few lines for a person."""
        lines = [f"{self.state} after {self.steps} tokens"]
        for part in (self.overall, *self.layers):
            name = "all layers" if part.layer is None else f"layer {part.layer}"
            line = f"{name:<11} {part.state:<6} evidence {part.evidence:.2g}"
            if part.cause is not None:
                cause = part.cause
                where = "all layers" if cause.layer is None else f"layer {cause.layer}"
                line += (
                    f", {cause.statistic} of {where} {'rose' if cause.rises else 'fell'}"
                    f" at token {cause.since}, noticed at {cause.step}"
                )
            lines.append(line)
        return "\n".join(lines)
