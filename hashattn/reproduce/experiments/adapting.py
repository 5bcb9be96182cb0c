"""Notebook 05: hash weights adapted to another domain, beside those trained on it alone."""

from __future__ import annotations

import random
import resource
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from hashattn.evaluation.benchmarks.texts import EVAL, TRAIN, documents
from hashattn.evaluation.measures.selection import selection_metrics
from hashattn.hashing.capture import CapturedLayer
from hashattn.hashing.train import train_hash_weights
from hashattn.hashing.weights import HashWeights
from hashattn.reproduce.experiments.common import sequences
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import Profile
from hashattn.selectors import HashSelector
from hashattn.trust.retraining.adapt import AdaptSettings, adapt, recipe_of
from hashattn.trust.retraining.captures import captured_tokens, text_sequences
from hashattn.trust.retraining.versions import LINEAGE, Versions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEFORE, ADAPTED, ALONE = "before", "adapted", "trained on it alone"
_DOMAINS = {"minutes_ja": "Japanese", "code": "source code"}  # kinds of text, and what they are
_OLD_SEED, _TEST_SEED = 3000, 9000  # of generated tasks, which no other experiment draws
_COLORS = {BEFORE: "#999999", ADAPTED: "#0072b2", ALONE: "#d55e00"}
_Tokens = list[tuple[Tensor, Tensor]]  # ids (n,) and positions of queries (rows,)


@dataclass(frozen=True)
class AdaptScale:
    """How much is learned from and measured on.

    length: tokens of every sequence. sequences: of the new domain, a quarter of them held out;
    replay: of the old one. rows: queries of each. steps: of adapting; alone: of the training on the
    new domain alone, with the weights' own recipe, on the same sequences. tested: other sequences
    of each domain that recall is measured on. seed: of both trainings.
    """

    length: int = 2048
    sequences: int = 16
    replay: int = 10
    rows: int = 192
    steps: int = 100
    alone: int = 300
    tested: int = 6
    seed: int = 0


BRIEF = AdaptScale(sequences=8, replay=5, steps=50, alone=100, tested=3)  # a notebook's: a minute
_LEAST = AdaptScale(length=512, sequences=4, replay=2, rows=24, steps=2, alone=2, tested=1)


def scale_of(profile: Profile) -> AdaptScale:
    """BRIEF, or as little as runs at all where a profile trains on few sequences."""
    return BRIEF if profile.training.sequences >= 8 else _LEAST


