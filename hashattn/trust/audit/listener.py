"""Audit: what every layer and head read for each answer token, and what dense attention would.

audit = Audit(tokenizer, prompt, file="answer.audit")
with attach(model, selector, Budget(density=1/16)) as run, run.listen(audit):
    model.generate(**inputs, streamer=audit)
save_page(audit.evidence, "answer.html")
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hashattn.base.checks import require_numbers
from hashattn.trust.audit.evidence import (
    FULL,
    TOKENS,
    UNAUDITED,
    Evidence,
    LayerEvidence,
    header_frame,
)
from hashattn.trust.audit.frames import Frame, FrameLog, frame_bytes
from hashattn.trust.audit.source import AuditError, Document, Source
from hashattn.trust.exact import row_weights

if TYPE_CHECKING:
    from hashattn.attention.observer import LayerStep

_PROMPT = ("prefill", "no_cache")  # reasons of calls that read a prompt
_NOT_AUDITED = {
    "sliding_window": "reads a sliding window, as the model does by itself",
    "unsupported_mask": "its mask adds numbers to the logits, or differs by head",
    "position_bias": "adds a bias by position to the logits",
    "unsupported_cache": "its keys are in a cache that is not indexed",
}


@dataclass(frozen=True)
class AuditSettings:
    """What an audit keeps.

    top: heaviest tokens of each kind kept for a head and step. passages: at most how many the
    prompt is cut into (`Source.of`). every: audits the first answer token it can, and from there
    each every-th. ceiling: most bytes of evidence; at the first layer that would go over it the
    audit stops, and says so in the evidence. The run goes on.

    A step keeps of each layer, at most and before compression, `step_bytes`; only the layer in hand
    is in memory where the audit has a file. The defaults for 8,192 tokens, 200 steps and 32 layers
    of 32 query heads: 410 MB with a list of tokens for each query head, 252 MB with one for each of
    8 KV heads, before compression; the ceiling holds for what is stored, after it.
    """

    top: int = 8
    passages: int = 128
    every: int = 1
    ceiling: int = 256 << 20

    def __post_init__(self) -> None:
        require_numbers(asdict(self), counts=dict.fromkeys(asdict(self), 1))

    def step_bytes(self, n: int, heads: int, lists: int, segments: int | None = None) -> int:
        """Most bytes of one layer's evidence of one step over n cached tokens, before compression,
        without the few bytes that describe it.

        segments: passages and two more, `passages` + 2 if None.
        """
        segments = self.passages + 2 if segments is None else segments
        weights = 3 * 2 * segments  # half-precision, three kinds
        tokens = 3 * self.top * (4 + 2 + 2)  # position, read, dense
        return lists * -(-n // 8) + heads * (4 + weights + tokens)


class Audit:
    """A listener (`Attachment.listen`) that keeps the evidence of one answer to one prompt.

    text: the prompt as it was tokenised, chat template and all. ids: the model's input, if it is
    not `tokenizer(text)`. documents: parts of the text that came from files (see find_documents);
    positions in the evidence then count from the start of those files. file: where evidence is
    appended layer by layer, so that a killed process loses the step in hand at most
    (`Evidence.load` reads it); None keeps it in memory.

    Pass it to `model.generate` as `streamer` too, or call `put` with what generate returned: it
    then knows the answer's tokens, and checks that the prompt is the one it was told.

    Audited is every call that follows the prompt, and the prompt's last row where it is no prefill:
    exact attention of all heads over all keys, so an audited step costs about that of a dense one
    once more. Nothing changes in what the model reads. One sequence at a time: AuditError for more;
    of threads that share the attachment, the first that calls or puts.
    Under tensor parallelism it sees the heads of its process.
    """

    timed = False

    def __init__(
        self,
        tokenizer: Any,
        text: str,
        *,
        ids: Sequence[int] | Tensor | None = None,
        documents: Sequence[Document] = (),
        file: str | os.PathLike | None = None,
        settings: AuditSettings | None = None,
    ) -> None:
        self.settings = AuditSettings() if settings is None else settings
        self.source = Source.of(tokenizer, text, ids, documents, self.settings.passages)
        self._tokenizer = tokenizer
        self._log = FrameLog(file)
        self._log.append(header_frame(self.source, asdict(self.settings)))
        self._segments = torch.empty(0, dtype=torch.int64)
        self._unaudited: set[int] = set()
        self._first: int | None = None  # number of the first audited answer token
        self._answered = 0  # answer tokens that were put
        self._prompted = False  # whether the sequence with the prompt was
        self._thread: int | None = None
        self._full = False

    @property
    def evidence(self) -> Evidence:
        """What was kept so far."""
        return Evidence(self._log.content(), str(self._log.path or "evidence"))

    def saw(self, step: LayerStep) -> None:
        """Keep what a call of a layer read for answer tokens (hashattn.attention.observer)."""
        if not self._is_mine():
            return
        if step.query.shape[0] != 1:
            raise AuditError(
                f"an audit is of one sequence, and this call has {step.query.shape[0]}: generate "
                "with a batch of 1 and one beam"
            )
        if step.reason in _PROMPT:
            self._check_prompt(step)
        elif step.reason in _NOT_AUDITED:
            self._leave_out(step.layer, step.reason)
        else:
            rows = step.query.shape[2]
            for row in range(rows):
                token = step.n - rows + row - (len(self.source.ids) - 1)
                if token >= 0 and self._is_due(token) and not self._full:
                    self._keep(self._evidence(step, row, token))

    def put(self, ids: Tensor) -> None:
        """Tell the audit tokens, as generate tells a streamer: the sequence so far (1, n), or the
        answer's next (n,). AuditError if a sequence does not begin with the prompt."""
        self._is_mine()
        ids = torch.as_tensor(ids)
        answer = ids.reshape(-1).tolist()
        if ids.dim() > 1:
            prompt = list(self.source.ids)
            if len(ids) == 1 and answer[: len(prompt)] == prompt:
                answer, self._prompted = answer[len(prompt) + self._answered :], True
            elif len(ids) != 1 or not self._prompted:  # several at a time: drafts that were right
                raise AuditError(
                    f"the model was given a sequence of shape {tuple(ids.shape)} that does not "
                    f"begin with the {len(prompt)} tokens of the audit's text: give Audit the text "
                    "of this prompt, and its ids"
                )
        if answer:
            pairs = [(token, self._tokenizer.decode([token])) for token in answer]
            self._log.append(Frame(TOKENS, self._answered, 0, json.dumps(pairs).encode()))
            self._answered += len(answer)

    def end(self) -> None:
        """The end of generate's stream; nothing to do."""

    def _is_mine(self) -> bool:
        """Whether this is the thread of the answer: the first that calls."""
        me = threading.get_ident()
        self._thread = me if self._thread is None else self._thread
        return self._thread == me

    def _check_prompt(self, step: LayerStep) -> None:
        if self._first is not None:
            raise AuditError("this audit has its answer: make a new Audit for every generate")
        if step.n > len(self.source.ids):
            raise AuditError(
                f"the model reads a prompt of at least {step.n} tokens, and the audit's text has "
                f"{len(self.source.ids)}: give Audit the text of this prompt, and its ids"
            )

    def _is_due(self, token: int) -> bool:
        if self._first is None:
            if token > 1:
                raise AuditError(
                    f"{token - 1} tokens after the audit's text were cached before it listened: "
                    "listen before generate, and give Audit the text of all that is cached"
                )
            self._first = token
        return (token - self._first) % self.settings.every == 0

    def _leave_out(self, layer: int, reason: str) -> None:
        if layer not in self._unaudited:
            self._unaudited.add(layer)
            self._log.append(Frame(UNAUDITED, 0, layer, _NOT_AUDITED[reason].encode()))

    def _keep(self, evidence: LayerEvidence) -> None:
        frame = evidence.to_frame()
        if self._log.size + len(frame_bytes(frame)) > self.settings.ceiling:
            self._full = True
            frame = Frame(FULL, evidence.token, evidence.layer, b"")
        self._log.append(frame)

    @torch.no_grad()
    def _evidence(self, step: LayerStep, row: int, token: int) -> LayerEvidence:
        weights = row_weights(step, row)
        kinds = torch.stack((weights.read, weights.dense, weights.missed))  # (3, heads, n)
        segments = self._segment_numbers(step.n, kinds.device)
        sums = kinds.new_zeros(*kinds.shape[:2], len(self.source.passages) + 2)
        sums.index_add_(-1, segments, kinds)
        best = kinds.topk(min(self.settings.top, step.n), dim=-1)
        top = best.indices.masked_fill(best.values <= 0, -1)
        read, dense = (kinds[kind].expand_as(kinds).gather(-1, best.indices) for kind in (0, 1))
        return LayerEvidence(
            token=token,
            layer=step.layer,
            n=step.n,
            reason=step.reason,
            listed=weights.listed.cpu().numpy(),
            missed=weights.missed.sum(-1).cpu().numpy(),
            masses=_half(sums),
            top=top.to(torch.int32).cpu().numpy(),
            top_read=_half(read),
            top_dense=_half(dense),
        )

    def _segment_numbers(self, n: int, device: torch.device) -> Tensor:
        """`Source.segments` of n tokens, kept on the device with room for later steps."""
        if len(self._segments) < n or self._segments.device != device:
            room = max(n, len(self.source.ids)) + 1024
            self._segments = torch.from_numpy(self.source.segments(room)).to(device)
        return self._segments[:n]


def _half(values: Tensor) -> np.ndarray:
    return values.half().cpu().numpy()
