"""The runner: truncated-depth prefill, projection of the skipped layers' keys and values, boundary recompute, and
decode.

Every token either goes through all layers (it is *deep*: boundary, anchor and generated tokens) or through the first P
only (the other prompt tokens). Layers below P see both alike; at layers from P up the deep tokens go on, and attend to
the keys and values that were projected for the others. So one function, `PrefillModel._forward`, is prefill and decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.calibration import Calibration
from ..checkpoints.config import load_config
from ..checkpoints.families import ModelSpec
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.tokenizer import load_generation_config, load_tokenizer
from ..checkpoints.weights import load_weights
from ..vision.encoder import Vision
from ..vision.spans import ImageSpan
from .checks import check_count, check_image_spans, check_token_lists
from .device import StageTimes, cache_capacity, check_kernels, resolve_device, to_device, weight_bytes
from .finite import NonFiniteError, check_logits, explained
from .forward_batch import ForwardBatch, SequenceChunk, forward_passes
from .kv_cache import BLOCK_SIZE, KVCache, Sequence
from .rope import RotaryEmbedding

pop = torch.ops.pop
DEFAULT_MAX_CACHE_TOKENS = 32768  # of the cache, where the model's own context is longer


class PrefillModel:
    """A causal language model with its tokenizer and key/value cache, and of a vision-language checkpoint `vision`, its
    vision tower and processing: prefill and decode. `pop_ext.load` makes one that generates, too (`generation.Model`).

    prefill_depth, boundary_tokens and anchor_tokens are the defaults of every call; `chunk_tokens` bounds the prompt
    tokens of one forward pass, and with it the memory of activations (results do not depend on it). Not for use by
    several threads at once.
    """

    def __init__(
        self,
        folder: Path,
        prefill_depth,
        boundary_tokens: int,
        anchor_tokens: int,
        dtype: torch.dtype,
        max_cache_tokens: int | None,
        calibration: str | Path | None = None,
        device: str | torch.device = "cpu",
    ):
        if max_cache_tokens is not None:
            check_count("max_cache_tokens", max_cache_tokens, 1)
        self.folder = folder
        self.config = load_config(folder)
        self.spec = ModelSpec.from_config(self.config)
        self.dtype, self.device = dtype, resolve_device(device)
        check_kernels(self.spec, dtype, self.device)
        self.prefill_depth = prefill_depth
        self.boundary_tokens, self.anchor_tokens, self.chunk_tokens = boundary_tokens, anchor_tokens, 2048
        self._check_settings()
        self.calibration = None if calibration is None else Calibration.load(calibration, self.spec, dtype)
        depth = self.resolve_prefill_depth(prefill_depth)
        if self.device.type == "cpu":
            first, capacity = 0, max_cache_tokens or min(self.spec.max_position_embeddings, DEFAULT_MAX_CACHE_TOKENS)
        else:  # projections of layers below the depth asked for take memory that a GPU has better uses for
            first = min(depth, self.spec.num_layers - 1)
            extra = 0 if self.calibration is None else self.calibration.nbytes
            needed = weight_bytes(self.spec, dtype.itemsize, first, extra)
            capacity = cache_capacity(self.spec, dtype.itemsize, self.device, needed, BLOCK_SIZE, max_cache_tokens)
        self.max_cache_tokens = capacity
        self.weights = load_weights(folder, self.spec, dtype, self.device, first)
        self.rope = RotaryEmbedding(self.config, self.device)
        self.rope_index = torch.tensor(self.spec.rope_index, dtype=torch.int32, device=self.device)
        self._no_gain = torch.ones(self.spec.hidden_size, device=self.device)
        if self.calibration is not None:
            self.calibration.check(self)
            self.calibration = self.calibration.to(self.device)
        self.k_norms = torch.stack([layer.k_norm for layer in self.weights.layers]) if self.spec.qk_norm else None
        self.tokenizer = load_tokenizer(folder)
        self.vision = Vision(folder, self.config, self.spec, dtype, self.device) if self.spec.vision_type else None
        self.generation_config = load_generation_config(folder, self.config)
        self.decode_buffers, self.cuda_graphs = {}, True  # on a GPU: see `decoding`
        self.cache = KVCache(
            self.spec.num_layers, self.spec.num_kv_heads, self.spec.head_dim, capacity, dtype, self.device
        )

    def __repr__(self) -> str:
        depth, layers = self.prefill_depth, self.spec.num_layers
        if isinstance(depth, float):
            depth = max(1, int(depth * layers + 0.5))
        held = "own projections" if self.calibration is None else repr(self.calibration)
        dtype = str(self.dtype).removeprefix("torch.")
        name = f"{type(self).__name__} {self.folder.name}: {self.spec.model_type}, {dtype} on {self.device}"
        return f"<{name}, prefill depth {depth} of {layers} layers, {held}>"

    # Conversations

    def new_sequence(self) -> Sequence:
        """An empty conversation for `prefill` and `decode`."""
        return Sequence(self.cache)

    def free(self, sequence: Sequence) -> None:
        """Gives a conversation's blocks back, after which it cannot be continued. Freeing it again does nothing."""
        if isinstance(sequence, Sequence) and sequence.cache is None:
            return
        self._check_sequence("sequence", sequence)
        self.cache.free(sequence)

    def _check_sequence(self, name: str, sequence: Sequence) -> None:
        if not isinstance(sequence, Sequence):
            raise TypeError(f"{name} is {sequence!r:.80}, expected a conversation of model.new_sequence()")
        if sequence.cache is not self.cache:
            state = "was freed" if sequence.cache is None else "is a sequence of another model"
            raise ValueError(f"{name} {state}, expected a conversation of this model")

    def resolve_prefill_depth(self, prefill_depth=None) -> int:
        """The prefill depth P in layers: of an int itself, of a float the nearest share of all layers; None is the
        model's own.
        """
        depth, layers = self.prefill_depth if prefill_depth is None else prefill_depth, self.spec.num_layers
        if isinstance(depth, bool) or not isinstance(depth, int | float):
            raise TypeError(f"prefill_depth is {depth!r}, expected layers (int) or a share of them (float)")
        if isinstance(depth, float):
            if not 0 < depth <= 1:
                raise ValueError(f"prefill_depth is {depth}, expected a share of the layers in (0, 1]")
            depth = max(1, int(depth * layers + 0.5))
        if not 1 <= depth <= layers:
            raise ValueError(f"prefill_depth is {depth}, expected 1 to {layers} layers (or a float, a share of them)")
        if self.calibration is not None and depth < layers - 1:  # at the last layer's input nothing needs projecting
            self.calibration.at(depth)
        return depth

    def fingerprint(self) -> str:
        """Identifies the weights, in whatever dtype they were loaded: a SHA-256 over the spec and a sample of every
        tensor.
        """
        weights = self.weights
        tables = [{"embedding": weights.embedding, "final_norm": weights.final_norm, "lm_head": weights.lm_head}]
        return fingerprint(self.spec, tables + [vars(layer) for layer in weights.layers])

    # Prefill and decode

    @torch.no_grad()
    def prefill(
        self,
        sequences: list[Sequence],
        prompts: list[list[int]],
        *,
        visuals: list[list[ImageSpan]] | None = None,
        prefill_depth=None,
    ) -> tuple[Tensor, StageTimes]:
        """A turn: appends prompts[i] to sequences[i] and runs every token that is not in the cache yet.

        Tokens from before the prompt (the last one sampled) and the prompt's last `boundary_tokens` run at full depth,
        as do the sequence's first `anchor_tokens`. visuals[i] are the images of prompts[i] (`Vision.encode`), with
        indices into the prompt. Returns the logits [B, vocabulary] float32 that follow the prompts,
        and the time of each stage. Raises before anything is changed if a prompt is empty or too long, or the cache too
        full.
        """
        times = StageTimes(self.device)
        return self._turn(
            sequences, prompts, "prompts", self.resolve_prefill_depth(prefill_depth), times, visuals
        ), times

    @torch.no_grad()
    def decode(self, sequences: list[Sequence], token_ids: list[int]) -> Tensor:
        """Appends token_ids[i] to sequences[i] and runs it, and what is not in the cache yet, through all layers.

        Returns the logits [B, vocabulary] float32 that follow.
        """
        return self._turn(
            sequences,
            [[token] for token in token_ids],
            "token_ids",
            self.spec.num_layers,
            StageTimes(self.device),
            deep=True,
        )

    @torch.no_grad()
    def logits(
        self,
        prompts: list[list[int]],
        continuations: list[list[int]],
        *,
        visuals: list[list[ImageSpan]] | None = None,
        prefill_depth=None,
    ) -> list[Tensor]:
        """Teacher-forced logits: for each pair, the [c, vocabulary] float32 logits that predict its c continuation
        tokens.

        Prompts, with `visuals` as in `prefill`, are prefilled by POP at `prefill_depth`, one that follows its equal not
        again; continuations are decoded at full depth.
        """
        depth = self.resolve_prefill_depth(prefill_depth)
        check_token_lists("prompts", prompts, self.spec.vocab_size)
        check_token_lists("continuations", continuations, self.spec.vocab_size, least=0)
        if len(prompts) != len(continuations):
            raise ValueError(f"continuations has {len(continuations)} entries, expected one per prompt, {len(prompts)}")
        visuals = check_image_spans(visuals, prompts, self.spec, depth)
        results, sequence, before = [], None, None
        try:
            for prompt, continuation, images in zip(prompts, continuations, visuals, strict=True):
                if not len(continuation):
                    results.append(torch.empty(0, self.spec.vocab_size, device=self.device))
                    continue
                if sequence is None or images or (prompt, []) != before:
                    if sequence is not None:
                        self.free(sequence)
                    sequence, before = self.new_sequence(), (prompt, images)
                    first = self._turn([sequence], [list(prompt)], "prompts", depth, StageTimes(self.device), [images])
                rows = [first]
                if len(continuation) > 1:
                    forced = [list(continuation[:-1])]
                    rows.append(
                        self._turn(
                            [sequence],
                            forced,
                            "continuations",
                            depth,
                            StageTimes(self.device),
                            deep=True,
                            all_logits=True,
                        )
                    )
                    del sequence.token_ids[
                        len(prompt) :
                    ]  # back to the prompt; what follows in the cache is overwritten
                    sequence.num_cached = len(prompt)
                results.append(torch.cat(rows))
                check_logits(results[-1])
        except NonFiniteError as error:
            raise explained(error, self, prompts) from None
        finally:
            if sequence is not None:
                self.free(sequence)
        return results

    @torch.no_grad()
    def hidden_states(self, prompts: list[list[int]], visuals: list[list[ImageSpan]] | None = None) -> Iterator[Tensor]:
        """The hidden states [T, D] of all tokens of `prompts`, one prompt after the other, at full depth: before each
        layer, and after the last, L + 1 in turn. Each prompt, with `visuals` as in `prefill`, is a conversation of its
        own, and forgotten.
        """
        sequences = [self.new_sequence() for _ in prompts]
        self._check_prompts(sequences, prompts, "prompts")
        for sequence, images in zip(sequences, check_image_spans(visuals, prompts, self.spec), strict=True):
            for visual in images:
                sequence.add(replace(visual))
        try:
            self.cache.grow(sequences, [len(prompt) for prompt in prompts])
            runs = [(sequence, 0, len(prompt)) for sequence, prompt in zip(sequences, prompts, strict=True)]
            batch = self._batch(runs)
            inputs = {"token_ids": torch.tensor([token for prompt in prompts for token in prompt])}
            inputs = to_device(inputs | batch.integers(), self.device)
            batch.ready(inputs, self.rope)
            hidden = self._embed(inputs["token_ids"], batch)
            for layer in range(self.spec.num_layers):
                yield hidden
                hidden = self._add_visual(layer, self._layer(layer, hidden, batch), batch)
            yield hidden
        finally:
            for sequence in sequences:
                self.free(sequence)

    def _turn(
        self,
        sequences,
        prompts,
        name: str,
        depth: int,
        times: StageTimes,
        visuals=None,
        *,
        deep=False,
        all_logits=False,
    ) -> Tensor:
        """Appends prompts and runs all that is not in the cache, `chunk_tokens` at a time; nothing of it stays if that
        fails.
        """
        self._check_settings()
        self._check_prompts(sequences, prompts, name)
        visuals = check_image_spans(visuals, prompts, self.spec, depth)
        lengths, images = [len(s.token_ids) for s in sequences], [len(s.visuals) for s in sequences]
        self.cache.grow(sequences, [n + len(p) for n, p in zip(lengths, prompts, strict=True)])
        try:
            pieces = []
            for sequence, length, prompt, new in zip(sequences, lengths, prompts, visuals, strict=True):
                sequence.token_ids += prompt
                for visual in new:
                    sequence.add(replace(visual, start=visual.start + length, end=visual.end + length))
                end = length + len(prompt)
                anchors = self.anchor_tokens
                if self.spec.bidirectional_images:  # an image that begins within the anchors is one with them
                    anchors = max([anchors, *(v.end for v in sequence.visuals if v.start < self.anchor_tokens)])
                if self._features(depth) is not None:  # no token's, where the one before it is not of this turn
                    anchors = max(anchors, sequence.num_cached + 1)
                shallow = (max(length, anchors), end - self.boundary_tokens) if not deep else (end, end)
                pieces.append(
                    SequenceChunk(sequence, sequence.num_cached, end, *shallow, length if all_logits else end - 1)
                )
            chunks = forward_passes(pieces, self.chunk_tokens, self.spec.bidirectional_images)
            logits = [self._forward(chunk, depth, times) for chunk in chunks]
        except BaseException:
            for sequence, length, count in zip(sequences, lengths, images, strict=True):
                del sequence.token_ids[length:], sequence.visuals[count:]
            raise
        for sequence, count in zip(sequences, images, strict=True):
            sequence.num_cached, sequence.last_hidden = len(sequence.token_ids), None
            for visual in sequence.visuals[count:]:
                visual.features = None
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    def _forward(self, pieces: list[SequenceChunk], depth: int, times: StageTimes) -> Tensor:
        """One pass over the tokens of `pieces`; returns the logits wanted of them, [rows, vocabulary] float32.

        All integers are made on the host first, and go to the device in one copy.
        """
        times.start()
        spec = self.spec
        depth = min(depth, spec.num_layers - 1)  # exact: shallow tokens need the last layer's keys and values only
        token_ids = [token for p in pieces for token in p.sequence.token_ids[p.start : p.end]]
        batch = self._batch([(p.sequence, p.start, p.end) for p in pieces])
        deep, deep_runs, logits_rows = _deep_rows(pieces)
        truncated = len(deep) < len(token_ids)
        deep_batch = self._batch(deep_runs) if truncated and deep_runs else None

        inputs = {"token_ids": torch.tensor(token_ids), "logits_rows": torch.tensor(logits_rows, dtype=torch.int64)}
        if truncated:
            inputs["deep"] = torch.tensor(deep, dtype=torch.int64)
            inputs["shallow_slots"] = batch.slot_mapping.index_fill(0, inputs["deep"], -1)
            if self._features(depth) is not None:
                inputs["previous"] = _previous_rows(batch.cu_seqlens_q)
        inputs |= batch.integers()
        if deep_batch is not None:
            inputs |= deep_batch.integers("deep_")
        inputs = to_device(inputs, self.device)
        batch.ready(inputs, self.rope)

        hidden = self._embed(inputs["token_ids"], batch)
        for layer in range(depth):
            hidden = self._add_visual(layer, self._layer(layer, hidden, batch), batch)
        times.end("truncated_prefill")

        before = [piece.sequence.last_hidden for piece in pieces]
        if self._features(depth) is not None:
            for piece, last in zip(pieces, hidden[batch.cu_seqlens_q[1:].long() - 1], strict=True):
                piece.sequence.last_hidden = last
        if truncated:
            self._project(depth, hidden, before, batch, inputs["shallow_slots"], inputs.get("previous"))
            times.end("projection")
            if deep_batch is None:
                return torch.empty(0, spec.vocab_size, device=self.device)
            deep_batch.ready(inputs, self.rope, "deep_")
            hidden, batch = hidden[inputs["deep"]], deep_batch
        for layer in range(depth, spec.num_layers):
            hidden = self._layer(layer, hidden, batch)
        logits = self._logits(hidden if len(logits_rows) == len(hidden) else hidden[inputs["logits_rows"]])
        times.end("boundary")
        return logits

    def _batch(self, runs: list[tuple[Sequence, int, int]]) -> ForwardBatch:
        return ForwardBatch(runs, self.rope.axes is not None, self.spec.bidirectional_images)

    def rope_tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin of every position that a cached token may have."""
        return self.rope.tables(min(self.max_cache_tokens + BLOCK_SIZE, self.spec.max_position_embeddings))

    def _logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, D] after the last layer -> [rows, vocabulary] float32."""
        hidden = pop.rms_norm(hidden, self.weights.final_norm, self.spec.rms_norm_eps)
        return pop.linear(hidden, self.weights.lm_head, out_dtype=torch.float32)

    def _features(self, depth: int) -> Tensor | None:
        """What projections at `depth` take of the token before, [rank, D] as in `Calibration`; None: nothing."""
        if self.calibration is None or depth >= self.spec.num_layers - 1:  # whose input is exact
            return None
        features = self.calibration.at(depth)[1]
        return features if len(features) else None

    def _project(
        self,
        depth: int,
        hidden: Tensor,
        before: list[Tensor | None],
        batch: ForwardBatch,
        slot_mapping: Tensor,
        previous: Tensor | None,
    ) -> None:
        """Keys and values of the layers from `depth` up, projected from hidden [T, D] and the hidden state [D] before
        each run of tokens (None where its first is deep), to the cache. previous: `_previous_rows`.
        """
        weights, features = self.weights, self._features(depth)
        own = self.calibration is None or depth == self.spec.num_layers - 1  # whose input is exact
        if features is not None:
            rows = torch.stack([hidden[0] if row is None else row for row in before])
            x = pop.rms_norm(torch.cat([rows, hidden]), self._no_gain, self.spec.rms_norm_eps)
            hidden = torch.cat([x[len(rows) :], pop.linear(x, features)[previous]], 1)
        pop.project_kv(
            hidden,
            weights.projections_from(depth) if own else self.calibration.at(depth)[0],
            None if weights.projection_bias is None else weights.projection_bias[depth:],
            None if self.k_norms is None else self.k_norms[depth:],
            self.spec.rms_norm_eps,
            batch.cos,
            batch.sin,
            self.rope_index[depth:],
            slot_mapping,
            self.cache.keys[depth:],
            self.cache.values[depth:],
        )

    def _embed(self, token_ids: Tensor, batch: ForwardBatch) -> Tensor:
        """The hidden states [T, D] before layer 0: embeddings, and for the tokens of images their features."""
        hidden = pop.embedding(token_ids, self.weights.embedding, self.spec.embedding_scale)
        if batch.visual_features is not None:
            hidden[batch.visual_rows] = batch.visual_features[0]
        return hidden

    def _add_visual(self, index: int, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """DeepStack (arXiv 2406.04334): visual features added, in place, after layer `index`, if it is of the first."""
        if batch.visual_features is not None and index + 1 < len(batch.visual_features):
            hidden[batch.visual_rows] += batch.visual_features[index + 1]
        return hidden

    def _layer(self, index: int, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """hidden [T, D] before layer `index` -> after it; the tokens' keys and values go to the cache."""
        spec, w = self.spec, self.weights.layers[index]
        eps = spec.rms_norm_eps
        cos, sin = batch.angles[spec.rope_index[index]]
        keys, values = self.cache.layers[index]
        x = pop.rms_norm(hidden, w.input_norm, eps)
        query = pop.qkv_project(
            x, w.qkv, w.qkv_bias, w.q_norm, w.k_norm, eps, cos, sin, batch.slot_mapping, keys, values
        )
        x = self._attention(index, query, batch).flatten(1)
        if spec.sandwich_norms:
            hidden = pop.rms_norm(pop.linear(x, w.output, w.output_bias), w.post_attention_norm, eps, hidden)
            x = pop.gated_linear(pop.rms_norm(hidden, w.mlp_norm, eps), w.gate_up, spec.activation)
            return pop.rms_norm(pop.linear(x, w.down), w.post_mlp_norm, eps, hidden)
        hidden = pop.linear(x, w.output, w.output_bias, hidden)
        x = pop.gated_linear(pop.rms_norm(hidden, w.mlp_norm, eps), w.gate_up, spec.activation)
        return pop.linear(x, w.down, None, hidden)

    def _attention(self, index: int, query: Tensor, batch: ForwardBatch) -> Tensor:
        """query [T, Hq, E] -> what it attends to in the cache of layer `index`, [T, Hq, E]."""
        return pop.attention(
            query,
            *self.cache.layers[index],
            batch.block_tables,
            batch.cu_seqlens_q,
            batch.seqlens_k,
            batch.max_seqlen_q,
            batch.max_seqlen_k,
            self.spec.attention_scale,
            self.spec.windows[index],
            batch.spans,
        )

    def _check_settings(self) -> None:
        """The attributes that may be set at any time."""
        check_count("boundary_tokens", self.boundary_tokens, 1)
        check_count("anchor_tokens", self.anchor_tokens, 0)
        check_count("chunk_tokens", self.chunk_tokens, 1)

    def _check_prompts(self, sequences: list[Sequence], prompts: list[list[int]], name: str) -> None:
        check_token_lists(name, prompts, self.spec.vocab_size)
        if not isinstance(sequences, list | tuple) or len(sequences) != len(prompts) or not len(sequences):
            raise ValueError(f"sequences is {sequences!r:.80}, expected one or more, as many as {name}, {len(prompts)}")
        for i, sequence in enumerate(sequences):
            self._check_sequence(f"sequences[{i}]", sequence)
            length, limit = len(sequence.token_ids) + len(prompts[i]), self.spec.max_position_embeddings
            if length > limit:
                raise ValueError(
                    f"{name}[{i}] makes the conversation {length} tokens long, expected at most the model's {limit}"
                )
        if len({id(s) for s in sequences}) < len(sequences):
            raise ValueError("sequences has the same conversation twice, expected different ones")


def _deep_rows(pieces: list[SequenceChunk]) -> tuple[list[int], list[tuple[Sequence, int, int]], list[int]]:
    """Which rows of a forward pass are deep, the runs that they make, and which of them logits are wanted of."""
    deep, runs, wanted, offset = [], [], [], 0
    for piece in pieces:
        for start, end in piece.deep_runs():
            wanted += range(len(deep) + max(piece.logits_start - start, 0), len(deep) + end - start)
            deep += range(offset + start - piece.start, offset + end - piece.start)
            runs.append((piece.sequence, start, end))
        offset += piece.end - piece.start
    return deep, runs, wanted


def _previous_rows(cu_seqlens_q: Tensor) -> Tensor:
    """For each token of a pass, where the token before it is among the tokens before the runs and then those of the
    pass: [T] int64.
    """
    runs, tokens = len(cu_seqlens_q) - 1, int(cu_seqlens_q[-1])
    previous = torch.arange(runs - 1, runs + tokens - 1)
    previous[cu_seqlens_q[:-1].long()] = torch.arange(runs)
    return previous
