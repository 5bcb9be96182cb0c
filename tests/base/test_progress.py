"""Progress goes where it is wanted, and lines worth keeping are printed once."""

import os
from pathlib import Path

from hashattn.base.progress import MARK, VARIABLE, progress_bar, say
from hashattn.reproduce.notebooks.progress import Heartbeat, last_line


def test_progress_goes_to_stderr_by_default(monkeypatch, capsys):
    monkeypatch.delenv(VARIABLE, raising=False)
    for _ in progress_bar(range(3), desc="layers"):
        pass
    say("reused 2 of 4 layers")
    captured = capsys.readouterr()
    assert "layers: 100%" in captured.err and "reused 2 of 4 layers" in captured.err
    assert captured.out == ""


def test_driver_shows_the_bar_and_keeps_said_lines_once(monkeypatch, tmp_path, capsys):
    path = tmp_path / "progress.txt"
    monkeypatch.setenv(VARIABLE, str(path))
    with Heartbeat("01_hash", tmp_path / "none.ipynb", path, pause=0.05):
        say("reused 2 of 4 layers")
        for _ in progress_bar(range(2), desc="layers"):
            pass
        assert "layers: 100%" in last_line(path)
    shown = capsys.readouterr().err
    assert shown.count("01_hash: reused 2 of 4 layers") == 1
    assert not path.exists()


def test_kept_lines_are_read_once_however_long_the_file(monkeypatch, tmp_path, capsys):
    """A bar of hours leaves megabytes; each look takes what is new."""
    path = tmp_path / "progress.txt"
    beat = Heartbeat("01_hash", tmp_path / "none.ipynb", path)
    taken = []

    def counting(name, mode):
        assert Path(name) == path and mode == "rb"
        file = os.fdopen(os.open(name, os.O_RDONLY), mode)
        read = file.read
        file_of = type("Counting", (), {
            "seek": file.seek, "read": lambda self: taken.append(read()) or taken[-1],
            "__enter__": lambda self: self, "__exit__": lambda self, *_: file.close(),
        })  # fmt: skip
        return file_of()

    monkeypatch.setattr("hashattn.reproduce.notebooks.progress.open", counting, raising=False)
    written = b""
    parts = [f"\n{MARK}first\n", "layers:  1%\r" * 999, f"\n{MARK}sec", "ond, Müller\n", "", "x"]
    for part in parts:
        with path.open("ab") as file:
            file.write(part.encode())
        written += part.encode()
        beat._print_kept_lines()
    shown = capsys.readouterr().err
    assert [line for line in shown.splitlines() if line] == [
        "01_hash: first", "01_hash: second, Müller",
    ]  # fmt: skip
    assert b"".join(taken) == written and len(taken) == len(parts)
