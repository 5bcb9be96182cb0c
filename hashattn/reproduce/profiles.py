"""Profiles: which model, hash weights, data and amounts the notebooks run with.

A profile is data/profiles/<name>.yaml, or any YAML file with the same fields. HASHATTN_PROFILE
names it and HASHATTN_RESULTS the folder of all profiles' results, so notebooks contain neither.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hashattn.base.checks import INT32_MAX, is_count, is_file_name, is_number, is_text, require
from hashattn.base.errors import HashAttnError
from hashattn.base.files import read_yaml
from hashattn.base.layout import LAYOUTS, Layout
from hashattn.base.repository import repository
from hashattn.evaluation.benchmarks.registry import BENCHMARKS, usual_benchmark
from hashattn.evaluation.benchmarks.ruler.specs import TASKS as RULER_TASKS
from hashattn.evaluation.benchmarks.ruler.styles import STYLES
from hashattn.evaluation.benchmarks.texts import KINDS
from hashattn.selectors import HASH_VARIANTS, METHODS

_DEFAULT = "embedded"
_USUAL_METHODS = (
    "dense",
    "oracle",
    "window",
    "random",
    "lsh",
    "double_sparsity",
    "quest",
    "hash",
)
DTYPES = ("float32", "bfloat16", "float16")
_DEVICES = ("auto", "cpu", "cuda")
_PLACEMENTS = ("single", "device_map", "tensor_parallel")
MEMORY = (32, 64, 128, 256)
_NAMING = (
    "a name for a folder in results/, of at most 200 bytes, without / and \\ and no leading dot"
)


class ProfileError(HashAttnError, ValueError):
    """A profile is missing or one of its fields is not valid."""


def _check(owner: object, rules: Mapping[str, tuple[bool, str]]) -> None:
    for field, (valid, allowed) in rules.items():
        require(valid, field, getattr(owner, field), allowed, ProfileError)


def _as_tuples(owner: object, *fields: str) -> None:
    """Turn lists, as YAML gives them, into tuples; ProfileError for any other type."""
    for field in fields:
        value = getattr(owner, field)
        _check(owner, {field: (isinstance(value, list | tuple), "a list")})
        object.__setattr__(owner, field, tuple(value))


def _are_counts(values: tuple) -> bool:
    return bool(values) and all(is_count(value, most=INT32_MAX) for value in values)


def _are_names(values: tuple) -> bool:
    return bool(values) and all(map(is_file_name, values)) and len(set(values)) == len(values)


def _are_some_of(values: tuple, allowed: tuple) -> bool:
    return bool(values) and all(value in allowed for value in values)


class _FromLengths(int):
    """A default derived from `lengths`: dataclasses.replace(lengths=...) derives it again."""


class _FromData(str):
    """A default derived from `data`: dataclasses.replace(data=...) derives it again."""


_RECIPES = ("default", "signs", "official")


@dataclass(frozen=True)
class HashTraining:
    """How much hash training a profile asks for.

    recipe: "default", "signs" or "official" (hashattn.hashing.TrainRecipe); layout, bits, depth,
    hidden: of the hash maps; sequences: training sequences, the longest of `length` tokens; steps:
    at most this many per layer, None for the recipe's own number; texts: kinds of text to learn
    from (evaluation.benchmarks.texts), none for the generated tasks. Raises ProfileError.
    """

    recipe: str = "default"
    layout: Layout = "per_kv_head"
    bits: int = 32
    depth: int = 1
    hidden: int = 128
    sequences: int = 24
    length: int = 4096
    steps: int | None = None
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _as_tuples(self, "texts")
        rules = {
            "texts": (all(kind in KINDS for kind in self.texts), f"some of {', '.join(KINDS)}"),
            "recipe": (self.recipe in _RECIPES, " or ".join(_RECIPES)),
            "layout": (self.layout in LAYOUTS, " or ".join(LAYOUTS)),
            "bits": (is_count(self.bits) and self.bits % 32 == 0, "a positive multiple of 32"),
            "depth": (is_count(self.depth, most=3), "1, 2 or 3"),
            "steps": (self.steps is None or is_count(self.steps), "a positive integer or null"),
        }
        rules |= {
            field: (is_count(getattr(self, field)), "a positive integer")
            for field in ("hidden", "sequences", "length")
        }
        _check(self, rules)

    def at_most(self, steps: int) -> int:
        """`steps`, or this profile's number where that is smaller."""
        return min(steps, self.steps or steps)


