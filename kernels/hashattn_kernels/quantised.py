"""Rows of 8 or 4 bits: K and V of a token and KV head, side by side, with a scale for each.

A vector is rotated first, so that no channel is much larger than the others (Ashkboos et al. 2024,
QuaRot): a sign for each channel, then a Hadamard matrix. Attention rotates queries alike, which
leaves the logits as they are, and the output back. Then each number is a code times the vector's
scale: at 8 bits a whole number of -127..127; at 4 bits one of 16 levels close to those of the least
squared error for normal numbers (Max 1960, Lloyd 1982), as rotated vectors nearly are.

Bytes of a row: codes of K, codes of V, scale of K, scale of V. Scales are bfloat16. At 4 bits byte
i of eight holds the number i of 16 in its low half, number 8 + i in its high half.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BITS = (8, 4)
DIMS = 16  # head dims are multiples of it
SCALE = torch.bfloat16
SCALES = 2 * SCALE.itemsize  # bytes of a row's scales
MOST = 127  # the largest code of 8 bits
CURVE = 2.5  # level of x = (2 code - 15) / 16: x (CURVE + x^2), exact in float32
NOT_NUMBERS = (
    "keys or values hold NaN or infinite numbers, or such as overflow float32: no code stands for "
    "them"
)
_SPREADS = (0.7, 1.15, 8)  # scales tried, relative to that of normal numbers: from, to, how many
NORMAL = 1.2188  # standard deviation of normal numbers whose best levels are these
SMALLEST = 2.0**-120  # divisors for vectors of zeros
_TOKENS_AT_ONCE = 512


@dataclass(frozen=True)
class RowFormat:
    """How rows are stored: bits of a number (8 or 4), head dims of K and V, and the dtype of what
    was quantised. ValueError for what the kernels cannot read."""

    bits: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits = {self.bits!r}: must be 8 or 4; None keeps the model's dtype")
        for name in ("key_dim", "value_dim"):
            dim = getattr(self, name)
            if dim < DIMS or dim % DIMS:
                raise ValueError(
                    f"{name} = {dim}: must be a positive multiple of {DIMS}; keep this model's "
                    "keys and values in its own dtype"
                )
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype = {self.dtype}: must be that of keys and values, a float")

    @property
    def codes(self) -> int:
        """Bytes of a row before its scales."""
        return (self.key_dim + self.value_dim) * self.bits // 8

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return self.codes + SCALES


@torch.no_grad()
def quantise(keys: Tensor, values: Tensor, row_format: RowFormat) -> Tensor:
    """The rows of `api.quantise` in torch, some tokens at a time."""
    rows = torch.empty(*keys.shape[:3], row_format.width, dtype=torch.uint8, device=keys.device)
    middle = row_format.key_dim * row_format.bits // 8
    for start in range(0, keys.shape[2], _TOKENS_AT_ONCE):
        tokens = slice(start, start + _TOKENS_AT_ONCE)
        made = rows[:, :, tokens]
        key_codes, key_scale = _encode(keys[:, :, tokens], row_format.bits)
        value_codes, value_scale = _encode(values[:, :, tokens], row_format.bits)
        made[..., :middle], made[..., middle : row_format.codes] = key_codes, value_codes
        scales = torch.cat((key_scale, value_scale), dim=-1)
        made[..., row_format.codes :] = scales.view(torch.uint8)
    return rows


def dequantise(rows: Tensor, row_format: RowFormat) -> tuple[Tensor, Tensor]:
    """Keys (..., D) and values (..., Dv) of rows (..., width) uint8, in the format's dtype.

    ValueError for rows that are not of this format.
    """
    check_rows(rows, row_format)
    keys, values = decode(rows, row_format)
    return (rotate_back(keys).to(row_format.dtype), rotate_back(values).to(row_format.dtype))


def decode(rows: Tensor, row_format: RowFormat) -> tuple[Tensor, Tensor]:
    """Keys and values of rows, float32, as they are attended to: rotated."""
    scales = rows[..., row_format.codes :].contiguous().view(SCALE).float()
    levels = _levels(rows[..., : row_format.codes], row_format.bits)
    keys, values = levels.split((row_format.key_dim, row_format.value_dim), dim=-1)
    return keys * scales[..., :1], values * scales[..., 1:]


def check_rows(rows: Tensor, row_format: RowFormat) -> None:
    """ValueError unless rows are bytes of this format."""
    if rows.dtype != torch.uint8 or rows.shape[-1] != row_format.width:
        raise ValueError(
            f"rows: expected uint8 (..., {row_format.width}) for {row_format.bits} bits of head "
            f"dims {row_format.key_dim} and {row_format.value_dim}, got {rows.dtype} "
            f"{tuple(rows.shape)}"
        )


def rotate(vectors: Tensor) -> Tensor:
    """Vectors (..., dim) as keys are stored, float32: their products stay as they are."""
    return vectors.float() @ rotation(vectors.shape[-1], vectors.device, torch.float32)


def rotate_back(vectors: Tensor) -> Tensor:
    """The inverse of `rotate`."""
    return vectors.float() @ rotation(vectors.shape[-1], vectors.device, torch.float32).mT


@cache
def rotation(dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The orthogonal matrix (dim, dim) that stored vectors were multiplied with.

    Signs (`signs_of`), then a Hadamard matrix; in a dim that is no power of two, one of
    the largest power below it for the first channels, then both again for the last. Part of the
    format: what is stored is read with the same one.
    """
    size = 1 << dim.bit_length() - 1
    pair, hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), torch.ones(1, 1)
    while len(hadamard) < size:
        hadamard = torch.kron(hadamard, pair)
    hadamard, rest = hadamard / size**0.5, torch.eye(dim - size, dtype=torch.float64)
    signs = signs_of(dim)
    matrix = signs[:dim, None] * torch.block_diag(hadamard, rest)
    if len(rest):
        matrix = matrix * signs[dim:] @ torch.block_diag(rest, hadamard)
    return matrix.to(device, dtype)


