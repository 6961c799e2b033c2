"""POP in lm-eval: `python -m pop_ext.integrations.lm_eval --model pop --model_args pretrained=FOLDER,...`.

Registers the model "pop" and calls lm-eval's own command line. Needs `pip install pop-ext[lm-eval]`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  which makes all other models known by name
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from ..runtime.loading import load
from ..runtime.prefill_depth import parse_depth

COUNT_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's order of them


@register_model("pop")
class POP(TemplateLM):
    """A model whose contexts are prefilled by POP. Arguments as `pop_ext.load` has them; prefill_depth is layers (12)
    or their share (0.7), by default what the calibration recommends or its only depth, else all.
    """

    def __init__(
        self,
        pretrained: str,
        prefill_depth: int | float | str | None = None,
        calibration: str | None = None,
        boundary_tokens: int = 1,
        anchor_tokens: int = 1,
        dtype: str = "bfloat16",
        max_gen_toks: int = 256,
        max_cache_tokens: int | None = None,
        # lm-eval passes these three to every model; not used, as a context runs at a time, where the model is
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype is {dtype!r}, expected bfloat16 or float32")
        self.model = load(
            pretrained,
            prefill_depth=parse_depth(prefill_depth) if isinstance(prefill_depth, str) else prefill_depth,
            boundary_tokens=boundary_tokens,
            anchor_tokens=anchor_tokens,
            dtype=dtype,
            max_cache_tokens=max_cache_tokens,
            calibration=calibration,
        )
        if self.model.tokenizer is None:
            raise ValueError(f"{pretrained} has no tokenizer: text cannot be turned into tokens")
        self.tokenizer, self.max_gen_toks = self.model.tokenizer, max_gen_toks
        self.max_length = min(self.model.spec.max_position_embeddings, self.model.max_cache_tokens)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        token = self.tokenizer.eos_token_id if bos is None else bos
        if token is None:
            raise ValueError(
                "the tokenizer has neither a beginning nor an end of sequence to stand for an empty context"
            )
        return token

    @property
    def tokenizer_name(self) -> str:
        return Path(self.tokenizer.name_or_path).name

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        # A text that a chat template made, or that carries it already, gets no second beginning of sequence.
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False).input_ids

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """requests: (strings, context, continuation), token ids. Those that share a context prefill it once."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) >= self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, the model's context {self.max_length}"
                )
            room = self.max_length - len(continuation)
            groups.setdefault(tuple(context[-room:]), []).append(index)
        results: list = [None] * len(requests)
        for context, members in self._bar(groups.items(), "loglikelihood", disable_tqdm):
            continuations = [requests[index][2] for index in members]
            for index, logits in zip(
                members, self.model.logits([list(context)] * len(members), continuations), strict=True
            ):
                log_p, target = logits.log_softmax(-1), torch.tensor(requests[index][2], dtype=torch.int64)
                greedy = bool((log_p.argmax(-1) == target).all())
                results[index] = float(log_p.gather(1, target[:, None]).sum()), greedy
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError(
            "loglikelihood_rolling scores a text without a prompt: there is nothing for prefill-only pruning to prune; "
            "choose tasks of loglikelihood or generate_until"
        )

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        results = []
        for request in self._bar(requests, "generate_until", disable_tqdm):
            context, settings = request.args
            settings = dict(settings)
            until = settings.pop("until", None) or []
            until = [string for string in ([until] if isinstance(until, str) else until) if string]
            counts = [settings.pop(name, None) for name in COUNT_NAMES]
            count = int(next((value for value in counts if value is not None), self.max_gen_toks))
            if not 1 <= count < self.max_length:
                raise ValueError(
                    f"max_gen_toks is {count}, expected 1 to {self.max_length - 1}: the model's context is "
                    f"{self.max_length} tokens, and the prompt needs one at least"
                )
            temperature = settings.get("temperature")
            sample = settings.pop("do_sample", None)
            sample = bool(temperature) if sample is None else bool(sample) and temperature != 0
            if not sample:
                settings = {k: v for k, v in settings.items() if k not in ("temperature", "top_p", "top_k")}
            prompt = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - count) :]
            stop = {"stop_strings": until} if until else {}
            output: Any = self.model.generate([prompt], max_new_tokens=count, do_sample=sample, **stop, **settings)
            text = output.text[0]
            for string in until:
                text = text.split(string)[0]
            results.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return results

    def _bar(self, items, what: str, disable: bool):
        from tqdm import tqdm

        return tqdm(items, desc=what, disable=disable or None)  # None: only on a terminal


def main() -> None:
    """lm-eval's command line, with "pop" among its models."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
