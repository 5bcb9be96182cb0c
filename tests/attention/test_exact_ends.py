"""Tokens kept as they were beside rows of fewer bits: lists read in two parts against one."""

from functools import partial

import pytest
import torch

from hashattn.attention.exact_ends import ExactEnds
from hashattn.kernels import attend, gather_tokens

LOGITS = {"scaling": 0.3, "softcap": None, "sinks": None}


def states(tokens, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 2, tokens, 16, generator=generator).unbind(0)


def lists_of(n, width, batch=1, seed=0):
    """Ascending tokens, padded at their end, of 4 lists; some without any at an end."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.full((batch, 4, 1, width), -1, dtype=torch.int32)
    for row in range(batch):
        for line in range(4):
            tokens = torch.randperm(n, generator=generator)[: width - line].sort().values
            made[row, line, 0, : len(tokens)] = tokens
    return made


@pytest.mark.parametrize("n", [1, 3, 5, 12, 25, 26, 60, 100])
@pytest.mark.parametrize("sinks", [False, True])
def test_two_parts_give_what_one_gives(n, sinks):
    ends, (keys, values) = ExactEnds(8), states(n, batch=2)
    for start in range(0, n, 7):
        ends.append(keys[:, :, start : start + 7], values[:, :, start : start + 7])
    assert ends.length == n and ends.nbytes <= 2 * 2 * 512 * 2 * 16 * 4
    query, lists = torch.randn(2, 4, 1, 16), lists_of(n, min(n + 2, 20), 2)
    logits = LOGITS | {"sinks": torch.randn(4) if sinks else None}
    logits["log_weights"] = torch.rand(lists.shape)
    outside = partial(_reads, keys, values)
    found, lse = ends.attend(query, lists, outside, return_lse=True, **logits)
    expected, total = attend(query, keys, values, lists, return_lse=True, **logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, total, rtol=1e-4, atol=1e-5)


def _reads(keys, values, query, indices, **logits):
    return attend(query, keys, values, indices, **logits)


def test_the_ends_are_not_read_outside():
    ends, (keys, values) = ExactEnds(8), states(60)
    ends.append(keys, values)
    seen = []

    def outside(query, indices, **logits):
        seen.append(indices)
        return attend(query, keys, values, indices, **logits)

    ends.attend(torch.randn(1, 4, 1, 16), lists_of(60, 30), outside, **LOGITS)
    read = seen[0][seen[0] >= 0]
    assert len(read) and read.min() >= 4 and read.max() < 52


@pytest.mark.parametrize("n", [1, 3, 5, 12, 25, 60])
def test_the_ends_replace_what_was_gathered(n):
    ends, (keys, values) = ExactEnds(8), states(n, batch=2)
    for start in range(0, n, 7):
        ends.append(keys[:, :, start : start + 7], values[:, :, start : start + 7])
    lists = lists_of(n, min(n + 2, 20), 2)
    tokens = lists.clamp(min=0)
    here = (lists >= 0) & ((tokens < 4) | (tokens >= n - 8))
    far = [gather_tokens(part, lists) + 1 for part in (keys, values)]
    for found, part, other in zip(ends.replace(*far, lists), (keys, values), far, strict=True):
        exact = gather_tokens(part, tokens)
        assert torch.equal(found[here], exact[here]) and torch.equal(found[~here], other[~here])


def test_changes_of_the_cache_are_followed():
    generator = torch.Generator().manual_seed(0)
    ends, (keys, values) = ExactEnds(8), states(0, batch=2)
    for turn in range(80):
        more = states(1 + turn % 6, len(keys), seed=turn)
        ends.append(*more)
        keys, values = torch.cat((keys, more[0]), 2), torch.cat((values, more[1]), 2)
        if turn % 5 == 3:
            order = torch.randint(len(keys), (2,), generator=generator)
            ends.map(lambda part, order=order: part[order])
            keys, values = keys[order], values[order]
        if turn % 7 == 6:
            length = int(torch.randint(keys.shape[2] + 1, (1,), generator=generator))
            ends.crop(length)
            keys, values = keys[:, :, :length], values[:, :, :length]
        n = keys.shape[2]
        assert ends.length == n
        if not n:
            continue
        restored = [torch.zeros_like(part) for part in (keys, values)]
        ends.restore(*restored)
        for made, whole in zip(restored, (keys, values), strict=True):
            kept = (made != 0).flatten(3).any(-1)
            assert torch.equal(made[kept], whole[kept]) and kept[:, :, : min(4, n)].all()
        added = more[0].shape[2] if turn % 7 != 6 else 0
        assert torch.equal(restored[0][:, :, n - added :], keys[:, :, n - added :])
        query, lists = torch.randn(2, 4, 1, 16), lists_of(n, min(n, 9), 2, turn)
        found = ends.attend(query, lists, partial(_reads, keys, values), **LOGITS)
        expected = attend(query, keys, values, lists, **LOGITS)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
