"""A tokenizer of one token per byte with a chat template, checkpoints that have it, and the `pop` command in-process."""

from __future__ import annotations

import shutil
from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|start|>system\nBe kind.<|end|>\n{% endif %}"
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
START, END = 256, 257


def make_tokenizer():
    """One token per byte, and two special ones: ids 0 .. 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_chat_folder(checkpoint: Path, tmp_path_factory) -> Path:
    """A copy of the checkpoint with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(checkpoint, folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def pop(*arguments, stdin: bytes | None = None):
    """Runs a `pop` command in this process; returns typer's result (stdout, stderr, exit_code)."""
    from typer.testing import CliRunner

    from pop_ext import cli

    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)
