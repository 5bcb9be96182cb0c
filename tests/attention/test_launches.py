"""What a decode step of a layer launches on a GPU, and that it never waits for it.

Without a GPU Triton's interpreter stands in for it, codes lie as a GPU reads them, and operators
are counted as they are dispatched: one kernel each, but for views and allocations.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from hashattn import Budget, attach
from hashattn.attention import dispatch
from hashattn.hashing.maps import HashConfig
from hashattn.hashing.weights import HashWeights
from hashattn.selectors import HashSelector, codes
from hashattn_kernels import backends, static
from hashattn_kernels.codes import Tiled
from helpers import generate, prompt, tiny_model
from on_device import CUDA, GPU

NO_KERNEL = {
    "view", "_unsafe_view", "expand", "transpose", "permute", "slice", "select", "unsqueeze",
    "squeeze", "as_strided", "t", "detach", "alias", "empty", "new_empty", "empty_like", "split",
    "split_with_sizes", "unbind", "reshape", "_reshape_alias", "unflatten", "flatten", "narrow",
    "empty_strided", "lift_fresh", "chunk", "new_empty_strided",
}  # fmt: skip
WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"}
LAYER = 1  # of two: the first plans the step for both


class Launches(TorchDispatchMode):
    """Kernels and host waits of what runs while `on`, by name."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.on, self.kernels, self.waits = False, Counter(), Counter()
        launched = JITFunction if CUDA else InterpretedFunction
        run = launched.run

        def counted(function, *arguments, **options):
            was, self.on = self.on, False  # the interpreter's own operators are none of a GPU
            if was:
                self.kernels[function.fn.__name__] += 1
            try:
                return run(function, *arguments, **options)
            finally:
                self.on = was

        monkeypatch.setattr(launched, "run", counted)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        out = operator(*args, **(kwargs or {}))
        if self.on and name in WAITS:
            self.waits[name] += 1
        elif self.on and name not in NO_KERNEL:
            copies = name in ("_to_copy", "copy_", "clone")
            if not (copies and name == "_to_copy" and out.dtype == args[0].dtype):
                self.kernels[name] += 1
        return out


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The path of tensors on a GPU."""
    if not CUDA:
        monkeypatch.setattr(backends, "_DEFAULT", "triton")
        for module in (codes, static):
            monkeypatch.setattr(module, "layout_for", lambda device: Tiled)
        monkeypatch.setattr(dispatch, "counted_there", lambda device: True)


def selector(**options) -> HashSelector:
    config = HashConfig((0, 1), 4, 2, 16, "per_kv_head", 32, depth=2, hidden=16)
    return HashSelector(HashWeights.random(config, seed=0), **options)


def counted(monkeypatch, method, budget=None, **settings) -> tuple[Launches, torch.Tensor, object]:
    """What a step of a layer takes; the tokens; the receipt."""
    launches, forward, steps = Launches(monkeypatch), dispatch.forward, Counter()
    first = 1 if settings else 2  # over a dynamic cache the first step packs maps, reserves memory

    def watched(module, query, *arguments, **options):
        steps[module.layer_idx] += query.shape[2] == 1
        launches.on = module.layer_idx == LAYER and steps[LAYER] == first
        try:
            return forward(module, query, *arguments, **options)
        finally:
            launches.on = False

    monkeypatch.setattr(dispatch, "forward", watched)
    model = tiny_model("llama").to(GPU)
    budget = budget or Budget(sink=1, local=3, heavy=6)
    with attach(model, method, budget, allow_untrained=True) as run, launches:
        tokens, _ = generate(model, prompt(1, 40).to(GPU), max_new_tokens=3, **settings)
    return launches, tokens, run.receipt


STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize("settings", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("drawn", [0, 0.5], ids=["ranked", "drawn"])
def test_a_step_of_a_layer_takes_few_launches_and_never_waits(
    as_on_a_gpu, monkeypatch, drawn, settings
):
    method = selector()._with(slopes={layer: torch.full((4,), 0.5) for layer in (0, 1)})
    budget = Budget(sink=1, local=3, heavy=6, sampled=drawn)
    launches, tokens, receipt = counted(monkeypatch, method, budget, **settings)
    assert not launches.waits
    assert 4 <= sum(launches.kernels.values()) <= 8, launches.kernels
    assert receipt.sparse_calls == 4 and not receipt.dense_reasons.keys() - {"prefill"}


@pytest.mark.parametrize("settings", [{}, STATIC], ids=["dynamic", "static"])
def test_tokens_and_receipt_are_those_of_a_host_that_counts(as_on_a_gpu, monkeypatch, settings):
    _, tokens, receipt = counted(monkeypatch, selector(), **settings)
    model = tiny_model("llama").to(GPU)
    kinds = {"allow_untrained": True, "keep_steps": 1}  # which the host has to count
    with attach(model, selector(), Budget(sink=1, local=3, heavy=6), **kinds) as run:
        expected, _ = generate(model, prompt(1, 40).to(GPU), max_new_tokens=3, **settings)
    assert torch.equal(tokens, expected)
    assert receipt.to_dict()["counts"] == run.receipt.to_dict()["counts"]


def test_the_counter_sees_kernels_and_waits(monkeypatch):
    launches = Launches(monkeypatch)
    with launches:
        launches.on = True
        (torch.ones(4, device=GPU).view(2, 2) + 1).sum().item()
        launches.on = False
    assert launches.kernels == {"ones": 1, "add": 1, "sum": 1}
    assert launches.waits == {"_local_scalar_dense": 1}
