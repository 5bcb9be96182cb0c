"""A method as a newcomer adds it: a file, a line in METHODS and a test; then it is everywhere."""

import pickle
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import FrozenInstanceError, dataclass, field, replace

import pytest
import torch
from torch import Tensor

from hashattn import Budget, attach
from hashattn.base.checks import require
from hashattn.evaluation.methods import Method
from hashattn.hashing import HashWeights
from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments import common as experiments
from hashattn.reproduce.experiments import contenders
from hashattn.reproduce.plots import method_style, method_styles
from hashattn.reproduce.profiles import Profile, load_profile
from hashattn.selectors import METHODS, describe, make_selector
from hashattn.selectors.base import NORM_BITS, KeyView, Selector


@dataclass(frozen=True, eq=False)
class KNormSelector(Selector):
    """Ranks by the norm of the key, small ones first (Devoto et al. 2024), for all queries alike.

    power: of the norm; a negative one ranks large norms first.
    """

    name = "knorm"

    power: float = 1.0

    def __post_init__(self) -> None:
        require(self.power != 0, "power", self.power, "a number other than 0")

    def encode_keys(self, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """{"norms": float16 (B, KV heads, n, 1)} of keys (B, KV heads, n, D)."""
        return {"norms": keys.float().norm(dim=-1, keepdim=True).half()}

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """-norm ** power, float32 (B, KV heads, q, n)."""
        norms = view.index["norms"].float().mT
        return -(norms**self.power).expand(-1, -1, queries.shape[2], -1)

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """The norm."""
        return float(NORM_BITS)


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    monkeypatch.setitem(METHODS, "knorm", (__name__, "KNormSelector"))  # the one line


@pytest.fixture(scope="module")
def tiny() -> Iterator[tuple]:
    profile = load_profile("tiny")
    model, tokenizer = load_model(profile)
    yield profile, model, tokenizer, HashWeights.load(profile.hash_weights_path, model)


def with_knorm(profile: Profile) -> Profile:
    return replace(profile, methods=("dense", "hash", "knorm"))


def test_a_profile_that_names_it_runs_it_at_every_density(tiny):
    profile, _, _, weights = tiny
    own = with_knorm(profile)
    usual = experiments.selectors(own, weights, [])
    assert isinstance(usual["knorm"], KNormSelector)
    chosen = experiments.methods(own, usual)
    assert [m.name for m in chosen].count("knorm") == len(own.densities)
    longest = experiments.long_context_methods(own, chosen)
    assert "knorm" in {method.name for method in longest}
    with pytest.raises(ValueError, match="knorm"):  # among what is allowed
        replace(profile, methods=("knrom",))


def test_it_is_measured_beside_all_others_of_the_frontier(tiny):
    profile, model, tokenizer, _ = tiny
    own = replace(with_knorm(profile), memory=(32,))
    calibrated = experiments.captured(own, model, tokenizer, 512, split="train")
    compared = contenders.other_methods(own, calibrated)
    assert isinstance(compared["knorm"], KNormSelector)
    without = contenders.other_methods(replace(own, methods=("dense", "hash")), calibrated)
    assert {*compared} - {*without} == {"knorm"}
    table = experiments.recall(own, model, tokenizer, {"knorm": compared["knorm"]}, [512])
    assert set(table["bits"]) == {NORM_BITS} and table["recall@32"].between(0, 1).all()


def test_it_answers_through_the_one_attention_path_and_leaves_a_receipt(tiny):
    _, model, tokenizer, _ = tiny
    ids = tokenizer("The keys are small. " * 40, return_tensors="pt").input_ids
    selector = make_selector("knorm", power=2.0)
    with attach(model, selector, Budget(sink=4, local=8, density=1 / 8), keep_steps=99) as run:
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert run.receipt.method == selector.record()
    assert (run.receipt.auxiliary_bits, run.receipt.nominal_bits) == (NORM_BITS, NORM_BITS)
    steps = [step for step in run.receipt.recent if step.reason is None]
    assert steps and all(step.read <= step.cached / 8 for step in steps)


def test_its_record_is_its_fields():
    selector = make_selector("knorm", power=2.0)
    record = {"name": "knorm", "parameters": {"power": 2.0}, "weights_sha256": None}
    assert selector.record() == record
    row = describe(selector, 4, 64)
    assert row["parameters"] == {"power": 2.0} and row["nominal_bits"] == 16
    assert (row["tokens"], row["needs"]) == ("retrieves", "nothing")
    assert Method("knorm", selector, Budget(heavy=8)).selector.record() == record
    with pytest.raises(ValueError, match="power = 0: must be a number other than 0"):
        make_selector("knorm", power=0)
    with pytest.raises(ValueError, match="selector 'knorm' with parameters"):
        make_selector("knorm", powr=1.0)


def test_it_has_a_colour_and_a_marker_that_no_other_method_has():
    styles = method_styles()
    own = styles.pop("knorm")
    assert own == method_style("knorm") and own.label == "knorm"
    assert own.color not in {style.color for style in styles.values()}
    assert own.marker not in {style.marker for style in styles.values()}


def test_settings_are_frozen_and_each_object_keeps_its_own_identity():
    selector = make_selector("knorm")
    with pytest.raises(FrozenInstanceError):
        selector.power = 2.0
    twin = make_selector("knorm")
    assert selector != twin and selector.identity != twin.identity  # same settings, another index
    copies = [deepcopy(selector), pickle.loads(pickle.dumps(selector))]
    assert all(copied.record() == selector.record() for copied in copies)
    changed = selector._with(power=3.0)
    assert changed.record()["parameters"] == {"power": 3.0} and selector.power == 1.0
    assert changed.identity != selector.identity


@dataclass(frozen=True, eq=False)
class Weighted(KNormSelector):
    table: Tensor | None = None


def test_data_that_is_not_marked_as_such_is_refused_by_name():
    with pytest.raises(TypeError, match=r"'table' holds a Tensor.*field\(repr=False\)"):
        Weighted(table=torch.ones(2)).record()

    @dataclass(frozen=True, eq=False)
    class Marked(KNormSelector):
        table: Tensor | None = field(default=None, repr=False)

    assert Marked(table=torch.ones(2)).record()["parameters"] == {"power": 1.0}
