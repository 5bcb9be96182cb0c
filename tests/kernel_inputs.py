"""Random inputs for the kernels' tests: a seed gives the same on every device."""

import torch
from torch import Tensor

from hashattn.kernels import Maps
from on_device import GPU

BACKENDS = ("reference", "numpy", "numba", "triton")


def random_codes(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """int32 words of uniform bits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(device, torch.int32)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """N(0, 1), on the device where Triton's kernels run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(GPU, dtype)


def normal_maps(heads: int, *widths: int, activation: str = "silu") -> Maps:
    """Maps of these widths in bfloat16, on the device where Triton's kernels run."""
    sizes = list(zip(widths, widths[1:], strict=False))
    weights = tuple(normal(heads, a, b, seed=a) * a**-0.5 for a, b in sizes)
    biases = tuple(normal(heads, b, seed=b) * 0.1 for _, b in sizes)
    return Maps(weights, biases, activation).rounded()


def attention_states(heads, kv_heads, n, dim, value_dim, dtype) -> list[Tensor]:
    """q (2, heads, 1, dim), k (2, kv_heads, n, dim) and v (2, kv_heads, n, value_dim)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 1, dim), (2, kv_heads, n, dim), (2, kv_heads, n, value_dim)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def token_lists(kv_heads: int, n: int, m: int) -> Tensor:
    """Ascending lists (2, kv_heads, 1, m) int32 of m of n tokens."""
    generator = torch.Generator().manual_seed(n)
    rows = [torch.randperm(n, generator=generator)[:m].sort().values for _ in range(2 * kv_heads)]
    return torch.stack(rows).reshape(2, kv_heads, 1, m).to(torch.int32)
