"""Verified fallback through attach, against a float64 loop of the whole policy."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

from hashattn import Budget, HashSelector, HashWeights, Memory, Receipt, attach, make_selector
from hashattn.attention.fallback import Fallback, FallbackError, fallback_fingerprint
from hashattn.attention.masks import spans_plan
from hashattn.attention.observer import LayerStep
from hashattn.base.errors import SparsePathError
from hashattn.kernels import available
from hashattn.models.heads import HeadSlice
from hashattn.selectors import hash as hash_module
from hashattn.selectors.oracle import OracleSelector
from hashattn.selectors.random import RandomSelector
from helpers import generate, left_padded, prompt, tiny_model

SMALL = Budget(sink=2, local=3, heavy=5)
LEVELS = 3


def rule(model, selector, budget=SMALL, tolerance=0.2, begin=None, lists=None, **changes):
    """A fallback with coefficients drawn at random, so that every head decides in its own way."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or 0
    lists = lists or selector.lists(heads, kv_heads or heads)
    generator = torch.Generator().manual_seed(5)
    layers = range(config.num_hidden_layers)
    coefficients = {
        layer: torch.rand(heads, LEVELS, 3, generator=generator) * torch.tensor([3.0, 0.5, 0.5])
        - torch.tensor([3.0, 0, 0])
        for layer in layers
    }
    starts = torch.arange(lists) % 2 if begin is None else torch.full((lists,), begin)
    settings = {
        "tolerance": tolerance, "risk": 0.05, "factor": 1.1, "coefficients": coefficients,
        "start": dict.fromkeys(layers, starts), "calibrated": {"sequences": 0},
        "fingerprint": fallback_fingerprint(model, selector, budget),
    }  # fmt: skip
    return Fallback(**settings | changes)


class Listener:
    timed = False

    def __init__(self) -> None:
        self.steps: list[LayerStep] = []

    def saw(self, step: LayerStep) -> None:
        if step.reason is None:
            self.steps.append(step)


def run_with(model, selector, fallback, ids=None, mask=None, budget=SMALL, new=4, **settings):
    with attach(model, selector, budget, fallback=fallback, allow_dense=True, **settings) as run:
        with run.listen(Listener()) as heard:
            generate(model, prompt(length=60) if ids is None else ids, mask, max_new_tokens=new)
    return heard.steps, run.receipt


def attention(query, keys, values, tokens, logits):
    """Output (Dv,) and the sum of the weights of one head over tokens, in float64."""
    total, out = 0.0, torch.zeros(values.shape[-1], dtype=torch.float64)
    for token in tokens:
        logit = float(query @ keys[token]) * logits["scaling"]
        if logits["softcap"] is not None:
            logit = math.tanh(logit / logits["softcap"]) * logits["softcap"]
        total += math.exp(logit)
        out += math.exp(logit) * values[token]
    return out / total if total else out, total


