"""Loki against loops in float64, its basis against the definition of principal components."""

import math

import pytest
import torch

from hashattn.selectors import make_selector
from hashattn.selectors.base import KeyView
from hashattn.selectors.loki import LokiSelector

B, HEADS, KV_HEADS, ROWS, N, D = 2, 4, 2, 3, 31, 8
GROUP = HEADS // KV_HEADS
PADDING = [0, 5]
SCALING = 0.6
LAYER = 3


class Captured:
    def __init__(self, layer, queries, keys):
        self.layer, self.queries, self.keys = layer, queries, keys


def states(seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, ROWS, HEADS, D, generator=generator).transpose(1, 2)
    mixed = torch.randn(KV_HEADS, D, D, generator=generator)
    k = torch.randn(B, KV_HEADS, N, D, generator=generator) * 1.5 ** torch.arange(D) @ mixed + 0.7
    return q, k / 8


def calibrated(k, components=3, **parameters):
    captured = [Captured(LAYER, None, k[0]), Captured(LAYER, None, k[1, :, :20])]
    return LokiSelector.calibrate(captured, components, **parameters)


def view_of(selector, k, padding=PADDING):
    visible = torch.arange(N) >= torch.tensor(padding)[:, None]
    return KeyView(k, selector.encode_keys(LAYER, k), visible)


def reference_logit(q, k, basis):
    total = 0.0
    for component in basis.T.double().tolist():
        on_key = sum(p * x for p, x in zip(component, k.double().tolist(), strict=True))
        on_query = sum(p * x for p, x in zip(component, q.double().tolist(), strict=True))
        total += on_query * float(torch.tensor(on_key).half())
    return total * SCALING


def test_the_basis_holds_the_leading_principal_components_of_centred_keys():
    _, k = states()
    basis = calibrated(k, 3).basis[LAYER].double()
    assert basis.shape == (KV_HEADS, D, 3)
    for head in range(KV_HEADS):
        rows = torch.cat([k[0, head], k[1, head, :20]]).double()
        centred = rows - rows.mean(0)
        own = basis[head]
        assert torch.allclose(own.T @ own, torch.eye(3, dtype=torch.float64), atol=1e-5)
        largest = torch.linalg.svdvals(centred)[:3] ** 2
        assert torch.allclose((centred @ own).square().sum(0), largest, rtol=1e-4)


@pytest.mark.parametrize("components", [1, 3, D])
def test_query_head_scores_are_products_of_components(components):
    q, k = states()
    selector = calibrated(k, components)
    view = view_of(selector, k)
    found = selector.scores(LAYER, q, view, SCALING)
    assert found.shape == (B, HEADS, ROWS, N) and found.dtype == torch.float32
    for b in range(B):
        for head in range(HEADS):
            basis = selector.basis[LAYER][head // GROUP]
            for row in range(ROWS):
                expected = [
                    reference_logit(q[b, head, row], key, basis) for key in k[b, head // GROUP]
                ]
                assert found[b, head, row].tolist() == pytest.approx(expected, abs=5e-3)


def test_kv_head_scores_sum_the_weights_of_the_group():
    q, k = states()
    selector = calibrated(k, 3, layout="per_kv_head")
    found = selector.scores(LAYER, q, view_of(selector, k), SCALING)
    assert found.shape == (B, KV_HEADS, ROWS, N)
    for b in range(B):
        for kv in range(KV_HEADS):
            for row in range(ROWS):
                expected = [0.0] * N
                seen = range(PADDING[b], N - ROWS + row + 1)
                for head in range(kv * GROUP, (kv + 1) * GROUP):
                    exps = [
                        math.exp(
                            reference_logit(q[b, head, row], k[b, kv, t], selector.basis[LAYER][kv])
                        )
                        for t in seen
                    ]
                    for t, one in zip(seen, exps, strict=True):
                        expected[t] += one / sum(exps)
                assert found[b, kv, row].tolist() == pytest.approx(expected, abs=2e-3)


def test_all_components_rotate_and_leave_the_exact_logits():
    q, k = states()
    selector = calibrated(k, D)
    exact = q @ k.repeat_interleave(GROUP, 1).mT * SCALING
    found = selector.scores(LAYER, q, view_of(selector, k), SCALING)
    assert torch.allclose(found, exact, atol=2e-2)


def test_components_do_not_depend_on_how_many_keys_come_at_once():
    _, k = states()
    selector = calibrated(k)
    one_by_one = [selector.encode_keys(LAYER, k[:, :, t : t + 1])["components"] for t in range(N)]
    whole = selector.encode_keys(LAYER, k)["components"]
    assert torch.allclose(torch.cat(one_by_one, 2).float(), whole.float(), atol=2e-3)


def test_a_row_that_sees_nothing_has_finite_scores():
    q, k = states()
    for layout in ("per_query_head", "per_kv_head"):
        selector = calibrated(k, layout=layout)
        view = view_of(selector, k, padding=[0, N])
        assert selector.scores(LAYER, q, view, SCALING).isfinite().all()


def test_auxiliary_bits_are_what_is_stored():
    _, k = states()
    selector = calibrated(k, 3)
    stored = selector.encode_keys(LAYER, k)["components"]
    bits = stored.numel() * stored.element_size() * 8 / (B * KV_HEADS * N)
    assert selector.auxiliary_bits(GROUP, D) == selector.read_bits(GROUP, D) == bits == 48


def test_record_names_parameters_and_tells_bases_apart():
    _, k = states()
    one, two = calibrated(k, 3), calibrated(k * k, 3)
    assert one.record()["parameters"] == {"components": 3, "layout": "per_query_head"}
    assert one.record()["weights_sha256"] != two.record()["weights_sha256"]
    assert one.needs == "calibration" and not one.evicts


def test_bad_parameters_are_refused():
    q, k = states()
    for components in (0, D + 1):
        with pytest.raises(ValueError, match=rf"components = {components}: must be within 1\.\.8"):
            calibrated(k, components)
    with pytest.raises(ValueError, match="layout = 'heads': must be one of"):
        calibrated(k, layout="heads")
    with pytest.raises(ValueError, match="capture at least one"):
        LokiSelector.calibrate([])
    with pytest.raises(ValueError, match=r"same number .* \[2, 3\]"):
        make_selector("loki", basis={0: torch.zeros(2, 8, 3), 1: torch.zeros(2, 8, 2)})
    with pytest.raises(ValueError, match="at least one layer"):
        make_selector("loki", basis={})
    with pytest.raises(ValueError, match="layer 9"):
        calibrated(k).scores(9, q, view_of(calibrated(k), k), SCALING)
