"""Which backend runs: by device, by name, by what is installed and what it supports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hashattn_kernels
from hashattn.kernels import attend, available, hamming_scores
from hashattn_kernels import backends

KERNELS = Path(hashattn_kernels.__file__).parents[1]


def chosen(*arguments, kernel="attend", name=None) -> str:
    module = backends.backend_for(arguments[0], name, kernel, *arguments)
    return module.__name__.split(".")[-1]


def states(dim=32, dtype=torch.float32, **options):
    return [
        torch.randn(1, heads, n, dim, dtype=dtype, **options)
        for heads, n in ((4, 1), (2, 9), (2, 9))
    ]


def test_the_fastest_backend_that_takes_the_arguments():
    assert chosen(*states()) == "numba_cpu"
    assert chosen(*states(dtype=torch.bfloat16)) == "numba_cpu"
    assert chosen(*states(dtype=torch.float64)) == "numpy_cpu"
    assert chosen(*states(dim=24)) == "numpy_cpu"
    assert chosen(states(dim=20)[0], kernel="encode") == "numpy_cpu"
    q, k, v = states()
    assert chosen(q, k, v.half()) == "numpy_cpu"


def test_compiled_backends_have_no_gradients():
    q, k, v = states(requires_grad=True)
    assert chosen(q, k, v) == "numpy_cpu"
    with torch.no_grad():
        assert chosen(q, k, v) == "numba_cpu"
    indices = torch.arange(9, dtype=torch.int32).expand(1, 2, 1, 9)
    attend(q, k, v, indices, 1.0).sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in (q, v))


def test_names_are_obeyed_or_refused(monkeypatch):
    q, k, v = states()
    assert chosen(q, k, v, name="reference") == "reference"
    with pytest.raises(ValueError, match="backend = 'gpu': must be one of"):
        chosen(q, k, v, name="gpu")
    with pytest.raises(ValueError, match="backend = 'numba': does not support attend"):
        chosen(*states(dim=24), name="numba")
    monkeypatch.setattr(backends, "_DEFAULT", "numpy")
    assert chosen(q, k, v) == "numpy_cpu"
    assert chosen(q, k, v, name="numba") == "numba_cpu"


def test_a_backend_needs_its_device():
    q, k, v = (x.to("meta") for x in states())
    assert chosen(q, k, v) == "reference"
    with pytest.raises(ValueError, match="backend = 'numba': needs .* main memory, got meta"):
        chosen(q, k, v, name="numba")


def test_what_is_installed(monkeypatch):
    assert available("reference") and available("numpy") and available("numba")
    backends.available.cache_clear()
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    try:
        assert available("numpy") and not available("numba")
        with pytest.raises(ValueError, match=r"not installed; pip install -e '.\[cpu\]'"):
            chosen(*states(), name="numba")
    finally:
        backends.available.cache_clear()


WITHOUT_NUMBA = """
import sys, warnings
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "numba" else find(name, *more)
import torch
import hashattn_kernels as kernels
codes = torch.arange(300, dtype=torch.int32).reshape(1, 2, 150, 1)
query = torch.zeros(1, 4, 1, 1, dtype=torch.int32)
q, k = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 150, 32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        indices = kernels.select_by_codes(query, codes, 10, 2, 4)
        out = kernels.attend(q, k, k, indices, 0.1), kernels.dense_decode(q, k, k, 0.1)
said = [str(w.message) for w in caught]
assert len(said) == 1 and "numba is not installed" in said[0] and "'.[cpu]'" in said[0], said
assert "numba" not in sys.modules
assert indices.shape == (1, 2, 1, 16)
"""


def test_without_numba_everything_runs_and_says_so_once():
    environment = os.environ | {"PYTHONPATH": str(KERNELS)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_kernels_loads_no_compiler():
    code = (
        "import sys, hashattn_kernels; "
        "assert not {'numba', 'llvmlite', 'triton'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(KERNELS)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_lists_have_to_fit():
    queries, keys = (
        torch.zeros(1, 4, 1, 1, dtype=torch.int32),
        torch.zeros(1, 2, 5, 1, dtype=torch.int32),
    )
    assert hamming_scores(queries, keys, 4).shape == (1, 4, 1, 5)
    for lists in (0, 1, 3):
        with pytest.raises(ValueError, match=f"lists = {lists}"):
            hamming_scores(queries, keys, lists)
