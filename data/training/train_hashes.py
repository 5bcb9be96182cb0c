"""Train the hash weights that are shipped with a profile's model: its own and their variants.

    python data/training/train_hashes.py [--profile embedded] [names]

names: "default", or variants of hashattn.reproduce.experiments.common.VARIANTS; by default all that
the profile ships. Finished layers are kept in the profile's results, where a stopped run goes on.
On 2 cores 10 minutes for the embedded model; the cards of others say their hours.
"""

import argparse
import shutil
import time

from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments.common import shipped, train_hashes
from hashattn.reproduce.profiles import load_profile

_CAPTURES = "shipped/captured"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="embedded")
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    profile = load_profile(arguments.profile)
    runs = shipped(profile)
    unknown = sorted(set(arguments.names) - set(runs))
    if unknown:
        parser.error(f"{', '.join(unknown)}: profile {profile.name} ships {', '.join(runs)}")
    model, tokenizer = load_model(profile)
    for name in arguments.names or runs:
        start, (folder, settings) = time.perf_counter(), runs[name]
        weights = train_hashes(
            profile, model, tokenizer, f"shipped/{name}", shared_captures=_CAPTURES,
            **settings,
        )  # fmt: skip
        weights.save(folder)
        minutes = (time.perf_counter() - start) / 60
        print(f"{name}: {weights.sha256[:12]} in {minutes:.1f} min, saved to {folder}", flush=True)
    shutil.rmtree(profile.results / "hash_training" / _CAPTURES, ignore_errors=True)


if __name__ == "__main__":
    main()
