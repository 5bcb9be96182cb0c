"""RULER's 13 tasks satisfy their definitions at every length, checked from the text of the records.

The solvers here parse prompts on their own and never ask the generators.
"""

import re
from collections import Counter
from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hashattn.base.repository import repository
from hashattn.evaluation.benchmarks.corpus import paragraphs
from hashattn.evaluation.benchmarks.ruler import TASKS, ruler_protocol, ruler_records
from hashattn.evaluation.benchmarks.ruler.questions import question_set

NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
DEPTHS = [round(100 * i / 39) for i in range(40)]
NOISE = (
    "Rain falls on the hill. A boat drifts down the river. The evening is long. "
    "Nobody is in a hurry. Then it all starts over."
)
NEEDLE = re.compile(r"A secret (number|uuid) for (\S+) is: (\S+)\.")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


@cache
def tokenizers(name):
    """The embedded one, a byte-level BPE of 8,000 entries, and one with a token a word."""
    if name == "embedded":
        return AutoTokenizer.from_pretrained(
            repository() / "data" / "embedded", local_files_only=True
        )
    if name == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=8000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
        tokenizer.train_from_iterator(paragraphs("train"), trainer)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def family(task):
    return task.split("_")[0]


def check_length(record, tokenizer, length):
    """Prompt and answer, counted again: at most the length, at least 99 % of it."""
    text = record.context + record.input
    tokens = len(tokenizer(text, verbose=False)["input_ids"]) + NEW_TOKENS[family(record.dataset)]
    assert record.length == tokens
    assert 0.99 * length <= tokens <= length
    assert record.context.endswith("\n")  # where no token spans context and question


def check_retrieval(record, length):
    task = record.dataset
    body = record.context.split("\n", 1)[1]
    found = [(key, value) for _, key, value in NEEDLE.findall(body)]
    asked = re.search(r"gives? for (.*)\? ", record.input)[1].replace(" and ", " ").split(", ")
    given = {key: [v for k, v in found if k == key] for key in asked}
    assert sorted(record.answers) == sorted(v for values in given.values() for v in values)
    assert [len(values) for values in given.values()] == [4 if task == "niah_multivalue" else 1] * (
        4 if task == "niah_multiquery" else 1
    )
    assert all(body.count(answer) == 1 for answer in record.answers)
    check_values(task, found)
    if task in ("niah_multikey_2", "niah_multikey_3"):
        lines = body.strip().split("\n")
        unlike = [line for line in lines if not NEEDLE.fullmatch(line)]
        assert len(lines) - len(unlike) == len(found) > 7
        assert "\n".join([NOISE] * 8).startswith("\n".join(unlike))  # fills what no needle fits
        if length >= 8192 and len(found) > 200:
            assert not unlike
    elif task == "niah_single_1":
        lines = [line for line in body.strip().split("\n") if not NEEDLE.fullmatch(line)]
        assert len(found) == 1 and len(body.strip().split("\n")) == len(lines) + 1
        assert all(line == NOISE for line in lines[:-1]) and NOISE.startswith(lines[-1])
    else:
        expected = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}
        assert len(found) == expected.get(task, 1)
        check_depths(body)


def check_values(task, found):
    uuids = task in ("niah_single_3", "niah_multikey_3")
    for key, value in found:
        assert UUID.fullmatch(value) if uuids else re.fullmatch(r"[1-9]\d{6}", value)
        if task == "niah_multikey_3":
            assert UUID.fullmatch(key)
        else:
            assert re.fullmatch(r"[a-z]+-[a-z]+", key)


def check_depths(body):
    """Every needle stands after int(sentences * depth / 100) sentences, each at its own depth."""
    body = body.split(" Rain")[0].strip()  # words of noise that fill a short prompt
    pieces = re.split(NEEDLE.pattern.replace("(", "(?:"), body)
    counts = [len(re.findall(r"[.!?](?=\s)|\S$", piece.strip())) for piece in pieces]
    total = sum(counts)
    allowed = {int(total * depth / 100) for depth in DEPTHS}
    before = [sum(counts[: i + 1]) for i in range(len(counts) - 1)]
    assert set(before) <= allowed


def check_tracking(record, length):
    title = "Follow the assignments"
    assert record.context.count(title) == 2
    example, asked = record.context.split(title)[1:]
    value = re.search(r"the value (\d{5}) in", record.input)[1]
    check_chain(asked, value, record.answers, letters=5)
    solved = re.search(r"the value (\d{5})\. They are: (.*)", example)
    check_chain(example.split("Question")[0], solved[1], solved[2].split(), letters=3)
    assert f"5 variables have the value {value}" in record.input


