"""Store: copy the notebooks that a profile's run executed, tidied, back into notebooks/, and the
README's picture with them; of the pretrained model's profile its tables, into data/reference/.

A committed notebook keeps sources, tags, outputs and counts 1..N and nothing that differs from
run to run, so that `git diff` shows only changed results.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from hashattn.base.errors import HashAttnError
from hashattn.base.files import write_text
from hashattn.reproduce.experiments.stored import FULL, PRETRAINED, store_tables
from hashattn.reproduce.notebooks.driver import ReproductionError, find_notebooks
from hashattn.reproduce.notebooks.fingerprint import notebook_source
from hashattn.reproduce.notebooks.hygiene import problems
from hashattn.reproduce.pretrained import PREFIX
from hashattn.reproduce.profiles import load_profile, repository

PICTURE = "quality_against_density.png"  # the README's, a figure of notebook 03
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}


def tidy(notebook: Any) -> Any:
    """`notebook` (nbformat, changed in place) without what differs from run to run."""
    notebook.metadata = dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
        cell["id"] = f"cell-{number:02d}"
        if cell.cell_type == "code":
            cell.outputs = _joined_streams(cell.outputs)
    return notebook


def _joined_streams(outputs: list[Any]) -> list[Any]:
    """Neighbouring prints as one output: where they are split depends on timing."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and "name" in last and last.get("name") == output.get("name"):
            last.text += output.text
        else:
            joined.append(output)
    return joined


def store(executed: Path, target: Path) -> bool:
    """Write `executed`, tidied, to `target`; True if that changed it.

    Raises ReproductionError without a run, or when it is not of this source or not fit to commit.
    """
    import nbformat

    if not executed.is_file():
        raise ReproductionError(f"{executed} does not exist: run make reproduce first")
    if notebook_source(executed) != notebook_source(target):
        raise ReproductionError(
            f"{target.name} is not the notebook that was run: run make reproduce again"
        )
    notebook = tidy(nbformat.read(executed, as_version=4))
    reasons = problems(notebook)
    if reasons:
        raise ReproductionError(f"{executed} is not fit to be stored: {'; '.join(reasons)}")
    text = nbformat.writes(notebook) + "\n"
    if target.read_text(encoding="utf-8") == text:
        return False
    write_text(target, text)
    return True


def store_picture(results: Path, notebooks: Path) -> None:
    """Copy the README's picture from a run's figures to notebooks/figures."""
    figure = results / "figures" / f"03_{PICTURE}"
    if figure.is_file():
        (notebooks / "figures").mkdir(exist_ok=True)
        shutil.copyfile(figure, notebooks / "figures" / PICTURE)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 stored, 1 refused (the reason is on stderr)."""
    parser = argparse.ArgumentParser(prog="hashattn.reproduce.notebooks.store", description=__doc__)
    parser.add_argument("--profile", help="the profile whose run is stored")
    options = parser.parse_args(arguments)
    try:
        profile = load_profile(options.profile)
        results = profile.results
        # whose tables the embedded model's notebooks show
        if profile.model == PREFIX + PRETRAINED or profile.name == FULL:
            for path in store_tables(profile):
                print(f"{path.name}: stored in {path.parent}")
            return 0
        for target in find_notebooks():
            changed = store(results / "notebooks" / target.name, target)
            print(f"{target.name}: {'stored' if changed else 'unchanged'}")
        store_picture(results, repository() / "notebooks")
    except HashAttnError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
