"""The results file: resumes after a kill at any byte, refuses damage."""

import json

import pytest

from hashattn.evaluation.log import ResultLog, ResultLogError

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