def adaptations(
    profile: Profile, model, tokenizer, weights: HashWeights,
    domains: Iterable[str] = tuple(_DOMAINS), scale: AdaptScale | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Of each domain (a kind of text, evaluation.benchmarks.texts) and of `weights` as they are,
    adapted to it and trained on it alone: recall@32 on held-out sequences of the domain (`new`) and
    of the profile's own (`old`), a line each.

    Recall is the mean over layers, query heads and rows, with density 1 / 32 of the length, sink
    and local included (or as many heavy tokens beside them, where that leaves none). cpu_seconds:
    of all processes, the captures of the sequences included; seconds: of the wall clock. Versions
    are written under <results>/adapting, anew.
    """
    scale, lines = scale or AdaptScale(), []
    replay = _old(profile, tokenizer, scale, scale.replay, TRAIN, _OLD_SEED)
    tested = _layers(model, _old(profile, tokenizer, scale, scale.tested, EVAL, _TEST_SEED))
    for domain in domains:
        made = _new(tokenizer, domain, scale, scale.sequences, TRAIN)
        test = {"new": _layers(model, _new(tokenizer, domain, scale, scale.tested, EVAL)),
                "old": tested}  # fmt: skip
        folder = _folder(profile, domain)
        shutil.rmtree(folder, ignore_errors=True)
        found: dict[str, HashWeights] = {BEFORE: weights}
        costs: dict[str, dict[str, float]] = {BEFORE: {}}
        clock = _Clock()
        found[ADAPTED] = _adapted(model, weights, made, replay, scale, folder, domain)
        costs[ADAPTED], clock = clock.spent(), _Clock()
        found[ALONE] = _alone(model, weights, made, scale, folder)
        costs[ALONE] = clock.spent()
        for name, hashes in found.items():
            recall = {
                part: _recall(hashes, layers, profile, scale) for part, layers in test.items()
            }
            lines.append({"domain": domain, "weights": name, **recall, **costs[name]})
    return pd.DataFrame(lines)


def closed(table: pd.DataFrame) -> pd.DataFrame:
    """By domain, of `adaptations`: the share of the gap between `weights` as they were and those
    trained on the domain alone that adapting closes, what recall on the old domain fell by, and
    what adapting took."""
    wide = table.set_index(["domain", "weights"]).unstack()
    gap = wide["new"][ALONE] - wide["new"][BEFORE]
    return pd.DataFrame({
        "gap": gap,
        "closed": (wide["new"][ADAPTED] - wide["new"][BEFORE]) / gap,
        "old_lost": wide["old"][BEFORE] - wide["old"][ADAPTED],
        "cpu_seconds": wide["cpu_seconds"][ADAPTED],
    })  # fmt: skip


def version_table(profile: Profile, domain: str) -> pd.DataFrame:
    """The versions that `adaptations` wrote for a domain: which is in use, what each was made from,
    and which layers got new maps."""
    rows = []
    for version in Versions(_folder(profile, domain) / "versions").records():
        lineage = version[LINEAGE] or {"parent_version": None, "layers": []}
        rows.append({
            "version": version["name"], "in use": version["current"],
            "made from": lineage["parent_version"], "layers with new maps": lineage["layers"],
        })  # fmt: skip
    return pd.DataFrame(rows).set_index("version")


def adapting_claims(claims: Claims, shares: pd.DataFrame) -> None:
    """What notebook 05 claims about the table of `closed`."""
    for domain, row in shares.iterrows():
        name = _DOMAINS.get(domain, domain)
        claims.goal(f"{name}: share of the gap to hashes trained on it alone that adapting closes",
                    row["closed"], low=0.8)  # fmt: skip
        claims.goal(f"{name}: recall@32 lost on the old domain (points)",
                    100 * row["old_lost"], high=2.0)  # fmt: skip
        claims.goal(f"{name}: CPU seconds of adapting", row["cpu_seconds"], high=180)


def recall_bars(axis: Axes, table: pd.DataFrame) -> None:
    """recall@32 of `adaptations`: a group of bars for each domain, and for the old one after each
    adaptation."""
    names = list(_COLORS)
    groups = [(domain, part) for domain in dict.fromkeys(table["domain"])
              for part in ("new", "old")]  # fmt: skip
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        rows = table[table["weights"] == name].set_index("domain")
        heights = [rows.loc[domain, part] for domain, part in groups]
        places = [place + (number - 1) * width for place in range(len(groups))]
        axis.bar(places, heights, width, color=_COLORS[name], label=name)
    labels = [_DOMAINS.get(d, d) if part == "new" else f"tasks,\nadapted to\n{_DOMAINS.get(d, d)}"
              for d, part in groups]  # fmt: skip
    axis.set_xticks(range(len(groups)), labels)
    axis.set(ylabel="recall@32, held-out sequences")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _folder(profile: Profile, domain: str) -> Path:
    return profile.results / "adapting" / domain


def _new(tokenizer, domain: str, scale: AdaptScale, count: int, split: str) -> _Tokens:
    made = documents(tokenizer, domain, scale.length, count, split)
    return text_sequences(tokenizer, made, scale.length, scale.rows, scale.seed)


def _old(
    profile: Profile, tokenizer, scale: AdaptScale, count: int, split: str, seed: int
) -> _Tokens:
    """Sequences of the profile's own domain, `rows` of their queries each."""
    made = sequences(profile, tokenizer, count, length=scale.length, split=split, seed=seed)
    draw = random.Random(f"{split}/{seed}")
    return [
        (ids, torch.tensor(sorted(draw.sample(rows.tolist(), min(scale.rows, len(rows))))))
        for ids, rows in made
    ]


def _layers(model, tokens: _Tokens) -> list[CapturedLayer]:
    return [layer for sequence in captured_tokens(model, tokens) for layer in sequence.values()]


def _adapted(
    model, weights: HashWeights, made: _Tokens, replay: _Tokens, scale: AdaptScale, folder: Path,
    domain: str,
) -> HashWeights:  # fmt: skip
    return adapt(
        model,
        Versions.begin(folder / "versions", weights),
        captured_tokens(model, made),
        replay=captured_tokens(model, replay),
        settings=AdaptSettings(steps=scale.steps, seed=scale.seed),
        note=f"{domain}, training split; replayed: the profile's own",
        progress=False,
    ).weights


def _alone(
    model, weights: HashWeights, made: _Tokens, scale: AdaptScale, folder: Path
) -> HashWeights:
    """Of the shape and by the recipe of `weights`, from nothing, on the sequences that adapting
    trains on."""
    config = weights.config
    held_out = made[3::4] or made[-1:]
    return train_hash_weights(
        model,
        [sequence for sequence in made if all(sequence is not other for other in held_out)],
        recipe_of(weights).vary(steps=scale.alone),
        validation=held_out,
        out_dir=folder / "alone",
        layout=config.layout, bits=config.bits, depth=config.depth, hidden=config.hidden,
        activation=config.activation, folds=config.folds, layers=config.layers, seed=scale.seed,
        progress=False,
    )  # fmt: skip


def _recall(
    weights: HashWeights, layers: list[CapturedLayer], profile: Profile, scale: AdaptScale
) -> float:
    window = profile.sink + profile.local
    heavy = scale.length // 32 - window
    heavy = heavy if heavy > 0 else scale.length // 32
    rows = selection_metrics(layers, {"hash": HashSelector.as_trained(weights)}, [heavy],
                             profile.sink, profile.local)  # fmt: skip
    return sum(row["recall@32"] for row in rows) / len(rows)


class _Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._cpu, self._wall = _cpu(), time.perf_counter()

    def spent(self) -> dict[str, float]:
        """Of all processes, and of the wall clock."""
        return {"cpu_seconds": _cpu() - self._cpu, "seconds": time.perf_counter() - self._wall}


def _cpu() -> float:
    """Seconds that this process and those that it started and awaited have computed."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in used)
