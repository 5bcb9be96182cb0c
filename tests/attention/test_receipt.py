"""The receipt: counts, files and what it refuses."""

import dataclasses
import gc
import json
import pickle

import pytest
import torch
import transformers

from hashattn import Budget, HashSelector, HashWeights, Receipt, SparsePathError, attach
from hashattn.attention.observer import LayerStep
from hashattn.base.errors import ReceiptError
from hashattn.models.heads import HeadSlice
from hashattn.selectors.random import RandomSelector
from hashattn.selectors.rerank import RerankSelector
from helpers import generate, left_padded, prompt, tiny_model

SMALL = Budget(sink=1, local=3, heavy=6)


@pytest.fixture(scope="module")
def receipt() -> Receipt:
    model = tiny_model("qwen2_sliding")
    with attach(model, RandomSelector(seed=3), SMALL, keep_steps=99) as run:
        generate(model, prompt(length=40), max_new_tokens=5)
    return run.receipt


def test_counts_every_layer_and_step(receipt):
    sparse = [
        (step.layer, step.step, step.cached, step.read)
        for step in receipt.recent
        if step.reason is None
    ]
    assert sparse == [(0, i, 41.0 + i, 10.0) for i in range(4)]
    assert receipt.density == pytest.approx(40 / (41 + 42 + 43 + 44))
    assert receipt.dense_reasons == {"prefill": 2, "sliding_window": 4}
    # the sliding layer caches and reads its window of 16
    assert receipt.decode_density == pytest.approx((40 + 64) / (170 + 64))
    rows = {row["layer"]: row for row in receipt.by_layer()}
    assert rows[0]["sparse_steps"] == 4 and rows[1]["sparse_steps"] == 0
    assert rows[0]["density"] == receipt.density and rows[1]["density"] == 1.0


def test_padding_is_not_counted():
    model = tiny_model("llama")
    with attach(model, RandomSelector(), SMALL, keep_steps=2) as run:
        generate(model, *left_padded((40, 20)), max_new_tokens=2)
    step = run.receipt.recent[0]
    assert (step.rows, step.cached, step.read) == (2, (41 + 21) / 2, 10.0)


def test_describes_the_run(receipt):
    assert receipt.method == {"name": "random", "parameters": {"seed": 3}, "weights_sha256": None}
    assert receipt.settings["heavy"] == 6 and receipt.settings["dense_layers"] == []
    assert receipt.environment["torch"] == torch.__version__
    assert receipt.environment["transformers"] == transformers.__version__
    assert receipt.environment["dtype"] == "float32" and receipt.auxiliary_bits == 0.0
    for text in ("random", "density", "sliding_window 4", "4 of 8 that followed cached tokens"):
        assert text in receipt.summary()


@pytest.mark.parametrize("wrap", [lambda base: base, RerankSelector])
@pytest.mark.parametrize("learned, beyond", [(44, False), (43, True), (None, False)])
def test_says_when_contexts_are_longer_than_any_that_the_codes_learned_from(wrap, learned, beyond):
    model = tiny_model("llama")
    untrained = HashWeights.for_model(model)
    card = untrained.card | ({} if learned is None else {"data": {"train": {"longest": learned}}})
    selector = wrap(HashSelector(HashWeights(untrained.config, untrained.maps, card)))
    with attach(model, selector, SMALL, allow_untrained=True) as run:
        generate(model, prompt(length=40), max_new_tokens=5)  # the last step has 44 cached
    assert run.receipt.settings.get("learned_length") == learned
    line = f"learned from     contexts of up to {learned} tokens"
    assert (line in run.receipt.summary()) == beyond


def test_a_part_of_the_heads_is_named_everywhere(receipt, tmp_path):
    held = HeadSlice(query_heads=8, kv_heads=4, rank=1, ranks=2).record()
    assert (held["query"], held["kv"]) == ([4, 5, 6, 7], [2, 3])
    part = dataclasses.replace(receipt, heads=held).fresh()
    part.save(tmp_path / "receipt.json")
    assert Receipt.load(tmp_path / "receipt.json").heads == held
    assert "heads            2 of 4 KV heads, rank 1 of 2\n" in part.summary()
    assert receipt.heads is None and "heads  " not in receipt.summary()


