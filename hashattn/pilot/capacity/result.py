"""What a pre-flight is asked and what it answers: plain numbers, for people and for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hashattn.base.checks import INT32_MAX, is_count, is_text, require, require_numbers
from hashattn.pilot.capacity.machine import Measurement

WORTH, MARGINAL, NO = VERDICTS = ("worth", "marginal", "no")

_SUFFIXES = {"k": 1 << 10, "m": 1 << 20}


@dataclass(frozen=True)
class Workload:
    """What is asked of the model.

    context: tokens cached when an answer begins. batch: sequences decoded together. new_tokens: of
    an answer. requests_per_day, price_per_hour (of one device, in `currency`), days: for the cost;
    None for what is not known. Raises ValueError naming the field.
    """

    context: int
    batch: int = 1
    new_tokens: int = 256
    requests_per_day: float | None = None
    price_per_hour: float | None = None
    currency: str = "USD"
    days: int = 30

    def __post_init__(self) -> None:
        for name in ("context", "batch", "new_tokens", "days"):
            value = getattr(self, name)
            require(is_count(value, 1, INT32_MAX), name, value, f"an integer from 1 to {INT32_MAX}")
        for name in ("requests_per_day", "price_per_hour"):
            if getattr(self, name) is not None:
                require_numbers({name: getattr(self, name)}, not_negative=(name,))
        require(is_text(self.currency), "currency", self.currency, "a text, e.g. USD")

    @property
    def tokens_per_day(self) -> float | None:
        """Answer tokens of a day."""
        return None if self.requests_per_day is None else self.requests_per_day * self.new_tokens


@dataclass(frozen=True)
class Note:
    """A reason, or a change: the key of its sentence (wording.SENTENCES) and the values in it."""

    key: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A number: the key of its label (wording.LABELS), its value (None: there is none) and unit:
    bytes, share, times, tokens, ms, us, devices or sequences."""

    key: str
    value: float | None
    unit: str


@dataclass(frozen=True)
class Holding:
    """What device memory may hold of the cache: said by a note, bytes of K, V and codes there, and
    the longest context that then fits on one device."""

    note: Note
    bytes: float
    longest_context: int


@dataclass(frozen=True)
class Cost:
    """Decoding alone (no prompts, no idle time) over `days` days; money None without a price."""

    gpu_hours_dense: float
    gpu_hours_sparse: float
    money_dense: float | None
    money_sparse: float | None
    currency: str
    price_per_hour: float | None
    tokens_per_day: float
    days: int


@dataclass(frozen=True)
class Preflight:
    """The verdict, why (most important first), what would change it, and all figures.

    share, ceiling: see Speed, on bandwidth alone. speedup: predicted at the budget, from this
    machine's times where it was measured; 1 where decoding would stay dense. memory: all of
    the cache on the device, then what takes less. cost: None without a traffic.
    """

    verdict: str
    model: str
    device: str
    workload: Workload
    budget: float
    bits: int
    lists: str
    share: float
    ceiling: float
    speedup: float
    devices: int
    reasons: tuple[Note, ...]
    changes: tuple[Note, ...]
    lines: tuple[Figure, ...]
    memory: tuple[Holding, ...]
    cost: Cost | None
    measured: Measurement | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        return asdict(self)


def tokens_of_text(text: str) -> int:
    """A number of tokens as it is written, K and M being 1024 and 1024^2; ValueError."""
    factor = _SUFFIXES.get(text[-1:].lower(), 1)
    try:
        return int(text[:-1] if factor > 1 else text) * factor
    except ValueError as problem:
        raise ValueError(f"{text!r} is no number of tokens") from problem
