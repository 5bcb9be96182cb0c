"""Generated long-context tasks in LongBench's record format, one for each category.

A task is a set of one-line *facts* scattered in natural text and one question about each of them.
A fact belongs to the training or the evaluation split by the hash of its own line, and so does
every paragraph of the haystack: nothing that evaluation asks or shows was trained on. On "vote"
nothing was trained at all.

========== =============================== ====================================================
task       LongBench category              example fact; question; answer
========== =============================== ====================================================
lookup     single-document QA              Note: Alice visits Kyoto; Alice visits; Kyoto
multihop   multi-document QA               Rule: hammer needs rope, Rule: rope needs fan;
                                           hammer needs; rope needs fan
needle     retrieval among distractors     Fact: brave falcon hides ruby violin; brave falcon hides;
           that share half of the key      ruby violin
fewshot    few-shot learning (labels)      Text: calm shy wolf => B; odd tall wolf =>; B
passage    synthetic retrieval             Abstract: ginger melon = 4821; ginger melon =; 4821
code       code completion                 def brave_anchor(falcon, otter); brave_anchor;
                                           (falcon, otter)
vote       none: few-shot labels of which  three of Text: odd tall wolf => B, one of
           the majority is the answer      Text: calm shy wolf => G; fair old wolf =>; B
========== =============================== ====================================================
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hashattn.base.checks import require_numbers, require_one_of
from hashattn.base.hashes import sha256_text
from hashattn.evaluation.benchmarks.base import Benchmark
from hashattn.evaluation.benchmarks.corpus import paragraphs, require_split, split_of
from hashattn.evaluation.benchmarks.words import (
    ADJECTIVES,
    ANIMALS,
    COLORS,
    FOODS,
    LABELS,
    NAMES,
    OBJECTS,
    VERBS,
)
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record, record_from_dict

_QUESTION_MARK = "Q: "
QUESTIONS_PER_CONTEXT = 2  # of each task
_FOR, _AGAINST = 3, 1  # examples of a vote's two labels


@dataclass(frozen=True)
class Question:
    """`text` is asked after the context; `answer` follows it and ends with the line."""

    text: str
    answer: str


@dataclass(frozen=True)
class FactSet:
    """The facts of one task in one context (lines without newline) and their questions."""

    task: str
    facts: tuple[str, ...]
    questions: tuple[Question, ...]


class _Draw:
    """Random draws whose fact lines all belong to one split."""

    def __init__(self, rng: random.Random, split: str):
        self.rng, self.split = rng, require_split(split)

    def line(self, make: Callable[[], str]) -> str:
        """The first line from `make` that belongs to the split."""
        while split_of(line := make()) != self.split:
            pass
        return line


def _lookup(draw: _Draw, size: int) -> FactSet:
    keys = [(name, verb) for name in NAMES for verb in VERBS]
    lines, questions = [], []
    for name, verb in draw.rng.sample(keys, min(size, len(keys))):
        line = draw.line(lambda n=name, v=verb: f"Note: {n} {v} {draw.rng.choice(VERBS[v])}")
        lines.append(line)
        questions.append(Question(f"{name} {verb}", " " + line.split()[-1]))
    return FactSet("lookup", tuple(lines), tuple(questions))


def _multihop(draw: _Draw, size: int) -> FactSet:
    unused = draw.rng.sample(OBJECTS, len(OBJECTS))
    lines, questions = [], []

    def targets(word: str) -> list[str]:
        return [w for w in unused if split_of(f"Rule: {word} needs {w}") == draw.split]

    while len(lines) < size and len(unused) >= 3:
        chain = [unused.pop()]
        while len(chain) < 3 and (choices := targets(chain[-1])):
            chain.append(draw.rng.choice(choices))
            unused.remove(chain[-1])
        if len(chain) < 3:
            continue  # no rule of the split continues this chain
        lines += [f"Rule: {a} needs {b}" for a, b in zip(chain, chain[1:], strict=False)]
        questions.append(Question(f"{chain[0]} needs", " " + " needs ".join(chain[1:])))
    return FactSet("multihop", tuple(lines), tuple(questions))


def _needle(draw: _Draw, size: int) -> FactSet:
    side = max(2, round(size**0.5))  # a grid of keys: every half of a key occurs `side` times
    first, second = draw.rng.sample(ADJECTIVES, side), draw.rng.sample(ANIMALS, side)
    lines, questions = [], []
    for adjective, animal in ((a, b) for a in first for b in second):
        key = f"{adjective} {animal} hides"
        line = draw.line(
            lambda k=key: f"Fact: {k} {draw.rng.choice(COLORS)} {draw.rng.choice(OBJECTS)}"
        )
        lines.append(line)
        questions.append(Question(key, " " + " ".join(line.split()[-2:])))
    return FactSet("needle", tuple(lines), tuple(questions))


def _example(draw: _Draw, keyword: str, label: str) -> str:
    """A labelled line of few-shot learning."""
    return draw.line(
        lambda: f"Text: {' '.join(draw.rng.sample(ADJECTIVES, 2))} {keyword} => {label}"
    )


def _unlabelled(example: str, label: str) -> Question:
    """The question for an example's label."""
    return Question(example[len("Text: ") : -len(f" {label}")], f" {label}")


