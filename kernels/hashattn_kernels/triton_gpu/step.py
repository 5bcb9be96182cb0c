"""Decode steps of one layer: their launches, and the memory that these keep.

Nothing here waits for the device or depends on what lies there, so a CUDA graph captures a step and
replays it after its sizes have changed.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from ..api import room_for
from ..codes import TILE, Tiled
from ..coins import parts_of
from ..coins import table as coin_table
from ..maps import Maps
from ..memory import capacity
from ..step import Drawing, Grades
from . import launch

_KEPT = threading.local()  # what launches of several threads write must not be shared
_MOST_KEPT = 8  # shapes
_STEP = 64  # tokens by which lists grow, and an eighth


@dataclass(frozen=True)
class StepSpace:
    """Memory of a step's stages.

    query_codes: (batch, heads, 1, words) int32, or graded (batch, lists, 1, words, 1 + planes);
    numbers, of each list (batch, lists, 1): steps float32 or costs int64 of graded codes; certain
    and chancy int64.
    """

    grades: Grades | None
    query_codes: Tensor
    steps: Tensor
    certain: Tensor
    chancy: Tensor
    selection: launch.SelectSpace
    attention: launch.AttendSpace
    lse: Tensor

    @classmethod
    def reserve(
        cls, q: Tensor, v: Tensor, tokens: int, bits: int, lists: int, width: int,
        grades: Grades | None, draws: bool, read: tuple[int, int] | None = None,
    ) -> StepSpace:  # fmt: skip
        """For queries like q (batch, heads, 1, dim) and values like v, over up to `tokens` tokens;
        lists of `width`, which attention reads unless it reads (lists, width)."""
        batch, heads, device = q.shape[0], q.shape[1], q.device
        words, (planes, most) = bits // 32, grades or (0, None)
        codes = (batch, lists, 1, words, 1 + planes) if grades else (batch, heads, 1, words)
        shape = (batch, lists, 1)

        def numbers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        read_lists, read_width = read or (lists, width)
        return cls(
            grades,
            numbers(*codes, dtype=torch.int32),
            numbers(*shape, dtype=torch.int64 if draws else torch.float32),
            numbers(*shape),
            numbers(*shape),
            launch.SelectSpace.reserve(
                batch * lists, tokens, 1 if grades else heads // lists, words, device, planes, most
            ),
            launch.AttendSpace.reserve(q, read_lists, read_width, v.shape[3], v.dtype),
            numbers(batch, heads, 1, dtype=torch.float32),
        )


def kept_space(
    q: Tensor, v: Tensor, storage: Tensor, bits: int, lists: int, width: int,
    grades: Grades | None, draws: bool, memory: dict | None = None,
) -> StepSpace:  # fmt: skip
    """The space of such steps of this thread, which launches one at a time.

    storage: of the Tiled codes. memory: where spaces stay as long as it does, as a graph that
    captured a step needs; else the thread keeps one of a shape, and replaces it where lists or
    codes have grown out of it.
    """
    tokens, room = storage.shape[2] * TILE, capacity(width, _STEP)
    shape = q.shape, v.shape[3], q.dtype, q.device, bits, lists, grades, draws
    if memory is not None:
        key = (threading.get_ident(), tokens, width, *shape)
        if key not in memory:
            memory[key] = StepSpace.reserve(q, v, tokens, bits, lists, width, grades, draws)
        return memory[key]
    kept = _KEPT.__dict__.setdefault("spaces", {})
    most_tokens, most_room, space = kept.get(shape, (0, 0, None))
    if tokens > most_tokens or room > most_room:
        if len(kept) >= _MOST_KEPT:
            kept.clear()
        space = StepSpace.reserve(q, v, tokens, bits, lists, room, grades, draws)
        kept[shape] = tokens, room, space
    return space


def reserve(
    q: Tensor, v: Tensor, storage: Tensor, query_maps: Maps, key_maps: Maps, lists: int, width: int,
    grades: Grades | None, draws: bool, memory: dict,
) -> None:  # fmt: skip
    """Make all that steps keep between calls, which a graph that captures one must not make."""
    kept_space(q, v, storage, query_maps.bits, lists, width, grades, draws, memory)
    if launch.alike(query_maps, key_maps):
        launch.pack(query_maps, key_maps)
    else:
        launch.pack(query_maps, query_maps)
        launch.pack(key_maps, key_maps)
    if draws:
        for name in ("TABLE", "CHANCES", "LOG_WEIGHTS"):
            coin_table(q.device, name)


def encode(
    space: StepSpace, q: Tensor, k: Tensor, v: Tensor, codes: Tiled, query_maps: Maps,
    key_maps: Maps, place: int | Tensor, *, heavy: Tensor, spans: Tensor, drawing: Drawing | None,
    counters: Tensor | None = None,
) -> None:  # fmt: skip
    """The first stage: codes of the query and of the newest of the keys k, at `place` (see
    launch.Newest), and what selection and counters need. One launch where both maps are alike."""
    batch, lists = space.certain.shape[:2]
    slopes = drawn = grading = None
    if drawing is not None:
        slopes, drawn = drawing.slopes, drawing.drawn.expand(batch, lists, 1)
    if space.grades is not None:
        grading = launch.Grading(*space.grades, space.steps, slopes)
    begin = launch.Begin(
        heavy.expand(batch, lists, 1), space.certain, drawn, space.chancy, spans, v, counters
    )
    other = (k, key_maps, launch.Newest(codes.storage, place))
    if launch.alike(query_maps, key_maps):
        launch.encode(q, query_maps, space.query_codes, other, grading=grading, begin=begin)
        return
    launch.encode(q, query_maps, space.query_codes, grading=grading, begin=begin)
    launch.encode(k, key_maps, space.query_codes[:, :0], other, begin=begin)


def choose(
    space: StepSpace, codes: Tiled, indices: Tensor, log_weights: Tensor | None, *, spans: Tensor,
    sink: int, local: int, drawing: Drawing | None,
) -> None:  # fmt: skip
    """The second stage: token lists into indices, and their log weights."""
    if drawing is None:
        launch.select(
            space.query_codes, codes, space.certain, spans, sink, local, indices, space.selection
        )
        return
    launch.sample(
        space.query_codes, codes, space.steps, space.certain, space.chancy, parts_of(drawing.trust),
        drawing.coins, spans, sink, local, indices, log_weights, space.selection,
    )  # fmt: skip


class DecodeStep:
    """Encode a step's queries and keys, choose tokens by their codes, attend to them.

    Memory is for up to `capacity` cached tokens and `heavy` chosen ones: keys and values (batch,
    kv_heads, capacity, head_dim) and codes (append those of a prompt), which the caller fills;
    spans (batch, 1, 2) int64, the tokens that each sequence sees, the newest last, and heavy
    (batch, lists, 1) int64, how many each list chooses. All are read on the device: a captured step
    that is replayed after they changed uses the new sizes. Dims must be those that the backend
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
        grades: Grades | None = None,
        drawing: Drawing | None = None,
    ) -> None:
        """lists: token lists of a sequence, one for each key map (default) or query head; union:
        every query head chooses a list, and a KV head's group reads their union; grades: of the
        queries; drawing: how a part of heavy is drawn. ValueError for maps, lists or a drawing that
        do not fit."""
        batch, kv_heads, capacity, dim = keys.shape
        heads, device = query_maps.heads, keys.device
        code_heads = key_maps.heads
        lists = heads if union else lists or code_heads
        if query_maps.bits != key_maps.bits:
            raise ValueError("query and key maps must have the same bits")
        if code_heads not in (kv_heads, heads) or lists not in (code_heads, heads):
            raise ValueError(
                f"{code_heads} key maps and {lists} lists for {kv_heads} KV heads and {heads} "
                "query heads: one key map a KV head or query head, and a list for each key map or "
                "query head"
            )
        if drawing is not None and (grades is None or union):
            raise ValueError("drawing needs graded queries, and lists that are not united")
        self.query_maps, self.key_maps = query_maps, key_maps
        self.keys, self.values = keys, values
        self.sink, self.local, self.scaling = sink, local, scaling
        self.drawing = drawing
        self.codes = Tiled()
        self.codes.reserve(batch, code_heads, key_maps.bits // 32, capacity, device)

        def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.spans = numbers(batch, 1, 2, dtype=torch.int64)
        self.heavy = numbers(batch, lists, 1, dtype=torch.int64).fill_(heavy)
        room = heavy if drawing is None else room_for(0, heavy)
        width = min(capacity, sink + local + room)
        self.indices = numbers(batch, lists, 1, width)
        self.log_weights = None if drawing is None else self.indices.float()
        self.union = self._bitmap = read = None
        if union:
            self.union = numbers(batch, kv_heads, 1, min(capacity, width * heads // kv_heads))
            self._bitmap = numbers(batch, kv_heads, 1, -(-capacity // 32))
            read = kv_heads, self.union.shape[3]
        q = torch.empty(batch, heads, 1, dim, dtype=keys.dtype, device=device)
        self.out = q.new_empty(batch, heads, 1, values.shape[3])
        self._space = StepSpace.reserve(
            q, values, capacity, key_maps.bits, lists, width, grades, drawing is not None, read
        )
        launch.pack(query_maps, key_maps)

    def __call__(self, q: Tensor) -> Tensor:
        """Outputs (batch, heads, 1, value_dim) of queries q (batch, heads, 1, head_dim).

        `keys` and `values` hold the newest token, the last that `spans` sees, already; its code is
        written here. The next step overwrites the result.
        """
        self.encode(q)
        self.select()
        self.attend(q)
        return self.out

    def encode(self, q: Tensor) -> None:
        """The first stage: codes of q (batch, heads, 1, head_dim) and of the newest key."""
        encode(
            self._space, q, self.keys, self.values, self.codes, self.query_maps, self.key_maps,
            self.spans[:, 0, 1], heavy=self.heavy, spans=self.spans, drawing=self.drawing,
        )  # fmt: skip

    def select(self) -> None:
        """The second stage: token lists, and their union where one is read."""
        choose(
            self._space, self.codes, self.indices, self.log_weights, spans=self.spans,
            sink=self.sink, local=self.local, drawing=self.drawing,
        )  # fmt: skip
        if self.union is not None:
            self._bitmap.zero_()
            launch.union(self.indices, self._bitmap, self.union)

    def attend(self, q: Tensor) -> None:
        """The third stage: attention of q (batch, heads, 1, head_dim) over the lists, to `out`."""
        read = self.indices if self.union is None else self.union
        launch.attend(
            q, self.keys, self.values, read, None, self.scaling, None, None, self.out,
            self._space.lse, self._space.attention, self.log_weights,
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
