"""The numba backend beyond what all backends share: head sizes, dtypes, threads, compilation."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import hashattn_kernels
from hashattn.kernels import attend, dense_decode, encode, select_by_codes
from hashattn_kernels.numba_cpu import compiled, regions, selection, simd
from hashattn_kernels.numba_cpu.backend import smallest
from kernel_inputs import attention_states, token_lists

KERNELS = Path(hashattn_kernels.__file__).parents[1]


@pytest.fixture(autouse=True)
def threads():
    """Restore torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_results_do_not_depend_on_the_number_of_threads(number):
    """With more threads than lists every list is split, and its parts are merged."""
    q, k, v = attention_states(8, 2, 300, 64, 64, torch.float32)
    indices = token_lists(2, 300, 130)
    torch.set_num_threads(1)
    expected = attend(q[:1], k[:1], v[:1], indices[:1], 0.1), dense_decode(q, k, v, 0.1)
    torch.set_num_threads(number)
    actual = attend(q[:1], k[:1], v[:1], indices[:1], 0.1), dense_decode(q, k, v, 0.1)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_selection_and_codes_are_the_same_on_any_number_of_threads(number):
    generator = torch.Generator().manual_seed(0)
    queries, keys = (
        torch.randint(-(2**31), 2**31, (2, h, n, 2), generator=generator).to(torch.int32)
        for h, n in ((6, 1), (3, 700))
    )
    x = torch.randn(3, 4, 2, 32, generator=generator)
    widths = ((4, 32, 2048), (4, 2048, 64))  # enough weights to be worth several threads
    stack = hashattn_kernels.Maps(
        tuple(torch.randn(w, generator=generator) for w in widths),
        tuple(torch.randn(4, w[2], generator=generator) for w in widths),
    )
    torch.set_num_threads(1)
    expected = select_by_codes(queries, keys, 90, 4, 9), encode(x, stack)
    torch.set_num_threads(number)
    actual = select_by_codes(queries, keys, 90, 4, 9), encode(x, stack)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_the_pool_does_what_openmp_does(monkeypatch):
    q, k, v = attention_states(8, 2, 300, 64, 64, torch.float32)
    torch.set_num_threads(4)
    expected = dense_decode(q, k, v, 0.1)
    monkeypatch.setattr(regions, "_openmp", lambda: None)
    torch.testing.assert_close(dense_decode(q, k, v, 0.1), expected, rtol=0, atol=1e-6)


def test_shares_that_openmp_gives_no_thread_are_done_all_the_same(monkeypatch):
    """Inside another parallel region OpenMP may start one thread where four were asked for."""
    q, k, v = attention_states(8, 2, 300, 64, 64, torch.float32)
    torch.set_num_threads(4)
    expected = dense_decode(q, k, v, 0.1)
    found = regions._openmp()
    if found is None:
        pytest.skip("torch's OpenMP library is not found here")
    parallel, number = found
    monkeypatch.setattr(
        regions,
        "_openmp",
        lambda: (lambda entry, call, threads, flags: parallel(entry, call, 1, flags), number),
    )
    torch.testing.assert_close(dense_decode(q, k, v, 0.1), expected, rtol=0, atol=1e-6)


def test_python_threads_may_call_at_once():
    q, k, v = attention_states(8, 2, 2000, 64, 64, torch.float32)
    torch.set_num_threads(2)
    inputs = [q * (1 + i / 10) for i in range(6)]
    expected = [dense_decode(x, k, v, 0.1) for x in inputs]
    actual = [None] * 6

    def work(i):
        for _ in range(5):
            actual[i] = dense_decode(inputs[i], k, v, 0.1)

    running = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 64, 500, 1000])
def test_smallest_levels_with_ties_to_the_lowest(k):
    levels = torch.randint(0, 9, (3, 1000), generator=torch.Generator().manual_seed(k)).to(
        torch.uint8
    )
    expected = levels.to(torch.int32).sort(dim=1, stable=True).indices[:, :k].sort().values
    assert torch.equal(smallest(levels, k), expected.to(torch.int32))


def every_half() -> np.ndarray:
    """Every float16 as int16 bits, infinities and NaN too."""
    return np.arange(2**16, dtype=np.uint16).view(np.int16)


@simd.kernel
def widened(source, target):
    for i in range(0, len(source), 8):
        simd.store(target, i, simd.load(source, i))


@simd.kernel
def exponentials(x):
    for i in range(0, len(x), 8):
        simd.store(x, i, simd.exp(simd.load(x, i)))


@pytest.mark.parametrize("room", [0, 1, 3, 4, 5, 8, 100])
@pytest.mark.parametrize("positions", [(), (0,), (63,), (2, 3, 40, 63), (5, 6, 7, 8, 9), range(64)])
def test_positions_of_a_words_ones_stay_within_their_room(positions, room):
    word = np.uint64(sum(1 << i for i in positions))
    out = np.full(110, -7, dtype=np.int32)
    end = selection.write_bits(word, 1000, out, 2, 2 + room)
    assert end == 2 + min(room, len(positions))
    assert out[2:end].tolist() == [1000 + i for i in positions][:room]
    assert (out[:2] == -7).all() and (out[2 + room :] == -7).all()


