"""Documents of every kind: long enough, held out from training, the same for the same seed."""

from dataclasses import replace

import pytest

from hashattn.evaluation.benchmarks import texts
from hashattn.evaluation.benchmarks.texts import KINDS, documents
from hashattn.evaluation.fidelity import fidelity_table
from hashattn.evaluation.methods import Method
from hashattn.evaluation.runner import evaluate
from hashattn.reproduce.access import load_model
from hashattn.reproduce.profiles import load_profile
from hashattn.selectors import make_selector

LENGTH = 1500


@pytest.fixture(scope="module")
def loaded():
    return load_model(load_profile("tiny"))


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_long_enough_and_never_in_both_splits(loaded, kind):
    tokenizer = loaded[1]
    made = {split: documents(tokenizer, kind, LENGTH, 3, split) for split in ("eval", "train")}
    for part in made.values():
        assert len(set(part)) == 3
        assert all(len(tokenizer(text)["input_ids"]) >= LENGTH for text in part)
    lines = {s: {line for text in part for line in text.splitlines() if len(line) > 60}
             for s, part in made.items()}  # fmt: skip
    if kind != "legal":  # licences quote one another
        assert not lines["eval"] & lines["train"]
    assert documents(tokenizer, kind, LENGTH, 3) == made["eval"]


def test_generated_minutes_follow_the_seed(loaded):
    one, other = (documents(loaded[1], "minutes", LENGTH, 1, seed=seed) for seed in (1, 2))
    assert one != other
    japanese = documents(loaded[1], "minutes_ja", LENGTH, 1)[0]
    assert sum("\u3040" <= c <= "\u9fff" for c in japanese) > len(japanese) / 2


def test_too_many_and_unknown_documents_are_refused(loaded):
    with pytest.raises(ValueError, match="kind = 'poetry': must be one of documentation, prose"):
        documents(loaded[1], "poetry", LENGTH, 1)
    with pytest.raises(ValueError, match="count = 9999: must be at most .* of 'documentation'"):
        documents(loaded[1], "documentation", 100_000, 9999)


def test_a_profile_scores_them_by_fidelity(loaded, tmp_path):
    profile = replace(load_profile("tiny"), benchmark="texts", tasks=("code", "minutes"))
    model, tokenizer = loaded
    records = texts.BENCHMARK.records(profile, tokenizer, 1024, 1, None)
    protocol = texts.BENCHMARK.protocol(profile, 1024, None)
    methods = [
        Method("dense"),
        Method("oracle", make_selector("oracle"), protocol.budget(density=1 / 8)),
        Method("random", make_selector("random"), protocol.budget(density=1 / 8)),
    ]
    frame = evaluate(model, tokenizer, records, methods, protocol, tmp_path / "rows.jsonl",
                     progress=False, setups="B")  # fmt: skip
    assert set(frame.dataset) == {"code", "minutes"} and (frame.positions == 64).all()
    table = fidelity_table(frame).droplevel("budget")
    assert table["kl"]["dense"] < 1e-6 < table["kl"]["oracle"] < table["kl"]["random"]
    assert table["density"]["oracle"] == pytest.approx(1 / 8, rel=0.1)


def test_sequences_take_kinds_in_turn_and_are_cut_to_their_length(loaded):
    tokenizer, kinds = loaded[1], ("code", "minutes")
    made = texts.sequences(tokenizer, kinds, 512, 4, split="eval")
    assert [len(ids) for ids, _ in made] == 4 * [512]
    expected = [
        documents(tokenizer, kinds[i % 2], 512, i // 2 + 1)[i // 2] for i in range(len(made))
    ]
    for (ids, rows), text in zip(made, expected, strict=True):
        assert ids == tokenizer(text)["input_ids"][:512]
        assert rows == list(range(448, 512, 2))
    later = texts.sequences(tokenizer, kinds, 512, 2, split="eval", first=2)
    assert later == made[2:]


def test_splits_of_sequences_share_no_text_and_training_learns_from_everywhere(loaded):
    parts = {
        split: texts.sequences(loaded[1], ("documentation",), 512, 3, split=split)
        for split in ("train", "validation", "eval")
    }
    starts = {tuple(ids[:64]) for part in parts.values() for ids, _ in part}
    assert len(starts) == 9
    assert parts["train"][0][1] == list(range(31, 512, 32)) == parts["validation"][0][1]


def test_sequences_begin_again_and_too_long_ones_are_refused(loaded):
    tokenizer = loaded[1]
    made = texts.sequences(tokenizer, ("documentation",), 8192, 33, split="eval")
    assert made[0] in made[1:]
    with pytest.raises(ValueError, match="length = 10000000: must be shorter for texts of 'legal'"):
        texts.sequences(tokenizer, ("legal",), 10_000_000, 1, split="validation")
