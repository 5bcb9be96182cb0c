"""Command line: python -m hashattn.reproduce.notebooks.preflight --model NAME --context 128K, which
`make preflight` calls: the pilot's pre-flight (hashattn.pilot.capacity) with a profile's names of
models, GGUF files and "pretrained:<name>" too."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from hashattn.base.errors import HashAttnError
from hashattn.models.gguf import is_gguf
from hashattn.pilot.capacity.__main__ import main as judge
from hashattn.reproduce.access import model_folder
from hashattn.reproduce.pretrained import PREFIX
from hashattn.reproduce.profiles import load_profile

_MODEL, _CONTEXT = "data/embedded", "4096"  # where the command line names none


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 for a verdict, whichever; 1 failed (the reason is on stderr); 2 usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    given = ["--model", _MODEL, "--context", _CONTEXT, *given]  # the last of two counts
    try:
        for at, word in enumerate(given):
            name, equals, value = word.partition("=")
            if name == "--model" and equals:
                given[at] = f"--model={_folder(value)}"
            elif name == "--model" and at + 1 < len(given):
                given[at + 1] = _folder(given[at + 1])
    except HashAttnError as error:
        print(error, file=sys.stderr)
        return 1
    return judge(given)


def _folder(name: str) -> str:
    """A GGUF file or a pinned model as a folder with config.json; other names as they are."""
    if name.startswith(PREFIX) or is_gguf(name):
        return str(model_folder(replace(load_profile(), model=name)))
    return name


if __name__ == "__main__":
    sys.exit(main())
