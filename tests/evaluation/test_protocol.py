"""Protocol: validation, fingerprint, prompt splitting, truncation."""

import json
from dataclasses import fields

import pytest

from hashattn.evaluation.protocol import Protocol

CHANGES = {
    "question": "dense", "sink": 5, "local": 29, "dense_layers": (0,), "max_new_tokens": 3,
    "stop": "\n\n", "template": "{context} {input}", "metric": "qa_f1", "max_context": 99,
    "truncation": "middle", "seed": 1,
}  # fmt: skip


def test_every_field_moves_the_fingerprint():
    base = Protocol()
    assert set(CHANGES) == {field.name for field in fields(Protocol)}
    prints = {base.with_(**{name: value}).fingerprint for name, value in CHANGES.items()}
    assert len(prints | {base.fingerprint}) == len(CHANGES) + 1


def test_fingerprint_survives_json_and_field_order():
    protocol = Protocol(dense_layers=(3, 1, 1))
    values = json.loads(json.dumps(protocol.to_dict()))
    again = Protocol.from_dict(dict(reversed(values.items())))
    assert again == protocol and again.fingerprint == protocol.fingerprint
    assert protocol.dense_layers == (1, 3)


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="windows"):
        Protocol.from_dict({"windows": 3})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": "some"}, "question = 'some'"),
        ({"sink": -1}, "sink = -1"),
        ({"local": 0}, "local = 0"),
        ({"local": 2.5}, "local = 2.5"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"stop": ""}, "stop"),
        ({"metric": "bleu"}, "metric = 'bleu'"),
        ({"truncation": "left"}, "truncation = 'left'"),
        ({"template": "{input}"}, "template"),
        ({"template": "{input} {context}"}, "template"),
    ],
)
def test_invalid_values_name_field_and_value(change, said):
    with pytest.raises(ValueError, match=said):
        Protocol(**change)


def test_prompt_splits_before_the_input_and_keeps_its_space():
    shared, rest = Protocol().split_prompt("Some {text}.", "who { is")
    assert (shared, rest) == ("Some {text}.\nQ:", " who { is")


def test_prompt_without_an_input_splits_after_the_context():
    protocol = Protocol(template="Read: {context}\n\nNow, summarise.")
    assert protocol.split_prompt("abc ", "") == ("Read: abc ", "\n\nNow, summarise.")


def test_literal_braces_in_templates_survive():
    protocol = Protocol(template="{{x}} {context} Q {input} {{y}}")
    assert protocol.split_prompt("c", "i") == ("{x} c Q", " i {y}")


def test_truncation_keeps_both_ends_or_refuses():
    tokens = list(range(10))
    assert Protocol().truncate(tokens) == tokens
    assert Protocol(max_context=10).truncate(tokens) == tokens
    middle = Protocol(max_context=5, truncation="middle")
    assert middle.truncate(tokens) == [0, 1, 7, 8, 9]
    with pytest.raises(ValueError, match="10 tokens and max_context = 5"):
        Protocol(max_context=5).truncate(tokens)
