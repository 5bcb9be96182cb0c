"""Hash weights know the model they were made for, and say how another one differs."""

import json
import warnings

import pytest
import torch
from torch import nn

from hashattn import Budget, HashSelector, attach, make_selector
from hashattn.base.errors import HashWeightsError
from hashattn.hashing import HashWeights, TrainRecipe, renew_card, train_hash_weights
from hashattn.hashing.weight_files import CONFIG_FILE, MAPS_FILE
from hashattn.models.identity import base_model_record
from helpers import generate, prompt, tiny_config, tiny_model


def made_for(model, folder):
    """Hash weights in `folder` that claim to be trained on `model`."""
    weights = HashWeights.for_model(model, hidden=8)
    HashWeights(weights.config, weights.maps, weights.card | {"trained": True}).save(folder)
    return folder


def weight(model, name):
    """The one parameter of `model` whose name ends so."""
    return next(p for n, p in model.named_parameters() if n.endswith(name))


def noise(p):
    p.normal_()


def one_row_doubled(p):
    p[1] *= 2


def one_element(p):
    p.view(-1)[-2] += 0.5


def low_rank(p):
    """What merging an adapter of rank 1 adds."""
    p += 0.02 * torch.outer(torch.randn(p.shape[0]), torch.randn(p.shape[1]))


CHANGES = [
    ("llama", "1.self_attn.q_proj.weight", noise, [1]),
    ("llama", "0.self_attn.k_proj.weight", noise, [0]),
    ("llama", "1.self_attn.k_proj.weight", one_row_doubled, [1]),
    ("llama", "0.self_attn.q_proj.weight", one_element, [0]),
    ("llama", "1.self_attn.q_proj.weight", low_rank, [1]),
    ("llama", "0.input_layernorm.weight", one_element, [0]),
    ("qwen2", "1.self_attn.k_proj.bias", one_element, [1]),
    ("qwen3", "1.self_attn.q_norm.weight", one_element, [1]),
    ("qwen3", "0.self_attn.k_norm.weight", noise, [0]),
    ("gemma2", "1.self_attn.q_proj.weight", one_row_doubled, [1]),
    ("phi3", "1.self_attn.qkv_proj.weight", one_row_doubled, [1]),
    ("gpt_neox", "0.attention.query_key_value.weight", one_element, [0]),
    ("gpt_neox", "1.attention.query_key_value.bias", noise, [1]),
]


@pytest.mark.parametrize(("family", "name", "change", "layers"), CHANGES)
def test_a_model_of_other_queries_or_keys_is_refused(tmp_path, family, name, change, layers):
    model = tiny_model(family)
    made_for(model, tmp_path)
    assert HashWeights.load(tmp_path, model).forced == ()
    with torch.no_grad():
        change(weight(model, name))
    said = f"projections or norms of layer {layers[0]} \\(fine-tuned or merged adapter.*force=True"
    with pytest.raises(HashWeightsError, match=said):
        HashWeights.load(tmp_path, model)


def test_every_layer_that_differs_is_named(tmp_path):
    model = tiny_model("llama")
    made_for(model, tmp_path)
    with torch.no_grad():
        for layer in model.model.layers:
            noise(layer.self_attn.q_proj.weight)
            noise(layer.self_attn.k_proj.weight)
    with pytest.raises(HashWeightsError, match="norms of layers 0, 1 "):
        HashWeights.load(tmp_path, model)


@pytest.mark.parametrize("name", ["v_proj.weight", "o_proj.weight", "down_proj.weight"])
def test_what_makes_neither_queries_nor_keys_does_not_matter(tmp_path, name):
    model = tiny_model("llama")
    made_for(model, tmp_path)
    with torch.no_grad():
        noise(weight(model, name))
    HashWeights.load(tmp_path, model)


def test_another_dtype_is_the_same_model(tmp_path):
    made_for(tiny_model("qwen3"), tmp_path)
    HashWeights.load(tmp_path, tiny_model("qwen3", torch.bfloat16))


