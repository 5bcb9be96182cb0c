"""Sampled reading through attach: what is read, repeatable coins, no bias, error bars, refusals."""

from collections.abc import Callable

import pytest
import torch

from hashattn import Budget, attach, make_selector
from hashattn.attention.error_bars import sampling_error
from hashattn.attention.observer import LayerStep
from hashattn.hashing.capture import capture
from hashattn.selectors.oracle import OracleSelector
from hashattn.selectors.slopes import fit_slopes
from helpers import generate, left_padded, prompt, tiny_model

HALF = Budget(sink=2, local=4, heavy=12, sampled=0.5)


class Listener:
    timed = False

    def __init__(self, see: Callable[[LayerStep], object]) -> None:
        self.see, self.seen = see, []

    def saw(self, step: LayerStep) -> None:
        if step.reason is None:
            self.seen.append(self.see(step))


def lists_of(step: LayerStep) -> list:
    return [[t for t in row if t >= 0] for row in step.indices.flatten(0, 2).tolist()]


def heard(model, budget: Budget, see, selector=None, ids=None, mask=None, **settings) -> list:
    with attach(model, selector or OracleSelector(), budget) as run:
        with run.listen(Listener(see)) as listener:
            generate(model, prompt(length=60) if ids is None else ids, mask, **settings)
    return listener.seen


def test_the_budget_is_read_on_average_and_the_best_for_certain():
    model = tiny_model("llama")
    sampled = heard(model, HALF, lists_of, max_new_tokens=40)
    ranked = heard(model, Budget(2, 4, heavy=6), lists_of, max_new_tokens=2)
    assert all(set(best) <= set(read) for best, read in zip(ranked[0], sampled[0], strict=True))
    counts = torch.tensor([len(row) for step in sampled for row in step], dtype=torch.float)
    assert counts.mean().item() == pytest.approx(18, abs=0.6) and counts.std() > 0.5


def test_runs_repeat_and_seeds_differ():
    model = tiny_model("llama")
    runs = [heard(model, HALF, lists_of) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0] != heard(model, Budget(2, 4, heavy=12, sampled=0.5, seed=1), lists_of)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert heard(model, HALF, lists_of) == runs[0]
    finally:
        torch.set_num_threads(threads)
    layers = heard(model, HALF, lambda step: lists_of(step), max_new_tokens=2)
    assert layers[0] != layers[1]


def test_a_row_is_read_alike_alone_and_padded_in_a_batch():
    model = tiny_model("llama")
    ids, mask = left_padded((50, 33))
    together = heard(model, HALF, lists_of, ids=ids, mask=mask, max_new_tokens=2)
    alone = heard(model, HALF, lists_of, ids=ids[1:, 17:], max_new_tokens=2)
    for both, one in zip(together, alone, strict=True):
        assert [[t - 17 for t in row] for row in both[len(one) :]] == one


def test_fixed_coins_keep_what_fresh_ones_change():
    model = tiny_model("llama")

    def kept(fresh: bool) -> float:
        budget = Budget(2, 4, heavy=20, sampled=1.0, fresh=fresh)
        steps = heard(model, budget, lists_of, ids=prompt(length=120), max_new_tokens=30)[::2]
        pairs = [(set(a), set(b)) for one, two in zip(steps, steps[1:], strict=False)
                 for a, b in zip(one, two, strict=True)]  # fmt: skip
        return sum(len(a & b) / len(a) for a, b in pairs) / len(pairs)

    assert kept(False) > kept(True) + 0.05


