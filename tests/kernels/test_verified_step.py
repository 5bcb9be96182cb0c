"""A decode step whose lists read until a rule is content: against float64, list by list.

Ranked and drawn lists: what is read is known from `decode_step`, statistics by their definitions.
"""

import math

import pytest
import torch
from test_decode_step import FINE, LOCAL, SHAPES, SINK, Step, composed

from hashattn import kernels
from hashattn.kernels import LEAST_HEAVY, LOG_LIMIT, Coins, Drawing, Rule, available
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


def exact(step: Step, scaling: float, softcap: float | None):
    """Logits (B, Hq, n) and values (B, Hq, n, Dv) of the step's row, in float64."""
    heads = step.q.shape[1]
    k, v = (x.double().repeat_interleave(heads // x.shape[1], 1) for x in (step.k, step.v))
    logits = (step.q.double() @ k.mT)[:, :, 0] * scaling
    return logits if softcap is None else softcap * torch.tanh(logits / softcap), v


def log_error(rule: Rule, head: int, level: int, *statistics) -> float:
    """What the rule predicts."""
    terms = [x.log().clamp(-LOG_LIMIT, LOG_LIMIT) for x in statistics]
    weights = rule.coefficients[head, level].double()
    return float(weights[0] + weights[1] * terms[0] + weights[2] * terms[1])


def expected(step: Step, rule: Rule, lists: int, grades, heavy: int, scaling: float, softcap=None):
    """Output (B, Hq, Dv), token sets and levels by list, and how near a decision came to the
    limit; in float64."""
    heads, tokens = step.q.shape[1], step.k.shape[2]
    group = heads // lists
    logits, v = exact(step, scaling, softcap)

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
                    errors.append(log_error(rule, head, level, edge, change))
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
    out, indices, log_weights, levels, codes = step.run(
        kernels.verified_step, rule=made, spans=step.spans, sink=SINK, local=LOCAL,
        **given | {"heavy": torch.full((step.batch, 1, 1), 6)},
    )  # fmt: skip
    assert log_weights is None and {key: int(levels[key]) for key in reached} == reached
    for (item, line), tokens in sets.items():
        row = indices[item, line, 0]
        assert row[row >= 0].tolist() == sorted(tokens) and (row[len(tokens) :] == -1).all()
    error = (out[:, :, 0].double() - outs).norm() / outs.norm()
    assert error < (0.02 if out.dtype == torch.bfloat16 else 1e-5)
    newest = kernels.encode(step.k[:, :, -1:], step.key_maps)
    assert torch.equal(codes, torch.cat((step.before, newest), dim=2))


def drawing(lists: int, share: float = 0.5, fresh: bool = True) -> Drawing:
    slopes = torch.linspace(0.01, 0.05, lists)
    return Drawing(
        slopes, torch.full((lists,), share, dtype=torch.float64), 0.1, Coins(5, 3, fresh=fresh)
    )


def expected_drawn(step: Step, rule: Rule, lists: int, grades, heavy: int, scaling: float,
                   draws: Drawing, softcap=None):  # fmt: skip
    """As `expected`, of lists of which a part is drawn; sets are {token: log weight}."""
    heads, tokens = step.q.shape[1], step.k.shape[2]
    group = heads // lists
    logits, v = exact(step, scaling, softcap)

    def sample(item: int, line: int, count: int) -> dict[int, float]:
        drawn = torch.full((step.batch, 1, 1), round(count * float(draws.drawn[line])))
        found = step.run(composed, heavy=torch.full((step.batch, 1, 1), count), spans=step.spans,
                         sink=SINK, local=LOCAL, width=tokens, lists=lists, scaling=scaling,
                         grades=grades, drawing=draws._replace(drawn=drawn))  # fmt: skip
        read = found[1][item, line, 0].tolist()
        return {t: float(w) for t, w in zip(read, found[2][item, line, 0], strict=True) if t >= 0}

    def attend(item: int, head: int, read: dict[int, float]):
        at = torch.tensor(list(read))
        added = torch.tensor(list(read.values()), dtype=torch.float64)
        weights = (logits[item, head, at] + added).exp()
        weights = weights / weights.sum()
        rows = v[item, head, at]
        out = weights @ rows
        variance = 0.0
        for weight, lifted, row in zip(weights, added, rows, strict=True):
            variance += (1 - (-lifted).exp()) * weight**2 * (row - out).square().sum()
        return out, variance.sqrt() / out.norm(), weights[added > 0].sum()

    outs, sets, reached, nearest = torch.empty(step.batch, heads, v.shape[3]), {}, {}, math.inf
    for item in range(step.batch):
        first, end = step.spans[item, 0].tolist()
        candidates = max(0, end - first - SINK - LOCAL)
        for line in range(lists):
            members = range(line * group, (line + 1) * group)
            level = int(rule.start[line])
            while level < LEVELS:
                size = max(heavy, LEAST_HEAVY) << level
                if size >= candidates:
                    level = LEVELS
                    break
                now = sample(item, line, size)
                errors = [
                    log_error(rule, head, level, *attend(item, head, now)[1:]) for head in members
                ]
                nearest = min(nearest, abs(max(errors) - rule.limit))
                if max(errors) <= rule.limit:
                    break
                level += 1
            if level == LEVELS:
                now = dict.fromkeys(range(first, end), 0.0)
            sets[item, line], reached[item, line] = now, level
            for head in members:
                outs[item, head] = attend(item, head, now)[0]
    return outs, sets, reached, nearest


def check_drawn(step: Step, made: Rule, draws: Drawing, given: dict) -> set[int]:
    """Compare a step with `expected_drawn`; the levels that it met."""
    outs, sets, reached, nearest = expected_drawn(step, made, draws=draws, **given)
    assert nearest > 1e-3, "a decision is a matter of rounding: change the seed"
    heavy = torch.full((step.batch, 1, 1), given["heavy"])
    out, indices, log_weights, levels, codes = step.run(
        kernels.verified_step, rule=made, spans=step.spans, sink=SINK, local=LOCAL, drawing=draws,
        **given | {"heavy": heavy},
    )  # fmt: skip
    assert {key: int(levels[key]) for key in reached} == reached
    for (item, line), read in sets.items():
        row, added = indices[item, line, 0], log_weights[item, line, 0]
        assert dict(zip(row[: len(read)].tolist(), added.tolist(), strict=False)) == read
        assert (row[len(read) :] == -1).all() and (added[len(read) :] == 0).all()
    error = (out[:, :, 0].double() - outs).norm() / outs.norm()
    assert error < (0.02 if out.dtype == torch.bfloat16 else 1e-5)
    newest = kernels.encode(step.k[:, :, -1:], step.key_maps)
    assert torch.equal(codes, torch.cat((step.before, newest), dim=2))
    return set(reached.values())


GRADED = [name for name, (_, _, grades) in SHAPES.items() if grades is not None]


def easing(heads: int, lists: int, limit: float, start: int = 0) -> Rule:
    """A rule that longer lists satisfy more easily, so that lists end at every level."""
    made = rule(heads, lists, limit, start)
    made.coefficients[..., 0] -= 0.4 * torch.arange(LEVELS)
    return made


@pytest.mark.parametrize("name", GRADED)
def test_drawn_lists_read_what_the_rule_asks_for(name):
    shape, lists, grades = SHAPES[name]
    met = set()
    for limit in (-0.2, -0.8, -1.4):
        step = Step(**shape | {"n": 160})
        if step.batch > 1:
            step.spans = torch.tensor([[[0, 160]], [[80, 160]], [[151, 160]]])
        given = {"heavy": 6, "scaling": 0.3, "lists": lists, "grades": grades}
        met |= check_drawn(step, easing(step.q.shape[1], lists, limit), drawing(lists), given)
    assert len(met) > 1 and (lists < 8 or met == set(range(LEVELS + 1)))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("fresh", [True, False])
def test_any_share_may_be_drawn(share, fresh):
    step = Step(n=300, dim=32)
    given = {"heavy": 5, "scaling": 0.3, "lists": 8, "grades": FINE, "softcap": 2.0}
    assert check_drawn(step, easing(8, 8, -0.8, 1), drawing(8, share, fresh), given) - {LEVELS}


@pytest.mark.parametrize("n", [1, 9, 10, 11, 12, 13])
@pytest.mark.parametrize("start", [0, 2, LEVELS])
def test_few_tokens_to_draw_from(n, start):
    step = Step(n=n)
    given = {"heavy": 1, "scaling": 0.3, "lists": 8, "grades": FINE}
    check_drawn(step, easing(8, 8, -1.5, start), drawing(8), given)


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
            )[3]  # fmt: skip
            met |= set(levels.flatten().tolist())
    assert met == set(range(LEVELS + 1))


@pytest.mark.parametrize("n", [1, 9, 10, 11, 12, 13])
@pytest.mark.parametrize("start", [0, 2, LEVELS])
def test_few_tokens_and_later_beginnings(n, start):
    step = Step(n=n)
    made = rule(8, 8, -0.7, start)
    given = {"heavy": 1, "scaling": 0.6, "lists": 8, "grades": FINE}
    outs, sets, reached, _ = expected(step, made, **given)
    out, indices, _, levels, _ = step.run(
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
    out, indices, _, levels, _ = step.run(kernels.verified_step, rule=lost, **given)
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
    for wrong, grades, message in (
        (drawing(8)._replace(drawn=torch.full((1, 1, 1), 3)), FINE, r"float64 \(8,\)"),
        (drawing(4), FINE, r"drawing.slopes: expected .* \(8,\)"),
        (drawing(8), None, "needs graded queries"),
        (drawing(8)._replace(slopes=torch.ones(8).double()), FINE, "float32 .*got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            step.run(kernels.verified_step, rule=fine, drawing=wrong, **given | {"grades": grades})
    codes = kernels.layout_for(torch.device("cpu")).from_tokens(step.before)
    arguments = step.q, step.k, step.v, codes, step.query_maps, step.key_maps
    left = kernels.verified_step(*arguments, rule=fine, sinks=torch.zeros(8), **given)
    assert left is None and codes.length == 89
    assert kernels.verified_step(*arguments, rule=fine, backend="reference", **given) is None
    step.k[0, 0, -1, 0] = math.nan
    with pytest.raises(FloatingPointError):
        kernels.verified_step(*arguments, rule=fine, **given)
    assert codes.length == 89 and hasattr(numba_cpu, "verified_step")
