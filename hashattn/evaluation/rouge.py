"""ROUGE-L F as LongBench scores it: the summary level of the package `rouge` 1.0.1.

Not by that package, because it walks back the longest common subsequence by recursion. Where
Python's stack overflows, LongBench scores 0, and when it does depends on the depth of the caller's
stack and on the recursion limit, which notebook libraries raise. Here the overflow is that of
LongBench's own script, wherever this is called from.
"""

from __future__ import annotations

from collections.abc import Sequence

# steps of the walk that fit in CPython's default limit of 1000 frames below LongBench's eval.py
OVERFLOW = 991


def rouge_l_f(prediction: str, answer: str, overflow: int = OVERFLOW) -> float:
    """F of the union of longest common subsequences over all pairs of sentences, 0..1.

    Sentences end at "." (a full stop of other scripts does not end one); words are what white space
    separates and count once, however often they occur. 0.0 when a text has no sentence or a walk
    takes more than `overflow` steps.
    """
    candidate, reference = _sentences(prediction), _sentences(answer)
    if not candidate or not reference:
        return 0.0
    union: set[str] = set()
    for sentence in reference:
        for other in candidate:
            common, steps = _common_subsequence(sentence, other)
            if steps > overflow:
                return 0.0
            union |= common
    precision = len(union) / len({word for words in candidate for word in words})
    recall = len(union) / len({word for words in reference for word in words})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; one of white space alone has the empty word, as in `rouge`."""
    return [part.split() or [""] for part in text.split(".") if part]


def _common_subsequence(x: Sequence[str], y: Sequence[str]) -> tuple[set[str], int]:
    """Words of the longest common subsequence, and the steps of the walk that collects them."""
    table = [[0] * (len(y) + 1)]
    for word in x:
        above, row = table[-1], [0]
        for j, other in enumerate(y):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    i, j, steps = len(x), len(y), 1
    words = set()
    while i and j:
        steps += 1
        if x[i - 1] == y[j - 1]:
            words.add(x[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words, steps
