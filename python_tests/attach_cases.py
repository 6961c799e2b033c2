"""What the tests of `attach` share: prompts, batches, and the runner's answers beside generate's."""

from __future__ import annotations

import torch
import transformers

import pop_ext

# Log-probabilities of some nats, rounded in float32 (2^-23) after six layers of sums of about 200 terms each.
TOLERANCE = 2**-23 * 6 * 200
NEW = 8  # tokens


def make_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 250, (length,), generator=generator).tolist() for length in lengths]


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.arange(width) >= width - torch.tensor([[len(prompt)] for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask.long()}


def generate(model, inputs: dict[str, torch.Tensor], **settings):
    """Greedy, by the model's own generate."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | settings
    return model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **settings)


def answer(runner, prompts, sequences=None, **settings):
    """The runner's tokens, log-probabilities and, where they are kept, conversations."""
    settings = {"max_new_tokens": NEW, "return_logprobs": True, "do_sample": False} | settings
    return runner.generate(prompts, sequences=sequences, **settings)


def check(model, inputs: dict[str, torch.Tensor], expected, message="", **settings):
    """generate's greedy tokens are those of the runner's answer, and so are their log-probabilities; returns what
    generate gave.
    """
    output = generate(model, inputs, **settings)
    tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert tokens.tolist() == expected.tokens, message
    logprobs = torch.stack(output.logits, 1).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    error = (logprobs - torch.tensor(expected.logprobs)).abs().max().item()
    assert error <= TOLERANCE, f"{message}: log-probabilities are {error} apart"
    return output


def load_runner(folder, depth, **settings):
    return pop_ext.load(folder, prefill_depth=depth, dtype=torch.float32, **settings)


def load_peer(folder, attention: str = "sdpa", kind=transformers.AutoModelForCausalLM):
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
