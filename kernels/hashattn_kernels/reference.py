"""Reference kernels in plain torch: they define the results of every other backend."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .codes import Codes, tokens_of
from .coins import LARGEST, SIZE, SURVEYED, Coins
from .coins import table as coin_table
from .maps import Maps
from .quantised import RowFormat, decode, quantise  # noqa: F401

WORD = 32
NON_FINITE = "the key or the value of the newest token holds NaN or infinite numbers"
TOKENS_AT_ONCE = 16_384  # whose bits are expanded to floats at a time


def pack_bits(preactivations: Tensor) -> Tensor:
    """(..., bits) real -> (..., bits // 32) int32; bit i of a word is unit i > 0."""
    ones = (preactivations > 0).unflatten(-1, (-1, WORD)).to(torch.int64)
    shifts = torch.arange(WORD, device=ones.device)
    words = (ones << shifts).sum(dim=-1)
    return words.to(torch.int32)  # wraps: unit 31 becomes the sign bit


SHARE = 65_535  # of the largest pre-activation: from here on grading is integers, on any backend
PARTS = 256  # of a weight, in which the sum of weights is set


def grade_bits(preactivations: Tensor, planes: int, most: int) -> Tensor:
    """(..., bits) real -> (..., bits // 32, 1 + planes) int32: signs, digits of the weights.

    With s the sizes as integers, S their sum and m = `most` less half a unit for every bit's
    rounding, weight_i = round(s_i m / S), where m is less if the largest had too many digits.
    """
    magnitudes = preactivations.float().abs().nan_to_num()  # infinities become the largest number
    largest = magnitudes.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    shares = (magnitudes / largest * SHARE).round().to(torch.int64)
    total = shares.sum(dim=-1, keepdim=True).clamp(min=1)
    room = PARTS * most - PARTS // 2 * preactivations.shape[-1]
    room = (PARTS * (2**planes - 1) * total // SHARE).clamp(max=room)
    weights = (2 * shares * room + PARTS * total) // (2 * PARTS * total)
    digits = [pack_bits((weights >> plane) & 1) for plane in range(planes)]
    return torch.stack([pack_bits(preactivations), *digits], dim=-1)


def grade_step(preactivations: Tensor, planes: int, most: int) -> Tensor:
    """(..., bits) -> (...) float32: what a unit of weight of `grade_bits` stands for."""
    sizes = preactivations.float().abs()
    room = most - preactivations.shape[-1] / 2  # half a unit for every bit's rounding
    return torch.maximum(sizes.sum(dim=-1) / room, sizes.amax(dim=-1) / (2**planes - 1))


def encode_graded(
    x: Tensor, maps: Maps, lists: int, planes: int, most: int
) -> tuple[Tensor, Tensor]:
    """Graded codes (B, lists, n, words, 1 + planes) int32 of x (B, heads, n, in), and their steps
    (B, lists, n) float32."""
    sums = preactivations(x, maps).unflatten(1, (lists, -1)).sum(dim=2)
    return grade_bits(sums, planes, most), grade_step(sums, planes, most)


def unpack_bits(codes: Tensor, bits: int) -> Tensor:
    """(..., words) int32 -> (..., bits) bool, the inverse of pack_bits."""
    shifts = torch.arange(WORD, device=codes.device, dtype=torch.int32)
    return ((codes.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :bits].bool()


ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}


def preactivations(x: Tensor, maps: Maps) -> Tensor:
    """x (..., heads, n, in) -> (..., heads, n, bits) in float32, before the sign is taken.

    Each fold replaces p by p - sign(p) step, what the bits before it leave of a number: the signs
    of p, p - sign(p) s and so on are the digits of a scalar quantiser with levels +-s +-...
    """
    x = x.float()
    for stage, (weight, bias) in enumerate(zip(maps.weights, maps.biases, strict=True)):
        if stage:
            x = ACTIVATIONS[maps.activation](x)
        x = x @ weight + bias[:, None]
    for step in () if maps.steps is None else maps.steps.unbind(1):
        x = x - torch.where(x > 0, step[:, None], -step[:, None])
    return x


def encode(x: Tensor, maps: Maps) -> Tensor:
    """Codes (B, maps, n, words) of x (B, heads, n, in); maps / heads maps read the same head."""
    x = x.repeat_interleave(maps.heads // x.shape[1], 1)
    return pack_bits(preactivations(x, maps))


def popcount(words: Tensor) -> Tensor:
    """Ones in each int32 (Hacker's Delight, figure 5-2); the masks undo sign extension."""
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF


def hamming_scores(query_codes: Tensor, key_codes: Tensor, lists: int) -> Tensor:
    """Matching bits: (B, Hq, q, W) and (B, Hc, n, W) -> (B, lists, q, n) int32.

    A list sums the scores of its Hq / lists query heads; lists / Hc of them read the same codes.
    Graded queries (B, lists, q, W, 1 + planes) weigh the bits.
    """
    if query_codes.dim() == 5:
        return _graded_scores(query_codes, key_codes)
    batch, heads, q_len, words = query_codes.shape
    n = key_codes.shape[2]
    group = heads // lists
    grouped = query_codes.reshape(batch, lists, group, q_len, words)
    shared = key_codes.repeat_interleave(lists // key_codes.shape[1], 1)
    scores = torch.full(
        (batch, lists, q_len, n),
        group * words * WORD,
        dtype=torch.int32,
        device=key_codes.device,
    )
    for word in range(words):  # one word at a time keeps the scratch at (B, lists, q, n)
        keys = shared[:, :, None, :, word]
        for member in range(group):
            scores -= popcount(grouped[:, :, member, :, word, None] ^ keys)
    return scores


def _graded_scores(query_codes: Tensor, key_codes: Tensor) -> Tensor:
    """As a product of signs: half of (the sum of all weights, plus those of matching bits, minus
    those of the others). Whole numbers, exact in float32 up to 2^24."""
    batch, lists, q_len, words, slots = query_codes.shape
    code_heads, bits = key_codes.shape[1], words * WORD
    work = torch.float32 if 2 * bits * (2 ** (slots - 1) - 1) <= 2**24 else torch.float64
    digits = [unpack_bits(query_codes[..., slot], bits) for slot in range(slots)]
    weights = sum(digit.to(work) * 2**plane for plane, digit in enumerate(digits[1:]))
    signed = torch.where(digits[0], weights, -weights).reshape(batch, code_heads, -1, bits)
    parts = [
        signed @ (unpack_bits(part, bits).to(work) * 2 - 1).mT
        for part in key_codes.split(TOKENS_AT_ONCE, dim=2)
    ]
    agreement = torch.cat(parts, dim=-1).reshape(batch, lists, q_len, -1)
    return ((weights.sum(dim=-1, keepdim=True) + agreement) / 2).to(torch.int32)


def token_sets(spans: Tensor, n: int, sink: int, local: int) -> tuple[Tensor, Tensor]:
    """(visible, mandatory) of spans (B, q, 2), both (B, 1, q, n) bool: all tokens of a span, and
    its first `sink` and last `local`."""
    tokens = torch.arange(n, device=spans.device)
    first, last = spans[..., :1], spans[..., 1:]
    visible = (tokens >= first) & (tokens < last)
    fixed = (tokens < first + sink) | (tokens >= last - local)
    return visible[:, None], (visible & fixed)[:, None]


def select_by_codes(
    query_codes: Tensor,
    key_codes: Tensor | Codes,
    heavy: Tensor,
    spans: Tensor,
    sink: int,
    local: int,
    lists: int,
    width: int,
    most: int | None = None,
) -> Tensor:
    """`select` by `hamming_scores` among the tokens of spans (B, q, 2) -> (B, lists, q, width)
    int32. heavy (B, lists, q) int64; codes as in `hamming_scores`. `most` is of no use here."""
    key_codes = tokens_of(key_codes)
    scores = hamming_scores(query_codes, key_codes, lists)
    visible, mandatory = token_sets(spans, key_codes.shape[2], sink, local)
    indices = select(scores, heavy, visible, mandatory)
    return F.pad(indices, (0, width - indices.shape[-1]), value=-1)


def select(scores: Tensor, k: Tensor, candidates: Tensor, mandatory: Tensor) -> Tensor:
    """All `mandatory` tokens and the k best candidates -> (B, L, q, m) int32, ascending.

    scores (B, L, q, n); k (B, L, q) int64; candidates, mandatory (B or 1, 1 or L, q or 1, n) bool.
    Threshold at the k-th best value, then a prefix count over the tokens that equal it, so the
    lowest indices win ties whatever order a sort returns.
    """
    candidates = candidates & ~mandatory
    if scores.is_floating_point():
        candidates = candidates & (scores != -torch.inf)
    candidates = candidates.expand(scores.shape)
    k = torch.minimum(k, candidates.sum(dim=-1))
    floor = -torch.inf if scores.is_floating_point() else torch.iinfo(scores.dtype).min
    masked = torch.where(candidates, scores, floor)
    widest = int(k.max()) if k.numel() else 0
    if widest:
        best = masked.topk(widest, dim=-1).values
        threshold = best.gather(-1, (k - 1).clamp(min=0).unsqueeze(-1))
        above = candidates & (masked > threshold)
        level = candidates & (masked == threshold)
        room = (k - above.sum(dim=-1)).unsqueeze(-1)
        heavy = (above | (level & (level.cumsum(dim=-1) <= room))) & (k.unsqueeze(-1) > 0)
    else:
        heavy = torch.zeros_like(candidates)
    return mask_to_indices(heavy | mandatory)


def mask_to_indices(mask: Tensor) -> Tensor:
    """(..., n) bool -> (..., m) int32 positions of the true entries, ascending, -1 padded."""
    rows = mask.reshape(-1, mask.shape[-1])
    counts = rows.sum(dim=-1)
    width = int(counts.max()) if counts.numel() else 0
    row, token = rows.nonzero(as_tuple=True)
    starts = counts.cumsum(0) - counts
    slot = torch.arange(row.numel(), device=row.device) - starts[row]
    indices = torch.full((rows.shape[0], width), -1, dtype=torch.int32, device=rows.device)
    indices[row, slot] = token.to(torch.int32)
    return indices.reshape(*mask.shape[:-1], width)


def indices_to_mask(indices: Tensor, n: int) -> Tensor:
    """(..., m) int32, -1 padded -> (..., n) bool: the tokens that are listed."""
    mask = torch.zeros(*indices.shape[:-1], n + 1, dtype=torch.bool, device=indices.device)
    slots = torch.where(indices < 0, n, indices).long()  # the padding lands in a spare column
    return mask.scatter_(-1, slots, True)[..., :n]


def gather_tokens(states: Tensor, indices: Tensor) -> Tensor:
    """(B, Hkv, n, D) and indices (B, L, q, m) -> (B, L, q, m, D); padding repeats token 0.

    One index_select from the memory seen as rows: it neither repeats K and V for the query heads of
    a group nor copies them where they are views of a larger buffer.
    """
    batch, kv_heads, n, dim = states.shape
    lists = indices.shape[1]
    if states.stride(3) != 1 or any(step % dim for step in states.stride()[:3]):
        states = states.contiguous()
    steps = [step // dim for step in states.stride()[:3]]
    start, end = states.storage_offset(), states.untyped_storage().nbytes() // states.element_size()
    rows = states.as_strided(((end - start) // dim, dim), (dim, 1))
    head = torch.arange(lists, device=states.device) // (lists // kv_heads)
    base = torch.arange(batch, device=states.device)[:, None] * steps[0] + head * steps[1]
    flat = indices.clamp(min=0).to(torch.int64) * steps[2] + base[:, :, None, None]
    return rows.index_select(0, flat.reshape(-1)).reshape(*indices.shape, dim)


def working_dtype(q: Tensor) -> torch.dtype:
    """Softmax precision: float32, or float64 for float64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap), as in Gemma 2; unchanged for None."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def listed_softmax(logits: Tensor, unlisted: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax of logits (..., n) without the unlisted tokens, and the log of its sum (...).

    unlisted: bool, broadcast to logits. A row that lists no token, such as a query of padding, gets
    zeros and -inf instead of NaN. One whose listed logits are all -inf gets NaN, as in torch,
    unless sinks take all the weight.
    """
    logits = logits.masked_fill(unlisted, -torch.inf)
    lse = logits.logsumexp(dim=-1)
    weightless = unlisted if sinks is None else logits == -torch.inf
    return logits.softmax(dim=-1).masked_fill(weightless, 0), lse


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Let extra logits, sinks (heads,), join the softmax sum: they take weight and have no value.

    out (B, heads, q, Dv) and lse (B, heads, q) without them -> both with them.
    """
    if sinks is None:
        return out, lse
    sinks = sinks.to(lse.dtype)[:, None]
    sinks = sinks.masked_fill(sinks == torch.inf, torch.nan)  # inf - inf, as in a softmax over all
    return out * torch.sigmoid(lse - sinks)[..., None], torch.logaddexp(lse, sinks)


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention from that over parts of the tokens: outputs (parts, B, heads, q, Dv) and logs of
    softmax sums (parts, B, heads, q) -> both of all tokens. Zeros where none has weight."""
    total = lses.logsumexp(dim=0)
    shares = (lses - total).exp().masked_fill(total == -torch.inf, 0)
    return (outs * shares[..., None]).sum(dim=0), total


def union(indices: Tensor, lists: int, n: int) -> Tensor:
    """Union of the lists of each group: (B, L, q, m) -> (B, lists, q, at most m L / lists)."""
    batch, lists_before, q_len, width = indices.shape
    grouped = indices.reshape(batch, lists, lists_before // lists, q_len, width).transpose(2, 3)
    return mask_to_indices(indices_to_mask(grouped.flatten(3), n))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    log_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed tokens only -> (B, Hq, q, Dv) and log-sum-exp (B, Hq, q).

    q (B, Hq, q, D), k (B, Hkv, n, D), v (B, Hkv, n, Dv); indices (B, L, q, m) int32 and log_weights
    like them; sinks (Hq,).
    """
    work = working_dtype(q)
    gathered = (gather_tokens(states, indices).to(work) for states in (k, v))
    return _attend_gathered(q, *gathered, indices, scaling, softcap, sinks, log_weights)


def attend_rows(
    q: Tensor,
    rows: Tensor,
    row_format: RowFormat,
    indices: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    log_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend` over rows (B, Hkv, n, width) uint8, for rotated q (B, Hq, q, D) float32 -> rotated
    output (B, Hq, q, Dv) float32 and log-sum-exp."""
    gathered = decode(gather_tokens(rows, indices), row_format)
    return _attend_gathered(q, *gathered, indices, scaling, softcap, sinks, log_weights)


def _attend_gathered(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    log_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`attend` for the keys (B, L, q, m, D) and values (B, L, q, m, Dv) of the listed tokens."""
    batch, heads, q_len, dim = q.shape
    lists, work = indices.shape[1], working_dtype(q)
    queries = q.reshape(batch, lists, heads // lists, q_len, dim).transpose(2, 3).to(work)
    padding = indices < 0
    if padding.any():  # its weight is 0, and 0 * NaN is NaN
        values = values.masked_fill(padding[..., None], 0)
    logits = cap_logits(queries @ keys.transpose(-1, -2) * scaling, softcap)  # (B, L, q, r, m)
    if log_weights is not None:
        logits = logits + log_weights[:, :, :, None].to(work)
    weights, lse = listed_softmax(logits, padding[:, :, :, None], sinks)
    out = (weights @ values).transpose(2, 3).reshape(batch, heads, q_len, values.shape[-1])
    lse = lse.transpose(2, 3).reshape(batch, heads, q_len)
    out, lse = add_sinks(out, lse, sinks)
    return out.to(q.dtype), lse


def attend_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    unlisted: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`attend` as one dense product; unlisted (B or 1, lists, q, n) bool: tokens left out."""
    batch, heads, q_len, dim = q.shape
    kv_heads, n = k.shape[1:3]
    lists = unlisted.shape[1]
    work = working_dtype(q)
    stacked = q.reshape(batch, kv_heads, -1, dim).to(work)
    logits = cap_logits(stacked @ k.to(work).transpose(-1, -2) * scaling, softcap)
    logits = logits.reshape(batch, lists, heads // lists, q_len, n)
    weights, lse = listed_softmax(logits, unlisted[:, :, None], sinks)
    out = _weighted(weights, unlisted, v.to(work))
    out, lse = out.reshape(batch, heads, q_len, -1), lse.reshape(batch, heads, q_len)
    out, lse = add_sinks(out, lse, sinks)
    return out.to(q.dtype), lse


def _weighted(weights: Tensor, unlisted: Tensor, v: Tensor) -> Tensor:
    """weights (B, lists, r, q, n) times values, (B, KV heads, rows, Dv), whatever is unlisted.

    The weight of an unlisted token is 0, but 0 times an infinity or NaN is NaN: such a value counts
    as 0 where only unlisted tokens have one.
    """
    kv_heads, n = v.shape[1:3]
    rows = weights.reshape(len(v), kv_heads, -1, n)
    out = rows @ v
    if out.isfinite().all():
        return out
    listed = (~unlisted)[:, :, None].expand_as(weights).reshape(rows.shape)
    non_finite = ~v.isfinite()
    reached = listed.to(v.dtype) @ non_finite.to(v.dtype) > 0
    return torch.where(reached, out, rows @ v.masked_fill(non_finite, 0))


def dense_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens of spans (B, q, 2), all if None; else as `attend`."""
    n = k.shape[2]
    if spans is None:
        spans = torch.tensor([0, n], device=q.device).expand(q.shape[0], q.shape[2], 2)
    visible, _ = token_sets(spans, n, 0, 0)
    unlisted = ~visible.expand(-1, k.shape[1], -1, -1)
    return attend_masked(q, k, v, unlisted, scaling, softcap, sinks)


def sample(
    costs: Tensor,
    certain: Tensor,
    drawn: Tensor,
    trust: int,
    coins: Tensor,
    candidates: Tensor,
    mandatory: Tensor,
    threshold: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Indices (B, L, q, m) int32 of what is read, and log weights like them, float32.

    costs (B, L, q, n) int64: minus the logarithm of the tokens' weights, up to a constant of the
    row, in 1 / NAT nats; certain and drawn (B, L, q) int64. All mandatory tokens are read and the
    `certain` other candidates of the least cost; of the rest, each whose coin is at least
    min(cost - tau, cap): tau is the largest number with which no more than `drawn` are expected,
    cap the largest with a chance of trust / SIZE times drawn / (how many are not certain).
    threshold: a backend's own search for tau, `_threshold` of the same arguments.
    """
    threshold = threshold or _threshold
    candidates = (candidates & ~mandatory).expand(costs.shape)
    best = indices_to_mask(select(-costs, certain, candidates, mandatory), costs.shape[-1])
    best_free = best & candidates
    caps = _caps((candidates & ~best).sum(dim=-1), drawn, trust)
    tau = threshold(costs, _counts(costs, candidates, best_free), drawn, caps)
    over = torch.minimum((costs - tau[..., None]).clamp(min=0), caps[..., None])
    read = candidates & (coins >= over) & (drawn > 0)[..., None]
    indices = mask_to_indices(best | read)
    weights = coin_table(costs.device, "LOG_WEIGHTS")[over].masked_fill(best, 0)
    return indices, weights.gather(-1, indices.clamp(min=0).long()).masked_fill(indices < 0, 0)


def _caps(rest: Tensor, drawn: Tensor, trust: int) -> Tensor:
    """The cap of `sample`, int64 like rest and drawn."""
    falling = coin_table(rest.device, "CHANCES")
    least = -(-(trust * drawn) // rest.clamp(min=1))
    return (falling.numel() - 1 - torch.searchsorted(falling.flip(0), least)).clamp(min=0)


def _counts(costs: Tensor, candidates: Tensor, best: Tensor) -> Tensor:
    """For how many tokens each stands, (B, L, q, n) int64, when `sample` counts what it expects.

    Every stride-th candidate stands for `stride`, since no choice of tau makes a bias; candidates
    that tie with the last certain one all count.
    """
    rest = candidates & ~best
    size = candidates.sum(dim=-1, keepdim=True)
    stride = (-(-size // SURVEYED)).clamp(min=1)
    last = costs.masked_fill(~best, torch.iinfo(costs.dtype).min).amax(dim=-1, keepdim=True)
    surveyed = rest & (costs > last) & ((candidates.cumsum(dim=-1) - 1) % stride == 0)
    return torch.where(surveyed, stride, 0) + (rest & (costs == last))


def _threshold(costs: Tensor, counts: Tensor, drawn: Tensor, caps: Tensor) -> Tensor:
    """tau (B, L, q) int64 of `sample`, by bisection."""
    chances = coin_table(costs.device, "CHANCES")
    shown = costs.masked_fill(counts == 0, 0)
    low, high = shown.amin(dim=-1) - LARGEST - 1, shown.amax(dim=-1)
    while bool((low < high).any()):
        middle = low + (high - low + 1) // 2
        over = torch.minimum((costs - middle[..., None]).clamp(min=0), caps[..., None])
        fits = (chances[over] * counts).sum(dim=-1) <= drawn * SIZE
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
    return low


def sample_by_codes(
    query_codes: Tensor,
    key_codes: Tensor | Codes,
    units: Tensor,
    certain: Tensor,
    drawn: Tensor,
    trust: int,
    coins: Coins,
    spans: Tensor,
    sink: int,
    local: int,
    width: int,
    most: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`sample` by the distances of codes times `units` (B, lists, q) int64, among the tokens of
    spans -> (B, lists, q, width) int32 and float32. What `width` cannot hold is left out."""
    key_codes = tokens_of(key_codes)
    lists, n = units.shape[1], key_codes.shape[2]
    matching = hamming_scores(query_codes, key_codes, lists).long()
    costs = (_total(query_codes, lists)[..., None] - matching) * units[..., None]
    visible, mandatory = token_sets(spans, n, sink, local)
    steps = spans[..., 1] - spans[..., 0]
    faces = [
        coins.of(lists, steps[:, row : row + 1], _places(spans[:, row, 0], n))
        for row in range(spans.shape[1])
    ]
    indices, weights = sample(
        costs, certain, drawn, trust, torch.cat(faces, dim=2), visible, mandatory
    )
    room = width - indices.shape[-1]
    return F.pad(indices, (0, room), value=-1), F.pad(weights, (0, room))


def _places(first: Tensor, n: int) -> Tensor:
    """How far tokens (batch, n) lie behind the first that a row sees; 0 for those before it."""
    return (torch.arange(n, device=first.device) - first[:, None]).clamp(min=0)


def _total(query_codes: Tensor, lists: int) -> Tensor:
    """The score of a key whose bits all match, (B, lists, q) int64."""
    if query_codes.dim() == 4:
        batch, heads, q_len, words = query_codes.shape
        return torch.full((batch, lists, q_len), heads // lists * words * WORD)
    words, slots = query_codes.shape[-2:]
    weights = sum(
        popcount(query_codes[..., 1 + plane]).sum(dim=-1) << plane for plane in range(slots - 1)
    )
    return weights.long()
