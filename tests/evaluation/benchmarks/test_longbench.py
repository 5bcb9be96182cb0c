"""LongBench's datasets, loading and protocols; prompts as token ids; a run on official files."""

import json
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hashattn.evaluation.answering import PrefilledContext, feed, greedy
from hashattn.evaluation.benchmarks.longbench import (
    DATASETS,
    E_NAMES,
    LONGBENCH_E,
    bucket,
    dataset,
    fine_tuning_split,
    load_dataset,
)
from hashattn.evaluation.benchmarks.longbench_authors import authors
from hashattn.evaluation.benchmarks.longbench_protocol import by_the_book, load_prompts
from hashattn.evaluation.identity import record_sha256
from hashattn.evaluation.methods import Method
from hashattn.evaluation.metrics import METRICS
from hashattn.evaluation.prompting import encode_prompt, end_token_ids
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record, RecordError, save_records
from hashattn.evaluation.runner import evaluate
from hashattn.evaluation.tables import bucket_table
from hashattn.models.identity import tokenizer_sha256
from hashattn.reproduce.access import load_model
from hashattn.reproduce.profiles import load_profile
from hashattn.selectors import make_selector


def record(name, context="some context", question="what?", answers=("42",), **fields):
    return Record(question, context, answers, dataset=name, **fields)


# the table


def test_the_table_holds_longbenchs_21_datasets():
    assert len(DATASETS) == 21 and all(name == of.name for name, of in DATASETS.items())
    assert Counter(of.language for of in DATASETS.values()) == {"en": 14, "zh": 5, "code": 2}
    assert Counter(of.category for of in DATASETS.values()).most_common()[0][1] == 4
    assert {of.metric for of in DATASETS.values()} == set(METRICS) - {
        "exact_match", "code_sim_levenshtein", "string_match_all", "string_match_part",
        "holds_answer",
    }  # fmt: skip
    assert sum(of.max_new_tokens for of in DATASETS.values()) == 3168
    untemplated = [of.name for of in DATASETS.values() if not of.chat]
    assert untemplated == ["trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"]
    assert [of.name for of in DATASETS.values() if of.first_line] == untemplated[:4]
    assert [of.name for of in DATASETS.values() if of.end_tokens] == ["samsum"]


def test_longbench_e_has_13_datasets_asked_as_the_others():
    assert len(LONGBENCH_E) == 13 and set(LONGBENCH_E) < set(DATASETS)
    assert dataset("trec_e") is dataset("trec") is DATASETS["trec"]
    for name in ("narrativeqa_e", "squad"):
        with pytest.raises(ValueError, match=f"dataset = '{name}': must be one of"):
            dataset(name)


@pytest.mark.parametrize(
    ("length", "name"),
    [(0, "0-4k"), (3999, "0-4k"), (4000, "4-8k"), (7999, "4-8k"), (8000, "8k+"), (90000, "8k+")],
)
def test_buckets_begin_where_the_last_ended(length, name):
    assert bucket(length) == name


# loading


def test_local_files_come_first_and_name_the_dataset(tmp_path):
    save_records([record("", "one"), record("", "two")], tmp_path / "hotpotqa.jsonl")
    save_records([record("hotpotqa", "three")], tmp_path / "data" / "hotpotqa_e.jsonl")
    assert [(r.dataset, r.context) for r in load_dataset(tmp_path, "hotpotqa")] == [
        ("hotpotqa", "one"), ("hotpotqa", "two"),
    ]  # fmt: skip
    assert len(load_dataset(tmp_path, "hotpotqa", limit=1)) == 1
    (of_e,) = load_dataset(tmp_path, "hotpotqa_e")
    assert (of_e.dataset, of_e.context) == ("hotpotqa_e", "three")


