"""Result files: what is written is what is read, small, and of this version."""

import pytest

from hashattn.base.files import FileError
from hashattn.reproduce.bench.record import load, save

ROWS = [
    {"variant": "default", "ms": 1.23456789, "bytes": 7, "threads": 1, "n": 8},
    {"variant": "dense", "ms": 2.0, "bytes": None, "threads": 1, "n": 8, "extra": "x"},
]


def test_rows_come_back_with_what_they_share(tmp_path):
    save(tmp_path / "a.json", layer=ROWS, empty=[], note="n", nested={"x": [1.23456789]})
    record = load(tmp_path / "a.json")
    assert record["layer"] == [
        {"variant": "default", "ms": 1.23457, "bytes": 7, "threads": 1, "n": 8, "extra": None},
        {"variant": "dense", "ms": 2.0, "bytes": None, "threads": 1, "n": 8, "extra": "x"},
    ]
    assert record["empty"] == [] and record["note"] == "n"
    assert record["nested"] == {"x": [1.23457]}
    assert record["environment"]["packages"]["torch"]


def test_a_row_takes_a_line_and_shared_values_are_written_once(tmp_path):
    rows = [{"variant": "a long name", "protocol": "the same for all rows", "ms": i / 3}
            for i in range(100)]  # fmt: skip
    save(tmp_path / "a.json", layer=rows)
    text = (tmp_path / "a.json").read_text()
    assert text.count("the same") == text.count("a long name") == 1
    assert len(text.splitlines()) > 100 and len(text) < 3000
    assert load(tmp_path / "a.json")["layer"][7] == rows[7] | {"ms": 2.33333}


@pytest.mark.parametrize("change", [('"format": 2', '"format": 1'), ('"format": 2', '"form": 2')])
def test_other_formats_are_refused(tmp_path, change):
    save(tmp_path / "a.json", layer=ROWS)
    text = (tmp_path / "a.json").read_text()
    assert change[0] in text
    (tmp_path / "a.json").write_text(text.replace(*change))
    with pytest.raises(FileError, match="another version"):
        load(tmp_path / "a.json")
