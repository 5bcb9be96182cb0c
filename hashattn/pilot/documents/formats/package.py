"""An Office file is a zip archive of XML: looked through before a library opens it.

Every part is inflated once and thrown away. That finds damage, what only claims to be small, and
declarations of entities, by which XML grows without end or asks for other files; OPC (ECMA-376
part 2) forbids them, so no Office writes them.
"""

from __future__ import annotations

import io
import zipfile
import zlib

from hashattn.pilot.documents.skipped import Refused

_COMPOUND = bytes.fromhex("d0cf11e0a1b11ae1")  # old Office files, and protected ones
_PARTS = 10_000
_RATIO, _SMALL = 200, 8 << 20  # XML shrinks to 1/100 at most; below 8 MiB a ratio does no harm
_CHUNK = 1 << 20
_DECLARATIONS = [  # as any encoding of XML that the libraries read writes them
    word.encode(codec)
    for word in ("<!DOCTYPE", "<!ENTITY")
    for codec in ("ascii", "utf-16-le", "utf-16-be")
]


def checked_package(content: bytes, kind: str, limits: dict) -> io.BytesIO:
    """The file for a library to open; Refused for what no library should."""
    if content.startswith(_COMPOUND):
        raise Refused("encrypted_office", suffix=kind)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            _check(archive, limits["unpacked_bytes"])
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as problem:
        raise Refused("damaged", kind=kind) from problem
    except RuntimeError as problem:  # a part with a password
        raise Refused("encrypted") from problem
    return io.BytesIO(content)


def _check(archive: zipfile.ZipFile, most: int) -> None:
    parts = archive.infolist()
    declared = sum(part.file_size for part in parts)
    if len(parts) > _PARTS or declared > most:
        raise Refused("bomb", megabytes=most / 1e6)
    inflated = 0
    for part in parts:
        xml = part.filename.lower().endswith((".xml", ".rels", ".vml"))
        size, tail = 0, b""
        with archive.open(part) as file:
            while chunk := file.read(_CHUNK):
                size += len(chunk)
                inflated += len(chunk)
                if inflated > most or size > max(_SMALL, _RATIO * part.compress_size):
                    raise Refused("bomb", megabytes=most / 1e6)
                if xml and any(word in tail + chunk for word in _DECLARATIONS):
                    raise Refused("entities")
                tail = chunk[-32:]
