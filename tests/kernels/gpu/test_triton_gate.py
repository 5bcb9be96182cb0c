"""Every shipped configuration compiles for sm_80 and sm_90, to the machine code that it should."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hashattn_kernels
from hashattn_kernels.triton_gpu import configs, gate

KERNELS = Path(hashattn_kernels.__file__).parents[1]
REPORT = Path(__file__).parents[3] / "data" / "reference" / "triton_gate.json"


def compiled_here(*arguments: str) -> subprocess.CompletedProcess:
    """A Python of its own, for the interpreter of this one compiles nothing."""
    environment = os.environ | {"PYTHONPATH": str(KERNELS)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def stored():
    """The committed report, if it is of these sources and this Triton; None otherwise."""
    report = json.loads(REPORT.read_text())
    return report["builds"] if report["key"] == gate.key() else None


@pytest.fixture(scope="module")
def report(stored, tmp_path_factory):
    """The committed report; of other sources or another Triton one made here, which takes long."""
    if stored is not None:
        return stored
    file = tmp_path_factory.mktemp("gate") / "gate.json"
    run = compiled_here("-m", "hashattn_kernels.triton_gpu.gate", "--json", str(file))
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(file.read_text())["builds"]


def test_all_builds_are_without_fault(report):
    """Also that the gate covers what it says: each kernel, head dim, dtype, width and group."""
    builds = gate.different_builds()
    assert {row["name"] for row in report} == set(builds)
    for row in report:
        assert row["faults"] == gate.faults(builds[row["name"]], row) == [], row["name"]
    assert len(report) == len({(row["name"], row["architecture"]) for row in report})
    assert {row["architecture"] for row in report} == {"sm_80", "sm_90"}
    names = {row["name"] for row in report}
    assert {name.split()[0] for name in names} == set(gate.KERNELS)
    for dim in configs.HEAD_DIMS:
        for kind in ("*bf16", "*fp16"):
            for group in (1, 4):
                found = [n for n in names if f"attend_kernel {kind} GROUP={group} " in n]
                assert any(f" DIM={dim} " in name for name in found)
    kinds = [(bits // 32, group, 0) for bits in configs.BITS for group in configs.GROUPS]
    kinds += [(bits // 32, 1, planes) for bits, (planes, _) in configs.GRADES.items()]
    for words, group, grades in kinds:
        heads, query = f"GROUP={group} SLOTS={group} WORDS={words} ", words * (1 + grades)
        found = [n for n in names if n.startswith(f"histogram_kernel {heads}")]
        assert sum(f" QUERY_WORDS={query} " in n for n in found) == len(configs.TILES), heads
    for kernel in ("refine_kernel", "compact_kernel"):
        for pack in (2, 4):  # levels of two bytes, and of one
            found = [name for name in names if name.startswith(kernel) and f" PACK={pack} " in name]
            assert len(found) == len(configs.TILES), (kernel, pack)
    assert all(row["registers"] > 0 and row["instructions"] for row in report)


SAMPLE = """
import json, random, sys
from hashattn_kernels.triton_gpu import gate

builds = list(gate.different_builds().values())
drawn = {each: random.choice([b for b in builds if b.kernel == each]) for each in gate.KERNELS}
print(json.dumps([gate.check((b, random.choice(gate.ARCHITECTURES))) for b in drawn.values()]))
"""


def test_the_stored_report_is_what_compiles_here(stored):
    """One configuration of each kernel, drawn anew each time."""
    if stored is None:
        pytest.skip("all builds were compiled here: the stored report is of other sources")
    run = compiled_here("-c", SAMPLE)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert len(rows) == len(gate.KERNELS)
    assert all(row in stored for row in rows), [row["name"] for row in rows if row not in stored]


def test_the_key_is_of_every_source_that_decides_machine_code(tmp_path, monkeypatch):
    """Those of the GPU kernels, what they import from beside them, and the compiler's version."""
    package = tmp_path / "kernels"
    shutil.copytree(Path(gate.__file__).parents[1], package, ignore=shutil.ignore_patterns("__py*"))
    before = gate.key()
    monkeypatch.setattr(gate, "__file__", str(package / "triton_gpu" / "gate.py"))
    assert gate.key() == before
    for name in ("triton_gpu/selection.py", "triton_gpu/configs.py", "codes.py", "maps.py"):
        content = (package / name).read_text()
        (package / name).write_text(content + "#")
        assert gate.key() != before, name
        (package / name).write_text(content)
    monkeypatch.setattr(gate.triton, "__version__", "0.0")
    assert gate.key() != before


