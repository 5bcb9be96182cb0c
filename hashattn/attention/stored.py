"""A cache layer whose keys and values do not all lie in fast memory as they were computed.

A row is what one KV head keeps of one token: K and V side by side, in bytes. A RowFormat says what
the bytes mean, a row store where they lie. A step reads the rows on its lists; a dense call gets
all of them for as long as it runs, one layer at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from hashattn import kernels
from hashattn.attention.cache import IndexedLayer
from hashattn.attention.exact_ends import ExactEnds, NoEnds
from hashattn.attention.memory import LayerMemory, Traffic
from hashattn.attention.offload import OffloadedRows
from hashattn.base.errors import UnsupportedModelError
from hashattn.kernels import GrowableBuffer

_BLOCK = 4096  # tokens that are decoded at a time


class RowFormat(Protocol):
    """What the bytes of a row mean. width: bytes of a row."""

    width: int

    def pack(self, keys: Tensor, values: Tensor) -> Tensor:
        """Rows (B, KV heads, n, width) uint8 of keys and values (B, KV heads, n, D)."""

    def unpack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, KV heads, n, D) of rows."""

    def attend(self, query: Tensor, rows: Tensor, indices: Tensor, **logits: Any) -> Any:
        """`kernels.attend` over rows (B, KV heads, n, width); indices: numbers of rows."""


class PlainRows:
    """Keys and values in their own dtype, (2, D)."""

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        self.dtype, self._dim = dtype, dim
        self.width = 2 * dim * dtype.itemsize

    def pack(self, keys: Tensor, values: Tensor) -> Tensor:
        pairs = torch.stack((keys, values), dim=3).contiguous()
        return pairs.flatten(3).view(torch.uint8)

    def unpack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows.view(self.dtype).unflatten(3, (2, self._dim)).unbind(3)

    def attend(self, query: Tensor, rows: Tensor, indices: Tensor, **logits: Any) -> Any:
        return kernels.attend(query, *self.unpack(rows), indices, **logits)


class QuantisedRows:
    """Keys and values of fewer bits (kernels.quantise), decoded as attention reads them."""

    def __init__(self, bits: int, dim: int, dtype: torch.dtype) -> None:
        self._format = kernels.RowFormat(bits, dim, dim, dtype)
        self.width = self._format.width

    def pack(self, keys: Tensor, values: Tensor) -> Tensor:
        return kernels.quantise(keys, values, self._format.bits)

    def unpack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.dequantise(rows, self._format)

    def attend(self, query: Tensor, rows: Tensor, indices: Tensor, **logits: Any) -> Any:
        return kernels.attend_rows(query, rows, self._format, indices, **logits)


