"""Questions about a context: one prefill for all, answers as if each were asked alone."""

import pytest
import torch

from hashattn import Budget, Context, HashSelector, HashWeights, SparsePathError, ask, attach
from hashattn.attention.contexts.text import ids_after
from hashattn.base.errors import ContextError
from hashattn.base.files import WriteError
from helpers import characters, full_disk, generate, tiny_model

SMALL = Budget(sink=1, local=3, heavy=6)
TEXT = "The meeting of March began at nine. Nobody spoke before ten."
QUESTIONS = ["Who spoke?", "When did it begin?", "Why?"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return characters()


def prefill_rows(receipt):
    """Query rows that read prompts, of one layer."""
    return sum(c.rows for c in receipt.counts if c.layer == 0 and c.reason == "prefill")


def alone(model, tokenizer, prompt, new=6):
    """The answer to one prompt that is read whole."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return tuple(generate(model, ids, max_new_tokens=new)[0][0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("together", [1, 2, 8])
def test_answers_are_those_of_whole_prompts(model, tokenizer, together):
    context = Context.read(model, tokenizer, TEXT, chunk=16)
    found = ask(model, tokenizer, context, QUESTIONS, max_new_tokens=6, together=together)
    expected = [alone(model, tokenizer, TEXT + question) for question in QUESTIONS]
    assert list(found.tokens) == expected and found.receipt is None
    assert found.texts == tuple(tokenizer.decode(tokens) for tokens in expected)
    assert context.tokens == tokenizer(TEXT)["input_ids"] and len(context) == len(TEXT)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_a_saved_context_answers_identically(model, tokenizer, tmp_path, settings):
    selector = HashSelector(HashWeights.for_model(model, hidden=16))
    settings = {"max_new_tokens": 6} | settings
    with attach(model, selector, SMALL, allow_untrained=True):
        context = Context.read(model, tokenizer, TEXT)
        torch.manual_seed(3)
        first = ask(model, tokenizer, context, QUESTIONS, **settings)
        context = Context.load(context.save(tmp_path / "a"), model)
        torch.manual_seed(3)
        assert ask(model, tokenizer, context, QUESTIONS, **settings).tokens == first.tokens
    sampled = settings.get("do_sample", False)
    with attach(model, selector, SMALL, allow_untrained=True):
        torch.manual_seed(3)
        whole = ask(
            model, tokenizer, Context.read(model, tokenizer, TEXT, chunk=7), QUESTIONS, **settings
        )
    assert whole.tokens == first.tokens or sampled


def test_a_context_is_read_into_its_file(model, tokenizer, tmp_path):
    one = Context.read(model, tokenizer, TEXT)
    saved = one.save(tmp_path / "a").read_bytes()
    two = Context.read(model, tokenizer, TEXT, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == saved and len(list(tmp_path.iterdir())) == 2
    answers = [ask(model, tokenizer, each, QUESTIONS, max_new_tokens=3) for each in (one, two)]
    assert answers[0] == answers[1]
    with full_disk(100_000), pytest.raises(WriteError, match="b cannot be written"):
        Context.read(model, tokenizer, TEXT, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == saved and len(list(tmp_path.iterdir())) == 2


def test_ten_questions_cost_one_prefill(model, tokenizer, tmp_path):
    questions = [f"Question {number}?" for number in range(10)]
    asked = sum(map(len, questions))
    selector = HashSelector(HashWeights.for_model(model, hidden=16))
    with attach(model, selector, SMALL, allow_untrained=True) as run:
        context = Context.read(model, tokenizer, TEXT, chunk=16)
        found = ask(model, tokenizer, context, questions, max_new_tokens=3, together=4)
        assert found.receipt is run.receipt
        assert prefill_rows(found.receipt) == len(TEXT) + asked
        assert found.receipt.sparse_calls == 2 * 3 * 2  # layers, batches, tokens after the first
        run.reset_receipt()
        loaded = Context.load(context.save(tmp_path / "a"), model)
        again = ask(model, tokenizer, loaded, questions, max_new_tokens=3, together=4)
        assert prefill_rows(again.receipt) == asked and again.tokens == found.tokens


def test_a_chat_template_is_written_around_both(model):
    tokenizer = characters()
    tokenizer.chat_template = (
        "SYS.\n{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}A: {% endif %}"
    )
    question = QUESTIONS[0]
    message = [{"role": "user", "content": TEXT + question}]
    whole = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    context = Context.read(model, tokenizer, TEXT)
    assert tokenizer.decode(context.tokens) == "SYS.\nuser: " + TEXT and context.after == "\nA: "
    found = ask(model, tokenizer, context, [question], max_new_tokens=6)
    assert found.tokens == (alone(model, tokenizer, whole),)
    plain = Context.read(model, tokenizer, TEXT, chat=False)
    assert plain.tokens == tokenizer(TEXT)["input_ids"] and plain.after == ""
    with pytest.raises(ContextError, match="another tokenizer, or another chat template"):
        ask(model, characters(), context, [question])


def test_templates_that_cannot_serve_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="chat = True needs a tokenizer with a chat template"):
        Context.read(model, tokenizer, TEXT, chat=True)
    upper = characters()
    upper.chat_template = "{{ messages[0].content | upper }}"
    with pytest.raises(ValueError, match="changes what a user says"):
        Context.read(model, upper, TEXT)


def test_an_answer_ends_where_the_model_ends_it(model, tokenizer):
    context = Context.read(model, tokenizer, TEXT)
    whole = ask(model, tokenizer, context, QUESTIONS, max_new_tokens=12).tokens
    model.generation_config.eos_token_id = end = whole[0][5]
    try:
        found = ask(model, tokenizer, context, QUESTIONS, max_new_tokens=12).tokens
    finally:
        model.generation_config.eos_token_id = None
    for tokens, cut in zip(whole, found, strict=True):
        place = tokens.index(end) if end in tokens else len(tokens)
        assert cut == tokens[: place + 1]


def test_a_question_goes_on_with_the_text_where_its_tokens_allow(embedded_tokenizer):
    """Tokens of the text never change; those of the question are the same as in one text."""
    tokenizer = embedded_tokenizer
    for text, question in [
        ("Note: Alice visits Kyoto\n", "Q: Alice visits"),
        ("Note: Alice", " visits Kyoto"),
        ("Note: Ali", "ce visits Kyoto"),  # "ce" would change the token before it
    ]:
        tokens = tokenizer(text)["input_ids"]
        whole = tokenizer(text + question)["input_ids"]
        found = ids_after(tokenizer, tokens, question)
        if whole[: len(tokens)] == tokens:
            assert tokens + found == whole
        else:
            assert found == tokenizer(question, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokens + found, skip_special_tokens=True) == text + question


@pytest.fixture(scope="module")
def embedded_tokenizer():
    from transformers import AutoTokenizer

    from hashattn.base.repository import repository

    return AutoTokenizer.from_pretrained(repository() / "data" / "embedded")


def test_what_cannot_be_asked(model, tokenizer):
    context = Context.read(model, tokenizer, TEXT)
    for questions in ([], "Who spoke?"):
        with pytest.raises(ValueError, match="a list of at least one text"):
            ask(model, tokenizer, context, questions)
    with pytest.raises(ValueError, match="question = '': must be a text"):
        ask(model, tokenizer, context, ["Who?", ""])
    with pytest.raises(ValueError, match="ask twice for two answers"):
        ask(model, tokenizer, context, QUESTIONS, num_return_sequences=2)
    with pytest.raises(ValueError, match="together = 0"):
        ask(model, tokenizer, context, QUESTIONS, together=0)
    with pytest.raises(ValueError, match="need up to 570 positions and the model has 512"):
        ask(model, tokenizer, context, ["W" * 10], max_new_tokens=500)
    with pytest.raises(ContextError, match="another model"):
        ask(tiny_model("llama", seed=1), tokenizer, context, QUESTIONS)
    with pytest.raises(ValueError, match="a text with at least one token"):
        Context.read(model, tokenizer, "")


def test_another_copy_of_the_model_may_ask(model, tokenizer):
    context = Context.read(model, tokenizer, TEXT)
    copy = tiny_model("llama")
    selector = HashSelector(HashWeights.for_model(copy, hidden=16))
    expected = ask(model, tokenizer, context, QUESTIONS, max_new_tokens=3)
    assert ask(copy, tokenizer, context, QUESTIONS, max_new_tokens=3) == expected
    with attach(copy, selector, SMALL, allow_untrained=True):
        assert ask(copy, tokenizer, context, QUESTIONS, max_new_tokens=3).receipt.is_sparse
    with pytest.raises(SparsePathError), attach(copy, selector, SMALL, allow_untrained=True):
        ask(model, tokenizer, context, QUESTIONS, max_new_tokens=3)  # the other one
