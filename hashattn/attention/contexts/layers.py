"""Cache layers as tensors of a file, and back again: keys, values and the selector's index.

A layer with full attention is stored as its rows, K and V of a token side by side, in whole pages a
head, from which a cache is mapped; a layer with a window as its keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from hashattn.attention.cache import GrowingLayer, IndexedLayer, indexed_layer
from hashattn.attention.contexts.file import ContextFile, Part, rows_of_pages
from hashattn.attention.contexts.mapping import can_share, mapped_rows
from hashattn.attention.stored import StoredLayer
from hashattn.base.errors import UnsupportedModelError
from hashattn.kernels import Codes, GrowableBuffer
from hashattn.selectors.base import Selector

_OBSERVED = "observed."


def method_of(selector: Selector) -> dict[str, Any]:
    """What a stored index depends on: the method, its settings and its weights."""
    kind = type(selector)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "parameters": selector.parameters(),
        "weights_sha256": selector.weights_sha256(),
    }


def layer_record(number: int, layer: CacheLayerMixin) -> dict[str, Any]:
    """What a layer needs beside its tensors; UnsupportedModelError for a layer of another kind."""
    if not layer.is_initialized:  # it uses another layer's keys
        return {"kind": "empty"}
    if type(layer) is DynamicSlidingWindowLayer:
        return {"kind": "sliding", "length": layer.cumulative_length}
    bits = layer.memory.memory.bits if isinstance(layer, StoredLayer) else None
    if bits is not None:
        raise UnsupportedModelError(
            f"layer {number} of this cache keeps its rows in {bits} bits, which is not what the "
            "model computed: read the text before attach, or without Memory.bits"
        )
    if type(layer) is not DynamicLayer and not isinstance(layer, GrowingLayer | StoredLayer):
        raise UnsupportedModelError(
            f"layer {number} of this cache is a {type(layer).__name__}, of which no context can be "
            "made: read the text into a DynamicCache, as Context.read does"
        )
    rows = "pairs" if _in_pairs(layer) else "apart"
    return {"kind": rows, "length": layer.get_seq_length()}


def layer_parts(number: int, layer: CacheLayerMixin, consume: bool) -> Iterator[Part]:
    """A layer's keys and values, (1, KV heads, n, ...). consume: the layer is emptied as they are
    written, so that there is never a second copy of all layers."""
    if not layer.is_initialized:
        return
    name, stored = f"layers.{number}", isinstance(layer, StoredLayer)
    if type(layer) is DynamicSlidingWindowLayer or not _in_pairs(layer):
        yield Part.of(f"{name}.keys", layer.keys)
        yield Part.of(f"{name}.values", layer.values)
        return
    n, keys = layer.get_seq_length(), layer.some_keys() if stored else layer.keys
    heads, dim, dtype, device = keys.shape[1], keys.shape[3], keys.dtype, keys.device
    rows = rows_of_pages(2 * dim * keys.itemsize, n)

    def pairs() -> Tensor:
        made = torch.zeros((1, heads, rows, 2, dim), dtype=dtype, device=device)
        both = layer.whole() if stored else (layer.keys, layer.values)
        made[:, :, :n, 0], made[:, :, :n, 1] = both
        if consume:
            layer.reset()
        return made

    yield Part(f"{name}.pairs", dtype, (1, heads, rows, 2, dim), pairs)


def index_parts(number: int, layer: CacheLayerMixin, selector: Selector) -> list[Part]:
    """What a selector stored of all tokens of a layer, and observed of them; empty where that is
    not all there, or not in tensors."""
    if not isinstance(layer, IndexedLayer) or layer.index_owner != selector.identity:
        return []
    if layer.index_length != layer.get_seq_length():
        return []
    parts = {name: _by_token(store) for name, store in (layer.stores or {}).items()}
    if any(part is None for part in parts.values()):
        return []
    parts |= {f"{_OBSERVED}{name}": part for name, part in (layer.observed or {}).items()}
    return [Part.of(f"layers.{number}.index.{name}", part) for name, part in parts.items()]


def _by_token(store: Any) -> Tensor | None:
    """What is stored, (1, heads, n, ...); None for a store that is no tensor."""
    if isinstance(store, Codes):
        return store.to_tokens()
    return store.value if isinstance(store.value, Tensor) else None


def _in_pairs(layer: CacheLayerMixin) -> bool:
    if isinstance(layer, StoredLayer):  # which lays them side by side itself
        return True
    return layer.keys.shape == layer.values.shape and layer.keys.dtype == layer.values.dtype


def fill_layer(
    cache: DynamicCache, number: int, file: ContextFile, device: torch.device, batch: int, room: int
) -> None:
    """Give a layer of a new cache the file's keys and values in each row of the batch, with room
    for `room` more tokens. On this machine's CPU they are the file's own pages."""
    record, name = file.record["layers"][number], f"layers.{number}"
    if record["kind"] == "pairs":
        cache.layers[number] = DynamicLayer()
        layer = indexed_layer(cache, number)
        pairs = _rows(file, f"{name}.pairs", record["length"], device, batch, room)
        layer.lazy_initialization(pairs.value, pairs.value)
        layer.pairs = pairs
        layer.keys, layer.values = pairs.value.unbind(3)
    elif record["kind"] != "empty":
        sliding = record["kind"] == "sliding"
        if not sliding:
            cache.layers[number] = DynamicLayer()
        layer = cache.layers[number]
        keys, values = (
            file.tensor(f"{name}.{part}").to(device).expand(batch, -1, -1, -1)
            for part in ("keys", "values")
        )
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values  # such layers grow by concatenation, not in place
        if sliding:
            layer.cumulative_length = record["length"]


def _rows(
    file: ContextFile, name: str, length: int, device: torch.device, batch: int, room: int
) -> GrowableBuffer:
    """The first `length` rows of a part, for each row of a batch, with room behind them."""
    dtype, shape, start = file.place(name)
    rows = rows_of_pages(shape[3] * shape[4] * dtype.itemsize, length + room)
    if can_share(device):
        mapped = mapped_rows(file.descriptor, start, shape, dtype, batch, rows)
        if mapped is not None:
            return GrowableBuffer.over(mapped, length, axis=2)
    buffer = GrowableBuffer(axis=2)
    buffer.reserve((batch, shape[1], rows, *shape[3:]), dtype, device)
    buffer.append(file.tensor(name)[:, :, :length].expand(batch, -1, -1, -1, -1))
    return buffer


def fill_index(
    cache: DynamicCache, number: int, file: ContextFile, selector: Selector, batch: int
) -> None:
    """Give a layer that `fill_layer` filled the index that the file has of it."""
    prefix = f"layers.{number}.index."
    names = [name for name in file.record["tensors"] if name.startswith(prefix)]
    if not names:
        return
    layer = cache.layers[number]
    layer.stores, observed = {}, {}
    for name in names:
        stored = file.tensor(name)
        part = stored.to(layer.device).expand(batch, *stored.shape[1:])
        name = name.removeprefix(prefix)
        if name.startswith(_OBSERVED):
            observed[name.removeprefix(_OBSERVED)] = part
        else:
            layer.stores[name] = selector.new_store(name, part)
            layer.stores[name].append(part)
    layer.index_length, layer.index_owner = layer.get_seq_length(), selector.identity
    layer.observed = observed or None
