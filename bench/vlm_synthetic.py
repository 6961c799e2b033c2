"""Two very small models that see, and what truncated prefill does to them.

python bench/vlm_synthetic.py FOLDER [--family gemma3] [--json]

Trains a Qwen3-VL-shaped and a Gemma-3-shaped model from nothing on pictures that are drawn on the fly, with fixed seeds
(checkpoints in FOLDER, once), then asks them about pictures that they have not seen, at every prefill depth. A picture
has sixteen figures in a grid. Questions follow the picture, so that an answer has to read its keys and values:

    b3 ?          red circle      what stands there
    below b3 ?    green square    what stands under it
"""

import argparse
import copy
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 230), "yellow": (235, 200, 30)}
SHAPES = ("circle", "square", "triangle", "star")
GRID = 4  # cells in a row and in a column
CELLS = tuple(row + column for row in "abcd" for column in "1234")
WORDS = (*COLOURS, *SHAPES, *CELLS, "below", "?", "<end>", "<unknown>")
SPECIAL = {
    "qwen3_vl": ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    "gemma3": ("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
}
SIDE = 64  # pixels of a picture
IMAGE_TOKENS = 64  # each of 8 x 8 pixels, four to a cell
READ = 3  # the layer by which a model in training is to know what is asked for, and not what stands there
STEPS, BATCH, GOAL = 800, 50, 0.95
CALIBRATION_PICTURES = 512
STAGES = ("vision", "truncated_prefill", "projection", "boundary")
STAGE_NAMES = ("vision tower", "truncated prefill", "projection", "boundary")
ITEMS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


class Picture:
    """Sixteen different figures, in places, sizes and shades of their own, and what can be asked about them."""

    def __init__(self, rng: random.Random):
        self.items = rng.sample(ITEMS, GRID**2)
        ground = rng.randrange(150, 256)
        self.image = Image.new("RGB", (SIDE, SIDE), tuple(ground + rng.randrange(-10, 1) for _ in range(3)))
        draw = ImageDraw.Draw(self.image)
        for index, (colour, shape) in enumerate(self.items):
            radius = rng.uniform(5, 6.5)
            cell = SIDE / GRID
            x = cell * (index % GRID + 0.5) + rng.uniform(-1, 1)
            y = cell * (index // GRID + 0.5) + rng.uniform(-1, 1)
            shade = tuple(max(0, min(255, value + rng.randrange(-25, 26))) for value in COLOURS[colour])
            draw_figure(draw, shape, x, y, radius, shade)

    def question(self, rng: random.Random) -> tuple[str, str]:
        """A question of a random kind, and its answer."""
        if rng.randrange(2):
            index = rng.randrange(GRID**2)
            return f"{CELLS[index]} ?", " ".join(self.items[index])
        index = rng.randrange(GRID**2 - GRID)
        return f"below {CELLS[index]} ?", " ".join(self.items[index + GRID])


def draw_figure(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill) -> None:
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        draw.rectangle((x - radius * 0.85, y - radius * 0.85, x + radius * 0.85, y + radius * 0.85), fill=fill)
    else:
        points, inner = (3, 1.0) if shape == "triangle" else (4, 0.35)
        corners = []
        for i in range(points * 2 if inner < 1 else points):
            step = math.pi / points * (i if inner < 1 else 2 * i)
            length = radius * (inner if inner < 1 and i % 2 else 1.1)
            corners.append((x + length * math.sin(step), y - length * math.cos(step)))
        draw.polygon(corners, fill=fill)


# The models


def make_tokenizer(family: str):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<end>", *SPECIAL[family]])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unknown>")


def make_model(family: str):
    """An untrained model of the family: 6 layers, hidden size 128; and its image processor."""
    import torch
    import transformers
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

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


def batch_of(family: str, asked: list[tuple[Picture, list[tuple[str, str]]]], tokenizer, processor) -> dict:
    """transformers' inputs: pictures, each followed by its questions and answers. Beside them, what training needs:

    labels [B, T]: the answers' tokens where they stand, -100 elsewhere; cells [B, T]: the index of the cell asked for
    at the tokens that its colour and shape come after, -100 elsewhere; figures [B * IMAGE_TOKENS, 3]: colour, shape and
    cell under each image token, as indices.
    """
    import torch

    special = tokenizer.convert_tokens_to_ids(list(SPECIAL[family]))
    image = [special[0], *[special[2]] * IMAGE_TOKENS, special[1]]
    rows, labels, cells, figures = [], [], [], []
    places = [index * GRID // 8 for index in range(8)]  # of the eight tokens in a row or column
    for picture, questions in asked:
        ids, wanted, known = list(image), [-100] * len(image), [-100] * len(image)
        for question, answer in questions:
            cell = picture.items.index(tuple(answer.split()))
            question, answer = tokenizer(question).input_ids, [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
            ids += question + answer
            wanted += [-100] * len(question) + answer
            known += [-100] * (len(question) - 1) + [cell, cell, -100, -100]
        rows.append(ids)
        labels.append(wanted)
        cells.append(known)
        for cell in (GRID * row + column for row in places for column in places):
            colour, shape = picture.items[cell]
            figures.append((list(COLOURS).index(colour), SHAPES.index(shape), cell))
    width = max(map(len, rows))
    input_ids = torch.tensor([ids + [tokenizer.eos_token_id] * (width - len(ids)) for ids in rows])
    inputs = dict(processor([picture.image for picture, _ in asked], return_tensors="pt"))
    inputs.pop("num_crops", None)
    return inputs | {
        "input_ids": input_ids,
        "token_type_ids" if family == "gemma3" else "mm_token_type_ids": (input_ids == special[2]).int(),
        "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
        "cells": torch.tensor([row + [-100] * (width - len(row)) for row in cells]),
        "figures": torch.tensor(figures),
    }


def initialise(model, family: str) -> None:
    """Starts the decoder so that looking up is soon learnt: attention between what is alike, which copies what it sees
    (after the mimetic initialisation of Trockman and Kolter, 2023), and little else in the residual stream.
    """
    import torch

    with torch.no_grad():
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            for target, source in (("q_proj", "k_proj"), ("o_proj", "v_proj")):
                heads = getattr(attention, source).weight.unflatten(0, (-1, attention.head_dim))
                weight = heads.repeat_interleave(attention.num_key_value_groups, 0).flatten(0, 1)
                getattr(attention, target).weight.copy_(0.5 * weight.T if target == "o_proj" else weight)
            layer.mlp.down_proj.weight.mul_(0.1)
            attention.q_norm.weight.fill_(1.0 if family == "gemma3" else 2.0)  # Gemma's gain is 1 + weight


def train(family: str, folder: Path, steps: int, console: Console, seed: int = 1) -> float:
    """Trains a model and writes its checkpoint folder; returns the seconds that it took.

    In the first tenth of the steps the vision tower alone learns to speak the decoder's language: the features of every
    token are to have the highest products with the embeddings of its figure's colour and shape and of its cell's name.
    Afterwards the whole model learns to answer as well. Before layer READ image tokens are still to say what they show,
    and tokens that an answer's word comes after are to know which cell is asked for. Gemma-3's sliding windows keep
    most of the picture from them until then; Qwen3-VL's first READ layers do not show it to them in 60 percent of the
    training, and ever oftener in the next 20. So both come to read it in the deep layers.
    """
    import torch
    from torch.nn.functional import cross_entropy, linear, rms_norm

    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer(family)
    model, processor = make_model(family)
    initialise(model, family)
    model.train()
    embedding = model.get_input_embeddings().weight
    groups = [tokenizer.convert_tokens_to_ids(list(words)) for words in (COLOURS, SHAPES, CELLS)]
    hidden = {}  # the keys that questions do not see, [B, 1, T, T], while there are any

    def hide(module, arguments, keywords):
        if "mask" in hidden:
            mask, unseen = keywords["attention_mask"], hidden["mask"]
            mask = torch.ones_like(unseen).tril() if mask is None else mask
            return arguments, keywords | {"attention_mask": mask & ~unseen}

    if family == "qwen3_vl":
        for layer in model.model.language_model.layers[:READ]:
            layer.register_forward_pre_hook(hide, with_kwargs=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    start, average = time.perf_counter(), 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"training {family}", total=steps)
        for step in range(steps):
            pictures = [Picture(rng) for _ in range(16)]
            asked = [(picture, [picture.question(rng) for _ in range(12)]) for picture in pictures]
            inputs = batch_of(family, asked, tokenizer, processor)
            labels, cells, figures = (inputs.pop(name) for name in ("labels", "cells", "figures"))
            vision = model.get_image_features(
                **{key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
            )

            def shown(features, figures=figures):
                return sum(
                    cross_entropy(linear(features, embedding[ids]), figures[:, i]) for i, ids in enumerate(groups)
                )

            loss = shown(torch.cat(tuple(vision.pooler_output)))
            if step >= steps // 10:
                inputs.pop("pixel_values")
                is_image = inputs["input_ids"] == model.config.image_token_id
                if rng.random() < (0.8 - step / steps) / 0.2:
                    hidden["mask"] = is_image[:, None, None, :] & ~is_image[:, None, :, None]
                output = model(**inputs, mm_encoder_outputs={"image": vision}, output_hidden_states=True)
                hidden.clear()
                # times 4: a third of a token's direction is to suffice, as the rest is needed for other things
                middle = 4 * rms_norm(output.hidden_states[READ], (embedding.shape[1],))
                known = cells != -100
                logits, wanted = output.logits[:, :-1], labels[:, 1:]
                loss = 0.3 * (loss + shown(middle[is_image]))
                loss = loss + 0.5 * cross_entropy(linear(middle[known], embedding[groups[2]]), cells[known])
                loss = loss + cross_entropy(logits[wanted != -100], wanted[wanted != -100])
                right = (logits.argmax(-1) == wanted)[known[:, :-1]].float().mean().item()
                average = 0.95 * average + 0.05 * right
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            # every picture is drawn for its step, so this is of pictures not seen before
            progress.update(
                task, advance=1, description=f"training {family}, {average:.0%} of colours and shapes right"
            )
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return time.perf_counter() - start


# The report


class Control:
    """transformers' model at a prefill depth, the skipped layers' attention with or without the picture.

    Shallow tokens keep the hidden state that they have at layer P, so that the skipped layers' keys and values come
    from it, as in POP with own weights; deep tokens go on. Without the picture, its keys are hidden from the skipped
    layers.
    """

    def __init__(self, folder: Path):
        import transformers

        kind = transformers.AutoModelForImageTextToText
        self.model = kind.from_pretrained(folder, dtype="float32", attn_implementation="eager").eval()

    def right(self, inputs: dict, labels, depth: int, picture: bool) -> int:
        """How many answers come out whole, which is token by token, given the right ones before. One a picture."""
        import torch

        ids = inputs["input_ids"]
        is_image = (ids == self.model.config.image_token_id)[:, None, None, :]
        answer_start = (labels != -100).int().argmax(1, keepdim=True)
        index = torch.arange(ids.shape[1])[None]
        deep = ((index == 0) | (index >= answer_start - 1))[..., None]  # anchor, boundary and answer
        layers = self.model.model.language_model.layers[depth:]

        def hide(module, arguments, keywords):
            mask = keywords["attention_mask"]
            return arguments, keywords | {"attention_mask": mask.masked_fill(is_image, torch.finfo(mask.dtype).min)}

        def keep(module, arguments, keywords, output):
            return torch.where(deep, output, arguments[0] if arguments else keywords["hidden_states"])

        hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
        if not picture:
            hooks += [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
        try:
            with torch.no_grad():
                chosen = self.model(**inputs).logits[:, :-1].argmax(-1)
        finally:
            for hook in hooks:
                hook.remove()
        wanted = labels[:, 1:]
        return int(((chosen == wanted) | (wanted == -100)).all(1).sum())


def calibration_of(model, depths):
    """Projections for these depths, fitted on pictures with a question and its answer, of a seed of their own."""
    from pop_ext.analysis.calibration import calibrate
    from pop_ext.runtime.prompts import encode_prompt

    rng = random.Random(2_000_003)
    windows, visuals = [], []
    for _ in range(CALIBRATION_PICTURES):
        picture = Picture(rng)
        ids, media = encode_prompt(model, " ".join(picture.question(rng)), "prompt", [], [picture.image])
        windows.append(ids)
        visuals.append([visual for item in media for visual in model.vision.encode(item)])
    return calibrate(model, windows, list(depths), visuals=visuals)


def measure(family: str, folder: Path, questions: int, console: Console) -> dict:
    """Accuracy and prefill times at every prefill depth, on pictures of another seed than training's."""
    import pop_ext

    model, control = pop_ext.load(folder, max_cache_tokens=BATCH * 128), Control(folder)
    rng, layers = random.Random(1_000_003), model.spec.num_layers
    calibrated = copy.copy(model)
    with console.status(f"{family}: calibrating"):
        calibrated.calibration = calibration_of(model, range(1, layers - 1))
    depths = list(range(1, layers + 1))
    methods = ("own", "calibrated", "control", "reference")
    right = {method: dict.fromkeys(depths, 0) for method in methods}
    times: dict[int, list] = {depth: [] for depth in depths}
    kinds: dict[str, list[bool]] = {}
    with console.status("") as status:
        for start in range(0, questions, BATCH):
            status.update(f"{family}: asking about picture {start + 1} of {questions}")
            asked = [(picture, [picture.question(rng)]) for picture in (Picture(rng) for _ in range(BATCH))]
            prompts = [question for _, [(question, _)] in asked]
            images = [[picture.image] for picture, _ in asked]
            inputs = batch_of(family, asked, model.tokenizer, model.vision.image_processor)
            labels, _, _ = (inputs.pop(name) for name in ("labels", "cells", "figures"))
            for depth in depths if start // BATCH % 2 else depths[::-1]:  # in turn, so that all see the same machine
                output = model.generate(prompts, images=images, prefill_depth=depth, max_new_tokens=3, do_sample=False)
                good = [text == answer for text, (_, [(_, answer)]) in zip(output.text, asked, strict=True)]
                right["own"][depth] += sum(good)
                times[depth].append(output.times)
                other = calibrated.generate(
                    prompts, images=images, prefill_depth=depth, max_new_tokens=3, do_sample=False
                )
                right["calibrated"][depth] += sum(
                    text == answer for text, (_, [(_, answer)]) in zip(other.text, asked, strict=True)
                )
                for method, picture in (("control", False), ("reference", True)):
                    right[method][depth] += control.right(inputs, labels, depth, picture)
                if depth == layers:
                    for question, is_right in zip(prompts, good, strict=True):
                        word = question.split()[0]
                        kinds.setdefault("cell" if word in CELLS else word, []).append(is_right)
    asked_in_all = -(-questions // BATCH) * BATCH
    return {
        "family": family,
        "layers": layers,
        "questions": asked_in_all,
        "prompt_tokens": output.prompt_tokens[-1],
        "image_tokens": IMAGE_TOKENS,
        "accuracy_by_kind": {kind: sum(entries) / len(entries) for kind, entries in sorted(kinds.items())},
        "depths": [
            {
                "prefill_depth": depth,
                "accuracy": {method: right[method][depth] / asked_in_all for method in methods},
                "milliseconds": {
                    stage: 1000 * median(getattr(entry, stage) for entry in times[depth]) / BATCH for stage in STAGES
                },
            }
            for depth in reversed(depths)
        ],
    }


def show(result: dict, console: Console) -> None:
    title = (
        f"{result['family']}: {result['questions']} questions, one a picture; {result['image_tokens']} of about "
        f"{result['prompt_tokens']} prompt tokens are the picture's; milliseconds a prompt, in batches of {BATCH}"
    )
    names = ("own", "calibrated", "control")
    table = Table("prefill depth", *names, *STAGE_NAMES, title=title, title_justify="left")
    for row in result["depths"]:
        accuracy = row["accuracy"]
        cells = [f"{accuracy[method]:.1%}" for method in names]
        table.add_row(
            f"{row['prefill_depth']} of {result['layers']}",
            *cells,
            *(f"{value:.2f}" for value in row["milliseconds"].values()),
        )
    console.print(table)
    by_kind = ", ".join(f"{kind} {accuracy:.1%}" for kind, accuracy in result["accuracy_by_kind"].items())
    console.print(f"At full depth by kind: {by_kind}.", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the two checkpoints are, or go")
    parser.add_argument("--family", choices=list(SPECIAL), action="append", help="only this one")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--questions", type=int, default=600, help="of the report")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(stderr=True)
    results = []
    for family in arguments.family or list(SPECIAL):
        folder = arguments.folder / f"vlm-synthetic-{family.replace('_', '-')}"
        if not (folder / "config.json").exists():
            with tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".vlm-synthetic-") as temporary:
                seconds = train(family, Path(temporary) / "model", arguments.steps, console)
                (Path(temporary) / "model").rename(folder)
            console.print(f"trained {family} in {seconds / 60:.1f} minutes", highlight=False)
        results.append(measure(family, folder, arguments.questions, console))
        if not arguments.json:
            show(results[-1], Console(width=None if sys.stdout.isatty() else 120))
    if arguments.json:
        print(json.dumps(results))
    blind = [result["family"] for result in results if result["depths"][0]["accuracy"]["own"] < GOAL]
    if blind:
        console.print(f"{', '.join(blind)}: fewer than {GOAL:.0%} right at full depth", style="red")
    return 1 if blind else 0


if __name__ == "__main__":
    sys.exit(main())
