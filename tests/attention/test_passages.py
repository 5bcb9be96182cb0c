"""Tokens that every step reads beside its budget: lists against those without, on every path."""

from contextlib import contextmanager

import pytest
import torch

from hashattn import Budget, Memory, attach, make_selector
from hashattn.attention.passages import Passages
from hashattn.base.errors import AttachmentError
from hashattn.selectors.oracle import OracleSelector
from helpers import generate, left_padded, prompt, tiny_model

SMALL = Budget(sink=2, local=4, heavy=6)
KEPT = [30, 9, 10, 11, 31, 9]


class Heard:
    timed = False

    def __init__(self):
        self.steps = []

    def saw(self, step):
        if step.reason is None:
            self.steps.append(step)


def lists(step) -> list[list[list[int]]]:
    """Tokens of every list of every row, by sequence; -1 has to be behind them."""
    rows = []
    for row in step.indices.flatten(1, 2).tolist():
        rows.append([[token for token in entry if token >= 0] for entry in row])
        assert all(entry == sorted(entry, key=lambda t: (t < 0, t)) for entry in row)
    return rows


@contextmanager
def attached(kept=None, selector=None, budget=SMALL, model=None, **settings):
    model = model or tiny_model("llama")
    with attach(model, selector or OracleSelector(), budget, **settings) as run:
        heard = Heard()
        with run.listen(heard):
            if kept is None:
                yield run, heard, model
            else:
                with run.keep(kept):
                    yield run, heard, model


def steps(kept=None, ids=None, mask=None, length=60, new=2, settings=None, **attachment):
    """What the first step's layers read, and its logits."""
    with attached(kept, **attachment) as (run, heard, model):
        given = prompt(length=length) if ids is None else ids
        ids, logits = generate(model, given, mask, max_new_tokens=new, **(settings or {}))
    return heard.steps, logits, run.receipt


@pytest.mark.parametrize("layout", ["per_query_head", "per_kv_head"])
@pytest.mark.parametrize("name", ["oracle", "window", "random", "quest"])
def test_kept_tokens_are_read_beside_what_is_selected(name, layout):
    selector = make_selector(name) if name != "oracle" else OracleSelector(layout)
    without, _, plain = steps(selector=selector)
    within, _, receipt = steps(KEPT, selector=selector)
    assert "kept_tokens" not in plain.settings and "kept " not in plain.summary()
    assert receipt.settings["kept_tokens"] == 5 and "up to 5 named tokens" in receipt.summary()
    for own, all_read in zip(lists(without[0]), lists(within[0]), strict=True):
        for before, read in zip(own, all_read, strict=True):
            assert read == sorted({*before, *KEPT})
    read = sum(len(entry) for step in within for row in lists(step) for entry in row)
    heads = within[0].indices.shape[1]
    assert receipt.tokens_read == pytest.approx(read / heads)


def test_with_every_token_kept_a_step_is_dense():
    ids = prompt(length=50)
    _, logits, _ = steps(range(50), ids=ids, allow_dense=True)
    _, dense = generate(tiny_model("llama"), ids, max_new_tokens=2)
    torch.testing.assert_close(logits, dense)
    _, sparse, _ = steps(ids=ids)
    assert (sparse - dense).abs().max() > 1e-3


def test_each_prompt_of_a_batch_has_its_own_and_padding_does_not_count():
    ids, mask = left_padded((50, 33))
    both, logits, receipt = steps([[8, 9], [20, 30, 31, 600]], ids=ids, mask=mask)
    assert receipt.settings["kept_tokens"] == 4
    for number, (kept, length) in enumerate((([8, 9], 50), ([20, 30, 31], 33))):
        alone, own_logits, _ = steps(kept, ids=ids[number : number + 1, 50 - length :])
        shift = 50 - length
        read = [[t - shift for t in entry] for entry in lists(both[0])[number]]
        assert read == lists(alone[0])[0]
        assert all(set(kept) <= set(entry) for entry in read)
        torch.testing.assert_close(logits[number, 1], own_logits[0, 1])


def test_a_gap_in_the_mask_does_not_count_either():
    ids, mask = prompt(length=50), torch.ones(1, 50, dtype=torch.long)
    mask[0, 5:9] = 0
    found, _, _ = steps([4, 5, 20], ids=ids, mask=mask)
    without, _, _ = steps(ids=ids, mask=mask)
    for before, read in zip(lists(without[0])[0], lists(found[0])[0], strict=True):
        assert read == sorted({*before, 4, 9, 24})


def test_beams_and_several_rows():
    ids = prompt(batch=2, length=40)
    settings = {"num_beams": 3, "do_sample": False}
    found, _, _ = steps([[7], [21, 22]], ids=ids, settings=settings)
    held = [all({*kept} <= set(e) for e in row) for kept, row in
            zip(3 * [[7]] + 3 * [[21, 22]], lists(found[0]), strict=True)]  # fmt: skip
    assert held == 6 * [True]
    with attached([39, 41, 3], sparse_rows=4) as (_, heard, model), torch.no_grad():
        cache = model(prompt(length=40), use_cache=True).past_key_values
        model(prompt(length=4, seed=2), past_key_values=cache, use_cache=True)
    rows = heard.steps[0].indices[0, 0].tolist()
    assert [{3, 39} <= set(row) for row in rows] == 4 * [True]
    assert [41 in row for row in rows] == [False, True, True, True]  # none sees what follows it


