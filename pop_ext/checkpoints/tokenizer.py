"""A folder's tokenizer and generation config."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from .bounds import check_number, truncated_repr
from .files import CONFIG_LIMIT, CheckpointError, one_line, read_json, regular_file

logger = logging.getLogger(__name__)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
# What a generation config may say of how another program runs the model. It does not change which tokens come out of
# one greedy or sampled sequence, so that a checkpoint that says it is none the worse.
HARMLESS = (
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config",
    "low_memory", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
    "output_hidden_states", "early_stopping", "length_penalty", "return_legacy_cache", "disable_compile",
)  # fmt: skip
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
             "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")  # fmt: skip
TOKEN_ID_BOUNDS = (-1, 2**31 - 1)  # -1 is none
COUNTS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size", "num_beams",
          "num_beam_groups", "num_return_sequences")  # fmt: skip
NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
           "encoder_repetition_penalty")  # fmt: skip
# tokenizer_config.json: key -> the types that it may have
TOKENIZER_TYPES = {
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), (str, dict)),
    **dict.fromkeys(("add_bos_token", "add_eos_token"), (bool,)),
    **dict.fromkeys(("padding_side", "truncation_side", "tokenizer_class"), (str,)),
    "chat_template": (str, list, dict),
    "added_tokens_decoder": (dict,),
    "model_max_length": (int, float),
}


def load_tokenizer(folder: Path):
    """The folder's tokenizer; None where it has none. CheckpointError names the file that is wrong."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    path = folder / "tokenizer_config.json"
    if path.is_file():
        config = read_json(regular_file(folder, path.name), CONFIG_LIMIT)
        for key, kinds in TOKENIZER_TYPES.items():
            value = config.get(key)
            if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
                names = " or ".join("table" if kind is dict else kind.__name__ for kind in kinds)
                raise CheckpointError(f"{path}: {key} is {truncated_repr(value)}, expected {names}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a damaged file makes of it
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {one_line(error)}") from error
    path = folder / "chat_template.json"  # where older vision-language checkpoints keep it
    if not tokenizer.chat_template and path.exists():
        template = read_json(regular_file(folder, path.name), CONFIG_LIMIT).get("chat_template")
        if not isinstance(template, str):
            raise CheckpointError(f"{path}: chat_template is {truncated_repr(template)}, expected str")
        tokenizer.chat_template = template
    return tokenizer


def load_generation_config(folder: Path, config) -> GenerationConfig:
    """The folder's generation config without what says nothing of the tokens; CheckpointError names file and key."""
    path = folder / "generation_config.json"
    if not path.exists():
        return GenerationConfig.from_model_config(config)
    values = read_json(regular_file(folder, path.name), CONFIG_LIMIT)
    try:
        for key in TOKEN_IDS:
            ids = values.get(key)
            for token in ids if isinstance(ids, list) else [ids]:
                if token is not None or isinstance(ids, list):
                    check_number(key, token, TOKEN_ID_BOUNDS, integer=True)
        for keys, bounds in ((COUNTS, (0, 2**31 - 1)), (NUMBERS, (-1e9, 1e9))):
            for key in keys:
                if values.get(key) is not None:
                    check_number(key, values[key], bounds, integer=keys is COUNTS)
        if not isinstance(values.get("do_sample", False), bool | None):
            raise ValueError(f"do_sample is {truncated_repr(values['do_sample'])}, expected true or false")
        for key in TOKEN_IDS:
            if values.get(key) == []:
                del values[key]
        if values.get("do_sample") and values.get("temperature") == 0:  # what is meant by it is greedy decoding
            values = {key: value for key, value in values.items() if key not in NUMBERS} | {"do_sample": False}
        for key in HARMLESS:
            if values.pop(key, None) is not None:
                logger.debug("%s: %s is not used", path, key)
        return GenerationConfig.from_dict(values)
    except Exception as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from error
