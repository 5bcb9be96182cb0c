"""transformers cache layers that carry a selector's index beside their keys and values.

Dynamic layers also grow in place: concatenation would copy the whole cache for every token. The K
and V rows of a token lie side by side, so that a scattered read fetches both at once. The attention
function computes the index, as it has the keys exactly as attention uses them; it is stored here so
that beam search, cropping and prefix reuse move it with K and V. A layer that was filled before
`attach` is encoded on its first use.
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
_WITHOUT_WINDOW = {DynamicSlidingWindowLayer: DynamicLayer, StaticSlidingWindowLayer: StaticLayer}


class IndexedLayer:
    """Mixin over a transformers cache layer: a store for each part of a selector's index."""

    stores: dict[str, GrowableBuffer | Codes] | None = None
    index_length: int = 0  # tokens encoded so far
    index_owner: str | None = None  # identity of the selector that encoded them
    observed: dict[str, Tensor] | None = None  # Selector.observe's result on earlier calls
    written: bool = False  # whether keys were added since its attention module was entered
    steps: Any = None  # of a static layer, what its steps are read by: attention.static
    behind: bool = False  # whether keys were added since the index was brought up to date

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, and note that this layer got them."""
        self.written = self.behind = True
        return super().update(*args, **kwargs)

    def sync_index(
        self,
        selector: Selector,
        layer: int,
        keys: Tensor,
        values: Tensor,
        n: int,
    ) -> dict[str, Tensor | Codes]:
        """Index of n tokens, given keys and values (batch, kv_heads, m, dim) of the last m of them,
        all that it lacks among them; encodes only these.

        ValueError for a part of the index whose axis 2 is not the tokens.
        """
        if self.index_owner != selector.identity or self.index_length > n:
            self.drop_index()
        if self.index_length < n:
            first = keys.shape[2] - (n - self.index_length)
            new = selector.encode_keys(layer, keys[:, :, first:])
            new = new | selector.encode_values(layer, values[:, :, first:])
            _check_index(selector, "encode_keys or encode_values", new, n - self.index_length)
            if self.stores is None:
                self.stores = {name: selector.new_store(name, part) for name, part in new.items()}
                self._reserve(new)
            for name, part in new.items():
                self.stores[name].append(part)
            self.index_length, self.index_owner = n, selector.identity
        self.behind = False
        return self.index()

    def _reserve(self, new: dict[str, Tensor]) -> None:
        """Make room for the codes of all tokens that a static layer can hold: graphs keep their
        addresses."""
        for name, store in self.stores.items():
            if isinstance(self, StaticLayer) and isinstance(store, Codes):
                batch, heads, _, words = new[name].shape
                store.reserve(batch, heads, words, self.max_cache_len, new[name].device)
                torch._dynamo.mark_static_address(store.room)

    def index(self) -> dict[str, Tensor | Codes]:
        """Index of the tokens encoded so far, and what the selector observed of them."""
        index = {name: store.value for name, store in (self.stores or {}).items()}
        return index if self.observed is None else index | self.observed

    @property
    def observed_length(self) -> int:
        """Tokens that the selector has observed."""
        return next((part.shape[2] for part in (self.observed or {}).values()), 0)

    def keep_observed(self, selector: Selector, state: dict[str, Tensor]) -> None:
        """Replace what was observed by parts (batch, heads, index_length, ...).

        Never written in place: copies of the layer may share it. ValueError for another axis 2.
        """
        _check_index(selector, "observe", state, self.index_length)
        self.observed = state

    def drop_index(self) -> None:
        """Forget the index; the next use encodes all keys again."""
        self.stores, self.index_length, self.index_owner = None, 0, None
        self.observed = self.steps = None

    def _map_index(self, change: Any) -> None:
        for store in (self.stores or {}).values():
            store.map(change)
        self._map_observed(change)

    def _map_observed(self, change: Any) -> None:
        if self.observed is not None:
            self.observed = {name: change(part) for name, part in self.observed.items()}

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Crop K and V, then the index to their new length."""
        super().crop(*args, **kwargs)
        # not by the argument, whose meaning has changed between transformers releases
        self._crop_index(int(self.get_seq_length()))

    def _crop_index(self, length: int) -> None:
        if length < self.index_length:
            for store in (self.stores or {}).values():
                store.crop(length)
            self._map_observed(lambda part: part[:, :, :length])
            self.index_length = length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch axis by beam_idx (batch,) for beam search."""
        super().reorder_cache(beam_idx)
        self._map_index(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)
        self._map_index(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (m,) of the batch."""
        super().batch_select_indices(indices)
        self._map_index(lambda part: part[indices.to(part.device)])

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self.drop_index()


