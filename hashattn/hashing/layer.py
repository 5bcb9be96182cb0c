"""Training of one layer's hash maps on captured queries and keys."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hashattn.base.checks import require
from hashattn.base.progress import progress_bar
from hashattn.hashing.capture import CapturedLayer
from hashattn.hashing.initial import moments, spectral_maps
from hashattn.hashing.labels import RowLabels, candidate_mask, row_labels
from hashattn.hashing.maps import HashConfig, LayerMaps, random_maps
from hashattn.hashing.objective import Batch, batch_loss, relax
from hashattn.hashing.recipe import TrainRecipe
from hashattn.hashing.slopes import map_slopes, mean_divergence
from hashattn.hashing.transform import Digits, initial_components
from hashattn.hashing.validate import selection_quality

SAMPLE = 65_536  # query and key vectors a head's initial statistics are taken from


@dataclass(frozen=True)
class TrainedLayer:
    """Maps of raw inputs, one record per evaluation (step, loss and selection quality), and the
    maps' slopes (hashing.slopes), None where validation had no row that tells them."""

    maps: LayerMaps
    history: list[dict[str, float]]
    slopes: Tensor | None = None


class LayerTrainer:
    """Trains the maps of one layer on captures of many sequences, from `start` (maps of raw
    inputs) or, without it, from where the recipe begins."""

    def __init__(
        self,
        captures: Sequence[CapturedLayer],
        config: HashConfig,
        recipe: TrainRecipe,
        seed: int,
        start: LayerMaps | None = None,
    ) -> None:
        self.captures, self.config, self.recipe = captures, config, recipe
        self.generator = torch.Generator().manual_seed(seed)
        self.device = captures[0].keys.device
        self.query_stats, self.key_stats = self._statistics()
        self.labels = [self._label(c) for c in captures]
        first, self.digits = self._first(start)
        self.names = [name for name, _ in first.tensors()]
        self.parameters = [t.clone().requires_grad_() for _, t in first.tensors()]
        # its logarithm is trained, so that the scale stays positive
        self.log_scale = torch.full((config.key_maps,), math.log(recipe.scale), device=self.device)
        self.bias = torch.zeros(config.key_maps, device=self.device)
        if self.digits is not None:
            self._begin_components()
        self.optimiser, self.scheduler = self._optimiser()

    def _statistics(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        if self.recipe.normalise == "none":
            dim, c = self.config.head_dim, self.config
            return tuple(
                (torch.zeros(h, dim, device=self.device), torch.ones(h, dim, device=self.device))
                for h in (c.query_heads, c.kv_heads)
            )
        return moments(self._sample("queries")), moments(self._sample("keys"))

    def _sample(self, name: str) -> list[Tensor]:
        """Evenly strided rows of every capture, about SAMPLE per head in all."""
        tensors = [getattr(c, name) for c in self.captures]
        stride = max(1, sum(t.shape[1] for t in tensors) // SAMPLE)
        return [t[:, ::stride] for t in tensors]

    def _first(self, start: LayerMaps | None) -> tuple[LayerMaps, Digits | None]:
        """Maps of normalised inputs on the trainer's device: of bits, or of components and what
        quantises these."""
        if start is not None:
            maps = self._unfolded(start)
            return (maps, None) if start.key.steps is None else Digits.collapse(maps)
        made = self._initial_maps()
        maps, digits = made if isinstance(made, tuple) else (made, None)
        return maps.to(self.device), digits and Digits(digits.levels.to(self.device))

    def _begin_components(self) -> None:
        """Scales maps so that weights have size 1: a step of the optimiser is a share of them. The
        logits that belong to these are the model's own to begin with."""
        maps, group = self._maps(self.parameters), self.config.query_heads // self.config.key_maps
        sizes = []
        for part, together in ((maps.key, 1), (maps.query, group)):
            last = part.weights[-1].detach().unflatten(0, (-1, together))
            sizes.append(last.square().mean((1, 2, 3)).sqrt())
            each = sizes[-1].repeat_interleave(together)
            part.weights[-1].data /= each[:, None, None]
            part.biases[-1].data /= each[:, None]
        key, query = sizes
        self.digits = Digits(self.digits.levels / key[:, None, None])
        self.log_levels = torch.zeros_like(self.digits.levels).requires_grad_()
        count = self.digits.levels.shape[-1] if self.recipe.average_group else 1
        self.log_scale = (key * query * self.captures[0].scaling * count).log()

    @property
    def _quantiser(self) -> Digits:
        """The digits with their levels as they are now."""
        return Digits(self.digits.levels * self.log_levels.exp())

    def _initial_maps(self) -> LayerMaps | tuple[LayerMaps, Digits]:
        init, folds = self.recipe.init, self.config.folds
        require(init == "transform" or not folds, "folds", folds, f'0 where init is "{init}"')
        if init == "random":
            return random_maps(self.config, self.generator)
        # on the CPU, so that rotations and eigenvectors do not depend on the device
        queries, keys = (
            torch.cat(self._sample(name), 1).float().cpu() for name in ("queries", "keys")
        )
        query_stats, key_stats = (
            tuple(t.cpu() for t in stats) for stats in (self.query_stats, self.key_stats)
        )
        make = spectral_maps if init == "spectral" else initial_components
        return make(queries, keys, query_stats, key_stats, self.config, self.generator)

    def _unfolded(self, start: LayerMaps) -> LayerMaps:
        """Maps of normalised inputs that give the codes of `start`, those of raw ones."""
        start, (key_stats, query_stats) = start.to(self.device), self._map_stats()
        return LayerMaps(start.key.unfold_input(*key_stats), start.query.unfold_input(*query_stats))

    def _map_stats(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """(mean, std) of what each key map and each query map reads."""
        group = self.config.key_maps // self.config.kv_heads
        return [s.repeat_interleave(group, 0) for s in self.key_stats], self.query_stats

    def _label(self, captured: CapturedLayer) -> RowLabels:
        return row_labels(
            captured.queries,
            captured.keys,
            captured.positions,
            captured.scaling,
            sink=self.recipe.sink,
            local=self.recipe.local,
            top=self.recipe.top,
            top_fraction=self.recipe.top_fraction,
            values=captured.values if self.recipe.reads_values else None,
            softcap=captured.softcap,
        )

    def _optimiser(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        recipe, groups = self.recipe, [{"params": self.parameters}]
        if self.digits is not None:
            groups.append({"params": [self.log_levels], "weight_decay": 0.0})
        if recipe.learn_scale:
            extra = [self.log_scale.requires_grad_(), self.bias.requires_grad_()]
            # decay would pull the scale to 1, which means nothing
            groups.append({"params": extra, "weight_decay": 0.0})
        optimiser = torch.optim.AdamW(
            groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        if recipe.schedule == "one_cycle":
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimiser,
                recipe.learning_rate,
                recipe.steps + 1,  # its own construction counts as one
                pct_start=0.1,
                cycle_momentum=False,
            )
        else:
            schedule = torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)
        return optimiser, schedule

    def _draw(self, count: int, limit: int) -> Tensor:
        """Up to `limit` distinct numbers below `count`, drawn on the CPU: alike on any device."""
        return torch.randperm(count, generator=self.generator)[:limit].to(self.device)

    def _batch(self) -> Batch:
        """A random sequence's random rows, against all its keys or a sample of them."""
        number = int(torch.randint(len(self.captures), (1,), generator=self.generator))
        captured, labels = self.captures[number], self.labels[number]
        rows = self._draw(captured.positions.numel(), self.recipe.rows_per_step)
        positions = captured.positions[rows]
        labels = RowLabels(labels.tokens[:, rows], labels.weight[:, rows])
        allowed = candidate_mask(
            positions, captured.keys.shape[1], self.recipe.sink, self.recipe.local
        )
        batch = Batch(
            captured.queries[:, rows].float(), captured.keys, allowed, positions + 1, labels,
            scaling=captured.scaling, softcap=captured.softcap,
        )  # fmt: skip
        limit = self.recipe.keys_per_step
        if limit is None or limit >= captured.keys.shape[1]:
            return batch
        return self._subsample(batch, limit)

    def _subsample(self, batch: Batch, limit: int) -> Batch:
        """Keep all label tokens of the rows and random other keys, `limit` in all if they fit."""
        n, labels = batch.keys.shape[1], batch.labels
        order = torch.rand(n, generator=self.generator).to(self.device)
        order[labels.tokens[labels.valid]] = -1.0  # before all others
        limit = max(limit, int((order < 0).sum()))
        tokens = order.argsort()[:limit].sort().values
        # labels name tokens by where they are among the kept keys; -1 in `weight` still voids one
        place = torch.zeros(n, dtype=torch.long, device=self.device)
        place[tokens] = torch.arange(limit, device=self.device)
        labels = RowLabels(place[labels.tokens], labels.weight)
        return replace(
            batch, keys=batch.keys[:, tokens], allowed=batch.allowed[:, tokens], labels=labels,
            kept=limit / n,
        )  # fmt: skip

    def _maps(self, tensors: Sequence[Tensor]) -> LayerMaps:
        return LayerMaps.from_tensors(dict(zip(self.names, tensors, strict=True)), self.config)

    def step(self, number: int) -> float:
        """One optimiser step; returns the loss."""
        recipe, total = self.recipe, 0.0
        progress = number / recipe.steps
        # soft first, so that bits far from 0 get gradients; sharp in the end, as codes are hard
        annealed = recipe.surrogate != "tanh"
        sharpness = 1 + (recipe.sharpness - 1) * progress if annealed else 1.0
        hard = recipe.surrogate == "straight_through" and progress >= 1 - recipe.hard_share
        self.optimiser.zero_grad(set_to_none=True)
        maps = self._maps(self.parameters)
        for _ in range(recipe.sequences_per_step):
            batch = self._batch()
            # the maps that learn read normalised inputs; `maps` folds that into what is stored
            q = (batch.queries - self.query_stats[0][:, None]) / self.query_stats[1][:, None]
            k = (batch.keys.float() - self.key_stats[0][:, None]) / self.key_stats[1][:, None]
            query, key = maps.query(q), maps.preactivations_keys(k)
            if self.digits is None:
                query, key = relax(query, sharpness, hard), relax(key, sharpness, hard)
            else:  # a query is not quantised, only its weights graded
                key = self._quantiser.quantise(key)
            loss = batch_loss(
                query,
                key,
                self.log_scale.exp(),
                self.bias,
                batch,
                recipe,
            )
            (loss / recipe.sequences_per_step).backward()
            total += float(loss.detach()) / recipe.sequences_per_step
        self.optimiser.step()
        self.scheduler.step()
        return total

    def slopes(self) -> Tensor:
        """What a unit of the maps' scores (hashing.slopes) stands for as the loss has it, in nats:
        (lists,)."""
        recipe, group = self.recipe, self.config.query_heads // self.config.key_maps
        slopes = self.log_scale.detach().exp()
        if recipe.average_group:
            count = self.config.bits if self.digits is None else self.digits.levels.shape[-1]
            slopes = slopes / (count if recipe.group == "each" else count * group)
        # a matching bit instead of one that differs turns -1 to 1
        return slopes.repeat_interleave(group) if recipe.group == "each" else 2 * slopes

    def maps(self) -> LayerMaps:
        """Current maps of raw inputs: normalisation folded into the first stage, then rounded."""
        maps = self._maps([p.detach().clone() for p in self.parameters])
        if self.digits is not None:
            maps = Digits(self._quantiser.levels.detach()).expand(maps)
        key_stats, query_stats = self._map_stats()
        folded = LayerMaps(maps.key.fold_input(*key_stats), maps.query.fold_input(*query_stats))
        # here and not on saving, so that evaluations judge the very codes that will be used
        return folded.rounded() if self.recipe.precision == "bfloat16" else folded


def figure_of_merit(record: dict[str, float]) -> float:
    """What early stopping maximises: the mean of the three selection measures, or what the
    "sampling" loss is small for."""
    if "divergence" in record:
        return -record["divergence"]
    return (record["recall@4"] + record["recall@32"] + record["mass"]) / 3


def train_layer(
    captures: Sequence[CapturedLayer],
    validation: Sequence[CapturedLayer],
    config: HashConfig,
    recipe: TrainRecipe,
    *,
    seed: int = 0,
    label: str = "layer",
    progress: bool = True,
    start: LayerMaps | None = None,
) -> TrainedLayer:
    """Train one layer's maps; the maps of the best evaluation on `validation` are returned.

    captures, validation: the layer's CapturedLayer of each sequence. start: maps to go on from,
    instead of the recipe's `init`. history[0] is step 0, before any training; later records carry
    the mean loss since the one before.
    """
    trainer = LayerTrainer(captures, config, recipe, seed, start)
    started, best, best_merit, stale = time.perf_counter(), trainer.maps(), -math.inf, 0
    history: list[dict[str, float]] = []
    losses: list[float] = []
    bar = progress_bar(range(recipe.steps + 1), desc=label, disable=not progress)
    for number in bar:
        if number % recipe.evaluate_every == 0 or number == recipe.steps:
            maps = trainer.maps()
            quality = selection_quality(
                maps,
                validation,
                sink=recipe.sink,
                local=recipe.local,
                fraction=recipe.selection_fraction,
                group=recipe.group,
            )
            if recipe.loss == "sampling":
                spread = mean_divergence(
                    maps, trainer.slopes(), validation, recipe.group, recipe.sink, recipe.local
                )
                quality |= {} if spread is None else {"divergence": spread}
            mean_loss = {"loss": sum(losses) / len(losses)} if losses else {}
            history.append({"step": number, **mean_loss, **quality})
            losses.clear()
            bar.set_postfix({name: f"{value:.3f}" for name, value in quality.items()})
            if figure_of_merit(quality) > best_merit:
                best, best_merit, stale = maps, figure_of_merit(quality), 0
            else:
                stale += 1
            if stale >= recipe.patience:
                break
        if number < recipe.steps:
            losses.append(trainer.step(number))
    bar.close()
    slopes = map_slopes(best, validation, recipe.group, recipe.sink, recipe.local)
    history[-1]["seconds"] = time.perf_counter() - started
    return TrainedLayer(best, history, slopes)
