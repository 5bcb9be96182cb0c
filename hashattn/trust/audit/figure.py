"""The figure of an audit: what each layer and head missed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hashattn.trust.audit.source import AuditError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hashattn.trust.audit.evidence import Evidence


def draw_missed(axis: Axes, evidence: Evidence, token: int | None = None) -> None:
    """Share of dense attention that each layer (row) and query head (column) did not read: for one
    answer token, or the mean over all that were audited. AuditError where none was."""
    tokens = evidence.tokens if token is None else [token]
    if not tokens:
        raise AuditError("no answer token was audited, so there is nothing to draw")
    rows = [
        np.mean([evidence.layer(number, layer).missed for number in tokens], axis=0)
        for layer in evidence.layers
    ]
    shares = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, missed in zip(shares, rows, strict=True):
        row[: len(missed)] = missed
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Oranges", aspect="auto")
    axis.set(xlabel="query head", ylabel="layer", yticks=range(len(rows)))
    axis.grid(False)
    axis.set_yticklabels([str(layer) for layer in evidence.layers])
    axis.figure.colorbar(image, ax=axis, label="attention missed")
