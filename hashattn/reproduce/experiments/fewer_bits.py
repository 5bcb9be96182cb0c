"""What keys and values of 8 or 4 bits cost in quality (notebook 04).

python -m hashattn.reproduce.experiments.fewer_bits --profile smollm2 writes a profile's table.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import pandas as pd
import torch

from hashattn.attention.attachment import attach
from hashattn.attention.budget import Budget
from hashattn.attention.memory import Memory
from hashattn.evaluation.answering import PrefilledContext
from hashattn.evaluation.benchmarks import texts
from hashattn.evaluation.fidelity import compare_logits
from hashattn.evaluation.measures.quantisation import quantisation_errors
from hashattn.hashing.capture import capture
from hashattn.pilot.capacity.hot_memory import HotMemory
from hashattn.reproduce.experiments.hot_set import llama
from hashattn.reproduce.experiments.own_run import run
from hashattn.reproduce.profiles import Profile
from hashattn.selectors.base import Selector

NAME = "04_fewer_bits"
INDEX = ["tokens", "fraction", "bits", "exact"]
_FRACTIONS = (32, 16, 8)  # n over these are read beside sink and local tokens
# bits, and how many of the newest tokens are as they were; 16: all are
_KEPT = ((16, 0), (8, 0), (4, 256), (4, 0))
_KINDS = ("documentation", "code", "prose", "minutes")  # of held-out text, a document each
_POSITIONS = 128  # the last ones, teacher-forced
_CAPTURED = 32  # of them, those whose attention output is compared


@torch.no_grad()
def fewer_bits_table(
    profile: Profile, model, tokenizer, selector: Selector, lengths: Iterable[int]
) -> pd.DataFrame:
    """By INDEX, means over held-out documents: KL to dense attention (nats) and top-1 agreement of
    the next token, where K and V of the whole context are stored in so many bits; output_error to
    dense attention and added_error to the same lists in the model's dtype, means over layers; bytes
    of K and V a token that is not exact.

    16 bits: the model's own dtype, whatever that is, for KL; bfloat16 for errors and bytes.
    """
    rows = []
    for n in lengths:
        for ids, _ in texts.sequences(tokenizer, _KINDS, n, len(_KINDS), split=texts.EVAL):
            errors = _errors(profile, model, selector, ids)
            for row in _fidelity(profile, model, selector, ids):
                where = row["fraction"], row["bits"], row["exact"]
                rows.append({"tokens": n} | row | errors[where])
    return pd.DataFrame(rows).groupby(INDEX, sort=False).mean().round(6)


def _fidelity(profile: Profile, model, selector: Selector, ids: list[int]) -> Iterable[dict]:
    context = PrefilledContext(model, ids[:-_POSITIONS])
    asked = torch.tensor([ids[-_POSITIONS:]], device=model.device)
    targets = torch.tensor([*ids[1 - _POSITIONS :], -1])

    def logits():
        return model(input_ids=asked, past_key_values=context.fork(), use_cache=True).logits[0]

    dense = logits()
    for fraction in _FRACTIONS:
        budget = Budget(profile.sink, profile.local, heavy=len(ids) // fraction)
        for bits, exact in _KEPT:
            memory = None if bits == 16 else Memory(bits=bits, exact=exact)
            with attach(model, selector, budget, sparse_rows=_POSITIONS, memory=memory):
                compared = compare_logits(dense, logits(), targets)
            yield {"fraction": fraction, "bits": bits, "exact": exact} | {
                name: compared[name] for name in ("kl", "agreement")
            }


def _errors(profile: Profile, model, selector: Selector, ids: list[int]) -> dict:
    """output_error, added_error and bytes by fraction, bits and exact."""
    rows = torch.arange(len(ids) - _CAPTURED, len(ids))
    bits, exact = (sorted(set(part)) for part in zip(*_KEPT, strict=True))
    layers = list(capture(model, torch.tensor(ids), rows=rows, values=True).values())
    heavy = {len(ids) // fraction: fraction for fraction in _FRACTIONS}
    table = pd.DataFrame(quantisation_errors(
        layers, selector, list(heavy), bits, exact, sink=profile.sink, local=profile.local
    ))  # fmt: skip
    by = table.groupby(["heavy", "bits", "exact"])
    means = by[["output_error", "added_error"]].mean().join(by["bytes"].sum())
    return {(heavy[label[0]], *label[1:]): line for label, line in means.to_dict("index").items()}


def by_error(table: pd.DataFrame) -> pd.DataFrame:
    """The table, with output_error and KL as multiples of those in the model's dtype."""
    base = table.xs((16, 0), level=["bits", "exact"])
    compared = table.copy()
    same = table.index.droplevel(["bits", "exact"])
    for name in ("output_error", "kl"):
        compared[f"{name} / 16 bits"] = table[name] / base[name].reindex(same).to_numpy()
    return compared


def tokens_of_a_gigabyte(code_bits: int = 32) -> pd.Series:
    """Tokens of Llama-3.1-8B that a gigabyte holds, with their codes, by bits of K and V."""
    model = llama()
    held = {16: None, 8: 8, 4: 4}
    sizes = {
        bits: HotMemory(model, code_bits, kv_bits=kept).bytes_per_token
        for bits, kept in held.items()
    }
    return pd.Series({bits: 1e9 / size for bits, size in sizes.items()}, name="tokens a GB")


if __name__ == "__main__":
    sys.exit(run(NAME, __doc__, fewer_bits_table, "frontier_length"))
