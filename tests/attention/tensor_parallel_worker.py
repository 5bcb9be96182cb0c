"""Runs of one process and of each of two processes under tensor parallelism, to be compared.

`torchrun --nproc-per-node 2 tensor_parallel_worker.py <folder>` writes <folder>/<rank>.pt.
"""

import dataclasses
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from hashattn import Budget, HashSelector, HashWeights, attach
from hashattn.base.errors import HashAttnError
from hashattn.evaluation.methods import Method
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record
from hashattn.evaluation.runner import evaluate
from hashattn.hashing import capture
from hashattn.models.identity import base_model_record, model_sha256
from hashattn.reproduce.access import load_model
from hashattn.reproduce.profiles import load_profile, repository
from hashattn.selectors import make_selector
from helpers import characters, prompt

SHIPPED = repository() / "data" / "embedded" / "hash_weights"
TINY = Budget(sink=1, local=3, heavy=6)
TEXT = (
    "Note: Alice visits Kyoto\n"
    + 150 * "Nothing happens here, and nothing will.\n"
    + "Q: Alice visits"
)


class TracingHash(HashSelector):
    """Keeps what every sparse call saw and chose, the copies for parts of the heads too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def select(self, layer, queries, view, scaling, plan):
        indices = super().select(layer, queries, view, scaling, plan)
        codes = self.encode_keys(layer, view.keys)["codes"]
        call = {"layer": layer, "keys": view.keys, "codes": codes, "indices": indices}
        self.calls.append(call)
        return indices


def generate(model, ids, selector, budget, new_tokens):
    """New tokens and the receipt of a greedy run."""
    with (
        attach(model, selector, budget, allow_untrained=True, keep_steps=99) as run,
        torch.no_grad(),
    ):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
        )
    return {"tokens": out[0, ids.shape[1] :].tolist(), "receipt": run.receipt.to_dict()}


def embedded(placement):
    """The embedded model with the weights that come with it, loaded as a profile says."""
    profile = dataclasses.replace(load_profile("embedded"), device="auto", placement=placement)
    model, tokenizer = load_model(profile)
    selector = TracingHash(HashWeights.load(SHIPPED, model))
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    result = generate(model, ids, selector, Budget(density=1 / 16), 6)
    identity = {"model_sha256": model_sha256(model), "record": base_model_record(model)}
    text = tokenizer.decode(result["tokens"])
    return result | identity | {"calls": selector.calls, "cached": ids.shape[1], "text": text}


def tiny_selectors(weights):
    """Methods with and without state of their own for each head, by name."""
    return {
        "hash": HashSelector(weights, scoring="hamming"),
        "random": make_selector("random", seed=5),
        "lsh": make_selector("lsh"),
        "h2o": make_selector("h2o"),
        "quest": make_selector("quest", page=4),
    }


def tiny(folder, **placement):
    """A random model: every method, the first with shares of the budget by head too."""
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", **placement).eval()
    weights = HashWeights.load(folder / "llama_weights", model, allow_untrained=True)
    selectors = tiny_selectors(weights)
    found = {
        name: generate(model, prompt(), selector, TINY, 12) for name, selector in selectors.items()
    }
    shares = dataclasses.replace(TINY, shares=((0.5, 1.5), (1.0,)))
    return found | {"shares": generate(model, prompt(), selectors["hash"], shares, 12)}


def gathering(folder, **placement):
    """A family whose plan shards the projections and gathers their outputs again."""
    model = AutoModelForCausalLM.from_pretrained(folder / "phi3", **placement).eval()
    weights = HashWeights.load(folder / "phi3_weights", model, allow_untrained=True)
    return generate(model, prompt(), HashSelector(weights), TINY, 12)


def evaluated(folder, out, **placement):
    """evaluate()'s predictions and densities, in its order; twice, so that the second reuses."""
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", **placement).eval()
    weights = HashWeights.load(folder / "llama_weights", model, allow_untrained=True)
    protocol = Protocol(sink=TINY.sink, local=TINY.local, max_new_tokens=4)
    budget = protocol.budget(heavy=20)
    methods = [
        Method("dense"),
        Method("hash", HashSelector(weights), budget, allow_untrained=True),
        Method("h2o", make_selector("h2o"), budget),
    ]
    contexts = ("the quick brown fox jumps over the dog " * 3, "pack my box with five jugs " * 4)
    records = [Record(asked, context, ("a",)) for context in contexts for asked in ("x", "what")]
    frames = [
        evaluate(model, characters(), records, methods, protocol, out, progress=False)
        for _ in range(2)
    ]
    assert frames[1].attrs["reused"] == len(frames[1])
    return frames[0][["setup", "method", "prediction", "density"]].to_dict("list")


def refusals(folder):
    """What tensor parallelism is refused with, by what was asked."""
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", tp_plan="auto")
    odd = AutoModelForCausalLM.from_pretrained(folder / "llama_mqa", tp_plan="auto")
    mqa_weights = folder / "llama_mqa_weights"
    asked = {
        "capture": lambda: capture(model, prompt()),
        "infllm": lambda: attach(model, make_selector("infllm"), TINY),
        "uneven, attach": lambda: attach(odd, make_selector("oracle"), TINY),
        "uneven, load": lambda: HashWeights.load(mqa_weights, odd, allow_untrained=True),
    }
    return {name: message(ask) for name, ask in asked.items()}


def message(ask):
    try:
        ask()
    except HashAttnError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def main(folder):
    # a process that waits for a lost one gives up, instead of hanging the test
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {
        "embedded": embedded("tensor_parallel"),
        "tiny": tiny(folder, tp_plan="auto"),
        "gathering": gathering(folder, tp_plan="auto"),
        "evaluated": evaluated(folder, folder / "shared.jsonl", tp_plan="auto"),
        "refusals": refusals(folder),
    }
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
