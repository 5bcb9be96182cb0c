"""Which backend runs a kernel: by device, by what is installed, by what it supports."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

MODULES = {
    "reference": "reference",
    "numpy": "numpy_cpu",
    "numba": "numba_cpu",
    "triton": "triton_gpu",
}
INSTALL = {
    "numba": "pip install -e '.[cpu]' in its repository",
    "triton": "pip install -e '.[triton]' in its repository (Linux on x86-64)",
}
ENVIRONMENT = "HASHATTN_BACKEND"  # names the backend of every call that names none itself
_DEFAULT = os.environ.get(ENVIRONMENT) or None


def backend_for(tensor: Tensor, name: str | None, kernel: str, *arguments) -> ModuleType:
    """The module whose `kernel` takes these arguments: `name`, or the fastest for the device.

    tensor: the argument whose device counts. Raises ValueError for a backend that is unknown or not
    installed, needs another device, or does not support the arguments.
    """
    name = name or _DEFAULT
    if name is not None:
        return _named(tensor, name, kernel, arguments)
    for module, supports in _preferred("cpu" if tensor.is_cpu else tensor.device.type):
        if _supported(supports, kernel, arguments):
            return module
    raise AssertionError("the last backend of a device supports everything")


def _supported(supports: Callable[..., bool] | None, kernel: str, arguments: tuple) -> bool:
    """Whether a backend takes the arguments, by its `supports`; None: it takes all of them."""
    if supports is None:
        return True
    tensors = (argument for argument in arguments if isinstance(argument, Tensor))
    # a backend with a `supports` is compiled, and has no gradients
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return supports(kernel, *arguments)


def _named(tensor: Tensor, name: str, kernel: str, arguments: tuple) -> ModuleType:
    if name not in MODULES:
        raise ValueError(f"backend = {name!r}: must be one of {', '.join(sorted(MODULES))}")
    if name in ("numpy", "numba") and tensor.device.type != "cpu":
        raise ValueError(f"backend = {name!r}: needs tensors in main memory, got {tensor.device}")
    if not available(name):
        raise ValueError(f"backend = {name!r}: not installed; {INSTALL[name]}")
    if name == "triton" and not (tensor.is_cuda or _interpreted()):
        raise ValueError(
            f"backend = 'triton': needs tensors on a CUDA GPU, got {tensor.device}; for a slow run "
            "on a CPU set TRITON_INTERPRET=1 before Python starts"
        )
    module, supports = _load(name)
    if not _supported(supports, kernel, arguments):
        raise ValueError(
            f"backend = {name!r}: does not support {kernel} for these dtypes and head dims, or has "
            "no gradients for it; name no backend, or 'reference'"
        )
    return module


@cache
def available(name: str) -> bool:
    """Whether a backend's package is installed."""
    return name not in INSTALL or find_spec(name) is not None


def _interpreted() -> bool:
    return bool(import_module("triton").knobs.runtime.interpret)


@cache
def _preferred(device: str) -> tuple:
    """(module, its `supports` or None) of a device's backends, fastest first."""
    names = {"cpu": ("numba", "numpy"), "cuda": ("triton", "reference")}.get(device, ("reference",))
    if device == "cpu" and not available("numba"):
        warnings.warn(
            "numba is not installed: hash attention runs on numpy and torch, several times slower "
            f"on a CPU. For the fast kernels: {INSTALL['numba']}",
            stacklevel=2,
        )
    return tuple(_load(name) for name in names if available(name))


@cache
def _load(name: str) -> tuple:
    module = import_module(f".{MODULES[name]}", __package__)
    return module, getattr(module, "supports", None)
