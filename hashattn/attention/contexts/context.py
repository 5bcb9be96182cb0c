"""A prefilled context: keys, values, codes and token ids of a text that a model has read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from hashattn.attention.attachment import attachment_of
from hashattn.attention.contexts.file import ContextFile, Part
from hashattn.attention.contexts.layers import (
    fill_index,
    fill_layer,
    index_parts,
    layer_parts,
    layer_record,
    method_of,
)
from hashattn.attention.contexts.text import template_of, token_ids
from hashattn.attention.hooks import PROMPT
from hashattn.base.checks import require, require_numbers
from hashattn.base.environment import package_versions
from hashattn.base.errors import ContextError, UnsupportedModelError
from hashattn.base.fingerprints import require_same
from hashattn.models.identity import model_name, states_record, tokenizer_sha256
from hashattn.models.structure import attention_modules, shared_by

_CHUNK = 4096  # tokens a forward pass; bounds activations on long contexts
_ROOM = 1024  # tokens


@dataclass(frozen=True, eq=False)
class Context:
    """A text that `model` has read, from which any number of caches begin.

    All of them, in this process and in others that loaded the same file, share the memory of its
    keys and values; what they add is their own, and the file never changes.
    """

    model: PreTrainedModel
    file: ContextFile

    @classmethod
    @torch.no_grad()
    def read(
        cls, model: PreTrainedModel, tokenizer: Any, text: str, path: str | Path | None = None, *,
        chat: bool | None = None, chunk: int = _CHUNK,
    ) -> Context:  # fmt: skip
        """Let the model read a text once, densely, in chunks of at most `chunk` tokens.

        path: of the context's file, as `save` writes it; None: it is kept in memory, layer by layer
        in place of the cache. While sparse attention is attached, the selector's index is made
        along and kept; with Memory in fewer bits UnsupportedModelError. chat: the
        text begins the user's message of the tokenizer's chat template, which the questions of
        `ask` then end; None: if there is a template. ValueError for a text without tokens, or chat
        without a template.
        """
        require_numbers({"chunk": chunk}, counts={"chunk": 1})
        before, after = template_of(tokenizer, chat)
        tokens = token_ids(tokenizer, before + text)
        require(len(tokens) > 0, "text", text, "a text with at least one token")
        _refuse_shared(model)
        cache = DynamicCache(config=model.config)
        ids = torch.tensor([tokens], device=model.device)
        # equal parts: a short last one could pass for decoding where sparse attention is attached
        for part in ids.tensor_split(-(-len(tokens) // chunk), dim=1):
            model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        prompt = {"tokenizer": tokenizer_sha256(tokenizer), "after": after}
        return cls(model, _file_of(model, cache, tokens, path, prompt, consume=True))

    @classmethod
    def of_cache(
        cls, model: PreTrainedModel, cache: Cache, tokens: Sequence[int],
        path: str | Path | None = None,
    ) -> Context:  # fmt: skip
        """A copy of a cache that `model` filled with these tokens, of one row without padding.

        path: as in `read`. Its questions are plain text after the tokens. UnsupportedModelError for
        other caches than DynamicCache, ValueError where tokens and cache differ in length.
        """
        _refuse_shared(model)
        return cls(model, _file_of(model, cache, [int(token) for token in tokens], path))

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, *, verify: bool = True) -> Context:
        """A saved context, for the model that read it.

        Its pages are mapped, not read: they come from the disk as they are needed, once for all
        processes. verify: read all of them now and compare with the hashes (sha256, on all cores);
        without it, header, size and record alone are checked. Raises ContextError for a file that
        is missing, truncated, altered, or was made by another model, revision or dtype.
        """
        _refuse_shared(model)
        context = cls(model, ContextFile.open(path))
        context.check_model(model)
        if verify:
            context.file.verify()
        return context

    def save(self, path: str | Path) -> Path:
        """Write the context to a file, whole or not at all; returns its path.

        Writers of the same path do not disturb each other: the last one's file stays. WriteError
        where the disk is full or cannot be written; what was there is then unchanged.
        """
        return self.file.save(path)

    @property
    def tokens(self) -> list[int]:
        """The ids of what was read."""
        return self.file.tensor("tokens").tolist()

    def __len__(self) -> int:
        return self.file.place("tokens")[1][0]

    def cache(self, batch: int = 1, room: int = _ROOM) -> DynamicCache:
        """A new cache that holds the context in each of `batch` rows, for `model.generate(...,
        past_key_values=cache)`.

        On a CPU the rows map the context's pages, and an added token costs its own bytes alone;
        elsewhere they are a copy. room: tokens that can be added before rows move to memory of
        their own. With sparse attention attached, by the selector by which the context was read, it
        brings the index along; for another selector it is encoded anew on the first step, as it
        follows from the keys.
        """
        require_numbers({"batch": batch, "room": room}, counts={"batch": 1, "room": 0})
        cache = DynamicCache(config=self.model.config)
        attached = attachment_of(self.model)
        selector = None if attached is None else attached.selector
        stored = selector is not None and self.file.record["method"] == _json(method_of(selector))
        devices = {module.layer_idx: _device(module) for module in attention_modules(self.model)}
        for number in range(len(self.file.record["layers"])):
            device = devices.get(number) or self.model.device
            fill_layer(cache, number, self.file, device, batch, room)
            if stored:
                fill_index(cache, number, self.file, selector, batch)
        vars(cache)[PROMPT] = len(self)  # a question goes on with the prompt
        return cache

    def check_model(self, model: PreTrainedModel) -> None:
        """ContextError unless `model` is the one that read this context."""
        name = self.file.record["model_name"] or "an unnamed model"
        require_same(
            "context", {"model": self.file.record["model"]}, {"model": _json(states_record(model))},
            ContextError, f"load that model ({name}), or read the document with this one",
        )  # fmt: skip

    def check_tokenizer(self, tokenizer: Any) -> None:
        """ContextError for another tokenizer than the text was read by."""
        stated = self.file.record["prompt"]["tokenizer"]
        if stated not in (None, tokenizer_sha256(tokenizer)):
            raise ContextError(
                "this context was read by another tokenizer, or another chat template: pass that "
                "one, or read the document again with Context.read"
            )

    @property
    def after(self) -> str:
        """What follows a question: the rest of the chat template."""
        return self.file.record["prompt"]["after"]


def _file_of(
    model: PreTrainedModel, cache: Cache, tokens: list[int], path: str | Path | None,
    prompt: dict[str, Any] | None = None, consume: bool = False,
) -> ContextFile:  # fmt: skip
    """The file of a cache. consume: empty each layer of the cache when it is written."""
    attached = attachment_of(model)
    selector = None if attached is None else attached.selector
    for layer in cache.layers:
        rows = layer.keys.shape[0] if layer.is_initialized else 1
        require(rows == 1, "batch", rows, "1: a context is one sequence (batch_select_indices)")
    length = cache.get_seq_length()
    require(length == len(tokens), "tokens", len(tokens), f"the cache's {length}")
    kept: dict[int, list[Part]] = {}
    if selector is not None:
        kept = {i: index_parts(i, layer, selector) for i, layer in enumerate(cache.layers)}
    record = {
        "model": states_record(model),
        "model_name": model_name(model),
        "method": method_of(selector) if any(kept.values()) else None,
        "prompt": {"tokenizer": None, "after": ""} | (prompt or {}),
        "layers": [layer_record(i, layer) for i, layer in enumerate(cache.layers)],
        "packages": package_versions(("hashattn", "torch", "transformers")),
    }

    def parts() -> Iterator[Part]:
        for number, layer in enumerate(cache.layers):
            yield from layer_parts(number, layer, consume)
            yield from kept.get(number, ())
        yield Part.of("tokens", torch.tensor(tokens))

    return ContextFile.write(path, record, parts())


def _json(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def _device(module: torch.nn.Module) -> torch.device | None:
    """Where an attention module computes; None where its weights are elsewhere meanwhile."""
    weight = next(module.parameters())
    return None if weight.is_meta else weight.device


def _refuse_shared(model: PreTrainedModel) -> None:
    if shared_by(model) > 1:
        raise UnsupportedModelError(
            "contexts are not kept under tensor parallelism, where each process holds a part of "
            "the heads: load the model on one device"
        )
