"""Command line: python -m hashattn.reproduce.notebooks.pilot --docs FOLDER (`make pilot`).

Runs notebook 06 on a company's documents and leaves report.html, report.md, pilot.json, the audit
pages and the executed notebook in one folder. Exit status 0 for any recommendation: "no" is an
answer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

from hashattn.base.checks import require, require_one_of
from hashattn.base.errors import HashAttnError
from hashattn.base.files import read_json
from hashattn.base.progress import VARIABLE
from hashattn.base.repository import repository
from hashattn.pilot.capacity.result import tokens_of_text
from hashattn.pilot.report.numbers import fraction
from hashattn.pilot.settings import LANGUAGES
from hashattn.reproduce.notebooks.driver import exit_status, only_run
from hashattn.reproduce.notebooks.execute import execute, kernel_environment, require_kernel
from hashattn.reproduce.notebooks.progress import Heartbeat
from hashattn.reproduce.profiles import load_profile, profile_path, results_root

_NOTEBOOK = "06_pilot.ipynb"
_WORKLOAD = {"context": 8192, "batch": 8}  # where the command line names a price alone


class PilotError(HashAttnError, ValueError):
    """A pilot cannot start: a path or a setting is wrong."""


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 a report was written, 1 failed (the reason is on stderr), 130 interrupted."""
    options = _parser().parse_args(arguments)

    def work() -> None:
        out = options.out.resolve()
        run_pilot(_parameters(options, out), out)
        print(f"report: {out / 'report.html'}")

    return exit_status(work, "what was measured is kept")


def run_pilot(parameters: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run notebook 06 with `parameters` (fields of its first cell) in `out`; the pilot's result.

    Raises KernelError, ReproductionError where another pilot writes to `out`, NotebookFailed.
    """
    require_kernel()
    profile = load_profile()
    os.environ.update(kernel_environment(profile, profile_path()))
    executed = out / _NOTEBOOK
    partial = executed.with_suffix(".partial.ipynb")
    with only_run(out):
        for name in ("report.html", "report.md", "pilot.json"):  # of other documents, perhaps
            (out / name).unlink(missing_ok=True)
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        os.environ |= {
            VARIABLE: str(out / "progress.txt"),
            "HASHATTN_RESULTS": str(out / "notebook"),
        }
        with Heartbeat("pilot", partial, out / "progress.txt"):
            execute(repository() / "notebooks" / _NOTEBOOK, partial, parameters | {"out": str(out)})
        partial.replace(executed)
    result = read_json(out / "pilot.json")
    recommended = result["recommendation"]
    budget = f" at {fraction(recommended['budget'])}" if recommended["budget"] else ""
    print(f"recommendation: {recommended['verdict'].replace('_', ' ')}{budget}")
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hashattn.reproduce.notebooks.pilot", description=__doc__)
    add = parser.add_argument
    add("--docs", type=Path, help="folder of documents; by default the sample company's")
    add("--questions", type=Path, help="CSV, JSONL or XLSX: question, answer, document")
    add("--model", help="folder, hub id, GGUF file or pretrained:<name>; by default auto")
    add("--language", default="en", help="of the report: en or ja")
    add("--context", help="most tokens of a prompt")
    add("--budgets", help="shares of the context to try, as 1/8,1/16,1/32")
    add("--device", help="of the pre-flight: this-machine, or one that make preflight lists")
    add("--workload", help='of the pre-flight, as JSON: {"context": 8192, "batch": 8}')
    add("--price", help="of one device for an hour, in USD")
    add("--samples", help='how much is measured, as JSON: {"questions": 100, "texts": 12}')
    add("--out", type=Path, default=results_root() / "pilot", help="folder of the report")
    return parser


def _parameters(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The notebook's parameters, checked before a kernel starts; those not given are left out."""
    require_one_of("language", options.language, LANGUAGES, PilotError)
    given: dict[str, Any] = {"language": options.language}
    if options.docs is not None:
        require(
            options.docs.is_dir(), "docs", str(options.docs), "a folder of documents", PilotError
        )
        require(not out.is_relative_to(options.docs.resolve()), "out", str(out),
                f"a folder outside the documents, {options.docs}", PilotError)  # fmt: skip
        given |= {"docs": str(options.docs.resolve()), "questions": None}
    if options.questions is not None:
        known = options.questions.is_file()
        require(known, "questions", str(options.questions), "a CSV, JSONL or XLSX file", PilotError)
        given["questions"] = str(options.questions.resolve())
    if options.model is not None:
        local = Path(options.model)
        given["model_name"] = str(local.resolve()) if local.exists() else options.model
    if options.device is not None:
        given["device"] = options.device
    readers = {"context": tokens_of_text, "budgets": _budgets, "workload": _fields,
               "samples": _fields, "price": float}  # fmt: skip
    for name, read in readers.items():
        text = getattr(options, name)
        if text is not None:
            given[name] = _read(name, text, read)
    price = given.pop("price", None)
    if price is not None:
        given["workload"] = {**_WORKLOAD, **given.get("workload", {}), "price_per_hour": price}
    return given


def _read(name: str, text: str, read: Any) -> Any:
    try:
        return read(text)
    except PilotError:
        raise
    except (ValueError, ZeroDivisionError) as problem:
        raise PilotError(f"{name} = {text!r}: {problem}") from problem


def _fields(text: str) -> dict[str, Any]:
    fields = json.loads(text)
    require(isinstance(fields, dict), "value", fields, 'a JSON object, as {"batch": 8}', PilotError)
    return fields


def _budgets(text: str) -> list[float]:
    return [float(Fraction(part)) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
