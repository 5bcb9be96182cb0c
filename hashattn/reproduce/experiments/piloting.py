"""Notebook 06: a pilot's model, its settings by profile, its pre-flight."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from hashattn.base.checks import require
from hashattn.base.environment import device_name
from hashattn.base.repository import repository
from hashattn.evaluation.methods import Method
from hashattn.evaluation.tables import POINTS
from hashattn.models.families import max_positions
from hashattn.pilot.capacity.devices import THIS_MACHINE, device_named
from hashattn.pilot.capacity.machine import Measurement, MeasurementError, measure
from hashattn.pilot.capacity.preflight import preflight
from hashattn.pilot.capacity.result import Preflight, Workload
from hashattn.pilot.capacity.shapes import ModelShape, model_shape
from hashattn.pilot.codes import PilotCodes
from hashattn.pilot.documents.library import Library, read_documents
from hashattn.pilot.documents.skipped import Skipped
from hashattn.pilot.judgement import UNJUDGED, Judgement
from hashattn.pilot.plan import Plan
from hashattn.pilot.report.numbers import fraction
from hashattn.pilot.settings import PilotSettings
from hashattn.reproduce.access import load_model
from hashattn.reproduce.pretrained import PREFIX, pretrained
from hashattn.reproduce.profiles import Profile, load_profile

_AUTO = "auto"
_EMBEDDED, _PRETRAINED = "data/embedded", "smollm2"


@dataclass(frozen=True)
class PilotModel:
    """A model with its tokenizer, the folder of codes shipped with it (None: none), what it is
    ("embedded", "pretrained" or "own") and what it is called."""

    model: Any
    tokenizer: Any
    shipped: Path | None
    note: str
    name: str


def pilot_model(profile: Profile, name: str = _AUTO) -> PilotModel:
    """The model of a pilot: a folder, a hub id, a GGUF file or "pretrained:<name>", as in profiles.

    "auto": the profile's; for a profile of the embedded model, SmolLM2 where `make pretrained` has
    fetched it (not under the profile of tests). Raises AccessError as load_model does.
    """
    if name == _AUTO:
        name = profile.model
        fetched = pretrained(_PRETRAINED).path.is_file() and profile.name != "tiny"
        if name == _EMBEDDED and fetched:
            name = PREFIX + _PRETRAINED
    if (repository() / name).resolve() == repository() / _EMBEDDED:
        name = _EMBEDDED
    known = {load_profile(each).model: each for each in ("embedded", _PRETRAINED)}
    own = profile if name == profile.model else replace(profile, model=name, hash_weights=None)
    own = load_profile(known[name]) if name in known else own
    model, tokenizer = load_model(own)
    note = {_EMBEDDED: "embedded", PREFIX + _PRETRAINED: "pretrained"}.get(name, "own")
    called = Path(name).name if (repository() / name).exists() else name
    return PilotModel(model, tokenizer, _shipped(own), note, called)


def _shipped(profile: Profile) -> Path | None:
    """The 64-bit codes of a profile's model where there are such, else its default ones if they are
    there."""
    folder = profile.hash_weights_path
    if folder is None:
        return None
    wide = folder.parent / "hash_variants" / "64_bits"
    return next((each for each in (wide, folder) if each.is_dir()), None)


def pilot_settings(
    profile: Profile, chosen: PilotModel, context: int, budgets: Sequence[float],
    samples: Mapping[str, int] | None = None,
) -> PilotSettings:  # fmt: skip
    """The notebook's own, samples being other fields of PilotSettings; under the profile of tests,
    fewer of everything. ValueError for a context beyond the model's positions."""
    positions = max_positions(chosen.model.config)
    allowed = f"at most {positions}, the model's positions (max_position_embeddings)"
    require(not positions or context <= positions, "context", context, allowed)
    own = PilotSettings(context=context, budgets=tuple(budgets), seed=profile.seed)
    if profile.name == "tiny":
        small = {"questions": 8, "quotes": 8, "texts": 5, "text_tokens": 16, "audits": 1}
        own = replace(own, context=min(context, 1664), **small)
    return replace(own, **(samples or {}))


def read_library(docs: Path, questions: Path | None) -> Library:
    """The documents of a folder; a file of questions among them is asked, not read."""
    library = read_documents(docs)
    if questions is None or not questions.resolve().is_relative_to(docs.resolve()):
        return library
    name = questions.resolve().relative_to(docs.resolve()).as_posix()
    kept = tuple(document for document in library.documents if document.name != name)
    return replace(library, documents=kept, skipped=(*library.skipped, Skipped(name, "questions")))


def path_of(name: str | None) -> Path | None:
    """A path as a notebook names it: relative to the repository."""
    return None if name is None else repository() / name


