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
import random
import sys
import tempfile
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table
from vlm_pictures import CELLS, IMAGE_TOKENS, SPECIAL, Picture, batch_of

STEPS, BATCH, GOAL = 800, 50, 0.95
CALIBRATION_PICTURES = 512
STAGES = ("vision", "truncated_prefill", "projection", "boundary")
STAGE_NAMES = ("vision tower", "truncated prefill", "projection", "boundary")


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
    from vlm_training import train

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
