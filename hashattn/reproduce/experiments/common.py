"""What several notebooks run, for whatever model and scale the profile names."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain, cycle, islice
from pathlib import Path

import pandas as pd
import torch

from hashattn.attention.budget import Budget
from hashattn.base.checks import require
from hashattn.base.layout import Layout
from hashattn.evaluation.benchmarks import crowded as crowded_tasks
from hashattn.evaluation.benchmarks import texts
from hashattn.evaluation.benchmarks.generated import QUESTIONS_PER_CONTEXT, TASKS, make_sequences
from hashattn.evaluation.benchmarks.registry import BENCHMARKS
from hashattn.evaluation.benchmarks.texts import EVAL, TRAIN, VALIDATION
from hashattn.evaluation.measures.selection import selection_metrics
from hashattn.evaluation.methods import Method
from hashattn.evaluation.protocol import SETUPS, Protocol
from hashattn.evaluation.records import Record
from hashattn.evaluation.runner import evaluate
from hashattn.evaluation.tables import nothing_at_stake
from hashattn.hashing.capture import CapturedLayer, capture
from hashattn.hashing.recipe import TrainRecipe
from hashattn.hashing.sequences import shifts
from hashattn.hashing.train import train_hash_weights
from hashattn.hashing.weights import HashWeights
from hashattn.models.identity import attends_by_distance
from hashattn.reproduce.access import data_folder
from hashattn.reproduce.bench.cpu import budget as bench_budget
from hashattn.reproduce.bench.layer import layer_latency
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import Profile, ProfileError
from hashattn.reproduce.published.table import cite
from hashattn.selectors import UsualContext, usual_selector
from hashattn.selectors.base import Selector

# arguments of train_hashes for weights other than the default: more bits, a learned bit for each
# direction, and the paper's recipe with its code for every query head
VARIANTS: dict[str, dict] = {
    "64_bits": {"bits": 64},
    "128_bits": {"bits": 128},
    "256_bits": {"bits": 256},
    "signs": {"recipe": TrainRecipe.signs(), "depth": 2, "hidden": 128},
    "official": {"recipe": TrainRecipe.official(), "layout": "per_query_head", "depth": 3},
}
_VALIDATION_SHARE = 6  # one validation sequence for every six that train
_MIXTURE = (1, 2, 4, 1)  # divisors of the profile's length, for training sequences in turn
_VALIDATION_SEED = 1000  # of generated sequences, whose split knows no validation
KEPT_BYTES = 2 << 30  # of captures in memory
_kept: OrderedDict[tuple, list[CapturedLayer]] = OrderedDict()
_CROWDED = (1 / 64, 1 / 128, 1 / 256)  # densities of the crowded tasks
_CROWDED_LOCAL = 12  # with the sinks, half of what 1/256 of 8K tokens may read
_CALIBRATION = 4  # training sequences that calibrate baselines
SHORTEST = 512  # tokens of a generated training sequence
# methods left out at the longest context and in RULER, where each adds its full cost
_FRONTIER_ALONE = ("random", "oracle_top_p", "streaming_llm", "h2o", "snapkv", "infllm", "socket",
                  "hata", "magicpig", "rerank", "sparq", "loki", "pqcache")  # fmt: skip


def sequences(
    profile: Profile, tokenizer, count: int, *, length: int, split: str = "train", seed: int = 0,
    tasks: tuple[str, ...] | None = None, questions: int = 8,
) -> list[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """(token ids (length,), query positions (rows,)), int64, of `count` sequences of a split
    ("train", "validation" or "eval"): documents of the profile's kinds of text, from number `seed`
    on, or generated tasks without any. tasks: these kinds or tasks instead of all."""
    seed += profile.seed
    if kinds := text_kinds(profile, split):
        made = texts.sequences(tokenizer, tasks or kinds, length, count, split=split, first=seed)
    else:
        validates = split == VALIDATION
        made = make_sequences(
            tokenizer, length, count, split=TRAIN if validates else split,
            seed=seed + validates * _VALIDATION_SEED, tasks=tasks or TASKS,
            questions_per_task=questions,
        )  # fmt: skip
    return [(torch.tensor(ids), torch.tensor(rows)) for ids, rows in made]


def text_kinds(profile: Profile, split: str) -> tuple[str, ...]:
    """The kinds of text that a split's sequences take in turn; none where tasks are generated."""
    if split == EVAL and profile.training.texts:
        return profile.texts
    return profile.training.texts


