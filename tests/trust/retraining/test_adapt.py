"""Adapting learns another domain, never at the price of recall, and can be undone."""

import dataclasses
import json

import pytest
import torch

from hashattn import Budget, HashSelector, attach
from hashattn.base.errors import HashWeightsError
from hashattn.base.files import FileError
from hashattn.hashing import CapturedLayer, HashWeights, TrainRecipe, capture
from hashattn.hashing import train as training
from hashattn.hashing.card import trained_benchmarks
from hashattn.hashing.labels import attention_logits, candidate_mask
from hashattn.hashing.run_folder import RunFolder
from hashattn.hashing.train import train_hash_weights
from hashattn.kernels import unpack_bits
from hashattn.trust.retraining import adapt as adapting
from hashattn.trust.retraining.adapt import AdaptSettings, adapt
from hashattn.trust.retraining.captures import (
    captured_tokens,
    load_sequences,
    save_sequences,
    text_sequences,
)
from hashattn.trust.retraining.held_out import AdaptError
from hashattn.trust.retraining.outcome import NEW, REPLAY
from hashattn.trust.retraining.reservoir import Reservoir, ReservoirSettings
from hashattn.trust.retraining.versions import LINEAGE, Versions
from helpers import characters, generate, prompt, tiny_model

RECIPE = TrainRecipe.default().vary(
    steps=4, evaluate_every=2, rows_per_step=8, top=8, sink=1, local=3, selection_fraction=4
)
SETTINGS = AdaptSettings(steps=2)


def tokens(count, low, high, seed=0, n=96):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randint(low, high, (n,), generator=draw), torch.arange(40, n, 2))
            for _ in range(count)]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def old(model):
    """Captured sequences of the old domain: few tokens of the vocabulary."""
    return list(captured_tokens(model, tokens(8, 3, 12)))


@pytest.fixture(scope="module")
def new(model):
    return list(captured_tokens(model, tokens(8, 60, 128, seed=1)))


@pytest.fixture(scope="module")
def parent(model, tmp_path_factory):
    """Hashes of the old domain alone."""
    return train_hash_weights(
        model, tokens(4, 3, 12, seed=2), RECIPE, out_dir=tmp_path_factory.mktemp("parent"),
        depth=1, folds=3, progress=False, benchmarks={},
    )  # fmt: skip


@pytest.fixture
def versions(parent, tmp_path):
    return Versions.begin(tmp_path / "versions", parent)


def run(model, versions, *args, settings=SETTINGS, **options):
    return adapt(model, versions, *args, settings=settings, progress=False, **options)


