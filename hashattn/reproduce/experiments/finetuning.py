"""Notebook 01's fine-tuning: hashes that learned from plain text, and 25 samples of one task.

The paper's hashes learn from web text, and its 32x claim adds the last 25 samples of each LongBench
dataset. Here the text is the corpus' training paragraphs without any fact or question in them, and
the task one of the generated kinds; a profile with data gives its own records by
`fine_tuning_split`, where it has enough of them. Of what text teaches, most is the spectral start:
three of four layers of the embedded model keep the maps they began with. What is scored shares no
context with what trains.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from hashattn.attention.budget import Budget
from hashattn.base.checks import require_one_of
from hashattn.base.progress import say
from hashattn.evaluation.benchmarks.corpus import paragraphs
from hashattn.evaluation.benchmarks.generated import TASKS, generated_records, make_records
from hashattn.evaluation.benchmarks.longbench import SCORED, TRAINED, fine_tuning_split
from hashattn.evaluation.contamination import benchmarks
from hashattn.evaluation.fine_tuning import fine_tuning_sequences
from hashattn.evaluation.measures.selection import selection_metrics
from hashattn.evaluation.methods import Method
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record, record_from_dict
from hashattn.evaluation.runner import evaluate
from hashattn.evaluation.tables import nothing_at_stake, score_table
from hashattn.hashing.capture import capture
from hashattn.hashing.recipe import TrainRecipe
from hashattn.hashing.train import train_hash_weights
from hashattn.hashing.weights import HashWeights
from hashattn.reproduce.access import data_folder
from hashattn.reproduce.experiments import common as experiments
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import Profile
from hashattn.selectors import make_selector
from hashattn.selectors.hash import HashSelector

USUAL_TASK = "multihop"  # of the generated tasks, where generic hashes lose most
GENERIC, CONTROL, TUNED = "text only", "text, more steps", "text, then the task"
MEASURES = ["recall@4", "recall@32", "heavy_mass", "output_error"]
TEXT_STEPS = 100  # at the fine-tuning rate: at the default's, so few lose what they start with
TEXT_SEED, SCORED_SEED = 4000, 5000
TEXT_ROWS = 32  # every 32nd position of a text is learned from
SPARSITIES = (32, 64, 100)
SHORTER = 2  # generated contexts train at half the scored length: capturing is most of the work
LEAST_HEAVY = 8  # a budget of fewer tokens beside sink and local is not asked
MEASURED = 8  # held-out records whose selections are measured
WHOLE = 10**9  # more records than a dataset has


@dataclass(frozen=True)
class Samples:
    """Records that fine-tune, records of the same task that are scored, and some of other tasks;
    protocol: how they are asked."""

    task: str
    protocol: Protocol
    train: tuple[Record, ...]
    scored: tuple[Record, ...]
    others: tuple[Record, ...]


def samples(profile: Profile, tokenizer, length: int, task: str | None = None) -> Samples:
    """25 records of `task` to fine-tune on (fewer where the profile trains on few sequences), and
    profile.samples_per_task to score. None: USUAL_TASK where the profile has it, else its first
    with enough records, else USUAL_TASK's generated ones.

    Generated records train on the training split at half the length and score on the other: no fact
    line or paragraph is in both. A profile's own data is split as the paper does, at the same 1 to
    7 where a task has fewer than 200 records; scored records whose context trains too are left out.
    ValueError for a `task` that the profile does not have, or one with too few records to be split.
    """
    if task is not None:
        require_one_of("task", task, profile.tasks)
    usual = sorted(profile.tasks, key=lambda name: name != USUAL_TASK)
    if data_folder(profile) is None:
        return _generated(profile, tokenizer, task or usual[0], length)
    for name in [task] if task else usual:
        try:
            return _own(profile, tokenizer, name, length)
        except _TooFewError:
            if task:
                raise
    say(f"no task of {profile.data} has records enough to fine-tune on: {USUAL_TASK} is generated")
    generated = replace(
        profile, data=None, benchmark="generated", prompt_limit=None, tasks=TASKS,
        template=Profile.template, metric=Profile.metric,
    )  # fmt: skip
    return _generated(generated, tokenizer, USUAL_TASK, length)


class _TooFewError(ValueError):
    """A task has not enough records to be split."""


def _own(profile: Profile, tokenizer, task: str, length: int) -> Samples:
    """Samples of the profile's own data."""
    found = experiments.records(replace(profile, tasks=(task,)), tokenizer, length, WHOLE)
    trained = min(TRAINED, max(2, len(found) * TRAINED // (TRAINED + SCORED)))
    split = fine_tuning_split(found, trained, min(SCORED, max(0, len(found) - trained)))
    scored = [r for r in split.score if r not in split.shared_contexts]
    if not split.train or not scored:
        raise _TooFewError(
            f"task = {task!r} has {len(found)} records, too few to train on some and score others "
            "of other contexts: use another task"
        )
    rest = tuple(other for other in profile.tasks if other != task)
    others = experiments.records(replace(profile, tasks=rest), tokenizer, length) if rest else []
    return Samples(
        task, experiments.protocol(profile, length), split.train,
        tuple(scored[: profile.samples_per_task]), _spread(others),
    )  # fmt: skip


def _generated(profile: Profile, tokenizer, task: str, length: int) -> Samples:
    seed = profile.seed + SCORED_SEED
    count = min(TRAINED, 4 * profile.training.sequences)
    training = make_records(tokenizer, length // SHORTER, count, seed=seed,
                            split="train", questions_per_task=1)  # fmt: skip
    train = tuple(record_from_dict(r) for r in training if r["dataset"] == task)
    held_out = generated_records(tokenizer, length, profile.samples_per_task, seed=seed)
    scored = tuple(r for r in held_out if r.dataset == task)
    others = [r for r in held_out if r.dataset != task]
    protocol = experiments.protocol(profile, length)
    return Samples(task, protocol, train, scored, _spread(others))


def _spread(records: list[Record]) -> tuple[Record, ...]:
    """At most MEASURED records, as many of each dataset as they divide into."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.dataset, []).append(record)
    each = max(1, MEASURED // max(1, len(groups)))
    return tuple(record for group in groups.values() for record in group[:each])[:MEASURED]


def text_sequences(
    tokenizer, length: int, count: int, *, split: str = "train", seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """(token ids, rows) of `count` runs of `length` tokens of the corpus' paragraphs alone; rows
    are every TEXT_ROWS-th position. Half are as long, a quarter each a half and a quarter of it."""
    found, prose = [], paragraphs(split)
    for number in range(count):
        share = (1, 2, 1, 4)[number % 4]
        drawn = random.Random(f"text/{split}/{length}/{seed}/{number}")
        ids = tokenizer("")["input_ids"]
        while len(ids) < length // share:
            line = drawn.choice(prose) + "\n"
            ids = ids + tokenizer(line, add_special_tokens=False)["input_ids"]
        rows = torch.arange(TEXT_ROWS - 1, length // share, TEXT_ROWS)
        found.append((torch.tensor(ids[: length // share]), rows))
    return found


def train(
    profile: Profile, model, tokenizer, made: Samples, length: int, progress: bool = True
) -> dict[str, HashWeights]:
    """Weights by name: GENERIC learned from text alone; CONTROL from as many steps more of the same
    text as fine-tuning takes; TUNED from GENERIC and the task's samples.

    Under <results>/hash_training/finetuning; finished layers found there are reused.
    """
    asked = profile.training
    folder = profile.results / "hash_training" / "finetuning"
    shape = {"layout": asked.layout, "bits": asked.bits, "depth": asked.depth,
             "hidden": asked.hidden}  # fmt: skip
    count = max(4, asked.sequences // 4)
    longest = length // SHORTER
    text = text_sequences(tokenizer, longest, count, seed=TEXT_SEED)
    held_out = text_sequences(tokenizer, longest, 2, seed=TEXT_SEED + 1)
    tuning = fine_tuning_sequences(made.train, made.protocol, tokenizer)

    def trained(name: str, recipe: TrainRecipe, sequences, validation=None, start=None, note="",
                records=()):  # fmt: skip
        steps = min(recipe.steps, asked.steps or recipe.steps)
        return train_hash_weights(
            model, sequences, recipe.vary(sink=profile.sink, local=profile.local, steps=steps),
            validation=validation, start=start, seed=profile.seed, data_note=note,
            benchmarks=benchmarks(records), out_dir=folder / name,
            capture_dir=folder / "captured", progress=progress, **shape,
        )  # fmt: skip

    plain = "paragraphs of the corpus, training split, no task"
    tune = TrainRecipe.fine_tuning()
    generic = trained("generic", tune.vary(steps=TEXT_STEPS), text, held_out, note=plain)
    control = trained("control", tune, text, held_out, generic, plain)
    note = f"{len(made.train)} samples of {made.task}; scored ones share no context with them"
    tuned = trained("tuned", tune, tuning, None, generic, note, made.train)
    return {GENERIC: generic, CONTROL: control, TUNED: tuned}


def selection(
    profile: Profile, model, tokenizer, weights: Mapping[str, HashWeights], made: Samples,
    length: int, fraction: int = 128,
) -> pd.DataFrame:  # fmt: skip
    """MEASURES at a heavy budget of length / fraction by (what is asked, weights): held-out samples
    of the task, of other tasks, and text. The oracle bounds them all."""
    asked = {
        made.task: fine_tuning_sequences(made.scored[:MEASURED], made.protocol, tokenizer),
        "other tasks": fine_tuning_sequences(made.others, made.protocol, tokenizer),
        "text": text_sequences(tokenizer, length, 1, split="eval", seed=TEXT_SEED),
    }
    chosen = _selectors(weights)
    tables = {}
    for name, sequences in ((name, part) for name, part in asked.items() if part):
        captured = (c for ids, rows in sequences
                    for c in capture(model, ids, rows=rows, values=True).values())  # fmt: skip
        found = selection_metrics(
            captured, chosen, [length // fraction], profile.sink, profile.local
        )
        tables[name] = pd.DataFrame(found).groupby("method", sort=False)[MEASURES].mean()
    return pd.concat(tables, names=["asked", "method"])


def answers(
    profile: Profile, model, tokenizer, weights: Mapping[str, HashWeights], made: Samples,
    length: int, progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Points on the task's held-out samples by method and sparsity (SPARSITIES), question and
    answer sparse. Results resume in <results>/records."""
    least = profile.sink + profile.local + LEAST_HEAVY
    budgets = [Budget(profile.sink, profile.local, density=1 / s)
               for s in SPARSITIES if length // s >= least]  # fmt: skip
    methods = [Method("dense")] + [
        Method(name, selector, budget)
        for name, selector in _selectors(weights).items()
        for budget in budgets
    ]
    frame = evaluate(
        model, tokenizer, made.scored, methods, made.protocol,
        profile.results / "records" / "finetuning.jsonl", progress=progress, setups="B",
    )  # fmt: skip
    return score_table(frame)


def fine_tuning_claims(
    claims: Claims, caught: pd.DataFrame, points: pd.DataFrame, task: str
) -> None:
    """What notebook 01 claims of `selection`'s and `answers`' tables."""
    mass = caught["heavy_mass"].unstack("method")
    what = "attention mass caught on held-out samples of the task (ratio)"
    claims.goal(f"fine-tuned / text only: {what}",
                mass[TUNED][task] / mass[GENERIC][task], low=1)  # fmt: skip
    claims.goal(f"fine-tuned / as many steps more on text: {what}",
                mass[TUNED][task] / mass[CONTROL][task], low=1)  # fmt: skip
    for asked, low in (("other tasks", 0.98), ("text", 0.95)):
        if asked in mass.index:
            claims.goal(f"fine-tuned / text only: attention mass caught on {asked} (ratio)",
                        mass[TUNED][asked] / mass[GENERIC][asked], low=low)  # fmt: skip
    if "32x" in points:
        claims.goal("fine-tuned on 25 samples, at 32x minus dense (points)",
                    points["32x"][TUNED] - points["dense"]["dense"], low=-1,
                    paper="full quality, Figure 3",
                    unjudged=nothing_at_stake(points))  # fmt: skip
    if "cut" in points.attrs:
        claims.caution(f"samples of {task}: {points.attrs['cut']}")


def _selectors(weights: Mapping[str, HashWeights]) -> dict:
    found = {name: HashSelector.as_trained(made) for name, made in weights.items()}
    return {"oracle": make_selector("oracle")} | found
