"""The receipt: what a run really read, counted where the tokens are gathered.

Density is counted, never configured: tokens read / tokens cached, over the calls that follow cached
tokens, with equal weight for every query row. A receipt keeps sums by layer, so it does not grow
with the run; the last steps are kept on request.
"""

import json
import math
import os
import threading
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hashattn.attention.memory import Traffic
from hashattn.base.environment import package_versions, python_version
from hashattn.base.errors import ReceiptError, SparsePathError
from hashattn.base.files import read_json, write_text
from hashattn.models.identity import config_sha256, model_name
from hashattn.selectors.calibration import tensors_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hashattn.attention.break_even import BreakEven
    from hashattn.attention.budget import Budget
    from hashattn.attention.device_counts import DeviceCounts
    from hashattn.attention.fallback import Fallback
    from hashattn.attention.memory import Memory
    from hashattn.attention.observer import LayerStep
    from hashattn.models.heads import HeadSlice
    from hashattn.selectors.base import Selector

FORMAT = 2
_NO_STEPS = ("prefill", "no_cache")  # calls that begin a context: counted, but in no density
_SEVERAL_ROWS, _SHORT = "several_rows", "short_context"
# reasons that leave nothing to the selector in any context, however long
_NEVER_SPARSE = (*_NO_STEPS, "sliding_window", "dense_layer")
_KEPT = "kept_tokens"  # of the settings
_LEARNED = "learned_length"
_ADDING = threading.Lock()  # threads may share a receipt


@dataclass(frozen=True)
class Step:
    """One call of one layer that followed cached tokens.

    step: its number within the layer. rows: batch x query rows. cached, read: tokens per row, mean
    over rows and token lists, without padding. reason: why it was dense, None if sparse.
    """

    layer: int
    step: int
    rows: int
    cached: float
    read: float
    reason: str | None = None


@dataclass
class Count:
    """The calls of one layer with the same reason, summed.

    reason: why they were dense, None for sparse ones. rows: batch x query rows of all calls; most:
    the most query rows of a call; longest: the most tokens cached. cached, read: tokens summed over
    rows, read also over `lists` token lists; 0 for calls that begin a context. On a GPU they are
    tensors of one element, as reading numbers would make every step wait. levels: with a fallback,
    how many lists ended at each of its levels.
    """

    layer: int
    reason: str | None
    lists: int = 1
    calls: int = 0
    rows: int = 0
    most: int = 0
    longest: int = 0
    cached: float | Tensor = 0
    read: float | Tensor = 0
    levels: list[int] = field(default_factory=list)

    def add(
        self, rows: int, most: int, longest: int, cached: float | Tensor, read: float | Tensor,
        levels: Sequence[int] = (), calls: int = 1,
    ) -> None:  # fmt: skip
        """Add calls; cached and read are numbers or tensors of one element."""
        if levels:
            self.levels = _summed(self.levels, levels)
        self.calls += calls
        self.rows += rows
        self.most, self.longest = max(self.most, most), max(self.longest, longest)
        self.cached, self.read = _added(self.cached, cached), _added(self.read, read)

    def totals(self) -> "Count":
        """The same counts as numbers, `read` as the mean over lists."""
        cached, read = float(self.cached), float(self.read) / self.lists
        return replace(self, lists=1, cached=cached, read=read)


def _summed(counts: Sequence[int], others: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip_longest(counts, others, fillvalue=0)]


def _added(total: float | Tensor, value: float | Tensor) -> float | Tensor:
    if not isinstance(value, Tensor):
        return total + value
    if value.is_cpu:
        return total + value.item()
    if isinstance(total, Tensor):
        return total.add_(value)  # one small tensor for the whole run
    return value.to(torch.int64 if not value.is_floating_point() else value.dtype) + total


