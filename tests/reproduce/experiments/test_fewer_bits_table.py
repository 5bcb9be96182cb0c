"""Notebook 04's table of keys and values in fewer bits, and tokens of a gigabyte by hand."""

import pandas as pd
import pytest

from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments import fewer_bits
from hashattn.reproduce.profiles import load_profile
from hashattn.selectors import make_selector


def test_tokens_of_a_gigabyte_of_llama_by_hand():
    # 32 layers of 8 KV heads: 256 rows a token, of 512, 2 * 128 + 4 and 2 * 64 + 4 bytes; 4 of code
    sizes = {16: 256 * 516, 8: 256 * 264, 4: 256 * 136}
    expected = {bits: 1e9 / size for bits, size in sizes.items()}
    assert fewer_bits.tokens_of_a_gigabyte().to_dict() == pytest.approx(expected)


def test_fewer_bits_cost_more_and_little(monkeypatch):
    profile = load_profile("tiny")
    model, tokenizer = load_model(profile)
    for name, value in {
        "_POSITIONS": 24, "_CAPTURED": 8, "_FRACTIONS": (8,), "_KINDS": ("documentation",),
        "_KEPT": ((16, 0), (8, 0), (4, 64), (4, 0)),
    }.items():  # fmt: skip
        monkeypatch.setattr(fewer_bits, name, value)
    selector = make_selector("oracle")
    table = fewer_bits.fewer_bits_table(profile, model, tokenizer, selector, [512])
    kept = [(16, 0), (8, 0), (4, 64), (4, 0)]
    assert list(table.index) == [(512, 8, *each) for each in kept]
    added = table["added_error"].tolist()
    assert added == sorted(added) and added[1] < 0.02 and added[3] < 0.2
    kl = table["kl"].tolist()
    assert kl[0] / 2 < kl[1] < 2 * kl[0] and kl[2] < kl[3]
    shapes = model.config
    rows = shapes.num_hidden_layers * shapes.num_key_value_heads
    width = 2 * shapes.head_dim
    assert table["bytes"].tolist() == [
        rows * size for size in (2 * width, width + 4, *2 * [width // 2 + 4])
    ]
    compared = fewer_bits.by_error(table)
    assert compared["output_error / 16 bits"].iloc[0] == 1
    pd.testing.assert_series_equal(compared["kl / 16 bits"], table["kl"] / kl[0], check_names=False)
