"""Benchmark records as training sequences: what the rows ask for, as evaluation asks it."""

import pytest
import torch

from hashattn.evaluation.benchmarks.generated import TASKS, make_records, make_sequences
from hashattn.evaluation.benchmarks.longbench import fine_tuning_split
from hashattn.evaluation.benchmarks.longbench_protocol import by_the_book, load_prompts
from hashattn.evaluation.fine_tuning import fine_tuning_sequences, joined
from hashattn.evaluation.prompting import encode_prompt
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record
from hashattn.hashing import train_hash_weights
from hashattn.hashing.recipe import TrainRecipe
from hashattn.reproduce.access import load_model
from hashattn.reproduce.profiles import load_profile

TEXT = "The museum opens at nine in the morning and closes late.\n" * 40


@pytest.fixture(scope="module")
def loaded():
    return load_model(load_profile("tiny"))


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


def only(record, protocol, tokenizer, **options):
    ((ids, rows),) = fine_tuning_sequences([record], protocol, tokenizer, **options)
    return ids, rows


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_the_question_and_the_answer_as_the_task_trains_them(tokenizer, task):
    """Word for word what make_sequences, which trained the model, writes after "Q: "."""
    made = make_records(tokenizer, 1024, 1, seed=3, tasks=(task,), questions_per_task=1)
    record = Record(**next(made))
    ids, rows = only(record, Protocol(), tokenizer)
    said = tokenizer.decode(ids[rows]).strip()
    space = "" if task == "code" else " "
    assert said == f"{record.input}{space}{record.answers[0]}"
    assert rows.tolist() == list(range(int(rows[0]), len(ids)))
    assert tokenizer.decode(ids[: rows[0]]).endswith("\nQ:")
    context, question = encode_prompt(tokenizer, Protocol(), record)
    assert ids[: len(context) + len(question)].tolist() == context + question
    trained = make_sequences(tokenizer, 1024, 1, seed=3, tasks=(task,), questions_per_task=1)
    tail = [t for t, rows in trained for t in torch.tensor(t)[rows].tolist()]
    assert len(tail) - len(rows) in (1, 2, 3)  # it has "Q", ":" and the line's end as well


def test_a_truncated_prompt_keeps_its_question_and_answer(tokenizer):
    record = Record("When does it open?", TEXT, ("at nine",), dataset="qasper")
    prompts = load_prompts()
    whole, limit = (by_the_book(prompts, n, chat=False) for n in (None, 300))
    long, short = (only(record, protocol, tokenizer) for protocol in (whole, limit))
    assert len(long[0]) > 500 and 250 < len(short[0]) <= 310
    assert tokenizer.decode(short[0][short[1]]) == tokenizer.decode(long[0][long[1]])
    said = tokenizer.decode(short[0][short[1]])
    assert "When does it open?" in said and said.endswith("at nine")
    refused = Protocol(max_context=100)
    with pytest.raises(ValueError, match="raise max_context"):
        only(record, refused, tokenizer)


def test_an_answer_ends_where_evaluation_stops_generating(tokenizer):
    record = Record("How often?", TEXT, ("nine " * 50,))
    lengths = [
        len(only(record, Protocol(max_new_tokens=most), tokenizer)[0]) for most in (1, 5, None)
    ]
    assert lengths[1] - lengths[0] == 4 and lengths[2] > lengths[1] + 30


@pytest.mark.parametrize(
    "prompt, answer, language, text",
    [
        ("Answer:", "Kyoto", "en", " Kyoto"),
        ("next line:\n", "x = 1", "code", "x = 1"),
        ("brave_anchor", "(falcon)", "en", "(falcon)"),
        ("答案：", "京都", "zh", "京都"),
        ("", "Kyoto", "en", " Kyoto"),
    ],
)
def test_words_are_kept_apart(prompt, answer, language, text):
    assert joined(prompt, answer, language) == text


def test_the_joint_can_be_given_and_the_first_answer_counts(tokenizer):
    record = Record("Who?", TEXT, ("Alice", "Bob"))
    for joint in ("", " ", "\n"):
        ids, rows = only(record, Protocol(), tokenizer, joint=joint)
        assert tokenizer.decode(ids[rows]).endswith(f"Who?{joint}Alice")


def test_an_answer_without_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match="'a' of 'qasper' has the answer ''.*leave it out"):
        only(Record("Who?", TEXT, ("",), dataset="qasper", _id="a"), Protocol(), tokenizer)


def test_tokenizers_that_begin_with_a_space_get_the_answer_as_it_follows():
    """SentencePiece's way: whatever text comes, a space goes before it."""

    class Spaced:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [*([1] if add_special_tokens else []), *map(ord, " " + text)]}

        def decode(self, ids):
            return "".join(map(chr, ids)).removeprefix(" ")

    ids, rows = only(Record("Who", "text", ("Al",)), Protocol(), Spaced())
    assert "".join(map(chr, ids[rows])) == " Who Al"


def test_the_papers_split_of_longbench_records_trains_hashes(loaded, tmp_path):
    """25 of 200 records of a dataset, through the dataset's own prompt, into hash weights."""
    model, tokenizer = loaded
    records = [
        Record(f"When is number {i}?", f"{TEXT[:300]} {i}", (f"at {i}",), dataset="hotpotqa")
        for i in range(200)
    ]
    split = fine_tuning_split(records)
    protocol = by_the_book(load_prompts(), 200, chat=False)
    made = fine_tuning_sequences(split.train, protocol, tokenizer)
    assert len(made) == 25 and "number 175?" in tokenizer.decode(made[0][0][made[0][1]])
    recipe = TrainRecipe.fine_tuning().vary(steps=2, evaluate_every=1, top=4)
    weights = train_hash_weights(
        model, made, recipe, out_dir=tmp_path, layers=[1], hidden=16, progress=False
    )
    assert weights.card["data"]["train"]["sequences"] == 22
