"""The sampled residual: unbiased, within its budget, and as many tokens as its bound asks for."""

import math
from statistics import NormalDist

import pytest
import torch

from hashattn import Budget, attach
from hashattn.attention.masks import make_plan
from hashattn.kernels import attend
from hashattn.selectors import OracleSelector, make_selector
from hashattn.selectors.base import KeyView
from hashattn.selectors.residual import ResidualSelector
from helpers import generate, prompt, tiny_model

B, HEADS, KV_HEADS, N, D = 2, 4, 2, 60, 16


def states(n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, HEADS, 1, D), (B, KV_HEADS, n, D), (B, KV_HEADS, n, D)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def sampled(selector, budget, q, k, mask=None):
    plan = make_plan(mask, B, 1, k.shape[2], k.device, budget)
    view = KeyView(k) if mask is None else KeyView(k, visible=mask[:, 0, -1])
    return selector.sample(0, q, view, 0.25, plan)


@pytest.mark.parametrize("layout", ["per_kv_head", "per_query_head"])
def test_budget_is_shared_between_the_best_and_a_sample(layout):
    q, k, _ = states()
    selector = ResidualSelector(OracleSelector(layout), share=0.25)
    indices, weights = sampled(selector, Budget(2, 3, heavy=20), q, k)
    best = OracleSelector(layout).select(
        0, q, KeyView(k), 0.25, make_plan(None, B, 1, N, k.device, Budget(2, 3, heavy=15))
    )
    assert (indices >= 0).sum(-1).unique().tolist() == [25]
    for row, best_row, row_weights in zip(
        indices.flatten(0, 2), best.flatten(0, 2), weights.flatten(0, 2), strict=True
    ):
        found, chosen = set(row.tolist()), set(best_row.tolist())
        assert chosen <= found and len(found - chosen) == 5
        for token, weight in zip(row.tolist(), row_weights.tolist(), strict=True):
            expected = 0.0 if token in chosen else math.log((N - 20) / 5)
            assert weight == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("proposal", ["uniform", "weights"])
def test_numerator_and_denominator_are_unbiased(proposal):
    """The mean over many seeds is dense attention's, within four standard errors."""
    q, k, v = states()
    logits = (q.double() @ k.double().repeat_interleave(2, 1).mT * 0.25)[..., 0, :]
    total = logits.exp().sum(-1)
    weighted = (logits.exp()[..., None] * v.double().repeat_interleave(2, 1)).sum(-2)
    sums, outs = [], []
    for seed in range(400):
        selector = ResidualSelector(
            OracleSelector("per_kv_head"), share=0.5, seed=seed, proposal=proposal
        )
        indices, weights = sampled(selector, Budget(2, 3, heavy=20), q, k)
        out, lse = attend(q, k, v, indices, 0.25, log_weights=weights, return_lse=True)
        mass = lse[..., 0].double().exp()
        sums.append(mass)
        outs.append(out[..., 0, :].double() * mass[..., None])
    for found, expected in ((torch.stack(sums), total), (torch.stack(outs), weighted)):
        error = (found.mean(0) - expected).abs()
        assert (error <= 4.5 * found.std(0) / 20 + 1e-9).all()
    assert torch.stack(sums).std(0).min() > 0


