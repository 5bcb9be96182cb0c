"""The bench of rows in a file, small: what it records, and that its lists come back as stated."""

import pytest
import torch

from hashattn.reproduce.bench import offload, record
from hashattn.reproduce.bench.ways import Shape


def test_what_is_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(offload, "_ON_DISK", (200, 20))
    monkeypatch.setattr(offload, "_ROUNDS", 2)
    monkeypatch.setattr(offload, "_COLD_ROUNDS", 1)
    path = tmp_path / "offload.json"
    offload.bench(path, ((16384, 1, (1 / 4, 1 / 2)),), Shape(4, 2, 128))
    kept = record.load(path)
    steps = offload.table(kept["steps"])
    assert list(steps.index.unique("variant")) == ["memory", "page cache", "dense", "disk"]
    assert (steps["times memory"].xs("memory", level="variant") == 1).all()
    rates = steps["hit rate"].xs("page cache", level="variant")
    assert 0.5 < rates.loc[16384, 0.25] < rates.loc[16384, 0.5] <= 1
    held = offload.held(kept["held"])
    # rows of 512 bytes, 2 heads; codes of 4 bytes a row; tables are small beside them
    assert held.loc[(16384, 1.0), "counted GB"] == pytest.approx(16384 * 2 * 516 / 1e9, rel=0.15)
    assert 0.25 < held.loc[(16384, 0.25), "counted / all"] < 0.35
    assert "times memory" in capsys.readouterr().out


def test_lists_come_back_as_the_reuse_says():
    n, width, shape = 4096, 128, Shape(4, 2, 128)
    reuse = offload._Reuse(0.6, {0.125: 0.9, 0.25: 0.95, 0.5: 0.98, 1.0: 1.0}, 1.5)
    trace, seen = offload._Trace(n, width, shape, reuse), []
    for lists in (next(trace) for _ in range(5)):
        assert lists.shape == (1, 4, 1, width)
        assert all((row.diff() > 0).all() for row in lists[0, :, 0])
        seen.append([set(lists[0, at : at + 2].flatten().tolist()) for at in (0, 2)])
    unions = torch.tensor([[len(rows) for rows in step] for step in seen])
    assert (unions == int(1.5 * width)).all()
    again = len(seen[4][0] & seen[3][0]) / len(seen[4][0])
    assert again >= 0.59  # rows of whole numbers