def check_chain(text, value, answers, letters):
    lines = text.strip().split("\n")
    assigned = [line for line in lines if line.startswith("VAR ")]
    noise = [line for line in lines[1:] if line and not line.startswith("VAR ")]
    assert all(line == NOISE for line in noise[:-1]) and NOISE.startswith(noise[-1])
    assert len(noise) >= 5
    known = []
    for line in assigned:  # in the order of the text: nothing is used before it is known
        name, right = re.fullmatch(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", line).groups()
        assert right == (known[-1] if known else value)
        known.append(name)
    assert len(set(known)) == len(known) == 5
    assert {len(name) for name in known} == {letters}
    assert list(answers) == known


def check_common_words(record, length):
    example, asked = record.context.split("This is a numbered list")[1:]
    often, seldom = (6, 1) if length < 4096 else (30, 3)
    assert set(common_words(asked, often, seldom)) == set(record.answers)
    text, solution = example.rsplit("Answer:", 1)
    size, *repeats = (20, 3, 1) if length < 4096 else (40, 10, 3)
    listed = [word for _, word in re.findall(r"(\d+)\. (\S+)", solution)]
    assert set(common_words(text, *repeats)) == set(listed)
    assert len(set(entries(text))) == size


def common_words(text, often, seldom):
    counts = Counter(entries(text))
    assert set(counts.values()) == {often, seldom}
    common = [word for word, times in counts.items() if times == often]
    assert len(common) == 10
    return common


def entries(text):
    found = re.findall(r"(\d+)\. ([a-z]+)\b", text)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [word for _, word in found]


def check_frequent_words(record, length):
    words = record.context.split("\n", 1)[1].split()
    (dots, *ranked) = Counter(words).most_common()
    assert dots[0] == "..."
    assert [word for word, _ in ranked[:3]] == list(record.answers)
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked)
    assert len(ranked) < (length - 50) // 50
    # one share that, divided by rank squared and rounded down, gives every count
    counts = [times for _, times in ranked]
    low = max(times * rank**2 for rank, times in enumerate(counts, 2))
    high = min((times + 1) * rank**2 for rank, times in enumerate(counts, 2))
    assert low < high
    assert dots[1] >= low and dots[1] - high < 0.02 * length


def check_answering(record, length):
    source = question_set({"qa_1": "squad", "qa_2": "hotpotqa"}[record.dataset], "corpus")
    text = re.search(r"Question: (.*) Answer:$", record.input)[1]
    (asked,) = [question for question in source.questions if question.text == text]
    assert record.answers == asked.answers
    body = record.context.split("These are the documents.\n\n")[1].rsplit("\n\nAnswer the", 1)[0]
    parts = re.split(r"(?:^|\n\n)Document (\d+):\n", body)[1:]
    assert [int(number) for number in parts[::2]] == list(range(1, len(parts) // 2 + 1))
    documents = Counter(parts[1::2])
    gold = [source.documents[i] for i in asked.gold]
    assert len(gold) == {"qa_1": 1, "qa_2": 2}[record.dataset]
    for document in gold:
        assert documents[document] == 1
        assert all(answer in document for answer in asked.answers)
    others = set(documents) - set(gold)
    cut = others - set(source.documents)
    assert len(cut) <= 1 and all(
        any(document.startswith(part) for document in source.documents) for part in cut
    )
    near = {source.documents[i] for i in asked.near}
    whole = others - cut
    assert near <= whole if len(whole) >= len(near) else whole <= near
    named = record.answers if record.dataset == "qa_1" else re.findall('says "(.*?)"', text)
    assert named and not any(name in document for name in named for document in others)


CHECKS = {
    "niah": check_retrieval,
    "vt": check_tracking,
    "cwe": check_common_words,
    "fwe": check_frequent_words,
    "qa": check_answering,
}


LENGTHS = {"embedded": (1024, 4096, 32768), "bytes": (1024, 4096, 32768), "words": (1024, 4096)}
LONGEST = ("niah_multiquery", "vt", "cwe", "fwe", "qa_2")  # one of each family at 128K
SAMPLES = [
    *((name, length, task) for name in LENGTHS for length in LENGTHS[name] for task in TASKS),
    *(("embedded", 131072, task) for task in LONGEST),
]


@pytest.mark.parametrize(("name", "length", "task"), SAMPLES)
def test_samples_satisfy_their_definition(name, length, task):
    tokenizer = tokenizers(name)
    samples = {1024: 6, 4096: 3}.get(length, 1)
    made = list(ruler_records(tokenizer, task, length, samples, seed=3))
    assert len({record.context for record in made}) == samples
    for record in made:
        check_length(record, tokenizer, length)
        CHECKS[family(task)](record, length)
        assert record.dataset == task


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
def test_needles_lie_at_all_depths(task):
    tokenizer = tokenizers("words")
    records = list(ruler_records(tokenizer, task, 1024, 60))
    bodies = [record.context.split("\n", 1)[1] for record in records]
    places = [
        body.index(record.answers[0]) / len(body)
        for body, record in zip(bodies, records, strict=True)
    ]
    tenths = Counter(int(10 * place) for place in places)
    assert len(tenths) >= 9 and max(tenths.values()) < 20
    if task == "niah_single_2":  # prose is read from another sentence on in every sample
        assert len({body[:40] for body in bodies}) > 50


def test_no_distractor_repeats_what_is_asked():
    """Four-digit values and 9,500 keys: without care, one in ten samples would have a double."""
    for record in ruler_records(tokenizers("words"), "niah_multikey_2", 8192, 20, style="facts"):
        key = record.input.removeprefix("Q: ").removesuffix(" =")
        assert len(re.findall(rf"^Fact: {key} = ", record.context, re.MULTILINE)) == 1
        assert len(re.findall(rf" = {record.answers[0]}$", record.context, re.MULTILINE)) == 1


def test_the_solved_chain_shares_no_variable_with_the_asked_one():
    for record in ruler_records(tokenizers("embedded"), "vt", 1024, 20, style="facts"):
        rules = re.findall(r"^Rule: (\w+) needs (\w+)$", record.context, re.MULTILINE)
        assert len({right for _, right in rules}) == len(rules) == 10


def test_published_parameters():
    assert len(TASKS) == 13
    for task in TASKS:
        protocol = ruler_protocol(task)
        assert ruler_protocol().of(task) == protocol
        assert protocol.max_new_tokens == NEW_TOKENS[family(task)]
        assert protocol.metric == f"string_match_{'part' if family(task) == 'qa' else 'all'}"
