"""RULER's records beside their definition: sizes, sources, official files, styles, determinism."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hashattn.base.repository import repository
from hashattn.evaluation.benchmarks.ruler import (
    TASKS,
    Haystack,
    RulerError,
    load_ruler,
    profile_records,
    ruler_protocol,
    ruler_records,
)
from hashattn.evaluation.benchmarks.ruler.draws import Vocabulary
from hashattn.evaluation.benchmarks.ruler.questions import (
    hotpot_of_rows,
    question_set,
    squad_of_rows,
)
from hashattn.evaluation.benchmarks.ruler.sizing import CLOSE, largest_fit
from hashattn.evaluation.benchmarks.ruler.styles import NOISE
from hashattn.evaluation.methods import Method
from hashattn.evaluation.metrics import METRICS
from hashattn.evaluation.runner import evaluate
from hashattn.reproduce.profiles import RulerRuns


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(repository() / "data" / "embedded", local_files_only=True)


def one(tokenizer, task, length=1024, **options):
    (record,) = ruler_records(tokenizer, task, length, 1, **options)
    return record


@pytest.mark.parametrize(
    ("prediction", "answers", "every", "some"),
    [
        ("the values are 12 and 34.", ["12", "34"], 1.0, 1.0),
        ("CAT dog", ["cat", "cow", "Dog", "hen"], 0.5, 1.0),
        ("", ["cat"], 0.0, 0.0),
        ("concatenate", ["cat", "dog"], 0.5, 1.0),
    ],
)
def test_string_match_counts_answers_within_the_prediction(prediction, answers, every, some):
    assert METRICS["string_match_all"](prediction, answers) == every
    assert METRICS["string_match_part"](prediction, answers) == some


@pytest.mark.parametrize("seed", range(20))
def test_largest_fit_fills_or_stops_at_the_last_unit(seed):
    rng = random.Random(seed)
    costs = [rng.choice((0, 1, 2, 9)) for _ in range(20_000)]
    sums = [7]
    for cost in costs:
        sums.append(sums[-1] + cost)
    calls = []

    def tokens(size):
        calls.append(size)
        return sums[size]

    limit = rng.randrange(100, 3000)
    size, used = largest_fit(tokens, limit, 3, rng.choice((1, 8, 256)))
    assert used == sums[size] <= limit
    assert limit - used <= limit / CLOSE or sums[size + 1] > limit
    assert len(calls) < 30


def test_largest_fit_needs_few_prompts_where_units_cost_the_same():
    calls = []
    size, used = largest_fit(lambda n: calls.append(n) or 50 + 13 * n, 1_000_000, 1, 64)
    assert (size, used) == (76_919, 999_997) and len(calls) <= 4


def test_largest_fit_refuses_what_cannot_fit():
    with pytest.raises(RulerError, match="has 120 tokens and only 100 are left"):
        largest_fit(lambda size: 120 + size, 100, 0, 1)


def test_a_sample_is_the_same_in_every_process_and_number(tokenizer):
    """Also with other hash seeds: no order of a set reaches a record."""

    def digest(records):
        return hashlib.sha256(json.dumps([r.to_dict() for r in records]).encode()).hexdigest()

    here = list(ruler_records(tokenizer, TASKS, 2048, 2, seed=5))
    code = (
        "import hashlib, json\n"
        "from transformers import AutoTokenizer\n"
        "from hashattn.evaluation.benchmarks.corpus import corpus_path\n"
        "from hashattn.evaluation.benchmarks.ruler import TASKS, ruler_records\n"
        "folder = corpus_path().parents[1] / 'embedded'\n"
        "t = AutoTokenizer.from_pretrained(folder, local_files_only=True)\n"
        "made = [r.to_dict() for r in ruler_records(t, TASKS, 2048, 2, seed=5)]\n"
        "print(hashlib.sha256(json.dumps(made).encode()).hexdigest())\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "99", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == digest(here)
    first = list(ruler_records(tokenizer, TASKS, 2048, 1, seed=5))
    assert first == here[::2]
    assert not {r.context for r in ruler_records(tokenizer, TASKS, 2048, 1, seed=6)} & {
        r.context for r in here
    }


def test_records_name_their_source(tokenizer, tmp_path):
    text = "It was noon. " + "The ship lay at anchor. " * 50
    path = tmp_path / "tale.txt"
    path.write_text(text)
    essays = tmp_path / "essays.json"
    essays.write_text(json.dumps({"text": text}))
    for haystack in (path, essays, Haystack(text, "tale")):
        record = one(tokenizer, "niah_single_2", haystack=haystack)
        body = record.context.split("\n", 1)[1]
        rest = re.sub(r"A secret number for \S+ is: \d+\.", "", body)
        assert set(rest.split()) <= set(f"{text} {' '.join(NOISE)}".split())
        assert getattr(haystack, "stem", "tale") in record._id
    assert one(tokenizer, "niah_single_2", seed=4)._id == "niah_single_2/plain/corpus/1024/4/0"
    assert one(tokenizer, "qa_1")._id.split("/")[2] == "corpus"
    with pytest.raises(RulerError, match="no haystack at"):
        one(tokenizer, "niah_single_2", haystack=tmp_path / "none.txt")
    with pytest.raises(RulerError, match="holds no text"):
        Haystack(" \n", "empty")
    essays.write_text("[]")
    with pytest.raises(RulerError, match="not RULER's JSON"):
        one(tokenizer, "niah_single_2", haystack=essays)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "niah_single_4"}, "task = 'niah_single_4': must be one of niah_single_1"),
        ({"length": 1000}, "must be 1024 to 1048576"),
        ({"length": 2**20 + 1}, "must be 1024 to 1048576"),
        ({"samples": 0}, "samples = 0"),
        ({"style": "verse"}, "must be one of plain, facts"),
        ({"qa": "/nowhere", "tasks": "qa_2"}, "put hotpot_dev_distractor_v1.json or hotpotqa.json"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_bad_input_is_refused(tokenizer, options, message):
    options = {"tasks": "vt", "length": 1024, "samples": 1} | options
    with pytest.raises(RulerError, match=re.escape(message)):
        list(ruler_records(tokenizer, **options))


def test_chat_puts_the_answers_opening_after_the_header():
    tokenizer = AutoTokenizer.from_pretrained(
        repository() / "data" / "embedded", local_files_only=True
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    plain, chat = (one(tokenizer, "niah_single_1", chat=chat) for chat in (False, True))
    assert chat.context.startswith("<user>The text below hides")
    question, prefix = chat.input.split("</><assistant>")
    assert question + prefix == plain.input and prefix.startswith(" The secret number")
    assert len(tokenizer(chat.context + chat.input)["input_ids"]) + 128 == chat.length <= 1024


# Few and of their own make, in the structures of the official files.
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Rivers",
            "paragraphs": [
                {
                    "context": "The Alder is 90 km long.",
                    "qas": [
                        {
                            "question": "How long is the Alder?",
                            "id": "a1",
                            "answers": [
                                {"text": "90 km", "answer_start": 13},
                                {"text": "90", "answer_start": 13},
                                {"text": "90 km", "answer_start": 13},
                            ],
                            "is_impossible": False,
                        },
                        {"question": "How deep?", "id": "a2", "answers": [], "is_impossible": True},
                    ],
                },
                {"context": "The Birk rises in the hills.", "qas": []},
            ],
        },
        {"title": "Hills", "paragraphs": [{"context": "The Knoll is low.", "qas": []}]},
    ],
}
HOTPOT = [
    {
        "question": "Who leads the town on the Alder?",
        "answer": "Ida Holm",
        "supporting_facts": [["Elmford", 0], ["Holm", 1]],
        "context": [
            ["Holm", ["Ida Holm is an engineer.", " She leads Elmford."]],
            ["Oakham", ["Oakham is a town."]],
            ["Elmford", ["Elmford lies on the Alder."]],
        ],
    }
]


def write_official(folder):
    (folder / "dev-v2.0.json").write_text(json.dumps(SQUAD))
    (folder / "hotpotqa.json").write_text(json.dumps(HOTPOT))


def test_official_question_files_load(tokenizer, tmp_path):
    write_official(tmp_path)
    squad = question_set("squad", str(tmp_path))
    (asked,) = squad.questions
    assert asked.text == "How long is the Alder?" and asked.answers == ("90 km", "90")
    assert [squad.documents[i] for i in asked.gold] == ["The Alder is 90 km long."]
    assert [squad.documents[i] for i in asked.near] == ["The Birk rises in the hills."]
    assert len(squad.documents) == 3
    hotpot = question_set("hotpotqa", str(tmp_path / "hotpotqa.json"))
    (asked,) = hotpot.questions
    assert [hotpot.documents[i] for i in asked.gold] == [
        "Elmford\nElmford lies on the Alder.",
        "Holm\nIda Holm is an engineer. She leads Elmford.",
    ]
    assert [hotpot.documents[i] for i in asked.near] == ["Oakham\nOakham is a town."]
    record = one(tokenizer, "qa_1", qa=str(tmp_path))
    assert record.answers == ("90 km", "90") and record._id.split("/")[2].startswith("dev-v2.0@")
    assert record.context.count("The Alder is 90 km long.") == 1  # only distractors repeat
    assert record.context.count("The Knoll is low.") > 9
    (tmp_path / "dev-v2.0.json").write_text('{"data": [{"title": "Rivers"}]}')
    with pytest.raises(RulerError, match="not in the official format of squad: 'paragraphs'"):
        question_set("squad", str(tmp_path / "dev-v2.0.json"))
    (tmp_path / "squad.json").write_text('{"data": []}')
    with pytest.raises(RulerError, match="no answerable question"):
        question_set("squad", str(tmp_path / "squad.json"))


def test_rows_of_the_hub_are_the_official_files(tmp_path):
    """The hub's tables, made here in its columns, give the same questions."""
    from datasets import Dataset

    squad = Dataset.from_list([
        {
            "id": asked["id"],
            "title": article["title"],
            "context": paragraph["context"],
            "question": asked["question"],
            "answers": {
                "text": [a["text"] for a in asked["answers"]],
                "answer_start": [a["answer_start"] for a in asked["answers"]],
            },
        }
        for article in SQUAD["data"]
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ])  # fmt: skip
    (article,) = squad_of_rows(squad)["data"]
    assert article["title"] == "Rivers"
    (paragraph,) = article["paragraphs"]  # the others have no question, so the hub lacks them
    assert [asked["is_impossible"] for asked in paragraph["qas"]] == [False, True]
    assert [a["text"] for a in paragraph["qas"][0]["answers"]] == ["90 km", "90", "90 km"]
    hotpot = Dataset.from_list([
        {
            "question": row["question"],
            "answer": row["answer"],
            "context": {
                "title": [title for title, _ in row["context"]],
                "sentences": [sentences for _, sentences in row["context"]],
            },
            "supporting_facts": {
                "title": [title for title, _ in row["supporting_facts"]],
                "sent_id": [number for _, number in row["supporting_facts"]],
            },
        }
        for row in HOTPOT
    ])  # fmt: skip
    assert json.loads(json.dumps(hotpot_of_rows(hotpot))) == [
        {key: row[key] for key in ("question", "answer", "context", "supporting_facts")}
        for row in HOTPOT
    ]


