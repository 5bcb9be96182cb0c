"""attach and detach: what they change, what they refuse, and what they say."""

import pytest
import torch
import transformers
from torch import nn

from hashattn import Budget, SparsePathError, attach
from hashattn.base.errors import AttachmentError, HashWeightsError, UnsupportedModelError
from hashattn.models.heads import HeadSlice
from hashattn.selectors.dense import DenseSelector
from hashattn.selectors.random import RandomSelector
from helpers import generate, prompt, tiny_model

SMALL = Budget(sink=1, local=3, heavy=6)
TINY = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


class Untrained(RandomSelector):
    name = "untrained"
    trained = False


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fails", [False, True])
def test_detach_restores_the_model(attention, fails):
    model = tiny_model("llama", attention=attention)
    before, config = generate(model, prompt()), model.config.to_json_string()
    if fails:
        with pytest.raises(KeyError), attach(model, RandomSelector(), SMALL):
            raise KeyError("the user's own error, not hidden by a SparsePathError")
    else:
        with attach(model, RandomSelector(), SMALL):
            assert hooks(model) == 3  # of two layers and the model
            generate(model, prompt())
    after = generate(model, prompt())
    assert model.config._attn_implementation == attention
    assert model.config.to_json_string() == config
    assert hooks(model) == 0
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_detach_by_hand_then_attach_again():
    model = tiny_model("llama")
    for _ in range(2):
        run = attach(model, RandomSelector(), SMALL)
        generate(model, prompt())
        run.detach()
        run.detach()  # has nothing left to do
    with pytest.raises(AttachmentError, match="call attach again"), run:
        raise AssertionError("a detached attachment must not be entered")


def test_attaching_twice_is_refused():
    model = tiny_model("llama")
    with attach(model, RandomSelector(), SMALL, allow_dense=True):
        with pytest.raises(AttachmentError, match="detach first"):
            attach(model, RandomSelector(), SMALL)
        with pytest.raises(AttachmentError, match="detach first"):
            attach(model.model, RandomSelector(), SMALL)  # the same layers inside
    assert hooks(model) == 0


def test_covering_budget_raises_on_leaving():
    model = tiny_model("llama")
    with pytest.raises(SparsePathError, match="density 1.0"):
        with attach(model, RandomSelector(), Budget(heavy=1000)):
            generate(model, prompt())
    assert hooks(model) == 0


def test_no_sparse_step_raises_on_leaving():
    model = tiny_model("llama")
    with pytest.raises(SparsePathError, match="'dense_layer': 22"):
        with attach(model, RandomSelector(), SMALL, dense_layers=[0, 1]):
            generate(model, prompt())
    with pytest.raises(SparsePathError, match="no call reached"):
        attach(model, RandomSelector(), SMALL).detach()


def test_reset_receipt_remembers_that_the_run_was_sparse():
    model = tiny_model("llama")
    with attach(model, RandomSelector(), SMALL) as run:
        generate(model, prompt())
        first = run.reset_receipt()
        assert first.decode_calls == 22 and not run.receipt.decode_calls
    assert first.method == run.receipt.method


def test_dense_selector_is_the_model_itself():
    model = tiny_model("llama")
    expected = generate(model, prompt())
    with attach(model, DenseSelector()) as run:
        actual = generate(model, prompt())
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    assert run.receipt.dense_reasons == {"dense_selector": 22, "prefill": 2}
    assert run.receipt.decode_density == 1.0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"selector": "hash"}, ValueError, "selector = 'hash': must be a Selector"),
        ({"budget": None}, ValueError, "budget = None: must be a Budget"),
        ({"sparse_rows": 0}, ValueError, "sparse_rows = 0"),
        ({"dense_layers": [0, 7]}, ValueError, r"dense_layers = \[7\]"),
        ({"selector": Untrained()}, HashWeightsError, "allow_untrained=True"),
    ],
)
def test_invalid_arguments(settings, error, message):
    model = tiny_model("llama")
    with pytest.raises(error, match=message):
        attach(model, **({"selector": RandomSelector(), "budget": SMALL} | settings))
    assert hooks(model) == 0


def test_untrained_weights_can_be_measured_as_a_control():
    model = tiny_model("llama")
    with attach(model, Untrained(), SMALL, allow_untrained=True) as run:
        generate(model, prompt())
    assert run.receipt.is_sparse


@pytest.mark.parametrize(
    ("config", "auto", "message"),
    [
        (transformers.FalconConfig(**TINY), "AutoModelForCausalLM", "outside .*AttentionInterface"),
        (transformers.BloomConfig(**TINY), "AutoModelForCausalLM", "outside .*AttentionInterface"),
        (
            transformers.T5Config(
                vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2
            ),
            "AutoModelForSeq2SeqLM",
            "encoder-decoder",
        ),
        (
            transformers.DeepseekV3Config(
                **TINY,
                num_key_value_heads=2,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
                moe_intermediate_size=16,
                kv_lora_rank=16,
                q_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=8,
            ),
            "AutoModelForCausalLM",
            "MLA",
        ),
    ],
    ids=["falcon", "bloom", "t5", "deepseek_v3"],
)
def test_unsupported_families(config, auto, message):
    model = getattr(transformers, auto).from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=message):
        attach(model, RandomSelector(), SMALL)
    assert model.config._attn_implementation == before


def test_other_attention_kernels_are_refused():
    model = tiny_model("llama", attention="flex_attention")
    with pytest.raises(UnsupportedModelError, match="flex_attention.*sdpa"):
        attach(model, RandomSelector(), SMALL)


def test_wrapped_models_are_refused():
    class Wrapped(nn.Module):
        def get_base_model(self):
            raise AssertionError("only named in the message")

    with pytest.raises(UnsupportedModelError, match="get_base_model"):
        attach(Wrapped(), RandomSelector(), SMALL)


def test_attention_weights_are_refused():
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match="output_attentions"):
        with attach(model, RandomSelector(), SMALL):
            generate(model, prompt(), output_attentions=True)


def test_heads_that_are_not_those_of_the_plan_are_refused(monkeypatch):
    part = HeadSlice(query_heads=4, kv_heads=2, rank=1, ranks=2)
    monkeypatch.setattr("hashattn.attention.attachment.head_slice", lambda model: part)
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match="on rank 1, expected 2 and 1: .*device_map"):
        with attach(model, RandomSelector(), SMALL):
            generate(model, prompt())


def test_training_is_refused():
    model = tiny_model("llama").train()
    with pytest.raises(UnsupportedModelError, match="model.eval"):
        with attach(model, RandomSelector(), SMALL):
            cache = model(prompt()).past_key_values
            model(prompt(length=1), past_key_values=cache)


def test_training_of_whole_sequences_stays_dense():
    model = tiny_model("llama").train()
    with attach(model, RandomSelector(), SMALL, allow_dense=True):
        model(prompt(), labels=prompt()).loss.backward()


def test_continuous_batching_is_refused():
    model = tiny_model("llama")
    with attach(model, RandomSelector(), SMALL, allow_dense=True):
        with pytest.raises(ValueError, match="hash_attention is not supported"):
            model.generate_batch([[5, 6, 7]], generation_config=model.generation_config)


def test_an_attachment_names_its_method():
    model, selector = tiny_model("llama"), RandomSelector()
    with attach(model, selector, SMALL) as run:
        assert run.selector is selector
        generate(model, prompt())
