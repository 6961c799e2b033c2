"""Generation: prompts in, tokens and text out.

`Model.generate` turns prompts into token ids, prefills them in one batch, and decodes until every row is finished; rows
of a batch share the arithmetic and nothing else. `sampling` chooses the tokens.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from .checks import check_integer
from .device import StageTimes
from .device_generation import decode_on_device
from .finite import NonFiniteError, explained
from .layers import in_turn
from .model import PrefillModel
from .prompts import encode_prompt, media_lists, prompt_list
from .sampling import TransformersRules

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class GenerationTimes:
    """Seconds of wall time of one `generate` call, all rows together.

    The vision tower, the stages of prefill (`selection` is the choice of `deep_tokens`), then the decode loop: model,
    choice of token and streamer. `time_to_first_token` runs from the start of the call's turn until the first tokens
    are chosen, so it is the first five and what surrounds them, as the processing of images.
    """

    vision: float = 0.0
    truncated_prefill: float = 0.0
    projection: float = 0.0
    selection: float = 0.0
    boundary: float = 0.0
    decode: float = 0.0
    time_to_first_token: float = 0.0
    decode_tokens: int = 0  # that the decode loop made: all but the first of each row

    @property
    def decode_tokens_per_second(self) -> float | None:
        return self.decode_tokens / self.decode if self.decode_tokens else None


@dataclass
class GenerationOutput:
    """What `generate` returns; the lists have an entry per prompt.

    prompt_tokens: how many tokens the prompt has, those of images included.
    reused_tokens: how many of them the prefix cache had (`load(..., prefix_cache=True)`).
    tokens: the new token ids, an end-of-sequence token included where one ended the row.
    text: `tokens` decoded without special tokens; None for a model without a tokenizer.
    logprobs: per new token its natural log-probability under the model's own next-token distribution, before any
        logits processor, temperature or other warper; None unless asked for.
    times: seconds per stage.
    sequences: with `keep=True`, the conversations, still in the cache; pass them to the next call. Otherwise None.
    """

    prompt_tokens: list[int]
    reused_tokens: list[int]
    tokens: list[list[int]]
    text: list[str] | None
    logprobs: list[list[float]] | None
    times: GenerationTimes
    sequences: list | None

    def __repr__(self) -> str:
        shown = self.tokens if self.text is None else self.text
        first = f"{len(self.tokens)} answers" if len(shown) > 1 else f"{shown[0]!r:.200}"
        counts = ", ".join(f"{asked} + {len(new)}" for asked, new in zip(self.prompt_tokens, self.tokens, strict=True))
        kept = "" if self.sequences is None else ", conversations kept"
        return (
            f"<GenerationOutput {first}; prompt + new tokens {counts:.100}; first token after "
            f"{self.times.time_to_first_token:.3f} s{kept}>"
        )


def ends_stream(method: Callable[P, R]) -> Callable[P, R]:
    """A method whose `streamer` is ended also when something failed: a reader in another thread waits for the end."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        finally:
            if isinstance(streamer := kwargs.get("streamer"), BaseStreamer):
                streamer.end()

    return call


