"""Hits of a hot set against a cache of each size, run step by step."""

import itertools
import random
from collections import OrderedDict

import pytest
import torch

from hashattn import Budget, attach, make_selector
from hashattn.attention.observer import LayerStep
from hashattn.evaluation.measures.hot_set import HotSet
from hashattn.selectors.plan import SelectionPlan
from helpers import prompt, tiny_model

HEADS, GROUP, SINK, LOCAL, BEGIN, STEPS, WARM = 2, 2, 2, 3, 24, 12, 4
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)


def drawn(seed=0):
    """For each step the tokens that each list reads, and the tokens cached."""
    choose = random.Random(seed)
    for n in range(BEGIN + 1, BEGIN + STEPS + 1):
        window = {*range(SINK), *range(n - LOCAL, n)}
        few = [t for t in range(SINK, n - LOCAL) if choose.random() < 0.6]
        lists = [window | set(choose.sample(few, min(4, len(few)))) for _ in range(HEADS * GROUP)]
        yield n, window, lists


def told(n, lists, layer=0, batch=1):
    """A step as the attention path tells it: rows are lists of sets, the last with n tokens."""
    rows, heads = len(lists), len(lists[0])
    width = max(len(tokens) for row in lists for tokens in row)
    indices = torch.full((batch, heads, rows, width), -1, dtype=torch.int32)
    for row, head in itertools.product(range(rows), range(heads)):
        own = sorted(lists[row][head])
        indices[:, head, row, : len(own)] = torch.tensor(own)
    visible = torch.arange(n - rows + 1, n + 1).expand(batch, -1)
    spans = torch.stack([torch.zeros_like(visible), visible], dim=-1)
    plan = SelectionPlan(n, SINK, LOCAL, visible, visible, width, spans)
    return LayerStep(layer, torch.zeros(batch, heads, rows, 1), n, 0, indices=indices, plan=plan,
                     values=torch.zeros(batch, HEADS, n, 1))  # fmt: skip


def simulated(share):
    """Hits of caches of `share` of the tokens in the end, the least recently used row leaving."""
    size, hit, asked = int(share * (BEGIN + STEPS)), 0, 0
    caches = [OrderedDict.fromkeys(range(BEGIN)) for _ in range(HEADS)]
    for number, (n, window, lists) in enumerate(drawn()):
        for head, cache in enumerate(caches):
            used = set.union(*lists[GROUP * head : GROUP * (head + 1)])
            cache[n - 1] = None
            while len(cache) > size:
                cache.popitem(last=False)
            if number >= WARM:
                hit += len((used - window) & set(cache))
                asked += len(used - window)
            for token in sorted(used):
                cache.pop(token, None)
                cache[token] = None
            while len(cache) > size:
                cache.popitem(last=False)
    return hit / asked


def test_every_size_has_the_hits_of_a_cache_of_that_size():
    hot = HotSet(WARM)
    for n, _, lists in drawn():
        hot.saw(told(n, [lists]))
    found = {row["share"]: row["hits"] for row in hot.rows(SHARES)}
    assert found == {share: pytest.approx(simulated(share)) for share in SHARES}
    assert found[1.0] == 1 and 0 < found[0.25] < found[0.5]


def test_reuse_and_union_are_what_sets_say():
    hot, steps = HotSet(WARM), list(drawn())
    for n, _, lists in steps:
        hot.saw(told(n, [lists]))
    again = chosen = union = 0
    for (_, before_window, before), (_, window, lists) in itertools.pairwise(steps[WARM - 1 :]):
        heavy = [tokens - window for tokens in lists]
        earlier = [tokens - before_window for tokens in before]
        again += sum(len(a & b) for a, b in zip(heavy, earlier, strict=True))
        chosen += sum(map(len, heavy))
        union += sum(len(set.union(*heavy[h * GROUP : (h + 1) * GROUP])) for h in range(HEADS))
    row = hot.rows([0.5])[0]
    assert row["again"] == pytest.approx(again / chosen)
    assert row["union"] == pytest.approx(union * GROUP / chosen)
    assert row["steps"] == STEPS - WARM and row["layer"] == 0


def test_many_rows_at_once_are_as_many_steps():
    steps = list(drawn())
    one, many = HotSet(WARM), HotSet(WARM)
    for n, _, lists in steps:
        one.saw(told(n, [lists]))
    for part in (steps[:5], steps[5:]):
        many.saw(told(part[-1][0], [lists for *_, lists in part]))
    assert one.rows() == many.rows()


def test_a_context_that_does_not_follow_begins_anew_and_layers_count_apart():
    hot, steps = HotSet(WARM), [told(n, [lists]) for n, _, lists in drawn()]
    for step in steps:
        hot.saw(step)
    once = hot.rows()
    for step in steps[:-2]:
        hot.saw(step)  # shorter than what was counted
    assert hot.rows()[0]["steps"] == 2 * (STEPS - WARM) - 2
    twice = HotSet(WARM)
    for step in [*steps, *steps]:
        twice.saw(step)
    assert [row["hits"] for row in twice.rows()] == [row["hits"] for row in once]
    for n, _, lists in drawn(1):
        twice.saw(told(n, [lists], layer=7))
    assert [row["layer"] for row in twice.rows([0.5, 1])] == [0, 0, 7, 7]


def test_what_a_model_reads_is_the_same_token_by_token_and_at_once():
    model, ids = tiny_model("llama"), prompt(length=60)
    found = []
    for rows in (1, 20):
        hot = HotSet(8)
        with attach(model, make_selector("oracle"), Budget(2, 4, heavy=6), sparse_rows=rows) as run:
            with run.listen(hot), torch.no_grad():
                cache = model(ids[:, :40], use_cache=True).past_key_values
                for part in ids[:, 40:].split(rows, dim=1):
                    model(part, past_key_values=cache)
        found.append(hot.rows())
        assert [row["steps"] for row in hot.rows([0.5])] == [12, 12]
    assert found[0] == found[1]
    assert all(1 <= row["union"] <= 2 for row in found[0])
    assert all(0 < row["hits"] < 1 for row in hot.rows([0.5]))


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="warm = 0: must be at least 1 step"):
        HotSet(0)
    hot, (n, _, lists) = HotSet(), next(drawn())
    hot.saw(told(n, [lists]))
    with pytest.raises(ValueError, match="steps = 0: must be more than the 1 that warm up"):
        hot.rows()
    with pytest.raises(ValueError, match="batch = 2: must be 1"):
        hot.saw(told(n + 1, [lists], batch=2))
    hot.saw(told(n + 1, [lists]))
    with pytest.raises(ValueError, match=r"share = 0: must be a number in \(0, 1\]"):
        hot.rows([0])