def recall(maps, captures, fraction=4, window=(1, 3)):
    """recall@32 by a loop over heads and rows: bits of keys weighed by the query's map."""
    hits = []
    for c in captures:
        logits = attention_logits(c.queries, c.keys, c.scaling)
        pre = maps.query(c.queries[None])[0]
        from hashattn.kernels import encode, grade_bits, hamming_scores

        codes = encode(c.keys[None], maps.key)
        scores = hamming_scores(grade_bits(maps.query(c.queries[None]), **maps.grades), codes)[0]
        assert unpack_bits(codes, pre.shape[-1]).shape[-1] == pre.shape[-1]
        allowed = candidate_mask(c.positions, c.keys.shape[1], *window)
        for head in range(len(c.queries)):
            for row, position in enumerate(c.positions.tolist()):
                places = allowed[row].nonzero()[:, 0].tolist()
                heavy = max(1, (position + 1) // fraction)
                score, logit = scores[head, row].tolist(), logits[head, row].tolist()
                chosen = sorted(places, key=lambda t: (-score[t], t))[:heavy]
                best = sorted(places, key=lambda t: -logit[t])[:32]
                hits.append(len(set(chosen) & set(best)) / len(best))
    return sum(hits) / len(hits)


def test_another_domain_is_learned_and_the_old_one_kept_by_replay(
    model, versions, parent, new, old
):
    outcome = run(model, versions, new, replay=old)
    before, after = outcome.mean()
    assert outcome.accepted and outcome.replaced and after > before + SETTINGS.least_gain
    old_before, old_after = outcome.mean(REPLAY)
    assert old_after >= old_before - SETTINGS.most_lost
    assert outcome.version == versions.current == "v0002" and outcome.parent_version == "v0001"
    assert versions.load(model).sha256 == outcome.weights.sha256 != parent.sha256
    assert versions.load(name="v0001").sha256 == parent.sha256
    assert outcome.held_out == {NEW: "sequences", REPLAY: "sequences"}
    assert not (versions.path / "work").exists()
    text = outcome.summary()
    assert f"{before:.3f} to {after:.3f}, new" in text and "v0002" in text and "replay" in text
    for row in outcome.recall:
        assert row.after == (row.trained if row.layer in outcome.replaced else row.before)


def test_recall_is_that_of_rows_that_neither_train_nor_choose(model, versions, parent, new):
    """The 4th and 8th sequence are held out; every other of their rows judges."""
    outcome = run(model, versions, new)
    for row in outcome.recall:
        judging = [
            dataclasses.replace(c, queries=c.queries[:, 1::2], positions=c.positions[1::2])
            for c in (new[3][row.layer], new[7][row.layer])
        ]
        assert row.before == pytest.approx(recall(parent.maps[row.layer], judging), abs=1e-6)
        maps = outcome.weights.maps[row.layer]
        assert row.after == pytest.approx(recall(maps, judging), abs=1e-6)


def test_training_and_choosing_see_no_row_that_judges(model, versions, new, monkeypatch):
    seen, real = {}, training.train_layer

    def notes(train, validation, *args, **options):
        seen[train[0].layer] = train, validation
        return real(train, validation, *args, **options)

    monkeypatch.setattr(training, "train_layer", notes)
    run(model, versions, new)
    for layer, (train, validation) in seen.items():
        assert [int(c.keys.sum() * 1e3) for c in train] == [
            int(new[k][layer].keys.sum() * 1e3) for k in (0, 1, 2, 4, 5, 6)
        ]
        assert [c.positions.tolist() for c in validation] == [list(range(40, 96, 4))] * 2
    assert set(seen) == {0, 1}


def test_a_single_sequence_is_split_by_rows(model, versions, new, monkeypatch):
    seen, real = [], training.train_layer

    def notes(train, validation, *args, **options):
        seen.append([c.positions.tolist() for c in (*train, *validation)])
        return real(train, validation, *args, **options)

    monkeypatch.setattr(training, "train_layer", notes)
    outcome = run(model, versions, new[:1])
    assert outcome.held_out == {NEW: "rows"} and "held-out rows" in outcome.summary()
    assert seen[0] == [list(range(40, 96, 4)), list(range(42, 96, 8))]


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_few_sequences_hold_one_out(model, versions, new, monkeypatch, count):
    seen = []

    def notes(train, validation, *args, **options):
        seen.append((len(train), len(validation)))
        raise Killed

    monkeypatch.setattr(training, "train_layer", notes)
    with pytest.raises(Killed):
        run(model, versions, new[:count])
    assert seen == [(count - 1, 1)]


def test_nothing_is_replaced_unless_recall_rises(model, versions, parent, old):
    """A learning rate that moves nothing, from the maps as they are: the same codes."""
    still = RECIPE.vary(learning_rate=1e-12)
    outcome = run(model, versions, old, settings=AdaptSettings(recipe=still, go_on=True))
    assert not outcome.accepted and outcome.version == versions.current == "v0001"
    assert versions.names == ["v0001"] and outcome.weights.sha256 == parent.sha256
    assert "v0001 stays" in outcome.summary()
    assert all(row.after == row.before for row in outcome.recall)
    assert not (versions.path / "work").exists()


def test_maps_that_get_worse_are_refused(model, versions, parent, new):
    """Keys that were shuffled among the tokens tell nothing of the queries."""
    draw = torch.Generator().manual_seed(0)
    noise = [
        {
            layer: dataclasses.replace(
                c, keys=torch.randn(c.keys.shape, generator=draw) * 5,
                queries=torch.randn(c.queries.shape, generator=draw),
            )
            for layer, c in sequence.items()
        }
        for sequence in new[:3]
    ]  # fmt: skip
    judged = [*noise, new[3]]  # the 4th is held out
    outcome = run(model, versions, judged, settings=AdaptSettings(steps=2, least_gain=0.02))
    trained = [row.trained for row in outcome.recall]
    worse = [row.layer for row in outcome.recall if row.trained <= row.before + 0.02]
    assert worse and not set(worse) & set(outcome.replaced), trained
    for layer in worse:
        for name, tensor in parent.maps[layer].tensors():
            assert torch.equal(tensor, dict(outcome.weights.maps[layer].tensors())[name])


def test_layers_decide_apart_and_the_worst_go_first():
    def decide(most_lost, **gains):
        measured = {
            (domain, layer): (0.5, 0.5 + gain)
            for domain, values in gains.items() for layer, gain in enumerate(values)
        }  # fmt: skip
        layers = range(len(gains["new"]))
        return adapting._decide(measured, layers, AdaptSettings(most_lost=most_lost))

    assert decide(0.02, new=[0.1, 0.004, -0.1, 0.2]) == (0, 3)
    lost = {"new": [0.1, 0.1, 0.1, -0.1], "replay": [-0.1, 0.01, -0.03, -0.5]}
    assert decide(0.02, **lost) == (1, 2)  # of 4 layers at most 0.08 in all
    assert decide(0.03, **lost) == (0, 1, 2)
    assert decide(0.0, **lost) == (1,)
    assert decide(0.0, new=[0.1], replay=[-0.1]) == ()


def test_layers_that_were_not_captured_keep_their_maps(model, versions, parent, new):
    outcome = run(model, versions, [{1: sequence[1]} for sequence in new])
    assert outcome.replaced == (1,) and {row.layer for row in outcome.recall} == {1}
    kept, same = (dict(w.maps[0].tensors()) for w in (parent, outcome.weights))
    assert all(torch.equal(kept[name], same[name]) for name in kept)


def test_the_card_has_the_lineage(model, versions, parent, new, old):
    first = run(model, versions, new, replay=old, note="words", benchmarks={"qasper": 3})
    card = json.loads((versions.path / "v0002" / "hash_config.json").read_text())["card"]
    lineage = card[LINEAGE]
    assert (lineage["parent"], lineage["parent_version"]) == (parent.sha256, "v0001")
    assert lineage["when"].endswith("+00:00") and lineage["layers"] == list(first.replaced)
    assert lineage["recall"] == [dataclasses.asdict(row) for row in first.recall]
    data = card["data"]
    assert data["note"] == "words" and trained_benchmarks(card) == {"qasper": 3}
    assert (data[NEW]["sequences"], data[NEW]["tokens"], data[NEW]["rows"]) == (8, 768, 224)
    assert data[NEW]["sha256"] != data[REPLAY]["sha256"] and len(data[NEW]["sha256"]) == 64
    assert card["recipe"]["steps"] == 2 and card["recipe"]["loss"] == "sampling"
    assert card["started_from"]["sha256"] == parent.sha256
    assert card["started_from"]["data"] == parent.card["data"]
    assert set(card["slopes"]) == {"0", "1"} and first.weights.slopes is not None
    again = run(model, versions, old, settings=AdaptSettings(steps=2, least_gain=0.0))
    if again.accepted:
        assert again.weights.card[LINEAGE]["parent"] == first.weights.sha256
        assert again.weights.card["started_from"]["started_from"]["sha256"] == parent.sha256


def test_rolled_back_weights_are_the_old_ones_and_adapt_starts_from_them(
    model, versions, parent, new
):
    run(model, versions, new)
    assert versions.rollback() == "v0001" and versions.load(model).sha256 == parent.sha256
    again = run(model, versions, new)
    assert again.version == "v0003" and again.parent_version == "v0001"
    assert again.weights.sha256 == versions.load(name="v0002").sha256  # the same inputs


class Killed(BaseException):
    """Stands for a kill: nothing in the library may catch it."""


def test_a_killed_adaptation_leaves_the_old_version_and_resumes(
    model, versions, parent, new, monkeypatch, tmp_path
):
    whole = run(model, Versions.begin(tmp_path / "whole", parent), new)
    calls, real = [], training.train_layer

    def dies_at_second(train, *args, **options):
        calls.append(train[0].layer)
        if len(calls) == 2:
            raise Killed
        return real(train, *args, **options)

    monkeypatch.setattr(training, "train_layer", dies_at_second)
    with pytest.raises(Killed):
        run(model, versions, new)
    assert versions.current == "v0001" and versions.names == ["v0001"]
    assert versions.load(model).sha256 == parent.sha256
    resumed = run(model, versions, new)
    assert calls == [0, 1, 1]  # the first layer was finished
    assert resumed.weights.sha256 == whole.weights.sha256


def test_after_a_kill_other_data_starts_anew(
    model, versions, parent, new, old, monkeypatch, tmp_path
):
    whole = run(model, Versions.begin(tmp_path / "whole", parent), new[:6])
    calls, keep = [], RunFolder.keep

    def dies_after_first(self, layer, trained):
        keep(self, layer, trained)
        calls.append(layer)
        if len(calls) == 1:
            raise Killed

    monkeypatch.setattr(RunFolder, "keep", dies_after_first)
    with pytest.raises(Killed):
        run(model, versions, new)
    other = run(model, versions, new[:6])
    assert calls == [0, 0, 1] and other.weights.sha256 == whole.weights.sha256


def test_running_traffic_is_adapted_to_and_the_run_goes_on_with_the_new_maps(
    model, versions, parent
):
    reservoir = Reservoir(parent.config.layers, ReservoirSettings(rows=40))
    budget = Budget(sink=1, local=3, heavy=8)
    with attach(model, HashSelector(parent), budget) as served:
        with served.listen(reservoir):
            for seed in range(8):
                generate(model, prompt(1, 90, seed))
        outcome = run(model, versions, reservoir.captured())
        assert outcome.accepted
        finished = served.swap(HashSelector(outcome.weights))
        generate(model, prompt(1, 90, 99))
        used = (finished.method["weights_sha256"], served.receipt.method["weights_sha256"])
    assert used == (parent.sha256, outcome.weights.sha256)


def test_saved_buffers_come_back(model, tmp_path, new):
    save_sequences(tmp_path / "buffer", new[:2])
    save_sequences(tmp_path / "buffer", new[2:3])
    loaded = list(load_sequences(tmp_path / "buffer"))
    assert len(loaded) == 3
    for one, other in zip(loaded, new, strict=False):
        for layer, captured in other.items():
            assert torch.equal(one[layer].keys, captured.keys)
            assert torch.equal(one[layer].queries, captured.queries)
            assert torch.equal(one[layer].positions, captured.positions)
    (tmp_path / "buffer" / "sequence_00001.safetensors").write_bytes(b"short")
    with pytest.raises(FileError, match="sequence_00001.*capture it again"):
        list(load_sequences(tmp_path / "buffer"))
    (tmp_path / "buffer" / "sequence_00001.safetensors").unlink()
    save_sequences(tmp_path / "buffer", new[1:2])  # none is written over
    assert len(list(load_sequences(tmp_path / "buffer"))) == 3
    assert list(load_sequences(tmp_path / "nothing")) == []


def test_texts_become_sequences(model):
    tokenizer = characters()
    ids, rows = text_sequences(tokenizer, ["abcdefgh" * 4, "ab"], length=20, rows=5)[0]
    assert ids.tolist() == tokenizer("abcdefgh" * 4)["input_ids"][:20]
    assert len(rows) == len(set(rows.tolist())) == 5 and 10 <= int(rows[0]) and int(rows[-1]) < 20
    short_ids, short_rows = text_sequences(tokenizer, ["ab"], length=20, rows=5)[0]
    assert len(short_ids) == 2 and short_rows.tolist() == [1]
    captured = next(captured_tokens(model, [(ids, rows)]))
    reference = capture(model, ids, rows=rows)
    assert torch.equal(captured[1].queries, reference[1].queries)
    with pytest.raises(ValueError, match="rows"):
        text_sequences(tokenizer, ["ab"], length=20, rows=0)


def small(captured, heads=slice(None), rows=slice(None), keys=slice(None)):
    return CapturedLayer(
        captured.layer, captured.queries[heads, rows], captured.positions[rows],
        captured.keys[:, keys], captured.scaling,
    )  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda new: [], "no new sequences: let a Reservoir listen"),
        (lambda new: [{}], r"layers \[\]"),
        (lambda new: [{7: new[0][0]}], r"layers \[\] of those with hash maps, \[0, 1\]"),
        (lambda new: [new[0], {0: new[1][0]}], r"sequence 1 has layers \[0\].*\[0, 1\]"),
        (lambda new: [{0: small(new[0][0], heads=slice(2))}], "query_heads 2.*another model"),
        (lambda new: [{0: small(new[0][0], rows=slice(0))}], "no rows"),
        (lambda new: [{0: small(new[0][0], rows=slice(2))}], "rows of 1 new.*judging"),
        (lambda new: [{0: small(new[0][0], rows=slice(3))}], "rows of 1 new.*judging"),
        (
            lambda new: [
                {0: dataclasses.replace(new[0][0], queries=new[0][0].queries * torch.nan)}
            ],
            "not finite",
        ),
    ],
)
def test_too_little_or_of_another_model_is_refused(model, versions, new, change, message):
    with pytest.raises(AdaptError, match=message):
        run(model, versions, change(new))
    assert versions.current == "v0001"


