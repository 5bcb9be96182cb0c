"""What a pilot will read and ask: documents split into those that are scored and those that the
codes may learn from, packed into contexts, and the records of questions and quotes."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hashattn.base.checks import require
from hashattn.base.errors import HashAttnError
from hashattn.base.hashes import sha256_text
from hashattn.evaluation.prompting import make_prompt
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record
from hashattn.pilot.contexts import Context, Part, best_parts, pack, split_document
from hashattn.pilot.settings import PilotSettings

if TYPE_CHECKING:
    from hashattn.pilot.documents import Library, Question, SourceDocument

QUESTIONS, QUOTES = "questions", "quotes"
_CALIBRATION = 4  # one document of so many is kept from scoring, for the codes
_SLACK = 8  # tokens that joining parts and a chat template may add
_LEAST = 128  # tokens of documents that a context has to have room for
_QUOTE = 24  # characters that a quote has to continue by
_SENTENCE = re.compile(r"(?<=[\n。.!?！？])[^。.!?！？]{60,600}[。.!?！？]")
_BEGIN = 30  # characters, at least, that a sentence to complete begins with
_JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
_TEMPLATES = {
    "en": "Answer the question with a few words copied from the documents.\n\n{context}"
    "Question: {input}\nAnswer:",
    "ja": "文書にある語句を抜き出して、質問に短く答えてください。\n\n{context}"
    "質問：{input}\n答え：",
}  # fmt: skip
_NO_DOCUMENT = "-\n\n"  # the context of a question that is asked without documents


class PlanError(HashAttnError, ValueError):
    """There is nothing that a pilot could measure."""


@dataclass(frozen=True)
class Asked:
    """A question, the context it is asked over, and its record. answers: the accepted ones, none if
    the company gave none. lost: an answer stands in the document but not in the context."""

    question: str
    answers: tuple[str, ...]
    document: str
    context: Context
    record: Record
    lost: bool = False


@dataclass(frozen=True)
class Plan:
    """What is read and asked.

    scored, calibration: documents by what they are for, with their tokens. contexts: of scored
    documents, those with questions first. learning: contexts of the others. asked, quotes: what is
    asked over the contexts. dropped: questions that are not asked, because their document is for
    calibration or there are too many. divided: names of documents too long for one context.
    """

    scored: tuple[tuple[SourceDocument, int], ...]
    calibration: tuple[tuple[SourceDocument, int], ...]
    contexts: tuple[Context, ...]
    learning: tuple[Context, ...]
    asked: tuple[Asked, ...]
    quotes: tuple[Asked, ...]
    dropped: int
    divided: tuple[str, ...]

    @property
    def answered(self) -> tuple[Asked, ...]:
        """Questions whose answers are known."""
        return tuple(each for each in self.asked if each.answers)


def protocol(tokenizer: Any, settings: PilotSettings) -> Protocol:
    """How questions and quotes are asked: context dense, question and answer sparse, the answer's
    first line scored by whether it holds an accepted answer."""
    chat = bool(getattr(tokenizer, "chat_template", None))
    asked = {"chat": chat} | ({"stop": None} if chat else {})
    datasets = {
        f"{QUESTIONS}_{language}": {"template": template} | asked
        for language, template in _TEMPLATES.items()
    }
    return Protocol(
        sink=settings.sink, local=settings.local, seed=settings.seed,
        max_new_tokens=settings.answer_tokens, metric="string_match_part", first_line=True,
        truncated="prompt", datasets=datasets | {QUOTES: {"template": "{context}{input}"}},
    )  # fmt: skip


def make_plan(
    tokenizer: Any, library: Library, questions: Sequence[Question], settings: PilotSettings
) -> Plan:
    """Divides, packs and asks. The same for the same documents, questions and settings.

    A quarter of the documents, those that no question is about if there are enough, is for
    calibration. A document that does not fit a context is divided; its questions are asked over the
    part that BM25 finds. Without a question with answers, sentences are to be completed instead.
    Raises PlanError without documents, or if a context has no room for any.
    """
    if not library.documents:
        raise PlanError(
            f"no document could be read ({len(library.skipped)} files were skipped): give a folder "
            "with txt, md, html, pdf, docx, xlsx, csv or pptx files"
        )
    require(getattr(tokenizer, "is_fast", False), "tokenizer", tokenizer,
            "a fast one, which knows the characters of each token", PlanError)  # fmt: skip
    scored, calibration = _split(library.documents, [q.document for q in questions])
    kept = [q for q in questions if q.document not in {d.name for d in calibration}]
    chosen = kept if len(kept) <= settings.questions else _evenly(kept, settings.questions)
    room = _room(tokenizer, [q.text for q in chosen], settings)
    parts = {d.name: split_document(tokenizer, d.name, d.text, room) for d in library.documents}
    contexts = pack((part for d in scored for part in parts[d.name]), room)
    asked = _asked(tokenizer, chosen, [d for d in scored], parts, contexts)
    busy = {id(each.context) for each in asked}
    contexts.sort(key=lambda context: id(context) not in busy)
    quotes = [] if any(each.answers for each in asked) else _quotes(contexts, settings)

    def sized(documents: Iterable[SourceDocument]) -> tuple[tuple[SourceDocument, int], ...]:
        return tuple((d, sum(part.tokens for part in parts[d.name])) for d in documents)

    return Plan(
        sized(scored), sized(calibration), tuple(contexts),
        tuple(pack((part for d in calibration for part in parts[d.name]), room)),
        tuple(asked), tuple(quotes), len(questions) - len(chosen),
        tuple(name for name, own in parts.items() if len(own) > 1),
    )  # fmt: skip


def _split(
    documents: Sequence[SourceDocument], asked: Sequence[str | None]
) -> tuple[list[SourceDocument], list[SourceDocument]]:
    """(scored, calibration), each in the library's order; no calibration of a single document."""
    wanted = set(asked)
    order = sorted(documents, key=lambda d: (d.name in wanted, sha256_text(d.name)))
    learning = {d.name for d in order[: len(documents) // _CALIBRATION]}
    return (
        [d for d in documents if d.name not in learning],
        [d for d in documents if d.name in learning],
    )


def _room(tokenizer: Any, questions: Sequence[str], settings: PilotSettings) -> int:
    """Tokens of documents that a context may hold beside its longest question and answer."""
    own = protocol(tokenizer, settings)
    around = max(
        sum(map(len, (prompt.context, prompt.question)))
        for prompt in (
            make_prompt(tokenizer, own.of(record.dataset), record)
            for record in (_record(question, "", ("",)) for question in [*questions, ""])
        )
    )
    room = settings.context - around - settings.answer_tokens - _SLACK
    require(
        room >= _LEAST, "context", settings.context,
        f"at least {settings.context - room + _LEAST} tokens: the longest question and its answer "
        f"take {settings.context - room} of them",
        PlanError,
    )  # fmt: skip
    return room


def _asked(
    tokenizer: Any, questions: Sequence[Question], scored: Sequence[SourceDocument],
    parts: dict[str, list[Part]], contexts: Sequence[Context],
) -> list[Asked]:  # fmt: skip
    texts = {document.name: document.text for document in scored}
    every = [part for name in texts for part in parts[name]]
    choices = [every if q.document is None else parts[q.document] for q in questions]
    best = best_parts(tokenizer, [q.text for q in questions], choices)
    where = {id(part): context for context in contexts for part in context.parts}
    made = []
    for question, part in zip(questions, best, strict=True):
        context = where[id(part)]
        record = _record(question.text, context.text, question.answers or ("",))
        lost = any(answer in texts[part.name] for answer in question.answers) and not any(
            answer in context.text for answer in question.answers
        )
        made.append(Asked(question.text, question.answers, part.name, context, record, lost))
    return made


def _record(question: str, context: str, answers: tuple[str, ...]) -> Record:
    language = "ja" if _JAPANESE.search(question) else "en"
    return Record(question, context, answers, length=len(context), language=language,
                  dataset=f"{QUESTIONS}_{language}")  # fmt: skip


def without_document(record: Record) -> Record:
    """The same question, asked of nothing: what a guess scores."""
    return Record(record.input, _NO_DOCUMENT, record.answers, dataset=record.dataset,
                  language=record.language)  # fmt: skip


def _quotes(contexts: Sequence[Context], settings: PilotSettings) -> list[Asked]:
    """Sentences of the documents whose second half is to be found, `quotes` of them at most, taken
    in turn from as many contexts as fidelity is measured on."""
    rng = random.Random(settings.seed)
    drawn = [_sentences(context, rng) for context in contexts[: settings.texts]]
    made: list[Asked] = []
    while len(made) < settings.quotes and any(drawn):
        made += [own.pop() for own in drawn if own]
    return made[: settings.quotes]


def _sentences(context: Context, rng: random.Random) -> list[Asked]:
    """Sentences that occur once in a context, whose end is not near, in random order."""
    text, found = context.text, []
    for part, place in zip(context.parts, context.places(), strict=True):
        for match in _SENTENCE.finditer(part.text):
            sentence = match[0].strip()
            half = _middle(sentence)
            begin, rest = sentence[:half].rstrip(), sentence[half:].lstrip()
            near = len(text) - place.start - match.end() < 400
            short = len(begin) < _BEGIN or len(rest) < _QUOTE or "\n" in rest[:_QUOTE]
            if near or short or text.count(begin) > 1:
                continue
            record = Record(begin, text, (_first_words(rest),), length=len(text), dataset=QUOTES)
            found.append(Asked(begin, record.answers, part.name, context, record))
    rng.shuffle(found)
    return found


def _middle(sentence: str) -> int:
    """Where its second half begins, with a word if words are apart."""
    space = sentence.rfind(" ", 0, len(sentence) // 2 + 1)
    return space if space > len(sentence) // 4 else len(sentence) // 2


def _first_words(text: str) -> str:
    """About _QUOTE characters of a text, whole words if words are apart."""
    space = text.rfind(" ", 1, _QUOTE + 1)
    return text[: space if space > 0 else _QUOTE]


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, evenly spaced."""
    return [items[number * len(items) // count] for number in range(count)]
