"""report.html: the claims, figures and tables of a run in one file that opens without a network."""

from __future__ import annotations

import base64
import csv
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hashattn.reproduce.claims import Claim, format_value

if TYPE_CHECKING:
    from hashattn.reproduce.driver import Outcome

MAX_ROWS = 100  # rows of a table that are shown; the CSV beside the report has all
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
table { display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .6rem; text-align: left; }
th { border-bottom: 2px solid #444; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } figcaption { color: #555; font-size: 13px; }
.holds, .met { color: #00664b; } .VIOLATED { color: #a8310c; font-weight: bold; }
.not-met { color: #a8310c; }
"""


def render_report(outcome: Outcome, manifest: dict[str, Any]) -> str:
    """The whole page. Figures and tables are those the notebooks of this run produced."""
    results = outcome.profile.results
    sections = [_heading(outcome, manifest), "<h2>Claims</h2>", claims_table(outcome.claims)]
    for notebook, state in outcome.states.items():
        files = sorted(results / name for name in state.files)
        sections.append(
            f'<h2>{escape(notebook)}</h2><p><a href="notebooks/{escape(notebook)}.ipynb">executed '
            f"notebook</a>, {state.seconds:.0f} s</p>"
        )
        sections += [figure(path) for path in files if path.suffix == ".png"]
        sections += [table(path, results) for path in files if path.suffix == ".csv"]
    title = f"HashAttention, profile {escape(outcome.profile.name)}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _heading(outcome: Outcome, manifest: dict[str, Any]) -> str:
    git, machine = manifest["git"], manifest["machine"]
    commit = (git["commit"] or "unknown")[:12] + (" with local changes" if git["dirty"] else "")
    device = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores"
    minutes = sum(manifest["seconds"].values()) / 60
    return (
        f"<h1>HashAttention: profile {escape(outcome.profile.name)}</h1>"
        f"<p>Model {escape(outcome.profile.model)}; commit {escape(commit)}; {escape(device)}; "
        f"Python {manifest['python']}, torch {manifest['packages'].get('torch')}, transformers "
        f"{manifest['packages'].get('transformers')}; {minutes:.1f} minutes in notebooks; "
        f'{escape(manifest["written"])}. Everything else: <a href="manifest.json">manifest.json'
        "</a>.</p>"
    )


def claims_table(claims: list[Claim]) -> str:
    """Claim, paper's value, ours, tolerance, verdict and the notebook that measured it."""
    rows = []
    for c in claims:
        link = f'<a href="notebooks/{escape(c.notebook)}.ipynb">{escape(c.notebook)}</a>'
        name = "goal: " + c.claim if c.goal else c.claim
        cells = [name, c.paper, format_value(c.ours), c.tolerance]
        verdict = f'<td class="{c.verdict.replace(" ", "-")}">{escape(c.verdict)}</td>'
        rows.append("".join(f"<td>{escape(x)}</td>" for x in cells) + verdict + f"<td>{link}</td>")
    head = ("claim", "paper", "ours", "tolerance", "verdict", "notebook")
    return _table(head, rows)


def figure(path: Path) -> str:
    """A PNG, embedded, with its name."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(path.stem)}</figcaption></figure>"
    )


def table(path: Path, results: Path) -> str:
    """A CSV as a table, its first rows if it is long, with a link to the file."""
    with open(path, newline="", encoding="utf-8") as file:
        head, *rows = list(csv.reader(file)) or [[]]
    shown = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows[:MAX_ROWS]]
    link = escape(path.relative_to(results).as_posix())
    more = f", first {MAX_ROWS} of {len(rows)} rows" if len(rows) > MAX_ROWS else ""
    return f'<h3><a href="{link}">{escape(path.stem)}</a>{more}</h3>' + _table(head, shown)


def _table(head: tuple[str, ...] | list[str], rows: list[str]) -> str:
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<table><tr>{names}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
