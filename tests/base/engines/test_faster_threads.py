"""Pieces of work on the number of threads that is faster, found out by the work itself."""

import pytest
import torch

from hashattn.base.engines import threads
from hashattn.base.engines.threads import AGAIN, VARIABLES, FasterThreads
from hashattn.evaluation.measures.selection import selection_metrics
from hashattn.hashing.capture import capture
from hashattn.selectors import make_selector
from helpers import prompt, tiny_model


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """As a process with two threads might have started; its time passes when a test says so."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before, now = torch.get_num_threads(), [0.0]
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "STARTED_WITH", 2)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])
    yield now
    torch.set_num_threads(before)


def work(faster, clock, seconds, pieces, kind="kind", size=1.0) -> list[int]:
    """Threads of so many pieces that take seconds[threads] times their size."""
    used = []
    for _ in range(pieces):
        with faster.piece(kind, size):
            used.append(torch.get_num_threads())
            clock[0] += seconds[used[-1]] * size
        assert torch.get_num_threads() == 2
    return used


@pytest.mark.parametrize(
    "seconds, chosen", [({1: 1, 2: 5}, 1), ({1: 5, 2: 1}, 2), ({1: 0.95, 2: 1}, 2)]
)
def test_the_faster_number_is_found_by_the_work_itself(clock, seconds, chosen):
    faster = FasterThreads()
    assert work(faster, clock, seconds, 3) == [2, 1, 2]
    assert work(faster, clock, seconds, AGAIN - 3) == [chosen] * (AGAIN - 3)
    assert work(faster, clock, seconds, 2) == [3 - chosen, chosen]  # is it still so?


def test_what_is_faster_may_change(clock):
    faster = FasterThreads()
    quiet, shared = {1: 5, 2: 1}, {1: 5, 2: 20}  # another process comes, and goes
    work(faster, clock, quiet, 4)
    assert work(faster, clock, shared, 3) == [2, 1, 1]
    assert work(faster, clock, quiet, AGAIN)[-2:] == [2, 2]


def test_pieces_are_compared_within_their_kind_and_by_their_size(clock):
    faster = FasterThreads()
    work(faster, clock, {1: 5, 2: 1}, 3, "one")
    work(faster, clock, {1: 1, 2: 5}, 3, "other")
    assert work(faster, clock, {1: 5, 2: 1}, 2, "one", size=100) == [2, 2]
    assert work(faster, clock, {1: 1, 2: 5}, 2, "other", size=100) == [1, 1]
    assert work(faster, clock, {1: 1, 2: 5}, 2, "other", size=0.01) == [1, 1]


@pytest.mark.parametrize("said", [*VARIABLES, "set_num_threads"])
def test_what_the_user_said_is_kept(clock, monkeypatch, said):
    if said == "set_num_threads":
        torch.set_num_threads(3)
    else:
        monkeypatch.setenv(said, "2")
    expected, faster = torch.get_num_threads(), FasterThreads()
    for _ in range(5):
        with faster.piece("kind"):
            assert torch.get_num_threads() == expected


def test_a_piece_that_fails_is_none(clock):
    faster = FasterThreads()
    with pytest.raises(KeyError), faster.piece("kind"):
        raise KeyError
    assert torch.get_num_threads() == 2
    assert work(faster, clock, {1: 1, 2: 5}, 4) == [2, 1, 2, 1]


def test_captures_and_recall_do_not_depend_on_it():
    model, ids = tiny_model("llama"), prompt(length=300)
    selectors = {"oracle": make_selector("oracle"), "lsh": make_selector("lsh", bits=64)}
    captures, rows = [], []
    for _ in range(4):  # with all threads, one, all, and the faster
        captures.append(list(capture(model, ids, values=True).values()))
        rows.append(selection_metrics(captures[0], selectors, [8], by_head=True))
    for again in captures[1:]:
        for one, other in zip(captures[0], again, strict=True):
            assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
            assert torch.equal(one.queries, other.queries)
    assert all(again == rows[0] for again in rows[1:])
