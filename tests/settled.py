"""Long tests that need not run again: they passed, and nothing that they depend on changed.

    python tests/settled.py

runs all tests of the modules whose record is missing or out of date, and keeps in
data/reference/settled_tests.json which of them took long, with a key of every file that decides
their outcome: the module, all that it imports or names of hashattn, the kernels and the tests, and
DATA. That is most of hashattn for every module, as conftest.py names the package and the package
what it exports: a change of hashattn/reproduce unsettles few modules, one of a lower room nearly
all. `make test` leaves the long tests out as long as the key is theirs, save the shortest case of
each parametrised function; `make test ALL=1` runs everything, and so does a GPU. A test marked
`long` is left out whatever it took: others may have paid for what it shares with them, a
compilation, say.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from hashattn.base.environment import package_versions, python_version
from hashattn.base.files import read_json, write_json
from imports import imports

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "data" / "reference" / "settled_tests.json"
# of these the outcome is decided by Python files and DATA alone; others read documents, notebooks
# or what is installed, and always run
FOLDERS = (
    "tests/attention", "tests/base/engines", "tests/evaluation", "tests/hashing", "tests/kernels",
    "tests/models", "tests/reproduce/bench", "tests/reproduce/experiments",
    "tests/reproduce/notebooks", "tests/selectors", "tests/trust",
)  # fmt: skip
ELSEWHERE = "tests/kernels/gpu/test_triton_gate.py"  # has a report of its own
DATA = ("data/embedded", "data/profiles", "data/longbench", "data/corpus",
        "hashattn/trust/audit/templates")  # fmt: skip
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "numba",
            "llvmlite", "triton", "ray", "papermill", "nbclient", "ipykernel")  # fmt: skip
LONG = 3.0  # seconds of one of two processes that share two cores
_NAMED = re.compile(r"\bhashattn\w*(?:\.\w+)*")


def environment() -> dict[str, str | None]:
    """Versions of what runs or compiles the tests, of any build."""
    versions = package_versions(PACKAGES)
    found = {name: known and known.split("+")[0] for name, known in versions.items()}
    python = python_version().rpartition(".")[0]
    return {"python": python, "machine": platform.machine()} | found


def key(module: str, root: Path = ROOT) -> str:
    """SHA-256 over the files that decide the outcome of a test module, a path from `root`."""
    paths = {*closure(root / module, root), *_data(root)}
    return hashlib.sha256("".join(_line(path, root) for path in sorted(paths)).encode()).hexdigest()


def closure(module: Path, root: Path = ROOT) -> set[Path]:
    """The module, the conftest.py above it, and every file that these import or name, and so on;
    not this file, which decides no outcome."""
    conftests = [folder / "conftest.py" for folder in module.parents if folder.is_relative_to(root)]
    here = root / "tests" / Path(__file__).name
    reached, todo = {here}, [module, *(path for path in conftests if path.is_file())]
    while todo:
        path = todo.pop()
        if path not in reached:
            reached.add(path)
            todo += references(path, root)
    return reached - {here}


@cache
def references(path: Path, root: Path = ROOT) -> list[Path]:
    """Files of this repository that a file imports, anywhere in it, or names in a string."""
    kernels = root / "kernels" / "hashattn_kernels"
    if path.is_relative_to(kernels):  # its backends are chosen by name: all or nothing
        return sorted(kernels.rglob("*.py"))
    names = imports(path, root / path.relative_to(root).parts[0])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.update(_NAMED.findall(node.value))
    return sorted({file for name in names for file in _files(name, path.parent, root)})


def _files(name: str, beside: Path, root: Path) -> Iterator[Path]:
    """The files that `import name` opens, packages above it included; none if it is not of here."""
    for place in (root, root / "kernels", root / "tests", beside):
        for part in name.split("."):
            place = place / part
            if (place / "__init__.py").is_file():
                yield place / "__init__.py"
            elif place.with_suffix(".py").is_file():
                yield place.with_suffix(".py")


@cache
def _data(root: Path) -> tuple[Path, ...]:
    return tuple(path for name in DATA for path in (root / name).rglob("*") if path.is_file())


@cache
def _line(path: Path, root: Path) -> str:
    """A file's path and content as part of a key."""
    label = path.relative_to(root).as_posix()
    return f"{label} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def forget() -> None:
    """Read all files anew for the next key."""
    for kept in (references, _data, _line):
        kept.cache_clear()


