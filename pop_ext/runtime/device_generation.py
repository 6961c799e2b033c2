"""The decode loop on a GPU: the host enqueues a step before it reads the tokens of the one before."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from .decoding import Decoder
from .kv_cache import CacheFullError
from .sampling import Row, TransformersRules

pop = torch.ops.pop


def decode_on_device(
    model, rules: TransformersRules, rows: list[Row], logits: Tensor, streamer, return_logprobs: bool, times, start
) -> None:
    """From prefill's logits until every row is finished; fills in `rows` and `times`.

    A row whose end shows in its tokens has one step too many by then, whose token is dropped and whose keys and values
    the next turn overwrites.
    """
    choose, settings = rules.batched(rows[0])
    decoder = Decoder(model, rows, choose, None if settings is None else [settings] * len(rows))
    loop = _Loop(model, rules, rows, decoder, streamer, return_logprobs)
    if choose == "logits":
        loop.choose(logits)
    else:
        decoder.choose_first(logits)
        loop.chosen(logits)
    first = 0.0  # when the first tokens arrived
    while decoder.pending or decoder.goes_on:
        try:
            if decoder.launch():
                if choose == "logits":
                    loop.choose(decoder.logits)
                else:
                    loop.chosen(decoder.logits)
        except CacheFullError:  # perhaps no row goes on after the tokens that are on their way
            if not decoder.pending:
                raise
        if decoder.pending:
            count = loop.receive()
            if not first:
                first = time.perf_counter()
                times.time_to_first_token = first - start
            else:
                times.decode_tokens += count
    times.decode = time.perf_counter() - first
    loop.finish()


class _Loop:
    """What happens to the tokens of a decode batch, on the device when they are chosen and on the host when they are
    read.
    """

    def __init__(self, model, rules, rows, decoder, streamer, return_logprobs):
        self.model, self.rules, self.rows, self.decoder, self.streamer = model, rules, rows, decoder, streamer
        self.logprobs = [] if return_logprobs else None  # [rows] on the device, of each step
        self.done = [False] * len(rows)

    def choose(self, logits: Tensor) -> None:
        """The next tokens by processors that `pop.sample` does not know."""
        active = self.decoder.rows
        rows = [self.rows[row.index] for row in active]
        scores = self.rules.scores(rows, [logits[row.index] for row in active])
        tokens = torch.empty(len(rows), dtype=torch.int64, device=scores.device)
        settings = uniforms = None
        if self.rules.do_sample:
            draws = [torch.rand((), generator=row.generator, dtype=torch.float64) for row in active]
            uniforms = torch.stack(draws)[None].to(scores.device, non_blocking=True)
            settings = scores.new_tensor([[1.0, 0.0, 1.0, 0.0, 1.0]]).expand(len(rows), 5).contiguous()
        pop.sample(scores.float(), settings, None, uniforms, None, tokens)
        self.decoder.put(tokens)
        self.chosen(logits)

    def chosen(self, logits: Tensor) -> None:
        """On the device: what else wants to know the tokens that were just chosen from `logits`."""
        tokens = self.decoder.buffers.tokens[: len(self.rows)]
        if self.logprobs is not None:
            logits = logits[: len(self.rows)]
            chosen = logits.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
            self.logprobs.append(chosen - logits.logsumexp(-1))
        for row in self.decoder.rows:
            ours = self.rows[row.index]
            if ours.ids is not None:
                ours.ids = torch.cat([ours.ids, tokens[None, row.index : row.index + 1]], dim=1)

    def receive(self) -> int:
        """On the host: takes the oldest tokens, and ends rows. Returns how many there were."""
        count = 0
        for index, token in self.decoder.receive():
            if self.done[index]:
                continue
            if token < 0:
                raise ValueError("no token can be sampled: the scores are not finite or every token is ruled out")
            row, sequence, count = self.rows[index], self.rows[index].sequence, count + 1
            row.tokens.append(token)
            sequence.token_ids.append(token)
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            ids = None if row.ids is None else row.ids[:, : len(sequence.token_ids)]
            if self.rules.is_finished(row, ids):
                # The last token belongs to the conversation; the next turn will run it.
                self.done[index] = True
                self.decoder.drop(index)
                sequence.num_cached = len(sequence.token_ids) - 1
                self.model.cache.shrink(sequence, len(sequence.token_ids))
        return count

    def finish(self) -> None:
        if self.logprobs is not None:
            for row, logprobs in zip(self.rows, torch.stack(self.logprobs, 1).tolist(), strict=True):
                row.logprobs += logprobs[: len(row.tokens)]
