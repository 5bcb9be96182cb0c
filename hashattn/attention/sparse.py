"""attach: run a Hugging Face model with sparse attention over its cache.

with attach(model, selector, Budget(density=1/16)) as run:
    model.generate(...)
print(run.receipt.summary())
"""

from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from ..errors import AttachmentError, HashWeightsError
from ..models.structure import (
    CACHE_ARGUMENTS,
    attention_modules,
    full_attention_layers,
    head_slice,
    text_config,
)
from ..selectors.base import Selector
from ..trust.receipt import Receipt
from .budget import Budget
from .cache import indexed_layer
from .forward import CALL, NAME, LayerCall, SparseRun, register
from .support import check_model, check_switched

_ATTACHED: WeakSet[nn.Module] = WeakSet()


class Attachment:
    """A model with sparse attention; use it as a context manager or call `detach`.

    receipt: what was read since attach or the last `reset_receipt`.
    """

    def __init__(self, model: PreTrainedModel, run: SparseRun, allow_dense: bool) -> None:
        self.model = model
        self.attached = False
        self._run = run
        self._allow_dense = allow_dense
        self._proved_sparse = False
        self._hooks: list[Any] = []
        self._previous = ""

    @property
    def receipt(self) -> Receipt:
        """The receipt being written."""
        return self._run.receipt

    def reset_receipt(self) -> Receipt:
        """Start a new receipt and return the finished one."""
        finished = self._run.receipt
        self._proved_sparse = self._proved_sparse or finished.is_sparse
        self._run.receipt = finished.fresh()
        return finished

    def detach(self, verify: bool = True) -> None:
        """Restore the model. Raises SparsePathError if the run was not sparse (see attach)."""
        if not self.attached:
            return
        self._restore()
        nothing_new = self._proved_sparse and not self.receipt.steps
        if verify and not nothing_new:
            self.receipt.verify(allow_dense=self._allow_dense)

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
        self._previous = text_config(self.model)._attn_implementation
        _set_attention(self.model, NAME)
        self.attached = True
        _ATTACHED.add(self.model)
        try:
            check_switched(self.model, NAME)
            for module in attention_modules(self.model):
                hook = module.register_forward_pre_hook(_hand_over(self._run), with_kwargs=True)
                self._hooks.append(hook)
        except BaseException:
            self._restore()
            raise

    def _restore(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        _set_attention(self.model, self._previous)
        _ATTACHED.discard(self.model)
        self.attached = False


def attach(
    model: PreTrainedModel,
    selector: Selector,
    budget: Budget | None = None,
    *,
    sparse_rows: int = 1,
    dense_layers: Collection[int] = (),
    allow_dense: bool = False,
    allow_untrained: bool = False,
) -> Attachment:
    """Make decoding steps of `model` read only selected tokens; undone by detach.

    budget may be None only for a dense selector. sparse_rows: calls of up to this many query rows
    are sparse, row by row and causal (1: decoding only; a question's length: question and answer).
    dense_layers: model layers that stay dense. allow_dense: accept a run that turns out dense
    instead of raising SparsePathError on detach. allow_untrained: accept random hash weights.

    Under tensor parallelism every process attaches the same selector, made for all heads; it takes
    the part of the heads it holds, and its receipt counts these.

    Raises UnsupportedModelError for models outside transformers' attention interface, or whose
    KV heads the processes of tensor parallelism cannot share evenly,
    AttachmentError when the model is attached already, HashWeightsError for untrained weights.
    """
    _check_arguments(selector, budget, sparse_rows, allow_untrained)
    if model in _ATTACHED:
        raise AttachmentError("this model already has sparse attention: call detach first")
    check_model(model, NAME)
    layers = {module.layer_idx for module in attention_modules(model)}
    unknown = sorted(set(dense_layers) - layers)
    if unknown:
        raise ValueError(f"dense_layers={unknown}: the model has attention layers {sorted(layers)}")
    register()
    budget = budget if budget is not None else Budget(density=1.0)
    heads = head_slice(model)
    run = SparseRun(
        selector=selector if heads is None else selector.of_heads(heads),
        budget=budget,
        sparse_rows=sparse_rows,
        dense_layers=frozenset(dense_layers),
        full_layers=full_attention_layers(model),
        eager=text_config(model)._attn_implementation == "eager",
        heads=heads,
        receipt=Receipt.start(
            model, selector, budget, sparse_rows=sparse_rows, dense_layers=dense_layers, heads=heads
        ),
    )
    attachment = Attachment(model, run, allow_dense)
    attachment._install()
    return attachment


def _check_arguments(
    selector: Selector, budget: Budget | None, sparse_rows: int, allow_untrained: bool
) -> None:
    if not isinstance(selector, Selector):
        raise ValueError(
            f"selector={selector!r}: expected a Selector, e.g. HashSelector(HashWeights.load(path))"
        )
    if budget is None and selector.sparse:
        raise ValueError(f"selector {selector.name!r} needs a budget, e.g. Budget(density=1/16)")
    if isinstance(sparse_rows, bool) or not isinstance(sparse_rows, int) or sparse_rows < 1:
        raise ValueError(f"sparse_rows={sparse_rows!r}: must be an integer of at least 1")
    if not selector.trained and not allow_untrained:
        raise HashWeightsError(
            f"selector {selector.name!r} has randomly initialised weights: train them first "
            "(hashattn.hashing), or pass allow_untrained=True to measure them as a control"
        )


def _hand_over(run: SparseRun) -> Callable[[nn.Module, tuple, dict], tuple[tuple, dict]]:
    """Pre-hook of an attention module: pass its cache layer on to the attention function."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        cache = next((kwargs[a] for a in CACHE_ARGUMENTS if kwargs.get(a) is not None), None)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        found = isinstance(cache, Cache)
        whole = module.layer_idx in run.full_layers
        layer = indexed_layer(cache, module.layer_idx, whole) if found else None
        return args, kwargs | {CALL: LayerCall(run, module.layer_idx, layer, found)}

    return hook


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """Switch the text model only: a vision tower has no cache."""
    config, text = model.config, text_config(model)
    if text is config:
        model.set_attn_implementation(name)
        return
    key = next(key for key in config.sub_configs if getattr(config, key, None) is text)
    model.set_attn_implementation({key: name})
