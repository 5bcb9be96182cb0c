"""The README's tables, from a made-up record."""

import pandas as pd

from hashattn.reproduce.bench import quality, reference
from hashattn.reproduce.bench.__main__ import main


def record():
    """Steps of 2 + n / 1024 (torch), 1 + n / 2048 (dense), 1 + n / 16384 ms (both ways)."""
    rows = []
    for threads in (1, 2):
        for n in (1024, 2048, 32768):
            shared = {"n": n, "threads": threads, "dtype": "bfloat16", "stage": "total"}
            times = {"matmul": 2 + n / 1024, "dense": 1 + n / 2048, "default": 1 + n / 16384,
                     "default_kv_lists": 1 + n / 16384, "read": n / 4096}  # fmt: skip
            rows += [shared | {"variant": name, "ms": ms / threads, "bytes": n * 4096}
                     for name, ms in times.items()]  # fmt: skip
    shared = {"model": "m", "threads": 1, "n": 32768, "q1": 0, "q3": 0, "ceiling": 2.0}
    models = [shared | {"variant": name, "ms": ms, "attention_share": 0.5}
              for name, ms in (("dense", 30.0), ("default", 20.0))]  # fmt: skip
    beside = [
        {"engine": name, "threads": 1, "n": n, "ms": a + b * n}
        for name, a, b in (("default", 30, 0.001), ("llama.cpp, f16", 10, 0.016))
        for n in (2048, 8000)
    ]
    return {
        "layer": rows, "models": models, "llamacpp": beside, "llamacpp_note": "how",
        "date": "2026-01-01", "environment": {"device": "a machine", "packages": {}},
    }  # fmt: skip


def test_every_number_is_in_its_place(monkeypatch, capsys):
    errors = pd.DataFrame({("m", "1/8"): {"default": 0.1}})
    monkeypatch.setattr(quality, "stored", lambda: errors)
    monkeypatch.setattr(reference, "stored", lambda device: record())
    assert main(["readme"]) == 0
    text = capsys.readouterr().out
    assert "measured on a machine, 2026-01-01" in text and "\n\nhow\n\n" in text
    ours = "3.00 ms | 11.3 | 5.7"
    assert f"| 32K | 34.0 ms | 17.0 ms | {ours} | {ours} |" in text
    assert "| default | 1.00 ms | 62.5 | 1.06 ms | 4.2 | 0.25 ms | 0 |" in text
    assert "| default | 11.3 | 5.7 | 0.100 |" in text
    assert "| paper | not measured | not measured | not measured |" in text
    assert "| m | 1 | 32K | default | 20.0 | 1.50 | 0.50 |" in text
    assert "| default | 1 | 32 | 38 | 30.0 | 1.0 | 16.0 |" in text
    assert "| llama.cpp, f16 | 1 | 43 | 138 | 10.0 | 16.0 | 1.0 |" in text
    assert "| us a layer and step | H100, 32K |" in text


def test_without_results_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(reference, "stored", lambda device: None)
    assert main(["readme"]) == 0
    assert "no results are stored" in capsys.readouterr().out
