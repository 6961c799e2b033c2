"""The choice of next tokens.

transformers' own logits processors and stopping criteria decide what is allowed as a next token and when a row is
finished: `TransformersRules` builds them from a `GenerationConfig`, and is the one place that touches transformers'
private methods.
"""

import copy
import math
import warnings
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import transformers
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .checks import check_integer, type_name
from .finite import check_chosen, check_logits

# Settings of a GenerationConfig that ask for something else than one sequence per prompt, decoded greedily or by
# sampling from POP's own cache. Each with the values that ask for nothing; any other value raises.
# How the cache is kept and the model compiled is not among them: it would change no token, and here it is ours.
UNSUPPORTED_SETTINGS = {
    # beams and constraints
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0),
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
    # outputs that GenerationOutput does not have
    "return_dict_in_generate": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}


# What `pop.sample` does itself, in its order.
KNOWN_PROCESSORS = {
    kind: order
    for order, kind in enumerate(
        (
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
            MinPLogitsWarper,
        )
    )
}

# What holds something of its row: its prompt, or what it has seen so far.
PROCESSORS_OF_A_ROW = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
)


@dataclass
class Row:
    """One sequence while it is generated."""

    sequence: object
    prompt_length: int  # tokens of the conversation with the new prompt
    max_new_tokens: int
    processors: LogitsProcessorList
    generator: torch.Generator | None
    ids: Any  # tensor [1, n] int64, the whole conversation; None where neither processors nor criteria look
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TransformersRules(cast(Any, transformers.GenerationMixin)):
    """Which next tokens are allowed and when a row is finished, as transformers derives it from a `GenerationConfig`.

    transformers builds its processors and criteria in private methods of its own mixin, for one padded batch. They are
    called here and nowhere else, once per row, so that a row sees its own ids, unpadded, and its own prompt length.
    """

    def __init__(self, model, generation_config, settings, logits_processor, stopping_criteria):
        self.context = model.spec.max_position_embeddings
        # what the inherited methods expect of a model
        self.config, self.generation_config, self.device = model.config, model.generation_config, model.device

        if generation_config is not None and not isinstance(generation_config, transformers.GenerationConfig):
            raise TypeError(f"generation_config is of type {type_name(generation_config)}, expected a GenerationConfig")
        for name in ("max_new_tokens", "max_length", "min_new_tokens", "min_length"):
            check_integer(name, settings.get(name))
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
        ids = torch.tensor([token_ids], dtype=torch.int64)
        processors = self._get_logits_processor(
            config,
            input_ids_seq_length=length,
            encoder_input_ids=ids if self.settings.encoder_repetition_penalty in (None, 1) else ids.to(self.device),
            logits_processor=self.logits_processor,
            device=self.device,
        )
        looked_at = ids.to(self.device, non_blocking=True) if processors or self.criteria else None
        return Row(sequence, length, config.max_length - length, processors, generator, looked_at)

    def choose(self, rows: list[Row], logits: torch.Tensor, return_logprobs: bool) -> list[int]:
        """The next token of every row from logits [rows, vocabulary] float32; appends it to the rows."""
        if self.do_sample or rows[0].processors:
            check_logits(logits)
            scores = self.scores(rows, list(logits))
            if self.do_sample:
                pairs = zip(rows, scores.softmax(-1), strict=True)
                tokens = [sample(probabilities, row.generator) for row, probabilities in pairs]
            else:
                tokens = _argmax(scores)
        else:
            tokens = _argmax(logits)
            check_chosen(logits, tokens)
        if return_logprobs:
            chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
            for row, logprob in zip(rows, (chosen - logits.logsumexp(-1)).tolist(), strict=True):
                row.logprobs.append(logprob)
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)
            if row.ids is not None:
                row.ids = torch.cat([row.ids, row.ids.new_tensor([[token]])], dim=1)
        return tokens

    def batched(self, row: Row) -> tuple[str, list[float] | None]:
        """How `pop.sample` chooses as `choose` would: "greedy"; "sample" with a row of settings; or "logits", where
        there are processors that it does not know.
        """
        if not row.processors and not self.do_sample:
            return "greedy", None
        settings, last = [1.0 if self.do_sample else 0.0, 0.0, 1.0, 0.0, 1.0], -1
        for processor in row.processors:
            order = KNOWN_PROCESSORS.get(type(processor), -1)
            plain = (
                getattr(processor, "prompt_ignore_length", None) is None
                and getattr(processor, "filter_value", -math.inf) == -math.inf
                and (getattr(processor, "min_tokens_to_keep", 1) == 1)
            )
            if order <= last or not plain or (order > 0 and not self.do_sample):
                return "logits", None
            last = order
            index, name = (
                (4, "penalty") if order == 0 else (order - 1, ("temperature", "top_k", "top_p", "min_p")[order - 1])
            )
            settings[index] = float(getattr(processor, name))
        return "sample", settings

    def scores(self, rows: list[Row], logits: list[torch.Tensor]) -> torch.Tensor:
        """What the processors make of each row's logits [V]: [rows, V].

        Rows whose prompts are of one length grow alike and have equal processors: they meet them together.
        """
        groups: dict[tuple, list[int]] = {}
        for i, row in enumerate(rows):
            alone = any(isinstance(processor, PROCESSORS_OF_A_ROW) for processor in row.processors)
            groups.setdefault((row.prompt_length, i if alone else None), []).append(i)
        scores: list[Any] = [None] * len(rows)
        for members in groups.values():
            group = torch.stack([logits[i] for i in members])
            if processors := rows[members[0]].processors:
                ids: Any = torch.cat([rows[i].ids for i in members])
                group = processors(ids, group)
            for i, row_scores in zip(members, group, strict=True):
                scores[i] = row_scores
        return torch.stack(scores)

    def is_finished(self, row: Row, ids: Any = None) -> bool:
        """ids: the conversation where it is not `row.ids`."""
        # the criteria are always asked: some count or watch the tokens that they are shown
        ids = row.ids if ids is None else ids
        stopped = bool(self.criteria(ids, None).any()) if self.criteria else False
        return stopped or len(row.tokens) >= row.max_new_tokens or row.tokens[-1] in self.eos_tokens


def sample(probabilities: torch.Tensor, generator: torch.Generator | None) -> int:
    """Draws an index from probabilities [vocabulary] by inverting their sum: one random number a token.

    torch.multinomial draws one for every entry of the vocabulary, which takes as long as a small model does.
    """
    sums = probabilities.cumsum(0, dtype=torch.float64)
    point = torch.rand((), generator=generator, dtype=torch.float64).to(sums.device) * sums[-1]
    if not point.isfinite():
        raise ValueError("no token can be sampled: the scores are not finite or every token is ruled out")
    return int(
        torch.searchsorted(sums, point, right=True).clamp_(max=len(sums) - 1)
    )  # right: never one of probability 0


def _argmax(scores: torch.Tensor) -> list[int]:
    return (scores.numpy() if scores.is_cpu else scores).argmax(-1).tolist()  # numpy's is 30 times faster than torch's


def _check_list(name: str, value) -> list:
    if value is not None and not (isinstance(value, (list, tuple)) and all(callable(entry) for entry in value)):
        raise TypeError(f"{name} is of type {type_name(value)}, expected a list of callables")
    return list(value) if value is not None else []
