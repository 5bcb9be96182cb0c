"""transformers cache layers that carry a selector's index beside their keys and values.

The index is computed by the attention function, which sees the keys exactly as attention uses
them, and lives here so that beam search, cropping and prefix reuse move it with K and V. A layer
that was filled densely before `attach` is caught up on its first use.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from ..selectors.base import Selector

_CLASSES: dict[type, type] = {}


class IndexedLayer:
    """Mixin over a transformers cache layer: `index` maps names to tensors, token axis 2."""

    index: dict[str, Tensor] | None = None
    index_length: int = 0  # tokens encoded so far
    index_owner: str | None = None  # identity of the selector that encoded them

    def sync_index(self, selector: Selector, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """Index of all keys (batch, kv_heads, n, head_dim), encoding only those not yet seen."""
        n = keys.shape[2]
        if self.index_owner != selector.identity or self.index_length > n:
            self.drop_index()
        if self.index_length < n:
            new = selector.encode_keys(layer, keys[:, :, self.index_length :])
            _check_index(selector, new, n - self.index_length)
            old = self.index or {}
            self.index = {
                name: torch.cat([old[name], part], dim=2) if name in old else part
                for name, part in new.items()
            }
            self.index_length, self.index_owner = n, selector.identity
        return self.index or {}

    def drop_index(self) -> None:
        """Forget the index; the next use encodes all keys again."""
        self.index, self.index_length, self.index_owner = None, 0, None

    def _map_index(self, change: Any) -> None:
        if self.index is not None:
            self.index = {name: change(part) for name, part in self.index.items()}

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Crop K and V, then the index to what is left: the argument's meaning has changed
        between transformers releases, the resulting length has not."""
        super().crop(*args, **kwargs)
        kept = int(self.get_seq_length())
        if kept < self.index_length:
            self._map_index(lambda part: part[:, :, :kept])
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


def indexed_layer(cache: Cache, layer: int) -> IndexedLayer | None:
    """The cache's layer, given an index in place; None for layers that cannot carry one.

    Sliding-window and linear-attention layers keep no full history and stay as they are.
    """
    if cache.layer_class_to_replicate is not None:  # grows on first use, as in Cache.update
        while len(cache.layers) <= layer:
            cache.layers.append(cache.layer_class_to_replicate())
    if layer >= len(cache.layers):
        return None
    found = cache.layers[layer]
    if isinstance(found, IndexedLayer):
        return found
    if not isinstance(found, DynamicLayer | StaticLayer) or found.is_sliding:
        return None
    cls = _indexed_class(type(found))
    upgraded = cls.__new__(cls)  # assigning __class__ fails: the object layout differs
    upgraded.__dict__ = found.__dict__
    cache.layers[layer] = upgraded
    return upgraded


def _indexed_class(cls: type) -> type:
    if cls not in _CLASSES:
        name = f"Indexed{cls.__name__}"
        # _layer_type is cleared: transformers would register the subclass for new caches
        body = {"__module__": __name__, "_layer_type": None}
        _CLASSES[cls] = type(name, (IndexedLayer, cls), body)
        globals()[name] = _CLASSES[cls]  # lets a cache be pickled
    return _CLASSES[cls]


def _check_index(selector: Selector, new: dict[str, Tensor], tokens: int) -> None:
    for name, part in new.items():
        if part.dim() < 3 or part.shape[2] != tokens:
            raise ValueError(
                f"selector {selector.name!r}: encode_keys returned {name!r} of shape "
                f"{tuple(part.shape)} for {tokens} keys; the token axis must be axis 2"
            )
