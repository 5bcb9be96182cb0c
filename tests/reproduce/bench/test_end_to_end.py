"""Whole models: what is timed, and that timing leaves no trace."""

import pytest
import torch
from transformers import AttentionInterface

from hashattn.attention import dispatch
from hashattn.attention.budget import Budget
from hashattn.reproduce.bench import cpu
from hashattn.reproduce.bench.end_to_end import filled_cache, model_latency, random_llama
from hashattn.reproduce.bench.receipts import receipt_cost
from hashattn.reproduce.bench.record import load, save

TINY = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=128, max_position_embeddings=4096,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return random_llama(TINY)


def test_the_model_is_random_and_small(model):
    assert model.dtype == torch.bfloat16 and torch.get_default_dtype() == torch.float32
    cache = filled_cache(model, 5000)
    assert cache.get_seq_length() == 5000
    keys = cache.layers[2].keys
    assert keys.shape == (1, 2, 5000, 128) and 0.9 < keys.float().std() < 1.1


def test_rows_of_every_way_to_attend(model):
    before = AttentionInterface()["sdpa"], dispatch.attend, model.config._attn_implementation
    rows = model_latency("tiny", model, 600, Budget(4, 28, heavy=32), steps=3, hidden=32)
    after = AttentionInterface()["sdpa"], dispatch.attend, model.config._attn_implementation
    assert after == before
    assert [row["variant"] for row in rows] == ["transformers", "dense", "hash"]
    for row in rows:
        assert 0 < row["attention_ms"] < row["ms"] and row["q1"] <= row["ms"] <= row["q3"]
        assert row["ceiling"] == pytest.approx(1 / (1 - row["attention_share"]))
        assert (row["model"], row["n"], row["steps"], row["layers"]) == ("tiny", 600, 3, 3)
    assert [row["density"] < 0.2 for row in rows] == [False, False, True]
    stages = [
        sum(row.get(f"{name}_ms", 0) for name in ("encode", "select", "attend")) for row in rows
    ]
    assert stages[0] == stages[1] == 0
    # of one layer, where attention is of all three; each is a median of its own
    assert 0 < stages[2] * 3 < 1.5 * rows[2]["attention_ms"]


def test_the_whole_benchmark_in_small(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "MODELS", {"tiny": (lambda: model, 2, True)})
    monkeypatch.setattr(cpu, "MODEL_CONTEXTS", (600,))
    monkeypatch.setattr(cpu, "receipts", lambda: receipt_cost(model, 600, Budget(4, 28, heavy=32)))
    monkeypatch.setattr(cpu, "start_seconds", lambda: {"cold": 9.0, "warm": 0.5})
    path = tmp_path / "bench" / "cpu.json"
    cpu.bench(path, contexts=(600, 1200))
    said = capsys.readouterr().out
    titles = ("speed-up over torch", "break-even", "roofline", "whole models", "the receipt")
    for title in (*titles, "first step"):
        assert title in said
    record = load(path)
    assert record["environment"]["packages"]["torch"] == torch.__version__
    cost = record["receipt"]
    assert 0 < cost["receipt_us"] < cost["everything_us"] and cost["layers"] == 3
    assert cost["receipt_share"] == pytest.approx(cost["receipt_us"] / cost["token_ms"] / 1e3)
    assert {row["n"] for row in record["layer"]} == {600, 1200} and len(record["models"]) in (3, 6)
    save(path, models=[])
    path.write_text(path.read_text().replace('"format": 1', '"format": 0'))
    with pytest.raises(ValueError, match="another version"):
        load(path)