def test_rows_that_see_only_the_window_are_refused(model, versions, new):
    early = [
        {layer: dataclasses.replace(c, positions=c.positions % 4) for layer, c in s.items()}
        for s in new
    ]
    with pytest.raises(AdaptError, match="training sees a token beside the sink and the 3 latest"):
        run(model, versions, early)


def test_replay_needs_the_same_layers(model, versions, new, old):
    with pytest.raises(AdaptError, match="replay"):
        run(model, versions, new, replay=[{0: old[0][0]}, {0: old[1][0]}])


def test_weights_of_another_model_are_refused(versions, new):
    with pytest.raises(HashWeightsError, match="made for"):
        run(tiny_model("llama", seed=3), versions, new)
    with pytest.raises(HashWeightsError):
        run(tiny_model("llama_mha"), versions, new)


@pytest.mark.parametrize(
    "recipe, message",
    [(RECIPE.vary(group="sum"), "group"), (RECIPE.vary(weigh="output"), "values")],
)
def test_recipes_that_do_not_fit_are_refused(model, versions, new, recipe, message):
    with pytest.raises(AdaptError, match=message):
        run(model, versions, new, settings=AdaptSettings(recipe=recipe))


def test_weights_that_were_calibrated_can_be_adapted(model, parent, new, tmp_path):
    card = {**parent.card, "recipe": {"init": "transform", "group": "each", "steps": 0}}
    versions = Versions.begin(tmp_path, HashWeights(parent.config, parent.maps, card))
    assert run(model, versions, new, settings=AdaptSettings(steps=1)).weights.card["recipe"][
        "init"
    ] == "transform"  # fmt: skip


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"seed": -1}, {"least_gain": -0.1}, {"most_lost": 1.0}], ids=str
)
def test_bad_settings_name_the_field(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        AdaptSettings(**wrong)
