"""Notebook 01's comparisons: recipes that differ in one option, hashes that never saw a task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import pandas as pd

from hashattn.base.checks import require_one_of
from hashattn.base.engines.processes import PROCESS_BYTES, Processes, spread
from hashattn.base.layout import LAYOUTS
from hashattn.evaluation.measures.selection import selection_metrics
from hashattn.hashing.capture import CapturedLayer, capture
from hashattn.hashing.recipe import TrainRecipe
from hashattn.hashing.weights import HashWeights
from hashattn.reproduce.access import load_model
from hashattn.reproduce.bench.layer import encode_latency
from hashattn.reproduce.bench.ways import Way
from hashattn.reproduce.experiments.common import learnable, sequences, train_hashes
from hashattn.reproduce.experiments.contenders import hash_selectors
from hashattn.reproduce.profiles import Profile
from hashattn.selectors import make_selector
from hashattn.selectors.base import Selector
from hashattn.selectors.double_sparsity import DoubleSparsitySelector as DoubleSparsity
from hashattn.selectors.hash import HashSelector
from hashattn.selectors.quest import QuestSelector
from hashattn.selectors.rabitq import RaBitQSelector
from hashattn.selectors.transform import TransformSelector

MEASURES = ["recall@4", "recall@32", "heavy_mass"]
_HELD_OUT_SEED = 3000
_ABLATION_STEPS = 300


def training_curves(weights: HashWeights) -> pd.DataFrame:
    """Validation records of every layer: layer, step, loss, recall@4, recall@32, mass."""
    rows = [
        {"layer": int(layer)} | record
        for layer, history in weights.card["validation"].items()
        for record in history["curve"]
    ]
    return pd.DataFrame(rows)


def training_contenders(profile: Profile, model, retrained: HashWeights) -> dict[str, Selector]:
    """Retrained weights, the shipped ones if there are any, and SimHash with as many bits."""
    selectors = {"hash retrained": make_selector("hash", weights=retrained)}
    folder = profile.hash_weights_path
    if folder is not None and folder.is_dir():
        selectors["hash shipped"] = make_selector("hash", weights=HashWeights.load(folder, model))
    selectors["lsh"] = make_selector("lsh", bits=retrained.config.bits, seed=profile.seed)
    return selectors


def variants() -> dict[str, dict]:
    """Arguments of train_hashes: the default and its loss undone, learned signs and their choices
    undone one at a time, and the paper's."""
    default, signs = TrainRecipe.default(), TrainRecipe.signs()
    official = {"recipe": TrainRecipe.official(), "depth": 3, "hidden": 128}
    recipes = {
        "default": default,
        "default, loss: budgeted": default.vary(loss="budgeted", budget_fraction=16.0),
        "signs": signs,
        "signs, loss: sampling": signs.vary(loss="sampling"),
        "signs, loss: weighted BCE": signs.vary(loss="bce"),
        "signs, loss: cross-entropy": signs.vary(loss="cross_entropy"),
        "signs, labels: top-32 only": signs.vary(mass_share=0.0),
        "signs, labels: attention mass only": signs.vary(mass_share=1.0),
        "signs, surrogate: tanh": signs.vary(surrogate="tanh"),
        "signs, start: random": signs.vary(init="random"),
        "signs, labels: 1/128 of the tokens seen": signs.vary(top=64, top_fraction=1 / 128),
        "signs, labels: by the output's loss": signs.vary(weigh="output"),
        "signs, ranked by the group's sum, by bits": signs.vary(group="sum"),
    }
    by_query_head = {"layout": "per_query_head"}
    return {name: {"recipe": recipe} for name, recipe in recipes.items()} | {
        "official recipe": official,
        "signs, code per query head": {"recipe": signs} | by_query_head,
        "official recipe, code per query head": official | by_query_head,
    }


def _map_shapes() -> dict[str, tuple[int, int, str]]:
    """(stages, hidden width, precision of the weights): the paper's shape, and smaller ones."""
    return {
        "3 stages of 128, float32": (3, 128, "float32"),
        "3 stages of 128, bfloat16": (3, 128, "bfloat16"),
        "2 stages of 128, bfloat16": (2, 128, "bfloat16"),
        "2 stages of 64, bfloat16": (2, 64, "bfloat16"),
        "1 stage, bfloat16": (1, 128, "bfloat16"),
    }


