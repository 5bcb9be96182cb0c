import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hashattn.base.engines import EngineError
from hashattn.reproduce.__main__ import main
from hashattn.reproduce.access import AccessError
from hashattn.reproduce.notebooks.driver import (
    ReproductionError,
    find_notebooks,
    only_run,
    reproduce,
)
from hashattn.reproduce.notebooks.execute import KernelError, NotebookFailed
from hashattn.reproduce.notebooks.store import store

CLAIM = """
from hashattn.reproduce import Claims
claims = Claims("{name}")
claims.must_hold("value of {name}", {value}, low=1, paper="2")
claims.verdict()
"""
FIGURE = """
import os
from hashattn.reproduce.profiles import load_profile
folder = load_profile().results
for kind in ("figures", "tables"):
    (folder / kind).mkdir(exist_ok=True)
_ = (folder / "figures" / "dot.png").write_bytes(b"not really a picture")
_ = (folder / "tables" / "t.csv").write_text("method,score\\nhash,<1>\\n")
"""


@pytest.fixture
def results(results):
    """The results folder of `profile_file`."""
    return results / "small"


@pytest.fixture(autouse=True)
def caller_s_environment(monkeypatch):
    """reproduce() sets variables for its kernels: undo them after each test."""
    for name in ("HASHATTN_PROFILE", "HASHATTN_PROGRESS", "PYTHONPATH", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.delenv("HASHATTN_PROGRESS")


def test_an_engine_that_is_not_here_ends_a_run_before_any_work(
    profile_file, results, write_notebook, monkeypatch
):
    folder = write_notebook("00_first", "x = 1", "print(x)").parent
    monkeypatch.setenv("HASHATTN_ENGINE", "spark")
    with pytest.raises(EngineError, match="in_process, ray"):
        reproduce(str(profile_file), folder)
    monkeypatch.setenv("HASHATTN_ENGINE", "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"pip install '\.\[ray\]'"):
        reproduce(str(profile_file), folder)
    assert not (results / "notebooks").exists()


def test_a_run_is_complete_reused_and_repeated_only_where_something_changed(
    profile_file, results, write_notebook, capsys
):
    first = write_notebook("00_first", "x = 1", FIGURE, CLAIM.format(name="00_first", value=1.5))
    second = write_notebook("01_second", "y = 2", "print(y)")
    outcome = reproduce(str(profile_file), first.parent)

    out = capsys.readouterr().out
    assert "00_first: running" in out and "01_second: running" in out
    assert "value of 00_first" in out and "holds" in out and "1.5" in out
    assert [c.verdict for c in outcome.claims] == ["holds"]
    manifest = json.loads((results / "manifest.json").read_text())
    assert {"figures/dot.png", "tables/t.csv", "notebooks/00_first.ipynb"} <= set(
        manifest["files_sha256"]
    )
    assert manifest["packages"]["papermill"] and manifest["inputs_sha256"]["model"]
    assert set(manifest["seconds"]) == {"00_first", "01_second"}
    report = (results / "report.html").read_text()
    assert "data:image/png;base64," in report and "&lt;1&gt;" in report
    assert 'href="notebooks/00_first.ipynb"' in report and "value of 00_first" in report
    assert "http" not in report

    reproduce(str(profile_file), first.parent)
    out = capsys.readouterr().out
    assert "00_first: reused" in out and "01_second: reused" in out and "running" not in out
    assert "value of 00_first" in out

    second.write_text(second.read_text().replace("y = 2", "y = 3"))
    reproduce(str(profile_file), first.parent)
    out = capsys.readouterr().out
    assert "00_first: reused" in out and "01_second: running" in out

    (results / "figures" / "dot.png").unlink()
    reproduce(str(profile_file), first.parent)
    assert "00_first: running" in capsys.readouterr().out

    executed = results / "notebooks" / "00_first.ipynb"
    assert store(executed, first) and not store(executed, first)
    reproduce(str(profile_file), first.parent)  # storing outputs changed no input
    assert "running" not in capsys.readouterr().out


def test_a_failing_cell_ends_the_run_with_two_lines(profile_file, results, write_notebook, capsys):
    broken = write_notebook("00_broken", "x = 0", "1 / x", "print('not reached')")
    assert main(["--profile", str(profile_file), "--notebooks", str(broken.parent)]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    partial = results / "notebooks" / "00_broken.partial.ipynb"
    assert error[0] == "00_broken.ipynb failed in cell 2: ZeroDivisionError: division by zero"
    assert error[1].startswith(f"see {partial}") and partial.is_file() and len(error) == 2
    assert not (results / "notebooks" / "00_broken.ipynb").exists()


def test_a_dead_kernel_is_a_failure_too(profile_file, write_notebook):
    dead = write_notebook("00_dead", "import os", "os._exit(1)")
    with pytest.raises(NotebookFailed, match="DeadKernelError"):
        reproduce(str(profile_file), dead.parent)


UNJUDGED = """
import torch
from hashattn.reproduce import Claims
torch.set_num_threads(3)
claims = Claims("{name}")
claims.caution("4 of 8 contexts were cut, 2 answers lost")
claims.goal("ours at 32x minus dense", 0, low=-3, unjudged="dense answers 0 of <8>", main=True)
claims.verdict()
"""


def test_a_run_that_judged_nothing_is_no_success(profile_file, results, write_notebook, capsys):
    """Its report says so first, in red; what was recorded comes from the notebook's kernel."""
    path = write_notebook("00_dead", "x = 1", UNJUDGED.format(name="00_dead"))
    write_notebook("01_silent", "x = 1", "x")
    assert main(["--profile", str(profile_file), "--notebooks", str(path.parent)]) == 1
    out, error = capsys.readouterr()
    assert "0 of 0 claims hold, 0 of 0 goals met, 1 not judged" in out
    assert "1 not judged: dense answers 0 of <8>" in out
    assert "caution: 4 of 8 contexts were cut, 2 answers lost" in out
    assert "'ours at 32x minus dense' first: dense answers 0 of <8>" in error
    report = (results / "report.html").read_text()
    alarm = report.index('class="alarm">Not judged, because dense answers 0 of &lt;8&gt;')
    assert alarm < report.index("<h2>") < report.index("4 of 8 contexts were cut")
    manifest = json.loads((results / "manifest.json").read_text())
    assert manifest["machine"]["threads"] == 3  # set in the kernel
    assert manifest["environments"]["00_dead"]["executable"] == sys.executable
    assert manifest["environments"]["01_silent"] is None


@pytest.mark.parametrize("argv", [["/nowhere/python3"], [sys.executable, "-S"]])
def test_the_notebooks_interpreter_is_the_drivers_whatever_jupyter_finds(
    profile_file, results, write_notebook, monkeypatch, tmp_path, argv
):
    """A python3 kernelspec earlier on the path: of a Python that is gone, or without ipykernel."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = [*argv, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    fake = {"argv": argv, "display_name": "Python 3", "language": "python",
            "env": {"FAKE_KERNELSPEC": "1"}}  # fmt: skip
    (spec / "kernel.json").write_text(json.dumps(fake))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    said = "import os, sys\nprint(sys.executable, os.environ.get('FAKE_KERNELSPEC'))"
    path = write_notebook("00_where", "x = 1", said)
    reproduce(str(profile_file), path.parent)
    executed = json.loads((results / "notebooks" / "00_where.ipynb").read_text())
    assert executed["cells"][2]["outputs"][0]["text"] == [f"{sys.executable} None\n"]


def test_an_interpreter_without_ipykernel_is_said_before_any_work(
    profile_file, results, write_notebook, monkeypatch
):
    folder = write_notebook("00_first", "x = 1").parent
    monkeypatch.setattr(
        "hashattn.reproduce.notebooks.execute.find_spec",
        lambda name: None if name == "ipykernel" else name,
    )
    with pytest.raises(KernelError, match="has no ipykernel: run make setup"):
        reproduce(str(profile_file), folder)
    assert not results.exists()


def test_a_violated_claim_that_nobody_raised_fails_the_run(profile_file, write_notebook):
    quiet = CLAIM.format(name="00_quiet", value=0.5).replace("claims.verdict()", "")
    path = write_notebook("00_quiet", "x = 1", quiet)
    with pytest.raises(ReproductionError, match="did not hold: value of 00_quiet"):
        reproduce(str(profile_file), path.parent)


def test_after_a_kill_the_next_run_goes_on(profile_file, results, write_notebook):
    write_notebook("00_quick", "x = 1")
    nap = "import os, time\ntime.sleep(float(os.environ['NAP']))"
    folder = write_notebook("01_slow", "x = 1", nap).parent
    command = [sys.executable, "-m", "hashattn.reproduce", "--profile", str(profile_file)]
    command += ["--notebooks", str(folder)]
    environment = os.environ | {"PYTHONPATH": ".:kernels", "NAP": "60"}
    process = subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 60
    while not (results / "notebooks" / "01_slow.partial.ipynb").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(
        command, env=environment | {"NAP": "0"}, cwd=Path(__file__).parents[3],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "00_quick: reused" in done.stdout and "01_slow: running" in done.stdout


def test_a_missing_model_ends_before_any_work(profile_file, results, write_notebook):
    folder = write_notebook("00_first", "x = 1").parent
    (profile_file.parent / "model" / "config.json").unlink()
    with pytest.raises(AccessError, match="lacks config.json"):
        reproduce(str(profile_file), folder)
    assert not results.exists()


def test_two_runs_do_not_share_a_results_folder(tmp_path):
    with only_run(tmp_path):
        with pytest.raises(ReproductionError, match="another run is writing"):
            with only_run(tmp_path):
                pytest.fail("the folder was taken twice")
    with only_run(tmp_path):
        pass


def test_notebooks_are_found_in_order(tmp_path):
    for name in ("02_c", "00_a", "draft", "00_a.partial"):
        (tmp_path / f"{name}.ipynb").touch()
    assert [path.stem for path in find_notebooks(tmp_path)] == ["00_a", "02_c"]
    with pytest.raises(ReproductionError, match="no notebook"):
        find_notebooks(tmp_path / "absent")
