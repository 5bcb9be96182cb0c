"""Slopes from scores to logits: found where scores are logits in another unit, then kept."""

import pytest
import torch

from hashattn.hashing import (
    HashWeights,
    TrainRecipe,
    calibrate_transform,
    capture,
    renew_slopes,
    train_hash_weights,
)
from hashattn.hashing.capture import CapturedLayer
from hashattn.hashing.labels import attention_logits, candidate_mask
from hashattn.hashing.slopes import Slope, map_slopes, telling_rows
from hashattn.selectors import make_selector
from hashattn.selectors.hash import HashSelector
from hashattn.selectors.slopes import fit_slopes
from helpers import prompt, tiny_model

STEPS = TrainRecipe.default().vary(steps=4, evaluate_every=4, top=8, sink=2, local=4)


def captured(seed: int = 0, heads: int = 4) -> CapturedLayer:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(heads, 12, 16, generator=generator)
    keys = torch.randn(2, 400, 16, generator=generator)
    return CapturedLayer(0, queries, torch.arange(388, 400), keys, scaling=0.5)


@pytest.mark.parametrize("unit", [0.01, 1.0, 30.0])
def test_scores_that_are_logits_in_another_unit_give_that_unit(unit):
    layer = captured()
    slope, rows = Slope(2, 4), telling_rows(captured().positions, 2, 4)
    logits = attention_logits(layer.queries[:, rows], layer.keys, layer.scaling)
    offset = torch.randn(4, len(rows), 1)  # a constant of the row tells nothing
    slope.add(layer, rows, (logits + offset) / unit)
    torch.testing.assert_close(slope.best(), torch.full((4,), unit), rtol=0.08, atol=0)


def test_noise_flattens_the_slope_and_its_divergence_is_least():
    """Scores that are logits and noise: the best slope is below 1, and no other on a fine grid has
    a smaller sum(a^2 / w) sum(w)."""
    layer, slope = captured(3), Slope(2, 4)
    rows = telling_rows(layer.positions, 2, 4)
    logits = attention_logits(layer.queries[:, rows], layer.keys, layer.scaling)
    scores = logits + 2 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    slope.add(layer, rows, scores)
    best = slope.best()
    assert (best < 0.9).all()
    allowed = candidate_mask(layer.positions[rows], 400, 2, 4)

    def divergence(slopes: torch.Tensor) -> torch.Tensor:
        a = logits.double().masked_fill(~allowed, -torch.inf).softmax(-1)
        w = (scores * slopes[:, None, None]).double().masked_fill(~allowed, -torch.inf).softmax(-1)
        w = w + 0.1 / allowed.sum(-1, keepdim=True) * allowed
        return ((a * a / w.clamp(min=1e-300)).sum(-1) * w.sum(-1)).log().sum(-1)

    least = divergence(best)
    for factor in (0.3, 0.6, 1.6, 3.0):
        assert (divergence(best * factor) > least - 0.02 * len(rows)).all()


def test_a_list_for_several_heads_estimates_the_sum_of_their_weights():
    layer, slope = captured(5), Slope(2, 4)
    rows = telling_rows(layer.positions, 2, 4)
    logits = attention_logits(layer.queries[:, rows], layer.keys, layer.scaling)
    allowed = candidate_mask(layer.positions[rows], 400, 2, 4)
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1).unflatten(0, (2, 2)).sum(1)
    slope.add(layer, rows, weights.log() / 4)
    torch.testing.assert_close(slope.best(), torch.full((2,), 4.0), rtol=0.08, atol=0)


