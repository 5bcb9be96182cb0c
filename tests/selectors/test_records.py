"""record(): what receipts and results' keys say of a method, field by field and in this order."""

import json

import pytest
import torch
from torch import Tensor

from hashattn.hashing.maps import HashConfig
from hashattn.hashing.weights import HashWeights
from hashattn.selectors import METHODS, make_selector


def filled(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape) / 8


CENTERS = {0: filled(2, 4), 1: filled(2, 4) + 1}
CENTERS_SHA256 = "6d99e03c2bba4cacfb6bacab8f9f80fde67a1866621ab0bdb10581d8cdab96a9"
CHANNELS = {0: torch.tensor([[3, 1], [0, 2]])}
CHANNELS_SHA256 = "76b49c0fbefb8a45ddc05564993a109c71b4abbf5545fa7ddda31ee221279dc2"
HASH = HashWeights.random(HashConfig((0,), 4, 2, 8, "per_kv_head", 32, depth=2, hidden=16), 0)
DIGITS = HashWeights.random(HashConfig((0,), 4, 2, 8, bits=32, depth=1, folds=3), 0)
HASH_OF_QUERY_HEADS = HashWeights.random(
    HashConfig((0,), 4, 2, 8, "per_query_head", 64, depth=3, hidden=16), 0
)
RECORDS = [
    ("dense", {}, {"name": "dense", "parameters": {"kernel": False}, "weights_sha256": None}),
    (
        "dense",
        {"kernel": True},
        {"name": "dense", "parameters": {"kernel": True}, "weights_sha256": None},
    ),
    (
        "oracle",
        {},
        {
            "name": "oracle",
            "parameters": {"layout": "per_query_head", "value_norms": False},
            "weights_sha256": None,
        },
    ),
    (
        "oracle",
        {"layout": "per_kv_head", "value_norms": True},
        {
            "name": "oracle",
            "parameters": {"layout": "per_kv_head", "value_norms": True},
            "weights_sha256": None,
        },
    ),
    (
        "oracle_top_p",
        {},
        {
            "name": "oracle_top_p",
            "parameters": {"p": 0.95, "layout": "per_query_head"},
            "weights_sha256": None,
        },
    ),
    (
        "oracle_top_p",
        {"p": 0.5, "layout": "per_kv_head"},
        {
            "name": "oracle_top_p",
            "parameters": {"p": 0.5, "layout": "per_kv_head"},
            "weights_sha256": None,
        },
    ),
    (
        "window",
        {},
        {
            "name": "window",
            "parameters": {"method": "streaming_llm"},
            "weights_sha256": None,
            "evicts": True,
        },
    ),
    (
        "streaming_llm",
        {},
        {
            "name": "window",
            "parameters": {"method": "streaming_llm"},
            "weights_sha256": None,
            "evicts": True,
        },
    ),
    ("random", {}, {"name": "random", "parameters": {"seed": 0}, "weights_sha256": None}),
    ("random", {"seed": 7}, {"name": "random", "parameters": {"seed": 7}, "weights_sha256": None}),
    (
        "transform",
        {"weights": DIGITS},
        {
            "name": "transform",
            "parameters": {
                "codes": "per_kv_head",
                "bits": 32,
                "depth": 1,
                "scoring": "graded",
                "layout": "per_query_head",
            },
            "weights_sha256": DIGITS.sha256,
        },
    ),
    (
        "rabitq",
        {"weights": DIGITS, "factor": True},
        {
            "name": "rabitq",
            "parameters": {
                "codes": "per_kv_head",
                "bits": 32,
                "depth": 1,
                "scoring": "graded",
                "layout": "per_query_head",
                "factor": True,
            },
            "weights_sha256": DIGITS.sha256,
        },
    ),
    (
        "lsh",
        {},
        {
            "name": "lsh",
            "parameters": {"bits": 32, "seed": 0, "layout": "per_kv_head", "centred": False},
            "weights_sha256": None,
        },
    ),
    (
        "lsh",
        {"bits": 64, "seed": 3, "layout": "per_query_head", "query_heads": 8, "centers": CENTERS},
        {
            "name": "lsh",
            "parameters": {"bits": 64, "seed": 3, "layout": "per_query_head", "centred": True},
            "weights_sha256": CENTERS_SHA256,
        },
    ),
    (
        "double_sparsity",
        {"channels": CHANNELS},
        {
            "name": "double_sparsity",
            "parameters": {
                "channels_per_head": 2,
                "label_bits": 4,
                "channel_layout": "per_query_head",
                "layout": "per_query_head",
            },
            "weights_sha256": CHANNELS_SHA256,
        },
    ),
    (
        "double_sparsity",
        {
            "channels": CHANNELS,
            "label_bits": 16,
            "channel_layout": "per_kv_head",
            "layout": "per_kv_head",
        },
        {
            "name": "double_sparsity",
            "parameters": {
                "channels_per_head": 2,
                "label_bits": 16,
                "channel_layout": "per_kv_head",
                "layout": "per_kv_head",
            },
            "weights_sha256": CHANNELS_SHA256,
        },
    ),
    (
        "quest",
        {},
        {
            "name": "quest",
            "parameters": {"page": 16, "bits": 16, "layout": "per_query_head"},
            "weights_sha256": None,
        },
    ),
    (
        "quest",
        {"page": 4, "bits": 8, "layout": "per_kv_head", "grids": {0: filled(2, 2, 3)}},
        {
            "name": "quest",
            "parameters": {"page": 4, "bits": 8, "layout": "per_kv_head"},
            "weights_sha256": "0ec484f982cb6a5fa85951c70b57019273e4466db77d6fb47c15b9105bad9b62",
        },
    ),
    ("h2o", {}, {"name": "h2o", "parameters": {}, "weights_sha256": None, "evicts": True}),
    (
        "snapkv",
        {},
        {
            "name": "snapkv",
            "parameters": {"window": 32, "kernel": 7, "pooling": "max"},
            "weights_sha256": None,
            "evicts": True,
        },
    ),
    (
        "snapkv",
        {"window": 4, "kernel": 3, "pooling": "avg"},
        {
            "name": "snapkv",
            "parameters": {"window": 4, "kernel": 3, "pooling": "avg"},
            "weights_sha256": None,
            "evicts": True,
        },
    ),
    (
        "infllm",
        {},
        {
            "name": "infllm",
            "parameters": {"block": 128, "representatives": 4, "window": 4096},
            "weights_sha256": None,
            "evicts": False,
        },
    ),
    (
        "infllm",
        {"block": 8, "representatives": 2, "window": 16},
        {
            "name": "infllm",
            "parameters": {"block": 8, "representatives": 2, "window": 16},
            "weights_sha256": None,
            "evicts": False,
        },
    ),
    (
        "socket",
        {},
        {
            "name": "socket",
            "parameters": {
                "tables": 16,
                "hyperplanes": 8,
                "temperature": 0.3,
                "seed": 0,
                "layout": "per_query_head",
                "value_norms": False,
            },
            "weights_sha256": None,
        },
    ),
    (
        "socket",
        {
            "tables": 4,
            "hyperplanes": 3,
            "temperature": 0.5,
            "seed": 2,
            "layout": "per_kv_head",
            "value_norms": True,
        },
        {
            "name": "socket",
            "parameters": {
                "tables": 4,
                "hyperplanes": 3,
                "temperature": 0.5,
                "seed": 2,
                "layout": "per_kv_head",
                "value_norms": True,
            },
            "weights_sha256": None,
        },
    ),
    (
        "hata",
        {"weights": {0: filled(2, 4, 32)}},
        {
            "name": "hata",
            "parameters": {"bits": 32, "key_norm": False},
            "weights_sha256": "d37f79392f0f3a0c9c4d5e497d8de653afd1e855a31bcbe5d2381804eec608cd",
        },
    ),
    (
        "hata",
        {"weights": {0: filled(2, 4, 64)}, "key_norm": True, "trained": False},
        {
            "name": "hata",
            "parameters": {"bits": 64, "key_norm": True},
            "weights_sha256": "7c36daf3483b4dcb25e0e7c75b547543c7b0540d6cfde39a9559530d93a6ce80",
        },
    ),
    (
        "magicpig",
        {},
        {
            "name": "magicpig",
            "parameters": {"bits": 10, "tables": 150, "seed": 0, "centred": False},
            "weights_sha256": None,
        },
    ),
    (
        "magicpig",
        {"bits": 4, "tables": 8, "seed": 5, "centers": CENTERS},
        {
            "name": "magicpig",
            "parameters": {"bits": 4, "tables": 8, "seed": 5, "centred": True},
            "weights_sha256": CENTERS_SHA256,
        },
    ),
    (
        "rerank",
        {"base": make_selector("quest")},
        {
            "name": "rerank",
            "parameters": {
                "factor": 4,
                "value_norms": False,
                "base": {
                    "name": "quest",
                    "parameters": {"page": 16, "bits": 16, "layout": "per_query_head"},
                    "weights_sha256": None,
                },
            },
            "weights_sha256": None,
        },
    ),
    (
        "rerank",
        {"base": make_selector("lsh", centers=CENTERS), "factor": 2, "value_norms": True},
        {
            "name": "rerank",
            "parameters": {
                "factor": 2,
                "value_norms": True,
                "base": {
                    "name": "lsh",
                    "parameters": {"bits": 32, "seed": 0, "layout": "per_kv_head", "centred": True},
                    "weights_sha256": CENTERS_SHA256,
                },
            },
            "weights_sha256": CENTERS_SHA256,
        },
    ),
    (
        "certified",
        {"base": make_selector("quest"), "softcap": 50.0},
        {
            "name": "certified",
            "parameters": {
                "bits": 8,
                "tolerance": 0.1,
                "softcap": 50.0,
                "base": {
                    "name": "quest",
                    "parameters": {"page": 16, "bits": 16, "layout": "per_query_head"},
                    "weights_sha256": None,
                },
            },
            "weights_sha256": None,
        },
    ),
    (
        "residual",
        {"base": make_selector("snapkv")},
        {
            "name": "residual",
            "parameters": {
                "share": 0.5,
                "epsilon": None,
                "delta": None,
                "seed": 0,
                "base": {
                    "name": "snapkv",
                    "parameters": {"window": 32, "kernel": 7, "pooling": "max"},
                    "weights_sha256": None,
                    "evicts": True,
                },
            },
            "weights_sha256": None,
        },
    ),
    (
        "residual",
        {
            "base": make_selector("random", seed=1),
            "share": 0.25,
            "epsilon": 0.1,
            "delta": 0.2,
            "seed": 9,
        },
        {
            "name": "residual",
            "parameters": {
                "share": 0.25,
                "epsilon": 0.1,
                "delta": 0.2,
                "seed": 9,
                "base": {"name": "random", "parameters": {"seed": 1}, "weights_sha256": None},
            },
            "weights_sha256": None,
        },
    ),
    (
        "residual",
        {"base": make_selector("random", seed=1), "proposal": "weights"},
        {
            "name": "residual",
            "parameters": {
                "share": 0.5,
                "epsilon": None,
                "delta": None,
                "seed": 0,
                "proposal": "weights",
                "base": {"name": "random", "parameters": {"seed": 1}, "weights_sha256": None},
            },
            "weights_sha256": None,
        },
    ),
    (
        "sparq",
        {},
        {
            "name": "sparq",
            "parameters": {"channels": 32, "layout": "per_kv_head"},
            "weights_sha256": None,
        },
    ),
    (
        "sparq",
        {"channels": 5, "layout": "per_query_head"},
        {
            "name": "sparq",
            "parameters": {"channels": 5, "layout": "per_query_head"},
            "weights_sha256": None,
        },
    ),
    (
        "loki",
        {"basis": {0: filled(2, 4, 3)}},
        {
            "name": "loki",
            "parameters": {"components": 3, "layout": "per_query_head"},
            "weights_sha256": "d95d8ad237e3378404184a0a138f9bb713b49b687298905ce301a0e73b5e4e10",
        },
    ),
    (
        "loki",
        {"basis": {0: filled(2, 4, 2)}, "layout": "per_kv_head"},
        {
            "name": "loki",
            "parameters": {"components": 2, "layout": "per_kv_head"},
            "weights_sha256": "64899cd59cbd6632390881e8c305f71be07394ea345f2b62a544362fdd3774b8",
        },
    ),
    (
        "pqcache",
        {},
        {
            "name": "pqcache",
            "parameters": {
                "parts": 2,
                "bits": 6,
                "iterations": 10,
                "sink": 4,
                "layout": "per_kv_head",
            },
            "weights_sha256": None,
        },
    ),
    (
        "pqcache",
        {"parts": 4, "bits": 3, "iterations": 0, "sink": 1, "layout": "per_query_head"},
        {
            "name": "pqcache",
            "parameters": {
                "parts": 4,
                "bits": 3,
                "iterations": 0,
                "sink": 1,
                "layout": "per_query_head",
            },
            "weights_sha256": None,
        },
    ),
    (
        "hash",
        {"weights": HASH},
        {
            "name": "hash",
            "parameters": {
                "codes": "per_kv_head",
                "bits": 32,
                "depth": 2,
                "scoring": "graded",
                "layout": "per_query_head",
            },
            "weights_sha256": HASH.sha256,
        },
    ),
    (
        "hash",
        {"weights": HASH, "scoring": "hamming", "layout": "per_kv_head"},
        {
            "name": "hash",
            "parameters": {
                "codes": "per_kv_head",
                "bits": 32,
                "depth": 2,
                "scoring": "hamming",
                "layout": "per_kv_head",
            },
            "weights_sha256": HASH.sha256,
        },
    ),
    (
        "hash",
        {"weights": HASH_OF_QUERY_HEADS, "scoring": "asymmetric"},
        {
            "name": "hash",
            "parameters": {
                "codes": "per_query_head",
                "bits": 64,
                "depth": 3,
                "scoring": "asymmetric",
                "layout": "per_query_head",
            },
            "weights_sha256": HASH_OF_QUERY_HEADS.sha256,
        },
    ),
]


@pytest.mark.parametrize(("name", "settings", "record"), RECORDS)
def test_a_record_is_the_same_to_the_byte(name, settings, record):
    """The literals are of the code that wrote each record by hand: stored results keep their keys.

    As text, since the order of the fields is part of a receipt.
    """
    selector = make_selector(name, **settings)
    assert json.dumps(selector.record()) == json.dumps(record)


def test_every_method_has_its_record_here():
    assert {name for name, _, _ in RECORDS} == {*METHODS}
