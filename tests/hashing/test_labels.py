"""Labels against a brute-force reference that shares no code with them."""

import math

import pytest
import torch

from hashattn.hashing.labels import attention_mass, candidate_mask, row_labels


def brute_force(queries, keys, positions, scaling, sink, local, top, softcap):
    """Per head and row: the best `top` candidates and their softmax shares."""
    heads, group = queries.shape[0], queries.shape[0] // keys.shape[0]
    result = {}
    for head in range(heads):
        for row, position in enumerate(positions.tolist()):
            logits = []
            for token in range(position + 1):
                logit = scaling * sum(
                    float(queries[head, row, c]) * float(keys[head // group, token, c])
                    for c in range(queries.shape[2])
                )
                logits.append(softcap * math.tanh(logit / softcap) if softcap else logit)
            peak = max(logits)
            weights = [math.exp(logit - peak) for logit in logits]
            shares = {t: w / sum(weights) for t, w in enumerate(weights)}
            inside = {t: s for t, s in shares.items() if sink <= t < position + 1 - local}
            best = sorted(inside, key=lambda t: -inside[t])[:top]
            result[head, row] = (best, [inside[t] for t in best])
    return result


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sink, local", [(0, 1), (3, 5), (4, 28)])
def test_labels_are_the_heaviest_candidates(sink, local, softcap):
    generator = torch.Generator().manual_seed(sink)
    queries = torch.randn(4, 6, 8, generator=generator)
    keys = torch.randn(2, 40, 8, generator=generator)
    positions = torch.tensor([0, 7, 13, 30, 33, 39])
    labels = row_labels(
        queries,
        keys,
        positions,
        0.7,
        sink=sink,
        local=local,
        top=5,
        softcap=softcap,
        rows_at_once=4,
    )
    expected = brute_force(queries, keys, positions, 0.7, sink, local, 5, softcap)
    for (head, row), (tokens, mass) in expected.items():
        valid = labels.valid[head, row]
        assert labels.tokens[head, row][valid].tolist() == tokens
        assert labels.weight[head, row][valid].tolist() == pytest.approx(mass, abs=1e-6)
        assert (labels.tokens[head, row][~valid] == 0).all()


def test_labels_by_what_the_output_loses():
    """Attention over all tokens but one, head by head: its distance from attention over all."""
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(4, 3, 8, generator=generator)
    keys = torch.randn(2, 40, 8, generator=generator)
    values = torch.randn(2, 40, 6, generator=generator) * torch.rand(2, 40, 1, generator=generator)
    positions = torch.tensor([13, 30, 39])
    labels = row_labels(
        queries, keys, positions, 0.7, sink=2, local=3, top=4, values=values, rows_at_once=2
    )
    for head in range(4):
        k, v = keys[head // 2].double(), values[head // 2].double()
        for row, position in enumerate(positions.tolist()):
            logits = k[: position + 1] @ queries[head, row].double() * 0.7
            output = logits.softmax(0) @ v[: position + 1]
            lost = {}
            for token in range(2, position - 2):
                rest = [t for t in range(position + 1) if t != token]
                change = logits[rest].softmax(0) @ v[rest] - output
                lost[token] = float(change.norm() / output.norm())
            best = sorted(lost, key=lambda t: -lost[t])[:4]
            assert labels.tokens[head, row].tolist() == best
            found = labels.weight[head, row].tolist()
            assert found == pytest.approx([lost[t] for t in best], rel=1e-3)


def test_labels_scale_with_length():
    queries, keys = torch.randn(2, 3, 4), torch.randn(1, 64, 4)
    positions, limits = torch.tensor([15, 40, 63]), {"sink": 0, "local": 1, "top": 5}
    few = row_labels(queries, keys, positions, 1.0, top_fraction=1 / 16, **limits)
    assert few.valid.sum(-1).tolist() == 2 * [[1, 2, 4]]
    many = row_labels(queries, keys, positions, 1.0, **limits)
    assert torch.equal(few.tokens, torch.where(few.valid, many.tokens, 0))
    assert many.valid.all()


def test_fewer_keys_than_labels():
    labels = row_labels(
        torch.randn(2, 1, 4), torch.randn(1, 3, 4), torch.tensor([2]), 1.0, sink=0, local=1, top=32
    )
    assert labels.tokens.shape == (2, 1, 3) and labels.valid.sum() == 4


def test_candidates_leave_out_sink_local_and_future():
    mask = candidate_mask(torch.tensor([5, 11]), 14, sink=2, local=4)
    assert mask[0].nonzero().flatten().tolist() == []
    assert mask[1].nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 7]
    assert candidate_mask(torch.tensor([6]), 14, 2, 4)[0].nonzero().flatten().tolist() == [2]


def test_mass_is_causal_and_sums_to_one():
    positions = torch.tensor([0, 9, 19])
    mass = attention_mass(torch.randn(4, 3, 8), torch.randn(2, 20, 8), positions, 0.3)
    assert torch.allclose(mass.sum(-1), torch.ones(4, 3), atol=1e-6)
    assert (mass[:, 0, 1:] == 0).all() and (mass[:, 1, 10:] == 0).all()
