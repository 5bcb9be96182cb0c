"""Tables of another profile beside those of the profile that runs: computed on this machine if it
ran here, else the committed record under data/reference/<profile>/."""

from __future__ import annotations

import shutil
from datetime import date
from pathlib import Path

import pandas as pd

from hashattn.base.checks import require
from hashattn.base.environment import machine, package_versions
from hashattn.base.files import read_json, write_json
from hashattn.base.repository import repository
from hashattn.reproduce.profiles import Profile, ProfileError, results_root

PRETRAINED = "smollm2"  # the profile whose model others trained
FULL = "embedded-full"  # the embedded model with enough sequences for intervals
_ABOUT = "about.json"
_PACKAGES = ("torch", "transformers", "numba")


def stored_table(name: str, index: list[str], profile: str = PRETRAINED) -> pd.DataFrame:
    """Table <name>.csv of a profile, by the columns `index`; attrs["source"] says where it was
    computed. FileNotFoundError if neither a run nor a record has it."""
    ran, kept = results_root() / profile, reference_folder(profile)
    folder = ran / "tables" if (ran / "tables" / f"{name}.csv").is_file() else kept
    table = pd.read_csv(folder / f"{name}.csv").set_index(index)
    table.attrs["source"] = f"{profile}: computed on this machine"
    if folder == kept:
        about = read_json(kept / _ABOUT)
        packages = ", ".join(f"{name} {number}" for name, number in about["packages"].items())
        day = about.get("dates", {}).get(name, about["date"])  # tables measured after the rest
        table.attrs["source"] = (
            f"{profile}: not run here, the committed record of {day} "
            f"({about['machine']['processor']}, {about['machine']['cores']} cores, {packages})"
        )
    return table


def reference_folder(profile: str) -> Path:
    """data/reference/<profile>, where its tables are committed."""
    return repository() / "data" / "reference" / profile


def store_tables(profile: Profile) -> list[Path]:
    """Copy the tables of a run to the profile's reference folder, those of the pretrained model in
    any size to one, with the day, the machine and the profile that made them; returns the copies.
    ProfileError without a run."""
    tables = sorted((profile.results / "tables").glob("*.csv"))
    ran = f"one that ran: make reproduce PROFILE={profile.name} first"
    require(bool(tables), "profile", profile.name, ran, ProfileError)
    pretrained = profile.model == f"pretrained:{PRETRAINED}"
    folder = reference_folder(PRETRAINED if pretrained else profile.name)
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "packages": package_versions(_PACKAGES),
        "profile": profile.to_dict(),
    }
    write_json(folder / _ABOUT, about)
    return [Path(shutil.copyfile(table, folder / table.name)) for table in tables]
