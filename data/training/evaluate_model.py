"""Score the embedded model: 200 held-out questions of every task at 4K tokens, 100 at 8K.

It writes the scores of dense attention, of sink and local tokens alone, and of these with the exact
top n/32 tokens, to data/reference/embedded_model.json. A quarter of an hour on one core; resumes.
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from hashattn.attention.budget import Budget
from hashattn.base.files import write_text
from hashattn.base.repository import repository
from hashattn.evaluation.benchmarks.generated import make_records
from hashattn.evaluation.methods import Method
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.runner import evaluate
from hashattn.evaluation.tables import dataset_table
from hashattn.models.identity import model_sha256
from hashattn.reproduce.access import load_model
from hashattn.reproduce.profiles import load_profile
from hashattn.selectors import make_selector

CONTEXTS = {4096: 50, 8192: 25}  # by length
QUESTIONS, SEED = 4, 100  # questions of each task in each context
SINK, LOCAL = 16, 64


def score(model, tokenizer, length: int, results: Path) -> dict:
    methods = [
        Method("dense"),
        Method("window", make_selector("window"), Budget(SINK, LOCAL, heavy=0)),
        Method("oracle", make_selector("oracle"), Budget(SINK, LOCAL, heavy=length // 32)),
    ]
    records = make_records(
        tokenizer, length, CONTEXTS[length], seed=SEED, questions_per_task=QUESTIONS
    )
    path = results / f"embedded_model_{length}.jsonl"
    protocol = Protocol(sink=SINK, local=LOCAL, seed=SEED)
    frame = evaluate(model, tokenizer, records, methods, protocol, path, setups="B")
    table = dataset_table(frame).round(2)
    return {method: table.loc[(method, budget)].to_dict() for method, budget in table.index}


def main() -> None:
    profile = load_profile("embedded")
    model, tokenizer = load_model(profile)
    results = profile.results.parent / "model"
    results.mkdir(parents=True, exist_ok=True)
    record = {
        "protocol": {
            "samples_per_task": {n: count * QUESTIONS for n, count in CONTEXTS.items()},
            "sink": SINK, "local": LOCAL, "seed": SEED,
            "heavy": "n/32", "question": "sparse", "metric": "exact match, %",
        },
        "model_sha256": model_sha256(model),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "machine": {"arch": platform.machine(), "threads": torch.get_num_threads()},
        "scores": {str(n): score(model, tokenizer, n, results) for n in CONTEXTS},
    }  # fmt: skip
    output = repository() / "data" / "reference" / "embedded_model.json"
    write_text(output, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["scores"], indent=1))


if __name__ == "__main__":
    main()
