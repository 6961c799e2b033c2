"""Generation: prompts in, tokens and text out.

`GenerationMixin.generate` is part of `Model`. It turns prompts into token ids, prefills them in one batch, and decodes
until every row is finished; rows of a batch share the arithmetic and nothing else. What is allowed as a next token and
when a row is finished is decided by transformers' own logits processors and stopping criteria: `TransformersRules`
builds them from a `GenerationConfig`, and is the one place that touches transformers' private methods.
"""

import copy
import operator
import time
import warnings
from dataclasses import dataclass, field

import torch
import transformers
from transformers.generation import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

# Settings of a GenerationConfig that ask for something else than one sequence per prompt, decoded greedily or by
# sampling from POP's own cache. Each with the values that ask for nothing; any other value raises.
UNSUPPORTED_SETTINGS = {
    # beams and constraints
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0),
    "length_penalty": (None, 1),
    "early_stopping": (None, False),
    "constraints": (None,),
    "force_words_ids": (None,),
    "num_return_sequences": (None, 1),
    # contrastive search, DoLa, guidance, assisted decoding
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "guidance_scale": (None, 1),
    "token_healing": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "is_assistant": (None, False),
    "speculation_type": (None,),
    "use_mtp": (None, False),
    # the cache and the forward pass are ours
    "use_cache": (None, True),
    "cache_implementation": (None,),
    "cache_config": (None,),
    "max_cache_len": (None,),
    "prefill_chunk_size": (None,),
    "compile_config": (None,),
    "low_memory": (None, False),
    # outputs that GenerationOutput does not have
    "return_dict_in_generate": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}


