"""A decode step whose lists read until a rule is content: against float64, list by list."""

import math

import pytest
import torch
from test_decode_step import FINE, LOCAL, SHAPES, SINK, Step, composed

from hashattn import kernels
from hashattn.kernels import LEAST_HEAVY, LOG_LIMIT, Rule, available
from hashattn_kernels import numba_cpu

pytestmark = pytest.mark.skipif(not available("numba"), reason="numba is not installed")
LEVELS = 3


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a list may be the only one
    yield
    torch.set_num_threads(before)


def rule(heads: int, lists: int, limit: float, start: int = 0) -> Rule:
    coefficients = torch.tensor([0.2, 0.6, 0.5]) + 0.2 * torch.randn(heads, LEVELS, 3)
    return Rule(coefficients, torch.full((lists,), start), limit)


def expected(step: Step, rule: Rule, lists: int, grades, heavy: int, scaling: float, softcap=None):
    """Output (B, Hq, Dv), token sets and levels by list, and how near a decision came to the
    limit; in float64."""
    heads, tokens = step.q.shape[1], step.k.shape[2]
    group = heads // lists
    k, v = (x.double().repeat_interleave(heads // x.shape[1], 1) for x in (step.k, step.v))
    logits = (step.q.double() @ k.mT)[:, :, 0] * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)

    def best(item: int, line: int, count: int) -> set[int]:
        found = step.run(composed, heavy=torch.full((step.batch, 1, 1), count), spans=step.spans,
                         sink=SINK, local=LOCAL, width=min(tokens, SINK + LOCAL + count),
                         lists=lists, scaling=scaling, grades=grades)[1]  # fmt: skip
        return {int(token) for token in found[item, line, 0] if token >= 0}

    def attend(item: int, head: int, read: set[int]):
        at = torch.tensor(sorted(read))
        weights = logits[item, head, at].exp()
        return weights @ v[item, head, at] / weights.sum(), weights.sum()

    outs, sets, reached, nearest = torch.empty(step.batch, heads, v.shape[3]), {}, {}, math.inf
    for item in range(step.batch):
        first, end = step.spans[item, 0].tolist()
        candidates = max(0, end - first - SINK - LOCAL)
        for line in range(lists):
            level = int(rule.start[line])
            size = min(max(heavy, LEAST_HEAVY) << level, candidates)
            before, now = best(item, line, size // 2), best(item, line, size)
            while level < LEVELS and size < candidates:
                errors = []
                for head in range(line * group, (line + 1) * group):
                    (old, less), (new, total) = (attend(item, head, s) for s in (before, now))
                    edge = (end - first - len(now)) / (len(now) - len(before)) * (1 - less / total)
                    change = (new - old).norm() / new.norm()
                    terms = [x.log().clamp(-LOG_LIMIT, LOG_LIMIT) for x in (edge, change)]
                    weights = rule.coefficients[head, level].double()
                    errors.append(float(weights[0] + weights[1] * terms[0] + weights[2] * terms[1]))
                nearest = min(nearest, abs(max(errors) - rule.limit))
                if max(errors) <= rule.limit:
                    break
                level, size = level + 1, min(2 * size, candidates)
                before, now = now, best(item, line, size)
            if level == LEVELS or size >= candidates:
                level, now = LEVELS, set(range(first, end))
            sets[item, line], reached[item, line] = now, level
            for head in range(line * group, (line + 1) * group):
                outs[item, head] = attend(item, head, now)[0]
    return outs, sets, reached, nearest


@pytest.mark.parametrize("limit", [-0.5, -1.0, -1.5], ids=["loose", "middle", "tight"])
@pytest.mark.parametrize("name", SHAPES)
def test_lists_read_what_the_rule_asks_for(name, limit):
    shape, lists, grades = SHAPES[name]
    step = Step(**shape)
    if step.batch > 1:
        step.spans = torch.tensor([[[0, 90]], [[33, 90]], [[81, 90]]])
    made = rule(step.q.shape[1], lists, limit)
    given = {"heavy": 6, "scaling": 0.6, "lists": lists, "grades": grades}
    outs, sets, reached, nearest = expected(step, made, **given)
    assert nearest > 1e-3, "a decision is a matter of rounding: change the seed"
    out, indices, levels, codes = step.run(
        kernels.verified_step, rule=made, spans=step.spans, sink=SINK, local=LOCAL,
        **given | {"heavy": torch.full((step.batch, 1, 1), 6)},
    )  # fmt: skip
    assert {key: int(levels[key]) for key in reached} == reached
    for (item, line), tokens in sets.items():
        row = indices[item, line, 0]
        assert row[row >= 0].tolist() == sorted(tokens) and (row[len(tokens) :] == -1).all()
    error = (out[:, :, 0].double() - outs).norm() / outs.norm()
    assert error < (0.02 if out.dtype == torch.bfloat16 else 1e-5)
    newest = kernels.encode(step.k[:, :, -1:], step.key_maps)
    assert torch.equal(codes, torch.cat((step.before, newest), dim=2))


def test_all_levels_are_met():
    """So that the comparison above says something of each."""
    met = set()
    for name in ("one list a query head", "one list a KV head"):
        shape, lists, grades = SHAPES[name]
        for limit in (-0.5, -1.0, -1.5):
            step = Step(**shape)
            made = rule(8, lists, limit)
            levels = step.run(
                kernels.verified_step, rule=made, spans=step.spans, sink=SINK, local=LOCAL,
                heavy=torch.full((1, 1, 1), 6), scaling=0.6, lists=lists, grades=grades,
            )[2]  # fmt: skip
            met |= set(levels.flatten().tolist())
    assert met == set(range(LEVELS + 1))


@pytest.mark.parametrize("n", [1, 9, 10, 11, 12, 13])
@pytest.mark.parametrize("start", [0, 2, LEVELS])
def test_few_tokens_and_later_beginnings(n, start):
    step = Step(n=n)
    made = rule(8, 8, -0.7, start)
    given = {"heavy": 1, "scaling": 0.6, "lists": 8, "grades": FINE}
    outs, sets, reached, _ = expected(step, made, **given)
    out, indices, levels, _ = step.run(
        kernels.verified_step, rule=made, spans=step.spans, sink=SINK, local=LOCAL,
        **given | {"heavy": torch.ones(1, 1, 1, dtype=torch.int64)},
    )  # fmt: skip
    assert {key: int(levels[key]) for key in reached} == reached
    assert [int((indices[0, line] >= 0).sum()) for line in range(8)] == [
        len(sets[0, line]) for line in range(8)
    ]
    assert (out[:, :, 0].double() - outs).norm() < 1e-5 * outs.norm()


def test_a_rule_that_is_no_number_reads_everything_and_softcap_counts():
    step = Step()
    given = {"spans": step.spans, "sink": SINK, "local": LOCAL, "lists": 8, "grades": FINE,
             "heavy": torch.full((1, 1, 1), 6), "scaling": 0.6, "softcap": 1.5}  # fmt: skip
    lost = rule(8, 8, math.nan)
    out, indices, levels, _ = step.run(kernels.verified_step, rule=lost, **given)
    assert (levels == LEVELS).all() and indices.shape[-1] == 90
    whole, *_ = expected(step, lost, 8, FINE, 6, 0.6, softcap=1.5)
    assert (out[:, :, 0].double() - whole).norm() < 1e-5 * whole.norm()


def test_what_does_not_fit_is_refused_and_what_cannot_be_one_call_is_left():
    step = Step()
    given = {"spans": step.spans, "sink": SINK, "local": LOCAL, "lists": 8, "grades": FINE,
             "heavy": torch.full((1, 1, 1), 6), "scaling": 0.6}  # fmt: skip
    fine = rule(8, 8, -1.0)
    for wrong, message in (
        (
            fine._replace(coefficients=fine.coefficients[:4]),
            r"rule.coefficients: expected .* \(8, ",
        ),
        (fine._replace(coefficients=fine.coefficients.double()), "float32"),
        (fine._replace(start=fine.start[:3]), r"rule.start: expected .* \(8,\)"),
        (fine._replace(start=fine.start.int()), "int64"),
    ):
        with pytest.raises(ValueError, match=message):
            step.run(kernels.verified_step, rule=wrong, **given)
    codes = kernels.layout_for(torch.device("cpu")).from_tokens(step.before)
    arguments = step.q, step.k, step.v, codes, step.query_maps, step.key_maps
    left = kernels.verified_step(*arguments, rule=fine, sinks=torch.zeros(8), **given)
    assert left is None and codes.length == 89
    assert kernels.verified_step(*arguments, rule=fine, backend="reference", **given) is None
    step.k[0, 0, -1, 0] = math.nan
    with pytest.raises(FloatingPointError):
        kernels.verified_step(*arguments, rule=fine, **given)
    assert codes.length == 89 and hasattr(numba_cpu, "verified_step")
