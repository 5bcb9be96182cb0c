"""What a call is: the prompt's prefill, or a step that follows cached tokens, whatever its rows."""

import pytest
import torch
from transformers import DynamicCache

from hashattn import Budget, attach
from hashattn.selectors.random import RandomSelector
from helpers import generate, prompt, tiny_model

SMALL = Budget(sink=1, local=3, heavy=6)
LAYERS = 2


def rows_of(receipt) -> dict[str | None, int]:
    """Query rows of one layer by reason."""
    return {count.reason: count.rows for count in receipt.counts if count.layer == 0}


def expected_density(receipt, prompt_length: int, read: int = 10) -> float:
    """Of one layer's recent steps: every row of a dense step reads all it sees."""
    steps = [step for step in receipt.recent if step.layer == 0]
    cached = sum(step.rows * step.cached for step in steps)
    return (
        sum(step.rows * (read if step.reason is None else step.cached) for step in steps) / cached
    )


def repeating() -> torch.Tensor:
    return prompt(length=20).repeat(1, 2)


@pytest.mark.parametrize("drafted", [2, 5])
def test_verification_of_looked_up_drafts_counts(drafted):
    """Several rows a call, all of them read dense: no prefill, and no density of 1/8."""
    model = tiny_model("llama")
    with attach(model, RandomSelector(), SMALL, keep_steps=999) as run:
        generate(model, repeating(), prompt_lookup_num_tokens=drafted, max_new_tokens=24)
    receipt, rows = run.receipt, rows_of(run.receipt)
    assert receipt.dense_reasons["prefill"] == LAYERS
    verified = receipt.dense_reasons["several_rows"]
    assert receipt.decode_calls == receipt.sparse_calls + verified
    assert rows["several_rows"] > receipt.sparse_calls / LAYERS
    assert receipt.density == pytest.approx(expected_density(receipt, 40))
    assert receipt.density > 0.5
    assert f"sparse_rows={drafted + 1}" in receipt.summary()


def test_verification_for_an_assistant_counts():
    model, assistant = tiny_model("llama"), tiny_model("llama", seed=0)
    with attach(model, RandomSelector(), SMALL, allow_dense=True, keep_steps=99) as run:
        generate(model, prompt(), assistant_model=assistant, max_new_tokens=8)
    rows = rows_of(run.receipt)
    assert rows["several_rows"] >= 2 and "prefill" in rows
    assert run.receipt.decode_density == pytest.approx(expected_density(run.receipt, 40))
    assert run.receipt.dense_reasons["prefill"] == LAYERS


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("chunk", [2, 7, 39, 64])
def test_chunks_of_a_prompt_are_its_prefill(chunk, cache):
    model = tiny_model("llama")
    with attach(model, RandomSelector(), SMALL) as run:
        generate(model, prompt(), prefill_chunk_size=chunk, max_new_tokens=4,
                 cache_implementation=cache)  # fmt: skip
    steps = 3 + (40 % chunk == 1)  # a chunk of one row is a step like any other
    assert run.receipt.sparse_calls == run.receipt.decode_calls == steps * LAYERS
    assert rows_of(run.receipt)["prefill"] == 40 - (40 % chunk == 1)
    assert run.receipt.density < 0.3


@pytest.mark.parametrize("rows", [2, 5, 30])
@pytest.mark.parametrize("ask", [{}, {"logits_to_keep": 1}])
def test_a_second_turn_counts(rows, ask):
    """After a step whatever comes is no prompt, also where only its last row is asked for."""
    model = tiny_model("llama")
    with torch.no_grad(), attach(model, RandomSelector(), SMALL) as run:
        cache = DynamicCache(config=model.config)
        model(prompt(), past_key_values=cache, logits_to_keep=1)
        model(prompt(length=1), past_key_values=cache)
        model(prompt(length=rows), past_key_values=cache, **ask)
        model(prompt(length=1), past_key_values=cache)
    assert rows_of(run.receipt) == {None: 2, "prefill": 40, "several_rows": rows}
    read = 10 + (41 + rows / 2 + 0.5) * rows + 10
    cached = 41 + (41 + rows / 2 + 0.5) * rows + 42 + rows
    assert run.receipt.density == pytest.approx(read / cached)


def test_a_second_turn_of_generate_counts():
    model = tiny_model("llama")
    with attach(model, RandomSelector(), SMALL) as run:
        first = model.generate(prompt(), max_new_tokens=4, return_dict_in_generate=True,
                               do_sample=False)  # fmt: skip
        longer = torch.cat((first.sequences, prompt(length=6, seed=9)), dim=1)
        model.generate(longer, past_key_values=first.past_key_values, max_new_tokens=3,
                       do_sample=False)  # fmt: skip
    assert rows_of(run.receipt) == {None: 3 + 2, "prefill": 40, "several_rows": 7}


def test_chunks_whose_logits_are_all_wanted_are_steps():
    """Nothing tells them from drafts; a cache that the model made itself goes on like any other."""
    model = tiny_model("llama")
    with torch.no_grad(), attach(model, RandomSelector(), SMALL, allow_dense=True) as run:
        cache = model(prompt()).past_key_values
        model(prompt(length=8), past_key_values=cache, logits_to_keep=1)
        assert rows_of(run.receipt) == {"prefill": 48}
        model(prompt(length=8), past_key_values=cache)
    assert rows_of(run.receipt) == {"prefill": 48, "several_rows": 8}


def test_a_cropped_prompt_that_is_asked_again_is_a_step():
    model = tiny_model("llama")
    with torch.no_grad(), attach(model, RandomSelector(), SMALL, allow_dense=True) as run:
        cache = DynamicCache(config=model.config)
        model(prompt(), past_key_values=cache)
        cache.crop(-6)
        model(prompt(length=6), past_key_values=cache, logits_to_keep=1)
    assert rows_of(run.receipt) == {"prefill": 40, "several_rows": 6}


def test_several_rows_of_a_dense_layer_are_dense_for_that_reason():
    model = tiny_model("llama")
    with attach(model, RandomSelector(), SMALL, dense_layers=[1]) as run:
        generate(model, repeating(), prompt_lookup_num_tokens=3)
    assert {count.reason for count in run.receipt.counts if count.layer == 1} == {
        "prefill", "dense_layer",
    }  # fmt: skip
