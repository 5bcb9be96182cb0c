"""The hot set's places against a loop, its rule by hand, and rows read from files."""

import os

import pytest
import torch

from hashattn_kernels import HotSet, hot_set, read_rows

TABLES = ("_slot_of", "_row_in", "_used", "_hand")


@pytest.fixture
def by_loop(monkeypatch):
    def change():
        monkeypatch.setattr(hot_set, "available", lambda name: False)

    yield change
    monkeypatch.undo()


@pytest.mark.parametrize("slots", [1, 7, 40])
def test_places_are_those_of_the_loop(slots, by_loop, monkeypatch):
    generator = torch.Generator().manual_seed(slots)
    compiled, plain = HotSet(3, slots), HotSet(3, slots)
    refused = 0
    for step in range(150):
        width = slots if step % 9 else 2 * slots  # more than fits, but for repetitions
        rows = torch.randint(10 + step, (3, width), generator=generator).int()
        rows[:, width // 2 :] = rows[:, : width - width // 2]
        rows[0, step % width] = -1
        if step % 9 == 0:
            rows[1] = torch.arange(width)
        found = compiled.place(rows)
        by_loop()
        expected = plain.place(rows)
        monkeypatch.undo()
        assert (found is None) == (expected is None)
        if found is None:  # how recent rows are may differ then
            refused += 1
            plain._used, plain._hand = compiled._used.clone(), compiled._hand.clone()
            continue
        assert found.hits == expected.hits
        for name in ("slots", "heads", "rows", "into"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
        assert all(torch.equal(getattr(compiled, t), getattr(plain, t)) for t in TABLES)
        if step % 20 == 19:
            for each in (compiled, plain):
                each.forget(step // 2)
    assert 0 < refused < 150


@pytest.mark.parametrize("loop", [False, True])
def test_a_row_used_since_the_last_visit_is_spared_once(loop, by_loop):
    if loop:
        by_loop()
    hot = HotSet(1, 3)

    def place(*rows):
        placed = hot.place(torch.tensor([rows], dtype=torch.int32))
        return placed.hits, placed.rows.tolist(), placed.into.tolist(), placed.slots[0].tolist()

    assert place(5, 6, 5) == (0, [5, 6], [0, 1], [0, 1, 0])
    assert place(7) == (0, [7], [2], [2])
    assert place(5) == (1, [], [], [0])
    # the hand goes round, sparing all three once, and takes the first
    assert place(8) == (0, [8], [0], [0])
    assert place(6, 9) == (1, [9], [2], [1, 2])  # 6 is used by this step, 7 was not since
    assert hot.place(torch.tensor([[1, 2, 3, 4]], dtype=torch.int32)) is None
    assert place(-1, 9) == (1, [], [], [-1, 2])
    hot.forget(9)
    assert place(9)[1] == [9] and hot.place(torch.empty((1, 0), dtype=torch.int32)).hits == 0


@pytest.fixture
def stored(tmp_path):
    data = torch.randint(256, (50, 24), generator=torch.Generator().manual_seed(0)).byte()
    path = tmp_path / "rows"
    path.write_bytes(data.numpy().tobytes())
    file = os.open(path, os.O_RDWR)
    yield file, data
    os.close(file)


@pytest.mark.parametrize("loop", [False, True])
def test_rows_are_read_to_their_offsets(loop, by_loop, stored):
    if loop:
        by_loop()
    file, data = stored
    places = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:9]
    for cached in (True, False):
        if not cached:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        out = torch.zeros(20, 24, dtype=torch.uint8)
        read_rows(file, 24, places, out.view(-1), 24 * (2 * torch.arange(9) + 1))
        assert torch.equal(out[1:18:2], data[places]) and not out[::2].any() and not out[18:].any()
    read_rows(file, 24, places[:0], out.view(-1), places[:0])


@pytest.mark.parametrize("loop", [False, True])
def test_a_truncated_file_is_an_error(loop, by_loop, stored):
    if loop:
        by_loop()
    file, _ = stored
    os.truncate(file, 24 * 40 + 5)
    out = torch.zeros(48, dtype=torch.uint8)
    read_rows(file, 24, torch.tensor([3, 39]), out, torch.tensor([0, 24]))
    with pytest.raises(OSError, match="ends"):
        read_rows(file, 24, torch.tensor([3, 40]), out, torch.tensor([0, 24]))
