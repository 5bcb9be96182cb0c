"""qa_1 and qa_2: a question, the documents that answer it, and distractors."""

from __future__ import annotations

import random
from itertools import cycle, islice

from hashattn.evaluation.benchmarks.ruler.prompt import Prompt, worded
from hashattn.evaluation.benchmarks.ruler.questions import Question, QuestionSet
from hashattn.evaluation.benchmarks.ruler.styles import Style


class AnsweringSample:
    """Size: distractors beside the documents of the question; fill: characters of one more.

    Distractors are first those that the data set gives the question (SQuAD: paragraphs of the
    same article), then any others; past the last document they start over. The answering
    documents come once.
    """

    smallest = 0
    step = 4

    def __init__(self, question: Question, source: QuestionSet, style: Style, seed: str) -> None:
        rng = random.Random(seed)
        self._style, self._seed, self._question = style, seed, question
        self.answers = question.answers
        documents = source.documents
        self._gold = [documents[i] for i in question.gold]
        near = rng.sample(question.near, len(question.near))
        used = {*question.gold, *near}
        others = [i for i in range(len(documents)) if i not in used]
        order = near + rng.sample(others, len(others))
        self._distractors = [documents[i] for i in order]

    def prompt(self, size: int, fill: int = 0) -> Prompt:
        distractors = list(islice(cycle(self._distractors), size + 1))
        last = distractors.pop()[:fill]
        documents = self._gold + distractors + ([last] if fill else [])
        random.Random(f"{self._seed}/order").shuffle(documents)
        context = "\n\n".join(
            self._style.document.format(number=number, text=text)
            for number, text in enumerate(documents, 1)
        )
        return worded(self._style.answering, context, query=self._question.text)
