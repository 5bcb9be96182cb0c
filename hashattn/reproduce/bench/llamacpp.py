"""Side by side with llama.cpp on a CPU: the same SmolLM2-135M, token by token from a long cache.

llama.cpp comes from the wheel `xllamacpp` (an extra, never required) and decodes the GGUF file of
`make pretrained` as it is: quantised weights, flash attention, K and V in float16 or q8_0, timed by
its own server. This package decodes the same weights, dequantised to bfloat16, through `generate`.
Every engine has a process of its own, and they decode in turn. A token costs a + b n
milliseconds with n cached ones: b is attention, a all the rest.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pandas as pd
import torch

from hashattn.attention.break_even import line
from hashattn.attention.budget import Budget
from hashattn.base.errors import HashAttnError
from hashattn.reproduce.bench.record import save
from hashattn.reproduce.bench.timing import spread
from hashattn.reproduce.pretrained import Pretrained, pretrained

DEPTHS = (1024, 2048, 4096, 8000)  # SmolLM2 sees 8,192
_SLOPE_FROM = 2048  # shorter caches do not count for the slope
TOKENS = 12  # decoded for one time
REPEATS = 3
_KV_TYPES = ("f16", "q8_0")
OURS = ("dense", "default", "default_kv_lists")
_DENSITY = 1 / 16
_MODEL = "smollm2"
_SEED = 0
_WAIT = 900  # seconds for an answer of a worker: a prefill of 8K tokens takes minutes


class LlamaCppError(HashAttnError, RuntimeError):
    """llama.cpp is not here, or one of the processes that decode failed."""


def side_by_side(
    depths: Sequence[int] = DEPTHS, repeats: int = REPEATS, tokens: int = TOKENS
) -> tuple[list[dict[str, Any]], str]:
    """Rows (engine, threads, n, ms a token with quartiles, tokens, repeats), and a note: the
    protocol, or what is missing, where there are no rows."""
    if missing := _missing():
        print(missing)
        return [], missing
    model, threads = pretrained(_MODEL), sorted({1, torch.get_num_threads()})
    times: dict[tuple[str, int, int], list[float]] = {}
    with _engines(model, depths, threads) as engines:
        for repeat in range(repeats):
            for number in threads:
                for n in depths:
                    for name, ask in engines(number):
                        spent = ask("decode", n, tokens)
                        times.setdefault((name, number, n), []).append(spent / 1e3)
            print(f"llama.cpp beside ours, round {repeat + 1} of {repeats}", flush=True)
    rows = [
        {"engine": name, "threads": number, "n": n, "tokens": tokens, "repeats": repeats}
        | spread(spent)
        for (name, number, n), spent in times.items()
    ]
    return rows, protocol(tokens, repeats)


def protocol(tokens: int, repeats: int) -> str:
    """What was compared, in a sentence."""
    return (
        f"SmolLM2-135M-Instruct; llama.cpp: Q4_1 weights, flash attention, a real prompt, times of "
        f"its server (xllamacpp's wheel, built for AVX2); ours: the same weights in bfloat16, "
        f"random keys, `generate`, sparse reading 1/{1 / _DENSITY:g}; medians of {repeats} rounds "
        f"of {tokens} tokens, engines in turn, each in a process of its own"
    )


def _missing() -> str:
    """What to do where llama.cpp or the model is not here; "" where both are."""
    if find_spec("xllamacpp") is None:
        return (
            "llama.cpp is not compared: the package xllamacpp is not installed; "
            "pip install -e '.[llamacpp]' brings it"
        )
    if not pretrained(_MODEL).path.is_file():
        return "llama.cpp is not compared: SmolLM2-135M is not here; `make pretrained` fetches it"
    return ""


def bench(path: Path) -> dict[str, Any]:
    """Measure this alone, print it, write `path`; LlamaCppError where something is missing."""
    rows, note = side_by_side()
    if not rows:
        raise LlamaCppError(note)
    record = {"llamacpp": rows, "llamacpp_note": note}
    save(path, **record)
    report(rows, note)
    return record


def costs(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """What a token costs: by threads and engine a (ms) and b (us a cached token) of the line over
    all lengths, and b from _SLOPE_FROM on with llama.cpp's, K and V in float16, over it."""
    found, frame = {}, pd.DataFrame(rows)
    for (threads, engine), part in frame.groupby(["threads", "engine"], sort=False):
        a, b = line(part["n"], part["ms"])
        far = part[part["n"] >= _SLOPE_FROM]
        slope = line(far["n"], far["ms"])[1] if len(far) > 1 else float("nan")
        found[threads, engine] = {"a ms": a, "b us": b * 1e3, "b us, far": slope * 1e3}
    table = pd.DataFrame(found).T.rename_axis(["threads", "engine"])
    theirs = table["b us, far"].xs(_name("f16"), level="engine")
    theirs = theirs.reindex(table.index, level="threads")
    return table.assign(**{"llama.cpp's b over it": (theirs / table["b us, far"]).where(
        table["b us, far"] > 0)})  # fmt: skip


