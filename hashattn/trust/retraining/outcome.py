"""What adapting did: recall before and after, by layer, on the new domain and the replayed one."""

from __future__ import annotations

from dataclasses import dataclass

from hashattn.base.checks import require
from hashattn.hashing.weights import HashWeights

NEW, REPLAY = "new", "replay"  # the domains


@dataclass(frozen=True)
class LayerRecall:
    """recall@32 of a layer on the rows that judge: of the parent's maps, of the trained ones, and
    of those in use now."""

    layer: int
    domain: str
    before: float
    trained: float
    after: float


@dataclass(frozen=True)
class Adaptation:
    """What `adapt` did.

    weights: those in use now; version: their name. replaced: layers with new maps, empty where the
    parent stays. recall: of each layer and domain. held_out: "sequences" or "rows", by domain.
    seconds: of the wall clock.
    """

    weights: HashWeights
    version: str
    parent_version: str
    replaced: tuple[int, ...]
    recall: tuple[LayerRecall, ...]
    held_out: dict[str, str]
    seconds: float

    @property
    def accepted(self) -> bool:
        """Whether there is a new version."""
        return bool(self.replaced)

    def mean(self, domain: str = NEW) -> tuple[float, float]:
        """recall@32 before and after, the mean over layers; ValueError for a domain without."""
        rows = [r for r in self.recall if r.domain == domain]
        domains = sorted({r.domain for r in self.recall})
        require(bool(rows), "domain", domain, f"one of {domains}")
        return tuple(
            sum(getattr(r, part) for r in rows) / len(rows) for part in ("before", "after")
        )

    def summary(self) -> str:
        """A few lines for people."""
        lines = [
            f"version      {self.version}, layers {list(self.replaced)} are new, from "
            f"{self.parent_version}" if self.accepted
            else f"version      {self.version} stays: recall rose in no layer"
        ]  # fmt: skip
        for domain, by in self.held_out.items():
            before, after = self.mean(domain)
            lines.append(f"recall@32    {before:.3f} to {after:.3f}, {domain}, held-out {by}")
        return "\n".join([*lines, f"seconds      {self.seconds:.0f}"])
