"""The first and the newest tokens of a cache as they were, beside rows of fewer bits.

Most of what a head weighs lies there, and it is few bytes. A list of tokens is read in two parts,
outside and inside, whose outputs are merged by the logs of their softmax sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hashattn.kernels import GrowableBuffer, attend, gather_tokens, merge

_FIRST = 4  # tokens that nearly all heads weigh, whatever they are (attention sinks)


class ExactEnds:
    """Keys and values of the first _FIRST and the newest `window` tokens."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._kept = GrowableBuffer(axis=2)  # the first tokens' rows, then those from `start` on
        self._ahead = self._start = 0  # rows of first tokens; the token that follows them there

    @property
    def length(self) -> int:
        """Tokens of the cache."""
        return self._start + self._kept.length - self._ahead

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._kept.room.nbytes if self._kept.length else 0

    def append(self, keys: Tensor, values: Tensor) -> None:
        """The next tokens' keys and values (B, KV heads, new, D)."""
        self._kept.append(torch.stack((keys, values), dim=3))
        # twice the window, so that tokens may be cropped and rows move seldom
        if self._kept.length > _FIRST + 2 * self._window:
            start, rows = self.length - self._window, self._kept.value
            ends = rows[:, :, :_FIRST], rows[:, :, rows.shape[2] - self._window :]
            self._kept = GrowableBuffer(axis=2)
            for part in ends:
                self._kept.append(part)
            self._ahead, self._start = _FIRST, start

    def crop(self, length: int) -> None:
        """Drop the tokens after the first `length`."""
        self._kept.crop(self._ahead + max(0, length - self._start))
        self._start = min(self._start, length)
        if length < self._ahead:
            self._kept.crop(length)
            self._ahead = length

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to axis 0, the batch."""
        self._kept.map(change)

    def restore(self, keys: Tensor, values: Tensor) -> None:
        """Write them over keys and values (B, KV heads, n, D) of all tokens."""
        begin, rows = self._begin, self._kept.value
        first = min(_FIRST, begin)
        newest = rows[:, :, begin - self._start + self._ahead :]
        for at, pairs in ((0, rows[:, :, :first]), (begin, newest)):
            for whole, part in zip((keys, values), pairs.unbind(3), strict=True):
                whole[:, :, at : at + part.shape[2]] = part

    def replace(self, keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, lists, q, m, D) of tokens (B, lists, q, m), with these in place of
        those that are here."""
        begin = self._begin
        first = (indices >= 0) & (indices < min(_FIRST, begin))
        here = first | (indices >= begin)
        places = torch.where(first, indices, indices - self._start + self._ahead)
        places, (near_keys, near_values) = places.masked_fill(~here, 0), self._kept.value.unbind(3)
        return (
            torch.where(here[..., None], gather_tokens(near_keys, places), keys),
            torch.where(here[..., None], gather_tokens(near_values, places), values),
        )

    @property
    def _begin(self) -> int:
        """The first token of the window."""
        return max(self._start, self.length - self._window)

    def attend(
        self, query: Tensor, indices: Tensor, outside: Callable[..., Any], *,
        log_weights: Tensor | None = None, return_lse: bool = False, **logits: Any,
    ) -> Any:  # fmt: skip
        """`kernels.attend` over lists, ascending, of which `outside`, another of that signature
        after its query, reads the tokens that are not here."""
        begin, listed = self._begin, indices >= 0
        exact_first = min(_FIRST, begin)
        first = (listed & (indices < exact_first)).sum(-1, keepdim=True)
        middle = (listed & (indices < begin)).sum(-1, keepdim=True) - first
        last = listed.sum(-1, keepdim=True) - first - middle
        columns = torch.arange(indices.shape[-1], device=indices.device)
        # middle tokens, then those at both ends, each from the left
        inner = (columns + first).clamp(max=indices.shape[-1] - 1)
        outer = torch.where(columns < first, columns, columns + middle)
        outer = outer.clamp(max=indices.shape[-1] - 1)
        inside = indices.gather(-1, outer)
        moved = inside - self._start + self._ahead
        places = torch.where(inside < exact_first, inside, moved)
        width = max(1, int((first + last).max()))
        places = places.masked_fill(columns >= first + last, -1)[..., :width].contiguous()
        others = indices.gather(-1, inner).masked_fill(columns >= middle, -1)
        others = others[..., : max(1, int(middle.max()))].contiguous()
        weights = {"inner": None, "outer": None}
        if log_weights is not None:
            weights["inner"] = log_weights.gather(-1, inner)[..., : others.shape[-1]].contiguous()
            weights["outer"] = log_weights.gather(-1, outer)[..., :width].contiguous()
        near, near_lse = attend(
            query, *self._kept.value.unbind(3), places, log_weights=weights["outer"],
            return_lse=True, **logits,
        )  # fmt: skip
        logits = logits | {"sinks": None}  # they count once
        far, far_lse = outside(
            query, others, log_weights=weights["inner"], return_lse=True, **logits
        )
        out, lse = merge(torch.stack((near, far)), torch.stack((near_lse, far_lse)))
        out = out.to(query.dtype)
        return (out, lse) if return_lse else out


class NoEnds:
    """An ExactEnds of no token: all of them are read outside."""

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Nothing: none is kept."""

    def crop(self, length: int) -> None:
        """Nothing."""

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Nothing."""

    def restore(self, keys: Tensor, values: Tensor) -> None:
        """Nothing."""

    def replace(self, keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """They as they are."""
        return keys, values

    def attend(
        self, query: Tensor, indices: Tensor, outside: Callable[..., Any], **logits: Any
    ) -> Any:
        """What `outside` gives."""
        return outside(query, indices, **logits)
