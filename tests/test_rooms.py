"""Which room may import which; `import hashattn` loads no room above attention."""

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from hashattn.base.source import packages
from imports import imports, module_name

PACKAGE, KERNELS = packages()
ROOT = PACKAGE.parent
# from the ground up: a room imports its own modules and those of rooms before it
ROOMS = (
    "base",
    "models",
    "hashing",
    "selectors",
    "attention",
    "evaluation",
    "trust",
    "pilot",
    "reproduce",
)
OUTSIDE = {"__init__", "kernels"}  # the names that users import, and the kernels' own


def room(name: str) -> str | None:
    """`attention` of hashattn.attention.cache.IndexedLayer; None outside the package."""
    parts = name.split(".")
    return parts[1] if parts[0] == "hashattn" and len(parts) > 1 else None


def wrong_imports(package: Path) -> list[str]:
    """Imports of a package's files against the direction, as `file -> name`."""
    wrong = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package).parts[0].removesuffix(".py")
        if place in OUTSIDE:
            continue
        allowed = {*ROOMS[: ROOMS.index(place) + 1], "kernels"}
        for name in sorted(imports(path, package)):
            if room(name) not in {None, *allowed}:
                wrong.append(f"{path.relative_to(package)} -> {name}")
    return wrong


def circles(package: Path) -> list[list[str]]:
    """Modules that import each other, in groups; imports for annotations count too."""
    paths = {module_name(path, package): path for path in package.rglob("*.py")}
    graph = {}
    for name, path in paths.items():
        imported = imports(path, package)
        graph[name] = {n if n in paths else n.rpartition(".")[0] for n in imported} & set(paths)
    order: list[str] = []
    while ready := [n for n in graph if n not in order and graph[n] - {n} <= set(order)]:
        order += ready
    rest = sorted(set(graph) - set(order))
    return [rest] if rest else []


def test_every_file_lies_in_a_room():
    places = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}
    assert {place.removesuffix(".py") for place in places} == {*ROOMS, *OUTSIDE}


def test_rooms_import_downwards_alone():
    assert wrong_imports(PACKAGE) == []


def test_no_module_imports_itself_over_others():
    assert circles(PACKAGE) == []
    assert circles(KERNELS) == []


@pytest.fixture
def planted(tmp_path):
    """plant(name=text, ...): writes modules into a package of its own and returns its folder."""

    def plant(**files: str) -> Path:
        for name, text in files.items():
            path = tmp_path / "hashattn" / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "hashattn"

    return plant


@pytest.mark.parametrize(
    "line",
    [
        "from hashattn.attention import attach",
        "import hashattn.reproduce.profiles",
        "from ..attention.budget import Budget",
        "def later():\n    from hashattn.evaluation import runner",
        "if TYPE_CHECKING:\n    from hashattn.attention.budget import Budget",
    ],
)
def test_a_planted_wrong_import_is_found(planted, line):
    package = planted(selectors__new=line, base__fine="from hashattn_kernels import select")
    (wrong,) = wrong_imports(package)
    assert wrong.startswith("selectors/new.py -> hashattn.")


def test_a_planted_circle_is_found(planted):
    package = planted(
        base__one="from hashattn.base import two",
        base__two="from .three import x",
        base__three="def f():\n    import hashattn.base.one",
        base__four="from hashattn.base import one",
    )
    (circle,) = circles(package)
    assert {f"hashattn.base.{name}" for name in ("one", "two", "three")} <= set(circle)
    package = planted(base__three="if TYPE_CHECKING:\n    import hashattn.base.one")
    assert circles(package) == [circle]
    assert circles(planted(base__three="import os")) == []


def test_importing_the_package_opens_no_room_above_attention():
    script = (
        "import sys, hashattn\n"
        "light = {n.split('.')[1] for n in sys.modules if n.startswith('hashattn.')}\n"
        "[getattr(hashattn, name) for name in hashattn.__all__]\n"
        "all = {n.split('.')[1] for n in sys.modules if n.startswith('hashattn.')}\n"
        "print(*light, '|', *all)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    light, everything = (set(part.split()) for part in done.stdout.split("|"))
    assert light == set()
    assert "attention" in everything and everything <= {*ROOMS[:5], "kernels"}


PACKAGES = ("selectors", "hashing", "evaluation", "trust", "pilot", "kernels", "reproduce")
PUBLIC = ("hashattn", *(f"hashattn.{name}" for name in PACKAGES))


def test_public_names_are_listed_in_one_place():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## What is public") :].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(hashattn\S*)` \| (.+) \|$", section, flags=re.MULTILINE))
    listed = {name: sorted(re.findall(r"`(\w+)`", names)) for name, names in rows.items()}
    assert listed == {name: sorted(importlib.import_module(name).__all__) for name in PUBLIC}
    for name, names in listed.items():
        assert all(hasattr(importlib.import_module(name), each) for each in names)


def test_what_only_its_module_reads_is_private():
    """Functions and constants; a class or an alias may name what others only receive."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder in ("hashattn", "kernels", "tests", "data", "notebooks"):
        paths += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".ipynb")]
    texts = {path: path.read_text() for path in paths}
    readers = Counter(word for text in texts.values() for word in set(re.findall(r"\w+", text)))
    alone = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in defined(ast.parse(texts[path]))
        if readers[name] == 1 and not name.startswith("_")
    ]
    assert alone == []


def defined(tree: ast.Module) -> set[str]:
    """Functions and constants (no aliases of types) at the top of a module."""
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not re.match("[A-Z][a-z]", name)}
