"""Shapes and arithmetic of hash maps, and the linear hash that training starts from."""

import pytest
import torch

from hashattn.hashing.initial import interaction_directions, moments, second_moment, spectral_maps
from hashattn.hashing.maps import HashConfig, LayerMaps, expected_shapes, random_maps
from hashattn.kernels import encode, unpack_bits

LAYOUTS = ("per_kv_head", "per_query_head")


def config(**fields):
    return HashConfig(
        **{"layers": (0,), "query_heads": 4, "kv_heads": 2, "head_dim": 16, "hidden": 24, **fields}
    )


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("bits", [32, 64, 96])
def test_codes_are_the_signs_of_a_plain_mlp_per_head(layout, depth, bits):
    shapes = config(layout=layout, depth=depth, bits=bits)
    maps = random_maps(shapes, torch.Generator().manual_seed(1))
    keys, queries = draw(3, 2, 7, 16), draw(3, 4, 5, 16, seed=2)
    key_codes, query_codes = encode(keys, maps.key), encode(queries, maps.query)
    assert key_codes.shape == (3, shapes.key_maps, 7, bits // 32)
    assert query_codes.shape == (3, 4, 5, bits // 32)
    assert key_codes.dtype == query_codes.dtype == torch.int32

    def mlp(part, head, x):
        for stage in range(depth):
            x = torch.nn.functional.silu(x) if stage else x
            x = torch.nn.functional.linear(x, part.weights[stage][head].T, part.biases[stage][head])
        return x

    for index in range(shapes.key_maps):
        kv_head = index if layout == "per_kv_head" else index // 2
        pre = mlp(maps.key, index, keys[:, kv_head])
        clear = pre.abs() > 1e-5
        assert ((unpack_bits(key_codes[:, index], bits) == (pre > 0)) | ~clear).all()
    for head in range(4):
        pre = mlp(maps.query, head, queries[:, head])
        clear = pre.abs() > 1e-5
        assert ((unpack_bits(query_codes[:, head], bits) == (pre > 0)) | ~clear).all()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bits": 33}, "bits = 33.* multiple of 32"),
        ({"bits": 0}, "bits = 0"),
        ({"depth": 4}, "depth = 4.* 1, 2 or 3"),
        ({"kv_heads": 3}, "kv_heads = 3.* divisor of query_heads"),
        ({"layout": "per_head"}, "layout = 'per_head'.* per_kv_head or per_query_head"),
        ({"layers": ()}, "layers = "),
        ({"layers": (1, 1)}, "layers = "),
        ({"activation": "sine"}, "activation = 'sine'"),
        ({"hidden": 0}, "hidden = 0"),
        ({"head_dim": 0}, "head_dim = 0"),
        ({"head_dim": 64.0}, "head_dim = 64.0"),
        ({"depth": True}, "depth = True"),
        ({"bits": "32"}, "bits = '32'"),
        ({"layers": "01"}, "layers = '01'"),
        ({"layers": (0.5,)}, r"layers = \(0.5,\)"),
        ({"layers": 2}, "layers = 2"),
    ],
)
def test_an_impossible_config_names_field_value_and_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_folding_the_normalisation_keeps_the_map():
    maps = random_maps(config(), torch.Generator().manual_seed(3))
    x = draw(2, 50, 16) * 5 + 3
    mean, std = moments([x[:, :20], x[:, 20:]])
    expected = maps.key((x - mean[:, None]) / std[:, None])
    assert torch.allclose(maps.key.fold_input(mean, std)(x), expected, atol=1e-4)


def test_moments_do_not_blow_up_a_constant_channel():
    x = draw(2, 50, 16)
    x[..., 3] = 7.0
    mean, std = moments([x])
    assert torch.allclose(mean, x.mean(1))
    assert torch.allclose(std[:, :3], x.std(1, correction=0)[:, :3])
    assert (std[:, 3] > 1e-4).all()


def test_tensor_names_round_trip():
    shapes = config(layout="per_query_head", depth=2)
    maps = random_maps(shapes, torch.Generator().manual_seed(0))
    tensors = dict(maps.tensors())
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected_shapes(shapes)
    again = LayerMaps.from_tensors(tensors, shapes)
    keys = draw(2, 9, 16)
    assert torch.equal(encode(keys, again.key), encode(keys, maps.key))


def test_interaction_directions_reproduce_the_inner_product():
    queries = draw(400, 16) @ torch.diag(torch.linspace(3, 0.2, 16))
    keys = draw(300, 16, seed=1) @ torch.diag(torch.linspace(0.5, 2, 16)) + 4
    centred = keys - keys.mean(0)
    a, b = interaction_directions(second_moment(queries), second_moment(centred))
    assert torch.allclose((queries @ a) @ (centred @ b).T, queries @ centred.T, atol=2e-2)
    sizes = ((queries @ a).square().mean(0) * (centred @ b).square().mean(0)).sqrt()
    assert (sizes[:-1] >= sizes[1:] * 0.99).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("depth, hidden", [(1, 24), (2, 32), (3, 32)])
def test_spectral_maps_start_as_a_linear_hash_of_query_and_key(layout, depth, hidden):
    shapes = config(layout=layout, depth=depth, hidden=hidden, bits=512)
    queries, keys = draw(4, 200, 16) + 0.5, draw(2, 300, 16, seed=1) * 2 + 1
    q_stats, k_stats = moments([queries]), moments([keys])
    maps = spectral_maps(queries, keys, q_stats, k_stats, shapes, torch.Generator().manual_seed(0))
    q = (queries - q_stats[0][:, None]) / q_stats[1][:, None]
    k = (keys - k_stats[0][:, None]) / k_stats[1][:, None]
    query_bits = maps.query(q).sign()
    key_bits = maps.preactivations_keys(k).sign()
    for head in range(4):
        key_map = head // 2 if layout == "per_kv_head" else head
        agreement = query_bits[head] @ key_bits[key_map].T
        exact = queries[head] @ (keys[head // 2] - keys[head // 2].mean(0)).T
        correlation = torch.corrcoef(torch.stack([agreement.flatten(), exact.flatten()]))[0, 1]
        assert correlation > 0.85
