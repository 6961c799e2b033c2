"""What calibrated projections gain and cost at a prefill depth: fidelity against prefill time, and against the minutes
that they take to make.

python bench/projections.py MODEL_FOLDER --text FILE [--prefill-depth 0.5] [--refine STEPS ...] [--output FILE]

Calibrates on the first 50,000 tokens of the text and tests on 32 windows of what follows, 384 prompt tokens and 64 of
continuation. Prefill times are of 2,048 prompt tokens, all projections in turn, medians, as ratios within a round.
Refined projections cost what they are refined from costs.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

import pop_ext
from pop_ext.analysis.calibration import WINDOW, calibrate
from pop_ext.analysis.evaluation import evaluate, time_prefill
from pop_ext.analysis.refinement import refine
from pop_ext.analysis.text import encode, read_text, windows
from pop_ext.checkpoints.files import atomic_write

TOKENS, PROMPTS, PROMPT, CONTINUATION = 50_000, 32, 384, 64
LONG, ROUNDS = 2048, 9


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_FOLDER")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prefill-depth", default="0.5", help="15 or 0.5")
    parser.add_argument(
        "--rank", type=int, nargs="*", help="features of the token before; by default 0, 16, 64 and all"
    )
    parser.add_argument("--deeper", type=int, default=2, metavar="N", help="also up to N layers deeper, with rank 0")
    parser.add_argument(
        "--refine", type=int, nargs="*", default=[], metavar="STEPS", help="steps from the default rank"
    )
    parser.add_argument("--output", type=Path, help="also write the rows to this file, as JSON")
    return parser.parse_args()


def timed(make):
    """What it makes, and the seconds that this takes."""
    start = time.perf_counter()
    return make(), time.perf_counter() - start


def prefill_ratios(variants: list, prompt: list[int]) -> list[float]:
    """Each variant's prefill time over the first one's, in the same rounds."""
    times: list[list[float]] = [[] for _ in variants]
    for _ in range(ROUNDS + 1):
        for entries, (variant, depth) in zip(times, variants, strict=True):
            entries.append(time_prefill(variant, prompt, [], depth))
    return [median(a / b for a, b in zip(entries[1:], times[0][1:], strict=True)) for entries in times]


def show(rows: list[dict], title: str, layers: int) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("projections", "prefill depth", "KL, nats a token (95%)", "perplexity", "prefill time", "made in"):
        table.add_column(column)
    for row in rows:
        low, high = row["kl_ci95"]
        cells = [row["projections"], f"{row['prefill_depth']} of {layers}"]
        cells += [f"{row['kl']:.4f} ({low:.4f} to {high:.4f})", f"{row['perplexity']:.2f}"]
        table.add_row(*cells, f"{row['prefill_ratio']:.3f}", f"{row['seconds'] / 60:.1f} min")
    Console(width=120).print(table)


def main() -> None:
    arguments = parse()
    model = pop_ext.load(arguments.model, max_cache_tokens=4 * LONG)
    given = arguments.prefill_depth
    depth, size = model.resolve_prefill_depth(float(given) if "." in given else int(given)), model.spec.hidden_size
    ranks = sorted({0, *([16, 64, size] if arguments.rank is None else arguments.rank)})
    bos, tokens = encode(model.tokenizer, read_text(arguments.text))
    head, rest = (model.tokenizer.decode(part) for part in (tokens[:TOKENS], tokens[TOKENS + TOKENS // 5 :]))
    fitted = windows(model.tokenizer, head, WINDOW)
    tests = windows(model.tokenizer, rest, PROMPT + CONTINUATION, PROMPTS)
    prompts, continuations = [w[:PROMPT] for w in tests], [w[PROMPT:] for w in tests]
    console, rows, variants = Console(stderr=True), [], []

    def score(name: str, depth: int, calibration, seconds: float) -> None:
        variant = copy.copy(model)
        variant.calibration = calibration
        method = "pop_uncalibrated" if calibration is None else "pop_calibrated"
        fidelity = evaluate(variant, prompts, continuations, [depth], [method])[1]
        row = {"projections": name, "prefill_depth": depth, "seconds": seconds}
        rows.append(row | {"kl": fidelity.kl, "kl_ci95": fidelity.kl_ci95, "perplexity": fidelity.perplexity})
        variants.append((variant, depth))
        console.print(f"{name} at {depth}: {fidelity.kl:.4f} nats a token", highlight=False)

    score("own weights", depth, None, 0.0)
    deepest = min(depth + arguments.deeper + 1, model.spec.num_layers)
    deeper, seconds = timed(lambda: calibrate(model, fitted, range(depth, deepest), rank=0))
    for other in deeper.depths:
        score("calibrated, rank 0", other, deeper, seconds)
    for rank in ranks[1:]:
        score(f"calibrated, rank {rank}", depth, *timed(lambda rank=rank: calibrate(model, fitted, [depth], rank=rank)))
    for steps in arguments.refine:

        def refined(steps=steps):
            result = calibrate(model, fitted, [depth])
            refine(model, result, fitted, steps)
            return result

        score(f"refined {steps} steps", depth, *timed(refined))
    for row, ratio in zip(rows, prefill_ratios(variants, (bos + tokens)[:LONG]), strict=True):
        row["prefill_ratio"] = ratio
    title = f"{Path(arguments.model).name}, {torch.get_num_threads()} threads"
    show(rows, title, model.spec.num_layers)
    if arguments.output:
        atomic_write(arguments.output, lambda file: Path(file).write_text(json.dumps(rows, indent=1) + "\n"))


if __name__ == "__main__":
    main()
