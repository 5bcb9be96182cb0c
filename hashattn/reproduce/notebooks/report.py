"""report.html: what a run found, in words first, then its claims, figures and tables.

One file that opens without a network, and on a phone, where the cells of a row stack.
"""

from __future__ import annotations

import base64
import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hashattn.reproduce.notebooks.claims import (
    NOT_JUDGED,
    VIOLATED,
    Claim,
    format_value,
    not_judged,
    tally,
)
from hashattn.reproduce.notebooks.execute import State
from hashattn.reproduce.notebooks.outcome import Outcome

_MAX_ROWS = 100  # rows of a table that are shown; the CSV beside the report has all
_DECIMAL = re.compile(r"-?\d+\.\d+(e[+-]?\d+)?|-?\d+e[+-]?\d+")
_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; overflow-wrap: normal; }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .6rem; text-align: left; }
th { border-bottom: 2px solid #444; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
figcaption, caption { color: #555; font-size: 13px; text-align: left; }
.holds, .met { color: #00664b; } .not-met { color: #a8310c; }
.VIOLATED, .not-judged { color: #a8310c; font-weight: bold; }
.alarm { border: 2px solid #a8310c; color: #a8310c; padding: .2rem 1rem; font-weight: bold; }
.caution { border-left: 4px solid #b26a00; padding: .1rem 1rem; }
@media (max-width: 700px) {
  body { margin: 1rem auto; }
  table, tbody, tr, td, caption { display: block; overflow-wrap: anywhere; }
  tr.head { display: none; }
  tr { border-bottom: 2px solid #444; padding: .4rem 0; }
  td { border: 0; padding: .1rem 0; }
  td:empty { display: none; }
  td::before { content: attr(data-name) ": "; color: #555; }
}
</style></head>
<body>
<h1>{{ title }}</h1>
{% for text in alarms %}<p class="alarm">{{ text }}</p>
{% endfor %}
<h2>What was found</h2>
{% for text in findings %}<p>{{ text }}</p>
{% endfor %}
{% for text in cautions %}<p class="caution">{{ text }}</p>
{% endfor %}
<p>{{ where }} <a href="manifest.json">manifest.json</a> holds everything else.</p>
<h2>Claims</h2>
<p>Claims must hold; goals are met or not. The paper's value is given where it has one.</p>
{% for part in parts if part.claims.rows %}<h3>{{ part.title }}</h3>
{{ grid(part.claims) }}
{% endfor %}
{% for part in parts %}<h2>{{ part.title }}</h2>
<p><a href="{{ part.link }}">executed notebook</a>, {{ part.seconds }} s</p>
{% for image in part.figures %}<figure><img alt="{{ image.caption }}" src="{{ image.source }}">
<figcaption>{{ image.caption }}</figcaption></figure>
{% endfor %}
{% for table in part.tables %}{{ grid(table) }}
{% endfor %}
{% endfor %}
</body></html>
"""
_GRID = """{% macro grid(table) %}<div class="wide"><table>
{% if table.caption %}<caption>{{ table.caption }}{% if table.link %}
(<a href="{{ table.link }}">file</a>){% endif %}</caption>{% endif %}
<tr class="head">{% for name in table.head %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td data-name="{{ table.head[loop.index0] }}"
{%- if cell in marked %} class="{{ cell.replace(' ', '-') }}"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}</table></div>{% endmacro %}"""
_VERDICTS = ("holds", "VIOLATED", "met", "not met", NOT_JUDGED)


@dataclass(frozen=True)
class Grid:
    """A table to show: cells as text, one for each name of the head."""

    head: list[str]
    rows: list[list[str]]
    caption: str = ""
    link: str = ""


@dataclass(frozen=True)
class Image:
    """A figure to show: its caption and itself as a data URL."""

    caption: str
    source: str


@dataclass(frozen=True)
class Part:
    """One notebook: its title in words, claims, figures and tables."""

    title: str
    link: str
    seconds: str
    claims: Grid
    figures: list[Image]
    tables: list[Grid]


def render_report(outcome: Outcome, manifest: dict[str, Any]) -> str:
    """The whole page. Figures and tables are those the notebooks of this run produced."""
    import jinja2

    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return page.from_string(_GRID + _TEMPLATE).render(
        title=f"HashAttention: profile {outcome.profile.name}",
        alarms=_alarms(outcome.claims),
        findings=findings(outcome.claims, outcome.profile.model),
        cautions=outcome.cautions,
        where=_where(outcome, manifest),
        parts=[_part(outcome, name, state) for name, state in outcome.states.items()],
        marked=_VERDICTS,
    )


def _alarms(claims: list[Claim]) -> list[str]:
    """What makes a run fail, in sentences: claims that did not hold, comparisons not judged."""
    sentences = [
        f"Did not hold: {c.claim}: measured {format_value(c.ours)}, must be {c.tolerance}."
        for c in claims
        if c.verdict == VIOLATED
    ]
    for reason, unjudged in not_judged(claims).items():
        names = "; ".join(c.claim for c in unjudged)
        sentences.append(f"Not judged, because {reason}: {names}.")
    return sentences


def findings(claims: list[Claim], model: str) -> list[str]:
    """What a run of a profile's model found, in sentences: how many claims held, the main
    comparisons, goals missed."""
    if not claims:
        return ["No notebook of this run makes a claim."]
    sentences = [f"{tally(claims, model)}."]
    for c in claims:
        if c.main and c.verdict != NOT_JUDGED:
            paper = f"; the paper has {c.paper}" if c.paper else ""
            sentences.append(
                f"{c.claim}: {format_value(c.ours)}, where {c.tolerance} was the goal, which is "
                f"{c.verdict}{paper}."
            )
    missed = [f"{c.claim} ({format_value(c.ours)}, goal {c.tolerance})"
              for c in claims if c.verdict == "not met" and not c.main]  # fmt: skip
    if missed:
        sentences.append(f"Goals that were not met: {'; '.join(missed)}.")
    return sentences


def _where(outcome: Outcome, manifest: dict[str, Any]) -> str:
    """The run in a sentence: model, commit, machines and versions of its kernels, time."""
    git = manifest["git"]
    commit = (git["commit"] or "unknown")[:12] + (" with local changes" if git["dirty"] else "")
    places = dict.fromkeys(_place(known) for known in manifest["environments"].values() if known)
    minutes = sum(manifest["seconds"].values()) / 60
    parts = [f"Model {outcome.profile.model}", f"commit {commit}", *places,
             f"{minutes:.1f} minutes in notebooks", manifest["written"]]  # fmt: skip
    return "; ".join(parts) + "."


def _place(environment: dict[str, Any]) -> str:
    machine, packages = environment["machine"], environment["packages"]
    device = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores"
    return (
        f"{device}, {machine['threads']} threads, Python {environment['python']}, torch "
        f"{packages.get('torch')}, transformers {packages.get('transformers')}"
    )


def _part(outcome: Outcome, notebook: str, state: State) -> Part:
    results = outcome.profile.results
    executed = results / "notebooks" / f"{notebook}.ipynb"
    files = sorted((results / name for name in state.files), key=_age)
    return Part(
        title=_title(executed),
        link=f"notebooks/{notebook}.ipynb",
        seconds=f"{state.seconds:.0f}",
        claims=_claims_grid([c for c in outcome.claims if c.notebook == notebook]),
        figures=[_image(path) for path in files if path.suffix == ".png"],
        tables=[_table(path, results) for path in files if path.suffix == ".csv"],
    )


def _age(path: Path) -> tuple[int, str]:
    """A key that sorts files in the order in which a notebook wrote them."""
    return path.stat().st_mtime_ns, path.name


def _claims_grid(claims: list[Claim]) -> Grid:
    """Verdict, claim, our value, tolerance and the paper's value of each claim."""
    head = ["verdict", "claim", "ours", "tolerance", "paper"]
    rows = [[c.verdict, f"goal: {c.claim}" if c.goal else c.claim, format_value(c.ours),
             c.tolerance, c.paper] for c in claims]  # fmt: skip
    return Grid(head, rows)


def _title(notebook: Path) -> str:
    """The first heading of a notebook, or its name without one."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = ("".join(c["source"]).strip() for c in cells if c["cell_type"] == "markdown")
    heading = next((text for text in texts if text.startswith("# ")), "")
    return heading.partition("\n")[0].removeprefix("# ") or notebook.stem


def caption(stem: str) -> str:
    """A file's name in words: "02_recall_by_length" is "Recall by length"."""
    words = re.sub(r"^\d+_", "", stem).replace("_", " ")
    return words[:1].upper() + words[1:]


def _image(path: Path) -> Image:
    data = base64.b64encode(path.read_bytes()).decode()
    return Image(caption(path.stem), f"data:image/png;base64,{data}")


def _table(path: Path, results: Path) -> Grid:
    """A CSV's first _MAX_ROWS rows, numbers to four significant digits."""
    with open(path, newline="", encoding="utf-8") as file:
        head, *rows = list(csv.reader(file)) or [[]]
    more = f", first {_MAX_ROWS} of {len(rows)} rows" if len(rows) > _MAX_ROWS else ""
    shown = [[short(cell) for cell in row[: len(head)]] for row in rows[:_MAX_ROWS]]
    link = path.relative_to(results).as_posix()
    return Grid(head, shown, caption(path.stem) + more, link)


def short(cell: str) -> str:
    """A decimal number to four significant digits, anything else as it is."""
    if not _DECIMAL.fullmatch(cell):
        return cell
    value = float(cell)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"
