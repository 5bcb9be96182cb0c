"""Packing and scoring of codes, against Python integers."""

import pytest
import torch

from hashattn.kernels import hamming_scores, pack_bits, unpack_bits
from kernel_inputs import random_codes

BACKENDS = ("reference", "numpy")


@pytest.mark.parametrize(
    ("unit", "word", "value"),
    [(0, 0, 1), (1, 0, 2), (30, 0, 2**30), (31, 0, -(2**31)), (32, 1, 1), (63, 1, -(2**31))],
)
def test_unit_zero_is_the_least_significant_bit(unit, word, value):
    preactivations = torch.full((64,), -1.0)
    preactivations[unit] = 0.5
    expected = torch.zeros(2, dtype=torch.int32)
    expected[word] = value
    assert torch.equal(pack_bits(preactivations), expected)


def test_zero_is_not_set():
    assert pack_bits(torch.zeros(32)).item() == 0


@pytest.mark.parametrize("bits", [32, 64, 96])
def test_unpack_inverts_pack(bits):
    preactivations = torch.randn(2, 3, 5, bits, generator=torch.Generator().manual_seed(bits))
    codes = pack_bits(preactivations)
    assert codes.dtype == torch.int32 and codes.shape == (2, 3, 5, bits // 32)
    assert torch.equal(unpack_bits(codes, bits), preactivations > 0)


def test_bits_must_fill_words():
    with pytest.raises(ValueError, match="bits = 33"):
        pack_bits(torch.zeros(4, 33))
    with pytest.raises(ValueError, match="bits = 0"):
        pack_bits(torch.zeros(4, 0))
    with pytest.raises(ValueError, match="must be 32"):
        unpack_bits(torch.zeros(4, 1, dtype=torch.int32), 64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "q_len", "n", "words"),
    [(1, 4, 2, 1, 37, 1), (2, 4, 4, 3, 11, 2), (2, 6, 2, 2, 1, 3), (1, 3, 1, 1, 8, 32)],
)
def test_scores_count_matching_bits_of_the_group(backend, batch, heads, key_heads, q_len, n, words):
    queries = random_codes(batch, heads, q_len, words, seed=0)
    keys = random_codes(batch, key_heads, n, words, seed=1)
    scores = hamming_scores(queries, keys, backend=backend)
    assert scores.dtype == torch.int32 and scores.shape == (batch, key_heads, q_len, n)
    group = heads // key_heads
    for b, h, row, token in torch.cartesian_prod(
        *(torch.arange(size) for size in (batch, key_heads, q_len, n))
    ).tolist():
        expected = 0
        for head in range(h * group, (h + 1) * group):
            for word in range(words):
                mixed = queries[b, head, row, word].item() ^ keys[b, h, token, word].item()
                expected += 32 - (mixed & 0xFFFFFFFF).bit_count()
        assert scores[b, h, row, token] == expected


def test_scores_of_sliced_codes():
    """Cropped caches hand over views that are not contiguous."""
    queries = random_codes(2, 4, 1, 4, seed=0)
    keys = random_codes(2, 2, 20, 4, seed=1)[:, :, :13]
    expected = hamming_scores(queries, keys.contiguous(), backend="reference")
    assert torch.equal(hamming_scores(queries, keys, backend="numpy"), expected)


def test_mismatched_codes_are_refused():
    with pytest.raises(ValueError, match="same bits"):
        hamming_scores(random_codes(1, 2, 1, 1, seed=0), random_codes(1, 2, 5, 2, seed=0))
    with pytest.raises(ValueError, match="multiple"):
        hamming_scores(random_codes(1, 4, 1, 1, seed=0), random_codes(1, 3, 5, 1, seed=0))
    with pytest.raises(ValueError, match="int32"):
        hamming_scores(random_codes(1, 2, 1, 1, seed=0).long(), random_codes(1, 2, 5, 1, seed=0))
    with pytest.raises(ValueError, match="backend = 'gpu'"):
        codes = random_codes(1, 2, 1, 1, seed=0)
        hamming_scores(codes, codes, backend="gpu")
