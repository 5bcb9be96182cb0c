"""transformers cache layers that carry a selector's index beside their keys and values.

Dynamic layers also grow in place instead of by concatenation, which copies the whole cache for
every token, with the K and V rows of a token side by side: a scattered read then fetches both at
once. The index is computed by the attention function, which sees the keys exactly as attention uses
them, and lives here so that beam search, cropping and prefix reuse move it with K and V. A layer
that was filled densely before `attach` is caught up on its first use.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from hashattn.kernels import Codes, GrowableBuffer
from hashattn.selectors.base import Selector

_CLASSES: dict[type, type] = {}
_UNLIMITED = {DynamicSlidingWindowLayer: DynamicLayer, StaticSlidingWindowLayer: StaticLayer}


class IndexedLayer:
    """Mixin over a transformers cache layer: a store for each part of a selector's index."""

    stores: dict[str, GrowableBuffer | Codes] | None = None
    index_length: int = 0  # tokens encoded so far
    index_owner: str | None = None  # identity of the selector that encoded them
    observed: dict[str, Tensor] | None = None  # what Selector.observe made of earlier calls
    written: bool = False  # whether keys came since the module whose slot this is was entered

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, and remember that this slot was the one to get them."""
        self.written = True
        return super().update(*args, **kwargs)

    def sync_index(
        self,
        selector: Selector,
        layer: int,
        keys: Tensor,
        values: Tensor,
    ) -> dict[str, Tensor | Codes]:
        """Index of all keys and values (batch, kv_heads, n, dim), encoding only the unseen ones."""
        n = keys.shape[2]
        if self.index_owner != selector.identity or self.index_length > n:
            self.drop_index()
        if self.index_length < n:
            new = selector.encode_keys(layer, keys[:, :, self.index_length :])
            new = new | selector.encode_values(layer, values[:, :, self.index_length : n])
            _check_index(selector, "encode_keys or encode_values", new, n - self.index_length)
            if self.stores is None:
                self.stores = {name: selector.new_store(name, part) for name, part in new.items()}
            for name, part in new.items():
                self.stores[name].append(part)
            self.index_length, self.index_owner = n, selector.identity
        index = {name: store.value for name, store in (self.stores or {}).items()}
        return index if self.observed is None else index | self.observed

    @property
    def observed_length(self) -> int:
        """Tokens of which the selector has observed something."""
        return next((part.shape[2] for part in (self.observed or {}).values()), 0)

    def keep_observed(self, selector: Selector, state: dict[str, Tensor]) -> None:
        """Replace what was observed. Never written in place: copies of the layer may share it."""
        _check_index(selector, "observe", state, self.index_length)
        self.observed = state

    def drop_index(self) -> None:
        """Forget the index; the next use encodes all keys again."""
        self.stores, self.index_length, self.index_owner = None, 0, None
        self.observed = None

    def _map_index(self, change: Any) -> None:
        for store in (self.stores or {}).values():
            store.map(change)
        self._map_observed(change)

    def _map_observed(self, change: Any) -> None:
        if self.observed is not None:
            self.observed = {name: change(part) for name, part in self.observed.items()}

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Crop K and V, then the index to what is left: the argument's meaning has changed
        between transformers releases, the resulting length has not."""
        super().crop(*args, **kwargs)
        kept = int(self.get_seq_length())
        if kept < self.index_length:
            for store in (self.stores or {}).values():
                store.crop(kept)
            self._map_observed(lambda part: part[:, :, :kept])
            self.index_length = kept

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch axis for beam search."""
        super().reorder_cache(beam_idx)
        self._map_index(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)
        self._map_index(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows of the batch."""
        super().batch_select_indices(indices)
        self._map_index(lambda part: part[indices.to(part.device)])

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self.drop_index()


