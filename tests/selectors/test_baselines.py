"""Every baseline's scores against a brute-force reference: loops, float64, own formulas."""

import pytest
import torch

from hashattn.kernels import unpack_bits
from hashattn.selectors import make_selector
from hashattn.selectors.base import KeyView
from hashattn.selectors.double_sparsity import DoubleSparsitySelector, quantise
from hashattn.selectors.lsh import LSHSelector
from hashattn.selectors.quest import QuestSelector

B, HEADS, KV_HEADS, ROWS, N, D = 2, 4, 2, 3, 43, 8
GROUP = HEADS // KV_HEADS


@pytest.fixture
def qk():
    generator = torch.Generator().manual_seed(7)
    # models hand over transposed views, not contiguous queries
    queries = torch.randn(B, ROWS, HEADS, D, generator=generator).transpose(1, 2)
    keys = torch.randn(B, KV_HEADS, N, D, generator=generator) * torch.linspace(0.2, 3, D) + 0.3
    return queries, keys


def scores(selector, qk, visible=None, layer=1):
    queries, keys = qk
    index = selector.encode_keys(layer, keys)
    assert all(t.shape[2] == N for t in index.values())
    return selector.scores(layer, queries, KeyView(keys, index, visible), D**-0.5)


class Captured:
    def __init__(self, layer, queries, keys):
        self.layer, self.queries, self.keys = layer, queries, keys


# LSH


@pytest.mark.parametrize("bits", [32, 96])
def test_lsh_counts_matching_signs_of_its_planes(qk, bits):
    selector = LSHSelector(bits=bits, seed=3)
    found = scores(selector, qk)
    queries, keys = qk
    planes = torch.randn(
        KV_HEADS, D, bits, generator=torch.Generator().manual_seed(3 * 1_000_003 + 1)
    ).double()
    expected = torch.zeros(B, KV_HEADS, ROWS, N, dtype=torch.int32)
    for b in range(B):
        for head in range(HEADS):
            kv = head // GROUP
            for row in range(ROWS):
                for token in range(N):
                    q_side = queries[b, head, row].double() @ planes[kv] > 0
                    k_side = keys[b, kv, token].double() @ planes[kv] > 0
                    expected[b, kv, row, token] += (q_side == k_side).sum()
    assert torch.equal(found, expected)


def test_lsh_per_query_head_uses_other_planes_for_each_head_of_a_group(qk):
    selector = LSHSelector(bits=64, layout="per_query_head", query_heads=HEADS)
    queries, keys = qk
    codes = selector.encode_keys(0, keys)["codes"]
    assert codes.shape == (B, HEADS, N, 2)
    assert not torch.equal(codes[:, 0], codes[:, 1])
    found = selector.scores(0, queries, KeyView(keys, {"codes": codes}), 1.0)
    bits = unpack_bits(codes, 64)
    own = LSHSelector(bits=64, layout="per_query_head", query_heads=HEADS)
    query_bits = unpack_bits(own.encode_keys(0, queries[:, :, :1])["codes"], 64)
    assert torch.equal(found[:, :, :1], (query_bits == bits).sum(-1, dtype=torch.int32)[:, :, None])


def test_lsh_bit_agreement_estimates_the_angle():
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(1, 1, n, 16, generator=generator) for n in (4, 20))
    selector = LSHSelector(bits=8192)
    view = KeyView(keys, selector.encode_keys(0, keys))
    agreement = selector.scores(0, queries, view, 1.0)[0, 0] / 8192
    cosine = torch.nn.functional.cosine_similarity(queries[0, 0][:, None], keys[0, 0][None], dim=-1)
    assert (agreement - (1 - torch.arccos(cosine) / torch.pi)).abs().max() < 0.03


def test_lsh_codes_do_not_depend_on_how_many_keys_come_at_once(qk):
    selector = LSHSelector(bits=32)
    _, keys = qk
    together = selector.encode_keys(0, keys)["codes"]
    one_by_one = [selector.encode_keys(0, keys[:, :, i : i + 1])["codes"] for i in range(N)]
    assert torch.equal(together, torch.cat(one_by_one, dim=2))


def test_lsh_seed_and_layer_choose_the_planes(qk):
    _, keys = qk
    codes = LSHSelector(seed=1).encode_keys(0, keys)["codes"]
    assert torch.equal(codes, LSHSelector(seed=1).encode_keys(0, keys)["codes"])
    assert not torch.equal(codes, LSHSelector(seed=2).encode_keys(0, keys)["codes"])
    assert not torch.equal(codes, LSHSelector(seed=1).encode_keys(1, keys)["codes"])


def test_lsh_centring_is_hashing_keys_minus_their_mean(qk):
    queries, keys = qk
    selector = LSHSelector.calibrate([Captured(1, queries[0], keys[0])], bits=32, seed=5)
    centred = keys - keys[0].mean(dim=1)[None, :, None]
    plain = LSHSelector(bits=32, seed=5)
    codes = selector.encode_keys(1, keys)["codes"]
    assert torch.equal(codes, plain.encode_keys(1, centred)["codes"])
    assert not torch.equal(codes, plain.encode_keys(1, keys)["codes"])
    assert selector.record()["weights_sha256"] and selector.record()["parameters"]["centred"]


