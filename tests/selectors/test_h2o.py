"""H2O against loops in float64: what tokens gather, what is evicted, and that it stays so."""

import pytest
import torch
from attention_reference import KV_HEADS, SCALING, B, attention, observe, random_qk

from hashattn.selectors import make_selector
from hashattn.selectors import observed as observed_module
from hashattn.selectors.base import KeyView

N = 13


def reference(queries, keys, starts=(0, 0), last=N):
    expected = torch.zeros(B, KV_HEADS, last, dtype=torch.float64)
    for b in range(B):
        for kv in range(KV_HEADS):
            for position in range(starts[b], last):
                seen = range(starts[b], position + 1)
                for t, w in attention(queries, keys, b, kv, position, seen).items():
                    expected[b, kv, t] += w
    return expected


@pytest.mark.parametrize("at_once", [1 << 24, 60])
def test_prefill_gathers_the_column_sums_of_causal_attention(monkeypatch, at_once):
    monkeypatch.setattr(observed_module, "WEIGHTS_AT_ONCE", at_once)
    queries, keys = random_qk(N)
    found = observe(make_selector("h2o"), queries, keys, 0, N, {})["gathered"]
    assert (found.double() - reference(queries, keys)).abs().max() < 1e-5


@pytest.mark.parametrize("cuts", [(0, 1, 5, N), tuple(range(N + 1))])
def test_chunks_gather_the_same(cuts):
    queries, keys = random_qk(N)
    selector, state = make_selector("h2o"), {}
    for first, last in zip(cuts, cuts[1:], strict=False):
        state = observe(selector, queries, keys, first, last, state)
    assert (state["gathered"].double() - reference(queries, keys)).abs().max() < 1e-5


def test_padding_neither_gives_nor_gathers():
    queries, keys = random_qk(N)
    visible = torch.ones(B, N, dtype=torch.bool)
    visible[1, :4] = False
    found = observe(make_selector("h2o"), queries, keys, 0, N, {}, visible=visible)["gathered"]
    assert (found.double() - reference(queries, keys, (0, 4))).abs().max() < 1e-5
    assert (found[1, :, :4] == 0).all()


def test_a_step_gathers_over_what_it_read_and_evicts_the_rest_for_good():
    queries, keys = random_qk(N + 2)
    selector = make_selector("h2o")
    prompt = observe(selector, queries, keys, 0, N, {})
    reads = [[0, 2, 7, N], [1, 3, 4, N]]  # a list for each KV head
    read = torch.tensor([reads, reads], dtype=torch.int32)[:, :, None]
    state = observe(selector, queries, keys, N, N + 1, prompt, read)
    expected = torch.full((B, KV_HEADS, N + 1), -torch.inf, dtype=torch.float64)
    before = reference(queries, keys)
    for b in range(B):
        for kv in range(KV_HEADS):
            for t, w in attention(queries, keys, b, kv, N, reads[kv]).items():
                expected[b, kv, t] = w + (before[b, kv, t] if t < N else 0)
    assert torch.equal(state["gathered"].isinf(), expected.isinf())
    assert (state["gathered"].double() - expected).nan_to_num(0.0).abs().max() < 1e-5

    scores = selector.scores(
        0, queries[:, :, N + 1 :], KeyView(keys, state | {}), SCALING
    )  # a token that has just come has gathered nothing
    assert torch.equal(scores[:, :, 0, : N + 1], state["gathered"]) and (scores[..., -1] == 0).all()

    everything = torch.arange(N + 2, dtype=torch.int32).expand(B, KV_HEADS, 1, -1)
    for again in (everything, None):  # neither a step that reads all nor a dense call brings back
        later = observe(selector, queries, keys, N + 1, N + 2, state, again)["gathered"]
        assert torch.equal(later[..., : N + 1].isinf(), expected.isinf())


def test_of_several_rows_the_last_decides_what_is_kept():
    queries, keys = random_qk(N + 2)
    selector = make_selector("h2o")
    prompt = observe(selector, queries, keys, 0, N, {})
    rows = torch.tensor([[0, 5, N, -1], [0, 6, N, N + 1]], dtype=torch.int32)
    read = rows.expand(B, KV_HEADS, 2, 4)
    state = observe(selector, queries, keys, N, N + 2, prompt, read)["gathered"]
    kept = (~state[0, 0].isinf()).nonzero()[:, 0].tolist()
    assert kept == [0, 6, N, N + 1]
    weights = attention(queries, keys, 0, 0, N, [0, 5, N])
    weights_last = attention(queries, keys, 0, 0, N + 1, [0, 6, N, N + 1])
    assert float(state[0, 0, N]) == pytest.approx(weights[N] + weights_last[N], abs=1e-5)


def test_scores_without_an_observed_prompt_are_refused():
    queries, keys = random_qk(N)
    with pytest.raises(ValueError, match="'h2o'.*saw none"):
        make_selector("h2o").scores(0, queries[:, :, -1:], KeyView(keys), SCALING)


def test_record_and_cost():
    selector = make_selector("h2o")
    assert selector.evicts and selector.observes and selector.needs == "nothing"
    assert selector.auxiliary_bits(4, 128) == 32
    assert selector.record() == {
        "name": "h2o", "parameters": {}, "weights_sha256": None, "evicts": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match="heavy"):
        make_selector("h2o", heavy=3)


def test_streaming_llm_is_the_window():
    selector = make_selector("streaming_llm")
    assert isinstance(selector, type(make_selector("window"))) and selector.evicts
    assert selector.record()["parameters"] == {"method": "streaming_llm"}
    queries, keys = random_qk(N)
    assert (selector.scores(0, queries, KeyView(keys), SCALING) == -torch.inf).all()


def test_only_eviction_methods_evict_and_each_says_what_it_needs():
    from importlib import import_module

    from hashattn.selectors import METHODS

    classes = {name: getattr(import_module(m), cls) for name, (m, cls) in METHODS.items()}
    evicting = {name for name, cls in classes.items() if cls.evicts}
    assert evicting >= {"window", "streaming_llm", "h2o", "snapkv"}
    assert not evicting & {"dense", "oracle", "quest", "hash", "lsh", "random", "infllm"}
    assert classes["hash"].needs == "training" and classes["oracle"].needs == "nothing"
    assert classes["double_sparsity"].needs == "calibration"
