"""The seam that receipts, benchmarks and audits listen at; and numbers that are none."""

import pytest
import torch

from hashattn import Budget, attach
from hashattn.attention import dispatch as path
from hashattn.attention.finite import FiniteWatch
from hashattn.attention.observer import LayerStep
from hashattn.base.errors import NonFiniteError
from hashattn.selectors.dense import DenseSelector
from hashattn.selectors.oracle import OracleSelector
from hashattn.selectors.random import RandomSelector
from helpers import TracingOracle, generate, left_padded, prompt, tiny_model

SMALL = Budget(sink=1, local=3, heavy=6)


class Listener:
    def __init__(self, timed: bool = False) -> None:
        self.timed = timed
        self.steps: list[LayerStep] = []

    def saw(self, step: LayerStep) -> None:
        self.steps.append(step)


def test_every_call_is_told_once_with_what_it_read():
    model = tiny_model("qwen2_sliding")
    ids, mask = left_padded((40, 20))
    with attach(model, OracleSelector(), SMALL) as run, run.listen(Listener()) as heard:
        generate(model, ids, mask, max_new_tokens=5)
    told = [(step.layer, step.reason) for step in heard.steps]
    assert told == [(0, "prefill"), (1, "prefill")] + 4 * [(0, None), (1, "sliding_window")]
    for number, step in enumerate(step for step in heard.steps if step.reason is None):
        assert step.n == 41 + number and step.rows == 2
        assert float(step.seen) == 41 + 21 + 2 * number
        assert step.indices.shape[:3] == (2, 4, 1)
        assert ((step.indices >= 0).sum(dim=-1) == 10).all()
        first = step.indices.where(step.indices >= 0, 99).amin(dim=-1)[:, :, 0]
        assert (first == torch.tensor([[0], [20]])).all()  # the sink behind the padding
        assert step.plan.n == step.n and step.view.keys.shape[2] == step.n
        assert step.seconds is None and step.log_weights is None


def test_what_was_heard_is_what_was_attended(monkeypatch):
    model, read = tiny_model("llama"), []
    attend = path.attend

    def spy(query, key, value, indices, *rest, **options):
        read.append(indices)
        return attend(query, key, value, indices, *rest, **options)

    monkeypatch.setattr(path, "attend", spy)
    selector = TracingOracle()
    with attach(model, selector, SMALL) as run, run.listen(Listener()) as heard:
        generate(model, prompt())
    told = [step.indices for step in heard.steps if step.reason is None]
    assert len(read) == len(told) == sum(selector.calls.values())  # nothing selects twice
    assert all(one is other for one, other in zip(read, told, strict=True))


def test_stages_are_timed_for_those_who_ask():
    model = tiny_model("llama")
    with attach(model, OracleSelector(), SMALL) as run:
        with run.listen(Listener()) as untimed, run.listen(Listener(timed=True)) as timed:
            generate(model, prompt())
        heard = len(timed.steps)
        generate(model, prompt())  # nobody listens any more
    assert len(timed.steps) == len(untimed.steps) == heard == 12 * 2
    for step in timed.steps:
        stages = ("encode", "attend") if step.reason else ("encode", "select", "attend")
        assert set(step.seconds) == {*stages, "total"}
        assert 0 < sum(step.seconds[name] for name in stages) <= step.seconds["total"]


def test_dense_steps_say_why():
    model = tiny_model("llama")
    with attach(model, DenseSelector(kernel=True)) as run, run.listen(Listener()) as heard:
        generate(model, prompt(), max_new_tokens=3)
    assert [step.reason for step in heard.steps] == 2 * ["prefill"] + 4 * ["dense_selector"]
    assert [step.seen for step in heard.steps] == 2 * [40 * 41 / 2] + 2 * [41] + 2 * [42]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dense_steps_are_told_with_their_keys_and_what_was_visible(attention):
    model = tiny_model("llama", attention=attention)
    ids, mask = left_padded((40, 20))
    with attach(model, DenseSelector(kernel=True)) as run, run.listen(Listener()) as heard:
        generate(model, ids, mask, max_new_tokens=2)
    for step in heard.steps[-2:]:
        assert step.reason == "dense_selector" and step.indices is None
        assert step.view.keys.shape[2] == step.n == 41
        assert step.view.visible.sum(dim=-1).tolist() == [41, 21]
        assert set(step.logits) == {"scaling", "softcap", "sinks"}


def test_a_listener_that_fails_is_heard():
    class Broken(Listener):
        def saw(self, step):
            raise KeyError("the listener's own error")

    model = tiny_model("llama")
    with pytest.raises(KeyError, match="own error"):
        with attach(model, OracleSelector(), SMALL) as run, run.listen(Broken()):
            generate(model, prompt())


BROKEN = {"nan": float("nan"), "inf": float("inf"), "minus_inf": float("-inf")}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
@pytest.mark.parametrize("selector", [RandomSelector(), OracleSelector()], ids=["random", "oracle"])
def test_keys_and_values_that_are_no_numbers_are_refused(broken, projection, selector):
    model = tiny_model("llama")
    weight = getattr(model.model.layers[1].self_attn, projection).weight
    with torch.no_grad():
        weight[3] = broken
    with pytest.raises(NonFiniteError, match="layer 1"):
        with attach(model, selector, SMALL):
            generate(model, prompt())
    with attach(model, selector, SMALL, dense_layers=[1], allow_dense=True):
        model(prompt())  # not looked at where nothing is chosen
    with attach(model, DenseSelector(kernel=True)):
        assert not generate(model, prompt())[1].isfinite().all()  # as the model answers itself


def test_a_key_that_breaks_while_decoding_is_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    ids = prompt()
    ids[ids == 5] = 6
    with torch.no_grad(), attach(model, OracleSelector(), SMALL, allow_dense=True):
        cache = model(ids).past_key_values
        model(torch.tensor([[7]]), past_key_values=cache)
        with pytest.raises(NonFiniteError, match="layer 0"):
            model(torch.tensor([[5]]), past_key_values=cache)


def test_a_gpu_is_asked_only_at_the_end(monkeypatch):
    """Sums stay where they are, spoiled for good by one number, and name the first layer."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))
    watch, keys = FiniteWatch(), torch.ones(1, 2, 9, 4)
    watch.check(0, keys, keys, 0)
    watch.verify()
    keys[0, 1, 3, 2] = float("inf")
    watch.check(4, keys, keys, 4)  # the tokens before have been looked at
    watch.verify()
    watch.check(4, -keys, keys, 3)
    watch.check(4, keys[:, :, :3], keys[:, :, :3], 0)
    with pytest.raises(NonFiniteError, match="layer 4"):
        watch.verify()