@pytest.mark.parametrize("dataset", ["squad", "hotpotqa"])
def test_offline_questions_are_answered_by_their_documents_alone(dataset):
    made = question_set(dataset, "corpus")
    assert len({question.text for question in made.questions}) == len(made.questions) > 70
    for question in made.questions:
        (answer,) = question.answers
        gold = [made.documents[i] for i in question.gold]
        assert all(answer in document for document in gold)
        assert answer not in question.text
        if dataset == "squad":
            before, after = re.search(r'"(.*)"\?$', question.text)[1].split("____")
            assert f"{before}{answer}{after}" in gold[0]
            holders = [document for document in made.documents if answer in document.split()]
            assert set(holders) <= set(gold)
        else:
            quoted = re.findall(r'says "(.*?)"(?: and in|\?$)', question.text)
            assert [q in d for q in quoted for d in gold] == [True, False, False, True]
            assert len(question.near) == 8


def test_official_ruler_files_load(tmp_path):
    folder = tmp_path / "vt"
    folder.mkdir()
    lines = [
        {
            "index": 4,
            "input": "Track this.\n\nVAR A = 1\nnoise\nQuestion: Which are 1?",
            "outputs": ["A", "B"],
            "length": 99,
            "length_w_model_temp": 99,
            "answer_prefix": " Answer: they are:",
        },
        {"input": "x\nQuestion?\n\n", "outputs": ["A"]},
    ]
    path = folder / "validation.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = load_ruler(folder)
    assert load_ruler(path, limit=1) == [first]
    assert first.context + first.input == lines[0]["input"] + lines[0]["answer_prefix"]
    assert first.input == "Question: Which are 1? Answer: they are:"
    assert (first.answers, first.length, first.dataset) == (("A", "B"), 99, "vt")
    assert (first._id, second._id) == ("vt/official/4", "vt/official/2")
    assert second.input == "Question?\n\n"
    for broken, message in (
        ("{", "validation.jsonl:1 is not JSON"),
        ('{"input": "a\\nb"}', "no field 'outputs'"),
        ('{"input": "a b", "outputs": ["c"]}', "no line break before the question"),
        ('{"input": "a\\nb", "outputs": []}', "answers = .*at least one text"),
        ("[]", "validation.jsonl:1: "),
        ("", "holds no samples"),
    ):
        path.write_text(broken + "\n")
        with pytest.raises(RulerError, match=message):
            load_ruler(folder)
    with pytest.raises(RulerError, match="no RULER samples at"):
        load_ruler(tmp_path / "none.jsonl", task="vt")
    with pytest.raises(RulerError, match="task = 'essay': must be one of niah_single_1"):
        load_ruler(path, task="essay")


