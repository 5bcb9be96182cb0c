"""The generated tasks: answers are in the context once, splits never share a line, records load."""

import random
import re

import pytest
from transformers import AutoTokenizer

from hashattn.base.repository import repository
from hashattn.evaluation.benchmarks import words
from hashattn.evaluation.benchmarks.corpus import corpus_path, paragraphs, split_of
from hashattn.evaluation.benchmarks.generated import (
    TASKS,
    draw_facts,
    make_records,
    make_sequences,
    scatter,
)

PREFIX = {"lookup": "Note", "multihop": "Rule", "needle": "Fact", "fewshot": "Text",
          "passage": "Abstract", "code": "def"}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(repository() / "data" / "embedded", local_files_only=True)


@pytest.fixture(scope="module")
def records(tokenizer):
    return list(make_records(tokenizer, 1024, 3, seed=0))


def test_records_have_longbench_fields_and_unique_ids(records):
    fields = {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"}
    assert all(set(record) == fields for record in records)
    assert len({record["_id"] for record in records}) == len(records) == 3 * 2 * len(TASKS)
    assert {record["dataset"] for record in records} == set(TASKS)


def test_length_counts_context_tokens_within_the_limit(records, tokenizer):
    for record in records:
        counted = len(tokenizer(record["context"], add_special_tokens=False)["input_ids"])
        assert record["length"] == counted <= 1024 - 32


def solve(task: str, question: str, context: str) -> str:
    """Answer by string search, independently of the generator."""
    lines = context.splitlines()
    if task == "multihop":
        needs = dict(re.findall(r"^Rule: (\w+) needs (\w+)$", context, re.MULTILINE))
        first = needs[question.split()[0]]
        return f"{first} needs {needs[first]}"
    if task == "fewshot":
        keyword = question.split()[-2]
        found = {line.split()[-1] for line in lines
                 if line.startswith("Text: ") and f" {keyword} => " in line}  # fmt: skip
    elif task == "code":
        found = {line.removeprefix(f"def {question}") for line in lines
                 if line.startswith(f"def {question}(")}  # fmt: skip
    else:
        start = f"{PREFIX[task]}: {question} "
        found = {line.removeprefix(start) for line in lines if line.startswith(start)}
    assert len(found) == 1, (task, question, found)
    return found.pop()


def test_every_question_has_exactly_its_answer_in_the_context(records):
    for record in records:
        answer = solve(record["dataset"], record["input"], record["context"])
        assert record["answers"] == [answer]


def test_needle_keys_share_halves_with_distractors():
    facts = draw_facts("needle", 16, random.Random(0), "eval").facts
    keys = [tuple(fact.split()[1:3]) for fact in facts]
    for adjective, animal in keys:
        assert sum(a == adjective for a, _ in keys) >= 2
        assert sum(b == animal for _, b in keys) >= 2


def test_training_and_evaluation_never_share_a_line():
    seen = {"train": set(), "eval": set()}
    for split in seen:
        for seed in range(40):
            for task in TASKS:
                seen[split] |= set(draw_facts(task, 12, random.Random(seed), split).facts)
        seen[split] |= set(paragraphs(split))
        assert all(split_of(line) == split for line in seen[split])
    assert len(seen["eval"]) > 3000
    assert not seen["train"] & seen["eval"]


def test_corpus_splits_cover_the_file():
    lines = corpus_path().read_text().splitlines()
    assert len(paragraphs("train")) + len(paragraphs("eval")) == len(lines) == 4646


def test_every_task_word_is_one_token(tokenizer):
    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    groups = [group for group in vars(words).values() if isinstance(group, tuple)]
    assert len(groups) == 9
    assert all(tokens(f" {word}") == 1 for group in groups for word in group)
    assert all(tokens(f"_{word}") == 1 for word in words.OBJECTS)
    assert all(tokens(f"({word}") == 1 for word in words.ANIMALS)


def test_same_seed_same_records_other_seed_others(tokenizer, records):
    assert list(make_records(tokenizer, 1024, 3, seed=0)) == records
    other = {record["context"] for record in make_records(tokenizer, 1024, 3, seed=1)}
    assert not other & {record["context"] for record in records}


def test_sequences_end_with_the_asked_rows(tokenizer):
    ((ids, rows),) = make_sequences(tokenizer, 1024, 1, seed=0, questions_per_task=2)
    assert len(ids) <= 1024 and ids[0] == tokenizer.bos_token_id
    assert rows == list(range(rows[0], len(ids)))
    assert tokenizer.decode(ids[rows[0] :]).count("Q: ") == 2 * len(TASKS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: draw_facts("poetry", 4, random.Random(0), "eval"), "task = .* must be one of"),
        (lambda t: draw_facts("code", 1, random.Random(0), "eval"), "size = 1: must be"),
        (lambda t: draw_facts("code", 4, random.Random(0), "test"), "split = .* must be"),
        (lambda t: list(make_records(t, 64, 1, seed=0)), "tokens = 64: must be"),
        (lambda t: scatter(["a b c"], 2, lambda s: len(s.split()), random.Random(0), "eval"),
         "more than the 2 allowed"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        call(tokenizer)
