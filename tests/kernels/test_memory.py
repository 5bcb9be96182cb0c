"""Buffers that grow in place."""

import sys

import pytest
import torch

from hashattn.kernels import GrowableBuffer
from hashattn_kernels import memory


@pytest.mark.parametrize("axis", [1, 2])
def test_it_holds_what_was_appended(axis):
    parts = [torch.randn(2, 3, 4).narrow(axis, 0, size) for size in (2, 3, 1)]
    store = GrowableBuffer(axis)
    for part in parts:
        store.append(part)
    assert torch.equal(store.value, torch.cat(parts, dim=axis))
    assert store.length == 6


def test_most_appends_copy_nothing():
    store, places = GrowableBuffer(axis=2), []
    for _ in range(3000):
        store.append(torch.zeros(1, 2, 1, 8))
        places.append(store.value.data_ptr())
    assert len(set(places)) <= 10  # 256, then an eighth more each time
    assert memory.capacity(3000) == 3584 and memory.capacity(1) == 256


def test_crop_and_write_again():
    store = GrowableBuffer(axis=2)
    store.append(torch.arange(12.0).reshape(1, 1, 6, 2))
    store.crop(2)
    store.append(torch.full((1, 1, 1, 2), -1.0))
    assert store.value.flatten().tolist() == [0, 1, 2, 3, -1, -1]


def test_room_is_for_the_caller_to_fill():
    store = GrowableBuffer(axis=1)
    store.extend((2, 3), torch.float64, torch.device("cpu"))[:] = 7
    assert store.value.tolist() == [[7, 7, 7], [7, 7, 7]] and store.value.dtype == torch.float64


def test_map_keeps_room_to_grow():
    store = GrowableBuffer(axis=2)
    store.append(torch.arange(3.0).reshape(3, 1, 1, 1))
    store.map(lambda part: part[torch.tensor([2, 2])])
    place = store.value.data_ptr()
    store.append(torch.zeros(2, 1, 1, 1))
    assert store.value[:, 0, :, 0].tolist() == [[2, 0], [2, 0]]
    assert store.value.data_ptr() == place


def test_an_empty_store_says_so():
    with pytest.raises(ValueError, match="append first"):
        _ = GrowableBuffer(axis=2).value
    GrowableBuffer(axis=2).map(lambda part: part)  # nothing to change


@pytest.mark.skipif(sys.platform != "linux", reason="madvise with huge pages is Linux's")
def test_huge_pages_are_asked_for_large_buffers_only(monkeypatch):
    assert memory.huge_pages(torch.empty(memory.HUGE // 4)) in (True, False)
    assert not memory.huge_pages(torch.empty(1000))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not memory.huge_pages(torch.empty(memory.HUGE // 4))
