"""The buffer holds what attention saw, a uniform sample of it, within its bound."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from hashattn import Budget, attach
from hashattn.hashing import capture
from hashattn.selectors.oracle import OracleSelector
from hashattn.selectors.random import RandomSelector
from hashattn.trust.retraining.reservoir import Reservoir, ReservoirSettings
from helpers import generate, left_padded, prompt, tiny_model

EVERYTHING = Budget(sink=1, local=3, heavy=1000)  # so that queries are those of dense attention
SMALL = Budget(sink=1, local=3, heavy=6)


def listened(model, prompts, settings, layers=(0, 1), budget=EVERYTHING, masks=None, **options):
    """The reservoir, and the sequences that were generated."""
    reservoir, sequences = Reservoir(layers, settings), []
    with attach(model, OracleSelector(), budget, allow_dense=True) as run, run.listen(reservoir):
        for number, ids in enumerate(prompts):
            mask = None if masks is None else masks[number]
            sequences.append(generate(model, ids, mask, **options)[0])
    return reservoir, sequences


def assert_captured(held, model, ids):
    """Each layer of `held` is what capture gives for tokens (n,), up to the last row."""
    reference = capture(model, ids, rows=next(iter(held.values())).positions)
    for layer, got in held.items():
        expected = reference[layer]
        n = int(got.positions[-1]) + 1
        assert torch.equal(got.positions, expected.positions)
        assert got.keys.shape[1] == n and got.queries.shape == expected.queries.shape
        torch.testing.assert_close(got.queries, expected.queries, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.keys, expected.keys[:, :n], atol=1e-5, rtol=1e-5)
        assert (got.scaling, got.softcap) == (expected.scaling, expected.softcap)
        assert got.layer == layer and got.values is None


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "qwen2_sliding"])
@pytest.mark.parametrize("rows", [7, 1000])
def test_a_context_is_what_capture_gives(family, rows):
    model = tiny_model(family)
    layers = {"gemma2": (1,), "qwen2_sliding": (0,)}.get(family, (0, 1))  # with full attention
    reservoir, (out,) = listened(model, [prompt()], ReservoirSettings(rows=rows), layers)
    (held,) = reservoir.captured()
    assert tuple(held) == layers
    # the last token is generated and never read; with few rows keys end at the last of them
    assert len(held[layers[0]].positions) == min(rows, out.shape[1] - 1)
    assert_captured(held, model, out[0])


@pytest.mark.parametrize("length", [1, 2, 40])
def test_prompts_in_chunks_and_of_a_token(length):
    model = tiny_model("llama")
    reservoir, (out,) = listened(
        model, [prompt(1, length)], ReservoirSettings(rows=20), prefill_chunk_size=16
    )
    (held,) = reservoir.captured()
    assert_captured(held, model, out[0])


def test_a_row_of_a_padded_batch_is_kept_without_its_padding():
    model = tiny_model("llama")
    ids, mask = left_padded()
    drawn = set()
    for seed in range(8):
        reservoir, (out,) = listened(
            model, [ids], ReservoirSettings(rows=15, seed=seed), masks=[mask]
        )
        (held,) = reservoir.captured()
        rows = [row[-int(real) - 12 :] for row, real in zip(out, mask.sum(-1), strict=True)]
        matches = [
            row for row, tokens in enumerate(rows)
            if torch.allclose(held[0].keys, _keys(model, tokens, held[0]), atol=1e-5)
        ]  # fmt: skip
        assert len(matches) == 1
        assert_captured(held, model, rows[matches[0]])
        drawn.add(matches[0])
    assert drawn == {0, 1, 2}


def _keys(model, tokens, held):
    keys = capture(model, tokens)[0].keys[:, : held.keys.shape[1]]
    return keys if keys.shape == held.keys.shape else torch.full_like(held.keys, torch.inf)


def test_what_sparse_attention_saw_is_kept_not_what_dense_attention_would_have():
    model = tiny_model("llama")
    reservoir, (out,) = listened(model, [prompt()], ReservoirSettings(rows=99), budget=SMALL)
    (held,) = reservoir.captured()
    reference = capture(model, out[0], rows=held[1].positions)[1]
    prompt_rows = held[1].positions < 40
    torch.testing.assert_close(
        held[1].queries[:, prompt_rows], reference.queries[:, prompt_rows], atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(held[1].queries[:, ~prompt_rows], reference.queries[:, ~prompt_rows])


def steps(lengths, answer, layers=2, heads=(4, 2), dim=8):
    """Calls of contexts without a model: a prompt and single rows; all numbers are the position."""
    for number, length in enumerate(lengths):
        keys = torch.arange(length + answer).float().add(1000 * number)
        keys = keys[None, None, :, None].expand(1, heads[1], -1, dim)
        for begin, end in [(0, length)] + [(n, n + 1) for n in range(length, length + answer)]:
            query = keys[:, :1, begin:end].expand(-1, heads[0], -1, -1)
            for layer in range(layers):
                sparse = {"view": SimpleNamespace(keys=keys[:, :, :end], visible=None),
                          "logits": {"scaling": 1.0, "softcap": None}, "reason": None}  # fmt: skip
                dense = {"view": None, "logits": None, "reason": "prefill"}
                yield SimpleNamespace(
                    layer=layer, query=query, n=end, **(sparse if begin else dense)
                )


def test_rows_are_a_uniform_sample_of_prompt_and_answer():
    """Each of 40 positions is among the 10 kept in a quarter of 2,000 contexts: 500 +- 19."""
    length, answer, rows, contexts = 30, 10, 10, 2000
    reservoir = Reservoir([0], ReservoirSettings(contexts=contexts, rows=rows, tokens=64))
    for step in steps([length] * contexts, answer, layers=1):
        reservoir.saw(step)
    counts = torch.zeros(length + answer)
    for held in reservoir.captured():
        assert len(held[0].positions) == rows
        counts[held[0].positions] += 1
    share = rows / (length + answer)
    # without replacement: sum of z^2 has mean 39 * (n / (n - 1)); 99.9 % of chi-square(39) is 72
    z = (counts - contexts * share) / (contexts * share * (1 - share)) ** 0.5
    assert float(z.square().sum()) * (len(counts) - 1) / len(counts) < 72
    assert counts[:length].mean() == pytest.approx(500, rel=0.03)


def test_the_same_rows_are_kept_in_every_layer_and_for_the_same_seed():
    settings = ReservoirSettings(rows=5, tokens=64)
    first, again, other = (
        Reservoir([0, 1], s)
        for s in (settings, settings, ReservoirSettings(rows=5, tokens=64, seed=1))
    )
    for step in steps([30, 20], 5):
        for reservoir in (first, again, other):
            reservoir.saw(step)
    positions = [[c[0].positions.tolist() for c in r.captured()] for r in (first, again, other)]
    assert positions[0] == positions[1] != positions[2]
    for held in first.captured():
        assert torch.equal(held[0].positions, held[1].positions)


def test_memory_stays_within_the_stated_bytes_and_the_latest_contexts_stay():
    settings = ReservoirSettings(contexts=3, rows=6, tokens=32)
    reservoir = Reservoir([0, 1], settings)
    bound = reservoir.most_bytes(query_heads=4, kv_heads=2, head_dim=8, itemsize=4)
    assert bound == 4 * 2 * ((6 * 4 + 32 * 2) * 8 * 4 + 16 * 6 + 32)
    for step in steps([20, 50, 10, 30, 31, 32, 33, 100], 12):
        reservoir.saw(step)
        assert reservoir.nbytes <= bound
    held = reservoir.captured()
    assert [int(c[0].keys[0, 0, 0]) // 1000 for c in held] == [5, 6, 7]
    for context in held:  # of longer contexts the first 32 tokens, whose rows see nothing later
        assert context[0].keys.shape[1] <= 32 and int(context[0].positions.max()) < 32
    assert reservoir.nbytes > bound / 3
    reservoir.clear()
    assert reservoir.captured() == [] and reservoir.nbytes == 0


def test_a_share_of_the_contexts_is_sampled():
    reservoir = Reservoir([0], ReservoirSettings(contexts=400, rows=2, tokens=16, share=0.25))
    for step in steps([10] * 400, 2, layers=1):
        reservoir.saw(step)
    assert 70 < len(reservoir.captured()) < 130  # 100 +- 8.7


@pytest.mark.parametrize("other", [37, 41])  # 41: as long as the context is when it gets its turn
def test_a_context_ends_where_another_cache_gets_its_turn(other):
    model = tiny_model("llama")
    reservoir = Reservoir([0, 1], ReservoirSettings(rows=100))
    texts = [prompt(1, length, length) for length in (other, 40)]
    with torch.no_grad(), attach(model, OracleSelector(), EVERYTHING, allow_dense=True) as run:
        with run.listen(reservoir):
            caches = [DynamicCache(config=model.config) for _ in texts]
            for ids, cache in zip(texts, caches, strict=True):
                model(ids, past_key_values=cache)
            for number in (1, 0, 1, 0):
                model(torch.tensor([[5 + number]]), past_key_values=caches[number])
    (held,) = reservoir.captured()
    assert held[0].keys.shape[1] == 41
    assert_captured(held, model, torch.cat([texts[1][0], torch.tensor([6])]))


def test_beams_and_cropped_caches_end_a_context():
    model = tiny_model("llama")
    reservoir, (out,) = listened(
        model, [prompt()], ReservoirSettings(rows=100), num_beams=3, max_new_tokens=10
    )
    for held in reservoir.captured():  # whichever beam it was: one sequence, as far as it goes
        n = held[0].keys.shape[1]
        assert 40 < n <= 50
        assert_captured({0: _cut(held[0], 40), 1: _cut(held[1], 40)}, model, out[0])
    cropped = Reservoir([0, 1], ReservoirSettings(rows=100))
    with torch.no_grad(), attach(model, OracleSelector(), EVERYTHING, allow_dense=True) as run:
        with run.listen(cropped):
            cache = DynamicCache(config=model.config)
            model(prompt(), past_key_values=cache)
            for token in (5, 6, 7):
                model(torch.tensor([[token]]), past_key_values=cache)
            cache.crop(-2)
            for token in (8, 9):
                model(torch.tensor([[token]]), past_key_values=cache)
    (held,) = cropped.captured()
    assert held[0].keys.shape[1] == 43
    assert_captured(held, model, torch.cat([prompt()[0], torch.tensor([5, 6, 7])]))


def _cut(captured, tokens):
    from dataclasses import replace

    rows = captured.positions < tokens
    n = int(captured.positions[rows].max()) + 1
    return replace(captured, queries=captured.queries[:, rows], positions=captured.positions[rows],
                   keys=captured.keys[:, :n])  # fmt: skip


def test_a_question_over_a_cached_prefix_is_a_context():
    model = tiny_model("llama")
    reservoir = Reservoir([0, 1], ReservoirSettings(rows=100))
    prefix, question = prompt(), prompt(1, 6, 3)
    with torch.no_grad(), attach(model, OracleSelector(), EVERYTHING, allow_dense=True) as run:
        cache = DynamicCache(config=model.config)
        model(prefix, past_key_values=cache)
        for _ in range(2):
            own = copy.deepcopy(cache)
            with run.listen(reservoir):
                model(question, past_key_values=own)
                model(torch.tensor([[9]]), past_key_values=own)
    ids = torch.cat([prefix[0], question[0], torch.tensor([9])])
    assert len(reservoir.captured()) == 2
    for held in reservoir.captured():
        assert held[0].positions.tolist() == list(range(40, 47))
        assert_captured(held, model, ids)


def test_contexts_that_are_not_decoded_and_dense_layers_are_left_out():
    model = tiny_model("llama")
    settings = ReservoirSettings(rows=10)
    reservoir, _ = listened(model, [prompt()], settings, max_new_tokens=1)
    assert reservoir.captured() == []
    reservoir = Reservoir([0, 1], settings)
    with attach(model, RandomSelector(), SMALL, dense_layers=[0]) as run, run.listen(reservoir):
        generate(model, prompt())
    assert [list(held) for held in reservoir.captured()] == [[1]]


@pytest.mark.parametrize(
    "wrong",
    [{"contexts": 0}, {"rows": 0}, {"tokens": 1.5}, {"share": 0}, {"share": 1.1}, {"seed": -1}],
    ids=str,
)
def test_bad_settings_name_the_field(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        ReservoirSettings(**wrong)


def test_some_layers_have_to_be_named():
    with pytest.raises(ValueError, match="layers"):
        Reservoir([])


def test_a_question_of_several_sparse_rows_and_steps_after_it():
    """The question's call has a mask and the steps none; nothing is padding."""
    model, reservoir = tiny_model("llama"), Reservoir((0, 1), ReservoirSettings(rows=1000))
    ids = prompt(1, 50)
    with (
        torch.no_grad(),
        attach(model, OracleSelector(), EVERYTHING, sparse_rows=20, allow_dense=True) as run,
        run.listen(reservoir),
    ):
        cache = model(ids[:, :30]).past_key_values
        token = model(ids[:, 30:], past_key_values=cache).logits[:, -1:].argmax(-1)
        for _ in range(3):
            ids = torch.cat((ids, token), dim=1)
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    (held,) = reservoir.captured()
    assert int(held[0].positions[-1]) == 52
    assert_captured(held, model, ids[0])
