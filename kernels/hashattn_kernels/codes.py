"""Storage of key codes: each layout is a class, so that kernels may change it.

To callers, codes are (batch, heads, n, words) int32, token by token. Inside, words lie as the
backend reads them fastest; `append`, `to_tokens` and `from_tokens` are all that callers need.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from .memory import GrowableBuffer, capacity, reserve

LANES = 32  # tokens whose codes one thread of a GPU holds as one bit mask
BYTES = 4  # of a word
TILE = 4096  # tokens of a tile: LANES rows of 128 columns


class Codes(ABC):
    """The codes of a layer's cached keys."""

    @classmethod
    def from_tokens(cls, codes: Tensor) -> Codes:
        """Codes (batch, heads, n, words) int32 in this layout."""
        made = cls()
        made.append(codes)
        return made

    @classmethod
    @abstractmethod
    def over(cls, storage: Tensor, length: int) -> Codes:
        """The first `length` tokens of memory that another store reserved: its `room`."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens stored."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, length, words)."""

    @property
    @abstractmethod
    def storage(self) -> Tensor:
        """The memory the kernels read."""

    @property
    @abstractmethod
    def room(self) -> Tensor:
        """`storage` with the spare room behind what is stored."""

    @abstractmethod
    def reserve(
        self, batch: int, heads: int, words: int, tokens: int, device: torch.device
    ) -> None:
        """Make room for `tokens` tokens; those already stored stay."""

    @abstractmethod
    def append(self, codes: Tensor) -> None:
        """Store the codes (batch, heads, new, words) int32 of the next tokens."""

    @abstractmethod
    def to_tokens(self) -> Tensor:
        """All codes (batch, heads, length, words) int32."""

    @abstractmethod
    def crop(self, length: int) -> None:
        """Drop the tokens after the first `length`."""

    @abstractmethod
    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to the storage: reorder, repeat or select its first axis, the batch."""

    @property
    def value(self) -> Codes:
        """Itself: what a selector finds in its index (see memory.GrowableBuffer.value)."""
        return self


class ByteMajor(Codes):
    """One line of tokens for each byte of the code: what a CPU's vector units read.

    storage: (batch, heads, 4 * words, capacity) uint8, the first `length` of the last axis in use;
    the lowest byte of a word comes first.
    """

    def __init__(self) -> None:
        self._lines = GrowableBuffer(axis=3)

    @classmethod
    def over(cls, storage: Tensor, length: int) -> ByteMajor:
        made = cls()
        made._lines = GrowableBuffer.over(storage, length, axis=3)
        return made

    @property
    def length(self) -> int:
        return self._lines.length

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, planes, length = self._lines.value.shape
        return batch, heads, length, planes // BYTES

    @property
    def storage(self) -> Tensor:
        return self._lines.value

    @property
    def room(self) -> Tensor:
        return self._lines.room

    def reserve(
        self, batch: int, heads: int, words: int, tokens: int, device: torch.device
    ) -> None:
        self._lines.reserve((batch, heads, BYTES * words, tokens), torch.uint8, device)

    def append(self, codes: Tensor) -> None:
        self._lines.append(check(codes).contiguous().view(torch.uint8).transpose(2, 3))

    def extend(self, batch: int, words: int) -> Tensor:
        """`storage` with room for one more token, for the caller to fill in."""
        heads = self.shape[1]
        self._lines.extend((batch, heads, BYTES * words, 1), torch.uint8, torch.device("cpu"))
        return self._lines.value

    def to_tokens(self) -> Tensor:
        return self._lines.value.transpose(2, 3).contiguous().view(torch.int32)

    def crop(self, length: int) -> None:
        self._lines.crop(length)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        self._lines.map(change)


class Tiled(Codes):
    """Tiles of 4,096 tokens, transposed: what a GPU reads.

    storage: (batch, heads, tiles, words, 32, 128) int32; token 32 c + r of a tile is at [r, c]. A
    thread goes down a column, 32 tokens in order, and collects their results as the bits of one
    word; 128 threads together read one row of 512 bytes.
    """

    def __init__(self) -> None:
        self._length = 0
        self._storage: Tensor | None = None

    @classmethod
    def over(cls, storage: Tensor, length: int) -> Tiled:
        made = cls()
        made._storage, made._length = storage, length
        return made

    @property
    def length(self) -> int:
        return self._length

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, _, words = self.storage.shape[:4]
        return batch, heads, self._length, words

    @property
    def storage(self) -> Tensor:
        if self._storage is None:
            raise ValueError("no codes are stored yet: append first")
        return self._storage

    @property
    def room(self) -> Tensor:
        return self.storage

    def append(self, codes: Tensor) -> None:
        batch, heads, new, words = check(codes).shape
        start = self._length
        self.extend(batch, heads, words, codes.device, new)
        tile, row, column = place(torch.arange(start, self._length, device=codes.device))
        # separated advanced indices move their axis to the front: (new, batch, heads, words)
        self._storage[:, :, tile, :, row, column] = codes.permute(2, 0, 1, 3)

    def extend(
        self, batch: int, heads: int, words: int, device: torch.device, new: int = 1
    ) -> None:
        """Count `new` tokens more, whose codes a kernel then writes into the storage."""
        end = self._length + new
        if self._storage is None or self._storage.shape[2] * TILE < end:
            self.reserve(batch, heads, words, capacity(end, TILE), device)
        self._length = end

    def to_tokens(self) -> Tensor:
        batch, heads, tiles, words = self.storage.shape[:4]
        by_token = self.storage.permute(0, 1, 2, 5, 4, 3)  # (..., tiles, 128, 32, words)
        return by_token.reshape(batch, heads, tiles * TILE, words)[:, :, : self._length]

    def crop(self, length: int) -> None:
        self._length = min(self._length, length)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._storage is not None:
            self._storage = change(self._storage)

    def reserve(
        self, batch: int, heads: int, words: int, tokens: int, device: torch.device
    ) -> None:
        shape = [batch, heads, -(-tokens // TILE), words, LANES, TILE // LANES]
        grown = reserve(shape, torch.int32, device).zero_()
        if self._storage is not None:
            grown[:, :, : self._storage.shape[2]] = self._storage
        self._storage = grown


def place(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tile, row and column of tokens (n,) in a Tiled storage, each (n,)."""
    within = tokens % TILE
    return tokens // TILE, within % LANES, within // LANES


def layout_for(device: torch.device) -> type[Codes]:
    """The layout that the kernels of a device read."""
    return ByteMajor if device.type == "cpu" else Tiled


def check(codes: Tensor, name: str = "codes") -> Tensor:
    """`codes`; ValueError unless they are (batch, heads, n, words) int32."""
    if codes.dim() != 4 or codes.dtype != torch.int32:
        raise ValueError(
            f"{name}: expected int32 (batch, heads, tokens, words), got {codes.dtype} "
            f"{tuple(codes.shape)}"
        )
    return codes


def tokens_of(codes: Tensor | Codes) -> Tensor:
    """Codes (batch, heads, n, words) int32, however they are stored."""
    return codes.to_tokens() if isinstance(codes, Codes) else codes
