"""RULER samples as records that `evaluate` runs: generated, or read from official files."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hashattn.base.checks import is_text, require
from hashattn.evaluation.benchmarks.base import Benchmark
from hashattn.evaluation.benchmarks.ruler.answering import AnsweringSample
from hashattn.evaluation.benchmarks.ruler.counting import CommonWordsSample, FrequentWordsSample
from hashattn.evaluation.benchmarks.ruler.haystack import Haystack, read_haystack
from hashattn.evaluation.benchmarks.ruler.prompt import Prompt, Sample
from hashattn.evaluation.benchmarks.ruler.questions import question_set
from hashattn.evaluation.benchmarks.ruler.retrieval import RetrievalSample
from hashattn.evaluation.benchmarks.ruler.sizing import largest_fit
from hashattn.evaluation.benchmarks.ruler.specs import (
    TASKS,
    Answering,
    CommonWords,
    FrequentWords,
    Retrieval,
    RulerError,
    task_of,
)
from hashattn.evaluation.benchmarks.ruler.styles import Style, style_of
from hashattn.evaluation.benchmarks.ruler.tracking import TrackingSample
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record, parsed_lines

LENGTHS = (1024, 1_048_576)
FULL = 0.99  # share of the length that prompt and answer take at least
_NO_STOP = "\x00"  # in no prediction: RULER decodes all of max_new_tokens


def ruler_records(
    tokenizer: Any, tasks: str | Iterable[str], length: int, samples: int, *, seed: int = 0,
    style: str = "plain", haystack: str | Path | Haystack | None = None, qa: str = "corpus",
    chat: bool = False,
) -> Iterator[Record]:  # fmt: skip
    """`samples` records of each task: prompt and answer of at most `length` tokens, at least 99 %.

    length: 1,024 to 1,048,576 tokens, special tokens and the answer's max_new_tokens included, as
    `tokenizer` counts. seed: sample i of a task does not depend on how many are made, nor on the
    process. style: a key of STYLES. haystack: prose, by default data/corpus. qa: where the
    questions come from (question_set). chat: wraps prompts in the tokenizer's chat template, the
    opening of the answer after the assistant's header.

    A record's `context` is the part that is prefilled, `input` the question with the opening of the
    answer; `_id` names task, style, source, length, seed and number.
    Raises RulerError for arguments out of range and for sources that cannot be read.
    """
    allowed = f"{LENGTHS[0]} to {LENGTHS[1]} tokens"
    require(LENGTHS[0] <= length <= LENGTHS[1], "length", length, allowed, RulerError)
    require(samples >= 1, "samples", samples, "at least 1", RulerError)
    wording, prose = style_of(style), read_haystack(haystack)
    wrap = _chat_parts(tokenizer) if chat else ("", "")

    def count(text: str) -> int:
        return len(tokenizer(text, verbose=False)["input_ids"])

    for name in [tasks] if isinstance(tasks, str) else tasks:
        for number in range(samples):
            sample, source = _sample(name, length, number, seed, wording, prose, str(qa), count)
            prompt, tokens = _fitted(sample, length - task_of(name).max_new_tokens, length, count,
                                     wrap)  # fmt: skip
            yield Record(
                input=prompt.question + prompt.prefix,
                context=prompt.text,
                answers=sample.answers,
                length=tokens + task_of(name).max_new_tokens,
                dataset=name,
                _id=f"{name}/{style}/{source}/{length}/{seed}/{number}",
            )


def ruler_protocol(
    tasks: str | Iterable[str] = tuple(TASKS), stop: str = _NO_STOP, **changes: Any
) -> Protocol:
    """RULER's way to decode and score one task, or several, each by its own fields in `datasets`.

    Answers take all their max_new_tokens, or end at `stop`. changes: further fields of Protocol
    (sink, local, seed).
    """
    if isinstance(tasks, str):
        fields = _task_fields(tasks)
    else:
        fields = {"datasets": {name: _task_fields(name) for name in tasks}}
    return Protocol(**{"template": "{context}{input}", "stop": stop} | fields | changes)


def _task_fields(name: str) -> dict[str, Any]:
    task = task_of(name)
    return {"metric": task.metric, "max_new_tokens": task.max_new_tokens}


def load_ruler(path: str | Path, task: str | None = None, limit: int | None = None) -> list[Record]:
    """The records of an official file: JSON lines of index, input, outputs, length, answer_prefix.

    path: a .jsonl file, or a folder <task> with validation.jsonl. task: by default the folder's
    name. The question is the last line of `input`, what comes before it the context.
    RulerError with file and line for a line that is not in that form.
    """
    path = Path(path)
    file = path / "validation.jsonl" if path.is_dir() else path
    task = task or file.parent.name
    task_of(task)
    if not file.exists():
        raise RulerError(f"no RULER samples at {file}; NVIDIA/RULER writes <task>/validation.jsonl")
    records = parsed_lines(
        file, limit, lambda values, where: _official(values, task, where), RulerError
    )
    if not records and limit != 0:
        raise RulerError(f"{file} holds no samples")
    return records


def _official(values: Any, task: str, where: str) -> Record:
    """The record of the sample at "file:line"."""
    for field in ("input", "outputs"):
        if not isinstance(values, dict) or field not in values:
            raise RulerError(f"no field {field!r}; RULER writes objects with input and outputs")
    text, prefix = values["input"], values.get("answer_prefix", "")
    for field, value in (("input", text), ("answer_prefix", prefix)):
        require(is_text(value, empty=True), field, value, "a text", RulerError)
    before, line_break, _ = text.rstrip().rpartition("\n")
    if not line_break:
        raise RulerError("no line break before the question; write it without --remove_newline_tab")
    return Record(
        input=text[len(before) + 1 :] + prefix,
        context=before + line_break,
        answers=values["outputs"],
        length=values.get("length", 0),
        dataset=task,
        _id=f"{task}/official/{values.get('index', where.rsplit(':', 1)[1])}",
    )


def _sample(
    name: str, length: int, number: int, seed: int, style: Style, prose: Haystack, qa: str,
    count: Callable[[str], int],
) -> tuple[Sample, str]:  # fmt: skip
    """The sample and the name of its source."""
    task = task_of(name)
    sample_seed = f"ruler/{name}/{length}/{seed}/{number}"
    if isinstance(task, Retrieval):
        source = prose.name if task.haystack == "text" else task.haystack
        return RetrievalSample(task, style, prose, sample_seed), source
    if isinstance(task, CommonWords):
        return CommonWordsSample(task, style, sample_seed, length), "words"
    if isinstance(task, FrequentWords):
        return FrequentWordsSample(task, style, sample_seed, length - task.max_new_tokens), "words"
    if isinstance(task, Answering):
        dataset = question_set(task.dataset, qa)
        order = list(dataset.questions)
        random.Random(f"ruler/{name}/{seed}").shuffle(order)
        question = order[number % len(order)]
        return AnsweringSample(question, dataset, style, sample_seed), dataset.name
    return TrackingSample(task, style, sample_seed, count), "noise"


def _fitted(
    sample: Sample, limit: int, length: int, count: Callable[[str], int], wrap: tuple[str, str]
) -> tuple[Prompt, int]:
    """The largest prompt of at most `limit` tokens, and how many it has."""

    def prompt(size: int, fill: int = 0) -> Prompt:
        bare = sample.prompt(size, fill)
        return Prompt(wrap[0] + bare.text, bare.question + wrap[1], bare.prefix)

    size, tokens = largest_fit(
        lambda size: count(str(prompt(size))), limit, sample.smallest, sample.step
    )
    fill = 0
    if tokens + length - limit < FULL * length:
        fill, tokens = largest_fit(
            lambda fill: count(str(prompt(size, fill))), limit, smallest=0, step=8
        )
    return prompt(size, fill), tokens


def _chat_parts(tokenizer: Any) -> tuple[str, str]:
    """What the tokenizer's chat template puts before and after a user's message."""
    if not getattr(tokenizer, "chat_template", None):
        raise RulerError("this tokenizer has no chat template; leave chat = False")
    mark = "<the message>"
    messages = [{"role": "user", "content": mark}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, after = text.split(mark)
    # the tokenizer adds the beginning-of-sequence token itself
    return before.removeprefix(tokenizer.bos_token or ""), after


def profile_records(
    profile: Any, tokenizer: Any, length: int, samples: int | None = None,
    tasks: Iterable[str] = tuple(TASKS), **options: Any,
) -> list[Record]:  # fmt: skip
    """`samples` records (by default samples_per_task) of each task, by the profile's seed, RULER
    style and chat. options: further arguments of ruler_records.
    """
    number = profile.samples_per_task if samples is None else samples
    asked = profile.ruler
    options = {"seed": profile.seed, "style": asked.style, "chat": asked.chat} | options
    return list(ruler_records(tokenizer, tasks, length, number, **options))


def records(
    profile: Any, tokenizer: Any, length: int, samples: int, folder: Path | None
) -> list[Record]:
    """profile_records of the profile's tasks."""
    return profile_records(profile, tokenizer, length, samples, profile.tasks)


def protocol(profile: Any, length: int, folder: Path | None) -> Protocol:
    """ruler_protocol; an answer in the style "facts" stops at the end of its line."""
    stop = "\n" if profile.ruler.style == "facts" else _NO_STOP
    return ruler_protocol(profile.tasks, stop, sink=profile.sink, local=profile.local,
                          seed=profile.seed)  # fmt: skip


BENCHMARK = Benchmark(records, protocol, tuple(TASKS), drawn=True)
