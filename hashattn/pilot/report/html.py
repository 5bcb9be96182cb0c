"""The report as one HTML file that asks for nothing: no script, its own style by its hash, pictures
as data. What others wrote reaches it as text that jinja2 escapes."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from hashattn.pilot.report.blocks import Page
from hashattn.pilot.report.figures import STYLES


def html_of(page: Page) -> str:
    """The page as ASCII text."""
    from jinja2 import Environment, StrictUndefined

    folder = files("hashattn.pilot.report") / "templates"
    template, style = (
        (folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css")
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    environment.filters["data_uri"] = _data_uri
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    text = environment.from_string(template).render(
        page=page, first=page.first, styles=STYLES, style=style, style_hash=f"'sha256-{digest}'"
    )
    return text.encode("ascii", "xmlcharrefreplace").decode()


def _data_uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
