"""Two processes that share a model's heads answer, and choose tokens, as one process does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensor_parallel_worker import SHIPPED, embedded, evaluated, gathering, tiny

from hashattn.hashing.weights import HashWeights
from hashattn.kernels import indices_to_mask
from hashattn.models.heads import HeadSlice
from helpers import tiny_model

pytest.importorskip("accelerate", reason="transformers places models with accelerate")
pytestmark = pytest.mark.long  # 20 seconds of processes before the first test

RANKS = 2
LIMIT = 150  # seconds; 25 to 40 on two cores
WORKER = Path(__file__).with_name("tensor_parallel_worker.py")


def save_models(folder):
    """Random models and untrained hash weights for them."""
    for family, layout in (
        ("llama", "per_query_head"),
        ("phi3", "per_kv_head"),
        ("llama_mqa", "per_kv_head"),
    ):
        model = tiny_model(family)
        model.save_pretrained(folder / family)
        weights = HashWeights.for_model(model, seed=3, layout=layout, hidden=16)
        weights.save(folder / f"{family}_weights")


def run_processes(folder):
    """Run the worker in RANKS processes; fails with what they said after LIMIT seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    command += ["--standalone", str(WORKER), str(folder)]
    said = folder / "output.txt"
    with open(said, "w") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that the processes it starts end with it
        )
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = f"none within {LIMIT} s"
    if code != 0:
        pytest.fail(f"exit code {code}:\n{said.read_text()[-6000:]}", pytrace=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """What each process found."""
    run_processes(folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone():
    return embedded("single")


def test_the_embedded_model_answers_as_in_one_process(ranks, alone):
    assert alone["cached"] > 1024 and alone["text"].startswith(" Kyoto")
    for rank in ranks:
        assert rank["embedded"]["tokens"] == alone["tokens"]


def test_every_process_selects_for_its_heads_what_one_process_selects(ranks, alone):
    assert len(alone["calls"]) == 4 * 5
    for rank, found in enumerate(ranks):
        part = HeadSlice(8, 2, rank, RANKS)
        for call, expected in zip(found["embedded"]["calls"], alone["calls"], strict=True):
            assert call["layer"] == expected["layer"]
            wanted = indices_to_mask(part.of(expected["indices"][0])[None], alone["cached"] + 6)
            both = indices_to_mask(call["indices"], alone["cached"] + 6) & wanted
            # the processes add up their shares of a layer in another order: a bit may flip
            assert both.sum() >= 0.98 * wanted.sum()


def test_codes_are_those_of_all_hash_weights_for_the_keys_that_were_seen(ranks):
    weights = HashWeights.load(SHIPPED)
    for calls in zip(*(rank["embedded"]["calls"] for rank in ranks), strict=True):
        keys, codes = (torch.cat([c[n] for c in calls], dim=1) for n in ("keys", "codes"))
        assert torch.equal(weights.encode_keys(calls[0]["layer"], keys), codes)


def test_a_sharded_model_is_the_same_model(ranks, alone):
    for rank in ranks:
        assert rank["embedded"]["model_sha256"] == alone["model_sha256"]
        assert rank["embedded"]["record"] == alone["record"]


def test_a_receipt_says_which_heads_it_counts(ranks, alone):
    assert alone["receipt"]["heads"] is None
    for number, rank in enumerate(ranks):
        receipt = rank["embedded"]["receipt"]
        assert receipt["heads"] == {
            "rank": number,
            "ranks": 2,
            "query": [4 * number + i for i in range(4)],
            "query_heads": 8,
            "kv": [number],
            "kv_heads": 2,
        }
        for name in ("method", "settings", "model"):
            assert receipt[name] == alone["receipt"][name]
        assert receipt["density"] < 1 / 16 + 0.001


def test_methods_choose_as_in_one_process(ranks, folder):
    expected = tiny(folder)
    for name, run in expected.items():
        assert [rank["tiny"][name]["tokens"] for rank in ranks] == RANKS * [run["tokens"]], name
    read = [step["read"] for step in expected["shares"]["receipt"]["recent"]]
    parts = [[s["read"] for s in rank["tiny"]["shares"]["receipt"]["recent"]] for rank in ranks]
    assert [sum(both) / 2 for both in zip(*parts, strict=True)] == pytest.approx(read)
    assert parts[0] != parts[1]


def test_a_plan_that_gathers_all_heads(ranks, folder):
    expected = gathering(folder)
    for rank in ranks:
        assert rank["gathering"]["tokens"] == expected["tokens"]
        assert rank["gathering"]["receipt"]["heads"] is None


def test_processes_that_share_a_model_evaluate_together(ranks, folder, tmp_path):
    expected = evaluated(folder, tmp_path / "alone.jsonl")
    for rank in ranks:
        found = rank["evaluated"]
        assert found["prediction"] == expected["prediction"]
        assert found["density"] == pytest.approx(expected["density"])
    lines = [len(f.read_text().splitlines())
             for f in (folder / "shared.jsonl", tmp_path / "alone.jsonl")]  # fmt: skip
    assert lines == 2 * [4 * (1 + 2 * 2)]  # each answer once, dense in both setups
    assert (folder / "shared.jsonl.receipts.json").exists()


def test_what_needs_all_heads_or_equal_shares_is_refused(ranks):
    for rank in ranks:
        said = rank["refusals"]
        assert "UnsupportedModelError: capturing needs all heads" in said["capture"]
        assert "UnsupportedModelError: infllm ranks a block by all heads" in said["infllm"]
        for name in ("uneven, attach", "uneven, load"):
            assert "1 KV heads cannot be shared evenly by 2 processes: start 1" in said[name]
