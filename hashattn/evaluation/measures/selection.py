"""How much of what dense attention reads a selector finds: recall of top tokens, attention mass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hashattn.attention.budget import Budget
from hashattn.base.engines.threads import FasterThreads
from hashattn.hashing.labels import attention_logits, candidate_mask
from hashattn.kernels import attend, indices_to_mask, select
from hashattn.selectors.base import IndexStore, KeyView, Selector
from hashattn.selectors.plan import SelectionPlan

if TYPE_CHECKING:
    from hashattn.hashing.capture import CapturedLayer

_THREADS = FasterThreads()
ROWS_AT_ONCE = 64  # bounds the dense logits (query heads, rows, n) that recall is measured against


def selection_metrics(
    captured: Iterable[CapturedLayer],
    selectors: Mapping[str, Selector],
    heavy: Sequence[int],
    sink: int = 4,
    local: int = 28,
    top: Sequence[int] = (4, 32),
    prompt: int = 0,
    by_head: bool = False,
    shares: tuple[tuple[float, ...], ...] | None = None,
) -> list[dict[str, Any]]:
    """One row for each captured layer, selector and heavy budget (tokens beside sink and local).

    Columns: method, layer, length (cached tokens), heavy, bits (auxiliary, per token and KV head),
    queries (rows averaged), recall@k for k in `top` (share of the k best tokens by q.k outside sink
    and local that were selected), heavy_mass (share of the attention mass outside sink and local
    that the selection holds), mass (share of all mass on selected, sink and local tokens), density
    (tokens read / visible), union (distinct tokens that a group's query heads read / visible) and,
    where values were captured, output_error (relative L2 error of the attention output against
    dense; sampled tokens have the method's weights). Means over rows and query heads. Rows without
    a token outside sink and local are left out; ValueError if none is left.

    by_head: a row for each KV head instead, column head, means over its group. shares: as in
    Budget, how layers and heads divide the heavy tokens.

    prompt: the queries of the first `prompt` tokens, all captured, are shown to selectors that
    observe and not measured; every later row is ranked as if it came right after them. ValueError
    where such a selector has no prompt, or some of its queries were not captured.
    """
    table = []
    for layer in captured:
        all_rows = rows_with_candidates(layer, sink, local, prompt=prompt)
        index = {name: stored_keys(selector, layer, prompt) for name, selector in selectors.items()}
        parts: dict[tuple[str, int], list[dict[str, Tensor]]] = {}
        kind = tuple(selectors), len(heavy), layer.keys.shape
        for rows in all_rows.split(ROWS_AT_ONCE):
            with _THREADS.piece(kind, len(rows)):
                truth = Truth(layer, rows, (sink, local), top, shares)
                for name, selector in selectors.items():
                    scores = truth.scores(selector, index[name]) if selector.ranks else None
                    for tokens in heavy:
                        read = truth.read(selector, index[name], scores, tokens)
                        parts.setdefault((name, tokens), []).append(truth.measure(*read))
        for (name, tokens), measures in parts.items():
            labels = _labels(layer, name, selectors[name], tokens, len(all_rows))
            table += [labels | means for means in _means(measures, len(layer.keys), by_head)]
    return table


def selected_rows(
    layer: CapturedLayer, selector: Selector, heavy: int, sink: int, local: int, prompt: int = 0
) -> tuple[Truth, tuple[Tensor, Tensor | None]]:
    """What the rows of a captured layer attend to, and the lists (1, lists, rows, m) int32 that the
    selector reads for them, with their log weights of the same shape, None where it does not
    sample; arguments as of selection_metrics."""
    rows = rows_with_candidates(layer, sink, local, prompt=prompt)
    index = stored_keys(selector, layer, prompt)
    truth = Truth(layer, rows, (sink, local), (heavy,), None)
    scores = truth.scores(selector, index) if selector.ranks else None
    return truth, truth.read(selector, index, scores, heavy)


class Truth:
    """What some rows of a layer attend to, computed once for all selectors and budgets."""

    def __init__(
        self,
        layer: CapturedLayer,
        rows: Tensor,
        window: tuple[int, int],
        top: Sequence[int],
        shares: tuple[tuple[float, ...], ...] | None,
    ) -> None:
        n = layer.keys.shape[1]
        self.layer, self.top, self.shares = layer, top, shares
        self.positions, self.queries = layer.positions[rows], layer.queries[:, rows]
        self.candidates = candidate_mask(self.positions, n, *window)
        view = KeyView(layer.keys[None], positions=self.positions)
        self.visible = view.causal(len(rows))[0, 0]
        logits = attention_logits(self.queries, layer.keys, layer.scaling, layer.softcap)
        self.window = window
        self.weights = logits.masked_fill(~self.visible, float("-inf")).softmax(dim=-1)
        self.dense = None if layer.values is None else self._dense_output()
        outside = logits.masked_fill(~self.candidates, float("-inf"))
        self.outside = outside.softmax(dim=-1)
        self.best = best_tokens(outside, max(top))

    def scores(self, selector: Selector, index: dict[str, Tensor | IndexStore]) -> Tensor:
        """Scores (1, lists, rows, n) of a selector that ranks."""
        if selector.observes:
            return torch.cat(
                [self._step(selector, index, row) for row in range(len(self.positions))], 2
            )
        view = KeyView(self.layer.keys[None], index, positions=self.positions)
        return selector.scores(self.layer.layer, self.queries[None], view, self.layer.scaling)

    def _step(self, selector: Selector, index: dict[str, Tensor | IndexStore], row: int) -> Tensor:
        """Scores (1, lists, 1, n) of one row in a call of its own, before later keys come."""
        keys = self.layer.keys[None]
        cached = int(self.positions[row]) + 1
        view = KeyView(keys[:, :, :cached], index)
        query = self.queries[None, :, row : row + 1]
        scores = selector.scores(self.layer.layer, query, view, self.layer.scaling)
        return pad(scores, (0, keys.shape[2] - cached), value=float("-inf"))

    def read(
        self,
        selector: Selector,
        index: dict[str, Tensor | IndexStore],
        scores: Tensor | None,
        heavy: int,
        sampled: float = 0.0,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Lists (1, lists, rows, m) int32 of what a selector reads, and log weights if it samples.

        scores: of a selector that ranks; the same for every budget. sampled, seed: as in Budget.
        """
        cached = self.positions[None] + 1
        plan = SelectionPlan(
            self.visible.shape[-1], *self.window, torch.full_like(cached, heavy)[:, None], cached,
            width=heavy + sum(self.window), mask=self.visible[None, None],
        )  # fmt: skip
        kv_heads = len(self.layer.keys)
        lists = selector.lists(len(self.queries), kv_heads)
        budget = Budget(
            *self.window, heavy=heavy, shares=self.shares, sampled=sampled, seed=seed, fresh=False
        )
        plan = budget.of_layer(plan, self.layer.layer, kv_heads, lists)
        if scores is not None and plan.draw is None:
            mandatory = self.visible & ~self.candidates
            return select(
                scores, plan.heavy, self.candidates[None, None], mandatory[None, None]
            ), None
        view = KeyView(self.layer.keys[None], index, positions=self.positions)
        return selector.sample(self.layer.layer, self.queries[None], view, self.layer.scaling, plan)

    def measure(self, indices: Tensor, log_weights: Tensor | None) -> dict[str, Tensor]:
        """recall@k, heavy_mass, mass, density, union and output_error of lists (1, lists, rows, m),
        each (query heads, rows)."""
        group = len(self.weights) // indices.shape[1]
        attended = indices_to_mask(indices, self.weights.shape[-1])[0].repeat_interleave(
            group, dim=0
        )
        real = self.candidates.expand_as(attended).gather(-1, self.best)
        hits = attended.gather(-1, self.best) & real
        measures = {f"recall@{k}": hits[..., :k].sum(-1) / real[..., :k].sum(-1) for k in self.top}
        measures["heavy_mass"] = (self.outside * attended).sum(-1)
        measures["mass"] = (self.weights * attended).sum(-1)
        measures["density"] = attended.sum(-1) / self.visible.sum(-1)
        heads = len(self.weights) // len(self.layer.keys)
        union = attended.unflatten(0, (-1, heads)).any(1).sum(-1) / self.visible.sum(-1)
        measures["union"] = union.repeat_interleave(heads, dim=0)
        if self.dense is not None:
            error = self.output(indices, log_weights) - self.dense
            measures["output_error"] = error.norm(dim=-1) / self.dense.norm(dim=-1)
        return measures

    def output(self, indices: Tensor, log_weights: Tensor | None) -> Tensor:
        """Attention output (query heads, rows, D) over lists and log weights as of `read`."""
        layer = self.layer
        queries, keys, values = (x[None].float() for x in (self.queries, layer.keys, layer.values))
        return attend(
            queries, keys, values, indices, layer.scaling, layer.softcap, log_weights=log_weights
        )[0]

    def _dense_output(self) -> Tensor:
        """Dense attention output (query heads, rows, D)."""
        values = self.layer.values.float()
        return self.weights @ values.repeat_interleave(len(self.weights) // len(values), dim=0)


def best_tokens(scores: Tensor, k: int) -> Tensor:
    """Indices (..., min(k, n)) int64 of the k largest scores (..., n), best first, ties to the
    lowest index."""
    # 2 k are taken and sorted stably by (score, index), which is exact unless the k-th ties with
    # the last of them; then everything is sorted
    n = scores.shape[-1]
    width = min(n, 2 * k)
    values, indices = scores.topk(width, dim=-1)
    if width < n and bool((values[..., -1] == values[..., min(k, width) - 1]).any()):
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    by_index = indices.sort(dim=-1)
    ordered = values.gather(-1, by_index.indices).sort(dim=-1, descending=True, stable=True)
    return by_index.values.gather(-1, ordered.indices)[..., :k]


def rows_with_candidates(
    layer: CapturedLayer, sink: int, local: int, *, least: int = 1, prompt: int = 0
) -> Tensor:
    """Captured rows (r,) int64 after the prompt, as indices into layer.positions, that see at least
    `least` tokens outside sink and local; ValueError if there are none."""
    candidates = layer.positions + 1 - sink - local
    measured = (candidates >= least) & (layer.positions >= prompt)
    if not measured.any():
        raise ValueError(
            f"layer {layer.layer}: no captured query after the prompt of {prompt} sees {least} "
            f"tokens outside sink {sink} and local {local}; capture later rows or a longer sequence"
        )
    return measured.nonzero()[:, 0]


def stored_keys(
    selector: Selector, layer: CapturedLayer, prompt: int
) -> dict[str, Tensor | IndexStore]:
    """What the selector stores for the keys, and what it observes in the prompt's queries."""
    index = selector.index_of(layer.layer, layer.keys, layer.values)
    if not selector.observes:
        return index
    rows = (layer.positions < prompt).nonzero()[:, 0]
    if not 0 < prompt == len(rows):
        raise ValueError(
            f"prompt = {prompt}: selector {selector.name!r} observes a prompt's queries, and layer "
            f"{layer.layer} has {len(rows)} of them; capture every row from the first on"
        )
    view = KeyView(layer.keys[None, :, :prompt])
    queries = layer.queries[None, :, rows]
    return index | selector.observe(layer.layer, queries, view, layer.scaling)


def _labels(
    layer: CapturedLayer, name: str, selector: Selector, heavy: int, queries: int
) -> dict[str, Any]:
    group = layer.queries.shape[0] // layer.keys.shape[0]
    return {
        "method": name,
        "layer": layer.layer,
        "length": layer.keys.shape[1],
        "heavy": heavy,
        "bits": selector.nominal_bits(group, layer.keys.shape[-1]),
        "queries": queries,
    }


def _means(
    parts: Sequence[dict[str, Tensor]], kv_heads: int, by_head: bool
) -> list[dict[str, float]]:
    """Mean of every measure, over all query heads or those of each KV head."""
    joined = {name: torch.cat([part[name].float() for part in parts], dim=1) for name in parts[0]}
    if not by_head:
        return [{name: float(values.mean()) for name, values in joined.items()}]
    return [
        {"head": head}
        | {name: float(values.chunk(kv_heads)[head].mean()) for name, values in joined.items()}
        for head in range(kv_heads)
    ]
