"""Processes of one thread each: the same results, errors as they are, nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from base.engines.process_work import Noting
from hashattn.base.engines import EngineError
from hashattn.base.engines.processes import Processes, processes_that_fit
from hashattn.base.progress import VARIABLE

PATIENCE = 60  # seconds, on a busy machine


def run(jobs, count=2, **options):
    return list(Processes(count).run(Noting(**options), jobs))


def test_jobs_are_divided_among_processes_of_one_thread(tmp_path, monkeypatch):
    progress = tmp_path / "progress"
    monkeypatch.setenv(VARIABLE, str(progress))
    jobs = [[f"{job}{item}" for item in range(3)] for job in "abcd"] + [["said"]]
    results = run([None, *jobs[:3], None, None, *jobs[3:]], pause=0.05)
    assert sorted(item for item, _, _ in results) == sorted(sum(jobs, []))
    for job in jobs:
        assert [item for item, _, _ in results if item in job] == job
    pids = {pid for _, pid, _ in results}
    assert len(pids) == 2 and os.getpid() not in pids
    assert {threads for _, _, threads in results} == {1}
    assert all(not Path(f"/proc/{pid}").exists() for pid in pids)
    shown = progress.read_text()
    for job in jobs:
        assert f"job {job[0]}: 100%" in shown
    assert shown.count("* half of it is done") == 1


def test_no_job_starts_no_process(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert run([]) == [] and run([None]) == []


@pytest.mark.parametrize(
    "item, kind, message",
    [
        ("wrong", KeyError, "no such sample"),
        ("unsendable", EngineError, "Unsendable: this and that"),
    ],
)
def test_what_a_worker_raises_is_raised_here(item, kind, message):
    with pytest.raises(kind, match=message) as raised:
        run([["a", item, "b"]])
    assert type(raised.value) is kind
    (note,) = raised.value.__notes__
    assert "in a worker process" in note and "process_work.py" in note


@pytest.mark.parametrize(
    "item, message",
    [
        ("killed", "at work on killed was killed.*memory ran out: run fewer at a time.*OMP_NUM"),
        ("terminated", "at work on terminated was ended by SIGTERM; it wrote: nothing"),
        ("exits", "at work on exits ended with 3; it wrote: the disk is gone"),
    ],
)
def test_a_worker_that_dies_is_reported_after_the_results_it_gave(item, message):
    results = Processes(1).run(Noting(), [["a", item, "b"]])
    assert next(results)[0] == "a"
    with pytest.raises(EngineError, match=message):
        next(results)


def test_work_that_cannot_be_found_says_why():
    """Of a script's own `__main__`, say, which no other process has."""
    Noting.__module__, before = "no_such_module", Noting.__module__
    sys.modules["no_such_module"] = sys.modules[before]
    try:
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            run([["a"]])
    finally:
        Noting.__module__ = before
        del sys.modules["no_such_module"]


def test_a_caller_that_looks_no_further_ends_the_workers():
    results = Processes(1).run(Noting(pause=0.01), [list(map(str, range(10_000)))])
    _, pid, _ = next(results)
    results.close()
    assert not Path(f"/proc/{pid}").exists()


SCRIPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
from base.engines.process_work import Noting
from hashattn.base.engines.processes import Processes
for item, pid, _ in Processes(2).run(Noting(0.01), [["a"] * 100_000, ["b"] * 100_000]):
    print(item, pid, flush=True)
"""


def environment():
    paths = os.pathsep.join(path for path in sys.path if path)
    return {k: v for k, v in os.environ.items() if k != VARIABLE} | {"PYTHONPATH": paths}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_their_caller(number):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as script:  # fmt: skip
        found = {}
        while len(found) < 2:
            found.update([script.stdout.readline().split()])
        script.send_signal(number)
        assert script.wait(PATIENCE) != 0
    end = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in found.values()):
        assert time.monotonic() < end, "a worker outlived its caller"
        time.sleep(0.01)


def test_as_many_processes_as_jobs_threads_and_memory_allow(monkeypatch):
    from hashattn.base.engines import processes

    monkeypatch.setattr(processes.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(processes, "_free_bytes", lambda: 9 * 2**30)
    assert processes_that_fit(4, 0) == 4
    assert processes_that_fit(32, 0) == 8
    assert processes_that_fit(32, 2**30) == 4
    assert processes_that_fit(32, 2**40) == 1
    monkeypatch.setattr(processes, "_free_bytes", lambda: None)
    assert processes_that_fit(32, 2**40) == 8


def test_a_count_below_one_is_refused():
    with pytest.raises(ValueError, match="count = 0: must be at least 1"):
        Processes(0)
