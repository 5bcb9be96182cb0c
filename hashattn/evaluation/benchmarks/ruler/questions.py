"""Question sets: SQuAD and HotpotQA from their official JSON or the hub, and an offline one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hashattn.base.files import parse_json, read_text
from hashattn.base.hashes import sha256_text
from hashattn.evaluation.benchmarks.corpus import paragraphs
from hashattn.evaluation.benchmarks.ruler.corpus_questions import hotpot_of, squad_of
from hashattn.evaluation.benchmarks.ruler.specs import RulerError

FILES = {  # the names under which a folder may hold a data set: official, RULER's
    "squad": ("dev-v2.0.json", "squad.json"),
    "hotpotqa": ("hotpot_dev_distractor_v1.json", "hotpotqa.json"),
}
_HUB = {
    "squad": ("rajpurkar/squad_v2", None),
    "hotpotqa": ("hotpotqa/hotpot_qa", "distractor"),
}


@dataclass(frozen=True)
class Question:
    """gold: documents (indices) that answer it; near: the distractors that its data set gives."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...]


@dataclass(frozen=True)
class QuestionSet:
    """name: where the questions come from, for the records."""

    name: str
    documents: tuple[str, ...]
    questions: tuple[Question, ...]


def question_set(dataset: str, source: str = "corpus") -> QuestionSet:
    """The questions of "squad" or "hotpotqa".

    source: "corpus" makes them offline from the evaluation paragraphs of data/corpus, in the same
    structure; "hub" loads them with `datasets`; else a folder that holds the official file, or
    the file itself. RulerError for a source that is missing or not in the official format.
    """
    if source == "corpus":
        return _corpus_questions(dataset, paragraphs("eval"))
    return _official_questions(dataset, source)


@cache
def _corpus_questions(dataset: str, texts: tuple[str, ...]) -> QuestionSet:
    if dataset == "squad":
        return _squad_questions(squad_of(texts), "corpus")
    return _hotpot_questions(hotpot_of(texts), "corpus")


@cache
def _official_questions(dataset: str, source: str) -> QuestionSet:
    parse = {"squad": _squad_questions, "hotpotqa": _hotpot_questions}[dataset]
    if source == "hub":
        return parse(_from_hub(dataset), _HUB[dataset][0])
    path = _official_file(dataset, Path(source))
    text = read_text(path, RulerError)
    name = f"{path.stem}@{sha256_text(text)[:8]}"
    data = parse_json(text, str(path), RulerError)
    try:
        return parse(data, name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RulerError(f"{path} is not in the official format of {dataset}: {error}") from error


def _squad_questions(data: Mapping[str, Any], name: str) -> QuestionSet:
    """SQuAD 2.0's {"data": [{"paragraphs": [{"context", "qas"}]}]}; answerable questions only.

    near: the other paragraphs of the article.
    """
    articles = [article["paragraphs"] for article in data["data"]]
    index = _index(paragraph["context"] for article in articles for paragraph in article)
    questions = []
    for article in articles:
        members = dict.fromkeys(index[paragraph["context"]] for paragraph in article)
        for paragraph in article:
            gold = index[paragraph["context"]]
            near = tuple(i for i in members if i != gold)
            for qa in paragraph["qas"]:
                if not qa.get("is_impossible", False):
                    answers = tuple(dict.fromkeys(a["text"] for a in qa["answers"]))
                    questions.append(Question(qa["question"], answers, (gold,), near))
    return _question_set(name, index, questions)


def _hotpot_questions(data: Iterable[Mapping[str, Any]], name: str) -> QuestionSet:
    """HotpotQA's [{"question", "answer", "context": [[title, sentences]], "supporting_facts"}].

    gold: the documents of the supporting facts; near: the other eight.
    """
    rows = list(data)
    index = _index(_hotpot_document(*item) for row in rows for item in row["context"])
    questions = []
    for row in rows:
        documents = {title: index[_hotpot_document(title, s)] for title, s in row["context"]}
        titles = dict.fromkeys(title for title, _ in row["supporting_facts"])
        gold = tuple(documents[title] for title in titles)
        near = tuple(i for i in documents.values() if i not in gold)
        questions.append(Question(row["question"], (row["answer"],), gold, near))
    return _question_set(name, index, questions)


def _hotpot_document(title: str, sentences: Iterable[str]) -> str:
    return f"{title}\n{''.join(sentences)}"


def _index(documents: Iterable[str]) -> dict[str, int]:
    return {text: number for number, text in enumerate(sorted(set(documents)))}


def _question_set(name: str, index: dict[str, int], questions: list[Question]) -> QuestionSet:
    if not questions:
        raise RulerError(f"{name} holds no answerable question")
    return QuestionSet(name, tuple(index), tuple(questions))


def _official_file(dataset: str, path: Path) -> Path:
    candidates = [path] if path.is_file() else [path / name for name in FILES[dataset]]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise RulerError(
        f"no {dataset} at {path}: put {' or '.join(FILES[dataset])} there, or use the source "
        '"hub" (downloads) or "corpus" (offline)'
    )


def _from_hub(dataset: str) -> Any:
    from datasets import load_dataset

    repository, configuration = _HUB[dataset]
    rows = load_dataset(repository, configuration, split="validation")
    return squad_of_rows(rows) if dataset == "squad" else hotpot_of_rows(rows)


def squad_of_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The hub's rows, one a question, in the nested form of the official file."""
    articles: dict[str, dict[str, list]] = {}
    for row in rows:
        texts = row["answers"]["text"]
        qa = {
            "question": row["question"],
            "answers": [{"text": text} for text in texts],
            "is_impossible": not texts,
        }
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(qa)
    return {
        "data": [
            {
                "title": title,
                "paragraphs": [{"context": c, "qas": qas} for c, qas in paragraphs.items()],
            }
            for title, paragraphs in articles.items()
        ]
    }


def hotpot_of_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The hub's columns of lists as the official file's lists of pairs."""

    def pairs(columns: Mapping[str, list], *names: str) -> list[tuple]:
        return list(zip(*(columns[name] for name in names), strict=True))

    return [
        {
            "question": row["question"],
            "answer": row["answer"],
            "context": pairs(row["context"], "title", "sentences"),
            "supporting_facts": pairs(row["supporting_facts"], "title", "sent_id"),
        }
        for row in rows
    ]
