"""Over-fetch and re-rank: the best of what the base proposed, by exact attention."""

import pytest
import torch

from hashattn import Budget, attach
from hashattn.attention.masks import make_plan
from hashattn.selectors import OracleSelector, make_selector
from hashattn.selectors.base import KeyView
from hashattn.selectors.rerank import RerankSelector
from helpers import generate, left_padded, prompt, tiny_model

B, HEADS, KV_HEADS, N, D = 2, 4, 2, 70, 16


def states():
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(B, HEADS, 2, D, generator=generator)
    return queries, torch.randn(B, KV_HEADS, N, D, generator=generator)


@pytest.mark.parametrize("layout", ["per_kv_head", "per_query_head"])
def test_the_best_of_the_proposed(layout):
    q, k = states()
    base = make_selector("quest", page=3, layout=layout)
    plan = make_plan(None, B, 2, N, k.device, Budget(2, 3, heavy=6))
    wider = make_plan(None, B, 2, N, k.device, Budget(2, 3, heavy=18))
    view = KeyView(k)
    proposed = base.select(0, q, view, 0.25, wider)
    found = RerankSelector(base, factor=3).select(0, q, view, 0.25, plan)
    group = HEADS // found.shape[1]
    for b in range(B):
        for line in range(found.shape[1]):
            for row in range(2):
                last = N - 1 + row
                tokens = [t for t in proposed[b, line, row].tolist() if t >= 0]
                total = torch.zeros(len(tokens), dtype=torch.float64)
                for head in range(line * group, (line + 1) * group):
                    keys = k[b, head // 2, tokens].double()
                    total += (keys @ q[b, head, row].double() * 0.25).softmax(0)
                free = [t for t in tokens if 2 <= t < last - 3]
                weight = dict(zip(tokens, total.tolist(), strict=True))
                best = sorted(free, key=lambda t: -weight[t])[:6]
                expected = sorted({0, 1, last - 1, last - 2, last - 3} | set(best))
                assert found[b, line, row].tolist() == expected


def test_a_base_that_proposes_everything_gives_the_oracle():
    model, budget = tiny_model("llama"), Budget(1, 3, heavy=8)
    ids, mask = left_padded()
    logits = {}
    for name, selector in (
        ("oracle", OracleSelector()),
        ("rerank", RerankSelector(make_selector("quest", page=4), factor=8)),
    ):
        with attach(model, selector, budget, keep_steps=1) as run:
            logits[name] = generate(model, ids, mask)[1]
        assert run.receipt.recent[0].read == 12
    torch.testing.assert_close(logits["oracle"], logits["rerank"], rtol=0, atol=1e-5)


def test_short_caches_and_records():
    """Fewer tokens than sink and local; the base's bits and weights are this method's."""
    model = tiny_model("llama")
    selector = RerankSelector(make_selector("lsh", bits=64), factor=2)
    with attach(model, selector, Budget(8, 60, heavy=2), allow_dense=True):
        generate(model, prompt(length=9))
    assert selector.auxiliary_bits(2, D) == 64
    assert selector.record()["parameters"]["base"]["name"] == "lsh"


def test_invalid_parameters():
    with pytest.raises(ValueError, match="factor = 1"):
        make_selector("rerank", base=OracleSelector(), factor=1)
    with pytest.raises(ValueError, match="base = 'residual': must be a method that ranks"):
        make_selector("rerank", base=make_selector("residual", base=OracleSelector()))
