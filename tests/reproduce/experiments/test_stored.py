"""Tables of another profile: from a run on this machine, else from the committed record."""

import json

import pandas as pd
import pytest

from hashattn.reproduce.experiments import stored
from hashattn.reproduce.notebooks import store
from hashattn.reproduce.profiles import load_profile

TABLE = "method,bits,1/8\noracle,0,0.25\nlsh,32,0.5\n"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A results folder and a reference folder, both empty."""
    monkeypatch.setenv("HASHATTN_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(stored, "reference_folder", lambda profile: tmp_path / "kept" / profile)
    tables = tmp_path / "results" / stored.PRETRAINED / "tables"
    tables.mkdir(parents=True)
    return tables, tmp_path / "kept" / stored.PRETRAINED


def test_a_run_is_stored_and_then_read_where_nothing_ran(folders, capsys):
    tables, kept = folders
    (tables / "02_output_error.csv").write_text(TABLE)
    run = stored.stored_table("02_output_error", ["method", "bits"])
    assert run.attrs["source"] == "smollm2: computed on this machine"
    assert run.loc[("lsh", 32), "1/8"] == 0.5
    assert store.main(["--profile", stored.PRETRAINED]) == 0
    about = json.loads((kept / "about.json").read_text())
    assert about["profile"]["model"] == "pretrained:smollm2" and about["machine"]["cores"]
    (tables / "02_output_error.csv").unlink()
    record = stored.stored_table("02_output_error", ["method", "bits"])
    pd.testing.assert_frame_equal(record, run)
    assert f"not run here, the committed record of {about['date']}" in record.attrs["source"]
    assert f"torch {about['packages']['torch']}" in record.attrs["source"]


def test_a_table_measured_after_the_rest_has_a_day_of_its_own(folders):
    tables, kept = folders
    (tables / "02_output_error.csv").write_text(TABLE)
    (tables / "03_fidelity.csv").write_text(TABLE)
    stored.store_tables(load_profile(stored.PRETRAINED))
    about = json.loads((kept / "about.json").read_text())
    about |= {"date": "2026-01-01", "dates": {"03_fidelity": "2026-02-02"}}
    (kept / "about.json").write_text(json.dumps(about))
    for table in tables.glob("*.csv"):
        table.unlink()
    for name, day in (("02_output_error", "2026-01-01"), ("03_fidelity", "2026-02-02")):
        source = stored.stored_table(name, ["method"]).attrs["source"]
        assert f"the committed record of {day} (" in source


def test_without_a_run_there_is_nothing_to_store(folders):
    with pytest.raises(ValueError, match="profile = 'smollm2': must be one that ran"):
        stored.store_tables(load_profile(stored.PRETRAINED))
    with pytest.raises(FileNotFoundError):
        stored.stored_table("02_output_error", ["method"])
    assert store.main(["--profile", stored.PRETRAINED]) == 1
