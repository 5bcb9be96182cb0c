import dataclasses

import pytest
import yaml

from hashattn.access import (
    AccessError,
    data_folder,
    missing_model_files,
    model_folder,
    require_access,
)
from hashattn.errors import HashAttnError
from hashattn.profiles import METHODS, ProfileError, available, load_profile, repository

NAMES = [
    "embedded", "embedded-full", "llama-3.1-8b", "llama-3.1-8b-authors",
    "llama-3.1-8b-longbench-e", "llama-3.1-8b-ruler", "mistral-7b", "tiny",
]  # fmt: skip
MODEL_FILES = ("config.json", "tokenizer.json", "model.safetensors")


@pytest.fixture
def llama(monkeypatch, tmp_path):
    """The Llama profile on a machine with an empty hub cache, its device and data set aside."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return dataclasses.replace(
        load_profile("llama-3.1-8b"), device="auto", data=None, protocol="own"
    )


def fill(folder, names=MODEL_FILES):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


def test_all_profiles_load():
    assert available() == NAMES
    assert [load_profile(name).name for name in NAMES] == NAMES


def test_the_environment_names_profile_and_results(monkeypatch, tmp_path):
    monkeypatch.setenv("HASHATTN_PROFILE", "tiny")
    monkeypatch.setenv("HASHATTN_RESULTS", str(tmp_path))
    assert load_profile().name == "tiny" and load_profile().results == tmp_path
    monkeypatch.delenv("HASHATTN_PROFILE")
    monkeypatch.delenv("HASHATTN_RESULTS")
    assert load_profile().results == repository() / "results" / "embedded"


def test_a_profile_of_one_s_own_is_a_path(tmp_path):
    fields = yaml.safe_load((repository() / "data" / "profiles" / "tiny.yaml").read_text())
    path = tmp_path / "ours.yaml"
    path.write_text(yaml.safe_dump(fields | {"lengths": [512]}))
    assert load_profile(str(path)).name == "ours" and load_profile(str(path)).lengths == (512,)


def test_an_unknown_profile_names_the_known_ones():
    with pytest.raises(ProfileError, match="no profile 'embeded': use one of embedded, "):
        load_profile("embeded")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"densities": [0.5, 1.5]}, r"densities = \(0.5, 1.5\) is not valid"),
        ({"lengths": []}, r"lengths = \(\) is not valid"),
        ({"lengths": 4096}, "lengths = 4096 is not valid: use a list"),
        ({"methods": ["hash", "magic"]}, "use some of dense, oracle"),
        ({"samples_per_task": 0}, "samples_per_task = 0"),
        ({"samples_per_task": True}, "samples_per_task = True"),
        ({"dtype": "int8"}, "use float32 or bfloat16 or float16"),
        ({"device": "tpu"}, "device = 'tpu'"),
        ({"placement": "two"}, "placement = 'two' is not valid: use single or device_map or"),
        (
            {"placement": "device_map", "device": "cpu"},
            "device = 'cpu' is not valid: use auto or cuda with placement 'device_map'",
        ),
        ({"training": {"bits": 33}}, "bits = 33 is not valid: use a positive multiple of 32"),
        ({"ruler": {"tasks": ["niah"]}}, "is not valid: use some of niah_single_1"),
        ({"ruler": {"lengths": [512]}}, "integers of at least 1024"),
        ({"ruler": {"samples": 0}}, "samples = 0 is not valid"),
        ({"training": {"layers": 2}}, "unexpected keyword argument 'layers'"),
        ({"lenghts": [4096]}, "unexpected keyword argument 'lenghts'"),
        ({"model": None}, "model = None"),
        ({"protocol": "mine"}, "protocol = 'mine' is not valid: use own or longbench or authors"),
        ({"protocol": "longbench", "data": "x"}, "tasks = .* use some of narrativeqa, qasper"),
        ({"protocol": "authors", "tasks": ["lcc_e"]}, "data = None is not valid: use the folder"),
        ({"chat": "no"}, "chat = 'no'"),
        ({"prompt_limit": 9}, "prompt_limit = 9 is not valid: use .* protocol longbench or auth"),
        ({"prompt_limit": 0, "protocol": "longbench", "data": "x", "tasks": ["lcc"]},
         "prompt_limit = 0 is not valid"),
    ],
)  # fmt: skip
def test_an_invalid_field_is_named_with_its_file(tmp_path, change, message):
    fields = yaml.safe_load((repository() / "data" / "profiles" / "tiny.yaml").read_text())
    path = tmp_path / "ours.yaml"
    path.write_text(yaml.safe_dump(fields | change))
    with pytest.raises(ProfileError, match=message) as error:
        load_profile(str(path))
    assert str(path) in str(error.value) and isinstance(error.value, ValueError)


@pytest.mark.parametrize("text", ["", "a: [1", "- 1"])
def test_a_file_that_is_no_profile_is_an_error_of_ours(tmp_path, text):
    (tmp_path / "ours.yaml").write_text(text)
    with pytest.raises(HashAttnError, match="ours.yaml"):
        load_profile(str(tmp_path / "ours.yaml"))


def test_a_hub_model_that_is_not_here_says_how_to_get_it(llama):
    with pytest.raises(AccessError) as error:
        require_access(llama)
    message = str(error.value)
    assert "hf download meta-llama/Llama-3.1-8B-Instruct" in message
    assert "HASHATTN_MODEL_DIR=<folder>" in message


def test_a_hub_model_is_found_in_a_local_folder(llama, tmp_path, monkeypatch):
    folder = fill(tmp_path / "models" / "Llama-3.1-8B-Instruct")
    for chosen in (folder, folder.parent):
        monkeypatch.setenv("HASHATTN_MODEL_DIR", str(chosen))
        assert model_folder(llama) == folder
        require_access(llama)


def test_a_hub_model_is_found_in_the_hub_s_cache(llama, tmp_path):
    cached = tmp_path / "cache" / "models--meta-llama--Llama-3.1-8B-Instruct"
    folder = fill(cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert model_folder(llama) == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(AccessError, match="lacks model.safetensors or"):
        model_folder(llama)


def test_missing_shards_are_named(tmp_path):
    folder = fill(tmp_path / "m", ("config.json", "tokenizer.json", "one.safetensors"))
    index = '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)
    assert missing_model_files(folder) == ["two.safetensors"]


def test_a_model_folder_of_the_repository_that_is_not_complete(tmp_path):
    profile = dataclasses.replace(load_profile("tiny"), model=str(fill(tmp_path / "m", ())))
    with pytest.raises(AccessError, match="lacks config.json, .*make model"):
        require_access(profile)


def test_missing_data_files_are_named(tmp_path, monkeypatch):
    profile = load_profile("llama-3.1-8b")
    monkeypatch.setenv("HASHATTN_DATA_DIR", str(tmp_path))
    for task in profile.tasks[1:]:
        (tmp_path / f"{task}.jsonl").touch()
    with pytest.raises(AccessError, match=r"lacks narrativeqa.jsonl.\n  download:  hf download"):
        data_folder(profile)
    (tmp_path / "narrativeqa.jsonl").touch()
    assert data_folder(profile) == tmp_path
    (tmp_path / "data").mkdir()
    (tmp_path / "qasper.jsonl").rename(tmp_path / "data" / "qasper.jsonl")
    assert data_folder(profile) == tmp_path
    assert data_folder(load_profile("tiny")) is None


def test_a_missing_gpu_is_said_first(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HASHATTN_MODEL_DIR", str(fill(tmp_path / "m")))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(AccessError, match="torch sees no GPU"):
        require_access(dataclasses.replace(llama, device="cuda"))


def test_a_profile_may_name_every_selector():
    profile = dataclasses.replace(load_profile("tiny"), methods=tuple(METHODS))
    assert len(profile.methods) >= 18
    with pytest.raises(ProfileError, match="methods"):
        dataclasses.replace(profile, methods=("dense", "sharp"))
