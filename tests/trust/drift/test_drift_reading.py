"""What is read from steps, against float64 loops over their tokens."""

import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drift_runs import Keeper, attached, selector, several_rows, traffic

from hashattn import Budget
from hashattn.kernels import tokens_of
from hashattn.trust.drift.reading import _BATCH, StepReader, _last, is_sampled
from hashattn.trust.drift.statistics import (
    bit_rates,
    bits_of,
    count_bytes,
    margin_at_threshold,
    recall_and_missed_mass,
    surprise,
    surprise_tables,
)
from hashattn_kernels.codes import ByteMajor, Tiled
from helpers import generate, left_padded, prompt


class Reader(StepReader):
    def __init__(self, method, share=1.0, top=4, every=1):
        super().__init__(SimpleNamespace(selector=method), share, 0, top, every)
        self.kept = []

    def _take(self, readings):
        self.kept.append(readings)


def rows_of(step):
    """(batch, row, visible tokens, read tokens of each query head) of a step, in order of rows."""
    batch, heads, q_len, _ = step.query.shape
    group = heads // step.indices.shape[1]
    for row in range(q_len):
        for b in range(batch):
            seen = step.plan.seen.expand(batch, 1, -1, -1)[b, 0, row].nonzero()[:, 0].tolist()
            read = [
                {t for t in step.indices[b, head // group, row].tolist() if t >= 0}
                for head in range(heads)
            ]
            yield b, row, seen, read


def expected_quality(step, top):
    """recall and missed mass of every row, one token at a time."""
    heads, kv_heads = step.query.shape[1], step.view.keys.shape[1]
    recalls, missed = [], []
    for b, row, seen, read in rows_of(step):
        found, mass = [], []
        for head in range(heads):
            query = step.query[b, head, row].double()
            keys = step.view.keys[b, head * kv_heads // heads].double()
            logits = {t: float(query @ keys[t]) * step.logits["scaling"] for t in seen}
            cap = step.logits["softcap"]
            if cap is not None:
                logits = {t: cap * math.tanh(x / cap) for t, x in logits.items()}
            middle = seen[step.plan.sink : len(seen) - step.plan.local]
            best = sorted(middle, key=lambda t: -logits[t])[:top]
            found.append(sum(t in read[head] for t in best) / len(best) if best else math.nan)
            weights = {t: math.exp(x) for t, x in logits.items()}
            sinks = step.logits["sinks"]
            total = sum(weights.values()) + (0 if sinks is None else math.exp(sinks[head]))
            mass.append(sum(w for t, w in weights.items() if t not in read[head]) / total)
        recalls.append(sum(found) / heads)
        missed.append(sum(mass) / heads)
    return recalls, missed


def expected_margin(step, method):
    """The margin of every row, one list at a time."""
    scores = method.scores(step.layer, step.query, step.view, step.logits["scaling"])
    lists, heads = scores.shape[1], step.query.shape[1]
    margins = []
    for b, row, seen, read in rows_of(step):
        middle, parts = seen[step.plan.sink : len(seen) - step.plan.local], []
        for number in range(lists):
            mine = read[number * heads // lists]
            value = {t: float(scores[b, number, row, t]) for t in middle}
            rest = [x for t, x in value.items() if t not in mine]
            picked = [x for t, x in value.items() if t in mine]
            mean = sum(rest) / len(rest)
            spread = math.sqrt(sum((x - mean) ** 2 for x in rest) / len(rest))
            parts.append((min(picked) - mean) / spread if spread and picked else math.nan)
        margins.append(sum(parts) / lists)
    return margins


def flat(tensor):
    return tensor.T.flatten().tolist()


RUNS = {
    "a list per KV head": {"method": selector(layout="per_kv_head")},
    "a list per query head": {"method": selector()},
    "codes per query head": {"method": selector(codes="per_query_head")},
    "matching bits": {"method": selector(scoring="hamming")},
    "no codes": {"method": selector("oracle")},
    "a soft cap": {"method": selector("oracle"), "family": "gemma2"},
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("padded", [False, True])
def test_recall_mass_and_margin_of_every_row(name, padded):
    keeper = Keeper()
    ids, mask = left_padded((30, 21)) if padded else (prompt(2, 30), torch.ones(2, 30).long())
    with attached(**RUNS[name], sparse_rows=5) as run, run.listen(keeper):
        several_rows(run, mask=mask if padded else None)
    steps = [step for step in keeper.steps if step.reason is None]
    assert steps
    for step in steps:
        recall, missed = recall_and_missed_mass(step, 4)
        recalls, masses = expected_quality(step, 4)
        np.testing.assert_allclose(flat(recall), recalls, rtol=1e-5)
        np.testing.assert_allclose(flat(missed), masses, rtol=1e-4, atol=1e-6)
        margin = margin_at_threshold(step, run.selector)
        np.testing.assert_allclose(flat(margin), expected_margin(step, run.selector), rtol=1e-4)


def test_learned_sinks_take_mass():
    keeper = Keeper()
    with attached() as run, run.listen(keeper):
        traffic(run, 1, tokens=2)
    step = keeper.steps[-1]
    step.logits["sinks"] = torch.tensor([0.5, -1.0, 2.0, 8.0])
    _, missed = recall_and_missed_mass(step, 4)
    np.testing.assert_allclose(flat(missed), expected_quality(step, 4)[1], rtol=1e-4)


def test_short_contexts_have_no_recall_and_miss_nothing():
    keeper = Keeper()
    with attached() as run, run.listen(keeper):
        generate(run.model, prompt(1, 2), max_new_tokens=2)
    step = keeper.steps[-1]
    recall, missed = recall_and_missed_mass(step, 4)
    assert recall.isnan().all() and (missed == 0).all()
    assert margin_at_threshold(step, run.selector).isnan().all()


def test_drawn_tokens_have_no_threshold():
    keeper = Keeper()
    with attached(selector("oracle", layout="per_query_head"),
                  budget=Budget(1, 3, heavy=8, sampled=1.0)) as run:  # fmt: skip
        with run.listen(keeper):
            traffic(run, 1, tokens=2)
    step = keeper.steps[-1]
    assert step.log_weights is not None and margin_at_threshold(step, run.selector) is None


def test_surprise_by_counting_bytes():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 6, size=(500, 2, 4), dtype=np.uint8)
    counts = count_bytes(codes)
    tables = surprise_tables(counts)
    value, head, place = 3, 1, 2
    assert counts[head, place, value] == (codes[:, head, place] == value).sum()
    ones = [((codes[:, head, place] >> bit) & 1).sum() for bit in range(8)]
    rates = [(float(one) + 0.5) / 501 for one in ones]
    prior = math.prod(r if value >> bit & 1 else 1 - r for bit, r in enumerate(rates))
    expected = -math.log2((counts[head, place, value] + 32 * prior) / (500 + 32))
    assert tables[head, place, value] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(np.exp2(-tables.astype(float)).sum(-1), 1, rtol=1e-5)
    row = codes[7]
    by_hand = [sum(tables[h, b, row[h, b]] for b in range(4)) for h in range(2)]
    assert surprise(codes, tables)[7] == pytest.approx(sum(by_hand) / 2, rel=1e-5)
    often = bits_of(codes).mean(0)
    np.testing.assert_allclose(bit_rates(tables), often, atol=0.01)


@pytest.mark.parametrize("layout", [ByteMajor, Tiled])
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_last_codes_of_every_layout(layout, tokens):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**31), 2**31 - 1, (2, 3, 4100, 2), generator=generator).int()
    expected = codes[:, :, -tokens:].contiguous().view(torch.uint8)
    for stored in (codes, layout.from_tokens(codes)):
        assert torch.equal(_last(stored, tokens), expected)


@pytest.mark.parametrize("codes", ["per_kv_head", "per_query_head"])
def test_codes_are_those_of_the_new_keys_and_of_the_queries(codes):
    keeper, method = Keeper(), selector(codes=codes)
    reader = Reader(method)
    ids, mask = left_padded((30, 21))
    with attached(method, sparse_rows=5) as run, run.listen(keeper), run.listen(reader):
        several_rows(run, mask=mask)
    reader.flush()
    (readings,) = reader.kept
    assert readings.rows == 10 and readings.sequences[:2].tolist() == [
        readings.sequences[0], readings.sequences[0] + 1,
    ]  # fmt: skip
    for step in keeper.steps:
        if step.reason is not None:
            continue
        stored = tokens_of(step.view.index["codes"])[:, :, -5:]
        queries = method.encode_queries(step.layer, step.query)[..., 0]
        for kind, expected in (("keys", stored), ("queries", queries)):
            rows, found = getattr(readings, kind)[step.layer]
            assert rows.tolist() == list(range(10))
            for number, (row, b) in enumerate((row, b) for row in range(5) for b in range(2)):
                word = expected[b, :, row].contiguous().numpy().view(np.uint8)
                assert (found[number] == word).all()


def test_padding_rows_are_left_out():
    method = selector()
    reader = Reader(method)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, -2:] = 0  # the second question is shorter
    with attached(method, sparse_rows=5) as run, run.listen(reader):
        several_rows(run, mask=mask)
    reader.flush()
    (readings,) = reader.kept
    assert readings.rows == 8
    assert np.bincount(readings.sequences - readings.sequences[0]).tolist() == [5, 3]


def test_calls_that_are_joined_read_as_one_by_one():
    """Batches of different sizes, some calls audited; the same as with every call on its own."""
    joined, single = (Reader(selector(), share=0.4, every=every) for every in (1000, 1))
    with attached() as run, run.listen(joined), run.listen(single):
        for batch in (1, 2, 1):
            generate(run.model, prompt(batch, 20), max_new_tokens=6)
    joined.flush()
    single.flush()
    (whole,) = joined.kept
    assert whole.rows == sum(part.rows for part in single.kept) == 5 + 10 + 5
    assert whole.sequences.tolist() == [s for part in single.kept for s in part.sequences]
    assert len(set(whole.sequences)) == 4
    for name, by_layer in whole.values.items():
        for layer, values in by_layer.items():
            parts = [part.values.get(name, {}).get(layer, np.full(part.rows, np.nan))
                     for part in single.kept]  # fmt: skip
            np.testing.assert_array_equal(values, np.concatenate(parts))
            assert 0 < np.isnan(values).sum() < len(values)
    for layer, (rows, codes) in whole.keys.items():
        np.testing.assert_array_equal(rows, np.arange(20))
        parts = [part.keys[layer][1] for part in single.kept]
        np.testing.assert_array_equal(codes, np.concatenate(parts))


def test_dense_layers_and_methods_without_codes_are_absent():
    reader = Reader(selector())
    with attached(dense_layers=[0]) as run, run.listen(reader):
        traffic(run, 1, tokens=4)
    reader.flush()
    assert {layer for part in reader.kept for layer in part.keys} == {1}
    assert reader._rows_by_reason == {(0, "dense_layer"): 3, (1, None): 3}
    reader = Reader(selector("oracle"))
    with attached(selector("oracle")) as run, run.listen(reader):
        traffic(run, 1, tokens=4)
    reader.flush()
    part = reader.kept[0]
    assert part.keys == part.queries == {}
    assert set(part.values) == {"margin", "recall", "missed_mass"}


def test_the_sample_is_a_share_of_the_steps_by_seed():
    numbers = range(20_000)
    first, again, other = ([is_sampled(seed, n, 0.05) for n in numbers] for seed in (1, 1, 2))
    assert first == again != other
    assert abs(sum(first) / len(first) - 0.05) < 4 * math.sqrt(0.05 * 0.95 / len(first))
    both = sum(a and b for a, b in zip(first, first[1:], strict=False)) / len(first)
    assert abs(both - 0.0025) < 0.002
    assert all(is_sampled(0, n, 1.0) for n in range(100))
    assert not any(is_sampled(0, n, 0.0) for n in range(100))


def test_threads_keep_their_calls_apart():
    reader = Reader(selector(), every=3)
    with attached() as run, run.listen(reader):

        def serve(seed):
            with torch.no_grad():
                cache = run.model(prompt(1, 20, seed), use_cache=True).past_key_values
                for token in range(6):
                    ids = prompt(1, 1, seed=10 * seed + token)
                    run.model(ids, past_key_values=cache, use_cache=True)
            reader.flush()

        threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    sequences = np.concatenate([part.sequences for part in reader.kept])
    assert sorted(np.unique(sequences, return_counts=True)[1]) == [6, 6, 6, 6]
    assert all(len(rows) == part.rows for part in reader.kept for rows, _ in part.keys.values())


def test_rows_are_sampled_and_not_calls():
    """Of one call of several rows those of the share are audited, each for all sequences."""
    share, batch, rows = 0.3, 2, 40
    reader, all_rows = Reader(selector(), share=share), Reader(selector())
    with attached(sparse_rows=rows) as run, run.listen(reader), run.listen(all_rows):
        several_rows(run, batch, 60, rows)
    for one in (reader, all_rows):
        one.flush()
    (part,), (whole,) = reader.kept, all_rows.kept
    number = 1  # of the call
    sampled = [is_sampled(0, number + row * _BATCH, share) for row in range(rows)]
    assert 0 < sum(sampled) < rows
    expected = np.repeat(sampled, batch)
    for name, by_layer in whole.values.items():
        for layer, values in by_layer.items():
            found = part.values[name][layer]
            np.testing.assert_array_equal(found, np.where(expected, values, np.nan))
    for layer, (places, codes) in part.queries.items():
        np.testing.assert_array_equal(places, expected.nonzero()[0])
        np.testing.assert_array_equal(codes, whole.queries[layer][1][expected])
    for places, _ in part.keys.values():
        np.testing.assert_array_equal(places, np.arange(batch * rows))
