"""Models in GGUF files (llama.cpp's format): dequantised once into a folder like any other's.

The folder lies in the cache under the SHA-256 of the file's bytes, so another copy of a file is the
same model and another file never is. transformers dequantises (modeling_gguf_pytorch_utils); what
it loads so cannot be saved again, since it counts as quantised, which `_save` undoes.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hashattn.base.errors import HashAttnError, UnsupportedModelError
from hashattn.base.files import WriteError, read_json, write_json, write_text
from hashattn.base.hashes import sha256_file
from hashattn.base.repository import cache_folder

_SUFFIX = ".gguf"
RECORD = "gguf.json"  # written last: a folder that holds it is complete
_MAGIC = b"GGUF"
_BYTES = 4  # of a dequantised weight, float32: what the file says, without rounding
_SLACK = 1.05  # of the disk space: tokenizer, headers
_DAMAGE = (ValueError, IndexError, KeyError, OverflowError, MemoryError, struct.error, OSError)


class GGUFError(HashAttnError, ValueError):
    """A GGUF file is missing, damaged or not the one that was expected."""


@dataclass(frozen=True)
class GGUFHeader:
    """What a file says of itself.

    architecture: llama.cpp's name ("llama"); model_type: transformers'. quantizations: tensors by
    their type ("Q4_1": 210). parameters: elements of all tensors. licence: "" if it names none.
    """

    architecture: str
    model_type: str
    name: str
    licence: str
    quantizations: dict[str, int]
    parameters: int


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file, there or not."""
    return Path(path).suffix.lower() == _SUFFIX


def read_header(path: Path) -> GGUFHeader:
    """The header of a file, no weight read.

    GGUFError for a file that is missing, truncated or no GGUF file, or without the package gguf;
    UnsupportedModelError for an architecture that transformers cannot dequantise, or that is no
    causal language model.
    """
    if find_spec("gguf") is None:
        raise GGUFError("GGUF files need the package gguf:  pip install gguf")
    if not path.is_file():
        raise GGUFError(f"{path} is not a file: correct the path, or copy the file there")
    with open(path, "rb") as file:
        start = file.read(len(_MAGIC))
    if start != _MAGIC:
        raise GGUFError(f"{path} begins with {start!r}, a GGUF file with {_MAGIC!r}: copy it again")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {
            key: field.contents() if (field := reader.get_field(f"general.{key}")) else ""
            for key in ("architecture", "name", "license")
        }
        quantizations = Counter(tensor.tensor_type.name for tensor in reader.tensors)
        parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    except _DAMAGE as problem:
        raise GGUFError(f"{path} is damaged or truncated ({problem}): copy it again") from problem
    return GGUFHeader(
        fields["architecture"], _model_type(path, fields["architecture"]), fields["name"],
        fields["license"], dict(sorted(quantizations.items())), parameters,
    )  # fmt: skip


def _model_type(path: Path, architecture: str) -> str:
    """transformers' name of an architecture that it can dequantise into a causal language model."""
    from transformers.modeling_gguf_pytorch_utils import (
        GGUF_SUPPORTED_ARCHITECTURES,
        load_gguf_checkpoint,
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        model_type = load_gguf_checkpoint(path)["config"]["model_type"]
    except (ValueError, KeyError, TypeError, IndexError) as problem:
        known = ", ".join(GGUF_SUPPORTED_ARCHITECTURES)
        raise UnsupportedModelError(
            f"{path.name}: transformers {version('transformers')} does not dequantise the "
            f"architecture {architecture!r} ({problem}), but {known}: use the model's safetensors "
            "folder instead"
        ) from problem
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{path.name}: {model_type!r} is no causal language model, which hashattn needs"
        )
    return model_type


def model_from_gguf(path: str | Path, sha256: str | None = None) -> Path:
    """The folder (config, tokenizer, float32 safetensors, model card) of a GGUF file's model.

    Made on first use, which takes some seconds per 100 million parameters and their size in memory;
    then found. A run that was killed leaves nothing that counts. sha256: what the file must have.
    Raises GGUFError for a damaged or other file, UnsupportedModelError before anything is
    dequantised, WriteError without the disk space or where the cache cannot be written.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise GGUFError(f"{path} is not a file: correct the path, or copy the file there")
    digest = _sha256(path)
    if sha256 is not None and digest != sha256:
        raise GGUFError(
            f"{path} is not the file that was expected: its SHA-256 is {digest}, not {sha256}. "
            "Delete it and fetch it again"
        )
    folder = cache_folder() / "gguf" / digest[:16]
    if not is_complete(folder):
        header = read_header(path)
        with _whole_folder(folder, int(header.parameters * _BYTES * _SLACK)) as partial:
            _save(path, partial)
            write_text(partial / "README.md", _card(path.name, digest, header))
            record = {"file": path.name, "sha256": digest, "bytes": path.stat().st_size}
            made_by = {"transformers": version("transformers"), "gguf": version("gguf")}
            write_json(partial / RECORD, record | asdict(header) | {"made_by": made_by})
    return folder


def is_complete(folder: Path) -> bool:
    """Whether a folder of `model_from_gguf` was written to its end."""
    return (folder / RECORD).is_file() and (folder / "config.json").is_file()


def _sha256(path: Path) -> str:
    """A file's SHA-256, remembered for its place, size and time of change."""
    status = path.stat()
    known = cache_folder() / "gguf" / "known.json"
    key = f"{path} {status.st_size} {status.st_mtime_ns}"
    hashes: dict[str, str] = read_json(known) if known.is_file() else {}
    if key not in hashes:
        hashes[key] = sha256_file(path)
        write_json(known, hashes)
    return hashes[key]


@contextmanager
def _whole_folder(folder: Path, size: int) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` when it is left without an error.

    WriteError if the disk has not `size` bytes free, or fails.
    """
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < size:
            raise WriteError(
                f"{folder.parent} has {free / 1e9:.1f} GB free, and the dequantised model needs "
                f"{size / 1e9:.1f} GB: free some, or name another folder with HASHATTN_CACHE"
            )
        yield partial
        if is_complete(folder):  # another process was faster
            return
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except WriteError:
        raise
    except OSError as problem:
        raise WriteError(
            f"{folder} cannot be written ({problem.strerror or problem}): nothing was kept"
        ) from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save(path: Path, folder: Path) -> None:
    """Dequantise a file with transformers, and save what it becomes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
    # It counts as quantised, which save_pretrained refuses, but its weights are plain by now.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _card(name: str, sha256: str, header: GGUFHeader) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in header.quantizations.items())
    lines = (
        f"# {header.name or name}",
        f"Dequantised from `{name}` (SHA-256 {sha256}) by hashattn, to float32, else unchanged.",
        f"Architecture: {header.architecture} ({header.model_type}), "
        f"{header.parameters / 1e6:.1f} M parameters. Tensors: {kinds}. What quantisation lost "
        "stays lost: scores are those of the quantised model.",
        f"Licence, as the file says: {header.licence or 'not named'}.",
    )
    return "\n\n".join(lines) + "\n"
