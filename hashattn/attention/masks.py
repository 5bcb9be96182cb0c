"""What transformers' mask lets each query row see, and with a budget the plan of its selection."""

import torch
from torch import Tensor

from hashattn.attention.budget import Budget
from hashattn.kernels import causal_spans
from hashattn.selectors.plan import SelectionPlan


def make_plan(
    mask: Tensor | None, batch: int, q_len: int, n: int, device: torch.device, budget: Budget
) -> SelectionPlan:
    """The plan of the last q_len of n cached tokens under transformers' boolean mask.

    mask: (batch or 1, 1, q, at least n) bool; None means causal.
    """
    if mask is None:
        spans = causal_spans(batch, q_len, n, device).contiguous()
    else:
        mask = mask[..., :n]
        spans = spans_of(mask)
        if spans is not None:
            spans, mask = spans.expand(batch, q_len, 2).contiguous(), None
    if spans is not None:
        return spans_plan(spans, n, budget)
    return _plan(mask.sum(dim=-1)[:, 0], batch, n, budget, mask=mask)


def spans_plan(spans: Tensor, n: int, budget: Budget) -> SelectionPlan:
    """The plan of rows that see spans (batch, q, 2) int64 of n cached tokens."""
    return _plan(spans[..., 1] - spans[..., 0], len(spans), n, budget, spans=spans)


def _plan(visible: Tensor, batch: int, n: int, budget: Budget, **tokens: Tensor) -> SelectionPlan:
    heavy = budget.heavy_tokens(visible).expand(batch, visible.shape[1])
    return SelectionPlan(
        n=n,
        sink=budget.sink,
        local=budget.local,
        heavy=heavy[:, None].contiguous(),
        visible=visible,
        width=budget.total(n),
        **tokens,
    )


def spans_of(mask: Tensor) -> Tensor | None:
    """First and last + 1 visible token (batch, q, 2) int64 of a boolean mask (batch, 1, q, n).

    0 and 0 for a row that sees none. None unless every row's visible tokens are contiguous, as with
    padding on the left.
    """
    visible = mask[:, 0]
    count = visible.sum(dim=-1)
    first = visible.to(torch.int8).argmax(dim=-1)
    last = visible.shape[-1] - visible.flip(-1).to(torch.int8).argmax(dim=-1)
    last = torch.where(count > 0, last, first)
    if bool((last - first != count).any()):
        return None
    return torch.stack((first, last), dim=-1)


def static_spans(mask: Tensor, batch: int) -> Tensor:
    """`spans_of` a mask (batch or 1, 1, 1, n) that nobody looks at, so as not to wait for a GPU:
    (batch, 1, 2) int64, with 1 and 0 for a row whose visible tokens are not contiguous."""
    visible, n = mask[:, 0], mask.shape[3]
    places = torch.arange(n, device=mask.device)
    last = torch.where(visible, places + 1, 0).amax(dim=-1)
    first = torch.where(visible, places, n).amin(dim=-1)
    first = torch.minimum(first, last)
    broken = last - first != visible.sum(dim=-1)
    first, last = torch.where(broken, 1, first), torch.where(broken, 0, last)
    return torch.stack((first, last), dim=-1).expand(batch, 1, 2).contiguous()


def tokens_seen(query: Tensor, mask: Tensor | None, n: int) -> float | Tensor:
    """Tokens that the rows of a query (batch, heads, q, head_dim) see, summed over batch and rows.

    mask: transformers' (batch or 1, heads or 1, q, at least n), None for causal rows at the end.
    """
    batch, _, q_len, _ = query.shape
    if mask is None:
        return batch * (q_len * n - q_len * (q_len - 1) / 2)
    visible = _as_bool(mask)[..., :n]
    return visible.sum() * (batch / visible.shape[0] / visible.shape[1])


def visible_tokens(mask: Tensor | None, n: int) -> Tensor | None:
    """Tokens (batch or 1, n) bool that the last row of transformers' mask sees; None for all.

    mask: (batch or 1, heads or 1, q, at least n), boolean or added to the logits.
    """
    return None if mask is None else _as_bool(mask[:, 0, -1, :n])


def _as_bool(mask: Tensor) -> Tensor:
    """True where a row may attend, by transformers' mask, boolean or added to the logits."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
