"""HATA: scores bit by bit, labels and loss pair by pair in float64, and what training gains."""

import pytest
import torch

from hashattn import Budget, attach
from hashattn.attention.masks import make_plan
from hashattn.hashing.capture import CapturedLayer
from hashattn.hashing.hata import HataRecipe, hata_loss, label_query, train_hata_weights
from hashattn.kernels import indices_to_mask, select
from hashattn.selectors import make_selector
from hashattn.selectors.base import KeyView
from hashattn.selectors.hata import HATASelector
from helpers import generate, left_padded, tiny_model

B, HEADS, KV_HEADS, ROWS, N, D = 2, 4, 2, 3, 43, 8
GROUP = HEADS // KV_HEADS
LAYER = 1


def states():
    generator = torch.Generator().manual_seed(7)
    # models hand over transposed views, not contiguous queries
    queries = torch.randn(B, ROWS, HEADS, D, generator=generator).transpose(1, 2)
    return queries, torch.randn(B, KV_HEADS, N, D, generator=generator) + 0.3


def random_selector(bits=64, key_norm=False):
    generator = torch.Generator().manual_seed(5)
    weights = {LAYER: torch.randn(KV_HEADS, D, bits, generator=generator)}
    return HATASelector(weights, key_norm, trained=False)


def scores(selector, queries, keys):
    index = selector.encode_keys(LAYER, keys)
    assert all(part.shape[2] == N for part in index.values())
    return selector.scores(LAYER, queries, KeyView(keys, index), D**-0.5)


# the selector


@pytest.mark.parametrize("bits", [32, 96])
@pytest.mark.parametrize("key_norm", [False, True])
def test_scores_sum_matching_bits_over_the_group(bits, key_norm):
    selector = random_selector(bits, key_norm)
    queries, keys = states()
    expected = torch.zeros(B, KV_HEADS, ROWS, N, dtype=torch.float64)
    for b in range(B):
        for head in range(HEADS):
            kv = head // GROUP
            w = selector.weights[LAYER][kv].double()
            for row in range(ROWS):
                q_bits = queries[b, head, row].double() @ w > 0
                for token in range(N):
                    distance = int((q_bits != (keys[b, kv, token].double() @ w > 0)).sum())
                    if key_norm:
                        norm = keys[b, kv, token].double().square().sum().sqrt()
                        expected[b, kv, row, token] += (1 - 2 * distance / bits) * norm
                    else:
                        expected[b, kv, row, token] += bits - distance
    found = scores(selector, queries, keys)
    assert found.is_floating_point() == key_norm
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-3)  # float16 norms


def test_codes_do_not_depend_on_how_many_keys_come_at_once(monkeypatch):
    monkeypatch.setattr("hashattn.selectors.hata.TOKENS_AT_ONCE", 8)  # a chunk is cut too
    selector, keys = random_selector(key_norm=True), states()[1]
    together = selector.encode_keys(LAYER, keys)
    for name in ("codes", "norms"):
        singly = [selector.encode_keys(LAYER, keys[:, :, i : i + 1])[name] for i in range(N)]
        assert torch.equal(together[name], torch.cat(singly, dim=2))


@pytest.mark.parametrize("key_norm", [False, True])
def test_selection_is_the_one_by_scores(key_norm):
    selector, (queries, keys) = random_selector(key_norm=key_norm), states()
    plan = make_plan(None, B, ROWS, N, keys.device, Budget(sink=1, local=2, heavy=6))
    view = KeyView(keys, selector.encode_keys(LAYER, keys))
    found = selector.select(LAYER, queries, view, 1.0, plan)
    expected = select(scores(selector, queries, keys), plan.heavy, plan.candidates, plan.mandatory)
    assert torch.equal(indices_to_mask(found, N), indices_to_mask(expected, N))


