"""Train the shipped hash weights, data/embedded/hash_weights and variants: 10 minutes on 2 cores.

With names as arguments ("default", or variants of hashattn.reproduce.experiments.common.VARIANTS)
only those.
"""

import sys
import tempfile
from pathlib import Path

from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments.common import VARIANTS, train_hashes
from hashattn.reproduce.profiles import load_profile


def main(names: list[str]) -> None:
    profile = load_profile("embedded")
    model, tokenizer = load_model(profile)
    default = profile.hash_weights_path
    runs = {"default": (default, {})}
    runs |= {name: (default.parent / "hash_variants" / name, arguments)
             for name, arguments in VARIANTS.items()}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name in names or runs:
            path, arguments = runs[name]
            weights = train_hashes(profile, model, tokenizer, str(Path(folder) / name),
                                   shared_captures=str(Path(folder) / "captured"),
                                   **arguments)  # fmt: skip
            weights.save(path)
            print(f"saved {weights.sha256[:12]} to {path.relative_to(default.parent)}")


if __name__ == "__main__":
    main(sys.argv[1:])
