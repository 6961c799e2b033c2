"""The models of bench/vlm_synthetic.py, and how they learn to see.

In the first tenth of the steps the vision tower alone learns to speak the decoder's language: the features of every
token are to have the highest products with the embeddings of its figure's colour and shape and of its cell's name.
Afterwards the whole model learns to answer as well. Before layer READ image tokens are still to say what they show,
and tokens that an answer's word comes after are to know which cell is asked for. Gemma-3's sliding windows keep most
of the picture from them until then; Qwen3-VL's first READ layers do not show it to them in 60 percent of the training,
and in ever fewer of the steps of the next 20. So both come to read it in the deep layers.
"""

import math
import random
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn.functional import cross_entropy, linear, rms_norm
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vlm_pictures import CELLS, COLOURS, IMAGE_TOKENS, SHAPES, SIDE, SPECIAL, WORDS, Picture, batch_of, make_tokenizer

READ = 3  # the layer by which a model in training is to know what is asked for, and not what stands there


def make_model(family: str):
    """An untrained model of the family: 6 layers, hidden size 128; and its image processor."""
    first = len(WORDS)
    text = dict(vocab_size=first + len(SPECIAL[family]), hidden_size=128, intermediate_size=256, num_hidden_layers=6,
                num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
                eos_token_id=WORDS.index("<end>"), bos_token_id=None, pad_token_id=None,
                initializer_range=0.09)  # fmt: skip
    vision = dict(hidden_size=64, intermediate_size=128, patch_size=4, initializer_range=0.12)
    if family == "gemma3":
        config = transformers.Gemma3Config(
            text_config=text | dict(
                sliding_window=16, query_pre_attn_scalar=32, layer_types=["sliding_attention"] * 3
                + ["full_attention", "sliding_attention", "full_attention"],
            ),
            vision_config=vision | dict(num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
                                        vision_use_head=False),
            boi_token_index=first, eoi_token_index=first + 1, image_token_index=first + 2,
            mm_tokens_per_image=IMAGE_TOKENS,
        )  # fmt: skip
        processor = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_pan_and_scan=False)
        model = transformers.Gemma3ForConditionalGeneration(config)
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.12)  # zeros otherwise
        return model, processor
    rope = {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config=text | dict(rope_parameters=rope),
        vision_config=vision | dict(depth=2, num_heads=2, out_hidden_size=128, num_position_embeddings=256,
                                    deepstack_visual_indexes=[0]),
        vision_start_token_id=first, vision_end_token_id=first + 1, image_token_id=first + 2, video_token_id=first + 3,
        tie_word_embeddings=True,
    )  # fmt: skip
    processor = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE})
    return transformers.Qwen3VLForConditionalGeneration(config), processor


def initialise(model, family: str) -> None:
    """Starts the decoder so that looking up is soon learnt: attention between what is alike, which copies what it sees
    (after the mimetic initialisation of Trockman and Kolter, 2023), and little else in the residual stream.
    """
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            for target, source in (("q_proj", "k_proj"), ("o_proj", "v_proj")):
                heads = getattr(attention, source).weight.unflatten(0, (-1, attention.head_dim))
                weight = heads.repeat_interleave(attention.num_key_value_groups, 0).flatten(0, 1)
                getattr(attention, target).weight.copy_(0.5 * weight.T if target == "o_proj" else weight)
            layer.mlp.down_proj.weight.mul_(0.1)
            attention.q_norm.weight.fill_(1.0 if family == "gemma3" else 2.0)  # Gemma's gain is 1 + weight


class Training:
    """A model that learns from pictures drawn for every step."""

    def __init__(self, family: str, steps: int, seed: int):
        torch.manual_seed(seed)
        self.rng = random.Random(seed)
        self.family, self.steps = family, steps
        self.tokenizer = make_tokenizer(family)
        self.model, self.processor = make_model(family)
        initialise(self.model, family)
        self.model.train()
        self.embedding = self.model.get_input_embeddings().weight
        self.groups = [self.tokenizer.convert_tokens_to_ids(list(words)) for words in (COLOURS, SHAPES, CELLS)]
        self.unseen = None  # the keys that questions do not see, [B, 1, T, T], while there are any
        self.right = 0.0  # the share of colours and shapes, averaged over the last steps
        if family == "qwen3_vl":
            for layer in self.model.model.language_model.layers[:READ]:
                layer.register_forward_pre_hook(self._hide, with_kwargs=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
        warmup = max(1, steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        )

    def _hide(self, module, arguments, keywords):
        if self.unseen is not None:
            mask = keywords["attention_mask"]
            mask = torch.ones_like(self.unseen).tril() if mask is None else mask
            return arguments, keywords | {"attention_mask": mask & ~self.unseen}

    def _shown(self, features, figures):
        """How far the features are from saying what the tokens show."""
        return sum(
            cross_entropy(linear(features, self.embedding[ids]), figures[:, i]) for i, ids in enumerate(self.groups)
        )

    def _loss(self, step: int):
        pictures = [Picture(self.rng) for _ in range(16)]
        asked = [(picture, [picture.question(self.rng) for _ in range(12)]) for picture in pictures]
        inputs = batch_of(self.family, asked, self.tokenizer, self.processor)
        labels, cells, figures = (inputs.pop(name) for name in ("labels", "cells", "figures"))
        vision = self.model.get_image_features(
            **{key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
        )
        loss = self._shown(torch.cat(tuple(vision.pooler_output)), figures)
        if step < self.steps // 10:
            return loss
        inputs.pop("pixel_values")
        is_image = inputs["input_ids"] == self.model.config.image_token_id
        if self.rng.random() < (0.8 - step / self.steps) / 0.2:
            self.unseen = is_image[:, None, None, :] & ~is_image[:, None, :, None]
        output = self.model(**inputs, mm_encoder_outputs={"image": vision}, output_hidden_states=True)
        self.unseen = None
        # times 4: a third of a token's direction is to suffice, as the rest is needed for other things
        middle = 4 * rms_norm(output.hidden_states[READ], (self.embedding.shape[1],))
        known = cells != -100
        logits, wanted = output.logits[:, :-1], labels[:, 1:]
        loss = 0.3 * (loss + self._shown(middle[is_image], figures))
        loss = loss + 0.5 * cross_entropy(linear(middle[known], self.embedding[self.groups[2]]), cells[known])
        loss = loss + cross_entropy(logits[wanted != -100], wanted[wanted != -100])
        # every picture is drawn for its step, so this is of pictures not seen before
        right = (logits.argmax(-1) == wanted)[known[:, :-1]].float().mean().item()
        self.right = 0.95 * self.right + 0.05 * right
        return loss

    def step(self, step: int) -> None:
        loss = self._loss(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()

    def save(self, folder: Path) -> None:
        self.model.eval().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def train(family: str, folder: Path, steps: int, console: Console, seed: int = 1) -> float:
    """Trains a model and writes its checkpoint folder; returns the seconds that it took."""
    training = Training(family, steps, seed)
    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"training {family}", total=steps)
        for step in range(steps):
            training.step(step)
            done = f"training {family}, {training.right:.0%} of colours and shapes right"
            progress.update(task, advance=1, description=done)
    training.save(folder)
    return time.perf_counter() - start