def _fewshot(draw: _Draw, size: int) -> FactSet:
    keywords = draw.rng.sample(ANIMALS, max(2, min(len(ANIMALS), size // 2)))
    lines, questions = [], []
    for keyword in keywords:
        label = draw.rng.choice(LABELS)
        lines += [_example(draw, keyword, label) for _ in range(2)]
        questions.append(_unlabelled(_example(draw, keyword, label), label))
    return FactSet("fewshot", tuple(lines), tuple(questions))


def _passage(draw: _Draw, size: int) -> FactSet:
    topics = {tuple(draw.rng.sample(FOODS, 2)) for _ in range(size)}
    lines, questions = [], []
    for topic in sorted(topics):
        key = f"{' '.join(topic)} ="
        line = draw.line(lambda k=key: f"Abstract: {k} {draw.rng.randrange(1000, 10000)}")
        lines.append(line)
        questions.append(Question(key, " " + line.split()[-1]))
    return FactSet("passage", tuple(lines), tuple(questions))


def _code(draw: _Draw, size: int) -> FactSet:
    names = {(draw.rng.choice(ADJECTIVES), draw.rng.choice(OBJECTS)) for _ in range(size)}
    lines, questions = [], []
    for name in ("_".join(pair) for pair in sorted(names)):
        line = draw.line(lambda n=name: f"def {n}({', '.join(draw.rng.sample(ANIMALS, 2))})")
        signature = line[len("def ") + len(name) :]
        lines.append(line)
        questions.append(Question(name, signature))
    return FactSet("code", tuple(lines), tuple(questions))


def _vote(draw: _Draw, size: int) -> FactSet:
    lines, questions = [], []
    for keyword in draw.rng.sample(ANIMALS, max(1, min(len(ANIMALS), size // (_FOR + _AGAINST)))):
        answer, other = draw.rng.sample(LABELS, 2)
        labels = [answer] * _FOR + [other] * _AGAINST
        lines += [_example(draw, keyword, label) for label in labels]
        questions.append(_unlabelled(_example(draw, keyword, answer), answer))
    return FactSet("vote", tuple(lines), tuple(questions))


_MAKERS: dict[str, Callable[[_Draw, int], FactSet]] = {
    "lookup": _lookup,
    "multihop": _multihop,
    "needle": _needle,
    "fewshot": _fewshot,
    "passage": _passage,
    "code": _code,
}
TASKS = tuple(_MAKERS)  # what the embedded model and its hashes learned from
_MAKERS["vote"] = _vote


def draw_facts(task: str, size: int, rng: random.Random, split: str) -> FactSet:
    """About `size` facts of `task` from `split`, with their questions in random order.

    Raises `ValueError` for an unknown task or split, or a size below 2.
    """
    require_one_of("task", task, _MAKERS)
    require_numbers({"size": size}, counts={"size": 2})
    drawn = _MAKERS[task](_Draw(rng, split), size)
    return FactSet(task, drawn.facts, tuple(rng.sample(drawn.questions, len(drawn.questions))))


def scatter(
    facts: list[str], tokens: int, count: Callable[[str], int], rng: random.Random, split: str
) -> str:
    """Fact lines shuffled into paragraphs of `split` until `count(text)` reaches `tokens`.

    At most `tokens` tokens, in whole lines, so it may fall short by one paragraph. ValueError if
    the facts alone take more.
    """
    used = sum(count(fact + "\n") for fact in facts)
    if used > tokens:
        raise ValueError(f"{len(facts)} facts take {used} tokens, more than the {tokens} allowed")
    lines, prose = list(facts), paragraphs(split)
    while True:
        paragraph = rng.choice(prose)
        used += count(paragraph + "\n")
        if used > tokens:
            break
        lines.append(paragraph)
    rng.shuffle(lines)
    return "\n".join(lines)


def make_records(
    tokenizer, tokens: int, contexts: int, *, seed: int, split: str = "eval",
    tasks: tuple[str, ...] = TASKS, questions_per_task: int = 2, facts_per_1k: float = 2.5,
) -> Iterator[dict]:  # fmt: skip
    """LongBench-format records: `contexts` haystacks of at most `tokens` tokens in all.

    Every context holds facts of all `tasks` (`facts_per_1k` of each for 1,024 tokens) and is
    asked `questions_per_task` questions of each, one record a question. A record's `length` is the
    number of its context's tokens.
    """
    values = {"tokens": tokens, "contexts": contexts, "questions_per_task": questions_per_task}
    require_numbers(values, counts={"tokens": 256, "contexts": 1, "questions_per_task": 1})
    count = _token_counter(tokenizer)
    for number in range(contexts):
        rng = random.Random(f"{split}/{tokens}/{seed}/{number}")
        size = max(4, round(facts_per_1k * tokens / 1024))
        sets = [draw_facts(task, size, rng, split) for task in tasks]
        facts = [fact for fact_set in sets for fact in fact_set.facts]
        context = scatter(facts, tokens - 32, count, rng, split)  # 32: room for the question
        length = count(context)
        for fact_set in sets:
            for question in fact_set.questions[:questions_per_task]:
                yield _record(fact_set.task, context, question, length)


def _token_counter(tokenizer: Any) -> Callable[[str], int]:
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _record(task: str, context: str, question: Question, length: int) -> dict:
    answer = question.answer.strip()
    return {
        "input": question.text,
        "context": context,
        "answers": [answer],
        "length": length,
        "dataset": task,
        "language": "en",
        "all_classes": list(LABELS) if task == "fewshot" else None,
        "_id": sha256_text("\x00".join((context, question.text)))[:32],
    }


def make_sequences(
    tokenizer, tokens: int, count: int, *, seed: int, split: str = "train",
    tasks: tuple[str, ...] = TASKS, questions_per_task: int = 8, facts_per_1k: float = 2.5,
) -> Iterator[tuple[list[int], list[int]]]:  # fmt: skip
    """Token sequences for learning hashes: (input ids, positions of questions and answers).

    Contexts as of `make_records`, followed by many questions with their answers; the positions are
    those of the queries worth learning from. At most `tokens` tokens in all.
    """
    token_count = _token_counter(tokenizer)
    for number in range(count):
        rng = random.Random(f"sequence/{split}/{tokens}/{seed}/{number}")
        size = max(4, round(facts_per_1k * tokens / 1024))
        sets = [draw_facts(task, size, rng, split) for task in tasks]
        questions = [q for fact_set in sets for q in fact_set.questions[:questions_per_task]]
        rng.shuffle(questions)
        tail = "".join(f"{_QUESTION_MARK}{q.text}{q.answer}\n" for q in questions)
        tail_ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
        facts = [fact for fact_set in sets for fact in fact_set.facts]
        context = scatter(facts, tokens - len(tail_ids) - 1, token_count, rng, split)
        context_ids = tokenizer(context + "\n")["input_ids"]
        ids = context_ids + tail_ids
        yield ids, list(range(len(context_ids), len(ids)))


def generated_records(
    tokenizer: Any, length: int, samples: int, *, seed: int = 0, tasks: tuple[str, ...] = TASKS
) -> list[Record]:
    """`samples` evaluation records of every task, contexts of `length` tokens.

    Fewer samples are the first of more.
    """
    taken, counts = [], Counter()
    # a generator: makes only the contexts that are needed, each with a question of every task
    candidates = make_records(tokenizer, length, samples, seed=seed, tasks=tasks,
                              questions_per_task=QUESTIONS_PER_CONTEXT)  # fmt: skip
    for record in candidates:
        if counts[record["dataset"]] < samples:
            counts[record["dataset"]] += 1
            taken.append(record_from_dict(record))
        if all(counts[task] == samples for task in tasks):
            break
    return taken


def records(
    profile: Any, tokenizer: Any, length: int, samples: int, folder: Path | None
) -> list[Record]:
    """generated_records of the profile's tasks, seeded by it."""
    return generated_records(tokenizer, length, samples, seed=profile.seed, tasks=profile.tasks)


def protocol(profile: Any, length: int, folder: Path | None) -> Protocol:
    """Context dense, question and answer sparse, by the profile's template and metric."""
    return Protocol(sink=profile.sink, local=profile.local, seed=profile.seed,
                    template=profile.template, metric=profile.metric)  # fmt: skip


BENCHMARK = Benchmark(records, protocol, TASKS)