# Double Sparsity


def calibrated(qk, **parameters):
    captured = [Captured(1, qk[0][b], qk[1][b]) for b in range(B)]
    return DoubleSparsitySelector.calibrate(captured, **parameters)


@pytest.mark.parametrize("per_kv_head", [False, True])
def test_calibration_ranks_channels_by_mean_absolute_product_of_all_pairs(qk, per_kv_head):
    queries, keys = (x.double() for x in qk)
    layout = "per_kv_head" if per_kv_head else "per_query_head"
    channels = calibrated(qk, channels_per_head=3, channel_layout=layout).channels[1]
    strength = torch.zeros(HEADS, D, dtype=torch.float64)
    for head in range(HEADS):
        q = torch.cat([queries[b, head] for b in range(B)])
        k = torch.cat([keys[b, head // GROUP] for b in range(B)])
        for c in range(D):
            strength[head, c] = (q[:, None, c] * k[None, :, c]).abs().mean()
    if per_kv_head:
        strength = strength.view(KV_HEADS, GROUP, D).sum(1)
    assert torch.equal(channels, strength.topk(3).indices.sort().values)


def reference_quantise(values, bits):
    """Asymmetric min-max over one token's channels, its minimum and step kept in half precision."""
    low = torch.tensor(min(values)).half().double()
    step = ((max(values) - low) / (2**bits - 1)).half().double()
    if step == 0:
        return [float(low) for _ in values]
    return [
        float(low + step * min(max(torch.round((v - low) / step), 0), 2**bits - 1)) for v in values
    ]


@pytest.mark.parametrize("label_bits", [2, 4, 8, 16])
@pytest.mark.parametrize("channel_layout", ["per_query_head", "per_kv_head"])
def test_double_sparsity_scores_quantised_channels(qk, label_bits, channel_layout):
    selector = calibrated(
        qk, channels_per_head=4, label_bits=label_bits, channel_layout=channel_layout
    )
    found = scores(selector, qk).double()
    queries, keys = qk
    expected = torch.zeros(B, HEADS, ROWS, N, dtype=torch.float64)
    for b in range(B):
        for head in range(HEADS):
            own = head if channel_layout == "per_query_head" else head // GROUP
            picked = selector.channels[1][own].tolist()
            for row in range(ROWS):
                q = [float(queries[b, head, row, c]) for c in picked]
                for token in range(N):
                    k = [float(keys[b, head // GROUP, token, c]) for c in picked]
                    if label_bits < 16:
                        k = reference_quantise(k, label_bits)
                    else:
                        k = [float(torch.tensor(v).half()) for v in k]
                    left = reference_quantise(q, label_bits) if label_bits < 16 else q
                    expected[b, head, row, token] = sum(x * y for x, y in zip(left, k, strict=True))
    assert (found - expected).abs().max() < 1e-4


def test_double_sparsity_shared_selection_sums_the_group(qk):
    one = calibrated(qk, channels_per_head=4, channel_layout="per_kv_head")
    shared = DoubleSparsitySelector(one.channels, 4, "per_kv_head", layout="per_kv_head")
    each = scores(one, qk)
    found = scores(shared, qk)
    assert found.shape == (B, KV_HEADS, ROWS, N)
    assert torch.allclose(found, each.view(B, KV_HEADS, GROUP, ROWS, N).sum(2), atol=1e-5)


def test_double_sparsity_of_all_channels_at_16_bits_ranks_like_exact_scores(qk):
    queries, keys = qk
    selector = calibrated(qk, channels_per_head=D, label_bits=16)
    exact = queries @ keys.repeat_interleave(GROUP, 1).mT
    assert (scores(selector, qk) - exact).abs().max() < 0.02


def test_quantise_keeps_values_within_half_a_step():
    x = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(1))
    labels, low, step = quantise(x, 4)
    assert labels.max() == 15 and labels.dtype == torch.uint8
    error = (low.float() + step.float() * labels.float() - x).abs()
    assert (error <= step.float() * 0.55).all()  # half a step, and what half precision loses


def test_quantise_of_equal_values_is_finite():
    labels, low, step = quantise(torch.full((2, 4), 1.5), 2)
    assert labels.sum() == 0 and step.sum() == 0 and (low == 1.5).all()


# Quest


def reference_quest(queries, keys, page, starts, bounds=None):
    expected = torch.full((B, HEADS, ROWS, N), float("-inf"), dtype=torch.float64)
    for b in range(B):
        for token in range(starts[b], N):
            first = starts[b] + (token - starts[b]) // page * page
            members = range(first, min(first + page, N))
            for head in range(HEADS):
                k = keys[b, head // GROUP].double()
                for row in range(ROWS):
                    q = queries[b, head, row].double()
                    total = 0.0
                    for c in range(D):
                        low = min(float(k[m, c]) for m in members)
                        high = max(float(k[m, c]) for m in members)
                        total += max(float(q[c]) * low, float(q[c]) * high)
                    expected[b, head, row, token] = total
    return expected


@pytest.mark.parametrize("page", [1, 8, 64])
def test_quest_scores_are_the_page_bounds(qk, page):
    found = scores(QuestSelector(page=page), qk).double()
    expected = reference_quest(*qk, page, [0] * B)
    assert (found - expected).abs().max() < 1e-4


def test_quest_anchors_pages_at_the_first_visible_token_of_each_row(qk):
    visible = torch.ones(B, N, dtype=torch.bool)
    visible[1, :5] = False
    found = scores(QuestSelector(page=8), qk, visible).double()
    expected = reference_quest(*qk, 8, [0, 5])
    assert torch.equal(found.isinf(), expected.isinf())
    assert (found - expected).nan_to_num(0.0).abs().max() < 1e-4


def test_quest_scores_bound_every_exact_score(qk):
    queries, keys = qk
    exact = queries @ keys.repeat_interleave(GROUP, 1).mT
    assert (scores(QuestSelector(page=8), qk) >= exact - 1e-4).all()


def test_quest_page_of_one_token_is_exact(qk):
    queries, keys = qk
    exact = queries @ keys.repeat_interleave(GROUP, 1).mT
    assert (scores(QuestSelector(page=1), qk) - exact).abs().max() < 1e-4


def test_quest_shared_selection_sums_the_group(qk):
    each, shared = scores(QuestSelector(8), qk), scores(QuestSelector(8, layout="per_kv_head"), qk)
    assert torch.allclose(shared, each.view(B, KV_HEADS, GROUP, ROWS, N).sum(2), atol=1e-4)


# what each of them costs, and refusals


@pytest.mark.parametrize(
    ("selector", "bits"),
    [
        (LSHSelector(bits=64), 64),
        (LSHSelector(bits=64, layout="per_query_head", query_heads=32), 256),
        (QuestSelector(page=16, bits=16), 256),
        (QuestSelector(16, 4, grids={0: torch.zeros(8, 2, 128)}), 64),
        (DoubleSparsitySelector({0: torch.zeros(8, 16)}, 4, "per_kv_head"), 64 + 32),
        (DoubleSparsitySelector({0: torch.zeros(32, 16)}, 4), 4 * (64 + 32)),
        (DoubleSparsitySelector({0: torch.zeros(8, 2)}, 16, "per_kv_head"), 32),
    ],
)
def test_nominal_bits_for_llama_3_1_8b_heads(selector, bits):
    assert selector.nominal_bits(group=4, head_dim=128) == bits


def test_auxiliary_bits_are_what_double_sparsity_really_stores(qk):
    selector = calibrated(qk, channels_per_head=4, label_bits=8)
    stored = selector.encode_keys(1, qk[1])
    bits = sum(t.numel() * t.element_size() * 8 for t in stored.values()) / (B * KV_HEADS * N)
    assert selector.auxiliary_bits(GROUP, D) == bits


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("lsh", {"bits": 48}, "multiple of 32"),
        ("lsh", {"layout": "heads"}, "layout"),
        ("lsh", {"layout": "per_query_head"}, "query_heads"),
        ("quest", {"page": 0}, "page"),
        ("quest", {"bits": 3}, "bits"),
        ("quest", {"layout": "heads"}, "layout"),
        ("quest", {"pages": 4}, "pages"),
        ("hush", {}, "hush"),
        ("double_sparsity", {"channels": {}}, "channels"),
        ("double_sparsity", {"channels": {0: torch.zeros(2, 4)}, "label_bits": 5}, "label_bits"),
        ("double_sparsity", {"channels": {0: torch.zeros(2, 4)}, "layout": "per_kv_head"}, "needs"),
    ],
)
def test_wrong_parameters_are_refused_by_name(name, parameters, said):
    with pytest.raises(ValueError, match=said):
        make_selector(name, **parameters)


def test_calibration_without_captures_is_refused():
    with pytest.raises(ValueError, match="capture at least one"):
        DoubleSparsitySelector.calibrate([])
    with pytest.raises(ValueError, match="channels_per_head"):
        DoubleSparsitySelector.calibrate(
            [Captured(0, torch.ones(2, 3, 4), torch.ones(1, 3, 4))], channels_per_head=5
        )


def test_a_layer_without_channels_is_refused(qk):
    with pytest.raises(ValueError, match="layer 9"):
        scores(calibrated(qk, channels_per_head=2), qk, layer=9)


def test_records_tell_calibrations_apart(qk):
    one, two = calibrated(qk, channels_per_head=2), calibrated(qk, channels_per_head=3)
    assert one.record()["weights_sha256"] != two.record()["weights_sha256"]
    assert make_selector("quest", page=8).record() == {
        "name": "quest",
        "parameters": {"page": 8, "bits": 16, "layout": "per_query_head"},
        "weights_sha256": None,
    }
