"""What a pilot measures: answers, quotes and fidelity, dense and sparse; a killed run resumes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hashattn.evaluation.fidelity import document
from hashattn.evaluation.methods import Method
from hashattn.evaluation.runner import evaluate
from hashattn.pilot.plan import Asked, Plan, protocol, without_document
from hashattn.pilot.reading import SETUP, reading_protocol
from hashattn.pilot.settings import PilotSettings


@dataclass(frozen=True)
class Measured:
    """Rows of evaluate(), the records' order kept.

    answers: of every question or quote, by dense attention and at each budget; guesses: dense
    answers to the same, without documents; fidelity: of contexts. asked: what `answers` is about,
    in order. labels: the rows' budget of each density (None: dense attention). packed, read_bytes:
    for each context of fidelity, bits a byte that a file compressor needs for the tokens that are
    predicted, and how many bytes these are.
    """

    asked: tuple[Asked, ...]
    answers: pd.DataFrame
    guesses: pd.DataFrame
    fidelity: pd.DataFrame
    labels: dict[float | None, str]
    packed: tuple[float, ...]
    read_bytes: tuple[int, ...]

    def rows(self, frame: pd.DataFrame, density: float | None) -> pd.DataFrame:
        """Of one of the frames, those of a density, in the order of `asked` or of the contexts."""
        return frame[frame["budget"] == self.labels[density]].reset_index(drop=True)


def measure(
    model: Any, tokenizer: Any, plan: Plan, tried: Sequence[Method], settings: PilotSettings,
    folder: str | Path, progress: bool = True,
) -> Measured:  # fmt: skip
    """Everything that the verdict rests on, by dense attention and at every budget (`tried`, as
    reading.methods makes them). Results are kept in `folder` and found again, so that an
    interrupted pilot repeats one answer at most. Raises as evaluate does."""
    folder = Path(folder)
    log = folder / "answers.jsonl"
    asked = plan.asked if plan.asked else plan.quotes
    own = protocol(tokenizer, settings)
    empty = pd.DataFrame()
    answers, guesses = empty, empty
    if asked:
        records = [each.record for each in asked]
        answers = evaluate(model, tokenizer, records, tried, own, log, progress, setups=SETUP)
        nothing = [without_document(record) for record in records]
        guesses = evaluate(model, tokenizer, nothing, tried[:1], own, log, progress, setups=SETUP)
    read = reading_protocol(settings, settings.text_tokens // 2)
    texts = [context.text for context in plan.contexts[: settings.texts]]
    documents = [document(text, "texts", str(number)) for number, text in enumerate(texts)]
    fidelity = evaluate(model, tokenizer, documents, tried, read, folder / "fidelity.jsonl",
                        progress, setups=SETUP)  # fmt: skip
    tails = [_tail(tokenizer, text, settings.text_tokens) for text in texts]
    packed = tuple(packed_bits(*tail) for tail in tails)
    densities = [None, *settings.budgets]
    labels = {d: m.budget_label for d, m in zip(densities, tried, strict=True)}
    return Measured(tuple(asked), answers, guesses, fidelity, labels, packed,
                    tuple(len(after) for _, after in tails))  # fmt: skip


def _tail(tokenizer: Any, text: str, tokens: int) -> tuple[bytes, bytes]:
    """(what comes before, what is predicted) of a text whose last `tokens` tokens are read: each
    of these but the first is predicted."""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    start = offsets[-tokens:][1][0]
    return text[:start].encode(), text[start:].encode()


def packed_bits(before: bytes, after: bytes) -> float:
    """Bits a byte that zlib needs for `after`, having packed `before`."""
    sizes = [len(zlib.compress(part, 9)) for part in (before, before + after)]
    return 8 * (sizes[1] - sizes[0]) / max(1, len(after))
