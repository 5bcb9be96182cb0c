"""The import package beside Hugging Face's own `kernels`."""

import subprocess
import sys
from pathlib import Path

import hashattn.kernels
import hashattn_kernels

FOLDER = Path(hashattn_kernels.__file__).parent.parent


def test_kernels_folder_is_no_package():
    """`kernels/__init__.py` would shadow Hugging Face's package and break model imports."""
    assert not (FOLDER / "__init__.py").exists()


def test_hashattn_re_exports_every_kernel():
    assert set(hashattn.kernels.__all__) == set(hashattn_kernels.__all__)
    for name in hashattn_kernels.__all__:
        assert getattr(hashattn.kernels, name) is getattr(hashattn_kernels, name)


def test_import_is_light():
    code = (
        "import sys, hashattn; heavy = {'torch', 'transformers', 'triton', 'datasets', "
        "'matplotlib', 'pandas'} & set(sys.modules); assert not heavy, heavy; "
        "assert hashattn.Budget(heavy=8).heavy == 8"
    )
    search = [str(Path(hashattn.__file__).parent.parent), str(FOLDER)]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {search!r}; {code}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