@pytest.mark.parametrize("key_norm", [False, True])
def test_padding_and_batch_do_not_change_what_a_model_reads(key_norm):
    model = tiny_model("llama")
    config = model.config
    kv_heads = config.num_key_value_heads
    generator = torch.Generator().manual_seed(2)
    shape = (kv_heads, config.hidden_size // config.num_attention_heads, 32)
    weights = {
        layer: torch.randn(shape, generator=generator) for layer in range(config.num_hidden_layers)
    }
    selector, budget = HATASelector(weights, key_norm), Budget(sink=1, local=3, heavy=6)

    def logits(ids, mask=None):
        with attach(model, selector, budget) as run:
            found = generate(model, ids, mask)[1]
        assert run.receipt.density < 0.5
        return found

    ids, mask = left_padded((40, 27))
    together = logits(ids, mask)
    for row, length in enumerate((40, 27)):
        alone = logits(ids[row : row + 1, 40 - length :])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


def test_auxiliary_bits_are_what_is_stored():
    for key_norm in (False, True):
        selector = random_selector(128, key_norm)
        stored = selector.encode_keys(LAYER, states()[1]).values()
        bits = sum(part.numel() * part.element_size() * 8 for part in stored) / (B * KV_HEADS * N)
        assert selector.auxiliary_bits(GROUP, D) == bits == 128 + 16 * key_norm


def test_records_tell_weights_apart():
    one, two = random_selector(64), random_selector(32)
    assert one.record()["name"] == "hata"
    assert one.record()["parameters"] == {"bits": 64, "key_norm": False}
    assert one.record()["weights_sha256"] != two.record()["weights_sha256"]
    assert (one.needs, one.evicts, one.trained) == ("training", False, False)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"weights": {}}, "weights"),
        ({"weights": {0: torch.zeros(2, 8, 48)}}, "bits = 48: must be"),
        ({"weights": {0: torch.zeros(2, 8, 0)}}, "bits = 0: must be"),
        ({"weights": {0: torch.zeros(8, 32)}}, "KV heads, D, bits"),
        ({"weights": {0: torch.zeros(2, 8, 32), 1: torch.zeros(1, 8, 32)}}, "every layer"),
        ({"weights": {0: torch.zeros(2, 8, 32)}, "bits": 32}, "bits"),
    ],
)
def test_wrong_parameters_are_refused_by_name(parameters, said):
    with pytest.raises(ValueError, match=said):
        make_selector("hata", **parameters)


def test_a_layer_without_weights_is_refused():
    with pytest.raises(ValueError, match="layer 9"):
        random_selector().encode_keys(9, states()[1])


# labels and loss


