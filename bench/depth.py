"""Prefill time against prefill depth, by stage: `python bench/depth.py MODEL [--json]`.

Rounds, medians and yardsticks are bench/prefill.py's; every round runs every depth once. An object of the list that
--json prints is one depth with one prompt length:

    processor, instruction_set, cores, threads      what it ran on
    prefill_depth, prompt_tokens
    seconds, seconds_range                  to the last prompt token's logits: median of the rounds, [least, most]
    stages_seconds                          medians of truncated_prefill, projection and boundary
    relative, predicted_relative            speed over that at full depth; and the same by counting multiplications
    gemm_share                              of a large GEMM's rate, by the multiplications that are done
    other_load                              processors that other programs kept busy meanwhile (mean)
"""

from __future__ import annotations

import argparse
import json
import sys

from prefill import EngineError, compare
from rich import box
from rich.console import Console
from rich.table import Table

from pop_ext.checkpoints.config import load_config
from pop_ext.checkpoints.families import ModelSpec
from pop_ext.checkpoints.files import resolve_folder

SHARES = (5 / 6, 2 / 3, 1 / 2, 1 / 3)  # of all layers, besides all of them
STAGES = "truncated_prefill", "projection", "boundary"


def measure(model: str, depths: list[int] | None, **settings) -> list[dict]:
    """The lines described above; `settings` go to bench/prefill.py's `compare`."""
    if depths is None:
        layers = ModelSpec.from_config(load_config(resolve_folder(model))).num_layers
        depths = [max(1, round(layers * share)) for share in SHARES]
    lines = compare(model, [], depths=depths, decode_tokens=1, **settings)
    kept = (
        "processor",
        "instruction_set",
        "cores",
        "threads",
        "prefill_depth",
        "prompt_tokens",
        "stages_seconds",
        "relative",
        "predicted_relative",
        "gemm_share",
        "other_load",
    )
    return [
        {key: line[key] for key in kept}
        | {
            "seconds": line["prompt_tokens"] / line["tokens_per_second"],
            "seconds_range": [line["prompt_tokens"] / rate for rate in reversed(line["tokens_per_second_range"])],
        }
        for line in lines
    ]


def show(lines: list[dict], console: Console) -> None:
    console.print(
        f"{lines[0]['processor']}, {lines[0]['instruction_set']}, {lines[0]['threads']} threads", soft_wrap=True
    )
    for tokens in sorted({line["prompt_tokens"] for line in lines}):
        table = Table(title=f"{tokens} prompt tokens, ms", box=box.SIMPLE_HEAD, collapse_padding=True)
        for column in ("depth", "prefill", "truncated", "projection", "boundary", "speed", "predicted", "GEMM"):
            table.add_column(column, justify="right", no_wrap=True)
        for line in lines:
            if line["prompt_tokens"] == tokens:
                table.add_row(
                    str(line["prefill_depth"]),
                    f"{1e3 * line['seconds']:.1f}",
                    *(f"{1e3 * line['stages_seconds'][stage]:.1f}" for stage in STAGES),
                    f"{line['relative']:.2f}x",
                    f"{line['predicted_relative']:.2f}x",
                    f"{line['gemm_share']:.0%}",
                )
        console.print(table)
    console.print(
        "speed: over full depth, measured and predicted by counting multiplications; GEMM: of a large one's rate",
        style="dim",
        soft_wrap=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint folder or hub id")
    add("--json", action="store_true", help="print the result as JSON")
    add("--prompt-tokens", type=int, nargs="+", default=[512, 2048], metavar="N")
    add("--prefill-depth", type=int, nargs="+", metavar="P", help="besides all layers (5/6, 2/3, 1/2, 1/3 of them)")
    add("--rounds", type=int, default=5)
    add("--patience", type=float, default=0, metavar="SECONDS", help="how long a sample may wait for a quiet machine")
    options = parser.parse_args()
    try:
        with Console(stderr=True).status("starting") as status:  # shows nothing where stderr is not a terminal
            lines = measure(
                options.model,
                options.prefill_depth,
                prompt_tokens=options.prompt_tokens,
                rounds=options.rounds,
                patience=options.patience,
                say=status.update,
            )
    except EngineError as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps(lines, indent=2))
    else:
        show(lines, Console())


if __name__ == "__main__":
    main()
