"""llama.cpp beside ours: what is said where it is missing, the fits, the order of the asking."""

import math
import time
from contextlib import contextmanager

import pytest

from hashattn.reproduce.bench import llamacpp
from hashattn.reproduce.bench.__main__ import main
from hashattn.reproduce.bench.llamacpp import (
    LlamaCppError,
    _Worker,
    costs,
    report,
    side_by_side,
    times,
    verdict,
)


def rows(threads=1, ours=(30.0, 0.5e-3), theirs=(10.0, 15e-3)):
    """Engines whose tokens cost a + b n milliseconds."""
    lines = {"default": ours, "dense": (30.0, 3e-3), "llama.cpp, f16": theirs,
             "llama.cpp, q8_0": (9.0, 16e-3)}  # fmt: skip
    return [
        {"engine": name, "threads": threads, "n": n, "ms": a + b * n, "q1": 0, "q3": 0}
        for name, (a, b) in lines.items()
        for n in (1024, 2048, 4096, 8000)
    ]


def test_without_the_package_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(llamacpp, "find_spec", lambda name: None)
    found, note = side_by_side()
    assert found == [] and "pip install -e '.[llamacpp]'" in note
    assert note in capsys.readouterr().out
    assert main(["llamacpp", "--output", str(tmp_path / "a.json")]) == 2
    assert "xllamacpp is not installed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    report(found, note)
    assert note in capsys.readouterr().out


def test_without_the_model_it_says_how_to_fetch_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HASHATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(llamacpp, "find_spec", lambda name: True)
    found, note = side_by_side()
    assert found == [] and "`make pretrained`" in note


def test_fits_and_the_ratio_of_slopes():
    table = costs(rows() + rows(threads=2, ours=(20.0, -1e-3)))
    line = table.loc[1, "default"]
    assert line["a ms"] == pytest.approx(30) and line["b us"] == pytest.approx(0.5)
    assert line["llama.cpp's b over it"] == pytest.approx(30)
    assert table.loc[1, "dense"]["llama.cpp's b over it"] == pytest.approx(5)
    assert table.loc[1, "llama.cpp, f16"]["llama.cpp's b over it"] == pytest.approx(1)
    assert math.isnan(table.loc[2, "default"]["llama.cpp's b over it"])  # no slope, no ratio
    assert times(rows()).loc[(1, "llama.cpp, q8_0"), 1024] == pytest.approx(25.384)


def test_it_says_where_ours_loses():
    assert "slower than llama.cpp at 1024 cached tokens" in verdict(rows())
    assert "slower than llama.cpp nowhere" in verdict(rows(ours=(1.0, 0.5e-3)))
    assert "its a is 30.0 ms, llama.cpp's 10.0 ms" in verdict(rows())


def test_engines_are_asked_in_turn_at_every_length(monkeypatch):
    asked = []

    @contextmanager
    def engines(model, depths, threads):
        def asking(name, number):
            return lambda what, n, tokens: asked.append((number, n, name)) or 1.0 * n

        yield lambda number: [(name, asking(name, number)) for name in "ab"]

    monkeypatch.setattr(llamacpp, "_missing", lambda: "")
    monkeypatch.setattr(llamacpp, "_engines", engines)
    monkeypatch.setattr(llamacpp.torch, "get_num_threads", lambda: 2)
    found, note = side_by_side((8, 16), repeats=2, tokens=3)
    once = [(number, n, name) for number in (1, 2) for n in (8, 16) for name in "ab"]
    assert asked == once * 2
    assert len(found) == 8 and {row["ms"] for row in found} == {8.0, 16.0}
    assert found[0] == {"engine": "a", "threads": 1, "n": 8, "tokens": 3, "repeats": 2,
                        "ms": 8.0, "q1": 8.0, "q3": 8.0}  # fmt: skip
    assert "3 tokens" in note


class Counter:
    """Stands for an engine."""

    def __init__(self, start):
        self.count = start

    def add(self, number):
        self.count += number
        return self.count

    def wait(self):
        time.sleep(60)


def test_a_worker_keeps_its_state_and_says_what_failed(monkeypatch):
    with _Worker(Counter, 3) as worker:
        assert [worker.ask("add", 1), worker.ask("add", 2)] == [4, 6]
        with pytest.raises(LlamaCppError, match="add: TypeError"):
            worker.ask("add", "x")
        assert worker.ask("add", 1) == 7
        monkeypatch.setattr(llamacpp, "_WAIT", 0.2)
        with pytest.raises(LlamaCppError, match="no answer in 0.2 s"):
            worker.ask("wait")
        process = worker._process
        process.kill()
        process.join()
        with pytest.raises(LlamaCppError, match="ended"):
            worker.ask("add", 1)
    assert not process.is_alive()
