"""Is everything that a profile needs on this machine? Checked before any work is done.

Nothing is downloaded here: models of tens of gigabytes, some behind a licence, are the reader's
own decision, so the error for a missing one gives the command that downloads it.
"""

from __future__ import annotations

import dataclasses
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hashattn.base.checks import is_text
from hashattn.base.errors import HashAttnError
from hashattn.base.files import read_json
from hashattn.base.repository import repository
from hashattn.evaluation.benchmarks.longbench import find_file
from hashattn.models.gguf import is_gguf, model_from_gguf
from hashattn.reproduce.pretrained import PREFIX, PretrainedError, pretrained
from hashattn.reproduce.profiles import Profile

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_OF_PATHS = (".", "/", "data/")  # what a hub id does not begin with
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


class AccessError(HashAttnError, FileNotFoundError):
    """A model, a data set or a device that the profile names is not on this machine."""


def missing_model_files(folder: Path) -> list[str]:
    """File names that a model and tokenizer need and `folder` lacks; empty if it is complete.

    Raises AccessError for a damaged weight index.
    """
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        missing.append(" or ".join(_TOKENIZER_FILES))
    index = folder / _WEIGHT_FILES[1]
    if index.is_file():
        content = read_json(index, AccessError)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not all(map(is_text, shards.values())):
            raise AccessError(f"{index} has no weight_map of file names: copy it again")
        missing += sorted(name for name in set(shards.values()) if not (folder / name).is_file())
    elif not (folder / _WEIGHT_FILES[0]).is_file():
        missing.append(" or ".join(_WEIGHT_FILES))
    return missing


def model_folder(profile: Profile) -> Path:
    """The local folder of the profile's model.

    A path is relative to the repository; a GGUF file's folder is dequantised on first use
    (hashattn.models.gguf), as is that of "pretrained:<name>" (hashattn.reproduce.pretrained). For a
    hub id: HASHATTN_MODEL_DIR (the model's folder, or one that holds it under its name), else the
    hub's local cache. A folder without safetensors may hold a GGUF file; of several, `model` names
    one: "org/name/file.gguf". Raises AccessError saying what is missing and how to get it.
    """
    if profile.model.startswith(PREFIX):
        try:
            return pretrained(profile.model.removeprefix(PREFIX)).folder
        except PretrainedError as problem:
            raise AccessError(f"profile {profile.name}: {problem}") from problem
    path = repository() / profile.model
    if is_gguf(path) and not _is_file_of_hub(profile.model):
        return model_from_gguf(path)
    local = path.is_dir() or not is_hub_id(profile.model)
    folder = path if local else _named_folder(profile.model) or _cached_folder(profile.model)
    if folder is None:
        raise AccessError(_how_to_get_model(profile, "is not on this machine"))
    in_hub = _is_file_of_hub(profile.model)
    file = folder / Path(profile.model).name if in_hub else _only_gguf(folder)
    if file is not None:
        if not file.is_file():
            raise AccessError(_how_to_get_model(profile, f"{folder} has no {file.name}"))
        return model_from_gguf(file)
    if missing := ", ".join(missing_model_files(folder)):
        if local:
            lacking = f"profile {profile.name}: {folder} lacks {missing}. "
            raise AccessError(lacking + _how_to_restore(folder))
        raise AccessError(_how_to_get_model(profile, f"{folder} lacks {missing}"))
    return folder


def data_folder(profile: Profile) -> Path | None:
    """The folder with one LongBench-format <task>.jsonl per task, in itself or in its data/; None
    when records are generated.

    A hub id's files are looked for in HASHATTN_DATA_DIR, those of a path there. Raises AccessError
    naming the missing files.
    """
    if profile.data is None:
        return None
    folder = repository() / profile.data
    local = folder.is_dir() or not is_hub_id(profile.data)
    if not local and (downloaded := os.environ.get("HASHATTN_DATA_DIR")):
        folder = Path(downloaded)
    missing = [f"{task}.jsonl" for task in profile.tasks if find_file(folder, task) is None]
    if missing and local:
        raise AccessError(
            f"profile {profile.name} evaluates on the files of {folder}, which "
            f"{'lacks ' + ', '.join(missing) if folder.is_dir() else 'is not a folder'}.\n"
            "  Each task needs a <task>.jsonl there, one record a line (data/longbench/README.md): "
            "add the files, or correct `data` and `tasks` in the profile"
        )
    if missing:
        raise AccessError(
            f"profile {profile.name} evaluates on {profile.data}, and {folder} lacks "
            f"{', '.join(missing)}.\n  download:  hf download {profile.data} --repo-type dataset "
            "--local-dir <folder> (unpack data.zip there)\n"
            "  then:      export HASHATTN_DATA_DIR=<the folder of the .jsonl files>"
        )
    return folder


