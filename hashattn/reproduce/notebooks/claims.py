"""Claims: what a notebook says the numbers show, checked where they are measured.

A notebook records each measurement with the band it must stay in, then ends with two cells:
`claims.table()` shows the numbers, which differ between machines; `claims.verdict()` prints what
must not differ and raises when a measurement left its band. A comparison with a baseline that
failed (dense attention answers nothing) is not judged, whatever the number, and says why.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hashattn.base.errors import HashAttnError
from hashattn.base.files import FileError, read_json, write_json
from hashattn.reproduce.notebooks.environment import leave_environment
from hashattn.reproduce.notebooks.files import read_or_none

if TYPE_CHECKING:
    import pandas as pd

HOLDS, VIOLATED, MET, NOT_MET = "holds", "VIOLATED", "met", "not met"
NOT_JUDGED = "not judged"


class ClaimError(HashAttnError, AssertionError):
    """A measurement left the band that it must stay in."""


@dataclass(frozen=True)
class Band:
    """The values a claim allows, both ends included; None leaves an end open.

    Raises ValueError without ends, for NaN, or for low above high.
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        ends = [float(end) for end in (self.low, self.high) if end is not None]
        if not ends or any(map(math.isnan, ends)) or ends != sorted(ends):
            raise ValueError(
                f"band low={self.low}, high={self.high} is not valid: give low, high or both, "
                "low not above high"
            )

    def __contains__(self, value: float) -> bool:
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return low <= value <= high  # False for NaN

    def __str__(self) -> str:
        if self.high is None:
            return f">= {self.low:g}"
        if self.low is None:
            return f"<= {self.high:g}"
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Claim:
    """One line of the final table. `goal` claims report met or not met; others must hold. reason:
    why the verdict is NOT_JUDGED, else "". main: whether a report begins with it."""

    notebook: str
    claim: str
    paper: str
    ours: float
    tolerance: str
    verdict: str
    goal: bool
    reason: str = ""
    main: bool = False


class Claims:
    """The claims of one notebook, kept in <results>/claims/<notebook>.json as they are made.

    notebook: the notebook's name without .ipynb; results: default is the profile's folder.
    """

    def __init__(self, notebook: str, results: Path | None = None) -> None:
        if results is None:
            from hashattn.reproduce.profiles import load_profile

            results = load_profile().results
        self.notebook = notebook
        self.path = Path(results) / "claims" / f"{notebook}.json"
        self.records: list[Claim] = []
        self.cautions: list[str] = []
        self._save()
        leave_environment(Path(results), notebook)

    def must_hold(
        self,
        claim: str,
        ours: float,
        *,
        low: float | None = None,
        high: float | None = None,
        paper: str = "",
        unjudged: str = "",
    ) -> None:
        """Record a measurement that has to lie in [low, high]; `verdict` raises if one does not.

        paper: the paper's value as text, with its setting if that differs ("" if it has none).
        unjudged: why this measurement decides nothing, in words; "" if it does decide.
        """
        self._record(claim, ours, Band(low, high), paper, goal=False, reason=unjudged)

    def goal(
        self,
        claim: str,
        ours: float,
        *,
        low: float | None = None,
        high: float | None = None,
        paper: str = "",
        unjudged: str = "",
        main: bool = False,
    ) -> None:
        """Record a measurement we aim to bring into [low, high]; reported, never raised.

        paper, unjudged: as for must_hold. main: whether a report begins with it.
        """
        self._record(claim, ours, Band(low, high), paper, goal=True, reason=unjudged, main=main)

    def caution(self, text: str) -> None:
        """Print and record what a reader must know before any claim, for the summary and report of
        a run; "" is ignored."""
        if text:
            print(text)
            self.cautions.append(text)
            self._save()

    def _record(
        self, claim: str, ours: float, band: Band, paper: str, *, goal: bool, reason: str,
        main: bool = False,
    ) -> None:  # fmt: skip
        if any(claim == record.claim for record in self.records):
            raise ValueError(f"claim {claim!r} is made twice in {self.notebook}: word each once")
        inside = float(ours) in band
        if reason:
            verdict = NOT_JUDGED
        elif goal:
            verdict = MET if inside else NOT_MET
        else:
            verdict = HOLDS if inside else VIOLATED
        self.records.append(
            Claim(self.notebook, claim, str(paper), float(ours), str(band), verdict, goal, reason,
                  main)
        )  # fmt: skip
        self._save()

    def _save(self) -> None:
        # JSON has no NaN, and repr keeps all digits
        records = [asdict(record) | {"ours": repr(record.ours)} for record in self.records]
        write_json(self.path, records)
        write_json(_cautions_path(self.path.parents[1], self.notebook), self.cautions)

    def table(self) -> pd.DataFrame:
        """The claims with the measured values: claim, paper, ours, tolerance, verdict."""
        import pandas as pd

        rows = [[c.claim, c.paper, format_value(c.ours), c.tolerance, c.verdict]
                for c in self.records]  # fmt: skip
        return pd.DataFrame(rows, columns=["claim", "paper", "ours", "tolerance", "verdict"])

    def verdict(self) -> None:
        """Print each claim with its band, the same on every machine; the last cell of a notebook.

        Raises ClaimError naming every measurement outside the band it must stay in, and
        ValueError when nothing was claimed.
        """
        # again: cells may have imported or changed what __init__ recorded
        leave_environment(self.path.parents[1], self.notebook)
        if not self.records:
            raise ValueError(f"{self.notebook} makes no claim: record one with claims.must_hold")
        violated = [c for c in self.records if c.verdict == VIOLATED]
        if violated:
            raise ClaimError("; ".join(
                f"{c.claim}: measured {format_value(c.ours)}, must be {c.tolerance}"
                for c in violated
            ))  # fmt: skip
        for c in self.records:
            if c.verdict == NOT_JUDGED:
                print(f"not judged  {c.claim} ({c.tolerance}): {c.reason}")
            else:
                print(f"{'goal ' if c.goal else 'holds'}  {c.claim} ({c.tolerance})")