class GrowingLayer(IndexedLayer):
    """Mixin over DynamicLayer: keys and values are views of one buffer (B, KV heads, room, 2, D).

    Views taken before a crop see what is written over the cropped tokens, as with a static cache.
    """

    pairs: GrowableBuffer | None = None

    @torch._dynamo.disable  # where memory lies is no part of a graph
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, KV heads, new, D); returns all of them."""
        self.written = True
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        differentiable = torch.is_grad_enabled() and key_states.requires_grad
        alike = key_states.shape == value_states.shape and key_states.dtype == value_states.dtype
        if differentiable or not alike:
            self.pairs = None
            return super().update(key_states, value_states, *args, **kwargs)
        length = self.get_seq_length()
        if self.pairs is None or not self._lies_in(self.pairs, length):
            self.pairs = GrowableBuffer(axis=2)
            if length:
                self._store(self.keys, self.values)
        self.pairs.crop(length)
        self._store(key_states, value_states)
        both = self.pairs.value
        self.keys, self.values = both[:, :, :, 0], both[:, :, :, 1]
        return self.keys, self.values

    def _store(self, keys: Tensor, values: Tensor) -> None:
        shape = (*keys.shape[:3], 2, keys.shape[3])
        room = self.pairs.extend(shape, keys.dtype, keys.device)
        room[:, :, :, 0], room[:, :, :, 1] = keys, values

    def _lies_in(self, pairs: GrowableBuffer, length: int) -> bool:
        """Whether keys and values are still the first tokens of the buffer: not after a batch was
        reordered, repeated, unpickled or moved."""
        if not 0 < length <= pairs.length:
            return False
        both = pairs.value
        return all(
            states.data_ptr() == part.data_ptr() and states.stride() == part.stride()
            for states, part in ((self.keys, both[:, :, :, 0]), (self.values, both[:, :, :, 1]))
        )

    def offload(self) -> None:
        """Move keys and values away; the buffer would keep their memory."""
        super().offload()
        self.pairs = None

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self.pairs = None


def indexed_layer(cache: Cache, layer: int, whole: bool = False) -> IndexedLayer | None:
    """The cache's layer, given an index in place; None for layers that cannot carry one.

    Sliding-window and linear-attention layers keep no full history and stay as they are, unless the
    layer has full attention (`whole`): its window is longer than the model's positions, so that
    as long as nothing has slid out of it the layer is made one without a window.
    """
    if cache.layer_class_to_replicate is not None:  # grows on first use, as in Cache.update
        while len(cache.layers) <= layer:
            cache.layers.append(cache.layer_class_to_replicate())
    if layer >= len(cache.layers):
        return None
    found = cache.layers[layer]
    if isinstance(found, IndexedLayer):
        return found
    kind = type(found)
    if whole and kind in _UNLIMITED and _holds_all(found):
        kind = _UNLIMITED[kind]
    if not issubclass(kind, DynamicLayer | StaticLayer) or kind.is_sliding:
        return None
    cls = _indexed_class(kind)
    upgraded = cls.__new__(cls)  # assigning __class__ fails: the object layout differs
    upgraded.__dict__ = found.__dict__
    cache.layers[layer] = upgraded
    return upgraded


def _holds_all(found: DynamicSlidingWindowLayer | StaticSlidingWindowLayer) -> bool:
    """Whether every token that a sliding layer was given is still in it."""
    if isinstance(found, StaticLayer):
        return found.cumulative_length_int <= found.max_cache_len
    return found.cumulative_length < found.sliding_window


def _indexed_class(cls: type) -> type:
    if cls not in _CLASSES:
        name = f"Indexed{cls.__name__}"
        # _layer_type is cleared: transformers would register the subclass for new caches
        body = {"__module__": __name__, "_layer_type": None}
        mixin = GrowingLayer if cls is DynamicLayer else IndexedLayer
        _CLASSES[cls] = type(name, (mixin, cls), body)
        globals()[name] = _CLASSES[cls]  # lets a cache be pickled
    return _CLASSES[cls]


def _check_index(selector: Selector, method: str, new: dict[str, Tensor], tokens: int) -> None:
    for name, part in new.items():
        if part.dim() < 3 or part.shape[2] != tokens:
            raise ValueError(
                f"selector {selector.name!r}: {method} returned {name!r} of shape "
                f"{tuple(part.shape)} for {tokens} keys; the token axis must be axis 2"
            )
