"""Hash training: a model and sequences in, hash weights out, resumable layer by layer.

The model runs once over every sequence and its queries and keys are kept on disk; then each layer
learns alone. A captured sequence and a trained layer are the units of work: both are written
atomically under `out_dir` and reused after an interruption, with the same final weights. On a CPU a
layer trains on one thread, whatever there is, and layers train side by side, in processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hashattn.base.engines import Engine, InProcess, chosen_engine
from hashattn.base.engines.processes import Processes, processes_that_fit
from hashattn.base.engines.threads import thread_count
from hashattn.base.errors import HashWeightsError
from hashattn.base.files import FileError, read_json, write_json
from hashattn.base.progress import progress_bar, say
from hashattn.base.tensors import read_tensors, write_tensors
from hashattn.hashing.benchmarks import benchmarks_field
from hashattn.hashing.capture import CapturedLayer, capture
from hashattn.hashing.layer import TrainedLayer, figure_of_merit, train_layer
from hashattn.hashing.maps import HashConfig, LayerMaps
from hashattn.hashing.recipe import TrainRecipe
from hashattn.hashing.start import check_start, start_record
from hashattn.hashing.weights import HashWeights, config_for
from hashattn.models.identity import base_model_record

SequenceRows = tuple[Tensor, Tensor]
HELD_OUT = 8  # without a validation set, every 8th sequence is held out
STEPS_WORTH_PROCESSES = 500  # of all layers; fewer are done before a process has started
CODE_VERSION = 3  # raise when training changes, so that old layers are not reused


def train_hash_weights(
    model: nn.Module,
    sequences: Iterable[SequenceRows],
    recipe: TrainRecipe | None = None,
    *,
    out_dir: str | Path,
    layout: str = "per_kv_head",
    bits: int = 32,
    depth: int = 2,
    hidden: int = 128,
    activation: str = "silu",
    layers: Collection[int] | None = None,
    seed: int = 0,
    validation: Iterable[SequenceRows] | None = None,
    data_note: str = "",
    benchmarks: Mapping[str, Any] | None = None,
    start: HashWeights | None = None,
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
    (fine-tuning) instead of the recipe's `init`; the card names them. Finished layers in
    out_dir/layers are reused if model, data, recipe, shapes, seed and start are the same, trained
    again otherwise; the weights are also saved in out_dir. capture_dir: where captured queries
    and keys are kept, for other trainings on the same sequences; None: out_dir, until the end.
    engine: where layers are trained, by default the environment's choice (base.engines); on
    this machine's CPU, long trainings run in as many processes as torch has threads here and memory
    allows. The weights are the same.
    Raises ValueError for unusable sequences or settings or a start that does not fit;
    UnsupportedModelError as `capture` does; EngineError when a process is lost.
    """
    stated = benchmarks_field(benchmarks)
    recipe = recipe or TrainRecipe.default()
    config = config_for(
        model,
        layers=layers,
        layout=layout,
        bits=bits,
        depth=depth,
        hidden=hidden,
        activation=activation,
    )
    if start is not None:
        check_start(start, config, model)
    train, held_out = _split(sequences, validation)
    run = _Run(
        Path(out_dir),
        Path(capture_dir or Path(out_dir) / "captured"),
        config,
        recipe,
        seed,
        progress,
        model.device,
        {
            "model": base_model_record(model),
            "train": data_hash(train),
            "validation": data_hash(held_out),
            "chunk": chunk,
        },
        start,
    )
    finished = run.finished_layers()
    missing = [layer for layer in config.layers if layer not in finished]
    if missing:
        run.capture(model, [*train, *held_out], chunk)
        engine = engine or run.engine(len(missing))
        tasks = (
            [run.task(layer, len(train), len(held_out), by_path=engine.local)] for layer in missing
        )
        with thread_count(1 if run.device.type == "cpu" else torch.get_num_threads()):
            for layer, trained in engine.run(run.trainer, tasks):
                run.keep(layer, trained)
                finished[layer] = trained
    card = {
        "trained": True,
        "base_model": run.inputs["model"],
        "seed": seed,
        "recipe": dataclasses.asdict(recipe),
        "validation": _curves(finished),
        "data": {
            "note": data_note,
            **stated,
            "train": _data_record(train),
            "validation": _data_record(held_out),
        },
    }
    if start is not None:
        card["started_from"] = start_record(start)
    maps = {layer: trained.maps for layer, trained in sorted(finished.items())}
    weights = HashWeights(config, maps, card)
    weights.save(run.out_dir)
    if capture_dir is None:
        shutil.rmtree(run.captures, ignore_errors=True)
    return weights


