"""The audit's page: one HTML file that shades the prompt by what was read for an answer token.

It holds all that it shows and asks for nothing: its Content-Security-Policy allows its own script
and style, by their hashes, and no request. Texts reach the page as JSON in which no markup can
begin, and the document as text nodes.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from hashattn.base.files import write_text
from hashattn.trust.audit.evidence import COLUMNS, FORMAT, Evidence
from hashattn.trust.audit.source import AuditError, Source

_LIMIT = 24 << 20  # bytes of weights above which a page shows means over heads


def save_page(
    evidence: Evidence,
    path: str | os.PathLike,
    *,
    title: str = "What was read for each answer token",
    notes: str = "",
    tokens: Collection[int] | None = None,
    layers: Collection[int] | None = None,
) -> Path:
    """Write the page of an audit, whole or not at all; returns its path.

    notes: a text shown under the page, such as `run.receipt.summary()`. tokens, layers: those to
    show, all if None. Where what is kept of all heads needs more than 24 MiB, the page shows means
    over the heads of a layer, and says so (8K tokens, 200 steps and 32 layers of 32 heads: 10 MB):
    choose fewer tokens or layers to see heads. AuditError for evidence of no token; WriteError.
    """
    return write_text(path, page_html(evidence, title, notes, tokens, layers))


def page_html(
    evidence: Evidence,
    title: str,
    notes: str,
    tokens: Collection[int] | None = None,
    layers: Collection[int] | None = None,
    limit: int = _LIMIT,
) -> str:
    """The page as ASCII text; limit: bytes of weights above which heads are averaged."""
    from jinja2 import Environment

    folder = files("hashattn.trust.audit") / "templates"
    template, style, script = (
        (folder / f"audit.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    page = Environment(autoescape=True).from_string(template)
    text = page.render(
        title=title,
        data={"title": title, "notes": notes} | _page_data(evidence, tokens, layers, limit),
        style=style,
        script=script,
        style_hash=_policy_hash(style),
        script_hash=_policy_hash(script),
    )
    # what is not ASCII, half surrogate pairs included, stands as character references
    return text.encode("ascii", "xmlcharrefreplace").decode()


def _page_data(
    evidence: Evidence,
    tokens: Collection[int] | None,
    layers: Collection[int] | None,
    limit: int,
) -> dict[str, Any]:
    """What the script shows; arrays as base64 of little-endian numbers, see audit.js."""
    tokens = evidence.tokens if tokens is None else sorted(set(tokens))
    layers = evidence.layers if layers is None else sorted(set(layers))
    if not tokens or not layers:
        raise AuditError(
            "no step of this run was audited, so there is no page: the audit keeps what follows "
            "the prompt, so generate more than one token, with a cache"
        )
    first = evidence.layer(tokens[0], layers[0])
    size = first.masses.nbytes + first.top.nbytes + first.top.size * 6  # position, three weights
    means = len(tokens) * len(layers) * size > limit
    masses, tops, heads = [], [], []
    for token in tokens:
        for layer in layers:
            found = evidence.layer(token, layer)
            weights = found.masses.astype(np.float32)
            masses.append(weights.mean(1, keepdims=True) if means else weights)
            tops.append(_tops(found, means))
            heads.append((found.missed, found.read_tokens, found.n, found.reason))
    lengths = [[len(top[0]) for top in layer] for layer in tops]
    flat = [top for layer in tops for top in layer]
    last = max(evidence.answer, default=-1)
    shown = range(max(last, tokens[-1]) + 1)
    return {
        "format": FORMAT,
        "columns": COLUMNS,
        "tokens": list(tokens),
        "layers": list(layers),
        "heads": [len(missed) for missed, *_ in heads[: len(layers)]],
        "means": means,
        "answer": [evidence.text_of(token) for token in shown],
        "known": bool(evidence.answer),
        "full": evidence.full,
        "unaudited": sorted(evidence.unaudited.items()),
        "reasons": [reason for *_, reason in heads],
        "cached": [n for *_, n, _ in heads],
        "missed": [_base64(missed, "<f4") for missed, *_ in heads],
        "read": [read.tolist() for _, read, *_ in heads],
        "masses": [_base64(part, "<f2") for part in masses],
        "lengths": lengths,
        "positions": _base64(np.concatenate([top[0] for top in flat]), "<i4"),
        "weights": _base64(np.concatenate([top[1] for top in flat]), "<f2"),
    } | _text_data(evidence.source)


def _tops(found: Any, means: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each head, or once for their mean: positions (m,) of the heaviest tokens by any kind, and
    their weights (m, 3). A head's weight of a token that is not among its heaviest counts as 0; of
    the mean's tokens as many are kept as of a head's."""
    heads, group = [], found.heads // len(found.listed)
    for head in range(found.heads):
        positions, at = np.unique(found.top[:, head], return_index=True)
        read, dense = (a[:, head].ravel()[at] for a in (found.top_read, found.top_dense))
        kept = positions >= 0
        positions, read, dense = positions[kept], read[kept], dense[kept]
        missed = np.where(found.listed[head // group, positions], 0, dense)
        heads.append((positions, np.stack((read, dense, missed), -1).astype(np.float32)))
    if not means:
        return heads
    positions, at = np.unique(np.concatenate([p for p, _ in heads]), return_inverse=True)
    weights = np.zeros((len(positions), 3), np.float32)
    np.add.at(weights, at, np.concatenate([w for _, w in heads]) / len(heads))
    best = np.argsort(-weights, axis=0, kind="stable")[: found.top.shape[2]]
    kept = np.unique(best)
    return [(positions[kept], weights[kept])]


def _text_data(source: Source) -> dict[str, Any]:
    """The prompt in pieces, each from the first character of a token to that of the next one."""
    starts, piece_of = [], []
    for start, end in source.offsets:
        if start < end and (not starts or start > starts[-1]):
            starts.append(start)
        piece_of.append(len(starts) - 1 if start < end else -1)
    edges = [0, *starts[1:], len(source.text)]
    passages = []
    for number, (first, last) in enumerate(source.passages):
        place = source.place_of_passage(number)
        pieces = [piece for piece in piece_of[first:last] if piece >= 0]
        where = [place.source, place.start, place.end, place.prompt_start, place.prompt_end]
        passages.append([pieces[0], pieces[-1] + 1, *where])
    places = [source.place_of_token(token) for token in range(len(source.ids))]
    return {
        "pieces": [source.text[a:b] for a, b in zip(edges, edges[1:], strict=False)],
        "pieceOf": piece_of,
        "passages": passages,
        "places": [
            None if p is None else [p.source, p.start, p.end, p.prompt_start, p.prompt_end]
            for p in places
        ],
    }


def _base64(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, kind).tobytes()).decode()


def _policy_hash(text: str) -> str:
    """The Content-Security-Policy source that allows this text inline."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
