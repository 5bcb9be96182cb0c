"""Files: read with a clear error whatever they hold, written whole or not at all.

Text is UTF-8; a byte-order mark and Windows line ends are accepted. Readers raise `error`, a class
of the caller's choice, naming the file, the line and what the content looks like.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from hashattn.base.errors import HashAttnError

PARTIAL = ".partial"  # ends the name of a file that is being written
_UNPACK = "unpack it first"
_SIGNATURES = {  # first bytes of a file that is not UTF-8 text: (what it is, what to do)
    b"\x1f\x8b": ("gzip", _UNPACK),
    b"BZh": ("bzip2", _UNPACK),
    b"\xfd7zXZ\0": ("xz", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("zstd", _UNPACK),
    b"PK\x03\x04": ("a zip archive or an Office document", "unpack it, or save it as text"),
    b"%PDF": ("PDF", "save its text"),
    b"PAR1": ("Parquet", "save it as JSON lines"),
    b"\xff\xfe\0\0": ("UTF-32", "convert it: iconv -f UTF-32 -t UTF-8"),
    b"\0\0\xfe\xff": ("UTF-32", "convert it: iconv -f UTF-32 -t UTF-8"),
    b"\xff\xfe": ("UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
    b"\x1b$": ("ISO-2022-JP", "convert it: iconv -f ISO-2022-JP -t UTF-8"),
}
_KANA = range(0x3041, 0x30FF)  # found in nearly every Japanese text


class FileError(HashAttnError, ValueError):
    """A file cannot be read, or does not hold what it should."""


class WriteError(HashAttnError, OSError):
    """A file cannot be written; what was there before is unchanged."""


def read_bytes(path: str | Path, error: type[Exception] = FileError) -> bytes:
    """The bytes of a file; `error` if it is missing, a folder or unreadable."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        raise error(_unreadable(path, problem)) from problem


def read_text(path: str | Path, error: type[Exception] = FileError) -> str:
    """The text of a file, its line ends as \\n."""
    text = decode(read_bytes(path, error), str(path), error)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | Path, error: type[Exception] = FileError) -> Any:
    """The JSON value in a file; an object with a key twice is refused."""
    return parse_json(read_text(path, error), str(path), error)


def read_json_lines(
    path: str | Path, error: type[Exception] = FileError
) -> Iterator[tuple[str, Any]]:
    """("file:line", value) of each line that is not empty, read as the caller iterates."""
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}:{number}"
                text = decode(line, where, error, whole=number == 1)
                if text.strip():
                    yield where, parse_json(text, where, error)
    except (OSError, ValueError) as problem:
        if isinstance(problem, error):
            raise
        raise error(_unreadable(path, problem)) from problem


def read_yaml(path: str | Path, error: type[Exception] = FileError) -> Any:
    """The YAML value in a file; a mapping with a key twice, at any depth, is refused."""
    import yaml

    text = read_text(path, error)
    try:
        return yaml.load(text, _yaml_loader())  # noqa: S506, a SafeLoader
    except RecursionError as problem:
        raise error(f"{path}: brackets are nested too deep to be read") from problem
    except (yaml.YAMLError, ValueError) as problem:  # ValueError: a date like 2026-99-99
        raise error(f"{path} is not YAML: {problem}") from problem


def parse_json(text: str, where: str, error: type[Exception] = FileError) -> Any:
    """The value of a JSON text; `error` names `where`, its source, and what is wrong."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError as problem:
        raise error(f"{where}: brackets are nested too deep to be read") from problem
    except json.JSONDecodeError as problem:
        line = f", line {problem.lineno}" if "\n" in text.strip() else ""
        raise error(f"{where} is not JSON ({problem.msg}{line})") from problem
    except ValueError as problem:  # a key given twice, a number of thousands of digits
        raise error(f"{where} is not JSON ({problem})") from problem


def decode(
    content: bytes, where: str, error: type[Exception] = FileError, whole: bool = True
) -> str:
    """UTF-8 bytes as text, without a byte-order mark; else `error` says what they look like.

    whole: `content` begins a file, so its first bytes can tell what the file is.
    """
    if whole and (guess := looks_like(content)):
        kind, remedy = guess
        raise error(f"{where} looks like {kind}: {remedy}")
    try:
        text = content.decode("utf-8-sig" if whole else "utf-8")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        place = f"{where}, line {line}," if line > 1 else where
        kind = _encoding(content)
        remedy = f"it looks like {kind}; convert it" if kind else "convert it, or take another copy"
        raise error(
            f"{place} is not UTF-8: {remedy}: iconv -f {kind or '<its encoding>'} -t UTF-8"
        ) from problem
    if "\0" in text:
        raise error(f"{where} holds NUL bytes: it is damaged or not text; take another copy")
    return text


def looks_like(content: bytes) -> tuple[str, str] | None:
    """(what it is, what to do) of a file that begins with these bytes and is not UTF-8 text; None
    if they tell nothing."""
    for signature, guess in _SIGNATURES.items():
        if content.startswith(signature):
            return guess
    start = content[:4096]
    # UTF-16 without a byte-order mark: of ASCII text, every other byte is 0
    for offset, kind in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        zeros = start[offset::2].count(0)
        if zeros > len(start) // 4 > 0 and start[1 - offset :: 2].count(0) == 0:
            return kind, f"convert it: iconv -f {kind} -t UTF-8"
    return None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to. On leaving, the file written there replaces `path`, whole
    and synced to disk; if anything is raised it is removed, and `path` stays as it was.

    Folders are made as needed. WriteError where the disk is full or cannot be written.
    """
    path = Path(os.path.realpath(path))  # a symbolic link stays a link
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except WriteError:
        raise
    except OSError as problem:
        raise WriteError(
            f"{path} cannot be written ({problem.strerror or problem}); what was there is unchanged"
        ) from problem
    finally:
        with suppress(OSError):
            partial.unlink()


def write_text(path: str | Path, text: str) -> Path:
    """Write a text as UTF-8, whole or not at all; returns its path. WriteError as `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Write indented JSON with sorted keys, whole or not at all; ValueError for NaN."""
    return write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def _unreadable(path: str | Path, problem: Exception) -> str:
    if isinstance(problem, FileNotFoundError):
        return f"{path} does not exist: give the path of a file"
    if isinstance(problem, IsADirectoryError):
        return f"{path} is a folder: give the path of a file in it"
    return f"{path} cannot be read ({getattr(problem, 'strerror', None) or problem})"


def _encoding(content: bytes) -> str | None:
    """The Japanese encoding in which bytes that are not UTF-8 make sense, None if none does."""
    as_utf8 = content.decode(errors="replace")
    if 10 * as_utf8.count("\ufffd") < sum(not character.isascii() for character in as_utf8):
        return None  # damaged UTF-8, which other encodings may decode to words
    for name, codec in (("SHIFT_JIS", "cp932"), ("EUC-JP", "euc_jp"), ("UTF-16LE", "utf-16-le")):
        text = content.decode(codec, errors="replace")
        if any(ord(character) in _KANA for character in text) and text.count("\ufffd") <= 1:
            return name
    return None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's pairs as a dict; ValueError for a key that occurs twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return value


@cache
def _yaml_loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML's safe loader, which by itself keeps the last of two equal keys."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys: list[Any] = []
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                key = self.construct_object(key_node, deep=True)
                if key in keys:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} is given twice", key_node.start_mark
                    )
                keys.append(key)
            return super().construct_mapping(node, deep)

    return Loader