@dataclasses.dataclass(frozen=True)
class _Run:
    """One training run: its settings, its directory and the work already done there."""

    out_dir: Path
    captures: Path
    config: HashConfig
    recipe: TrainRecipe
    seed: int
    progress: bool
    device: torch.device
    inputs: dict[str, Any]
    start: HashWeights | None = None

    @property
    def key(self) -> str:
        """Identity of everything that decides a layer's weights (but which other layers train)."""
        shapes = {k: v for k, v in dataclasses.asdict(self.config).items() if k != "layers"}
        start = [] if self.start is None else [self.start.sha256]
        return _digest(
            [CODE_VERSION, self.inputs, shapes, dataclasses.asdict(self.recipe), self.seed, *start]
        )

    def _layer_file(self, layer: int) -> Path:
        return self.out_dir / "layers" / f"layer_{layer:03d}.safetensors"

    def _capture_dir(self) -> Path:
        return self.captures / _digest([self.inputs, self.config.layers, self._values])[:16]

    @property
    def _values(self) -> bool:
        """Whether the recipe looks at values, which are captured for it alone."""
        return self.recipe.weigh == "output"

    def say(self, message: str) -> None:
        """A line of progress, if progress is wanted."""
        if self.progress:
            say(message)

    def finished_layers(self) -> dict[int, TrainedLayer]:
        """Layers an earlier run with the same settings finished."""
        found = {}
        for layer in self.config.layers:
            record = self._layer_file(layer).with_suffix(".json")
            if not record.is_file():
                continue
            try:
                content = read_json(record)
            except FileError:
                continue  # damaged: the layer is trained again
            if isinstance(content, dict) and content.get("key") == self.key:
                tensors = read_tensors(
                    self._layer_file(layer),
                    HashWeightsError,
                    f"delete {record} to train the layer again",
                )
                found[layer] = TrainedLayer(
                    LayerMaps.from_tensors(tensors, self.config), content["history"]
                )
        if found:
            self.say(
                f"reused {len(found)} of {len(self.config.layers)} trained layers: {sorted(found)}"
            )
        return found

    def capture(self, model: nn.Module, sequences: Sequence[SequenceRows], chunk: int) -> None:
        """Write every sequence's queries and keys, one file each, skipping those there."""
        directory = self._capture_dir()
        directory.mkdir(parents=True, exist_ok=True)
        numbered = [
            (i, s) for i, s in enumerate(sequences) if not _sequence_file(directory, i).is_file()
        ]
        for i, (ids, rows) in progress_bar(
            numbered, desc="queries and keys", disable=not self.progress
        ):
            found = capture(
                model, ids, rows=rows, chunk=chunk, layers=self.config.layers, values=self._values
            )
            _save_captures(_sequence_file(directory, i), found)

    @property
    def trainer(self) -> _Trainer:
        return _Trainer(self.config, self.recipe, self.progress, self.device)

    def engine(self, layers: int) -> Engine:
        """The environment's; instead of this process, several, where that is worth their start."""
        engine, steps = chosen_engine(), layers * self.recipe.steps
        if (
            not isinstance(engine, InProcess)
            or self.device.type != "cpu"
            or steps < STEPS_WORTH_PROCESSES
        ):
            return engine
        files = self._capture_dir().glob("*.safetensors")
        captured = sum(path.stat().st_size for path in files) // len(self.config.layers)
        count = processes_that_fit(layers, 2 * captured)  # with their labels
        return Processes(count) if count > 1 else engine

    def task(self, layer: int, train: int, held_out: int, by_path: bool) -> _LayerTask:
        """A layer's part of the captured files: the first `train` of them, then `held_out`; or, for
        other machines, what is in it."""
        captures: list[CapturedLayer | Path] = [
            _sequence_file(self._capture_dir(), i) for i in range(train + held_out)
        ]
        if not by_path:
            captures = [_load_capture(path, layer, self.device) for path in captures]
        start = None if self.start is None else self.start.maps[layer]
        seed = self.seed * 1000 + layer
        return _LayerTask(layer, captures[:train], captures[train:], seed, start)

    def keep(self, layer: int, trained: TrainedLayer) -> None:
        """Write a trained layer down."""
        path = self._layer_file(layer)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, dict(trained.maps.tensors()))
        write_json(path.with_suffix(".json"), {"key": self.key, "history": trained.history})


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
                _load_capture(found, task.layer, self.device) if isinstance(found, Path) else found
                for found in captures
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