def about(chosen: PilotModel) -> str:
    """What the pilot's model is, and what that means for its answers."""
    notes = {
        "embedded": "a 4.6 M-parameter teaching model: its answers to a company's questions say "
        "nothing about a model you would run. `make pretrained` fetches one that others trained",
        "pretrained": "trained by others, with 135 M parameters far smaller than what a company "
        "would run: what holds here has to be measured again on your own model",
        "own": "your own",
    }
    return f"{chosen.name}: {notes[chosen.note]}"


def about_codes(codes: PilotCodes) -> str:
    """Which codes were chosen, and how much of dense attention's weight they find."""
    config = codes.weights.config
    text = f"{codes.origin}, {config.bits} bits a token and KV head"
    if codes.mass is None:
        return f"{text}; no text was left to judge them on"
    text += f"; on the company's text they find {codes.mass:.3f} of dense attention's weight"
    text += f", exact top-k {codes.of_exact:.3f}"
    return text + (f", the shipped ones {codes.before:.3f}" if codes.before is not None else "")


def about_reading(tried: Sequence[Method]) -> str:
    """How every budget is read."""
    budgets = [method.budget for method in tried[1:]]
    ways = [f"{fraction(b.density)} {'half drawn' if b.sampled else 'ranked'}" for b in budgets]
    return f"read: {', '.join(ways)}"


def judge_workload(
    chosen: PilotModel, workload: Mapping[str, Any], device: str, settings: PilotSettings,
    folder: Path,
) -> Preflight:  # fmt: skip
    """The pre-flight of a model for a workload (fields of capacity.Workload), at the largest budget
    that is tried: a smaller one gains more.

    On this machine, a micro-benchmark of its shapes is run once and kept in `folder`; ValueError
    where the model is on a GPU, which that does not time.
    """
    model, asked = chosen.model, device_named(device)
    here = asked.name == THIS_MACHINE
    require(not here or model.device.type == "cpu", "device", device,
            "the name of the GPU that the model is on")  # fmt: skip
    shape = model_shape(model.config, chosen.name, dtype=str(model.dtype).removeprefix("torch."))
    budget = settings.budgets[0]
    measured = _measured(shape, budget, folder) if here else None
    return preflight(shape, Workload(**workload), asked, budget=budget, measured=measured)


def _measured(shape: ModelShape, budget: float, folder: Path) -> Measurement:
    path = folder / "machine.json"
    try:
        kept = Measurement.load(path)
        kept.check(shape, budget, kept.bits, kept.lists)
        if kept.device == device_name():
            return kept
    except (MeasurementError, OSError):
        pass
    made = measure(shape, budget)
    made.save(path)
    return made


def long_context(plan: Plan) -> str:
    """The text of the plan's longest context."""
    return max(plan.contexts, key=lambda context: context.tokens).text


def document_table(plan: Plan, library: Library) -> pd.DataFrame:
    """Files by kind and use, with their characters and tokens, and those that were not read."""
    rows = [
        {"use": use, "kind": document.kind, "files": 1, "characters": len(document.text),
         "tokens": tokens}
        for use, documents in (("scored", plan.scored), ("for the codes", plan.calibration))
        for document, tokens in documents
    ]  # fmt: skip
    rows += [{"use": "skipped", "kind": Path(each.name).suffix.removeprefix("."), "files": 1,
              "characters": 0, "tokens": 0} for each in library.skipped]  # fmt: skip
    return pd.DataFrame(rows).groupby(["use", "kind"]).sum()


