"""The results file: resumes after a kill at any byte, refuses damage, is shared."""

import errno
import json
import os

import pytest

from hashattn.evaluation.log import ResultLog, ResultLogError
from helpers import full_disk

ROWS = [{"key": f"k{i}", "prediction": "ü\nx", "score": i / 2} for i in range(3)]


def write(path, rows=ROWS):
    with ResultLog(path) as log:
        for row in rows:
            log.append(row)


def test_rows_come_back(tmp_path):
    path = tmp_path / "sub" / "results.jsonl"
    write(path)
    with ResultLog(path) as log:
        assert list(log.rows.values()) == ROWS


def test_a_row_is_on_disk_before_append_returns(tmp_path):
    log = ResultLog(tmp_path / "results.jsonl")
    log.append(ROWS[0])
    assert json.loads((tmp_path / "results.jsonl").read_text()) == ROWS[0]
    log.close()


def test_a_file_cut_anywhere_loses_at_most_its_last_row(tmp_path):
    path = tmp_path / "results.jsonl"
    write(path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = sum(len(b"".join(lines[: i + 1])) <= size for i in range(len(lines)))
        with ResultLog(path) as log:
            assert len(log.rows) == complete
            log.append({"key": "new"})
        assert [json.loads(line) for line in path.read_text().splitlines()] == [
            *ROWS[:complete],
            {"key": "new"},
        ]


@pytest.mark.parametrize(
    "spoiled", [b'{"key": "k3", "sc\n', b"\0\0\0\0\n", b"\xff\xfe{}\n", b"garbage", b"\0" * 4096]
)
def test_a_spoiled_last_line_is_set_aside(tmp_path, spoiled, capsys):
    path = tmp_path / "results.jsonl"
    write(path)
    whole = path.read_bytes()
    path.write_bytes(whole + spoiled)
    with ResultLog(path) as log:
        assert list(log.rows.values()) == ROWS
        assert path.read_bytes() == whole
        assert "cut off" in capsys.readouterr().err
        log.append({"key": "new"})
    aside = tmp_path / "results.jsonl.damaged"
    assert aside.read_bytes() == spoiled.removesuffix(b"\n") + b"\n"
    with ResultLog(path) as log:
        assert [*log.rows] == ["k0", "k1", "k2", "new"]
    assert aside.read_bytes() == spoiled.removesuffix(b"\n") + b"\n"


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("first\nsecond\n")
    with pytest.raises(ResultLogError, match=r"notes\.txt:1 is not JSON"):
        ResultLog(path)
    assert path.read_text() == "first\nsecond\n"


def test_a_key_is_written_once(tmp_path):
    path = tmp_path / "results.jsonl"
    with ResultLog(path) as log:
        assert log.append({"key": "a", "score": 1}) and not log.append({"key": "a", "score": 2})
        assert log.rows["a"]["score"] == 1
    assert path.read_text() == '{"key": "a", "score": 1}\n'


def test_rows_of_others_are_found(tmp_path):
    path = tmp_path / "results.jsonl"
    with ResultLog(path) as log:
        path.write_bytes(b'{"key": "theirs"}\n{"key": "being wri')
        log.refresh()
        assert [*log.rows] == ["theirs"] and path.read_bytes().endswith(b"wri")
        assert not log.append({"key": "theirs"})
        log.append({"key": "ours"})  # whoever was writing is dead: it held no lock
    assert path.read_bytes() == b'{"key": "theirs"}\n{"key": "ours"}\n'


def test_no_locks_no_results(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("hashattn.evaluation.log.fcntl.lockf", refuse)
    with pytest.raises(ResultLogError, match="cannot be locked"):
        ResultLog(tmp_path / "results.jsonl")


def test_damage_elsewhere_is_refused_with_its_line(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": "a"}\n{"ke\n{"key": "b"}\n')
    with pytest.raises(ResultLogError, match="results.jsonl:2 is not JSON"):
        ResultLog(path)
    path.write_text('{"score": 1}\n')
    with pytest.raises(ResultLogError, match="has no key"):
        ResultLog(path)


def test_nan_never_reaches_the_file(tmp_path):
    with ResultLog(tmp_path / "results.jsonl") as log, pytest.raises(ValueError):
        log.append({"key": "a", "score": float("nan")})
    assert (tmp_path / "results.jsonl").read_text() == ""


class Reluctant:
    """A file whose writes go as `takes` says: so many bytes each, then the error."""

    def __init__(self, file, takes):
        self.file, self.takes = file, iter(takes)

    def write(self, content):
        step = next(self.takes)
        if isinstance(step, OSError):
            raise step
        return self.file.write(bytes(content[:step]))

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_write_that_is_cut_short_goes_on(tmp_path):
    path = tmp_path / "results.jsonl"
    with ResultLog(path) as log:
        log._file = Reluctant(log._file, 99 * [3])
        for row in ROWS:
            assert log.append(row)
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS


@pytest.mark.parametrize("takes", [[5, OSError(errno.ENOSPC, "No space left")], [5, 0], [0]])
def test_a_row_that_the_disk_does_not_take_leaves_nothing(tmp_path, takes):
    path = tmp_path / "results.jsonl"
    write(path)
    whole = path.read_bytes()
    with ResultLog(path) as log:
        unharmed, log._file = log._file, Reluctant(log._file, takes)
        with pytest.raises(ResultLogError, match="No space left.* full.* 3 rows are kept"):
            log.append({"key": "lost", "text": "a longer line than the disk has room for"})
        assert path.read_bytes() == whole and "lost" not in log.rows
        log._file = unharmed
        assert log.append({"key": "next"})  # and is glued to nothing
    with ResultLog(path) as log:
        assert [*log.rows] == ["k0", "k1", "k2", "next"]


def test_a_full_disk_loses_no_row(tmp_path):
    path = tmp_path / "results.jsonl"
    write(path)
    whole = path.read_bytes()
    with ResultLog(path) as log, full_disk(len(whole) + 10):
        with pytest.raises(ResultLogError, match="3 rows are kept"):
            log.append({"key": "lost", "text": "more than ten bytes"})
        assert path.read_bytes() == whole
    write(path, [{"key": "next"}])
    assert path.read_bytes() == whole + b'{"key": "next"}\n'


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def stopped(_):
        raise KeyboardInterrupt

    path = tmp_path / "results.jsonl"
    write(path)
    whole = path.read_bytes()
    with ResultLog(path) as log:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "fsync", stopped)
            log.append({"key": "stopped"})
        assert path.read_bytes() == whole


def test_a_spoiled_line_stays_where_it_cannot_be_moved(tmp_path):
    path = tmp_path / "results.jsonl"
    write(path)
    spoiled = path.read_bytes() + b"x" * 5000
    path.write_bytes(spoiled)
    with full_disk(2000), pytest.raises(ResultLogError, match="cannot be moved to"):
        ResultLog(path)
    assert path.read_bytes() == spoiled


def test_a_path_that_takes_no_results_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "results.jsonl" / "inside"):
        (tmp_path / "results.jsonl").touch()
        with pytest.raises(ResultLogError, match="cannot be opened to write results"):
            ResultLog(path)


@pytest.mark.parametrize("row", ["[1]", '{"key": 5}', '{"key": ["a"]}', "null"])
def test_rows_without_a_text_as_key_are_refused(tmp_path, row):
    path = tmp_path / "results.jsonl"
    path.write_text(f"{row}\n")
    with pytest.raises(ResultLogError, match="results.jsonl:1 has no key"):
        ResultLog(path)