def times(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Milliseconds a token as measured: a line per (threads, engine), a column per length."""
    frame = pd.DataFrame(rows)
    return frame.pivot_table(index=["threads", "engine"], columns="n", values="ms", sort=False)


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Where ours loses: by thread count the lengths at which llama.cpp's fastest token is faster
    than our default's, and the reason that the fits give."""
    table, fits, said = times(rows), costs(rows), []
    for threads in table.index.unique("threads"):
        part = table.loc[threads]
        theirs = part[part.index.str.startswith("llama.cpp")].min()
        lost = [f"{n}" for n in part.columns if theirs[n] < part.loc["default", n]]
        where = f"at {', '.join(lost)} cached tokens" if lost else "nowhere"
        fit = fits.loc[threads]
        said.append(
            f"{threads} thread(s): the default is slower than llama.cpp {where}; "
            f"its a is {fit.loc['default', 'a ms']:.1f} ms, llama.cpp's "
            f"{fit.loc[_name('f16'), 'a ms']:.1f} ms (weights of 4 bits against 16)"
        )
    return "\n".join(said)


def report(rows: Sequence[dict[str, Any]], note: str) -> None:
    """Print the tables."""
    print(f"\nbeside llama.cpp: {note}")
    if rows:
        print(f"{times(rows).round(1).to_string()}\n\n{costs(rows).round(2).to_string()}")
        print(verdict(rows))


def _name(kv: str) -> str:
    return f"llama.cpp, {kv}"


@contextmanager
def _engines(
    model: Pretrained, depths: Sequence[int], threads: Sequence[int]
) -> Iterator[Callable[[int], list[tuple[str, Callable]]]]:
    """Processes that decode, ready: by number of threads the engines' names and how to ask them."""
    most = max(threads)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hashattn-llamacpp-"))
        asks: dict[tuple[str, int], Callable] = {}
        for kv in _KV_TYPES:
            start = time.perf_counter()
            for number in sorted(threads, reverse=True):  # the first reads the prompt, for all
                made = {"kv": kv, "threads": number, "most": most, "depth": max(depths)}
                worker = _Worker(_LlamaCpp, str(model.path), folder, made)
                asks[_name(kv), number] = stack.enter_context(worker).ask
                if number == most:
                    worker.ask("prefill")
            seconds = time.perf_counter() - start
            print(f"llama.cpp, {kv}: {max(depths)} tokens read in {seconds:.0f} s", flush=True)
        ours = stack.enter_context(_Worker(_Ours, str(model.folder))).ask

        def by(number: int) -> list[tuple[str, Callable]]:
            def asking(name: str) -> Callable:
                return lambda what, n, tokens: ours(what, name, number, n, tokens)

            theirs = [(name, ask) for (name, count), ask in asks.items() if count == number]
            return [*((name, asking(name)) for name in OURS), *theirs]

        yield by


class _Worker:
    """An object in a process of its own: `ask` calls one of its methods and waits."""

    def __init__(self, kind: type, *arguments: Any) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, kind, arguments), daemon=True)
        self._process.start()
        other.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """What the method returns; LlamaCppError where it fails or takes too long."""
        try:
            self._pipe.send((method, arguments))
            if not self._pipe.poll(_WAIT):
                raise LlamaCppError(f"{method}: no answer in {_WAIT} s")
            done, result = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise LlamaCppError(f"the process of {method} ended: {error!r}") from error
        if not done:
            raise LlamaCppError(f"{method}: {result}")
        return result

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _serve(pipe: Connection, kind: type, arguments: tuple) -> None:
    """A worker's process: makes the object when first asked, answers until the pipe closes."""
    made = None
    while True:
        try:
            method, given = pipe.recv()
        except EOFError:
            return
        try:
            made = kind(*arguments) if made is None else made
            pipe.send((True, getattr(made, method)(*given)))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}"))


