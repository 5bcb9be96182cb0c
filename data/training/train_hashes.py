"""Train the shipped hash weights: data/embedded/hash_weights. Two minutes on 2 CPU cores."""

import tempfile
from pathlib import Path

from hashattn.access import load_model
from hashattn.profiles import load_profile
from hashattn.reproduce.experiments import train_hashes


def main() -> None:
    profile = load_profile("embedded")
    model, tokenizer = load_model(profile)
    with tempfile.TemporaryDirectory() as folder:
        weights = train_hashes(profile, model, tokenizer, str(Path(folder) / "hashes"))
    weights.save(profile.hash_weights_path)
    print(f"saved {weights.sha256[:12]} to {profile.hash_weights_path}")


if __name__ == "__main__":
    main()
