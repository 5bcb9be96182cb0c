"""attach: run a Hugging Face model with sparse attention over its cache.

with attach(model, selector, Budget(density=1/16)) as run:
    model.generate(...)
print(run.receipt.summary())
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from hashattn.attention import step_times
from hashattn.attention.break_even import BreakEven, check_dense_below
from hashattn.attention.budget import Budget
from hashattn.attention.dispatch import register
from hashattn.attention.fallback import Fallback
from hashattn.attention.hooks import install_hooks, previous_of_copy, remove_copied_hooks
from hashattn.attention.memory import LayerMemory, Memory
from hashattn.attention.observer import Observer
from hashattn.attention.passages import Passages
from hashattn.attention.receipt import Receipt
from hashattn.attention.run import NAME, SparseRun
from hashattn.attention.stored import row_format
from hashattn.base.checks import require, require_numbers
from hashattn.base.errors import AttachmentError, HashWeightsError
from hashattn.models.structure import (
    attention_modules,
    attention_shapes,
    full_attention_layers,
    head_slice,
    text_config,
)
from hashattn.models.support import check_model, check_switched, set_text_attention
from hashattn.selectors.base import Selector


@dataclass
class _State:
    """What is installed in a model. It holds no reference to the model, which can be dropped."""

    run: SparseRun
    allow_dense: bool
    previous: str
    fallback: Fallback | None  # as it was given, of all heads
    hooks: list[Any] = field(default_factory=list)
    attached: bool = True
    proved_sparse: bool = False


_ATTACHED: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()


class Attachment:
    """A model with sparse attention; use it as a context manager or call `detach`.

    receipt: what was read since attach or the last `reset_receipt`.
    """

    def __init__(self, model: PreTrainedModel, state: _State) -> None:
        self.model = model
        self._state = state

    @property
    def attached(self) -> bool:
        """Whether the model is still sparse."""
        return self._state.attached

    @property
    def selector(self) -> Selector:
        """The method, for the heads that this process holds."""
        return self._state.run.selector

    @property
    def receipt(self) -> Receipt:
        """The receipt of the current run."""
        return self._state.run.receipt

    def reset_receipt(self) -> Receipt:
        """Start a new receipt and return the finished one."""
        run, finished = self._state.run, self.receipt
        self._state.proved_sparse = self._state.proved_sparse or finished.is_sparse
        run.begin_receipt(finished.fresh())
        return finished

    @contextmanager
    def listen(self, observer: Observer) -> Iterator[Observer]:
        """In a `with` block: tell `observer` of every call of every layer (attention.observer)."""
        run = self._state.run
        run.observers = (*run.observers, observer)
        try:
            yield observer
        finally:
            run.observers = tuple(other for other in run.observers if other is not observer)

    @contextmanager
    def keep(self, tokens: Sequence[int] | Sequence[Sequence[int]]) -> Iterator[None]:
        """In a `with` block: every sparse step reads these tokens whatever the selector says,
        beside its budget (attention.passages).

        tokens: numbers of tokens of the prompt, 0 the first that is no padding, or a list for each
        prompt of a batch; `trust.audit.source.Source.tokens_of` has those of passages of its text.
        One block at a time, which holds for all threads; the receipt says how many were kept. Steps
        over a static cache then leave a compiled graph. ValueError for what is no token number, and
        in a step for a batch of other prompts; AttachmentError inside of another block.
        """
        run, passages = self._state.run, Passages(tokens)
        if run.kept is not None:
            raise AttachmentError("tokens are kept already: name all of them in one keep(...)")
        run.kept = passages
        run.receipt.keeps(passages.most)
        try:
            yield
        finally:
            run.kept = None

    def swap(self, selector: Selector, fallback: Fallback | None = None) -> Receipt:
        """Go on with another selector, such as one with newer hash weights, and a new receipt;
        returns the finished one.

        Caches stay: their keys are encoded again when they are next used, those of an answer in
        the making too. Call it between two steps, or in an observer's `saw`; other threads must not
        be generating. fallback: calibrated for this selector, needed where the attachment has one.
        A measured break-even is kept.
        Raises what attach does for the selector, and ValueError for one that has to observe a
        prompt first or is sparse where this one is not; then nothing has changed.
        """
        run, receipt = self._state.run, self.receipt
        if not self.attached:
            raise AttachmentError("this attachment was detached: call attach again")
        _check_arguments(selector, run.budget, run.sparse_rows, False, receipt.keep_steps)
        fits = selector.sparse == run.selector.sparse and not selector.observes
        like = "sparse" if run.selector.sparse else "dense"
        require(fits, "selector", selector.name, f"{like} and no observer, to be swapped to")
        fallback = self._state.fallback if fallback is None else fallback
        shard = _served(self.model, selector, run.budget, run.dense_layers)
        rule = _ruling(self.model, selector, run.budget, run.dense_layers, fallback)
        finished = self.reset_receipt()
        run.selector, run.fallback, self._state.fallback = shard, rule, fallback
        run.begin_receipt(Receipt.start(
            self.model, selector, run.budget, sparse_rows=run.sparse_rows,
            dense_layers=run.dense_layers, heads=run.heads, keep_steps=receipt.keep_steps,
            fallback=fallback, dense_below=run.dense_below, break_even=run.break_even,
            memory=None if run.storage is None else run.storage.memory,
        ))  # fmt: skip
        return finished

    def detach(self, verify: bool = True) -> None:
        """Restore the model. If `verify`, raises SparsePathError if the run was not sparse (see
        attach), NonFiniteError if keys or values were not finite, AttachmentError if something else
        changed the model's attention in between."""
        if not self.attached:
            return
        changed = self._restore()
        if not verify:
            return
        if changed:
            raise AttachmentError(
                f"the model's attention was set to {changed!r} while sparse attention was "
                "attached, so later calls were not sparse: detach before set_attn_implementation"
            )
        run = self._state.run
        run.finite.verify(run.counts.not_finite())
        run.counts.verify()
        already_proved = self._state.proved_sparse and not self.receipt.decode_calls
        if not already_proved:
            self.receipt.verify(allow_dense=self._state.allow_dense)

    def __enter__(self) -> "Attachment":
        if not self.attached:
            raise AttachmentError("this attachment was detached: call attach again")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach(verify=kind is None)

    def _install(self) -> None:
        state = self._state
        set_text_attention(self.model, NAME)
        _ATTACHED[self.model] = state
        try:
            check_switched(self.model, NAME)
            state.hooks += install_hooks(self.model, state.run, state.previous)
        except BaseException:
            self._restore()
            raise

    def _restore(self) -> str | None:
        """Restore the model; returns the attention that someone else set, which stays, or None."""
        state = self._state
        for hook in state.hooks:
            hook.remove()
        state.hooks.clear()
        current = text_config(self.model)._attn_implementation
        if current == NAME:
            set_text_attention(self.model, state.previous)
        _ATTACHED.pop(self.model, None)
        state.attached = False
        return None if current == NAME else current


