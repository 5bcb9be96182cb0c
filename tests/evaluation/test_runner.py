"""evaluate: same answers as plain generation, shared prefill, both setups, resuming, failures."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from hashattn.attention.attachment import attach
from hashattn.base.errors import SparsePathError
from hashattn.evaluation import cells
from hashattn.evaluation.answering import PrefilledContext, end_tokens, feed, greedy
from hashattn.evaluation.cells import TIMINGS
from hashattn.evaluation.methods import Method
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record
from hashattn.evaluation.runner import evaluate
from hashattn.evaluation.tables import (
    bucket_table,
    comparison_table,
    dataset_table,
    density_table,
    results_frame,
    score_table,
    setup_table,
    sharing_table,
)
from hashattn.selectors import make_selector
from helpers import characters, tiny_model

CONTEXTS = ("the quick brown fox jumps over the lazy dog " * 3, "pack my box with jugs " * 6)
PROTOCOL = Protocol(sink=2, local=4, max_new_tokens=5)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return characters()


def records(questions=("who", "what is")):
    made = []
    for number, context in enumerate(CONTEXTS):
        for question in questions:
            made.append(Record(question, context, ("fox", "my box"), dataset=f"set{number}"))
    return made


def methods():
    half = PROTOCOL.budget(heavy=30)
    return [
        Method("dense"),
        Method("oracle", make_selector("oracle"), half),
        Method("lsh", make_selector("lsh", bits=32), half),
        Method("lsh", make_selector("lsh", bits=32), PROTOCOL.budget(heavy=10)),
    ]


def run(model, tokenizer, path, *, records=None, methods=None, protocol=PROTOCOL, setups=None):
    """By default in the protocol's own setup, so that a frame is one table's."""
    return evaluate(
        model,
        tokenizer,
        records or globals()["records"](),
        methods or globals()["methods"](),
        protocol,
        path,
        progress=False,
        setups=setups or [protocol.setup],
    )


def generated(model, tokenizer, record, new_tokens):
    """What plain generate answers to the whole prompt."""
    prompt = "".join(Protocol().split_prompt(record.context, record.input))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("\n", 1)[0]


def test_dense_answers_are_those_of_generate(model, tokenizer, tmp_path):
    frame = run(model, tokenizer, tmp_path / "r.jsonl", methods=[Method("dense")])
    expected = [generated(model, tokenizer, record, 5) for record in records()]
    assert frame["prediction"].tolist() == expected
    assert len(set(expected)) > 1 and all(expected)
    assert (frame["density"] == 1.0).all()


@pytest.mark.parametrize("question", ["sparse", "dense"])
@pytest.mark.parametrize("name", ["h2o", "snapkv", "infllm"])
def test_observing_methods_see_their_own_prefill(model, tokenizer, tmp_path, name, question):
    """Answers do not depend on which were given before, nor on the prefill's chunks."""
    protocol = replace(PROTOCOL, question=question)
    half = Method(name, make_selector(name), protocol.budget(heavy=30))
    frame = run(model, tokenizer, tmp_path / "all", methods=[half], protocol=protocol)
    assert (frame["density"] < 1).all()
    last = run(model, tokenizer, tmp_path / "one", records=records()[-1:], methods=[half],
               protocol=protocol)  # fmt: skip
    assert last["prediction"].tolist() == frame["prediction"].tolist()[-1:]
    everything = Method(name, half.selector, protocol.budget(density=1.0), allow_dense=True)
    dense = run(model, tokenizer, tmp_path / "dense", methods=[Method("dense")])
    full = run(model, tokenizer, tmp_path / "full", methods=[everything], protocol=protocol)
    assert full["prediction"].tolist() == dense["prediction"].tolist()


@pytest.mark.parametrize("length", [1, 4, 5, 9])
def test_no_part_of_a_prefill_is_short(model, monkeypatch, length):
    monkeypatch.setattr("hashattn.evaluation.answering.PREFILL_CHUNK", 4)
    parts = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: parts.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    PrefilledContext(model, range(3, 3 + length))
    hook.remove()
    assert sum(parts) == length and max(parts) <= 4 and max(parts) - min(parts) <= 1


