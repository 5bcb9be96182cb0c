"""Crowded tasks: many lines share half of a key; a vote is decided by the majority."""

import random
import re
from collections import Counter
from dataclasses import replace

from hashattn.evaluation.benchmarks import crowded
from hashattn.evaluation.benchmarks.generated import TASKS, draw_facts
from hashattn.reproduce.access import load_model
from hashattn.reproduce.profiles import load_profile


def test_a_vote_is_what_three_of_four_examples_say():
    drawn = draw_facts("vote", 40, random.Random(0), "eval")
    assert len(drawn.facts) == 40 and len(drawn.questions) == 10
    for question in drawn.questions:
        keyword = question.text.split()[-2]
        labels = Counter(fact.split()[-1] for fact in drawn.facts if f" {keyword} =>" in fact)
        assert sorted(labels.values()) == [1, 3]
        assert labels.most_common(1)[0][0] == question.answer.strip()
    assert "vote" not in TASKS  # nothing trains on it


def test_half_of_a_needles_key_is_shared_by_many_lines():
    profile = load_profile("embedded")
    asking = replace(profile, benchmark="crowded", tasks=crowded.TASKS)
    _, tokenizer = load_model(profile)
    records = crowded.BENCHMARK.records(asking, tokenizer, 4096, 2, None)
    assert [record.dataset for record in records] == 2 * list(crowded.TASKS)
    needle = next(record for record in records if record.dataset == "needle")
    first, second, _ = needle.input.split()
    assert len(re.findall(rf"Fact: {first} ", needle.context)) >= 6
    assert len(re.findall(rf"Fact: \w+ {second} hides", needle.context)) >= 6
    assert needle.context.count(needle.input) == 1
    assert all(r.length <= 4096 - 32 for r in records)
