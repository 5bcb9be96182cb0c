"""The files of a folder, in one order, and their bytes; links are not followed.

Names are paths below the folder as people can read them: invalid UTF-8, line breaks and other
unprintable characters stand as escapes. They are not normalised: Japanese names from macOS stay
decomposed.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter
from dataclasses import dataclass

from hashattn.pilot.documents.limits import ReadLimits
from hashattn.pilot.documents.skipped import DocumentsError, Refused, Skipped

KINDS = {  # suffix: how it is read
    **dict.fromkeys((".txt", ".text", ".log", ".rst", ""), "txt"),
    **dict.fromkeys((".md", ".markdown"), "md"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    ".pdf": "pdf",
    **dict.fromkeys((".docx", ".docm"), "docx"),
    **dict.fromkeys((".xlsx", ".xlsm"), "xlsx"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".pptx", ".pptm"), "pptx"),
}
KIND_NAMES = ", ".join(sorted(set(KINDS.values())))
_ARCHIVES = {".zip", ".7z", ".rar", ".lzh", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst"}
_OLD = {
    **dict.fromkeys((".doc", ".rtf", ".odt", ".pages", ".jtd"), "docx"),
    **dict.fromkeys((".xls", ".xlsb", ".ods", ".numbers"), "xlsx"),
    **dict.fromkeys((".ppt", ".odp", ".key"), "pptx"),
}
_CLUTTER = {"thumbs.db", "desktop.ini"}  # that Windows puts into folders


@dataclass(frozen=True)
class Found:
    """A file to read: its name in reports, its path, how it is read."""

    name: str
    path: str
    kind: str


def find_files(folder: str | os.PathLike, limits: ReadLimits) -> tuple[list[Found], list[Skipped]]:
    """Files below `folder` to be read, sorted by name, and what is left out.

    DocumentsError if it is no folder that can be listed, or holds nothing.
    """
    root = os.fspath(folder)
    if not os.path.isdir(root):
        found = "is a file" if os.path.exists(root) else "does not exist"
        raise DocumentsError(f"{root} {found}: give the path of a folder with documents")
    files, skipped, kinds, hidden = [], [], Counter(), 0
    names, trouble = _walk(root, limits.files)
    for name, entry in names:
        if _is_clutter(entry.name):
            hidden += 1
        elif entry.is_symlink():
            skipped.append(Skipped(readable(name), "symlink"))
        elif not entry.is_file(follow_symlinks=False):
            skipped.append(Skipped(readable(name), "special"))
        else:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in KINDS:
                files.append(Found(readable(name), entry.path, KINDS[suffix]))
            else:
                kinds[readable(suffix)] += 1
    for suffix, count in sorted(kinds.items()):
        values = {"count": count, "suffix": suffix}
        if suffix in _ARCHIVES:
            key = "archive"
        elif suffix in _OLD:
            key, values["save_as"] = "old_format", _OLD[suffix]
        else:
            key, values["kinds"] = "unknown_suffix", KIND_NAMES
        skipped.append(Skipped(f"*{suffix}", key, values))
    if hidden:
        skipped.append(Skipped(".*", "hidden", {"count": hidden}))
    skipped += trouble
    if not files and not skipped:
        raise DocumentsError(f"{root} holds no files: put documents into it ({KIND_NAMES})")
    return files, skipped


def read_file(path: str | os.PathLike, most: int) -> bytes:
    """The bytes of a regular file; Refused if it is none, cannot be read, or has more than `most`.

    Not by `base.files.read_bytes`: a file may have become a link, or a pipe that never ends.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Refused("special")
            if status.st_size <= most and len(content := file.read(most + 1)) <= most:
                return content
    except OSError as problem:
        raise Refused("unreadable", problem=problem.strerror or str(problem)) from problem
    raise Refused("too_large", megabytes=most / 1e6)


def readable(name: str) -> str:
    """A file's name with what cannot be printed as escapes; different names stay different."""
    text = os.fsencode(name).decode("utf-8", "surrogateescape")
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    # all spaces are shown: names of Japanese files hold wide ones
    if character != "\\" and (character.isprintable() or unicodedata.category(character) == "Zs"):
        return character
    return character.encode("unicode_escape").decode("ascii")


def _is_clutter(name: str) -> bool:
    """A hidden file, an Office lock file, or what a file manager left."""
    return name.startswith((".", "~$")) or name.lower() in _CLUTTER


def _walk(root: str, most: int) -> tuple[list[tuple[str, os.DirEntry]], list[Skipped]]:
    """(path below root, entry) of what is no folder to be entered, sorted; `most` are looked at."""
    found, skipped, folders, seen = [], [], [""], 0
    while folders:
        folder = folders.pop()
        try:
            entries = os.scandir(os.path.join(root, folder))
        except OSError as problem:
            reason = problem.strerror or str(problem)
            if not folder:
                raise DocumentsError(
                    f"{root} cannot be listed ({reason}): change its permissions"
                ) from problem
            skipped.append(Skipped(readable(folder) + "/", "unreadable", {"problem": reason}))
            continue
        with entries:
            for entry in entries:
                seen += 1
                if seen > most:
                    limit = {"limit": most}
                    return sorted(found, key=_order), [*skipped, Skipped("*", "files_limit", limit)]
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False) and not _is_clutter(entry.name):
                    folders.append(name)
                else:
                    found.append((name, entry))
    return sorted(found, key=_order), skipped


def _order(found: tuple[str, os.DirEntry]) -> list[str]:
    return found[0].split("/")
