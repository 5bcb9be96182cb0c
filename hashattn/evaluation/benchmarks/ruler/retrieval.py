"""The eight niah tasks: needles in noise, in prose or among other needles."""

from __future__ import annotations

import random
from collections.abc import Callable

from hashattn.evaluation.benchmarks.ruler.draws import distinct, drawer
from hashattn.evaluation.benchmarks.ruler.haystack import NOISE_WORDS, Haystack, noise
from hashattn.evaluation.benchmarks.ruler.prompt import GrowingText, Prompt, listed, worded
from hashattn.evaluation.benchmarks.ruler.specs import Retrieval
from hashattn.evaluation.benchmarks.ruler.styles import Style

DEPTHS = tuple(round(100 * i / 39) for i in range(40))  # percent of the sentences before a needle


class RetrievalSample:
    """Size: words of noise or prose, or needles; fill: words of noise after them.

    In prose, needles are at `DEPTHS` (drawn without repetition) counted in sentences; in noise and
    among needles, between any two lines. Distracting needles have other keys and other values.
    """

    def __init__(self, task: Retrieval, style: Style, haystack: Haystack, seed: str) -> None:
        rng = random.Random(seed)
        self._task, self._style, self._haystack, self._seed = task, style, haystack, seed
        self._kind = dict(style.kinds)[task.value]
        draw_key, draw_value = (drawer(kind, rng, style) for kind in (task.key, task.value))
        keys = distinct(task.keys, draw_key)
        values = distinct(task.keys * task.values, draw_value)
        values_of = {key: values[i :: task.keys] for i, key in enumerate(keys)}
        self._needles = [self._needle(key, value) for key in keys for value in values_of[key]]
        rng.shuffle(self._needles)
        self._depths = sorted(rng.sample(DEPTHS, len(self._needles)))
        self._queries = rng.sample(keys, task.queries)
        self.answers = tuple(value for key in self._queries for value in values_of[key])
        self._distractors = GrowingText(self._distractor(frozenset(keys), frozenset(values)))
        self.smallest = {"needles": 1, "noise": len(NOISE_WORDS), "text": 1}[task.haystack]
        self.step = 8 if task.haystack == "needles" else 256

    def prompt(self, size: int, fill: int = 0) -> Prompt:
        rng = random.Random(f"{self._seed}/places")
        if self._task.haystack == "text":
            parts = self._haystack.read(size, rng)
            places = [int(len(parts) * depth / 100) for depth in self._depths]
        else:
            parts = noise(size) if self._task.haystack == "noise" else self._distractors.first(size)
            places = sorted(rng.sample(range(len(parts)), len(self._needles)))
        for place, needle in reversed(list(zip(places, self._needles, strict=True))):
            parts.insert(place, needle)
        parts += noise(fill)
        several = self._task.values * self._task.queries > 1
        wording = self._style.many if several else self._style.one
        joint = self._style.joint if self._task.haystack == "text" else "\n"
        return worded(wording, joint.join(parts), kind=self._kind, query=listed(self._queries))

    def _needle(self, key: str, value: str) -> str:
        return self._style.needle.format(kind=self._kind, key=key, value=value)

    def _distractor(self, keys: frozenset[str], values: frozenset[str]) -> Callable[[], str]:
        """A function that draws needles with none of the keys and values."""
        rng = random.Random(f"{self._seed}/others")
        draw_key, draw_value = (
            drawer(kind, rng, self._style) for kind in (self._task.key, self._task.value)
        )

        def draw() -> str:
            (key,), (value,) = distinct(1, draw_key, keys), distinct(1, draw_value, values)
            return self._needle(key, value)

        return draw
