"""What a configuration says of weights and cache, against counts by hand and real models."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hashattn.base.errors import UnsupportedModelError
from hashattn.base.repository import repository
from hashattn.pilot.capacity.shapes import ModelShape, ShapeError, model_shape, read_config
from helpers import FAMILIES, tiny_config, tiny_model

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "dtype": "bfloat16", "max_position_embeddings": 131072,
}  # fmt: skip


@pytest.fixture
def shape_of(tmp_path):
    """shape_of(base, **fields): the shape of a config.json with these fields."""

    def shape_of(base=LLAMA_8B, *, weight_bits=None, dtype=None, **fields):
        path = tmp_path / "some-model" / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**base, **fields}))
        config = read_config(str(path.parent))
        return model_shape(config, weight_bits=weight_bits, dtype=dtype)

    return shape_of


def test_llama_3_1_8b(shape_of):
    shape = shape_of()
    assert shape.name == "some-model"
    assert shape.parameters == 8_030_261_248  # as published
    assert shape.weight_bytes == shape.read_bytes(1) == 16_060_522_496
    assert shape.kv_bytes_per_token == 131_072  # 2 x 8 heads x 128 x 2 bytes x 32 layers
    assert shape.code_bytes_per_token(64) == 2048  # 8 bytes x 8 heads x 32 layers
    assert (shape.group, shape.layers, shape.positions) == (4, 32, 131072)


def test_heads_of_their_own_cost_four_times_as_much(shape_of):
    assert shape_of(num_key_value_heads=32).kv_bytes_per_token == 4 * 131_072
    assert shape_of(dtype="float32").kv_bytes_per_token == 2 * 131_072


def test_tied_embeddings_count_once(shape_of):
    table = 128256 * 4096
    assert shape_of(tie_word_embeddings=True).parameters == 8_030_261_248 - table


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_parameters_are_those_of_the_model(family):
    config = tiny_config(family)
    if family == "mistral_sliding":  # no layer of full attention
        with pytest.raises(UnsupportedModelError, match="nothing to make sparse"):
            model_shape(config)
        return
    model = tiny_model(family)
    shape = model_shape(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    past = model(torch.arange(3, 40)[None], use_cache=True).past_key_values
    keys = past.layers[-1].keys  # the last layer has full attention in all of these families
    assert shape.row_bytes == 2 * 2 * keys.shape[1] * keys.shape[3]


def test_layers_with_a_window_keep_no_more_than_it():
    shape = model_shape(tiny_config("gemma2"))  # one layer of 16 tokens, one of all; 2 heads of 16
    row = 2 * 2 * 16 * 2
    assert (shape.full_layers, shape.windows) == (1, (16,))
    assert shape.kv_bytes_per_token == row
    assert [shape.window_bytes(n) for n in (10, 16, 500)] == [10 * row, 16 * row, 16 * row]
    assert shape.full_bytes(500) == 500 * row


def test_a_step_reads_the_experts_that_were_chosen(shape_of):
    shape = shape_of(
        model_type="mixtral", vocab_size=100, hidden_size=8, intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_local_experts=8,
        num_experts_per_tok=2,
    )  # fmt: skip
    experts = 2 * 8 * 3 * 8 * 16  # layers x experts x three matrices
    rest = 2 * 100 * 8 + 8 + 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 8 * 8 + 2 * 8)
    assert (shape.experts, shape.chosen, shape.expert_parameters) == (8, 2, experts)
    assert shape.parameters == rest + experts
    assert shape.read_bytes(1) == 2 * (rest + experts / 4)
    assert shape.read_bytes(2) == 2 * (rest + experts * (1 - 0.75**2))
    assert shape.read_bytes(1000) == pytest.approx(shape.weight_bytes)


@pytest.mark.parametrize(
    "record, bits",
    [
        ({"quant_method": "gptq", "bits": 4}, 4),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "fp8"}, 8),
    ],
)
def test_quantised_weights(shape_of, record, bits):
    shape = shape_of(quantization_config=record)
    kept = 2 * 128256 * 4096 + 65 * 4096  # embedding, output and norms stay in bfloat16
    assert shape.weight_bits == bits
    assert shape.weight_bytes == 2 * kept + (8_030_261_248 - kept) * bits / 8
    assert shape.weight_bytes == shape_of(weight_bits=bits).weight_bytes
    assert shape.kv_bytes_per_token == 131_072


def test_mxfp4_quantises_experts_alone(shape_of):
    shape = shape_of(
        {"model_type": "gpt_oss"}, vocab_size=100, hidden_size=64, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_local_experts=4, num_experts_per_tok=1, dtype="bfloat16",
        quantization_config={"quant_method": "mxfp4"},
    )  # fmt: skip
    rest = shape.parameters - shape.expert_parameters
    assert shape.windows == (128,) and shape.full_layers == 1
    assert shape.weight_bytes == 2 * rest + shape.expert_parameters * 4.25 / 8


def test_counting_allocates_nothing(shape_of, monkeypatch):
    made = []
    original = AutoModelForCausalLM.from_config
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_config",
        lambda *a, **k: made.append(original(*a, **k)) or made[-1],
    )  # fmt: skip
    shape_of(vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    assert all(p.is_meta for model in made for p in model.parameters()) and made


def test_the_embedded_model_and_its_config_file():
    folder = repository() / "data" / "embedded"
    shape = model_shape(read_config(str(folder)))
    assert shape == model_shape(read_config(str(folder / "config.json")))
    assert (shape.name, shape.parameters) == ("embedded", 4_589_824)
    assert shape.kv_bytes_per_token == 2048


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("[1]", "no model_type"),
        ('{"hidden_size": 3}', "no model_type"),
        ('{"model_type": "unheard_of"}', "does not know the model type 'unheard_of'"),
        ('{"model_type": "llama", "hidden_size": "x"}', "no valid llama configuration"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ShapeError, match=message):
        read_config(str(path))


def test_models_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(ShapeError, match="does not exist: give the path"):
        read_config(str(tmp_path))  # no config.json in it
    with pytest.raises(ShapeError, match="does not exist: give a folder"):
        read_config("./no/such/folder")
    with pytest.raises(ShapeError, match="hf download some-org/some-model config.json"):
        read_config("some-org/some-model")
    with pytest.raises(ShapeError, match="GGUF"):
        read_config("some/model.gguf")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "deepseek_v3"}, "latents"),
        ({"model_type": "mamba"}, "no attention heads"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "falcon"}, "outside transformers' AttentionInterface"),
        ({"model_type": "gemma3n_text"}, "several sizes"),
        ({"model_type": "gemma4_text"}, "not the same in all layers"),
    ],
)
def test_models_without_keys_and_values(shape_of, fields, message):
    with pytest.raises((UnsupportedModelError, ShapeError), match=message):
        shape_of({}, **fields)


def test_impossible_sizes_and_settings(shape_of):
    with pytest.raises(ShapeError, match="no causal language model can be built|no valid"):
        shape_of(hidden_size=-1)
    with pytest.raises(ShapeError, match="how many bits"):
        shape_of(quantization_config={"quant_method": "aqlm"})
    with pytest.raises(ValueError, match="dtype = 'int3': must be one of"):
        shape_of(dtype="int3")
    with pytest.raises(ValueError, match="weight_bits = 0.5: must be"):
        shape_of(weight_bits=0.5)
    with pytest.raises(ValueError, match="full_layers = 0: must be"):
        ModelShape("m", "llama", 4, 2, 16, 64, 0, (), 0, 1000, 0)
