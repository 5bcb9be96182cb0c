"""Small attached models, and steps of them, for the tests of drift."""

from contextlib import contextmanager

import numpy as np
import torch

from hashattn import Budget, attach, make_selector
from hashattn.hashing.maps import HashConfig
from hashattn.hashing.weights import HashWeights
from hashattn.trust.drift.evidence import BETS, BINS, bins_of
from hashattn.trust.drift.reference import DriftReference
from hashattn.trust.drift.statistics import STATISTICS
from helpers import generate, prompt, tiny_model

BUDGET = Budget(1, 3, heavy=6)


def selector(name="hash", codes="per_kv_head", **settings):
    """A method for tiny_model("llama"): random hash weights, or one without codes."""
    if name != "hash":
        return make_selector(name, **settings)
    config = HashConfig((0, 1), 4, 2, 16, codes, 32, depth=2, hidden=16)
    return make_selector("hash", weights=HashWeights.random(config, 0), **settings)


@contextmanager
def attached(method=None, family="llama", budget=BUDGET, **settings):
    """A tiny model's attachment."""
    method = selector() if method is None else method
    settings = {"allow_untrained": True, "allow_dense": True} | settings
    with attach(tiny_model(family), method, budget, **settings) as run:
        yield run


class Keeper:
    """Keeps copies of the LayerSteps' tensors by keeping the steps of short runs."""

    timed = False

    def __init__(self):
        self.steps = []

    def saw(self, step):
        self.steps.append(step)


def traffic(run, sequences, tokens=12, seed=0, length=40, step=None):
    """Generate `tokens` tokens after each of some random prompts."""
    for number in range(sequences):
        ids = prompt(1, length, seed=1000 * seed + number)
        if step is not None:  # prompts of another kind: of few tokens
            ids = ids - ids % step + 3
        generate(run.model, ids.clamp(max=127), max_new_tokens=tokens, do_sample=True)


@torch.no_grad()
def several_rows(run, batch=2, length=30, rows=5, mask=None):
    """A prompt, then one call of `rows` rows over it."""
    ids = prompt(batch, length)
    before = None if mask is None else mask[:, :-rows]
    cache = run.model(ids[:, :-rows], use_cache=True, attention_mask=before).past_key_values
    run.model(ids[:, -rows:], past_key_values=cache, use_cache=True, attention_mask=mask)


def random_reference(layers=2, values=400, seed=0, exponents=None):
    """A reference of standard normal values, without a model."""
    rng = np.random.default_rng(seed)
    shape = len(STATISTICS), layers + 1
    counts = np.zeros((*shape, BINS), np.int64)
    for place in np.ndindex(shape):
        np.add.at(counts[place], bins_of(rng.normal(size=values)), 1)
    fingerprint = {"model": {}, "method": {}, "budget": {}}
    return DriftReference(
        fingerprint, 4, 0.5, tuple(range(layers)), 30, {"key_surprise": {}, "query_surprise": {}},
        np.zeros((shape[0], layers)), np.ones((shape[0], layers)), counts,
        np.ones((*shape, *BETS)) if exponents is None else exponents,
    )  # fmt: skip