def with_config(family, **changes):
    """A model with the weights of tiny_model(family) and another configuration."""
    model, config = tiny_model(family), tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("family", "first", "then", "said"),
    [
        ("llama", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_the"),
        ("llama", {}, {"rope_parameters": YARN}, "rope_parameters.*'yarn'"),
        (
            "llama",
            {"rope_parameters": YARN},
            {"rope_parameters": YARN, "max_position_embeddings": 1024},
            "max_position_embeddings 512 in the card, 1024 in the model",
        ),
        (
            "gpt_neox",
            {},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                 "partial_rotary_factor": 0.5}},
            "rope_parameters.*0.25.*0.5",
        ),
        (
            "gemma3",
            {},
            {"rope_parameters": {k: {"rope_type": "default", "rope_theta": 1e4}
                                 for k in ("sliding_attention", "full_attention")}},
            "rope_parameters.*1000000.0",
        ),
        ("gemma2", {}, {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 2.0 in the card"),
        ("gemma2", {}, {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 16 in the card, 64"),
        ("llama", {}, {"rms_norm_eps": 1e-3}, "rms_norm_eps"),
    ],
)  # fmt: skip
def test_other_settings_of_rope_and_logits_are_refused_by_name(tmp_path, family, first, then, said):
    made_for(with_config(family, **first), tmp_path)
    HashWeights.load(tmp_path, with_config(family, **first))
    with pytest.raises(HashWeightsError, match=said):
        HashWeights.load(tmp_path, with_config(family, **then))


def test_more_positions_do_not_matter_where_rope_does_not_depend_on_them(tmp_path):
    made_for(tiny_model("llama"), tmp_path)
    HashWeights.load(tmp_path, with_config("llama", max_position_embeddings=4096))


class Adapted(nn.Module):
    """A linear layer as PEFT wraps it for LoRA."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        rank, name = 2, "default"
        self.lora_A = nn.ModuleDict({name: nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({name: nn.Linear(rank, base_layer.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_an_adapter_on_queries_is_named_and_one_on_values_does_not_matter(tmp_path):
    model = tiny_model("llama")
    made_for(model, tmp_path)
    attention = model.model.layers[1].self_attn
    attention.v_proj = Adapted(attention.v_proj)
    HashWeights.load(tmp_path, model)
    attention.q_proj = Adapted(attention.q_proj)
    with pytest.raises(HashWeightsError, match=r"layer 1 \(an adapter in layer 1\)"):
        HashWeights.load(tmp_path, model)
    assert HashWeights.load(tmp_path, model, force=True).forced


def fine_tuned():
    model = tiny_model("llama")
    with torch.no_grad():
        low_rank(model.model.layers[1].self_attn.k_proj.weight)
    return model


def test_force_accepts_and_every_record_says_so(tmp_path):
    made_for(tiny_model("llama"), tmp_path)
    model = fine_tuned()
    weights = HashWeights.load(tmp_path, model, force=True)
    assert len(weights.forced) == 1 and "layer 1 (fine-tuned" in weights.forced[0]
    assert weights.rounded().forced == weights.forced
    expected = list(weights.forced)
    selector = HashSelector(weights)
    assert selector.record()["forced"] == expected
    wrapped = make_selector("residual", base=selector)
    assert wrapped.record()["parameters"]["base"]["forced"] == expected
    with attach(model, selector, Budget(sink=1, local=3, heavy=6)) as run:
        generate(model, prompt())
    assert json.loads(run.receipt.to_json())["method"]["forced"] == expected
    usual = HashWeights.load(tmp_path, tiny_model("llama"), force=True)  # nothing to force
    assert usual.forced == () and "forced" not in HashSelector(usual).record()


def test_force_does_not_accept_other_shapes_or_damaged_files(tmp_path):
    made_for(tiny_model("llama"), tmp_path)
    with pytest.raises(ValueError, match="force=True accepts a model"):
        HashWeights.load(tmp_path, force=True)
    with pytest.raises(HashWeightsError, match="kv_heads 2, the model has 1"):
        HashWeights.load(tmp_path, tiny_model("llama_mqa"), force=True)
    (tmp_path / MAPS_FILE).write_bytes(b"")
    with pytest.raises(HashWeightsError, match="damaged"):
        HashWeights.load(tmp_path, tiny_model("llama"), force=True)


def test_training_goes_on_from_forced_weights_for_the_fine_tuned_model(tmp_path):
    made_for(tiny_model("llama"), tmp_path / "start")
    model, sequences = fine_tuned(), [(prompt(length=96)[0], torch.arange(60, 96, 3))] * 2
    recipe = TrainRecipe.signs().vary(steps=2, rows_per_step=8, top=8)
    settings = dict(recipe=recipe, hidden=8, progress=False)
    unchecked = HashWeights.load(tmp_path / "start")
    with pytest.raises(ValueError, match="start does not serve this model.*layer 1"):
        train_hash_weights(model, sequences, start=unchecked, out_dir=tmp_path / "a", **settings)
    start = HashWeights.load(tmp_path / "start", model, force=True)
    train_hash_weights(model, sequences, start=start, out_dir=tmp_path / "b", **settings)
    trained = HashWeights.load(tmp_path / "b", model)
    assert trained.forced == () and trained.card["started_from"]["forced"] == list(start.forced)


def old_card(folder):
    """Leaves in a card what it said before projections had fingerprints."""
    record = json.loads((folder / CONFIG_FILE).read_text())
    for name in ("projections", "settings", "unread"):
        record["card"]["base_model"].pop(name)
    (folder / CONFIG_FILE).write_text(json.dumps(record))


def test_an_old_card_loads_with_one_warning_and_is_renewed(tmp_path):
    model = tiny_model("llama")
    model.config._name_or_path = "org/model"
    sha256, maps = HashWeights.load(made_for(model, tmp_path)).sha256, tmp_path / MAPS_FILE
    before, content = json.loads((tmp_path / CONFIG_FILE).read_text()), maps.read_bytes()
    old_card(tmp_path)
    with pytest.warns(UserWarning, match="no fingerprints.*renew_card") as told:
        HashWeights.load(tmp_path, model)
    assert len(told) == 1 and told[0].filename == __file__
    with pytest.raises(HashWeightsError, match="weights_fingerprint"):
        renew_card(tmp_path, tiny_model("llama", seed=1))
    model.config._name_or_path = "copy"
    assert renew_card(tmp_path, model).sha256 == sha256
    assert json.loads((tmp_path / CONFIG_FILE).read_text()) == before
    assert maps.read_bytes() == content
    HashWeights.load(tmp_path, model)
    with pytest.raises(HashWeightsError, match="layer 1"):
        HashWeights.load(tmp_path, fine_tuned())
    with pytest.raises(HashWeightsError, match="layer 1"):  # a card is not renewed to fit
        renew_card(tmp_path, fine_tuned())


class Packed(nn.Module):
    """A linear layer whose weight is packed into a buffer, as GPTQ and AWQ do."""

    def __init__(self, base):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(base.weight.shape, dtype=torch.int32))


def quantised(model, how):
    for layer in model.model.layers[1:]:
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(layer.self_attn, name)
            if how == "packed":
                setattr(layer.self_attn, name, Packed(linear))
            else:
                linear.weight = nn.Parameter(linear.weight.to(how), requires_grad=False)
    return model


@pytest.mark.parametrize("how", ["packed", torch.int8, torch.float8_e4m3fn])
def test_quantised_projections_are_told_and_not_compared(tmp_path, how):
    model = quantised(tiny_model("qwen3"), how)
    record = base_model_record(model)
    assert record["unread"] == {"1": "quantised"} and list(record["projections"]) == ["0"]
    made_for(tiny_model("qwen3"), tmp_path / "plain")
    with pytest.warns(UserWarning, match="could not be compared.*layer 1 quantised in the model"):
        HashWeights.load(tmp_path / "plain", model)
    made_for(model, tmp_path / "quantised")
    with pytest.warns(UserWarning, match="layer 1 quantised in the card"):
        HashWeights.load(tmp_path / "quantised", tiny_model("qwen3"))
    with pytest.raises(HashWeightsError, match="cannot be read.*'1': 'quantised'"):
        renew_card(tmp_path / "plain", model)
    with torch.no_grad():
        noise(model.model.layers[0].self_attn.k_proj.weight)  # the others are
    with pytest.warns(UserWarning), pytest.raises(HashWeightsError, match="norms of layer 0"):
        HashWeights.load(tmp_path / "plain", model)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_projections_are_fetched_and_compared(tmp_path, place):
    accelerate = pytest.importorskip("accelerate")
    made_for(tiny_model("qwen3"), tmp_path)

    def offloaded(model):
        if place == "cpu":
            return accelerate.cpu_offload(model)
        return accelerate.disk_offload(model, str(tmp_path / str(id(model))))

    model, changed = offloaded(tiny_model("qwen3")), tiny_model("qwen3")
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    HashWeights.load(tmp_path, model)
    with torch.no_grad():
        one_element(changed.model.layers[1].self_attn.k_norm.weight)
    with pytest.raises(HashWeightsError, match="norms of layer 1 "):
        HashWeights.load(tmp_path, offloaded(changed))


@pytest.mark.parametrize(("parts", "said"), [("", "layers 0, 1"), ("layers.1", "layer 1")])
def test_projections_that_are_not_at_hand_are_told_and_not_compared(tmp_path, parts, said):
    model = tiny_model("llama")
    made_for(model, tmp_path)
    model.model.get_submodule(parts).to("meta")
    with pytest.warns(UserWarning, match=f"not be compared.*{said} offloaded in the model"):
        HashWeights.load(tmp_path, model)


def test_nothing_is_warned_of_where_all_was_compared(tmp_path):
    made_for(tiny_model("phi3"), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HashWeights.load(tmp_path, tiny_model("phi3"))
