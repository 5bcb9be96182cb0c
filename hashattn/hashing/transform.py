"""Transform codes: the directions in which queries and keys interact, a few bits for each.

q.k = sum_i (q.a_i)(k.b_i) along `initial.interaction_directions`. The key's component k.b_i is
quantised to levels m +-w_1 +-w_2 ..., whose signs are bits of its code; the query's share of a bit
is (q.a_i) w_j. Bits go where they lower the expected squared error of q.k the most, as in transform
coding (Gersho and Gray 1992, chapter 8). A bit per component and learned maps: the paper's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hashattn.base.layout import Layout
from hashattn.hashing.capture import CapturedLayer
from hashattn.hashing.card import slopes_field
from hashattn.hashing.initial import (
    interaction_directions,
    linear_stages,
    orthogonal,
    rank_of,
    second_moment,
    stack_heads,
)
from hashattn.hashing.maps import HashConfig, HashMap, LayerMaps
from hashattn.hashing.weights import HashWeights

# mean squared error of a normal variable of variance 1 with 0 to 4 bits, each with the best levels
# (Max 1960, table I)
_DISTORTION = (1.0, 0.3634, 0.1175, 0.03454, 0.009497)
SAMPLE = 16_384  # keys of a layer that levels are fitted to
_A_SEQUENCE = 2_048  # of them, at most, of one sequence
_NOTHING = "calibration got no captured layers; capture at least one sequence"
_LEAST = 1e-12  # of a level, so that each has its bit
_ROUNDS = 20  # of least squares: levels, then assignments


def deal_bits(sizes: Tensor, bits: int, most: int) -> Tensor:
    """How many of `bits` each component gets, int64 like sizes (components,).

    sizes: the component's share of the squared product, E[(q.a)^2] var(k.b). One bit at a time, to
    the component whose expected error it lowers the most, up to `most`. ValueError if there is no
    room for all.
    """
    if bits > most * len(sizes):
        raise ValueError(
            f"bits = {bits}: {len(sizes)} components take at most {most * len(sizes)}, {most} each"
        )
    distortion = torch.tensor([*_DISTORTION[: most + 1], _DISTORTION[most]])
    dealt = torch.zeros(len(sizes), dtype=torch.long)
    for _ in range(bits):
        gain = sizes * (distortion[dealt] - distortion[dealt + 1])
        gain[dealt == most] = -1
        dealt[gain.argmax()] += 1
    return dealt


def fit_levels(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Middle m (scalar) and weights w (bits,), largest first, whose 2^bits sums m +-w_1 +-w_2 ...
    are close to `values` (n,) float32 in squared error (a local optimum, from even levels)."""
    mean, spread = values.mean(), values.std(correction=0).clamp_min(1e-12)
    centred, middle = values - mean, torch.tensor(0.0)
    weights = spread * 3 / 2**bits * 2.0 ** torch.arange(bits - 1, -1, -1)
    ridge = 1e-6 * len(values) * torch.eye(bits + 1)  # of levels that no value is near
    for _ in range(_ROUNDS):
        signs = quantise(centred - middle, weights)
        design = torch.cat([signs, torch.ones(len(values), 1)], 1)
        solution = torch.linalg.solve(design.T @ design + ridge, design.T @ centred)
        weights, middle = solution[:-1], solution[-1]
    return mean + middle, weights


def quantise(values: Tensor, weights: Tensor) -> Tensor:
    """Signs (n, bits) in +-1 of values (n,): each of what the weights before it leave."""
    signs = []
    for weight in weights:
        signs.append(torch.where(values > 0, 1.0, -1.0))
        values = values - signs[-1] * weight
    return torch.stack(signs, -1)


@dataclass(frozen=True)
class HeadCode:
    """The code of a KV head: q.k is about the sum over components c of (q.a_c) l(k.b_c).

    queries, keys (D, C): directions a and b. middles (C,) and levels (digits, C): l rounds to
    m +-w_1 +-w_2 ..., w of size 0 where a component has no such digit.
    """

    queries: Tensor
    keys: Tensor
    middles: Tensor
    levels: Tensor


# from the second moments of a KV head's queries and centred keys, and a sample (n, D) of the latter
MakeCode = Callable[[Tensor, Tensor, Tensor, HashConfig], HeadCode]


