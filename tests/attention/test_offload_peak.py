"""Prefill straight to a file: peak memory of a context that is larger than fast memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from hashattn import Budget, HashSelector, HashWeights, Memory, attach
from hashattn.hashing.maps import HashConfig

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=8, head_dim=64,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=8192,
)
model = LlamaForCausalLM(config).eval()
model.generation_config.eos_token_id = None
weights = HashWeights.random(HashConfig(tuple(range(8)), 4, 4, 64, "per_kv_head", 32, 2, 16), 0)
memory = None
if sys.argv[1] != "dense":
    memory = Memory(fast_bytes=8 * 2**20, folder=sys.argv[1])
ids = torch.randint(3, 64, (1, 6144))

def run(length):
    with attach(
        model, HashSelector(weights), Budget(2, 4, heavy=32), memory=memory, allow_untrained=True
    ):
        model.generate(ids[:, :length], max_new_tokens=3, prefill_chunk_size=128, do_sample=False)

run(1100)
before = status("VmRSS")
run(6144)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_chunked_prefill_holds_one_layer_at_a_time(tmp_path):
    def peak(place: str) -> float:
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, place],
            capture_output=True, text=True, env=environment, check=True,
        )  # fmt: skip
        return float(done.stdout)

    size = 8 * 4 * 2 * 64 * 4 * 6144 / 2**20  # MiB of keys and values
    everything, stored = peak("dense"), peak(str(tmp_path))
    assert everything > size
    # fast memory, and copies of one layer of eight while it is read
    assert stored < 8 + 4 * size / 8 < 0.6 * everything
    assert not os.listdir(tmp_path)
