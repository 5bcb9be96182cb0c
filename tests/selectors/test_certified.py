"""Certified reading: true misses against tolerance and bound, needles, what more is read."""

import pytest
import torch

from hashattn import Budget, attach, make_selector
from hashattn.attention.masks import make_plan
from hashattn.selectors.base import KeyView
from hashattn.selectors.oracle import OracleSelector
from helpers import generate, left_padded, prompt, tiny_model

SMALL = Budget(sink=2, local=4, heavy=6)
SCALING = 32**-0.5


def drawn(*shape, seed=0, spread=1.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def truly_missed(step_or, read, scaling, softcap=None, seen=None):
    """Share of the attention on unread tokens, float64, one row at a time: (B, heads, q)."""
    queries, keys = step_or
    heads, group = queries.shape[1], queries.shape[1] // keys.shape[1]
    missed = torch.zeros(queries.shape[:3], dtype=torch.float64)
    for b in range(len(queries)):
        for h in range(heads):
            for row in range(queries.shape[2]):
                logits = queries[b, h, row].double() @ keys[b, h // group].double().T * scaling
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                weights = logits.exp() if seen is None else logits.exp() * seen[b, 0, row]
                taken = read[b, h // (heads // read.shape[1]), row]
                taken = [token for token in taken.tolist() if token >= 0]
                missed[b, h, row] = 1 - weights[taken].sum() / weights.sum()
    return missed


def select(selector, queries, keys, budget=SMALL, scaling=SCALING):
    plan = make_plan(None, len(queries), queries.shape[2], keys.shape[2], keys.device, budget)
    parts = selector.encode_keys(0, keys)
    view = KeyView(keys=keys, index=parts)
    return selector.select(0, queries, view, scaling, plan), view, plan


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("base", ["random", "window", "oracle", "oracle per group"])
def test_no_head_misses_more_than_its_bound_nor_the_bound_more_than_the_tolerance(
    base, bits, softcap
):
    layout = "per_kv_head" if base == "oracle per group" else "per_query_head"
    inner = OracleSelector(layout) if base.startswith("oracle") else make_selector(base)
    keys, queries = drawn(2, 2, 150, 32, seed=1, spread=2), drawn(2, 6, 3, 32, seed=2, spread=2)
    for tolerance in (0.02, 0.3):
        selector = make_selector("certified", base=inner, bits=bits, tolerance=tolerance,
                                 softcap=softcap)  # fmt: skip
        read, view, plan = select(selector, queries, keys)
        bound = selector.missed_at_most(queries, view, SCALING, read, plan.seen)
        seen = plan.seen.expand(2, 1, 3, 150).double()
        missed = truly_missed((queries, keys), read, SCALING, softcap, seen)
        assert (missed <= bound + 1e-9).all() and (bound <= tolerance + 1e-9).all()
        before = inner.select(0, queries, KeyView(keys, inner.encode_keys(0, keys)), SCALING, plan)
        for old, new in zip(
            before.flatten(0, 2).tolist(), read.flatten(0, 2).tolist(), strict=True
        ):
            assert {t for t in old if t >= 0} <= set(new)
    assert ((read >= 0).sum(-1) < 150).any()  # and not by reading everything


def test_what_is_added_is_the_least_that_the_bounds_allow():
    """Without that of the smallest upper bound among those added, too much may be missed."""
    keys, queries = drawn(1, 1, 200, 32, seed=3, spread=2), drawn(1, 1, 1, 32, seed=4, spread=2)
    selector = make_selector("certified", base=make_selector("window"), tolerance=0.1)
    read, view, plan = select(selector, queries, keys)
    codes, scales = (
        view.index["certificate_codes"].view(torch.int8),
        view.index["certificate_scales"],
    )
    copy = (codes.float() * scales[..., :1])[0, 0]
    upper = (copy @ queries[0, 0, 0] + queries.norm() * scales[0, 0, :, 1]) * SCALING
    tokens = [t for t in read[0, 0, 0].tolist() if t >= 0]
    added = [t for t in tokens if 2 <= t < 196]
    assert added and min(upper[added]) >= max(u for t, u in enumerate(upper) if t not in tokens)
    least = min(added, key=lambda t: upper[t])
    fewer = torch.tensor([[[[t for t in tokens if t != least]]]], dtype=torch.int32)
    assert selector.missed_at_most(queries, view, SCALING, fewer, plan.seen) > 0.1


def test_a_needle_is_read_whatever_the_codes_say():
    keys, queries = drawn(1, 2, 2000, 32, seed=5, spread=0.3), drawn(1, 4, 1, 32, seed=6)
    keys[0, :, 1234] = 6 * queries[0, ::2, 0]  # of one head of each of the two lists
    for bits in (8, 4):
        selector = make_selector(
            "certified", base=make_selector("window"), bits=bits, tolerance=0.5
        )
        read, _, _ = select(selector, queries, keys)
        assert all(1234 in tokens for tokens in read[0, :, 0].tolist())
    loose = make_selector("certified", base=make_selector("window"), tolerance=0.999)
    assert (select(loose, 0 * queries, keys)[0] >= 0).sum() == 6 * read.shape[1]  # nothing to add


@pytest.mark.parametrize("family", ["llama", "gemma2", "llama_mqa"])
def test_in_a_model_every_step_keeps_the_promise(family):
    class Heard:
        timed = False
        steps: list

        def saw(self, step):
            if step.reason is None:
                self.steps.append(step)

    model = tiny_model(family)
    cap = getattr(model.config, "attn_logit_softcapping", None)
    selector = make_selector("certified", base=make_selector("random"), tolerance=0.25, softcap=cap)
    heard, (ids, mask) = Heard(), left_padded((60, 41))
    heard.steps = []
    with attach(model, selector, SMALL, allow_dense=True) as run, run.listen(heard):
        generate(model, ids, mask, max_new_tokens=5)
        assert run.receipt.method["parameters"]["tolerance"] == 0.25
    worst = 0.0
    for step in heard.steps:
        scaling, seen = step.logits["scaling"], step.plan.seen.expand(2, 1, 1, step.n)
        missed = truly_missed((step.query, step.view.keys), step.indices, scaling, cap, seen)
        bound = selector.missed_at_most(
            step.query, step.view, scaling, step.indices, step.plan.seen
        )
        assert (missed <= bound + 1e-6).all() and (bound <= 0.25 + 1e-9).all()
        worst = max(worst, float(missed.max()))
    assert worst > 0.02


def test_the_copy_s_error_is_what_it_lacks():
    keys = drawn(1, 2, 50, 32, seed=7)
    keys[0, 0, 3] = 0
    for bits, relative in ((8, 0.02), (4, 0.25)):
        selector = make_selector("certified", base=make_selector("window"), bits=bits)
        parts = selector.encode_keys(0, keys)
        codes = parts["certificate_codes"]
        assert codes.shape[-1] == 32 * bits // 8
        if bits == 8:
            levels = codes.view(torch.int8).float()
        else:
            levels = torch.cat((codes & 15, codes >> 4), -1).float() - 8
        lost = (keys - levels * parts["certificate_scales"][..., :1]).norm(dim=-1)
        error = parts["certificate_scales"][..., 1]
        assert (lost <= error).all()
        assert (error <= relative * keys.norm(dim=-1) + 1e-9).all()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"bits": 6}, "bits"),
        ({"tolerance": 0}, "tolerance"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"softcap": 0.0}, "softcap"),
    ],
)
def test_other_settings_are_refused(settings, field):
    with pytest.raises(ValueError, match=f"^{field} = .*: must be "):
        make_selector("certified", **{"base": make_selector("window")} | settings)


def test_nothing_can_be_drawn_by_it():
    selector = make_selector("certified", base=OracleSelector())
    with pytest.raises(ValueError, match="sampled=0"):
        attach(tiny_model("llama"), selector, Budget(heavy=8, sampled=0.5))
    with attach(tiny_model("llama"), selector, SMALL, allow_dense=True) as run:
        generate(run.model, prompt(length=30), max_new_tokens=2)
