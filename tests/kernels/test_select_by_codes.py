"""Selection straight from codes, against a stable sort of distances counted bit by bit."""

import pytest
import torch
from torch import Tensor

from hashattn import kernels
from hashattn.kernels import Codes, hamming_scores, layout_for, unpack_bits
from kernel_inputs import BACKENDS, random_codes
from on_device import on_device

select, select_by_codes = map(on_device, (kernels.select, kernels.select_by_codes))


def clustered(keys: Tensor, queries: Tensor) -> Tensor:
    """The best codes side by side: copies of a query in one stretch, its complement elsewhere."""
    best = queries[:, :: queries.shape[1] // keys.shape[1], :1]
    keys = (~best).expand_as(keys).clone()
    middle = keys.shape[2] // 2
    keys[:, :, middle : middle + 9] = best.expand(
        -1, -1, keys[:, :, middle : middle + 9].shape[2], -1
    )
    return keys


def expected(queries, keys, heavy, spans, sink, local, lists) -> list:
    """Lists of token numbers by the definition, in Python integers."""
    batch, heads, rows, words = queries.shape
    budget = heavy.expand(batch, lists, rows)
    group, shared = heads // lists, lists // keys.shape[1]
    found = []
    for b, line, row in torch.cartesian_prod(*map(torch.arange, (batch, lists, rows))).tolist():
        first, last = spans[b, row].tolist()
        low, high = min(first + sink, last), 0
        high = max(last - local, low)
        distance = {
            token: sum(
                ((queries[b, line * group + g, row, w] ^ keys[b, line // shared, token, w]).item()
                 & 0xFFFFFFFF).bit_count()
                for g in range(group)
                for w in range(words)
            )
            for token in range(low, high)
        }  # fmt: skip
        best = sorted(distance, key=lambda token: (distance[token], token))[: budget[b, line, row]]
        found.append([*range(first, low), *sorted(best), *range(high, last)])
    return found


def as_lists(indices: Tensor) -> list:
    rows = indices.reshape(-1, indices.shape[-1]).tolist()
    kept = [[token for token in row if token >= 0] for row in rows]
    assert all(
        row[len(k) :] == [-1] * (len(row) - len(k)) for row, k in zip(rows, kept, strict=True)
    )
    return kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codes", ["random", "all_equal", "clustered"])
@pytest.mark.parametrize(
    ("heads", "code_heads", "lists", "rows", "n", "words"),
    [
        (4, 2, 2, 1, 70, 1),
        (4, 4, 4, 2, 65, 2),
        (6, 2, 6, 1, 64, 1),  # a list per query head over shared codes
        (6, 2, 2, 2, 63, 4),  # odd group
        (5, 1, 1, 1, 130, 8),
        (8, 1, 2, 1, 129, 1),  # two lists over one code head
        (1, 1, 1, 1, 1, 1),
    ],
)
def test_selects_what_a_stable_sort_selects(
    backend, codes, heads, code_heads, lists, rows, n, words
):
    queries = random_codes(2, heads, rows, words)
    keys = random_codes(2, code_heads, n, words, seed=1)
    if codes == "all_equal":
        keys[:] = keys[:, :, :1]
    elif codes == "clustered":
        keys = clustered(keys, queries)
    spans = torch.tensor([[0, n], [n // 3, n - n // 4]])[:, None].repeat(1, rows, 1)
    for heavy in ((0, n), (n // 2, 1), (n + 5, 7)):  # of the two sequences
        budgets = torch.tensor(heavy)[:, None, None].expand(2, 1, rows)
        made = select_by_codes(
            queries, keys, budgets, 3, 5, spans=spans, lists=lists, backend=backend
        )
        want = expected(queries, keys, budgets, spans, 3, 5, lists)
        assert made.dtype == torch.int32 and as_lists(made) == want


@pytest.mark.parametrize("backend", BACKENDS)
def test_budgets_and_spans_differ_between_rows(backend):
    queries, keys = random_codes(3, 4, 3, 1), random_codes(3, 2, 200, 1, seed=1)
    spans = torch.tensor([[[0, 198], [0, 199], [0, 200]], [[150, 198], [150, 199], [150, 200]],
                          [[0, 0], [7, 8], [5, 12]]])  # fmt: skip
    heavy = torch.tensor([[0, 9, 200], [1, 2, 3], [4, 4, 4]])[:, None]
    made = select_by_codes(queries, keys, heavy, 4, 8, spans=spans, backend=backend)
    assert as_lists(made) == expected(queries, keys, heavy, spans, 4, 8, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_budgets_differ_between_lists(backend):
    queries, keys = random_codes(2, 6, 2, 1), random_codes(2, 3, 90, 1, seed=1)
    heavy = torch.tensor([[[0, 1], [50, 7], [90, 3]], [[5, 5], [2, 60], [1, 0]]])
    made = select_by_codes(queries, keys, heavy, 2, 3, backend=backend)
    spans = torch.tensor([[0, 89], [0, 90]]).expand(2, 2, 2)
    assert as_lists(made) == expected(queries, keys, heavy, spans, 2, 3, 3)
    scores = hamming_scores(queries, keys, backend="reference")
    tokens = torch.arange(90)
    seen = (tokens < torch.tensor([[89], [90]]))[None, None]
    mandatory = seen & ((tokens < 2) | (tokens >= torch.tensor([[86], [87]])))[None, None]
    assert as_lists(select(scores, heavy, seen, mandatory, backend=backend)) == as_lists(made)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_select_of_the_scores(backend):
    """The same selection as by way of scores, at a size where nothing is checked by hand."""
    queries, keys = random_codes(1, 8, 1, 1), random_codes(1, 2, 9000, 1, seed=1)
    keys[:, :, ::7] &= 0xFF  # makes ties common
    mandatory = torch.zeros(1, 1, 1, 9000, dtype=torch.bool)
    mandatory[..., :16] = mandatory[..., -64:] = True
    scores = hamming_scores(queries, keys, backend="reference")
    want = select(scores, 281, torch.ones_like(mandatory), mandatory, backend="reference")
    made = select_by_codes(queries, keys, 281, 16, 64, backend=backend)
    assert torch.equal(made, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("group", "words"),
    [(32, 128), (71, 64), (3, 683)],  # sums of up to 131,072, 145,408, 65,568
)
def test_distances_of_more_than_two_bytes(backend, group, words):
    """Wrapped around, the farthest tokens would be the nearest."""
    queries, keys = random_codes(1, group, 1, words), random_codes(1, 1, 40, words, seed=1)
    queries[:] = queries[:, :1]
    keys[:, :, 20:30] = ~queries[:, :1]  # as far as can be
    keys[:, :, 30:] = queries[:, :1]
    keys[:, :, 30:, 0] ^= torch.arange(10, dtype=torch.int32)
    bits = unpack_bits(keys, 32 * words) != unpack_bits(queries[:, :1], 32 * words)
    distance = group * bits.sum(dim=-1).flatten()
    for heavy in (7, 25):
        made = select_by_codes(queries, keys, heavy, 1, 1, backend=backend)
        free = sorted(range(1, 39), key=lambda t: (distance[t].item(), t))[:heavy]
        assert as_lists(made) == [sorted({0, 39, *free})]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_spans_are_causal(backend):
    queries, keys = random_codes(1, 2, 3, 1), random_codes(1, 1, 40, 1, seed=1)
    spans = torch.tensor([[[0, 38], [0, 39], [0, 40]]])
    made = select_by_codes(queries, keys, 6, 1, 2, backend=backend)
    assert as_lists(made) == expected(queries, keys, torch.full((1, 1, 3), 6), spans, 1, 2, 1)


@pytest.mark.parametrize("layout", [layout_for(torch.device(d)) for d in ("cpu", "cuda")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_layout_is_read(backend, layout: type[Codes]):
    queries, keys = random_codes(2, 4, 1, 3), random_codes(2, 2, 301, 3, seed=1)
    store = layout.from_tokens(keys[:, :, :100])
    store.append(keys[:, :, 100:])
    made = select_by_codes(queries, store, 20, 4, 4, width=60, backend=backend)
    want = select_by_codes(queries, keys, 20, 4, 4, backend="reference")
    assert made.shape[-1] == 60 and as_lists(made) == as_lists(want)


def test_invalid_arguments():
    queries, keys = random_codes(1, 4, 1, 1), random_codes(1, 2, 9, 1)
    with pytest.raises(ValueError, match="lists = 3"):
        select_by_codes(queries, keys, 1, 0, 1, lists=3)
    with pytest.raises(ValueError, match="lists = 1"):
        select_by_codes(queries, keys, 1, 0, 1, lists=1)
    with pytest.raises(ValueError, match="sink = -1"):
        select_by_codes(queries, keys, 1, -1, 1)
    with pytest.raises(ValueError, match="heavy: expected"):
        select_by_codes(queries, keys, -1, 0, 1)
    with pytest.raises(ValueError, match=r"\(1, 1 or 2, 1\), got torch.int64 \(1, 3, 1\)"):
        select_by_codes(queries, keys, torch.ones(1, 3, 1, dtype=torch.int64), 0, 1)
    with pytest.raises(ValueError, match="width = 3: must be at least 4"):
        select_by_codes(queries, keys, 2, 1, 1, width=3)
    with pytest.raises(ValueError, match="spans: expected int64"):
        select_by_codes(queries, keys, 2, 1, 1, spans=torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="same bits"):
        select_by_codes(queries, random_codes(1, 2, 9, 2), 1, 0, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_budgets_of_no_rows_select_nothing(backend):
    queries, keys = random_codes(1, 2, 1, 1)[:, :, :0], random_codes(1, 1, 9, 1)
    heavy, spans = torch.zeros(1, 1, 0, dtype=torch.int64), torch.zeros(1, 0, 2, dtype=torch.int64)
    assert select_by_codes(queries, keys, heavy, 1, 1, spans=spans, backend=backend).numel() == 0


@pytest.mark.parametrize(
    ("heavy", "said"), [(-1, "got -1"), (torch.full((1, 1, 1), -3), "least -3")]
)
def test_a_negative_budget_is_named(heavy, said):
    with pytest.raises(ValueError, match=f"heavy: expected a non-negative integer.*{said}"):
        select_by_codes(random_codes(1, 2, 1, 1), random_codes(1, 1, 9, 1), heavy, 1, 1)
