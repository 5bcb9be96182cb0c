"""Which source files key a result, and which model hash weights know."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hashattn.base.source import packages, sources, sources_sha256
from hashattn.models import identity
from hashattn.models.identity import (
    PRESENTATION,
    attends_by_distance,
    base_model_record,
    code_version,
    model_name,
)
from hashattn.selectors import METHODS
from helpers import tiny_model

PACKAGE, KERNELS = packages()
COVERED = [path for _, path in sources(without=PRESENTATION)]


@pytest.fixture
def copied(tmp_path):
    """Folders like those of both packages, each file with its name alone in it."""
    for folder, path in sources():
        copy = tmp_path / folder.name / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(f"# {path.name}\n")
    return tuple(tmp_path / folder.name for folder in packages())


def key(folders):
    return sources_sha256(folders, without=PRESENTATION)


def moves_the_key(folders, path, before):
    content = path.read_bytes()
    path.write_bytes(content + b"\n# changed\n")
    changed = key(folders) != before
    path.write_bytes(content)
    return changed


def test_the_key_of_results_is_that_of_the_files_on_disk(tmp_path):
    assert code_version() == key(packages())
    ignored = shutil.ignore_patterns("__pycache__")
    copies = [shutil.copytree(p, tmp_path / p.name, ignore=ignored) for p in packages()]
    assert key(copies) == code_version()  # wherever they lie
    with open(copies[1] / "api.py", "a") as file:
        file.write("# changed\n")
    assert key(copies) != code_version()


def test_every_line_moves_the_key_but_those_of_presentation(copied):
    all_files = [path for _, path in sources(copied)]
    before = key(copied)
    still = {p for p in all_files if not moves_the_key(copied, p, before)}
    shown = {p for p in all_files for name in PRESENTATION if p.is_relative_to(copied[0] / name)}
    assert still == shown and len(shown) < len(all_files) / 3
    needed = [
        "models/dense.py",
        "evaluation/methods.py",
        "hashing/weights.py",
        "evaluation/runner.py",
    ]
    needed += [f"{module.removeprefix('hashattn.').replace('.', '/')}.py"
               for module, _ in METHODS.values()]  # fmt: skip
    assert not still & {copied[0] / name for name in needed}
    assert not any(path.is_relative_to(copied[1]) for path in still)


def test_a_new_a_moved_and_a_namesake_file_move_the_key(copied):
    before = key(copied)
    for name in ("selectors/newest.py", "evaluation/plots.py", "room/deep/er.py"):
        path = copied[0] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        assert key(copied) != before, name
        path.unlink()
    moved = (copied[0] / "models" / "heads.py").rename(copied[0] / "models" / "brows.py")
    assert key(copied) != before
    moved.rename(copied[0] / "models" / "heads.py")
    assert key(copied) == before


def imported(path):
    """Modules that a source file names anywhere: imported at any depth, or in a string."""
    package = path.relative_to(path.parents[len(path.relative_to(PACKAGE).parts)]).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"^hashattn(?:\.\w+)+$", node.value)


def test_no_source_of_the_key_names_a_module_outside_it():
    """Lazy imports too: what decides an answer cannot stand where no key sees it."""
    named = {
        path: {"/".join(name.split(".")[1:]) for name in imported(path)}
        for path in COVERED
        if path.is_relative_to(PACKAGE)
    }
    shown = [name.removesuffix(".py") for name in PRESENTATION]
    wrong = {
        (str(path), name)
        for path, names in named.items()
        for name in names
        if any(f"{name}/".startswith(f"{each}/") for each in shown)
    }
    assert wrong == set()
    assert (
        "models/families/softmax_sinks" in named[PACKAGE / "attention" / "inputs.py"]
    )  # relative imports are read


ANSWER = """
import importlib, json, sys, tempfile
import hashattn, hashattn.kernels
from hashattn.evaluation.records import Record
from hashattn.evaluation.methods import Method
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.runner import evaluate
from hashattn.selectors import METHODS
from helpers import characters, tiny_model

