"""Bytes of plain text to characters, in whatever encoding a company's files are.

A byte-order mark decides; then UTF-8, which bytes in another encoding are not by chance; then what
a page says of itself; then Japanese, where kana show it (charset-normalizer takes short EUC-JP for
Korean); then charset-normalizer among encodings in use.
"""

from __future__ import annotations

import codecs
import re

from hashattn.base.files import looks_like
from hashattn.pilot.documents.files import KIND_NAMES
from hashattn.pilot.documents.formats.reading import Reading
from hashattn.pilot.documents.skipped import Refused

_MARKS = {  # UTF-32 before UTF-16, whose mark begins it
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_GUESSES = (  # in use for documents, as charset-normalizer calls them
    "cp932 euc_jp gb18030 big5 cp949 cp1252 cp1250 cp1251 koi8_r cp1253 cp1254 cp1255 cp1256 cp874"
).split()
_KANA = re.compile("[\u3041-\u30fe]")
_CONTROLS = re.compile(
    "[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f]"
)  # in text hardly ever; \x1b colours logs


def read_text(content: bytes, kind: str, limits: dict) -> Reading:
    """A text file as it is."""
    text, encoding, notes = decoded(content)
    return Reading([text], encoding, notes)


def decoded(content: bytes, declared: str | None = None) -> tuple[str, str, list[tuple[str, dict]]]:
    """(text, encoding, notes); declared: encoding that the text names. Refused for binary data."""
    encoding, errors = _encoding(content, declared)
    text = content.decode(encoding, errors)
    damaged = text.count("\ufffd") if errors == "replace" else 0
    if len(_CONTROLS.findall(text)) > max(8, len(text) // 50):
        raise Refused("not_text", kinds=KIND_NAMES)
    return text, encoding, [("damaged_text", {"count": damaged})] if damaged else []


def _encoding(content: bytes, declared: str | None) -> tuple[str, str]:
    """(codec, what it does with bytes that it cannot decode)."""
    for mark, codec in _MARKS.items():
        if content.startswith(mark):
            return codec, "replace"
    kind = (looks_like(content) or ("", ""))[0]
    if kind in ("UTF-16LE", "UTF-16BE"):
        return kind.lower(), "replace"
    if kind and kind != "ISO-2022-JP":
        raise Refused("not_text", kinds=KIND_NAMES)
    # ISO-2022-JP is ASCII by its bytes; its escape stands anywhere
    first = ["iso2022_jp"] if b"\x1b$" in content else []
    for codec in (*first, "utf-8", *([declared] if declared else [])):
        if _decodes(content, codec):
            return codec, "strict"
    as_utf8 = content.decode("utf-8", "replace")
    if 10 * as_utf8.count("\ufffd") < sum(not character.isascii() for character in as_utf8):
        return "utf-8", "replace"  # damaged: other encodings would make other words of it
    for codec in ("euc_jp", "cp932"):  # what is EUC-JP can be read as half-width kana in cp932
        text = content.decode(codec, "replace")
        other = sum(not character.isascii() for character in text)
        if len(_KANA.findall(text)) > other // 8 and text.count("\ufffd") <= other // 100:
            return codec, "replace"
    return _guessed(content), "replace"


def _decodes(content: bytes, codec: str) -> bool:
    try:
        content.decode(codec)
    except (LookupError, ValueError):  # an encoding that Python does not know; other bytes
        return False
    return True


def _guessed(content: bytes) -> str:
    from charset_normalizer import from_bytes

    best = from_bytes(content, cp_isolation=_GUESSES).best()
    if best is None:
        raise Refused("not_text", kinds=KIND_NAMES)
    # one of many that give the same text: call it by its usual name
    same = _decodes(content, "cp1252") and content.decode("cp1252") == str(best)
    return "cp1252" if same else best.encoding