def learnable(profile: Profile) -> tuple[str, ...]:
    """Everything that hashes of this profile may learn from: kinds of text, or generated tasks."""
    return tuple(texts.KINDS) if profile.training.texts else TASKS


def training_sequences(
    profile: Profile, tokenizer, count: int, split: str = TRAIN,
    tasks: tuple[str, ...] | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """`count` training sequences, each (token ids (n,), rows to learn from (r,)), int64: of the
    profile's length over _MIXTURE's divisors in turn, since a budget of n/32 is a different task at
    every n. Longest first."""
    mixed = []
    for divisor, part in sorted(Counter(islice(cycle(_MIXTURE), count)).items()):
        length = max(SHORTEST, profile.training.length // divisor)
        mixed += sequences(profile, tokenizer, part, length=length, split=split, seed=divisor,
                           tasks=tasks)  # fmt: skip
    return mixed


def train_hashes(
    profile: Profile, model, tokenizer, name: str, recipe: TrainRecipe | None = None, *,
    tasks: tuple[str, ...] | None = None, layout: Layout | None = None, bits: int | None = None,
    depth: int | None = None, hidden: int | None = None, layers: Iterable[int] | None = None,
    count: int | None = None, progress: bool = True, shared_captures: str | None = None,
) -> HashWeights:  # fmt: skip
    """Hash weights trained as the profile says, under <results>/hash_training/<name>.

    Finished layers there are reused. recipe, tasks, the maps' shape, layers and count (training
    sequences) override the profile, for ablations; variants that train on the same sequences may
    share captures, in the folder shared_captures.
    """
    training = profile.training
    depth = depth or (recipe.shape["depth"] if recipe else training.depth)
    recipe = recipe or getattr(TrainRecipe, training.recipe)()
    steps = training.at_most(recipe.steps)
    recipe = recipe.vary(sink=profile.sink, local=profile.local, steps=steps)
    count = count or training.sequences
    whole = count // _VALIDATION_SHARE // len(_MIXTURE) * len(_MIXTURE)
    held_out = max(len(set(_MIXTURE)), whole)  # whole mixtures, or one sequence of each length
    folder = profile.results / "hash_training"
    return train_hash_weights(
        model,
        training_sequences(profile, tokenizer, count, tasks=tasks),
        recipe,
        validation=training_sequences(profile, tokenizer, held_out, VALIDATION, tasks),
        out_dir=folder / name,
        capture_dir=folder / shared_captures if shared_captures else None,
        reach=_reach(profile, model),
        layout=layout or training.layout, bits=bits or training.bits,
        depth=depth, hidden=hidden or training.hidden, layers=layers,
        seed=profile.seed, data_note=_data_note(profile, tasks), benchmarks={}, progress=progress,
    )  # fmt: skip


def _reach(profile: Profile, model) -> int | None:
    """The longest context that codes have to serve, where sequences may be placed in it."""
    return profile.longest_length if attends_by_distance(model) else None


def _data_note(profile: Profile, tasks: tuple[str, ...] | None) -> str:
    """What the sequences are, for the card."""
    what = "generated long-context tasks in Python documentation (evaluation.benchmarks.generated)"
    if profile.training.texts:
        kinds = ", ".join(tasks or profile.training.texts)
        what = f"text without tasks (evaluation.benchmarks.texts): {kinds}"
    return f"{what}, training split only; disjoint by construction from every evaluation context"


def shipped_or_trained(profile: Profile, model, tokenizer) -> HashWeights:
    """The profile's shipped hash weights, or those that notebook 01 trained into the results."""
    folder = profile.hash_weights_path
    if folder is not None and folder.is_dir():
        return HashWeights.load(folder, model)
    return train_hashes(profile, model, tokenizer, "default")


def retrained(profile: Profile, model, tokenizer, name: str) -> HashWeights:
    """Hash weights trained by the profile's recipe into the results, to compare with what it ships:
    of the layers that it measures. Of every layer where it ships none, as all else then uses them.
    """
    folder = profile.hash_weights_path
    ships = folder is not None and folder.is_dir()
    layers = profile.layers if ships and profile.layers else None
    return train_hashes(profile, model, tokenizer, name, layers=layers)


def hash_weights(profile: Profile, model, tokenizer, variant: str) -> HashWeights:
    """Weights of a key of VARIANTS: those shipped beside the profile's own, else trained into the
    results like those."""
    folder = shipped_variant(profile, variant)
    if folder is not None:
        return HashWeights.load(folder, model)
    settings = _variant_settings(profile, variant)
    return train_hashes(profile, model, tokenizer, f"variants/{variant}",
                        shared_captures="variants/captured", **settings)  # fmt: skip


def _variant_settings(profile: Profile, variant: str) -> dict:
    """Arguments of train_hashes; those of comparisons alone, for the layers that are measured."""
    compared = variant in ("official", "signs") and profile.layers
    layers = {"layers": profile.layers} if compared else {}
    return VARIANTS[variant] | layers


def shipped(profile: Profile) -> dict[str, tuple[Path, dict]]:
    """What is shipped with the profile's model, "default" and names of VARIANTS: the folder, and
    the arguments of train_hashes. Not those that notebook 01 trains for some layers, to compare.
    ProfileError for a profile that ships no weights."""
    default = profile.hash_weights_path
    require(default is not None, "hash_weights", None, "the folder to ship in", ProfileError)
    variants = {
        name: (default.parent / "hash_variants" / name, _variant_settings(profile, name))
        for name, settings in VARIANTS.items()
        if settings.get("bits") in (None, *profile.memory) or shipped_variant(profile, name)
    }
    own = f"{profile.training.bits}_bits"
    return {"default": (default, {})} | {
        name: (folder, settings)
        for name, (folder, settings) in variants.items()
        if name != own and "layers" not in settings
    }


def shipped_variant(profile: Profile, variant: str) -> Path | None:
    """The folder of a variant shipped with the profile's model; None if it has to be trained."""
    if profile.hash_weights_path is None:
        return None
    folder = profile.hash_weights_path.parent / "hash_variants" / variant
    return folder if folder.is_dir() else None


def captured(
    profile: Profile, model, tokenizer, length: int, count: int = 1, *, split: str = EVAL,
    seed: int = 0, values: bool = False, every_layer: bool = False, reach: int | None = None,
) -> list[CapturedLayer]:  # fmt: skip
    """Queries, keys and, if asked for, values of `count` sequences of a split: of the layers that
    the profile measures, or of every layer. reach: where they lie, as for training. What fits into
    KEPT_BYTES is kept, since a notebook measures on the same sequences several times."""
    key = (profile, model, tokenizer, length, count, split, seed, values, every_layer, reach)
    if key not in _kept:
        tokens = sequences(profile, tokenizer, count, length=length, split=split, seed=seed,
                           questions=QUESTIONS_PER_CONTEXT)  # fmt: skip
        layers = None if every_layer else profile.layers
        _keep(key, [layer for (ids, rows), shift in zip(tokens, shifts(tokens, reach), strict=True)
                    for layer in capture(model, ids, rows=rows, values=values, layers=layers,
                                         shift=shift).values()])  # fmt: skip
    _kept.move_to_end(key)
    return list(_kept[key])


def _keep(key: tuple, layers: list[CapturedLayer]) -> None:
    """Keeps the newest captures up to KEPT_BYTES, this one whatever its size."""
    _kept[key] = layers
    while len(_kept) > 1 and sum(map(_bytes, chain(*_kept.values()))) > KEPT_BYTES:
        _kept.popitem(last=False)


def _bytes(layer: CapturedLayer) -> int:
    tensors = (x for x in vars(layer).values() if isinstance(x, torch.Tensor))
    return sum(x.numel() * x.element_size() for x in tensors)


def calibration(profile: Profile, model, tokenizer) -> list[CapturedLayer]:
    """What calibrated baselines and budgets learn from: training sequences, as for the hashes."""
    return captured(
        profile, model, tokenizer, profile.training.length, _CALIBRATION, split=TRAIN, seed=2000,
        values=True, every_layer=True, reach=_reach(profile, model),
    )  # fmt: skip


def selectors(
    profile: Profile, weights: HashWeights, calibrated: list[CapturedLayer],
    codes: Mapping[str, HashWeights] | None = None,
) -> dict[str, Selector]:  # fmt: skip
    """One selector for each sparse method of the profile, in its usual setting (`Selector.usual`).

    codes: the other hash weights, by their names in
    hashattn.reproduce.experiments.contenders.our_codes.
    """
    config = weights.config
    context = UsualContext(
        calibrated=calibrated, group=config.group, head_dim=config.head_dim, weights=weights,
        codes=codes or {}, seed=profile.seed, steps=profile.training.steps,
    )  # fmt: skip
    return {name: usual_selector(name, context) for name in profile.methods if name != "dense"}


def methods(profile: Profile, selectors: Mapping[str, Selector]) -> list[Method]:
    """Every selector at every density of the profile; dense and the window alone need just one."""
    window = [Budget(profile.sink, profile.local, heavy=0)]
    budgets = [Budget(profile.sink, profile.local, density=d) for d in profile.densities]
    dense = [Method("dense")] if "dense" in profile.methods else []
    return dense + [
        Method(name, selector, budget)
        for name, selector in selectors.items()
        for budget in (window if name in ("window", "streaming_llm") else budgets)
    ]


def protocol(profile: Profile, length: int) -> Protocol:
    """How the profile's benchmark asks and scores its records at one length."""
    return BENCHMARKS[profile.benchmark].protocol(profile, length, data_folder(profile))


def records(profile: Profile, tokenizer, length: int, samples: int | None = None) -> list[Record]:
    """`samples` records per task of the profile's benchmark, by default the profile's number."""
    samples = samples or profile.samples_per_task
    load = BENCHMARKS[profile.benchmark].records
    return load(profile, tokenizer, length, samples, data_folder(profile))


def quality(
    profile: Profile, model, tokenizer, methods: list[Method], length: int,
    samples: int | None = None, progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """evaluate() on the profile's records at one length, in both setups; results resume in
    <results>/records."""
    return answers(profile, model, tokenizer, methods, length, samples, "length", progress)


def answers(
    profile: Profile, model, tokenizer, methods: Iterable[Method], length: int,
    samples: int | None, name: str, progress: bool = True, setups: Iterable[str] = SETUPS,
) -> pd.DataFrame:  # fmt: skip
    """evaluate() on `samples` records (as of `records`) of the profile's benchmark at one length;
    results resume in <results>/records/<name>_<length>.jsonl."""
    return evaluate(
        model, tokenizer, records(profile, tokenizer, length, samples), list(methods),
        protocol(profile, length), profile.results / "records" / f"{name}_{length}.jsonl",
        setups=tuple(setups), progress=progress,
    )  # fmt: skip


def crowded(
    profile: Profile, model, tokenizer, selectors: Mapping[str, Selector], progress: bool = True
) -> pd.DataFrame:
    """evaluate() on `profile.crowded` records of each crowded task (benchmarks.crowded) at the
    longest length, at 64x to 256x, setup B. Results resume in <results>/records."""
    hard = replace(profile, benchmark="crowded", tasks=crowded_tasks.TASKS, data=None,
                   prompt_limit=None, local=_CROWDED_LOCAL, densities=_CROWDED)  # fmt: skip
    return answers(
        hard, model, tokenizer, methods(hard, selectors), profile.longest_length, profile.crowded,
        "crowded", progress, setups="B",
    )  # fmt: skip


def ruler(
    profile: Profile, model, tokenizer, methods: Iterable[Method], progress: bool = True
) -> pd.DataFrame:  # fmt: skip
    """evaluate() on what profile.ruler names, in both setups; column tokens: the context length
    asked for. Results resume in <results>/records."""
    runs = profile.ruler
    of_ruler = replace(profile, benchmark="ruler", tasks=runs.tasks, data=None, prompt_limit=None)
    frames = []
    for length in runs.lengths:
        frame = answers(
            of_ruler, model, tokenizer, methods, length, runs.samples, "ruler", progress
        )
        frames.append(frame.assign(tokens=length))
    return pd.concat(frames, ignore_index=True)


def recall(
    profile: Profile, model, tokenizer, selectors: Mapping[str, Selector], lengths: Iterable[int],
    fractions: Iterable[int] = (32,), count: int = 1,
) -> pd.DataFrame:  # fmt: skip
    """selection_metrics of held-out sequences, a heavy budget of length / fraction for each."""
    # those that observe need the queries of the context too, and only the questions' are captured
    selectors = {name: s for name, s in selectors.items() if not s.observes}
    rows = []
    for length in lengths:
        layers = captured(profile, model, tokenizer, length, count)
        for fraction in fractions:
            metrics = selection_metrics(
                layers, selectors, [length // fraction], profile.sink, profile.local
            )
            rows += [row | {"fraction": fraction, "context": length} for row in metrics]
    return pd.DataFrame(rows)


def long_context_methods(profile: Profile, methods: Iterable[Method]) -> list[Method]:
    """The methods of the longest context and RULER: the main and new ones at 16x and 64x, or at
    every density of a profile that has neither."""
    main = [method for method in methods if method.name not in _FRONTIER_ALONE]
    few = {"16x", "64x"} & {method.budget_label for method in main}
    budgets = {"dense", "0 tokens", *few}
    return [method for method in main if not few or method.budget_label in budgets]


def long_samples(profile: Profile) -> int:
    """Samples per task at the longest context, where each costs the most: a third of the profile's,
    rounded down to whole contexts where they are generated."""
    third = max(1, profile.samples_per_task // 3)
    whole = third // QUESTIONS_PER_CONTEXT * QUESTIONS_PER_CONTEXT
    return whole if whole and profile.benchmark == "generated" else third


def latency(profile: Profile, dtypes: Iterable[str]) -> list[dict]:
    """layer_latency rows at every dtype and context of the profile, Llama-3.1-8B head shapes,
    reading n / 32 + 256 tokens."""
    rows = []
    for name in dtypes:
        for n in profile.contexts:
            rows += layer_latency(n, getattr(torch, name), bench_budget(n), seed=profile.seed,
                                  repeats=profile.repeats, peers=("roofline",))  # fmt: skip
    return rows


def quality_claims(
    claims: Claims, scores: pd.DataFrame, far_scores: pd.DataFrame, profile: Profile
) -> None:
    """What notebook 03 claims about its score tables (points; methods by budgets).

    How well dense attention answers is claimed for the generated tasks alone, whose answers are
    certain. Where it does not answer, or sink and local alone answer as well (nothing_at_stake),
    comparisons with it are not judged.
    """
    dense, ours = float(scores.loc["dense", "dense"]), scores.loc["hash"]
    unjudged = nothing_at_stake(scores)
    if profile.benchmark == "generated":
        far, window = far_scores.loc["dense", "dense"], scores.loc["window"].dropna().max()
        claims.must_hold("dense exact match, frontier length", dense, low=80)
        claims.goal("dense exact match at the frontier length", dense, low=95)
        claims.goal("dense exact match at the longest", float(far), low=90)
        claims.goal("sink and local alone, exact match", float(window), high=30)
    if "32x" in scores and "oracle" in scores.index:
        oracle = float(scores.loc["oracle", "32x"])
        claims.goal("oracle top-k at 32x minus dense (points)", oracle - dense, low=-2,
                    unjudged=unjudged)  # fmt: skip
    if {"residual", "oracle"} <= set(scores.index):
        labels = [label for label in ("8x", "16x") if label in scores]
        gaps = [float(scores.loc["residual", x] - scores.loc["oracle", x]) for x in labels]
        claims.goal("with a sampled residual minus oracle top-k, 8x and 16x, worst (points)",
                    min(gaps, default=math.nan), low=0, unjudged=unjudged)  # fmt: skip
    for label, tolerance, row in (
        ("16x", -1, "table2.average.hashattention_16x_minus_full"),
        ("32x", -3, "abstract_v1.hashattention_32x_minus_full"),
    ):
        if label in scores:
            claims.goal(f"HashAttention at {label} minus dense (points)",
                        float(ours[label]) - dense, low=tolerance, paper=cite(row),
                        unjudged=unjudged, main=True)  # fmt: skip
    for method in ("double_sparsity", "quest"):
        if method in scores.index:
            paper = cite(f"table1.hashattention_minus_{method}")
            worst = (ours - scores.loc[method]).dropna().min()
            claims.goal(f"HashAttention minus {method}, worst of the densities (points)",
                        float(worst), low=0, paper=paper, unjudged=unjudged)  # fmt: skip
