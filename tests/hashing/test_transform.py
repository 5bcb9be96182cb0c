"""Transform codes: how bits are dealt, where levels lie, what calibration keeps, and how training
goes on from them."""

from itertools import product

import pytest
import torch

from hashattn.hashing import CapturedLayer, HashConfig, HashWeights, TrainRecipe
from hashattn.hashing.layer import LayerTrainer
from hashattn.hashing.transform import (
    SAMPLE,
    Digits,
    calibrate_transform,
    deal_bits,
    fit_levels,
    quantise,
)
from hashattn.kernels import encode, grade_bits, hamming_scores, unpack_bits

DIM, HEADS, KV_HEADS = 32, 4, 2
# of a normal variable, deviation 1, with 1 to 4 bits (Max 1960, table I)
ERRORS = [1.0, 0.3634, 0.1175, 0.03454, 0.009497]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sequence(seed, n=600, rows=40, layer=0):
    """Keys that differ from one another mostly in a few directions, around a mean that is not 0,
    and queries that look at other directions more."""
    mix = draw(KV_HEADS, DIM, DIM, seed=90 + layer) * 0.9 ** torch.arange(DIM)
    look = draw(HEADS, DIM, DIM, seed=91 + layer) * 0.95 ** torch.arange(DIM)
    keys = draw(KV_HEADS, n, DIM, seed=seed) @ mix.mT + 2
    queries = draw(HEADS, rows, DIM, seed=seed + 1) @ look.mT
    return CapturedLayer(layer, queries, torch.arange(n - rows, n), keys, DIM**-0.5)


def scores(weights, captured):
    """Graded scores (Hq, rows, n) by the kernels, float."""
    maps = weights.layer(captured.layer, "cpu")
    queries = grade_bits(maps.query(captured.queries[None]), **weights.config.grades)
    return hamming_scores(queries, encode(captured.keys[None], maps.key))[0].float()


