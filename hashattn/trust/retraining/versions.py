"""Versions of hash weights in one folder: which is in use, and the way back.

    v0001/, v0002/, ...     hash weights as HashWeights.save writes them
    current                 the name of the one in use

A version is written whole before `current` names it, and `current` is replaced atomically: whatever
is interrupted, the version in use stays what it was. One process at a time may change a folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hashattn.base.errors import HashAttnError
from hashattn.base.files import read_text, write_text
from hashattn.hashing.weight_files import CONFIG_FILE
from hashattn.hashing.weights import HashWeights

LINEAGE = "lineage"  # of the card: where a version comes from
_POINTER = "current"
_NAME = re.compile(r"v\d{4,}")


class VersionsError(HashAttnError, ValueError):
    """A folder of versions does not hold what is asked for."""


@dataclass(frozen=True)
class Versions:
    """The versions in the folder `path`, which `begin` starts."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @classmethod
    def begin(cls, path: str | Path, weights: HashWeights) -> Versions:
        """The folder with `weights` as its first version; or as it is, where it holds these weights
        already, in use or not. VersionsError where it holds others."""
        versions = cls(Path(path))
        known = {record["sha256"] for record in versions.records()}
        if known and weights.sha256 not in known:
            raise VersionsError(
                f"{path} holds versions of other hash weights: use another folder, or go on with "
                "those by Versions(path)"
            )
        if not known:
            versions.add(weights)
        return versions

    @property
    def names(self) -> list[str]:
        """Of all whole versions, the oldest first."""
        if not self.path.is_dir():
            return []
        whole = (p for p in self.path.iterdir() if (p / CONFIG_FILE).is_file())
        return sorted((p.name for p in whole if _NAME.fullmatch(p.name)), key=_number)

    @property
    def current(self) -> str:
        """The name of the version in use; VersionsError where none is named, or one that is not
        there."""
        names = self.names
        if not names:
            raise VersionsError(f"{self.path} holds no versions: Versions.begin(path, weights)")
        pointer = self.path / _POINTER
        if len(names) == 1 and not pointer.is_file():  # interrupted while it began
            return names[0]
        name = read_text(pointer, VersionsError).strip()
        if name not in names:
            raise VersionsError(
                f"{pointer} names {name!r}, which is not there: write one of {names}"
            )
        return name

    def load(self, model: nn.Module | None = None, name: str | None = None) -> HashWeights:
        """The version in use, or the one named; checked, against `model` too if given. Raises
        HashWeightsError as HashWeights.load does."""
        name = self.current if name is None else name
        if name not in self.names:
            raise VersionsError(f"{self.path} has no version {name!r}, only {self.names}")
        return HashWeights.load(self.path / name, model)

    def add(self, weights: HashWeights) -> str:
        """Keep `weights` as the newest version and use it; returns its name."""
        names = self.names
        name = f"v{_number(names[-1]) + 1 if names else 1:04d}"
        weights.save(self.path / name)
        self._use(name)
        return name

    def rollback(self) -> str:
        """Use the version again that the one in use was made from; returns its name. Nothing is
        deleted. VersionsError where that is not in the folder, as for the first version."""
        name = self.current
        parent = (self.load(name=name).card.get(LINEAGE) or {}).get("parent")
        earlier = self.names[: self.names.index(name)]
        # by content: these weights may have been adapted in another folder before they came here
        found = [other for other in earlier if self.load(name=other).sha256 == parent]
        if not found:
            raise VersionsError(
                f"{name} is not made from another version in {self.path}: there is none to go back "
                "to"
            )
        self._use(found[-1])
        return found[-1]

    def records(self) -> list[dict[str, Any]]:
        """Of each version: name, sha256, whether it is in use, and its card's lineage (None for a
        first version)."""
        if not self.names:
            return []
        current = self.current
        weights = ((name, self.load(name=name)) for name in self.names)
        return [
            {"name": name, "sha256": w.sha256, "current": name == current,
             LINEAGE: w.card.get(LINEAGE)}
            for name, w in weights
        ]  # fmt: skip

    def _use(self, name: str) -> None:
        write_text(self.path / _POINTER, f"{name}\n")


def _number(name: str) -> int:
    return int(name[1:])