@dataclass(frozen=True)
class RulerRuns:
    """How much of RULER a profile runs: `samples` of each task at each length (tokens, the answer
    included). style: the wording, a key of evaluation.benchmarks.ruler.STYLES; "facts" for a model
    that knows only the patterns of the generated tasks, as the embedded one. chat: ask through the
    tokenizer's chat template. Raises ProfileError.
    """

    tasks: tuple[str, ...] = tuple(RULER_TASKS)
    lengths: tuple[int, ...] = (4096,)
    samples: int = 5
    style: str = "plain"
    chat: bool = False

    def __post_init__(self) -> None:
        _as_tuples(self, "tasks", "lengths")
        rules = {
            "tasks": (
                _are_some_of(self.tasks, tuple(RULER_TASKS)),
                f"some of {', '.join(RULER_TASKS)}",
            ),
            "lengths": (
                _are_counts(self.lengths) and min(self.lengths) >= 1024,
                "integers of at least 1024",
            ),
            "samples": (is_count(self.samples), "a positive integer"),
            "style": (self.style in tuple(STYLES), " or ".join(STYLES)),
            "chat": (type(self.chat) is bool, "true or false"),
        }
        _check(self, rules)


@dataclass(frozen=True)
class Profile:
    """One scale of the whole reproduction.

    model, hash_weights, data: a path in the repository, an absolute path or, for model and data,
    a hub id ("org/name"); hash_weights None: notebook 01 trains them.
    benchmark: the questions and how answers are scored, a key of evaluation.benchmarks.registry; by
    default "folder", the files of `data`, or "generated" without data. tasks: of the benchmark, or
    names of files; lengths: context lengths in tokens; frontier_length, longest_length: those
    at which all methods and at which only the main ones are compared (after construction never
    None; by default the second longest, or the only one, and the longest); densities: attended /
    cached tokens, sink and local included; methods: names of selectors or of HASH_VARIANTS;
    samples_per_task: records per task and length; template, metric: prompt and score of generated
    records and of files in a folder (hashattn.evaluation.Protocol); prompt_limit: tokens of
    LongBench's longest prompt, None for the length at hand; chat: whether LongBench's prompts use
    the chat template, false for base models; memory: nominal bits per token and KV head at which
    methods are compared, on `sequences` held-out sequences per length; layers: those of which
    recall and output errors are measured, None for all; texts: kinds of held-out text
    (evaluation.benchmarks.texts) that fidelity reads and, where text trains the hashes, recall and
    output errors too, `documents` of each, fidelity at document_lengths, none for frontier_length
    alone; crowded: records of each crowded task
    (evaluation.benchmarks.crowded) at longest_length; ruler: the part of RULER that runs; contexts:
    cached tokens of the latency figures; repeats: timings per latency point.
    placement: how many GPUs hold the model: "single", one `device`; "device_map", layer by layer
    over all GPUs of this machine, then its memory; "tensor_parallel", each layer split over the
    processes that torchrun started, one GPU each (see hashattn.reproduce.access.load_model).
    Raises ProfileError naming the field, its value and what is allowed.
    """

    name: str
    model: str
    hash_weights: str | None
    data: str | None
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    densities: tuple[float, ...]
    samples_per_task: int
    contexts: tuple[int, ...]
    frontier_length: int | None = None
    longest_length: int | None = None
    methods: tuple[str, ...] = _USUAL_METHODS
    memory: tuple[int, ...] = (32, 128)
    sequences: int = 2
    layers: tuple[int, ...] | None = None
    texts: tuple[str, ...] = ("documentation",)
    documents: int = 2
    document_lengths: tuple[int, ...] = ()
    crowded: int = 4
    training: HashTraining = HashTraining()
    ruler: RulerRuns = RulerRuns()
    benchmark: str | None = None
    template: str = "{context}\nQ: {input}"
    metric: str = "exact_match"
    prompt_limit: int | None = None
    chat: bool = True
    sink: int = 4
    local: int = 28
    repeats: int = 20
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    placement: str = "single"

    def __post_init__(self) -> None:
        _as_tuples(self, "tasks", "lengths", "densities", "contexts", "methods", "memory", "texts",
                   "document_lengths")  # fmt: skip
        if self.layers is not None:
            _as_tuples(self, "layers")
        rules = {"name": (is_file_name(self.name), _NAMING)}
        rules |= {
            field: (is_text(getattr(self, field)), "a text")
            for field in ("model", "template", "metric")
        }
        weights = self.hash_weights
        rules["hash_weights"] = (weights is None or is_text(weights), "a folder or null")
        rules["data"] = (self.data is None or is_text(self.data), "a folder, a hub id or null")
        _check(self, rules)
        if self.benchmark is None or isinstance(self.benchmark, _FromData):
            object.__setattr__(self, "benchmark", _FromData(usual_benchmark(self.data)))
        known = " or ".join(BENCHMARKS)
        _check(self, {"benchmark": (self.benchmark in tuple(BENCHMARKS), known)})
        benchmark = BENCHMARKS[self.benchmark]
        rules = {
            "data": (
                (self.data is not None) == benchmark.reads_files,
                f"the folder or hub id of what benchmark {self.benchmark!r} reads"
                if benchmark.reads_files
                else f"null, as benchmark {self.benchmark!r} generates its records",
            ),
            "prompt_limit": (
                self.prompt_limit is None or (benchmark.limited and is_count(self.prompt_limit)),
                "a positive integer where the benchmark is LongBench, else null",
            ),
            "chat": (type(self.chat) is bool, "true or false"),
            "tasks": (
                _are_some_of(self.tasks, benchmark.tasks)
                if benchmark.tasks
                else _are_names(self.tasks),
                f"some of {', '.join(benchmark.tasks)}"
                if benchmark.tasks
                else "names of datasets, each once",
            ),
            "lengths": (_are_counts(self.lengths), "positive integers"),
            "contexts": (_are_counts(self.contexts), "positive integers"),
            "densities": (
                bool(self.densities) and all(is_number(d) and 0 < d <= 1 for d in self.densities),
                "numbers above 0 and at most 1",
            ),
            "methods": (
                _are_some_of(self.methods, (*METHODS, *HASH_VARIANTS)),
                f"some of {', '.join((*METHODS, *HASH_VARIANTS))}",
            ),
            "memory": (
                all(map(is_count, self.memory)) and _are_some_of(self.memory, MEMORY),
                f"some of {', '.join(map(str, MEMORY))}",
            ),
            "sequences": (is_count(self.sequences), "a positive integer"),
            "layers": (
                self.layers is None
                or bool(self.layers)
                and all(is_count(layer, 0, INT32_MAX) for layer in self.layers),
                "numbers of layers, from 0, or null",
            ),
            "samples_per_task": (is_count(self.samples_per_task), "a positive integer"),
            "texts": (_are_some_of(self.texts, tuple(KINDS)), f"some of {', '.join(KINDS)}"),
            "documents": (is_count(self.documents), "a positive integer"),
            "document_lengths": (
                not self.document_lengths or _are_counts(self.document_lengths),
                "positive integers, or none for frontier_length",
            ),
            "crowded": (is_count(self.crowded), "a positive integer"),
            "repeats": (is_count(self.repeats), "a positive integer"),
            "sink": (is_count(self.sink, 0, INT32_MAX), "zero or a positive integer"),
            "local": (is_count(self.local, 1, INT32_MAX), "a positive integer"),
            "seed": (type(self.seed) is int, "an integer"),
            "dtype": (self.dtype in DTYPES, " or ".join(DTYPES)),
            "device": (self.device in _DEVICES, " or ".join(_DEVICES)),
            "placement": (self.placement in _PLACEMENTS, " or ".join(_PLACEMENTS)),
        }
        if self.placement in _PLACEMENTS[1:] and self.device == "cpu":
            rules["device"] = (False, f"auto or cuda with placement {self.placement!r}")
        _check(self, rules)
        ascending = sorted(set(self.lengths))
        for field, place in (("frontier_length", -2), ("longest_length", -1)):
            value = getattr(self, field)
            if value is None or isinstance(value, _FromLengths):
                value = _FromLengths(ascending[max(place, -len(ascending))])
                object.__setattr__(self, field, value)
            listed = is_count(value) and value in ascending
            _check(self, {field: (listed, f"one of lengths, {', '.join(map(str, ascending))}")})

    @property
    def results(self) -> Path:
        """The folder of this profile's results: <results_root()>/<name>."""
        return results_root() / self.name

    @property
    def hash_weights_path(self) -> Path | None:
        """The folder of the trained hash weights, whether it exists yet or not."""
        return repository() / self.hash_weights if self.hash_weights else None

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)


