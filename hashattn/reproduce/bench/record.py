"""Result files: measured numbers with the machine, versions and protocol they come from.

A list of rows is stored as a table, one row a line: what all rows share once, then columns. Numbers
keep six digits.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import torch

from hashattn.base.environment import device_name, package_versions, python_version, system_name
from hashattn.base.files import FileError, read_json, write_text

FORMAT = 2
_PACKAGES = ("hashattn", "torch", "triton", "numba", "numpy", "transformers", "faiss-cpu",
            "flashinfer-python", "xllamacpp")  # fmt: skip
_TABLE = {"same", "columns", "rows"}


def protocol_of(clock: str, seed: int) -> dict[str, Any]:
    """What was the same for all rows of a measurement."""
    return {"clock": clock, "threads": torch.get_num_threads(), "seed": seed}


def environment() -> dict[str, Any]:
    """Device, system and the versions of those _PACKAGES that are installed."""
    packages = {name: version for name, version in package_versions(_PACKAGES).items() if version}
    return {"device": device_name(), "system": system_name(), "python": python_version(),
            "packages": packages}  # fmt: skip


def save(path: Path, **content: Any) -> None:
    """Write a result file: environment, date and `content`."""
    record = {"format": FORMAT, "date": str(date.today()), "environment": environment()} | content
    parts = [f"{json.dumps(key)}: {_text(record[key])}" for key in sorted(record)]
    write_text(path, "{" + ",\n".join(parts) + "}\n")


def load(path: Path) -> dict[str, Any]:
    """A result file. FileError when it is damaged, or was written by another version."""
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise FileError(f"{path}: written by another version of hashattn; measure again")
    return {key: _rows_of(value) if _is_table(value) else value for key, value in record.items()}


def _text(value: Any) -> str:
    rows = isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
    if not rows:
        return json.dumps(_rounded(value), sort_keys=True)
    columns = list(dict.fromkeys(key for row in value for key in row))
    cells = [[_rounded(row.get(key)) for key in columns] for row in value]
    shared = [i for i in range(len(columns)) if all(row[i] == cells[0][i] for row in cells)]
    same = {columns[i]: cells[0][i] for i in shared}
    names = [name for name in columns if name not in same]
    lines = [json.dumps([cell for i, cell in enumerate(row) if i not in shared]) for row in cells]
    head = f'"same": {json.dumps(same, sort_keys=True)},\n"columns": {json.dumps(names)}'
    return f"{{{head},\n" + '"rows": [\n' + ",\n".join(lines) + "\n]}"


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == _TABLE


def _rows_of(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(table["columns"], row, strict=True)) | table["same"] for row in table["rows"]]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value
