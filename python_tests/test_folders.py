"""Checkpoint folders as people have them: links, leftovers, tied names, settings of other programs."""

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_helpers import edit
from helpers import transformers_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model

import pop_ext
from pop_ext.checkpoints.config import load_config
from pop_ext.checkpoints.files import CheckpointError, read_utf8
from pop_ext.checkpoints.tokenizer import load_tokenizer

PROMPT = [1, 2, 3, 4, 5]


def tokens(folder: Path, **settings) -> list[int]:
    return pop_ext.load(folder, dtype=torch.float32).generate(PROMPT, max_new_tokens=6, **settings).tokens[0]


@pytest.fixture
def expected(tiny_llama) -> list[int]:
    return tokens(tiny_llama)


def test_links(sharded, tmp_path, expected):
    """A folder of links to files kept elsewhere, and a link to a folder."""
    arranged = tmp_path / "arranged"
    arranged.mkdir()
    for path in sharded.iterdir():
        (arranged / path.name).symlink_to(path)
    (tmp_path / "link").symlink_to(arranged)
    assert tokens(arranged) == tokens(tmp_path / "link") == expected


def test_index_with_a_tied_head(sharded, expected):
    index = sharded / "model.safetensors.index.json"
    shard = min(path.name for path in sharded.glob("*.safetensors"))
    edit(index, lambda value: value["weight_map"].update({"lm_head.weight": shard}))
    assert tokens(sharded) == expected
    edit(sharded / "config.json", lambda config: config.update(tie_word_embeddings=False))
    with pytest.raises(CheckpointError, match=r"lacks 'lm_head.weight'"):
        pop_ext.load(sharded)


def test_save_model_keeps_one_name_of_two(tiny_llama, folder, expected):
    """safetensors' save_model writes either of two tied tensors, and the other's name in the metadata."""
    model = transformers_model(tiny_llama)
    save_model(model, str(folder / "model.safetensors"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert ("lm_head.weight" in names) != ("model.embed_tokens.weight" in names)
    assert tokens(folder) == expected
    tensors = load_file(folder / "model.safetensors")
    both = tensors.pop("lm_head.weight", None)
    tensors.setdefault("model.embed_tokens.weight", both)
    other = {key: value for key, value in tensors.items() if key != "model.embed_tokens.weight"}
    other["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(other, folder / "model.safetensors", {"model.embed_tokens.weight": "lm_head.weight"})
    assert tokens(folder) == expected
    save_file(other, folder / "model.safetensors", {"model.embed_tokens.weight": "model.norm.weight"})
    with pytest.raises(CheckpointError, match=r"is \[90\], expected \[293, 90\]"):
        pop_ext.load(folder)
    save_file(other, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 'model.embed_tokens.weight'"):
        pop_ext.load(folder)


def test_extra_tensors(folder, expected, caplog):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"v_head.summary.weight": torch.ones(1, 90), "score.bias": torch.ones(2).int()},
              folder / "model.safetensors")  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert tokens(folder) == expected
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: has 'score.bias', 'v_head.summary.weight', which this model does not use"
    ]


def test_settings_of_other_programs(folder, expected):
    """What says nothing of the tokens is ignored in the file."""
    values = {"use_cache": False, "return_dict_in_generate": True, "early_stopping": True, "output_scores": True,
              "cache_implementation": "hybrid", "length_penalty": 1.2, "max_length": 2048, "unknown_key": [1],
              "eos_token_id": [-1], "prefill_chunk_size": 4}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(values))
    assert tokens(folder) == expected
    ours = {"use_cache": False, "cache_implementation": "hybrid", "early_stopping": True, "prefill_chunk_size": 4}
    assert tokens(folder, **ours) == expected  # nor do they change a token where a caller passes them
    assert tokens(folder, generation_config=transformers.GenerationConfig(**ours)) == expected
    with pytest.raises(ValueError, match=r"return_dict_in_generate=True is not supported"):
        tokens(folder, return_dict_in_generate=True)
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 4}))
    with pytest.raises(ValueError, match=r"num_beams=4 is not supported"):
        tokens(folder)
    assert tokens(folder, num_beams=1) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [("eos_token_id", {"a": 1}), ("eos_token_id", [2**63]), ("pad_token_id", 2**63), ("bos_token_id", "1"),
     ("eos_token_id", [[1]]), ("eos_token_id", [None]), ("temperature", "hot"), ("top_k", 1.5), ("top_p", [1]),
     ("do_sample", "yes"), ("max_length", 2**63), ("repetition_penalty", {}), ("temperature", True)],
)  # fmt: skip
def test_bad_generation_config(folder, key, value):
    (folder / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key} is "):
        pop_ext.load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("eos_token", 2**63), ("bos_token", [1]), ("chat_template", 3), ("model_max_length", "long"),
     ("added_tokens_decoder", []), ("padding_side", 1), ("add_bos_token", "no"), ("model_max_length", True)],
)  # fmt: skip
def test_bad_tokenizer_config(folder, key, value):
    (folder / "tokenizer_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {key} is .*, expected"):
        load_tokenizer(folder)


