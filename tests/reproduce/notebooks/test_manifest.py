import json
import subprocess

from hashattn.base.files import PARTIAL, write_json, write_text
from hashattn.reproduce.notebooks.environment import lock_versions
from hashattn.reproduce.notebooks.files import produced_files, read_or_none
from hashattn.reproduce.notebooks.fingerprint import notebook_fingerprints
from hashattn.reproduce.notebooks.manifest import git_state
from hashattn.reproduce.notebooks.progress import last_line
from hashattn.reproduce.profiles import load_profile


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_git_state_names_commit_and_local_changes(tmp_path):
    assert git_state(tmp_path) == {"commit": None, "dirty": None}
    git(tmp_path, "init")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "one")
    clean = git_state(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == clean | {"dirty": True}


def test_package_versions_come_from_the_installation(tmp_path):
    lock = tmp_path / "requirements.lock"
    lock.write_text("# pins\npytest==0.0.1\nno-such-package==1 ; platform_system == 'Linux'\n")
    versions = lock_versions(lock)
    assert versions["no-such-package"] is None
    assert versions["pytest"] not in (None, "0.0.1")


def test_profile_is_json():
    assert json.loads(json.dumps(load_profile("embedded").to_dict()))["training"]["bits"] == 32


def test_damaged_json_is_like_none(tmp_path):
    path = write_json(tmp_path / "deep" / "state.json", {"b": 1, "a": [2]})
    assert read_or_none(path) == {"a": [2], "b": 1}
    path.write_text(path.read_text()[:-4])
    assert read_or_none(path) is None and read_or_none(tmp_path / "absent.json") is None


def test_produced_files_leave_out_what_is_about_the_run(tmp_path):
    kept = ["figures/a.png", "notebooks/00_a.ipynb", "claims/00_a.json"]
    out = [
        "manifest.json",
        "report.html",
        "state/00_a.json",
        "x.tmp",
        f"y{PARTIAL}",
        "notebooks/1.partial.ipynb",
    ]
    for name in kept + out:
        write_text(tmp_path / name, "x")
    assert [p.relative_to(tmp_path).as_posix() for p in produced_files(tmp_path)] == sorted(kept)
    assert produced_files(tmp_path / "absent") == []


def test_fingerprints_follow_code_of_earlier_notebooks_but_not_their_prose(write_notebook):
    def prints(*texts):
        paths = [write_notebook(f"0{i}_n", text) for i, text in enumerate(texts)]
        return paths, notebook_fingerprints(paths, "shared")

    paths, before = prints("a = 1", "b = 1", "c = 1")
    _, after = prints("a = 1", "b = 2", "c = 1")
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ["01_n", "02_n"]
    paths[1].write_text(paths[1].read_text().replace("# Title", "# Other title"))
    prose = notebook_fingerprints(paths, "shared")
    assert [name for name in after if after[name] != prose[name]] == ["01_n"]
    assert not set(prose.values()) & set(notebook_fingerprints(paths, "other").values())


def test_progress_shows_the_newest_state_of_a_bar(tmp_path):
    path = tmp_path / "progress.txt"
    assert last_line(path) == ""
    path.write_text("layer 0: 100%\nlayer 1:  10%\rlayer 1:  60%\r")
    assert last_line(path) == "layer 1:  60%"
