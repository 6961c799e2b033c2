"""What a prompt costs, by counting: multiplications, and bytes of weights."""

from __future__ import annotations

from pop_ext.checkpoints.families import ModelSpec


def visible_pairs(tokens: int, window: int) -> int:
    """Query-key pairs of causal attention, with the last `window` keys visible (0: all)."""
    short = min(tokens, window or tokens)
    return short * (short + 1) // 2 + (tokens - short) * short


def query_and_mlp_weights(spec: ModelSpec) -> int:
    return 2 * spec.hidden_size * spec.num_heads * spec.head_dim + 3 * spec.hidden_size * spec.intermediate_size


def key_value_weights(spec: ModelSpec) -> int:
    return 2 * spec.hidden_size * spec.num_kv_heads * spec.head_dim


def plain_multiplications(spec: ModelSpec, tokens: int) -> int:
    """Of the plain model for a prompt: every layer for every token, logits of the last one."""
    attention = sum(2 * spec.num_heads * spec.head_dim * visible_pairs(tokens, window) for window in spec.windows)
    linear = spec.num_layers * tokens * (query_and_mlp_weights(spec) + key_value_weights(spec))
    return linear + attention + spec.vocab_size * spec.hidden_size


def pop_multiplications(spec: ModelSpec, tokens: int, depth: int) -> int:
    """Of POP with one boundary and one anchor token: layers from `depth` up do the rest than keys and values for these.

    The last layer is always like that, for the boundary only: an exact shortcut, so a depth of L counts as L - 1.
    """
    depth = min(depth, spec.num_layers - 1)
    total = spec.vocab_size * spec.hidden_size
    for layer, window in enumerate(spec.windows):
        if layer < depth:
            rows, pairs = tokens, visible_pairs(tokens, window)
        else:
            rows = min(tokens, 2 if layer < spec.num_layers - 1 else 1)
            pairs = rows * min(tokens, window or tokens)
        total += tokens * key_value_weights(spec) + rows * query_and_mlp_weights(spec)
        total += 2 * spec.num_heads * spec.head_dim * pairs
    return total


def decode_bytes(spec: ModelSpec, weight_bytes: int = 2) -> int:
    """Bytes of weights that one token reads: every layer and the vocabulary projection."""
    return weight_bytes * (
        spec.num_layers * (query_and_mlp_weights(spec) + key_value_weights(spec)) + spec.vocab_size * spec.hidden_size
    )
