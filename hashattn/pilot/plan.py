"""What a pilot will read and ask: documents split into those that are scored and those that the
codes may learn from, packed into contexts, and the records of questions and quotes."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hashattn.base.checks import require
from hashattn.base.errors import HashAttnError
from hashattn.base.hashes import sha256_text
from hashattn.evaluation.metrics import holds_answer
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
_QUOTE = 8  # tokens that a sentence has to be continued by
_BEGIN_TOKENS = 48  # of it that are given, at most
_SENTENCE = re.compile(r"(?<=[\n。.!?！？])[^。.!?！？]{60,600}[。.!?！？]")
_FAR = 400  # characters from its end to that of the context, at least
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
    """A question or the beginning of a sentence, the context it is asked over, and its record.
    answers: the accepted ones, none if the company gave none. lost: an answer stands in a document
    but not in the context."""

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
    documents, those with questions first. learning: contexts of the others, or contexts without
    questions where there are too few documents. asked, quotes: what is asked over the contexts.
    withheld: questions that are not asked because their document is for calibration; beyond: those
    beyond `PilotSettings.questions`. divided: names of documents too long for one context.
    answer_tokens: of an answer, by dataset (`protocol`).
    """

    scored: tuple[tuple[SourceDocument, int], ...]
    calibration: tuple[tuple[SourceDocument, int], ...]
    contexts: tuple[Context, ...]
    learning: tuple[Context, ...]
    asked: tuple[Asked, ...]
    quotes: tuple[Asked, ...]
    withheld: int
    beyond: int
    divided: tuple[str, ...]
    answer_tokens: dict[str, int]


def protocol(tokenizer: Any, settings: PilotSettings, answer_tokens: Mapping[str, int]) -> Protocol:
    """How questions and quotes are asked: context dense, question and answer sparse, the answer's
    first line scored by whether it holds an accepted answer."""
    chat = bool(getattr(tokenizer, "chat_template", None))
    asked = {"chat": chat} | ({"stop": None} if chat else {})
    datasets = {
        f"{QUESTIONS}_{language}": {"template": template} | asked
        for language, template in _TEMPLATES.items()
    } | {QUOTES: {"template": "{context}{input}"}}
    for name, own in datasets.items():
        own["max_new_tokens"] = answer_tokens.get(name, settings.answer_tokens)
    return Protocol(
        sink=settings.sink, local=settings.local, seed=settings.seed, metric="holds_answer",
        first_line=True, truncated="prompt", datasets=datasets,
    )  # fmt: skip


def make_plan(
    tokenizer: Any, library: Library, questions: Sequence[Question], settings: PilotSettings
) -> Plan:
    """Divides, packs and asks. The same for the same documents, questions and settings.

    A question that names no document is about the one that BM25 finds. A quarter of the documents,
    those that no question is about if there are enough, is for calibration. A document that does
    not fit a context is divided; its questions are asked over the part that BM25 finds. Without a
    question with answers, sentences are to be completed too.
    Raises PlanError without documents, if a context has no room for any, or if all are so short
    that the smallest budget would read everything.
    """
    if not library.documents:
        raise PlanError(
            f"no document could be read ({len(library.skipped)} files were skipped): give a folder "
            "with txt, md, html, pdf, docx, xlsx, csv or pptx files"
        )
    require(getattr(tokenizer, "is_fast", False), "tokenizer", type(tokenizer).__name__,
            "a fast one, which knows the characters of each token", PlanError)  # fmt: skip
    lengths = _answer_tokens(tokenizer, questions, settings)
    room = _room(tokenizer, [q.text for q in questions], settings, lengths)
    parts = {d.name: split_document(tokenizer, d.name, d.text, room) for d in library.documents}
    about = _about(tokenizer, questions, parts)
    scored, calibration = _split(library.documents, about.values())
    learning = {document.name for document in calibration}
    kept = [n for n, name in about.items() if name not in learning]
    chosen = kept if len(kept) <= settings.questions else _evenly(kept, settings.questions)
    contexts = pack((part for d in scored for part in parts[d.name]), room)
    texts = {document.name: document.text for document in library.documents}
    asked = _asked(tokenizer, [(questions[n], about[n]) for n in chosen], texts, parts, contexts)
    busy = {id(each.context) for each in asked}
    contexts.sort(key=lambda context: id(context) not in busy)
    learn = pack((part for d in calibration for part in parts[d.name]), room)
    if not learn:
        contexts, learn = _set_aside(contexts, len(busy))
    longest = max((context.tokens for context in contexts), default=0)
    require(
        longest >= settings.least_tokens, "documents", f"{longest} tokens in the longest context",
        f"at least {settings.least_tokens}, or the smallest budget reads everything: give longer "
        "documents or larger budgets",
        PlanError,
    )  # fmt: skip
    known = any(each.answers for each in asked)
    quotes = [] if known else _quotes(tokenizer, contexts, settings)

    def sized(documents: Iterable[SourceDocument]) -> tuple[tuple[SourceDocument, int], ...]:
        return tuple((d, sum(part.tokens for part in parts[d.name])) for d in documents)

    return Plan(
        sized(scored), sized(calibration), tuple(contexts), tuple(learn), tuple(asked),
        tuple(quotes), len(questions) - len(kept), len(kept) - len(chosen),
        tuple(name for name, own in parts.items() if len(own) > 1), lengths,
    )  # fmt: skip


