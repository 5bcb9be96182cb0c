"""`make pilot` and `make preflight`: what they refuse before they start, and a whole pilot."""

import html
import json
import os
import re

import pytest

from hashattn.base.repository import repository
from hashattn.pilot.capacity.result import Workload
from hashattn.pilot.settings import PilotSettings
from hashattn.reproduce.experiments import piloting
from hashattn.reproduce.notebooks import pilot, preflight
from hashattn.reproduce.profiles import load_profile

LINES = {
    "en": "The {a} of hall {n} was replaced on day {d}, and {b} signed the sheet for it. ",
    "ja": "第{n}棟の{a}は{d}日に交換され、{b}が点検表に署名した。",
}


@pytest.fixture
def company(tmp_path):
    """A folder of a dozen files in two languages, one of which nothing can be read from."""
    folder = tmp_path / "わが社 docs"
    (folder / "議事録").mkdir(parents=True)
    for number in range(12):
        language = "ja" if number % 3 == 0 else "en"
        text = "\n".join(
            LINES[language].format(a="pump valve motor".split()[n % 3], n=n, d=n * number % 29,
                                   b=f"Person {n * 7 % 40}")
            for n in range(24)
        )  # fmt: skip
        path = folder / ("議事録" if number % 3 == 0 else ".") / f"note {number}.txt"
        path.write_text(text, encoding="shift_jis" if number == 0 else "utf-8")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7 not really")
    return folder


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--docs", "/no/such/folder"], "docs = .*a folder of documents"),
        (["--questions", "/no/such/file.csv"], "questions = .*CSV, JSONL or XLSX"),
        (["--language", "fr"], "language = 'fr': must be one of en, ja"),
        (["--context", "many"], "context = 'many'"),
        (["--budgets", "1/0"], "budgets = '1/0'"),
        (["--workload", "{"], "workload = '{'"),
        (["--samples", "5"], "a JSON object"),
    ],
)
def test_what_cannot_start_says_so(given, message, capsys, tmp_path):
    assert pilot.main([*given, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_report_is_not_written_among_the_documents(company, capsys):
    assert pilot.main(["--docs", str(company), "--out", str(company / "out")]) == 1
    assert "a folder outside the documents" in capsys.readouterr().err


def test_a_whole_pilot(company, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HASHATTN_PROFILE", "tiny")
    out = tmp_path / "result"
    before = {path: path.stat().st_mtime_ns for path in company.rglob("*")}
    given = ["--docs", str(company), "--model", "data/embedded", "--language", "ja",
             "--device", "a100-40gb", "--workload",
             json.dumps({"context": 131072, "batch": 8}), "--out", str(out)]  # fmt: skip
    for name in ("HASHATTN_HOME", "HASHATTN_RESULTS", "HASHATTN_PROGRESS", "PYTHONPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # what the run sets is taken back
    monkeypatch.setenv("HASHATTN_HOME", str(repository()))
    result = pilot.run_pilot(pilot._parameters(pilot._parser().parse_args(given), out), out)
    assert result["recommendation"]["verdict"] in ("cannot_be_judged", "no_go")
    assert result["private"] == {"sockets_denied": True, "offline": True}
    files = result["documents"]
    assert len(files["scored"]) + len(files["calibration"]) == 12
    assert [each["name"] for each in files["skipped"]] == ["broken.pdf"]
    page = html.unescape((out / "report.html").read_text())
    assert 'lang="ja"' in page and "議事録" in page
    assert {path: path.stat().st_mtime_ns for path in company.rglob("*")} == before
    assert {path.name for path in tmp_path.iterdir()} == {company.name, "result"}
    assert (out / "06_pilot.ipynb").is_file() and not list(out.glob("*.partial*"))
    assert "recommendation: " in capsys.readouterr().out


def test_a_pilots_model_is_recognised():
    profile = load_profile("tiny")
    for name in ("auto", "data/embedded", str(repository() / "data" / "embedded")):
        chosen = piloting.pilot_model(profile, name)
        assert (chosen.note, chosen.name) == ("embedded", "embedded")
        assert chosen.shipped.is_dir()


def test_a_model_of_ones_own_has_no_shipped_codes(tmp_path):
    from shutil import copytree

    own = copytree(repository() / "data" / "embedded", tmp_path / "our model")
    chosen = piloting.pilot_model(load_profile("tiny"), str(own))
    assert (chosen.note, chosen.name, chosen.shipped) == ("own", "our model", None)


def test_a_profile_of_another_model_is_piloted_with_that(tmp_path):
    from dataclasses import replace
    from shutil import copytree

    own = str(copytree(repository() / "data" / "embedded", tmp_path / "big"))
    profile = replace(load_profile("tiny"), model=own, hash_weights=f"{own}/hash_weights")
    chosen = piloting.pilot_model(profile)
    assert (chosen.note, chosen.name) == ("own", "big")
    assert chosen.shipped.is_relative_to(own)
    bare = piloting.pilot_model(replace(profile, hash_weights=f"{own}/none/hash_weights"))
    assert bare.shipped is None


def test_the_command_that_runs_a_pilot_again():
    again = piloting.command(docs="our docs", questions=None, budgets=[1 / 8, 1 / 16], price=2.0,
                             workload={"context": 8192})  # fmt: skip
    assert again == (
        "make pilot DOCS='our docs' BUDGETS=1/8,1/16 PRICE=2.0 WORKLOAD='{\"context\": 8192}'"
    )


def test_the_pre_flight_of_a_chat_and_of_long_documents(capsys):
    """A chat of 2K tokens is no case for sparse attention; 128K in batches of 8 is."""
    llama = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
             "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
             "vocab_size": 128256, "max_position_embeddings": 131072,
             "torch_dtype": "bfloat16", "tie_word_embeddings": False,
             "architectures": ["LlamaForCausalLM"]}  # fmt: skip
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/config.json"
        with open(path, "w") as file:
            json.dump(llama, file)
        said = []
        for context, batch in (("2K", "1"), ("128K", "8")):
            given = ["--model", path, "--context", context, "--batch", batch]
            assert preflight.main([*given, "--device", "a100-40gb"]) == 0
            said.append(capsys.readouterr().out)
    assert said[0].lower().startswith("no") and "worth" in said[1].splitlines()[0].lower()


def test_the_pre_flight_of_a_model_that_is_not_here(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HASHATTN_CACHE", str(tmp_path))
    assert preflight.main(["--model", "pretrained:smollm2", "--context", "2K"]) == 1
    assert "make pretrained" in capsys.readouterr().err


def test_settings_of_the_profile_of_tests_are_small():
    tiny = load_profile("tiny")
    chosen = piloting.pilot_model(tiny)
    own = piloting.pilot_settings(tiny, chosen, 4096, [1 / 8])
    assert own.questions < PilotSettings().questions and own.context < 4096
    embedded = load_profile("embedded")
    assert piloting.pilot_settings(embedded, chosen, 4096, [1 / 8]).context == 4096
    assert piloting.pilot_settings(tiny, chosen, 4096, [1 / 8], {"texts": 9}).texts == 9
    with pytest.raises(ValueError, match="at most 8192, the model's positions"):
        piloting.pilot_settings(embedded, chosen, 10_000, [1 / 8])


def test_a_file_of_questions_among_the_documents_is_not_read(company):
    (company / "questions.csv").write_text("question,answer\nWhich pump?,the old one\n")
    library = piloting.read_library(company, company / "questions.csv")
    assert "questions.csv" not in {document.name for document in library.documents}
    assert [s.key for s in library.skipped if s.name == "questions.csv"] == ["questions"]
    assert "questions" in library.skipped[-1].say("en") and "質問" in library.skipped[-1].say("ja")
    elsewhere = piloting.read_library(company, company.parent / "questions.csv")
    assert "questions.csv" in {document.name for document in elsewhere.documents}


def test_options_of_the_command_line(tmp_path):
    given = ["--context", "4K", "--budgets", "1/4,1/8", "--price", "3", "--samples",
             '{"texts": 9}', "--workload", '{"batch": 4, "context": 9}']  # fmt: skip
    read = pilot._parameters(pilot._parser().parse_args(given), tmp_path)
    assert read == {
        "language": "en", "context": 4096, "budgets": [0.25, 0.125], "samples": {"texts": 9},
        "workload": {"batch": 4, "context": 9, "price_per_hour": 3.0},
    }  # fmt: skip


def test_workloads_that_cannot_be():
    with pytest.raises(ValueError, match="batch"):
        Workload(2048, batch=0)
