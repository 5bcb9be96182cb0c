"""The interval of a share, by the equation that defines its ends."""

import math

import pytest

from hashattn.evaluation.statistics import wilson


@pytest.mark.parametrize(("count", "of"), [(0, 1), (1, 1), (3, 20), (900, 23040), (20, 20)])
def test_ends_are_as_far_as_their_own_spread_allows(count, of):
    low, high = wilson(count, of)
    assert 0 <= low <= count / of <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(count / of - end) == pytest.approx(
                1.959964 * math.sqrt(end * (1 - end) / of)
            )
    wider = wilson(count, of, confidence=0.99)
    assert wider[0] <= low + 1e-12 and high <= wider[1] + 1e-12


def test_bad_input():
    for arguments, match in [
        ((1, 0), "of = 0"),
        ((3, 2), "count = 3"),
        ((0, 2, 1.0), "confidence"),
    ]:
        with pytest.raises(ValueError, match=match):
            wilson(*arguments)