def _answer_tokens(
    tokenizer: Any, questions: Sequence[Question], settings: PilotSettings
) -> dict[str, int]:
    """Of an answer, by dataset: room for the longest accepted one and some words around it."""
    lengths: dict[str, int] = {}
    for question in questions:
        name = f"{QUESTIONS}_{_language(question.text)}"
        for answer in question.answers:
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            needed = min(settings.longest_answer, len(ids) + settings.answer_tokens // 2)
            lengths[name] = max(lengths.get(name, settings.answer_tokens), needed)
    return lengths


def _about(
    tokenizer: Any, questions: Sequence[Question], parts: Mapping[str, list[Part]]
) -> dict[int, str]:
    """The document that each question is about, by the question's number."""
    every = [part for own in parts.values() for part in own]
    open_ones = [n for n, question in enumerate(questions) if question.document is None]
    found = best_parts(tokenizer, [questions[n].text for n in open_ones], [every] * len(open_ones))
    guessed = {n: part.name for n, part in zip(open_ones, found, strict=True)}
    return {n: question.document or guessed[n] for n, question in enumerate(questions)}


def _set_aside(contexts: list[Context], busy: int) -> tuple[list[Context], list[Context]]:
    """(scored, for the codes) where documents are too few to be divided: a quarter of the contexts,
    one at least if three are left, of those behind the first `busy`, which questions are about."""
    count = min(max(1, len(contexts) // _CALIBRATION), len(contexts) - max(busy, 3))
    return (contexts[:-count], contexts[-count:]) if count > 0 else (contexts, [])


def _split(
    documents: Sequence[SourceDocument], asked: Iterable[str]
) -> tuple[list[SourceDocument], list[SourceDocument]]:
    """(scored, calibration), each in the library's order; no calibration of fewer than four."""
    wanted = set(asked)
    order = sorted(documents, key=lambda d: (d.name in wanted, sha256_text(d.name)))
    learning = {d.name for d in order[: len(documents) // _CALIBRATION]}
    return (
        [d for d in documents if d.name not in learning],
        [d for d in documents if d.name in learning],
    )


def _room(
    tokenizer: Any, questions: Sequence[str], settings: PilotSettings, lengths: Mapping[str, int]
) -> int:
    """Tokens of documents that a context may hold beside its longest question and answer."""
    own, around = protocol(tokenizer, settings, lengths), _BEGIN_TOKENS + settings.answer_tokens
    for question in [*questions, ""]:
        record = _record(question, "", ("",))
        asked = own.of(record.dataset)
        prompt = make_prompt(tokenizer, asked, record)
        needed = len(prompt.context) + len(prompt.question) + asked.max_new_tokens
        around = max(around, needed)
    room = settings.context - around - _SLACK
    require(
        room >= _LEAST, "context", settings.context,
        f"at least {settings.context - room + _LEAST} tokens: the longest question and its answer "
        f"take {settings.context - room} of them",
        PlanError,
    )  # fmt: skip
    return room


def _asked(
    tokenizer: Any, questions: Sequence[tuple[Question, str]], texts: Mapping[str, str],
    parts: Mapping[str, list[Part]], contexts: Sequence[Context],
) -> list[Asked]:  # fmt: skip
    best = best_parts(tokenizer, [question.text for question, _ in questions],
                      [parts[name] for _, name in questions])  # fmt: skip
    where = {id(part): context for context in contexts for part in context.parts}
    made = []
    for (question, name), part in zip(questions, best, strict=True):
        context, answers = where[id(part)], tuple(question.answers)
        there = answers and holds_answer(context.text, answers)
        lost = (
            bool(answers)
            and not there
            and any(holds_answer(text, answers) for text in texts.values())
        )
        record = _record(question.text, context.text, answers or ("",))
        made.append(Asked(question.text, answers, name, context, record, lost))
    return made


def _record(question: str, context: str, answers: tuple[str, ...]) -> Record:
    language = _language(question)
    return Record(question, context, answers, length=len(context), language=language,
                  dataset=f"{QUESTIONS}_{language}")  # fmt: skip


def _language(text: str) -> str:
    return "ja" if _JAPANESE.search(text) else "en"


def without_document(record: Record) -> Record:
    """The same question, asked of nothing: what a guess scores."""
    return Record(record.input, _NO_DOCUMENT, record.answers, dataset=record.dataset,
                  language=record.language)  # fmt: skip


def _quotes(tokenizer: Any, contexts: Sequence[Context], settings: PilotSettings) -> list[Asked]:
    """Sentences of the documents whose second half is to be found, `quotes` of them at most, taken
    in turn from as many contexts as fidelity is measured on."""
    rng = random.Random(settings.seed)
    drawn = [_sentences(tokenizer, context, rng) for context in contexts[: settings.texts]]
    made: list[Asked] = []
    while len(made) < settings.quotes and any(drawn):
        made += [own.pop() for own in drawn if own]
    return made[: settings.quotes]


def _sentences(tokenizer: Any, context: Context, rng: random.Random) -> list[Asked]:
    """Sentences that occur once in a context, whose end is not near, in random order."""
    text, found = context.text, []
    for part, place in zip(context.parts, context.places(), strict=True):
        for match in _SENTENCE.finditer(part.text):
            sentence = match[0].strip()
            half = _middle(sentence)
            begin = _tokens_of(tokenizer, sentence[:half].rstrip(), last=_BEGIN_TOKENS)
            rest = _tokens_of(tokenizer, sentence[half:].lstrip(), first=_QUOTE)
            near = len(text) - place.start - match.end() < _FAR
            if near or len(begin) < _BEGIN or "\n" in rest or text.count(begin) > 1:
                continue
            record = Record(begin, text, (rest,), length=len(text), dataset=QUOTES,
                            language=_language(sentence))  # fmt: skip
            found.append(Asked(begin, record.answers, part.name, context, record))
    rng.shuffle(found)
    return found


def _middle(sentence: str) -> int:
    """Where its second half begins, with a word if words are apart."""
    space = sentence.rfind(" ", 0, len(sentence) // 2 + 1)
    return space if space > len(sentence) // 4 else len(sentence) // 2


def _tokens_of(
    tokenizer: Any, text: str, *, first: int | None = None, last: int | None = None
) -> str:
    """The characters of a text's first or last tokens."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = offsets["offset_mapping"]
    if first is not None:
        return text[: ends[:first][-1][1]].strip()
    return text[ends[-last:][0][0] :].strip()


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, evenly spaced."""
    return [items[number * len(items) // count] for number in range(count)]
