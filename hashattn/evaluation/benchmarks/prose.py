"""Stories, generated: people, places and things that come back many pages later."""

from __future__ import annotations

import random
from collections.abc import Iterator

from hashattn.evaluation.benchmarks.words import ADJECTIVES, ANIMALS, FOODS, NAMES, OBJECTS

_PLACES = (
    "the mill by the weir", "the old post office", "the house on Tanner's Hill",
    "the harbour inn", "the orchard behind the chapel", "the last station of the branch line",
    "the school library", "the ferry landing", "the kitchen of the inn", "the attic",
)  # fmt: skip
_TIMES = (
    "That winter", "On the first warm day", "Long after midnight", "Before the harvest",
    "A week later", "When the rain stopped", "On the eve of the fair", "Years afterwards",
    "That same evening", "Early the next morning",
)  # fmt: skip
_TRADES = "baker clerk ferryman gardener glazier miller nurse organist pilot tailor".split()
_SENTENCES = (
    "{time}, {a} walked to {place} and found the {thing} where {b} had left it.",
    "{a} had always thought of {place} as a {quality} spot, but {time_low} it seemed {other}.",
    '"You were seen at {place}," said {a}. {b} put down the {thing} and did not answer.',
    "Nobody in the village would have believed that {b}, the {trade}, was afraid of {animal}s.",
    "{a} ate some {food} by the window and wondered what had become of the {thing}.",
    "The letter that {b} wrote from {place} reached {a} only {time_low}.",
    "There was a {quality} {animal} in the yard of {place}; {a} gave it what {food} was left.",
    '"If the {thing} is not at {place}," {b} said, "then {a} has it, and has had it for years."',
    "{time}, {b} told {a} about the {trade} who had once lived in {place}.",
    "It was a {quality} {thing}, {other} at the edges, and {a} kept it wrapped in paper.",
    "{a} and {b} quarrelled over the {thing}, and {time_low} they could not say why.",
    "Of all that {a} remembered of {place}, the smell of {food} stayed longest.",
    "{b} laughed, as {a} had not heard anyone laugh since {place} was sold to the {trade}.",
    "The {trade} shook his head: no {animal} had ever been that {quality}.",
)


def stories(seed: int) -> Iterator[str]:
    """One story after the other, without end: a title, then 8 to 20 paragraphs of 3 to 7 sentences
    about the same few people, places and things."""
    rng = random.Random(f"stories {seed}")
    while True:
        cast, places = rng.sample(NAMES, rng.randrange(3, 6)), rng.sample(_PLACES, 4)
        things, animals = rng.sample(OBJECTS, 5), rng.sample(ANIMALS, 2)
        paragraphs = [
            " ".join(_sentence(rng, cast, places, things, animals)
                     for _ in range(rng.randrange(3, 8)))
            for _ in range(rng.randrange(8, 21))
        ]  # fmt: skip
        yield "\n".join([f"The {things[0].capitalize()} of {cast[0]}", *paragraphs])


def _sentence(
    rng: random.Random, cast: list[str], places: list[str], things: list[str], animals: list[str]
) -> str:
    a, b = rng.sample(cast, 2)
    quality, other = rng.sample(ADJECTIVES, 2)
    time, later = rng.sample(_TIMES, 2)
    return rng.choice(_SENTENCES).format(
        a=a, b=b, place=rng.choice(places), thing=rng.choice(things), animal=rng.choice(animals),
        food=rng.choice(FOODS), trade=rng.choice(_TRADES), quality=quality, other=other,
        time=time, time_low=later[0].lower() + later[1:],
    )  # fmt: skip