def _sequence_file(directory: Path, number: int) -> Path:
    return directory / f"sequence_{number:05d}.safetensors"


def _save_captures(path: Path, captures: dict[int, CapturedLayer]) -> None:
    tensors = {}
    for layer, captured in captures.items():
        tensors |= {f"{layer}.queries": captured.queries, f"{layer}.keys": captured.keys}
        if captured.values is not None:
            tensors[f"{layer}.values"] = captured.values
        logits = [captured.scaling, float("nan") if captured.softcap is None else captured.softcap]
        tensors[f"{layer}.logits"] = torch.tensor(logits, dtype=torch.float64)
        tensors["positions"] = captured.positions
    write_tensors(path, tensors)


def _load_capture(path: Path, layer: int, device: torch.device) -> CapturedLayer:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        scaling, softcap = file.get_tensor(f"{layer}.logits").tolist()
        queries, positions, keys = (
            file.get_tensor(name).to(device)
            for name in (f"{layer}.queries", "positions", f"{layer}.keys")
        )
        softcap = None if math.isnan(softcap) else softcap
        name = f"{layer}.values"
        values = file.get_tensor(name).to(device) if name in file.keys() else None
        return CapturedLayer(layer, queries, positions, keys, scaling, softcap, values)


def _split(
    sequences: Iterable[SequenceRows], validation: Iterable[SequenceRows] | None
) -> tuple[list[SequenceRows], list[SequenceRows]]:
    train = [_checked(s) for s in sequences]
    if validation is not None:
        held_out = [_checked(s) for s in validation]
    else:
        held_out = train[HELD_OUT - 1 :: HELD_OUT] or train[1:][-1:]
        chosen = {id(s) for s in held_out}
        train = [s for s in train if id(s) not in chosen]
    if not train or not held_out:
        raise ValueError(
            f"{len(train)} training and {len(held_out)} validation sequences: pass "
            "at least two sequences, or one and a validation set"
        )
    return train, held_out


def _checked(sequence: SequenceRows) -> SequenceRows:
    ids, rows = (torch.as_tensor(part).cpu().long().reshape(-1) for part in sequence)
    if not ids.numel() or not rows.numel():
        raise ValueError(
            f"a sequence has {ids.numel()} tokens and {rows.numel()} rows: each needs "
            "at least one of both"
        )
    return ids, rows.unique()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def data_hash(sequences: Sequence[SequenceRows]) -> str:
    """sha256 over the tokens and rows of all sequences, in order."""
    digest = hashlib.sha256()
    for ids, rows in sequences:
        digest.update(f"{ids.numel()} {rows.numel()}\n".encode())
        digest.update(ids.numpy().tobytes() + rows.numpy().tobytes())
    return digest.hexdigest()


def _data_record(sequences: Sequence[SequenceRows]) -> dict[str, Any]:
    return {
        "sequences": len(sequences),
        "tokens": sum(ids.numel() for ids, _ in sequences),
        "longest": max(ids.numel() for ids, _ in sequences),
        "rows": sum(rows.numel() for _, rows in sequences),
        "sha256": data_hash(sequences),
    }


def _curves(layers: dict[int, TrainedLayer]) -> dict[str, Any]:
    """Per layer: the whole curve and the record that was kept; keys are strings, as in JSON."""
    return {
        str(layer): {"best": max(trained.history, key=figure_of_merit), "curve": trained.history}
        for layer, trained in sorted(layers.items())
    }
