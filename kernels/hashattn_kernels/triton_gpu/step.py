"""Decode steps of one layer with all memory reserved: what a CUDA graph captures and replays."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import Tiled
from ..maps import Maps
from . import launch


class DecodeStep:
    """Encode a step's queries and keys, choose tokens by their codes, attend to them.

    Memory is for up to `capacity` cached tokens and `heavy` chosen ones: keys and values (batch,
    kv_heads, capacity, head_dim) and codes (append those of a prompt), which the caller fills;
    spans (batch, 1, 2) int64, the tokens that each sequence sees, and heavy (batch, lists, 1)
    int64, how many each list chooses. All are read on the device: a captured step that is replayed
    after they changed uses the new sizes. Maps must have equal widths, and dims that the backend
    supports.
    """

    def __init__(
        self,
        query_maps: Maps,
        key_maps: Maps,
        keys: Tensor,
        values: Tensor,
        *,
        heavy: int,
        sink: int,
        local: int,
        scaling: float,
        lists: int | None = None,
        union: bool = False,
    ) -> None:
        """lists: token lists of a sequence, one for each key map (default) or query head; union:
        every query head chooses a list, and a KV head's group reads their union. ValueError for
        maps or lists that do not fit."""
        if launch.constants(query_maps) != launch.constants(key_maps):
            raise ValueError("query and key maps must have the same widths and activation")
        batch, kv_heads, capacity, dim = keys.shape
        heads, words, device = query_maps.heads, query_maps.bits // 32, keys.device
        code_heads = key_maps.heads
        lists = heads if union else lists or code_heads
        if code_heads not in (kv_heads, heads) or lists not in (code_heads, heads):
            raise ValueError(
                f"{code_heads} key maps and {lists} lists for {kv_heads} KV heads and {heads} "
                "query heads: one key map a KV head or query head, and a list for each key map or "
                "query head"
            )

        def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.query_maps, self.key_maps = query_maps, key_maps
        self.keys, self.values = keys, values
        self.sink, self.local, self.scaling = sink, local, scaling
        self.codes = Tiled()
        self.codes.reserve(batch, code_heads, words, capacity, device)
        self.spans = numbers(batch, 1, 2, dtype=torch.int64)
        self.heavy = numbers(batch, lists, 1, dtype=torch.int64).fill_(heavy)
        width = min(capacity, sink + local + heavy)
        self.indices = numbers(batch, lists, 1, width)
        self.union = self._bitmap = None
        if union:
            self.union = numbers(batch, kv_heads, 1, min(capacity, width * heads // kv_heads))
            self._bitmap = numbers(batch, kv_heads, 1, -(-capacity // 32))
        read = self.indices if self.union is None else self.union
        q = torch.empty(batch, heads, 1, dim, dtype=keys.dtype, device=device)
        self.out = q.new_empty(batch, heads, 1, values.shape[3])
        self.lse = numbers(batch, heads, 1, dtype=torch.float32)
        self._query_codes = numbers(batch, heads, 1, words)
        self._selection = launch.SelectSpace.reserve(
            batch * lists, capacity, heads // lists, words, device
        )
        self._attention = launch.AttendSpace.reserve(
            q, read.shape[1], read.shape[3], values.shape[3], keys.dtype
        )
        launch.pack(query_maps, key_maps)

    def __call__(self, q: Tensor, key: Tensor) -> Tensor:
        """Outputs (batch, heads, 1, value_dim) of queries q (batch, heads, 1, head_dim).

        key (batch, kv_heads, 1, head_dim): of the newest token, the last that `spans` sees. `keys`
        and `values` hold this token already; its code is written here. The next step overwrites the
        result.
        """
        self.encode(q, key)
        self.select()
        self.attend(q)
        return self.out

    def encode(self, q: Tensor, key: Tensor) -> None:
        """The first stage: codes of both (shapes as in a call), the key's into the cache."""
        other = (key, self.key_maps, self.codes.storage, self.spans)
        launch.encode(q, self.query_maps, self._query_codes, other)

    def select(self) -> None:
        """The second stage: token lists, and their union where one is read."""
        launch.select(
            self._query_codes, self.codes, self.heavy, self.spans, self.sink, self.local,
            self.indices, self._selection,
        )  # fmt: skip
        if self.union is not None:
            self._bitmap.zero_()
            launch.union(self.indices, self._bitmap, self.union)

    def attend(self, q: Tensor) -> None:
        """The third stage: attention of q (batch, heads, 1, head_dim) over the lists, to `out`."""
        read = self.indices if self.union is None else self.union
        launch.attend(
            q, self.keys, self.values, read, None, self.scaling, None, None, self.out, self.lse,
            self._attention,
        )  # fmt: skip


class DenseStep:
    """Dense attention of a layer's decode step with all its memory reserved: the baseline.

    spans (batch, 1, 2) int64: the tokens that each sequence sees, read on the device.
    """

    def __init__(self, heads: int, keys: Tensor, values: Tensor, *, scaling: float) -> None:
        """keys and values (batch, kv_heads, capacity, head_dim), for `heads` query heads."""
        batch, kv_heads, capacity, dim = keys.shape
        self.keys, self.values, self.scaling = keys, values, scaling
        self.spans = torch.zeros(batch, 1, 2, dtype=torch.int64, device=keys.device)
        q = keys.new_empty(batch, heads, 1, dim)
        self.out = keys.new_empty(batch, heads, 1, values.shape[3])
        self.lse = torch.empty(batch, heads, 1, device=keys.device)
        self._attention = launch.AttendSpace.reserve(
            q, kv_heads, capacity, values.shape[3], keys.dtype
        )

    def __call__(self, q: Tensor) -> Tensor:
        """Outputs (batch, heads, 1, value_dim) of queries q (batch, heads, 1, head_dim), which the
        next step overwrites."""
        launch.attend(
            q, self.keys, self.values, None, self.spans, self.scaling, None, None, self.out,
            self.lse, self._attention,
        )  # fmt: skip
        return self.out
