"""Per KV head or per query head: of stored codes and of lists of selected tokens alike."""

from __future__ import annotations

from typing import Literal, get_args

from hashattn.base.checks import require_one_of

Layout = Literal["per_kv_head", "per_query_head"]
LAYOUTS: tuple[str, ...] = get_args(Layout)


def check_layout(layout: str, field: str = "layout") -> None:
    """ValueError naming the field unless `layout` is one of LAYOUTS."""
    require_one_of(field, layout, LAYOUTS)
