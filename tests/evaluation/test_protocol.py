"""Protocol: validation, fingerprint, prompt splitting, truncation."""

import json
from dataclasses import fields, replace

import pytest

from hashattn.evaluation.protocol import Protocol

CHANGES = {
    "question": "dense", "sink": 5, "local": 29, "dense_layers": (0,), "max_new_tokens": 3,
    "stop": "\n\n", "template": "{context} {input}", "metric": "qa_f1", "max_context": 99,
    "truncation": "middle", "seed": 1, "min_new_tokens": 1, "end_tokens": ("x",), "chat": True,
    "window": 7, "first_line": True, "truncated": "prompt", "keep_first": 7,
    "datasets": {"one": {"metric": "qa_f1"}},
}  # fmt: skip


def test_every_field_moves_the_fingerprint():
    base = Protocol(truncated="chat")
    assert set(CHANGES) == {field.name for field in fields(Protocol)}
    prints = {replace(base, **{name: value}).fingerprint for name, value in CHANGES.items()}
    assert len(prints | {base.fingerprint}) == len(CHANGES) + 1


def test_fingerprint_survives_json_and_field_order():
    by_dataset = {"two": {"end_tokens": ["x"], "chat": True}, "one": {"metric": "qa_f1"}}
    protocol = Protocol(
        dense_layers=(3, 1, 1), end_tokens=["y"], truncated="chat", datasets=by_dataset
    )
    values = json.loads(json.dumps(protocol.to_dict()))
    again = Protocol(**dict(reversed(values.items())))
    assert again == protocol and again.fingerprint == protocol.fingerprint
    assert protocol.dense_layers == (1, 3) and hash(again) == hash(protocol)
    assert values["datasets"] == by_dataset


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": "some"}, "question = 'some'"),
        ({"sink": -1}, "sink = -1"),
        ({"local": 0}, "local = 0"),
        ({"local": 2.5}, "local = 2.5"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"stop": ""}, "stop = '': must be a text"),
        ({"stop": 5}, "stop = 5: must be a text"),
        ({"metric": "bleu"}, "metric = 'bleu': must be one of exact_match, "),
        ({"metric": ["qa_f1"]}, "must be one of exact_match, "),
        ({"seed": True}, "seed = True: must be an integer of at least 0"),
        ({"truncation": "left"}, "truncation = 'left'"),
        ({"truncated": "tail"}, "truncated = 'tail'"),
        ({"min_new_tokens": -1}, "min_new_tokens = -1"),
        ({"window": 0, "truncated": "chat"}, "window = 0"),
        ({"window": 4}, "truncated = 'context': must be 'prompt' or 'chat', as .* window = 4"),
        ({"chat": True}, "truncated = 'context': must be 'prompt' or 'chat', as chat = True"),
        ({"keep_first": -1}, "keep_first = -1"),
        (
            {"truncation": "suffix", "max_context": 128},
            "max_context = 128: must be more than",
        ),
        ({"truncation": "suffix"}, "max_context = None: must be more than keep_first = 128"),
        (
            {"datasets": {"qasper": {"sink": 1}}},
            r"datasets\['qasper'\] = \['sink'\]: must be",
        ),
        ({"datasets": {"qasper": {"metric": "bleu"}}}, r"datasets\['qasper'\]: metric = 'bleu'"),
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
    assert Protocol().truncate(tokens) == (tokens,)
    assert Protocol(max_context=10).truncate(tokens) == (tokens,)
    middle = Protocol(max_context=5, truncation="middle")
    assert middle.truncate(tokens) == ([0, 1], [7, 8, 9])
    with pytest.raises(ValueError, match="10 tokens and max_context = 5"):
        Protocol(max_context=5).truncate(tokens)


def test_suffix_truncation_keeps_the_first_tokens_and_the_end():
    suffix = Protocol(max_context=5, truncation="suffix", keep_first=2)
    assert suffix.truncate(range(10)) == ([0, 1], [7, 8, 9])
    assert replace(suffix, keep_first=0).truncate(range(10)) == ([], [5, 6, 7, 8, 9])
    assert suffix.truncate(range(5)) == ([0, 1, 2, 3, 4],)


def test_whole_prompts_keep_two_equal_halves_as_longbench_does():
    halves = Protocol(max_context=5, truncation="middle", truncated="prompt")
    assert halves.truncate(range(10)) == ([0, 1], [8, 9])
    assert halves.truncate(range(5)) == ([0, 1, 2, 3, 4],)


def test_a_dataset_is_asked_by_its_own_fields():
    protocol = Protocol(sink=9, datasets={"b": {"max_new_tokens": 7}, "a": {"metric": "count"}})
    assert protocol.of("b") == Protocol(sink=9, max_new_tokens=7)
    assert protocol.of("a") == Protocol(sink=9, metric="count")
    with pytest.raises(ValueError, match=r"no dataset 'c'; it has \['a', 'b'\]"):
        protocol.of("c")
    assert Protocol().of("c") == Protocol()


def test_only_the_first_line_is_scored_where_the_protocol_says_so():
    protocol = Protocol(metric="count")
    assert protocol.score("\n3\n4", ["3"]) == 0.5
    assert replace(protocol, first_line=True).score("\n3\n4", ["3"]) == 1
    classes = Protocol(metric="classification")
    assert classes.score("a b", ["a"], ["a", "b"]) == 0.5
