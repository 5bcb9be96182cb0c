"""What a pilot measures with: lengths, budgets, samples, and what counts as kept."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from hashattn.base.checks import is_number, require, require_numbers

LANGUAGES = ("en", "ja")  # of what a pilot says
QUESTIONS = 10  # over one document, where it is said what saving its context spares
_COUNTS = {
    "context": 256, "questions": 0, "quotes": 0, "texts": 1, "answer_tokens": 1,
    "longest_answer": 1, "text_tokens": 2, "audits": 0, "sink": 0, "local": 1, "seed": 0,
}  # fmt: skip


@dataclass(frozen=True)
class PilotSettings:
    """How a pilot reads, asks and judges.

    context: most tokens of a prompt with its answer; documents are packed into such contexts.
    budgets: densities to try, as shares of the cached tokens. questions, quotes, texts: most
    questions that are asked, sentences that are to be completed (where there are no questions with
    answers), and contexts that fidelity is measured on. answer_tokens: of an answer; more where the
    accepted ones are longer, up to longest_answer. text_tokens: the last tokens of a context at
    which distributions are compared, and half as many then generated. tolerance: share of right
    answers that may be lost (0.05: five points). kl_limit: nats of KL divergence to dense that may
    be lost: 0.05 is the order of what 4-bit weights cost (q4_K_M, Llama 3 8B: perplexity 1.03 times
    that of 16 bits, llama.cpp pull request 6936).
    audits: most changed answers that get an audit page. sink, local, seed: as in Protocol.
    ValueError naming the field.
    """

    context: int = 2048
    budgets: tuple[float, ...] = (1 / 8, 1 / 16, 1 / 32)
    questions: int = 40
    quotes: int = 24
    texts: int = 6
    answer_tokens: int = 20
    longest_answer: int = 96
    text_tokens: int = 48
    tolerance: float = 0.05
    kl_limit: float = 0.05
    audits: int = 4
    sink: int = 4
    local: int = 28
    seed: int = 0

    def __post_init__(self) -> None:
        valid = isinstance(self.budgets, list | tuple) and len(self.budgets) > 0
        valid = valid and all(is_number(b) and 0 < b < 1 for b in self.budgets)
        require(valid, "budgets", self.budgets, "shares between 0 and 1, as (1 / 8, 1 / 16)")
        object.__setattr__(self, "budgets", tuple(sorted(set(map(float, self.budgets)))[::-1]))
        require_numbers(asdict(self), counts=_COUNTS, shares=("tolerance",), positive=("kl_limit",))
        require(
            self.context >= self.least_tokens, "budgets", self.budgets,
            f"at least {self.sink + self.local + 1} tokens of context = {self.context}, sink and "
            "local included: raise context or drop the smallest budget",
        )  # fmt: skip

    @property
    def least_tokens(self) -> int:
        """Of a context, so that the smallest budget reads more than sink and local of it."""
        return math.ceil((self.sink + self.local + 1) / min(self.budgets))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self) | {"budgets": list(self.budgets)}
