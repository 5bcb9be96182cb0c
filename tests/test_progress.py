"""Progress goes where it is wanted, and lines worth keeping are printed once."""

from hashattn.progress import VARIABLE, progress_bar, say
from hashattn.reproduce.progress import Heartbeat, last_line


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