class Model(PrefillModel):
    """A model that generates: `generate` on top of `new_sequence`, `prefill`, `decode` and `free`."""

    @ends_stream
    @in_turn
    @torch.no_grad()
    def generate(
        self,
        prompts,
        *,
        images: list | None = None,
        videos: list | None = None,
        prefill_depth: int | float | None = None,
        sequences: list | None = None,
        keep: bool = False,
        generation_config: transformers.GenerationConfig | None = None,
        logits_processor: list | None = None,
        stopping_criteria: list | None = None,
        streamer=None,
        seed: int | None = None,
        return_logprobs: bool = False,
        **generation_kwargs,
    ) -> GenerationOutput:
        """Continue one prompt or a batch of prompts of any lengths.

        prompts: a string, a chat (list of {"role", "content"} messages, put through the tokenizer's chat template), a
            list of token ids, or a list of any of these.
        images: for a single prompt a list of its images, for a list of prompts a list of such lists (or None). An image
            is a file's path or a PIL image. They go where the prompt has the model's placeholders, or before it if it
            has none: in a string the placeholder token (Qwen3-VL <|image_pad|>, Gemma-3 <start_of_image>), in a chat a
            part {"type": "image"} of a message's content, which may hold the image itself under "image"; token ids
            have all of an image's tokens.
        videos: likewise, for Qwen3-VL; a video is (frames, frames per second), frames being images of one size.
        prefill_depth: for this call, instead of the model's own or its plan: layers (int) or their share (float in
            (0, 1]).
        sequences: conversations to go on with, `sequences` of an earlier output that was made with `keep=True`, one per
            prompt. A prompt is then the new turn alone: text is tokenized without a beginning-of-sequence token, and
            a chat is the new messages only, put through the template as what follows an assistant's answer.
        keep: leave the conversations in the cache and return them. `sequence.close()`, or a `with` block, gives their
            room back. Otherwise they are freed, those passed in `sequences` included, however the call ends. When a
            call with `keep=True` fails, the new ones are freed.
        generation_config, **generation_kwargs: transformers' settings, by default the checkpoint's
            generation_config.json: lengths (20 new tokens where nothing says otherwise, as in transformers), sampling,
            penalties, stop strings, ... Whatever is not one sequence per prompt, greedy or sampled (beams, assisted
            decoding, guidance, ...) raises. A row also ends where the model's context does.
        logits_processor: a list of your own, called with ids [rows, n] (whole conversations, never padded) and scores
            [rows, vocabulary]: once a token for all rows whose prompts are of one length, which grow alike.
        stopping_criteria: a list of your own, called once per row and token with that row's ids [1, n] and None for
            scores.
        streamer: a transformers streamer, for a single prompt; it gets the new prompt's ids, then every token.
        seed: for sampling. Row i draws from its own generator seeded with seed + i, whatever its neighbours are;
            None takes a seed from torch's global generator.
        return_logprobs: also return the log-probability of each new token under the model's own distribution.

        Calls on one model from several threads take turns: each waits until no other runs (`prefill`, `decode` and
        `logits` included). Prompts in one batch are faster than in turns. A stopping criterion that looks at a
        threading.Event stops a call from another thread.

        Raises TypeError or ValueError for an argument that cannot be used, before anything is computed.
        """
        start = time.perf_counter()
        prompts, single = prompt_list(prompts)
        rules = TransformersRules(self, generation_config, generation_kwargs, logits_processor, stopping_criteria)
        if streamer is not None and len(prompts) > 1:
            raise ValueError(f"streamer is given with {len(prompts)} prompts, expected a single prompt")
        if sequences is not None:
            _check_sequences(sequences, len(prompts))
        images = media_lists("images", images, prompts, single)
        videos = media_lists("videos", videos, prompts, single)
        check_integer("seed", seed)
        if seed is None and rules.do_sample:
            seed = int(torch.randint(2**62, ()))

        rows, prompt_ids, media = [], [], []
        for i, prompt in enumerate(prompts):
            sequence = sequences[i] if sequences is not None else None
            history = sequence.token_ids if sequence is not None else []
            token_ids, pictures = encode_prompt(self, prompt, f"prompts[{i}]", history, images[i], videos[i])
            prompt_ids.append(token_ids)
            media.append(pictures)
            generator = None if seed is None or not rules.do_sample else torch.Generator().manual_seed(seed + i)
            rows.append(rules.row(sequence, history + prompt_ids[-1], generator))

        created, done = [], False
        try:
            for row in rows:
                if row.sequence is None:
                    row.sequence = self.new_sequence()
                    created.append(row.sequence)
            times = self._generate(rules, rows, prompt_ids, media, prefill_depth, streamer, return_logprobs, start)
            reused = [row.sequence.num_reused for row in rows]
            done = True
        finally:
            if not keep:
                created = [row.sequence for row in rows if row.sequence is not None]
            if not (keep and done):
                for sequence in created:
                    self.free(sequence)

        tokens = [row.tokens for row in rows]
        return GenerationOutput(
            prompt_tokens=[len(ids) for ids in prompt_ids],
            reused_tokens=reused,
            tokens=tokens,
            text=[self.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens] if self.tokenizer else None,
            logprobs=[row.logprobs for row in rows] if return_logprobs else None,
            times=times,
            sequences=[row.sequence for row in rows] if keep else None,
        )

    def _generate(
        self, rules, rows, prompt_ids, media, prefill_depth, streamer, return_logprobs, start
    ) -> GenerationTimes:
        """Prefill and decode until all rows are finished."""
        try:
            if streamer is not None:
                streamer.put(torch.tensor(prompt_ids))
            clock = time.perf_counter()
            visuals = [[visual for picture in pictures for visual in self.vision.encode(picture)] for pictures in media]
            visuals = [sorted(spans, key=lambda visual: visual.start) for spans in visuals]
            vision = time.perf_counter() - clock if any(media) else 0.0
            sequences = [row.sequence for row in rows]
            stages, depth = StageTimes(self.device), self.resolve_prefill_depth(prefill_depth)
            options = {"share": self.prefix_cache, "partial": self.partial_layers(prefill_depth)}
            logits = self._turn(sequences, prompt_ids, "prompts", depth, stages, visuals, **options)
            if self.device.type != "cpu":
                times = GenerationTimes(vision)
                decode_on_device(self, rules, rows, logits, streamer, return_logprobs, times, start)
                for stage in stages.STAGES:
                    setattr(times, stage, getattr(stages, stage))
                return times
            times = GenerationTimes(vision, *(getattr(stages, stage) for stage in stages.STAGES))
            tokens = rules.choose(rows, logits, return_logprobs)
            first = time.perf_counter()
            times.time_to_first_token = first - start
            while True:
                if streamer is not None:
                    streamer.put(torch.tensor(tokens))
                finished = [rules.is_finished(row) for row in rows]
                if any(finished):
                    for row in (row for row, is_finished in zip(rows, finished, strict=True) if is_finished):
                        # The last token belongs to the conversation; the next turn will run it.
                        row.sequence.token_ids.append(row.tokens[-1])
                    rows = [row for row, is_finished in zip(rows, finished, strict=True) if not is_finished]
                    if not rows:
                        break
                    tokens = [row.tokens[-1] for row in rows]
                logits = self.decode([row.sequence for row in rows], tokens)
                tokens = rules.choose(rows, logits, return_logprobs)
                times.decode_tokens += len(tokens)
            times.decode = time.perf_counter() - first
            return times
        except NonFiniteError as error:
            raise explained(error, self, prompt_ids) from None


def _check_sequences(sequences, count: int) -> None:
    if not isinstance(sequences, (list, tuple)) or not all(hasattr(sequence, "token_ids") for sequence in sequences):
        raise TypeError(
            f"sequences is {sequences!r:.100}, expected a list of conversations, `sequences` of an earlier output"
        )
    if len(sequences) != count:
        raise ValueError(f"sequences has {len(sequences)} conversations for {count} prompts: expected one per prompt")
    if len({id(sequence) for sequence in sequences}) != count:
        raise ValueError("sequences has the same conversation twice")
