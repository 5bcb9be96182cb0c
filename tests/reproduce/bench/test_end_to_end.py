"""Whole models: what is timed, and that timing leaves no trace."""

import time

import pytest
import torch
from transformers import AttentionInterface

from hashattn.attention.budget import Budget
from hashattn.reproduce.bench import cpu, llamacpp, timing
from hashattn.reproduce.bench.end_to_end import (
    TIMED_WAYS,
    filled_cache,
    model_latency,
    random_llama,
    selectors,
    static_cache,
    timed_kernels,
    token_seconds,
)
from hashattn.reproduce.bench.policy import policy_latency
from hashattn.reproduce.bench.receipts import receipt_cost
from hashattn.reproduce.bench.record import load
from hashattn_kernels import numba_cpu

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
    before = AttentionInterface()["sdpa"], numba_cpu.encode, model.config._attn_implementation
    rows = model_latency("tiny", model, 600, Budget(4, 28, heavy=32), steps=3)
    after = AttentionInterface()["sdpa"], numba_cpu.encode, model.config._attn_implementation
    assert after == before
    assert [row["variant"] for row in rows] == ["transformers", "dense", *TIMED_WAYS]
    for row in rows:
        assert 0 < row["attention_ms"] < row["ms"] and row["q1"] <= row["ms"] <= row["q3"]
        assert row["ceiling"] == pytest.approx(1 / (1 - row["attention_share"]))
        assert (row["model"], row["n"], row["steps"], row["layers"]) == ("tiny", 600, 3, 3)
        assert row["cache"] == "dynamic"
    assert [row["density"] < 0.2 for row in rows] == [False, False, True, True, True]
    assert rows[0]["kernel_ms"] is rows[0]["host_ms"] is None
    for row in rows[1:]:
        assert 0 < row["kernel_ms"] < row["attention_ms"]
        assert row["host_ms"] == pytest.approx(row["attention_ms"] - row["kernel_ms"])


def test_a_static_cache_decodes_the_same_tokens_as_many(model):
    ways = {"default": selectors(model)["default"]}
    (row,) = model_latency("tiny", model, 300, Budget(4, 28, heavy=32), 2, ways=ways, static=True)
    assert row["cache"] == "static" and row["density"] == pytest.approx(64 / 301, rel=0.02)
    filled = filled_cache(model, 300)
    static = static_cache(model, filled, 5)
    assert static.layers[1].keys.shape[2] == 305 and int(static.get_seq_length()) == 300
    assert torch.equal(static.layers[1].keys[:, :, :300], filled.layers[1].keys)


def test_seconds_of_tokens_leave_the_cache_as_it_was(model):
    filled = filled_cache(model, 200)
    spent = token_seconds(model, filled, selectors(model)["dense"], Budget(heavy=1), 200, 4)
    assert len(spent) == 4 and min(spent) > 0 and filled.get_seq_length() == 200


def test_a_kernel_that_calls_another_counts_once(monkeypatch):
    monkeypatch.setattr(numba_cpu, "encode", lambda: time.sleep(0.01))
    monkeypatch.setattr(numba_cpu, "attend", lambda: numba_cpu.encode())
    spent: list[float] = []
    with timed_kernels(spent):
        numba_cpu.attend()
        numba_cpu.encode()
    numba_cpu.encode()
    assert len(spent) == 2 and all(0.01 <= seconds < 0.1 for seconds in spent)


def test_the_whole_benchmark_in_small(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "MODELS", {"tiny": (lambda: model, 2, True)})
    monkeypatch.setattr(cpu, "MODEL_CONTEXTS", (600,))
    monkeypatch.setattr(cpu, "receipts", lambda: receipt_cost(model, 600, Budget(4, 28, heavy=32)))
    monkeypatch.setattr(cpu, "policy", lambda: policy_latency(
        "tiny", model, selectors(model)["default"], Budget(heavy=8), (100,), rounds=1, steps=2
    ))  # fmt: skip
    monkeypatch.setattr(cpu, "start_seconds", lambda: {"cold": 9.0, "warm": 0.5})
    monkeypatch.setattr(llamacpp, "side_by_side", lambda: ([], "llama.cpp is not compared: why"))
    monkeypatch.setattr(timing, "FLUSH_BYTES", 4096)
    path = tmp_path / "bench" / "cpu.json"
    cpu.bench(path, contexts=(600, 1200))
    said = capsys.readouterr().out
    titles = ("speed-up over torch", "at any length", "break-even", "at equal quality", "roofline",
              "whole models", "kernels, and host", "the receipt", "first step",
              "llama.cpp is not compared: why", "over the model's own step")  # fmt: skip
    for title in titles:
        assert title in said
    record = load(path)
    assert record["environment"]["packages"]["torch"] == torch.__version__
    cost = record["receipt"]
    assert 0 < cost["receipt_us"] < cost["everything_us"] and cost["layers"] == 3
    assert cost["receipt_share"] == pytest.approx(
        cost["receipt_us"] / cost["token_ms"] / 1e3, rel=1e-4
    )
    assert {row["n"] for row in record["layer"]} == {600, 1200} and len(record["models"]) in (5, 10)
    assert record["layer"][0]["variant"] == "default"
    assert [row["variant"] for row in record["policy"]] == ["own", "policy"]
    assert {row["dtype"] for row in record["layer"] if row["threads"] > 1} <= {"bfloat16"}
