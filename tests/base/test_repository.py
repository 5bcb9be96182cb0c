"""HASHATTN_HOME moves everything under data/, and no other variable is read by accident."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hashattn.base.engines import EngineError, InProcess, chosen_engine
from hashattn.base.repository import RepositoryError, repository
from hashattn.evaluation.benchmarks.corpus import paragraphs
from hashattn.evaluation.benchmarks.longbench_protocol import load_prompts
from hashattn.evaluation.benchmarks.ruler.draws import real_words
from hashattn.evaluation.benchmarks.ruler.haystack import corpus
from hashattn.evaluation.benchmarks.ruler.questions import question_set
from hashattn.reproduce.bench.reference import reference_path, stored
from hashattn.reproduce.notebooks.fingerprint import input_hashes
from hashattn.reproduce.profiles import available, load_profile
from hashattn.reproduce.published.table import cite, load_paper

ROOT = Path(__file__).parents[2]
OTHERS_VARIABLES = {  # of Ray, torchrun, Triton, Python, the desktop
    "RAY_ADDRESS", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RANK", "WORLD_SIZE", "TRITON_INTERPRET",
    "PYTHONPATH", "XDG_CACHE_HOME",
}  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A checkout's data/ elsewhere, each part of it another one; what was read before is cached."""
    paragraphs("eval"), cite("table8.lsh_bits"), question_set("squad"), real_words()
    data = tmp_path / "data"
    for part in ("profiles", "longbench", "reference"):
        shutil.copytree(ROOT / "data" / part, data / part)
    (data / "profiles" / "tiny.yaml").rename(data / "profiles" / "little.yaml")
    lines = (ROOT / "data" / "corpus" / "python_docs.txt").read_text().splitlines()
    (data / "corpus").mkdir()
    text = "\n".join(lines[:2000]) + "\nA paragraph about zymurgy that is nowhere else.\n"
    (data / "corpus" / "python_docs.txt").write_text(text)
    prompts = data / "longbench" / "prompts.json"
    prompts.write_text(prompts.read_text().replace("{context}", "moved {context}"))
    paper = data / "reference" / "paper.csv"
    paper.write_text(paper.read_text().replace("Table 8", "Table 88"))
    monkeypatch.setenv("HASHATTN_HOME", str(tmp_path))
    return tmp_path


def test_every_path_follows_the_home(home):
    assert repository() == home.resolve()
    assert "little" in available() and "tiny" not in available()
    profile = load_profile("little")
    assert profile.hash_weights_path == home / "data" / "embedded" / "hash_weights"
    both = {*paragraphs("train"), *paragraphs("eval")}
    assert len(both) < 2002 and any("zymurgy" in line for line in both)
    assert corpus().text == " ".join(paragraphs("eval"))
    assert "zymurgy" in real_words()
    assert set(question_set("squad").documents) <= set(paragraphs("eval"))
    assert all(template.count("moved ") for template in load_prompts().values())
    assert cite("table8.lsh_bits").endswith("Table 88") and load_paper() is not None
    assert reference_path("cpu").is_relative_to(home) and stored("cpu")["layer"]


def test_the_home_is_where_it_was_afterwards():
    assert repository() == ROOT and not any("zymurgy" in line for line in paragraphs("train"))
    assert cite("table8.lsh_bits").endswith("Table 8")


def test_a_home_that_is_none_is_an_error_of_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("HASHATTN_HOME", str(tmp_path))
    for ask in (available, lambda: paragraphs("eval"), load_prompts, load_paper):
        with pytest.raises(RepositoryError, match="no data/profiles in .* set HASHATTN_HOME"):
            ask()
    monkeypatch.setenv("HASHATTN_HOME", "")
    assert repository() == ROOT


def test_one_place_says_where_the_data_is():
    """All other modules ask it: a path made from __file__ does not follow HASHATTN_HOME."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "hashattn").rglob("*.py")
        if re.search(r"Path\(__file__\)", path.read_text())
    }
    assert found == {"hashattn/base/repository.py", "hashattn/base/source.py"}
    assert set(input_hashes(load_profile("tiny"))) >= {"corpus", "prompts", "reference"}


def test_variables_of_the_environment_carry_the_prefix():
    found = set()
    for path in (ROOT / "hashattn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and "environ" in ast.unparse(node.func):
                found |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant)}
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                found.add(ast.unparse(node.slice).strip("'"))
    own = found - OTHERS_VARIABLES
    assert {"HASHATTN_HOME", "HASHATTN_RESULTS"} <= own
    assert all(name.startswith("HASHATTN_") for name in own), own


@pytest.mark.parametrize("stranger", ["docker", "ray", ""])
def test_an_engine_of_something_else_does_not_count(monkeypatch, stranger):
    monkeypatch.delenv("HASHATTN_ENGINE", raising=False)
    monkeypatch.setenv("ENGINE", stranger)
    assert isinstance(chosen_engine(), InProcess)
    monkeypatch.setenv("HASHATTN_ENGINE", "docker")
    with pytest.raises(
        EngineError, match="HASHATTN_ENGINE = 'docker': must be one of in_process, "
    ):
        chosen_engine()


def made(*arguments, **environment):
    """What `make` shows a command: its profile, and the engine in its environment."""
    show = "show: ; @echo $(PROFILE) $(TEST_PROFILE) $$HASHATTN_ENGINE"
    done = subprocess.run(
        ["make", "--eval", show, "show", *arguments],
        cwd=ROOT, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_make_takes_its_variables_from_the_command_line_alone():
    strangers = {"ENGINE": "docker", "PROFILE": "production", "TEST_PROFILE": "all"}
    assert made(**strangers) == "embedded tiny in_process"
    assert made("ENGINE=ray", "PROFILE=tiny", **strangers) == "tiny tiny ray"
    assert made(HASHATTN_ENGINE="ray") == "embedded tiny ray"
