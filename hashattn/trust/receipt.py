"""The receipt: what a run really read, counted where the tokens were gathered.

Density is counted, never configured: tokens read / tokens cached, over the sparse calls of all
layers, each query row weighing the same.
"""

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ReceiptError, SparsePathError
from ..hashing.model_identity import model_name

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..attention.budget import Budget
    from ..heads import HeadSlice
    from ..selectors.base import Selector

FORMAT = 1


@dataclass(frozen=True)
class Step:
    """One decode call of one layer.

    step: its number within the layer. rows: batch x query rows. cached, read: tokens per row, the
    mean over rows and token lists, padding not counted. reason: why it was dense, None if sparse.
    """

    layer: int
    step: int
    rows: int
    cached: float
    read: float
    reason: str | None = None


@dataclass
class Receipt:
    """What was read, by which method, on what.

    method: the selector's record. settings: budget, sparse_rows, dense_layers. model: name and
    configuration hash. environment: versions, device, dtype. auxiliary_bits: what was
    stored per token per KV head, nominal_bits: what the method needs (`Selector.nominal_bits`),
    None before the first sparse call. calls: dense calls that were no decode
    steps, by reason. heads: of a run under tensor parallelism, which of the model's heads this
    process computed; everything counted is of these. None for all.
    """

    method: dict[str, Any]
    settings: dict[str, Any]
    model: dict[str, Any]
    environment: dict[str, str]
    sparse_method: bool = True
    heads: dict[str, Any] | None = None
    auxiliary_bits: float | None = None
    nominal_bits: float | None = None
    calls: Counter[str] = field(default_factory=Counter)
    _steps: list[Step] = field(default_factory=list)

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
    ) -> "Receipt":
        """An empty receipt that describes the model, the method and the machine."""
        layers = sorted(dense_layers)
        settings = asdict(budget) | {"sparse_rows": sparse_rows, "dense_layers": layers}
        return cls(
            method=selector.record(),
            settings=settings,
            model={"name": model_name(model), "config_sha256": config_hash(model.config)},
            environment=_environment(model),
            sparse_method=selector.sparse,
            heads=None if heads is None else heads.record(),
        )

    def fresh(self) -> "Receipt":
        """An empty receipt of the same run."""
        return Receipt(
            self.method,
            self.settings,
            self.model,
            self.environment,
            self.sparse_method,
            self.heads,
        )

    def record_step(
        self,
        layer: int,
        *,
        rows: int,
        cached: "float | Tensor",
        read: "float | Tensor",
        reason: str | None = None,
    ) -> None:
        """Add a decode call of a layer; the arguments are Step's.

        Counts may be tensors of one element. They are read when the receipt is: reading one on a
        GPU would make every layer of every step wait for it.
        """
        number = self._counts[layer]
        self._counts[layer] += 1
        self._unread.append((layer, number, rows, cached, read, reason))

    @property
    def steps(self) -> list[Step]:
        """Every decode call, in order."""
        for layer, number, rows, cached, read, reason in self._unread:
            self._steps.append(Step(layer, number, rows, float(cached), float(read), reason))
        self._unread.clear()
        return self._steps

    def record_call(self, reason: str) -> None:
        """Count a dense call that is no decode step, such as prefill."""
        self.calls[reason] += 1

    def __post_init__(self) -> None:
        self._unread: list[tuple] = []
        self._counts = Counter(step.layer for step in self._steps)

    @property
    def sparse_steps(self) -> list[Step]:
        """Decode calls that went through the selector."""
        return [step for step in self.steps if step.reason is None]

    @property
    def dense_reasons(self) -> dict[str, int]:
        """Dense calls by reason, decode steps and others."""
        dense = Counter(step.reason for step in self.steps if step.reason is not None)
        return dict(sorted((dense + self.calls).items()))

    @property
    def density(self) -> float:
        """Read / cached over the sparse calls; 1.0 when there is none."""
        return _density(self.sparse_steps)

    @property
    def decode_density(self) -> float:
        """Read / cached over all decode calls, those of dense and sliding layers included."""
        return _density(self.steps)

    @property
    def is_sparse(self) -> bool:
        """Whether at least one call went through the selector and skipped a token."""
        return bool(self.sparse_steps) and self.density < 1.0

    def by_layer(self) -> list[dict[str, Any]]:
        """One row per layer: steps, sparse steps, mean tokens cached and read, density."""
        rows = []
        for layer in sorted({step.layer for step in self.steps}):
            steps = [step for step in self.steps if step.layer == layer]
            weight = sum(step.rows for step in steps)
            rows.append(
                {
                    "layer": layer,
                    "steps": len(steps),
                    "sparse_steps": sum(step.reason is None for step in steps),
                    "cached": sum(step.rows * step.cached for step in steps) / weight,
                    "read": sum(step.rows * step.read for step in steps) / weight,
                    "density": _density(steps),
                }
            )
        return rows

    def verify(self, allow_dense: bool = False) -> None:
        """Raise SparsePathError when a sparse method read everything it had cached."""
        if allow_dense or not self.sparse_method or self.is_sparse:
            return
        reasons = self.dense_reasons or "no call reached the attention layers"
        if not self.sparse_steps:
            raise SparsePathError(
                f"no decode step was sparse (dense calls: {reasons}). Generate at least two new "
                "tokens with a cache; for a model whose layers are all sliding windows, sparse "
                "attention has nothing to do. Pass allow_dense=True to accept this"
            )
        raise SparsePathError(
            f"density 1.0: the budget {self.settings} covers all cached tokens. Lower it, use "
            "longer prompts, or pass allow_dense=True to accept this"
        )

    def summary(self) -> str:
        """A few lines for people."""
        sparse = self.sparse_steps
        reasons = ", ".join(f"{k} {v}" for k, v in self.dense_reasons.items()) or "none"
        weights = self.method.get("weights_sha256")
        aux = "-" if self.auxiliary_bits is None else f"{self.auxiliary_bits:g}"
        other = self.nominal_bits != self.auxiliary_bits
        nominal = f", the method's own layout {self.nominal_bits:g}" if other else ""
        cached = max((step.cached for step in self.steps), default=0)
        return "\n".join(
            [
                f"method           {self.method['name']}" + (f" {weights[:12]}" if weights else ""),
                f"model            {self.model['name'] or 'unnamed'}",
                *self._heads_line(),
                f"tokens cached    up to {cached:.0f}",
                f"sparse calls     {len(sparse)} of {len(self.steps)} decode calls, all layers",
                f"density          {self.density:.4f} (all decode calls {self.decode_density:.4f})",
                f"auxiliary bits   {aux} per token per KV head{nominal}",
                f"dense calls      {reasons}",
            ]
        )

    def _heads_line(self) -> list[str]:
        if self.heads is None:
            return []
        held = self.heads
        part = f"{len(held['kv'])} of {held['kv_heads']} KV heads"
        return [f"heads            {part}, rank {held['rank']} of {held['ranks']}"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content, with the derived densities."""
        derived = {"density": self.density, "decode_density": self.decode_density}
        content = asdict(self) | {"calls": dict(self.calls), "steps": list(map(asdict, self.steps))}
        content.pop("_steps")
        return {"format": FORMAT} | derived | content

    def to_json(self) -> str:
        """The receipt as a JSON string."""
        return json.dumps(self.to_dict(), sort_keys=True)

    def save(self, path: str | os.PathLike) -> None:
        """Write the receipt as JSON."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Receipt":
        """Read a saved receipt. Raises ReceiptError when the file is not one."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ReceiptError(f"{path}: written by another version of hashattn")
            for derived in ("density", "decode_density"):
                content.pop(derived)
            content["_steps"] = [Step(**step) for step in content.pop("steps")]
            content["calls"] = Counter(content["calls"])
            return cls(**content)
        except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ReceiptError(f"{path} is no receipt: save one with receipt.save") from error


def config_hash(config: Any) -> str:
    """SHA-256 of a model configuration, without what does not change the model."""
    content = config.to_dict()
    for name in ("transformers_version", "_name_or_path"):
        content.pop(name, None)
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _density(steps: list[Step]) -> float:
    cached = sum(step.rows * step.cached for step in steps)
    return sum(step.rows * step.read for step in steps) / cached if cached else 1.0


def _environment(model: "PreTrainedModel") -> dict[str, str]:
    packages = {name: _version(name) for name in ("hashattn", "torch", "transformers", "numpy")}
    place = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    return packages | {"python": platform.python_version()} | place


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