def require_access(profile: Profile) -> None:
    """Raise AccessError if the model, the data or the device is missing, or this process cannot
    place the model as the profile says."""
    model_folder(profile)
    data_folder(profile)
    _require_placement(profile)
    if profile.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise AccessError(
                f"profile {profile.name} asks for device: cuda, and torch sees no GPU. Run it "
                "on a GPU machine, or copy its .yaml with `device: auto` and name that."
            )


def load_model(profile: Profile) -> tuple[Any, Any]:
    """(model, tokenizer) of the profile, placed as it says and in its dtype, ready for inference.

    Placement "device_map" runs in one process and needs accelerate. "tensor_parallel" needs it too,
    and a process started by torchrun: all processes must then do the same, sample with the same
    seed and attach the same selector. Raises AccessError where something is missing,
    UnsupportedModelError for KV heads that do not divide evenly among the processes.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    require_access(profile)
    logging.disable_progress_bar()  # a notebook would store the bar
    folder = model_folder(profile)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, profile.dtype),
        local_files_only=True,
        **_placement_options(profile, folder),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if profile.placement == "single":
        device = profile.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.to(device)
    return model.eval(), tokenizer


def _processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def _require_placement(profile: Profile) -> None:
    if profile.placement == "single":
        return
    if find_spec("accelerate") is None:
        raise AccessError(
            f"profile {profile.name}: placement {profile.placement!r} needs accelerate, which "
            "transformers uses to place models:  pip install accelerate"
        )
    if profile.placement == "tensor_parallel" and _processes() == 1:
        raise AccessError(
            f"profile {profile.name}: placement 'tensor_parallel' needs a process for each GPU. "
            "Run your own script with  torchrun --nproc-per-node <GPUs> script.py  ; "
            "`make reproduce` is one process, which needs `placement: device_map`."
        )


def _placement_options(profile: Profile, folder: Path) -> dict[str, Any]:
    """Arguments of from_pretrained that place the model."""
    if profile.placement == "single":
        return {}
    if profile.placement == "device_map":
        return {"device_map": "auto"}
    from transformers import AutoConfig
    from transformers.distributed import DistributedConfig

    from hashattn.models.families import tensor_parallel_plan
    from hashattn.models.structure import planned_heads

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    plan = tensor_parallel_plan(config)
    # raises for heads that do not divide, before minutes go into loading weights
    planned_heads(config, plan, int(os.environ["RANK"]), _processes())
    if "tp_plan" in {field.name for field in dataclasses.fields(DistributedConfig)}:
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    return {"tp_plan": "auto"}  # transformers 5.17 and before


def is_hub_id(name: str) -> bool:
    """Whether a profile's model or data is a hub id ("org/name", or a GGUF file of one), not a
    folder."""
    return _is_file_of_hub(name) or (name.count("/") == 1 and not name.startswith(_OF_PATHS))


def _is_file_of_hub(name: str) -> bool:
    """Whether a model is "org/name/file.gguf" and no file here."""
    named = is_gguf(name) and name.count("/") == 2 and not name.startswith(_OF_PATHS)
    return named and not (repository() / name).is_file()


def _hub_id(model: str) -> str:
    """ "org/name" of a hub id or a file of one."""
    return "/".join(model.split("/")[:2])


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder without safetensors; None without any. AccessError for several."""
    if any((folder / name).is_file() for name in _WEIGHT_FILES):
        return None
    files = sorted(file for file in folder.glob("*") if is_gguf(file))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise AccessError(f"{folder} holds several models: name one in the profile, as "
                          f"`model: <folder or org/name>/<file>`: {names}")  # fmt: skip
    return files[0] if files else None


def _named_folder(model: str) -> Path | None:
    """HASHATTN_MODEL_DIR itself, or its subfolder with the model's name; None if it is not set."""
    folder = os.environ.get("HASHATTN_MODEL_DIR")
    if not folder:
        return None
    subfolder = Path(folder) / model.split("/")[1]
    return subfolder if subfolder.is_dir() else Path(folder)


def _cached_folder(model: str) -> Path | None:
    """The model's snapshot in the hub's local cache, without a network request."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(_hub_id(model), local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _how_to_restore(folder: Path) -> str:
    if folder.is_relative_to(repository() / "data"):
        return "Restore it: git checkout -- data; `make model` trains the embedded model again."
    return "Copy the model there, or correct `model` in the profile."


def _how_to_get_model(profile: Profile, problem: str) -> str:
    name = profile.model.split("/")[1]
    wanted = " ".join([_hub_id(profile.model), *profile.model.split("/")[2:]])
    return (
        f"profile {profile.name} runs {profile.model}: {problem}.\n"
        f"  download:  hf download {wanted}   (accept the model's licence on its page and "
        "run `hf auth login` first if it asks for one)\n"
        f"  or, if you have a copy:  export HASHATTN_MODEL_DIR=<folder>   (the model's folder, "
        f"or one that holds it as {name}/)"
    )