def correlation(weights, captured):
    """Of scores with q.k, over the tokens of a query; mean over queries and heads."""
    keys = captured.keys.repeat_interleave(HEADS // KV_HEADS, 0)
    pairs = [scores(weights, captured), captured.queries @ keys.mT]
    a, b = (x - x.mean(-1, keepdim=True) for x in pairs)
    return float(((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean())


@pytest.mark.parametrize("most", [1, 2, 4])
def test_no_other_way_to_deal_bits_has_a_smaller_error(most):
    sizes = torch.tensor([5.0, 3.0, 1.0, 0.4, 0.02])
    for bits in range(1, 5 * min(most, 2)):
        ways = [w for w in product(range(most + 1), repeat=5) if sum(w) == bits]
        errors = [sum(s * ERRORS[b] for s, b in zip(sizes.tolist(), w, strict=True)) for w in ways]
        dealt = deal_bits(sizes, bits, most)
        error = sum(s * ERRORS[b] for s, b in zip(sizes.tolist(), dealt.tolist(), strict=True))
        assert int(dealt.sum()) == bits and error == pytest.approx(min(errors))


def test_bits_without_room_are_refused():
    with pytest.raises(ValueError, match="bits = 9: 4 components take at most 8, 2 each"):
        deal_bits(torch.ones(4), 9, 2)
    with pytest.raises(ValueError, match="bits = 64: 32 components take at most 32, 1 each"):
        calibrate_transform([sequence(1)], bits=64, folds=0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_of_a_normal_variable_are_nearly_the_best(bits):
    values = draw(40_000) * 3 + 5
    middle, weights = fit_levels(values, bits)
    signs = quantise(values - middle, weights)
    error = (values - middle - signs @ weights).square().mean() / 9
    # levels that are sums of signs are the best up to 2 bits, and up to a quarter worse beyond
    assert ERRORS[bits] * 0.97 < error < ERRORS[bits] * (1.03 if bits < 3 else 1.25)
    sums = torch.tensor(list(product((-1.0, 1.0), repeat=bits))) @ weights
    nearest = (values[:, None] - middle - sums).abs().amin(1)
    torch.testing.assert_close((values - middle - signs @ weights).abs(), nearest)


def test_a_constant_component_has_levels_too():
    middle, weights = fit_levels(torch.full((50,), 2.0), 2)
    assert middle == pytest.approx(2.0) and weights.isfinite().all()


def test_more_bits_tell_the_product_better():
    training, held_out = [sequence(s) for s in range(0, 8, 2)], sequence(50)
    found = [correlation(calibrate_transform(training, bits=b), held_out) for b in (32, 64, 96)]
    assert 0.9 < found[0] < found[1] - 0.01 and found[1] < found[2] - 0.001
    signs = correlation(calibrate_transform(training, bits=32, folds=0), held_out)
    assert signs < found[0] - 0.01  # one bit each: too many for some, too few for others


def test_a_bit_is_a_digit_of_a_component():
    """Decoded by hand, from the query's side: the sum of the bits' shares is the float score."""
    captured = sequence(1)
    weights = calibrate_transform([captured], bits=64)
    maps = weights.layer(0, "cpu")
    signs = unpack_bits(encode(captured.keys[None], maps.key), 64)[0].float() * 2 - 1
    shares = maps.query(captured.queries[None])[0]
    estimated = shares @ signs.repeat_interleave(2, 0).mT
    exact = captured.queries @ (captured.keys - captured.keys.mean(1, keepdim=True)) \
        .repeat_interleave(2, 0).mT  # fmt: skip
    estimated, exact = (x - x.mean(-1, keepdim=True) for x in (estimated, exact))
    assert (estimated - exact).square().mean() < 0.05 * exact.square().mean()
    # in units of q.k: the scale is right, too
    assert (estimated * exact).sum() / estimated.square().sum() == pytest.approx(1, abs=0.05)


def test_sequences_may_come_one_by_one_and_only_some_keys_are_kept():
    many = [sequence(s, n=5000) for s in range(0, 40, 2)]
    together = calibrate_transform(many, bits=64)
    streamed = calibrate_transform((sequence(s, n=5000) for s in range(0, 40, 2)), bits=64)
    assert together.sha256 == streamed.sha256
    assert together.card["data"] == {
        "keys": 100_000, "queries": 20 * 40 * HEADS // KV_HEADS, "longest": 5000,
    }  # fmt: skip
    assert calibrate_transform([sequence(0, n=64), sequence(1, n=9)], bits=64).learned_length == 64
    from hashattn.hashing.transform import _Streamed

    kept = _Streamed(many[0])
    for captured in many:
        kept.add(captured)
        assert sum(part.shape[1] for part in kept.samples) <= SAMPLE


def test_every_layer_and_layout_has_its_code():
    captured = [sequence(s, layer=layer) for s in (0, 2) for layer in (3, 1)]
    weights = calibrate_transform(captured, bits=32)
    assert weights.config.layers == (1, 3) and weights.config.kv_heads == KV_HEADS
    each = calibrate_transform(captured, bits=32, layout="per_query_head")
    keys = sequence(9, layer=3).keys[None]
    codes, copies = weights.encode_keys(3, keys), each.encode_keys(3, keys)
    assert torch.equal(copies, codes.repeat_interleave(2, 1))
    with pytest.raises(ValueError, match="calibration got no captured layers"):
        calibrate_transform([])


def test_they_are_saved_and_loaded_as_hash_weights_are(tmp_path):
    weights = calibrate_transform([sequence(0)], bits=64)
    weights.save(tmp_path)
    loaded = HashWeights.load(tmp_path)
    keys = sequence(7).keys[None]
    assert loaded.sha256 == weights.sha256 and loaded.config == weights.config
    assert torch.equal(loaded.encode_keys(0, keys), weights.encode_keys(0, keys))
    assert loaded.shard is not None and loaded.config.folds == 3 and loaded.trained


def test_weights_without_folds_are_recorded_as_before():
    """Their content hash and files do not change."""
    config = HashConfig((0,), HEADS, KV_HEADS, DIM)
    assert "folds" not in config.record()
    assert {name for name, _ in HashWeights.random(config, 0).maps[0].tensors()} == {
        f"{side}.{stage}.{part}"
        for side in ("key", "query") for stage in (0, 1) for part in ("weight", "bias")
    }  # fmt: skip
    with pytest.raises(ValueError, match="folds = 4: must be 0 to 3"):
        HashConfig((0,), HEADS, KV_HEADS, DIM, folds=4)


@pytest.mark.parametrize("depth", [1, 2])
def test_training_begins_with_the_calibrated_code(depth):
    captures = [sequence(s) for s in range(0, 8, 2)]
    recipe = TrainRecipe.default().vary(precision="float32", sink=4, local=28, top=8)
    config = HashConfig((0,), HEADS, KV_HEADS, DIM, bits=64, depth=depth, hidden=64, folds=3)
    first = LayerTrainer(captures, config, recipe, seed=0).maps()
    calibrated = calibrate_transform(captures, bits=64).layer(0, "cpu")
    codes = [unpack_bits(encode(captures[0].keys[None], m.key), 64) for m in (first, calibrated)]
    # noise of hidden units, and levels fitted to more keys
    assert (codes[0] == codes[1]).float().mean() > (0.97 if depth == 1 else 0.9)


@pytest.mark.parametrize("layout", ["per_kv_head", "per_query_head"])
def test_training_can_go_on_from_weights_with_folds(layout):
    """Components and levels are read off the maps of bits, which they give again."""
    captures = [sequence(s) for s in range(0, 8, 2)]
    weights = calibrate_transform(captures, bits=64, layout=layout)
    start = weights.layer(0, "cpu")
    recipe = TrainRecipe.signs().vary(precision="float32", top=8)
    again = LayerTrainer(captures, weights.config, recipe, 0, start).maps()
    keys, queries = captures[0].keys[None], captures[0].queries[None]
    assert torch.equal(encode(keys, again.key), encode(keys, start.key))
    # the same weights in other units, one for the heads that share a code
    ratio = again.query(queries)[0] / start.query(queries)[0]
    torch.testing.assert_close(ratio, ratio.mean((1, 2), keepdim=True).expand_as(ratio),
                               rtol=1e-3, atol=0)  # fmt: skip


def test_gradients_pass_within_the_levels_and_reach_these():
    levels = torch.tensor([[[2.0, 1.0], [1.0, 0.0]]]).requires_grad_()
    components = torch.tensor([[[0.4, 0.3], [-2.2, 5.0], [9.0, -0.1]]]).requires_grad_()
    values = Digits(levels).quantise(components)
    assert values.tolist() == [[[1.0, 1.0], [-3.0, 1.0], [3.0, -1.0]]]
    values.sum().backward()
    assert components.grad.tolist() == [[[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]]
    assert levels.grad.tolist() == [[[1.0, 1.0], [-1.0, 1.0]]]


def test_folds_need_a_recipe_that_begins_with_a_transform_code():
    config = HashConfig((0,), HEADS, KV_HEADS, DIM, bits=32, folds=2)
    with pytest.raises(ValueError, match='folds = 2: must be 0 where init is "spectral"'):
        LayerTrainer([sequence(0)], config, TrainRecipe.signs(), 0)


def test_training_goes_on_from_it():
    captures = [sequence(s) for s in range(0, 12, 2)]
    recipe = TrainRecipe.default().vary(
        precision="float32", steps=30, evaluate_every=15, rows_per_step=16, top=8
    )
    config = HashConfig((0,), HEADS, KV_HEADS, DIM, bits=32, depth=1, folds=2)
    trainer = LayerTrainer(captures, config, recipe, seed=0)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    losses = [trainer.step(number) for number in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
    moved = {name for name, old, new in
             zip(trainer.names, before, trainer.parameters, strict=True)
             if not torch.equal(old, new)}  # fmt: skip
    assert moved == set(trainer.names) and trainer.log_levels.abs().max() > 0
