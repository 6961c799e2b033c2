"""A folder's tokenizer and generation config."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from .files import CheckpointError


def load_tokenizer(folder: Path):
    if not any(
        (folder / name).exists()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        template = folder / "chat_template.json"  # where older vision-language checkpoints keep it
        if not tokenizer.chat_template and template.exists():
            tokenizer.chat_template = json.loads(template.read_text(encoding="utf-8"))["chat_template"]
        return tokenizer
    except Exception as error:  # whatever a damaged file makes of it
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {error}") from error


def load_generation_config(folder: Path, config) -> GenerationConfig:
    if not (folder / "generation_config.json").exists():
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{folder / 'generation_config.json'}: {error}") from error
