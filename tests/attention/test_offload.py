"""Rows of K and V outside fast memory: the same tokens, within limits, and what is told of them."""

import copy
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hashattn import Budget, HashSelector, HashWeights, Memory, Receipt, attach
from hashattn.attention.memory import LayerMemory, Traffic
from hashattn.attention.offload import OffloadedRows
from hashattn.attention.stored import StoredLayer
from hashattn.base.errors import MemoryLimitError, UnsupportedModelError
from hashattn.hashing.maps import HashConfig
from hashattn.models.structure import attention_shapes
from hashattn.selectors.oracle import OracleSelector
from helpers import full_disk, generate, left_padded, prompt, tiny_model

EMBEDDED = Path(__file__).parents[2] / "data" / "embedded"
SMALL = Budget(sink=2, local=4, heavy=6)
WIDTH = 2 * 16 * 4  # bytes of a row of tiny_model("llama")


def fast(slots: int, layers: int = 2, kv_heads: int = 2, width: int = WIDTH) -> int:
    """Bytes for so many rows of each KV head."""
    return slots * layers * kv_heads * width


def hashes(model) -> HashSelector:
    shapes = attention_shapes(model)
    heads = shapes["query_heads"], shapes["kv_heads"], shapes["head_dim"]
    config = HashConfig(shapes["layers"], *heads, "per_kv_head", 32, depth=2, hidden=16)
    return HashSelector(HashWeights.random(config, seed=0))


@pytest.fixture(params=["host", "file"])
def rest(request, tmp_path):
    return None if request.param == "host" else tmp_path


def run(model, ids, mask=None, memory=None, selector=None, budget=SMALL, **settings):
    given = {
        name: settings.pop(name) for name in ("sparse_rows", "dense_layers") if name in settings
    }
    with attach(
        model, selector or hashes(model), budget, memory=memory, allow_untrained=True, **given
    ) as attached:
        made = generate(model, ids, mask, **settings)
    return *made, attached.receipt


