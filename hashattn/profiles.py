"""Profiles: which model, hash weights, data and amounts the notebooks run with.

A profile is data/profiles/<name>.yaml, or any YAML file of the same fields. `HASHATTN_PROFILE`
names it and `HASHATTN_RESULTS` the folder its results go to, so a notebook needs neither.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hashattn.errors import HashAttnError
from hashattn.evaluation.longbench_datasets import DATASETS, E_NAMES
from hashattn.evaluation.ruler.specs import TASKS as RULER_TASKS
from hashattn.selectors import METHODS

DEFAULT = "embedded"
USUAL_METHODS = (
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
DEVICES = ("auto", "cpu", "cuda")
PLACEMENTS = ("single", "device_map", "tensor_parallel")
HASH_VARIANTS = ("hash_128", "hash_official")  # the same selector with other weights
MEMORY = (32, 64, 128, 256)
LAYOUTS = ("per_kv_head", "per_query_head")
PROTOCOLS = ("own", "longbench", "authors")


class ProfileError(HashAttnError, ValueError):
    """A profile is missing or one of its fields is not valid."""


def repository() -> Path:
    """The checkout: the folder that holds data/profiles. Raises ProfileError outside of one."""
    root = Path(os.environ.get("HASHATTN_HOME", Path(__file__).parents[1])).resolve()
    if not (root / "data" / "profiles").is_dir():
        raise ProfileError(
            f"no data/profiles in {root}: run from a checkout of the repository, or set "
            "HASHATTN_HOME to one"
        )
    return root


def _check(owner: object, rules: dict[str, tuple[bool, str]]) -> None:
    for field, (valid, allowed) in rules.items():
        if not valid:
            raise ProfileError(f"{field} = {getattr(owner, field)!r} is not valid: use {allowed}")


def _counts(values: Any) -> bool:
    return bool(values) and all(type(v) is int and v > 0 for v in values)


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


@dataclass(frozen=True)
class HashTraining:
    """How much hash training a profile asks for.

    recipe: "default" or "official" (hashattn.hashing.TrainRecipe); layout, bits, depth, hidden:
    the maps' shapes; sequences: training sequences of `length` tokens; steps: at most this many
    per layer, None for the recipe's own number.
    """

    recipe: str = "default"
    layout: str = "per_kv_head"
    bits: int = 32
    depth: int = 2
    hidden: int = 128
    sequences: int = 24
    length: int = 4096
    steps: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "recipe": (self.recipe in ("default", "official"), "default or official"),
            "layout": (self.layout in LAYOUTS, " or ".join(LAYOUTS)),
            "bits": (_count(self.bits) and self.bits % 32 == 0, "a positive multiple of 32"),
            "depth": (self.depth in (1, 2, 3), "1, 2 or 3"),
            "steps": (self.steps is None or _count(self.steps), "a positive integer or null"),
        }
        rules |= {
            field: (_count(getattr(self, field)), "a positive integer")
            for field in ("hidden", "sequences", "length")
        }
        _check(self, rules)


@dataclass(frozen=True)
class RulerRuns:
    """How much of RULER a profile runs: `samples` of each task at each length (tokens, with the
    answer's)."""

    tasks: tuple[str, ...] = tuple(RULER_TASKS)
    lengths: tuple[int, ...] = (4096,)
    samples: int = 5

    def __post_init__(self) -> None:
        for field in ("tasks", "lengths"):
            value = getattr(self, field)
            _check(self, {field: (isinstance(value, list | tuple), "a list")})
            object.__setattr__(self, field, tuple(value))
        rules = {
            "tasks": (
                bool(self.tasks) and set(self.tasks) <= set(RULER_TASKS),
                f"some of {', '.join(RULER_TASKS)}",
            ),
            "lengths": (
                _counts(self.lengths) and min(self.lengths) >= 1024,
                "integers of at least 1024",
            ),
            "samples": (_count(self.samples), "a positive integer"),
        }
        _check(self, rules)


@dataclass(frozen=True)
class Profile:
    """One scale of the whole reproduction.

    model, hash_weights, data: a path in the repository, an absolute path or, for model and data,
    a hub id ("org/name"); hash_weights None means that notebook 01 trains them. data None means
    that the records are generated (hashattn.evaluation.tasks).
    tasks: dataset names; lengths: context lengths in tokens; densities: attended / cached tokens,
    sink and local counted; methods: names of selectors or of HASH_VARIANTS; samples_per_task:
    records per task and length; protocol: how records are asked and scored: "own" (template and
    metric, see hashattn.evaluation.Protocol), "longbench" (each dataset by the book) or "authors"
    (LongBench as the paper's authors ran it); prompt_limit: tokens of these two's longest prompt,
    None for the length at hand; chat: whether they use the chat template, no for base models;
    memory: nominal bits per token and KV head at which methods are compared;
    sequences: held-out sequences per length of that comparison; ruler: what of RULER runs;
    contexts: cached tokens of the latency figures; repeats: timings per latency point.
    placement: how many GPUs hold the model: "single", one of `device`; "device_map", layer by layer
    over all GPUs of this machine, then its memory; "tensor_parallel", each layer over the processes
    that torchrun started, a GPU each (see hashattn.access.load_model).
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
    methods: tuple[str, ...] = USUAL_METHODS
    memory: tuple[int, ...] = (32, 128)
    sequences: int = 2
    training: HashTraining = HashTraining()
    ruler: RulerRuns = RulerRuns()
    protocol: str = "own"
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
        for field in ("tasks", "lengths", "densities", "contexts", "methods", "memory"):
            value = getattr(self, field)
            _check(self, {field: (isinstance(value, list | tuple), "a list")})
            object.__setattr__(self, field, tuple(value))
        rules = {
            field: (isinstance(getattr(self, field), str) and bool(getattr(self, field)), "a text")
            for field in ("name", "model", "template", "metric")
        }
        official, names = self.protocol in ("longbench", "authors"), (*DATASETS, *E_NAMES)
        rules |= {
            "protocol": (self.protocol in PROTOCOLS, " or ".join(PROTOCOLS)),
            "prompt_limit": (
                self.prompt_limit is None or (official and _count(self.prompt_limit)),
                "a positive integer with protocol longbench or authors, else null",
            ),
            "chat": (type(self.chat) is bool, "true or false"),
            "tasks": (
                bool(self.tasks) and (not official or set(self.tasks) <= set(names)),
                f"some of {', '.join(names)}" if official else "at least one dataset name",
            ),
            "data": (
                self.data is not None or not official,
                f"the folder or hub id of LongBench, which protocol {self.protocol!r} asks",
            ),
            "lengths": (_counts(self.lengths), "positive integers"),
            "contexts": (_counts(self.contexts), "positive integers"),
            "densities": (
                bool(self.densities) and all(0 < d <= 1 for d in self.densities),
                "numbers above 0 and at most 1",
            ),
            "methods": (
                bool(self.methods) and set(self.methods) <= {*METHODS, *HASH_VARIANTS},
                f"some of {', '.join((*METHODS, *HASH_VARIANTS))}",
            ),
            "memory": (
                bool(self.memory) and set(self.memory) <= set(MEMORY),
                f"some of {', '.join(map(str, MEMORY))}",
            ),
            "sequences": (_count(self.sequences), "a positive integer"),
            "samples_per_task": (_count(self.samples_per_task), "a positive integer"),
            "repeats": (_count(self.repeats), "a positive integer"),
            "sink": (type(self.sink) is int and self.sink >= 0, "zero or a positive integer"),
            "local": (_count(self.local), "a positive integer"),
            "seed": (type(self.seed) is int, "an integer"),
            "dtype": (self.dtype in DTYPES, " or ".join(DTYPES)),
            "device": (self.device in DEVICES, " or ".join(DEVICES)),
            "placement": (self.placement in PLACEMENTS, " or ".join(PLACEMENTS)),
        }
        if self.placement in PLACEMENTS[1:] and self.device == "cpu":
            rules["device"] = (False, f"auto or cuda with placement {self.placement!r}")
        _check(self, rules)

    @property
    def results(self) -> Path:
        """Where this profile's results go: HASHATTN_RESULTS, else results/<name>."""
        return results_folder(self.name)

    @property
    def hash_weights_path(self) -> Path | None:
        """The folder of the trained hash weights, whether it exists yet or not."""
        return repository() / self.hash_weights if self.hash_weights else None

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)


def results_folder(name: str) -> Path:
    """HASHATTN_RESULTS, else results/<name> in the repository."""
    chosen = os.environ.get("HASHATTN_RESULTS")
    return Path(chosen).resolve() if chosen else repository() / "results" / name


def available() -> list[str]:
    """Names of the profiles that come with the repository."""
    return sorted(path.stem for path in (repository() / "data" / "profiles").glob("*.yaml"))


def profile_path(name: str | None = None) -> Path:
    """The YAML file of `name`: a profile's name or a path; None means HASHATTN_PROFILE's."""
    name = name or os.environ.get("HASHATTN_PROFILE", DEFAULT)
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
    import yaml

    path = profile_path(name)
    try:
        fields = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ProfileError(f"{path} is not YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ProfileError(f"{path} must hold the fields of a profile, one a line")
    try:
        fields["training"] = HashTraining(**(fields.get("training") or {}))
        fields["ruler"] = RulerRuns(**(fields.get("ruler") or {}))
        return Profile(**{"name": path.stem} | fields)
    except TypeError as error:  # dataclasses name the missing or unknown field
        raise ProfileError(f"{path}: {str(error).replace('__init__()', 'a profile')}") from error
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from error
