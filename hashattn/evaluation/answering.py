"""One dense prefill of a context, one dense reading of each question, many greedy answers."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hashattn.base.checks import require
from hashattn.base.engines.threads import FasterThreads

PREFILL_CHUNK = 4096  # tokens a forward pass; bounds activations on long contexts
_THREADS = FasterThreads()


@dataclass(frozen=True)
class ReadQuestion:
    """A question read dense after its context. first: the greedy next token's id. states: keys and
    values of the question's tokens for each layer, (1, KV heads, tokens, head_dim); None where a
    layer keeps no full history, so that the question has to be read again. seconds: of the reading.
    """

    tokens: tuple[int, ...]
    first: int
    states: tuple[tuple[Tensor, Tensor], ...] | None
    seconds: float


class PrefilledContext:
    """The key-value cache of one context, run dense once; every answer starts from it.

    tokens: the context's token ids; ValueError without any. The cache is never written after the
    prefill: fork() gives a new cache over the same tensors. seconds: of the prefill.
    """

    @torch.no_grad()
    def __init__(self, model: Any, tokens: Sequence[int]) -> None:
        from transformers import DynamicCache

        allowed = "at least one token: give a template or a context with text"
        require(len(tokens) > 0, "tokens", tokens, allowed)
        start = time.perf_counter()
        self.model, self.tokens = model, list(tokens)
        self._read: dict[tuple, ReadQuestion] = {}
        self.cache = DynamicCache(config=model.config)
        ids = torch.tensor([self.tokens], device=model.device)
        # equal parts: a short last one could pass for decoding where sparse attention is attached
        with _THREADS.piece((id(model), len(self.tokens).bit_length()), len(self.tokens)):
            for chunk in ids.tensor_split(-(-ids.shape[1] // PREFILL_CHUNK), dim=1):
                model(input_ids=chunk, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.seconds = time.perf_counter() - start

    @torch.no_grad()
    def read(self, question: Sequence[int], barred: Iterable[int] = frozenset()) -> ReadQuestion:
        """The question's tokens run dense after the context, once for all callers; `first` is none
        of `barred`."""
        key = (tuple(question), frozenset(barred))
        if key not in self._read:
            from transformers.cache_utils import DynamicLayer

            start = time.perf_counter()
            cache = self.fork()
            first = feed(self.model, question, cache, barred)
            states = None
            if all(type(layer) is DynamicLayer for layer in cache.layers):
                states = tuple(
                    (layer.keys[:, :, -len(question) :].clone(),
                     layer.values[:, :, -len(question) :].clone())
                    for layer in cache.layers
                )  # fmt: skip
            seconds = time.perf_counter() - start
            self._read[key] = ReadQuestion(key[0], first, states, seconds)
        return self._read[key]

    def append(self, cache: Any, question: ReadQuestion) -> None:
        """Adds a question that was read dense to a cache of the context alone."""
        if question.states is None:
            feed(self.model, question.tokens, cache)
            return
        for layer, (keys, values) in zip(cache.layers, question.states, strict=True):
            layer.update(keys, values)

    def fork(self) -> Any:
        """A cache of the context alone, free to be written."""
        from transformers.cache_utils import DynamicLayer

        forked = copy.copy(self.cache)
        # a dynamic layer appends by concatenation, which leaves the original's tensors alone
        forked.layers = [
            copy.copy(layer) if isinstance(layer, DynamicLayer) else copy.deepcopy(layer)
            for layer in self.cache.layers
        ]
        return forked

    def rewind(self, cache: Any) -> Any:
        """The cache cut back to the context, its index kept; a new fork if a layer slides."""
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            return self.fork()
        extra = cache.get_seq_length() - len(self.tokens)
        if extra > 0:
            cache.crop(-extra)
        return cache


def feed(model: Any, tokens: Sequence[int], cache: Any, barred: Iterable[int] = frozenset()) -> int:
    """Appends tokens to the cache in one forward pass; the id of the greedy next token, which is
    none of `barred`. ValueError without tokens."""
    allowed = "at least one token: the template must end with some text"
    require(len(tokens) > 0, "tokens", tokens, allowed)
    ids = torch.tensor([list(tokens)], device=model.device)
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = out.logits[0, -1]
    if barred:
        excluded = torch.tensor(sorted(barred), device=logits.device)
        logits = logits.index_fill(0, excluded, -torch.inf)
    return int(logits.argmax())


def greedy(
    model: Any, tokenizer: Any, cache: Any, token: int, max_new_tokens: int, stop: str | None,
    ends: frozenset[int] | None = None, min_new_tokens: int = 0,
    saw: Callable[[int], None] | None = None,
) -> str:  # fmt: skip
    """The greedy continuation that begins with `token`, up to the stop string (left out).

    Ends at the token whose text completes the stop string (None: no such text), before a token of
    `ends` (None: the model's end_tokens), or after max_new_tokens. Before min_new_tokens none of
    `ends` is chosen; `token` itself is the caller's choice. saw: told each token of the answer
    before the next one is computed.
    """
    ends = end_tokens(model) if ends is None else ends
    generated: list[int] = []
    text = ""
    while token not in ends:
        generated.append(token)
        if saw is not None:
            saw(token)
        text = tokenizer.decode(generated, skip_special_tokens=True)
        if (stop is not None and stop in text) or len(generated) >= max_new_tokens:
            break
        token = feed(model, [token], cache, ends if len(generated) < min_new_tokens else ())
    return text if stop is None else text.split(stop, 1)[0]


def end_tokens(model: Any) -> frozenset[int]:
    """The model's end-of-sequence token ids, from its generation config."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
