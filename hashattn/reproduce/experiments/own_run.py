"""Tables that are measured by a command of their own, as a pretrained model's take minutes."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pandas as pd

from hashattn.reproduce import plots
from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments.common import VARIANTS, hash_weights, shipped_or_trained
from hashattn.reproduce.profiles import load_profile
from hashattn.selectors.hash import HashSelector


def run(
    name: str, description: str, measure: Callable[..., pd.DataFrame], *lengths: str,
    arguments: list[str] | None = None,
) -> int:  # fmt: skip
    """Read --profile, measure(profile, model, tokenizer, selector, lengths) with the profile's
    hash weights or, by --weights, a variant of them, save the table `name` and print where it is.
    lengths: fields of the profile."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--weights", choices=VARIANTS, help="a variant, such as 64_bits")
    read = parser.parse_args(arguments)
    profile = load_profile(read.profile)
    model, tokenizer = load_model(profile)
    weights = (
        hash_weights(profile, model, tokenizer, read.weights)
        if read.weights
        else shipped_or_trained(profile, model, tokenizer)
    )
    selector = HashSelector.as_trained(weights)
    tokens = dict.fromkeys(getattr(profile, length) for length in lengths)
    table = measure(profile, model, tokenizer, selector, tokens)
    print(plots.save_table(table, name, profile.results))
    return 0