for name in hashattn.__all__:
    getattr(hashattn, name)
for module, _ in METHODS.values():
    importlib.import_module(module)
protocol = Protocol(sink=1, local=3, max_new_tokens=2)
methods = [Method("dense")]
for name in ("oracle", "lsh", "quest"):
    methods.append(Method(name, hashattn.make_selector(name), protocol.budget(heavy=5)))
model = tiny_model("llama")
model.config.max_position_embeddings = 4096
with tempfile.TemporaryDirectory() as folder:
    rows = evaluate(model, characters(), [Record("x", "a b c d " * 20, ("a",))], methods, protocol,
                    folder + "/out.jsonl", progress=False)
assert len(rows) == 8
roots = ("hashattn", "hashattn_kernels")
found = {n: m.__file__ for n, m in sys.modules.items() if n.split(".")[0] in roots}
print(json.dumps({name: path for name, path in found.items() if path}))
"""


def test_everything_that_answering_imports_is_part_of_the_key():
    done = subprocess.run(
        [sys.executable, "-c", ANSWER],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "HOME": str(Path.home())},
    )
    assert done.returncode == 0, done.stderr
    loaded = {name: Path(path) for name, path in json.loads(done.stdout.splitlines()[-1]).items()}
    assert {"hashattn.evaluation.cells", "hashattn.models.dense", "hashattn_kernels.api"} <= set(
        loaded
    )
    assert set(loaded.values()) - set(COVERED) == set()


def test_model_name_never_tells_where_a_folder_lies(tmp_path):
    model = tiny_model("llama")
    for path, name in (("", None), ("org/model", "org/model"), (str(tmp_path), tmp_path.name)):
        model.config._name_or_path = path
        assert model_name(model) == name


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_stored_in_bfloat16_is_the_same_in_other_dtypes(family, dtype):
    stored = tiny_model(family, torch.bfloat16)
    with torch.no_grad():  # values that float16 flushes, of which large models have some
        for weight in stored.parameters():
            weight.view(-1)[:3] = torch.tensor([1e-6, -(2.0**-17), 3e-5])
    expected = base_model_record(stored)["projections"]
    assert base_model_record(stored.to(dtype))["projections"] == expected
    assert len(expected) == (1 if family == "gemma2" else 2) and len(set(expected.values())) > 0


def test_float32_weights_are_the_same_in_bfloat16():
    records = [base_model_record(tiny_model("qwen3", d)) for d in (torch.float32, torch.bfloat16)]
    assert records[0] == records[1] and records[0]["unread"] == {}


def test_nan_is_not_taken_for_a_small_weight():
    model = tiny_model("llama")
    before = base_model_record(model)["projections"]
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 3] = float("nan")
    after = base_model_record(model)["projections"]
    assert after["0"] == before["0"] and after["1"] != before["1"]


def test_configuration_hash_ignores_attention_but_not_shape():
    sdpa, eager = (tiny_model("llama", attention=name) for name in ("sdpa", "eager"))
    assert identity.config_sha256(sdpa.config) == identity.config_sha256(eager.config)
    assert identity.config_sha256(sdpa.config) != identity.config_sha256(
        tiny_model("llama_mqa").config
    )


@pytest.mark.parametrize(("family", "expected"), [("llama", True), ("gpt_neox", True)])
def test_rotary_models_attend_by_distance(family, expected):
    assert attends_by_distance(tiny_model(family)) is expected


def test_models_whose_rotation_depends_on_the_length_do_not():
    model = tiny_model("llama")
    for rope_type in ("dynamic", "longrope", "yarn"):
        model.config.rope_parameters = {"rope_type": rope_type, "rope_theta": 1e4}
        assert not attends_by_distance(model)
    model.config.rope_parameters = None
    assert not attends_by_distance(model)
