"""What a pilot measures: answers, quotes and fidelity, dense and sparse; a killed run resumes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hashattn.base.engines import InProcess
from hashattn.evaluation.fidelity import document
from hashattn.evaluation.methods import Method
from hashattn.evaluation.records import Record
from hashattn.evaluation.runner import evaluate
from hashattn.pilot.floor import Floor, answer_floor, languages
from hashattn.pilot.plan import Asked, Plan, protocol, without_document
from hashattn.pilot.reading import SETUP, reading_protocol
from hashattn.pilot.settings import PilotSettings


@dataclass(frozen=True)
class Measured:
    """What was measured; frames are rows of evaluate(), in the order of what they are about.

    asked: questions and quotes that dense attention was asked, and floor: its answers beside
    guesses, over all languages in which they can be told apart (over all if in none); None without
    known answers. left_out: the floors of the other languages. compared: what was asked at every
    budget as well: nothing in a language that is left out, nothing with known answers if dense
    attention is told from guessing in no language. answers: to `compared`, by dense attention and
    at every budget; fidelity: of contexts, likewise. labels: the rows' budget of each density
    (None: dense attention). packed, read_bytes: for each context of fidelity, bits a byte that a
    file compressor needs for the tokens that are predicted, and how many bytes these are.
    """

    asked: tuple[Asked, ...]
    floor: Floor | None
    left_out: dict[str, Floor]
    compared: tuple[Asked, ...]
    answers: pd.DataFrame
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
    asked, log = (*plan.asked, *plan.quotes), folder / "answers.jsonl"
    own = protocol(tokenizer, settings, plan.answer_tokens)

    def answered(records: Sequence[Record], by: Sequence[Method]) -> pd.DataFrame:
        if not records:
            return pd.DataFrame()
        return evaluate(model, tokenizer, records, by, own, log, progress, setups=SETUP,
                        engine=InProcess())  # fmt: skip

    records = [each.record for each in asked]
    dense = answered(records, tried[:1])
    guesses = answered([without_document(record) for record in records], tried[:1])
    floor, left_out, numbers = _told_from_guessing(asked, dense, guesses)
    answers = answered([records[number] for number in numbers], tried)
    read = reading_protocol(settings, settings.text_tokens // 2)
    long = [context.text for context in plan.contexts if context.tokens >= settings.least_tokens]
    texts = long[: settings.texts]
    documents = [document(text, "texts", str(number)) for number, text in enumerate(texts)]
    fidelity = evaluate(model, tokenizer, documents, tried, read, folder / "fidelity.jsonl",
                        progress, setups=SETUP, engine=InProcess())  # fmt: skip
    tails = [_tail(tokenizer, text, settings.text_tokens) for text in texts]
    packed = tuple(packed_bits(*tail) for tail in tails)
    densities = [None, *settings.budgets]
    labels = {d: m.budget_label for d, m in zip(densities, tried, strict=True)}
    compared = tuple(asked[number] for number in numbers)
    return Measured(asked, floor, left_out, compared, answers, fidelity, labels, packed,
                    tuple(len(after) for _, after in tails))  # fmt: skip


def _told_from_guessing(
    asked: Sequence[Asked], dense: pd.DataFrame, guesses: pd.DataFrame
) -> tuple[Floor | None, dict[str, Floor], list[int]]:
    """Measured.floor, Measured.left_out, and the numbers of what is compared."""
    groups = languages(asked)
    unknown = [number for number, each in enumerate(asked) if not each.answers]
    if not groups:
        return None, {}, unknown
    floors = {name: answer_floor(asked, dense, guesses, own) for name, own in groups.items()}
    told = sorted(n for name, own in groups.items() if floors[name].clear for n in own)
    if not told:
        every = sorted(number for own in groups.values() for number in own)
        return answer_floor(asked, dense, guesses, every), {}, unknown
    left_out = {name: floor for name, floor in floors.items() if not floor.clear}
    return answer_floor(asked, dense, guesses, told), left_out, sorted(told + unknown)


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