def attach(
    model: PreTrainedModel,
    selector: Selector,
    budget: Budget | None = None,
    *,
    sparse_rows: int = 1,
    dense_layers: Collection[int] = (),
    allow_dense: bool = False,
    allow_untrained: bool = False,
    keep_steps: int = 0,
    fallback: Fallback | None = None,
    dense_below: float | str | BreakEven = 0,
    memory: Memory | None = None,
) -> Attachment:
    """Make decoding steps of `model` read only selected tokens; undone by detach.

    budget may be None only for a dense selector. sparse_rows: calls of up to this many query rows
    are sparse, row by row and causal (1: decoding only; a question's length: question and answer;
    the number of drafted tokens and one: assisted decoding). dense_layers: model layers that stay
    dense. allow_dense: accept a run that turns out dense instead of raising SparsePathError on
    detach. allow_untrained: accept random hash weights. keep_steps: how many of the last steps the
    receipt keeps one by one (`Receipt.recent`), beside its sums. fallback: a calibrated rule by
    which every token list reads more than the budget where its head's output would be off
    (hashattn.attention.fallback). dense_below: calls with fewer cached tokens stay dense, and cost
    what they cost the model: their keys are encoded, and checked, when the first longer call needs
    them. A number; or "break_even" for the policy that never loses: the length from which a sparse
    step is no slower is measured (see `measure_break_even`), once a process for this model, method
    and machine; or such a measurement. With the policy a run whose contexts all stayed short raises
    no SparsePathError, and its receipt says so.
    memory: what of K and V stays in fast memory, and in how many bits, for dynamic caches; in the
    model's dtype the tokens are those of a run without it, bit for bit. Rows of layers that are
    never sparse stay as they are. The receipt tells hits, bytes moved and waiting time.

    A call that begins a cache is the prompt's prefill, and so are calls that continue this prompt:
    those that ask for the logits of their last row alone (logits_to_keep=1, as generate does for
    its chunks). Any other call over cached tokens is a step of the receipt: with more rows than
    sparse_rows it is dense, and counts as dense in the density.

    Threads may generate with one attached model. Under tensor parallelism every process attaches
    the same selector, made for all heads; it uses the part for the heads that the process holds,
    and its receipt counts these.

    With budget.sampled the selector has to estimate logits: ValueError where it does not.

    Raises UnsupportedModelError for models outside transformers' attention interface, or whose KV
    heads the processes of tensor parallelism cannot share evenly, AttachmentError when the model is
    attached already, HashWeightsError for untrained weights, FallbackError for a fallback of
    another model, method or budget, ValueError for a method that can have none, MemoryLimitError
    where memory holds less than a step reads, or a disk or a limit is full. Steps raise
    NonFiniteError for keys or values that are NaN or infinite (on a GPU detach does).
    """
    check_dense_below(dense_below)
    _check(model, selector, budget, sparse_rows, dense_layers, allow_untrained, keep_steps)
    register()
    budget = budget if budget is not None else Budget(density=1.0)
    settings = dict(sparse_rows=sparse_rows, dense_layers=dense_layers, fallback=fallback)
    measured = isinstance(dense_below, str | BreakEven)
    allowed = "a number with memory, as a break-even is measured with all rows in fast memory"
    require(memory is None or not measured, "dense_below", dense_below, allowed)
    if isinstance(dense_below, str):
        dense_below = _break_even(model, selector, budget, **settings) if selector.sparse else 0
    run = _new_run(
        model, selector, budget, dense_below, keep_steps=keep_steps, memory=memory, **settings
    )
    previous = text_config(model)._attn_implementation
    attachment = Attachment(model, _State(run, allow_dense, previous, fallback))
    attachment._install()
    return attachment