def test_drawn_tokens_that_are_kept_stand_for_themselves():
    budget = Budget(2, 4, heavy=12, sampled=1.0)
    without, _, _ = steps(budget=budget)
    within, _, _ = steps([*range(20, 40)], budget=budget)
    before, after = without[0], within[0]
    kept = torch.arange(20, 40)
    assert (before.log_weights[torch.isin(before.indices, kept)] > 0).any()
    assert (after.log_weights[torch.isin(after.indices, kept)] == 0).all()
    for entry in range(4):
        own, found = (
            dict(zip(step.indices[0, entry, 0].tolist(), step.log_weights[0, entry, 0].tolist(),
                     strict=True)) for step in (before, after)
        )  # fmt: skip
        assert all(found[t] == weight for t, weight in own.items() if t >= 0 and t not in kept)


def test_a_sample_beside_kept_tokens_is_right_on_average():
    """The softmax sum over many seeds against the dense one, within three standard errors."""
    from hashattn.kernels import attend

    sums, model, ids = [], tiny_model("llama"), prompt(length=120)
    for seed in range(80):
        budget = Budget(2, 4, heavy=30, sampled=1.0, seed=seed)
        step = steps(range(50, 70), ids=ids, budget=budget, model=model)[0][0]
        keys, values = step.view.keys, step.values
        _, lse = attend(step.query, keys, values, step.indices, log_weights=step.log_weights,
                        return_lse=True, **step.logits)  # fmt: skip
        sums.append(lse.double())
    everything = torch.arange(step.n, dtype=torch.int32).expand(1, 2, 1, -1).contiguous()
    _, dense = attend(step.query, keys, values, everything, return_lse=True, **step.logits)
    ratios = (torch.stack(sums) - dense).exp()
    error = ratios.std(0) / len(ratios) ** 0.5
    assert ((ratios.mean(0) - 1).abs() < 3 * error + 1e-6).all()


@pytest.mark.parametrize("cache", ["static", "offloaded", "file", "8 bits"])
def test_wherever_keys_lie_the_same_is_read(cache, tmp_path):
    settings, memory = {}, None
    if cache == "static":
        settings = {"cache_implementation": "static", "disable_compile": True}
    elif cache == "8 bits":
        memory = Memory(bits=8)
    else:
        memory = Memory(fast_bytes=24 * 2 * 2 * 128, folder=tmp_path if cache == "file" else None)
    given = {} if memory is None else {"memory": memory}
    expected, logits, _ = steps(KEPT, new=6)
    found, own, receipt = steps(KEPT, new=6, settings=settings, **given)
    assert lists(found[0]) == lists(expected[0])
    if cache != "8 bits":
        assert [lists(step) for step in found] == [lists(step) for step in expected]
        torch.testing.assert_close(own, logits)
    assert receipt.settings["kept_tokens"] == 5


def test_static_steps_go_on_in_the_operator_when_nothing_is_kept_any_more(monkeypatch):
    from hashattn import HashSelector, HashWeights
    from hashattn.attention import static
    from hashattn.hashing.maps import HashConfig

    config = HashConfig((0, 1), 4, 2, 16, "per_kv_head", 32, depth=2, hidden=16)
    selector = HashSelector(HashWeights.random(config, seed=0))
    settings = {"cache_implementation": "static", "disable_compile": True}
    calls, read = [], static.read
    monkeypatch.setattr(static, "read", lambda *a: calls.append(1) or read(*a))
    with attach(tiny_model("llama"), selector, SMALL, allow_untrained=True) as run:
        with run.keep(KEPT):
            generate(run.model, prompt(length=60), max_new_tokens=4, **settings)
        assert not calls and run.receipt.settings["kept_tokens"] == 5
        finished = run.reset_receipt()
        generate(run.model, prompt(length=60), max_new_tokens=4, **settings)
    assert len(calls) == 6 and run.receipt.density < finished.density
    assert "kept_tokens" not in run.receipt.settings


def test_a_receipt_begun_while_tokens_are_kept_says_so():
    with attached(KEPT) as (run, _, model):
        generate(model, prompt(length=60), max_new_tokens=2)
        run.reset_receipt()
        generate(model, prompt(length=60), max_new_tokens=2)
        assert run.receipt.settings["kept_tokens"] == 5


@pytest.mark.parametrize("tokens", [[], [[]], [-1], [1.0], [True], "12", [[1], 2], [2**31], None])
def test_what_is_no_token_number_is_refused(tokens):
    with pytest.raises(ValueError, match="^tokens = .*: must be "):
        Passages(tokens)


def test_one_block_at_a_time_and_for_as_many_prompts_as_there_are():
    with attached([1]) as (run, _, model):
        with pytest.raises(AttachmentError, match=r"one keep\("), run.keep([2]):
            pass
        generate(model, prompt(length=60), max_new_tokens=2)
    with attached([[1], [2]]) as (run, _, model):
        with pytest.raises(ValueError, match="of 2 prompts.*3 rows"):
            generate(model, prompt(batch=3, length=60), max_new_tokens=2)
        generate(model, prompt(batch=2, length=60), max_new_tokens=2)
