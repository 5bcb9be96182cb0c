"""Training beside a busy process: what is measured, and that the process ends."""

import torch

from hashattn.reproduce.bench import contention as bench
from hashattn.reproduce.bench.contention import contention


def test_one_thread_and_all_are_measured_alone_and_beside_a_busy_process(monkeypatch):
    started, real, before = [], bench.subprocess.Popen, torch.get_num_threads()
    monkeypatch.setattr(
        bench.subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1]
    )
    rows = contention(steps=2, length=256, threads=2)
    assert [(row["threads"], row["busy"]) for row in rows] == [
        (1, False), (2, False), (1, True), (2, True),
    ]  # fmt: skip
    assert all(0 < row["q1"] <= row["ms"] <= row["q3"] for row in rows)
    (busy,) = started
    assert busy.returncode == -9 and torch.get_num_threads() == before
