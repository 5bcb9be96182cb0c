"""Long tests of kernels that are settled are left out: see settled.py."""

import os
from pathlib import Path

import pytest
from settled import REPORT, name_of, settled

from on_device import CUDA


def pytest_collection_modifyitems(items):
    """Leave out what is settled; see settled.py. `items` are those of the whole session."""
    if os.environ.get("ALL") or CUDA:
        return
    names = {
        item: name_of(item.nodeid) for item in items if Path(__file__).parent in item.path.parents
    }
    done = settled(names.values())
    reason = f"passed with these sources ({REPORT.name}); make test ALL=1 runs it"
    for item, name in names.items():
        if name in done:
            item.add_marker(pytest.mark.skip(reason=reason))
