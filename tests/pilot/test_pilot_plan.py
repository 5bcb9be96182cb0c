"""Documents divided, packed and asked about: nothing lost, nothing scored that codes learn from."""

import random
import re
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from hashattn.base.repository import repository
from hashattn.evaluation.prompting import make_prompt
from hashattn.pilot.contexts import Part, best_parts, pack, split_document
from hashattn.pilot.plan import PlanError, make_plan, protocol, without_document
from hashattn.pilot.settings import PilotSettings

WORDS = "pump valve seal motor filter sensor board cable relay lamp hose gauge".split()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(repository() / "data" / "embedded")


def document(name, sentences=30, seed=0):
    rng = random.Random(f"{name} {seed}")
    text = "\n".join(
        f"The {rng.choice(WORDS)} number {rng.randrange(1000)} of {name} needs the "
        f"{rng.choice(WORDS)} that stands beside the {rng.choice(WORDS)} in hall "
        f"{rng.randrange(90)} of the works."
        for _ in range(sentences)
    )
    return SimpleNamespace(name=name, text=text, kind="txt", sha256=name)


def library(count=8, **how):
    names = [f"manual {number}.txt" for number in range(count)]
    return SimpleNamespace(documents=tuple(document(n, **how) for n in names), skipped=())


def question(text, document=None, answers=("relay",)):
    return SimpleNamespace(text=text, answers=answers, document=document, row=1)


