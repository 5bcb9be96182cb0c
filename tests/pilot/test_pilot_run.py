"""A pilot on the embedded model, from documents to result: what is kept, resumed, left out."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hashattn.attention.attachment import Attachment, measure_break_even
from hashattn.attention.break_even import BreakEven, StepTimes
from hashattn.attention.budget import Budget
from hashattn.base.repository import repository
from hashattn.evaluation.methods import Method
from hashattn.hashing.weights import HashWeights
from hashattn.pilot import latency
from hashattn.pilot.codes import choose_codes
from hashattn.pilot.evidence import changed_answers
from hashattn.pilot.judgement import judge
from hashattn.pilot.latency import step_times
from hashattn.pilot.measurements import measure
from hashattn.pilot.outcome import _use, kv_bytes
from hashattn.pilot.plan import PlanError, make_plan
from hashattn.pilot.reading import choose_reading, methods
from hashattn.pilot.settings import PilotSettings
from hashattn.selectors import HashSelector, OracleSelector

EMBEDDED = repository() / "data" / "embedded"
SETTINGS = PilotSettings(context=512, budgets=(0.25, 0.125), texts=5, text_tokens=12,
                         answer_tokens=4, quotes=5, audits=1)  # fmt: skip
WORTH = SimpleNamespace(verdict="worth", ceiling=3.0, share=0.6, speedup=2.2)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def library():
    text = (repository() / "data" / "corpus" / "python_docs.txt").read_text()
    pieces = [text[1500 * n : 1500 * (n + 1)] for n in range(10, 20)]
    documents = [SimpleNamespace(name=f"{n}.txt", text=piece, kind="txt", sha256=str(n))
                 for n, piece in enumerate(pieces)]  # fmt: skip
    return SimpleNamespace(documents=tuple(documents), skipped=())


@pytest.fixture(scope="module")
def plan(tokenizer, library):
    asked = [
        SimpleNamespace(text=f"What is {n}?", answers=("zqx",) if n < 4 else (), row=n,
                        document=f"{n}.txt")
        for n in range(6)
    ]  # fmt: skip
    return make_plan(tokenizer, library, asked, SETTINGS)


@pytest.fixture(scope="module")
def selector(model):
    return HashSelector(HashWeights.load(EMBEDDED / "hash_weights", model))


@pytest.fixture(scope="module")
def measured(model, tokenizer, plan, selector, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pilot")
    return folder, measure(
        model, tokenizer, plan, methods(selector, SETTINGS), SETTINGS, folder, progress=False
    )


def test_rows_keep_the_order_of_questions_and_contexts(measured, plan):
    _, found = measured
    assert found.asked == plan.asked and found.compared == plan.asked[-2:]  # of unknown answers
    assert found.floor.count == 4 and not found.floor.clear
    for density in (None, *SETTINGS.budgets):
        rows = found.rows(found.answers, density)
        assert len(rows) == 2
        assert len(found.rows(found.fidelity, density)) == min(5, len(plan.contexts))
    read = found.rows(found.answers, 0.125)["density"]
    assert read.between(0.11, 0.14).all()
    assert (found.rows(found.fidelity, None)["kl"] == 0).all()


def test_a_second_run_measures_nothing(measured, model, tokenizer, plan, selector):
    folder, first = measured
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.jsonl")}
    again = measure(
        model, tokenizer, plan, methods(selector, SETTINGS), SETTINGS, folder, progress=False
    )
    assert again.answers.attrs["reused"] == len(again.answers)
    assert {path.name: path.stat().st_size for path in folder.glob("*.jsonl")} == sizes
    assert again.answers["prediction"].tolist() == first.answers["prediction"].tolist()
    assert judge(again, plan, SETTINGS, WORTH) == judge(first, plan, SETTINGS, WORTH)


def test_changed_answers_come_with_a_page(measured, model, tokenizer, plan, selector):
    folder, found = measured
    one = methods(selector, SETTINGS)[-1]
    rows = found.rows(found.answers, 0.125)
    changed = changed_answers(model, tokenizer, plan, found, one, SETTINGS, folder)
    dense = found.rows(found.answers, None)["prediction"].str.strip()
    assert len(changed) == (dense != rows["prediction"].str.strip()).sum() <= 2
    paged = [row for row in changed if row["audit"]]
    assert len(paged) == min(1, len(changed))
    for row in paged:
        page = folder / row["audit"]
        assert "Content-Security-Policy" in page.read_text()
        stamp = page.stat().st_mtime_ns
        changed_answers(model, tokenizer, plan, found, one, SETTINGS, folder)
        assert page.stat().st_mtime_ns == stamp
    json.dumps(changed, allow_nan=False)


def test_answers_that_were_lost_come_first(measured, model, tokenizer, plan, selector, tmp_path):
    _, found = measured
    row = found.answers.iloc[0].to_dict()
    said = {"dense": [("a", 0), ("b", 1), ("c", 0), ("d", 1)],
            "8x": [("a", 0), ("x", 1), ("y", 1), ("z", 0)]}  # fmt: skip
    rows = [row | {"budget": budget, "prediction": text, "score": float(score)}
            for budget, own in said.items() for text, score in own]  # fmt: skip
    own = replace(found, compared=plan.asked[:4], answers=pd.DataFrame(rows))
    settings = replace(SETTINGS, audits=0)
    one = methods(selector, SETTINGS)[-1]
    changed = changed_answers(model, tokenizer, plan, own, one, settings, tmp_path)
    order = [(row["question"], row["dense_right"], row["sparse_right"]) for row in changed]
    assert order == [("What is 3?", True, False), ("What is 2?", False, True),
                     ("What is 1?", True, True)]  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_random_model_cannot_be_judged(tokenizer, plan, tmp_path):
    torch.manual_seed(0)
    config = AutoModelForCausalLM.from_pretrained(EMBEDDED).config
    model = AutoModelForCausalLM.from_config(config).eval()
    codes = choose_codes(model, tokenizer, plan, SETTINGS, tmp_path)
    assert codes.origin == "calibrated"
    found = measure(
        model,
        tokenizer,
        plan,
        methods(codes.selector, SETTINGS),
        SETTINGS,
        tmp_path,
        progress=False,
    )
    assert judge(found, plan, SETTINGS, WORTH).verdict == "cannot_be_judged"


def test_random_characters_cannot_be_judged(model, tokenizer, selector, tmp_path):
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789 "
    noise = ["".join(rng.choices(letters, k=1200)) for _ in range(10)]
    documents = tuple(SimpleNamespace(name=f"{n}.txt", text=t, kind="txt", sha256=t)
                      for n, t in enumerate(noise))  # fmt: skip
    own = make_plan(tokenizer, SimpleNamespace(documents=documents, skipped=()), [], SETTINGS)
    found = measure(
        model, tokenizer, own, methods(selector, SETTINGS), SETTINGS, tmp_path, progress=False
    )
    verdict = judge(found, own, SETTINGS, WORTH)
    assert verdict.verdict == "cannot_be_judged" and not verdict.floors["text"].clear


def test_shipped_codes_stay_where_they_find_enough(model, tokenizer, plan, tmp_path, monkeypatch):
    shipped = EMBEDDED / "hash_weights"
    monkeypatch.setattr("hashattn.pilot.codes._ENOUGH", 0.0)
    kept = choose_codes(model, tokenizer, plan, SETTINGS, tmp_path, shipped)
    assert (kept.origin, kept.before, kept.tokens) == ("shipped", None, 0)
    assert 0 < kept.mass <= kept.of_exact < 1 and not list(tmp_path.iterdir())


def test_codes_are_calibrated_where_shipped_ones_miss(
    model, tokenizer, plan, tmp_path, monkeypatch
):
    monkeypatch.setattr("hashattn.pilot.codes._ENOUGH", 2.0)
    bad = EMBEDDED / "hash_variants"
    worst = min(bad.iterdir(), key=lambda folder: folder.name != "signs")
    codes = choose_codes(model, tokenizer, plan, SETTINGS, tmp_path, worst)
    again = choose_codes(model, tokenizer, plan, SETTINGS, tmp_path, worst)
    if codes.origin == "calibrated":
        assert codes.mass > codes.before and codes.tokens > 0
        assert len(list(tmp_path.glob("codes-*"))) == 1
    assert codes.to_dict() == again.to_dict()
    assert again.weights.sha256 == codes.weights.sha256


def test_a_model_without_codes_gets_its_own(model, tokenizer, plan, tmp_path):
    codes = choose_codes(model, tokenizer, plan, SETTINGS, tmp_path)
    assert codes.origin == "calibrated" and codes.before is None
    assert codes.mass > 0.8 * codes.of_exact
    learned = "".join(context.text for context in plan.learning)
    assert codes.tokens < len(tokenizer(learned)["input_ids"])  # the last context judges


def test_too_little_text_for_codes_is_said(model, tokenizer, library, tmp_path):
    few = SimpleNamespace(documents=library.documents[:2], skipped=())
    small = make_plan(tokenizer, few, [], SETTINGS)
    with pytest.raises(PlanError, match="too few to calibrate"):
        choose_codes(model, tokenizer, small, SETTINGS, tmp_path)
    kept = choose_codes(model, tokenizer, small, SETTINGS, tmp_path, EMBEDDED / "hash_weights")
    assert (kept.origin, kept.mass) == ("shipped", None)


def test_the_reading_is_what_is_closer_to_dense_on_calibration_text(
    model, tokenizer, plan, selector, tmp_path
):
    chosen = choose_reading(model, tokenizer, plan, selector, SETTINGS, tmp_path, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "reading.jsonl").read_text().splitlines()]
    assert {row["dataset"] for row in rows} == {"reading"}
    for budget, share in zip(("4x", "8x"), chosen, strict=True):
        kl = {name: np.mean([row["kl"] for row in rows
                             if (row["budget"], row["method"]) == (budget, name)])
              for name in ("ranked", "sampled")}  # fmt: skip
        assert share == (0.5 if kl["sampled"] < kl["ranked"] else 0.0)
    tried = methods(selector, SETTINGS, chosen)
    assert [method.budget.sampled for method in tried[1:]] == list(chosen)


def test_without_calibration_text_tokens_are_ranked(model, tokenizer, library, selector, tmp_path):
    few = SimpleNamespace(documents=library.documents[:2], skipped=())
    small = make_plan(tokenizer, few, [], SETTINGS)
    shares = choose_reading(model, tokenizer, small, selector, SETTINGS, tmp_path)
    assert shares == (0.0, 0.0) and not list(tmp_path.iterdir())


def even_at(tokens):
    """A BreakEven there, or with None at no length: lines of 1 ms dense, 2 ms sparse at first."""
    lengths = (32, 2048)
    slope = 0 if tokens is None else 1 / tokens
    dense = StepTimes.of(lengths, [[(1 + slope * n) / 1e3] * 3 for n in lengths])
    return BreakEven(lengths, dense, StepTimes.of(lengths, [[2e-3] * 3] * 2), 8192)


@pytest.mark.parametrize("even", [None, 400, 300, 200])
def test_times_of_steps(model, selector, monkeypatch, even):
    """A step with 301 tokens and more is a dense one of the attachment below the break-even."""
    seen = []

    class Seen(Attachment):
        def detach(self, verify=True):
            if self.attached:
                seen.append(self.receipt)
            super().detach(verify)

    monkeypatch.setattr("hashattn.attention.attachment.Attachment", Seen)
    monkeypatch.setattr(latency, "measure_break_even", lambda *arguments: even_at(even))
    every = [Method("dense"), Method("sparse", selector, Budget(density=0.25))]
    times = step_times(model, list(range(300)), every)
    assert (times["context"], times["steps"], len(times["budgets"])) == (300, 20, 1)
    assert 0 < times["prefill_seconds"] < 60
    for ms in (times["dense_ms"], times["budgets"][0]["ms"]):
        assert 0 < ms["low"] <= ms["median"] <= ms["high"]
    ratio = times["dense_ms"]["median"] / times["budgets"][0]["ms"]["median"]
    assert times["budgets"][0]["speedup"] == pytest.approx(ratio)
    assert times["budgets"][0]["dense_below"] == even
    dense = even is None or even > 300
    assert len(seen) == 5 and all(r.stayed_short == dense for r in seen)
    assert all(r.is_sparse != dense for r in seen)


@pytest.mark.parametrize(
    ("verdict", "below", "argument"),
    [
        ("go", 1200, "dense_below=1200"),
        ("go", None, 'dense_below="break_even"'),
        ("go_with_fallback", 1200, 'dense_below="break_even"'),
    ],
)
def test_the_code_to_use_has_the_break_even_where_it_was_measured(verdict, below, argument):
    judgement = SimpleNamespace(verdict=verdict, budget=0.25)
    codes = SimpleNamespace(place=Path("codes"))
    tried = [Method("dense"), Method("sparse", OracleSelector(), Budget(density=0.25))]
    rows = [{"budget": 0.5, "dense_below": 9}, {"budget": 0.25, "dense_below": below}]
    times = {"device": "a machine", "budgets": rows}
    code = _use(judgement, codes, tried, times)
    compile(code, "use", "exec")
    (line,) = [line for line in code.splitlines() if line.startswith("with attach(")]
    assert line.endswith(f", {argument}) as run:")
    assert ("measured on a machine" in code) == (argument == "dense_below=1200")
    assert "dense_below" not in _use(judgement, codes, tried, None)


def test_a_break_even_is_measured_for_times_of_steps(model, selector):
    every = [Method("dense"), Method("sparse", selector, Budget(density=0.25))]
    (row,) = step_times(model, list(range(40)), every)["budgets"]
    even = measure_break_even(model, selector, Budget(density=0.25))
    assert row["dense_below"] == (None if even.tokens == math.inf else even.tokens)


def test_bytes_of_a_cached_token(model):
    cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    held = sum(x.numel() * x.element_size() for layer in cache.layers
               for x in (layer.keys, layer.values))  # fmt: skip
    assert kv_bytes(model) == held / 3
