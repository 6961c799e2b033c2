"""Decoding on a GPU: steps that the host enqueues without waiting, and reads one step late.

A step is embedding, advance of positions and slots, RoPE's rows, all layers, logits and the choice of tokens: kernels
of this project only, on static buffers. So it is captured in a CUDA graph, one for each batch bucket, context bucket
and way to choose, and a step is one replay. What changes on the host (a row that ends, blocks, random numbers) goes to
the device in one copy, once in up to `HORIZON` steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..transfer import Packing
from .forward_batch import ForwardBatch
from .kv_cache import BLOCK_SIZE, CacheFullError, Sequence

pop = torch.ops.pop

HORIZON = 64  # steps for which the host prepares: blocks and random numbers
LEAST_CONTEXT = 256  # tokens; context buckets are this and its doubles


def batch_bucket(rows: int) -> int:
    """1, 2, 4, 8, and then multiples of 8: the rows of a step, padded."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8


def context_bucket(tokens: int) -> int:
    bucket = LEAST_CONTEXT
    while bucket < tokens:
        bucket *= 2
    return bucket


class Step:
    """One decode step for a batch bucket, context bucket and way to choose, on buffers of its own but for the tokens.

    The first run is not captured: it loads what CUDA loads lazily, which a capture forbids.
    """

    def __init__(self, model, buffers: Buffers, context: int, choose: str):
        self.model, self.buffers, self.context, self.choose = model, buffers, context, choose
        rows, device = buffers.rows, model.device
        state = self.state([], HORIZON)
        self.packing = Packing(state)
        self.memory = torch.empty(self.packing.size, dtype=torch.uint8, device=device)
        self.views = self.packing.unpack(self.memory)
        self.positions = torch.empty(rows, dtype=torch.int64, device=device)
        self.slot_mapping = torch.empty(rows, dtype=torch.int64, device=device)
        self.logits, self.graph, self.runs = None, None, 0

    def state(self, rows: list[DecodeRow], horizon: int) -> dict[str, Tensor]:
        """What the host tells the device: of `rows` (the others are padded) before their next token."""
        count, columns = self.buffers.rows, -(-self.context // BLOCK_SIZE)
        tables = torch.zeros(count, columns, dtype=torch.int32)
        seqlens = torch.zeros(count, dtype=torch.int32)
        shifts = torch.zeros(count, dtype=torch.int64)
        uniforms = torch.zeros(HORIZON, count, dtype=torch.float64)
        for row in rows:
            blocks = row.sequence.blocks[:columns]
            tables[row.index, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            seqlens[row.index] = row.length
            if self.model.rope.axes is not None and row.sequence.visuals:
                shifts[row.index] = row.sequence.visuals[-1].shift
            if row.uniforms:
                uniforms[:horizon, row.index] = torch.tensor(row.uniforms[:horizon], dtype=torch.float64)
        return {
            "block_tables": tables,
            "seqlens_k": seqlens,
            "shifts": shifts,
            "cu_seqlens_q": torch.arange(count + 1, dtype=torch.int32),
            "uniforms": uniforms,
            "step": torch.full((1,), -1, dtype=torch.int32),
        }

    def upload(self, rows: list[DecodeRow], horizon: int) -> None:
        host = self.packing.pack(self.state(rows, horizon), self.model.device)
        self.memory.copy_(host, non_blocking=True)

    def run(self) -> None:
        """Enqueues the step."""
        module = torch.get_device_module(self.model.device)
        self.runs += 1
        if self.runs == 1 or not self.model.cuda_graphs:
            self._enqueue()
            return
        if self.graph is None:
            self.graph = module.CUDAGraph()
            with module.graph(self.graph):
                self._enqueue()
        self.graph.replay()

    def _enqueue(self) -> None:
        model, buffers, views = self.model, self.buffers, self.views
        pop.decode_advance(
            views["block_tables"], BLOCK_SIZE, views["shifts"], views["seqlens_k"], self.positions, self.slot_mapping,
            views["step"],
        )  # fmt: skip
        hidden = pop.embedding(buffers.tokens, model.weights.embedding, model.spec.embedding_scale)
        batch = ForwardBatch.of_step(
            views["block_tables"], views["cu_seqlens_q"], views["seqlens_k"], self.slot_mapping, self.context
        )
        batch.turn(pop.rope_gather(*model.rope_tables(), self.positions))
        for layer in range(model.spec.num_layers):
            hidden = model.layer(layer, hidden, batch)
        self.logits = model.head(hidden)
        if self.choose == "greedy":
            pop.sample(self.logits, None, None, None, None, buffers.tokens)
        elif self.choose == "sample":
            pop.sample(self.logits, buffers.settings, buffers.seen, views["uniforms"], views["step"], buffers.tokens)


class Buffers:
    """What the steps of one batch bucket share: the tokens, which a step reads and writes, and how they are chosen."""

    def __init__(self, model, rows: int):
        self.rows, self.model = rows, model
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=model.device)
        self.settings = torch.zeros(rows, 5, dtype=torch.float32, device=model.device)
        self.seen: Tensor | None = None  # [rows, V] uint8, made when first asked for
        self.steps: dict[tuple[int, str, bool], Step] = {}

    def step(self, context: int, choose: str) -> Step:
        key = (context, choose, self.seen is not None)
        if key not in self.steps:
            self.steps[key] = Step(self.model, self, context, choose)
        return self.steps[key]


@dataclass(eq=False)
class DecodeRow:
    """A row of a decode batch. length: tokens whose keys and values the steps so far put into the cache."""

    index: int
    sequence: Sequence
    length: int
    remaining: int  # steps that it may still take
    generator: torch.Generator | None
    uniforms: list[float]

    def draw(self, count: int) -> None:
        """Random numbers for `count` steps: the generator's, in order."""
        if self.generator is not None and len(self.uniforms) < count:
            more = torch.rand(count - len(self.uniforms), generator=self.generator, dtype=torch.float64)
            self.uniforms += more.tolist()


class Decoder:
    """The decode batch of one `generate` call. Rows keep their place; one that ended is a padded row from then on."""

    def __init__(self, model, rows, choose: str, settings: list[list[float]] | None):
        """rows: `sampling.Row`s after prefill. choose: "greedy", "sample" by `settings` (a row of pop.sample's each),
        or "logits", where the caller sets the tokens.
        """
        self.model, self.choose = model, choose
        count = batch_bucket(len(rows))
        self.buffers = model.decode_buffers.get(count)
        if self.buffers is None:
            self.buffers = model.decode_buffers[count] = Buffers(model, count)
        self.rows = [
            DecodeRow(i, row.sequence, row.sequence.num_cached, row.max_new_tokens - 1, row.generator, [])
            for i, row in enumerate(rows)
        ]
        self.step: Any = None  # the step that is launched, once there is one
        self.left = 0
        self.pending: list[tuple[Tensor, Any, list[int]]] = []  # tokens on their way to the host, and of which rows
        if choose == "sample" and settings is not None:
            padded = settings + [settings[0]] * (count - len(settings))
            self.buffers.settings.copy_(torch.tensor(padded, dtype=torch.float32))
            penalised = any(setting[4] != 1 for setting in settings)
            if penalised and self.buffers.seen is None:
                shape = (count, model.spec.vocab_size)
                self.buffers.seen = torch.empty(shape, dtype=torch.uint8, device=model.device)
            if self.buffers.seen is not None:
                seen = torch.zeros(self.buffers.seen.shape, dtype=torch.uint8)
                for marks, row in zip(seen, rows, strict=False):
                    marks[torch.tensor(row.sequence.token_ids)] = 1
                self.buffers.seen.copy_(seen)

    def choose_first(self, logits: Tensor) -> None:
        """The tokens after prefill, from its logits [rows, V]; they go to the host."""
        buffers, count = self.buffers, len(logits)
        tokens = torch.empty(count, dtype=torch.int64, device=self.model.device)
        if self.choose == "greedy":
            pop.sample(logits, None, None, None, None, tokens)
        else:
            for row in self.rows:
                row.draw(1)
            uniforms = [row.uniforms.pop(0) if row.uniforms else 0.0 for row in self.rows]
            uniforms = torch.tensor([uniforms], dtype=torch.float64)
            seen = None if buffers.seen is None else buffers.seen[:count]
            pop.sample(logits, buffers.settings[:count], seen, uniforms.to(self.model.device), None, tokens)
        self.put(tokens)

    def put(self, tokens: Tensor) -> None:
        """Tokens of the rows in turn, on the device, for the next step, and on their way to the host."""
        if len(tokens) == self.rows[-1].index + 1:
            self.buffers.tokens[: len(tokens)] = tokens
        else:
            for row, token in zip(self.rows, tokens, strict=True):
                self.buffers.tokens[row.index] = token
        self._send()

    def _send(self) -> None:
        device = self.model.device
        host = torch.empty(self.buffers.rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        host.copy_(self.buffers.tokens, non_blocking=True)
        event = torch.get_device_module(device).Event()
        event.record()
        self.pending.append((host, event, [row.index for row in self.rows]))

    def receive(self) -> list[tuple[int, int]]:
        """The oldest tokens that were sent, when they are there: the row of each, and the token."""
        host, event, indices = self.pending.pop(0)
        event.synchronize()
        tokens = host.tolist()
        return [(index, tokens[index]) for index in indices]

    @property
    def logits(self) -> Tensor:
        """Of the last step, [rows of the bucket, V]: until the next one is enqueued."""
        return self.step.logits

    @property
    def goes_on(self) -> bool:
        return any(row.remaining > 0 for row in self.rows)

    def drop(self, index: int) -> None:
        """A row ended: later steps leave it out."""
        self.rows = [row for row in self.rows if row.index != index]
        self.left = 0

    def launch(self) -> bool:
        """Enqueues a step for the rows that may go on; False, and nothing done, where there is none.

        CacheFullError, before anything is changed, where the cache has no room for it.
        """
        going = [row for row in self.rows if row.remaining > 0]
        if len(going) < len(self.rows):
            self.rows, self.left = going, 0
        if not self.rows:
            return False
        longest = max(row.length for row in self.rows) + 1
        if self.left == 0 or longest > self.step.context:
            self._prepare(longest)
        self.step.run()
        self.left -= 1
        for row in self.rows:
            row.length += 1
            row.remaining -= 1
            if row.uniforms:
                del row.uniforms[0]
        if self.choose != "logits":
            self._send()
        return True

    def _prepare(self, longest: int) -> None:
        """Blocks, random numbers and the step for the next tokens of all rows."""
        context = context_bucket(longest)
        horizon = min(HORIZON, context - longest + 1, max(row.remaining for row in self.rows))
        sequences = [row.sequence for row in self.rows]
        try:
            self.model.cache.grow(sequences, [row.length + min(horizon, row.remaining) for row in self.rows])
        except CacheFullError:
            horizon = 1
            self.model.cache.grow(sequences, [row.length + 1 for row in self.rows])
        if self.choose == "sample":
            for row in self.rows:
                row.draw(horizon)
        self.step, self.left = self.buffers.step(context, self.choose), horizon
        self.step.upload(self.rows, horizon)