def tokens(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("room", [40, 97, 400, 20000])
def test_the_parts_of_a_document_are_the_document(tokenizer, room):
    text = document("a.txt", 40).text + "\n" + "語" * 500 + "\n" + "x" * 3000
    parts = split_document(tokenizer, "a.txt", text, room)
    assert "".join(part.text for part in parts) == text
    for part in parts:
        assert text[part.start :].startswith(part.text)
        assert part.tokens == tokens(tokenizer, part.whole) <= room
    if room == 20000:
        assert len(parts) == 1


def test_parts_end_with_a_line_where_one_is_near(tokenizer):
    parts = split_document(tokenizer, "a.txt", document("a.txt", 60).text, 200)
    assert len(parts) > 2 and all(part.text.endswith("\n") for part in parts[:-1])


def test_text_without_content_makes_no_part(tokenizer):
    assert split_document(tokenizer, "a.txt", " \n\t\n", 100) == []


def names_of(contexts):
    return [[part.name for part in context.parts] for context in contexts]


def test_neighbours_are_packed_together():
    sizes = [60, 40, 50, 30, 120, 45]
    contexts = pack([Part(str(n), "", 0, size) for n, size in enumerate(sizes)], 100)
    assert names_of(contexts) == [["0", "1"], ["2", "3"], ["4"], ["5"]]


def test_what_is_left_over_goes_where_there_is_room():
    sizes = [20, 95, 60, 90, 10]
    contexts = pack([Part(str(n), "", 0, size) for n, size in enumerate(sizes)], 100)
    assert names_of(contexts) == [["1"], ["2", "0"], ["3", "4"]]


def test_a_long_document_is_divided_evenly(tokenizer):
    text = document("a.txt", 60).text
    whole = tokens(tokenizer, text)
    parts = split_document(tokenizer, "a.txt", text, round(whole / 1.1))
    assert len(parts) == 2 and min(part.tokens for part in parts) > 0.3 * whole


def test_contexts_know_where_their_documents_stand(tokenizer):
    parts = split_document(tokenizer, "a.txt", document("a.txt", 60).text, 300)[1:2]
    parts += split_document(tokenizer, "b.txt", document("b.txt", 4).text, 300)
    (context,) = pack(parts, 1000)
    for place, part in zip(context.places(7), parts, strict=True):
        assert ("x" * 7 + context.text)[place.start : place.end] == part.text
        assert (place.name, place.offset) == (part.name, part.start)


def test_the_part_that_a_question_is_about_is_found(tokenizer):
    text = document("a.txt", 200).text
    secret = "The warranty of the Zephyr centrifuge ends after 37 months.\n"
    lines = text.split("\n")
    lines.insert(150, secret)
    parts = split_document(tokenizer, "a.txt", "\n".join(lines), 300)
    (found,) = best_parts(
        tokenizer, ["How long is the warranty of the Zephyr centrifuge?"], [parts]
    )
    assert secret.strip() in found.text


def test_documents_are_scored_or_learned_from_never_both(tokenizer):
    asked = [question("What?", f"manual {number}.txt") for number in (0, 1, 2, 3, 4, 5)]
    plan = make_plan(tokenizer, library(), asked, PilotSettings())
    scored, learned = ({d.name for d, _ in part} for part in (plan.scored, plan.calibration))
    assert len(learned) == 2 and scored | learned == {f"manual {n}.txt" for n in range(8)}
    assert learned == {"manual 6.txt", "manual 7.txt"} and plan.withheld == 0
    texts = "".join(context.text for context in plan.contexts)
    assert not any(f"# {name}" in texts for name in learned)
    assert all(f"# {name}" in "".join(c.text for c in plan.learning) for name in learned)


def test_questions_about_what_codes_learn_from_are_dropped_and_counted(tokenizer):
    asked = [question("What?", f"manual {number}.txt") for number in range(8)]
    plan = make_plan(tokenizer, library(), asked, PilotSettings())
    assert plan.withheld == 2 and len(plan.asked) == 6
    learned = {d.name for d, _ in plan.calibration}
    assert not learned & {each.document for each in plan.asked}


def test_too_many_questions_are_thinned_evenly(tokenizer):
    asked = [question(f"What is {number}?", "manual 0.txt") for number in range(20)]
    plan = make_plan(tokenizer, library(), asked, PilotSettings(questions=5))
    assert [each.question for each in plan.asked] == [f"What is {n}?" for n in (0, 4, 8, 12, 16)]
    assert plan.beyond == 15


def test_every_prompt_and_its_answer_fit_the_context(tokenizer):
    asked = [question("Which " + "relay " * n + "?", f"manual {n}.txt") for n in range(6)]
    settings = PilotSettings(context=700, budgets=(0.25,))
    plan = make_plan(tokenizer, library(sentences=90), asked, settings)
    own = protocol(tokenizer, settings, plan.answer_tokens)
    assert plan.divided
    for each in plan.asked:
        prompt = make_prompt(tokenizer, own.of(each.record.dataset), each.record)
        longest = len(prompt.context) + len(prompt.question) + settings.answer_tokens
        assert longest <= settings.context and prompt.cut is None
    quoted = make_plan(tokenizer, library(sentences=90), [], settings)
    for each in quoted.quotes:
        prompt = make_prompt(tokenizer, own.of(each.record.dataset), each.record)
        assert len(prompt.context) + len(prompt.question) + 20 <= settings.context


def test_an_answer_in_a_part_that_is_not_read_is_counted(tokenizer):
    documents = library(5, sentences=120).documents
    documents[0].text = "The Zephyr is serviced by Ada.\n" + documents[0].text + "\nCode: QX-77\n"
    found = SimpleNamespace(documents=documents, skipped=())
    asked = [question("Who services the Zephyr?", "manual 0.txt", ("QX-77",)),
             question("Who services the Zephyr?", "manual 0.txt", ("Ada",))]  # fmt: skip
    plan = make_plan(tokenizer, found, asked, PilotSettings(context=600, budgets=(0.25,)))
    assert [each.lost for each in plan.asked] == [True, False]


def test_without_answers_sentences_are_to_be_completed(tokenizer):
    plan = make_plan(tokenizer, library(), [question("What?", "manual 0.txt", ())],
                     PilotSettings(quotes=6))  # fmt: skip
    assert len(plan.quotes) == 6 and len(plan.asked) == 1
    for quote in plan.quotes:
        (answer,) = quote.answers
        text = quote.context.text
        assert text.count(quote.question) == 1
        after = text[text.index(quote.question) + len(quote.question) :]
        assert after.lstrip().startswith(answer) and len(text) - text.index(answer) > 300
        assert len(quote.question) >= 30


def test_no_sentences_are_completed_where_answers_are_known(tokenizer):
    plan = make_plan(tokenizer, library(), [question("What?", "manual 0.txt")], PilotSettings())
    assert plan.quotes == () and len(plan.asked) == 1


def test_a_question_in_japanese_is_asked_in_japanese(tokenizer):
    plan = make_plan(tokenizer, library(), [question("保証期間は何か月ですか？")], PilotSettings())
    own = protocol(tokenizer, PilotSettings(), {})
    record = plan.asked[0].record
    assert "質問：" in own.of(record.dataset).template and record.language == "ja"


def test_a_guess_is_the_question_without_documents(tokenizer):
    plan = make_plan(tokenizer, library(), [question("What?", "manual 0.txt")], PilotSettings())
    record = plan.asked[0].record
    guess = without_document(record)
    assert not re.search("manual|pump", guess.context)
    assert (guess.input, guess.answers, guess.dataset) == (
        record.input, record.answers, record.dataset)  # fmt: skip


def test_questions_without_a_document_are_asked_wherever_they_belong(tokenizer):
    """BM25 looks at all documents before any is kept for the codes."""
    documents = library(8).documents
    for number, each in enumerate(documents):
        each.text += f"\nThe Zephyr-{number}{number} centrifuge is painted colour {number}.\n"
    asked = [question(f"Which colour has the Zephyr-{n}{n} centrifuge?", None, (f"colour {n}",))
             for n in range(6)]  # fmt: skip
    plan = make_plan(tokenizer, SimpleNamespace(documents=documents, skipped=()), asked,
                     PilotSettings())  # fmt: skip
    assert [each.document for each in plan.asked] == [f"manual {n}.txt" for n in range(6)]
    assert not any(each.lost for each in plan.asked) and plan.withheld == 0


def test_long_answers_get_room(tokenizer):
    long = "the relay that stands beside the old motor of the northern hall and its spare parts"
    asked = [question("Which relay?", "manual 0.txt", (long,)), question("どれですか？")]
    plan = make_plan(tokenizer, library(), asked, PilotSettings(answer_tokens=8))
    needed = tokens(tokenizer, long)
    assert plan.answer_tokens["questions_en"] == needed + 4
    assert plan.answer_tokens["questions_ja"] == 8
    endless = make_plan(tokenizer, library(), [question("Which?", None, (60 * long,))],
                        PilotSettings())  # fmt: skip
    assert endless.answer_tokens["questions_en"] == PilotSettings().longest_answer


def test_few_documents_leave_contexts_for_the_codes(tokenizer):
    found = SimpleNamespace(documents=library(2, sentences=150).documents, skipped=())
    plan = make_plan(tokenizer, found, [], PilotSettings(context=1200))
    assert len(plan.contexts) >= 3 and plan.learning and plan.calibration == ()
    scored, learned = ({(p.name, p.start) for c in part for p in c.parts}
                       for part in (plan.contexts, plan.learning))  # fmt: skip
    assert not scored & learned


def test_documents_that_every_budget_reads_whole_are_refused(tokenizer):
    found = SimpleNamespace(documents=library(1, sentences=3).documents, skipped=())
    with pytest.raises(PlanError, match="the smallest budget reads everything"):
        make_plan(tokenizer, found, [], PilotSettings())


def test_plans_repeat(tokenizer):
    asked = [question("Which relay?", None)]
    plans = [make_plan(tokenizer, library(), asked, PilotSettings()) for _ in range(2)]
    assert plans[0].contexts == plans[1].contexts and plans[0].asked == plans[1].asked


def test_nothing_to_read_is_said(tokenizer):
    with pytest.raises(PlanError, match="no document could be read"):
        make_plan(tokenizer, SimpleNamespace(documents=(), skipped=(1, 2)), [], PilotSettings())


def test_a_question_longer_than_the_context_is_said(tokenizer):
    with pytest.raises(PlanError, match="context = 300: must be at least"):
        make_plan(tokenizer, library(), [question("relay " * 300, "manual 0.txt")],
                  PilotSettings(context=300, budgets=(0.5,)))  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": ()}, "budgets"),
        ({"budgets": (1.5,)}, "budgets"),
        ({"budgets": (0.125,), "context": 256}, "budgets"),
        ({"context": 10}, "context"),
        ({"tolerance": 2}, "tolerance"),
        ({"texts": 0}, "texts"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        PilotSettings(**changes)