def captured(layer=LAYER, seed=0, n=200, rows=40, dim=16, scale=1.0):
    """A group's queries look for keys in a quarter of the directions; the rest of a key is noise,
    which hyperplanes drawn at random hash as well."""
    generator = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    generator = torch.Generator().manual_seed(100 + seed)
    q_strength, k_strength = torch.full((dim,), 0.2 * scale), torch.full((dim,), scale)
    q_strength[: dim // 4], k_strength[: dim // 4] = scale, 0.7 * scale
    q = torch.randn(KV_HEADS, 1, rows, dim, generator=generator) * q_strength @ rotation
    q = q.expand(-1, GROUP, -1, -1).flatten(0, 1)
    k = torch.randn(KV_HEADS, n, dim, generator=generator) * k_strength @ rotation
    positions = torch.linspace(n // 4, n - 1, rows).long()
    return CapturedLayer(layer, q, positions, k, dim**-0.5)


@pytest.mark.parametrize("m", [1, 9, 25])
def test_the_best_tenth_is_labelled_from_twenty_to_one_and_the_rest_minus_one(m):
    layer = captured()
    found = label_query(layer.queries[:, 0], layer.keys[:, :m], HataRecipe())
    count = max(1, m // 10)
    for head in range(HEADS):
        q, k = layer.queries[head, 0].double(), layer.keys[head // GROUP, :m].double()
        order = sorted(range(m), key=lambda token: -float(q @ k[token]))
        for rank, token in enumerate(order):
            label = -1.0
            if rank < count:
                label = 20.0 if count == 1 else 20 - 19 * rank / (count - 1)
            assert found.labels[head, token] == pytest.approx(label)


def test_equal_scores_are_labelled_in_the_order_of_tokens():
    found = label_query(torch.ones(1, 2), torch.ones(1, 30, 2), HataRecipe())
    assert found.labels[0].tolist() == [20.0, 10.5, 1.0] + [-1.0] * 27


def reference_loss(weights, examples, recipe):
    """Every pair of every query head by itself."""
    w = weights.double()
    kv_heads, _, bits = w.shape

    def h(x):
        return 2 / (1 + torch.exp(-recipe.sharpness * x)) - 1

    count = sum(example.labels.shape[1] for example in examples)
    similarity = torch.zeros((), dtype=torch.float64)
    balance = torch.zeros((), dtype=torch.float64)
    for head in range(HEADS):
        kv = head // GROUP
        mean = torch.zeros(bits, dtype=torch.float64)
        for example in examples:
            q = h(example.queries[head].double() @ w[kv])
            for token in range(example.labels.shape[1]):
                k = h(example.keys[kv, token].double() @ w[kv])
                label = float(example.labels[head, token])
                similarity += label * sum((q - k) ** 2) / count
                mean += (q + k) / (count * bits)
        balance += (mean**2).sum()
    off = 0.0
    for kv in range(kv_heads):
        for i in range(bits):
            for j in range(bits):
                off += float(w[kv, :, i] @ w[kv, :, j] - float(i == j)) ** 2
    pairs = recipe.similarity * similarity + recipe.balance * balance
    return pairs + recipe.decorrelation * off**0.5


@pytest.mark.parametrize(
    "settings", [{}, {"similarity": 1.0, "balance": 900.0, "decorrelation": 0.0, "sharpness": 1.0}]
)
def test_loss_is_the_sum_over_pairs(settings):
    recipe, layer = HataRecipe(**settings), captured(dim=D)
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(KV_HEADS, D, 32, generator=generator)
    examples = [
        label_query(torch.randn(HEADS, D, generator=generator), layer.keys[:, :m], recipe)
        for m in (12, 31)
    ]
    found = hata_loss(weights.double(), [_double(e) for e in examples], recipe)
    torch.testing.assert_close(found, reference_loss(weights, examples, recipe))
    torch.testing.assert_close(hata_loss(weights, examples, recipe), found.float())


def _double(example):
    return type(example)(example.queries.double(), example.keys.double(), example.labels.double())


# training


def recall(selector, layer):
    """Share of a row's best tenth by q.k, each query head's own, that the selector ranks first."""
    view = KeyView(
        layer.keys[None],
        selector.encode_keys(LAYER, layer.keys[None]),
        positions=layer.positions,
    )
    ranked = selector.scores(LAYER, layer.queries[None], view, 1.0)[0].float()
    found = []
    for head in range(HEADS):
        for row, position in enumerate(layer.positions.tolist()):
            seen, count = position + 1, (position + 1) // 10
            best = (layer.queries[head, row] @ layer.keys[head // GROUP, :seen].T).topk(count)
            mine = ranked[head // GROUP, row, :seen].topk(count).indices
            found.append(torch.isin(mine, best.indices).float().mean())
    return torch.stack(found).mean()


def test_training_finds_more_of_the_best_tenth_than_random_weights():
    sequences = [captured(seed=s) for s in range(4)]
    held_out = captured(seed=99)
    settings = {"bits": 32, "progress": False}
    before = HATASelector.train(sequences, steps=0, **settings)
    after = HATASelector.train(sequences, steps=100, **settings)
    assert (before.trained, after.trained) == (False, True)
    assert after.weights[LAYER].shape == (KV_HEADS, 16, 32)
    assert recall(after, held_out) > recall(before, held_out) + 0.04


def test_labels_teach_more_than_decorrelation_does():
    """Where fewer bits than channels make the hash choose, and the labels have a say: the authors'
    weights leave them so little that the outcome is a random orthogonal hash."""
    sequences = [captured(seed=s, dim=64, scale=6.0) for s in range(4)]
    held_out = captured(seed=99, dim=64, scale=6.0)
    settings = {"bits": 32, "steps": 100, "decorrelation": 0.1, "progress": False}
    taught = HATASelector.train(sequences, similarity=1.0, **settings)
    untaught = HATASelector.train(sequences, similarity=0.0, **settings)
    assert recall(taught, held_out) > recall(untaught, held_out) + 0.04


def test_training_starts_from_normal_weights_and_repeats_itself():
    sequences = [captured(seed=s, layer=layer) for s in range(2) for layer in (0, 3)]
    settings = {"bits": 32, "recipe": HataRecipe(steps=3), "progress": False}
    one = train_hata_weights(sequences, seed=1, **settings)
    two = train_hata_weights(iter(sequences), seed=1, **settings)
    other = train_hata_weights(sequences, seed=2, **settings)
    assert sorted(one) == [0, 3] and not torch.equal(one[0], one[3])
    assert all(torch.equal(one[layer], two[layer]) for layer in one)
    assert not torch.equal(one[0], other[0])
    start = HATASelector.train(sequences, bits=32, steps=0, progress=False).weights[0]
    assert abs(float(start.mean())) < 0.1 and 0.9 < float(start.std()) < 1.1


def test_a_layer_learns_the_same_beside_another():
    settings = {"bits": 32, "recipe": HataRecipe(steps=3), "progress": False}
    both = train_hata_weights([captured(layer=0), captured(layer=3)], **settings)
    alone = train_hata_weights([captured(layer=3)], **settings)
    assert torch.equal(both[3], alone[3])


def test_a_step_is_momentum_descent_with_a_decaying_rate():
    """Three steps by hand on one possible query, from torch's gradients of the loss."""
    layer = captured(rows=1)
    recipe = HataRecipe(steps=3, rows_per_step=1, weight_decay=0.01, decay=0.5)
    start = train_hata_weights([layer], bits=32, recipe=HataRecipe(steps=0), progress=False)[LAYER]
    example = label_query(layer.queries[:, 0], layer.keys[:, : int(layer.positions[0]) + 1], recipe)
    weights, velocity, rate = start.clone(), torch.zeros_like(start), recipe.learning_rate
    for _ in range(3):
        free = weights.clone().requires_grad_()
        gradient = torch.autograd.grad(hata_loss(free, [example], recipe), free)[0]
        velocity = 0.9 * velocity + gradient + 0.01 * weights
        weights, rate = weights - rate * velocity, rate * 0.5
    found = train_hata_weights([layer], bits=32, recipe=recipe, progress=False)[LAYER]
    torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-4)


def test_queries_of_the_later_half_are_learned_from(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "hashattn.hashing.hata.label_query",
        lambda q, k, recipe: drawn.append(k.shape[1]) or label_query(q, k, recipe),
    )
    layer = captured(n=200, rows=40)
    train_hata_weights([layer], bits=32, recipe=HataRecipe(steps=8), progress=False)
    assert len(drawn) == 64 and len(set(drawn)) > 8
    assert {m - 1 for m in drawn} <= {p for p in layer.positions.tolist() if p >= 100}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": -1}, "steps = -1"),
        ({"rows_per_step": 0}, "rows_per_step = 0"),
        ({"best_share": 1.5}, "best_share = 1.5"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0"),
        ({"momentum": -0.1}, "momentum = -0.1"),
        ({"balance": -1.0}, "balance = -1.0"),
        ({"steps": 2.5}, "steps = 2.5"),
        ({"momentum": "fast"}, "momentum = 'fast'"),
        ({"decay": float("nan")}, "decay = nan"),
        ({"bits": 48}, "bits = 48"),
        ({"bits": 0}, "bits = 0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, said):
    with pytest.raises(ValueError, match=said):
        HATASelector.train([captured()], progress=False, **settings)


def test_training_without_captures_is_refused():
    with pytest.raises(ValueError, match="capture at least one"):
        HATASelector.train([])