def changed_table(changed: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Answers that differ from dense attention's: what was expected and what was said."""
    columns = ["question", "expected", "dense", "sparse", "audit"]
    rows = [{**each, "expected": " | ".join(each["expected"])} for each in changed]
    return pd.DataFrame(rows, columns=columns).set_index("question")


def latency_table(latency: Mapping[str, Any]) -> pd.DataFrame:
    """Milliseconds of a step, dense and at each budget, how many times faster, and the length below
    which decoding stays dense (infinite: any)."""
    rows = {"dense": latency["dense_ms"] | {"speedup": 1.0}}
    for each in latency["budgets"]:
        below = math.inf if each["dense_below"] is None else each["dense_below"]
        more = {"speedup": each["speedup"], "dense_below": below}
        rows[fraction(each["budget"])] = each["ms"] | more
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("read")


def command(**parameters: Any) -> str:
    """The `make pilot` that runs a pilot again, of the notebook's parameters by their names."""
    given = {name.upper(): value for name, value in parameters.items() if value is not None}
    return " ".join(["make pilot", *(f"{n}={shlex.quote(_text(v))}" for n, v in given.items())])


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return ",".join(f"1/{1 / each:g}" for each in value)
    return str(value)


def open_ways(result: Mapping[str, Any]) -> int:
    """1 if nobody watched over connections to other machines, else 0."""
    return int(not result["private"]["sockets_denied"])


def title(docs: str) -> str:
    """What a report is called: the folder of the documents, or the one above "documents"."""
    path = (repository() / docs).resolve()
    return path.parent.name if path.name == "documents" else path.name


def shared_parts(plan: Plan) -> int:
    """Parts of documents that are both scored and learned from."""
    scored, learned = ({(part.name, part.start) for context in contexts for part in context.parts}
                       for contexts in (plan.contexts, plan.learning))  # fmt: skip
    return len(scored & learned)


def wrongly_judged(judgement: Judgement) -> int:
    """Findings on a measure whose floor is not clear, other than "cannot be judged"."""
    floors = {"fidelity": "text"}
    return sum(
        part.verdict != UNJUDGED
        for quality in judgement.quality
        for name, part in quality.judged
        if (floor := judgement.floors[floors.get(name, name)]) is None or not floor.clear
    )


def floor_table(judgement: Judgement) -> pd.DataFrame:
    """Dense attention beside a guess, one line a measure: points, and bits a byte of the text."""
    lines = {}
    for name, floor in judgement.floors.items():
        if floor is None:
            continue
        unit = 1 if name == "text" else POINTS
        lines[name] = {
            "dense": unit * floor.dense, "guess": unit * floor.guess,
            "from": unit * floor.low, "to": unit * floor.high, "samples": floor.count,
            "told apart": "yes" if floor.clear else "no: cannot be judged",
        }  # fmt: skip
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("measure")


def quality_table(judgement: Judgement) -> pd.DataFrame:
    """Of every budget and measure: dense, sparse, their difference with its interval (points; of
    fidelity KL in nats), and the verdict."""
    lines = {}
    for quality in judgement.quality:
        label = fraction(quality.budget)
        for name, part in quality.judged:
            if name == "fidelity":
                values = (None, None, part.kl, part.kl_low, part.kl_high, part.documents)
            else:
                shares = (part.dense, part.sparse, part.difference, part.low, part.high)
                values = *(None if x is None else POINTS * x for x in shares), part.count
            verdict = "cannot be judged" if part.verdict == UNJUDGED else part.verdict
            lines[label, name] = (*values, verdict)
    columns = ["dense", "sparse", "difference", "from", "to", "samples", "verdict"]
    index = pd.MultiIndex.from_tuples(lines, names=["budget", "measure"])
    return pd.DataFrame(list(lines.values()), index=index, columns=columns)


def draw_quality(judgement: Judgement, settings: PilotSettings) -> Any:
    """A figure: KL to dense against budgets and, where there were any, answers beside dense and
    guessing; the shaded part is what is tolerated, bars are 95 % intervals."""
    from matplotlib import pyplot as plt

    scored = _scored(judgement)
    figure, axes = plt.subplots(1, 2 if scored else 1, figsize=(8 if scored else 4.5, 3),
                                squeeze=False, layout="constrained")  # fmt: skip
    labels = [fraction(quality.budget) for quality in judgement.quality]
    closeness = [quality.fidelity for quality in judgement.quality]
    _with_bars(axes[0, 0], labels, [(c.kl, c.kl_low, c.kl_high) for c in closeness])
    axes[0, 0].axhspan(0, settings.kl_limit, color="0.9", zorder=0)
    axes[0, 0].set(ylabel="KL to dense (nats)", xlabel="share of the context read", ylim=(0, None))
    if scored:
        name, answers = scored
        floor, axis = judgement.floors[name], axes[0, 1]
        points = [(POINTS * a.sparse, POINTS * (a.dense + a.low), POINTS * (a.dense + a.high))
                  for a in answers]  # fmt: skip
        _with_bars(axis, labels, points)
        axis.axhline(POINTS * floor.dense, color="0.3", lw=1)
        axis.axhline(POINTS * floor.guess, color="0.3", lw=1, ls=":")
        for level, text in ((floor.dense, "dense"), (floor.guess, "guess")):
            axis.annotate(text, (0, POINTS * level), (2, 3), textcoords="offset points", size=8)
        least = POINTS * (floor.dense - settings.tolerance)
        axis.axhspan(least, POINTS * floor.dense, color="0.9", zorder=0)
        axis.set(ylabel=f"{name} answered right (%)", xlabel="share of the context read",
                 ylim=(-2, 102))  # fmt: skip
    return figure


def _scored(judgement: Judgement) -> tuple[str, list[Any]] | None:
    """The measure of answers that there is, and what was found at each budget."""
    for name in ("questions", "quotes"):
        found = [getattr(quality, name) for quality in judgement.quality]
        if all(each is not None and each.sparse is not None for each in found):
            return name, found
    return None


def _with_bars(axis: Any, labels: Sequence[str], points: Sequence[tuple]) -> None:
    middle = [point[0] for point in points]
    below = [max(0.0, point[0] - point[1]) for point in points]
    above = [max(0.0, point[2] - point[0]) for point in points]
    axis.errorbar(labels, middle, [below, above], marker="o", capsize=3, color="#004488")
    axis.margins(x=0.15)
