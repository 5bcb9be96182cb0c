"""Compile every shipped configuration for sm_80 and sm_90 and check the machine code.

    python -m hashattn_kernels.triton_gpu.gate [--jobs 2] [--json FILE]

No GPU is needed: Triton comes with ptxas and cuobjdump. What the interpreter accepts may still not
compile, or spill registers, or gather rows two bytes at a time; each of these fails here.

Machine code depends on nothing but these sources and Triton's version, so a report carries the key
of both. data/reference/triton_gate.json is the report of the committed sources (`make gate`); tests
compile everything only if its key differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .. import quantised
from . import configs
from .attention import attend_kernel
from .encoding import encode_kernel
from .machine_code import instructions, slots_a_key
from .sampling import list_kernel, survey_kernel, tally_kernel
from .selection import compact_kernel, histogram_kernel, refine_kernel
from .self_test import bits_kernel
from .unions import mark_kernel, write_kernel

ARCHITECTURES = (80, 90)
SHARED = (
    "codes.py",
    "coins.py",
    "counters.py",
    "maps.py",
    "quantised.py",
)  # sources outside this folder that constants come from
REGISTERS = 65536  # of a multiprocessor, for all its threads
NARROW = 4  # single-element loads that a kernel may have, for the query of one head
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = dict.fromkeys(
    ("SPANS", "HEAVY", "DRAWN", "UNITS", "CHANCES", "PLACES", "CERTAIN", "CHANCY", "COUNTERS"),
    "*i64",
)
POINTERS |= dict.fromkeys(
    ("BIASES", "SLOPES", "PARTS", "LSE", "SINKS", "OUT_LSE", "LOG_WEIGHTS", "LOGARITHMS"), "*fp32"
)
KERNELS = {
    kernel.fn.__name__: kernel
    for kernel in (
        encode_kernel, histogram_kernel, refine_kernel, compact_kernel, attend_kernel,
        mark_kernel, write_kernel, bits_kernel, survey_kernel, tally_kernel,
        list_kernel,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Build:
    """One kernel in one configuration.

    pointers: element types that are not int32. popcounts: its machine code must have POPC. rows:
    bytes of an element of the K and V rows, which it must load 16 bytes at a time; None: no rows.
    keys: in a word that its loop over keys loads, None where slots are not counted. slots: issue
    slots a key that this loop may take (machine_code). registers: that the compiler may use for a
    thread.
    """

    kernel: str
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    pointers: dict[str, str] = field(default_factory=dict)
    popcounts: bool = False
    rows: int | None = None
    keys: float | None = None
    slots: float | None = None
    registers: int | None = None

    @property
    def name(self) -> str:
        """The kernel, element types and constants: different for every build."""
        kinds = sorted(set(self.pointers.values()))
        sizes = [f"{key}={value}" for key, value in self.constants.items()]
        return " ".join([self.kernel, *kinds, *sizes])


def builds() -> Iterator[Build]:
    """Every kernel in every configuration that `configs` ships, for the usual dims and dtypes."""
    yield Build("bits_kernel", {"BLOCK": 128}, popcounts=True)
    yield from _encodes()
    yield from _selections()
    for dtype in configs.DTYPES:
        dims = configs.HEAD_DIMS if dtype != torch.float32 else (64, 128)
        for dim in dims:
            yield from _attention(dim, dtype)
    yield Build("mark_kernel", {"BLOCK": configs.MARK_BLOCK})
    yield Build("write_kernel", {"BLOCK": configs.WRITE_BLOCK}, popcounts=True)


def _encodes() -> Iterator[Build]:
    bf16, fp16, fp32 = configs.DTYPES
    for dim, hidden, bits, depth, dtype, half, folds in (
        (128, 128, 32, 2, bf16, True, 0),  # the default maps
        (64, 128, 32, 2, fp32, True, 0),  # the embedded model's
        (128, 128, 32, 3, bf16, True, 0),  # the paper's
        (128, 128, 32, 3, bf16, False, 0),  # and in its float32
        (80, 64, 64, 1, bf16, True, 0),
        (96, 128, 128, 2, fp16, True, 0),
        (256, 128, 256, 2, bf16, True, 0),
        (128, 128, 64, 1, bf16, True, 3),  # a transform code
        (64, 128, 128, 1, fp32, False, 3),
    ):
        sizes = {
            "IN": dim,
            "IN_SLOTS": triton.next_power_of_2(dim),
            "WIDTHS": (hidden,) * (depth - 1),
            "HIDDEN": hidden,
            "BITS": bits,
            "BIT_SLOTS": bits,
            "DEPTH": depth,
            "ACTIVATION": "silu",
            "FOLDS": folds,
        }
        x = "*" + TYPES[dtype]
        pointers = {"X": x, "X2": x, "VALUES": x, "WEIGHTS": "*bf16" if half else "*fp32"}
        slots, widest = sizes["IN_SLOTS"], max(hidden, bits)
        for rows, step, grades, group, priced in (
            (1, True, None, 1, False),  # a step: counted bits, graded ones,
            (1, True, configs.GRADES.get(bits), 1, False),
            (1, True, configs.GRADES.get(bits), 4, False),  # of a list per KV head,
            (1, True, configs.GRADES.get(bits), 1, True),  # and drawn by
            (1, False, configs.GRADES.get(bits), 1, False),
            (1, False, None, 1, False),
            (4096, False, None, 1, False),
        ):
            if step and folds and grades is None:  # bits that are digits are never counted
                continue
            config = configs.encode_config(
                rows, slots, widest, depth, dtype, half, grades is not None
            )
            planes, most = grades or (0, 0)
            shape = {
                "GROUP": group,
                "PLANES": planes,
                "MOST": most,
                "BLOCK": config.block,
                "TILED": step,
                "PLACED": step and grades is not None,
                "PRICED": priced and grades is not None,
                "STEP": step,
                "VALUE_DIM": dim if step else 0,
                "VALUE_SLOTS": slots if step else 16,
            }
            kinds = pointers | {"STEPS": "*i64" if shape["PRICED"] else "*fp32"}
            yield Build("encode_kernel", sizes | shape, config.warps, pointers=kinds)


def _selections() -> Iterator[Build]:
    kinds = [(bits // 32, group, 0, None) for bits in configs.BITS for group in configs.GROUPS]
    kinds += [(bits // 32, 1, *graded) for bits, graded in configs.GRADES.items()]
    for words, group, grades, most in kinds:
        for tiles in configs.TILES:
            config = configs.Select(group, words, tiles, grades, most)
            limited = {"registers": config.options["maxnreg"], "slots": config.slots}
            yield _selection("histogram_kernel", config.counting, keys=1 / words, **limited)
            slots = configs.REFINE_SLOTS[config.pack]
            for digit in config.refining:
                yield _selection("refine_kernel", digit, keys=config.pack, slots=slots)
            yield _selection("compact_kernel", config.storing, popcounts=True)
            if grades or words == 1:  # the default's codes, and the paper's
                tally = config.storing | {"BLOCK": configs.COUNT_BLOCK}
                yield _selection("tally_kernel", tally, popcounts=True)
                yield _selection("list_kernel", config.storing, popcounts=True)
                yield _selection("survey_kernel", config.surveying)


def _selection(kernel: str, constants: dict[str, Any], **options: Any) -> Build:
    return Build(kernel, constants, configs.WARPS, **({"registers": configs.REGISTERS} | options))


def _attention(dim: int, dtype: torch.dtype) -> Iterator[Build]:
    config, kind = configs.attend_config(dim, dtype), "*" + TYPES[dtype]
    slots = triton.next_power_of_2(dim)
    value = {"VALUE_DIM": dim, "VALUE_SLOTS": slots}
    for group, listed, weighted in (
        (1, True, False), (4, True, False), (1, False, False), (4, False, False),
        (1, True, True), (4, True, True),
    ):  # fmt: skip
        sizes = {
            "GROUP": group,
            "SLOTS": configs.head_slots(group, 0),
            "DIM": dim,
            "DIM_SLOTS": slots,
            **value,
            "BLOCK": config.block,
            "STAGES": config.stages,
            "LISTED": listed,
            "CAPPED": False,
            "WEIGHTED": weighted,
            "HAS_SINKS": False,
            "COUNTED": listed,
            "HEADS": group,
            "MERGED": configs.merged(group, slots),
            "BITS": 0,
        }
        pointers = {"Q": kind, "K": kind, "V": kind, "OUT": kind}
        yield Build(
            "attend_kernel", sizes, config.warps, config.stages, pointers, rows=dtype.itemsize
        )
        if weighted:
            yield from _decoding(dim, dtype, sizes)


def _decoding(dim: int, dtype: torch.dtype, sizes: dict[str, Any]) -> Iterator[Build]:
    """The same over quantised rows."""
    words = {"Q": "*" + TYPES[dtype], "K": "*i32", "V": "*i32", "OUT": "*fp32"}
    for bits in quantised.BITS:
        config = configs.attend_config(dim, dtype, bits)
        own = {"SLOTS": configs.head_slots(sizes["GROUP"], bits), "BLOCK": config.block,
               "STAGES": config.stages}  # fmt: skip
        sizes = sizes | own | {"COUNTED": False, "BITS": bits}
        yield Build("attend_kernel", sizes, config.warps, config.stages, words)


def compile_build(build: Build, architecture: int) -> dict[str, Any]:
    """Compile; returns registers, stack and local bytes, shared memory, instruction counts, and
    where they are counted the slots a key of the loops over keys, the cheapest first.

    Raises whatever the compiler raises.
    """
    kernel = KERNELS[build.kernel]
    signature, aligned = {}, {}
    in_words = build.constants.get("BITS", 0) > 0  # rows of a width that 16 does not divide
    for at, name in enumerate(kernel.arg_names):
        if name in build.constants:
            signature[name] = "constexpr"
        elif name.isupper() or name[0] in "XQKV":
            signature[name] = build.pointers.get(name, POINTERS.get(name, "*i32"))
            if name != "V" or not in_words:
                aligned[(at,)] = [["tt.divisibility", 16]]
        elif name in ("scale", "softcap"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            stride = name.split("_")[-1] in ("batch", "head", "row", "token")
            if stride and not (in_words and name[0] in "kv"):
                aligned[(at,)] = [["tt.divisibility", 16]]
    constants = {(kernel.arg_names.index(name),): v for name, v in build.constants.items()}
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": build.warps, "num_stages": build.stages, "maxnreg": build.registers}
    compiled = triton.compile(source, target=target, options=options)
    return _machine_code(compiled.asm["cubin"], build.keys) | {"shared": compiled.metadata.shared}


def _machine_code(cubin: bytes, keys: float | None) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        code = _cuobjdump("--dump-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resources: {usage[-500:]}")
    registers, stack, local = map(int, found.groups())
    counts = Counter(each.operation for each in instructions(code))
    facts = {"registers": registers, "stack": stack, "local": local, "instructions": dict(counts)}
    if keys is not None:
        facts["slots"] = [round(slots, 2) for slots in slots_a_key(code, keys)]
    return facts


def _cuobjdump(option: str, file: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def faults(build: Build, code: dict[str, Any]) -> list[str]:
    """What is wrong with the machine code of a build; empty for good code."""
    counts, found = code["instructions"], []

    def count(*prefixes: str) -> int:
        return sum(n for name, n in counts.items() if name.startswith(prefixes))

    spills = count("LDL", "STL")
    if spills or code["local"]:
        found.append(f"spills: {spills} local loads and stores, {code['local']} bytes")
    if code["registers"] * build.warps * 32 > REGISTERS:
        found.append(f"{code['registers']} registers do not fit {build.warps} warps")
    if build.registers is not None and code["registers"] > build.registers:
        found.append(
            f"{build.kernel} takes {code['registers']} registers, {build.registers} allowed"
        )
    if build.slots is not None:
        found += _slow(build, code["slots"])
    if build.popcounts and not count("POPC"):
        found.append("no POPC instruction")
    if build.rows:
        wide = count("LDGSTS.E.128", "LDGSTS.E.BYPASS.128", "LDG.E.128")
        narrow = count("LDG.E.U16", "LDG.E.U8", "LDG.E.S16")
        if not wide or (build.rows < 4 and narrow > NARROW):
            found.append(f"rows are read by {wide} loads of 16 bytes and {narrow} narrow ones")
    return found


def _slow(build: Build, slots: list[float]) -> list[str]:
    """Too many slots a key, in the loop over a whole chunk or in that over one at a span's edge,
    which may be short enough to be none."""
    if len(slots) not in (1, 2):
        return [f"{build.kernel} has {len(slots)} loops over keys instead of 1 or 2"]
    most = {"in a whole chunk": build.slots, "at an edge": build.slots + configs.EDGE_SLOTS}
    return [
        f"{build.kernel} takes {taken} issue slots a key {where}, {most[where]} allowed"
        for taken, where in zip(slots, most, strict=False)
        if taken > most[where]
    ]


def check(job: tuple[Build, int]) -> dict[str, Any]:
    """One row of the report: the machine code of a build and its faults."""
    build, architecture = job
    row = {"name": build.name, "architecture": f"sm_{architecture}"}
    try:
        code = compile_build(build, architecture)
    except Exception as error:  # the compiler raises many kinds: each is a fault of this build
        message = str(error).strip().splitlines() or [type(error).__name__]
        return row | {"faults": [f"does not compile: {message[-1][:300]}"]}
    return row | code | {"faults": faults(build, code)}


def key() -> dict[str, str]:
    """What machine code depends on: the sources (SHA-256) and Triton's version."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted([*folder.glob("*.py"), *(folder.parent / name for name in SHARED)]):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return {"sources": digest.hexdigest(), "triton": triton.__version__}


def different_builds() -> dict[str, Build]:
    """Every build by its name."""
    return {build.name: build for build in builds()}


def run(jobs: int) -> list[dict[str, Any]]:
    """The report of all builds on all architectures."""
    different = different_builds().values()
    work = [(build, architecture) for architecture in ARCHITECTURES for build in different]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(check, work, chunksize=4))


def main() -> None:
    """Print the faults and a summary; exit status 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="where the whole report goes, with its key")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: the interpreter compiles nothing. Unset it.")
    report = run(arguments.jobs)
    if arguments.json:
        rows = ",\n".join(json.dumps(row, sort_keys=True) for row in report)
        arguments.json.write_text(f'{{"key": {json.dumps(key())}, "builds": [\n{rows}\n]}}\n')
    bad = [row for row in report if row["faults"]]
    for row in bad:
        print(f"{row['architecture']} {row['name']}: {'; '.join(row['faults'])}")
    print(f"{len(report)} builds of {len(KERNELS)} kernels, {len(bad)} with faults")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
