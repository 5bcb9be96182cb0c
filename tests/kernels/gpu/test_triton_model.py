"""A Hugging Face model whose hash attention runs on the Triton kernels."""

import pytest
import torch

from hashattn import Budget, attach
from hashattn.hashing.maps import HashConfig
from hashattn.hashing.weights import HashWeights
from hashattn.kernels import attend, encode
from hashattn.selectors import HashSelector
from hashattn_kernels import backends
from helpers import generate, left_padded, tiny_model
from on_device import CUDA, GPU


def logits(model, monkeypatch, backend: str, layout: str) -> torch.Tensor:
    config = HashConfig((0, 1), 4, 2, 16, layout, 32, depth=2, hidden=16)
    selector = HashSelector(HashWeights.random(config, seed=0))
    ids, mask = (x.to(GPU) for x in left_padded((40, 33)))
    monkeypatch.setattr(backends, "_WISH", backend)
    with attach(model, selector, Budget(sink=1, local=3, heavy=6), allow_untrained=True) as run:
        found = generate(model, ids, mask, max_new_tokens=3)[1]
    assert run.receipt.density < 0.5
    return found


@pytest.mark.parametrize("layout", ["per_kv_head", "per_query_head"])
def test_decoding_on_triton_is_decoding_on_the_reference(monkeypatch, layout):
    model = tiny_model("llama").to(GPU)
    found = logits(model, monkeypatch, "triton", layout)
    torch.testing.assert_close(
        found, logits(model, monkeypatch, "reference", layout), rtol=0, atol=1e-4
    )


@pytest.mark.skipif(not CUDA, reason="needs a GPU: what is chosen there")
def test_tensors_on_a_gpu_choose_triton():
    q = torch.zeros(1, 2, 1, 64, device=GPU)
    assert backends.backend_for(q, None, "attend", q, q, q).__name__.endswith("triton_gpu")


def test_what_triton_cannot_do_is_refused(monkeypatch):
    q, indices = torch.zeros(1, 2, 1, 24, device=GPU), torch.zeros(1, 2, 1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="'triton' does not support attend"):
        attend(q, q, q, indices.to(GPU), 1.0, backend="triton")
    maps = HashWeights.random(HashConfig((0,), 2, 2, 24, bits=32, depth=2, hidden=16), 0).maps[0]
    monkeypatch.setattr(backends, "_interpreted", lambda: False)
    with pytest.raises(ValueError, match="'triton' needs tensors on a CUDA GPU, got cpu"):
        encode(q.cpu(), maps.query, backend="triton")
