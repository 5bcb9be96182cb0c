"""Every writer of whole files leaves the new file, or the old one and nothing beside it."""

import matplotlib
import pandas as pd
import pytest
import torch

from hashattn.base.errors import HashAttnError
from hashattn.base.files import WriteError, replacing, write_json, write_text
from hashattn.base.progress import VARIABLE, progress_bar, say
from hashattn.base.tensors import write_tensors
from hashattn.evaluation.methods import save_receipts
from hashattn.evaluation.records import Record, save_records
from hashattn.reproduce.bench.record import save
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.notebooks.execute import State
from hashattn.reproduce.plots import save_figure, save_table, save_text
from helpers import full_disk

matplotlib.use("agg")
LIMIT = 4096
LONG = 10 * LIMIT * "x"


def reading(text):
    receipt = {
        "dense_calls": {}, "sparse_calls": 1, "method": "hash", "settings": {},
        "environment": {"device": text},
    }  # fmt: skip
    return [{
        "setup": "B", "method": "hash", "budget": "16x", "tokens_read": 1, "tokens_cached": 16,
        "auxiliary_bits": 32, "nominal_bits": 32, "receipt": receipt,
    }]  # fmt: skip


def claim(path, text):
    made = Claims(path.stem, path.parents[1])
    made.goal(text, 1.0, low=0)


def draw(points):
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots()
    axis.plot(range(points), [i % 7 for i in range(points)])
    plt.close(figure)
    return figure


WRITERS = {  # {name: (file, write(folder, much))}; much: whether it is more than LIMIT
    "text": ("a", lambda folder, much: write_text(folder / "a", LONG if much else "x")),
    "JSON": ("a", lambda folder, much: write_json(folder / "a", [LONG if much else "x"])),
    "records": (
        "a",
        lambda folder, much: save_records(
            [Record("", LONG if much else "x", ("y",))], folder / "a"
        ),
    ),
    "reading": (
        "a",
        lambda folder, much: save_receipts(folder / "a", reading(LONG if much else "x")),
    ),
    "tensors": (
        "a",
        lambda folder, much: write_tensors(folder / "a", {"x": torch.zeros(9999 if much else 1)}),
    ),
    "bench": ("a", lambda folder, much: save(folder / "a", rows=LONG if much else "x")),
    "table": (
        "tables/a.csv",
        lambda folder, much: save_table(pd.DataFrame({"x": [LONG if much else "x"]}), "a", folder),
    ),
    "note": ("tables/a.md", lambda folder, much: save_text(LONG if much else "x", "a.md", folder)),
    "claims": (
        "claims/a.json",
        lambda folder, much: claim(folder / "claims/a.json", LONG if much else "x"),
    ),
    "state": (
        "state/a.json",
        lambda folder, much: State(LONG if much else "x", 1.0, "now").save(folder, "a"),
    ),
}


@pytest.mark.parametrize(("name", "write"), [pytest.param(*w, id=n) for n, w in WRITERS.items()])
def test_a_full_disk_leaves_the_old_file(tmp_path, name, write):
    write(tmp_path, False)
    path = tmp_path / name
    old, beside = path.read_bytes(), set(path.parent.iterdir())
    cautions = {path.with_name("a.cautions.json")} if name.startswith("claims") else set()
    if name.startswith("claims"):  # begins a notebook's claims anew, before the first is made
        old = b"[]\n"
    with full_disk(LIMIT), pytest.raises(WriteError, match=path.name) as error:
        write(tmp_path, True)
    assert isinstance(error.value, HashAttnError) and isinstance(error.value, OSError)
    assert path.read_bytes() == old and set(path.parent.iterdir()) == beside == {path} | cautions
    write(tmp_path, True)
    assert path.stat().st_size > LIMIT and set(path.parent.iterdir()) == {path} | cautions


def test_a_full_disk_leaves_the_old_figure(tmp_path):
    paths = save_figure(draw(2), "a", tmp_path)
    old = [path.read_bytes() for path in paths]
    with full_disk(LIMIT), pytest.raises(WriteError, match="a.png"):
        save_figure(draw(500), "a", tmp_path)
    assert [path.read_bytes() for path in paths] == old
    assert set((tmp_path / "figures").iterdir()) == set(paths)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_stops_a_writer_leaves_the_old_file(tmp_path, error):
    path = write_text(tmp_path / "a", "old")
    with pytest.raises(error), replacing(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr("hashattn.base.files.os.fsync", lambda _: done.append("on disk"))
    monkeypatch.setattr("hashattn.base.files.os.replace", lambda *_: done.append("in place"))
    write_text(tmp_path / "a", "x")
    assert done == ["on disk", "in place"]


def test_a_link_stays_one(tmp_path):
    write_text(tmp_path / "there", "old")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "new"


def test_a_path_that_takes_no_file_is_named(tmp_path):
    (tmp_path / "a").write_text("a file")
    for path in (tmp_path / "a" / "b", tmp_path):
        with pytest.raises(WriteError, match="cannot be written"):
            write_text(path, "x")


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_progress_that_cannot_be_written_ends_no_work(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none" / "progress.txt"))
    say("no folder")
    assert list(progress_bar(range(3))) == [0, 1, 2]
