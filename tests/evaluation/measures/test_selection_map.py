"""A picture's tokens: what was read, missed and not seen, against a loop in Python."""

import matplotlib
import pytest
import torch

from hashattn.evaluation.measures.selection_map import KINDS, selection_map
from hashattn.hashing.capture import capture
from hashattn.reproduce.plots import draw_selection
from hashattn.selectors import make_selector
from helpers import prompt, tiny_model

matplotlib.use("agg")
SINK, LOCAL, HEAVY = 2, 3, 5


@pytest.fixture(scope="module")
def layer():
    return capture(tiny_model("llama"), prompt(length=60))[1]


def expected(layer, head, read):
    """KINDS by a loop over the rows, of which `read(row)` gives the heavy tokens."""
    rows = []
    for query, position in zip(layer.queries[head], layer.positions.tolist(), strict=True):
        seen = range(position + 1)
        mandatory = {*seen[:SINK], *seen[max(0, len(seen) - LOCAL) :]}
        others = [token for token in seen if token not in mandatory]
        if not others:
            continue
        keys = layer.keys[head // 2].double()
        scores = {token: float(query.double() @ keys[token]) for token in others}
        best = set(sorted(others, key=lambda token: (-scores[token], token))[:HEAVY])
        heavy, kinds = set(read(scores)), []
        for token in range(layer.keys.shape[1]):
            told = (
                "later than the query" if token > position
                else "sink and recent" if token in mandatory
                else "read, and one of the best k" if token in heavy & best
                else "read, and none of them" if token in heavy
                else "one of the best k, missed" if token in best
                else "not read"
            )  # fmt: skip
            kinds.append(KINDS.index(told))
        rows.append(kinds)
    return torch.tensor(rows, dtype=torch.int8)


@pytest.mark.parametrize("head", [0, 3])
def test_the_oracle_misses_nothing(layer, head):
    selected = selection_map(layer, make_selector("oracle"), HEAVY, SINK, LOCAL, head=head)
    best = expected(layer, head, lambda s: sorted(s, key=lambda t: (-s[t], t))[:HEAVY])
    assert torch.equal(selected.kinds, best) and selected.hits == 1
    assert selected.positions.tolist() == layer.positions.tolist()[-len(best) :]


def test_a_window_reads_nothing_else(layer):
    selected = selection_map(layer, make_selector("window"), HEAVY, SINK, LOCAL)
    assert torch.equal(selected.kinds, expected(layer, 0, lambda scores: ()))
    assert selected.hits == 0


def test_heads_that_there_are_not_are_refused(layer):
    with pytest.raises(ValueError, match="head = 4: must be 0 to 3"):
        selection_map(layer, make_selector("oracle"), HEAVY, SINK, LOCAL, head=4)


def test_the_picture_shows_every_token_and_says_how_many_were_hit(layer):
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots()
    selected = selection_map(layer, make_selector("lsh", bits=64), HEAVY, SINK, LOCAL, name="LSH")
    draw_selection(axis, selected)
    (image,) = axis.images
    assert (image.get_array() == selected.kinds.numpy()).all()
    assert axis.get_title() == f"LSH, layer 1, head 0: {selected.hits:.0%} of the best"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == list(KINDS[1:])
    plt.close(figure)
