"""Files of contexts: mapped and shared, checked, refused where they do not fit, written whole."""

import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import DynamicCache

from hashattn import Context
from hashattn.attention.contexts.file import PAGE
from hashattn.base.errors import ContextError, HashAttnError
from hashattn.base.files import WriteError
from helpers import full_disk, generate, prompt, tiny_model

N = 700  # tokens: 512 rows of 128 bytes are a page, so two pages a head


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def filled(model, n=N, seed=0):
    """A context of n random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache(config=model.config)
    for layer in range(2):
        cache.update(*torch.randn(2, 1, 2, n, 16, generator=generator), layer)
    return Context.of_cache(model, cache, prompt(length=n, seed=seed)[0].tolist())


def same(one, other):
    return one.tokens == other.tokens and all(
        torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
        for a, b in zip(one.cache().layers, other.cache().layers, strict=True)
    )


def kilobytes(tensors, own=False):
    """Of the pages of these tensors those in memory; own: and no file's, but this process's alone.

    By page (Linux's admin-guide/mm/pagemap): counts of mappings hold a neighbour's pages too.
    """
    pages = 0
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        for tensor in tensors:
            first = tensor.data_ptr() // mmap.PAGESIZE
            count = -(-tensor.untyped_storage().nbytes() // mmap.PAGESIZE)
            flags = np.frombuffer(os.pread(file.fileno(), 8 * count, 8 * first), np.uint64)
            assert len(flags) == count
            present, of_file = flags >> np.uint64(63), flags >> np.uint64(61) & np.uint64(1)
            pages += int((present & ~of_file if own else present).sum())
    return pages * mmap.PAGESIZE // 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/pagemap")
@pytest.mark.parametrize("loaded", [False, True])
def test_a_batch_shares_the_pages_of_its_prefix(model, tmp_path, loaded):
    n, batch = 8192, 6  # 1 MiB a head, 4 MiB a row of the batch
    context = filled(model, n)
    if loaded:
        context = Context.load(context.save(tmp_path / "a"), model)
    cache = context.cache(batch, room=64)
    rooms = [layer.pairs.room for layer in cache.layers]
    sums = torch.stack([layer.keys.sum((1, 2, 3)) for layer in cache.layers])
    assert torch.equal(sums, sums[:, :1].expand(-1, batch))
    assert kilobytes(rooms) >= 4096 * batch  # all is mapped
    dirty = kilobytes(rooms, own=True)
    assert dirty < 64
    for number in range(2):
        cache.update(*torch.ones(2, batch, 2, 1, 16), number)
    added = kilobytes(rooms, own=True) - dirty
    assert 4 * 4 * batch <= added <= 8 * 4 * batch  # a page of each head


def test_what_is_written_stays_in_its_row(model, tmp_path):
    path = filled(model).save(tmp_path / "a")
    before, context = path.read_bytes(), Context.load(path, model)
    first, second = context.cache(2), context.cache(2)
    layer = first.layers[0]
    old = layer.keys.clone()
    layer.keys[0, :, :50] = 7
    layer.values[0, :, -50:] = 7
    assert torch.equal(layer.keys[1], old[1]) and not torch.equal(layer.keys[0], old[0])
    assert torch.equal(second.layers[0].keys, old) and same(context, Context.load(path, model))
    assert path.read_bytes() == before


def test_any_reader_of_safetensors_reads_it(model, tmp_path):
    context = filled(model)
    path = context.save(tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        pairs = file.get_tensor("layers.1.pairs")
        assert file.get_tensor("tokens").tolist() == context.tokens
        record = json.loads(file.metadata()["hashattn_context"])
    layer = context.cache().layers[1]
    assert torch.equal(pairs[:, :, :N, 0], layer.keys) and not pairs[:, :, N:].any()
    assert record["model"]["dtype"] == "float32" and record["layers"][1]["length"] == N
    assert (8 + struct.unpack("<Q", path.read_bytes()[:8])[0]) % PAGE == 0


def test_a_saved_context_is_the_same_after_its_file_was_replaced(model, tmp_path):
    one, other = filled(model), filled(model, seed=1)
    path = one.save(tmp_path / "a")
    loaded = Context.load(path, model)
    assert same(loaded, one)
    other.save(path)
    assert same(loaded, one) and same(Context.load(path, model), other)
    path.unlink()
    assert same(loaded, one) and same(Context.load(loaded.save(path), model), one)


@pytest.mark.parametrize("size", [0, 5, 8, 300, 2 * PAGE, -1, 1])
def test_a_file_of_another_size_is_refused(model, tmp_path, size):
    path = filled(model).save(tmp_path / "a")
    content = path.read_bytes()
    path.write_bytes(content + b"x" if size == 1 else content[:size])
    with pytest.raises(ContextError, match=r"a (is truncated|has|is damaged).*Context\.read"):
        Context.load(path, model, verify=False)


def test_every_altered_byte_is_found(model, tmp_path):
    path = filled(model).save(tmp_path / "a")
    content = path.read_bytes()
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    used = content[:begin].rstrip()
    header = [*range(8), *range(8, len(used), 41), len(used) + 1, begin - 1]
    data = [begin, begin + 3 * PAGE, len(content) - 8 * N, len(content) - 1]  # the last: tokens
    for place in [*header, *data]:
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ContextError, match=r"altered|damaged|truncated"):
            Context.load(path, model)
        if place in data:
            Context.load(path, model, verify=False)
    path.write_bytes(content)
    Context.load(path, model)


def test_what_is_no_context_is_refused(model, tmp_path):
    for name, content in {
        "text": b"some text, no context",
        "gzip": b"\x1f\x8b" + 99 * b"x",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ContextError, match="truncated, or not a context: copy it again"):
            Context.load(tmp_path / name, model)
    for name in ("missing", ".", "a\0b"):
        with pytest.raises(ContextError, match="cannot be read"):
            Context.load(tmp_path / name, model)


def test_a_file_of_another_format_names_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr("hashattn.attention.contexts.file.FORMAT", 1)
    path = filled(model).save(tmp_path / "a")
    monkeypatch.setattr("hashattn.attention.contexts.file.FORMAT", 2)
    with pytest.raises(ContextError, match="has format 1, this hashattn reads 2: install"):
        Context.load(path, model)


@pytest.mark.parametrize(
    ("family", "settings", "difference"),
    [
        ("llama", {"seed": 1}, "weights"),
        ("llama", {"dtype": torch.bfloat16}, "dtype float32"),
        ("llama_mqa", {}, "config"),
        ("mistral", {}, "type llama there.*type mistral here"),
    ],
)
def test_another_model_is_refused(model, tmp_path, family, settings, difference):
    path = filled(model).save(tmp_path / "a")
    with pytest.raises(ContextError, match=rf"of another model: .*{difference}.*load that model"):
        Context.load(path, tiny_model(family, **settings))
    assert same(Context.load(path, tiny_model("llama")), filled(model))


def test_a_full_disk_leaves_the_old_file(model, tmp_path):
    one, other = filled(model), filled(model, seed=1)
    path = one.save(tmp_path / "a")
    with full_disk(3 * PAGE), pytest.raises(WriteError, match="a cannot be written") as error:
        other.save(path)
    assert isinstance(error.value, HashAttnError)
    assert list(tmp_path.iterdir()) == [path] and same(Context.load(path, model), one)


def test_two_writers_leave_a_whole_file(model, tmp_path, monkeypatch):
    """The second comes while the first one's file waits for its name, and leaves it alone."""
    one, other = filled(model), filled(model, seed=1)
    written, go_on, replace = threading.Event(), threading.Event(), os.replace

    def slow_first(*paths):
        if not written.is_set():
            written.set()
            assert go_on.wait(30)
        replace(*paths)

    monkeypatch.setattr("hashattn.base.files.os.replace", slow_first)
    first = threading.Thread(target=one.save, args=[tmp_path / "a"])
    first.start()
    assert written.wait(30)
    path = other.save(tmp_path / "a")
    assert same(Context.load(path, model), other) and len(list(tmp_path.iterdir())) == 2
    go_on.set()
    first.join()
    assert same(Context.load(path, model), one) and list(tmp_path.iterdir()) == [path]


def test_a_writer_takes_part_in_the_race_for_its_own_file(model, tmp_path, monkeypatch):
    """Its file is cleared away between opening and locking: it begins once more."""
    import fcntl

    lock, taken = fcntl.flock, []

    def late(file, how):
        if how == fcntl.LOCK_EX and not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        return lock(file, how)

    monkeypatch.setattr("hashattn.attention.contexts.file.fcntl.flock", late)
    path = filled(model).save(tmp_path / "a")
    assert len(taken) == 1 and same(Context.load(path, model), filled(model))


KILLED = """
import sys, time
import torch
from hashattn import Context
from hashattn.base import files
from helpers import generate, tiny_model, prompt
model = tiny_model("llama")
context = Context.load(sys.argv[1], model)
ids = torch.tensor([context.tokens + prompt(length=5)[0].tolist()])
print(generate(model, ids, past_key_values=context.cache())[0][0].tolist(), flush=True)
def wait(*paths):
    print("not yet named", flush=True)
    time.sleep(60)
files.os.replace = wait
context.save(sys.argv[1])
"""


def test_another_process_answers_alike_and_leaves_nothing_when_killed(model, tmp_path):
    context = filled(model, 40)
    path = context.save(tmp_path / "a")
    ids = torch.tensor([context.tokens + prompt(length=5)[0].tolist()])
    expected = generate(model, ids, past_key_values=context.cache())[0]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    other = tmp_path / "a.b.1-1.partial"  # of another file, which is not this one's business
    other.touch()
    command = [sys.executable, "-c", KILLED, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert json.loads(process.stdout.readline()) == expected[0].tolist()
        assert process.stdout.readline() == "not yet named\n"
        beside = set(tmp_path.iterdir())
        assert len(beside) == 3
        context.save(path)
        assert set(tmp_path.iterdir()) == beside  # while that writer lives
        process.send_signal(signal.SIGKILL)
    assert set(tmp_path.iterdir()) == beside and same(Context.load(path, model), context)
    context.save(path)
    assert set(tmp_path.iterdir()) == {path, other} and same(Context.load(path, model), context)