def test_rows_that_see_too_little_are_left_out():
    assert telling_rows(torch.arange(100), 2, 4).min() == 24
    assert len(telling_rows(torch.arange(5000), 2, 4)) <= 32
    with pytest.raises(ValueError, match="no captured row sees 24 tokens"):
        Slope(2, 4).best()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Model, weights of the default recipe, and the validation sequence's captures."""
    model, folder = tiny_model("llama"), tmp_path_factory.mktemp("trained")
    sequences = [(prompt(length=200, seed=seed)[0], torch.arange(60, 200, 4)) for seed in (1, 2)]
    weights = train_hash_weights(model, sequences[:1], STEPS, validation=sequences[1:],
                                 out_dir=folder, progress=False)  # fmt: skip
    ids, rows = sequences[1]
    return model, weights, list(capture(model, ids, rows=rows).values()), folder, sequences


def test_training_keeps_the_slopes_and_reuses_them(trained):
    model, weights, layers, folder, sequences = trained
    for layer in layers:
        slopes = map_slopes(weights.maps[layer.layer], [layer], "each", 2, 4)
        torch.testing.assert_close(weights.slopes[layer.layer], slopes)
    again = train_hash_weights(model, sequences[:1], STEPS, validation=sequences[1:],
                               out_dir=folder, progress=False)  # fmt: skip
    assert again.card["slopes"] == weights.card["slopes"]
    loaded = HashWeights.load(folder, model)
    assert HashSelector(loaded).slopes[0].tolist() == weights.card["slopes"]["0"]


def test_slopes_belong_to_the_form_that_was_trained(trained):
    _, weights, layers, _, _ = trained
    assert HashSelector(weights, layout="per_kv_head").slopes is None
    fitted = fit_slopes(HashSelector(weights, layout="per_kv_head"), layers, sink=2, local=4)
    assert fitted.slopes[0].shape == (2,)
    graded = fit_slopes(HashSelector(weights), layers, sink=2, local=4)
    for layer in weights.slopes:  # grading rounds the query's weights, no more
        torch.testing.assert_close(graded.slopes[layer], weights.slopes[layer], rtol=0.15, atol=0)


def test_older_weights_get_their_slopes_afterwards(trained, tmp_path):
    _, weights, layers, _, _ = trained
    old = HashWeights(weights.config, weights.maps,
                      {k: v for k, v in weights.card.items() if k != "slopes"})  # fmt: skip
    old.save(tmp_path)
    assert HashWeights.load(tmp_path).slopes is None
    renewed = renew_slopes(tmp_path, layers, sink=2, local=4)
    assert renewed.card["slopes"] == weights.card["slopes"]
    assert HashWeights.load(tmp_path).sha256 == weights.sha256
    with pytest.raises(ValueError, match=r"layers \[0\] too"):
        renew_slopes(tmp_path, layers[1:])
    with pytest.raises(ValueError, match="rows that see 800 tokens or more"):
        renew_slopes(tmp_path, layers, sink=100, local=100)


@pytest.mark.parametrize("damaged", [[1.0], {"0": [1.0, 1.0, 1.0, -1.0]}, {"0": [1.0] * 3}])
def test_damaged_slopes_are_refused(trained, damaged):
    _, weights, _, _, _ = trained
    bad = HashWeights(weights.config, weights.maps, weights.card | {"slopes": damaged})
    with pytest.raises(ValueError, match="slopes = .*: must be positive numbers by layer"):
        HashSelector(bad).slopes  # noqa: B018


def test_a_calibrated_code_estimates_the_logits_themselves():
    layers = [captured(seed) for seed in range(3)]
    weights = calibrate_transform(layers, bits=64, folds=3)
    assert weights.slopes[0].tolist() == [0.5] * 4
    fitted = fit_slopes(HashSelector(weights), layers, sink=2, local=4)
    torch.testing.assert_close(fitted.slopes[0], weights.slopes[0], rtol=0.2, atol=0)


@pytest.mark.parametrize("name", ["lsh", "pqcache", "quest"])
def test_other_methods_are_fitted(name):
    layers = [captured(seed) for seed in range(2)]
    fitted = fit_slopes(make_selector(name), layers, sink=2, local=4)
    assert all((slope > 0).all() for slope in fitted.slopes.values())