class _LlamaCpp:
    """llama.cpp's server, in this process: one slot, flash attention, no cache of old prompts."""

    def __init__(self, gguf: str, folder: str, settings: dict[str, Any]) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = gguf
        parameters.n_ctx = settings["depth"] + 192
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = settings["threads"]
        parameters.cpuparams_batch.n_threads = settings["most"]
        parameters.warmup, parameters.verbosity = False, 0
        parameters.cache_ram_mib, parameters.n_ctx_checkpoints = 0, 0
        parameters.slot_save_path = folder + "/"
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{settings['kv'].upper()}")
        parameters.cache_type_k = parameters.cache_type_v = kind
        self._server, self._file = xllamacpp.Server(parameters), f"cache-{settings['kv']}"
        draw = random.Random(_SEED)
        self._prompt = [draw.randrange(100, 40000) for _ in range(settings["depth"])]

    def prefill(self) -> None:
        """Read the prompt, and keep the cache in a file for the other processes."""
        self._complete(len(self._prompt), 1)
        self._slot("save")

    def decode(self, n: int, tokens: int) -> float:
        """Milliseconds of one of `tokens` tokens after n cached ones, by the server."""
        self._slot("restore")
        timings = self._complete(n, tokens)
        if timings["cache_n"] < n - 1:
            raise RuntimeError(f"only {timings['cache_n']} of {n} tokens were cached")
        return timings["predicted_per_token_ms"]

    def _complete(self, n: int, tokens: int) -> dict[str, Any]:
        answer = self._server.handle_completions({
            "prompt": self._prompt[:n], "n_predict": tokens, "cache_prompt": True,
            "temperature": 0, "ignore_eos": True,
        })  # fmt: skip
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        if "timings" not in answer:
            raise RuntimeError(f"llama.cpp answered {str(answer)[:200]}")
        return answer["timings"]

    def _slot(self, action: str) -> None:
        """Save or restore the slot's cache, over the server's own port of this machine."""
        address = f"{self._server.listening_address}/slots/0?action={action}"
        body = json.dumps({"filename": self._file}).encode()
        with urlopen(Request(address, body, {"Content-Type": "application/json"}), timeout=60):
            pass


class _Ours:
    """The same weights in this package."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        from hashattn.hashing.weights import HashWeights
        from hashattn.reproduce.bench.end_to_end import selectors
        from hashattn.reproduce.profiles import load_profile
        from hashattn.selectors.hash import HashSelector

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        weights = HashWeights.load(load_profile(_MODEL).hash_weights_path, self._model)
        self._ways = selectors(self._model, names=()) | {
            "default": HashSelector(weights),
            "default_kv_lists": HashSelector(weights, layout="per_kv_head"),
        }
        self._filled: dict[int, Any] = {}

    def decode(self, name: str, threads: int, n: int, tokens: int) -> float:
        """Milliseconds of one of `tokens` tokens after n cached ones."""
        from hashattn.reproduce.bench.end_to_end import filled_cache, token_seconds

        torch.set_num_threads(threads)
        if n not in self._filled:
            self._filled[n] = filled_cache(self._model, n)
        budget = Budget(density=_DENSITY)
        spent = token_seconds(self._model, self._filled[n], self._ways[name], budget, n, tokens)
        return sum(spent) / len(spent) * 1e3