def measure_break_even(
    model: PreTrainedModel,
    selector: Selector,
    budget: Budget,
    *,
    dense_layers: Collection[int] = (),
    allow_untrained: bool = False,
    fallback: Fallback | None = None,
) -> BreakEven:
    """From which cached length on a sparse step of this model, method and machine is no slower.

    Batch 1, one layer's cache and attention function as decoding runs them (attention.step_times),
    dense as before attach, at three lengths up to 4,096 tokens (65,536 on a GPU, the model's
    positions at most); the number is where the lines through the medians meet. At most 3 seconds
    beyond warming up and one sample of each; a process measures once for a model, method, budget,
    dtype and number of threads. The result is for `attach(..., dense_below=...)`.

    Raises what attach does, and ValueError for a method that has to observe a prompt first.
    """
    _check(model, selector, budget, 1, dense_layers, allow_untrained, 0)
    register()
    return _break_even(model, selector, budget, dense_layers=dense_layers, fallback=fallback)


def _break_even(
    model: PreTrainedModel, selector: Selector, budget: Budget, **settings: Any
) -> BreakEven:
    allowed = "a sparse method that does not observe, for its break-even to be measured"
    require(selector.sparse and not selector.observes, "selector", selector.name, allowed)
    run = _new_run(model, selector, budget, **settings | {"sparse_rows": 1})
    allowed = "without one of the layers with full attention, for a break-even to be measured"
    require(run.full_layers - run.dense_layers, "dense_layers", sorted(run.dense_layers), allowed)
    return step_times.break_even(model, run)


def _new_run(
    model: PreTrainedModel,
    selector: Selector,
    budget: Budget,
    dense_below: float | BreakEven = 0,
    *,
    dense_layers: Collection[int],
    fallback: Fallback | None,
    sparse_rows: int = 1,
    keep_steps: int = 0,
    memory: Memory | None = None,
) -> SparseRun:
    """What an attachment keeps; nothing is installed."""
    measured = dense_below if isinstance(dense_below, BreakEven) else None
    below = dense_below if measured is None else measured.tokens
    heads = head_slice(model)
    run = SparseRun(
        selector=_served(model, selector, budget, dense_layers),
        budget=budget,
        sparse_rows=sparse_rows,
        dense_layers=frozenset(dense_layers),
        full_layers=full_attention_layers(model),
        eager=text_config(model)._attn_implementation == "eager",
        heads=heads,
        receipt=Receipt.start(
            model, selector, budget, sparse_rows=sparse_rows, dense_layers=dense_layers,
            heads=heads, keep_steps=keep_steps, fallback=fallback, dense_below=below,
            break_even=measured, memory=memory,
        ),
        fallback=_ruling(model, selector, budget, dense_layers, fallback),
        dense_below=below,
        break_even=measured,
        storage=_storage(model, selector, budget, dense_layers, memory),
    )  # fmt: skip
    run.receipt.follow(run.counts)
    return run


