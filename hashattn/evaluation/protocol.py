"""Everything that moves a score besides the method, in one frozen and fingerprinted record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from hashattn.attention.budget import Budget
from hashattn.evaluation.metrics import METRICS

QUESTION = ("sparse", "dense")
TRUNCATION = ("refuse", "middle")


@dataclass(frozen=True)
class Protocol:
    """How a set of records is asked, decoded and scored.

    question: "sparse" runs the question's tokens through the selector, "dense" only what is
        generated; the context is prefilled dense in both.
    sink, local: tokens always attended (both counted in the density).
    dense_layers: layers that stay dense.
    max_new_tokens: None means the longest answer's tokens plus two.
    stop: text that ends an answer.
    template: a str.format pattern with {context} before {input}; the part up to the input is the
        context that questions share.
    metric: a key of metrics.METRICS.
    max_context: longest shared part in tokens, None for no limit.
    truncation: past that, "refuse" raises, "middle" keeps both ends as LongBench does.
    seed: of every random choice of an evaluation (decoding is greedy).
    Raises ValueError naming the field, the value and what is allowed.
    """

    question: str = "sparse"
    sink: int = 4
    local: int = 28
    dense_layers: tuple[int, ...] = ()
    max_new_tokens: int | None = None
    stop: str = "\n"
    template: str = "{context}\nQ: {input}"
    metric: str = "exact_match"
    max_context: int | None = None
    truncation: str = "refuse"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", tuple(sorted(set(self.dense_layers))))
        _require_choice("question", self.question, QUESTION)
        _require_choice("truncation", self.truncation, TRUNCATION)
        _require_choice("metric", self.metric, tuple(METRICS))
        for name, low in (("sink", 0), ("local", 1), ("seed", 0)):
            _require_at_least(name, getattr(self, name), low)
        for name, low in (("max_new_tokens", 1), ("max_context", 2)):
            if getattr(self, name) is not None:
                _require_at_least(name, getattr(self, name), low)
        if not self.stop:
            raise ValueError("stop = '' must be a non-empty string, for example a newline")
        context, question = self.template.find("{context}"), self.template.find("{input}")
        if context < 0 or 0 <= question < context:
            raise ValueError(
                f"template = {self.template!r} must hold {{context}}, and {{input}} only after it: "
                "questions share the tokens before the input"
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of all fields; equal protocols, equal fingerprints."""
        return fingerprint(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self) | {"dense_layers": list(self.dense_layers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Protocol:
        """The inverse of to_dict; ValueError on a field that no protocol has."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            known = [field.name for field in fields(cls)]
            raise ValueError(f"protocol has no field {unknown}; its fields are {known}")
        return cls(**values)

    def with_(self, **changes: Any) -> Protocol:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def budget(self, heavy: int | None = None, density: float | None = None) -> Budget:
        """The Budget of this protocol's sink and local with heavy tokens or a density."""
        return Budget(self.sink, self.local, heavy=heavy, density=density)

    def split_prompt(self, context: str, question: str) -> tuple[str, str]:
        """(shared part, rest) of the prompt; white space before the input goes to the rest.

        Tokenizers glue a leading space to the word after it, so " apple" must not be cut in two.
        """
        cut = self.template.find("{input}")
        if cut < 0:
            cut = self.template.find("{context}") + len("{context}")
        head, tail = self.template[:cut], self.template[cut:]
        kept = head.rstrip(" ")
        shared = kept.format(context=context)
        return shared, (head[len(kept) :] + tail).format(input=question)

    def truncate(self, tokens: Sequence[int]) -> list[int]:
        """The shared part's token ids, cut to max_context as `truncation` says."""
        limit = self.max_context
        if limit is None or len(tokens) <= limit:
            return list(tokens)
        if self.truncation == "refuse":
            raise ValueError(
                f"a context has {len(tokens)} tokens and max_context = {limit}; raise max_context, "
                'or set truncation = "middle" to keep the two ends'
            )
        head = limit // 2
        return list(tokens[:head]) + list(tokens[len(tokens) - (limit - head) :])


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _require_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} must be one of {list(allowed)}")


def _require_at_least(name: str, value: int, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} = {value!r} must be an integer of at least {low}")
