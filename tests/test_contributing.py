"""CONTRIBUTING.md: each example runs as printed, and does what the page says."""

import importlib
import importlib.util
import re
import sys
from dataclasses import replace

import matplotlib
import pytest

from hashattn.evaluation.benchmarks.registry import BENCHMARKS
from hashattn.evaluation.metrics import METRICS
from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments import common as experiments
from hashattn.reproduce.profiles import load_profile, repository
from hashattn.selectors import METHODS

matplotlib.use("agg")
ROOT = repository()
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE))


def module(path, tmp_path, monkeypatch):
    """An example, imported as the module it would be."""
    file = tmp_path / path.replace("/", "_")
    file.write_text(EXAMPLES[path])
    name = path.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, file)
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, example)
    spec.loader.exec_module(example)
    return example


@pytest.fixture
def knorm(tmp_path, monkeypatch):
    """The selector, registered by the line that the page shows."""
    name, *entry = re.search(r'`"(knorm)": \("(\S+)", "(\S+)"\),`', TEXT).groups()
    module("hashattn/selectors/knorm.py", tmp_path, monkeypatch)
    monkeypatch.setitem(METHODS, name, tuple(entry))


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """The benchmark, registered by the line that the page shows."""
    name, stem, attribute = re.search(r'`"(capitals)": (capitals)\.(\w+),`', TEXT).groups()
    example = module(f"hashattn/evaluation/benchmarks/{stem}.py", tmp_path, monkeypatch)
    monkeypatch.setitem(BENCHMARKS, name, getattr(example, attribute))


@pytest.fixture(scope="module")
def tiny():
    profile = load_profile("tiny")
    return profile, *load_model(profile)


def test_every_example_is_run_here():
    assert len(EXAMPLES) == len(re.findall("^```python", TEXT, flags=re.MULTILINE)) == 7


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.startswith("scripts/")])
def test_a_script_runs(path, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    module(path, tmp_path, monkeypatch)
    assert path != "scripts/picture.py" or (tmp_path / "selection.png").stat().st_size > 5000


def test_a_selector_is_a_file_a_line_and_a_test(knorm, tiny, tmp_path, monkeypatch):
    """Its own test passes, and it runs in a comparison."""
    test = module("tests/selectors/test_knorm.py", tmp_path, monkeypatch)
    test.test_small_keys_come_first()
    profile = replace(tiny[0], methods=("dense", "knorm"))
    weights = experiments.shipped_or_trained(*tiny)
    methods = experiments.methods(profile, experiments.selectors(profile, weights, []))
    assert {method.name for method in methods} == {"dense", "knorm"}


def test_a_benchmark_is_a_file_and_a_line(benchmark, tiny):
    profile = replace(tiny[0], benchmark="capitals", tasks=("capitals",))
    records = experiments.records(profile, tiny[2], 512, samples=3)
    assert [record.answers for record in records] == [("Paris",), ("Tokyo",), ("Nairobi",)]
    assert 256 < len(tiny[2](records[0].context).input_ids) <= 512
    methods = experiments.methods(profile, {})
    rows = experiments.quality(profile, *tiny[1:], methods, 512, samples=2, progress=False)
    assert set(rows.dataset) == {"capitals"} and len(rows) == 4


def test_a_metric_is_a_function_and_a_name(tmp_path, monkeypatch):
    example = module("hashattn/evaluation/first_word.py", tmp_path, monkeypatch)
    monkeypatch.setitem(METRICS, "first_word", example.first_word)
    from hashattn.evaluation.protocol import Protocol

    protocol = Protocol(metric="first_word")
    assert METRICS[protocol.metric]("Paris, of course", ["Paris,"]) == 1
    assert METRICS[protocol.metric]("", ["Paris"]) == 0


def test_the_commands_of_the_page_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", TEXT, flags=re.MULTILINE))
    assert {"setup", "lint", "test", "gate", "store"} <= named
    assert named <= set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    for path in re.findall(r"`((?:hashattn|kernels|tests)/[\w/.]+)`", TEXT):
        assert (ROOT / path).exists(), path
