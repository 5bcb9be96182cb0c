"""InfLLM against loops in float64: representatives of blocks, and blocks ranked by them."""

import pytest
import torch
from attention_reference import GROUP, HEADS, KV_HEADS, SCALING, B, attention, observe, random_qk

from hashattn.kernels import select
from hashattn.selectors import make_selector
from hashattn.selectors.base import KeyView

N, ROWS = 23, 3


def gathered(queries, keys, window, starts, n):
    found = torch.zeros(B, KV_HEADS, n, dtype=torch.float64)
    for b in range(B):
        for kv in range(KV_HEADS):
            for position in range(starts[b], n):
                seen = range(max(starts[b], position - window + 1), position + 1)
                for t, w in attention(queries, keys, b, kv, position, seen).items():
                    found[b, kv, t] += w
    return found


def reference(queries, keys, block, representatives, window, starts=(0, 0)):
    """Scores of the last ROWS queries after N observed ones."""
    total = N + ROWS
    strength = gathered(queries, keys, window, starts, N)
    expected = torch.full((B, KV_HEADS, ROWS, total), -torch.inf, dtype=torch.float64)
    for b in range(B):
        for first in range(starts[b], total, block):
            members = range(first, min(first + block, total))
            score = 0.0
            for head in range(HEADS):
                kv = head // GROUP
                key = lambda t: -float(strength[b, kv, t]) if t < N else 0.0  # noqa: E731, B023
                for t in sorted(members, key=key)[:representatives]:
                    for row in range(N, total):
                        if row >= starts[b]:
                            score += float(queries[b, head, row].double() @ keys[b, kv, t].double())
            expected[b, :, :, first : members.stop] = score
    return expected


def scored(selector, queries, keys, visible=None):
    state = observe(selector, queries, keys, 0, N, {}, visible=visible)
    return selector.scores(0, queries[:, :, N:], KeyView(keys, state, visible), SCALING)


@pytest.mark.parametrize(("block", "representatives"), [(1, 1), (5, 2), (8, 8), (64, 4), (13, 4)])
@pytest.mark.parametrize("window", [1, 6, 4096])
def test_scores_are_the_sums_over_representatives(block, representatives, window):
    queries, keys = random_qk(N + ROWS)
    selector = make_selector("infllm", block=block, representatives=representatives, window=window)
    found = scored(selector, queries, keys)
    assert found.shape == (B, KV_HEADS, ROWS, N + ROWS)
    expected = reference(queries, keys, block, representatives, window)
    assert (found.double() - expected).abs().max() < 1e-4


def test_blocks_start_at_the_first_visible_token():
    queries, keys = random_qk(N + ROWS)
    visible = torch.ones(B, N + ROWS, dtype=torch.bool)
    for start in (3, N + 1):  # the second is padding even among the rows that ask
        visible[1, :start] = False
        selector = make_selector("infllm", block=5, representatives=2, window=6)
        found = scored(selector, queries, keys, visible)
        expected = reference(queries, keys, 5, 2, 6, (0, start))
        assert torch.equal(found.isinf(), expected.isinf())
        assert (found.double() - expected).nan_to_num(0.0).abs().max() < 1e-4


def test_chunks_and_steps_gather_the_same():
    queries, keys = random_qk(N)
    selector = make_selector("infllm", block=5, window=6)
    whole = observe(selector, queries, keys, 0, N, {})["gathered"]
    for cuts in ((0, 4, 21, N), tuple(range(N + 1))):
        state = {}
        for first, last in zip(cuts, cuts[1:], strict=False):
            read = torch.zeros(B, KV_HEADS, 1, 1, dtype=torch.int32) if first == N - 1 else None
            state = observe(selector, queries, keys, first, last, state, read)
        assert torch.allclose(state["gathered"], whole, atol=1e-5)


def test_whole_blocks_are_taken_best_first_and_the_last_is_cut():
    queries, keys = random_qk(N + ROWS)
    scores = scored(make_selector("infllm", block=5, representatives=2), queries, keys)
    nothing = torch.zeros(1, 1, 1, N + ROWS, dtype=torch.bool)
    read = select(scores, 7, ~nothing, nothing)
    chosen, left = set(read[0, 0, 0].tolist()) - {-1}, 7
    for first in 5 * scores[0, 0, 0, ::5].argsort(descending=True):
        members = list(range(first, min(first + 5, N + ROWS)))
        assert [t for t in members if t in chosen] == members[:left]
        left = max(0, left - len(members))
    assert (read == read[:, :1, :1]).all()  # one choice for all heads and rows


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"block": 0}, "block = 0"),
        ({"representatives": 0}, "representatives = 0"),
        ({"block": 8, "representatives": 9}, "1..8"),
        ({"window": 0}, "window = 0"),
    ],
)
def test_wrong_parameters_are_refused_by_name(parameters, said):
    with pytest.raises(ValueError, match=said):
        make_selector("infllm", **parameters)


def test_record_and_cost():
    selector = make_selector("infllm")
    assert not selector.evicts and selector.observes and selector.needs == "nothing"
    assert selector.nominal_bits(4, 128) == 64  # four keys of 128 channels in 128 tokens
    assert selector.record() == {
        "name": "infllm",
        "parameters": {"block": 128, "representatives": 4, "window": 4096},
        "weights_sha256": None,
        "evicts": False,
    }
    with pytest.raises(ValueError, match="saw none"):
        queries, keys = random_qk(N)
        selector.scores(0, queries, KeyView(keys), SCALING)
