import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from hashattn.reproduce.notebooks.driver import ReproductionError
from hashattn.reproduce.notebooks.hygiene import problems
from hashattn.reproduce.notebooks.store import PICTURE, store, store_picture, tidy


def executed_notebook():
    """A clean executed notebook with everything a run adds to it."""
    parameters = new_code_cell("x = 1", execution_count=1)
    parameters.metadata = {"tags": ["parameters"], "execution": {"iopub.status.busy": "2026"}}
    prints = new_code_cell("print(x)", execution_count=2)
    prints.metadata = {"papermill": {"duration": 1.2}, "tags": []}
    prints.outputs = [new_output("stream", name="stdout", text=t) for t in ("1\n", "2\n")]
    prints.outputs.append(new_output("display_data", data={"text/plain": "<Figure>"}))
    notebook = new_notebook(cells=[new_markdown_cell("# Title"), parameters, prints])
    notebook.metadata = {"papermill": {"end_time": "2026"}, "language_info": {"version": "3.11.7"}}
    return notebook


def test_tidy_keeps_the_page_and_drops_the_run():
    text = nbformat.writes(tidy(executed_notebook()))
    assert "papermill" not in text and "3.11.7" not in text and "iopub" not in text
    cells = nbformat.reads(text, as_version=4).cells
    assert [cell.id for cell in cells] == ["cell-00", "cell-01", "cell-02"]
    assert cells[1].metadata == {"tags": ["parameters"]} and cells[2].metadata == {}
    assert [cell.execution_count for cell in cells[1:]] == [1, 2]
    assert [output.output_type for output in cells[2].outputs] == ["stream", "display_data"]
    assert cells[2].outputs[0].text == "1\n2\n"


def test_two_runs_tidy_to_the_same_text():
    texts = {nbformat.writes(tidy(executed_notebook())) for _ in range(2)}
    assert len(texts) == 1


def test_a_clean_notebook_has_no_problems():
    assert problems(executed_notebook()) == []


def spoil_counts(notebook):
    notebook.cells[2].execution_count = 5


def spoil_not_run(notebook):
    notebook.cells[2].execution_count = None


def spoil_tag(notebook):
    notebook.cells[1].metadata = {}


def spoil_injected(notebook):
    notebook.cells[2].metadata["tags"] = ["injected-parameters"]


def spoil_skip(notebook):
    notebook.cells[2].metadata["tags"] = ["nbval-skip"]


def spoil_length(notebook):
    notebook.cells[2].source = "\n".join(["x"] * 26)


def spoil_semicolon(notebook):
    notebook.cells[2].source = "plt.plot(x);"


def spoil_error(notebook):
    notebook.cells[2].outputs = [new_output("error", ename="KeyError", evalue="", traceback=[])]


def spoil_stderr(notebook):
    notebook.cells[2].outputs = [new_output("stream", name="stderr", text="warning")]


def spoil_bar(notebook):
    notebook.cells[2].outputs[0].text = " 50%|#####     | 5/10 [00:01<00:01, 4.9it/s]"


def spoil_address(notebook):
    notebook.cells[2].outputs[2].data = {"text/plain": "<matplotlib.Line2D at 0x7f00aa>"}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_counts, "execution counts"),
        (spoil_not_run, "execution counts"),
        (spoil_tag, "tagged parameters"),
        (spoil_injected, "injected parameters"),
        (spoil_skip, "nbval-skip"),
        (spoil_length, "cell 2: 26 lines"),
        (spoil_semicolon, "cell 2: a trailing ;"),
        (spoil_error, "cell 2: error output (KeyError)"),
        (spoil_stderr, "cell 2: output on stderr"),
        (spoil_bar, "cell 2: a progress bar"),
        (spoil_address, "cell 2: a memory address"),
    ],
)
def test_every_problem_is_found(spoil, reason):
    notebook = executed_notebook()
    spoil(notebook)
    assert any(reason in problem for problem in problems(notebook)), problems(notebook)


def write(path, notebook):
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path


def test_store_writes_only_a_changed_notebook(tmp_path):
    target = write(tmp_path / "00_a.ipynb", executed_notebook())
    executed = write(tmp_path / "run" / "00_a.ipynb", executed_notebook())
    assert store(executed, target)
    before = target.stat().st_mtime_ns
    assert not store(executed, target) and target.stat().st_mtime_ns == before


def test_store_refuses_an_edited_source_and_an_unclean_or_missing_run(tmp_path):
    edited = executed_notebook()
    edited.cells[2].source = "print(x + 1)"
    target = write(tmp_path / "00_a.ipynb", edited)
    executed = write(tmp_path / "run" / "00_a.ipynb", executed_notebook())
    text = target.read_text()
    with pytest.raises(ReproductionError, match="not the notebook that was run"):
        store(executed, target)
    spoil_stderr(edited)
    with pytest.raises(ReproductionError, match="not fit to be stored: cell 2: output on stderr"):
        store(write(tmp_path / "run" / "00_b.ipynb", edited), target)
    with pytest.raises(ReproductionError, match="run make reproduce first"):
        store(tmp_path / "run" / "absent.ipynb", target)
    assert target.read_text() == text


def test_the_readme_s_picture_is_stored_with_the_run_that_drew_it(tmp_path):
    results, notebooks = tmp_path / "results", tmp_path / "notebooks"
    (results / "figures").mkdir(parents=True)
    notebooks.mkdir()
    store_picture(results, notebooks)
    assert not (notebooks / "figures").exists()  # a run that drew none leaves the old one
    for drawn in (b"first", b"second"):
        (results / "figures" / f"03_{PICTURE}").write_bytes(drawn)
        store_picture(results, notebooks)
        assert (notebooks / "figures" / PICTURE).read_bytes() == drawn
