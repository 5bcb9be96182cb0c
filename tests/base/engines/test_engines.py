"""Engines: the same results in process and on Ray, where workers and nodes may die."""

import json
import os
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch

from evaluation import test_parallel as shared
from hashattn.base.engines import EngineError, InProcess, chosen_engine
from hashattn.evaluation import runner
from hashattn.evaluation.cells import ContextRunner
from hashattn.hashing import TrainRecipe
from hashattn.hashing.train import train_hash_weights
from helpers import characters, tiny_model

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cluster():
    """Two nodes that compute beside a head that does not; as RAY_ADDRESS would name it."""
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    made.nodes = [made.add_node(num_cpus=1) for _ in range(2)]
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = made.address
    yield made
    os.environ.pop("RAY_ADDRESS")
    if before is not None:
        os.environ["RAY_ADDRESS"] = before
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def engine(cluster):
    return chosen_engine("ray")


def evaluate(path, engine=None):
    return runner.evaluate(
        tiny_model("llama"), characters(), shared.records(), shared.methods(), shared.PROTOCOL,
        path, progress=False, engine=engine,
    )  # fmt: skip


class SlowRunner(ContextRunner):
    """Notes which cells were begun, and takes its time for each."""

    notes = None

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.notes = SlowRunner.notes

    def _answer(self, cell, *rest):
        with open(self.notes, "a") as begun:
            begun.write(cell.key + "\n")
        time.sleep(0.05)
        return super()._answer(cell, *rest)


class Counting:
    """Gives (item, its process); dies the first `times` that it gets the item "deadly"."""

    def __init__(self, notes, times=0):
        self.notes, self.times = str(notes), times

    def __call__(self, items):
        for item in items:
            with open(self.notes, "a") as begun:
                begun.write(f"{item}\n")
            with open(self.notes) as begun:
                deaths = begun.read().split().count("deadly")
            if item == "deadly" and deaths <= self.times:
                os._exit(1)
            if item == "wrong":
                raise KeyError("no such sample")
            time.sleep(0.05)
            yield item, os.getpid()


def test_work_is_divided_and_every_item_gets_one_result(engine, tmp_path):
    jobs = [[f"{job}-{item}" for item in range(3)] for job in range(8)]
    asked_later = [None, *jobs[:4], None, None, *jobs[4:]]
    results = list(engine.run(Counting(tmp_path / "notes"), asked_later))
    assert sorted(item for item, _ in results) == sorted(sum(jobs, []))
    for job in jobs:
        assert [item for item, _ in results if item in job] == job
    pids = {pid for _, pid in results}
    assert len(pids) == 2 and os.getpid() not in pids
    assert list(engine.run(Counting(tmp_path / "notes"), [])) == []


def test_a_worker_that_dies_is_replaced_and_its_results_kept(engine, tmp_path):
    jobs = [["a", "b", "deadly", "c"], ["d", "e"]]
    results = list(engine.run(Counting(tmp_path / "notes", times=2), jobs))
    assert sorted(item for item, _ in results) == ["a", "b", "c", "d", "deadly", "e"]
    begun = Counter((tmp_path / "notes").read_text().split())
    assert begun == Counter("abcde") + Counter({"deadly": 3})


def test_an_item_that_always_kills_its_worker_ends_the_run(engine, tmp_path):
    with pytest.raises(EngineError, match="3 workers died at the same item"):
        list(engine.run(Counting(tmp_path / "notes", times=9), [["a", "deadly"]]))


def test_errors_of_the_work_are_raised_as_they_are(engine, tmp_path):
    with pytest.raises(KeyError, match="no such sample") as raised:
        list(engine.run(Counting(tmp_path / "notes"), [["a", "wrong"]]))
    assert type(raised.value) is KeyError  # not Ray's own that passes for one


def test_layers_train_the_same_on_ray(engine, tmp_path):
    def train(folder, engine):
        generator = torch.Generator().manual_seed(0)
        model = tiny_model("llama")
        sequences = [
            (torch.randint(3, 128, (160,), generator=generator), torch.arange(100, 160))
            for _ in range(3)
        ]
        recipe = TrainRecipe.signs().vary(steps=6, evaluate_every=3, rows_per_step=8, top=8)
        recipe = recipe.vary(sink=4, local=8)
        return train_hash_weights(model, sequences, recipe, out_dir=tmp_path / folder, hidden=16,
                                  progress=False, engine=engine)  # fmt: skip

    train("here", InProcess())
    train("ray", engine)
    files = [tmp_path / folder / "hash_maps.safetensors" for folder in ("here", "ray")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_node_that_dies_changes_no_record(cluster, engine, tmp_path, monkeypatch):
    evaluate(tmp_path / "here.jsonl")
    notes = tmp_path / "begun"
    monkeypatch.setattr(SlowRunner, "notes", str(notes))
    monkeypatch.setattr(runner, "ContextRunner", SlowRunner)
    append, written = runner.ResultLog.append, []

    def kill_after_twenty(log, row):
        written.append(row["key"])
        if len(written) == 20:
            cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
        return append(log, row)

    monkeypatch.setattr(runner.ResultLog, "append", kill_after_twenty)
    frame = evaluate(tmp_path / "ray.jsonl", engine)
    assert len(cluster.nodes) == 1 and frame.attrs["reused"] == 0
    shared.require_same(tmp_path / "ray.jsonl", shared.content(tmp_path / "here.jsonl"))
    begun = Counter(notes.read_text().split())
    assert shared.ANSWERS <= sum(begun.values()) <= shared.ANSWERS + 3 and max(begun.values()) <= 2


LOCAL = """
import json, os
from hashattn.base.engines import chosen_engine

def squared(items):
    for item in items:
        yield item * item, os.getpid()

results = sorted(chosen_engine().run(squared, [[1, 2], [3], [4]]))
import ray
print(json.dumps([ray.is_initialized(), os.getpid(), results]))
"""


def test_engine_ray_starts_a_cluster_of_its_own():
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {
        "HASHATTN_ENGINE": "ray",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run([sys.executable, "-c", LOCAL], env=environment, timeout=240,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    initialized, driver, results = json.loads(done.stdout.splitlines()[-1])
    assert initialized and [number for number, _ in results] == [1, 4, 9, 16]
    assert driver not in {pid for _, pid in results}


def test_engines_that_cannot_be_had(monkeypatch):
    monkeypatch.delenv("HASHATTN_ENGINE", raising=False)
    assert isinstance(chosen_engine(), InProcess)
    with pytest.raises(EngineError, match="in_process, ray"):
        chosen_engine("spark")
    monkeypatch.setenv("HASHATTN_ENGINE", "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"pip install '\.\[ray\]'"):
        chosen_engine()


def test_in_process_waits_for_what_comes_later(monkeypatch):
    slept = []
    monkeypatch.setattr("hashattn.base.engines.base.time.sleep", slept.append)
    found = list(InProcess().run(lambda items: (2 * item for item in items), [None, [1, 2], [3]]))
    assert found == [2, 4, 6] and len(slept) == 1