def test_a_budget_for_everything_gives_dense_answers(model, tokenizer, tmp_path):
    everything = PROTOCOL.budget(density=1.0)
    full = Method("all", make_selector("oracle"), everything, allow_dense=True)
    frame = run(model, tokenizer, tmp_path / "r.jsonl", methods=[Method("dense"), full])
    answers = frame.groupby("method", sort=False)["prediction"].apply(list)
    assert answers["all"] == answers["dense"]


@pytest.mark.parametrize(("family", "question"), [("llama", "sparse"), ("gemma2", "dense")])
def test_shared_prefill_changes_no_sparse_answer(family, question, tokenizer, tmp_path):
    """Against one fresh prefill for every question, other questions and methods never seen."""
    model = tiny_model(family)
    protocol = replace(PROTOCOL, question=question)
    frame = run(model, tokenizer, tmp_path / "r.jsonl", protocol=protocol)
    lines = iter(frame.itertuples())
    for method in methods():
        for record in records():
            context, asked = protocol.split_prompt(record.context, record.input)
            rest = tokenizer(asked)["input_ids"]
            cache = PrefilledContext(model, tokenizer(context)["input_ids"]).fork()
            assert next(lines).prediction == alone(model, tokenizer, method, question, cache, rest)


def alone(model, tokenizer, method, question, cache, rest):
    if method.selector is None:
        return greedy(model, tokenizer, cache, feed(model, rest, cache), 5, "\n")
    first = feed(model, rest, cache) if question == "dense" else None
    rows = 1 if question == "dense" else len(rest)
    with attach(model, method.selector, method.budget, sparse_rows=rows, allow_dense=True):
        first = feed(model, rest, cache) if first is None else first
        return greedy(model, tokenizer, cache, first, 5, "\n")


def test_one_prefill_a_context_and_every_question_sparse(model, tokenizer, tmp_path, monkeypatch):
    lengths = []
    real = cells.PrefilledContext

    def counted(model, tokens):
        lengths.append(len(tokens))
        return real(model, tokens)

    monkeypatch.setattr(cells, "PrefilledContext", counted)
    shuffled = records()[::2] + records()[1::2]
    frame = run(model, tokenizer, tmp_path / "r.jsonl", records=shuffled)
    assert lengths == [len(context + "\nQ:") for context in CONTEXTS]
    assert len(frame) == 4 * 4 and frame.attrs["reused"] == 0
    sparse = frame[frame["method"] != "dense"]
    assert (sparse["density"] < 0.4).all() and (sparse["density"] > 0.1).all()


def test_a_context_is_encoded_once_for_all_budgets_of_a_selector(model, tokenizer, tmp_path):
    class Counting(type(make_selector("lsh"))):
        encoded = 0

        def encode_keys(self, layer, keys):
            type(self).encoded += keys.shape[2]
            return super().encode_keys(layer, keys)

    ours, other = Counting(bits=32), make_selector("oracle")
    mixed = [
        Method(f"{name} {heavy}", selector, PROTOCOL.budget(heavy=heavy))
        for heavy in (20, 10)
        for name, selector in (("ours", ours), ("other", other))
    ]
    one = records(("who",))[:1]
    frame = evaluate(model, tokenizer, one, mixed, PROTOCOL, tmp_path / "mixed.jsonl", setups="B",
                     progress=False)  # fmt: skip
    assert list(frame["method"]) == ["ours 20", "other 20", "ours 10", "other 10"]
    layers, context = model.config.num_hidden_layers, len(tokenizer(CONTEXTS[0])["input_ids"])
    answers = 2 * (len("who") + 20)  # the question and what is generated, each time, at most
    assert layers * context <= Counting.encoded <= layers * (context + answers)


