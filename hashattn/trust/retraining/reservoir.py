"""A bounded, sampled buffer of recent traffic: queries and keys as attention used them.

Listens at `Attachment.listen` and copies what `adapt` learns from. A few contexts are kept, the
latest; of each its first tokens' keys and a uniform sample of its query rows. What the buffer holds
of a context is what `hashing.capture` would give for the same tokens and rows.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from hashattn.attention.observer import LayerStep
from hashattn.base.checks import require, require_numbers
from hashattn.hashing.capture import CapturedLayer

_BEGINS = ("prefill", "several_rows")  # calls that may begin a context, or go on with one


@dataclass(frozen=True)
class ReservoirSettings:
    """How much a Reservoir keeps.

    contexts: the latest ones, at most. rows: query rows of each, a uniform sample of all rows at
    the first `tokens` positions, prompt and answer alike. tokens: keys of each, the first ones; of
    a longer context this prefix is kept, which is a context of its own. share: of contexts that
    are sampled at all; the others cost next to nothing. seed: of all draws. Raises ValueError
    naming the field.
    """

    contexts: int = 12
    rows: int = 192
    tokens: int = 4096
    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"contexts": 1, "rows": 1, "tokens": 1, "seed": 0}
        require_numbers(vars(self), counts=counts, shares=("share",))
        require(self.share > 0, "share", self.share, "a number above 0, at most 1")


class Reservoir:
    """An observer that keeps recent contexts for `adapt`, in bounded memory (`most_bytes`).

    layers: those to keep, with full attention: `weights.config.layers`. Of a batch one row, drawn
    by the seed, is kept. Layers without sparse steps show no keys and are left out, and so are
    contexts that were never decoded. A context ends where its cache changes otherwise than by new
    tokens (cropping, beams that change places, another cache in the same thread); what was kept
    until then stays. Only two caches of one length that are filled one after the other in a thread,
    before either is decoded, cannot be told apart. Tensors are copied to the CPU in the model's
    dtype; on a GPU that waits for the device at each row that is kept.
    """

    timed = False

    def __init__(self, layers: Collection[int], settings: ReservoirSettings | None = None) -> None:
        self.layers, self.settings = frozenset(layers), settings or ReservoirSettings()
        require(
            bool(self.layers), "layers", layers, "the layers of the hash weights, some at least"
        )
        self._began = 0
        self._open = threading.local()
        self._held: WeakSet[_Context] = WeakSet()  # all that take memory, the open ones too
        self._kept: deque[_Context] = deque(maxlen=self.settings.contexts)
        self._lock = threading.Lock()

    def saw(self, step: LayerStep) -> None:
        """Take what is sampled of a call of a layer."""
        if step.layer in self.layers:
            with self._lock:
                self._take(step)

    def _take(self, step: LayerStep) -> None:
        context: _Context | None = getattr(self._open, "context", None)
        if context is None or not context.goes_on(step):
            if step.reason not in _BEGINS:
                self._open.context = None
                return
            context = self._open.context = self._begin(step.query.shape[0])
        if not context.add(step):
            self._open.context = None
        elif step.reason is None and context.sampled and not context.kept:
            context.kept = True
            self._kept.append(context)

    def _begin(self, batch: int) -> _Context:
        context = _Context(self.settings, self._began, batch)
        self._began += 1
        self._held.add(context)
        return context

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held now."""
        with self._lock:
            return sum(context.nbytes for context in self._held)

    def most_bytes(
        self, query_heads: int, kv_heads: int, head_dim: int, itemsize: int, threads: int = 1
    ) -> int:
        """What `nbytes` never exceeds for a model of this shape, itemsize bytes a number, that
        generates in so many threads: for each of contexts + threads, and of its layers,
        (rows query_heads + tokens kv_heads) head_dim itemsize + 16 rows + tokens bytes."""
        s = self.settings
        numbers = (s.rows * query_heads + s.tokens * kv_heads) * head_dim
        layer = numbers * itemsize + 16 * s.rows + s.tokens
        return (s.contexts + threads) * len(self.layers) * layer

    def captured(self) -> list[dict[int, CapturedLayer]]:
        """What is held of each context, the oldest first: queries (Hq, r, D) at sorted positions
        (r,), keys (Hkv, n, D) of the tokens up to the last of them, without padding. Copies."""
        with self._lock:
            made = [context.captured() for context in self._kept]
        return [layers for layers in made if layers]

    def clear(self) -> None:
        """Forget everything, such as what came before a drift alarm."""
        with self._lock:
            self._kept.clear()
            for context in self._held:
                context.drop()


class _Context:
    """What is kept of one context: of a row of the batch, the same sample in every layer."""

    def __init__(self, settings: ReservoirSettings, number: int, batch: int) -> None:
        self.settings, self.number, self.batch = settings, number, batch
        draws = np.random.default_rng([settings.seed, number, 0])
        self.sampled, self.kept = bool(draws.random() < settings.share), False
        self.row = int(draws.integers(batch))
        self.ends: dict[int, int] = {}  # tokens that each layer has had
        self.layers: dict[int, _Layer] = {}

    def goes_on(self, step: LayerStep) -> bool:
        """Whether a call follows the layer's last one, by its sizes."""
        end = self.ends.get(step.layer)
        begin = step.n - step.query.shape[2]
        return step.query.shape[0] == self.batch and (end is None or begin == end)

    def add(self, step: LayerStep) -> bool:
        """Sample a call; False, and nothing is taken, where it is seen to be of another cache."""
        self.ends[step.layer] = step.n
        if not self.sampled:
            return True
        if step.layer not in self.layers:
            draws = np.random.default_rng([self.settings.seed, self.number, 1])
            self.layers[step.layer] = _Layer(self.settings, draws)
        return self.layers[step.layer].add(step, self.row)

    def drop(self) -> None:
        self.sampled = False
        self.layers.clear()

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers.values())

    def captured(self) -> dict[int, CapturedLayer]:
        told = {number: layer for number, layer in sorted(self.layers.items()) if layer.length}
        # a context may have ended between two layers of a step
        common = set.intersection(*(layer.whole() for layer in told.values())) if told else set()
        if not common:
            return {}
        return {number: layer.captured(number, common) for number, layer in told.items()}


