"""Hash training: a model and sequences in, hash weights out, resumable layer by layer.

The model runs once over every sequence and its queries and keys are kept on disk; then each layer
learns alone. A captured sequence and a trained layer are the units of work: both are kept in the
run's folder and reused after an interruption, with the same final weights. On a CPU a layer trains
on one thread, whatever there is, and layers train side by side, in processes.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hashattn.base.engines import Engine, chosen_engine
from hashattn.base.engines.processes import spread
from hashattn.base.engines.threads import thread_count
from hashattn.base.layout import Layout
from hashattn.base.progress import progress_bar, say
from hashattn.hashing.capture import CapturedLayer, capture
from hashattn.hashing.capture_files import load_capture, save_captures
from hashattn.hashing.card import benchmarks_field, slopes_field
from hashattn.hashing.layer import TrainedLayer, figure_of_merit, train_layer
from hashattn.hashing.maps import HashConfig, LayerMaps
from hashattn.hashing.recipe import TrainRecipe
from hashattn.hashing.run_folder import RunFolder
from hashattn.hashing.sequences import SequenceRows, data_hash, data_record, shifts, split_sequences
from hashattn.hashing.start import check_start, start_record
from hashattn.hashing.weights import HashWeights, config_for
from hashattn.models.identity import base_model_record

STEPS_WORTH_PROCESSES = 500  # of all layers; fewer are done before a process has started


def train_hash_weights(
    model: nn.Module,
    sequences: Iterable[SequenceRows],
    recipe: TrainRecipe | None = None,
    *,
    out_dir: str | Path,
    layout: Layout = "per_kv_head",
    bits: int = 32,
    depth: int | None = None,
    hidden: int = 128,
    activation: str = "silu",
    folds: int | None = None,
    layers: Collection[int] | None = None,
    seed: int = 0,
    validation: Iterable[SequenceRows] | None = None,
    data_note: str = "",
    benchmarks: Mapping[str, Any] | None = None,
    start: HashWeights | None = None,
    reach: int | None = None,
    chunk: int = 1024,
    capture_dir: str | Path | None = None,
    progress: bool = True,
    engine: Engine | None = None,
) -> HashWeights:
    """Train hash maps for every full-attention layer (or `layers`) of a causal LM.

    sequences: (input_ids (n,), rows (r,)): tokens and the positions whose queries are learned
    from. validation: the same, for early stopping; every 8th sequence if not given. data_note:
    what the data is and how it overlaps with benchmarks, for the card; benchmarks: whose samples
    the sequences hold, for the card too (benchmarks_field). start: weights to go on from
    (fine-tuning) instead of the recipe's `init`; the card names them. depth, folds: of the maps, by
    default those of the recipe. reach: the longest context in tokens that the codes shall serve;
    every other sequence is placed anywhere in it by rotary position (capture's `shift`), for models
    that have no other. Finished layers in
    out_dir/layers are reused if model, data, recipe, shapes, seed and start are the same, trained
    again otherwise; the weights are also saved in out_dir. capture_dir: where captured queries
    and keys are kept, for other trainings on the same sequences; None: out_dir, until the end.
    engine: where layers are trained, by default the environment's choice (base.engines); on
    this machine's CPU, long trainings run in as many processes as torch has threads here and memory
    allows. The weights are the same.
    Raises ValueError for unusable sequences or settings or a start that does not fit;
    UnsupportedModelError as `capture` does; EngineError when a process is lost.
    """
    benchmarks_section = benchmarks_field(benchmarks)
    recipe = recipe or TrainRecipe.default()
    shape = {name: value for name, value in (("depth", depth), ("folds", folds))
             if value is not None}  # fmt: skip
    config = config_for(
        model,
        layers=layers,
        layout=layout,
        bits=bits,
        hidden=hidden,
        activation=activation,
        **(recipe.shape | shape if start is None else _shape(start) | shape),
    )
    if start is not None:
        check_start(start, config, model)
    train, held_out = split_sequences(sequences, validation)
    placed = shifts([*train, *held_out], reach)
    base_model = base_model_record(model)
    folder = RunFolder(
        path=Path(out_dir),
        captures=Path(capture_dir or Path(out_dir) / "captured"),
        config=config,
        recipe=recipe,
        seed=seed,
        inputs={
            "model": base_model,
            "train": data_hash(train),
            "validation": data_hash(held_out),
            "chunk": chunk,
            **({"reach": reach} if any(placed) else {}),
        },
        start_sha256=None if start is None else start.sha256,
    )
    if len(folder.finished_layers()) < len(config.layers):
        _capture_sequences(model, [*train, *held_out], placed, folder, chunk, progress)
    files = [folder.sequence_file(number) for number in range(len(train) + len(held_out))]
    finished = train_layers(
        folder, files[: len(train)], files[len(train) :], start=start, device=model.device,
        progress=progress, engine=engine,
    )  # fmt: skip
    card = {
        "trained": True,
        "base_model": base_model,
        "seed": seed,
        "recipe": dataclasses.asdict(recipe),
        "validation": curves(finished),
        **slopes_field({layer: trained.slopes for layer, trained in sorted(finished.items())}),
        "data": {
            "note": data_note,
            **benchmarks_section,
            **({"reach": reach} if any(placed) else {}),
            "train": data_record(train),
            "validation": data_record(held_out),
        },
    }
    if start is not None:
        card["started_from"] = start_record(start)
    maps = {layer: trained.maps for layer, trained in sorted(finished.items())}
    weights = HashWeights(config, maps, card)
    weights.save(out_dir)
    if capture_dir is None:
        shutil.rmtree(folder.captures, ignore_errors=True)
    return weights


def _shape(start: HashWeights) -> dict[str, int]:
    """Of the maps that training goes on from."""
    return {"depth": start.config.depth, "folds": start.config.folds}


def _capture_sequences(
    model: nn.Module,
    sequences: Sequence[SequenceRows],
    placed: Sequence[int],
    folder: RunFolder,
    chunk: int,
    progress: bool,
) -> None:
    """Write every sequence's queries and keys, one file each, skipping files that exist."""
    missing = [
        (number, sequence)
        for number, sequence in enumerate(sequences)
        if not folder.sequence_file(number).is_file()
    ]
    for number, (ids, rows) in progress_bar(missing, desc="queries and keys", disable=not progress):
        captures = capture(
            model,
            ids,
            rows=rows,
            chunk=chunk,
            layers=folder.config.layers,
            values=folder.recipe.reads_values,
            shift=placed[number],
        )
        save_captures(folder.sequence_file(number), captures)


def train_layers(
    folder: RunFolder,
    train: Sequence[Path],
    held_out: Sequence[Path],
    *,
    start: HashWeights | None = None,
    device: torch.device,
    progress: bool = True,
    engine: Engine | None = None,
) -> dict[int, TrainedLayer]:
    """The trained layers of folder.config, in no order: those that the folder has, and the others
    after training on captured sequences (files of hashing.capture_files) from `start` or, without
    it, from where the recipe begins.

    engine: as of train_hash_weights. EngineError when a process is lost, HashWeightsError for a
    damaged layer's file.
    """
    finished = folder.finished_layers()
    if finished and progress:
        layers = folder.config.layers
        say(f"reused {len(finished)} of {len(layers)} trained layers: {sorted(finished)}")
    missing = [layer for layer in folder.config.layers if layer not in finished]
    if missing:
        trainer = _Trainer(folder.config, folder.recipe, progress, device)
        engine = engine or _engine(folder, len(missing), [*train, *held_out], device)
        tasks = (
            [_task(folder.seed, layer, train, held_out, start, device, engine.local)]
            for layer in missing
        )
        with thread_count(1 if device.type == "cpu" else torch.get_num_threads()):
            for layer, trained in engine.run(trainer, tasks):
                folder.keep(layer, trained)
                finished[layer] = trained
    return finished


def _engine(folder: RunFolder, layers: int, files: Sequence[Path], device: torch.device) -> Engine:
    """The environment's choice; several processes instead of this one where they are worth it."""
    if layers * folder.recipe.steps < STEPS_WORTH_PROCESSES:
        return chosen_engine()
    layer_bytes = sum(path.stat().st_size for path in files) // len(folder.config.layers)
    return spread(layers, 2 * layer_bytes, device)  # twice, for the labels beside them


def _task(
    seed: int,
    layer: int,
    train: Sequence[Path],
    held_out: Sequence[Path],
    start: HashWeights | None,
    device: torch.device,
    by_path: bool,
) -> _LayerTask:
    """A layer's part of the captured files; or, for other machines, what is in it."""

    def part(files: Sequence[Path]) -> list[CapturedLayer | Path]:
        return list(files) if by_path else [load_capture(path, layer, device) for path in files]

    return _LayerTask(
        layer,
        train=part(train),
        held_out=part(held_out),
        seed=seed * 1000 + layer,  # layers draw apart, in whatever order they train
        start=None if start is None else start.maps[layer],
    )


@dataclasses.dataclass(frozen=True)
class _LayerTask:
    """A layer to train; a path is of the captured sequence's file, to be read where it trains."""

    layer: int
    train: list[CapturedLayer | Path]
    held_out: list[CapturedLayer | Path]
    seed: int
    start: LayerMaps | None

    def __str__(self) -> str:
        return f"layer {self.layer}"


@dataclasses.dataclass(frozen=True)
class _Trainer:
    """Trains layers, here or in another process (Engine.run)."""

    config: HashConfig
    recipe: TrainRecipe
    progress: bool
    device: torch.device

    def __call__(self, tasks: Sequence[_LayerTask]) -> Iterator[tuple[int, TrainedLayer]]:
        for task in tasks:
            yield task.layer, self._train(task)

    def _train(self, task: _LayerTask) -> TrainedLayer:
        train, held_out = (
            [
                load_capture(captured, task.layer, self.device)
                if isinstance(captured, Path)
                else captured
                for captured in captures
            ]
            for captures in (task.train, task.held_out)
        )
        return train_layer(
            train,
            held_out,
            self.config,
            self.recipe,
            seed=task.seed,
            label=str(task),
            progress=self.progress,
            start=task.start,
        )


def curves(layers: Mapping[int, TrainedLayer]) -> dict[str, Any]:
    """Per layer: the whole curve and the record of the maps kept; keys are strings, as in JSON."""
    return {
        str(layer): {"best": max(trained.history, key=figure_of_merit), "curve": trained.history}
        for layer, trained in sorted(layers.items())
    }
