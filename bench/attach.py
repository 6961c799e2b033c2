"""transformers' generate with POP attached beside without: `python bench/attach.py MODEL [--json]`.

One model on two threads; in each round every depth runs every prompt length once, to the first new token, in an order
that turns. Reported are medians over the rounds of tokens a second, and of the ratio to the plain model within a round.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pop_ext
from bench.engines import THREADS, Clock, random_prompt


def measure(args) -> list[dict]:
    """A line for each depth and prompt length; depth None is the plain model."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    layers = model.config.get_text_config().num_hidden_layers
    depths = [None, *sorted({max(1, round(layers * share)) for share in args.shares}, reverse=True)]
    seconds = {(depth, tokens): [] for depth in depths for tokens in args.prompt_tokens}
    for turn in range(-1, args.rounds):  # the first is to warm up
        for depth in depths[turn % len(depths) :] + depths[: turn % len(depths)]:
            if depth is not None:
                pop_ext.attach(model, prefill_depth=depth, calibration=args.calibration)
            for tokens in args.prompt_tokens:
                ids = torch.tensor([random_prompt(model.config.get_text_config().vocab_size, tokens)])
                mask = torch.ones_like(ids)
                with Clock() as clock:
                    model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0)
                if turn >= 0:
                    seconds[depth, tokens].append(clock.seconds)
            if depth is not None:
                pop_ext.detach(model)
    return [
        {
            "prefill_depth": layers if depth is None else depth,
            "attached": depth is not None,
            "prompt_tokens": tokens,
            "tokens_per_second": tokens / median(taken),
            "relative": median(a / b for a, b in zip(seconds[None, tokens], taken, strict=True)),
        }
        for (depth, tokens), taken in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--shares", type=float, nargs="+", default=[2 / 3, 0.5], help="of the layers")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--calibration", help="a file of pop calibrate that has these depths")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    lines = measure(args)
    if args.json:
        print(json.dumps(lines, indent=1))
        return
    title = f"{Path(args.model).name}, {args.dtype}, {pop_ext.build_info()['processor']}, {THREADS} threads"
    table = Table("engine", *(f"{tokens} prompt tokens" for tokens in args.prompt_tokens), title=title)
    rows = {}
    for line in lines:
        name = f"POP, {line['prefill_depth']} layers" if line["attached"] else f"plain, {line['prefill_depth']} layers"
        rows.setdefault(name, []).append(f"{line['tokens_per_second']:.0f} ({line['relative']:.2f}x)")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
