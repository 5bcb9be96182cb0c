"""GGUF files as models: folders of what transformers dequantises; refusals; nothing by halves."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gguf_files import write_gguf
from hashattn.base.errors import UnsupportedModelError
from hashattn.base.files import WriteError, read_json
from hashattn.models import gguf
from hashattn.models.gguf import GGUFError, model_from_gguf, read_header


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HASHATTN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("quantization", "tied"), [("Q8_0", True), ("Q4_0", False), ("Q4_1", True), ("F16", True)]
)
def test_the_folder_is_what_transformers_dequantises(tmp_path, quantization, tied):
    path = write_gguf(tmp_path / "small.gguf", quantization, tied)
    folder = model_from_gguf(path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.tie_word_embeddings == tied and model.dtype == torch.float32
    for (name, one), (other_name, other) in zip(
        sorted(model.state_dict().items()), sorted(expected.state_dict().items()), strict=True
    ):
        assert name == other_name and torch.equal(one, other)
    ids = torch.arange(2, 40)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "read by codes"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    record = read_json(folder / "gguf.json")
    assert record["quantizations"][quantization] >= 15 and record["licence"] == "apache-2.0"
    assert record["sha256"] in (folder / "README.md").read_text()


def test_a_folder_is_made_once_and_named_by_content(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "small.gguf")
    folder = model_from_gguf(path)
    monkeypatch.setattr(gguf, "_save", lambda *_: pytest.fail("dequantised again"))
    assert model_from_gguf(path) == folder
    copy = shutil.copy(path, tmp_path / "copy.gguf")
    assert model_from_gguf(copy) == folder
    monkeypatch.undo()
    monkeypatch.setenv("HASHATTN_CACHE", str(tmp_path / "cache"))
    write_gguf(path, seed=1)  # other weights under the same name
    assert model_from_gguf(path) != folder


def test_a_killed_run_leaves_nothing_that_counts(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "small.gguf")
    save = gguf._save

    def killed(path, folder):
        save(path, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        model_from_gguf(path)
    assert [p.name for p in (cache / "gguf").iterdir()] == ["known.json"]
    monkeypatch.setattr(gguf, "_save", save)
    assert gguf.is_complete(model_from_gguf(path))


def test_another_file_than_expected_is_refused(tmp_path):
    path = write_gguf(tmp_path / "small.gguf")
    with pytest.raises(GGUFError, match="its SHA-256 is .*, not 00"):
        model_from_gguf(path, sha256="00")


def test_damaged_files_are_refused(tmp_path):
    path = write_gguf(tmp_path / "small.gguf")
    whole = path.read_bytes()
    for size in (len(whole) - 1000, len(whole) // 2, 100, 10, 4):
        path.write_bytes(whole[:size])
        with pytest.raises(GGUFError, match="damaged or truncated"):
            read_header(path)
    path.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(GGUFError, match="begins with b'PK"):
        read_header(path)
    with pytest.raises(GGUFError, match="is not a file"):
        model_from_gguf(tmp_path / "absent.gguf")


def test_an_unsupported_architecture_is_refused_before_dequantising(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "_save", lambda *_: pytest.fail("dequantised"))
    with pytest.raises(UnsupportedModelError, match="'rwkv7'.*, but .*llama"):
        model_from_gguf(write_gguf(tmp_path / "other.gguf", architecture="rwkv7"))


def test_a_full_disk_is_named_before_dequantising(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "small.gguf")
    monkeypatch.setattr(gguf, "_save", lambda *_: pytest.fail("dequantised"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(gguf.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(WriteError, match="GB free, and the dequantised.*HASHATTN_CACHE"):
        model_from_gguf(path)
    assert [p.name for p in (cache / "gguf").iterdir()] == ["known.json"]


def test_a_disk_that_fills_up_meanwhile_keeps_nothing(tmp_path, cache, monkeypatch):
    def full(path, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "_save", full)
    with pytest.raises(WriteError, match="No space left on device.*nothing was kept"):
        model_from_gguf(write_gguf(tmp_path / "small.gguf"))
    assert [p.name for p in (cache / "gguf").iterdir()] == ["known.json"]


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda _: None)
    with pytest.raises(GGUFError, match="pip install gguf"):
        read_header(write_gguf(tmp_path / "small.gguf"))
