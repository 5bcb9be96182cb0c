"""Kernels of the API, called where their backend runs: Triton on the GPU, if there is one."""

import importlib
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from hashattn.kernels import Codes, Maps

CUDA = torch.cuda.is_available()
GPU = torch.device("cuda" if CUDA else "cpu")  # without a GPU Triton's interpreter takes its place
if not CUDA:
    importlib.import_module("interpreter")


def move(value: Any, device: torch.device) -> Any:
    """Tensors, maps and codes on `device`; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Maps):
        parts = [tuple(x.to(device) for x in part) for part in (value.weights, value.biases)]
        steps = None if value.steps is None else value.steps.to(device)
        return Maps(*parts, value.activation, steps)
    if isinstance(value, Codes):
        return type(value).from_tokens(value.to_tokens().to(device))
    return tuple(move(part, device) for part in value) if isinstance(value, tuple) else value


def on_device(kernel):
    """`kernel`, with arguments moved to the device of its backend, and results back to the CPU."""
    if not CUDA:
        return kernel

    @wraps(kernel)
    def moved(*arguments, backend=None, **options):
        device = GPU if backend == "triton" else torch.device("cpu")
        arguments = [move(value, device) for value in arguments]
        options = {name: move(value, device) for name, value in options.items()}
        return move(kernel(*arguments, backend=backend, **options), torch.device("cpu"))

    return moved
