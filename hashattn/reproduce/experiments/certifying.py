"""Notebook 05's certified reading: what a bound on the missed attention costs and what it keeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pandas as pd

from hashattn.attention.budget import Budget
from hashattn.evaluation.methods import Method
from hashattn.models.structure import text_config
from hashattn.reproduce.experiments import divergence
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import Profile
from hashattn.selectors import make_selector
from hashattn.selectors.base import Selector

INDEX = ["method", "tolerance"]
_DENSITY = 1 / 16  # of the budget that certified reading begins with
_BITS = (8, 4)


def certified_reading(
    profile: Profile, model, tokenizer, selector: Selector, tolerances: Iterable[float],
    progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """KL divergence (nats), agreement (share) and density on a document of each of the profile's
    kinds of text, at its frontier_length: of `selector` at 1/16, and for each tolerance (share of
    the attention that may be missed) of the same certified by copies of the keys in 8 and 4 bits,
    and of the fewest tokens that true weights allow. By INDEX, means over documents; the budget
    alone has a tolerance of 1, as it promises nothing."""
    budget = Budget(profile.sink, profile.local, density=_DENSITY)
    every = replace(budget, density=1.0)
    softcap = getattr(text_config(model), "attn_logit_softcapping", None)
    made = {("the budget alone", 1.0): Method("budget", selector, budget)}
    for tolerance in tolerances:
        true = make_selector("oracle_top_p", p=1 - tolerance)
        label = f"true weights {tolerance}"
        made["true weights", tolerance] = Method(label, true, every, allow_dense=True)
        for bits in _BITS:
            bound = make_selector("certified", base=selector, bits=bits, tolerance=tolerance,
                                  softcap=softcap)  # fmt: skip
            label = f"certified by {bits} bits"
            made[label, tolerance] = Method(f"{label} {tolerance}", bound, budget, allow_dense=True)
    one = replace(profile, documents=1, document_lengths=(profile.frontier_length,))
    rows = divergence.fidelity(
        one, model, tokenizer, [Method("dense"), *made.values()], progress
    ).groupby("method")[["kl", "agreement", "density"]].mean()  # fmt: skip
    index = pd.MultiIndex.from_tuples(list(made), names=INDEX)
    return rows.loc[[method.name for method in made.values()]].set_axis(index)


def certified_claims(claims: Claims, table: pd.DataFrame, model: str) -> None:
    """What notebook 05 claims of `certified_reading`'s table."""
    for tolerance, read in table.loc["certified by 8 bits", "density"].items():
        claims.goal(
            f"{model}: certified within {100 * tolerance:g} %, tokens read / least by true weights",
            read / table.loc[("true weights", tolerance), "density"], high=2,
        )  # fmt: skip
