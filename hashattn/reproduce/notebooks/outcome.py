"""What a run of a profile came to."""

from __future__ import annotations

from dataclasses import dataclass, field

from hashattn.reproduce.notebooks.claims import Claim
from hashattn.reproduce.notebooks.execute import State
from hashattn.reproduce.profiles import Profile


@dataclass(frozen=True)
class Outcome:
    """A finished run: the profile, each notebook's state in order, their claims and cautions."""

    profile: Profile
    states: dict[str, State]
    claims: list[Claim]
    cautions: list[str] = field(default_factory=list)
