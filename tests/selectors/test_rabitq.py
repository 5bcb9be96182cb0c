"""RaBitQ against its definition: rotated signs, the factor, and that estimates are not biased."""

import pytest
import torch

from hashattn.hashing import CapturedLayer
from hashattn.selectors.base import KeyView
from hashattn.selectors.rabitq import RaBitQSelector

LAYER, HEADS, KV_HEADS, N, D = 0, 4, 2, 80, 32
GROUP = HEADS // KV_HEADS


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def captured(seed=1, n=600):
    keys = drawn(KV_HEADS, n, D, seed=seed) + 2 * drawn(KV_HEADS, 1, D, seed=9)
    return CapturedLayer(LAYER, drawn(HEADS, 9, D, seed=7), torch.arange(n - 9, n), keys, 0.3)


def scored(selector, queries, keys):
    index = selector.encode_keys(LAYER, keys)
    stores = {name: selector.new_store(name, part) for name, part in index.items()}
    for name, part in index.items():
        stores[name].append(part)
    view = KeyView(keys, {name: store.value for name, store in stores.items()})
    return selector.scores(LAYER, queries, view, 1.0)


def inputs():
    return drawn(1, HEADS, 3, D, seed=5), captured(seed=21, n=N).keys[None]


def rotation(selector):
    """(KV heads, D, planes) of the key maps, which are nothing else."""
    return selector.weights.layer(LAYER, "cpu").key.weights[0]


def test_one_bit_is_the_sign_of_the_rotated_centred_key_against_the_real_query():
    selector = RaBitQSelector.calibrate([captured()])
    queries, keys = inputs()
    found = scored(selector, queries, keys).float()
    mean = captured().keys.mean(1)
    for head in range(HEADS):
        turn = rotation(selector)[head // GROUP]
        assert torch.allclose(turn.T @ turn, torch.eye(D), atol=1e-5)
        signs = torch.sign((keys[0, head // GROUP] - mean[head // GROUP]) @ turn)
        expected = queries[0, head] @ turn @ signs.T
        for row in range(3):  # graded, in five binary digits
            both = torch.stack([found[0, head, row], expected[row]])
            assert float(torch.corrcoef(both)[0, 1]) > 0.98


@pytest.mark.parametrize("digits", [1, 2])
def test_the_factor_makes_the_estimate_unbiased(digits):
    """Over rotations, within three standard errors."""
    queries, keys = inputs()
    mean = captured().keys.mean(1)
    centred = keys[0] - mean[:, None]
    exact = (queries[0] @ centred.repeat_interleave(GROUP, 0).mT)[:, :, ::7]
    seen = torch.stack([
        scored(RaBitQSelector.calibrate([captured()], digits=digits, factor=True, seed=seed),
               queries, keys)[0, :, :, ::7]
        for seed in range(60)
    ])  # fmt: skip
    deviations = (seen.mean(0) - exact) / (seen.std(0) / 60**0.5)
    assert 0.8 < float(deviations.square().mean()) < 1.4  # 1, were they normal
    assert float(deviations.abs().max()) < 5


@pytest.mark.parametrize("factor", [False, True])
def test_more_bits_are_nearer_to_the_exact_scores(factor):
    queries, keys = inputs()
    exact = queries[0] @ keys[0].repeat_interleave(GROUP, 0).mT

    def nearness(digits):
        selector = RaBitQSelector.calibrate([captured()], digits=digits, factor=factor)
        found = scored(selector, queries, keys)[0].float()
        pairs = zip(found.flatten(0, 1), exact.flatten(0, 1), strict=True)
        return sum(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs) / HEADS / 3

    one, two, four = (nearness(digits) for digits in (1, 2, 4))
    assert one < two < four and one > 0.7 and two > 0.9 and four > 0.98


def test_directions_may_be_fewer_or_more_than_channels():
    for planes in (32, 64, 96):
        selector = RaBitQSelector.calibrate([captured()], planes=planes)
        assert selector.auxiliary_bits(GROUP, D) == planes
        turn = rotation(selector)[0]
        for block in turn.split(D, dim=1):  # each rotation by itself
            assert torch.allclose(block.T @ block, torch.eye(D), atol=1e-5)
    with pytest.raises(ValueError, match="bits = 48: must be a positive multiple of 32"):
        RaBitQSelector.calibrate([captured()], planes=48)


def test_bits_and_records():
    selector = RaBitQSelector.calibrate([captured()], digits=2, factor=True)
    assert selector.auxiliary_bits(GROUP, D) == 2 * D + 16
    assert selector.record()["parameters"]["factor"] is True
    with pytest.raises(ValueError, match="calibration got no captured layers"):
        RaBitQSelector.calibrate([])
