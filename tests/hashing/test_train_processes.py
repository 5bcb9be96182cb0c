"""Layers that train in processes: the same weights, whatever starts, stops or ends them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hashattn.base.engines import EngineError, InProcess, processes
from hashattn.base.engines.processes import Processes
from hashattn.hashing import TrainRecipe
from hashattn.hashing import train as training
from hashattn.hashing.train import train_hash_weights
from hashing.test_train import Killed, model_of_four_layers, sequences

RECIPE = TrainRecipe.signs().vary(steps=30, evaluate_every=10, rows_per_step=8, top=8)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def train(path, engine=None, recipe=RECIPE, **options):
    settings = {"hidden": 16, "seed": 3, "progress": False} | options
    return train_hash_weights(
        model_of_four_layers(), sequences(), recipe, out_dir=path, engine=engine, **settings
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process and one thread train."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    weights = train(tmp_path_factory.mktemp("whole"), InProcess())
    torch.set_num_threads(before)
    return weights


SCRIPT = """
import torch
from hashattn.hashing import train
from hashing import test_train_processes as t
train.STEPS_WORTH_PROCESSES = 0
torch.set_num_threads(2)
def not_here(*arguments, **options):
    raise AssertionError("a layer trains in the script's own process")
train.train_layer = not_here
print("sha256", t.train({path!r}).sha256)
"""


def test_a_script_without_a_main_guard_trains_the_same_weights_side_by_side(whole, tmp_path):
    """From stdin, so that there is not even a file that another process could run again."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-"], input=SCRIPT.format(path=str(tmp_path)), env=environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["sha256", whole.sha256]


def test_an_interrupted_training_ends_its_workers_and_resumes_with_the_same_weights(
    whole, tmp_path, monkeypatch
):
    workers, layers = [], []
    starts = processes.subprocess.Popen

    def notes(*arguments, **options):
        workers.append(starts(*arguments, **options))
        return workers[-1]

    def interrupts_at_the_third(self, sender, report):
        if report[1] and report[1]["prefix"].startswith("layer 2"):
            raise KeyboardInterrupt

    monkeypatch.setattr(processes.ReportedProgress, "show", interrupts_at_the_third)
    monkeypatch.setattr(processes.subprocess, "Popen", notes)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Processes(2), progress=True)
    assert len(workers) == 2 and not any(Path(f"/proc/{one.pid}").exists() for one in workers)
    kept = [int(path.stem[-3:]) for path in (tmp_path / "layers").glob("*.json")]
    assert kept and not list((tmp_path / "layers").glob("*.partial"))
    real = training.train_layer
    monkeypatch.setattr(
        training, "train_layer", lambda *a, **k: layers.append(k["label"]) or real(*a, **k)
    )
    assert train(tmp_path, InProcess()).sha256 == whole.sha256
    assert sorted(layers) == [f"layer {i}" for i in range(4) if i not in kept]


def test_a_killed_worker_names_its_layer_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(
        processes.ReportedProgress, "show", lambda self, pid, _: os.kill(pid, signal.SIGKILL)
    )
    with pytest.raises(EngineError, match="at work on layer 1 was killed.*OMP_NUM_THREADS"):
        train(tmp_path, Processes(1), progress=True, layers=[1])


def test_an_error_of_a_layer_is_raised_as_it_is(tmp_path, monkeypatch):
    """A captured sequence is lost between the capture and its reading."""
    real = training._capture_sequences

    def loses_one(model, sequences, folder, *options):
        real(model, sequences, folder, *options)
        folder.sequence_file(0).write_bytes(b"short")

    monkeypatch.setattr(training, "_capture_sequences", loses_one)
    found = []
    for engine in (InProcess(), Processes(1)):
        with pytest.raises(Exception) as raised:
            train(tmp_path / type(engine).__name__, engine)
        found.append((raised.type, str(raised.value)))
    assert found[0] == found[1]


def test_one_thread_trains_and_the_others_come_back(tmp_path, monkeypatch):
    counts = []

    def counted(*arguments, **options):
        counts.append(torch.get_num_threads())
        raise Killed

    monkeypatch.setattr(training, "train_layer", counted)
    with pytest.raises(Killed):
        train(tmp_path)
    assert counts == [1] and torch.get_num_threads() == 2


@pytest.mark.parametrize("threads, layers, steps, count", [
    (2, None, 200, 2), (2, None, 100, None), (2, [1], 600, None), (4, [0, 1, 3], 200, 3),
    (1, None, 200, None),
])  # fmt: skip
def test_processes_are_used_where_they_are_worth_their_start(
    tmp_path, monkeypatch, threads, layers, steps, count
):
    used = []

    class Stops(Processes):
        def run(self, work, jobs):
            used.append(self.count)
            for job in jobs:
                assert all(isinstance(path, Path) for path in job[0].train)
            raise Killed

    def here(self, work, jobs):
        used.append(None)
        raise Killed

    monkeypatch.setattr(processes, "Processes", Stops)
    monkeypatch.setattr(InProcess, "run", here)
    monkeypatch.setattr(processes, "_free_bytes", lambda: None)
    torch.set_num_threads(threads)
    with pytest.raises(Killed):
        train(tmp_path, recipe=RECIPE.vary(steps=steps), layers=layers)
    torch.set_num_threads(2)
    assert used == [count]


def test_an_engine_elsewhere_gets_what_the_files_hold(tmp_path):
    """Its machines may not see this one's folders."""

    class Elsewhere(InProcess):
        local = False

        def run(self, work, jobs):
            for job in jobs:
                assert all(capture.keys.shape[1] == 96 for capture in job[0].train)
                yield from work(job)

    here, there = (train(tmp_path / str(i), e) for i, e in enumerate((InProcess(), Elsewhere())))
    assert here.sha256 == there.sha256