def test_saves_and_loads(receipt, tmp_path):
    receipt.save(tmp_path / "receipt.json")
    loaded = Receipt.load(tmp_path / "receipt.json")
    assert loaded.to_dict() == receipt.to_dict() and loaded.density == receipt.density
    loaded.add(0, rows=1, cached=45.0, read=10.0)
    assert loaded.recent[-1].step == 4  # numbering goes on


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 1}', '{"format": 2}', '{"format": 99}']
)
def test_other_files_are_refused(text, tmp_path):
    path = tmp_path / "receipt.json"
    path.write_text(text)
    with pytest.raises(ReceiptError, match="receipt.json"):
        Receipt.load(path)
    with pytest.raises(ReceiptError, match="missing.json"):
        Receipt.load(tmp_path / "missing.json")


def test_verify(receipt):
    receipt.verify()
    empty = receipt.fresh()
    assert empty.density == 1.0  # nothing was skipped
    with pytest.raises(SparsePathError, match="no call reached"):
        empty.verify()
    empty.verify(allow_dense=True)
    empty.add(0, rows=1, cached=9.0, read=9.0, reason="dense_layer")
    with pytest.raises(SparsePathError, match="'dense_layer': 1"):
        empty.verify()
    empty.add(0, rows=1, cached=9.0, read=9.0)
    with pytest.raises(SparsePathError, match="density 1.0"):
        empty.verify()
    empty.add(0, rows=1, cached=9.0, read=8.5)
    empty.verify()


def test_rows_weigh_the_same(receipt):
    mixed = receipt.fresh()
    mixed.add(0, rows=3, cached=300.0, read=30.0)
    mixed.add(0, rows=1, cached=100.0, read=50.0)
    assert mixed.density == pytest.approx(80 / 400)
    assert mixed.by_layer()[0]["read"] == pytest.approx(20.0)


def test_json_has_the_derived_numbers(receipt):
    content = json.loads(receipt.to_json())
    assert content["density"] == receipt.density
    assert content["decode_density"] == receipt.decode_density
    assert sum(count["calls"] for count in content["counts"]) == 8 + 2
    assert len(content["recent"]) == len(receipt.recent) == 8


def test_size_does_not_grow_with_the_run(receipt):
    """100,000 steps of two layers: as many sums as after one, and the ring that was asked for."""
    run = dataclasses.replace(receipt, keep_steps=5).fresh()
    query, indices = torch.zeros(1, 8, 1, 4), torch.arange(-2, 14, dtype=torch.int32)
    indices = indices.expand(1, 8, 1, 16).contiguous()
    steps = [LayerStep(layer, query, 50, 50, None, indices) for layer in range(2)]

    def run_steps(count: int) -> tuple[int, int]:
        for _ in range(count):
            for step in steps:
                run.saw(step)
        gc.collect()
        tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
        return len(pickle.dumps(run)), tensors

    size, tensors = run_steps(10)
    grown, more = run_steps(100_000 - 10)
    assert grown - size < 100 and more <= tensors  # bytes: longer numbers alone
    assert (len(run.counts), len(run.recent)) == (2, 5)
    assert run.sparse_calls == 200_000 and run.tokens_read == 200_000 * 14
    assert run.density == 14 / 50 and run.recent[-1].step == 99_999


class OnAGpu(torch.Tensor):
    """A number that says it lies on a GPU, and may not be looked at."""

    is_cpu = property(lambda self: False)

    def __float__(self):
        raise AssertionError("reading it would wait for the device")

    __int__ = item = __float__


def test_counting_does_not_wait_for_a_gpu(receipt):
    run = dataclasses.replace(receipt, keep_steps=0).fresh()
    for value in (3, 5):
        lies_there = torch.tensor(value).as_subclass(OnAGpu)
        run.add(0, rows=1, cached=2 * lies_there, read=lies_there)
    (count,) = run._counts.values()
    assert isinstance(count.read, OnAGpu) and count.read.numel() == 1
    count.read, count.cached = (x.as_subclass(torch.Tensor) for x in (count.read, count.cached))
    assert run.tokens_read == 8 and run.density == 0.5
