"""Layouts of stored codes: what goes in comes out, whatever lies in between."""

import pytest
import torch
from torch import Tensor

from hashattn.kernels import Codes, layout_for
from hashattn_kernels.codes import TILE, ByteMajor, Tiled, place

LAYOUTS = (ByteMajor, Tiled)


def codes(batch: int, heads: int, n: int, words: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, n, words)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("words", [1, 2, 8])
@pytest.mark.parametrize(
    "parts", [(1,), (5, 1, 1), (TILE - 1, 1, 1), (TILE, TILE + 7), (3000, 2000)]
)
def test_appended_codes_come_back(layout: type[Codes], words, parts):
    given = codes(2, 3, sum(parts), words)
    store, at = layout(), 0
    for part in parts:
        store.append(given[:, :, at : at + part])
        at += part
        assert store.length == at and store.shape == (2, 3, at, words)
    assert torch.equal(store.to_tokens(), given)
    assert torch.equal(layout.from_tokens(given).to_tokens(), given)
    assert store.value is store


@pytest.mark.parametrize("layout", LAYOUTS)
def test_growth_keeps_what_is_stored(layout: type[Codes]):
    given = codes(1, 2, 3 * TILE, 1)
    store = layout()
    for part in given.split(1000, dim=2):
        store.append(part)
    assert torch.equal(store.to_tokens(), given)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cropped_codes_are_written_over(layout: type[Codes]):
    given, other = codes(2, 1, 5000, 2), codes(2, 1, 900, 2, seed=1)
    store = layout.from_tokens(given)
    store.crop(9000)
    assert store.length == 5000
    store.crop(4090)
    store.append(other)
    assert torch.equal(store.to_tokens(), torch.cat((given[:, :, :4090], other), dim=2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_batch_is_reordered_and_grows_on(layout: type[Codes]):
    given, more = codes(3, 2, 40, 1), codes(4, 2, 3, 1, seed=1)
    rows = torch.tensor([2, 0, 0, 1])
    store = layout.from_tokens(given)
    store.map(lambda part: part.index_select(0, rows))
    store.append(more)
    assert torch.equal(store.to_tokens(), torch.cat((given[rows], more), dim=2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_and_missing_codes_are_refused(layout: type[Codes]):
    with pytest.raises(ValueError, match="append first"):
        _ = layout().storage
    with pytest.raises(ValueError, match="codes: expected int32"):
        layout().append(codes(1, 1, 4, 1).long())


def test_every_device_has_its_layout():
    assert layout_for(torch.device("cpu")) is ByteMajor
    assert layout_for(torch.device("cuda")) is Tiled


def test_tokens_of_a_tile_lie_down_its_columns():
    """Token 32 c + r of a tile is at row r, column c: a column holds one mask word's tokens."""
    given = torch.arange(2 * TILE, dtype=torch.int32).reshape(1, 1, -1, 1)
    storage = Tiled.from_tokens(given).storage
    assert storage[0, 0, 1, 0, 5, 3] == TILE + 32 * 3 + 5
    tile, row, column = place(torch.tensor([0, 31, 32, TILE + 33]))
    assert (tile.tolist(), row.tolist(), column.tolist()) == (
        [0, 0, 0, 1],
        [0, 31, 0, 1],
        [0, 0, 1, 1],
    )


def test_bytes_lie_in_lines():
    given = codes(1, 2, 9, 3)
    lines = ByteMajor.from_tokens(given).storage
    assert lines.shape == (1, 2, 12, 9) and lines.dtype == torch.uint8
    for byte in range(12):
        expected = (given[..., byte // 4] >> 8 * (byte % 4)) & 255
        assert torch.equal(lines[:, :, byte].int(), expected)