@dataclass
class GenerationTimes:
    """Seconds of wall time of one `generate` call, all rows together.

    The vision tower, the three stages of prefill, then the decode loop: model, choice of token and streamer.
    `time_to_first_token` runs from the call until the first tokens are chosen, so it is the first four and what
    surrounds them, as the processing of images.
    """

    vision: float = 0.0
    truncated_prefill: float = 0.0
    projection: float = 0.0
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
    tokens: the new token ids, an end-of-sequence token included where one ended the row.
    text: `tokens` decoded without special tokens; None for a model without a tokenizer.
    logprobs: per new token its natural log-probability under the model's own next-token distribution, before any
        logits processor, temperature or other warper; None unless asked for.
    times: seconds per stage.
    sequences: with `keep=True`, the conversations, still in the cache; pass them to the next call. Otherwise None.
    """

    prompt_tokens: list[int]
    tokens: list[list[int]]
    text: list[str] | None
    logprobs: list[list[float]] | None
    times: GenerationTimes
    sequences: list | None


@dataclass
class Row:
    """One sequence while it is generated."""

    sequence: object
    max_new_tokens: int
    processors: LogitsProcessorList
    generator: torch.Generator | None
    ids: torch.Tensor | None  # [1, n] int64, the whole conversation; None where neither processors nor criteria look
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TransformersRules(transformers.GenerationMixin):
    """Which next tokens are allowed and when a row is finished, as transformers derives it from a `GenerationConfig`.

    transformers builds its processors and criteria in private methods of its own mixin, for one padded batch. They are
    called here and nowhere else, once per row, so that a row sees its own ids, unpadded, and its own prompt length.
    """

    def __init__(self, model, generation_config, settings, logits_processor, stopping_criteria):
        self.context = model.spec.max_position_embeddings
        # what the inherited methods expect of a model
        self.config, self.generation_config, self.device = model.config, model.generation_config, model.device

        if generation_config is not None and not isinstance(generation_config, transformers.GenerationConfig):
            raise TypeError(f"generation_config must be a GenerationConfig, got {_kind(generation_config)}")
        for name in ("max_new_tokens", "max_length", "min_new_tokens", "min_length"):
            _check_integer(name, settings.get(name))
        self.has_default_length = (
            all(config is None or config.max_length is None for config in (generation_config, self.generation_config))
            and settings.get("max_length") is None
        )
        self.settings, unknown = self._prepare_generation_config(generation_config, **settings)
        for name, neutral in UNSUPPORTED_SETTINGS.items():
            value = getattr(self.settings, name, None)
            if value not in neutral:
                raise ValueError(
                    f"{name}={value!r} is not supported: generate makes one sequence per prompt, greedily or by "
                    f"sampling, from its own cache (leave it at {neutral[-1]!r})"
                )
        if unknown:
            raise ValueError(f"generate does not know or support {', '.join(sorted(unknown))}")
        if self.has_default_length and self.settings.max_new_tokens is None:
            warnings.warn(
                f"neither max_new_tokens nor max_length is set: making {self.settings.max_length} tokens at most, "
                "transformers' default",
                stacklevel=3,
            )
        self._prepare_special_tokens(self.settings, kwargs_has_attention_mask=True, device=self.device, batch_size=1)

        self.do_sample = bool(self.settings.do_sample)
        self.logits_processor = _check_list("logits_processor", logits_processor)
        # Criteria are the same for all rows but for the length. Length and end-of-sequence tokens are the usual ones
        # and are compared as Python numbers; a tensor per token and criterion would cost more than they are worth.
        config = copy.copy(self.settings)
        config.max_length = None
        self.max_length, self.eos_tokens, self.criteria = None, set(), StoppingCriteriaList()
        stopping_criteria = _check_list("stopping_criteria", stopping_criteria)
        for criterion in self._get_stopping_criteria(config, stopping_criteria, model.tokenizer):
            if type(criterion) is MaxLengthCriteria:  # the caller's own: it goes before the settings
                self.max_length = criterion.max_length
            elif type(criterion) is EosTokenCriteria:
                self.eos_tokens.update(criterion.eos_token_id.tolist())
            else:
                self.criteria.append(criterion)

    def row(self, sequence, token_ids: list[int], generator) -> Row:
        """The state of a row whose conversation, the new prompt included, is `token_ids`."""
        length, config = len(token_ids), copy.copy(self.settings)
        if config.max_new_tokens is not None:
            config.max_length = length + config.max_new_tokens
        elif self.has_default_length:
            config.max_length = length + config.max_length
        if self.max_length is not None:
            config.max_length = self.max_length
        config.max_length = min(config.max_length, self.context)
        if config.min_new_tokens is not None:
            config.min_length = length + config.min_new_tokens
        if length >= config.max_length:
            raise ValueError(
                f"max_length={config.max_length} leaves nothing to generate: the conversation with its new prompt has "
                f"{length} tokens already (the model's context is {self.context}; max_new_tokens counts new ones only)"
            )
        ids = torch.tensor([token_ids], dtype=torch.int64, device=self.device)
        processors = self._get_logits_processor(
            config,
            input_ids_seq_length=length,
            encoder_input_ids=ids,
            logits_processor=self.logits_processor,
            device=self.device,
        )
        return Row(
            sequence, config.max_length - length, processors, generator, ids if processors or self.criteria else None
        )

    def choose(self, rows: list[Row], logits: torch.Tensor, return_logprobs: bool) -> list[int]:
        """The next token of every row from logits [rows, vocabulary] float32; appends it to the rows."""
        if self.do_sample or rows[0].processors:
            tokens = [self._choose_one(row, logits[i : i + 1].clone()) for i, row in enumerate(rows)]
        else:
            tokens = _argmax(logits)
        if return_logprobs:
            chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
            for row, logprob in zip(rows, (chosen - logits.logsumexp(-1)).tolist(), strict=True):
                row.logprobs.append(logprob)
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)
            if row.ids is not None:
                row.ids = torch.cat([row.ids, row.ids.new_tensor([[token]])], dim=1)
        return tokens

    def _choose_one(self, row: Row, logits: torch.Tensor) -> int:
        scores = row.processors(row.ids, logits)
        return sample(scores.softmax(-1), row.generator) if self.do_sample else _argmax(scores)[0]

    def is_finished(self, row: Row) -> bool:
        # the criteria are always asked: some count or watch the tokens that they are shown
        stopped = bool(self.criteria(row.ids, None).any()) if self.criteria else False
        return stopped or len(row.tokens) >= row.max_new_tokens or row.tokens[-1] in self.eos_tokens


class GenerationMixin:
    """`generate`, on top of the model's `new_sequence`, `prefill`, `decode` and `free`."""

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
        prefill_depth: for this call, instead of the model's own: layers (int) or their share (float in (0, 1]).
        sequences: conversations to go on with, `sequences` of an earlier output that was made with `keep=True`, one per
            prompt. A prompt is then the new turn alone: text is tokenized without a beginning-of-sequence token, and
            a chat is the new messages only, put through the template as what follows an assistant's answer.
        keep: leave the conversations in the cache and return them. Otherwise they are freed, those passed in
            `sequences` included, however the call ends. When a call with `keep=True` fails, the new ones are freed.
        generation_config, **generation_kwargs: transformers' settings, by default the checkpoint's
            generation_config.json: lengths (20 new tokens where nothing says otherwise, as in transformers), sampling,
            penalties, stop strings, ... Whatever is not one sequence per prompt, greedy or sampled (beams, assisted
            decoding, guidance, ...) raises. A row also ends where the model's context does.
        logits_processor, stopping_criteria: lists of your own, called once per row and token with that row's ids
            [1, n] (the whole conversation) and scores [1, vocabulary]; scores are not handed to stopping criteria.
        streamer: a transformers streamer, for a single prompt; it gets the new prompt's ids, then every token.
        seed: for sampling. Row i draws from its own generator seeded with seed + i, whatever its neighbours are;
            None takes a seed from torch's global generator.
        return_logprobs: also return the log-probability of each new token under the model's own distribution.

        Raises TypeError or ValueError for an argument that cannot be used, before anything is computed.
        """
        start = time.perf_counter()
        prompts, single = _prompt_list(prompts)
        rules = TransformersRules(self, generation_config, generation_kwargs, logits_processor, stopping_criteria)
        if streamer is not None and len(prompts) > 1:
            raise ValueError(f"streamer: a streamer takes a single prompt, got {len(prompts)} prompts")
        if sequences is not None:
            _check_sequences(sequences, len(prompts))
        images = _media_lists("images", images, prompts, single)
        videos = _media_lists("videos", videos, prompts, single)
        _check_integer("seed", seed)
        if seed is None and rules.do_sample:
            seed = int(torch.randint(2**62, ()))

        rows, prompt_ids, media = [], [], []
        for i, prompt in enumerate(prompts):
            sequence = sequences[i] if sequences is not None else None
            history = sequence.token_ids if sequence is not None else []
            token_ids, pictures = encode_prompt(self, prompt, f"prompts[{i}]", history, images[i], videos[i])
            prompt_ids.append(token_ids)
            media.append(pictures)
            generator = torch.Generator(self.device).manual_seed(seed + i) if rules.do_sample else None
            rows.append(rules.row(sequence, history + prompt_ids[-1], generator))

        created, done = [], False
        try:
            for row in rows:
                if row.sequence is None:
                    row.sequence = self.new_sequence()
                    created.append(row.sequence)
            times = self._generate(rules, rows, prompt_ids, media, prefill_depth, streamer, return_logprobs, start)
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
            logits, stages = self.prefill(sequences, prompt_ids, visuals=visuals, prefill_depth=prefill_depth)
            times = GenerationTimes(vision, stages.truncated_prefill, stages.projection, stages.boundary)
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
        finally:
            if streamer is not None:
                streamer.end()  # also when something failed: a reader in another thread waits for the end


def sample(probabilities: torch.Tensor, generator: torch.Generator) -> int:
    """Draws an index from probabilities [1, vocabulary] by inverting their sum: one random number a token.

    torch.multinomial draws one for every entry of the vocabulary, which takes as long as a small model does.
    """
    sums = probabilities[0].cumsum(0, dtype=torch.float64)
    point = torch.rand((), generator=generator, dtype=torch.float64, device=sums.device) * sums[-1]
    if not point.isfinite():
        raise ValueError("no token can be sampled: the scores are not finite or every token is ruled out")
    return int(
        torch.searchsorted(sums, point, right=True).clamp_(max=len(sums) - 1)
    )  # right: never one of probability 0


def _argmax(scores: torch.Tensor) -> list[int]:
    return (scores.numpy() if scores.is_cpu else scores).argmax(-1).tolist()  # numpy's is 30 times faster than torch's


def encode_prompt(model, prompt, name: str, history: list[int], images=(), videos=()) -> tuple[list[int], list]:
    """The token ids of one prompt, which is text, chat messages or token ids, and its images and videos, ready for the
    vision tower (`vision.Media`). `history` is the conversation so far, if any.
    """
    if not isinstance(prompt, (str, list, tuple)):
        raise TypeError(f"{name} must be a string, a list of chat messages or a list of token ids, got {_kind(prompt)}")
    is_text, is_chat = isinstance(prompt, str), bool(prompt) and isinstance(prompt[0], dict)
    if is_chat:
        prompt, images, videos = _chat_media(prompt, name, images, videos)
    if (images or videos) and model.vision is None:
        kind = "images" if images else "videos"
        raise ValueError(f"{name} has {kind}, but this model ({model.spec.model_type}) reads text only")
    if (is_text or is_chat) and model.tokenizer is None:
        raise ValueError(f"{name} is text, but the model has no tokenizer: pass token ids")
    media = {"image": [], "video": []}
    if images or videos:
        media = {
            "image": [model.vision.process_image(image, f"{name}, image {i}") for i, image in enumerate(images)],
            "video": [model.vision.process_video(video, f"{name}, video {i}") for i, video in enumerate(videos)],
        }
    if is_text or is_chat:
        text = _render_chat(model.tokenizer, prompt, name, continues=bool(history)) if is_chat else prompt
        if model.vision is not None:
            kinds = {kind: model.vision.placeholder(kind, model.tokenizer) for kind in model.vision.kinds}
            if is_text and not any(token in text for token in kinds.values()):
                text = (
                    "".join(model.vision.written(kind, model.tokenizer) for kind in kinds for _ in media[kind]) + text
                )
            text = model.vision.expand(text, media, name, model.tokenizer)
        token_ids = model.tokenizer(text, add_special_tokens=is_text and not history).input_ids
        # A finished answer ends with the token that a chat template puts after it: once is enough.
        if is_chat and history and history[-1:] == token_ids[:1]:
            token_ids = token_ids[1:]
    else:
        token_ids = []
        for i, token in enumerate(prompt):
            if not _is_integer(token):
                raise TypeError(f"{name}[{i}] must be a token id (int), got {_kind(token)}")
            token_ids.append(operator.index(token))
    if not token_ids:
        raise ValueError(f"{name} is empty: a prompt has at least one token")
    vocab_size = model.spec.vocab_size
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        wrong = next(i for i, token in enumerate(token_ids) if not 0 <= token < vocab_size)
        raise ValueError(
            f"{name} has token id {token_ids[wrong]} at position {wrong}, outside of the vocabulary [0, {vocab_size})"
        )
    pictures = {kind: [item for item, _ in entries] for kind, entries in media.items()}
    if model.vision is not None:
        model.vision.locate(token_ids, pictures["image"], pictures["video"], name)
    return token_ids, pictures["image"] + pictures["video"]


def _chat_media(messages, name: str, images, videos) -> tuple[list, list, list]:
    """Chat messages with a placeholder part for each image and video, and these in order.

    A part may bring its own; the others take the next of `images` and `videos`. Where no message has parts for any,
    they go before the text of the first message of the user.
    """
    given, found = {"image": list(images), "video": list(videos)}, {"image": [], "video": []}
    result, waiting = [], {kind: list(items) for kind, items in given.items()}
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list | tuple):
            parts = []
            for part in content:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind not in ("text", "image", "video"):
                    raise ValueError(f"{name}: a part of a message is {part!r:.80}, expected text, image or video")
                if kind != "text":
                    if kind in part:
                        found[kind].append(part[kind])
                    elif waiting[kind]:
                        found[kind].append(waiting[kind].pop(0))
                    else:
                        raise ValueError(f"{name} has more parts of type {kind} than {kind}s: expected one for each")
                    part = {"type": kind}
                parts.append(part)
            message = message | {"content": parts}
        result.append(message)
    if not any(found.values()):
        for i, message in enumerate(result):
            if any(waiting.values()) and isinstance(message, dict) and message.get("role") == "user":
                content = message.get("content")
                text = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
                parts = [{"type": kind} for kind, items in waiting.items() for _ in items]
                result[i], found, waiting = message | {"content": parts + text}, waiting, {}
    for kind, items in waiting.items():
        if items:
            raise ValueError(
                f"{name} has {len(found[kind])} parts of type {kind}, but {len(items)} more {kind}s are given"
            )
    return result, found["image"], found["video"]


def _render_chat(tokenizer, messages, name: str, continues: bool) -> str:
    """Chat messages as text, up to where the assistant's answer starts."""
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise TypeError(f"{name}[{i}] must be a message with 'role' and 'content', got {message!r:.100}")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{name} is a list of chat messages, but the tokenizer has no chat template: pass text")

    def render(messages):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    if not continues:
        return render(messages)
    # A template renders whole chats, with a system message and the like at their start. So let the new messages follow
    # a chat whose answer is known, and take what the template puts behind that answer.
    answer = "\N{SYMBOL FOR START OF TEXT}answer\N{SYMBOL FOR END OF TEXT}"
    chat = render([{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}, *messages])
    if chat.count(answer) != 1:
        raise ValueError(f"{name}: the tokenizer's chat template cannot continue a chat: pass text or token ids")
    return chat.partition(answer)[2]


