"""Training learns, resumes, and does not depend on what was interrupted."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hashattn.hashing import CapturedLayer, HashConfig, HashWeights, TrainRecipe
from hashattn.hashing import train as training
from hashattn.hashing.layer import LayerTrainer, train_layer
from hashattn.hashing.maps import HashMap, LayerMaps
from hashattn.hashing.objective import relaxed_scores
from hashattn.hashing.slopes import map_scores, mean_divergence, telling_rows
from hashattn.hashing.train import train_hash_weights
from hashattn.hashing.validate import METRICS, selected_tokens, selection_quality
from hashattn.kernels import encode, unpack_bits
from helpers import tiny_model

SHAPES = dict(query_heads=4, kv_heads=2, head_dim=32)
WINDOW = dict(sink=4, local=28)
FAST = TrainRecipe.signs().vary(steps=8, evaluate_every=4, rows_per_step=8, top=8)


def lookup_sequence(seed, n=512, rows=48, dim=32, facts=160):
    """Keys name one of `facts` things in half of the channels, under loud noise in the others, as
    RoPE's fast channels are; a query asks for the thing that an earlier key named. Things come in
    eight kinds, and telling things of a kind apart is where a linear hash wastes its bits."""
    world = torch.Generator().manual_seed(99)
    kinds = torch.randn(8, dim // 2, generator=world) * 2
    names = kinds[torch.arange(facts) % 8] + torch.randn(facts, dim // 2, generator=world)
    loud = torch.linspace(1, 4, dim // 2)
    generator = torch.Generator().manual_seed(seed)
    things = torch.randint(facts, (n,), generator=generator)
    positions = torch.arange(n - rows, n)
    asked = things[torch.randint(8, n - rows - 40, (rows,), generator=generator)]

    def draw(heads, meant, loudness):
        noise = torch.randn(heads, len(meant), dim // 2, generator=generator) * loudness
        return torch.cat([names[meant].expand(heads, -1, -1), noise], -1)

    queries, keys = draw(4, asked, 0.05) * torch.tensor(3.0), draw(2, things, loud) + 1.0
    return CapturedLayer(0, queries, positions, keys, 0.5)


def lsh(bits=32):
    generator = torch.Generator().manual_seed(3)
    planes = torch.randn(1, 32, bits, generator=generator)
    return LayerMaps(
        HashMap((planes.expand(2, -1, -1),), (torch.zeros(2, bits),)),
        HashMap((planes.expand(4, -1, -1),), (torch.zeros(4, bits),)),
    )


@pytest.fixture(scope="module")
def data():
    return [lookup_sequence(s) for s in range(10)], [lookup_sequence(s) for s in range(50, 53)]


@pytest.mark.parametrize("layout", ["per_kv_head", "per_query_head"])
def test_the_default_recipe_clearly_beats_lsh_of_the_same_bits(data, layout):
    config = HashConfig((0,), **SHAPES, layout=layout, hidden=64)
    recipe = TrainRecipe.signs().vary(steps=120, evaluate_every=40)
    trained = train_layer(*data, config, recipe, progress=False)
    learned = selection_quality(trained.maps, data[1], **WINDOW)
    same_bits, more_bits = (selection_quality(lsh(b), data[1], **WINDOW) for b in (32, 256))
    for name in ("recall@4", "mass"):
        assert learned[name] > same_bits[name] + 0.3
        assert learned[name] > more_bits[name] + 0.1
        assert learned[name] > trained.history[0][name] + 0.1


def test_the_official_recipe_learns_too(data):
    config = HashConfig((0,), **SHAPES, layout="per_query_head", hidden=32)
    recipe = TrainRecipe.official().vary(**WINDOW, steps=200, evaluate_every=50, top=4)
    trained = train_layer(*data, config, recipe, progress=False)
    by_bits = WINDOW | {"group": "sum"}
    start, random = trained.history[0], selection_quality(lsh(), data[1], **by_bits)
    learned = selection_quality(trained.maps, data[1], **by_bits)
    assert learned["recall@4"] > max(start["recall@4"], random["recall@4"]) + 0.15
    assert trained.history[-1]["loss"] < trained.history[1]["loss"]


@pytest.mark.parametrize("layout", ["per_kv_head", "per_query_head"])
@pytest.mark.parametrize("depth, bits", [(1, 32), (2, 64), (3, 96)])
def test_every_shape_trains(data, layout, depth, bits):
    config = HashConfig((0,), **SHAPES, layout=layout, depth=depth, bits=bits, hidden=16)
    trained = train_layer(data[0][:2], data[1][:1], config, FAST, progress=False)
    assert encode(data[0][0].keys, trained.maps.key).shape == (config.key_maps, 512, bits // 32)
    assert set(METRICS) < set(trained.history[-1])


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "bce"},
        {"loss": "cross_entropy"},
        {"surrogate": "straight_through"},
        {"surrogate": "tanh"},
        {"init": "random"},
        {"normalise": "none"},
        {"schedule": "constant"},
        {"learn_scale": False},
        {"keys_per_step": 128},
        {"sequences_per_step": 2},
        {"balance": 0.1, "decorrelation": 0.1},
        {"top_fraction": 1 / 128},
        {"group": "sum"},
    ],
    ids=str,
)
def test_each_option_changes_the_outcome(data, changes):
    config = HashConfig((0,), **SHAPES, hidden=16)
    results = [
        train_layer(data[0][:3], data[1][:1], config, recipe, progress=False)
        for recipe in (FAST, FAST.vary(**changes))
    ]
    first, second = (r.history[-1]["loss"] for r in results)
    assert second == second and first != second


@pytest.mark.parametrize("group", ["sum", "each"])
def test_selection_quality_by_hand(group):
    """Keys carry their own score as bits; the choice and the measures are counted by hand."""
    n, positions = 64, torch.tensor([63])
    keys = torch.zeros(1, n, 32)
    keys[0, :, 0] = torch.linspace(-1, 1, n)
    queries = torch.zeros(1, 1, 32)
    queries[..., 0] = 10.0
    eye = torch.eye(32)[None]
    maps = LayerMaps(HashMap((eye,), (torch.zeros(1, 32),)), HashMap((eye,), (torch.zeros(1, 32),)))
    captured = CapturedLayer(0, queries, positions, keys, 1.0)
    settings = {"sink": 4, "local": 8, "group": group}
    chosen = selected_tokens(maps, captured, fraction=32, **settings)
    assert chosen.nonzero()[:, 2].tolist() == [32, 33]  # bit 0 set from token 32: lowest ties first
    quality = selection_quality(maps, [captured], fraction=4, **settings)
    logits = 10 * torch.linspace(-1, 1, n)
    mass = logits.softmax(0)[4:56]  # candidates are tokens 4..55; chosen are 32..47
    assert quality["recall@4"] == 0.0
    assert quality["recall@32"] == pytest.approx(16 / 32)
    assert quality["mass"] == pytest.approx(float(mass[28:44].sum() / mass.sum()), rel=1e-4)


def test_early_stop_keeps_the_best_maps(data):
    config = HashConfig((0,), **SHAPES, hidden=32)
    bad = FAST.vary(
        steps=200, evaluate_every=2, patience=3, learning_rate=30.0, schedule="constant"
    )
    trained = train_layer(data[0][:2], data[1][:1], config, bad, progress=False)
    assert trained.history[-1]["step"] < 200
    kept = selection_quality(trained.maps, data[1][:1], **WINDOW)
    best = max(trained.history, key=lambda r: sum(r[m] for m in METRICS))
    assert kept == pytest.approx({name: best[name] for name in METRICS})


def sequences(count=4, n=96):
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randint(3, 128, (n,), generator=generator), torch.arange(60, n, 3))
        for _ in range(count)
    ]


def model_of_four_layers():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


class Killed(BaseException):
    """Stands for a kill: nothing in the library may catch it."""


def test_a_killed_run_resumes_with_the_same_weights(tmp_path, monkeypatch, capsys):
    model, settings = model_of_four_layers(), dict(recipe=FAST, hidden=16, seed=3)
    whole = train_hash_weights(
        model, sequences(), out_dir=tmp_path / "a", progress=False, **settings
    )
    calls, real = [], training.train_layer

    def dies_at_third(*args, **kwargs):
        calls.append(kwargs["label"])
        if len(calls) == 3:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(training, "train_layer", dies_at_third)
    with pytest.raises(Killed):
        train_hash_weights(model, sequences(), out_dir=tmp_path / "b", **settings)
    assert not (tmp_path / "b" / "hash_config.json").exists()
    resumed = train_hash_weights(model, sequences(), out_dir=tmp_path / "b", **settings)
    assert calls == ["layer 0", "layer 1", "layer 2", "layer 2", "layer 3"]
    assert resumed.sha256 == whole.sha256
    assert "reused 2 of 4 trained layers: [0, 1]" in capsys.readouterr().err
    assert HashWeights.load(tmp_path / "b", model).sha256 == whole.sha256
    assert not (tmp_path / "b" / "captured").exists()


def test_captured_sequences_survive_a_kill(tmp_path, monkeypatch):
    model, seen, real = tiny_model("llama"), [], training.capture

    def dies_at_third(model, ids, **kwargs):
        seen.append(ids)
        if len(seen) == 3:
            raise Killed
        return real(model, ids, **kwargs)

    monkeypatch.setattr(training, "capture", dies_at_third)
    for _ in range(2):
        if len(seen) < 3:
            with pytest.raises(Killed):
                train_hash_weights(
                    model, sequences(), FAST, hidden=16, out_dir=tmp_path, progress=False
                )
        else:
            train_hash_weights(
                model, sequences(), FAST, hidden=16, out_dir=tmp_path, progress=False
            )
    assert len(seen) == 5  # four sequences, one of them twice


def test_finished_layers_are_reused_only_for_the_same_settings(tmp_path, monkeypatch):
    model, calls, real = tiny_model("llama"), [], training.train_layer
    monkeypatch.setattr(
        training, "train_layer", lambda *a, **k: calls.append(k["label"]) or real(*a, **k)
    )

    def trains(data=None, **changes):
        calls.clear()
        train_hash_weights(
            model,
            data or sequences(),
            changes.pop("recipe", FAST),
            hidden=16,
            out_dir=tmp_path,
            progress=False,
            **changes,
        )
        return len(calls)

    assert trains() == 2 and trains() == 0
    assert trains(layers=[1]) == 0  # another choice of layers does not change a layer
    assert trains(recipe=FAST.vary(top=4)) == 2
    assert trains(seed=1) == 2
    assert trains(bits=64) == 2
    assert trains(data=sequences(5)) == 2


def test_a_damaged_layer_file_says_what_to_delete(tmp_path):
    model = tiny_model("llama")
    train_hash_weights(model, sequences(), FAST, hidden=16, out_dir=tmp_path, progress=False)
    (tmp_path / "layers" / "layer_001.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="layer_001.json to train the layer again"):
        train_hash_weights(model, sequences(), FAST, hidden=16, out_dir=tmp_path, progress=False)


def test_the_card_tells_how_the_weights_came_about(tmp_path):
    model = tiny_model("qwen3")
    weights = train_hash_weights(
        model,
        sequences(),
        FAST,
        hidden=16,
        out_dir=tmp_path,
        seed=4,
        validation=sequences(2, 80),
        data_note="random tokens",
        progress=False,
    )
    card = json.loads((tmp_path / "hash_config.json").read_text())["card"]
    assert card == weights.card and card["trained"] and weights.trained
    assert card["data"]["note"] == "random tokens" and card["seed"] == 4
    assert card["data"]["train"]["sequences"] == 4 and card["data"]["train"]["tokens"] == 4 * 96
    assert card["data"]["validation"]["sequences"] == 2
    assert card["data"]["train"]["sha256"] != card["data"]["validation"]["sha256"]
    assert card["recipe"]["steps"] == 8 and card["base_model"]["type"] == "qwen3"
    for layer in ("0", "1"):
        curve = card["validation"][layer]["curve"]
        assert [record["step"] for record in curve] == [0, 4, 8]
        assert card["validation"][layer]["best"] in curve and curve[1]["loss"] > 0


@pytest.mark.parametrize(
    "stated", [{}, {"qasper": 25}, {"qasper": {"samples": ["a"], "contexts": []}}]
)
def test_the_card_keeps_the_benchmarks_that_trained_and_the_weights_do_not_change(tmp_path, stated):
    model, data = tiny_model("llama"), sequences()
    options = {"hidden": 16, "out_dir": tmp_path, "progress": False}
    silent = train_hash_weights(model, data, FAST, **options)
    weights = train_hash_weights(model, data, FAST, benchmarks=stated, **options)
    assert "benchmarks" not in silent.card["data"] and weights.sha256 == silent.sha256
    assert HashWeights.load(tmp_path, model).card["data"]["benchmarks"] == stated
    with pytest.raises(ValueError, match=r"benchmarks\['qasper'\] = 'all': must be a number"):
        train_hash_weights(model, data, FAST, benchmarks={"qasper": "all"}, **options)


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "0 training and 0 validation"),
        (sequences(1), "at least two sequences"),
        ([(torch.tensor([], dtype=torch.long), torch.tensor([0]))], "0 tokens and 1 rows"),
        ([(torch.arange(9), torch.tensor([], dtype=torch.long))], "9 tokens and 0 rows"),
    ],
)
def test_unusable_sequences_are_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        train_hash_weights(tiny_model("llama"), data, FAST, out_dir=tmp_path, progress=False)


def test_captures_can_be_shared_between_trainings(tmp_path, monkeypatch):
    runs, real = [], training.capture
    monkeypatch.setattr(training, "capture", lambda *a, **k: runs.append(1) or real(*a, **k))
    model, data = tiny_model("llama"), sequences()
    for name, recipe in (("a", FAST), ("b", FAST.vary(loss="cross_entropy"))):
        train_hash_weights(
            model, data, recipe, out_dir=tmp_path / name, hidden=16, depth=1, progress=False,
            capture_dir=tmp_path / "shared",
        )  # fmt: skip
    assert len(runs) == len(data)
    assert any((tmp_path / "shared").rglob("*.safetensors"))


def test_values_are_captured_for_the_recipe_that_weighs_by_output(tmp_path):
    """Beside the captures of other recipes; labels, and so the weights, differ."""
    model, data, results = tiny_model("llama"), sequences(), []
    for name, recipe in (("a", FAST), ("b", FAST.vary(weigh="output"))):
        weights = train_hash_weights(
            model, data, recipe, out_dir=tmp_path / name, hidden=16, depth=1, progress=False,
            capture_dir=tmp_path / "shared",
        )  # fmt: skip
        results.append(weights.sha256)
    assert results[0] != results[1]
    assert len(list((tmp_path / "shared").iterdir())) == 2


# starting from given weights


def trained_start(model, folder, recipe=FAST, **shapes):
    return train_hash_weights(
        model, sequences(), recipe, out_dir=folder, progress=False, **{"hidden": 16} | shapes
    )


def other_sequences():
    return [(ids.flip(0), rows) for ids, rows in sequences(5)]


def codes(weights):
    generator = torch.Generator().manual_seed(11)
    queries, keys = (torch.randn(1, heads, 500, 16, generator=generator) * 3 for heads in (4, 2))
    layers = [weights.layer(i, "cpu") for i in (0, 1)]
    return [c for maps in layers for c in (encode(queries, maps.query), encode(keys, maps.key))]


@pytest.mark.parametrize("recipe", [FAST, TrainRecipe.official().vary(steps=8, **WINDOW)],
                         ids=["normalised", "raw"])  # fmt: skip
@pytest.mark.parametrize("layout", ["per_kv_head", "per_query_head"])
def test_without_learning_a_start_comes_back_bit_for_bit(tmp_path, recipe, layout):
    model = tiny_model("llama")
    start = trained_start(model, tmp_path / "a", recipe, layout=layout)
    still = recipe.vary(learning_rate=1e-12)
    found = train_hash_weights(
        model, other_sequences(), still, hidden=16, out_dir=tmp_path / "b", progress=False,
        layout=layout, start=start,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(codes(start), codes(found), strict=True))
    scratch = trained_start(model, tmp_path / "c", still, layout=layout, seed=1)
    assert not all(torch.equal(a, b) for a, b in zip(codes(start), codes(scratch), strict=True))


def test_unfolding_undoes_folding(data):
    maps = lsh().key
    mean, std = torch.randn(2, 32), torch.rand(2, 32) + 0.5
    x = data[0][0].keys
    unfolded = maps.unfold_input(mean, std)
    assert torch.allclose(unfolded((x - mean[:, None]) / std[:, None]), maps(x), atol=1e-4)
    again = unfolded.fold_input(mean, std)
    for (_, a), (_, b) in zip(again.tensors(), maps.tensors(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_training_goes_on_from_a_start_and_improves_on_it(data):
    config = HashConfig((0,), **SHAPES, hidden=32)
    recipe = TrainRecipe.signs().vary(steps=60, evaluate_every=30)
    short = recipe.vary(init="random", steps=10)
    start = train_layer(*data, config, short, progress=False).maps
    tuned = train_layer(*data, config, recipe, progress=False, start=start)
    quality = selection_quality(start, data[1], **WINDOW)
    assert {name: tuned.history[0][name] for name in METRICS} == pytest.approx(quality)
    assert tuned.history[-1]["mass"] > quality["mass"] + 0.1


def test_the_card_and_the_layers_know_their_start(tmp_path):
    model = tiny_model("llama")
    start, other = (trained_start(model, tmp_path / str(s), seed=s) for s in (1, 2))
    settings = dict(recipe=FAST, hidden=16, out_dir=tmp_path / "tuned", progress=False)

    def layer_keys():
        records = sorted((tmp_path / "tuned" / "layers").glob("*.json"))
        return [json.loads(record.read_text())["key"] for record in records]

    keys = []
    for given in (None, start, other):
        tuned = train_hash_weights(
            model, other_sequences(), start=given, data_note="a task", **settings
        )
        keys += layer_keys()
    assert len(set(keys)) == 3  # the layers of a training share its key
    told = json.loads((tmp_path / "tuned" / "hash_config.json").read_text())["card"]
    assert told["started_from"]["sha256"] == other.sha256 != tuned.sha256
    assert told["started_from"]["data"] == other.card["data"] != told["data"]
    assert told["data"]["note"] == "a task" and told["started_from"]["seed"] == 2
    again = train_hash_weights(
        model, sequences(), start=tuned, **settings | {"out_dir": tmp_path / "again"}
    )
    assert again.card["started_from"]["started_from"]["sha256"] == other.sha256


def test_fine_tuning_resumes_with_the_same_weights(tmp_path, monkeypatch):
    model, real, calls = tiny_model("llama"), training.train_layer, []
    start = trained_start(model, tmp_path / "start")
    settings = dict(recipe=FAST, hidden=16, progress=False, start=start)
    whole = train_hash_weights(model, other_sequences(), out_dir=tmp_path / "a", **settings)

    def dies_at_second(*args, **kwargs):
        calls.append(kwargs["label"])
        if len(calls) == 2:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(training, "train_layer", dies_at_second)
    with pytest.raises(Killed):
        train_hash_weights(model, other_sequences(), out_dir=tmp_path / "b", **settings)
    resumed = train_hash_weights(model, other_sequences(), out_dir=tmp_path / "b", **settings)
    assert calls == ["layer 0", "layer 1", "layer 1"]
    assert resumed.sha256 == whole.sha256 != start.sha256


def test_a_start_shares_captures_with_training_from_scratch(tmp_path, monkeypatch):
    runs, real = [], training.capture
    monkeypatch.setattr(training, "capture", lambda *a, **k: runs.append(1) or real(*a, **k))
    model, shared = tiny_model("llama"), {"capture_dir": tmp_path / "shared"}
    start = trained_start(model, tmp_path / "a", **shared)
    trained_start(model, tmp_path / "b", start=start, **shared)
    assert len(runs) == len(sequences())


@pytest.mark.parametrize(
    "made, asked, message",
    [
        ({}, {"bits": 64}, "bits 32, not 64.*ask for the shapes in start"),
        ({}, {"layout": "per_query_head"}, "layout 'per_kv_head', not 'per_query_head'"),
        ({"layers": [1]}, {}, r"no maps for layers \[0\], only for \[1\]: train some of those"),
    ],
)
def test_a_start_of_other_shapes_is_refused(tmp_path, made, asked, message):
    model = tiny_model("llama")
    start = trained_start(model, tmp_path / "a", **made)
    with pytest.raises(ValueError, match=message):
        trained_start(model, tmp_path / "b", start=start, **asked)


def test_a_start_that_is_untrained_or_of_another_model_is_refused(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="random-initialised.*leave start out"):
        start = HashWeights.for_model(model, hidden=16)
        trained_start(model, tmp_path / "a", start=start)
    start = trained_start(tiny_model("llama", seed=1), tmp_path / "b")
    with pytest.raises(ValueError, match="start does not serve this model.*weights_fingerprint"):
        trained_start(model, tmp_path / "c", start=start)
    layers = trained_start(model, tmp_path / "d")
    found = trained_start(model, tmp_path / "e", start=layers, layers=[1])
    assert list(found.maps) == [1]  # a part of the start's layers may train


def test_sequences_lie_anywhere_up_to_the_reach(tmp_path):
    from hashattn.hashing.sequences import shifts

    sequences = [(torch.zeros(n), torch.tensor([0])) for n in (400, 100, 400, 900) * 5]
    placed = shifts(sequences, 800)
    assert placed[::2] == [0] * 10 and len(set(placed[1::2])) > 3
    assert placed == shifts(sequences, 800)
    for (ids, _), shift in zip(sequences, placed, strict=True):
        assert 0 <= shift and (shift + len(ids) <= 800 or shift == 0)
    short = sorted(placed[1::4])
    assert short[0] < 150 and short[-1] > 550 and shifts(sequences, None) == [0] * 20


def test_a_reach_is_in_the_card_and_in_the_weights(tmp_path):
    trained = {
        reach: train_hash_weights(tiny_model("llama"), sequences(), FAST, hidden=16, reach=reach,
                                  out_dir=tmp_path / str(reach), progress=False)
        for reach in (None, 500)
    }  # fmt: skip
    assert trained[500].card["data"]["reach"] == 500 and "reach" not in trained[None].card["data"]
    assert trained[500].sha256 != trained[None].sha256


@pytest.mark.parametrize("changes", [
    {"group": "each", "average_group": True}, {"group": "each", "average_group": False},
    {"group": "sum", "average_group": True}, {"group": "sum", "average_group": False},
    {"init": "transform", "average_group": False}, {"init": "transform", "average_group": True},
], ids=str)  # fmt: skip
def test_the_trainers_slopes_turn_scores_of_codes_into_the_logits_of_the_loss(data, changes):
    recipe = FAST.vary(loss="sampling", precision="float32", scale=3.0, **changes)
    config = HashConfig((0,), **SHAPES, **recipe.shape, hidden=16)
    trainer = LayerTrainer(data[0][:2], config, recipe, seed=0)
    for number in range(3):
        trainer.step(number)
    layer, maps = data[1][0], trainer.maps()
    q, k = maps.query(layer.queries[None])[0], unpack_bits(encode(layer.keys[None], maps.key), 32)
    signs = k[0].float() * 2 - 1
    if recipe.group == "sum":
        q = torch.where(q > 0, 1.0, -1.0)
    logits = relaxed_scores(q, signs, recipe.average_group and trainer.digits is None, recipe.group)
    scale = trainer.log_scale.exp().repeat_interleave(len(logits) // 2)[:, None, None]
    if recipe.average_group and trainer.digits is not None:
        scale = scale / trainer.digits.levels.shape[-1]
    logits = (logits * scale).log_softmax(-1)
    scores = map_scores(maps, layer, torch.arange(len(layer.positions)), recipe.group).float()
    own = (scores * trainer.slopes()[:, None, None]).log_softmax(-1)
    torch.testing.assert_close(own, logits, rtol=1e-4, atol=1e-4)


def test_the_sampling_loss_keeps_the_maps_that_estimate_best(data):
    """Best by the divergence of held-out rows, which is that of a float64 loop."""
    config = HashConfig((0,), **SHAPES, folds=3, depth=1)
    recipe = TrainRecipe.default().vary(
        steps=40, evaluate_every=4, learning_rate=0.1, schedule="constant"
    )
    trained = train_layer(data[0][:2], data[1][:1], config, recipe, progress=False)
    best = min(record["divergence"] for record in trained.history)
    assert best < trained.history[0]["divergence"]
    assert best < trained.history[-1]["divergence"]  # the last maps are not the best
    layer, rows = data[1][0], telling_rows(data[1][0].positions, **WINDOW)
    scores, total = map_scores(trained.maps, layer, rows, "each").double(), 0.0
    for head in range(4):
        for number, row in enumerate(rows.tolist()):
            free = slice(WINDOW["sink"], int(layer.positions[row]) + 1 - WINDOW["local"])
            logits = layer.queries[head, row] @ layer.keys[head // 2, free].T * layer.scaling
            estimated = (trained.slopes[head] * scores[head, number, free]).softmax(-1)
            total += float(divergence_of(logits.double().softmax(-1), estimated))
    given = (trained.maps, trained.slopes, data[1][:1], "each", *WINDOW.values())
    assert total / (4 * len(rows)) == pytest.approx(mean_divergence(*given), rel=1e-4)
    assert abs(best - mean_divergence(*given)) < 0.1  # a slope for each head, not for a group


def divergence_of(a, w):
    w = w + 0.1 / len(w)
    return ((a * a / w).sum() * w.sum()).log()
