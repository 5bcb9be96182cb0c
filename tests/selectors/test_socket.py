"""SOCKET: scores against products of per-hyperplane chances, float64 loops, no table of corners."""

import math

import pytest
import torch

from hashattn import Budget
from hashattn.attention.masks import make_plan
from hashattn.selectors import make_selector
from hashattn.selectors.base import KeyView
from hashattn.selectors.socket import OFFICIAL, SocketSelector

B, HEADS, KV_HEADS, ROWS, N, D = 2, 4, 2, 3, 29, 8
GROUP = HEADS // KV_HEADS
SEED, LAYER = 3, 1


def states():
    generator = torch.Generator().manual_seed(7)
    # models hand over transposed views, not contiguous queries
    queries = torch.randn(B, ROWS, HEADS, D, generator=generator).transpose(1, 2)
    return queries, torch.randn(B, KV_HEADS, N, D, generator=generator) + 0.3


def scores(selector, queries, keys, **extra):
    index = selector.encode_keys(LAYER, keys) | extra
    return selector.scores(LAYER, queries, KeyView(keys, index), D**-0.5)


def reference(queries, keys, tables, hyperplanes, temperature):
    """A softmax over the corners of a cube is a product of independent chances, one a hyperplane:
    that of sign s is 1 / (1 + exp(-2 s h / temperature))."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + LAYER)
    planes = torch.randn(D, tables * hyperplanes, generator=generator).double()
    expected = torch.zeros(B, HEADS, ROWS, N, dtype=torch.float64)
    for b in range(B):
        for head in range(HEADS):
            key_sides = keys[b, head // GROUP].double() @ planes > 0
            for row in range(ROWS):
                pull = torch.tanh(queries[b, head, row].double() @ planes) / math.sqrt(D)
                for token in range(N):
                    sign = torch.where(key_sides[token], 1.0, -1.0).double()
                    chance = 1 / (1 + torch.exp(-2 * sign * pull / temperature))
                    collisions = chance.view(tables, hyperplanes).prod(-1)
                    expected[b, head, row, token] = collisions.sum()
    return expected


@pytest.mark.parametrize(
    ("tables", "hyperplanes", "temperature"), [(5, 3, 0.3), (1, 1, 0.05), (2, 10, 1.0)]
)
def test_scores_are_the_chances_of_the_keys_buckets(tables, hyperplanes, temperature):
    selector = SocketSelector(tables, hyperplanes, temperature, seed=SEED)
    found = scores(selector, *states())
    expected = reference(*states(), tables, hyperplanes, temperature)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_table_s_chances_add_up_to_one():
    """A key in every bucket of one table of two hyperplanes."""
    selector = SocketSelector(tables=1, hyperplanes=2, seed=SEED)
    queries, keys = states()
    buckets = torch.arange(4, dtype=torch.uint8).view(1, 1, 4, 1).expand(B, KV_HEADS, 4, 1)
    view = KeyView(keys[:, :, :4], {"buckets": buckets})
    total = selector.scores(LAYER, queries, view, 1.0).sum(dim=-1)
    torch.testing.assert_close(total, torch.ones(B, HEADS, ROWS))


def test_a_cold_query_collides_with_its_own_bucket_alone():
    selector = SocketSelector(tables=6, hyperplanes=4, temperature=1e-4, seed=SEED)
    queries, keys = states()
    asked = selector.encode_keys(LAYER, queries)["buckets"]
    stored = selector.encode_keys(LAYER, keys)["buckets"].repeat_interleave(GROUP, dim=1)
    collisions = (asked[:, :, :, None] == stored[:, :, None]).sum(dim=-1)
    assert collisions.max() > 0
    assert torch.equal(scores(selector, queries, keys).round(), collisions.float())


def test_shared_selection_sums_the_group():
    each = scores(SocketSelector(seed=SEED), *states())
    shared = scores(SocketSelector(seed=SEED, layout="per_kv_head"), *states())
    torch.testing.assert_close(shared, each.view(B, KV_HEADS, GROUP, ROWS, N).sum(2))


def test_value_norms_multiply_and_must_be_given():
    queries, keys = states()
    norms = torch.rand(B, KV_HEADS, N, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    plain = scores(SocketSelector(seed=SEED), queries, keys)
    weighted = scores(SocketSelector(seed=SEED, value_norms=True), queries, keys, value_norms=norms)
    for head in range(HEADS):
        expected = plain[:, head] * norms[:, head // GROUP, :, 0][:, None]
        torch.testing.assert_close(weighted[:, head], expected)
    with pytest.raises(ValueError, match="value_norms"):
        scores(SocketSelector(value_norms=True), queries, keys)


def test_buckets_do_not_depend_on_how_many_keys_come_at_once(monkeypatch):
    monkeypatch.setattr("hashattn.selectors.socket.TOKENS_AT_ONCE", 8)  # a chunk is cut too
    keys = states()[1]
    selector = SocketSelector()
    together = selector.encode_keys(0, keys)["buckets"]
    one_by_one = [selector.encode_keys(0, keys[:, :, i : i + 1])["buckets"] for i in range(N)]
    assert torch.equal(together, torch.cat(one_by_one, dim=2))


def test_seed_and_layer_choose_the_hyperplanes():
    keys = states()[1]
    buckets = SocketSelector(seed=1).encode_keys(0, keys)["buckets"]
    assert torch.equal(buckets, SocketSelector(seed=1).encode_keys(0, keys)["buckets"])
    assert not torch.equal(buckets, SocketSelector(seed=2).encode_keys(0, keys)["buckets"])
    assert not torch.equal(buckets, SocketSelector(seed=1).encode_keys(1, keys)["buckets"])


@pytest.mark.parametrize("hyperplanes", [8, 15])
def test_a_bucket_id_fits_what_it_is_stored_as(hyperplanes):
    selector = SocketSelector(tables=3, hyperplanes=hyperplanes, seed=SEED)
    keys = states()[1]
    buckets = selector.encode_keys(LAYER, keys)["buckets"]
    assert buckets.dtype == (torch.uint8 if hyperplanes == 8 else torch.int16)
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + LAYER)
    planes = torch.randn(D, 3 * hyperplanes, generator=generator)
    sides = (keys @ planes > 0).unflatten(-1, (3, hyperplanes))
    for plane in range(hyperplanes):
        assert torch.equal((buckets.int() >> plane) & 1, sides[..., plane].int())
    assert buckets.int().min() >= 0 and buckets.int().max() < 2**hyperplanes


def test_padding_and_batch_do_not_change_what_is_selected():
    selector, (queries, keys) = SocketSelector(seed=SEED), states()
    visible = torch.ones(B, N, dtype=torch.bool)
    visible[1, :5] = False
    budget = Budget(sink=1, local=2, heavy=6)

    def chosen(queries, keys, visible):
        batch, n = keys.shape[0], keys.shape[2]
        mask = None
        if visible is not None:
            rows = torch.arange(n - ROWS, n)
            mask = (torch.arange(n) <= rows[:, None]) & visible[:, None, None]
        plan = make_plan(mask, batch, ROWS, n, keys.device, budget)
        view = KeyView(keys, selector.encode_keys(LAYER, keys), visible)
        return selector.select(LAYER, queries, view, 1.0, plan)

    together = chosen(queries, keys, visible)
    alone = chosen(queries[1:], keys[1:, :, 5:], None)
    shifted = torch.where(alone >= 0, alone + 5, alone)
    assert torch.equal(together[1:, ..., : shifted.shape[-1]], shifted)


def test_nominal_bits_at_equal_memory_and_as_the_authors_have_them():
    selector = SocketSelector()
    assert selector.nominal_bits(group=4, head_dim=128) == 128
    stored = selector.encode_keys(0, states()[1])["buckets"]
    assert stored.element_size() * 8 * stored.shape[-1] == 128
    assert SocketSelector(**OFFICIAL).nominal_bits(4, 128) == 720
    assert SocketSelector(**OFFICIAL, value_norms=True).nominal_bits(4, 128) == 736


def test_a_record_tells_everything_that_moves_a_score():
    selector = make_selector("socket", tables=2, hyperplanes=3, temperature=0.5, seed=9)
    assert selector.record() == {
        "name": "socket",
        "parameters": {
            "tables": 2,
            "hyperplanes": 3,
            "temperature": 0.5,
            "seed": 9,
            "layout": "per_query_head",
            "value_norms": False,
        },
        "weights_sha256": None,
    }
    assert (selector.needs, selector.evicts) == ("nothing", False)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"tables": 0}, "tables = 0"),
        ({"hyperplanes": 0}, "hyperplanes = 0"),
        ({"hyperplanes": 16}, "1..15"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"layout": "heads"}, "layout"),
        ({"bits": 8}, "bits"),
    ],
)
def test_wrong_parameters_are_refused_by_name(parameters, said):
    with pytest.raises(ValueError, match=said):
        make_selector("socket", **parameters)
