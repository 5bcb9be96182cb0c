"""Captured layers come back from disk as they were; files of another format are made again."""

import pytest
import torch

from hashattn.hashing import CapturedLayer, run_folder
from hashattn.hashing import train as training
from hashattn.hashing.capture_files import load_capture, save_captures
from hashing.test_train import FAST, sequences
from helpers import tiny_model


def captured(layer, softcap, values):
    draw = torch.Generator().manual_seed(layer)
    queries, keys = torch.randn(4, 3, 8, generator=draw), torch.randn(2, 9, 8, generator=draw)
    return CapturedLayer(
        layer,
        queries.bfloat16(),
        torch.tensor([2, 5, 8]),
        keys.bfloat16(),
        scaling=0.1 + layer / 3,  # no float32
        softcap=softcap,
        values=keys + 1 if values else None,
    )


@pytest.mark.parametrize("values", [False, True])
def test_every_layer_comes_back_bit_for_bit(tmp_path, values):
    layers = {3: captured(3, None, values), 11: captured(11, 50.1, values)}
    save_captures(tmp_path / "folder" / "a.safetensors", layers)
    for layer, saved in layers.items():
        loaded = load_capture(tmp_path / "folder" / "a.safetensors", layer, "cpu")
        assert vars(loaded).keys() == vars(saved).keys()
        for name, value in vars(saved).items():
            other = getattr(loaded, name)
            if isinstance(value, torch.Tensor):
                assert other.dtype == value.dtype and torch.equal(other, value)
            else:
                assert other == value and type(other) is type(value)


def test_captures_in_another_format_are_made_again(tmp_path, monkeypatch):
    runs, real = [], training.capture
    monkeypatch.setattr(training, "capture", lambda *a, **k: runs.append(1) or real(*a, **k))
    count, shas = len(sequences()), []
    for number, captures_format in enumerate((1, 2, 2)):
        monkeypatch.setattr(run_folder, "CAPTURE_FORMAT", captures_format)
        weights = training.train_hash_weights(
            tiny_model("llama"), sequences(), FAST, hidden=16, progress=False,
            out_dir=tmp_path / str(number), capture_dir=tmp_path / "shared",
        )  # fmt: skip
        shas.append(weights.sha256)
        assert len(runs) == count * min(number + 1, 2)
    assert len(set(shas)) == 1