def results_root() -> Path:
    """The folder of all profiles' results: HASHATTN_RESULTS, else results/ in the repository."""
    root = os.environ.get("HASHATTN_RESULTS")
    return Path(root).resolve() if root else repository() / "results"


def available() -> list[str]:
    """Names of the profiles that come with the repository."""
    return sorted(path.stem for path in (repository() / "data" / "profiles").glob("*.yaml"))


def profile_path(name: str | None = None) -> Path:
    """The YAML file of `name`: a profile's name or a path; None means HASHATTN_PROFILE's."""
    name = name or os.environ.get("HASHATTN_PROFILE") or _DEFAULT
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = repository() / "data" / "profiles" / f"{name}.yaml"
    if not path.is_file():
        raise ProfileError(
            f"no profile {name!r}: use one of {', '.join(available())}, or the path of a .yaml file"
        )
    return path.resolve()


def load_profile(name: str | None = None) -> Profile:
    """The profile called `name` (a name or a .yaml path; None: HASHATTN_PROFILE, else embedded).

    Raises ProfileError when it does not exist or a field is missing, unknown or not valid.
    """
    path = profile_path(name)
    fields = read_yaml(path, ProfileError)
    if not isinstance(fields, dict):
        raise ProfileError(f"{path} must hold the fields of a profile, one a line")
    try:
        sections = {
            "training": _built(HashTraining, fields.get("training"), "training."),
            "ruler": _built(RulerRuns, fields.get("ruler"), "ruler."),
        }
        return _built(Profile, {"name": path.stem} | fields | sections, "")
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from error


def _built(kind: type, fields: Any, prefix: str) -> Any:
    """An instance of a dataclass, its defaults for fields None; ProfileError names `prefix`, field
    and what is wrong with it."""
    fields = {} if fields is None else fields
    section = prefix.removesuffix(".")
    require(isinstance(fields, dict), section, fields, "fields, one a line", ProfileError)
    known = {field.name: field for field in dataclasses.fields(kind)}
    for field in fields:
        if field not in known:
            near = get_close_matches(str(field), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"use {', '.join(known)}"
            raise ProfileError(f"{prefix}{field} is not a field of a profile; {hint}")
    for name, field in known.items():
        if name not in fields and field.default is dataclasses.MISSING:
            raise ProfileError(f"{prefix}{name} is missing: every profile needs it")
    try:
        return kind(**fields)
    except ProfileError as error:
        raise ProfileError(f"{prefix}{error}") from error
