"""SnapKV against loops in float64: votes of the last prompt queries, pooled, decided once."""

import pytest
import torch
from attention_reference import KV_HEADS, SCALING, B, attention, observe, random_qk

from hashattn.selectors import make_selector
from hashattn.selectors.base import KeyView

N, WINDOW = 17, 4


def reference(queries, keys, kernel, pooling, starts=(0, 0), n=N, window=WINDOW):
    """Ranks by the formula; the window's tokens one above the most votes there can be."""
    expected = torch.zeros(B, KV_HEADS, n, dtype=torch.float64)
    inside = max(0, n - window)
    for b in range(B):
        for kv in range(KV_HEADS):
            votes = [0.0] * n
            for position in range(max(inside, starts[b]), n):
                seen = range(starts[b], position + 1)
                for t, w in attention(queries, keys, b, kv, position, seen).items():
                    votes[t] += w
            for t in range(n):
                reach = range(t - kernel // 2, t + kernel // 2 + 1)
                near = [votes[i] if 0 <= i < inside else 0.0 for i in reach]
                pooled = max(near) if pooling == "max" else sum(near) / kernel
                expected[b, kv, t] = pooled if t < inside else window + 1
    return expected


@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize("kernel", [1, 3, 7, 41])
@pytest.mark.parametrize("cuts", [(0, N), (0, 6, N - 2, N), tuple(range(N + 1))])
def test_rank_is_the_pooled_vote_of_the_window_however_the_prompt_comes(pooling, kernel, cuts):
    queries, keys = random_qk(N)
    selector, state = make_selector("snapkv", window=WINDOW, kernel=kernel, pooling=pooling), {}
    for first, last in zip(cuts, cuts[1:], strict=False):
        state = observe(selector, queries, keys, first, last, state)
    expected = reference(queries, keys, kernel, pooling)
    assert (state["rank"].double() - expected).abs().max() < 1e-5
    assert state["votes"].shape == (B, KV_HEADS, N, WINDOW)


@pytest.mark.parametrize("n", [1, WINDOW - 1, WINDOW, WINDOW + 1])
def test_short_prompts(n):
    queries, keys = random_qk(n)
    selector = make_selector("snapkv", window=WINDOW, kernel=3)
    found = observe(selector, queries, keys, 0, n, {})["rank"]
    assert (found.double() - reference(queries, keys, 3, "max", n=n)).abs().max() < 1e-5


def test_padding_does_not_vote():
    queries, keys = random_qk(N)
    for start in (6, N - 2):  # the second row is shorter than the window
        visible = torch.ones(B, N, dtype=torch.bool)
        visible[1, :start] = False
        selector = make_selector("snapkv", window=WINDOW, kernel=3)
        found = observe(selector, queries, keys, 0, N, {}, visible=visible)["rank"]
        expected = reference(queries, keys, 3, "max", (0, start))
        assert (found.double() - expected).abs().max() < 1e-5


def lists(*tokens):
    return torch.tensor(tokens, dtype=torch.int32).expand(B, KV_HEADS, 1, -1)


def test_the_first_step_decides_and_later_tokens_are_readable_only_while_local():
    queries, keys = random_qk(N + 3)
    selector = make_selector("snapkv", window=WINDOW, kernel=3)
    prompt = observe(selector, queries, keys, 0, N, {})
    decided = observe(selector, queries, keys, N, N + 1, prompt, lists(0, 5, 9, N - 1, N))
    assert set(decided) == {"rank"}
    finite = ~decided["rank"].isinf()
    # the new token itself was read as local; it has no place once it leaves the local window
    expected = torch.zeros(N + 1, dtype=torch.bool).index_fill(0, torch.tensor([0, 5, 9, N - 1]), 1)
    assert (finite == expected).all()
    kept = decided["rank"][finite]
    assert torch.equal(kept, prompt["rank"][finite[..., :N]])

    view = KeyView(keys[:, :, : N + 2], decided)
    scores = selector.scores(0, queries[:, :, N + 1 : N + 2], view, SCALING)
    assert torch.equal(scores[:, :, 0, : N + 1], decided["rank"])
    after = observe(
        selector, queries, keys, N + 1, N + 2, decided, lists(0, 3, 5, N - 1, N, N + 1)
    )  # 3 was evicted, 9 is not read any more
    left = (~after["rank"][0, 0].isinf()).nonzero()[:, 0].tolist()
    assert left == [0, 5, N - 1]


def test_a_question_of_several_sparse_rows_ranks_with_the_window():
    queries, keys = random_qk(N + 3)
    selector = make_selector("snapkv", window=WINDOW, kernel=3)
    prompt = observe(selector, queries, keys, 0, N, {})
    asked = queries[:, :, N:]
    scores = selector.scores(0, asked, KeyView(keys, prompt), SCALING)
    assert (scores[..., N:] == WINDOW + 1).all() and scores.shape == (B, KV_HEADS, 3, N + 3)
    assert (scores[..., : N - WINDOW] <= WINDOW).all()
    read = torch.tensor([[0, N, -1, -1], [0, N, N + 1, -1], [0, N, N + 1, N + 2]])
    read = read.expand(B, KV_HEADS, 3, 4)
    rank = observe(selector, queries, keys, N, N + 3, prompt, read)["rank"]
    assert (~rank[0, 0].isinf()).nonzero()[:, 0].tolist() == [0, N, N + 1, N + 2]


def test_a_next_turn_votes_among_what_is_left():
    queries, keys = random_qk(N + 6)
    selector = make_selector("snapkv", window=WINDOW, kernel=3)
    prompt = observe(selector, queries, keys, 0, N, {})
    decided = observe(selector, queries, keys, N, N + 1, prompt, lists(0, 5, 9, N))
    turn = observe(selector, queries, keys, N + 1, N + 6, decided)
    expected = reference(queries, keys, 3, "max", n=N + 6)
    left = torch.zeros(N + 6, dtype=torch.bool)
    left[[0, 5, 9, *range(N + 1, N + 6)]] = True
    assert (turn["rank"].isinf() == ~left).all()
    difference = (turn["rank"].double() - expected)[..., left]
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"window": 0}, "window = 0"),
        ({"kernel": 4}, "kernel = 4"),
        ({"kernel": -1}, "kernel = -1"),
        ({"pooling": "mean"}, "pooling = 'mean'"),
    ],
)
def test_wrong_parameters_are_refused_by_name(parameters, said):
    with pytest.raises(ValueError, match=said):
        make_selector("snapkv", **parameters)


def test_record_and_cost():
    selector = make_selector("snapkv", window=16)
    assert selector.evicts and selector.needs == "nothing"
    assert selector.auxiliary_bits(4, 128) == 32
    assert selector.record() == {
        "name": "snapkv",
        "parameters": {"window": 16, "kernel": 7, "pooling": "max"},
        "weights_sha256": None,
        "evicts": True,
    }
    with pytest.raises(ValueError, match="saw none"):
        queries, keys = random_qk(N)
        selector.scores(0, queries, KeyView(keys), SCALING)