def test_drawing_by_weights_reads_what_draws_with_replacement_would_hold():
    """Inclusion probabilities by hand in float64; on average at most as many tokens as draws."""
    q, k, _ = states()
    budget, total = Budget(2, 3, heavy=20), []
    for seed in range(50):
        selector = ResidualSelector(OracleSelector(), share=0.5, seed=seed, proposal="weights")
        indices, log_weights = sampled(selector, budget, q, k)
        best = OracleSelector().select(
            0, q, KeyView(k), 0.25, make_plan(None, B, 1, N, k.device, Budget(2, 3, heavy=10))
        )
        for batch, head in ((0, 1), (1, 3)):
            chosen = best[batch, head, 0].tolist()
            logits = (k[batch, head // 2].double() @ q[batch, head, 0].double()) * 0.25
            logits[chosen] = -math.inf
            inclusion = 1 - (1 - logits.softmax(0)) ** 10
            listed = [t for t in indices[batch, head, 0].tolist() if t >= 0]
            total.append(len(listed) - len(chosen))
            for token, weight in zip(listed, log_weights[batch, head, 0].tolist(), strict=False):
                expected = 0.0 if token in chosen else -math.log(inclusion[token])
                assert weight == pytest.approx(expected, abs=1e-5)
    assert 7 < sum(total) / len(total) < 10


def test_a_whole_sample_is_dense_attention():
    q, k, v = states()
    selector = ResidualSelector(OracleSelector(), share=0.5)
    indices, weights = sampled(selector, Budget(2, 3, heavy=N), q, k)
    every = torch.arange(N, dtype=torch.int32).expand(B, HEADS, 1, N)
    assert torch.equal(indices, every) and not weights.any()


def test_epsilon_and_delta_decide_how_many_are_sampled():
    """The formula by hand in float64, one row and head at a time."""
    q, k, _ = states(n=400)
    epsilon, delta, z = 0.1, 0.2, NormalDist().inv_cdf(0.9)
    budget = Budget(2, 3, heavy=40)
    first, _ = sampled(ResidualSelector(OracleSelector(), 0.5), budget, q, k)
    chosen = OracleSelector().select(
        0, q, KeyView(k), 0.25, make_plan(None, B, 1, 400, k.device, Budget(2, 3, heavy=20))
    )
    indices, weights = sampled(
        ResidualSelector(OracleSelector(), 0.5, epsilon, delta), budget, q, k
    )
    counts = set()
    for b in range(B):
        for head in range(HEADS):
            best = set(chosen[b, head, 0].tolist())
            base = set(first[b, head, 0].tolist()) - best
            values = (k[b, head // 2].double() @ q[b, head, 0].double() * 0.25).exp()
            drawn = values[sorted(base)]
            left = 400 - len(best)
            total = values[sorted(best)].sum() + left * drawn.mean()
            needed = float((z * drawn.std() * left / (epsilon * total)) ** 2)
            needed = min(left, max(len(base), math.ceil(needed / (1 + needed / left))))
            found = set(indices[b, head, 0].tolist()) - {-1}
            assert best | base <= found and len(found - best) == needed
            own = weights[b, head, 0][: len(found)]
            assert own.max().item() == pytest.approx(math.log(left / needed), abs=1e-5)
            counts.add(needed)
    assert len(counts) > 1 and min(counts) > 20


def test_the_denominator_keeps_the_promise():
    """Relative error above epsilon in at most delta of the runs (and some more, by chance)."""
    q, k, v = states(n=400)
    truth = (q.double() @ k.double().repeat_interleave(2, 1).mT * 0.25).logsumexp(-1)
    missed = []
    for seed in range(60):
        selector = ResidualSelector(OracleSelector(), 0.5, 0.05, 0.2, seed=seed)
        indices, weights = sampled(selector, Budget(2, 3, heavy=40), q, k)
        _, lse = attend(q, k, v, indices, 0.25, log_weights=weights, return_lse=True)
        missed.append(((lse.double() - truth).exp() - 1).abs() > 0.05)
        assert (indices >= 0).sum(-1).max() < 400
    assert 0 < torch.stack(missed).float().mean() < 0.25


def test_lists_per_kv_head_take_the_neediest_head():
    q, k, _ = states(n=400)
    arguments = (0.5, 0.1, 0.2)
    budget = Budget(2, 3, heavy=40)
    shared, _ = sampled(ResidualSelector(OracleSelector("per_kv_head"), *arguments), budget, q, k)
    counts = (shared >= 0).sum(-1)
    for head in range(2):
        other = q.clone()
        other[:, :2], other[:, 2:] = q[:, head, None], q[:, 2 + head, None]
        assert counts.shape == (B, KV_HEADS, 1) and counts.min() > 45


def test_padding_and_seeds():
    """A padded row samples what it would alone; another seed samples other tokens."""
    q, k, _ = states()
    mask = torch.ones(B, 1, 1, N, dtype=torch.bool)
    mask[1, ..., :17] = False
    selector, budget = ResidualSelector(OracleSelector(), 0.5), Budget(2, 3, heavy=12)
    indices, _ = sampled(selector, budget, q, k, mask)
    alone = make_plan(None, 1, 1, N - 17, k.device, budget)
    expected, _ = selector.sample(0, q[1:], KeyView(k[1:, :, 17:]), 0.25, alone)
    assert torch.equal(indices[1:] - 17, expected)
    other, _ = sampled(ResidualSelector(OracleSelector(), 0.5, seed=1), budget, q, k, mask)
    assert not torch.equal(indices, other)


def test_generation_reads_the_sample():
    """Through attach: with half of the budget sampled, the logits differ and the receipt counts."""
    model = tiny_model("llama")
    budget = Budget(1, 3, heavy=10)
    found = {}
    for name, selector in (
        ("top", OracleSelector()), ("both", ResidualSelector(OracleSelector(), 0.5)),
    ):  # fmt: skip
        with attach(model, selector, budget, keep_steps=1) as run:
            found[name] = generate(model, prompt())[1]
        assert run.receipt.recent[0].read == 14
    assert run.receipt.method["parameters"]["base"]["name"] == "oracle"
    assert (found["top"] - found["both"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"share": 0.0}, "share = 0.0"),
        ({"epsilon": 0.1}, "give both or neither"),
        ({"epsilon": 1.5, "delta": 0.1}, "epsilon = 1.5"),
        ({"proposal": "guess"}, "proposal = 'guess'"),
        ({"epsilon": 0.1, "delta": 0.1, "proposal": "weights"}, 'or use proposal = "uniform"'),
    ],
)
def test_invalid_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        make_selector("residual", base=OracleSelector(), **parameters)
