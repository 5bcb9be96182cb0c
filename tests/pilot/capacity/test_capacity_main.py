"""The command line: the verdict first, errors in a line, JSON on request."""

import json

import pytest
from capacity_cases import measurement

from hashattn.base.repository import repository
from hashattn.pilot.capacity import __main__ as command
from hashattn.pilot.capacity.shapes import model_shape, read_config

EMBEDDED = str(repository() / "data" / "embedded")


@pytest.fixture
def run(capsys):
    """run(*arguments) on the embedded model: (exit status, stdout, stderr)."""

    def run(*arguments, model=EMBEDDED):
        status = command.main(["--model", model, *arguments])
        return status, *capsys.readouterr()

    return run


def test_the_verdict_comes_first(run, tmp_path):
    path = tmp_path / "out" / "preflight.json"
    status, out, err = run(
        "--context", "4K", "--batch", "2", "--device", "l4-24gb", "--budget", "1/8",
        "--tokens-per-day", "1000000", "--price", "0.7", "--json", str(path),
    )  # fmt: skip
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] in ("Worth a pilot", "Marginal", "No: sparse attention will not pay off here")
    assert lines[1] == "embedded, 4,096 tokens, batch 2, on NVIDIA L4"
    content = json.loads(path.read_text())
    assert (content["budget"], content["workload"]["context"]) == (0.125, 4096)
    assert content["cost"]["tokens_per_day"] == pytest.approx(1e6)
    assert content["cost"]["money_dense"] == pytest.approx(0.7 * content["cost"]["gpu_hours_dense"])


def test_in_japanese(run):
    status, out, _ = run("--context", "1K", "--device", "l4-24gb", "--language", "ja")
    assert status == 0 and "理由" in out and "Why" not in out


def test_this_machine_is_measured_once(run, tmp_path, monkeypatch):
    model = model_shape(read_config(EMBEDDED))
    calls = []
    made = lambda shape, **settings: calls.append(settings) or measurement(shape, **settings)  # noqa: E731
    monkeypatch.setattr(command, "measure", made)
    path = tmp_path / "machine.json"
    for budget, measured in (("1/16", 1), ("1/16", 1), ("1/8", 2), ("1/8", 2)):
        status, out, err = run("--context", "4K", "--budget", budget, "--measurement", str(path))
        assert status == 0 and "timed on this machine" in out and len(calls) == measured
    assert calls[0] == {"budget": 1 / 16, "bits": 64, "lists": "per_query_head"}
    assert model.query_heads == json.loads(path.read_text())["query_heads"]
    path.write_text("{}")
    status, out, err = run("--context", "4K", "--measurement", str(path))
    assert status == 1 and "delete it and measure again" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--context", "-5"), "context = -5: must be"),
        (("--context", "4K", "--batch", "0"), "batch = 0: must be"),
        (("--context", "4K", "--budget", "2"), "budget = 2.0: must be"),
        (("--context", "4K", "--bits", "33"), "bits = 33: must be"),
        (("--context", "4K", "--device", "h100"), "known: give this-machine or one of l4-24gb"),
        (("--context", "4K", "--tokens-per-day", "5", "--new-tokens", "0"), "new_tokens = 0"),
        (("--context", "4K", "--tokens-per-day", "-5"), "requests_per_day = "),
        (("--context", "4K", "--dtype", "int8"), "dtype = 'int8'"),
    ],
)
def test_bad_values_are_told_before_anything_is_measured(run, monkeypatch, arguments, message):
    monkeypatch.setattr(command, "measure", None)
    status, out, err = run(*arguments)
    assert (status, out) == (1, "") and message in err
    assert "Traceback" not in err


def test_a_model_that_is_not_there(run):
    status, out, err = run("--context", "4K", model="some-org/some-model")
    assert (status, out) == (1, "") and "hf download some-org/some-model config.json" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--context", "many"), "'many' is no number of tokens"),
        (("--context", "4K", "--budget", "1/0"), "'1/0' is no number"),
        (("--context", "4K", "--language", "fr"), "invalid choice: 'fr'"),
    ],
)
def test_usage(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
