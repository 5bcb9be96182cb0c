"""The process in which files are read; `reader.Reader` starts it.

Libraries for PDF and Office files are large, partly C, and get files from anywhere: one of them
may crash, hang or fill the memory. In a process of its own that costs one file, not the pilot's
hour. One process reads all files, one after the other, so a file costs its bytes through a pipe and
no start of Python. It opens none of them itself: it gets bytes and gives text. It cannot write
files, connect or start programs, and ends itself if a file takes too long, even where nobody is
left to end it.

A job is a line of JSON {"task", "kind", "size", "limits", "seconds"} and `size` bytes; its answer
is a line of JSON: {"result"}, {"refused": [key, values]} or {"missing": name of a package}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

from hashattn.pilot.documents.formats.reading import cleaned
from hashattn.pilot.documents.skipped import Refused

_READERS = {  # module, function: imported when the first file of a kind comes
    "txt": ("text", "read_text"),
    "md": ("text", "read_text"),
    "html": ("page", "read_page"),
    "pdf": ("pdf", "read_pdf"),
    "docx": ("office", "read_docx"),
    "pptx": ("office", "read_pptx"),
    "xlsx": ("tables", "read_xlsx"),
    "csv": ("tables", "read_csv"),
}
_STARTS = ("subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pty.")


def _main() -> None:
    """Answer jobs until the input ends. Argument: bytes of memory that may be used."""
    answers = os.fdopen(os.dup(1), "wb")
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):  # what libraries print is no answer, and nobody's business
        os.dup2(silence, stream)
    _confine(int(sys.argv[1]))
    jobs = sys.stdin.buffer
    for line in iter(jobs.readline, b""):
        job = json.loads(line)
        # without a handler the alarm ends the process, whatever C code it is in
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])
        answer = json.dumps(_answer(job, jobs.read(job["size"])))
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(answer.encode() + b"\n")
        answers.flush()


def _confine(memory: int) -> None:
    """Bound this process's memory, and forbid what reading does not need."""
    import resource

    for kind, most in (("AS", memory), ("FSIZE", 0), ("CORE", 0)):
        with suppress(ValueError, OSError):  # macOS has no limit of address space
            resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, most))
    sys.addaudithook(_forbid)


def _forbid(event: str, arguments: tuple) -> None:
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    if event == "open":
        forbidden = bool((arguments[2] or 0) & writes)
    else:
        forbidden = event.startswith(("socket.", *_STARTS))
    if forbidden:
        raise PermissionError(f"{event}: a reader of documents does not do that")


def _answer(job: dict[str, Any], content: bytes) -> dict[str, Any]:
    try:
        return {"result": _TASKS[job["task"]](content, job["kind"], job["limits"])}
    except Refused as refused:
        return {"refused": [refused.key, refused.values]}
    except MemoryError:
        return {"refused": ["memory", {"megabytes": int(sys.argv[1]) / 1e6}]}
    except ModuleNotFoundError as problem:
        return {"missing": problem.name}
    except Exception:  # a library raises what its parts raise: KeyError, ExpatError, RecursionError
        return {"refused": ["damaged", {"kind": job["kind"]}]}


def _document(content: bytes, kind: str, limits: dict) -> dict[str, Any]:
    """A file's text."""
    module, name = _READERS[kind]
    reader = getattr(import_module(f"hashattn.pilot.documents.formats.{module}"), name)
    reading = reader(content, kind, limits)
    text, more = reading.text(limits["characters"])
    if not text.strip():
        raise Refused(reading.empty)
    notes = [*reading.notes, *([("cut", {"characters": limits["characters"]})] if more else [])]
    return {"text": text, "encoding": reading.encoding, "notes": notes}


def _rows(content: bytes, kind: str, limits: dict) -> list[list[str]]:
    """Rows of a table, of the first sheet of a workbook: its cells as texts."""
    from hashattn.pilot.documents.formats.tables import csv_rows, xlsx_sheets

    if kind == "csv":
        rows, _, _ = csv_rows(content)
    else:
        rows = next((rows for _, rows in xlsx_sheets(content, kind, limits, [])), [])
    return [[cleaned(cell).strip() for cell in row] for row in rows]


def _lines(content: bytes, kind: str, limits: dict) -> list[str]:
    """Lines of a text, all of them."""
    from hashattn.pilot.documents.formats.text import decoded

    return cleaned(decoded(content)[0]).split("\n")


_TASKS = {"document": _document, "rows": _rows, "lines": _lines}

if __name__ == "__main__":
    _main()