class GrowingLayer(IndexedLayer):
    """Mixin over DynamicLayer: keys and values are views of one buffer (B, KV heads, room, 2, D).

    Views taken before a crop change where new tokens overwrite the cropped ones, as with a static
    cache. paired_from: tokens up to which they are concatenated as transformers does, since dense
    attention reads rows that lie apart faster, and no other reads them.
    """

    pairs: GrowableBuffer | None = None
    paired_from: float = 0

    @torch._dynamo.disable  # a graph cannot depend on addresses
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, KV heads, new, D); returns all of them."""
        self.written = self.behind = True
        length = self.get_seq_length()
        if self.pairs is None and length + key_states.shape[2] < self.paired_from:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        differentiable = torch.is_grad_enabled() and key_states.requires_grad
        stackable = key_states.shape == value_states.shape
        stackable = stackable and key_states.dtype == value_states.dtype
        if differentiable or not stackable:
            self.pairs = None
            return super().update(key_states, value_states, *args, **kwargs)
        if self.pairs is None or not self._views_of(self.pairs, length):
            self.pairs = GrowableBuffer(axis=2)
            if length:
                self._store(self.keys, self.values)
        self.pairs.crop(length)
        self._store(key_states, value_states)
        self.keys, self.values = self.pairs.value.unbind(3)
        return self.keys, self.values

    def _store(self, keys: Tensor, values: Tensor) -> None:
        shape = (*keys.shape[:3], 2, keys.shape[3])
        room = self.pairs.extend(shape, keys.dtype, keys.device)
        room.select(3, 0).copy_(keys)
        room.select(3, 1).copy_(values)

    def _views_of(self, pairs: GrowableBuffer, length: int) -> bool:
        """Whether keys and values are still views of the buffer's first tokens: they are not after
        the batch was reordered, repeated, unpickled or moved."""
        if not 0 < length <= pairs.length:
            return False
        stored, keys, values = pairs.value, self.keys, self.values
        first, strides = stored.data_ptr(), stored.stride()
        apart = strides[3] * stored.itemsize
        return (
            keys.data_ptr() == first
            and values.data_ptr() == first + apart
            and keys.stride() == values.stride() == (*strides[:3], strides[4])
        )

    def offload(self) -> None:
        """Move keys and values to the CPU, and free the buffer."""
        super().offload()
        self.pairs = None

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self.pairs = None


def indexed_layer(cache: Cache, layer: int, whole: bool = False) -> IndexedLayer | None:
    """The cache's layer, upgraded in place to carry an index; None for layers that cannot.

    Sliding-window and linear-attention layers do not keep all tokens and stay as they are. But
    where the module has full attention (`whole`), its window is longer than the model's positions:
    while no token has left the window, the layer becomes one without.
    """
    if cache.layer_class_to_replicate is not None:  # layers are added on first use (Cache.update)
        while len(cache.layers) <= layer:
            cache.layers.append(cache.layer_class_to_replicate())
    if layer >= len(cache.layers):
        return None
    cache_layer = cache.layers[layer]
    if isinstance(cache_layer, IndexedLayer):
        return cache_layer
    kind = type(cache_layer)
    if whole and kind in _WITHOUT_WINDOW and _holds_all(cache_layer):
        kind = _WITHOUT_WINDOW[kind]
    if not issubclass(kind, DynamicLayer | StaticLayer) or kind.is_sliding:
        return None
    cls = _indexed_class(kind)
    upgraded = cls.__new__(cls)  # assigning __class__ fails: the object layout differs
    upgraded.__dict__ = cache_layer.__dict__
    cache.layers[layer] = upgraded
    return upgraded


def _holds_all(layer: DynamicSlidingWindowLayer | StaticSlidingWindowLayer) -> bool:
    """Whether a sliding layer still holds every token that was added to it."""
    if isinstance(layer, StaticLayer):
        return layer.cumulative_length_int <= layer.max_cache_len
    return layer.cumulative_length < layer.sliding_window


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