def test_receipts_count_what_the_budget_allows(model, tokenizer, tmp_path):
    path = tmp_path / "r.jsonl"
    frame = run(model, tokenizer, path)
    small = frame[frame["budget"] == "10 tokens"]
    for line in small.itertuples():
        assert line.density == pytest.approx(16 / (line.context_tokens + 6), rel=0.05)
    accounts = json.loads((tmp_path / "r.jsonl.receipts.json").read_text())
    assert [(a["method"], a["budget"], a["samples"]) for a in accounts] == [
        ("oracle", "30 tokens", 4),
        ("lsh", "30 tokens", 4),
        ("lsh", "10 tokens", 4),
    ]
    by_cell = dict(list(frame.groupby(["method", "budget"])))
    for receipt_summary in accounts:
        part = by_cell[receipt_summary["method"], receipt_summary["budget"]]
        assert receipt_summary["density"] == part["tokens_read"].sum() / part["tokens_cached"].sum()
        assert receipt_summary["sparse_calls"] > 0 and receipt_summary["dense_calls"] == {}
        assert receipt_summary["environments"][0]["torch"] == torch.__version__
    assert accounts[1]["auxiliary_bits"] == accounts[1]["nominal_bits"] == 32


def test_a_second_run_reuses_everything_without_the_model(model, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    first = run(model, tokenizer, path)
    monkeypatch.setattr(cells, "PrefilledContext", None)
    again = run(model, tokenizer, path)
    assert again.attrs["reused"] == len(again) == len(path.read_text().splitlines())
    assert again.equals(first)


def test_only_what_changed_runs_again(model, tokenizer, tmp_path):
    path = tmp_path / "r.jsonl"
    run(model, tokenizer, path, methods=methods()[2:3])
    renamed = [Method("other name", make_selector("lsh"), PROTOCOL.budget(heavy=30))]
    frame = run(model, tokenizer, path, methods=renamed)
    assert frame.attrs["reused"] == len(frame) == 4
    assert set(frame["method"]) == {"other name"}
    changed = [
        {"methods": [Method("lsh", make_selector("lsh", seed=1), PROTOCOL.budget(heavy=30))]},
        {"methods": [Method("lsh", make_selector("lsh"), PROTOCOL.budget(heavy=31))]},
        {"protocol": replace(PROTOCOL, question="dense")},
        {"records": records(("why",))},
    ]
    for change in changed:
        change = {"methods": methods()[2:3]} | change
        assert run(model, tokenizer, path, **change).attrs["reused"] == 0
    other = run(tiny_model("llama", seed=1), tokenizer, path, methods=methods()[2:3])
    assert other.attrs["reused"] == 0


@pytest.mark.parametrize("kept", [0, 5])
def test_an_interrupted_run_goes_on_where_it_stopped(model, tokenizer, tmp_path, kept):
    path, whole = tmp_path / "r.jsonl", tmp_path / "whole.jsonl"
    expected = run(model, tokenizer, whole, methods=methods()[:2])
    lines = whole.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:kept]) + lines[kept][:40])
    frame = run(model, tokenizer, path, methods=methods()[:2])
    assert frame.attrs["reused"] == kept
    assert frame.drop(columns=list(TIMINGS)).equals(expected.drop(columns=list(TIMINGS)))


def test_the_model_is_as_before_also_after_an_error(model, tokenizer, tmp_path, monkeypatch):
    before = model.config._attn_implementation

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cells, "greedy", fail)
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, tmp_path / "r.jsonl", methods=methods()[1:])
    assert model.config._attn_implementation == before


def test_a_sparse_method_that_reads_everything_fails_after_its_results(model, tokenizer, tmp_path):
    full = Method("oracle", make_selector("oracle"), PROTOCOL.budget(density=1.0))
    with pytest.raises(SparsePathError, match="every cached token"):
        run(model, tokenizer, tmp_path / "r.jsonl", methods=[full])
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 4


