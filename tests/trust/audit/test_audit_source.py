"""A prompt's passages, and characters of its tokens in the user's own files."""

import pytest
import torch
from transformers import AutoTokenizer

from hashattn.trust.audit.source import AuditError, Document, Source, find_documents
from helpers import characters

MIXED = "One line.\n\nZwei Größen: 日本語 and 😀😀.\n" + 30 * "word, " + "\nend"


@pytest.fixture(scope="module")
def bpe():
    return AutoTokenizer.from_pretrained("data/embedded")


@pytest.mark.parametrize("most", [1, 2, 7, 500])
@pytest.mark.parametrize("text", [MIXED, "a" + 300 * "日"])  # three tokens a character
def test_passages_hold_every_token_once_in_order(bpe, text, most):
    source = Source.of(bpe, text, most=most)
    assert source.passages[0][0] == 1  # the first token has no text
    covered = [t for first, last in source.passages for t in range(first, last)]
    assert covered == [t for t, (a, b) in enumerate(source.offsets) if a < b]
    assert len(source.passages) <= most
    places = [source.place_of_passage(p) for p in range(len(source.passages))]
    assert places[0].prompt_start == 0 and places[-1].prompt_end == len(text)
    for one, other in zip(places, places[1:], strict=False):
        assert one.prompt_end <= other.prompt_start  # no character is cut in two
    segments = source.segments(len(source.ids) + 3).tolist()
    assert segments[0] == len(source.passages)
    assert segments[-3:] == [len(source.passages) + 1] * 3
    for token in range(1, len(source.ids)):
        first, last = source.passages[segments[token]]
        assert first <= token < last
    assert source.segments(2).tolist() == segments[:2]


def test_a_passage_ends_with_a_line_and_a_long_one_with_a_sentence():
    lines = "a b c\nd\n" + 30 * "x." + 10 * "x" + ". " + 10 * "y" + "\nz"
    source = Source.of(characters(), lines, most=1000)
    places = [source.place_of_passage(p) for p in range(len(source.passages))]
    texts = [lines[p.start : p.end] for p in places]
    assert texts == ["a b c\n", "d\n", lines[8:79], " " + 10 * "y" + "\n", "z"]
    for endless, sizes in ((1000 * "q", {192, 1000 % 192}), (200 * "words ", {96, 1200 % 96})):
        endless = Source.of(characters(), endless, most=1000)
        assert {last - first for first, last in endless.passages} == sizes


def test_positions_are_in_the_user_s_own_files(bpe):
    one, two = "Alpha: the first file.\nIt ends.", "Beta – zweite Datei 😀, mit Text."
    text = f"Read these.\n--- one\n{one}\n--- two\n{two}\nQuestion: which?"
    documents = find_documents(text, {"two.md": two, "one.txt": one})
    assert [d.name for d in documents] == ["one.txt", "two.md"]
    source = Source.of(bpe, text, documents=documents, most=4)
    files = {"one.txt": one, "two.md": two, "prompt": text}
    seen = set()
    for token in range(1, len(source.ids)):
        place = source.place_of_token(token)
        seen.add(place.source)
        exact = text[place.prompt_start : place.prompt_end]
        assert files[place.source][place.start : place.end] == exact
        start, end = source.offsets[token]
        assert exact in text[start:end] and exact
    assert seen == set(files)
    for passage in range(len(source.passages)):
        place = source.place_of_passage(passage)
        exact = text[place.prompt_start : place.prompt_end]
        assert files[place.source][place.start : place.end] == exact and exact
    cut = Source.of(bpe, one[6:], documents=[Document("one.txt", 0, 10, offset=6)])
    place = cut.place_of_token(1)
    assert one[place.start : place.end] == one[6:][: place.prompt_end] and place.start == 6


def test_a_token_belongs_to_the_document_that_has_its_middle(bpe):
    text = "x Hello"
    (token,) = [t for t, (a, b) in enumerate(bpe(text, return_offsets_mapping=True).offset_mapping)
                if a <= 2 < b]  # fmt: skip
    source = Source.of(bpe, text, documents=[Document("d", 2, 7)])
    place = source.place_of_token(token)  # " Hel" begins before the document
    assert source.offsets[token][0] == 1 and (place.source, place.start) == ("d", 0)


def test_ids_must_be_those_of_the_text(bpe):
    ids = bpe(MIXED, return_tensors="pt").input_ids
    bare = bpe(MIXED, add_special_tokens=False).input_ids
    assert Source.of(bpe, MIXED, ids).ids == Source.of(bpe, MIXED).ids == tuple(ids[0].tolist())
    assert Source.of(bpe, MIXED, bare).ids == tuple(bare)
    with pytest.raises(AuditError, match="the text that was tokenised"):
        Source.of(bpe, MIXED, ids[:, :-1])
    with pytest.raises(ValueError, match="ids = .*shape"):
        Source.of(bpe, MIXED, torch.cat((ids, ids)))
    with pytest.raises(ValueError, match="at least one token"):
        Source.of(characters(), "")
    with pytest.raises(AuditError, match="use_fast=True"):
        Source.of(object(), MIXED)


def test_hostile_characters_keep_their_positions(bpe):
    text = "a\0b \u202egnp.\u202c \ud800 <script>\u2028\u2067x"
    source = Source.of(bpe, text)
    assert source.text == text
    ends = [b for _, b in source.offsets]
    assert ends[-1] == len(text) and max(ends) == len(text)
    assert Source.from_dict(source.to_dict()) == source


def test_tokens_of_a_passage_are_those_that_share_a_character_with_it(bpe):
    source = Source.of(bpe, MIXED)
    for spans in ([(0, 3)], [(14, 19)], [(20, 21), (5, 9)], [(0, len(MIXED))], [(4, 9), (6, 30)]):
        wanted = {c for start, end in spans for c in range(start, end)}
        expected = [t for t, (a, b) in enumerate(source.offsets) if wanted & set(range(a, b))]
        assert source.tokens_of(iter(spans)) == expected
    kept = source.tokens_of([(MIXED.index("日"), MIXED.index("日") + 1)])
    assert kept and 0 not in kept  # the first token has no text
    assert source.tokens_of([]) == []


@pytest.mark.parametrize("span", [(3, 3), (5, 2), (-1, 4), (0, 10_000), (0.0, 3)])
def test_a_passage_is_a_part_of_the_text(span):
    with pytest.raises(ValueError, match="spans = .*characters"):
        Source.of(characters(), MIXED).tokens_of([span])


@pytest.mark.parametrize(
    "documents",
    [
        [Document("a", 3, 3)],
        [Document("a", 0, 5), Document("b", 4, 6)],
        [Document("a", 0, 10_000)],
        [Document("a", -1, 3)],
        [Document("a", 0, 3, -1)],
    ],
)
def test_documents_are_in_order_and_within_the_text(documents):
    with pytest.raises(ValueError, match="documents = .*Document"):
        Source.of(characters(), MIXED, documents=documents)


@pytest.mark.parametrize("text", ["", "absent", "na"])
def test_a_document_is_found_once_or_not_at_all(text):
    with pytest.raises(
        ValueError, match="found once in the prompt, where the text of 'd.txt' occurs"
    ):
        find_documents("banana", {"d.txt": text})
