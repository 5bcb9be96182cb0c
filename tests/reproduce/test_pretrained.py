"""`make pretrained`: a model out of a wheel, without its code, whole or not at all."""

import shutil
import zipfile
from dataclasses import replace

import pytest
import torch

from gguf_files import write_gguf
from hashattn.base.hashes import sha256_file
from hashattn.models.gguf import GGUFError, model_from_gguf
from hashattn.reproduce import pretrained as module
from hashattn.reproduce.access import AccessError, load_model, model_folder, require_access
from hashattn.reproduce.pretrained import Pretrained, PretrainedError, fetch, pretrained
from hashattn.reproduce.profiles import load_profile

METADATA = "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n"
WHEEL, MEMBER = "some_model-1.0-py3-none-any.whl", "some_model/small.Q8_0.gguf"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only index, with the wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    file = write_gguf(tmp_path / "small.gguf")
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.write(file, MEMBER)
        wheel.writestr("some_model/__init__.py", "raise SystemExit('code of the wheel ran')")
        info = "some_model-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("HASHATTN_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def pinned(index, tmp_path):
    return Pretrained(
        "small", "some-model==1.0", WHEEL, sha256_file(index / WHEEL), MEMBER,
        sha256_file(tmp_path / "small.gguf"),
    )  # fmt: skip


def kept(model):
    """Names beside the model's file."""
    return sorted(path.name for path in model.path.parent.iterdir())


def test_the_pinned_models_are_complete():
    model = pretrained("smollm2")
    assert model.path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert len(model.sha256) == len(model.wheel_sha256) == 64
    with pytest.raises(PretrainedError, match="pretrained = 'large': must be one of smollm2"):
        pretrained("large")


def test_one_file_is_taken_out_of_the_wheel(pinned, tmp_path):
    assert fetch(pinned) == pinned.path and kept(pinned) == ["small.Q8_0.gguf"]
    assert pinned.path.read_bytes() == (tmp_path / "small.gguf").read_bytes()
    assert fetch(pinned, lambda *_: pytest.fail("downloaded again")) == pinned.path


def test_a_wheel_put_by_hand_needs_no_index(pinned, index):
    pinned.path.parent.mkdir(parents=True)
    shutil.move(index / WHEEL, pinned.path.parent)
    assert fetch(pinned) == pinned.path


def test_without_an_index_it_says_what_to_put_where(pinned, index):
    (index / WHEEL).unlink()
    with pytest.raises(PretrainedError, match=f"copy {WHEEL} from .* to {pinned.path.parent}"):
        fetch(pinned)
    assert kept(pinned) == []


def test_another_wheel_than_pinned_is_refused_by_pip(pinned):
    with pytest.raises(PretrainedError, match="pip did not bring some-model==1.0"):
        fetch(replace(pinned, wheel_sha256="0" * 64))
    assert kept(pinned) == []


def test_a_truncated_wheel_is_refused(pinned, index):
    def half(model, folder):
        content = (index / WHEEL).read_bytes()
        (folder / WHEEL).write_bytes(content[: len(content) // 2])

    with pytest.raises(PretrainedError, match="is truncated or another file"):
        fetch(pinned, half)
    assert kept(pinned) == []


def test_another_model_in_the_wheel_is_refused(pinned):
    with pytest.raises(PretrainedError, match="has another SHA-256 than was pinned"):
        fetch(replace(pinned, sha256="0" * 64))
    assert kept(pinned) == []


def test_a_damaged_file_is_fetched_again(pinned):
    fetch(pinned)
    pinned.path.write_bytes(b"GGUF")
    with pytest.raises(GGUFError, match="not the file that was expected"):
        _ = pinned.folder
    assert fetch(pinned) == pinned.path and (pinned.folder / "config.json").is_file()


def test_a_profile_names_a_pinned_model_or_a_file(pinned, tmp_path, monkeypatch):
    monkeypatch.setattr("hashattn.reproduce.access.pretrained", lambda name: pinned)
    profile = replace(load_profile("tiny"), model="pretrained:small", hash_weights=None)
    with pytest.raises(AccessError, match="small is not on this machine: run `make pretrained`"):
        model_folder(profile)
    fetch(pinned)
    file = replace(profile, model=str(tmp_path / "small.gguf"))
    assert model_folder(profile) == model_folder(file)
    model, tokenizer = load_model(file)
    assert model.dtype == torch.float32 and tokenizer.vocab_size >= 259


def test_a_folder_or_a_hub_id_may_hold_gguf_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HASHATTN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "models" / "small"
    folder.mkdir(parents=True)
    one = write_gguf(folder / "one.gguf")
    profile = replace(load_profile("tiny"), model=str(folder), hash_weights=None)
    made = model_from_gguf(one)
    assert model_folder(profile) == made
    monkeypatch.setenv("HASHATTN_MODEL_DIR", str(tmp_path / "models"))
    assert model_folder(replace(profile, model="org/small")) == made
    write_gguf(folder / "two.gguf", seed=1)
    for name in (str(folder), "org/small"):
        with pytest.raises(AccessError, match=r"several models: name one .*: one.gguf, two.gguf"):
            model_folder(replace(profile, model=name))
    assert model_folder(replace(profile, model="org/small/one.gguf")) == made
    assert model_folder(replace(profile, model=f"{folder}/one.gguf")) == made
    with pytest.raises(AccessError, match=r"has no three.gguf(?s:.*)hf download org/small three"):
        model_folder(replace(profile, model="org/small/three.gguf"))


def test_a_gguf_file_of_a_hub_id_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.delenv("HASHATTN_MODEL_DIR", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    profile = replace(load_profile("tiny"), model="org/nowhere/x.gguf", hash_weights=None)
    with pytest.raises(AccessError, match=r"not on this machine(?s:.*)hf download org/nowhere x"):
        model_folder(profile)


def test_the_command_prints_where_the_model_is(pinned, monkeypatch, capsys):
    monkeypatch.setattr(module, "pretrained", lambda name: pinned)
    monkeypatch.setattr("sys.argv", ["pretrained", "smollm2"])
    module.main()
    assert f"smollm2: {pinned.path}" in capsys.readouterr().out.replace("small:", "smollm2:")


def test_a_profile_that_names_an_unknown_one_is_told_the_known():
    profile = replace(load_profile("smollm2"), model="pretrained:large")
    with pytest.raises(AccessError, match="profile smollm2: pretrained = 'large': must be one of"):
        require_access(profile)
