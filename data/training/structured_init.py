"""A starting point for the embedded model: stock Llama weights in an n-gram induction circuit.

From a random initialisation, no retrieval is learned in CPU-hours at this size; this layout
retrieves at once, and training improves it (data/embedded/README.md: what the layout scores alone).

The residual stream is cut into five code blocks and a constant direction:

    own | token t-1 | token t-2 | token t-3 | answer | constant

* embedding: a random code in `own`, plus the constant;
* layer 0: heads look exactly 1, 2 and 3 tokens back (queries and keys read only the constant, the
  fast RoPE pairs give the offset) and copy `own` into the block of that offset;
* later layers: the query is (own, t-1, t-2), the key (t-1, t-2, t-3), both placed in RoPE pairs too
  slow to turn within the context, so a head attends where the last three tokens occurred before,
  and copies the token there into `answer`;
* the output head reads `answer`.
"""

import torch
from transformers import LlamaForCausalLM

BLOCK = 48  # dimensions of one code block
OWN, ANSWER = 0, 4
CONSTANT = 5 * BLOCK
SHIFTS = (1, 2, 3)
FAST_PAIRS = 4
MAX_TURN = 1.0  # radians a "slow" RoPE pair may turn within the context
CODE_NORM = 8.0  # length of a token's code, and of the constant
SHIFT_LOGIT = 60.0  # attention logit of layer 0 at the exact offset
MATCH_LOGIT = 20.0  # attention logit of a full three-token match
OUTPUT_SCALE = 2.5
ANSWER_NORM = 16.0
NOISE = 0.02


def _block(index: int) -> slice:
    return slice(index * BLOCK, (index + 1) * BLOCK)


def _orthonormal(rows: int, columns: int) -> torch.Tensor:
    """(rows, columns) with orthonormal rows; rows <= columns."""
    return torch.linalg.qr(torch.randn(columns, rows))[0].T


@torch.no_grad()
def structure(model: LlamaForCausalLM, seed: int = 0) -> None:
    """Write the layout above into `model`, in place."""
    torch.manual_seed(seed)
    config = model.config
    if config.hidden_size <= CONSTANT or config.head_dim < BLOCK:
        raise ValueError(f"needs hidden_size > {CONSTANT} and head_dim >= {BLOCK}")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.0 if "down_proj" in name else NOISE)
    codes = torch.nn.functional.normalize(torch.randn(config.vocab_size, BLOCK), dim=-1)
    embedding = model.model.embed_tokens.weight
    embedding.zero_()
    embedding[:, _block(OWN)] = CODE_NORM * codes
    embedding[:, CONSTANT] = CODE_NORM
    model.lm_head.weight.normal_(std=NOISE)
    model.lm_head.weight[:, _block(ANSWER)] += OUTPUT_SCALE * codes
    frequencies = model.model.rotary_emb.inv_freq
    for mlp in (layer.mlp for layer in model.model.layers):
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight.normal_(std=config.hidden_size**-0.5)
    _shift_layer(model.model.layers[0].self_attn, config, frequencies)
    for layer in model.model.layers[1:]:
        _match_layer(layer.self_attn, config, frequencies)


def _shift_layer(attention, config, frequencies: torch.Tensor) -> None:
    head_dim, half = config.head_dim, config.head_dim // 2
    fast = frequencies[:FAST_PAIRS]
    norm = (config.hidden_size / 2) ** 0.5  # length of the constant (and the code) after the norm
    gain = (SHIFT_LOGIT * head_dim**0.5 / FAST_PAIRS) ** 0.5 / norm
    heads_per_shift = [0] * len(SHIFTS)
    for head in range(config.num_attention_heads):
        heads_per_shift[head % len(SHIFTS)] += 1
    for kv_head in range(config.num_key_value_heads):
        start = kv_head * head_dim
        attention.k_proj.weight[start : start + FAST_PAIRS, CONSTANT] += gain
        value = attention.v_proj.weight[start : start + BLOCK, _block(OWN)]
        value += torch.eye(BLOCK)
    for head in range(config.num_attention_heads):
        which, start = head % len(SHIFTS), head * head_dim
        turn = -fast * SHIFTS[which]
        query = attention.q_proj.weight
        query[start : start + FAST_PAIRS, CONSTANT] += gain * turn.cos()
        query[start + half : start + half + FAST_PAIRS, CONSTANT] += gain * turn.sin()
        output = attention.o_proj.weight[_block(which + 1), start : start + BLOCK]
        output += torch.eye(BLOCK) * CODE_NORM / norm / heads_per_shift[which]


def _match_layer(attention, config, frequencies: torch.Tensor) -> None:
    head_dim, half = config.head_dim, config.head_dim // 2
    group = config.num_attention_heads // config.num_key_value_heads
    slow = (frequencies * config.max_position_embeddings <= MAX_TURN).nonzero()[:, 0]
    norm = (config.hidden_size / 5) ** 0.5  # length of each code after the norm: five equal parts
    heads, layers = config.num_attention_heads, config.num_hidden_layers - 1
    for kv_head in range(config.num_key_value_heads):
        key = torch.zeros(head_dim, config.hidden_size)
        query = torch.zeros(head_dim, config.hidden_size)
        order = slow[torch.randperm(len(slow))]
        for slot, pairs in enumerate(order.chunk(len(SHIFTS))):
            rows = torch.cat((pairs, pairs + half))
            projection = _orthonormal(len(rows), BLOCK)
            query[rows, _block(slot)] = projection
            key[rows, _block(slot + 1)] = projection
        matched = norm**2 * 2 * len(slow) / BLOCK  # q.k of a full match before the gain
        gain = (MATCH_LOGIT * head_dim**0.5 / matched) ** 0.5
        start = kv_head * head_dim
        attention.k_proj.weight[start : start + head_dim] += gain * key
        value = attention.v_proj.weight[start : start + BLOCK, _block(OWN)]
        value += torch.eye(BLOCK)
        for head in range(kv_head * group, (kv_head + 1) * group):
            at = head * head_dim
            attention.q_proj.weight[at : at + head_dim] += gain * query
            output = attention.o_proj.weight[_block(ANSWER), at : at + BLOCK]
            output += torch.eye(BLOCK) * ANSWER_NORM / norm / heads / layers
