"""Reuse of selections against a loop over steps and heads."""

import pytest
import torch

from hashattn.evaluation.measures.reuse import reuse
from hashattn.hashing import CapturedLayer
from hashattn.selectors import make_selector

HEADS, KV_HEADS, N, D, ROWS = 4, 2, 90, 8, 12
SINK, LOCAL, HEAVY = 2, 5, 10
SCALING = D**-0.5


def layers(count=3):
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        made.append(CapturedLayer(
            2 * number, draw(HEADS, ROWS, D) * 2, torch.arange(N - ROWS, N), draw(KV_HEADS, N, D),
            SCALING, None, draw(KV_HEADS, N, D)))  # fmt: skip
    return made


def selected(layer, head, row):
    """The oracle's heavy tokens of one head and row, and the row's sink and local ones."""
    position = int(layer.positions[row])
    logits = layer.queries[head, row] @ layer.keys[head // 2].T
    window = set(range(SINK)) | set(range(position - LOCAL + 1, position + 1))
    candidates = [t for t in range(position + 1) if t not in window]
    best = sorted(candidates, key=lambda t: -float(logits[t]))[:HEAVY]
    return set(best), window


def error(layer, head, row, read):
    position = int(layer.positions[row])
    logits = (layer.queries[head, row] @ layer.keys[head // 2].T * SCALING)[: position + 1]
    values = layer.values[head // 2][: position + 1]
    dense = logits.softmax(0) @ values
    kept = torch.tensor(sorted(t for t in read if t <= position))
    sparse = logits[kept].softmax(0) @ values[kept]
    return float((sparse - dense).norm() / dense.norm())


@pytest.mark.parametrize("kind", ["steps", "layers"])
@pytest.mark.parametrize("every", [1, 2, 4])
def test_reuse_is_what_a_loop_finds(kind, every):
    captured = layers()
    found = reuse(captured, make_selector("oracle"), HEAVY, SINK, LOCAL, every=(1, 2, 4))
    for number, layer in enumerate(captured):
        errors, overlaps, densities = [], [], []
        for head in range(HEADS):
            for row in range(ROWS):
                source, when = layer, row
                if kind == "steps":
                    when = row // every * every
                else:
                    source = captured[number // every * every]
                heavy, window = selected(source, head, when)
                own, mine = selected(layer, head, row)
                read = heavy | window | mine
                errors.append(error(layer, head, row, read))
                overlaps.append(len(own & read) / len(own))
                densities.append(len(read) / (int(layer.positions[row]) + 1))
        line, = (r for r in found
                 if (r["kind"], r["every"], r["layer"]) == (kind, every, layer.layer))  # fmt: skip
        for name, values in (("output_error", errors), ("overlap", overlaps),
                             ("density", densities)):  # fmt: skip
            assert line[name] == pytest.approx(sum(values) / len(values), abs=1e-5)
        if every == 1:
            assert line["overlap"] == 1


def test_what_cannot_be_measured_is_refused():
    (layer,) = layers(1)
    bare = CapturedLayer(0, layer.queries, layer.positions, layer.keys, SCALING)
    with pytest.raises(ValueError, match=r"layer 0 was captured without values"):
        reuse([bare], make_selector("oracle"), HEAVY)
    apart = CapturedLayer(0, layer.queries, layer.positions - torch.arange(ROWS) % 2, layer.keys,
                          SCALING, None, layer.values)  # fmt: skip
    with pytest.raises(ValueError, match="successive positions"):
        reuse([apart], make_selector("oracle"), HEAVY)
