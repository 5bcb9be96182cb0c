"""The results file: resumes after a kill at any byte, refuses damage, is shared."""

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
