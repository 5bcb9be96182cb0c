"""Losses against direct formulas, and the recipe's validation."""

import math
from dataclasses import replace

import pytest
import torch

from hashattn.hashing import TrainRecipe
from hashattn.hashing.labels import RowLabels, row_labels
from hashattn.hashing.objective import (
    Batch,
    batch_loss,
    bit_penalties,
    label_weights,
    relax,
    relaxed_scores,
)

RECIPE = TrainRecipe.signs()


def random_batch(heads=4, kv_heads=2, rows=3, n=30, top=4, sink=2, local=3):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(heads, rows, 8, generator=generator)
    keys = torch.randn(kv_heads, n, 8, generator=generator)
    positions = torch.tensor([6, 17, 29])[:rows]
    labels = row_labels(queries, keys, positions, 1.0, sink=sink, local=local, top=top)
    allowed = (torch.arange(n) >= sink) & (torch.arange(n) <= positions[:, None] - local)
    return Batch(queries, keys, allowed, positions + 1, labels)


def bits(heads, n, seed):
    return torch.tanh(torch.randn(heads, n, 32, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("maps", [2, 4])
def test_scores_are_sums_over_the_group(maps):
    q, k = bits(4, 3, 1), bits(maps, 30, 2)
    scores = relaxed_scores(q, k, average=False)
    for m in range(maps):
        group = 4 // maps
        expected = sum(q[h] @ k[m].T for h in range(m * group, (m + 1) * group))
        assert torch.allclose(scores[m], expected, atol=1e-5)
    averaged = relaxed_scores(q, k, average=True)
    assert torch.allclose(averaged * 32 * 4 / maps, scores, atol=1e-4)


@pytest.mark.parametrize("maps", [2, 4])
def test_official_loss_is_the_papers_bce(maps):
    batch, recipe = random_batch(), TrainRecipe.official().vary(alpha=20.0, beta=0.01)
    q, k = bits(4, 3, 1) * 0.2, bits(maps, 30, 2)
    loss = batch_loss(q, k, torch.ones(maps), torch.zeros(maps), batch, recipe)
    group, total = 4 // maps, 0.0
    for m in range(maps):
        heads = range(m * group, (m + 1) * group)
        for row in range(3):
            positives = {
                int(t)
                for h in heads
                for t in batch.labels.tokens[h, row][batch.labels.valid[h, row]]
            }
            for token in batch.allowed[row].nonzero().flatten().tolist():
                logit = sum(float(q[h, row] @ k[m, token]) for h in heads)
                p = 1 / (1 + math.exp(-logit))
                total -= (20 + 0.01 * 30) * math.log(p) if token in positives else math.log(1 - p)
    assert float(loss) == pytest.approx(total / (maps * 3 * 30), rel=1e-4)


@pytest.mark.parametrize("loss_name", ["cross_entropy", "budgeted"])
@pytest.mark.parametrize(("maps", "summed"), [(2, "sum"), (2, "each"), (4, "each")])
def test_ranking_losses_follow_their_formula(loss_name, maps, summed):
    batch = random_batch()
    recipe = RECIPE.vary(
        loss=loss_name,
        budget_fraction=8.0,
        mass_share=0.3,
        balance=0.0,
        decorrelation=0.0,
        average_group=True,
        group=summed,
    )
    q, k, scale = bits(4, 3, 1), bits(maps, 30, 2), torch.tensor(7.0)
    loss = batch_loss(q, k, scale.expand(maps), torch.zeros(maps), batch, recipe)
    weights, group, total = label_weights(batch.labels, 0.3), 4 // maps, 0.0
    for head in range(4):
        m = head // group
        for row in range(3):
            asked = q[m * group : (m + 1) * group, row].mean(0) if summed == "sum" else q[head, row]
            logits = scale * (asked @ k[m].T) / 32
            whole = logits[batch.allowed[row]].exp().sum().log()
            budget = max(1.0, int(batch.visible[row]) / 8)
            for slot in range(4):
                gap = float(whole - logits[batch.labels.tokens[head, row, slot]])
                if loss_name == "budgeted":
                    gap = math.log1p(math.exp(gap - math.log(budget)))
                total += float(weights[head, row, slot]) * gap
    assert float(loss) == pytest.approx(total / float(weights.sum()), rel=1e-4)


@pytest.mark.parametrize(("maps", "summed"), [(2, "sum"), (2, "each"), (4, "each")])
def test_the_sampling_loss_is_the_chi_square_divergence(maps, summed):
    """log sum(a^2 / w) of every row, by its mass on labels; w has a tenth of its mean added."""
    batch = replace(random_batch(), scaling=0.7, softcap=5.0)
    recipe = RECIPE.vary(loss="sampling", average_group=True, group=summed)
    q, k, scale = bits(4, 3, 1), bits(maps, 30, 2), torch.tensor(7.0)
    loss = batch_loss(q, k, scale.expand(maps), torch.zeros(maps), batch, recipe)
    group, total, weights = 4 // maps, 0.0, 0.0
    lists = [range(m * group, (m + 1) * group) for m in range(maps)] if summed == "sum" else [
        range(h, h + 1) for h in range(4)
    ]  # fmt: skip
    for heads in lists:
        for row in range(3):
            allowed = batch.allowed[row]
            asked, codes = q[list(heads), row].mean(0), k[heads[0] // group]
            w = (scale * (asked @ codes.T) / 32)[allowed].double().softmax(-1)
            w = w + 0.1 / len(w)
            a = sum(
                (5 * torch.tanh(0.7 * (batch.queries[h, row] @ batch.keys[h // 2].T) / 5))[allowed]
                .double().softmax(-1)
                for h in heads
            )  # fmt: skip
            mass = sum(float(batch.labels.weight[h, row].clamp(min=0).sum()) for h in heads)
            total += mass * math.log(float((a * a / w).sum()))
            weights += mass
    assert float(loss) == pytest.approx(total / weights, rel=1e-4)


def test_a_row_without_candidates_costs_nothing_and_has_finite_gradient():
    batch = random_batch()
    empty = Batch(
        batch.queries,
        batch.keys,
        torch.zeros_like(batch.allowed),
        batch.visible,
        RowLabels(torch.zeros(4, 3, 4, dtype=torch.long), -torch.ones(4, 3, 4)),
    )
    for recipe in (RECIPE, TrainRecipe.official(), RECIPE.vary(loss="sampling")):
        q, k = bits(4, 3, 1).requires_grad_(), bits(2, 30, 2).requires_grad_()
        loss = batch_loss(
            q, k, torch.ones(2), torch.zeros(2), empty, recipe.vary(balance=0.0, decorrelation=0.0)
        )
        loss.backward()
        assert loss.item() == 0 and torch.isfinite(q.grad).all() and torch.isfinite(k.grad).all()


def test_label_weights_share_between_mass_and_count():
    labels = RowLabels(
        torch.tensor([[[3, 4], [5, 0]]]),
        torch.tensor([[[0.6, 0.2], [0.1, -1.0]]]),
    )
    assert torch.allclose(label_weights(labels, 0.0), torch.tensor([[[0.5, 0.5], [1.0, 0.0]]]))
    by_mass = label_weights(labels, 1.0)
    assert torch.allclose(by_mass, torch.tensor([[[0.6, 0.2], [0.1, 0.0]]]) * 2 / 0.9)
    assert label_weights(labels, 0.4).sum() == pytest.approx(2.0)


def test_relaxed_bits_are_hard_forward_and_smooth_backward():
    pre = torch.tensor([-2.0, -0.1, 0.0, 0.3], requires_grad=True)
    hard = relax(pre, 2.0, hard=True)
    assert hard.tolist() == [-1, -1, -1, 1]  # bit = pre-activation > 0, as the packed codes
    hard.sum().backward()
    expected = 2 * (1 - torch.tanh(2 * pre.detach()).square())
    assert torch.allclose(pre.grad, expected, atol=1e-5)
    assert torch.allclose(relax(pre, 2.0, hard=False), torch.tanh(2 * pre))


def test_penalties_are_zero_for_balanced_independent_bits():
    recipe = RECIPE.vary(balance=1.0, decorrelation=1.0)
    table = torch.tensor([[(i >> b & 1) * 2.0 - 1 for b in range(5)] for i in range(32)])[None]
    assert float(bit_penalties(table, recipe)) == pytest.approx(0, abs=1e-6)
    same = table[..., :1].expand(1, 32, 2)
    assert float(bit_penalties(same, recipe.vary(balance=0.0))) == pytest.approx(0.5)
    assert float(bit_penalties(torch.ones(1, 8, 1), recipe.vary(decorrelation=0.0))) == 1


@pytest.mark.parametrize(
    "field, value",
    [
        ("loss", "hinge"),
        ("surrogate", "relu"),
        ("init", "zeros"),
        ("schedule", "linear"),
        ("normalise", "layer"),
        ("steps", 0),
        ("top", 0),
        ("mass_share", 1.5),
        ("hard_share", -0.1),
        ("learning_rate", 0.0),
        ("scale", -1.0),
        ("sink", -1),
        ("keys_per_step", 3),
        ("balance", -1.0),
        ("steps", "many"),
        ("steps", True),
        ("rows_per_step", 1.5),
        ("learning_rate", float("nan")),
        ("alpha", [20.0]),
        ("mass_share", None),
        ("loss", ["bce"]),
        ("keys_per_step", "all"),
    ],
)
def test_an_invalid_option_names_itself(field, value):
    with pytest.raises(ValueError, match=f"{field} = .*: must be"):
        RECIPE.vary(**{field: value})


def test_the_official_recipe_is_the_papers():
    r = TrainRecipe.official()
    assert (r.loss, r.top, r.alpha, r.beta, r.sink, r.local) == ("bce", 32, 20.0, 0.0, 128, 128)
    assert (r.learning_rate, r.schedule, r.scale, r.learn_scale) == (1e-3, "constant", 1.0, False)
    assert (r.surrogate, r.init, r.normalise, r.mass_share) == ("tanh", "random", "none", 0.0)
    assert r.balance == r.decorrelation == r.weight_decay == 0.0
