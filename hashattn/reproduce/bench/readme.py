"""The README's tables of speed, from the stored results: `python -m hashattn.reproduce.bench
readme`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hashattn.reproduce.bench import gpu_model, llamacpp, quality, tables
from hashattn.reproduce.bench.reference import label
from hashattn.reproduce.bench.ways import DEFAULT

_LENGTHS = (1024, 4096, 32768, 131072)
_SHOWN = (DEFAULT, "default_kv_lists")
_DTYPE = "bfloat16"


def sections(record: dict[str, Any]) -> Iterable[str]:
    """Markdown: where it was measured, a layer's step, its fixed cost, speed beside quality, whole
    models, llama.cpp beside ours, and the model of a GPU."""
    rows = record["layer"]
    yield label(record)
    for threads in sorted({row["threads"] for row in rows}):
        yield f"{threads} thread(s)\n\n{_layer(rows, threads)}"
    yield _costs(rows)
    yield _beside_quality(rows)
    if record["models"]:
        yield _models(record["models"])
    yield record["llamacpp_note"]
    if record["llamacpp"]:
        yield _beside_llamacpp(record["llamacpp"])
        yield llamacpp.verdict(record["llamacpp"])
    yield "a GPU, by the model\n\n" + gpu_model.paragraph()


def _layer(rows: Iterable[dict[str, Any]], threads: int) -> str:
    """Milliseconds of a step and speed-ups, by cached tokens."""
    table = tables.speedups(rows).xs((threads, _DTYPE), level=["threads", "dtype"])
    heads = ["cached tokens", "torch's fastest dense call", "our dense step"]
    for name in _SHOWN:
        heads += [name, "over torch", "over ours"]
    lines = []
    for n in (n for n in _LENGTHS if n in table.index):
        line = table.loc[n]
        cells = [_tokens(n), _ms(line["torch ms"]), _ms(line["dense ms"])]
        for name in _SHOWN:
            ratios = [f"{line[f'{name} / {peer}']:.1f}" for peer in ("torch", "dense")]
            cells += [_ms(line[f"{name} ms"]), *ratios]
        lines.append(cells)
    return _table(heads, lines)


def _costs(rows: Iterable[dict[str, Any]]) -> str:
    """What a step costs at any length, one thread."""
    table = tables.fixed_costs(rows)
    lines = [
        [name, _ms(line["a ms"]), f"{line['b us/1K']:.1f}", _ms(line["ms"]), f"{line['MB']:.1f}",
         _ms(line["roofline ms"]), f"{line['below dense from']:.0f}"]
        for name, line in table.loc[1, _DTYPE].iterrows()
    ]  # fmt: skip
    heads = ["", "a", "b, us a 1K tokens", "step at the shortest", "MB read", "reading these",
             "below our dense step from"]  # fmt: skip
    return _table(heads, lines)


def _beside_quality(rows: Iterable[dict[str, Any]]) -> str:
    """Speed-ups beside output errors."""
    table = tables.equal_quality(rows, quality.stored())
    heads = ["", *(" ".join(map(str, column)) for column in table.columns)]
    lines = []
    for name, line in table.iterrows():
        speeds, errors = (
            [_number(value, digits) for column, value in line.items() if ("over" in column[1]) == s]
            for s, digits in ((True, 1), (False, 3))
        )
        lines.append([name, *speeds, *errors])
    return _table(heads, lines)


def _models(rows: Iterable[dict[str, Any]]) -> str:
    """Whole models through generate: ms a token, speed-up over our dense kernel."""
    table = tables.models(rows)
    lines = [
        [model, str(threads), _tokens(n), variant, f"{line['ms']:.1f}", f"{line['speed-up']:.2f}",
         f"{line['attention_share']:.2f}"]
        for (model, threads, n, variant), line in table.iterrows()
    ]  # fmt: skip
    heads = ["model", "threads", "cached", "attention", "ms a token", "over dense", "its share"]
    return _table(heads, lines)


def _beside_llamacpp(rows: Sequence[dict[str, Any]]) -> str:
    """Milliseconds a token by cached tokens, and the fits."""
    times, fits = llamacpp.times(rows), llamacpp.costs(rows)
    heads = ["", "threads", *map(_tokens, times.columns), "a, ms", "b, us", "llama.cpp's b over it"]
    lines = []
    for (threads, engine), fit in fits.iterrows():
        measured = [f"{value:.0f}" for value in times.loc[threads, engine]]
        numbers = [_number(fit[name], 1) for name in ("a ms", "b us, far", heads[-1])]
        lines.append([engine, str(threads), *measured, *numbers])
    return _table(heads, lines)


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))


def _tokens(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}"


def _ms(value: float) -> str:
    return f"{value:.{1 if value >= 10 else 2}f} ms"


def _number(value: float, digits: int) -> str:
    return "not measured" if value != value else f"{value:.{digits}f}"