def _head_code(cq: Tensor, ck: Tensor, sample: Tensor, config: HashConfig) -> HeadCode:
    """The transform code of a KV head; cq, ck (D, D)."""
    directions = interaction_directions(cq, ck)
    a, b = (part[:, : rank_of(config)] for part in directions)
    sizes = ((a.T @ cq @ a).diagonal() * (b.T @ ck @ b).diagonal()).clamp_min(0)
    dealt = deal_bits(sizes, config.bits, config.folds + 1)
    components, middles = sample @ b, torch.zeros(len(dealt))
    levels = torch.zeros(config.folds + 1, len(dealt))
    for component in dealt.nonzero()[:, 0].tolist():
        digits = int(dealt[component])
        middles[component], fitted = fit_levels(components[:, component], digits)
        levels[:digits, component] = fitted.clamp_min(_LEAST)
    return HeadCode(a, b, middles, levels)


@dataclass(frozen=True)
class Digits:
    """What quantises the components of a layer's key maps: levels (key maps, digits, C), 0 where a
    component has no such digit.

    A component's digits are neighbouring bits of a code, in order. As many digits in every map.
    """

    levels: Tensor

    def owners(self) -> tuple[Tensor, Tensor]:
        """The component and the number of the digit of each bit, int64 (key maps, bits) each."""
        found = [(levels.T > 0).nonzero() for levels in self.levels]  # by component, then digit
        owners = torch.stack(found)
        return owners[..., 0], owners[..., 1]

    def quantise(self, components: Tensor) -> Tensor:
        """Components (key maps, n, C) at their levels.

        Gradients pass as if values between the outermost levels were not rounded, and levels learn
        as the step sizes of Esser et al. (2020, LSQ) do.
        """
        rest, total = components.detach(), 0.0
        for level in self.levels.unbind(1):
            step = torch.where(rest > 0, 1.0, -1.0) * level[:, None]
            rest, total = rest - step.detach(), total + step
        most = self.levels.sum(1)[:, None].detach()
        passed = components.clamp(-most, most)
        return total + (passed - passed.detach())

    def expand(self, maps: LayerMaps) -> LayerMaps:
        """Maps of bits from maps of components: a query's component is the weight of its digits."""
        owners, digits = self.owners()
        heads = torch.arange(len(owners), device=owners.device)[:, None]
        weights = self.levels[heads, digits, owners]
        copies = len(maps.query.weights[0]) // len(owners)
        query = _columns(maps.query, owners.repeat_interleave(copies, 0),
                         weights.repeat_interleave(copies, 0))  # fmt: skip
        key = _columns(maps.key, owners, torch.ones_like(weights))
        folds = self.levels.shape[1] - 1
        before = [
            torch.where(digits > digit, self.levels[heads, digit, owners], 0.0)
            for digit in range(folds)
        ]
        return LayerMaps(replace(key, steps=torch.stack(before, 1) if folds else None), query)

    @classmethod
    def collapse(cls, maps: LayerMaps) -> tuple[LayerMaps, Digits]:
        """The inverse of `expand`, for maps with folds: training goes on from components.

        A component's last level is in no step: it stands to the first as the query's weights do.
        """
        steps, group = maps.key.steps, len(maps.query.weights[0]) // len(maps.key.weights[0])
        size = maps.query.weights[-1].unflatten(0, (-1, group)).square().sum((1, 2)).sqrt()
        found = [_components(*head) for head in zip(steps.mT.tolist(), size.tolist(), strict=True)]
        count = max(len(levels) for _, levels in found)
        columns = steps.new_zeros(len(found), count, dtype=torch.long)
        levels = steps.new_zeros(len(found), steps.shape[1] + 1, count)
        for head, (first, weights) in enumerate(found):
            columns[head, : len(first)] = torch.tensor(first)
            for component, own in enumerate(weights):
                levels[head, : len(own), component] = torch.tensor(own)
        shares = (1 / levels[:, 0]).masked_fill(levels[:, 0] == 0, 0)
        key = _columns(replace(maps.key, steps=None), columns, torch.ones_like(shares))
        columns, shares = (x.repeat_interleave(group, 0) for x in (columns, shares))
        return LayerMaps(key, _columns(maps.query, columns, shares)), cls(levels)


