"""evaluate under kill -9 and in several processes: nothing lost, nothing twice, same records."""

import json
import multiprocessing
import random
import string
import time
from collections import Counter

import pytest
import torch

from hashattn.base.engines import processes
from hashattn.base.engines.processes import Processes
from hashattn.evaluation import runner
from hashattn.evaluation.cells import TIMINGS, ContextRunner
from hashattn.evaluation.log import ResultLog
from hashattn.evaluation.methods import Method
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record
from hashattn.evaluation.runner import evaluate
from hashattn.selectors import make_selector
from helpers import characters, tiny_model

PROTOCOL = Protocol(sink=2, local=4, max_new_tokens=3)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hashattn.evaluation.runner", "helpers", "transformers"])
PATIENCE = 120  # seconds that a process may take


def records():
    letters = string.ascii_letters + string.digits  # not one like another: near ties could flip
    contexts = ["".join(random.Random(i).sample(letters, 60)) + " " for i in range(6)]
    return [Record(q, context, ("a",), dataset="set") for context in contexts for q in "xy"]


def methods():
    oracle, lsh = make_selector("oracle"), make_selector("lsh", bits=32)
    return [
        Method("dense"),
        Method("oracle", oracle, PROTOCOL.budget(heavy=30)),
        Method("lsh", lsh, PROTOCOL.budget(heavy=30)),
        Method("lsh", lsh, PROTOCOL.budget(heavy=10)),
    ]


ANSWERS = 12 * (1 + 3 * 2)  # questions by dense once and three methods in two setups


def run(path, notes=None, pause=0.0):
    """evaluate() in this process; `notes` lists the keys in the order in which they were begun."""
    torch.set_num_threads(1)
    if notes is not None:
        real = ContextRunner._answer

        def noted(self, cell, *rest):
            with open(notes, "a") as begun:
                begun.write(cell.key + "\n")
            time.sleep(pause)
            return real(self, cell, *rest)

        ContextRunner._answer = noted
    return evaluate(*arguments(), path, progress=False)


def arguments():
    return tiny_model("llama"), characters(), records(), methods(), PROTOCOL


def start(*arguments):
    process = PROCESSES.Process(target=run, args=arguments)
    process.start()
    return process


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def content(path):
    """The records without timings, by key."""
    found = [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows(path)]
    return sorted(found, key=lambda row: row["key"])


def require_same(path, wanted):
    """The records of a file are the wanted ones, timings apart; says which fields differ."""
    found = content(path)
    assert [row["key"] for row in found] == [row["key"] for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        assert {
            k: (row.get(k), other.get(k)) for k in row | other if row.get(k) != other.get(k)
        } == {}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "r.jsonl"
    process = start(path)
    process.join(PATIENCE)
    assert process.exitcode == 0
    return content(path)


def test_five_kills_change_no_record(tmp_path, undisturbed):
    path, notes, rng = tmp_path / "r.jsonl", tmp_path / "begun", random.Random(5)
    assert len(undisturbed) == ANSWERS
    for _ in range(5):
        process, before = start(path, notes, 0.02), lines(notes)
        wait_for(lambda before=before: lines(notes) > before)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join(PATIENCE)
        assert process.exitcode < 0, "it had ended before the kill: too few samples for this test"
    killed = lines(path)
    assert 0 < killed < ANSWERS
    process = start(path, notes)
    process.join(PATIENCE)
    assert process.exitcode == 0
    require_same(path, undisturbed)
    begun = Counter(notes.read_text().split())
    assert sum(begun.values()) <= ANSWERS + 5  # each kill repeats the sample in hand, no other
    assert max(begun.values()) <= 1 + 5 and set(begun) == {row["key"] for row in undisturbed}


def test_much_to_answer_is_divided_among_processes(tmp_path, undisturbed, monkeypatch):
    started = []

    class Counted(Processes):
        def run(self, work, jobs):
            started.append(self.count)
            return super().run(work, jobs)

    monkeypatch.setattr(processes, "Processes", Counted)
    path, threads = tmp_path / "r.jsonl", torch.get_num_threads()
    parameters = sum(each.numel() for each in tiny_model("llama").parameters())
    monkeypatch.setattr(runner, "_WORTH_PROCESSES", ANSWERS * parameters)
    torch.set_num_threads(2)
    try:
        evaluate(*arguments(), path, progress=False)
        assert started == [2]
        require_same(path, undisturbed)
        path.unlink()
        monkeypatch.setattr(runner, "_WORTH_PROCESSES", ANSWERS * parameters + 1)
        evaluate(*arguments(), path, progress=False)
    finally:
        torch.set_num_threads(threads)
    assert started == [2]


def test_processes_share_the_work_and_survive_one_another(tmp_path, undisturbed):
    path, notes = tmp_path / "r.jsonl", [tmp_path / f"begun{i}" for i in range(3)]
    workers = [start(path, begun, 0.02) for begun in notes]
    wait_for(lambda: all(lines(begun) for begun in notes))
    workers[0].kill()
    for worker in workers:
        worker.join(PATIENCE)
    assert [worker.exitcode for worker in workers[1:]] == [0, 0]
    require_same(path, undisturbed)  # a record written twice would show
    begun = [set(file.read_text().split()) for file in notes]
    assert not begun[1] & begun[2] and len(begun[0] & (begun[1] | begun[2])) <= 1


def test_a_claim_ends_with_its_process(tmp_path):
    held, free = PROCESSES.Event(), PROCESSES.Event()
    process = PROCESSES.Process(target=hold, args=(tmp_path / "r.jsonl", held, free))
    process.start()
    assert held.wait(PATIENCE)
    with ResultLog(tmp_path / "r.jsonl") as log:
        assert not log.claim("one") and log.claim("two")
        process.kill()
        process.join(PATIENCE)
        assert log.claim("one")


def hold(path, held, free):
    with ResultLog(path) as log:
        assert log.claim("one")
        held.set()
        free.wait(PATIENCE)


def test_a_process_finds_what_others_have_done(tmp_path, undisturbed):
    path = tmp_path / "r.jsonl"
    frame = run(path)
    assert frame.attrs["reused"] == 0
    assert run(path).attrs["reused"] == len(frame) == ANSWERS + 12  # dense in both setups
    require_same(path, undisturbed)
