"""Checkpoints of vision-language models: names of tensors, processors, and defects, each with its message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vision_models import picture
from vision_models import tokenizer as tiny_tokenizer
from vision_pairs import CONTINUATION

import pop_ext


def test_published_names(pair, folder):
    """Tensor names as they are published, and as transformers names its modules."""
    tensors = load_file(folder / "model.safetensors")
    expected = pair.ours(f"a{pair.mark}", [picture(33, 33)])
    logits = pair.model.logits([expected[0]], [CONTINUATION], visuals=[expected[1]])[0]
    if pair.gemma:
        assert any(name.startswith("language_model.model.layers") for name in tensors)
        siglip = {n.replace("vision_tower.", "vision_tower.vision_model."): t for n, t in tensors.items()}
        modules = {"model." + n.replace("language_model.model.", "language_model."): t for n, t in tensors.items()}
        layouts = [siglip, modules]
    else:
        layouts = [tensors]
    for layout in layouts:
        save_file(layout, folder / "model.safetensors")
        model = pop_ext.load(folder, dtype=torch.float32)
        assert torch.equal(model.logits([expected[0]], [CONTINUATION], visuals=[expected[1]])[0], logits)


def test_text_alone_needs_no_processor(pair, folder):
    (folder / "preprocessor_config.json").unlink()
    model = pop_ext.load(folder, dtype=torch.float32)
    assert model.generate("the an", max_new_tokens=3).tokens == pair.model.generate("the an", max_new_tokens=3).tokens
    with pytest.raises(
        pop_ext.CheckpointError, match=r"has no preprocessor_config.json, so images cannot be processed"
    ):
        model.generate("the", images=[picture(9, 9)], max_new_tokens=2)


def test_chat_template_of_the_processor(pair, folder):
    """Where older checkpoints keep it."""
    template = tiny_tokenizer(pair.gemma).chat_template
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    model = pop_ext.load(folder, dtype=torch.float32)
    assert model.tokenizer.chat_template == template


def edit(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("table", "key", "value", "message"),
    [
        (None, "text_config", [1], r"text_config is \[1\], expected a table"),
        (None, "vision_config", None, "vision_config is None, expected a table"),
        (None, "quantization_config", {"bits": 4}, "quantization_config is {'bits': 4}"),
        ("text_config", "model_type", "llama", "text_config: model_type is 'llama'"),
        ("text_config", "hidden_size", 10**9, "hidden_size is 1000000000, expected 1 to"),
        ("vision_config", "model_type", "clip", "vision_config: model_type is 'clip'"),
        ("vision_config", "hidden_size", 31, "hidden_size is 31, not a multiple of its"),
        ("vision_config", "hidden_size", 1.5, "vision_config: hidden_size is 1.5, expected an integer"),
        ("vision_config", "intermediate_size", 10**9, "intermediate_size is 1000000000, expected 1 to"),
        ("vision_config", "hidden_act", "nonsense", "vision_config: "),
        ("vision_config", "hidden_act", 3, "vision_config: hidden_act is 3, expected a name"),
    ],
)
def test_config_defects(folder, table, key, value, message):
    edit(folder / "config.json", lambda config: (config[table] if table else config).update({key: value}))
    with pytest.raises(pop_ext.CheckpointError, match=message) as error:
        pop_ext.load(folder)
    assert str(error.value).startswith(str(folder / "config.json"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("out_hidden_size", 8, "out_hidden_size is 8, expected hidden_size"),
        ("deepstack_visual_indexes", [1, 0], r"deepstack_visual_indexes is \[1, 0\], expected ascending"),
        ("deepstack_visual_indexes", [5], r"deepstack_visual_indexes is \[5\]"),
        ("deepstack_visual_indexes", "all", "deepstack_visual_indexes"),
        ("num_position_embeddings", 10, "num_position_embeddings is 10, not a square"),
        ("rope_parameters", {"rope_type": "linear"}, "rope_parameters"),
        ("image_token_id", 5000, "image_token_id is 5000, expected less than vocab_size"),
        ("mrope_section", [9, 9, 9], r"mrope_section is \[9, 9, 9\], expected three counts with the sum"),
        ("mrope_interleaved", False, "mrope_interleaved is False, expected true"),
    ],
)
def test_qwen_config_defects(qwen, tmp_path, key, value, message):
    folder = shutil.copytree(qwen.folder, tmp_path / "copy")

    def change(config):
        table = config if key == "image_token_id" else config["vision_config"]
        (config["text_config"]["rope_parameters"] if key.startswith("mrope") else table)[key] = value

    edit(folder / "config.json", change)
    with pytest.raises(pop_ext.CheckpointError, match=message):
        pop_ext.load(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("mm_tokens_per_image", 15, "mm_tokens_per_image is 15, expected a square"),
     ("mm_tokens_per_image", 25, "mm_tokens_per_image is 25, expected a square whose side divides"),
     ("image_token_index", 10**7, "image_token_index is 10000000, expected less than")],
)  # fmt: skip
def test_gemma_config_defects(gemma, tmp_path, key, value, message):
    folder = shutil.copytree(gemma.folder, tmp_path / "copy")
    edit(folder / "config.json", lambda config: config.update({key: value}))
    with pytest.raises(pop_ext.CheckpointError, match=message):
        pop_ext.load(folder)


def test_tensor_defects(pair, folder, caplog):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tower = next(name for name in tensors if "vision_tower" in name or "visual" in name)
    for change, message in (
        ({tower: None}, "lacks"),
        ({tower + "_extra": torch.zeros(1)}, "unknown to this model"),
        ({tower: torch.zeros(3)}, "expected .* by config.json"),
    ):
        spoilt = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_file(spoilt, path)
        with pytest.raises(pop_ext.CheckpointError, match=message):
            pop_ext.load(folder)
    save_file(tensors | {"stray.weight": torch.zeros(1)}, path)  # of neither tower nor decoder: named, and left alone
    pop_ext.load(folder)
    assert "has 'stray.weight', which this model does not use" in caplog.text
    if pair.gemma:
        name = "language_model.model.norm.weight"
        save_file(tensors | {"model.language_model.norm.weight": tensors[name].clone()}, path)
        with pytest.raises(pop_ext.CheckpointError, match="under another name"):
            pop_ext.load(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "(patch_size is 5|size.height is 31), expected .* by config.json"),
        ({"do_normalize": False}, "do_normalize is False, expected true"),
        ({"image_std": [0, 0, 0]}, "image_std is 0"),
        ({"rescale_factor": "x"}, "rescale_factor is 'x'|cannot be loaded"),
    ],
)
def test_processor_defects(pair, folder, values, message):
    values = values or ({"size": {"height": 31, "width": 31}} if pair.gemma else {"patch_size": 5})
    edit(folder / "preprocessor_config.json", lambda config: config.update(values))
    with pytest.raises(pop_ext.CheckpointError, match=message):
        pop_ext.load(folder)


def test_a_processor_that_is_no_json(folder):
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(pop_ext.CheckpointError, match="not JSON"):
        pop_ext.load(folder)
