"""Tiny random vision-language checkpoints, whole folders with tokenizer, chat template and processor, and pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

QWEN = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
GEMMA = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
MERGES = [("Ċ", "Ċ"), ("Ċ", "ĊĊ"), ("ĊĊ", "ĊĊ"), ("a", "n"), ("Ġ", "t"), ("Ġt", "he"), ("h", "e")]
FIRST_SPECIAL = 256 + len(MERGES)
VOCABULARY = FIRST_SPECIAL + 6

QWEN_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'video' %}\
<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
GEMMA_TEMPLATE = """{{ bos_token }}{% for message in messages %}<start_of_turn>\
{{ 'model' if message.role == 'assistant' else message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


def tokenizer(gemma: bool) -> transformers.PreTrainedTokenizerFast:
    """Bytes, a few merges (of newlines, as what stands around an image merges with what it is put beside), and the
    family's special tokens.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(letters + ["".join(pair) for pair in MERGES])}
    merges = sorted(MERGES, key=lambda pair: (len("".join(pair)), pair != ("h", "e")))
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = GEMMA if gemma else QWEN
    settings = {"bos_token": "<bos>"} if gemma else {}
    if gemma:
        settings["extra_special_tokens"] = {
            "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
        }  # fmt: skip
    backend.add_special_tokens(special)
    result = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    result.chat_template = GEMMA_TEMPLATE if gemma else QWEN_TEMPLATE
    assert result.convert_tokens_to_ids(special) == list(range(FIRST_SPECIAL, VOCABULARY))
    return result


@dataclass(frozen=True)
class TinyVision:
    text: dict
    vision: dict
    top: dict
    processor: dict
    gemma: bool = False

    def make(self, folder: Path, seed: int) -> Path:
        first = FIRST_SPECIAL
        text = dict(vocab_size=VOCABULARY, max_position_embeddings=2048, eos_token_id=None, bos_token_id=None,
                    pad_token_id=None) | self.text  # fmt: skip
        if self.gemma:
            config = transformers.Gemma3Config(
                text_config=text, vision_config=self.vision | {"vision_use_head": False}, boi_token_index=first + 3,
                eoi_token_index=first + 4, image_token_index=first + 5, **self.top,
            )  # fmt: skip
            model = transformers.Gemma3ForConditionalGeneration(config)
            Gemma3ImageProcessorPil(**self.processor).save_pretrained(folder)
        else:
            config = transformers.Qwen3VLConfig(
                text_config=text, vision_config=self.vision | {"out_hidden_size": text["hidden_size"]},
                vision_start_token_id=first + 2, vision_end_token_id=first + 3, image_token_id=first + 4,
                video_token_id=first + 5, **self.top,
            )  # fmt: skip
            model = transformers.Qwen3VLForConditionalGeneration(config)
            Qwen2VLImageProcessorPil(**self.processor).save_pretrained(folder)
            video = self.processor | {"size": {"shortest_edge": 256, "longest_edge": 5000}}
            (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
        randomise(model.float(), seed)
        model.save_pretrained(folder)
        tokenizer(self.gemma).save_pretrained(folder)
        return folder


def mrope(*section: int) -> dict:
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": list(section), "mrope_interleaved": True}


TINY_VISION = {
    # DeepStack after two layers, untied, head size 32, patches of 4 merged 2 x 2
    "qwen3_vl": TinyVision(
        text=dict(hidden_size=72, intermediate_size=101, num_hidden_layers=6, num_attention_heads=6,
                  num_key_value_heads=2, head_dim=32, rope_parameters=mrope(6, 5, 5)),
        vision=dict(hidden_size=48, intermediate_size=70, depth=3, num_heads=3, patch_size=4,
                    num_position_embeddings=49, deepstack_visual_indexes=[0, 2]),
        top=dict(tie_word_embeddings=False),
        processor=dict(patch_size=4, size={"shortest_edge": 256, "longest_edge": 24 * 40}),
    ),
    # one DeepStack layer, tied, biases, head size 80, lopsided sections, patches merged 3 x 3
    "qwen3_vl_tied": TinyVision(
        text=dict(hidden_size=60, intermediate_size=80, num_hidden_layers=5, num_attention_heads=3,
                  num_key_value_heads=1, head_dim=80, rope_parameters=mrope(20, 15, 5), attention_bias=True),
        vision=dict(hidden_size=32, intermediate_size=50, depth=2, num_heads=2, patch_size=3,
                    num_position_embeddings=16, spatial_merge_size=3, deepstack_visual_indexes=[1]),
        top=dict(tie_word_embeddings=True),
        processor=dict(patch_size=3, merge_size=3, size={"shortest_edge": 81 * 4, "longest_edge": 81 * 14}),
    ),
    # windows (9) shorter than an image (16 tokens), full layers between, two RoPE bases
    "gemma3": TinyVision(
        text=dict(hidden_size=93, intermediate_size=110, num_hidden_layers=6, num_attention_heads=3,
                  num_key_value_heads=1, head_dim=64, sliding_window=9, query_pre_attn_scalar=50,
                  layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2),
        vision=dict(hidden_size=32, intermediate_size=50, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                    patch_size=4),
        top=dict(mm_tokens_per_image=16),
        processor=dict(size={"height": 32, "width": 32}, do_pan_and_scan=False),
        gemma=True,
    ),
    # windows longer than an image (4 tokens), pan and scan, the last layer sliding
    "gemma3_pan": TinyVision(
        text=dict(hidden_size=64, intermediate_size=90, num_hidden_layers=5, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=32, sliding_window=21,
                  layer_types=["full_attention", "sliding_attention"] * 2 + ["sliding_attention"]),
        vision=dict(hidden_size=24, intermediate_size=30, num_hidden_layers=2, num_attention_heads=2, image_size=24,
                    patch_size=6),
        top=dict(mm_tokens_per_image=4),
        processor=dict(size={"height": 24, "width": 24}, do_pan_and_scan=True, pan_and_scan_min_crop_size=10,
                       pan_and_scan_max_num_crops=4, pan_and_scan_min_ratio_to_activate=1.2),
        gemma=True,
    ),
}  # fmt: skip


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draws every weight, so that each term matters: norms, biases, attention that picks, images that differ."""
    generator = torch.Generator().manual_seed(seed)
    gemma = model.config.model_type == "gemma3"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            decoder = "language_model" in name or name.startswith("lm_head")
            if "norm" in name and not name.endswith("bias"):
                offset = gemma and (decoder or "soft_emb_norm" in name)  # Gemma's gain is 1 + weight
                weight.copy_(0.3 * noise + (0 if offset else 1))
                if gemma and name.endswith("language_model.norm.weight"):
                    weight.add_(4.0)
            elif name.endswith("bias"):
                weight.copy_(0.3 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                weight.copy_(noise * (0.6 if gemma else 3.0) / weight.shape[1] ** 0.5)
            elif "position_embedding" in name or "pos_embed" in name:
                weight.copy_(noise)
            elif "mm_input_projection" in name:
                weight.copy_(noise / weight.shape[0] ** 0.5)
            else:
                fan_in = weight[0].numel()
                gain = 1.3 if ("q_proj" in name or "k_proj" in name) else 1.0
                weight.copy_(noise * gain / fan_in**0.5)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured blots on noise: every patch differs, and resizing matters."""
    generator = np.random.default_rng(1000 * width + height + 7 * seed)
    coarse = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((image + generator.integers(-20, 20, image.shape)).clip(0, 255).astype(np.uint8))


class ImageOnlyProcessor(Qwen3VLProcessor):
    """transformers' processor for Qwen3-VL without its video part, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None):
        super().__init__(image_processor, tokenizer)


def transformers_processor(folder: Path):
    """transformers' own processing of images and text together."""
    text = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.model_type == "gemma3":
        images = Gemma3ImageProcessorPil.from_pretrained(folder)
        processor = Gemma3Processor(images, text, image_seq_length=config.mm_tokens_per_image)
        processor.images_kwargs = {"do_convert_rgb": True}  # its defaults switch off what the folder's file asks for
        return processor
    return ImageOnlyProcessor(Qwen2VLImageProcessorPil.from_pretrained(folder), text)