@dataclass
class Receipt:
    """What was read, by which method, on what.

    method: the selector's record. settings: budget, sparse_rows, dense_layers. model: name and
    configuration hash. environment: versions, device, dtype. auxiliary_bits: stored per token per
    KV head, nominal_bits: what the method needs (`Selector.nominal_bits`), None before the first
    sparse call. heads: under tensor parallelism, those of the model's heads that this process
    computes, to which all counts refer; None for all. traffic: with a Memory, what moved between
    fast memory and the rest. recent: the last `keep_steps` Steps, oldest
    first.
    """

    method: dict[str, Any]
    settings: dict[str, Any]
    model: dict[str, Any]
    environment: dict[str, str]
    sparse_method: bool = True
    heads: dict[str, Any] | None = None
    auxiliary_bits: float | None = None
    nominal_bits: float | None = None
    keep_steps: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    _counts: dict[tuple[int, str | None], Count] = field(default_factory=dict)
    _recent: deque[Step] = field(default_factory=deque)
    _device: "DeviceCounts | None" = None  # of calls that are counted there

    @classmethod
    def start(
        cls,
        model: "PreTrainedModel",
        selector: "Selector",
        budget: "Budget",
        *,
        sparse_rows: int = 1,
        dense_layers: Collection[int] = (),
        heads: "HeadSlice | None" = None,
        keep_steps: int = 0,
        fallback: "Fallback | None" = None,
        dense_below: float = 0,
        break_even: "BreakEven | None" = None,
        memory: "Memory | None" = None,
    ) -> "Receipt":
        """An empty receipt that describes the model, the method and the machine."""
        layers = sorted(dense_layers)
        settings = asdict(budget) | {"sparse_rows": sparse_rows, "dense_layers": layers}
        if budget.sampled and selector.slopes is not None:
            settings["slopes_sha256"] = tensors_sha256(selector.slopes)
        if selector.learned_length is not None:
            settings[_LEARNED] = selector.learned_length
        if fallback is not None:
            settings["fallback"] = fallback.record()
        if dense_below:  # None where no length is enough
            settings["dense_below"] = None if dense_below == math.inf else dense_below
        if break_even is not None:
            settings["break_even"] = break_even.record()
        if memory is not None:
            settings["memory"] = memory.record()
        return cls(
            method=selector.record(),
            settings=settings,
            model={"name": model_name(model), "config_sha256": config_sha256(model.config)},
            environment=_environment(model),
            sparse_method=selector.sparse,
            heads=None if heads is None else heads.record(),
            keep_steps=keep_steps,
        )

    def fresh(self) -> "Receipt":
        """An empty receipt of the same run, in which nothing was kept yet."""
        return Receipt(
            self.method,
            {name: value for name, value in self.settings.items() if name != _KEPT},
            self.model,
            self.environment,
            self.sparse_method,
            self.heads,
            keep_steps=self.keep_steps,
        )

    def follow(self, device: "DeviceCounts", last: "Receipt | None" = None) -> None:
        """Read the counters that `last` read, which takes what they have along."""
        if last is not None:
            last._settle()
        self._device = device

    def _settle(self) -> None:
        """Take the device's counts over, to leave its counters to another receipt."""
        if self._device is not None:
            counts, self._device = self._device_counts(clear=True), None
            with _ADDING:
                for count in counts:
                    self._join(self._counts, count)

    def _device_counts(self, clear: bool = False) -> list[Count]:
        """What the device counted, in the form of the host's counts."""
        device = self._device
        if device is None:
            return []
        return [
            Count(layer, reason, 1 if reason else device.lists[layer], most=1, **numbers)
            for (layer, reason), numbers in device.read(clear).items()
        ]

    @staticmethod
    def _join(counts: dict[tuple[int, str | None], Count], count: Count) -> None:
        """Add a count of several calls to those of its layer and reason."""
        place = count.layer, count.reason
        own = counts.setdefault(place, Count(*place, count.lists))
        own.add(count.rows, count.most, count.longest, count.cached, count.read, calls=count.calls)

    def keeps(self, tokens: int) -> None:
        """Note that steps read up to so many tokens of a prompt whatever the selector says."""
        most = max(tokens, self.settings.get(_KEPT, 0))
        self.settings = self.settings | {_KEPT: most}

    def saw(self, step: "LayerStep") -> None:
        """Count a call of a layer (hashattn.attention.observer)."""
        read, lists, levels = step.seen, 1, ()
        if step.indices is not None:
            lists = step.indices.shape[1]
            read = _selected(step.indices)
        if step.levels is not None:
            levels = step.levels.flatten().bincount().tolist()
        self.add(
            step.layer,
            reason=step.reason,
            rows=step.rows,
            most=step.query.shape[2],
            longest=step.n,
            cached=step.seen,
            read=read,
            lists=lists,
            levels=levels,
        )

    def add(
        self,
        layer: int,
        *,
        rows: int,
        cached: float | Tensor,
        read: float | Tensor,
        reason: str | None = None,
        lists: int = 1,
        most: int = 1,
        longest: int = 0,
        levels: Sequence[int] = (),
    ) -> None:
        """Count a call; the arguments are the fields of Count, for this call alone."""
        if reason in _NO_STEPS:
            cached = read = 0
        with _ADDING:
            count = self._counts.get((layer, reason))
            if count is None:
                count = self._counts[layer, reason] = Count(layer, reason, lists)
            count.add(rows, most, longest, cached, read, levels)
            if self.keep_steps and reason not in _NO_STEPS:
                self._keep_step(layer, rows, float(cached), float(read) / lists, reason)

    def _keep_step(
        self, layer: int, rows: int, cached: float, read: float, reason: str | None
    ) -> None:
        number = sum(
            count.calls
            for count in self._counts.values()
            if count.layer == layer and count.reason not in _NO_STEPS
        )
        self._recent.append(Step(layer, number - 1, rows, cached / rows, read / rows, reason))
        while len(self._recent) > self.keep_steps:
            self._recent.popleft()

    @property
    def counts(self) -> list[Count]:
        """Totals by layer and reason, in order of layers, sparse calls first."""
        device = self._device_counts()
        with _ADDING:
            totals = {key: count.totals() for key, count in self._counts.items()}
        for count in device:
            self._join(totals, count.totals())
        totals = totals.values()
        return sorted(totals, key=lambda count: (count.layer, count.reason or ""))

    @property
    def recent(self) -> list[Step]:
        """The last steps, oldest first; none unless attach was called with keep_steps."""
        return list(self._recent)

    def _sum(self, name: str, reasons: Collection[str | None] | None = None) -> Any:
        """Sum of a Count field over the calls that followed cached tokens, or had these reasons."""
        return sum(
            getattr(count, name)
            for count in self.counts
            if (count.reason not in _NO_STEPS if reasons is None else count.reason in reasons)
        )

    @property
    def sparse_calls(self) -> int:
        """Calls, of all layers, that went through the selector."""
        return self._sum("calls", [None])

    @property
    def decode_calls(self) -> int:
        """Calls, of all layers, that followed cached tokens."""
        return self._sum("calls")

    @property
    def tokens_read(self) -> float:
        """Tokens read by all rows of all calls that followed cached tokens, over all layers."""
        return self._sum("read")

    @property
    def tokens_cached(self) -> float:
        """Tokens that these rows could attend to."""
        return self._sum("cached")

    @property
    def dense_reasons(self) -> dict[str, int]:
        """Dense calls by reason, those that begin a context included."""
        dense = Counter()
        for count in self.counts:
            if count.reason is not None:
                dense[count.reason] += count.calls
        return dict(sorted(dense.items()))

    @property
    def density(self) -> float:
        """Read / cached over the calls that the selector was meant for; 1.0 when there is none.

        These are the sparse calls, and dense ones with too many rows at once ("several_rows").
        """
        reasons = [None, _SEVERAL_ROWS]
        return _ratio(self._sum("read", reasons), self._sum("cached", reasons))

    @property
    def decode_density(self) -> float:
        """Read / cached over all calls that followed cached tokens, those of dense and sliding
        layers included."""
        return _ratio(self.tokens_read, self.tokens_cached)

    @property
    def levels(self) -> list[int]:
        """With a fallback, how many token lists ended at each of its levels, over all layers: at
        the budget, at twice its heavy tokens, and so on, last the dense ones; empty without one."""
        fallback, totals = self.settings.get("fallback"), []
        if fallback is None:
            return []
        for count in self.counts:
            totals = _summed(totals, count.levels)
        return _summed([0] * (fallback["levels"] + 1), totals)

    @property
    def is_sparse(self) -> bool:
        """Whether at least one call went through the selector and skipped a token."""
        return self._sum("read", [None]) < self._sum("cached", [None])

    @property
    def stayed_short(self) -> bool:
        """Whether every step was dense because its context was shorter than the break-even that
        the policy of never being slower had measured."""
        below, counts = self.settings.get("dense_below"), self.counts
        below = math.inf if below is None else below
        # steps over a static cache read short contexts as they read all others, whole
        short = [count for count in counts if count.reason in (None, _SHORT)]
        expected = all(count.reason in (None, _SHORT, *_NEVER_SPARSE) for count in counts)
        stayed = bool(short) and all(count.longest < below for count in short)
        return "break_even" in self.settings and expected and stayed

    def by_layer(self) -> list[dict[str, Any]]:
        """One row per layer: steps, sparse steps, mean tokens cached and read, density."""
        by_layer: dict[int, list[Count]] = {}
        for count in self.counts:
            if count.reason not in _NO_STEPS:
                by_layer.setdefault(count.layer, []).append(count)
        rows = []
        for layer, counts in by_layer.items():
            total = {name: sum(getattr(count, name) for count in counts)
                     for name in ("calls", "rows", "cached", "read")}  # fmt: skip
            rows.append(
                {
                    "layer": layer,
                    "steps": total["calls"],
                    "sparse_steps": sum(count.calls for count in counts if count.reason is None),
                    "cached": total["cached"] / total["rows"],
                    "read": total["read"] / total["rows"],
                    "density": _ratio(total["read"], total["cached"]),
                }
            )
        return rows

    def verify(self, allow_dense: bool = False) -> None:
        """Raise SparsePathError when a sparse method read all cached tokens in all steps, unless
        every context was shorter than the break-even that was asked for."""
        if allow_dense or not self.sparse_method or self.is_sparse or self.stayed_short:
            return
        reasons = self.dense_reasons or "no call reached the attention layers"
        if not self.sparse_calls:
            raise SparsePathError(
                f"no decode step was sparse (dense calls: {reasons}). Generate at least two new "
                "tokens with a cache; for a model whose layers are all sliding windows, sparse "
                "attention has nothing to do. Pass allow_dense=True to accept this"
            )
        if "fallback" in self.settings:
            raise SparsePathError(
                "density 1.0: the fallback made every list dense, as it predicts errors above its "
                f"tolerance {self.settings['fallback']['tolerance']}. Calibrate it for a larger "
                "one, or pass allow_dense=True to accept this"
            )
        raise SparsePathError(
            f"density 1.0: the budget {self.settings} covers all cached tokens. Lower it, use "
            "longer prompts, or pass allow_dense=True to accept this"
        )

    def summary(self) -> str:
        """A few lines for people."""
        reasons = ", ".join(f"{k} {v}" for k, v in self.dense_reasons.items()) or "none"
        weights = self.method.get("weights_sha256")
        aux = "-" if self.auxiliary_bits is None else f"{self.auxiliary_bits:g}"
        differs = self.nominal_bits != self.auxiliary_bits
        nominal = f", the method's own layout {self.nominal_bits:g}" if differs else ""
        longest = max((count.longest for count in self.counts), default=0)
        return "\n".join(
            [
                f"method           {self.method['name']}" + (f" {weights[:12]}" if weights else ""),
                f"model            {self.model['name'] or 'unnamed'}",
                *self._heads_line(),
                *self._forced_line(),
                f"tokens cached    up to {longest}",
                *self._learned_line(longest),
                f"sparse calls     {self.sparse_calls} of {self.decode_calls} that followed cached "
                "tokens, all layers",
                f"density          {self.density:.4f} (all decode calls {self.decode_density:.4f})",
                f"auxiliary bits   {aux} per token per KV head{nominal}",
                f"dense calls      {reasons}",
                *self._policy_lines(longest),
                *self._kept_line(),
                *self._fallback_lines(),
                *self._memory_lines(),
                *self._rows_line(),
            ]
        )

    def _learned_line(self, longest: int) -> list[str]:
        """Whether contexts were longer than any that the method learned from."""
        learned = self.settings.get(_LEARNED)
        if learned is None or longest <= learned:
            return []
        return [
            f"learned from     contexts of up to {learned} tokens: queries and keys further apart"
            " are new",
            "                 to the codes, which may fail there: train on contexts of this length",
        ]

    def _policy_lines(self, longest: int) -> list[str]:
        """Up to which length steps were to be dense, by which times, and whether all were."""
        if "dense_below" not in self.settings:
            return []
        below = self.settings["dense_below"]
        limit = "any length" if below is None else f"{below} tokens"
        even = self.settings.get("break_even")
        if even is None:
            return [f"dense below      {limit}, as given"]
        dense, sparse = (
            f"{each['fixed_ms']:.3g} ms {1e3 * each['per_token_ms']:+.3g} ms per 1,000 tokens"
            for each in (even["dense"], even["sparse"])
        )
        beyond = f", beyond the {even['lengths'][-1]} that were timed" * even["extrapolated"]
        lines = [
            f"dense below      {limit}, the measured break-even{beyond}: a layer's step takes",
            f"                 {dense} dense, {sparse} sparse",
        ]
        if self.stayed_short:
            lines.append(
                "                 every step was dense, as was asked: contexts were shorter"
                f" ({longest} tokens at most)"
            )
        return lines

    def _rows_line(self) -> list[str]:
        """What to do where steps were dense because of their rows."""
        most = max((c.most for c in self.counts if c.reason == _SEVERAL_ROWS), default=0)
        if not most:
            return []
        return [
            f"                 several_rows: steps of up to {most} rows were read dense; "
            f"attach(..., sparse_rows={most}) reads them sparse"
        ]

    def _kept_line(self) -> list[str]:
        """How many tokens were read because they were named."""
        kept = self.settings.get(_KEPT)
        if kept is None:
            return []
        return [f"kept             up to {kept} named tokens of a prompt, read beside the budget"]

    def _fallback_lines(self) -> list[str]:
        """What the fallback keeps, and where the lists ended."""
        fallback, levels = self.settings.get("fallback"), self.levels
        if fallback is None:
            return []
        names = [f"{2**level}x" for level in range(len(levels) - 1)] + ["dense"]
        total = max(1, sum(levels))
        shares = ", ".join(
            f"{k} {100 * v / total:.1f} %" for k, v in zip(names, levels, strict=True)
        )
        return [
            f"fallback         calibrated for an output error above {100 * fallback['tolerance']:g}"
            f" % in at most {100 * fallback['risk']:g} % of head-steps, the mean over sequences "
            "like the calibration's",
            f"lists ended at   {shares} (times the heavy tokens that a list begins with)",
        ]

    def _memory_lines(self) -> list[str]:
        """Where keys and values lay, and what that cost."""
        memory, traffic = self.settings.get("memory"), self.traffic
        if memory is None:
            return []
        bits = "the model's dtype" if memory["bits"] is None else f"{memory['bits']} bits"
        bits += f" (the newest {memory['exact']} as they were)" if memory["exact"] else ""
        if memory["rest"] is None:
            return [f"keys and values  in {bits}, all in fast memory"]
        streamed = f"; {traffic.streamed} steps read more than fits" if traffic.streamed else ""
        return [
            f"keys and values  in {bits}, {memory['fast_bytes']} bytes in fast memory, the rest in "
            f"{'a file' if memory['rest'] == 'file' else memory['rest']}",
            f"rows found there {100 * traffic.hit_rate:.1f} %; {traffic.bytes_moved} bytes moved, "
            f"waited for {traffic.seconds:.3g} s{streamed}",
        ]

    def _forced_line(self) -> list[str]:
        """That hash weights of another model were accepted, by the method itself or its base."""
        method = self.method
        while method is not None and not method.get("forced"):
            method = method.get("parameters", {}).get("base")
        return [] if method is None else [f"forced           {'; '.join(method['forced'])}"]

    def _heads_line(self) -> list[str]:
        if self.heads is None:
            return []
        heads = self.heads
        part = f"{len(heads['kv'])} of {heads['kv_heads']} KV heads"
        return [f"heads            {part}, rank {heads['rank']} of {heads['ranks']}"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content, with the derived densities."""
        derived = {"density": self.density, "decode_density": self.decode_density}
        fields = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        fields["traffic"] = self.traffic.record()
        counts = [{k: v for k, v in asdict(c).items() if k != "lists"} for c in self.counts]
        recent = [asdict(step) for step in self.recent]
        return {"format": FORMAT} | derived | fields | {"counts": counts, "recent": recent}

    def to_json(self) -> str:
        """The receipt as a JSON string."""
        return json.dumps(self.to_dict(), sort_keys=True)

    def save(self, path: str | os.PathLike) -> None:
        """Write the receipt as JSON, whole or not at all. Raises WriteError."""
        write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Receipt":
        """Read a saved receipt. Raises ReceiptError when the file is not one."""
        content = read_json(path, ReceiptError)
        try:
            if content.pop("format") != FORMAT:
                raise ReceiptError(f"{path}: written by another version of hashattn")
            for derived in ("density", "decode_density"):
                content.pop(derived)
            counts = [Count(**count) for count in content.pop("counts")]
            content["traffic"] = Traffic.of(content.get("traffic", {}))
            content["_counts"] = {(count.layer, count.reason): count for count in counts}
            content["_recent"] = deque(Step(**step) for step in content.pop("recent"))
            return cls(**content)
        except (KeyError, TypeError, AttributeError) as error:
            raise ReceiptError(f"{path} is not a receipt: save one with receipt.save") from error


def _selected(indices: Tensor) -> int | Tensor:
    """Number of tokens listed in indices (batch, lists, q, m), over all lists and rows."""
    if indices.is_cpu:
        return np.count_nonzero(indices.numpy() >= 0)  # takes a third of torch's time
    return (indices >= 0).sum()


def _ratio(read: float, cached: float) -> float:
    return read / cached if cached else 1.0


def _environment(model: "PreTrainedModel") -> dict[str, str]:
    versions = package_versions(("hashattn", "torch", "transformers", "numpy"))
    packages = {name: version or "not installed" for name, version in versions.items()}
    place = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    return packages | {"python": python_version()} | place
