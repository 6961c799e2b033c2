"""The runner: truncated-depth prefill, projection of the skipped layers' keys and values, boundary recompute, and
decode.

Every token either goes through all layers (it is *deep*: boundary, anchor and generated tokens) or through the first P
only (the other prompt tokens). Layers below P see both alike; at layers from P up the deep tokens go on, and attend to
the keys and values that were projected for the others. So one function, `PrefillModel._forward`, is prefill and decode;
with `deep_tokens`, what the end of a turn chooses goes on after it (`_deepen`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..transfer import to_device
from ..vision.spans import ImageSpan
from .checks import check_image_spans, check_token_lists
from .device import StageTimes
from .finite import NonFiniteError, check_logits, explained
from .forward_batch import SequenceChunk, deep_rows, forward_passes, previous_rows, runs_of, selections
from .kv_cache import Sequence, prefix_keys
from .layers import Layers, Partial, in_turn
from .prefill_depth import resolve_depth
from .selection import QUERIES, Selection, scoring_layers


class PrefillModel(Layers):
    """Conversations with a model: prefill and decode. `pop_ext.load` makes one that generates, too
    (`generation.Model`).

    prefill_depth, boundary_tokens, anchor_tokens and deep_tokens are the defaults of every call; `chunk_tokens` bounds
    the prompt tokens of one forward pass, and with it the memory of activations (results do not depend on it). Calls
    from several threads take turns.
    """

    def __repr__(self) -> str:
        layers = self.spec.num_layers
        depth = resolve_depth(self.prefill_depth, layers) if self.prefill_plan is None else self.prefill_plan.depth
        held = "own projections" if self.calibration is None else repr(self.calibration)
        dtype = str(self.dtype).removeprefix("torch.")
        name = f"{type(self).__name__} {self.folder.name}: {self.spec.model_type}, {dtype} on {self.device}"
        plan = ", by a plan" if self.partial_layers() else ""
        return f"<{name}, prefill depth {depth} of {layers} layers{plan}, {held}>"

    # Conversations

    def new_sequence(self) -> Sequence:
        """An empty conversation for `prefill` and `decode`."""
        return Sequence(self.cache)

    def free(self, sequence: Sequence) -> None:
        """`sequence.close()`: gives its blocks back, after which it cannot be continued."""
        if isinstance(sequence, Sequence) and sequence.cache is None:
            return
        self._check_sequence("sequence", sequence)
        sequence.close()

    def _check_sequence(self, name: str, sequence: Sequence) -> None:
        if not isinstance(sequence, Sequence):
            raise TypeError(f"{name} is {sequence!r:.80}, expected a conversation of model.new_sequence()")
        if sequence.cache is not self.cache:
            state = "was freed" if sequence.cache is None else "is a sequence of another model"
            raise ValueError(f"{name} {state}, expected a conversation of this model")

    # Prefill and decode

    @in_turn
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
        as do the sequence's first `anchor_tokens`, and of the others the share `deep_tokens` (`selection`). Without a
        boundary the logits are those of the last token's hidden state at the prefill depth. visuals[i]
        are the images of prompts[i] (`Vision.encode`), with indices into the prompt. Returns the logits [B, vocabulary]
        float32 that follow the prompts, and the time of each stage. Raises before anything is changed if a prompt is
        empty or too long, or the cache too full.
        """
        times, depth = StageTimes(self.device), self.resolve_prefill_depth(prefill_depth)
        partial = self.partial_layers(prefill_depth)
        return self._turn(sequences, prompts, "prompts", depth, times, visuals, partial=partial), times

    @in_turn
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

    @in_turn
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
        depth, partial = self.resolve_prefill_depth(prefill_depth), self.partial_layers(prefill_depth)
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
                    times = StageTimes(self.device)
                    first = self._turn([sequence], [list(prompt)], "prompts", depth, times, [images], partial=partial)
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
            with self.cache.lock:
                self.cache.grow(sequences, [len(prompt) for prompt in prompts])
            runs = [(sequence, 0, len(prompt)) for sequence, prompt in zip(sequences, prompts, strict=True)]
            batch = self.batch(runs)
            inputs = {"token_ids": torch.tensor([token for prompt in prompts for token in prompt])}
            inputs = to_device(inputs | batch.integers(), self.device)
            batch.ready(inputs, self.rope)
            hidden = self.embed(inputs["token_ids"], batch)
            for layer in range(self.spec.num_layers):
                yield hidden
                hidden = self.add_visual(layer, self.layer(layer, hidden, batch), batch)
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
        share=False,
        partial: Partial | None = None,
    ) -> Tensor:
        """Appends prompts and runs all that is not in the cache, `chunk_tokens` at a time; nothing of it stays if that
        fails. share: with the prefixes in the cache. partial: see `partial_layers`.
        """
        partial = partial or {}
        self.check_settings()
        self._check_prompts(sequences, prompts, name)
        visuals = check_image_spans(visuals, prompts, self.spec, depth)
        before = [(len(s.token_ids), len(s.visuals), s.num_cached) for s in sequences]
        kept = []
        try:
            pieces = []
            for sequence, (length, *_), prompt, new in zip(sequences, before, prompts, visuals, strict=True):
                sequence.token_ids += prompt
                for visual in new:
                    sequence.add(replace(visual, start=visual.start + length, end=visual.end + length))
                piece = self._piece(sequence, length, depth, deep)
                pieces.append(replace(piece, logits_start=length) if all_logits else piece)
            if share:
                self._share_prefixes(pieces, [length for length, *_ in before], depth, kept, partial)
            else:
                self.cache.grow(sequences, [piece.end for piece in pieces])
            chunks = forward_passes(pieces, self.chunk_tokens, self.spec.bidirectional_images)
            logits = [self._forward(chunk, depth, times, partial) for chunk in chunks]
            if any(piece.selection for piece in pieces):
                logits = [self._deepen(pieces, torch.cat(logits), depth, times)]
        except BaseException:
            self.cache.forget(kept)
            for sequence, (length, count, cached) in zip(sequences, before, strict=True):
                del sequence.token_ids[length:], sequence.visuals[count:]
                sequence.num_cached = cached
                if not cached:  # its blocks may be others'
                    self.cache.shrink(sequence, 0)
            raise
        for sequence, (_, count, _) in zip(sequences, before, strict=True):
            sequence.num_cached, sequence.last_hidden = len(sequence.token_ids), None
            for visual in sequence.visuals[count:]:
                visual.features = None
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    def _piece(self, sequence: Sequence, length: int, depth: int, deep: bool) -> SequenceChunk:
        """What there is to run of a conversation that had `length` tokens before this turn; logits of the last."""
        end, anchors = len(sequence.token_ids), self.anchor_tokens
        if self.spec.bidirectional_images:  # an image that begins within the anchors is one with them
            anchors = max([anchors, *(v.end for v in sequence.visuals if v.start < self.anchor_tokens)])
        if self.features(depth) is not None:  # no token's, where the one before it is not of this turn
            anchors = max(anchors, sequence.num_cached + 1)
        size = self.boundary_tokens or int(depth == self.spec.num_layers)  # nothing is truncated at all layers
        first, boundary = (end, end) if deep or self.deep_tokens == 1 else (max(length, anchors), end - size)
        piece = SequenceChunk(sequence, sequence.num_cached, end, first, boundary, end - 1)
        count = int(self.deep_tokens * (boundary - first) + 0.5)
        if count > 0 and depth < self.spec.num_layers - 1:  # at the last layer's input all tokens' are exact
            if sequence.visuals:
                raise ValueError(f"deep_tokens is {self.deep_tokens}, expected 0 for a conversation with images")
            piece.selection = Selection(sequence, first, boundary, end, max(length, end - QUERIES), count)
        return piece

    def _share_prefixes(
        self, pieces: list[SequenceChunk], lengths: list[int], depth: int, kept: list, partial: Partial
    ) -> None:
        """Gives every conversation its blocks. One that had no tokens before takes those that the cache has for the
        start of its prompt, and leaves its own there, whose keys go to `kept`.

        Whole blocks without a boundary token are shared. Their tokens' keys and values depend on what is before them
        alone, as every one is an anchor or truncated, in this prompt as in the other. A later one of `pieces` may take
        blocks of an earlier: at each layer the pass writes all keys and values before it reads any.
        """
        depths = (min(depth, self.spec.num_layers - 1), *partial.items())
        settings = (depths, self.anchor_tokens, self.calibration)
        for piece, length in zip(pieces, lengths, strict=True):
            sequence, keys, piece.sequence.num_reused = piece.sequence, [], 0
            if length == 0:
                shared = min(piece.shallow_end, piece.end - 1)  # the last token runs in any case
                keys = prefix_keys(sequence.token_ids, sequence.visuals, shared, settings)
                self.cache.shrink(sequence, 0)
                self.cache.adopt(sequence, keys)
                piece.start = sequence.num_reused = sequence.num_cached
                if piece.start and self.features(depth) is not None:
                    piece.start -= 1  # runs again, for the next token's features; it is not written
            self.cache.grow([sequence], [piece.end])
            kept += self.cache.keep(sequence, keys)

    def _forward(self, pieces: list[SequenceChunk], depth: int, times: StageTimes, partial: Partial) -> Tensor:
        """One pass over the tokens of `pieces`; returns the logits wanted of them, [rows, vocabulary] float32.

        All integers are made on the host first, and go to the device in one copy.
        """
        times.start()
        spec = self.spec
        depth = min(depth, spec.num_layers - 1)  # exact: shallow tokens need the last layer's keys and values only
        token_ids = [token for p in pieces for token in p.sequence.token_ids[p.start : p.end]]
        batch = self.batch([(p.sequence, p.start, p.end) for p in pieces])
        deep, deep_runs, early, logits_rows = deep_rows(pieces)
        truncated = len(deep) < len(token_ids)
        deep_batch = self.batch(deep_runs) if truncated and deep_runs else None

        inputs = {"token_ids": torch.tensor(token_ids), "logits_rows": torch.tensor(logits_rows, dtype=torch.int64)}
        if truncated:
            inputs["deep"], inputs["early"] = (torch.tensor(rows, dtype=torch.int64) for rows in (deep, early))
            inputs["shallow_slots"] = batch.slot_mapping.index_fill(0, inputs["deep"], -1)
            if self.features(depth) is not None:
                inputs["previous"] = previous_rows(batch.cu_seqlens_q)
        inputs |= batch.integers()
        if deep_batch is not None:
            inputs |= deep_batch.integers("deep_")
        inputs = to_device(inputs, self.device)
        batch.ready(inputs, self.rope)
        if deep_batch is not None:
            deep_batch.ready(inputs, self.rope, "deep_")

        hidden = self.embed(inputs["token_ids"], batch)
        selecting = list(selections(pieces))
        for layer in range(depth):
            if layer in scoring_layers(depth):
                for selection, start, rows in selecting:
                    selection.keep_queries(layer, hidden[rows], start)
            if truncated and layer in partial:
                parts = (inputs["shallow_slots"], inputs["deep"], deep_batch)
                hidden = self.partial_layer(layer, partial[layer], hidden, batch, *parts)
            else:
                hidden = self.add_visual(layer, self.layer(layer, hidden, batch), batch)
        for selection, start, rows in selecting:
            selection.keep_hidden(hidden[rows], start)
        times.end("truncated_prefill")

        before = [piece.sequence.last_hidden for piece in pieces]
        if self.features(depth) is not None:
            for piece, last in zip(pieces, hidden[batch.cu_seqlens_q[1:].long() - 1], strict=True):
                piece.sequence.last_hidden = last
        if truncated:
            self.project(depth, hidden, before, batch, inputs["shallow_slots"], inputs.get("previous"))
            times.end("projection")
            if deep_batch is None and not early:
                return torch.empty(0, spec.vocab_size, device=self.device)
            ends, hidden = hidden[inputs["early"]], hidden[inputs["deep"]]
            if deep_batch is not None:
                batch = deep_batch
        for layer in range(depth, spec.num_layers) if len(hidden) else ():
            hidden = self.layer(layer, hidden, batch)
        hidden = torch.cat([hidden, ends]) if early else hidden
        whole = len(logits_rows) == len(hidden) and not early
        logits = self.head(hidden if whole else hidden[inputs["logits_rows"]])
        times.end("boundary")
        return logits

    def _deepen(self, pieces: list[SequenceChunk], logits: Tensor, depth: int, times: StageTimes) -> Tensor:
        """Runs the tokens that turns choose at their end, and the boundaries after them, from P up; returns the logits
        of all pieces, of which `logits` has those of the others.
        """
        times.start()
        chosen = [(piece.selection, *piece.selection.choose(self)) for piece in pieces if piece.selection]
        times.end("selection")
        owners = torch.cat([torch.full_like(positions, i) for i, (_, positions, _) in enumerate(chosen)])
        positions, hidden = (torch.cat(parts) for parts in list(zip(*chosen, strict=True))[1:])
        ends, results = owners.bincount().cumsum(0) - 1, []
        for start in range(0, len(owners), self.chunk_tokens):
            rows = slice(start, start + self.chunk_tokens)
            runs = [
                (chosen[owner][0].sequence, first, last)
                for owner in owners[rows].unique().tolist()
                for first, last in runs_of(positions[rows][owners[rows] == owner])
            ]
            batch, last = self.batch(runs), ends[(ends >= start) & (ends < start + self.chunk_tokens)] - start
            batch.ready(batch.integers(), self.rope)
            x = hidden[rows]
            for layer in range(depth, self.spec.num_layers):
                x = self.layer(layer, x, batch)
            if len(last):
                results.append(self.head(x[last]))
        times.end("boundary")
        results = torch.cat([logits, *results])
        order = sorted(range(len(pieces)), key=lambda i: pieces[i].selection is not None)
        return torch.empty_like(results).index_copy_(0, torch.tensor(order), results)

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