def policy(step, fallback, scores, batch, entry, row):
    """(level, tokens) of one list by the policy's definition, one token at a time."""
    heads, lists = step.query.shape[1], scores.shape[1]
    group, share = heads // lists, heads // step.view.keys.shape[1]
    seen = step.plan.seen.expand(len(scores), 1, step.query.shape[2], step.n)[batch, 0, row]
    seen = [token for token in range(step.n) if seen[token]]
    sink, local = step.plan.sink, step.plan.local
    fixed = seen[:sink] + seen[sink:][-local:]
    candidates = seen[sink : max(sink, len(seen) - local)]
    score = scores[batch, entry, row]
    ranked = sorted(candidates, key=lambda token: (-float(score[token]), token))
    first = max(2, int(step.plan.heavy.expand(scores.shape[:3])[batch, entry, row]))
    level = int(fallback.start[step.layer][entry])
    while True:
        heavy = first * 2**level
        if level >= LEVELS or heavy >= len(candidates):
            return LEVELS, seen
        fine, lower = True, ranked[heavy // 2 : heavy]
        for head in range(entry * group, (entry + 1) * group):
            query = step.query[batch, head, row].double()
            keys, values = (x[batch, head // share].double() for x in (step.view.keys, step.values))
            half, _ = attention(query, keys, values, fixed + ranked[: heavy // 2], step.logits)
            out, read = attention(query, keys, values, fixed + ranked[:heavy], step.logits)
            _, low = attention(query, keys, values, lower, step.logits)
            edge = (len(candidates) - heavy) * low / len(lower) / read
            change = float((out - half).norm() / out.norm())
            a, b, c = fallback.coefficients[step.layer][head, level].double().tolist()
            error = math.exp(a) * edge**b * change**c
            fine = fine and fallback.factor * error <= fallback.tolerance
        if fine:
            return level, sorted(fixed + ranked[:heavy])
        level += 1


@torch.no_grad()
def check(steps, fallback, selector):
    """All steps by the loop; returns the levels that occurred."""
    occurred = set()
    for step in steps:
        scores = selector.scores(step.layer, step.query, step.view, step.logits["scaling"])
        for batch, entry, row in product(*map(range, scores.shape[:3])):
            level, tokens = policy(step, fallback, scores, batch, entry, row)
            read = [t for t in step.indices[batch, entry, row].tolist() if t >= 0]
            assert read == tokens
            assert int(step.levels[batch, entry, row]) == level
            occurred.add(level)
    return occurred


@pytest.mark.parametrize("layout", ["per_query_head", "per_kv_head"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_lists_grow_as_the_policy_says(family, layout):
    model = tiny_model(family)
    selector = OracleSelector(layout)
    occurred = set()
    for tolerance in (0.1, 0.4, 0.999):
        fallback = rule(model, selector, tolerance=tolerance)
        steps, receipt = run_with(model, selector, fallback)
        occurred |= check(steps, fallback, selector)
        read = sum(int((step.indices >= 0).sum()) for step in steps)
        assert receipt.tokens_read * steps[0].indices.shape[1] == pytest.approx(
            read + sum(c.read for c in receipt.counts if c.reason) * steps[0].indices.shape[1]
        )
        by_level = torch.cat([step.levels.flatten() for step in steps]).bincount(minlength=4)
        assert receipt.levels == by_level.tolist()
    assert occurred >= {1, 2, 3}


def test_batches_padding_and_several_rows():
    model = tiny_model("llama")
    ids, mask = left_padded((50, 33, 7))
    selector = OracleSelector()
    fallback = rule(model, selector, tolerance=0.3)
    steps, _ = run_with(model, selector, fallback, ids, mask, new=3)
    assert {LEVELS} < check(steps, fallback, selector)
    with attach(model, selector, SMALL, sparse_rows=6, fallback=fallback) as run:
        with run.listen(Listener()) as heard:
            cache = model(prompt(length=40), use_cache=True).past_key_values
            model(prompt(length=6, seed=3), past_key_values=cache)
    assert heard.steps[0].query.shape[2] == 6
    check(heard.steps, fallback, selector)


def test_padding_inside_a_row_and_hash_codes():
    model = tiny_model("llama")
    weights = HashWeights.for_model(model, seed=3, layout="per_kv_head", hidden=16)
    selector = HashSelector(weights)
    fallback = rule(model, selector, tolerance=0.9)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, 10:25] = 0
    occurred = set()
    for given in (None, mask):
        steps, _ = run_with(model, selector, fallback, prompt(2, 60), given, new=3,
                            allow_untrained=True)  # fmt: skip
        occurred |= check(steps, fallback, selector)
    assert len(occurred) > 1


@pytest.mark.skipif(not available("numba"), reason="numba is not installed")
@pytest.mark.parametrize("sampled", [0.0, 0.5, ((0.5, 0.25),) * 2], ids=["ranked", "half", "own"])
@pytest.mark.parametrize("layout", ["per_query_head", "per_kv_head"])
def test_codes_are_read_and_verified_in_one_call(layout, sampled, monkeypatch):
    """As by the parts, which every other method has, batches with padding too."""
    model = tiny_model("llama")
    weights = HashWeights.for_model(model, seed=3, layout="per_kv_head", hidden=16)
    selector = HashSelector(weights, layout=layout)
    lists = selector.lists(4, 2)
    selector = selector._with(slopes=dict.fromkeys(range(2), torch.full((lists,), 0.03)))
    budget = replace(SMALL, sampled=sampled)
    fallback = rule(model, selector, budget, tolerance=0.3 if sampled else 0.9)
    given = (model, selector, fallback, *left_padded((60, 44)))
    made, calls, kernel = [], [], hash_module.verified_step
    for once in (lambda *_, **__: None, kernel):

        def counted(*arguments, once=once, **keywords):
            calls.append(once(*arguments, **keywords))
            return calls[-1]

        monkeypatch.setattr(hash_module, "verified_step", counted)
        made.append(run_with(*given, new=6, budget=budget, allow_untrained=True)[0])
    assert sum(call is not None for call in calls) == len(made[1]) == len(calls) / 2
    assert len({int(level) for step in made[1] for level in step.levels.flatten()}) > 1
    for parts, once in zip(*made, strict=True):
        assert torch.equal(parts.indices, once.indices) and torch.equal(parts.levels, once.levels)
        torch.testing.assert_close(parts.log_weights, once.log_weights, rtol=0, atol=0)
        torch.testing.assert_close(parts.query, once.query)
        assert set(parts.view.index) == set(once.view.index) and parts.seen == once.seen


def test_a_rule_may_be_columns_of_larger_tensors():
    """Starts are quantiles, columns of a table, before a rule is saved and loaded."""
    model = tiny_model("llama")
    selector = HashSelector(HashWeights.for_model(model, seed=3, layout="per_kv_head", hidden=16))
    whole = rule(model, selector, tolerance=0.9)
    parts = {
        name: {layer: torch.stack((part, part), -1)[..., 0] for layer, part in parts.items()}
        for name, parts in (("start", whole.start), ("coefficients", whole.coefficients))
    }
    assert not any(part.is_contiguous() for each in parts.values() for part in each.values())
    made = [
        run_with(model, selector, fallback, allow_untrained=True)[0]
        for fallback in (whole, replace(whole, **parts))
    ]
    for one, other in zip(*made, strict=True):
        assert torch.equal(one.indices, other.indices) and torch.equal(one.levels, other.levels)


def test_what_is_said_to_be_read_is_attended():
    """Logits with a fallback equal those of lists that a plain step reads: of the tightest rule,
    dense ones; of the loosest, the budget's."""
    model = tiny_model("llama")
    ids = prompt(2, 60)
    selector = RandomSelector()

    def logits(fallback, budget=SMALL):
        with attach(model, selector, budget, fallback=fallback, allow_dense=True):
            return generate(model, ids, max_new_tokens=6)[1]

    tight = rule(model, selector, tolerance=1e-6, begin=0)
    torch.testing.assert_close(logits(tight), generate(model, ids, max_new_tokens=6)[1])
    budget = replace(SMALL, heavy=8)
    loose = {n: torch.tensor([-20.0, 0, 0]).expand(4, LEVELS, 3).contiguous() for n in range(2)}
    for level in range(LEVELS):
        fallback = rule(model, selector, budget, begin=level, coefficients=loose)
        plain = logits(None, replace(budget, heavy=8 * 2**level))
        torch.testing.assert_close(logits(fallback, budget), plain)


def test_rows_outside_fast_memory_change_nothing(tmp_path):
    model, selector = tiny_model("llama"), OracleSelector("per_kv_head")
    fallback = rule(model, selector)
    made = []
    for memory in (None, Memory(fast_bytes=30 * 2 * 2 * 128, folder=tmp_path)):
        settings = {"fallback": fallback, "allow_dense": True, "memory": memory}
        with attach(model, selector, SMALL, **settings) as run:
            made.append((*generate(model, prompt(length=60)), run.receipt.levels))
    assert all(torch.equal(*pair) for pair in zip(*(each[:2] for each in made), strict=True))
    assert made[0][2] == made[1][2] and made[0][2][-1] > 0 < made[0][2][1]


def test_kept_tokens_are_in_lists_of_every_level():
    model, selector, kept = tiny_model("llama"), OracleSelector("per_query_head"), {20, 21, 40}
    for begin in (0, 1, LEVELS):
        fallback = rule(model, selector, begin=begin)
        heard = Listener()
        with attach(model, selector, SMALL, fallback=fallback, allow_dense=True) as run:
            with run.listen(heard), run.keep(sorted(kept)):
                generate(model, prompt(length=60), max_new_tokens=3)
        read = [set(row) for step in heard.steps for row in step.indices.flatten(0, 2).tolist()]
        assert read and all(kept <= row for row in read)
        if begin == LEVELS:
            assert all(len(row) == len(set(row)) for step in heard.steps
                       for row in step.indices.flatten(0, 2).tolist())  # fmt: skip


DRAWS = replace(SMALL, heavy=6, sampled=0.5)


def drawn_policy(step, fallback, selector, entry):
    """(level, tokens, log weights) of one list of a drawn step of one row, each level drawn by a
    budget of its own; the error bar token by token."""
    heads, lists = step.query.shape[1], step.levels.shape[1]
    group, share = heads // lists, heads // step.view.keys.shape[1]
    level, candidates = int(fallback.start[step.layer][entry]), step.n - SMALL.sink - SMALL.local
    spans = torch.tensor([[[0, step.n]]])
    while True:
        heavy = DRAWS.heavy * 2**level
        if level >= LEVELS or heavy >= candidates:
            return LEVELS, list(range(step.n)), [0.0] * step.n
        budget = replace(DRAWS, heavy=heavy)
        plan = budget.of_layer(spans_plan(spans, step.n, budget), step.layer, 2, lists)
        indices, added = selector.sample(
            step.layer, step.query, step.view, step.logits["scaling"], plan
        )
        real = indices[0, entry, 0] >= 0
        tokens, added = (part[0, entry, 0][real].tolist() for part in (indices, added))
        fine = True
        for head in range(entry * group, (entry + 1) * group):
            query = step.query[0, head, 0].double()
            keys, values = (x[0, head // share].double() for x in (step.view.keys, step.values))
            weights = [
                math.exp(float(query @ keys[t]) * step.logits["scaling"] + more)
                for t, more in zip(tokens, added, strict=True)
            ]
            total, out = sum(weights), torch.zeros_like(values[0])
            for token, weight in zip(tokens, weights, strict=True):
                out += weight / total * values[token]
            variance = part = 0.0
            for token, weight, more in zip(tokens, weights, added, strict=True):
                away = float((values[token] - out).square().sum())
                variance += (1 - math.exp(-more)) * (weight / total) ** 2 * away
                part += weight / total if more > 0 else 0.0
            bar = math.sqrt(variance) / float(out.norm())
            a, b, c = fallback.coefficients[step.layer][head, level].double().tolist()
            terms = [math.log(x) if x > 0 else -13.8 for x in (bar, part)]
            error = a + b * terms[0] + c * terms[1] + math.log(fallback.factor)
            fine = fine and error <= math.log(fallback.tolerance)
        if fine:
            return level, tokens, added
        level += 1


@pytest.mark.parametrize("layout", ["per_query_head", "per_kv_head"])
def test_drawn_lists_grow_by_their_error_bar(layout):
    model = tiny_model("llama")
    selector, occurred = OracleSelector(layout), set()
    for tolerance in (0.02, 0.06, 0.2):
        fallback = rule(model, selector, DRAWS, tolerance)
        steps, receipt = run_with(model, selector, fallback, budget=DRAWS)
        assert steps and sum(receipt.levels)
        for step in steps:
            for entry in range(step.levels.shape[1]):
                level, tokens, added = drawn_policy(step, fallback, selector, entry)
                assert int(step.levels[0, entry, 0]) == level
                read = step.indices[0, entry, 0] >= 0
                assert step.indices[0, entry, 0][read].tolist() == tokens
                found = step.log_weights[0, entry, 0][read]
                torch.testing.assert_close(found, torch.tensor(added), rtol=1e-6, atol=1e-6)
                occurred.add(level)
    assert occurred == set(range(LEVELS + 1))


def test_drawn_lists_are_attended_with_their_weights():
    """The loosest rule reads what a plain drawn step does, the tightest what dense attention does;
    in batches and padded."""
    model = tiny_model("llama")
    selector, (ids, mask) = OracleSelector(), left_padded((50, 33))

    def logits(fallback, budget=DRAWS):
        with attach(model, selector, budget, fallback=fallback, allow_dense=True):
            return generate(model, ids, mask, max_new_tokens=5)[1]

    tight = rule(model, selector, DRAWS, tolerance=1e-6, begin=0)
    torch.testing.assert_close(logits(tight), generate(model, ids, mask, max_new_tokens=5)[1])
    loose = {n: torch.tensor([-20.0, 0, 0]).expand(4, LEVELS, 3).contiguous() for n in range(2)}
    for level in range(2):
        fallback = rule(model, selector, DRAWS, begin=level, coefficients=loose)
        plain = logits(None, replace(DRAWS, heavy=DRAWS.heavy * 2**level))
        torch.testing.assert_close(logits(fallback), plain)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_drawn_rows_may_lie_in_a_store(tmp_path, bits):
    """A hot set changes nothing: what is asked of rows is asked of those that were read."""
    model, selector = tiny_model("llama"), OracleSelector("per_kv_head")
    if bits is not None:  # the oracle would need the keys of all tokens
        weights = HashWeights.for_model(model, seed=3, layout="per_kv_head", hidden=16)
        selector = HashSelector(weights, layout="per_kv_head")
        selector = selector._with(slopes=dict.fromkeys(range(2), torch.full((2,), 0.03)))
    fallback, made = rule(model, selector, DRAWS, tolerance=0.1), []
    kept = {} if bits is None else {"bits": bits, "exact": 8}
    for hot in ({}, {"fast_bytes": 30 * 2 * 2 * 128, "folder": tmp_path}):
        memory = Memory(**kept, **hot) if kept or hot else None
        with attach(
            model, selector, DRAWS, fallback=fallback, memory=memory, allow_untrained=True
        ) as run:  # fmt: skip
            made.append((*generate(model, prompt(length=60)), run.receipt.levels))
    assert all(torch.equal(*pair) for pair in zip(*(each[:2] for each in made), strict=True))
    assert made[0][2] == made[1][2] and made[0][2][-1] < sum(made[0][2])


def test_learned_sinks_count_once():
    from hashattn.attention.fallback_reading import gather_rows, reading_of
    from hashattn.attention.masks import make_plan
    from hashattn.kernels import attend, dense_decode

    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8)
    plan = make_plan(None, 1, 1, 50, query.device, SMALL)
    logits = {"scaling": 0.4, "softcap": None, "sinks": torch.randn(4)}
    selector = RandomSelector()

    def sample(plan):
        from hashattn.selectors.base import KeyView

        return selector.sample(0, query, KeyView(key), 0.4, plan)

    lists = selector.lists(4, 2)
    read = partial(attend, query, key, value)
    start = torch.zeros(lists).long()
    reading = reading_of(
        sample, read, query, partial(gather_rows, key, value), plan, logits, 4, start
    )
    while not reading.dense.all():
        reading.double(torch.ones_like(reading.levels, dtype=torch.bool))
    torch.testing.assert_close(reading.out, dense_decode(query, key, value, **logits))


def test_short_contexts_are_dense_by_rule():
    model = tiny_model("llama")
    with attach(model, OracleSelector(), SMALL, dense_below=63) as run:
        generate(model, prompt(length=60), max_new_tokens=6)
    reasons = run.receipt.dense_reasons
    assert reasons == {"prefill": 2, "short_context": 4}
    assert run.receipt.sparse_calls == 6 and run.receipt.settings["dense_below"] == 63
    with pytest.raises(SparsePathError, match="short_context"):
        with attach(model, OracleSelector(), SMALL, dense_below=500):
            generate(model, prompt(length=60))
    with pytest.raises(ValueError, match="dense_below = -1"):
        attach(model, OracleSelector(), SMALL, dense_below=-1)


def test_receipts_say_what_was_promised_and_where_lists_ended(tmp_path):
    model = tiny_model("llama")
    selector = OracleSelector()
    fallback = rule(model, selector)
    _, receipt = run_with(model, selector, fallback)
    assert receipt.settings["fallback"]["sha256"] == fallback.sha256
    text = receipt.summary()
    assert "an output error above 20 % in at most 5 % of head-steps" in text
    assert "lists ended at   1x" in text and "dense" in text.splitlines()[-1]
    receipt.save(tmp_path / "receipt.json")
    loaded = Receipt.load(tmp_path / "receipt.json")
    assert loaded.levels == receipt.levels and loaded.summary() == text
    _, plain = run_with(model, selector, None)
    assert plain.levels == [] and "fallback" not in plain.summary() + plain.to_json()


def test_a_rule_that_reads_everything_is_no_sparse_run():
    model = tiny_model("llama")
    with pytest.raises(SparsePathError, match="the fallback made every list dense"):
        with attach(
            model, OracleSelector(), SMALL, fallback=rule(model, OracleSelector(), tolerance=1e-6)
        ):
            generate(model, prompt(length=60))


def test_saved_and_loaded(tmp_path):
    model = tiny_model("llama")
    fallback = rule(model, OracleSelector())
    loaded = Fallback.load(fallback.save(tmp_path))
    assert loaded.sha256 == fallback.sha256 and loaded.record() == fallback.record()
    one, _ = run_with(model, OracleSelector(), fallback)
    two, _ = run_with(model, OracleSelector(), loaded)
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(one, two, strict=True))
    path = tmp_path / "fallback.json"
    record = json.loads(path.read_text())
    for change, message in [
        ({"tolerance": 0.9}, "not of one fallback"),
        ({"format": 0}, "another version"),
        ({"tolerance": "x"}, "is not a fallback"),
    ]:
        path.write_text(json.dumps(record | change))
        with pytest.raises(FallbackError, match=message):
            Fallback.load(tmp_path)
    path.write_text("[]")
    with pytest.raises(FallbackError, match="is not a fallback"):
        Fallback.load(tmp_path)
    path.write_text(json.dumps(record))
    (tmp_path / "fallback.safetensors").unlink()
    with pytest.raises(FallbackError, match="does not exist"):
        Fallback.load(tmp_path)


def test_of_something_else_is_refused():
    model = tiny_model("llama")
    selector = OracleSelector()
    fallback = rule(model, selector, tolerance=0.9)
    for other, kind, budget, match in [
        (tiny_model("mistral"), selector, SMALL, "another model: config_sha256"),
        (model, RandomSelector(), SMALL, "another method: name oracle"),
        (model, OracleSelector("per_kv_head"), SMALL, "another method: parameters"),
        (model, selector, Budget(heavy=9), "another budget: heavy 5, local 3, sink 2 there"),
    ]:
        with pytest.raises(FallbackError, match=match):
            attach(other, kind, budget, fallback=fallback)
    less = replace(fallback, coefficients={0: fallback.coefficients[0]})
    with pytest.raises(FallbackError, match=r"not calibrated for layers \[1\]"):
        attach(model, selector, SMALL, fallback=less)
    with attach(model, selector, SMALL, fallback=less, dense_layers=[1]) as run:
        generate(model, prompt(length=60))
        with pytest.raises(FallbackError, match="another method"):
            run.swap(RandomSelector())
        run.swap(RandomSelector(), rule(model, RandomSelector(), tolerance=0.9))
        generate(model, prompt(length=60))
    assert run.receipt.method["name"] == "random" and sum(run.receipt.levels)


def test_methods_and_budgets_that_cannot_double_are_refused():
    model = tiny_model("llama")
    for selector, budget, match in [
        (OracleSelector(), Budget(heavy=8, sampled=((0.5,), (0.0,))), r"budget.sampled = \(\(0.5,"),
        (make_selector("snapkv"), SMALL, "selector = 'snapkv'"),
        (make_selector("oracle_top_p"), SMALL, "selector = 'oracle_top_p'"),
        (make_selector("dense"), SMALL, "selector = 'dense'"),
    ]:
        fallback = rule(model, selector, budget, lists=4)
        with pytest.raises(ValueError, match=match):
            attach(model, selector, budget, fallback=fallback)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tolerance": 0}, "tolerance = 0"),
        ({"risk": 1.0}, "risk = 1.0"),
        ({"factor": math.nan}, "factor = nan"),
        ({"coefficients": {}}, "coefficients = {}"),
        ({"coefficients": {0: torch.full((4, 2, 3), math.inf)}}, "must be finite"),
        ({"start": {0: torch.tensor([0, 4]), 1: torch.tensor([0])}}, r"start\[0\]"),
        ({"start": {0: torch.zeros(3).long()}}, r"start\[0\]"),
        ({"start": {}}, r"start\[0\]"),
    ],
)
def test_parts_that_do_not_fit(changes, match):
    with pytest.raises(ValueError, match=match):
        rule(tiny_model("llama"), OracleSelector(), **changes)


def test_a_process_of_tensor_parallelism_has_its_heads_rules():
    model = tiny_model("llama")
    for layout in ("per_query_head", "per_kv_head"):
        fallback = rule(model, OracleSelector(layout))
        parts = [fallback.shard(HeadSlice(4, 2, rank, 2)) for rank in range(2)]
        for name in ("coefficients", "start"):
            whole = getattr(fallback, name)
            for layer in whole:
                joined = torch.cat([getattr(part, name)[layer] for part in parts])
                assert torch.equal(joined, whole[layer])
    assert fallback.shard(None) is fallback
