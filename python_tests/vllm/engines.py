"""Engines of vLLM in this process, and the runner they are held against."""

from __future__ import annotations

import functools
import gc
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from helpers import COMMON, TINY, Tiny

import pop_ext

HEADS8 = Tiny(
    transformers.LlamaConfig,
    dict(hidden_size=96, intermediate_size=188, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
         head_dim=32, tie_word_embeddings=True),
)  # fmt: skip
TIE = 1e-4  # nats: two tokens so close are told apart by rounding only
TOLERANCE = 2e-4  # nats, of each of the 20 likeliest tokens


def tiny_folder(name: str, home: Path) -> Path:
    return (HEADS8 if name == "heads8" else TINY[name]).make(home / name, seed=77)


@functools.cache
def runner(folder: Path, depth: int, calibration: Path | None = None):
    """`pop_ext`'s own model in float32, the reference."""
    return pop_ext.load(folder, prefill_depth=depth, dtype=torch.float32, calibration=calibration)


@functools.cache
def text_ids(folder: Path) -> list[int]:
    """Tokens to make prompts of: of English text, or random ones where there is no tokenizer."""
    model = runner(folder, 1)
    if model.tokenizer is None:
        return torch.randint(COMMON["vocab_size"], (8192,), generator=torch.Generator().manual_seed(5)).tolist()
    return model.tokenizer.encode("\n".join(topics.values()))[:8192]


def calibration_of(folder: Path, depths, path: Path) -> Path:
    from pop_ext.analysis.calibration import calibrate

    ids = text_ids(folder)[4096:]
    calibrate(runner(folder, 1), [ids[i : i + 128] for i in range(0, 2048, 128)], list(depths)).save(path)
    return path


@contextmanager
def engine(folder: Path, pop: dict | None, **options):
    """An LLM in float32 that takes little memory; gone afterwards."""
    from vllm import LLM

    options = dict(dtype="float32", enforce_eager=True, max_model_len=1024, kv_cache_memory_bytes=192 << 20) | options
    options["skip_tokenizer_init"] = not (Path(folder) / "tokenizer.json").exists()
    options |= dict(max_num_seqs=16, disable_log_stats=False, additional_config={} if pop is None else {"pop": pop})
    set_num_threads = torch.set_num_threads
    llm = LLM(str(folder), **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        torch.set_num_threads = set_num_threads  # which vLLM's worker has taken away


def sampling(count: int, **options):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=20, **options)


def generate(llm, prompts: list[list[int]], count: int = 8) -> list:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling(count), use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) == count for output in outputs)
    return outputs


def tokens(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


_log_probabilities: dict[tuple, torch.Tensor] = {}


def log_probabilities(model, prompts: list[list[int]], continuations: list[list[int]]) -> list[torch.Tensor]:
    """The model's, [tokens, vocabulary] for each continuation; what is asked for again is not computed again."""
    settings = (id(model), model.boundary_tokens, model.anchor_tokens)  # `runner` keeps every model
    keys = [(settings, *map(tuple, pair)) for pair in zip(prompts, continuations, strict=True)]
    new = [i for i, key in enumerate(keys) if key not in _log_probabilities]
    if new:
        for i, logits in zip(
            new, model.logits([prompts[i] for i in new], [continuations[i] for i in new]), strict=True
        ):
            _log_probabilities[keys[i]] = logits.log_softmax(-1)
    return [_log_probabilities[key] for key in keys]


def differences(outputs, model, greedy: bool = True) -> list[float]:
    """For each output how far the log-probabilities of its 20 likeliest tokens are from the model's, at most, in nats.
    `greedy`: AssertionError for a token that is not the model's greedy one, and no tie with it either.
    """
    found = []
    prompts, continuations = [list(output.prompt_token_ids) for output in outputs], tokens(outputs)
    for output, logprobs in zip(outputs, log_probabilities(model, prompts, continuations), strict=True):
        completion, worst = output.outputs[0], 0.0
        for row, token, reported in zip(logprobs, completion.token_ids, completion.logprobs, strict=True):
            if greedy and token != row.argmax():
                assert row.max() - row[token] < TIE, (
                    f"token {token} is {row.max() - row[token]} nats below {row.argmax()}"
                )
            assert len(reported) >= 20
            worst = max([worst, *(abs(entry.logprob - float(row[other])) for other, entry in reported.items())])
        found.append(worst)
    return found


def assert_equal(outputs, model) -> None:
    found = differences(outputs, model)
    assert max(found) < TOLERANCE, f"nats, by prompt of {[len(o.prompt_token_ids) for o in outputs]} tokens: {found}"


def metric(llm, name: str) -> float:
    return sum(entry.value for entry in llm.get_metrics() if entry.name == name)
