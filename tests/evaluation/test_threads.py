"""The threads that decode: those that are faster, unless the user said how many."""

import time
from types import SimpleNamespace

import pytest
import torch

from evaluation import test_parallel as shared
from hashattn.base.engines import threads as engine_threads
from hashattn.base.engines.threads import VARIABLES, thread_count
from hashattn.evaluation import runner, threads
from hashattn.evaluation.answering import PrefilledContext
from hashattn.evaluation.cells import TIMINGS, ContextRunner
from hashattn.evaluation.threads import decode_threads
from helpers import characters, tiny_model


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """As this process might have started."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(engine_threads, "STARTED_WITH", 2)
    yield
    torch.set_num_threads(before)


class Model:
    def __init__(self, device="cpu"):
        self.device = torch.device(device)


def steps_of(monkeypatch, seconds):
    """Decode steps that take seconds[threads], and how many were taken."""
    taken = []

    def step():
        taken.append(torch.get_num_threads())
        time.sleep(seconds[taken[-1]])

    monkeypatch.setattr(threads, "_step", lambda context: step)
    return taken


def context(model, length=100):
    return SimpleNamespace(model=model, tokens=list(range(length)))


@pytest.mark.parametrize(
    "seconds, chosen", [({1: 0.001, 2: 0.01}, 1), ({1: 0.01, 2: 0.001}, 2), ({1: 0.3, 2: 0.3}, 2)]
)
def test_the_faster_number_is_chosen_and_measured_once(monkeypatch, capsys, seconds, chosen):
    taken, model = steps_of(monkeypatch, seconds), Model()
    assert decode_threads(context(model), progress=True) == chosen
    told = capsys.readouterr().err
    assert ("decoding with 1 thread of 2" in told) == (chosen == 1)
    assert "(100 tokens; OMP_NUM_THREADS overrides)" in told or chosen == 2
    measured = len(taken)
    assert measured == (1 if seconds[2] > threads.LONG else 25)
    assert decode_threads(context(model, 120), progress=True) == chosen
    assert len(taken) == measured and capsys.readouterr().err == ""
    decode_threads(context(model, 4000))
    decode_threads(context(Model()))
    assert len(taken) == 3 * measured and torch.get_num_threads() == 2


@pytest.mark.parametrize("said", [*VARIABLES, "set_num_threads", "one", "gpu"])
def test_what_the_user_said_is_not_measured(monkeypatch, said):
    taken, model, expected = steps_of(monkeypatch, {1: 0.0, 2: 0.1, 3: 0.1}), Model(), 2
    if said in VARIABLES:
        monkeypatch.setenv(said, "2")
    elif said == "gpu":
        model = Model("cuda")
    else:
        expected = 1 if said == "one" else 3
        torch.set_num_threads(expected)
    assert decode_threads(context(model)) == expected and taken == []


def test_the_count_is_restored_after_an_error(monkeypatch):
    def fails():
        raise KeyError("a step")

    monkeypatch.setattr(threads, "_step", lambda context: fails)
    with pytest.raises(KeyError):
        decode_threads(context(Model()))
    assert torch.get_num_threads() == 2


def evaluate(path):
    return runner.evaluate(
        tiny_model("llama"), characters(), shared.records()[:3], shared.methods()[:3],
        shared.PROTOCOL, path, progress=False, setups=["A"],
    )  # fmt: skip


def test_answers_and_densities_do_not_depend_on_the_count(monkeypatch, tmp_path):
    """Only decoding has the measured count; the prefill keeps all."""
    real, decoded, frames = ContextRunner._greedy, set(), []

    def noted(self, *arguments):
        decoded.add(torch.get_num_threads())
        return real(self, *arguments)

    monkeypatch.setattr(ContextRunner, "_greedy", noted)
    for number in (1, 2):
        monkeypatch.setattr(runner, "decode_threads", lambda context, progress, n=number: n)
        frames.append(evaluate(tmp_path / f"{number}.jsonl").drop(columns=list(TIMINGS)))
        assert decoded == {number} and torch.get_num_threads() == 2
        decoded.clear()
    assert frames[0].to_dict("records") == frames[1].to_dict("records")


def test_an_evaluation_that_fails_leaves_the_count_as_it_was(monkeypatch, tmp_path):
    def fails(self, *arguments):
        assert torch.get_num_threads() == 1
        raise KeyError("an answer")

    monkeypatch.setattr(runner, "decode_threads", lambda context, progress: 1)
    monkeypatch.setattr(ContextRunner, "_greedy", fails)
    with pytest.raises(KeyError):
        evaluate(tmp_path / "results.jsonl")
    assert torch.get_num_threads() == 2


def test_a_real_model_is_measured_in_a_cache_of_its_own():
    prefilled = PrefilledContext(tiny_model("llama"), list(range(3, 60)))
    assert decode_threads(prefilled) in (1, 2)
    assert prefilled.cache.get_seq_length() == 57


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_thread_count_is_for_a_while(error):
    with pytest.raises(error), thread_count(1):
        assert torch.get_num_threads() == 1
        raise error
    assert torch.get_num_threads() == 2
