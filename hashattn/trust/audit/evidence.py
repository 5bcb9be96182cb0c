"""Evidence of an audit: what each layer and head read for each answer token, and what it missed."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hashattn.base.files import parse_json, read_bytes, replacing
from hashattn.trust.audit.frames import Frame, read_frames
from hashattn.trust.audit.source import AuditError, Place, Source

KINDS = ("read", "dense", "missed")  # of weights, in this order in every array
HEADER, LAYER, TOKENS, UNAUDITED, FULL = b"H", b"L", b"T", b"N", b"E"  # kinds of frames
COLUMNS = (
    "token", "token_text", "layer", "head", "unit", "position", "source", "start", "end",
    "prompt_start", "prompt_end", *KINDS,
)  # fmt: skip
FORMAT = 1


@dataclass(frozen=True)
class LayerEvidence:
    """What one layer read for one answer token.

    Weights are of KINDS: "read", as attention over what was read gave it; "dense", as dense
    attention would have; "missed", the dense weight of what was not read. Each sums to 1 over the
    cached tokens (missed to the missed mass), less where the layer has learned sinks.

    n: tokens cached. reason: why the step was dense, None if it was sparse. listed (lists, n) bool:
    the tokens read, a list for each KV head or for each query head; one of all visible tokens where
    the step was dense. missed (heads,) float32. masses (3, heads, segments): weights summed over
    each of `Source.segments`. top (3, heads, m) int32: cache positions of the heaviest tokens by
    each kind, -1 where there are no more; top_read, top_dense (3, heads, m): their weights.
    Half-precision numbers but `missed`.
    """

    token: int
    layer: int
    n: int
    reason: str | None
    listed: np.ndarray
    missed: np.ndarray
    masses: np.ndarray
    top: np.ndarray
    top_read: np.ndarray
    top_dense: np.ndarray

    @property
    def heads(self) -> int:
        """Query heads."""
        return len(self.missed)

    @property
    def read_tokens(self) -> np.ndarray:
        """How many tokens each query head read, (heads,) int64."""
        return self.listed.sum(-1).repeat(self.heads // len(self.listed))

    def to_frame(self) -> Frame:
        """For storage, compressed: a line of JSON with the sizes, then the arrays."""
        sizes = {
            "n": self.n,
            "reason": self.reason,
            "lists": len(self.listed),
            "heads": self.heads,
            "segments": self.masses.shape[2],
            "top": self.top.shape[2],
        }
        packed = {"listed": np.packbits(self.listed, axis=-1)}
        parts = [
            np.ascontiguousarray(packed.get(name, getattr(self, name)), kind).tobytes()
            for name, kind in _STORED.items()
        ]
        content = json.dumps(sizes).encode() + b"\n" + b"".join(parts)
        return Frame(LAYER, self.token, self.layer, zlib.compress(content, level=1))

    @classmethod
    def from_frame(cls, frame: Frame) -> LayerEvidence:
        """The inverse of `to_frame`."""
        content = zlib.decompress(frame.content)
        position = content.index(b"\n") + 1
        sizes = json.loads(content[:position])
        n, lists, heads, top = (sizes[name] for name in ("n", "lists", "heads", "top"))
        tops = (len(KINDS), heads, top)
        shapes = {
            "listed": (lists, -(-n // 8)),
            "missed": (heads,),
            "masses": (len(KINDS), heads, sizes["segments"]),
            "top": tops,
            "top_read": tops,
            "top_dense": tops,
        }
        arrays = {}
        for name, kind in _STORED.items():
            count = math.prod(shapes[name])
            values = np.frombuffer(content, kind, count, position)
            arrays[name] = values.reshape(shapes[name])
            position += values.nbytes
        arrays["listed"] = np.unpackbits(arrays["listed"], axis=-1, count=n).astype(bool)
        return cls(frame.token, frame.layer, n, sizes["reason"], **arrays)


# arrays of LayerEvidence as they are stored; the lists as bitmaps
_STORED = {
    "listed": "u1", "missed": "<f4", "masses": "<f2", "top": "<i4", "top_read": "<f2",
    "top_dense": "<f2",
}  # fmt: skip


class Evidence:
    """What an audit kept: `audit.evidence`, or `Evidence.load` of its file.

    source: the prompt. answer: {number: (id, text)} of the answer tokens that were given to the
    audit. layers: the layers with evidence. tokens: numbers of the answer tokens of which all
    these layers left evidence, 0 for the first; what a killed run began is left out.
    unaudited: {layer: why}. full: whether the audit stopped at its ceiling.
    """

    def __init__(self, content: bytes, where: str = "evidence") -> None:
        frames = read_frames(content, where)
        header = next(frames, None)
        if header is None or header.kind != HEADER:
            raise AuditError(f"{where} ends before its header: nothing was audited")
        described = parse_json(zlib.decompress(header.content).decode(), where, AuditError)
        if described.get("format") != FORMAT:
            raise AuditError(f"{where}: written by another version of hashattn")
        self.source = Source.from_dict(described["source"])
        self.answer: dict[int, tuple[int, str]] = {}
        self.unaudited: dict[int, str] = {}
        self.full = False
        self._frames: dict[tuple[int, int], Frame] = {}
        for frame in frames:
            if frame.kind == LAYER:
                self._frames[frame.token, frame.layer] = frame
            elif frame.kind == TOKENS:
                given = enumerate(json.loads(frame.content), frame.token)
                self.answer |= {number: (id, text) for number, (id, text) in given}
            elif frame.kind == UNAUDITED:
                self.unaudited[frame.layer] = frame.content.decode()
            elif frame.kind == FULL:
                self.full = True
                at = frame.token  # its other layers are not there
                self._frames = {k: f for k, f in self._frames.items() if k[0] != at}
        self.layers = sorted({layer for _, layer in self._frames})
        numbers = sorted({token for token, _ in self._frames})
        complete = [t for t in numbers if all((t, layer) in self._frames for layer in self.layers)]
        self.tokens = complete

    @classmethod
    def load(cls, path: str | os.PathLike) -> Evidence:
        """Evidence from the file of an audit, also of a killed run. AuditError if it is none."""
        return cls(read_bytes(path, AuditError), str(path))

    def layer(self, token: int, layer: int) -> LayerEvidence:
        """What a layer read for an answer token. AuditError if that is not known."""
        if (token, layer) not in self._frames:
            raise AuditError(
                f"no evidence of answer token {token} in layer {layer}: audited are tokens "
                f"{_listed(self.tokens)} in layers {_listed(self.layers)}"
            )
        return LayerEvidence.from_frame(self._frames[token, layer])

    def text_of(self, token: int) -> str:
        """The text of an answer token, "" if the audit was not told."""
        return self.answer.get(token, (0, ""))[1]

    def rows(
        self,
        tokens: Collection[int] | None = None,
        layers: Collection[int] | None = None,
        heads: Collection[int] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """COLUMNS of every place with any weight, for the chosen tokens, layers and heads, or all.

        unit "passage": its sum. "token": one of the heaviest by any kind, at cache `position`.
        "special" and "answer": sums over prompt tokens without text, and over the answer so far.
        start, end: characters in `source`, a document or the prompt; prompt_start, prompt_end: in
        the prompt; None where a token is not in it.
        """
        for token in self.tokens if tokens is None else tokens:
            for layer in self.layers if layers is None else layers:
                found = self.layer(token, layer)
                for head in range(found.heads) if heads is None else heads:
                    first = dict(zip(COLUMNS, (token, self.text_of(token), layer, head),
                                     strict=False))  # fmt: skip
                    for place in self._places(found, head):
                        yield first | place

    def save_json(self, path: str | os.PathLike, **chosen: Collection[int]) -> Path:
        """Write `rows(**chosen)` as JSON: {"format", "columns", "rows"}, one row a line, whole or
        not at all; returns the path. WriteError."""
        with replacing(path) as partial, partial.open("w", encoding="ascii") as file:
            file.write(f'{{"format": {FORMAT}, "columns": {json.dumps(COLUMNS)}, "rows": [')
            for number, row in enumerate(self.rows(**chosen)):
                file.write(("," if number else "") + "\n" + json.dumps(row))
            file.write("\n]}\n")
        return Path(path)

    def save_csv(self, path: str | os.PathLike, **chosen: Collection[int]) -> Path:
        """Write `rows(**chosen)` as CSV in UTF-8, whole or not at all; returns the path.

        Texts are escaped as in JSON (\\n, \\u202e), and those that a spreadsheet would take for a
        formula begin with an apostrophe. WriteError.
        """
        import csv

        with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for row in self.rows(**chosen):
                writer.writerow(
                    _cell(value) if isinstance(value, str) else value for value in row.values()
                )
        return Path(path)

    def _places(self, found: LayerEvidence, head: int) -> Iterator[dict[str, Any]]:
        """The columns from "unit" on, of one head."""
        passages = len(self.source.passages)
        names = ("special", "answer")
        for segment, weights in enumerate(found.masses[:, head].T.astype(np.float64).tolist()):
            if any(weights):
                inside = segment < passages
                place = self.source.place_of_passage(segment) if inside else None
                unit = "passage" if inside else names[segment - passages]
                yield _row(unit, None, place, weights)
        prompt = len(self.source.ids)
        group = found.heads // len(found.listed)
        read = found.listed[head // group]
        for position, weights in _top_tokens(found, head).items():
            place = self.source.place_of_token(position) if position < prompt else None
            missed = 0.0 if read[position] else weights[1]
            yield _row("token", position, place, [*weights, missed])


def _top_tokens(found: LayerEvidence, head: int) -> dict[int, tuple[float, float]]:
    """{cache position: (read, dense)} of a head's heaviest tokens by any kind, in order."""
    positions = found.top[:, head].ravel().tolist()
    read, dense = (a[:, head].astype(np.float64).ravel() for a in (found.top_read, found.top_dense))
    pairs = zip(positions, zip(read.tolist(), dense.tolist(), strict=True), strict=True)
    return {position: weights for position, weights in sorted(pairs) if position >= 0}


def _row(
    unit: str, position: int | None, place: Place | None, weights: list[float]
) -> dict[str, Any]:
    where = [None] * 5
    if place is not None:
        where = [place.source, place.start, place.end, place.prompt_start, place.prompt_end]
    return dict(zip(COLUMNS[4:], (unit, position, *where, *weights), strict=True))


def _cell(text: str) -> str:
    """A text that shows what it holds, and that no spreadsheet runs."""
    shown = "".join(c if c.isprintable() and c != "\\" else json.dumps(c)[1:-1] for c in text)
    return f"'{shown}" if shown.startswith(tuple("=+-@＝＋－＠")) else shown


def _listed(numbers: Collection[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def header_frame(source: Source, settings: Mapping[str, Any]) -> Frame:
    """The first frame of an audit."""
    content = {"format": FORMAT, "source": source.to_dict(), "settings": dict(settings)}
    return Frame(HEADER, 0, 0, zlib.compress(json.dumps(content).encode()))