def modules(root: Path = ROOT) -> list[str]:
    """Test modules that may be settled, by their paths from `root`."""
    paths = (path for folder in FOLDERS for path in (root / folder).rglob("test_*.py"))
    names = sorted(path.relative_to(root).as_posix() for path in paths)
    return [name for name in names if name != ELSEWHERE]


def read(report: Path = REPORT) -> dict[str, dict]:
    """{module: {"key", "seconds" by test}} of a report; nothing if it is of another environment."""
    if not report.is_file():
        return {}
    stored = read_json(report)
    return stored["modules"] if stored["environment"] == environment() else {}


def settled(tests: Iterable[tuple[str, str, bool]], report: Path = REPORT) -> set[tuple[str, str]]:
    """(module, name) of those of the tests (module, name, whether marked) that may be left out."""
    cases: dict[str, dict[str, list[tuple[bool, str]]]] = {}
    for module, name, marked in tests:
        functions = cases.setdefault(module, {})
        functions.setdefault(name.split("[")[0], []).append((marked, name))
    done, stored = set(), read(report)
    for module in cases.keys() & stored.keys():
        if stored[module]["key"] != key(module):
            continue
        seconds = stored[module]["seconds"]
        for group in cases[module].values():
            done |= {(module, name) for marked, name in group if marked}
            by_time = sorted((seconds.get(name, 0.0), name) for marked, name in group if not marked)
            left = by_time[1:] if len(group) > 1 else by_time
            done |= {(module, name) for _, name in left if name in seconds}
    return done


def main() -> None:
    """Run what is not settled and store what took long; exit status 1 if a test failed."""
    stored, before = read(), {module: key(module) for module in modules()}
    stored = {name: entry for name, entry in stored.items() if entry["key"] == before.get(name)}
    missing = [name for name in before if name not in stored]
    failed: set[str] = set()
    if missing:
        print(f"{len(missing)} of {len(before)} modules changed since they were recorded")
        seconds, failed = run(missing)
        for name in set(missing) - failed:
            stored[name] = {"key": before[name], "seconds": seconds.get(name, {})}
    forget()
    if any(key(name) != before[name] for name in missing):
        sys.exit("sources changed while their tests ran: nothing is stored, run this again")
    report = {"environment": environment(), "modules": dict(sorted(stored.items()))}
    write_json(REPORT, report)
    long = [time for entry in stored.values() for time in entry["seconds"].values()]
    print(f"{len(long)} long tests of {sum(long):.0f} s are in {REPORT.name}")
    if failed:
        sys.exit(f"not recorded, as a test failed: {', '.join(sorted(failed))}")


def run(names: list[str]) -> tuple[dict[str, dict[str, float]], set[str]]:
    """Seconds of the long tests of every module, and the modules in which one failed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", *names, "--numprocesses", "2",
                   "--dist", "loadfile", "--no-loadscope-reorder", "--junitxml", str(results),
                   "--override-ini", "junit_family=xunit1"]  # fmt: skip
        # nothing is compiled yet, as on a new machine
        subprocess.run(command, cwd=ROOT, env=os.environ | {"ALL": "1", "XDG_CACHE_HOME": folder})
        if not results.is_file():
            sys.exit(1)
        cases = list(ElementTree.parse(results).getroot().iter("testcase"))
    seconds: dict[str, dict[str, float]] = {}
    failed = set(names) - {case.get("file") for case in cases}
    for case in cases:
        module, took = case.get("file"), float(case.get("time"))
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(module)
        if case.find("skipped") is None and took >= LONG:
            seconds.setdefault(module, {})[case.get("name")] = round(took, 1)
    return seconds, failed


if __name__ == "__main__":
    main()
