"""The policy that never loses: from timings to a break-even, to attach and its receipt."""

import json
import math

import numpy as np
import pytest
import torch

from hashattn import (
    Budget,
    HashSelector,
    HashWeights,
    Receipt,
    SparsePathError,
    attach,
    make_selector,
    measure_break_even,
)
from hashattn.attention import step_times
from hashattn.attention.break_even import BreakEven, StepTimes, line
from helpers import SPARSE_FAMILIES, generate, prompt, tiny_model

BUDGET = Budget(sink=2, local=4, heavy=6)
LENGTHS = (32, 128, 512)  # what is timed for a model of 512 positions


def on_a_line(fixed, per_token, lengths=LENGTHS):
    """StepTimes whose medians lie on a line, in milliseconds."""
    return StepTimes.of(lengths, [[(fixed + per_token * n) / 1e3] * 3 for n in lengths])


def measured(dense, sparse, longest=512, lengths=LENGTHS):
    return BreakEven(lengths, on_a_line(*dense, lengths), on_a_line(*sparse, lengths), longest)


@pytest.fixture
def timer(monkeypatch):
    """timer(dense=(fixed, per token), sparse=...): measurements find these times, in ms; returns
    the list of what was measured."""
    begun = []

    def install(dense, sparse):
        lines = {"dense": dense, "sparse": sparse}

        def samples(ways, device, calls, weights):
            begun.append(sorted(ways))
            return {(way, n): [(lines[way][0] + lines[way][1] * n) / 1e3] * 3 for way, n in ways}

        monkeypatch.setattr(step_times, "_seconds_of", samples)
        return begun

    return install


def test_the_break_even_is_where_the_lines_meet():
    # 1 + 0.01 n = 3 + 0.002 n at n = 250
    even = measured((1, 0.01), (3, 0.002))
    assert even.tokens == 250 and not even.extrapolated
    assert even.dense.fixed_ms == pytest.approx(1) and even.sparse.per_token_ms == pytest.approx(
        0.002
    )
    # 1 + 0.01 n = 3.001 + 0.002 n at 250.125: a step with 250 tokens is still slower
    assert measured((1, 0.01), (3.001, 0.002)).tokens == 251


@pytest.mark.parametrize(
    ("dense", "sparse", "longest", "tokens"),
    [
        ((1, 0.01), (0.5, 0.01), 512, 32),  # always faster: from the shortest that was timed
        ((1, 0.01), (1, 0.002), 512, 32),
        ((1, 0.01), (1.5, 0.01), 512, math.inf),  # never
        ((1, 0.01), (1.5, 0.02), None, math.inf),
        ((1, 0.01), (0.5, 0.011), 512, math.inf),  # faster at first, not at 512 tokens
        ((1, 0.01), (0.5, 0.0109), 512, 32),  # faster up to 512 tokens, which is all there is
        ((1, 0.01), (9, 0.002), 999, math.inf),  # from 1,000 on, which the model cannot read
        ((1, 0.01), (9, 0.002), 1000, 1000),
        ((1, 0.01), (9, 0.002), None, 1000),
    ],
)
def test_it_lies_among_the_model_s_positions(dense, sparse, longest, tokens):
    even = measured(dense, sparse, longest)
    assert even.tokens == tokens
    assert even.extrapolated == (tokens == 1000)


def test_the_line_has_the_least_squares_of_relative_errors():
    seconds = [[1e-3, 2e-3, 4e-3], [5e-3, 5e-3, 5e-3], [8e-3, 9e-3, 20e-3]]
    times = StepTimes.of((10, 20, 40), seconds)
    assert times.ms == (2, 5, 9)
    # minimise sum ((a + b n - t) / t)^2 by its normal equations
    sums = {"1": 0.0, "n": 0.0, "nn": 0.0, "t": 0.0, "nt": 0.0}
    for n, t in zip((10, 20, 40), times.ms, strict=True):
        w = 1 / t**2
        for name, value in {"1": 1, "n": n, "nn": n * n, "t": t, "nt": n * t}.items():
            sums[name] += w * value
    slope = (sums["1"] * sums["nt"] - sums["n"] * sums["t"]) / (
        sums["1"] * sums["nn"] - sums["n"] ** 2
    )
    assert times.per_token_ms == pytest.approx(slope)
    assert times.fixed_ms == pytest.approx((sums["t"] - slope * sums["n"]) / sums["1"])
    assert all(
        low <= ms <= high for low, ms, high in zip(times.low, times.ms, times.high, strict=True)
    )