def _components(steps: list[list[float]], size: list[float]) -> tuple[list[int], list[list[float]]]:
    """First bit and levels of each component of a code; steps (bits, folds), size (bits,) of the
    query's weights."""
    first, levels = [], []
    for bit, before in enumerate(steps):
        before = [step for step in before if step > 0]
        if before:
            levels[-1] = [*before, before[-1] * size[bit] / size[bit - 1]]
        else:
            first.append(bit)
            levels.append([1.0])
    return first, levels


def _columns(part: HashMap, columns: Tensor, factors: Tensor) -> HashMap:
    """The map whose outputs are those of `columns` (heads, count), times factors (heads, count)."""
    weight, bias = part.weights[-1], part.biases[-1]
    index = columns[:, None].expand(-1, weight.shape[1], -1)
    return replace(
        part,
        weights=(*part.weights[:-1], weight.gather(2, index) * factors[:, None]),
        biases=(*part.biases[:-1], bias.gather(1, columns) * factors),
    )


def _component_maps(
    codes: Sequence[HeadCode], query_stats: tuple[Tensor, Tensor],
    key_stats: tuple[Tensor, Tensor], config: HashConfig, generator: torch.Generator,
) -> tuple[LayerMaps, Digits]:  # fmt: skip
    """Maps to components of inputs less their mean, over their deviation, and how these are
    quantised; keys' means are their stats'."""
    count = len(codes[0].middles)
    ends = (*config.widths[:-1], count)
    shapes = list(zip(ends, ends[1:], strict=False))
    copies, straight = config.key_maps // config.kv_heads, torch.eye(count)
    key_heads, query_heads = [], []
    for kv_head, code in enumerate(codes):
        directions = key_stats[1][kv_head][:, None] * code.keys
        stages = linear_stages(directions, -code.middles, straight, shapes, generator)
        key_heads += [stages] * copies
        for head in range(kv_head * config.group, (kv_head + 1) * config.group):
            mean, std = query_stats[0][head], query_stats[1][head]
            directions, offset = std[:, None] * code.queries, mean @ code.queries
            query_heads.append(linear_stages(directions, offset, straight, shapes, generator))
    maps = LayerMaps(stack_heads(key_heads, config), stack_heads(query_heads, config))
    return maps, Digits(torch.stack([code.levels for code in codes for _ in range(copies)]))


def initial_components(
    queries: Tensor,
    keys: Tensor,
    query_stats: tuple[Tensor, Tensor],
    key_stats: tuple[Tensor, Tensor],
    config: HashConfig,
    generator: torch.Generator,
) -> tuple[LayerMaps, Digits]:
    """`_component_maps` of a transform code of normalised inputs; arguments as of
    `initial.spectral_maps`."""
    codes = []
    for kv_head, key in enumerate(keys.float()):
        own = queries.unflatten(0, (config.kv_heads, -1))[kv_head].flatten(0, 1).float()
        centred = key - key_stats[0][kv_head]
        codes.append(_head_code(second_moment(own), second_moment(centred), centred, config))
    return _component_maps(codes, query_stats, key_stats, config, generator)


