"""Where a cache's keys and values lie: `attach(..., memory=Memory(...))`.

Codes stay in fast memory, so a step needs of K and V only the rows that it reads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hashattn.base.checks import require, require_numbers, require_one_of
from hashattn.base.errors import MemoryLimitError

if TYPE_CHECKING:
    from hashattn.attention.budget import Budget

_BITS = (None, 8, 4)
_WINDOW = 256  # tokens
_ADDING = threading.Lock()


@dataclass(frozen=True)
class Memory:
    """What of a cache stays in fast memory.

    fast_bytes: of the rows of K and V that one cache keeps on the model's device, all layers
    together: the sink, the newest, and those read last. None: all of them.
    folder: the other rows lie in a file there, which has no name and is gone with the process;
    None: in host memory. slow_bytes: how much one cache may take there, None for no limit.
    bits: of a stored number of K and V, 8 or 4; None: the model's own dtype. exact: how many of the
    newest tokens are kept as they were beside fewer bits, and with any the first four (0 for none);
    None: 256 where bits = 4, which alone err by a tenth, else 0.
    ValueError for another value, for a folder or a limit without fast_bytes, and where nothing
    would change.
    """

    fast_bytes: int | None = None
    folder: str | os.PathLike | None = None
    slow_bytes: int | None = None
    bits: int | None = None
    exact: int | None = None

    def __post_init__(self) -> None:
        require_one_of("bits", self.bits, _BITS)
        limits = {"fast_bytes": self.fast_bytes, "slow_bytes": self.slow_bytes}
        given = {name: value for name, value in limits.items() if value is not None}
        require_numbers(given, counts=dict.fromkeys(given, 1))
        require_numbers({"exact": self.kept_exact}, counts={"exact": 0})
        allowed = "None or 0 unless bits = 8 or 4: all tokens are kept as they were"
        require(self.bits is not None or not self.exact, "exact", self.exact, allowed)
        useful = self.fast_bytes is not None or self.bits is not None
        require(useful, "fast_bytes", None, "a number of bytes, unless bits = 8 or 4")
        for name in ("folder", "slow_bytes"):
            value = getattr(self, name)
            allowed = "None without fast_bytes, as then no row leaves fast memory"
            require(value is None or self.fast_bytes is not None, name, value, allowed)
        if self.folder is not None:
            allowed = "an existing folder that can be written: create it first"
            writable = Path(self.folder).is_dir() and os.access(self.folder, os.W_OK)
            require(writable, "folder", str(self.folder), allowed)

    @property
    def kept_exact(self) -> int:
        """`exact`, or what it stands for."""
        return (_WINDOW if self.bits == 4 else 0) if self.exact is None else self.exact

    def record(self) -> dict[str, Any]:
        """For receipts: what lies where, without the folder's name."""
        settings = asdict(self) | {"exact": self.kept_exact}
        where = "host memory" if self.folder is None else "file"
        settings.pop("folder")
        return settings | {"rest": None if self.fast_bytes is None else where}


@dataclass(frozen=True)
class LayerMemory:
    """A layer's part of a Memory, of a model with `layers` layers whose rows are stored."""

    memory: Memory
    layers: int

    def slots(self, kv_heads: int, width: int) -> int | None:
        """Rows of `width` bytes that each KV head keeps in fast memory; None for all."""
        fast = self.memory.fast_bytes
        return None if fast is None else fast // (self.layers * kv_heads * width)

    @property
    def slow_bytes(self) -> int | None:
        """Bytes that the layer may take in host memory or in its file."""
        slow = self.memory.slow_bytes
        return None if slow is None else slow // self.layers

    def check(self, budget: Budget, kv_heads: int, width: int) -> None:
        """MemoryLimitError where fast memory is less than what any step of one sequence reads."""
        slots = self.slots(kv_heads, width)
        needed = budget.sink + budget.local + 1
        if slots is not None and slots < needed:
            least = needed * self.layers * kv_heads * width
            raise MemoryLimitError(
                f"fast_bytes = {self.memory.fast_bytes}: room for {slots} rows of each KV head in "
                f"{self.layers} layers, and a step reads at least {needed} (sink {budget.sink}, "
                f"local {budget.local}, and one): give at least {least} bytes, or a smaller budget"
            )


@dataclass
class Traffic:
    """What moved between fast memory and the rest, all layers together.

    hits, misses: rows of KV heads that steps read and that were, or were not, in fast memory.
    bytes_moved: into it, by the misses. seconds: that steps waited for them. streamed: steps that
    read more rows than fast memory holds, so that all rows passed through it.
    """

    hits: int = 0
    misses: int = 0
    bytes_moved: int = 0
    seconds: float = 0.0
    streamed: int = 0

    @classmethod
    def of(cls, record: Mapping[str, float]) -> Traffic:
        """As `record` wrote it. TypeError for other fields."""
        return cls(**{name: value for name, value in record.items() if name != "hit_rate"})

    def add(self, **numbers: float) -> None:
        """Add to the fields of these names; threads may share a run."""
        with _ADDING:
            for name, value in numbers.items():
                setattr(self, name, getattr(self, name) + value)

    @property
    def hit_rate(self) -> float:
        """Hits of all rows read; 1.0 where none was read."""
        total = self.hits + self.misses
        return self.hits / total if total else 1.0

    def record(self) -> dict[str, float]:
        """JSON-able numbers, the hit rate among them."""
        return vars(self) | {"hit_rate": self.hit_rate}
