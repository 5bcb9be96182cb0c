"""Every sentence in both languages, and numbers with their units."""

import re
import string
from dataclasses import replace

import pytest
from capacity_cases import DEVICE, LLAMA, SMALL, measurement

from hashattn.pilot.capacity.devices import device_named
from hashattn.pilot.capacity.preflight import preflight
from hashattn.pilot.capacity.result import VERDICTS, Figure, Note, Workload
from hashattn.pilot.capacity.wording import (
    LABELS,
    SENTENCES,
    VERDICT_WORDS,
    sentence,
    shown,
    summary,
)

A100, H100, L4 = (device_named(name) for name in ("a100-40gb", "h100-80gb", "l4-24gb"))


def results():
    """Pre-flights that together say all that can be said."""
    mixture = replace(SMALL, expert_parameters=400_000_000, experts=8, chosen=2)
    traffic = {"requests_per_day": 100.0, "price_per_hour": 2.5}
    yield preflight(LLAMA, Workload(2048, **traffic), A100)
    yield preflight(LLAMA, Workload(131072, 8), A100)
    yield preflight(LLAMA, Workload(131072), H100)
    yield preflight(LLAMA, Workload(131073), H100, fixed_us=5)
    yield preflight(replace(LLAMA, positions=None), Workload(65536), L4)
    yield preflight(LLAMA, Workload(8192), L4, fixed_us=250)
    yield preflight(replace(SMALL, query_heads=4), Workload(100_000), DEVICE, budget=1.0)
    yield preflight(LLAMA, Workload(32768), A100, budget=0.2)
    yield preflight(mixture, Workload(100_000), DEVICE)
    yield preflight(SMALL, Workload(100_000), DEVICE, measured=measurement())


def fields(template):
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def test_all_that_is_said_has_words_in_both_languages():
    said, labelled = {}, set()
    for result in results():
        notes = [*result.reasons, *result.changes, *(each.note for each in result.memory)]
        said |= {note.key: set(note.values) for note in notes}
        labelled |= {line.key for line in result.lines}
        for language in ("en", "ja"):
            text = summary(result, language)
            assert text.startswith(VERDICT_WORDS[language][result.verdict])
            assert not re.search(r"[{}]|None|nan", text)
    for language in ("en", "ja"):
        assert set(SENTENCES[language]) == set(said)
        assert set(LABELS[language]) == labelled
        assert set(VERDICT_WORDS[language]) == set(VERDICTS)
    for key, template in SENTENCES["en"].items():
        assert fields(template) == fields(SENTENCES["ja"][key]) <= said[key]


def test_a_sentence():
    note = Note(
        "attention_is_small", {"share": 0.0164, "ceiling": 1.0167, "context": 2048, "batch": 1}
    )
    assert sentence(note) == (
        "Keys and values are only 1.6% of the bytes that a decode step reads at 2,048 tokens and "
        "batch 1: even attention that takes no time would make answers 1.02x as fast at most."
    )
    assert sentence(note, "ja").startswith("2,048 トークン、バッチ 1 では、")
    with pytest.raises(ValueError, match="language = 'fr': must be one of en, ja"):
        sentence(note, "fr")


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (131072.0, "bytes", "131,072 B"),
        (16_060_522_496, "bytes", "16.1 GB"),
        (999_600_000, "bytes", "1 GB"),
        (268_435_456, "bytes", "268 MB"),
        (1.5e12, "bytes", "1.5 TB"),
        (8.5e9, "bytes a second", "8.5 GB/s"),
        (0.0164, "share", "1.6%"),
        (9.5576, "times", "9.56x"),
        (131072, "tokens", "131,072 tokens"),
        (0.3456, "ms", "0.346 ms"),
        (2028.4, "us", "2,028 us"),
        (None, "tokens", "none found"),
    ],
)
def test_numbers_with_their_units(value, unit, text):
    assert shown(Figure("kv", value, unit)) == text


def test_cost_in_words():
    traffic = {"requests_per_day": 1000.0, "price_per_hour": 2.5, "currency": "EUR"}
    result = preflight(SMALL, Workload(1_000_000, **traffic), DEVICE)
    text = summary(result)
    assert f"256,000 answer tokens a day for 30 days: {result.cost.gpu_hours_dense:,.1f}" in text
    assert f"{result.cost.money_sparse:,.2f} EUR (decoding alone" in text
    assert "EUR" not in summary(preflight(SMALL, Workload(10, requests_per_day=5.0), DEVICE))
