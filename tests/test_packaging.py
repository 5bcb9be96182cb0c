"""Packaging: pins that agree, `kernels/` beside a package called kernels, installation."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from transformers.utils import import_utils

ROOT = Path(__file__).parents[1]
REFRESH = "change requirements.lock first, then repeat its lines in environment.yml"


def lock_lines():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def locked():
    """{normalised name: version} of requirements.lock."""
    pins = (re.match(r"([\w.-]+)==([\w.]+)( ; .+)?$", line) for line in lock_lines())
    return {normal(pin[1]): pin[2] for pin in pins}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared():
    """Every requirement of pyproject.toml but its own extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["optional-dependencies"].values()
    lines = project["dependencies"] + [line for group in groups for line in group]
    return [line for line in lines if not line.startswith("hashattn[")]


def test_every_line_of_the_lock_is_one_exact_pin_in_order():
    pins = [re.fullmatch(r"([\w.-]+)==[\w.]+( ; .+)?", line) for line in lock_lines()]
    assert all(pins)
    names = [normal(pin[1]) for pin in pins]
    assert names == sorted(set(names))


def test_environment_yml_repeats_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip["pip"] == lock_lines(), REFRESH
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = next(line for line in conda if line.startswith("python="))
    assert project["requires-python"] == ">=" + python.removeprefix("python=")


def test_every_requirement_is_pinned_within_its_range():
    from packaging.requirements import Requirement

    pins = locked()
    for line in declared():
        requirement = Requirement(line)
        name = normal(requirement.name)
        assert name in pins, f"{name} of pyproject.toml is not in requirements.lock"
        assert requirement.specifier.contains(pins[name]), f"{line} excludes {pins[name]}"


def test_the_packages_of_the_card_are_pinned_where_they_have_to_be():
    pins = locked()
    card = "jupyterlab torch triton transformers datasets seaborn papermill nbval pytest ruff"
    assert set(card.split()) <= set(pins)
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1")  # torch needs exactly this triton


def test_make_installs_from_the_lock_torch_first():
    done = subprocess.run(
        ["make", "-n", "setup", "VENV=absent-venv"], cwd=ROOT, capture_output=True, text=True
    )
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert len(installs) == 2 and done.returncode == 0, done.stderr
    assert all("--constraint requirements.lock" in line for line in installs)
    assert re.search(r"\btorch\b", installs[0]) and "--editable" in installs[1]


def test_make_without_a_target_prints_the_help():
    text = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True).stdout
    for target in "setup compile test reproduce bench gpu lab lint clean model store".split():
        assert f"make {target}" in text


@pytest.mark.parametrize(
    ("python", "says"),
    [
        ("exit 1", "needs Python 3.11 or newer"),  # an old interpreter fails the version check
        ('test "$1" = -c', "apt install python3-venv"),  # a new one without ensurepip
    ],
)
def test_setup_says_what_is_missing(tmp_path, python, says):
    fake = tmp_path / "python3"
    fake.write_text(f"#!/bin/sh\n{python}\n")
    fake.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={fake}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and says in done.stdout


def test_kernels_is_a_folder_and_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


FAKE_KERNELS = '''
"""Stands for Hugging Face's package: it has every name, and decorators change nothing."""


class Anything:
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, function=None, *args, **kwargs):
        return function


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
'''
IMPORTS = """
import transformers
from transformers import LlamaForCausalLM
from transformers.utils import is_kernels_available
import hashattn, hashattn_kernels
assert is_kernels_available() is {available}, is_kernels_available()
if {available}:
    import kernels
    assert kernels.__file__ == {file!r}, kernels.__file__
"""


@pytest.fixture
def fake_kernels(tmp_path):
    """A folder with a `kernels` distribution of a version that transformers uses."""
    version = import_utils.KERNELS_MIN_VERSION
    package, info = (
        tmp_path / "site" / "kernels",
        tmp_path / "site" / f"kernels-{version}.dist-info",
    )
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text(FAKE_KERNELS)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    return package / "__init__.py"