BAD = """
import json, sys, torch
import triton, triton.language as tl
from hashattn_kernels.triton_gpu import gate

@triton.jit
def spilling_kernel(X, OUT, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * n + tl.arange(0, BLOCK)[None, :]
    x = tl.load(X + at)
    tl.store(OUT + at, x * tl.sum(x, axis=0)[None, :])

@triton.jit
def narrow_kernel(X, INDICES, OUT, n, BLOCK: tl.constexpr):
    slot = tl.arange(0, BLOCK)
    x = tl.load(X + tl.load(INDICES + slot) * 3)
    tl.store(OUT + slot, x)

@triton.jit
def broken_kernel(X, OUT, n, BLOCK: tl.constexpr):
    tl.store(OUT + tl.arange(0, BLOCK), tl.load(X + tl.arange(0, BLOCK + 1)))

@triton.jit
def looping_kernel(X, OUT, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        total += tl.load(X + start + at) // 3
    for start in range(0, n, BLOCK):
        total += tl.load(X + start + at) // 3 % 5
    tl.store(OUT + at, total)

for kernel in (spilling_kernel, narrow_kernel, broken_kernel, looping_kernel):
    gate.KERNELS[kernel.fn.__name__] = kernel
builds = [
    gate.Build("spilling_kernel", {"BLOCK": 128}, warps=1),
    gate.Build("narrow_kernel", {"BLOCK": 4096}, pointers={"X": "*bf16", "OUT": "*bf16"}, rows=2),
    gate.Build("narrow_kernel", {"BLOCK": 128}, popcounts=True),
    gate.Build("broken_kernel", {"BLOCK": 64}),
    gate.Build("looping_kernel", {"BLOCK": 128}, keys=1, slots=1),
    gate.Build("looping_kernel", {"BLOCK": 128}, keys=1, slots=1000),
]
print(json.dumps([gate.check((build, 80))["faults"] for build in builds]))
"""


def test_bad_kernels_are_faulted(tmp_path):
    """Spills, narrow loads, missing instructions, code that does not compile and slow loops are
    seen."""
    script = tmp_path / "bad.py"
    script.write_text(BAD)
    run = compiled_here(str(script))
    pytest.fail(run.stderr) if run.returncode else None
    spilling, narrow, popless, broken, slow, fast = json.loads(run.stdout.splitlines()[-1])
    assert any("spills" in fault for fault in spilling)
    assert any("rows are read by" in fault for fault in narrow)
    assert popless == ["no POPC instruction"]
    assert broken[0].startswith("does not compile")
    assert [fault.rsplit(" a key ")[1] for fault in slow] == [
        "in a whole chunk, 1 allowed",
        f"at an edge, {1 + configs.EDGE_SLOTS} allowed",
    ]
    assert slow[0].startswith("looping_kernel takes ") and fast == []


def test_the_threshold_search_of_the_default_has_limits():
    """Every build of it: slots a key of both digits together, and registers."""
    for bits, (planes, most) in configs.GRADES.items():
        config = configs.Select(1, bits // 32, 1, planes, most)
        assert len(config.refining) == 1
        allowed = config.slots + configs.REFINE_SLOTS[config.pack]
        assert allowed <= {32: 30, 64: 60, 128: 90}[bits]
        searches = {"histogram_kernel": config.counting, "refine_kernel": config.refining[0]}
        for kernel, constants in searches.items():
            for tiles in configs.TILES:
                name = gate.Build(kernel, constants | {"TILES": tiles}).name
                build = gate.different_builds()[name]
                assert build.registers == 96
                slots = [build.slots - 0.5, build.slots + 1.0]
                code = {"instructions": {}, "local": 0, "registers": 96, "slots": slots}
                assert gate.faults(build, code) == []
                taken = [f"{kernel} takes 97 registers, 96 allowed"]
                assert gate.faults(build, code | {"registers": 97}) == taken
                taken = f"takes {build.slots + 1.0} issue slots a key in a whole chunk"
                faults = gate.faults(build, code | {"slots": [slots[1], slots[1]]})
                assert taken in faults[0] and len(faults) == 1
                loopless = gate.faults(build, code | {"slots": []})
                assert loopless == [f"{kernel} has 0 loops over keys instead of 1 or 2"]


def test_the_interpreter_is_refused():
    environment = os.environ | {"PYTHONPATH": str(KERNELS), "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "hashattn_kernels.triton_gpu.gate"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode and "Unset it" in run.stderr
