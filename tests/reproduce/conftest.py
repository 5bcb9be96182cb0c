"""A profile with a stand-in model folder, and small notebooks to run."""

import nbformat
import pytest
import yaml


@pytest.fixture
def profile_file(tmp_path, results):
    """A valid profile whose model folder has all files, each without content."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / name).write_text("{}")
    path = tmp_path / "small.yaml"
    fields = {
        "model": str(model), "hash_weights": None, "data": None, "tasks": ["lookup"],
        "lengths": [64], "densities": [0.5], "samples_per_task": 1, "contexts": [64],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.fixture
def write_notebook(tmp_path):
    """write(name, *cells): a notebook in tmp_path/notebooks, its first code cell the parameters."""
    folder = tmp_path / "notebooks"
    folder.mkdir()

    def write(name, *cells):
        code = [nbformat.v4.new_code_cell(cell) for cell in cells]
        code[0].metadata["tags"] = ["parameters"]
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), *code])
        nbformat.write(notebook, folder / f"{name}.ipynb")
        return folder / f"{name}.ipynb"

    return write