def test_a_repository_of_datasets_is_read_where_there_is_no_file(tmp_path, monkeypatch):
    """A local copy in the hub's layout: one folder a configuration, named in the card."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    hub = tmp_path / "hub"
    save_records([record("trec", all_classes=("a", "b")), record("trec")], hub / "trec" / "t.jsonl")
    config = "configs:\n- config_name: trec\n  data_files:\n  - split: test\n    path: trec/*\n"
    (hub / "README.md").write_text(f"---\n{config}---\n")
    first, second = load_dataset(hub, "trec")
    assert first == record("trec", all_classes=("a", "b")) and second.all_classes is None
    assert len(load_dataset(hub, "trec", limit=1)) == 1
    with pytest.raises(RecordError, match=r"hub has no lcc.jsonl .*\n  Unpack .*data.zip"):
        load_dataset(hub, "lcc")


def test_the_hub_is_asked_for_the_configuration_and_revision(monkeypatch):
    import datasets

    asked = []

    def rows(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"input": "q", "context": "c"}])

    monkeypatch.setattr(datasets, "load_dataset", rows)
    with pytest.raises(RecordError, match=r"some/where lcc:1: record lacks \['answers'\]"):
        load_dataset("some/where", "lcc", revision="main")
    assert asked == [(("some/where", "lcc"), {"split": "test", "revision": "main"})]


# contamination


def test_the_fine_tuning_split_is_the_papers():
    whole = [record("hotpotqa", f"c{i}") for i in range(200)]
    code = [record("lcc", f"c{i}") for i in range(500)]
    small = [record("multifieldqa_en", f"c{i}") for i in range(150)]
    split = fine_tuning_split([*whole, *code, *small])
    assert split.train == (*whole[175:], *code[475:])
    assert split.score == (*whole[:175], *code[:175], *small)
    assert split.shared_contexts == ()


def test_scored_contexts_that_also_train_are_named():
    records = [record("qasper", f"c{i // 2}", f"q{i}") for i in range(201)]
    split = fine_tuning_split([*records[:175], *records[174:]])
    assert [r.input for r in split.shared_contexts] == []
    odd = fine_tuning_split(records[:7], trained=2, scored=5)
    assert [r.input for r in odd.train] == ["q5", "q6"]
    assert [r.input for r in odd.shared_contexts] == ["q4"]


# prompts and protocols


def test_our_prompts_have_longbenchs_placeholders():
    prompts = load_prompts()
    assert list(prompts) == list(DATASETS)
    without_input = {"gov_report", "multi_news", "vcsum", "passage_count", "lcc"}
    for name, template in prompts.items():
        assert template.count("{context}") == 1
        assert template.count("{input}") == (name not in without_input), name
        assert template.format(context="C", input="I").count("{") == 0


@pytest.mark.parametrize("place", ["data", "data/config", "config"])
def test_official_prompts_beside_the_data_come_first(tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / "data").mkdir(exist_ok=True)
    official = {name: f"{name}: {{context}}" for name in DATASETS}
    (tmp_path / place / "dataset2prompt.json").write_text(json.dumps(official | {"passkey": ""}))
    assert load_prompts(tmp_path / "data") == official
    assert load_prompts(tmp_path / "data" / "none" / "deeper") == load_prompts()


def test_broken_prompts_are_refused(tmp_path):
    path = tmp_path / "dataset2prompt.json"
    path.write_text("{")
    with pytest.raises(RecordError, match="dataset2prompt.json is not JSON"):
        load_prompts(tmp_path)
    path.write_text(json.dumps({"lcc": "{input}"}))
    with pytest.raises(RecordError, match="no template with {context} for .*'lcc'"):
        load_prompts(tmp_path)


def test_by_the_book_asks_every_dataset_as_longbench_does():
    prompts = load_prompts()
    protocol = by_the_book(prompts, 7500, sink=128, local=128)
    asked = protocol.of("hotpotqa_e")
    assert (asked.chat, asked.max_new_tokens, asked.metric) == (True, 32, "qa_f1")
    assert (asked.max_context, asked.truncated, asked.truncation) == (7500, "prompt", "middle")
    assert (asked.stop, asked.window, asked.sink) == (None, None, 128)
    samsum = protocol.of("samsum")
    assert (samsum.end_tokens, samsum.min_new_tokens, samsum.chat) == (("\n",), 1, False)
    assert samsum.first_line and not replace(protocol.of("samsum"), first_line=False).first_line
    assert protocol.of("vcsum").template == prompts["vcsum"]
    assert not any(by_the_book(prompts, chat=False).of(name).chat for name in DATASETS)
    assert len(protocol.datasets) == len(DATASETS) + len(E_NAMES)


def test_the_authors_protocol_truncates_after_the_template():
    protocol = authors(load_prompts(), 131072)
    report, samsum = protocol.of("gov_report"), protocol.of("samsum")
    assert (report.truncated, report.truncation, report.keep_first) == ("chat", "suffix", 128)
    assert (report.window, report.max_context, report.chat) == (128, 131072 - 512, True)
    assert (samsum.stop, samsum.end_tokens, samsum.min_new_tokens) == ("\n", (), 0)
    assert samsum.first_line and not samsum.chat
    with pytest.raises(ValueError, match="max_length = 640: must be at least 641"):
        authors(load_prompts(), 640)


def words(template=None, special=True):
    """A tokenizer of words and line breaks; begins with <s> where asked to add special tokens."""
    vocabulary = {"<s>": 0, "<unk>": 1, "\n": 2, "[U]": 3, "[A]": 4}
    vocabulary |= {f"w{i}": 5 + i for i in range(200)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"),
    ])  # fmt: skip
    if special:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    made.chat_template = template
    return made


CHAT = (
    "{{ bos_token }}[U] {{ messages[0]['content'].strip() }}"
    "{% if add_generation_prompt %} [A]{% endif %}"
)


def numbered(start, stop):
    return " ".join(f"w{i}" for i in range(start, stop))


def texts(tokenizer, parts):
    return [tokenizer.decode(part) for part in parts]


WHOLE = Protocol(template="w0 {context} w98 {input} w99", truncated="prompt")
ASKED = record("x", numbered(1, 11), "w50 w51")


def test_whole_prompts_split_before_the_input():
    tokenizer = words()
    context, question = texts(tokenizer, encode_prompt(tokenizer, WHOLE, ASKED))
    assert context == f"<s> w0 {numbered(1, 11)} w98" and question == "w50 w51 w99"


def test_whole_prompts_lose_their_middle_before_the_chat_template():
    tokenizer = words(CHAT)
    protocol = replace(WHOLE, chat=True, max_context=10, truncation="middle")
    context, question = texts(tokenizer, encode_prompt(tokenizer, protocol, ASKED))
    # ten of 16 tokens, <s> one of them; the seam of the two texts is tokenised anew
    assert context == "<s> [U] w0 w1 w2 <unk> w98"
    assert question == "w50 w51 w99 [A]"
    assert encode_prompt(tokenizer, replace(protocol, max_context=16), ASKED) == encode_prompt(
        tokenizer, replace(protocol, max_context=None), ASKED
    )


def test_the_authors_truncation_counts_the_chat_templates_tokens():
    tokenizer = words(CHAT)
    protocol = replace(
        WHOLE,
        chat=True,
        truncated="chat",
        truncation="suffix",
        keep_first=3,
        max_context=10,
        window=4,
    )
    context, question = texts(tokenizer, encode_prompt(tokenizer, protocol, ASKED))
    assert (context, question) == ("<s> [U] w0 w9 w10 w98", "w50 w51 w99 [A]")
    plain = replace(protocol, window=None)
    assert texts(tokenizer, encode_prompt(tokenizer, plain, ASKED)) == [context, question]


def test_the_question_is_found_where_the_chat_template_strips_the_prompt():
    tokenizer = words(CHAT)
    stripped = replace(WHOLE, chat=True, template=WHOLE.template + "\n\n")
    plain = encode_prompt(tokenizer, replace(WHOLE, chat=True), ASKED)
    assert encode_prompt(tokenizer, stripped, ASKED) == plain
    assert texts(tokenizer, plain[1:]) == ["w50 w51 w99 [A]"]


def test_a_prompt_begins_once_whoever_writes_the_beginning():
    for template in (CHAT, CHAT.removeprefix("{{ bos_token }}")):
        tokenizer = words(template)
        ids = sum(encode_prompt(tokenizer, replace(WHOLE, chat=True), ASKED), [])
        assert ids.count(0) == 1 and ids[0] == 0


def test_one_token_at_least_is_prefilled_and_one_asked():
    tokenizer = words()
    context, question = encode_prompt(tokenizer, replace(WHOLE, window=500), ASKED)
    assert len(context) == 1 and len(question) == 15
    bare = replace(WHOLE, template="w0 {context}")
    context, question = encode_prompt(tokenizer, bare, ASKED)
    assert texts(tokenizer, [question]) == ["w10"] and len(context) == 11


def test_a_question_that_truncation_cut_still_counts_its_tokens():
    tokenizer = words()
    protocol = replace(WHOLE, max_context=4, truncation="middle")
    context, question = encode_prompt(tokenizer, protocol, ASKED)
    assert len(context) == 1 and len(question) == 2  # <s>, and what is left of three


def test_a_missing_chat_template_and_no_token_are_said():
    with pytest.raises(ValueError, match="chat = True needs a tokenizer with a chat template"):
        encode_prompt(words(), replace(WHOLE, chat=True), ASKED)
    assert end_token_ids(words(special=False), Protocol(end_tokens=("\n",))) == {2}
    with pytest.raises(ValueError, match="one token of .* '<eot>' is not"):
        end_token_ids(words(special=False), Protocol(end_tokens=("<eot>",)))


# through evaluate, with the embedded model


@pytest.fixture(scope="module")
def embedded():
    return load_model(load_profile("tiny"))


NEWS = "会议记录：今天的会议讨论了城市交通。" * 12
FILLER = "The library opens at nine and closes at six on every day of the week.\n" * 20
FILES = {
    "hotpotqa": [
        record("", FILLER + "Note: Mira plays the oboe.\n", "What does Mira play?", ("oboe",),
               length=300),
        record("", FILLER, "When does it close?", ("six", "at six"), length=290),
    ],
    "gov_report": [record("", FILLER, "", ("The library has hours.",))],
    "trec": [
        record("", "Question: Who?\nType: Person\nQuestion: Where?\nType: Place\n" * 10,
               "Question: Which man?\nType:", ("Person",), all_classes=("Person", "Place")),
    ],
    "samsum": [record("", "Dialogue: A: hi\nSummary: A greets.\n" * 20,
                      "Dialogue: B: bye\nSummary: ", ("B leaves.",))],
    "passage_count": [record("", "Paragraph 1: a\n\nParagraph 2: b\n\n" * 20, "", ("2",))],
    "multifieldqa_zh": [record("", NEWS, "讨论了什么？", ("城市交通",), language="zh")],
    "lcc": [record("", "def f(x):\n    return x\n" * 20, "", ("print(f(1))",))],
    "qasper_e": [record("", FILLER, "Which hours?", ("nine to six",), length=n)
                 for n in (300, 5000, 9000)],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name, records in FILES.items():
        save_records(records, tmp_path / "set" / f"{name}.jsonl")
    return tmp_path / "set"


def generated(model, tokenizer, ids, new_tokens):
    """What plain generate answers to a prompt."""
    ids = torch.tensor([ids])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_official_files_run_by_the_book(embedded, folder, tmp_path):
    model, tokenizer = embedded
    records = [r for name in FILES for r in load_dataset(folder, name)]
    prompts = load_prompts(folder)
    book = by_the_book(prompts, 400, chat=False)
    short = {name: dict(fields) | {"max_new_tokens": 12} for name, fields in book.datasets}
    protocol = replace(book, datasets=short)  # a test has not the time for 512 tokens
    oracle = Method("oracle", make_selector("oracle"), protocol.budget(density=1 / 8))
    methods = [Method("dense"), oracle]
    frame = evaluate(model, tokenizer, records, methods, protocol, tmp_path / "r", progress=False,
                     setups="B")  # fmt: skip
    dense = frame[frame["method"] == "dense"].reset_index()
    assert dense["dataset"].tolist() == [name for name, part in FILES.items() for _ in part]
    assert frame[frame["method"] == "oracle"]["density"].max() < 0.13
    for row, r in zip(dense.itertuples(), records, strict=True):
        asked = dataset(r.dataset)
        prompt = prompts[asked.name].format(context=r.context, input=r.input)
        ids = tokenizer(prompt).input_ids
        if len(ids) > 400:
            ends = (ids[:200], ids[-200:])
            prompt = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in ends)
            ids = tokenizer(prompt).input_ids
        if asked.name != "samsum":  # which a line break ends
            assert row.prediction == generated(model, tokenizer, ids, 12)
        text = row.prediction
        if asked.first_line:
            text = text.lstrip("\n").split("\n")[0]
        assert row.score == METRICS[asked.metric](text, r.answers, r.all_classes)
    assert max(len(tokenizer(r.context).input_ids) for r in records) > 400
    lengths = frame[frame["dataset"] == "qasper_e"]["length"]
    assert lengths.tolist() == 2 * [300, 5000, 9000]  # equal texts, of one stored result
    again = evaluate(model, tokenizer, records, methods, protocol, tmp_path / "r", progress=False,
                     setups="B")  # fmt: skip
    assert again.attrs["reused"] == len(again) == 2 * len(records)


def test_longbench_e_is_averaged_by_interval_over_datasets():
    lines = [("a", 10, 1), ("a", 20, 0), ("b", 3999, 1), ("a", 8000, 0.25)]
    same = {"method": "dense", "budget": "dense", "protocol": "", "protocol_fields": {}}
    rows = [same | {"dataset": d, "length": n, "score": s}
            for d, n, s in lines]  # fmt: skip
    table = bucket_table(pd.DataFrame(rows))
    assert table.columns.tolist() == ["0-4k", "8k+"]
    assert table.loc[("dense", "dense")].tolist() == [75, 25]


def test_what_a_result_depends_on_moves_its_key():
    plain = record("trec", all_classes=("a", "b"))
    assert record_sha256(plain) != record_sha256(replace(plain, all_classes=("a",)))
    assert record_sha256(plain) == record_sha256(replace(plain, length=9))
    assert tokenizer_sha256(words()) != tokenizer_sha256(words(CHAT))


def test_the_authors_window_and_truncation_run(embedded, folder, tmp_path):
    model, tokenizer = embedded
    (asked,) = load_dataset(folder, "hotpotqa", limit=1)
    asked = replace(asked, context=2 * FILLER + asked.context)
    protocol = authors(load_prompts(), 700, chat=False)
    prompt = load_prompts()["hotpotqa"].format(context=asked.context, input=asked.input)
    ids = tokenizer(prompt).input_ids
    kept = ids[:128] + ids[len(ids) - (668 - 128) :]
    assert len(kept) == 668 < len(ids)
    oracle = Method("oracle", make_selector("oracle"), protocol.budget(density=1 / 8))
    frame = evaluate(model, tokenizer, [asked], [Method("dense"), oracle], protocol,
                     tmp_path / "r", progress=False, setups="B")  # fmt: skip
    assert frame["context_tokens"].tolist() == [668 - 128] * 2
    assert frame["prediction"][0] == generated(model, tokenizer, kept, 32)
    (receipt_summary,) = json.loads((tmp_path / "r.receipts.json").read_text())
    assert receipt_summary["settings"] and receipt_summary["density"] < 0.13


def test_a_first_token_that_ends_is_passed_over_where_one_is_due(embedded, tmp_path):
    """SAMSum: the answer has at least one token, though the model would end at once."""
    model, tokenizer = embedded
    asked = record("samsum", FILLER, "When does it open?")
    plain = Protocol(truncated="prompt", stop=None, max_new_tokens=6)
    free = evaluate(model, tokenizer, [asked], [Method("dense")], plain, tmp_path / "a",
                    progress=False)["prediction"][0]  # fmt: skip
    first = tokenizer.decode(tokenizer(free, add_special_tokens=False).input_ids[:1])
    ends = replace(plain, end_tokens=(first,))
    runs = [
        evaluate(model, tokenizer, [asked], [Method("dense")], protocol, tmp_path / "a",
                 progress=False)["prediction"][0]
        for protocol in (ends, replace(ends, min_new_tokens=1))
    ]  # fmt: skip
    assert free.startswith(first)
    assert runs[0] == "" and runs[1] and not runs[1].startswith(first)
    before = model.generation_config.eos_token_id
    (model.generation_config.eos_token_id,) = end_token_ids(tokenizer, ends)
    try:  # the model's own end counts as well
        run = evaluate(model, tokenizer, [asked], [Method("dense")], plain, tmp_path / "b",
                       progress=False)  # fmt: skip
    finally:
        model.generation_config.eos_token_id = before
    assert run["prediction"][0] == ""


def test_no_answer_ends_before_its_least_length(embedded):
    model, tokenizer = embedded
    ids = tokenizer(FILLER).input_ids

    def ask(ends, least):
        cache = PrefilledContext(model, ids[:-1]).fork()
        first = feed(model, ids[-1:], cache, ends)
        text = greedy(model, tokenizer, cache, first, 6, None, ends, least)
        return tokenizer(text, add_special_tokens=False).input_ids

    free = ask(frozenset(), 0)
    ends = frozenset(set(free) - {free[0]})
    assert free[1] in ends and ask(ends, 1) == free[:1]
    longer = ask(ends, 3)
    assert len(longer) >= 3 and not ends & set(longer)


def test_a_dataset_that_the_protocol_lacks_is_refused(embedded, tmp_path):
    model, tokenizer = embedded
    protocol = by_the_book(load_prompts(), chat=False)
    with pytest.raises(ValueError, match="no dataset 'squad'"):
        evaluate(model, tokenizer, [record("squad")], [Method("dense")], protocol, tmp_path / "r")


def test_contexts_that_were_truncated_apart_are_prefilled_apart(embedded, tmp_path):
    """Two questions of one document: longer questions leave less of it at the end."""
    model, tokenizer = embedded
    pair = [record("x", FILLER, q, ("a",)) for q in ("Who?", "Who " + "was it then " * 6 + "?")]
    protocol = Protocol(truncated="prompt", truncation="middle", max_context=200, max_new_tokens=4)
    run = [evaluate(model, tokenizer, part, [Method("dense")], protocol, tmp_path / str(i),
                    progress=False, setups="B")["prediction"].tolist()
           for i, part in enumerate([pair, pair[:1], pair[1:]])]  # fmt: skip
    assert run[0] == run[1] + run[2]
    contexts = {tuple(encode_prompt(tokenizer, protocol, r)[0]) for r in pair}
    assert len(contexts) == 2
    assert replace(pair[0], input="") != pair[0]