def test_bad_chat_template(folder):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    for content, message in (("{", "not JSON"), ('{"chat_template": 3}', "chat_template is 3, expected str")):
        (folder / "chat_template.json").write_text(content)
        with pytest.raises(CheckpointError, match=rf"chat_template\.json: {message}"):
            load_tokenizer(folder)


def test_rope_notes(folder):
    """What no function of RoPE reads is no reason to refuse; what changes positions, or a type unknown here, is."""
    rope = load_config(folder).rope_parameters
    edit(folder / "config.json", lambda config: config["rope_parameters"].update(finetuned=True, note="x"))
    assert {**load_config(folder).rope_parameters, "finetuned": 0, "note": 0} == {**rope, "finetuned": 0, "note": 0}
    for kind in ("longrope", "dynamic", "su"):
        given = {"type": kind, "factor": 2.0, "short_factor": [1.0] * 16, "long_factor": [1.0] * 16}
        edit(folder / "config.json", lambda config, given=given: config.update(rope_parameters=given))
        with pytest.raises(
            CheckpointError, match=rf"rope_parameters: rope_type is '{kind}'; supported: default, linear"
        ):
            load_config(folder)


def test_no_sampling_in_the_file(folder, expected):
    """Lists without an entry, and a temperature of 0, which means greedy decoding."""
    for values in ({"eos_token_id": [], "suppress_tokens": []}, {"do_sample": True, "temperature": 0.0, "top_p": 0.9}):
        (folder / "generation_config.json").write_text(json.dumps(values))
        assert tokens(folder) == expected


def test_a_decoder_alone(folder, expected):
    """As the model without its head is saved: names without the prefix."""
    tensors = load_file(folder / "model.safetensors")
    save_file({key.removeprefix("model."): value for key, value in tensors.items()}, folder / "model.safetensors")
    assert tokens(folder) == expected
    save_file({f"_orig_mod.{key}": value for key, value in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 'model\.embed_tokens\.weight'"):
        pop_ext.load(folder)


def test_another_name(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"expected under that name, not 'pytorch_model\.safetensors'"):
        pop_ext.load(folder)


def test_what_is_missing_is_named(folder, sharded):
    (sharded / "model.safetensors.index.json").unlink()
    (sharded / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(
        CheckpointError, match=r"there are shards \('model-00001-of-.*, but not model.safetensors.index"
    ):
        pop_ext.load(sharded)


def test_stand_ins(folder):
    """Git LFS pointers, and an adapter in place of a model."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name in ("model.safetensors", "config.json"):
        before = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).write_text(pointer)
        with pytest.raises(CheckpointError, match=rf"{name}: a Git LFS pointer, not the file itself"):
            pop_ext.load(folder)
        (folder / name).write_bytes(before)
    (folder / "adapter_config.json").write_text("{}")
    pop_ext.load(folder)  # a merged model may keep it
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=r"is a LoRA adapter"):
            pop_ext.load(folder)


def test_byte_order_mark(folder, tmp_path, expected):
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert tokens(folder) == expected
    text = tmp_path / "text"
    text.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_utf8(text) == "one\r\ntwo"
    for data, message in ((b"one\ntw\xf6", "line 2, is not UTF-8 text: "), ("é".encode("utf-16"), "looks like UTF-16")):
        text.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_utf8(text)
