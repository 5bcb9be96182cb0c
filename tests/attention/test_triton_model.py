"""A Hugging Face model whose hash attention runs on the Triton kernels."""

import pytest
import torch

from hashattn import Budget, attach
from hashattn.base.errors import NonFiniteError
from hashattn.hashing.maps import HashConfig
from hashattn.hashing.weights import HashWeights
from hashattn.kernels import attend, encode
from hashattn.selectors import HashSelector
from hashattn.selectors.oracle import OracleSelector
from hashattn.selectors.window import WindowSelector
from hashattn_kernels import backends
from helpers import generate, left_padded, tiny_model
from on_device import CUDA, GPU


def logits(model, monkeypatch, backend: str, layout: str) -> torch.Tensor:
    config = HashConfig((0, 1), 4, 2, 16, layout, 32, depth=2, hidden=16)
    selector = HashSelector(HashWeights.random(config, seed=0))
    ids, mask = (x.to(GPU) for x in left_padded((40, 33)))
    monkeypatch.setattr(backends, "_DEFAULT", backend)
    with attach(model, selector, Budget(sink=1, local=3, heavy=6), allow_untrained=True) as run:
        found = generate(model, ids, mask, max_new_tokens=2)[1]
    assert run.receipt.density < 0.5
    return found


@pytest.mark.long
@pytest.mark.parametrize("layout", ["per_kv_head", "per_query_head"])
def test_decoding_on_triton_is_decoding_on_the_reference(monkeypatch, layout):
    model = tiny_model("llama").to(GPU)
    found = logits(model, monkeypatch, "triton", layout)
    torch.testing.assert_close(
        found, logits(model, monkeypatch, "reference", layout), rtol=0, atol=1e-4
    )


def test_a_receipt_counts_the_same_on_every_device():
    receipts = []
    for device in (GPU, torch.device("cpu")):
        model, (ids, mask) = tiny_model("llama").to(device), left_padded((40, 33))
        with attach(model, OracleSelector(), Budget(sink=1, local=3, heavy=6)) as run:
            generate(model, ids.to(device), mask.to(device), max_new_tokens=4)
        receipts.append(run.receipt.to_dict())
    for name in ("density", "decode_density", "counts", "auxiliary_bits"):
        assert receipts[0][name] == receipts[1][name]


def test_keys_that_are_no_numbers_are_refused_on_every_device():
    model, (ids, mask) = tiny_model("llama").to(GPU), left_padded((40, 33))
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 1"):
        with attach(model, WindowSelector(), Budget(sink=1, local=3, heavy=0)):
            generate(model, ids.to(GPU), mask.to(GPU), max_new_tokens=4)


@pytest.mark.skipif(not CUDA, reason="needs a GPU: what is chosen there")
def test_tensors_on_a_gpu_choose_triton():
    q = torch.zeros(1, 2, 1, 64, device=GPU)
    assert backends.backend_for(q, None, "attend", q, q, q).__name__.endswith("triton_gpu")


def test_what_triton_cannot_do_is_refused(monkeypatch):
    q, indices = torch.zeros(1, 2, 1, 24, device=GPU), torch.zeros(1, 2, 1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="'triton': does not support attend"):
        attend(q, q, q, indices.to(GPU), 1.0, backend="triton")
    maps = HashWeights.random(HashConfig((0,), 2, 2, 24, bits=32, depth=2, hidden=16), 0).maps[0]
    monkeypatch.setattr(backends, "_interpreted", lambda: False)
    with pytest.raises(ValueError, match="'triton': needs tensors on a CUDA GPU, got cpu"):
        encode(q.cpu(), maps.query, backend="triton")