class _Layer:
    """One layer of a context: a uniform sample of its query rows, and its first keys.

    Each row gets a random priority, and those with the smallest are kept, which is a uniform sample
    without replacement of all rows so far (reservoir sampling, Vitter 1985; here by priorities, so
    that a prompt's rows are drawn in one call).
    """

    def __init__(self, settings: ReservoirSettings, draws: np.random.Generator) -> None:
        self.settings, self.draws = settings, draws
        self.length = 0  # keys held
        # of each place for a row; what is drawn is below 1
        self.priorities = np.ones(settings.rows)
        self.positions = np.full(settings.rows, -1)
        self.worst = 1.0  # of the priorities
        self.queries: Tensor | None = None  # (rows, Hq, D)
        self.keys: Tensor | None = None  # (Hkv, tokens, D), of which `length` are filled
        self.visible: Tensor | None = None  # (length,) bool: padding is not
        self.scaling, self.softcap = 1.0, None  # of the logits

    def add(self, step: LayerStep, row: int) -> bool:
        """Sample the rows of a call, then copy the keys that they need where the call shows any.
        False, and nothing is taken, where the cache is another one than before."""
        begin = step.n - step.query.shape[2]
        priorities = self.draws.random(step.query.shape[2])[: max(0, self.settings.tokens - begin)]
        fresh = (priorities < self.worst).nonzero()[0]
        if not len(fresh) and (self.length or step.reason is not None):
            return True  # most steps of an answer
        limit = self.settings.rows
        best = np.argsort(np.concatenate([self.priorities, priorities[fresh]]))[:limit]
        fresh = fresh[np.sort(best[best >= limit]) - limit]
        end = int(begin + fresh[-1]) + 1 if len(fresh) else int(self.positions.max()) + 1
        copies = step.reason is None and end > self.length
        # looked at only where something is taken: on a GPU it waits
        if copies and self.length and not self._same_cache(step.view.keys[row]):
            return False
        if len(fresh):
            free = np.ones(limit, dtype=bool)
            free[best[best < limit]] = False
            places = free.nonzero()[0]
            self._take(step.query[row], fresh, places)
            self.positions[places] = begin + fresh
            self.priorities[places] = priorities[fresh]
            self.worst = float(self.priorities.max())
        if copies:
            self._copy_keys(step, row, end)
        return True

    def _same_cache(self, keys: Tensor) -> bool:
        """Whether the last key held is the one in keys (Hkv, n, D): another cache, or another beam,
        has another one."""
        return torch.equal(keys[:, self.length - 1].cpu(), self.keys[:, self.length - 1])

    def _take(self, queries: Tensor, rows: np.ndarray, places: np.ndarray) -> None:
        """Copy these rows of queries (Hq, q, D) to places of the sample."""
        if self.queries is None:
            shape = (self.settings.rows, len(queries), queries.shape[2])
            self.queries = torch.empty(shape, dtype=queries.dtype)
        taken = queries[:, torch.from_numpy(rows).to(queries.device)]
        self.queries[torch.from_numpy(places)] = taken.transpose(0, 1).detach().cpu()

    def _copy_keys(self, step: LayerStep, row: int, end: int) -> None:
        """Those before `end` that are not held yet."""
        keys = step.view.keys[row]
        if self.keys is None:
            shape = (len(keys), self.settings.tokens, keys.shape[2])
            self.keys = torch.empty(shape, dtype=keys.dtype)
            self.scaling = float(step.logits["scaling"])
            self.softcap = step.logits["softcap"]
        self.keys[:, self.length : end] = keys[:, self.length : end].detach()
        visible = step.view.visible  # None where the call's rows see all, those before it included
        self.visible = None if visible is None else visible[min(row, len(visible) - 1), :end].cpu()
        self.length = end

    @property
    def nbytes(self) -> int:
        held = (part for part in (self.queries, self.keys, self.visible) if part is not None)
        return sum(x.nbytes for x in held) + self.priorities.nbytes + self.positions.nbytes

    def whole(self) -> set[int]:
        """Sampled positions whose keys are all held, and that are no padding."""
        held = (self.positions >= 0) & (self.positions < self.length)
        positions = self.positions[held].tolist()
        return {p for p in positions if self.visible is None or bool(self.visible[p])}

    def captured(self, number: int, positions: set[int]) -> CapturedLayer:
        """Of these positions, some of `whole`."""
        order = np.argsort(self.positions)
        chosen = torch.from_numpy(order[np.isin(self.positions[order], list(positions))])
        places = torch.from_numpy(self.positions)[chosen]
        end = int(places[-1]) + 1
        keys = self.keys[:, :end]
        if self.visible is not None:  # as if there had been no padding
            real = self.visible[:end]
            keys, places = keys[:, real], (real.cumsum(0) - 1)[places]
        queries = self.queries[chosen].transpose(0, 1)
        return CapturedLayer(
            number, queries.clone(), places, keys.clone(), self.scaling, self.softcap
        )
