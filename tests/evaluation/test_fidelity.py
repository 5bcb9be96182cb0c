"""Fidelity: distributions compared with plain formulas, positions one by one, free running."""

import math
from contextlib import nullcontext

import pytest
import torch

from hashattn.attention.attachment import attach
from hashattn.evaluation.fidelity import (
    compare_logits,
    document,
    fidelity_protocol,
    fidelity_table,
)
from hashattn.evaluation.methods import Method
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.runner import evaluate
from hashattn.selectors import make_selector
from helpers import characters, tiny_model

TEXTS = ["the cat sat on the mat and " * 8, "a dog ran far over the hills " * 7]
TOKENS, NEW = 12, 5


def methods(protocol):
    return [
        Method("dense"),
        Method("oracle", make_selector("oracle"), protocol.budget(heavy=8)),
        Method("random", make_selector("random", seed=1), protocol.budget(heavy=8)),
        Method("everything", make_selector("oracle"), protocol.budget(heavy=10_000), True),
    ]


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama")
    model.config.max_position_embeddings = 1024
    return model


@pytest.fixture
def frame(model, tmp_path):
    protocol = fidelity_protocol(TOKENS, NEW, sink=1, local=3)
    records = [document(text, "texts", str(i)) for i, text in enumerate(TEXTS)]
    return evaluate(model, characters(), records, methods(protocol), protocol,
                    tmp_path / "rows.jsonl", progress=False, setups="B")  # fmt: skip


def test_distributions_are_compared_by_the_formulas():
    generator = torch.Generator().manual_seed(0)
    dense, sparse = torch.randn(2, 300, 7, generator=generator).double()
    targets = torch.randint(0, 7, (300,), generator=generator)
    targets[-1] = -1
    got = compare_logits(dense, sparse, targets)
    kl = agreement = nll = 0.0
    for position in range(300):
        p, q = (
            [math.exp(x) / sum(math.exp(y) for y in row) for x in row]
            for row in (dense[position].tolist(), sparse[position].tolist())
        )
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 300
        agreement += (p.index(max(p)) == q.index(max(q))) / 300
        nll -= math.log(q[targets[position]]) / 299 if position < 299 else 0
    assert got["kl"] == pytest.approx(kl, rel=1e-4)
    assert got["agreement"] == pytest.approx(agreement)
    assert got["nll"] == pytest.approx(nll, rel=1e-5)


def test_reading_everything_is_dense(frame):
    for name in ("dense", "everything"):
        rows = frame[frame.method == name]
        assert (rows["kl"] < 1e-6).all() and (rows["score"] == 1).all()
        assert (rows["same_tokens"] == NEW).all()
        assert rows["nll"].tolist() == pytest.approx(rows["dense_nll"].tolist(), abs=1e-5)
    assert (frame[frame.method == "random"]["kl"] > 1e-4).all()


def test_a_pass_over_many_positions_is_one_step_for_each(model, frame):
    """Against decoding token by token with the same selector, and dense logits without a cache."""
    tokenizer = characters()
    for text, (_, row) in zip(TEXTS, frame[frame.method == "oracle"].iterrows(), strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            dense = model(ids).logits[0, -TOKENS:].double().log_softmax(-1)
            cache = model(ids[:, :-TOKENS], use_cache=True).past_key_values
            budget = fidelity_protocol(TOKENS, sink=1, local=3).budget(heavy=8)
            steps = []
            with attach(model, make_selector("oracle"), budget):
                for token in ids[0, -TOKENS:]:
                    out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
                    steps.append(out.logits[0, -1].double().log_softmax(-1))
        sparse = torch.stack(steps)
        kl = (dense.exp() * (dense - sparse)).sum(-1).mean().item()
        assert row["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-7)
        own = ids[0, -TOKENS + 1 :]
        nll = -sparse[:-1].gather(1, own[:, None]).mean().item()
        assert row["nll"] == pytest.approx(nll, rel=1e-4)


def test_free_running_counts_tokens_until_the_first_that_differs(model, frame):
    """Against greedy decoding of all tokens, dense and with the same selector."""

    def greedy(ids, method):
        with torch.no_grad():
            cache = model(ids[:, :-TOKENS], use_cache=True).past_key_values
            attached = nullcontext()
            if method.sparse:
                attached = attach(model, method.selector, method.budget, sparse_rows=TOKENS,
                                  allow_dense=True)  # fmt: skip
            step, tokens = ids[:, -TOKENS:], []
            with attached:
                for _ in range(NEW):
                    out = model(step, past_key_values=cache, use_cache=True)
                    tokens.append(int(out.logits[0, -1].argmax()))
                    step = torch.tensor([tokens[-1:]])
        return tokens

    same = []
    for text in TEXTS:
        ids = torch.tensor([characters()(text)["input_ids"]])
        dense, *sparse = (
            greedy(ids, method)
            for method in methods(fidelity_protocol(TOKENS, NEW, sink=1, local=3))[:3]
        )
        same += [next((i for i in range(NEW) if tokens[i] != dense[i]), NEW) for tokens in sparse]
    rows = frame[frame.method.isin(["oracle", "random"])].sort_values("sample", kind="stable")
    found = sorted(rows["same_tokens"])
    assert found == sorted(same) and min(same) < NEW
    assert (frame["new_tokens"] == NEW).all()


def test_a_run_resumes_and_the_table_says_how_sure(model, tmp_path, frame):
    table = fidelity_table(frame)
    assert list(table.index.get_level_values("method")) == [
        "dense",
        "oracle",
        "random",
        "everything",
    ]
    line = table.loc[("random", "8 tokens")]
    assert line["kl_low"] <= line["kl"] <= line["kl_high"] and line["documents"] == 2
    rows = frame[frame.method == "random"]
    ratio = math.exp((rows["nll"] - rows["dense_nll"]).mean())
    assert line["perplexity_ratio"] == pytest.approx(ratio)
    assert line["density"] == pytest.approx(rows["density"].mean())


def test_without_enough_tokens_it_is_refused():
    for window in (None, 1):
        with pytest.raises(ValueError, match="window = .*: must be at least 2 tokens"):
            Protocol(metric="fidelity", window=window, template="{context}", truncated="prompt")