def _storage(
    model: PreTrainedModel, selector: Selector, budget: Budget, dense_layers: Collection[int],
    memory: Memory | None,
) -> LayerMemory | None:  # fmt: skip
    """Where rows lie; MemoryLimitError where fast memory is too small for any step."""
    if memory is None or not selector.sparse:
        return None
    shapes, heads = attention_shapes(model), head_slice(model)
    storage = LayerMemory(memory, len(set(shapes["layers"]) - set(dense_layers)))
    width = row_format(memory.bits, shapes["head_dim"], model.dtype).width
    storage.check(budget, shapes["kv_heads"] if heads is None else len(heads.kv), width)
    return storage


def _served(
    model: PreTrainedModel, selector: Selector, budget: Budget, dense_layers: Collection[int]
) -> Selector:
    """The selector for the heads of this process, ready for threads; ValueError where tokens shall
    be drawn by a selector that cannot estimate logits."""
    heads = head_slice(model)
    shard = selector if heads is None else selector.shard(heads)
    if budget.sampled:
        for layer in sorted(set(full_attention_layers(model)) - set(dense_layers)):
            shard.require_estimates(layer)
    shard.identity  # noqa: B018, computed now, before threads need it
    return shard


def _ruling(
    model: PreTrainedModel, selector: Selector, budget: Budget, dense_layers: Collection[int],
    fallback: Fallback | None,
) -> Fallback | None:  # fmt: skip
    """The fallback for the heads of this process; its errors where it is of something else."""
    if fallback is None:
        return None
    fallback.require(model, selector, budget, full_attention_layers(model) - set(dense_layers))
    return fallback.shard(head_slice(model))


def detach(model: PreTrainedModel, verify: bool = True) -> None:
    """Restore a model whose attachment is not at hand, or a copy of an attached model.

    The same as `Attachment.detach`; AttachmentError for a model without sparse attention.
    """
    if model in _ATTACHED:
        Attachment(model, _ATTACHED[model]).detach(verify)
    elif not _clean_copy(model):
        raise AttachmentError("this model has no sparse attention: there is nothing to detach")


def attachment_of(model: nn.Module) -> Attachment | None:
    """What is attached to a model, None for nothing."""
    state = _ATTACHED.get(model)
    return None if state is None else Attachment(model, state)


def _clean_copy(model: nn.Module) -> bool:
    """Remove the dead hooks from a copy of an attached model; returns whether it was one."""
    previous = previous_of_copy(model)
    if previous is None:
        return False
    remove_copied_hooks(model)
    if text_config(model)._attn_implementation == NAME:
        set_text_attention(model, previous)
    return True


def _check(
    model: PreTrainedModel,
    selector: Selector,
    budget: Budget | None,
    sparse_rows: int,
    dense_layers: Collection[int],
    allow_untrained: bool,
    keep_steps: int,
) -> None:
    """The errors of attach before anything is made; cleans a copy of an attached model."""
    _check_arguments(selector, budget, sparse_rows, allow_untrained, keep_steps)
    if model in _ATTACHED:
        raise AttachmentError("this model already has sparse attention: call detach first")
    _clean_copy(model)
    check_model(model, NAME)
    layers = {module.layer_idx for module in attention_modules(model)}
    unknown = sorted(set(dense_layers) - layers)
    require(not unknown, "dense_layers", unknown, f"some of the model's layers {sorted(layers)}")


def _check_arguments(
    selector: Selector,
    budget: Budget | None,
    sparse_rows: int,
    allow_untrained: bool,
    keep_steps: int,
) -> None:
    example = "HashSelector(HashWeights.load(path))"
    valid = isinstance(selector, Selector)
    require(valid, "selector", selector, f"a Selector, e.g. {example}")
    needed = f"a Budget for selector {selector.name!r}, e.g. Budget(density=1/16)"
    require(budget is not None or not selector.sparse, "budget", budget, needed)
    counts = {"sparse_rows": 1, "keep_steps": 0}
    require_numbers({"sparse_rows": sparse_rows, "keep_steps": keep_steps}, counts=counts)
    if not selector.trained and not allow_untrained:
        raise HashWeightsError(
            f"selector {selector.name!r} has randomly initialised weights: train them "
            "(hashattn.hashing), or pass allow_untrained=True to measure them as a control"
        )