def test_facts_are_single_lines_of_the_trained_patterns(tokenizer):
    for task, value in (("niah_multikey_1", r"\d{4}"), ("niah_multikey_3", r"[a-z]+ [a-z]+")):
        record = one(tokenizer, task, style="facts")
        key, relation = re.fullmatch(r"Q: (\w+ \w+) (=|hides)", record.input).groups()
        found = re.findall(rf"^Fact: {key} {relation} ({value})$", record.context, re.MULTILINE)
        assert found == list(record.answers)
    record = one(tokenizer, "vt", 4096, style="facts")
    value = re.fullmatch(r"Q: (\d{5}) needs", record.input)[1]
    needs = dict(re.findall(r"^Rule: (\w+) needs (\w+)$", record.context, re.MULTILINE))
    assert len(needs) == 10  # the solved example's and the asked ones share no variable
    chain = [needs[value]]
    while chain[-1] in needs:
        chain.append(needs[chain[-1]])
    assert chain == list(record.answers)
    solved = re.search(r"^Q: \d{5} needs((?: \w+| needs)+)$", record.context, re.MULTILINE)[1]
    assert len(solved.split(" needs ")) == 5


def test_the_embedded_model_retrieves_through_evaluate(tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        repository() / "data" / "embedded", local_files_only=True, dtype=torch.float32
    )
    profile = SimpleNamespace(ruler=RulerRuns(style="facts"), seed=0, samples_per_task=2)
    records = profile_records(profile, tokenizer, 1024, tasks=["niah_multikey_1"])
    assert len(records) == 2 and all("/facts/" in record._id for record in records)
    protocol = ruler_protocol("niah_multikey_1", stop="\n")
    frame = evaluate(
        model, tokenizer, records, [Method("dense")], protocol, tmp_path / "r.jsonl", progress=False
    )
    assert frame["score"].tolist() == [1.0] * 4  # both setups
    assert (frame["context_tokens"] > 800).all()
    plain = SimpleNamespace(ruler=RulerRuns(), seed=0, samples_per_task=2)
    (record,) = profile_records(plain, tokenizer, 1024, 1, tasks=["niah_multikey_1"])
    assert "/plain/" in record._id


def test_vocabulary_is_distinct_and_grows_from_the_same_start():
    words = Vocabulary(random.Random(0))
    few, many = words.first(20), words.first(30_000)
    assert many[:20] == few and len(set(many)) == 30_000
    assert all(re.fullmatch("[a-z]+", word) for word in many)


def test_noise_shares_no_word_with_what_is_asked():
    from hashattn.evaluation.benchmarks import words

    groups = [group for group in vars(words).values() if isinstance(group, tuple)]
    asked = {word.lower() for group in groups for word in group if len(word) > 1}
    assert not asked & {word.strip(".").lower() for word in " ".join(NOISE).split()}