def signs_of(dim: int) -> Tensor:
    """The signs of `rotation`, (2 * dim) float64: a multiplicative hash (Knuth) of 1, 2, ..."""
    return (1 - 2 * (torch.arange(1, 2 * dim + 1) * 2654435761 >> 31 & 1)).double()


def _encode(vectors: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Bytes (..., dim * bits / 8) uint8 and scales (..., 1) bfloat16."""
    # float64: a row is the same, whatever order a product of this shape sums in
    turned = vectors.double() @ rotation(vectors.shape[-1], vectors.device, torch.float64)
    turned = turned.float()
    if turned.is_cpu and not turned.isfinite().all():
        raise ValueError(NOT_NUMBERS)
    return _encode_bytes(turned) if bits == 8 else _encode_halves(turned)


def _encode_bytes(vectors: Tensor) -> tuple[Tensor, Tensor]:
    # what a scale loses by rounding down is what its eight bits can lose
    scale = (vectors.abs().amax(dim=-1, keepdim=True) * ((1 + 2**-8) / MOST)).to(SCALE)
    codes = (vectors / scale.float().clamp(min=SMALLEST)).round().clamp(-MOST, MOST)
    return codes.to(torch.int8).view(torch.uint8), scale


def _encode_halves(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The levels nearest for the best of some scales; that is then the one of least squares."""
    largest = vectors.abs().amax(dim=-1, keepdim=True)
    parts = vectors / largest.clamp(min=SMALLEST)  # their squares neither overflow nor vanish
    deviation = parts.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=SMALLEST) / NORMAL
    spreads, edges = tables(vectors.device)
    codes = torch.bucketize(parts / (deviation * spreads), edges, out_int32=True)
    chosen = _level(codes)
    product, size = (chosen * parts).sum(dim=-1), chosen.square().sum(dim=-1)
    # the squared error of the best multiple of `chosen` is |parts|^2 - product^2 / size
    best = (product.square() / size).argmax(dim=0, keepdim=True)
    scale = (largest[..., 0] * (product / size).gather(0, best)[0]).to(SCALE)[..., None]
    codes = codes.gather(0, best[..., None].expand(1, *codes.shape[1:]))[0].to(torch.uint8)
    low, high = codes.unflatten(-1, (-1, 2, DIMS // 2)).unbind(dim=-2)
    return (low | high << 4).flatten(-2), scale


def _levels(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., bytes) uint8 -> (..., numbers) float32, without the scale."""
    if bits == 8:
        return codes.view(torch.int8).float()
    halves = codes.unflatten(-1, (-1, DIMS // 2))
    return _level(torch.stack((halves & 15, halves >> 4), dim=-2)).flatten(-3)


def _level(code: Tensor) -> Tensor:
    x = (2 * code.float() - 15) / 16
    return x * (CURVE + x * x)


@cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The scales tried, (spreads, 1, 1, 1, 1), and the middles between the levels."""
    levels = _level(torch.arange(16))
    spreads = torch.linspace(*_SPREADS).reshape(-1, 1, 1, 1, 1)
    return spreads.to(device), ((levels[1:] + levels[:-1]) / 2).to(device)