def format_value(value: float) -> str:
    """Four significant digits: `0.9375`, `12.5`, `3`."""
    return f"{value:.4g}"


def load_claims(results: Path, notebooks: list[str]) -> list[Claim]:
    """The claims that `notebooks` left in a results folder, in order; ClaimError for damage."""
    claims = []
    for notebook in notebooks:
        path = results / "claims" / f"{notebook}.json"
        try:
            for record in read_json(path) if path.exists() else []:
                claims.append(Claim(**record | {"ours": float(record["ours"])}))
        except (FileError, KeyError, TypeError, ValueError) as error:
            raise ClaimError(
                f"{path} is damaged ({error}): delete it with state/{notebook}.json and run again"
            ) from error
    return claims


def load_cautions(results: Path, notebooks: list[str]) -> list[str]:
    """What `notebooks` warned of (Claims.caution), in order, each once."""
    cautions = (read_or_none(_cautions_path(results, notebook)) or [] for notebook in notebooks)
    return list(dict.fromkeys(text for texts in cautions for text in texts))


def _cautions_path(results: Path, notebook: str) -> Path:
    return results / "claims" / f"{notebook}.cautions.json"


def tally(claims: list[Claim], model: str) -> str:
    """`8 of 8 claims hold, 22 of 25 goals met`, how many were not judged, if any, and the profile's
    model, which a claim is about unless it names another."""
    judged = [c for c in claims if c.verdict != NOT_JUDGED]
    goals, bound = [c for c in judged if c.goal], [c for c in judged if not c.goal]
    held, met = sum(c.verdict == HOLDS for c in bound), sum(c.verdict == MET for c in goals)
    text = f"{held} of {len(bound)} claims hold, {met} of {len(goals)} goals met"
    unjudged = len(claims) - len(judged)
    text += f", {unjudged} not judged" if unjudged else ""
    return f"{text}; about {model}, where a claim names no other model"


def not_judged(claims: list[Claim]) -> dict[str, list[Claim]]:
    """{reason: the claims that were not judged for it}."""
    by_reason: dict[str, list[Claim]] = {}
    for c in claims:
        if c.verdict == NOT_JUDGED:
            by_reason.setdefault(c.reason, []).append(c)
    return by_reason


def claims_text(claims: list[Claim], width: int = 52) -> str:
    """The final table of a run as text: claim | paper | ours | tolerance | verdict."""
    header = ("claim", "paper", "ours", "tolerance", "verdict")
    rows = [(c.claim, c.paper, format_value(c.ours), c.tolerance, c.verdict) for c in claims]
    rows = [[_wrap(cell, width if i == 0 else 22) for i, cell in enumerate(row)] for row in rows]
    cells = [[[name] for name in header], *rows]
    widths = [max(len(line) for row in cells for line in row[i]) for i in range(len(header))]
    lines = [_row(row, widths) for row in cells]
    lines.insert(1, "-+-".join("-" * w for w in widths))
    return "\n".join(lines)


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width) or [""]


def _row(cells: list[list[str]], widths: list[int]) -> str:
    height = max(map(len, cells))
    padded = [cell + [""] * (height - len(cell)) for cell in cells]
    return "\n".join(
        " | ".join(cell[i].ljust(w) for cell, w in zip(padded, widths, strict=True)).rstrip()
        for i in range(height)
    )
