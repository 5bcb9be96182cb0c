"""Calibration of the fallback: levels of captured rows, conformal risk control, what then runs."""

import math
from dataclasses import replace

import pytest
import torch

from hashattn import Budget, attach
from hashattn.attention.fallback import Fallback, FallbackError
from hashattn.attention.fallback_reading import read_verified
from hashattn.base.engines.processes import Processes
from hashattn.hashing.capture import capture
from hashattn.selectors.base import KeyView
from hashattn.selectors.oracle import OracleSelector
from hashattn.selectors.random import RandomSelector
from hashattn.trust.fallback import sequences as whole
from hashattn.trust.fallback.calibrate import (
    calibrate_fallback,
    calibrate_fallbacks,
    losses,
    sequences_needed,
)
from hashattn.trust.fallback.levels import captured_readings, levels_of
from hashattn.trust.fallback.sequences import Rows, read_sequences
from helpers import prompt, tiny_model

BUDGET = Budget(sink=2, local=3, heavy=4)
DRAWN = replace(BUDGET, heavy=8, sampled=0.5)
ROWS = torch.arange(90, 120, 5)


def sequences(model, count, seed=0, values=True, length=120):
    for number in range(count):
        ids = prompt(length=length, seed=1000 * seed + number + 1)
        yield capture(model, ids, rows=ROWS, values=values).values()


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.mark.parametrize("layout", ["per_query_head", "per_kv_head"])
def test_levels_are_those_of_a_loop(model, layout):
    selector = OracleSelector(layout)
    layer = list(next(sequences(model, 1)))[1]
    heads, lists = 4, selector.lists(4, 2)
    found = levels_of(layer, selector, BUDGET, 3, torch.arange(lists) % 2)
    view = KeyView(layer.keys[None], selector.index_of(1, layer.keys), positions=layer.positions)
    scores = selector.scores(1, layer.queries[None], view, layer.scaling)[0]
    queries, keys, values = (x.double() for x in (layer.queries, layer.keys, layer.values))
    for head in range(heads):
        entry, share = head * lists // heads, head // 2
        for row, position in enumerate(layer.positions.tolist()):
            weights = (queries[head, row] @ keys[share].mT * layer.scaling).exp()

            def output(tokens, weights=weights, share=share):
                return weights[tokens] @ values[share][tokens] / weights[tokens].sum()

            candidates = list(range(2, position + 1 - 3))
            ranked = sorted(candidates, key=lambda t, s=scores[entry, row]: (-float(s[t]), t))
            fixed = [0, 1, *range(position - 2, position + 1)]
            dense = output(list(range(position + 1)))
            for level in range(3):
                seen = level >= entry % 2
                if not seen:
                    assert found.errors[head, row, level].isnan()
                    continue
                heavy = 4 * 2**level
                all_read, half = fixed + ranked[:heavy], fixed + ranked[: heavy // 2]
                lower = ranked[heavy // 2 : heavy]
                out = output(all_read)
                error = (out - dense).norm() / dense.norm()
                unread = position + 1 - len(all_read)
                edge = unread * weights[lower].mean() / weights[all_read].sum()
                change = (out - output(half)).norm() / out.norm()
                expected = torch.stack((edge.log(), change.log(), error)).float()
                got = [*found.statistics[head, row, level], found.errors[head, row, level]]
                torch.testing.assert_close(torch.stack(got), expected, rtol=2e-4, atol=2e-4)
                density = len(all_read) / (position + 1)
                assert float(found.density[entry, row, level]) == pytest.approx(density)
            assert float(found.density[entry, row, 3]) == 1


@pytest.mark.parametrize(("budget", "tolerance"), [(BUDGET, 0.6), (DRAWN, 0.8)],
                         ids=["ranked", "half drawn"])  # fmt: skip
def test_what_is_calibrated_is_what_runs(model, budget, tolerance):
    """Levels that the calibration's tables predict, of a replay of captured rows, and of attach."""
    selector = OracleSelector("per_kv_head")
    rule = calibrate_fallback(sequences(model, 34), selector, budget, model=model, risk=0.1,
                              tolerance=tolerance, fitting=12, levels=4, begin=0.7)  # fmt: skip
    assert max(int(start.max()) for start in rule.start.values()) > 0
    ended = []
    for ids in (prompt(length=120, seed=77), prompt(length=120, seed=78)):
        captured = capture(model, ids, rows=torch.arange(110, 120), values=True).values()
        for layer in captured:
            start = rule.start[layer.layer]
            table = levels_of(layer, selector, budget, rule.levels, start)
            for reading in captured_readings(layer, selector, budget, rule.levels, start):
                read_verified(reading, rule, layer.layer)
                assert torch.equal(reading.levels[0], table.ended(rule, layer.layer))
                ended.append(reading.levels[0])
                errors, _ = table.at(reading.levels[0])
                dense = list(captured_readings(layer, selector, budget, 0, start * 0))[0].out
                true = (reading.out - dense).norm(dim=-1)[0] / dense.norm(dim=-1)[0]
                torch.testing.assert_close(errors, true, rtol=1e-3, atol=1e-6)
        with attach(model, selector, budget, sparse_rows=10, fallback=rule) as run:
            with run.listen(_Levels()) as heard:
                cache = model(ids[:, :110], use_cache=True).past_key_values
                model(ids[:, 110:], past_key_values=cache)
        assert torch.equal(heard.levels[0], ended[-2])  # the first layer reads what was captured
    assert len(torch.cat(ended).unique()) > 2


class _Levels:
    timed = False

    def __init__(self):
        self.levels = []

    def saw(self, step):
        if step.levels is not None:
            self.levels.append(step.levels[0])


def test_a_rule_of_drawn_lists_says_so(model, tmp_path):
    selector = OracleSelector()
    rules = [
        calibrate_fallback(sequences(model, 8), selector, budget, model=model, tolerance=0.6,
                           risk=0.5, fitting=4, levels=2)
        for budget in (BUDGET, DRAWN)
    ]  # fmt: skip
    ranked, drawn = (Fallback.load(rule.save(tmp_path / str(n))) for n, rule in enumerate(rules))
    assert ranked.terms[1:] == ("edge", "change") and drawn.terms[1:] == ("bar", "drawn")
    for rule, budget in ((ranked, DRAWN), (drawn, BUDGET)):
        with pytest.raises(FallbackError, match="sampled"):
            attach(model, selector, budget, fallback=rule)


def test_the_factor_is_the_smallest_that_keeps_the_risk(model):
    """By a loop over all sequences, heads and levels, in plain numbers."""
    selector, risk, tolerance = OracleSelector(), 0.15, 0.5
    rule = calibrate_fallback(sequences(model, 30), selector, BUDGET, model=model, risk=risk,
                              tolerance=tolerance, fitting=10, levels=3)  # fmt: skip
    tables = []
    for number, captured in enumerate(sequences(model, 30)):
        if number >= 10:
            tables.append([
                levels_of(layer, selector, BUDGET, 3, rule.start[layer.layer]) for layer in captured
            ])  # fmt: skip

    def promised(factor):
        total = 0.0
        for sequence in tables:
            wrong = steps = 0
            for layer, table in enumerate(sequence):
                for head in range(4):
                    for row in range(len(ROWS)):
                        level = int(rule.start[layer][head])
                        while level < 3:
                            a, b, c = rule.coefficients[layer][head, level].tolist()
                            edge, change = table.statistics[head, row, level].tolist()
                            if a + b * edge + c * change + math.log(factor) <= math.log(tolerance):
                                break
                            level += 1
                        later = table.errors[head, row, level:].tolist()
                        wrong += any(error > tolerance for error in later)
                        steps += 1
            total += wrong / steps
        return total / (len(tables) + 1) + 1 / (len(tables) + 1)

    assert promised(rule.factor * 1.0001) <= risk < promised(rule.factor / 1.011)
    steps = 20 * 2 * 4 * len(ROWS)
    assert rule.calibrated == {"sequences": 20, "fitting_sequences": 10, "head_steps": steps,
                               "shortest": 120, "longest": 120}  # fmt: skip


@pytest.mark.parametrize("budget", [BUDGET, DRAWN], ids=["ranked", "half drawn"])
def test_new_sequences_keep_the_risk(model, budget):
    selector = OracleSelector("per_kv_head")
    rules = calibrate_fallbacks(sequences(model, 34), selector, budget, model=model, risk=0.1,
                                tolerances=[0.5, 0.7], fitting=12, levels=3)  # fmt: skip
    density = []
    for tolerance, rule in rules.items():
        assert rule.tolerance == tolerance
        rows = Rows()
        for number, captured in enumerate(sequences(model, 16, seed=1)):
            levels = {
                c.layer: levels_of(c, selector, budget, 3, rule.start[c.layer]) for c in captured
            }
            rows.add(levels, number)
        tables = rows.joined()
        assert float(losses(rule, tables, rows.owner).mean()) < 0.15
        ended = [table.at(table.ended(rule, layer))[1] for layer, table in tables.items()]
        density.append(float(torch.stack(ended).mean()))
    assert 0.05 < density[1] < density[0] < 1


def test_processes_read_the_same(model, monkeypatch):
    """The same rows in the same order, whatever the number of processes."""
    selector, started = OracleSelector("per_kv_head"), []
    rules = calibrate_fallbacks(sequences(model, 12), selector, BUDGET, model=model, risk=0.5,
                                tolerances=[0.5], fitting=6, levels=2)  # fmt: skip

    def read():
        captured = (list(layers) for layers in sequences(model, 5, seed=2))
        return read_sequences(captured, selector, BUDGET, 2, [None, *rules.values()])

    def two(jobs, job_bytes, device):
        started.append(device.type)
        return Processes(2)

    here = read()
    monkeypatch.setattr(whole, "spread", two)
    monkeypatch.setattr(whole, "_WORTH_PROCESSES", 0)
    there = read()
    assert started == ["cpu"] and len(here) == len(there) == 2
    for one, other in zip(here, there, strict=True):
        assert one.owner == other.owner == [i for i in range(5) for _ in ROWS]
        for layer, table in one.joined().items():
            found = other.joined()[layer]
            for name in ("statistics", "errors", "density"):
                mine, theirs = getattr(table, name), getattr(found, name)
                assert torch.allclose(mine, theirs, atol=1e-5, equal_nan=True)
    assert [rows.owner for rows in read_sequences([], selector, BUDGET, 2, [None])] == [[]]


def test_too_few_sequences_for_a_risk(model):
    assert [sequences_needed(risk) for risk in (0.5, 0.1, 0.05, 0.01)] == [1, 9, 19, 99]
    settings = dict(model=model, tolerance=0.3, fitting=2, levels=2)
    for captured in (list(sequences(model, 12)), sequences(model, 12)):
        with pytest.raises(ValueError, match="at least 19 calibration sequences beside the 2 that"):
            calibrate_fallback(captured, OracleSelector(), BUDGET, **settings)
    calibrate_fallback(sequences(model, 12), OracleSelector(), BUDGET, **settings, risk=0.5)


def test_bad_input(model):
    def calibrated(captured=None, selector=None, budget=BUDGET, **changes):
        settings = dict(model=model, tolerance=0.3, risk=0.5, fitting=2, levels=2) | changes
        captured = sequences(model, 4) if captured is None else captured
        return calibrate_fallback(captured, selector or OracleSelector(), budget, **settings)

    for changes, match in [
        ({"tolerance": 0.0}, "tolerance = 0.0"),
        ({"risk": 1}, "risk = 1"),
        ({"fitting": 0}, "fitting = 0"),
        ({"levels": 0}, "levels = 0"),
        ({"begin": 2}, "begin = 2"),
        ({"budget": Budget(heavy=4, sampled=((0.5,), (0,)))}, r"budget.sampled = \(\(0.5,"),
        ({"captured": sequences(model, 4, values=False)}, "layers without values"),
        ({"captured": iter([[]])}, "a sequence without layers"),
        ({"captured": []}, "got 0"),
    ]:
        with pytest.raises(ValueError, match=match):
            calibrated(**changes)
    one, two = (list(next(sequences(model, 1))) for _ in range(2))
    with pytest.raises(ValueError, match="the same layers in every sequence"):
        calibrated([one, two[:1], one, one])


def test_an_artefact_is_of_its_method(model, tmp_path):
    rule = calibrate_fallback(sequences(model, 12), OracleSelector(), BUDGET, model=model,
                              tolerance=0.3, risk=0.2, fitting=4, levels=2)  # fmt: skip
    loaded = type(rule).load(rule.save(tmp_path))
    assert loaded.sha256 == rule.sha256 and loaded.calibrated == rule.calibrated
    with attach(model, OracleSelector(), BUDGET, fallback=loaded, allow_dense=True):
        pass
    with pytest.raises(FallbackError, match="another method"):
        attach(model, RandomSelector(), BUDGET, fallback=loaded)
    assert replace(loaded, factor=2.0).sha256 != loaded.sha256