WAYS = {
    "greedy": {},
    "drawn": {"do_sample": True, "temperature": 0.8},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "copies": {"do_sample": True, "num_return_sequences": 3},
    "chunked prefill": {"prefill_chunk_size": 16},
    "drafts": {"prompt_lookup_num_tokens": 3, "sparse_rows": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_generate_gives_the_same_tokens_and_logits(way, rest):
    model, ids = tiny_model("llama"), prompt(length=60)
    expected, logits, _ = run(model, ids, **WAYS[way])
    one = set(WAYS[way]).isdisjoint(("num_beams", "num_return_sequences"))
    memory = Memory(fast_bytes=fast(26 if one else 70), folder=rest)
    tokens, found, receipt = run(model, ids, memory=memory, **WAYS[way])
    assert torch.equal(tokens, expected) and torch.equal(found, logits)
    assert receipt.traffic.misses and receipt.traffic.hits > receipt.traffic.misses
    assert receipt.traffic.bytes_moved >= receipt.traffic.misses * WIDTH


@pytest.mark.parametrize("family", ["llama_mqa", "qwen3", "qwen2_sliding", "gemma2"])
def test_families(family, rest):
    model, ids = tiny_model(family), prompt(2, 60)
    expected, logits, _ = run(model, ids)
    tokens, found, _ = run(model, ids, memory=Memory(fast_bytes=200_000, folder=rest))
    assert torch.equal(tokens, expected) and torch.equal(found, logits)


def test_left_padded_batch(rest):
    model, (ids, mask) = tiny_model("llama"), left_padded()
    expected, logits, _ = run(model, ids, mask)
    memory = Memory(fast_bytes=fast(60), folder=rest)
    tokens, found, _ = run(model, ids, mask, memory)
    assert torch.equal(tokens, expected) and torch.equal(found, logits)


def test_sampled_reading_and_another_dtype(rest):
    model, ids = tiny_model("llama", torch.bfloat16), prompt(length=60)
    budget = Budget(sink=2, local=4, heavy=12, sampled=0.5)
    selector = OracleSelector()  # looks at the keys
    expected, logits, _ = run(model, ids, selector=selector, budget=budget)
    memory = Memory(fast_bytes=fast(40, width=WIDTH // 2), folder=rest)
    tokens, found, _ = run(model, ids, memory=memory, selector=selector, budget=budget)
    assert torch.equal(tokens, expected) and torch.equal(found, logits)


def test_second_turn_and_a_cache_that_was_filled_before(rest):
    model, ids = tiny_model("llama"), prompt(length=60)
    memory = Memory(fast_bytes=fast(26), folder=rest)

    def turns(memory):
        cache = DynamicCache()
        with torch.no_grad():
            model(ids[:, :40], past_key_values=cache)  # dense, before attach
        answers = []
        with attach(model, hashes(model), SMALL, memory=memory, allow_untrained=True):
            for end in (50, 60):
                out = model.generate(
                    ids[:, :end], past_key_values=cache, max_new_tokens=5, do_sample=False
                )
                answers.append(out)
                cache.crop(end - cache.get_seq_length())
        with torch.no_grad():  # detached, the model reads all of it
            logits = model(ids[:, :3], past_key_values=cache).logits
        return answers, logits, cache

    expected, found = turns(None), turns(memory)
    assert all(map(torch.equal, expected[0], found[0])) and torch.equal(expected[1], found[1])
    layers = zip(expected[2].layers, found[2].layers, strict=True)
    for plain, stored in layers:
        assert isinstance(stored, StoredLayer)
        assert torch.equal(plain.keys, stored.keys) and torch.equal(plain.values, stored.values)


def test_a_step_that_reads_more_than_fits_streams(rest):
    model, ids = tiny_model("llama"), prompt(length=60)
    expected, logits, _ = run(model, ids, budget=Budget(2, 4, heavy=20))
    memory = Memory(fast_bytes=fast(14), folder=rest)
    tokens, found, receipt = run(model, ids, memory=memory, budget=Budget(2, 4, heavy=20))
    assert torch.equal(tokens, expected) and torch.equal(found, logits)
    assert receipt.traffic.streamed > 0 and "read more than fits" in receipt.summary()


def test_rows_come_back_as_they_were_after_random_changes(rest):
    generator = torch.Generator().manual_seed(0)
    rows = OffloadedRows(LayerMemory(Memory(fast_bytes=1, folder=rest), 1), 2, 9, 16, "cpu")
    whole = torch.empty((1, 2, 0, 16), dtype=torch.uint8)
    traffic = Traffic()
    for turn in range(120):
        batch, length = len(whole), whole.shape[2]
        new = torch.randint(256, (batch, 2, 1 + turn % 5, 16), generator=generator).byte()
        rows.append(new)
        whole = torch.cat((whole, new), dim=2)
        if turn % 7 == 3:
            order = torch.randint(batch, (1 + turn % 4,), generator=generator)
            rows.map(lambda part, order=order: part[order])
            whole = whole[order]
        if turn % 5 == 4:
            rows.crop(length // 2)
            whole = whole[:, :, : length // 2]
        batch, _, length, _ = whole.shape
        lists = torch.randint(length, (batch, 4, 1, 3), generator=generator).int()
        lists[0, 1, 0, 0] = -1
        found, slots = rows.reach(lists, traffic)
        for b, line in ((b, line) for b in range(batch) for line in range(4)):
            for token, slot in zip(
                lists[b, line, 0].tolist(), slots[b, line, 0].tolist(), strict=True
            ):
                assert (token < 0) == (slot < 0)
                if token >= 0:
                    assert torch.equal(found[b, line // 2, slot], whole[b, line // 2, token])
        assert torch.equal(torch.cat(list(rows.blocks()), dim=2), whole) and rows.length == length
    assert traffic.hits and traffic.misses and traffic.streamed


def test_sequences_of_a_batch_share_records_and_slots():
    rows = OffloadedRows(LayerMemory(Memory(fast_bytes=1), 1), 1, 8, 4, "cpu")
    rows.append(torch.arange(80).byte().view(1, 1, 20, 4))
    rows.map(lambda part: part.repeat_interleave(50, dim=0))
    before, traffic = rows.nbytes, Traffic()
    lists = torch.arange(6, dtype=torch.int32).expand(50, 1, 1, 6)
    rows.reach(lists, traffic)
    assert traffic.misses == 6 and traffic.streamed == 0 and rows.nbytes == before


def test_copies_of_a_cache_are_apart_and_pickles_are_refused():
    model, ids = tiny_model("llama"), prompt(length=40)
    cache = DynamicCache()
    with attach(
        model, hashes(model), SMALL, memory=Memory(fast_bytes=fast(20)), allow_untrained=True
    ):
        generate(model, ids, past_key_values=cache, max_new_tokens=3)
        copied = copy.deepcopy(cache)
        before = copied.layers[0].keys
        generate(model, torch.cat((ids, ids), 1), past_key_values=cache, max_new_tokens=3)
    assert torch.equal(copied.layers[0].keys, before)
    assert copied.layers[0].index_length == before.shape[2]
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(cache)


def test_limits_are_checked_before_the_run(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(MemoryLimitError, match=f"at least {fast(7)} bytes"):
        attach(model, hashes(model), SMALL, memory=Memory(fast_bytes=fast(6)), allow_untrained=True)
    assert model.config._attn_implementation != "hash_attention"
    with pytest.raises(MemoryLimitError, match="slow_bytes leaves 2560 bytes to a layer"):
        run(model, prompt(), memory=Memory(fast_bytes=fast(20), slow_bytes=5120, folder=tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "fast_bytes = None"),
        ({"fast_bytes": 0}, "fast_bytes = 0"),
        ({"fast_bytes": 1, "bits": 5}, "bits = 5"),
        ({"bits": 8, "folder": "."}, "without fast_bytes"),
        ({"bits": 4, "exact": -1}, "exact = -1"),
        ({"fast_bytes": 1, "exact": 9}, "unless bits = 8 or 4"),
        ({"fast_bytes": 1, "folder": "no/such/folder"}, "create it first"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Memory(**settings)


def test_static_caches_and_measured_break_evens_are_refused():
    model, memory = tiny_model("llama"), Memory(fast_bytes=fast(20))
    with pytest.raises(UnsupportedModelError, match="dynamic cache"):
        run(model, prompt(), memory=memory, cache_implementation="static")
    with pytest.raises(ValueError, match="a number with memory"):
        attach(
            model, hashes(model), SMALL, memory=memory, allow_untrained=True,
            dense_below="break_even",
        )  # fmt: skip


def test_full_disk_is_an_error_that_says_so_and_leaves_nothing(tmp_path):
    model = tiny_model("llama")
    with full_disk(1000), pytest.raises(MemoryLimitError, match="free some"):
        run(model, prompt(), memory=Memory(fast_bytes=fast(20), folder=tmp_path))
    assert not os.listdir(tmp_path)
    assert model.config._attn_implementation != "hash_attention"


def test_the_receipt_tells_and_is_read_again(tmp_path):
    model = tiny_model("llama")
    memory = Memory(fast_bytes=fast(26), folder=tmp_path)
    _, _, receipt = run(model, prompt(length=60), memory=memory)
    assert receipt.settings["memory"] == {
        "fast_bytes": fast(26), "slow_bytes": None, "bits": None, "exact": 0, "rest": "file",
    }  # fmt: skip
    assert str(tmp_path) not in receipt.to_json()
    assert "rows found there" in receipt.summary()
    receipt.save(tmp_path / "receipt.json")
    assert Receipt.load(tmp_path / "receipt.json").traffic == receipt.traffic
    assert os.listdir(tmp_path) == ["receipt.json"]


def test_generated_text_of_a_dense_layer_stays_plain():
    model = tiny_model("llama")
    cache = DynamicCache()
    with attach(
        model, hashes(model), SMALL, memory=Memory(fast_bytes=fast(26)), dense_layers=[0],
        allow_untrained=True,
    ):  # fmt: skip
        generate(model, prompt(length=60), past_key_values=cache)
    assert [isinstance(layer, StoredLayer) for layer in cache.layers] == [False, True]


@pytest.mark.parametrize(("bits", "exact"), [(8, 0), (4, 0), (4, 16)])
def test_fewer_bits_in_memory_and_outside_give_the_same(bits, exact, rest):
    model, ids = tiny_model("llama"), prompt(2, length=60)
    _, dense, _ = run(model, ids)
    _, resident, receipt = run(model, ids, memory=Memory(bits=bits, exact=exact))
    width = 2 * 16 * bits // 8 + 4
    memory = Memory(fast_bytes=fast(50, width=width), bits=bits, exact=exact, folder=rest)
    _, offloaded, _ = run(model, ids, memory=memory)
    assert torch.equal(resident, offloaded) and not torch.equal(resident, dense)
    error = (resident[:, 0] - dense[:, 0]).norm() / dense[:, 0].norm()
    assert error < (0.03 if bits == 8 else 0.3)
    kept = f" (the newest {exact} as they were)" if exact else ""
    assert f"in {bits} bits{kept}, all in fast memory" in receipt.summary()


def test_codes_are_those_of_the_keys_as_they_were():
    model, ids = tiny_model("llama"), prompt(length=60)
    codes = []
    for memory, below in ((None, 0), (Memory(bits=4), 0), (Memory(bits=4), 50)):
        cache = DynamicCache()
        settings = {"memory": memory, "allow_untrained": True, "dense_below": below}
        with attach(model, hashes(model), SMALL, **settings):
            generate(model, ids, past_key_values=cache, max_new_tokens=2, prefill_chunk_size=16)
        codes.append(cache.layers[0].stores["codes"].to_tokens())
    # of layer 0, which sees no error of other layers
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])


def test_head_dims_that_cannot_be_stored_in_fewer_bits_are_refused():
    model = tiny_model("llama_mha")
    model.config.head_dim = 24
    with pytest.raises(ValueError, match="multiple of 16"):
        attach(model, OracleSelector(), SMALL, memory=Memory(bits=8))


@pytest.fixture(scope="module")
def embedded():
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED).eval()
    model.generation_config.eos_token_id = None
    return model, HashSelector(HashWeights.load(EMBEDDED / "hash_weights", model))


@pytest.mark.parametrize("way", [*WAYS, "left-padded"])
def test_the_embedded_model_gives_the_same_tokens(way, embedded, tmp_path):
    model, selector = embedded
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 500, (1, 300), generator=generator)
    mask, settings = None, WAYS.get(way, {})
    if way == "left-padded":
        ids, mask = ids.repeat(2, 1), torch.ones(2, 300, dtype=torch.int64)
        mask[1, :90] = 0
    budget = Budget(sink=4, local=12, density=1 / 8)
    expected, logits, _ = run(model, ids, mask, selector=selector, budget=budget, **settings)
    memory = Memory(fast_bytes=4 * 2 * 256 * 150, folder=tmp_path)
    tokens, found, receipt = run(model, ids, mask, memory, selector, budget, **settings)
    assert torch.equal(tokens, expected) and torch.equal(found, logits)
    assert receipt.traffic.bytes_moved


KILLED = """
import os, signal, sys
import torch
from hashattn.attention.cold_rows import FileRows
rows = FileRows(sys.argv[1], 2, 64, None)
rows.write(0, torch.zeros(5000, 2, 64, dtype=torch.uint8))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_file(tmp_path):
    root = EMBEDDED.parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], env=environment)
    assert done.returncode == -signal.SIGKILL and not os.listdir(tmp_path)
