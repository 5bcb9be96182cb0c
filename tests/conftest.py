"""Settings of all tests: results in a temporary folder, no network, no progress bars, and Triton's
interpreter where there is no GPU. Long tests that are settled are left out: see settled.py."""

import os
import tempfile

import pytest
import torch

_RESULTS = tempfile.TemporaryDirectory(prefix="hashattn-results-")

# Set here, not in a fixture: the kernels that nbval starts inherit the environment.
os.environ.update({
    "HASHATTN_RESULTS": _RESULTS.name,
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore:IProgress not found",
})  # fmt: skip
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined, to run it in numpy
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: one thread each, in children too
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
for name in ("HASHATTN_MODEL_DIR", "HASHATTN_DATA_DIR", "HASHATTN_PROGRESS"):
    os.environ.pop(name, None)


def pytest_collection_modifyitems(config, items):
    """Leave out what is settled."""
    if os.environ.get("ALL") or torch.cuda.is_available():
        return
    from settled import REPORT, settled

    reason = f"passed with these sources ({REPORT.name}); make test ALL=1 runs it"
    tests = {(item.nodeid.partition("::")[0], item.name): item for item in items}
    marked = {test: item.get_closest_marker("long") is not None for test, item in tests.items()}
    for test in settled((*test, marked[test]) for test in tests):
        tests[test].add_marker(pytest.mark.skip(reason=reason))


def pytest_unconfigure() -> None:
    _RESULTS.cleanup()


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder for the results of all profiles, this test's alone."""
    folder = tmp_path / "results"
    monkeypatch.setenv("HASHATTN_RESULTS", str(folder))
    return folder
