import dataclasses

import pytest
import yaml

from hashattn.base.errors import HashAttnError
from hashattn.base.repository import repository
from hashattn.reproduce.access import (
    AccessError,
    data_folder,
    missing_model_files,
    model_folder,
    require_access,
)
from hashattn.reproduce.profiles import METHODS, Profile, ProfileError, available, load_profile

NAMES = [
    "embedded", "embedded-full", "llama-3.1-8b", "llama-3.1-8b-authors",
    "llama-3.1-8b-longbench-e", "llama-3.1-8b-ruler", "mistral-7b", "smollm2",
    "smollm2-full", "tiny",
]  # fmt: skip
NO_NAMES = ("../../x", "/tmp/x", "", "a/b", ".", "..", ".x", "a\\b", 5, "a\nb", 300 * "x")
MODEL_FILES = ("config.json", "tokenizer.json", "model.safetensors")


@pytest.fixture
def llama(monkeypatch, tmp_path):
    """The Llama profile on a machine with an empty hub cache, its device and data set aside."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return dataclasses.replace(
        load_profile("llama-3.1-8b"),
        device="auto",
        data=None,
        benchmark="generated",
        tasks=("lookup",),
    )


def make_profile(**changes):
    """The smallest profile there can be."""
    smallest = {
        "name": "own", "model": "m", "hash_weights": None, "data": None, "tasks": ("code",),
        "lengths": (64,), "densities": (0.5,), "samples_per_task": 1, "contexts": (64,),
    }  # fmt: skip
    return Profile(**smallest | changes)


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
    assert load_profile().name == "tiny" and load_profile().results == tmp_path / "tiny"
    assert load_profile("embedded").results == tmp_path / "embedded"  # in the same process
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
        ({"densities": [0.5, 1.5]}, r"densities = \(0.5, 1.5\): must be numbers above 0"),
        ({"lengths": []}, r"lengths = \(\): must be"),
        ({"lengths": 4096}, "lengths = 4096: must be a list"),
        ({"methods": ["hash", "magic"]}, "must be some of dense, oracle"),
        ({"samples_per_task": 0}, "samples_per_task = 0"),
        ({"samples_per_task": True}, "samples_per_task = True"),
        ({"dtype": "int8"}, "must be float32 or bfloat16 or float16"),
        ({"device": "tpu"}, "device = 'tpu'"),
        ({"placement": "two"}, "placement = 'two': must be single or device_map or"),
        (
            {"placement": "device_map", "device": "cpu"},
            "device = 'cpu': must be auto or cuda with placement 'device_map'",
        ),
        ({"training": {"bits": 33}}, "training.bits = 33: must be a positive multiple of 32"),
        ({"ruler": {"tasks": ["niah"]}}, r"ruler.tasks = \('niah',\): must be some of niah_sin"),
        ({"ruler": {"lengths": [512]}}, "integers of at least 1024"),
        ({"ruler": {"samples": 0}}, "ruler.samples = 0: must"),
        ({"training": {"layers": 2}}, "training.layers is not a field of a profile; "),
        ({"training": {"depth": True}}, "training.depth = True: must be 1, 2 or 3"),
        ({"training": [1]}, r"training = \[1\]: must be fields, one a line"),
        ({"training": False}, "training = False: must be fields"),
        ({"ruler": "all"}, "ruler = 'all': must be fields"),
        ({"ruler": {"style": "poems"}}, "ruler.style = 'poems': must be plain or facts"),
        ({1: 2}, "1 is not a field of a profile"),
        ({"densities": ["a"]}, r"densities = \('a',\): must be numbers"),
        ({"densities": [float("nan")]}, r"densities = \(nan,\): must be numbers"),
        ({"densities": [True]}, r"densities = \(True,\): must be numbers"),
        ({"methods": [["hash"]]}, r"methods = \(\['hash'\],\): must be some of"),
        ({"memory": [[32]]}, "memory = .* must be some of 32"),
        ({"memory": [32.0]}, "memory = .* must be some of 32"),
        ({"tasks": [1, None]}, "tasks = .* must be some of lookup"),
        ({"data": "x", "tasks": ["a", "a"]}, "tasks = .* must be names of datasets, each once"),
        ({"data": "x", "tasks": ["../a"]}, "tasks = .* must be names of datasets"),
        ({"data": 5}, "data = 5: must be a folder, a hub id or null"),
        ({"hash_weights": ["x"]}, r"hash_weights = \['x'\]: must be a folder or null"),
        ({"lengths": [2**40]}, "lengths = .* must be positive integers"),
        ({"sink": 2**70}, "sink = .* must be zero or"),
        ({"layers": []}, r"layers = \(\): must be numbers of layers, from 0, or null"),
        ({"layers": [0, -1]}, r"layers = \(0, -1\): must be numbers of layers"),
        ({"layers": 3}, "layers = 3: must be a list"),
        ({"texts": ["poetry"]}, r"texts = \('poetry',\): must be some of documentation, prose"),
        ({"documents": 0}, "documents = 0: must be a positive integer"),
        ({"document_lengths": [0]}, r"document_lengths = \(0,\): must be positive integers"),
        ({"ruler": {"chat": "yes"}}, "ruler.chat = 'yes': must be true or false"),
        ({"training": {"texts": ["x"]}}, r"training.texts = \('x',\): must be some of"),
        ({"frontier_length": 1024}, "frontier_length = 1024: must be one of lengths, 1536, 2048"),
        ({"longest_length": True}, "longest_length = True: must be one of lengths"),
        *(
            ({"name": name}, "name = .* must be a name for a folder")
            for name in NO_NAMES
        ),
        ({"lenghts": [4096]}, "lenghts is not a field of a profile; did you mean lengths"),
        ({"model": None}, "model = None"),
        ({"benchmark": "mine"}, "benchmark = 'mine': must be generated or crowded or folder or"),
        ({"benchmark": "longbench", "data": "x"}, "tasks = .* must be some of narrativeqa, qasper"),
        ({"benchmark": "longbench_authors", "tasks": ["lcc_e"]}, "data = None: must be the folder"),
        ({"benchmark": "ruler", "tasks": ["vt"], "data": "x"}, "data = 'x': must be null, as"),
        ({"benchmark": "ruler"}, "tasks = .* must be some of niah_single_1"),
        ({"tasks": ["faq"]}, "tasks = .* must be some of lookup, multihop"),
        ({"chat": "no"}, "chat = 'no'"),
        ({"prompt_limit": 9}, "prompt_limit = 9: must be .* where the benchmark is LongBe"),
        ({"prompt_limit": 0, "benchmark": "longbench", "data": "x", "tasks": ["lcc"]},
         "prompt_limit = 0: must be"),
    ],
)  # fmt: skip
def test_an_invalid_field_is_named_with_its_file(tmp_path, change, message):
    fields = yaml.safe_load((repository() / "data" / "profiles" / "tiny.yaml").read_text())
    path = tmp_path / "ours.yaml"
    path.write_text(yaml.safe_dump(fields | change))
    with pytest.raises(ProfileError, match=message) as error:
        load_profile(str(path))
    assert str(path) in str(error.value) and isinstance(error.value, ValueError)


def test_a_missing_field_is_named(tmp_path):
    fields = yaml.safe_load((repository() / "data" / "profiles" / "tiny.yaml").read_text())
    del fields["lengths"]
    path = tmp_path / "ours.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(ProfileError, match=r"ours.yaml: lengths is missing"):
        load_profile(str(path))


@pytest.mark.parametrize("where", ["tasks: [code]", "ruler:\n  samples: 9", "training: {bits: 64}"])
def test_a_key_given_twice_is_refused_at_any_depth(tmp_path, where):
    text = (repository() / "data" / "profiles" / "tiny.yaml").read_text()
    path = tmp_path / "ours.yaml"
    path.write_text(f"{text}\n{where}\n")
    with pytest.raises(ProfileError, match=r"ours.yaml is not YAML: (?s:.*)is given twice"):
        load_profile(str(path))
    nested = text.replace("  samples: 2\n", "  samples: 2\n  samples: 3\n")
    assert nested != text
    path.write_text(nested)
    with pytest.raises(ProfileError, match="key 'samples' is given twice"):
        load_profile(str(path))


def test_lengths_of_the_comparisons_are_named_and_follow_lengths():
    tiny, full = load_profile("tiny"), load_profile("embedded-full")
    assert (tiny.frontier_length, tiny.longest_length) == (1536, 2048)
    assert (full.frontier_length, full.longest_length) == (4096, 8192)
    one = dataclasses.replace(full, lengths=(1024,))
    assert (one.frontier_length, one.longest_length) == (1024, 1024)
    back = dataclasses.replace(one, lengths=(4096, 512, 1024), frontier_length=4096)
    assert (back.frontier_length, back.longest_length) == (4096, 4096)
    with pytest.raises(ProfileError, match="frontier_length = 4096: must be one of lengths, 512"):
        dataclasses.replace(back, lengths=(512,))
    assert Profile(**tiny.to_dict() | {"training": tiny.training, "ruler": tiny.ruler}) == tiny


def test_rulers_wording_is_the_profiles_own():
    styles = {name: load_profile(name).ruler.style for name in NAMES}
    assert {name for name, style in styles.items() if style == "facts"} == {
        "embedded", "embedded-full", "tiny",
    }  # fmt: skip
    moved = dataclasses.replace(load_profile("tiny"), model="/elsewhere/renamed")
    assert moved.ruler.style == "facts"


@pytest.mark.parametrize("text", ["", "a: [1", "- 1", "a: 2026-99-99", "? [a, b]\n: 1"])
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
    with pytest.raises(AccessError, match="lacks config.json, .*Copy the model there"):
        require_access(profile)


def test_a_shipped_model_that_is_not_complete_is_restored(tmp_path, monkeypatch):
    monkeypatch.setenv("HASHATTN_HOME", str(tmp_path))
    (tmp_path / "data" / "profiles").mkdir(parents=True)
    fill(tmp_path / "data" / "embedded", ("config.json",))
    with pytest.raises(AccessError, match="git checkout -- data; `make model`"):
        require_access(make_profile(model="data/embedded"))


@pytest.mark.parametrize("content", ["[1]", '{"weight_map": 5}', '{"weight_map": {"a": 1}}', "{"])
def test_a_damaged_index_of_weights_is_an_error_of_ours(tmp_path, content):
    folder = fill(tmp_path / "m", ("config.json", "tokenizer.json"))
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(AccessError, match="model.safetensors.index.json"):
        missing_model_files(folder)


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


@pytest.mark.parametrize("folder", ["scratch", "mine/records", "./data", "absolute"])
def test_missing_files_of_one_s_own_are_no_download(tmp_path, monkeypatch, folder):
    """Also where HASHATTN_DATA_DIR says where LongBench is: that is not the profile's data."""
    monkeypatch.setenv("HASHATTN_HOME", str(tmp_path))
    monkeypatch.setenv("HASHATTN_DATA_DIR", str(tmp_path / "longbench"))
    (tmp_path / "data" / "profiles").mkdir(parents=True)
    own = tmp_path / folder
    data = str(own) if folder == "absolute" else folder
    profile = make_profile(data=data, tasks=("faq", "contracts"))
    if folder != "mine/records":  # which may as well be a hub id, until the folder is there
        own.mkdir(exist_ok=True)
    else:
        own.mkdir(parents=True)
    (own / "faq.jsonl").touch()
    with pytest.raises(AccessError, match="lacks contracts.jsonl") as error:
        data_folder(profile)
    assert "hf download" not in str(error.value) and str(own) in str(error.value)
    (own / "contracts.jsonl").touch()
    assert data_folder(profile) == own


def test_a_folder_that_is_not_there_says_so(tmp_path):
    profile = dataclasses.replace(load_profile("tiny"), data=str(tmp_path / "none"))
    with pytest.raises(AccessError, match="none, which is not a folder") as error:
        data_folder(profile)
    assert "hf download" not in str(error.value)


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