def map_costs(profile: Profile, model, tokenizer, layer: int, length: int) -> pd.DataFrame:
    """What smaller maps cost and save: selection quality of one layer at n/32, and the kilobytes
    and milliseconds to encode a token in one layer of Llama-3.1-8B's shape."""
    default = TrainRecipe.signs()
    shapes = _map_shapes()
    variants = {
        name: {"recipe": default.vary(precision=precision), "depth": depth, "hidden": hidden}
        for name, (depth, hidden, precision) in shapes.items()
    }
    table = _train_and_measure(profile, model, tokenizer, layer, length, variants)
    sizes = {name: (Way(depth=depth, hidden=hidden, folds=0), precision)
             for name, (depth, hidden, precision) in shapes.items()}  # fmt: skip
    costs = pd.DataFrame(encode_latency(sizes)).set_index("variant")
    costs = pd.DataFrame({"KB a layer": costs["bytes"] / 1e3, "encode ms": costs["ms"]})
    return table.join(costs)


def ablation(profile: Profile, model, tokenizer, layer: int, length: int) -> pd.DataFrame:
    """Held-out selection quality at n/32 of one layer's hashes, by recipe and layout."""
    return _train_and_measure(profile, model, tokenizer, layer, length, variants())


def _train_and_measure(
    profile: Profile, model, tokenizer, layer: int, length: int, variants: dict[str, dict]
) -> pd.DataFrame:
    """One row per variant, all trained on half of the profile's sequences for as many steps, cut to
    the `length` that they are measured at."""
    trainer = VariantTrainer(_cut(profile, length), layer)
    first, *others = variants.items()
    trained = {first[0]: trainer.train(model, tokenizer, *first)}
    # each trains on one thread, so that as many train at once as there are cores
    engine = spread(len(others), PROCESS_BYTES, model.device)
    if isinstance(engine, Processes):
        trained |= dict(engine.run(trainer, ([item] for item in others)))
    else:
        trained |= {item[0]: trainer.train(model, tokenizer, *item) for item in others}
    selectors = {name: HashSelector.as_trained(trained[name]) for name in variants}
    held_out = sequences(profile, tokenizer, 2, length=length, split="eval", questions=2)
    captured = [capture(model, ids, rows=rows, layers=[layer])[layer] for ids, rows in held_out]
    table = selection_metrics(captured, selectors, [length // 32], profile.sink, profile.local)
    return pd.DataFrame(table).groupby("method", sort=False)[["bits", *MEASURES]].mean()


def _cut(profile: Profile, length: int) -> Profile:
    """The profile, training on sequences of at most `length` tokens."""
    training = replace(profile.training, length=min(profile.training.length, length))
    return replace(profile, training=training)


@dataclass(frozen=True)
class VariantTrainer:
    """Trains variants (a name, arguments of train_hashes) of one layer's hashes into the results.

    All learn from the same captures, stored by the first. In another process it loads the profile's
    model itself.
    """

    profile: Profile
    layer: int

    def __call__(self, variants: Sequence[tuple[str, dict]]) -> Iterator[tuple[str, HashWeights]]:
        """Train variants in a worker process; yields the name and weights of each."""
        for name, arguments in variants:
            yield name, self.train(*_loaded(self.profile), name, arguments)

    def train(self, model, tokenizer, name: str, arguments: dict) -> HashWeights:
        """The weights of a variant, loaded from the results if an earlier run trained them."""
        folder = "ablation/" + "".join(c if c.isalnum() else "-" for c in name)
        arguments = arguments | {"recipe": arguments["recipe"].vary(steps=_ABLATION_STEPS)}
        return train_hashes(self.profile, model, tokenizer, folder, layers=[self.layer],
                            count=max(2, self.profile.training.sequences // 2),
                            shared_captures="ablation/captured", **arguments)  # fmt: skip


@cache
def _loaded(profile: Profile) -> tuple:
    """A worker's model and tokenizer."""
    return load_model(profile)


def transfer(
    profile: Profile, model, tokenizer, held_out: str | None, length: int
) -> pd.DataFrame:  # fmt: skip
    """Selection quality at n/32 on questions of one task or text of one kind, with and without it
    in training. held_out None: the third of common.learnable.

    Both hashes train on half as many sequences as the profile says, cut to the `length` that they
    are measured at, so that only the tasks differ, for the layers that the profile measures.
    """
    profile = _cut(profile, length)
    count = max(2, profile.training.sequences // 2)
    every = learnable(profile)
    held_out = held_out or every[2]
    require_one_of("held_out_task", held_out, every)
    others = tuple(task for task in every if task != held_out)
    selectors = {}
    for name, tasks in (("all_tasks", every), (f"without_{held_out}", others)):
        weights = train_hashes(profile, model, tokenizer, f"transfer/{name}", tasks=tasks,
                               layers=profile.layers, count=count)  # fmt: skip
        selectors[f"hash {name.replace('_', ' ')}"] = make_selector("hash", weights=weights)
    selectors["lsh"] = make_selector("lsh", bits=profile.training.bits, seed=profile.seed)
    tables = {}
    for task in (held_out, others[0]):
        questions = sequences(profile, tokenizer, 2, length=length, split="eval", tasks=(task,),
                              seed=_HELD_OUT_SEED)  # fmt: skip
        captured = [
            layer
            for ids, rows in questions
            for layer in capture(model, ids, rows=rows, layers=profile.layers).values()
        ]
        rows = selection_metrics(captured, selectors, [length // 32], profile.sink, profile.local)
        tables[f"on {task}"] = pd.DataFrame(rows).groupby("method", sort=False)[MEASURES].mean()
    return pd.concat(tables)


# of notebook 02's figure over bits; all other hash weights are one family
_FAMILIES = {"hash official": "hash_official", "hash signs": "hash_signs"}


def bit_variants(
    profile: Profile,
    codes: dict[str, HashWeights],
    calibrated: list[CapturedLayer],
    lsh_bits: list[int],
) -> dict[str, Selector]:
    """Every method at several sizes of its index, by "<method> at <setting>".

    codes: hash weights by name (hashattn.reproduce.experiments.contenders.our_codes).
    """
    selectors: dict[str, Selector] = {}
    for name, selector in hash_selectors(codes).items():
        config = selector.weights.config
        family = _FAMILIES.get(name, "hash")
        bits = selector.nominal_bits(config.group, config.head_dim)
        selectors[f"{family} at {bits:g} bits"] = selector
    dim = calibrated[0].keys.shape[-1]
    for bits in lsh_bits:
        selectors[f"lsh at {bits} bits"] = make_selector("lsh", bits=bits, seed=profile.seed)
        selectors[f"rabitq at {bits} bits"] = RaBitQSelector.calibrate(
            calibrated, planes=bits, seed=profile.seed
        )
    for bits in (32, 64, 128, 256):
        selectors[f"transform at {bits} bits"] = TransformSelector.calibrate(calibrated, bits)
    for page, bits in ((32, 4), (16, 4), (16, 16), (8, 16), (4, 16)):
        name = f"quest at page {page}, {bits} bit"
        selectors[name] = QuestSelector.calibrate(calibrated, page, bits)
    for width, bits in ((dim // 16, 4), (dim // 8, 4), (dim // 4, 4), (dim // 2, 4)):
        for layout in LAYOUTS:
            name = f"double_sparsity {layout} at {width} channels"
            selectors[name] = DoubleSparsity.calibrate(calibrated, width, bits, layout, layout)
    return selectors


def bits_to_match(table: pd.DataFrame, family: str, ours: str, measure: str) -> float:
    """Fewest bits at which `family` reaches `ours` (its fewest bits) in `measure`; inf if never."""
    target = table[table.family == ours].sort_values("bits")[measure].iloc[0]
    reached = table[(table.family == family) & (table[measure] >= target)]
    return float(reached.bits.min()) if len(reached) else math.inf