def _prompt_list(prompts) -> tuple[list, bool]:
    """The prompts, and whether it was a single one."""
    if isinstance(prompts, str):
        return [prompts], True
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(
            "prompts must be a string, a list of chat messages, a list of token ids, or a list of these, got "
            + _kind(prompts)
        )
    if not prompts:
        raise ValueError("prompts is empty: expected at least one prompt")
    single = isinstance(prompts[0], dict) or _is_integer(prompts[0])
    return ([prompts] if single else list(prompts)), single


def _media_lists(name: str, media, prompts, single: bool) -> list[list]:
    """For each prompt the list of its images or videos."""
    if media is None:
        return [[] for _ in prompts]
    if not isinstance(media, (list, tuple)):
        raise TypeError(f"{name} must be a list, got {_kind(media)}")
    if single:
        return [list(media)]
    if len(media) != len(prompts) or not all(entry is None or isinstance(entry, list | tuple) for entry in media):
        raise ValueError(f"{name} is {media!r:.80}, expected a list (or None) for each of the {len(prompts)} prompts")
    return [list(entry or []) for entry in media]


def _check_sequences(sequences, count: int) -> None:
    if not isinstance(sequences, (list, tuple)) or not all(hasattr(sequence, "token_ids") for sequence in sequences):
        raise TypeError(
            f"sequences must be a list of conversations, `sequences` of an earlier output, got {sequences!r:.100}"
        )
    if len(sequences) != count:
        raise ValueError(f"sequences has {len(sequences)} conversations for {count} prompts: expected one per prompt")
    if len({id(sequence) for sequence in sequences}) != count:
        raise ValueError("sequences has the same conversation twice")


def _check_integer(name: str, value) -> None:
    if value is not None and not _is_integer(value):
        raise TypeError(f"{name} must be an int, got {_kind(value)}")


def _check_list(name: str, value) -> list:
    if value is not None and not (isinstance(value, (list, tuple)) and all(callable(entry) for entry in value)):
        raise TypeError(f"{name} must be a list of callables, got {_kind(value)}")
    return value if value is not None else []


def _is_integer(value) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool | torch.Tensor)


def _kind(value) -> str:
    return type(value).__name__