class _Streamed:
    """What a layer's code is made of, of any number of sequences: moments, and some of the keys."""

    def __init__(self, first: CapturedLayer) -> None:
        heads, _, dim = first.keys.shape
        self.cq, self.ck = (torch.zeros(heads, dim, dim, dtype=torch.float64) for _ in range(2))
        self.mean = torch.zeros(heads, dim, dtype=torch.float64)
        self.queries = self.keys = self.longest = 0
        self.samples: list[Tensor] = []
        self.query_heads, self.scaling = len(first.queries), first.scaling

    def add(self, rows: CapturedLayer) -> None:
        keys = rows.keys.double().cpu()
        own = rows.queries.double().cpu().unflatten(0, (len(keys), -1)).flatten(1, 2)
        self.cq += own.mT @ own
        self.ck += keys.mT @ keys
        self.mean += keys.sum(1)
        self.queries, self.keys = self.queries + own.shape[1], self.keys + keys.shape[1]
        self.longest = max(self.longest, keys.shape[1])
        self.samples.append(keys[:, :: max(1, keys.shape[1] // _A_SEQUENCE)].float())
        kept = torch.cat(self.samples, 1)
        if kept.shape[1] > SAMPLE:  # every other one: early and late sequences alike
            self.samples = [kept[:, ::2]]

    def maps(self, config: HashConfig, code: MakeCode) -> LayerMaps:
        """Maps of raw inputs."""
        mean, sample = self.mean / self.keys, torch.cat(self.samples, 1)
        cq, ck = self.cq / self.queries, self.ck / self.keys - mean[:, :, None] * mean[:, None]
        mean = mean.float()
        codes = [
            code(cq[head].float(), ck[head].float(), sample[head] - mean[head], config)
            for head in range(len(mean))
        ]
        raw = torch.zeros(config.query_heads, config.head_dim)
        one = torch.ones_like(mean)
        generator = torch.Generator().manual_seed(0)
        maps, digits = _component_maps(codes, (raw, raw + 1), (mean, one), config, generator)
        maps = digits.expand(maps)
        copies = config.key_maps // config.kv_heads
        mean, one = (part.repeat_interleave(copies, 0) for part in (mean, one))
        return LayerMaps(maps.key.fold_input(mean, one), maps.query)


def calibrate_transform(
    captured: Iterable[CapturedLayer],
    *,
    bits: int = 64,
    folds: int = 3,
    layout: Layout = "per_kv_head",
    card: Mapping[str, Any] | None = None,
) -> HashWeights:
    """Hash weights that are a transform code, of the captured layers of some sequences.

    Reads each capture once and keeps moments and at most SAMPLE keys of a layer, so that sequences
    may come one by one. bits: of a code; folds: a component gets at most 1 + folds of them. card:
    of the weights; it says what they were made from, and nothing of the model unless given.
    Raises ValueError when nothing was captured, and for bits that the components cannot take.
    """
    return _calibrated(captured, _head_code, "transform", bits, folds, layout, card)


def calibrate_rotation(
    captured: Iterable[CapturedLayer],
    *,
    planes: int | None = None,
    digits: int = 1,
    seed: int = 0,
    card: Mapping[str, Any] | None = None,
) -> HashWeights:
    """Hash weights of centred keys under random rotations, `digits` bits (1 to 4) a direction.

    One digit: the signs of RaBitQ (Gao and Long 2024), and of SimHash with orthogonal planes where
    `planes`, the head size unless given, are fewer or more than that: as many rotations as needed.
    The levels of more digits are those that fit the layer's keys best. ValueError as of
    `calibrate_transform`.
    """
    rows = iter(captured)
    first = next(rows, None)
    if first is None:
        raise ValueError(_NOTHING)
    planes = planes or first.keys.shape[-1]

    def code(cq: Tensor, ck: Tensor, sample: Tensor, config: HashConfig) -> HeadCode:
        rotation = orthogonal(len(cq), planes, generator)
        rotated = (sample @ rotation).flatten()  # all directions alike: a part of them will do
        middle, weights = fit_levels(rotated[:: max(1, len(rotated) // SAMPLE)], digits)
        levels = weights.clamp_min(_LEAST)[:, None].expand(-1, planes)
        return HeadCode(rotation, rotation, middle.expand(planes), levels)

    generator = torch.Generator().manual_seed(seed)
    return _calibrated(
        chain([first], rows), code, "rotation", planes * digits, digits - 1, "per_kv_head", card
    )


def _calibrated(
    captured: Iterable[CapturedLayer], code: MakeCode, init: str, bits: int, folds: int,
    layout: Layout, card: Mapping[str, Any] | None,
) -> HashWeights:  # fmt: skip
    layers: dict[int, _Streamed] = {}
    for rows in captured:
        layers.setdefault(rows.layer, _Streamed(rows)).add(rows)
    if not layers:
        raise ValueError(_NOTHING)
    first = next(iter(layers.values()))
    config = HashConfig(
        tuple(sorted(layers)), first.query_heads, *first.mean.shape, layout, bits, depth=1,
        folds=folds,
    )  # fmt: skip
    made = {
        "trained": True,
        "recipe": {"init": init, "query": "weights", "group": "each", "steps": 0},
        "data": {"keys": first.keys, "queries": first.queries, "longest": first.longest},
    }
    maps = {layer: layers[layer].maps(config, code) for layer in config.layers}
    # a level is the mean of the keys that it stands for, so that q.k is estimated as it is
    scalings = {layer: torch.full((config.query_heads,), layers[layer].scaling) for layer in maps}
    return HashWeights(config, maps, made | slopes_field(scalings) | dict(card or {}))
