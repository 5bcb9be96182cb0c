"""Graded query codes: weights of a query's bits, and selection by them, in Python integers."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from hashattn import kernels
from hashattn.kernels import grade_step, pack_bits, unpack_bits
from kernel_inputs import BACKENDS, random_codes
from on_device import on_device

grade_bits, hamming_scores, select_by_codes = map(
    on_device, (kernels.grade_bits, kernels.hamming_scores, kernels.select_by_codes)
)


def real_bits(batch, lists, rows, words):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, lists, rows, 32 * words, generator=generator)


def weights_of(row, planes, most):
    """Shares of the largest in float32, the rest in whole numbers."""
    sizes = [abs(np.float32(x)) for x in row]
    largest = max(max(sizes), np.finfo(np.float32).tiny)
    shares = [int(np.rint(size / largest * np.float32(65535))) for size in sizes]
    total = max(sum(shares), 1)
    room = min(256 * most - 128 * len(row), 256 * (2**planes - 1) * total // 65535)
    return [int(Fraction(share * room, 256 * total) + Fraction(1, 2)) for share in shares]


def score(query, key, planes, most):
    """Sum of the weights of the bits in which a query (floats) and a key (words) agree."""
    total = 0
    for i, weight in enumerate(weights_of(query, planes, most)):
        bit = (key[i // 32] >> (i % 32)) & 1
        total += weight * (bit == (query[i] > 0))
    return total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("planes", "most"), [(1, 64), (3, 255), (5, 255), (8, 255), (8, 4000)])
def test_grades_hold_signs_and_the_digits_of_weights(backend, planes, most):
    real = real_bits(2, 3, 1, 2)
    real[0, 0], real[0, 1, 0, 7] = 0.0, 40.0  # nothing, and one that is nearly all there is
    codes = grade_bits(real, planes, most, backend=backend)
    assert codes.shape == (2, 3, 1, 2, 1 + planes) and codes.dtype == torch.int32
    assert torch.equal(codes[..., 0], pack_bits(real))
    for b in range(2):
        for h in range(3):
            wanted = weights_of(real[b, h, 0].tolist(), planes, most)
            assert sum(wanted) <= most and max(wanted) < 2**planes
            for i, weight in enumerate(wanted):
                digits = codes[b, h, 0, i // 32, 1:].tolist()
                found = sum(((digit >> (i % 32)) & 1) << p for p, digit in enumerate(digits))
                assert found == weight


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lists", "code_heads", "rows", "n", "words", "planes", "most"),
    [(2, 2, 1, 70, 1, 5, 255), (4, 2, 2, 65, 1, 1, 32), (6, 2, 1, 130, 4, 6, 1023),
     (3, 3, 1, 64, 2, 4, 255), (2, 1, 1, 33, 1, 2, 255), (2, 1, 1, 33, 10, 8, 4000),
     (2, 1, 1, 99, 2, 8, 64)],
)  # fmt: skip
def test_selects_by_weighted_bits(backend, lists, code_heads, rows, n, words, planes, most):
    real = real_bits(2, lists, rows, words)
    real[0, 0, 0, 1:] = 0  # one bit decides: many ties
    keys = random_codes(2, code_heads, n, words, seed=1)
    codes = grade_bits(real, planes, most)
    heavy = torch.tensor([[[7]], [[n // 2]]]).expand(2, 1, rows)
    scores = hamming_scores(codes, keys, backend=backend)
    made = select_by_codes(codes, keys, heavy, 2, 3, most=most, backend=backend)
    assert torch.equal(made, select_by_codes(codes, keys, heavy, 2, 3, backend=backend))
    for b in range(2):
        for line in range(lists):
            for row in range(rows):
                own = [score(real[b, line, row].tolist(), key, planes, most)
                       for key in keys[b, line * code_heads // lists].tolist()]  # fmt: skip
                assert scores[b, line, row].tolist() == own
                seen = n - rows + row + 1
                free = sorted(range(2, seen - 3), key=lambda t: (-own[t], t))[: heavy[b, 0, row]]
                wanted = sorted({0, 1, seen - 3, seen - 2, seen - 1} | set(free))
                assert [t for t in made[b, line, row].tolist() if t >= 0] == wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_more_than_float32_can_count(backend):
    """Eight planes of 67,200 bits: sums beyond 2^24, of which float32 has the even ones alone."""
    words, planes = 2100, 8
    codes, keys = (random_codes(1, 1, *s, seed=1) for s in ((1, words, 1 + planes), (12, words)))
    codes[..., 0], codes[..., -1] = -1, -1  # all positive, and heavy
    keys[:, :, :6] = -1  # all bits agree, but for one each
    keys[0, 0, torch.arange(6), torch.arange(6)] ^= 1
    weights = sum(unpack_bits(codes[..., 1 + j], 32 * words).long() << j for j in range(planes))
    own = (weights[0, 0] * unpack_bits(keys[0, 0], 32 * words)).sum(dim=-1)
    assert own.max() > 2**23
    scores = hamming_scores(codes, keys, backend=backend)
    assert scores.flatten().tolist() == own.tolist()
    made = select_by_codes(codes, keys, 5, 0, 1, backend=backend)
    free = sorted(range(11), key=lambda t: (-own[t].item(), t))[:5]
    assert made.flatten().tolist() == [*sorted(free), 11]


def test_invalid_grades():
    with pytest.raises(ValueError, match="planes = 9"):
        grade_bits(torch.zeros(1, 32), 9)
    with pytest.raises(ValueError, match="most = 63: must be an integer in 64..65535"):
        grade_bits(torch.zeros(1, 64), 5, 63)
    with pytest.raises(ValueError, match="bits = 40"):
        grade_bits(torch.zeros(1, 40))
    keys, codes = random_codes(1, 2, 9, 1), grade_bits(torch.ones(1, 4, 1, 32))
    with pytest.raises(ValueError, match="must be 4, one for each graded"):
        select_by_codes(codes, keys, 1, 0, 1, lists=2)
    with pytest.raises(ValueError, match="at least one plane"):
        select_by_codes(codes[..., :1], keys, 1, 0, 1)
    with pytest.raises(ValueError, match="same bits"):
        select_by_codes(grade_bits(torch.ones(1, 4, 1, 64)), keys, 1, 0, 1)


@pytest.mark.parametrize(("bits", "planes", "most"), [(32, 5, 255), (64, 5, 255), (128, 6, 1023)])
@pytest.mark.parametrize("shape", ["even", "peaked"])  # which of the two bounds holds
def test_a_step_is_what_a_unit_of_weight_stands_for(bits, planes, most, shape):
    sizes = torch.rand(3, bits, generator=torch.Generator().manual_seed(bits)) + 0.2
    if shape == "peaked":
        sizes[:, 1:] /= 40
    signs = torch.where(torch.arange(bits) % 2 == 0, 1.0, -1.0)
    graded = grade_bits(sizes * signs, planes, most)
    weights = sum(unpack_bits(graded[..., 1 + p], bits).long() << p for p in range(planes))
    step = grade_step(sizes * signs, planes, most)
    assert ((weights * step[:, None] - sizes).abs() <= 0.52 * step[:, None]).all()
