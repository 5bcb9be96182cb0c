"""Fast memory that holds codes and a hot set of keys and values, or all of them in fewer bits.

Counted from sizes alone. What misses of the hot set cost is a matter of hit rates, which are
measured (`evaluation.measures.hot_set`), and of the link to where the rest lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hashattn.base.checks import is_number, require
from hashattn.kernels import RowFormat
from hashattn.pilot.capacity.devices import Device
from hashattn.pilot.capacity.result import Holding, Note
from hashattn.pilot.capacity.shapes import ModelShape
from hashattn.pilot.capacity.speed import USABLE

# what is compared: share of the tokens in the hot set, and kv_bits
_HELD = ((1.0, None), (1 / 2, None), (1 / 4, None), (1.0, 8), (1.0, 4), (1 / 4, 4))


@dataclass(frozen=True)
class HotMemory:
    """What fast memory holds of a model's cache.

    code_bits: of a key's code per KV head; None: no codes, as dense attention has it. share: of the
    tokens, those whose rows are in the hot set, in (0, 1]; 1 for all. kv_bits: of a number of K and
    V, 8 or 4, stored as kernels.RowFormat; None as the model has them. Layers with a window keep
    theirs as they are. Raises ValueError naming the field, and RowFormat's.
    """

    model: ModelShape
    code_bits: int | None = 64
    share: float = 1.0
    kv_bits: int | None = None

    def __post_init__(self) -> None:
        valid = is_number(self.share) and 0 < self.share <= 1
        require(valid, "share", self.share, "a number in (0, 1], e.g. 1/4")
        if self.kv_bits is not None:
            _row_format(self.model, self.kv_bits)

    @property
    def row_bytes(self) -> float:
        """Bytes of one token's key and value in one KV head of a layer."""
        if self.kv_bits is None:
            return self.model.row_bytes / self.model.kv_heads
        return _row_format(self.model, self.kv_bits).width

    @property
    def rows_per_token(self) -> int:
        """Rows of a token: KV heads of all layers with full attention."""
        return self.model.kv_heads * self.model.full_layers

    @property
    def bytes_per_token(self) -> float:
        """What each further token of a context takes: its codes, and its part of the hot set."""
        codes = 0.0 if self.code_bits is None else self.model.code_bytes_per_token(self.code_bits)
        return codes + self.share * self.row_bytes * self.rows_per_token

    def bytes(self, context: int, batch: int = 1) -> float:
        """Bytes of K, V and codes in fast memory."""
        return batch * (self.bytes_per_token * context + self.model.window_bytes(context))

    def longest(self, memory: float, batch: int = 1) -> int:
        """The longest context that fits beside the weights into USABLE of so many bytes, windows
        being full; 0 for none."""
        windows = batch * self.model.row_bytes * sum(self.model.windows)
        left = USABLE * memory - self.model.weight_bytes - windows
        return max(0, int(left // (batch * self.bytes_per_token)))


def holdings(
    model: ModelShape, device: Device, code_bits: int, context: int, batch: int
) -> Iterator[Holding]:
    """All of the cache in a device's memory, then hot sets and, where the kernels take the model's
    head dims, fewer bits."""
    for share, bits in _HELD:
        if bits is not None and not _quantises(model):
            continue
        held = HotMemory(model, code_bits, share, bits)
        key = ("held" if share == 1 else "held_hot") + ("" if bits is None else "_bits")
        values = {} if share == 1 else {"share": f"1/{1 / share:g}"}
        note = Note(key, values | ({} if bits is None else {"bits": bits}))
        yield Holding(note, held.bytes(context, batch), held.longest(device.memory, batch))


def _row_format(model: ModelShape, bits: int) -> RowFormat:
    return RowFormat(bits, model.head_dim, model.head_dim)


def _quantises(model: ModelShape) -> bool:
    try:
        _row_format(model, 8)
    except ValueError:
        return False
    return True
