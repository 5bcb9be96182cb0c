"""Rounding of the compiled backends' attention, beside torch's own."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hashattn.kernels import attend, dense_decode
from kernel_inputs import attention_states, token_lists
from on_device import GPU


def exact(q, k, v, indices, scaling) -> Tensor:
    """float64 attention over the listed tokens, lists per KV head."""
    q, k, v = q.double(), k.double(), v.double()
    at = indices.long().squeeze(2).unsqueeze(-1)
    k, v = (
        k.gather(2, at.expand(*at.shape[:3], k.shape[3])),
        v.gather(2, at.expand(*at.shape[:3], v.shape[3])),
    )
    group = q.shape[1] // k.shape[1]
    weights = (q @ k.repeat_interleave(group, 1).mT * scaling).softmax(-1)
    return weights @ v.repeat_interleave(group, 1)


def compiled_here_alone(*shape) -> object:
    return pytest.param(*shape, marks=pytest.mark.long)  # 10 seconds for each head size and dtype


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim", "dtype"),
    [
        (8, 2, 64, 64, torch.float32),
        (8, 2, 128, 128, torch.bfloat16),
        (3, 3, 128, 128, torch.bfloat16),
        compiled_here_alone(5, 1, 80, 80, torch.float16),
        compiled_here_alone(4, 2, 96, 96, torch.bfloat16),
        compiled_here_alone(12, 2, 256, 256, torch.bfloat16),
        compiled_here_alone(2, 2, 64, 128, torch.float32),
        compiled_here_alone(8, 2, 16, 48, torch.float16),
    ],
)
@pytest.mark.parametrize("n", [1, 15, 200])
@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_error_is_at_most_twice_that_of_torch(backend, heads, kv_heads, dim, value_dim, dtype, n):
    """FlashAttention's criterion: against float64, beside torch's attention in the same dtype."""
    device = GPU if backend == "triton" else torch.device("cpu")
    q, k, v = (x.to(device) for x in attention_states(heads, kv_heads, n, dim, value_dim, dtype))
    indices = token_lists(kv_heads, n, max(1, n // 2)).to(device)
    everything = torch.arange(n, dtype=torch.int32, device=device).expand(2, kv_heads, 1, n)
    cases = [
        (attend(q, k, v, indices, dim**-0.5, backend=backend), indices),
        (dense_decode(q, k, v, dim**-0.5, backend=backend), everything),
    ]
    for ours, tokens in cases:
        expected = exact(q, k, v, tokens, dim**-0.5)
        at = tokens.long().squeeze(2).unsqueeze(-1)
        chosen = [x.gather(2, at.expand(*at.shape[:3], x.shape[3])) for x in (k, v)]
        group = heads // kv_heads
        peer = scaled_dot_product_attention(q, *(x.repeat_interleave(group, 1) for x in chosen))
        error, allowed = ((x.double() - expected).abs().max() for x in (ours, peer))
        assert ours.dtype == dtype and error <= 2 * allowed + 1e-6
