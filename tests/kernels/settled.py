"""Long kernel tests that need not run again: they passed, and nothing that they depend on changed.

    python tests/kernels/settled.py

runs all tests of this folder but the gate's, which has a report of its own, and keeps those that
took long in data/reference/kernel_tests.json, with a key of every source and compiler that decides
their outcome. `make test` leaves them out as long as the key is theirs, save the shortest case of
each test function; `make test ALL=1` runs everything, and so does a GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "data" / "reference" / "kernel_tests.json"
SOURCES = ("kernels/hashattn_kernels", "tests/kernels", "tests/kernel_inputs.py",
           "tests/on_device.py", "tests/interpreter.py", "hashattn/kernels.py")  # fmt: skip
COMPILERS = ("torch", "triton", "numba", "llvmlite")
REPORT_TEST = "test_the_committed_report_is_of_these_sources"  # what this run is to mend
LONG = 1.0  # seconds of one of two processes that share two cores


def key(root: Path = ROOT) -> dict[str, str]:
    """SHA-256 of the sources below `root`, and the versions of what runs or compiles them."""
    digest = hashlib.sha256()
    for name in SOURCES:
        place = root / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            content = path.read_bytes()
            label = path.relative_to(root).as_posix()
            digest.update(f"{label} {len(content)}\n".encode() + content)
    versions = {name: version(name).split("+")[0] for name in COMPILERS}  # of any build
    return {"sources": digest.hexdigest()} | versions


def name_of(nodeid: str) -> str:
    """A test as a JUnit report names it: folders.module::function[case]."""
    path, _, test = nodeid.partition("::")
    return f"{path.removesuffix('.py').replace('/', '.')}::{test}"


def settled(names: Iterable[str], report: Path = REPORT) -> set[str]:
    """Those of the tests `names` that may be left out: all long ones but the shortest case of each
    function, and none if the report is of other sources or compilers."""
    stored = json.loads(report.read_text())
    if stored["key"] != key():
        return set()
    seconds = stored["seconds"]
    cases: dict[str, list[str]] = {}
    for name in names:
        cases.setdefault(name.split("[")[0], []).append(name)
    long = set()
    for group in cases.values():
        ranked = sorted(group, key=lambda name: (seconds.get(name, 0.0), name))
        long |= set(ranked[1:]) & set(seconds)
    return long


def main() -> None:
    """Run every test of this folder and store the long ones; exit status 1 if one fails."""
    before = key()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/kernels", "--numprocesses", "2",
                   "--dist", "loadfile", "--no-loadscope-reorder", "--junitxml", str(results),
                   "--ignore", "tests/kernels/gpu/test_triton_gate.py",
                   "--deselect", f"tests/kernels/test_settled.py::{REPORT_TEST}"]  # fmt: skip
        run = subprocess.run(command, cwd=ROOT, env=os.environ | {"ALL": "1"})
        if run.returncode:
            sys.exit(1)
        if key() != before:
            sys.exit("sources changed while their tests ran: nothing is stored, run this again")
        cases = ElementTree.parse(results).getroot().iter("testcase")
    seconds = {
        f"{case.get('classname')}::{case.get('name')}": round(float(case.get("time")), 1)
        for case in cases
        if case.find("skipped") is None and float(case.get("time")) >= LONG
    }
    text = json.dumps({"key": before, "seconds": dict(sorted(seconds.items()))}, indent=1)
    REPORT.write_text(text + "\n")
    print(f"{len(seconds)} long tests of {sum(seconds.values()):.0f} s stored in {REPORT.name}")


if __name__ == "__main__":
    main()