class ResidentRows:
    """All rows in fast memory, token after token."""

    def __init__(self) -> None:
        self._stored = GrowableBuffer(axis=2)

    @property
    def length(self) -> int:
        """Tokens stored."""
        return self._stored.length

    def append(self, rows: Tensor) -> None:
        """Add rows (B, KV heads, new, width)."""
        self._stored.append(rows)

    def reach(self, indices: Tensor, traffic: Traffic) -> tuple[Tensor, Tensor]:
        """Rows (B, KV heads, m, width) and their numbers in place of tokens, like indices."""
        return self._stored.value, indices

    def blocks(self) -> Iterator[Tensor]:
        """All rows, in parts (B, KV heads, some tokens, width)."""
        yield from self._stored.value.split(_BLOCK, dim=2)

    def crop(self, length: int) -> None:
        """Drop the tokens after the first `length`."""
        self._stored.crop(length)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to axis 0, the batch."""
        self._stored.map(change)


class StoredLayer(IndexedLayer, DynamicLayer):
    """A dynamic layer over a row store, which its first tokens make.

    lends: whether the running call takes what is new and asks for the rest by `attend` or `whole`;
    the attention module's hook sets it, and any other caller of `update` gets everything.
    """

    memory: LayerMemory
    traffic: Traffic
    lends = False
    rows: ResidentRows | OffloadedRows | None = None
    format: RowFormat | None = None
    ends: ExactEnds | NoEnds = NoEnds()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append keys and values (B, KV heads, new, D); returns them, or all, see `lends`."""
        self.written = self.behind = True
        before, lends, self.lends = self.get_seq_length(), self.lends, False
        self._append(key_states, value_states)
        return (key_states, value_states) if lends or not before else self.whole()

    @torch.no_grad()
    def _append(self, keys: Tensor, values: Tensor) -> None:
        if self.rows is None:
            self._begin(keys, values)
        self.rows.append(self.format.pack(keys.detach(), values.detach()))
        self.ends.append(keys.detach(), values.detach())

    def _begin(self, keys: Tensor, values: Tensor) -> None:
        if keys.shape != values.shape or keys.dtype != values.dtype:
            raise UnsupportedModelError(
                f"memory: keys {tuple(keys.shape)} and values {tuple(values.shape)} of one token "
                "differ in size, and are not stored side by side: attach without memory"
            )
        self.format = row_format(self.memory.memory.bits, keys.shape[3], keys.dtype)
        exact = self.memory.memory.kept_exact
        self.ends = ExactEnds(exact) if exact else NoEnds()
        self._make_rows(keys.shape[1], keys.dtype, keys.device)

    def _make_rows(self, kv_heads: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device, self.is_initialized = dtype, device, True
        width = self.format.width
        slots = self.memory.slots(kv_heads, width)
        if slots is None:
            self.rows = ResidentRows()
        else:
            self.rows = OffloadedRows(self.memory, kv_heads, slots, width, device)

    def attend(self, query: Tensor, indices: Tensor, **logits: Any) -> Any:
        """`kernels.attend` of query (B, heads, q, D) over tokens, indices (B, lists, q, m)."""
        return self.ends.attend(query, indices, self._attend_rows, **logits)

    def _attend_rows(self, query: Tensor, indices: Tensor, **logits: Any) -> Any:
        rows, places = self.rows.reach(indices, self.traffic)
        return self.format.attend(query, rows, places, **logits)

    @torch.no_grad()
    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, lists, q, m, D) of tokens (B, lists, q, m); of padding any."""
        rows, places = self.rows.reach(indices, self.traffic)
        listed = kernels.gather_tokens(rows, places).flatten(2, 3)
        states = [part.unflatten(2, indices.shape[2:]) for part in self.format.unpack(listed)]
        return self.ends.replace(*states, indices)

    @torch.no_grad()
    def whole(self) -> tuple[Tensor, Tensor]:
        """All keys and values (B, KV heads, n, D), made for the caller."""
        parts = [self.format.unpack(rows) for rows in self.rows.blocks()]
        keys, values = (torch.cat(states, dim=2) for states in zip(*parts, strict=True))
        self.ends.restore(keys, values)
        return keys, values

    def some_keys(self) -> Tensor:
        """Keys (B, KV heads, some, D) of the first tokens, for their shape and dtype."""
        return self.format.unpack(next(iter(self.rows.blocks())))[0]

    @property
    def keys(self) -> Tensor | None:
        """All keys, made when asked for; None before the first."""
        return self.whole()[0] if self.get_seq_length() else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        """The rows are the store's: nothing else is kept."""

    @property
    def values(self) -> Tensor | None:
        """All values, made when asked for; None before the first."""
        return self.whole()[1] if self.get_seq_length() else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        """The rows are the store's: nothing else is kept."""

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return 0 if self.rows is None else self.rows.length

    def offload(self) -> None:
        """Nothing: the rows lie where Memory put them."""

    def prefetch(self) -> None:
        """Nothing: a step fetches what it reads."""

    def crop(self, tokens_to_remove: int) -> None:
        """Remove that many of the last tokens (negative), or keep that many (as transformers had it
        once)."""
        before = self.get_seq_length()
        kept = tokens_to_remove if tokens_to_remove > 0 else before + tokens_to_remove
        if 0 <= kept < before:
            self.rows.crop(kept)
            self.ends.crop(kept)
            self._crop_index(kept)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch axis by beam_idx (batch,): no row moves."""
        self._change(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch; they share what they have."""
        self._change(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (m,) of the batch."""
        self._change(lambda part: part[indices.to(part.device)])

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.get_seq_length():
            self.rows.map(change)
            self.ends.map(change)
            self._map_index(change)

    def reset(self) -> None:
        """Empty the layer."""
        self.rows, self.ends, self.is_initialized = None, NoEnds(), False
        self.drop_index()

    def __deepcopy__(self, memo: dict) -> StoredLayer:
        """A layer with rows of its own."""
        copied = _empty(self.memory, self.traffic)
        if self.get_seq_length():
            copied.format, copied.ends = self.format, copy.deepcopy(self.ends, memo)
            for number, rows in enumerate(self.rows.blocks()):
                if not number:
                    copied._make_rows(rows.shape[1], self.dtype, self.device)
                copied.rows.append(rows)
            copied._take_index(copy.deepcopy(self.__dict__.get("stores"), memo), self)
        return copied

    def _take_index(self, stores: Any, layer: IndexedLayer) -> None:
        """The index of another layer with the same tokens."""
        self.stores, self.observed, self.behind = stores, layer.observed, layer.behind
        self.index_length, self.index_owner = layer.index_length, layer.index_owner

    def __reduce__(self) -> Any:
        raise TypeError(
            "a cache whose rows are stored by Memory cannot be pickled: save the context with "
            "hashattn's Context, or attach without memory"
        )


def row_format(bits: int | None, dim: int, dtype: torch.dtype) -> RowFormat:
    """The rows of keys and values of `dim` numbers, in their dtype or in fewer bits."""
    return PlainRows(dim, dtype) if bits is None else QuantisedRows(bits, dim, dtype)


def store_layer(cache: Cache, index: int, memory: LayerMemory, traffic: Traffic) -> StoredLayer:
    """The cache's layer, an IndexedLayer over a DynamicLayer, with its rows stored.

    UnsupportedModelError for any other layer.
    """
    layer = cache.layers[index]
    if isinstance(layer, StoredLayer):
        layer.traffic = traffic
        return layer
    if not isinstance(layer, IndexedLayer) or not isinstance(layer, DynamicLayer):
        raise UnsupportedModelError(
            f"memory: layer {index} of this cache is a {type(layer).__name__}, whose rows cannot "
            "be stored elsewhere: generate with the default, dynamic cache, or attach without "
            "memory"
        )
    stored = _empty(memory, traffic)
    if layer.get_seq_length():
        stored._append(layer.keys, layer.values)
    stored._take_index(layer.stores, layer)
    cache.layers[index] = stored
    return stored


def _empty(memory: LayerMemory, traffic: Traffic) -> StoredLayer:
    layer = StoredLayer()
    layer.memory, layer.traffic = memory, traffic
    return layer
