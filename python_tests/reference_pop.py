"""Prefill-only pruning from transformers' own modules: what `pop_ext.Model` is compared with and shares no code with.

The definition is causal, so a conversation is a row of pieces of consecutive tokens, each run one of two ways:

    full        all L layers, as transformers runs them;
    truncated   layers 0 .. P-1; every later layer only gets K and V, made by its own input norm, projections, K-norm
                and rotary embedding from the hidden state that layer P-1 left.

A prompt goes truncated, except for the first `anchors` tokens of the conversation and the last `boundary` tokens of the
turn; everything else (continuations, a sampled token that was not run yet) goes full. Attention sees whatever K and V
the pieces left behind: each token those before it and its own, within the layer's window. Logits are of the hidden
state that a token ended with, which of a truncated one is the input of layer P.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager

import torch
from torch import Tensor


class ReferencePOP:
    """One conversation. `model` is a transformers causal LM of any floating dtype."""

    def __init__(self, model, prefill_depth: int, boundary: int = 1, anchors: int = 1, share: float = 0.0, plan=None):
        """plan: for each layer whether attention and MLP count for truncated tokens below P, or None: both do."""
        self.plan = plan
        self.model, self.config, self.layers = model, model.config, model.model.layers
        self.prefill_depth, self.boundary, self.anchors, self.share = prefill_depth, boundary, anchors, share
        self.keys: list[Tensor | None] = [None] * len(self.layers)  # each [1, Hkv, tokens so far, E], after RoPE
        self.values: list[Tensor | None] = [None] * len(self.layers)
        self.length = 0
        self.ids: list[int] = []

    def prompt(self, token_ids: list[int], *, depth: int | None = None) -> Tensor:
        """A turn of the user: the prompt by the rules above. Returns the logits [V] after its last token."""
        self.prefill_depth = self.prefill_depth if depth is None else depth
        anchor = min(max(self.anchors - self.length, 0), len(token_ids))
        boundary = max(len(token_ids) - self.boundary, anchor)  # first token of the boundary; an anchor is full already
        count = int(self.share * (boundary - anchor) + 0.5)
        if count and self.prefill_depth < len(self.layers):
            return self._prompt_with_deep_tokens(token_ids, anchor, boundary, count)
        self._run(token_ids[:anchor], full=True)
        self._run(token_ids[anchor:boundary], full=False)
        logits = self._run(token_ids[boundary:], full=True)
        return logits[-1] if len(logits) else self._last[-1]  # all of the prompt was anchor, or has no boundary

    def decode(self, token_ids: list[int]) -> Tensor:
        """Generated (here: given) tokens, at full depth. Returns the logits [len(token_ids), V] after each."""
        return self._run(token_ids, full=True)

    def logits(self, prompt: list[int], continuation: list[int]) -> Tensor:
        """Logits [c, V] that predict the c continuation tokens."""
        return torch.cat([self.prompt(prompt)[None], self.decode(continuation[:-1])])

    @torch.no_grad()
    def _run(self, token_ids: list[int], full: bool) -> Tensor:
        if not token_ids:
            return torch.empty(0, self.config.vocab_size)
        self.ids += token_ids
        positions = torch.arange(self.length, self.length + len(token_ids))[None]
        hidden = self.model.model.embed_tokens(torch.tensor([token_ids]))
        for index, layer in enumerate(self.layers):
            rope = self._rope(hidden, positions, index)
            if full or index < self.prefill_depth:
                with self._closed(layer, (True, True) if full or self.plan is None else self.plan[index]):
                    hidden = layer(
                        hidden,
                        attention_mask=self._mask(positions, index, hidden.dtype),
                        position_embeddings=rope,
                        past_key_values=self,
                    )
            else:
                self._project(hidden, layer, rope, index)
        self.length += len(token_ids)
        self._last = self.model.lm_head(self.model.model.norm(hidden))[0]
        return self._last if full else torch.empty(0, self.config.vocab_size)

    @contextmanager
    def _closed(self, layer, runs):
        """Nothing of the branches that do not run comes to the residual."""
        sandwich = hasattr(layer, "post_feedforward_layernorm")
        names = ("post_attention_layernorm", "post_feedforward_layernorm") if sandwich else ("self_attn", "mlp")

        def nothing(module, args, output):
            return (0 * output[0], *output[1:]) if isinstance(output, tuple) else 0 * output

        modules = [getattr(layer, name) for name, does in zip(names, runs, strict=True) if not does]
        handles = [module.register_forward_hook(nothing) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _prompt_with_deep_tokens(self, token_ids: list[int], anchor: int, boundary: int, count: int) -> Tensor:
        """A turn of which `count` tokens of [anchor, boundary) are deep: those that its last 16 tokens attend to most.
        Layer by layer, every token's K and V from its own hidden state, which from layer P on only deep tokens change.
        """
        size, shallow = len(token_ids), torch.zeros(len(token_ids), dtype=torch.bool)
        shallow[anchor:boundary] = True
        positions = torch.arange(self.length, self.length + size)[None]
        hidden = self.model.model.embed_tokens(torch.tensor([token_ids]))
        self.ids += token_ids
        after = self._after_repetition()
        paid = []  # by layer, [tokens of the turn]: of the head that pays most, the mean over queries
        for index, layer in enumerate(self.layers):
            rope, mask = self._rope(hidden, positions, index), self._mask(positions, index, hidden.dtype)
            if index == self.prefill_depth:
                scores = torch.stack(paid[-8:]).mean(0)[anchor:boundary]
                padded = torch.cat([torch.zeros(3), scores, torch.zeros(3)])
                near = torch.tensor([3, 3, 3, 4, 2, 1, 0])
                pooled = [float((padded[i : i + 7] * near).sum()) for i in range(len(scores))]
                first = [after is not None and 0 <= self.length + anchor + i - after < 24 for i in range(len(scores))]
                chosen = sorted(range(len(pooled)), key=lambda i: (not first[i], -pooled[i]))[:count]
                shallow[[anchor + i for i in chosen]] = False
            output = layer(hidden, attention_mask=mask, position_embeddings=rope, past_key_values=self)
            if index < self.prefill_depth:
                weights = self._weights(hidden, layer, rope, mask, index)[0, :, -16:, -size:]
                paid.append(weights.mean(1).max(0).values)
            hidden = torch.where(shallow[None, :, None], hidden, output) if index >= self.prefill_depth else output
        self.length += size
        self._last = self.model.lm_head(self.model.model.norm(hidden))[0]
        return self._last[-1]

    def _after_repetition(self) -> int | None:
        """Where the longest earlier match of the conversation's end, of 3 to 8 tokens, is over; the latest of them."""
        for size in range(8, 2, -1):
            for end in range(len(self.ids) - 1, size - 1, -1):
                if self.ids[end - size : end] == self.ids[-size:]:
                    return end
        return None

    def _weights(self, hidden: Tensor, layer, rope, mask: Tensor, index: int) -> Tensor:
        """The attention weights [1, Hq, tokens, keys] of a layer that has run on `hidden`."""
        attention = layer.self_attn
        query = attention.q_proj(layer.input_layernorm(hidden)).unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, "q_norm"):
            query = attention.q_norm(query)
        apply_rotary = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        query = apply_rotary(query, query, *rope, unsqueeze_dim=2)[0].transpose(1, 2)
        keys = self.keys[index].repeat_interleave(query.shape[1] // self.keys[index].shape[1], 1)
        return (query @ keys.transpose(2, 3) * attention.scaling + mask).softmax(-1)

    def _project(self, hidden: Tensor, layer, rope, index: int) -> None:
        """The K/V-only step of a skipped layer."""
        attention = layer.self_attn
        x = layer.input_layernorm(hidden)
        key, value = (
            projection(x).unflatten(-1, (-1, attention.head_dim)) for projection in (attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "k_norm"):
            key = attention.k_norm(key)
        apply_rotary = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        key = apply_rotary(key, key, *rope, unsqueeze_dim=2)[1]
        self.update(key.transpose(1, 2), value.transpose(1, 2), index)

    def update(self, key: Tensor, value: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """What transformers' attention calls on its cache: append the new K and V, return all."""
        if self.keys[index] is not None:
            key, value = torch.cat([self.keys[index], key], 2), torch.cat([self.values[index], value], 2)
        self.keys[index], self.values[index] = key, value
        return key, value

    def _rope(self, hidden: Tensor, positions: Tensor, index: int) -> tuple[Tensor, Tensor]:
        rotary = self.model.model.rotary_emb
        if self.config.model_type == "gemma3_text":  # two bases
            return rotary(hidden, positions, self.config.layer_types[index])
        return rotary(hidden, positions)

    def _mask(self, positions: Tensor, index: int, dtype: torch.dtype) -> Tensor:
        """Additive [1, 1, queries, keys]: causal, and within the window where the layer has one."""
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        if kinds is not None and kinds[index] == "full_attention":
            window = None
        i, j = positions[0][:, None], torch.arange(self.length + positions.shape[1])[None, :]
        hidden_keys = j > i
        if window is not None:
            hidden_keys |= j <= i - window
        return torch.zeros(hidden_keys.shape, dtype=dtype).masked_fill(hidden_keys, torch.finfo(dtype).min)[None, None]


class ReferenceVisionPOP:
    """One conversation with a transformers vision-language model. The definition again, but a turn at a time and layer
    by layer, as tokens of an image may see later ones: at every layer all tokens' K and V come from their own hidden
    state, which at layers from P up only the deep tokens' goes on.

    Image features, positions and masks are transformers' (`get_image_features`, `get_rope_index` of the whole
    conversation) or follow from its documented mask: causal or same image, within the window.
    """

    def __init__(self, model, prefill_depth: int, boundary: int = 1, anchors: int = 1):
        self.model, self.text = model, model.model.language_model
        self.config = model.config.text_config
        self.gemma = model.config.model_type == "gemma3"
        self.prefill_depth, self.boundary, self.anchors = prefill_depth, boundary, anchors
        self.keys: list[Tensor | None] = [None] * len(self.text.layers)
        self.values: list[Tensor | None] = [None] * len(self.text.layers)
        self.ids: list[int] = []
        self.inputs: dict[str, list[Tensor]] = {}  # of all turns: pixel_values, image_grid_thw, ..._videos
        self.cached = 0

    update = ReferencePOP.update

    def prompt(self, token_ids: list[int], *, depth: int | None = None, **inputs: Tensor) -> Tensor:
        """A turn with its pixel_values (and image_grid_thw, pixel_values_videos, video_grid_thw). Logits [V]."""
        self.prefill_depth = self.prefill_depth if depth is None else depth
        start, end = len(self.ids), len(self.ids) + len(token_ids)
        groups = self._groups([*self.ids, *token_ids])
        anchors = self.anchors
        while self.gemma and 0 < anchors < end and groups[anchors] >= 0 and groups[anchors] == groups[anchors - 1]:
            anchors += 1
        shallow = [i for i in range(self.cached, end) if max(anchors, start) <= i < end - self.boundary]
        return self._run(token_ids, shallow, inputs)[-1]

    def decode(self, token_ids: list[int]) -> Tensor:
        """Given tokens at full depth. Logits [len(token_ids), V] after each."""
        return self._run(token_ids, [], {})[-len(token_ids) :]

    @torch.no_grad()
    def _run(self, token_ids: list[int], shallow: list[int], inputs: dict[str, Tensor]) -> Tensor:
        self.ids += token_ids
        for name, value in inputs.items():
            self.inputs.setdefault(name, []).append(value)
        ids, positions = torch.tensor([self.ids[self.cached :]]), self._positions()[:, None, self.cached :]
        hidden = self.text.embed_tokens(ids)
        deepstack = []
        for kind in ("image", "video"):
            rows = ids[0] == getattr(self.model.config, f"{kind}_token_id", -1)
            pixels = inputs.get("pixel_values" if kind == "image" else "pixel_values_videos")
            if pixels is None:
                continue
            if self.gemma:
                hidden[0, rows] = self.model.model.get_image_features(pixels).pooler_output.flatten(0, 1)
                continue
            output = self.model.model.get_image_features(pixels, inputs[f"{kind}_grid_thw"])
            hidden[0, rows] = torch.cat(output.pooler_output)
            deepstack.append((rows, [torch.cat(features) for features in output.deepstack_features]))
        is_shallow = torch.zeros(ids.shape[1], dtype=torch.bool)
        is_shallow[[i - self.cached for i in shallow]] = True
        for index, layer in enumerate(self.text.layers):
            rope = self.text.rotary_emb(hidden, positions if not self.gemma else positions[0], *self._kind(index))
            output = layer(hidden, attention_mask=self._mask(index), position_embeddings=rope, past_key_values=self)
            hidden = torch.where(is_shallow[:, None], hidden, output) if index >= self.prefill_depth else output
            for rows, features in deepstack:
                if index < len(features):
                    hidden[0, rows] += features[index]
        self.cached = len(self.ids)
        return self.model.lm_head(self.text.norm(hidden))[0]

    def _kind(self, index: int) -> tuple[str, ...]:
        return (self.config.layer_types[index],) if self.gemma else ()

    def _positions(self) -> Tensor:
        """[3, tokens so far]."""
        kinds = torch.zeros(len(self.ids), dtype=torch.int)
        grids = {name: torch.cat(value) for name, value in self.inputs.items() if name.endswith("grid_thw")}
        if self.gemma or not grids:
            return torch.arange(len(self.ids)).repeat(3, 1)
        ids = torch.tensor(self.ids)
        kinds[ids == self.model.config.image_token_id] = 1
        kinds[ids == self.model.config.video_token_id] = 2
        return self.model.model.get_rope_index(ids[None], mm_token_type_ids=kinds[None], **grids)[0][:, 0]

    def _groups(self, ids: list[int]) -> list[int]:
        """The image that each token is of, -1 for none. Text stands between images."""
        groups, last = [], -1
        for i, token in enumerate(ids):
            is_image = token == self.model.config.image_token_id
            last += is_image and (i == 0 or ids[i - 1] != token)
            groups.append(last if is_image else -1)
        return groups

    def _mask(self, index: int) -> Tensor:
        """Additive [1, 1, queries, keys]."""
        i, j = torch.arange(self.cached, len(self.ids))[:, None], torch.arange(len(self.ids))[None, :]
        visible = j <= i
        if self.gemma:
            groups = torch.tensor(self._groups(self.ids))
            visible |= (groups[i] == groups[j]) & (groups[j] >= 0)
            if self._kind(index) == ("sliding_attention",):
                visible &= j > i - self.config.sliding_window
        return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