@pytest.mark.parametrize("layout", ["per_query_head", "per_kv_head"])
def test_outputs_are_right_on_average_and_error_bars_say_how_far_off(layout):
    """One layer's output over many seeds against dense: the mean within its standard error (the
    ratio's own bias is of second order), the spread as the error bars expect."""
    model = tiny_model("gemma2")
    ids = prompt(length=150)
    outs, bars = [], []
    selector = OracleSelector(layout)

    def see(step: LayerStep):
        logits = dict(step.logits)
        out = attend_again(step, logits)
        return step.layer, out, sampling_error(step), dense_again(step, logits)

    for seed in range(120):
        budget = Budget(2, 4, heavy=40, sampled=0.75, seed=seed)
        layer, out, bar, dense = heard(model, budget, see, selector, ids, max_new_tokens=2)[0]
        outs.append(out)
        bars.append(bar)
    outs, bars = torch.stack(outs), torch.stack(bars)
    true = (outs - dense).square().sum(-1).mean(0).sqrt()  # (batch, heads, q)
    said = bars.square().mean(0).sqrt()
    assert (said / true).log().abs().max() < 0.35
    error = (outs.mean(0) - dense).norm(dim=-1)
    assert (error < 0.35 * true).all()


def attend_again(step: LayerStep, logits: dict) -> torch.Tensor:
    from hashattn.kernels import attend

    return attend(step.query, step.view.keys, step.values, step.indices,
                  log_weights=step.log_weights, **logits)  # fmt: skip


def dense_again(step: LayerStep, logits: dict) -> torch.Tensor:
    from hashattn.kernels import dense_decode

    return dense_decode(step.query, step.view.keys, step.values, **logits)


def test_ranked_and_dense_steps_have_no_error_bar():
    model = tiny_model("llama")
    bars = heard(model, Budget(2, 4, heavy=12), sampling_error)
    assert bars and all(bar is None for bar in bars)
    bars = heard(model, Budget(2, 4, heavy=12, sampled=((0.0,), (0.5,))), sampling_error)
    assert [bar is None for bar in bars[:2]] == [True, False]


def test_the_seed_stands_in_the_receipt():
    model = tiny_model("llama")
    with attach(model, OracleSelector(), Budget(density=0.5, sampled=0.25, seed=11)) as run:
        generate(model, prompt(length=90))
    settings = run.receipt.settings
    assert settings["sampled"] == 0.25 and settings["seed"] == 11


def test_scores_that_are_no_logits_are_refused_until_they_are_calibrated():
    model = tiny_model("llama")
    selector = make_selector("lsh", bits=64)
    with pytest.raises(ValueError, match="'lsh': its scores estimate no logits in layer 0"):
        heard(model, HALF, lists_of, selector)
    captured = capture(model, prompt(length=300), values=True).values()
    fitted = fit_slopes(selector, captured, sink=2, local=4)
    assert len(heard(model, HALF, lists_of, fitted)) > 0
    with pytest.raises(ValueError, match="no captured row sees 384 tokens"):
        fit_slopes(selector, captured, sink=40, local=56)
    with pytest.raises(ValueError, match="'dense' has no scores"):
        fit_slopes(make_selector("dense"), captured)


@pytest.mark.parametrize("name", ["snapkv", "magicpig"])
def test_methods_that_read_by_other_rules_are_refused_early(name):
    with pytest.raises(ValueError, match=f"'{name}' does not read the best of its scores"):
        attach(tiny_model("llama"), make_selector(name), HALF)


@pytest.mark.parametrize(
    "selector",
    [make_selector("oracle", layout="per_kv_head"), make_selector("pqcache"),
     make_selector("sparq", channels=8)],
)  # fmt: skip
def test_a_list_of_a_group_is_drawn_by_the_sum_of_its_heads_weights(selector):
    """One coin for the group: exact scores estimate the sum, so what is drawn has the weight that
    the sum's share of the threshold gives it."""
    model = tiny_model("llama")
    captured = list(capture(model, prompt(length=300), values=True).values())
    if selector.name != "oracle":
        selector = fit_slopes(selector, captured, sink=2, local=4)
        slopes = torch.cat([*selector.slopes.values()])
        assert ((slopes > 0.2) & (slopes < 2)).all()  # nearly logits already
    steps = heard(model, HALF, lambda step: (step.indices.shape[1], step.log_weights), selector,
                  prompt(length=200), max_new_tokens=3)  # fmt: skip
    assert all(lists == 2 and weights.max() > 0 for lists, weights in steps)
