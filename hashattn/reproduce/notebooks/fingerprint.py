"""What a notebook's results depend on, as one hash: when it is unchanged the results are reused.

Its cells, the code of earlier notebooks (which write what later ones read), the package's source,
the profile, the model and data, and the versions of the libraries that compute and draw.
"""

from __future__ import annotations

import json
from pathlib import Path

from hashattn.base.environment import package_versions
from hashattn.base.files import read_json
from hashattn.base.hashes import sha256_text, sha256_tree
from hashattn.base.source import sources_sha256
from hashattn.reproduce.access import data_folder, model_folder
from hashattn.reproduce.profiles import Profile, repository

_LIBRARIES = ("torch", "transformers", "numpy", "matplotlib", "seaborn", "pandas")
_LARGE = 256 * 2**20  # bytes from which only a file's name and size count: hashing takes minutes


def notebook_source(path: Path, code_only: bool = False) -> str:
    """The cells of a notebook as one text, without outputs, counts and ids."""
    cells = read_json(path)["cells"]
    sources = [
        [cell["cell_type"], sorted(cell["metadata"].get("tags", [])), "".join(cell["source"])]
        for cell in cells
        if cell["cell_type"] == "code" or not code_only
    ]
    return json.dumps(sources)


def _folder_hash(folder: Path) -> str:
    """Hash of a model or data folder; of files of _LARGE bytes or more only name and size."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    small = [path for path in files if path.stat().st_size < _LARGE]
    large = [f"{p.relative_to(folder)} {p.stat().st_size}" for p in files if p not in small]
    return sha256_text("\n".join([sha256_tree(folder, small), *large]))


def input_hashes(profile: Profile) -> dict[str, str]:
    """Hash of each input folder: model, data, corpus, prompts, reference results, hash weights."""
    folders = {
        "model": model_folder(profile),
        "data": data_folder(profile),
        "corpus": repository() / "data" / "corpus",
        "prompts": repository() / "data" / "longbench",
        "reference": repository() / "data" / "reference",
        "hash_weights": profile.hash_weights_path,
    }
    return {name: _folder_hash(path) for name, path in folders.items() if path and path.is_dir()}


def shared_fingerprint(profile: Profile) -> str:
    """Hash of everything but the notebooks."""
    parts = {
        "package": sources_sha256(),
        "profile": profile.to_dict(),
        "inputs": input_hashes(profile),
        "versions": package_versions(_LIBRARIES),
    }
    return sha256_text(json.dumps(parts, sort_keys=True))


def notebook_fingerprints(notebooks: list[Path], shared: str) -> dict[str, str]:
    """{notebook name: fingerprint} of its cells, the code of earlier notebooks, and `shared`."""
    earlier, fingerprints = shared, {}
    for path in notebooks:
        fingerprints[path.stem] = sha256_text(earlier + notebook_source(path))
        earlier = sha256_text(earlier + notebook_source(path, code_only=True))
    return fingerprints