def test_every_float16_is_widened_exactly():
    bits = every_half()
    target = np.empty(len(bits), dtype=np.float32)
    widened(bits, target)
    assert np.array_equal(target, bits.view(np.float16).astype(np.float32), equal_nan=True)


def test_bfloat16_is_widened_and_rounded_like_torch():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 3
    target = np.empty(4096, dtype=np.uint16)
    widened(x.numpy(), target)
    assert torch.equal(torch.from_numpy(target).view(torch.bfloat16), x.bfloat16())
    back = np.empty(4096, dtype=np.float32)
    widened(target, back)
    assert torch.equal(torch.from_numpy(back), x.bfloat16().float())


def test_bfloat16_of_every_nan_is_nan():
    """Rounding adds to the bits: it must not carry a NaN's over into a number's."""
    bits = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001] * 2, dtype=np.uint32)
    target = np.empty(8, dtype=np.uint16)
    widened(bits.view(np.float32), target)
    assert torch.from_numpy(target).view(torch.bfloat16).isnan().all()
    widened(np.array([np.inf, -np.inf] * 4, dtype=np.float32), target)
    assert torch.from_numpy(target).view(torch.bfloat16).tolist() == [np.inf, -np.inf] * 4


def test_exp_is_accurate_and_ends_softly():
    x = np.linspace(-87, 88, 80_000, dtype=np.float32)
    y = x.copy()
    exponentials(y)
    assert np.abs(y / np.exp(x.astype(np.float64)) - 1).max() < 3e-7
    far = np.array([-np.inf, -1e30, -88, -87.5, 0, 100, np.inf, np.nan], dtype=np.float32)
    exponentials(far)
    assert (far[:3] == 0).all() and 0 < far[3] < 2e-38 and far[4] == 1
    assert (far[5:7] == np.inf).all() and np.isnan(far[7])


WITHOUT_HARDWARE = """
from hashattn_kernels.numba_cpu import simd
simd.HARDWARE_HALVES = False
import numpy as np
@simd.kernel
def widened(source, target):
    for i in range(0, len(source), 8):
        simd.store(target, i, simd.load(source, i))
bits = np.arange(2**16, dtype=np.uint16).view(np.int16)
target = np.empty(len(bits), dtype=np.float32)
widened(bits, target)
assert np.array_equal(target, bits.view(np.float16).astype(np.float32), equal_nan=True)
"""

STEP = """
import torch
import hashattn_kernels as kernels
torch.set_num_threads(2)
q, k = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 40, 32)
print(kernels.dense_decode(q, k, k, 0.1).shape)
"""


def run(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    settings = os.environ | {"PYTHONPATH": str(KERNELS), "XDG_CACHE_HOME": str(tmp_path)}
    settings.pop("NUMBA_CACHE_DIR", None)
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env=settings | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_float16_without_an_instruction_for_it(tmp_path):
    run(WITHOUT_HARDWARE, tmp_path)


def test_compilation_is_announced_once_and_kept(tmp_path):
    first, second = run(STEP, tmp_path), run(STEP, tmp_path)
    assert first.stderr.count("compiling CPU kernels") == 1 and not second.stderr
    assert str(tmp_path / "hashattn") in first.stderr
    assert first.stdout == second.stdout == "torch.Size([1, 4, 1, 32])\n"


def test_a_read_only_cache_folder_is_no_obstacle(tmp_path):
    """There is no place for the code: it is compiled for this process alone."""
    (tmp_path / "file").touch()
    done = run(STEP, tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert "in every process: no cache folder is writable" in done.stderr


def test_processors_of_other_kinds_compile_too(tmp_path):
    """AVX2 without AVX-512: the portable vectors must not depend on this machine's."""
    run(STEP, tmp_path, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="")


def test_cache_folder_changes_with_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = compiled.cache_folder.__wrapped__()
    own = Path(compiled.__file__).parent
    for changed in (Path("numba_cpu/simd.py"), Path("coins.py")):  # constants are compiled in
        copy = tmp_path / changed.stem
        for path in [*own.glob("*.py"), *own.parent.glob("*.py")]:
            place = copy / path.relative_to(own.parent)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
        monkeypatch.setattr(compiled, "__file__", str(copy / "numba_cpu" / "compiled.py"))
        assert compiled.cache_folder.__wrapped__() == before
        (copy / changed).write_text("changed")
        assert compiled.cache_folder.__wrapped__() != before
    monkeypatch.setattr(compiled.config, "CACHE_DIR", "/chosen/by/the/user")
    assert compiled.cache_folder.__wrapped__() == "/chosen/by/the/user"
