"""Everything that moves a score besides the method, in one frozen and fingerprinted record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from hashattn.attention.budget import Budget
from hashattn.base.checks import is_text, require, require_numbers, require_one_of
from hashattn.evaluation.metrics import METRICS, first_line
from hashattn.models.identity import fingerprint

FIDELITY = "fidelity"  # the metric that needs no answers: see evaluation.fidelity
_QUESTION = ("sparse", "dense")
SETUPS = {"A": "dense", "B": "sparse"}  # how the question is read
_TRUNCATION = ("refuse", "middle", "suffix")
_TRUNCATED = ("context", "prompt", "chat")
LEAST = {"sink": 0, "local": 1, "seed": 0, "min_new_tokens": 0, "keep_first": 0}
_LEAST_IF_GIVEN = {"max_new_tokens": 1, "max_context": 2, "window": 1}
BY_DATASET = (  # fields in which datasets may differ: how each is asked and scored
    "max_new_tokens", "min_new_tokens", "stop", "end_tokens", "template", "chat", "metric",
    "first_line", "max_context",
)  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """How a set of records is asked, decoded and scored.

    question: "sparse" runs the question's tokens through the selector (setup B), "dense" only what
        is generated (setup A); the context is prefilled dense in both.
    sink, local: tokens always attended (both counted in the density).
    dense_layers: layers that stay dense.
    max_new_tokens: None means the longest answer's tokens plus two.
    min_new_tokens: before this many, no token that ends an answer is chosen.
    stop: text that ends an answer, None for no such text.
    end_tokens: texts of one token each that end an answer as the model's own end tokens do.
    template: a str.format pattern with {context} before {input}; questions share the part up to
        the input.
    chat: ask through the tokenizer's chat template, the prompt as one user message.
    window: how many of the prompt's last tokens are the question; None: all from the input on.
    metric: a key of metrics.METRICS, or "fidelity" (evaluation.fidelity), which needs a window of
        at least two tokens.
    first_line: score only the first line of a prediction (metrics.first_line).
    max_context: longest prompt in tokens, of what `truncated` says; None for no limit.
    truncated: "context" limits the part that questions share; "prompt" all of it before the chat
        template, and "chat" all of it after. "prompt" is LongBench's way (see make_prompt).
    truncation: past the limit, "refuse" raises, "middle" keeps both halves as LongBench does,
        "suffix" keeps the first `keep_first` tokens and the end.
    keep_first: see truncation.
    datasets: {dataset: {field: value}}, what differs for the records of one dataset. If there are
        any, records of other datasets are refused.
    seed: of every random choice of an evaluation (decoding is greedy).
    Raises ValueError naming the field, the value and what is allowed.
    """

    question: str = "sparse"
    sink: int = 4
    local: int = 28
    dense_layers: tuple[int, ...] = ()
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop: str | None = "\n"
    end_tokens: tuple[str, ...] = ()
    template: str = "{context}\nQ: {input}"
    chat: bool = False
    window: int | None = None
    metric: str = "exact_match"
    first_line: bool = False
    max_context: int | None = None
    truncated: str = "context"
    truncation: str = "refuse"
    keep_first: int = 128
    datasets: Mapping[str, Mapping[str, Any]] | tuple[tuple[str, tuple], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", tuple(sorted(set(self.dense_layers))))
        object.__setattr__(self, "end_tokens", tuple(self.end_tokens))
        object.__setattr__(self, "datasets", _frozen(self.datasets))
        require_one_of("question", self.question, _QUESTION)
        require_one_of("truncated", self.truncated, _TRUNCATED)
        require_one_of("truncation", self.truncation, _TRUNCATION)
        require_one_of("metric", self.metric, (*METRICS, FIDELITY))
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        require_numbers(values, counts=LEAST)
        not_none = {name: value for name, value in values.items() if value is not None}
        require_numbers(not_none, counts=_LEAST_IF_GIVEN)
        valid_stop = self.stop is None or is_text(self.stop)
        require(valid_stop, "stop", self.stop, "a text, for example a newline, or None")
        require(
            self.truncated != "context" or not (self.chat or self.window),
            "truncated", self.truncated,
            f"'prompt' or 'chat', as chat = {self.chat} and window = {self.window} take the prompt "
            "as one",
        )  # fmt: skip
        require(
            self.metric != FIDELITY or (self.window or 0) > 1,
            "window", self.window, "at least 2 tokens to compare for metric = 'fidelity'",
        )  # fmt: skip
        require(
            self.truncation != "suffix" or (self.max_context or 0) > self.keep_first,
            "max_context", self.max_context,
            f"more than keep_first = {self.keep_first} for truncation = 'suffix'",
        )  # fmt: skip
        context, question = self.template.find("{context}"), self.template.find("{input}")
        require(
            context >= 0 and not 0 <= question < context, "template", self.template,
            "a text with {context}, and {input} only after it: questions share the tokens before "
            "the input",
        )  # fmt: skip
        for dataset, changes in self.datasets:
            _require_fields(dataset, changes)
            self.of(dataset)  # validates the dataset's protocol

    def of(self, dataset: str) -> Protocol:
        """The protocol of one dataset's records: this one with that dataset's differences.
        ValueError for a dataset that `datasets` lacks, if it has any."""
        if not self.datasets:
            return self
        changes = dict(self.datasets)
        if dataset not in changes:
            raise ValueError(
                f"the protocol has no dataset {dataset!r}; it has {sorted(changes)}: add it to "
                "`datasets`, or take its records out"
            )
        try:
            return replace(self, datasets=(), **dict(changes[dataset]))
        except ValueError as error:
            raise ValueError(f"datasets[{dataset!r}]: {error}") from error

    @property
    def setup(self) -> str:
        """ "A": the whole prompt dense, decoding sparse. "B": the question sparse as well."""
        return next(name for name, question in SETUPS.items() if question == self.question)

    def in_setup(self, setup: str) -> Protocol:
        """This protocol in setup "A" or "B"."""
        require_one_of("setup", setup, SETUPS)
        return replace(self, question=SETUPS[setup])

    def score(
        self, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
    ) -> float:
        """0..1, by this protocol's metric."""
        text = first_line(prediction) if self.first_line else prediction
        return METRICS[self.metric](text, answers, all_classes)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of all fields; equal protocols, equal fingerprints."""
        return fingerprint(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        datasets = {
            name: {k: list(v) if isinstance(v, tuple) else v for k, v in changes}
            for name, changes in self.datasets
        }
        lists = {name: list(getattr(self, name)) for name in ("dense_layers", "end_tokens")}
        return asdict(self) | lists | {"datasets": datasets}

    def budget(self, heavy: int | None = None, density: float | None = None) -> Budget:
        """The Budget of this protocol's sink and local with heavy tokens or a density."""
        return Budget(self.sink, self.local, heavy=heavy, density=density)

    def split_prompt(self, context: str, question: str) -> tuple[str, str]:
        """(shared part, rest) of the prompt; spaces before the input go to the rest."""
        cut = self.template.find("{input}")
        if cut < 0:
            cut = self.template.find("{context}") + len("{context}")
        head, tail = self.template[:cut], self.template[cut:]
        shared = head.rstrip(" ")  # tokenizers join a leading space to its word, as in " apple"
        rest = head[len(shared) :] + tail
        return shared.format(context=context), rest.format(input=question)

    def truncate(self, tokens: Sequence[int]) -> tuple[list[int], ...]:
        """The parts of a sequence that truncation leaves: all of it, or its two ends. ValueError
        where it is longer than max_context and truncation = "refuse"."""
        limit = self.max_context
        if limit is None or len(tokens) <= limit:
            return (list(tokens),)
        if self.truncation == "refuse":
            raise ValueError(
                f"a {self.truncated} has {len(tokens)} tokens and max_context = {limit}; raise "
                'max_context, or set truncation = "middle" to keep the two ends'
            )
        head = limit // 2 if self.truncation == "middle" else self.keep_first
        tail = limit - head
        if self.truncation == "middle" and self.truncated != "context":
            tail = head  # LongBench keeps two equal halves of an odd limit too
        return list(tokens[:head]), list(tokens[len(tokens) - tail :])


def _frozen(datasets: Any) -> tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]:
    """{dataset: {field: value}} as sorted tuples, which compare and hash; others as they are."""
    if not isinstance(datasets, Mapping):
        return datasets
    return tuple(
        (name, tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(part.items())))
        for name, part in sorted(datasets.items())
    )


def _require_fields(dataset: str, changes: Sequence[tuple[str, Any]]) -> None:
    unknown = [name for name, _ in changes if name not in BY_DATASET]
    allowed = f"some of {', '.join(BY_DATASET)}, in which a dataset may differ"
    require(not unknown, f"datasets[{dataset!r}]", unknown, allowed)
