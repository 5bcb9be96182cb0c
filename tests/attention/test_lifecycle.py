"""Attachments that are dropped, models copied or changed inside the block, threads, loops."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import transformers
from transformers import DynamicCache

import hashattn
from hashattn import Budget, HashSelector, HashWeights, attach
from hashattn.base.errors import AttachmentError, UnsupportedModelError
from hashattn.hashing.maps import HashConfig
from hashattn.selectors.oracle import OracleSelector
from hashattn.selectors.random import RandomSelector
from hashattn.selectors.residual import ResidualSelector
from helpers import generate, left_padded, prompt, tiny_model

SMALL = Budget(sink=1, local=3, heavy=6)


def hash_selector() -> HashSelector:
    config = HashConfig((0, 1), 4, 2, 16, "per_kv_head", 32, depth=2, hidden=16)
    return HashSelector(HashWeights.random(config, 0))


def test_a_dropped_attachment_can_be_detached():
    model = tiny_model("llama")
    before = generate(model, prompt())[1]
    attach(model, RandomSelector(), SMALL)
    assert not torch.equal(generate(model, prompt())[1], before)
    hashattn.detach(model)
    assert torch.equal(generate(model, prompt())[1], before)
    with pytest.raises(AttachmentError, match="nothing to detach"):
        hashattn.detach(model)


def test_detaching_a_dropped_attachment_verifies_it():
    model = tiny_model("llama")
    attach(model, RandomSelector(), SMALL)
    with pytest.raises(hashattn.SparsePathError, match="no call reached"):
        hashattn.detach(model)
    attach(model, RandomSelector(), SMALL)
    hashattn.detach(model, verify=False)


def test_an_attached_model_can_be_dropped():
    model = tiny_model("llama")
    attach(model, RandomSelector(), SMALL)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_copy_made_inside_the_block_is_dense(duplicate, attention):
    model = tiny_model("llama", attention=attention)
    dense = generate(model, prompt())[1]
    with attach(model, RandomSelector(), SMALL) as run:
        sparse = generate(model, prompt())[1]
        made = duplicate(model)
        calls = run.receipt.decode_calls
        assert torch.equal(generate(made, prompt())[1], dense)
        assert run.receipt.decode_calls == calls  # the copy writes into nobody's receipt
    assert torch.equal(generate(made, prompt())[1], dense)
    with attach(made, RandomSelector(), SMALL) as other:  # a model like any other
        assert torch.equal(generate(made, prompt())[1], sparse)
    assert other.receipt.decode_calls == calls
    assert made.config._attn_implementation == attention
    assert torch.equal(generate(made, prompt())[1], dense)


def test_detach_cleans_a_copy():
    model = tiny_model("llama")
    with attach(model, RandomSelector(), SMALL, allow_dense=True):
        made = copy.deepcopy(model)
    hashattn.detach(made)
    assert made.config._attn_implementation == "sdpa"
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in made.modules()) == 0


@pytest.mark.parametrize("other", ["eager", "sdpa"])
def test_another_attention_set_inside_the_block_is_noticed(other):
    model = tiny_model("llama")
    with pytest.raises(AttachmentError, match=f"set to {other!r} while"):
        with attach(model, RandomSelector(), SMALL):
            generate(model, prompt())
            model.set_attn_implementation(other)
            generate(model, prompt())
    assert model.config._attn_implementation == other  # what was asked for last
    with pytest.raises(AttachmentError, match="later calls were not sparse"):
        with attach(model, RandomSelector(), SMALL):
            generate(model, prompt())
            model.set_attn_implementation(other)  # and nothing is called after it
    with attach(model, RandomSelector(), SMALL):
        generate(model, prompt())
    assert model.config._attn_implementation == other


@pytest.mark.parametrize(
    "selector",
    [hash_selector(), OracleSelector(), ResidualSelector(OracleSelector(), 0.5)],
    ids=["hash", "oracle", "residual"],
)
def test_threads_share_an_attached_model(selector):
    """Prompts of different lengths, padded or not, in four threads: each as if it ran alone."""
    model = tiny_model("llama")
    inputs = [
        (prompt(length=40), None),
        (prompt(length=57, seed=2), None),
        left_padded((40, 33, 17)),
        (prompt(batch=2, length=23, seed=4), None),
    ]

    def run(number: int) -> torch.Tensor:
        ids, mask = inputs[number]
        mask = torch.ones_like(ids) if mask is None else mask
        return model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False,
                              output_logits=True, return_dict_in_generate=True)  # fmt: skip

    with attach(model, selector, SMALL, allow_untrained=True) as attached:
        alone = [run(number) for number in range(len(inputs))]
        before = attached.reset_receipt()
        answers, failures = {}, []

        def work(number: int) -> None:
            try:
                for again in range(3):
                    answers[number, again] = run(number)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after = attached.reset_receipt()
    assert not failures
    for (number, _), answer in answers.items():
        assert torch.equal(answer.sequences, alone[number].sequences)
        for made, expected in zip(answer.logits, alone[number].logits, strict=True):
            torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    assert after.sparse_calls == 3 * before.sparse_calls
    assert after.tokens_read == 3 * before.tokens_read
    assert after.dense_reasons["prefill"] == 3 * before.dense_reasons["prefill"]


class Swapped(DynamicCache):
    """Keeps the keys of each of two layers in the other one's slot."""

    def update(self, keys, values, layer_idx, *args, **kwargs):
        return super().update(keys, values, 1 - layer_idx, *args, **kwargs)


@pytest.mark.parametrize("budget", [SMALL, Budget(heavy=1000)], ids=["small", "covering"])
def test_keys_in_another_slot_are_refused(budget):
    """The index would be of other keys; a covering budget would hide it."""
    model = tiny_model("llama")
    dense = model(prompt(), past_key_values=DynamicCache(config=model.config)).logits
    with pytest.raises(UnsupportedModelError, match="another slot"):
        with attach(model, OracleSelector(), budget):
            model(prompt(), past_key_values=Swapped(config=model.config))
    again = model(prompt(), past_key_values=Swapped(config=model.config)).logits
    assert torch.equal(again, dense)


def test_a_looped_family_of_transformers_is_refused():
    config = transformers.AutoConfig.for_model(
        "hrm_text", vocab_size=128, hidden_size=64, intermediate_size=96, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModelError, match="looped"):
        with attach(model, OracleSelector(), SMALL):
            generate(model, prompt(), max_new_tokens=4)
