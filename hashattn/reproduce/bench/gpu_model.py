"""What a decode step of one layer should take on a GPU: arithmetic, for where none has run it.

A model, no measurement. Dense attention streams K and V at a share of the card's peak. A sparse
step scores every key once and keeps the level of each, a byte, for the passes that follow: it
streams codes and levels or, if that takes longer, issues the instructions for them, then gathers
rows at a lower share; every kernel of a CUDA graph adds a fixed time. Left out: the ends of the
kernels' loops, their serial tails, and the encoding's latency, so that short contexts take longer.
`python -m hashattn.reproduce.bench model` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hashattn.base.files import read_json
from hashattn.base.repository import repository
from hashattn.reproduce.bench.ways import WAYS, Shape, Way

STREAMED, GATHERED = 0.9, 0.75  # of the peak
_KERNEL_US = 2.5  # of each dependent kernel in a CUDA graph
_DENSE_LAUNCHES = 2
LANES = 64  # that a multiprocessor issues instructions for in a clock, over its 4 schedulers
CONTEXTS = (32768, 131072, 1048576)
_MODELLED = ("default", "default_kv_lists", "paper", "paper_kv_lists")
_ITEM = 2  # bytes of bfloat16


@dataclass(frozen=True)
class Card:
    """A GPU: bytes a second at its peak, bytes of its second-level cache that levels may fill,
    multiprocessors, and their clock in hertz."""

    peak: float
    cache: float = 40e6
    multiprocessors: int = 132
    clock: float = 1.755e9

    @property
    def slots(self) -> float:
        """Issue slots of a lane a second."""
        return LANES * self.multiprocessors * self.clock


CARDS = {"H100": Card(3.35e12), "H200": Card(4.8e12)}
_LISTING = 8.0  # issue slots a key of listing by stored levels: assumed, the gate counts none
# issue slots a key that finding the threshold may take on sm_90 (the gate's limits; of matching
# bits, where it has none, as counted before); a list of matching bits for a group scores its heads
SLOTS = {"default": 30.0, "default_kv_lists": 30.0, "paper": 13.0, "paper_kv_lists": 29.2}


def launches(way: Way) -> int:
    """Kernels of a step: encode and append, count and plan, compact, attend and merge; where there
    are many levels also the threshold's second digit."""
    return 5 if _many_levels(way) else 4


def _many_levels(way: Way) -> bool:
    """Of graded bits, and of matching bits summed over the heads of a group."""
    return way.grades is not None or way.layout == "per_kv_head"


def predict(
    card: Card, way: Way, n: int, slots: float, shape: Shape | None = None
) -> dict[str, float]:
    """Megabytes and microseconds of one layer's step with n cached tokens, batch 1, bfloat16,
    n / 32 + 256 tokens read by each list.

    slots: issue slots a key of finding a list's threshold. floor us: its bytes once, at the peak.
    """
    shape = shape or Shape()
    row = 2 * shape.head_dim * _ITEM
    dense = n * shape.kv_heads * row
    codes, lists = n * shape.kv_heads * way.bits / 8, way.lists(shape)
    rows = min(n, n // 32 + 256) * lists * row
    passes = 3 if _many_levels(way) else 2  # written, read for a second digit, and to list
    levels = n * lists * passes if n * lists > card.cache else 0
    dense_us = dense / card.peak / STREAMED * 1e6 + _DENSE_LAUNCHES * _KERNEL_US
    reading = (codes + levels) / card.peak / STREAMED * 1e6
    issuing = n * lists * (slots + _LISTING) / card.slots * 1e6
    gathering = rows / card.peak / GATHERED * 1e6
    us = max(reading, issuing) + gathering + launches(way) * _KERNEL_US
    return {
        "launches": launches(way), "codes MB": codes / 1e6, "rows MB": rows / 1e6, "slots": slots,
        "select us": max(reading, issuing), "gather us": gathering,
        "floor us": (codes + rows) / card.peak * 1e6, "us": us, "dense MB": dense / 1e6,
        "dense us": dense_us, "dense / sparse": dense_us / us,
    }  # fmt: skip


def table(slots: Mapping[str, float] | None = None) -> pd.DataFrame:
    """`predict` on CARDS over CONTEXTS; slots: a key, by way, default `known_slots`."""
    slots = known_slots() if slots is None else slots
    lines = {
        (card, n, name): predict(CARDS[card], WAYS[name], n, slots[name])
        for card in CARDS
        for n in CONTEXTS
        for name in _MODELLED
    }
    return pd.DataFrame(lines).T.rename_axis(["card", "n", "variant"])


def known_slots(report: Mapping[str, Any] | None = None) -> dict[str, float]:
    """SLOTS, with what the compile gate counted on sm_90 in their place where it did; report:
    default data/reference/triton_gate.json."""
    if report is None:
        path = repository() / "data" / "reference" / "triton_gate.json"
        report = read_json(path) if path.is_file() else {}
    counted = [build for build in report.get("builds", ()) if build.get("slots")]
    found = {}
    for name in SLOTS:
        way = WAYS[name]
        shared = 1 if way.grades or way.layout == "per_query_head" else Shape().group
        words = way.bits // 32
        planes = way.grades.planes if way.grades else 0
        wanted = {f"GROUP={shared}", f"WORDS={words}", f"QUERY_WORDS={words * (1 + planes)}"}
        score = _counted(counted, "histogram_kernel", wanted)
        digit = _counted(counted, "refine_kernel", {"PACK=4"}) if _many_levels(way) else 0.0
        if score is not None and digit is not None:
            found[name] = score + digit
    return SLOTS | found


def _counted(builds: Iterable[Mapping[str, Any]], kernel: str, wanted: set[str]) -> float | None:
    """Slots a key in the loop over whole chunks of the dearest such build; None without one."""
    found = [
        build["slots"][0]
        for build in builds
        if build["architecture"] == "sm_90"
        and build["name"].split()[0] == kernel
        and wanted <= set(build["name"].split())
    ]
    return max(found, default=None)


def paragraph(predicted: pd.DataFrame | None = None) -> str:
    """A Markdown table of the README: predicted microseconds, and times dense in brackets."""
    predicted = table() if predicted is None else predicted
    places = [(card, n) for card in CARDS for n in CONTEXTS]
    heads = [f"{card}, {n // 1024}K" for card, n in places]
    dense = [predicted.loc[(*place, _MODELLED[0]), "dense us"] for place in places]
    cells = {"dense": [f"{us:.0f}" for us in dense]}
    for name in _MODELLED:
        own = [predicted.loc[(*place, name)] for place in places]
        cells[name] = [f"{line['us']:.0f} ({line['dense / sparse']:.1f}x)" for line in own]
    lines = [f"| us a layer and step | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(part)} |" for name, part in cells.items()]
    return "\n".join(lines)
