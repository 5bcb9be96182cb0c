"""Notebook 01's fine-tuning: hashes that learned from plain text, then from 25 samples of a task.

The paper's hashes learn from web text, and its 32x claim adds the last 25 samples of each LongBench
dataset. Here the text is the corpus' training paragraphs, without facts or questions, and the task
one of the generated kinds, or of the profile's own data where a task has records enough for
`fine_tuning_split`. Most of what text teaches is the spectral start: three of four layers of the
embedded model keep their initial maps. Scored records share no context with training.
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
from hashattn.evaluation.benchmarks.registry import BENCHMARKS
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

_USUAL_TASK = "multihop"  # the generated task where generic hashes lose most
GENERIC, CONTROL, TUNED = "text only", "text, more steps", "text, then the task"
MEASURES = ["recall@4", "recall@32", "heavy_mass", "output_error"]
_TEXT_STEPS = 100  # at fine-tuning's rate: at the default's, so few undo the spectral start
TEXT_SEED, SCORED_SEED = 4000, 5000
_TEXT_ROWS = 32  # every 32nd position of a text is a training query
_SPARSITIES = (32, 64, 100)
_SHORTER = 2  # generated contexts train at half the scored length: capturing is most of the work
_LEAST_HEAVY = 8  # budgets of fewer tokens beside sink and local are left out
_MEASURED = 8  # held-out records whose selections are measured
WHOLE = 10**9  # more records than any dataset has: all of them


@dataclass(frozen=True)
class Samples:
    """Records of a task to train on and others of it to score, some of other tasks, and how all are
    asked (protocol)."""

    task: str
    protocol: Protocol
    train: tuple[Record, ...]
    scored: tuple[Record, ...]
    others: tuple[Record, ...]


def samples(profile: Profile, tokenizer, length: int, task: str | None = None) -> Samples:
    """25 records of `task` to fine-tune on (fewer where the profile trains on few sequences), and
    profile.samples_per_task to score. None: _USUAL_TASK if the profile has it, else its first task
    with enough records, else generated records of _USUAL_TASK.

    Generated training records are half as long and from the training split, which shares no fact
    line or paragraph with the scored one. Those of a benchmark that is drawn (RULER, packages) are
    half as long too, drawn by another seed, and ask nothing that is scored. A profile's own data is
    split as the paper does, or at the same 1 to 7 where a task has fewer than 200 records; scored
    records whose context is also trained on are left out.
    ValueError for a `task` that is not the profile's, or that has too few records to split.
    """
    if task is not None:
        require_one_of("task", task, profile.tasks)
    usual = sorted(profile.tasks, key=lambda name: name != _USUAL_TASK)
    if BENCHMARKS[profile.benchmark].drawn:
        return _drawn(profile, tokenizer, task or usual[0], length)
    if profile.benchmark == "generated":
        return _generated(profile, tokenizer, task or usual[0], length)
    own = [] if data_folder(profile) is None else [task] if task else usual
    for name in own:
        try:
            return _split(profile, tokenizer, name, length)
        except _TooFewError:
            if task:
                raise
    source = profile.data or f"benchmark {profile.benchmark!r}"
    say(f"no task of {source} has enough records to fine-tune on: {_USUAL_TASK} is generated")
    generated = replace(
        profile, data=None, benchmark="generated", prompt_limit=None, tasks=TASKS,
        template=Profile.template, metric=Profile.metric,
    )  # fmt: skip
    return _generated(generated, tokenizer, _USUAL_TASK, length)


class _TooFewError(ValueError):
    """A task has too few records to split."""


def _split(profile: Profile, tokenizer, task: str, length: int) -> Samples:
    """Samples from the profile's own data."""
    records = experiments.records(replace(profile, tasks=(task,)), tokenizer, length, WHOLE)
    trained = min(TRAINED, max(2, len(records) * TRAINED // (TRAINED + SCORED)))
    split = fine_tuning_split(records, trained, min(SCORED, max(0, len(records) - trained)))
    scored = [r for r in split.score if r not in split.shared_contexts]
    if not split.train or not scored:
        raise _TooFewError(
            f"task = {task!r} has {len(records)} records, too few to train on some and score "
            "others with other contexts: use another task"
        )
    return Samples(
        task, experiments.protocol(profile, length), split.train,
        tuple(scored[: profile.samples_per_task]), _others(profile, tokenizer, task, length),
    )  # fmt: skip


def _others(profile: Profile, tokenizer, task: str, length: int) -> tuple[Record, ...]:
    """A few records of each of the profile's other tasks."""
    rest = tuple(other for other in profile.tasks if other != task)
    return _spread(
        experiments.records(replace(profile, tasks=rest), tokenizer, length) if rest else []
    )


def _drawn(profile: Profile, tokenizer, task: str, length: int) -> Samples:
    """Samples of a benchmark's task: those that train are drawn by a seed of their own, and those
    that ask what is scored are left out."""
    own = replace(profile, tasks=(task,))
    train = experiments.records(
        replace(own, seed=profile.seed + SCORED_SEED), tokenizer, length // _SHORTER,
        min(TRAINED, 4 * profile.training.sequences),
    )  # fmt: skip
    scored = experiments.records(own, tokenizer, length)
    asked = {(record.input, record.answers) for record in scored}
    train = [record for record in train if (record.input, record.answers) not in asked]
    protocol, others = (
        experiments.protocol(profile, length),
        _others(profile, tokenizer, task, length),
    )
    return Samples(task, protocol, tuple(train), tuple(scored), others)


def _generated(profile: Profile, tokenizer, task: str, length: int) -> Samples:
    seed = profile.seed + SCORED_SEED
    count = min(TRAINED, 4 * profile.training.sequences)
    training = make_records(tokenizer, length // _SHORTER, count, seed=seed,
                            split="train", questions_per_task=1)  # fmt: skip
    train = tuple(record_from_dict(r) for r in training if r["dataset"] == task)
    held_out = generated_records(tokenizer, length, profile.samples_per_task, seed=seed)
    scored = tuple(r for r in held_out if r.dataset == task)
    others = [r for r in held_out if r.dataset != task]
    protocol = experiments.protocol(profile, length)
    return Samples(task, protocol, train, scored, _spread(others))


def _spread(records: list[Record]) -> tuple[Record, ...]:
    """At most _MEASURED records, equally many of each dataset."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.dataset, []).append(record)
    each = max(1, _MEASURED // max(1, len(groups)))
    return tuple(record for group in groups.values() for record in group[:each])[:_MEASURED]


def text_sequences(
    tokenizer, length: int, count: int, *, split: str = "train", seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """(token ids (n,), rows (n / _TEXT_ROWS,)), int64, of `count` texts of the corpus' paragraphs
    alone; rows: every _TEXT_ROWS-th position. n is `length` for half of them, a half and a quarter
    of it for a quarter each."""
    texts, prose = [], paragraphs(split)
    for number in range(count):
        n = length // (1, 2, 1, 4)[number % 4]
        generator = random.Random(f"text/{split}/{length}/{seed}/{number}")
        ids = tokenizer("")["input_ids"]
        while len(ids) < n:
            line = generator.choice(prose) + "\n"
            ids = ids + tokenizer(line, add_special_tokens=False)["input_ids"]
        texts.append((torch.tensor(ids[:n]), torch.arange(_TEXT_ROWS - 1, n, _TEXT_ROWS)))
    return texts


def train(
    profile: Profile, model, tokenizer, samples: Samples, length: int, progress: bool = True
) -> dict[str, HashWeights]:
    """Weights by name: GENERIC, trained on text alone; CONTROL, GENERIC after as many more steps on
    the same text as fine-tuning takes; TUNED, GENERIC after training on the task's samples.

    Under <results>/hash_training/finetuning; finished layers there are reused.
    """
    training = profile.training
    folder = profile.results / "hash_training" / "finetuning"
    shape = {"layout": training.layout, "bits": training.bits, "depth": training.depth,
             "hidden": training.hidden}  # fmt: skip
    count = max(4, training.sequences // 4)
    longest = length // _SHORTER
    text = text_sequences(tokenizer, longest, count, seed=TEXT_SEED)
    held_out = text_sequences(tokenizer, longest, 2, seed=TEXT_SEED + 1)
    tuning = fine_tuning_sequences(samples.train, samples.protocol, tokenizer)

    def weights(name: str, recipe: TrainRecipe, sequences, validation=None, start=None, note="",
                records=()):  # fmt: skip
        steps = training.at_most(recipe.steps)
        return train_hash_weights(
            model, sequences, recipe.vary(sink=profile.sink, local=profile.local, steps=steps),
            validation=validation, start=start, seed=profile.seed, data_note=note,
            benchmarks=benchmarks(records), out_dir=folder / name,
            capture_dir=folder / "captured", progress=progress, **shape,
        )  # fmt: skip

    plain = "paragraphs of the corpus, training split, no task"
    tune = TrainRecipe.fine_tuning()
    generic = weights("generic", tune.vary(steps=_TEXT_STEPS), text, held_out, note=plain)
    control = weights("control", tune, text, held_out, generic, plain)
    note = f"{len(samples.train)} samples of {samples.task}; scored ones share no context with them"
    tuned = weights("tuned", tune, tuning, None, generic, note, samples.train)
    return {GENERIC: generic, CONTROL: control, TUNED: tuned}


def selection(
    profile: Profile, model, tokenizer, weights: Mapping[str, HashWeights], samples: Samples,
    length: int, fraction: int = 128,
) -> pd.DataFrame:  # fmt: skip
    """MEASURES at a heavy budget of length / fraction by (what is asked, weights): held-out samples
    of the task, of other tasks, and text, in the layers that the profile measures. The oracle
    bounds them all."""
    sequences = {
        samples.task: fine_tuning_sequences(
            samples.scored[:_MEASURED], samples.protocol, tokenizer
        ),
        "other tasks": fine_tuning_sequences(samples.others, samples.protocol, tokenizer),
        "text": text_sequences(tokenizer, length, 1, split="eval", seed=TEXT_SEED),
    }
    selectors = _selectors(weights)
    tables = {}
    for name, part in sequences.items():
        if not part:
            continue
        captured = (c for ids, rows in part
                    for c in capture(model, ids, rows=rows, values=True,
                                     layers=profile.layers).values())  # fmt: skip
        heavy = [length // fraction]
        metrics = selection_metrics(captured, selectors, heavy, profile.sink, profile.local)
        tables[name] = pd.DataFrame(metrics).groupby("method", sort=False)[MEASURES].mean()
    return pd.concat(tables, names=["asked", "method"])


def answers(
    profile: Profile, model, tokenizer, weights: Mapping[str, HashWeights], samples: Samples,
    length: int, progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Points on the task's held-out samples by method and sparsity (_SPARSITIES), question and
    answer sparse. Results resume in <results>/records."""
    least = profile.sink + profile.local + _LEAST_HEAVY
    budgets = [Budget(profile.sink, profile.local, density=1 / s)
               for s in _SPARSITIES if length // s >= least]  # fmt: skip
    methods = [Method("dense")] + [
        Method(name, selector, budget)
        for name, selector in _selectors(weights).items()
        for budget in budgets
    ]
    frame = evaluate(
        model, tokenizer, samples.scored, methods, samples.protocol,
        profile.results / "records" / "finetuning.jsonl", progress=progress, setups="B",
    )  # fmt: skip
    return score_table(frame)


def fine_tuning_claims(
    claims: Claims, caught: pd.DataFrame, points: pd.DataFrame, task: str
) -> None:
    """What notebook 01 claims about the tables of `selection` and `answers`."""
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
    trained = {name: HashSelector.as_trained(hashes) for name, hashes in weights.items()}
    return {"oracle": make_selector("oracle")} | trained
