"""Prompts that a limit cuts: counted in rows, said in every table, refused beyond the positions."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
from transformers import AutoTokenizer

from hashattn.evaluation import cells
from hashattn.evaluation.methods import Method
from hashattn.evaluation.prompting import (
    Cut,
    PromptTooLongError,
    encode_prompt,
    make_prompt,
    require_positions,
)
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record
from hashattn.evaluation.runner import evaluate
from hashattn.evaluation.tables import (
    bucket_table,
    comparison_table,
    cut_counts,
    cut_note,
    dataset_table,
    density_table,
    score_table,
    setup_table,
)
from hashattn.reproduce import plots
from hashattn.reproduce.experiments import frontier
from hashattn.reproduce.profiles import repository
from hashattn.selectors import make_selector
from helpers import characters, tiny_model

PROTOCOL = Protocol(sink=2, local=4, max_new_tokens=3, max_context=60, truncation="middle")
FILLER = 9 * "nothing "  # more than the limit
RECORDS = [
    Record("q", FILLER + "the key is Red Fox " + FILLER, ("red  fox",), dataset="lost"),
    Record("q", "the key is red fox " + FILLER, ("red fox",), dataset="kept"),
    Record("q", "red fox, and no more", ("red fox",), dataset="whole"),
    Record("q", 2 * FILLER + "no such thing", ("blue",), dataset="lost"),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def embedded():
    return AutoTokenizer.from_pretrained(repository() / "data" / "embedded")


@pytest.fixture(scope="module")
def both(model, tmp_path_factory):
    return answered(model, tmp_path_factory.mktemp("both") / "r.jsonl")


def answered(model, path, records=RECORDS, protocol=PROTOCOL, **settings):
    sparse = make_selector("oracle"), protocol.budget(heavy=10)
    hashed = make_selector("lsh", bits=32), protocol.budget(heavy=10)
    chosen = [Method("dense"), Method("oracle", *sparse), Method("lsh", *hashed)]
    return evaluate(
        model, characters(), records, chosen, protocol, path, progress=False, **settings
    )


def test_a_row_says_what_was_cut_and_whether_the_answer_went(both, model, tmp_path):
    dense = both[(both.method == "dense") & (both.setup == "B")].reset_index()
    assert (dense["cut_tokens"] + dense["context_tokens"])[[0, 1, 3]].tolist() == (
        dense["uncut_tokens"][[0, 1, 3]].tolist()
    )
    assert dense["context_tokens"][[0, 1, 3]].tolist() == [60, 60, 60]
    assert dense["answer_in_context"][[0, 1, 3]].tolist() == [True, True, False]
    assert dense["answer_kept"][[0, 1, 3]].tolist() == [False, True, False]
    assert dense["cut_tokens"][2] == 0


def test_rows_of_what_was_not_cut_are_as_before(model, tmp_path):
    """Records of an unchanged setting stay byte for byte what they were."""
    answered(model, tmp_path / "r", RECORDS[2:3])
    lines = [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()]
    assert lines and all(not set(Cut.__dataclass_fields__) & set(line) for line in lines)
    found = answered(model, tmp_path / "r", RECORDS[2:3])
    assert found["cut_tokens"].tolist() == len(found) * [0] and cut_note(found) == ""


def test_every_table_tells_of_cut_contexts(both, tmp_path, capsys):
    part = both[both.setup == "B"]
    assert cut_counts(part) == {"contexts": 4, "cut": 3, "answers_lost": 1}
    note = cut_note(both)
    assert note.startswith("3 of 4 contexts were cut, 1 answers lost")
    assert "60 of 166 tokens" in note and "lost 2 of 2, answers lost 1; kept 1 of 1" in note
    tables = [make(part) for make in (score_table, dataset_table, density_table, bucket_table,
                                      comparison_table)]  # fmt: skip
    tables += [setup_table(both), frontier.task_verdicts(part, "lsh")]
    for number, table in enumerate(tables):
        assert table.attrs["cut"] == "3 of 4 contexts were cut, 1 answers lost", number
        path = plots.save_table(table, f"t{number}", tmp_path)
        assert f"t{number}: 3 of 4 contexts were cut" in capsys.readouterr().out
        assert (pd.read_csv(path)["cut"].astype(str).str[0] == "3").all()
    compared = comparison_table(part)
    assert compared["cut"].tolist() == [3, 3, 3]
    assert compared["answers_lost"].tolist() == [1, 1, 1]


def test_tables_of_whole_contexts_are_quiet(both, tmp_path, capsys):
    whole = both[(both.setup == "B") & (both.dataset == "whole")]
    table = score_table(whole)
    assert "cut" not in table.attrs and comparison_table(whole)["cut"].tolist() == [0, 0, 0]
    path = plots.save_table(table, "whole", tmp_path)
    assert "cut" not in path.read_text() and capsys.readouterr().out == ""


@pytest.mark.parametrize("truncated", ["context", "prompt"])
def test_japanese_contracts_lose_their_middle(embedded, truncated):
    clause = (
        "第三条 乙は、甲の事前の書面による承諾なく、本契約上の権利を第三者に譲渡してはならない。"
    )
    early, late = "契約番号は甲42-7である。", "違約金は三百万円とする。"
    protocol = Protocol(max_context=200, truncation="middle", truncated=truncated)
    for text, answer, kept in (
        (early + 20 * clause, "甲42-7", True),
        (10 * clause + late + 10 * clause, "三百万円", False),
        (10 * clause + late + 10 * clause, "４２", False),  # nowhere
    ):
        cut = make_prompt(embedded, protocol, Record("違約金は三百万円ですか", text, (answer,))).cut
        assert cut.uncut_tokens - cut.cut_tokens == 200
        assert (cut.answer_in_context, cut.answer_kept) == (answer != "４２", kept)


@pytest.mark.parametrize(
    ("context", "answer", "stands"),
    [
        ("founded in 1975", "7", False),
        ("founded in 1975", "1975", True),
        ("2026年7月", "7", True),
        ("Ｃafé Ｘ", "CAFÉ x", True),
        ("a line\nbreak", "line break", True),
        ("C++ (fast)", "c++", True),
        ("anything", "", False),
    ],
)
def test_an_answer_stands_in_a_text_as_itself(embedded, context, answer, stands):
    protocol = Protocol(max_context=4, truncation="middle")
    made = make_prompt(embedded, protocol, Record("q", context + 30 * " x", (answer,)))
    assert made.cut.answer_in_context == stands


def test_a_chat_prompt_counts_what_the_limit_counts(embedded):
    embedded.chat_template = "[U] {{ messages[0]['content'] }} [A]"
    protocol = Protocol(truncated="chat", truncation="suffix", keep_first=20, max_context=60,
                        chat=True)  # fmt: skip
    made = make_prompt(embedded, protocol, Record("who", "red fox " + 90 * "word ", ("fox",)))
    assert len(made.context) + len(made.question) == 60
    assert made.cut.uncut_tokens == 60 + made.cut.cut_tokens and made.cut.answer_kept


# the model's positions


def refused(model, monkeypatch, tmp_path, record, protocol):
    with monkeypatch.context() as patch, pytest.raises(PromptTooLongError) as error:
        patch.setattr(cells, "PrefilledContext", None)  # nothing may run
        answered(model, tmp_path / "r.jsonl", [RECORDS[2], record], protocol)
    assert (tmp_path / "r.jsonl").read_text() == ""
    return str(error.value)


def test_a_prompt_beyond_the_positions_is_refused_before_any_work(model, monkeypatch, tmp_path):
    protocol = replace(PROTOCOL, max_context=None, truncation="refuse")
    long = Record("q", 510 * "x", ("a",), dataset="d", _id="r7")
    said = refused(model, monkeypatch, tmp_path, long, protocol)
    assert "record 'r7' of 'd' needs 518 positions, 515 for the prompt and 3 for the answer" in said
    assert "the model has 512" in said and "set max_context (now None)" in said


def test_a_limit_that_leaves_no_room_for_the_answer_is_refused(model, monkeypatch, tmp_path):
    protocol = replace(PROTOCOL, max_context=509)
    said = refused(model, monkeypatch, tmp_path, Record("q", 600 * "x", ("a",)), protocol)
    assert "lower max_context = 509 by at least 2" in said
    found = answered(model, tmp_path / "fits", [Record("q", 600 * "x", ("a",))],
                     replace(protocol, max_context=507), setups="B")  # fmt: skip
    assert found["context_tokens"].max() == 507


def test_longbench_s_round_trip_through_text_is_checked_against_the_positions(embedded):
    """By the book a truncated prompt may exceed its limit: the positions are the real one."""
    record = Record("qu'est-ce", 40 * "élève à Kraków, 東京都の契約。", ("é",))
    over = []
    for limit in range(40, 120):
        protocol = Protocol(truncated="prompt", truncation="middle", max_context=limit,
                            max_new_tokens=4)  # fmt: skip
        size = sum(map(len, encode_prompt(embedded, protocol, record)))
        for positions, fits in ((size + 4, True), (size + 3, False)):
            config = SimpleNamespace(max_position_embeddings=positions)
            config.get_text_config = lambda config=config: config
            if fits:
                require_positions(config, embedded, protocol, record)
            else:
                with pytest.raises(PromptTooLongError, match="by at least 1"):
                    require_positions(config, embedded, protocol, record)
        over.append(size - limit)
    assert max(over) > 0  # it happens


def test_a_configuration_without_positions_has_no_limit(embedded):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=None))
    require_positions(config, embedded, Protocol(), Record("q", 99 * "word ", ("a",)))