def test_a_measurement_survives_json():
    for even in (measured((1, 0.01), (3, 0.002)), measured((1, 0.01), (3, 0.02), None)):
        record = json.loads(json.dumps(even.record(), allow_nan=False))
        assert BreakEven.from_record(record) == even
        assert record["tokens"] == (None if even.tokens == math.inf else even.tokens)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("lengths", {"lengths": (32,)}),
        ("lengths", {"lengths": (32, 16, 512)}),
        ("dense", {"lengths": (32, 128)}),
        ("longest", {"longest": 0}),
    ],
)
def test_what_is_no_measurement_is_refused(field, change):
    parts = {"lengths": LENGTHS, "dense": on_a_line(1, 1), "sparse": on_a_line(1, 1)}
    with pytest.raises(ValueError, match=f"^{field} = "):
        BreakEven(**parts | change)
    with pytest.raises(ValueError, match="^low = "):
        StepTimes((1.0,), (math.nan,), (1.0,), 0.0, 1.0)


@pytest.mark.parametrize("value", ["breakeven", "", -1, math.nan, -math.inf, 1.5, True, None, [5]])
def test_other_thresholds_are_refused(value):
    with pytest.raises(ValueError, match="dense_below = .*must be a number of tokens"):
        attach(tiny_model("llama"), make_selector("oracle"), BUDGET, dense_below=value)


def test_steps_are_sparse_from_the_break_even_on(timer, tmp_path):
    timer((1, 0.05), (4.3, -0.005))  # 60 tokens
    model = tiny_model("llama")
    with attach(model, make_selector("oracle"), BUDGET, dense_below="break_even") as run:
        generate(model, prompt(length=56), max_new_tokens=8)
    receipt = run.receipt
    assert receipt.dense_reasons == {"prefill": 2, "short_context": 6}  # with 57, 58, 59 tokens
    assert receipt.sparse_calls == 8 and not receipt.stayed_short
    receipt.save(tmp_path / "receipt.json")
    loaded = Receipt.load(tmp_path / "receipt.json")
    assert loaded.to_dict() == receipt.to_dict()
    kept = loaded.settings
    even = BreakEven.from_record(kept["break_even"])
    assert kept["dense_below"] == even.tokens == 60 and even.lengths == LENGTHS
    assert even.protocol["method"] == receipt.method and even.protocol["dense"] == "sdpa"
    summary = loaded.summary()
    assert "dense below      60 tokens, the measured break-even: a layer's step takes" in summary
    assert "1 ms +50 ms per 1,000 tokens dense, 4.3 ms -5 ms per 1,000 tokens sparse" in summary
    assert "every step was dense" not in summary


def test_contexts_that_stay_short_are_what_was_asked_for(timer):
    timer((1, 0.05), (4, 0))
    model = tiny_model("llama")
    with attach(model, make_selector("oracle"), BUDGET, dense_below="break_even") as run:
        generate(model, prompt(length=40), max_new_tokens=8)
    assert run.receipt.stayed_short and run.receipt.sparse_calls == 0
    assert "every step was dense, as was asked: contexts were shorter (47 tokens at most)" in (
        run.receipt.summary()
    )
    even = measure_break_even(model, make_selector("oracle"), BUDGET)
    with attach(model, make_selector("oracle"), BUDGET, dense_below=even) as run:
        generate(model, prompt(length=40), max_new_tokens=8)
    assert run.receipt.stayed_short
    # the same number as a setting of its own promises sparse steps
    with pytest.raises(SparsePathError, match="short_context"):
        with attach(model, make_selector("oracle"), BUDGET, dense_below=even.tokens) as run:
            generate(model, prompt(length=40), max_new_tokens=8)
    assert "dense below      60 tokens, as given" in run.receipt.summary()


def test_so_are_those_of_a_static_cache(timer):
    timer((1, 0.05), (4, 0))
    model = tiny_model("llama")
    selector = HashSelector(HashWeights.for_model(model, depth=1))
    kinds = {"dense_below": "break_even", "allow_untrained": True}
    static = {"cache_implementation": "static", "disable_compile": True}
    with attach(model, selector, BUDGET, **kinds) as run:
        generate(model, prompt(length=40), max_new_tokens=8, **static)
    assert run.receipt.stayed_short and run.receipt.decode_density == 1
    with attach(model, selector, BUDGET, **kinds) as run:
        generate(model, prompt(length=58), max_new_tokens=8, **static)
    assert not run.receipt.stayed_short and run.receipt.is_sparse


def test_what_else_makes_a_run_dense_is_still_an_error(timer):
    timer((1, 0.05), (4, 0))
    model = tiny_model("llama")
    ids = prompt(length=70)
    policy = {"dense_below": "break_even"}
    with pytest.raises(SparsePathError, match="no decode step was sparse"):  # no step at all
        with attach(model, make_selector("oracle"), BUDGET, **policy):
            model(ids)
    with pytest.raises(SparsePathError, match="several_rows"):
        with attach(model, make_selector("oracle"), BUDGET, **policy):
            cache = model(ids[:, :20], use_cache=True).past_key_values
            cache = model(ids[:, 20:21], past_key_values=cache).past_key_values
            model(ids[:, 21:24], past_key_values=cache)
    with pytest.raises(SparsePathError, match="budget"):
        with attach(model, make_selector("oracle"), Budget(heavy=1000), **policy):
            generate(model, ids)


