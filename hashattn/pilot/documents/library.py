"""A folder of documents as texts."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass

from hashattn.base.progress import progress_bar
from hashattn.pilot.documents.files import Found, find_files, read_file
from hashattn.pilot.documents.limits import ReadLimits
from hashattn.pilot.documents.reader import Reader
from hashattn.pilot.documents.skipped import Refused, Skipped


@dataclass(frozen=True)
class SourceDocument:
    """The text of a file.

    name: below the folder, with "/"; unprintable characters escaped. kind: "txt", "md", "html",
    "pdf", "docx", "xlsx", "csv" or "pptx". encoding: of its characters, None where its format
    fixes it. sha256: of the file.
    """

    name: str
    text: str
    kind: str
    encoding: str | None
    sha256: str


@dataclass(frozen=True)
class Library:
    """Documents by name, and what was not read of the folder; a document of which a part was not
    read stands in both."""

    documents: tuple[SourceDocument, ...]
    skipped: tuple[Skipped, ...]


def read_documents(folder: str | os.PathLike, *, limits: ReadLimits | None = None) -> Library:
    """The texts of the files in a folder and its folders, in the order of their names.

    Nothing is written, no link is followed, nothing is fetched. Files that cannot be read are
    recorded in `skipped` with the reason, whatever they hold; if there are only such, the library
    has no documents. Of files with the same content the first is read. Hidden files and Office's
    lock files are left out and counted. DocumentsError if there is no such folder, no file in it,
    or a package to read one is missing.
    """
    limits = limits or ReadLimits()
    files, skipped = find_files(folder, limits)
    documents: list[SourceDocument] = []
    first: dict[str, str] = {}  # name of the first file of each content
    characters, end = 0, time.monotonic() + limits.total_seconds
    with Reader(limits) as reader, progress_bar(total=len(files), desc="documents") as bar:
        for number, file in enumerate(files):
            stop = _limit_reached(limits, len(documents), characters, end)
            if stop:
                key, values = stop
                values["count"] = len(files) - number
                skipped.append(Skipped(file.name, key, values))
                break
            try:
                document, notes = _read(file, reader, limits, first)
                documents.append(document)
                characters += len(document.text)
                skipped += [Skipped(file.name, key, values) for key, values in notes]
            except Refused as refused:
                skipped.append(Skipped(file.name, refused.key, refused.values))
            bar.update()
    return Library(tuple(documents), tuple(sorted(skipped, key=lambda each: each.name)))


def _limit_reached(
    limits: ReadLimits, documents: int, characters: int, end: float
) -> tuple[str, dict] | None:
    if documents >= limits.documents:
        return "documents_limit", {"limit": limits.documents}
    if characters >= limits.total_characters:
        return "total_characters", {"limit": limits.total_characters}
    if time.monotonic() > end:
        return "total_seconds", {"seconds": limits.total_seconds}
    return None


def _read(
    file: Found, reader: Reader, limits: ReadLimits, first: dict[str, str]
) -> tuple[SourceDocument, list]:
    """A document, and notes (key, values) of what of it was not read."""
    content = read_file(file.path, limits.file_bytes)
    if not content:  # or all empty files would be copies of the first
        raise Refused("empty")
    sha256 = hashlib.sha256(content).hexdigest()
    same = first.setdefault(sha256, file.name)
    if same != file.name:
        raise Refused("duplicate", of=same)
    result = reader.read("document", content, file.kind)
    document = SourceDocument(file.name, result["text"], file.kind, result["encoding"], sha256)
    return document, result["notes"]