def run_from(root, command, *paths):
    """Run `command` in `root` with `paths` as PYTHONPATH, which comes after root."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def import_code(fake):
    return IMPORTS.format(available=fake is not None, file=str(fake))


def test_models_import_under_pytest_at_the_root(pytestconfig):
    assert pytestconfig.rootpath == ROOT
    exec(import_code(None), {})


def test_models_import_under_pytest_at_the_root_beside_hugging_face_s(tmp_path, fake_kernels):
    test = tmp_path / "test_imports.py"
    body = import_code(fake_kernels).strip().replace("\n", "\n    ")
    test.write_text(f"def test_imports():\n    {body}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"),
               "--rootdir", str(ROOT), "-p", "no:cacheprovider", str(test)]  # fmt: skip
    done = run_from(ROOT, command, fake_kernels.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("installed", [False, True], ids=["without", "with"])
def test_models_import_in_a_notebook_kernel_at_the_root(fake_kernels, installed):
    from nbval.kernel import CURRENT_ENV_KERNEL_NAME, start_new_kernel

    fake = fake_kernels if installed else None
    paths = [ROOT, ROOT / "kernels", *([fake.parents[1]] if installed else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    manager, client = start_new_kernel(
        kernel_name=CURRENT_ENV_KERNEL_NAME, cwd=ROOT, env=environment
    )
    try:
        reply = client.execute_interactive(import_code(fake), timeout=120, output_hook=print)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert reply["content"]["status"] == "ok", reply["content"].get("evalue")


def test_a_kernels_package_at_the_root_would_break_it(tmp_path, fake_kernels):
    """The control: what the rule about `kernels/` prevents does happen without it."""
    (tmp_path / "root" / "kernels").mkdir(parents=True)
    (tmp_path / "root" / "kernels" / "__init__.py").touch()
    command = [sys.executable, "-c", "import transformers.integrations.hub_kernels"]
    done = run_from(tmp_path / "root", command, fake_kernels.parents[1])
    assert "cannot import name" in done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is packaged, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("hashattn", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def pip_install(target, *source):
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index",
               "--no-build-isolation", "--disable-pip-version-check", *target, *source]  # fmt: skip
    done = subprocess.run(map(str, command), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


CHECK = """
import site, sys
editable = [f for f in sys.meta_path if "__editable__" in getattr(f, "__module__", "")]
for finder in editable:  # of the environment that runs the tests
    sys.meta_path.remove(finder)
    sys.modules.pop(finder.__module__)
sys.path.insert(0, sys.argv[1])
site.addsitedir(sys.argv[1])
import hashattn, hashattn_kernels, hashattn.kernels
assert hashattn.kernels.hamming_scores is hashattn_kernels.hamming_scores
print(hashattn.__file__, hashattn_kernels.__file__, sep="\\n")
"""


def import_installed(site_packages, cwd):
    """Where hashattn and hashattn_kernels are imported from, in a process that starts elsewhere."""
    command = [sys.executable, "-P", "-c", CHECK, str(site_packages)]
    done = run_from(cwd, command)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


def test_the_wheel_installs_both_packages_and_no_kernels(source, tmp_path):
    site_packages = tmp_path / "site"
    pip_install(["--target", site_packages], source)
    installed = {path.name for path in site_packages.iterdir() if "." not in path.name}
    assert installed == {"hashattn", "hashattn_kernels"}
    for kind in ("py", "html", "css", "js"):
        files = {p.relative_to(ROOT) for p in (ROOT / "hashattn").rglob(f"*.{kind}")}
        found = {p.relative_to(site_packages) for p in site_packages.glob(f"hashattn/**/*.{kind}")}
        assert found == files and files
    assert import_installed(site_packages, tmp_path) == [
        site_packages / name / "__init__.py" for name in ("hashattn", "hashattn_kernels")
    ]


def test_the_editable_install_points_at_the_source(source, tmp_path):
    # without --ignore-installed pip takes the installed package out of this interpreter
    pip_install(["--prefix", tmp_path, "--ignore-installed"], "--editable", source)
    (site_packages,) = tmp_path.glob("lib/python*/site-packages")
    assert import_installed(site_packages, tmp_path) == [
        source / "hashattn" / "__init__.py",
        source / "kernels" / "hashattn_kernels" / "__init__.py",
    ]