def test_where_sparse_never_wins_every_step_is_dense(timer):
    timer((1, 0.05), (4, 0.06))
    model = tiny_model("llama")
    ids = prompt(length=90)
    expected = generate(model, ids)[0]
    with attach(model, make_selector("oracle"), BUDGET, dense_below="break_even") as run:
        assert torch.equal(generate(model, ids)[0], expected)
    assert run.receipt.settings["dense_below"] is None and run.receipt.stayed_short
    assert "dense below      any length, the measured break-even" in run.receipt.summary()
    json.dumps(run.receipt.to_dict(), allow_nan=False)


def test_a_process_measures_once_for_what_the_times_depend_on(timer):
    begun = timer((1, 0.05), (4, 0))
    model = tiny_model("llama")
    for _ in range(2):  # a new object of the same method
        assert measure_break_even(model, make_selector("oracle"), BUDGET).tokens == 60
        attach(model, make_selector("oracle"), BUDGET, dense_below="break_even").detach(False)
    assert begun == [sorted((way, n) for way in ("dense", "sparse") for n in LENGTHS)]
    measure_break_even(model, make_selector("oracle"), Budget(heavy=7))
    measure_break_even(model, make_selector("quest"), BUDGET)
    measure_break_even(model, make_selector("oracle"), BUDGET, dense_layers=[0])
    measure_break_even(tiny_model("llama"), make_selector("oracle"), BUDGET)
    assert len(begun) == 5


def test_dense_methods_have_no_break_even(timer):
    begun = timer((1, 0.05), (4, 0))
    model = tiny_model("llama")
    with attach(model, make_selector("dense"), dense_below="break_even") as run:
        generate(model, prompt())
    assert begun == [] and "dense_below" not in run.receipt.settings
    for name in ("dense", "h2o"):
        with pytest.raises(ValueError, match=f"selector = '{name}': must be a sparse method"):
            measure_break_even(model, make_selector(name), BUDGET)
    with pytest.raises(ValueError, match="dense_layers"):
        measure_break_even(model, make_selector("oracle"), BUDGET, dense_layers=[0, 1])


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_the_measurement_runs_both_ways_and_leaves_the_model_as_it_was(family, monkeypatch):
    monkeypatch.setattr(step_times, "_ROUNDS", 3)
    monkeypatch.setattr(step_times, "_FLUSH_BYTES", 1 << 16)
    model = tiny_model(family)
    before = model.config._attn_implementation
    random = torch.get_rng_state()
    even = measure_break_even(model, make_selector("oracle"), BUDGET)
    assert even.lengths == LENGTHS and even.longest == 512
    assert even.protocol["rounds"] == 3 and even.protocol["seconds"] < 30
    assert torch.equal(torch.get_rng_state(), random)
    assert model.config._attn_implementation == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with attach(model, make_selector("oracle"), BUDGET) as run:  # nothing was counted before
        generate(model, prompt())
    assert run.receipt.decode_calls == 11 * 2


def test_a_sample_is_of_the_step_alone_and_rounds_end_in_time(monkeypatch):
    now, events = [0.0], []
    monkeypatch.setattr(step_times, "_FLUSH_BYTES", 16)
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: now[0])

    def takes(name, seconds):
        def call():
            events.append(name)
            now[0] += seconds

        return call

    def ways(seconds):
        return {
            "dense": (takes("before dense", 5 * seconds), takes("dense", seconds)),
            "sparse": (takes("before sparse", 7 * seconds), takes("sparse", 2 * seconds)),
        }

    samples = step_times._seconds_of(ways(1 / 128), torch.device("cpu"), 2, 8)
    assert samples == {"dense": [1 / 128] * 15, "sparse": [1 / 64] * 15}
    one_round = ["before dense", "dense", "dense", "before sparse", "sparse", "sparse"]
    assert events == one_round * 16
    assert len(step_times._seconds_of(ways(1), torch.device("cpu"), 1, 8)["sparse"]) == 3


def test_a_line_weighs_short_lengths_as_much_as_long_ones():
    assert line([1024, 2048, 4096], [1.5, 2.0, 3.0]) == pytest.approx((1.0, 0.5 / 1024))
    n, ms = np.array([1024, 2048, 131072]), np.array([1.0, 1.6, 100.0])

    def relative(a, b):
        return float((((a + b * n) / ms - 1) ** 2).sum())

    a, b = line(n, ms)
    slope, intercept = np.polyfit(n, ms, 1)
    assert relative(a, b) < relative(intercept, slope)
    assert relative(a, b) < min(relative(a * 1.01, b), relative(a, b * 1.01))
    with pytest.raises(ValueError, match="two different ones"):
        line([8, 8], [1.0, 2.0])