def test_a_sparse_method_with_only_dense_layers_fails_at_once(model, tokenizer, tmp_path):
    protocol = replace(PROTOCOL, dense_layers=(0, 1))
    with pytest.raises(SparsePathError, match="dense_layer"):
        run(model, tokenizer, tmp_path / "r.jsonl", protocol=protocol, methods=methods()[1:2])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], r"methods = \[\]: must be at least one"),
        ([Method("a"), Method("a")], "more than once"),
        ([Method("a", make_selector("oracle"), Protocol().budget(heavy=3))], "protocol.budget"),
    ],
)
def test_methods_that_cannot_be_compared_are_refused(model, tokenizer, tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        evaluate(model, tokenizer, records(), given, PROTOCOL, tmp_path / "r.jsonl")


def test_methods_need_a_budget_exactly_when_sparse():
    with pytest.raises(ValueError, match="needs a budget"):
        Method("oracle", make_selector("oracle"))
    for selector in (None, make_selector("dense")):
        with pytest.raises(ValueError, match="no budget"):
            Method("dense", selector, PROTOCOL.budget(heavy=3))


def test_answers_stop_at_the_stop_string_and_at_the_end_token(model, tokenizer):
    context = PrefilledContext(model, tokenizer(CONTEXTS[0])["input_ids"])

    def ask(stop, new_tokens=8):
        cache = context.fork()
        return greedy(model, tokenizer, cache, feed(model, [5, 6], cache), new_tokens, stop)

    free = ask("\0")
    assert len(free) == 8
    assert ask(free[3:5]) == free[: free.index(free[3:5])]
    assert ask("\0", 3) == free[:3]
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(free[2])
    try:
        assert ask("\0") == free[: free.index(free[2])]
        assert len(end_tokens(model)) == 1
    finally:
        model.generation_config.eos_token_id = None


def test_the_longest_answer_sets_the_length(model, tokenizer, tmp_path):
    protocol = replace(PROTOCOL, max_new_tokens=None, stop="\0")
    dense = [Method("dense")]
    frame = run(model, tokenizer, tmp_path / "r.jsonl", protocol=protocol, methods=dense)
    assert max(len(text) for text in frame["prediction"]) == len("my box") + 2


def test_tables_average_datasets_and_compare_with_dense(model, tokenizer, tmp_path):
    frame = run(model, tokenizer, tmp_path / "r.jsonl")
    frame["score"] = (frame["method"] == "dense") | (frame["dataset"] == "set0")
    scores, density = score_table(frame), density_table(frame)
    assert scores.loc["dense", "dense"] == 100 and scores.loc["lsh", "10 tokens"] == 50
    assert list(scores.index) == ["dense", "oracle", "lsh"]
    assert list(scores.columns) == ["dense", "30 tokens", "10 tokens"]
    assert density.loc["dense", "dense"] == 1.0 and density.loc["lsh", "10 tokens"] < 0.2
    assert dataset_table(frame).loc[("oracle", "30 tokens")].tolist() == [100, 0, 50]
    lines = comparison_table(frame).set_index(["method", "budget"])
    assert lines.loc[("dense", "dense"), "difference"] == 0
    assert lines.loc[("oracle", "30 tokens"), "difference"] == -50
    assert lines.loc[("oracle", "30 tokens"), "sparsity"] > 2


def test_datasets_of_unequal_size_weigh_the_same(model, tokenizer, tmp_path):
    frame = run(model, tokenizer, tmp_path / "r.jsonl", records=records()[:3])
    frame["score"] = (frame["method"] == "dense") | (frame["dataset"] == "set0")
    line = comparison_table(frame).set_index("method").loc["oracle"]
    assert line["score"] == 50 and line["difference"] == -50


def test_tables_refuse_mixed_protocols_samples_and_nothing(model, tokenizer, tmp_path):
    path = tmp_path / "r.jsonl"
    frame = run(model, tokenizer, path, methods=methods()[:2])
    with pytest.raises(ValueError, match="no results"):
        results_frame([])
    with pytest.raises(ValueError, match="baseline"):
        comparison_table(frame, baseline="full")
    with pytest.raises(ValueError, match="same records"):
        comparison_table(frame.iloc[:-1])
    with pytest.raises(ValueError, match="do not say by which protocol"):
        score_table(frame.drop(columns="protocol_fields"))
    both = run(model, tokenizer, path, methods=methods()[:2], setups="AB")
    tables = (score_table, density_table, dataset_table, bucket_table, comparison_table)
    for table in tables:
        with pytest.raises(ValueError, match="question: 'dense' or 'sparse'.*one setup"):
            table(both)
        table(both[both.setup == "B"])
    for changes, said in (
        ({"sink": 3, "local": 3}, "sink: 2 or 3; local: 4 or 3"),
        ({"max_new_tokens": 6}, "max_new_tokens: 5 or 6"),
        ({"template": "{context} {input}"}, r"template: .* or '{context} {input}'"),
    ):
        other = replace(PROTOCOL, **changes)
        dense = run(model, tokenizer, path, methods=[Method("dense")], protocol=other)
        with pytest.raises(ValueError, match=said) as refused:
            score_table(pd.concat([frame, dense]))
        assert "setup" not in str(refused.value)


def test_datasets_may_differ_in_how_they_are_asked_and_in_nothing_else(model, tokenizer, tmp_path):
    asked = {"set0": {"max_new_tokens": 3}, "set1": {"max_new_tokens": 4, "metric": "qa_f1"}}
    protocol = replace(PROTOCOL, datasets=asked)
    frame = run(model, tokenizer, tmp_path / "r", methods=methods()[:2], protocol=protocol)
    assert frame["protocol"].nunique() == 2
    score_table(frame)
    frame["protocol_fields"] = [
        fields | {"seed": int(dataset[-1])}
        for fields, dataset in zip(frame["protocol_fields"], frame["dataset"], strict=True)
    ]
    with pytest.raises(ValueError, match="differ in seed: 0 or 1"):
        score_table(frame)


def test_both_setups_run_and_dense_answers_once(model, tokenizer, tmp_path):
    path = tmp_path / "r.jsonl"
    frame = run(model, tokenizer, path, setups="AB")
    assert frame["setup"].value_counts().to_dict() == {"A": 16, "B": 16}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 4 + 2 * 12  # dense once
    of = {setup: frame[frame.setup == setup] for setup in "AB"}
    dense = [part[part.method == "dense"].prediction.tolist() for part in of.values()]
    assert dense[0] == dense[1]
    for setup, part in of.items():
        protocol = PROTOCOL.in_setup(setup)
        assert set(part["protocol"]) == {protocol.fingerprint}
        assert Protocol(**part["protocol_fields"].iloc[0]) == protocol
        alone = run(model, tokenizer, tmp_path / setup, protocol=protocol)
        assert alone["prediction"].tolist() == part["prediction"].tolist()
        assert alone["density"].tolist() == part["density"].tolist()
    assert of["A"]["density"].tolist() != of["B"]["density"].tolist()
    table = setup_table(frame)
    assert list(table.index) == list(dict.fromkeys(zip(frame.method, frame.budget, strict=True)))
    for setup, part in of.items():
        assert table[setup].tolist() == score_table(part).stack().reindex(table.index).tolist()
    with pytest.raises(ValueError, match="no rows of setup"):
        setup_table(of["A"])


def test_sharing_is_measured(model, tokenizer, tmp_path):
    frame = run(model, tokenizer, tmp_path / "r", setups="AB")
    table = sharing_table(frame)
    assert table.loc["prefill", "runs"] == len(CONTEXTS)
    assert table.loc["question", "runs"] == len(records())
    assert table.loc["answer", "runs"] == 4 + 2 * 12
    seconds = frame.drop_duplicates("key")["prefill_seconds"]
    assert table.loc["prefill", "seconds"] == pytest.approx(sum(set(seconds)))
    assert table.loc["prefill", "seconds alone"] == pytest.approx(seconds.sum())
    assert 0.5 < table.loc["prefill", "saved"] < 1 and table.loc["answer", "saved"] == 0
    assert 0 < table.loc["all", "saved"] < 1


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_question_read_once_is_that_of_every_reading(family, tokenizer):
    model = tiny_model(family)
    context = PrefilledContext(model, tokenizer(CONTEXTS[0])["input_ids"])
    question = tokenizer("\nwho is it")["input_ids"]
    read = context.read(question)
    assert context.read(question) is read
    assert (read.states is None) == (family == "gemma2")  # a sliding window keeps too little
    fed, appended = context.fork(), context.fork()
    assert feed(model, question, fed) == read.first
    context.append(appended, read)
    for mine, theirs in zip(appended.layers, fed.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
    assert context.read(question, {read.first}).first != read.first
