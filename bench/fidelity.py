"""The README's table of fidelity: calibration on the default text, every method, long contexts, copying and retrieval.

python bench/fidelity.py MODEL_FOLDER --text FILE [--prefill-depth 20] [--refine STEPS] [--output FILE]

Runs the `pop` commands as anyone would, and prints their rows as Markdown.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pop_ext.checkpoints.files import atomic_write

CONTEXTS = (512, 1024, 2048, 4096)


def pop(*arguments) -> str:
    """What a command prints; its progress bar goes to the terminal."""
    command = [sys.executable, "-m", "pop_ext.cli", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def full_pass(folder: Path, tokens: int) -> float:
    """Seconds of the full model's pass over `tokens` tokens, in the batches that calibration takes."""
    import torch

    import pop_ext
    from pop_ext.analysis.calibration import BATCH, WINDOW

    model = pop_ext.load(folder)
    windows = torch.randint(model.spec.vocab_size, (tokens // WINDOW, WINDOW)).tolist()
    start = time.perf_counter()
    with torch.no_grad():
        for i in range(0, len(windows), BATCH):
            list(model.hidden_states(windows[i : i + BATCH]))
    return time.perf_counter() - start


def row(cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def show(title: str, rows: list[dict], exact: bool = False) -> None:
    print(f"\n{title}\n")
    header = ["prompt tokens", "layers", "method", "KL, nats a token (95%)", "perplexity", "top-1", "prefill"]
    header = [*header[:-1], "all exact", "prefill"] if exact else header
    print(row(header), row(["---"] * len(header)), sep="\n")
    for r in rows:
        cells = [r["prompt_tokens"], r["prefill_depth"], r["method"]]
        cells += [f"{r['kl']:.4f} ({r['kl_ci95'][0]:.4f} to {r['kl_ci95'][1]:.4f})", f"{r['perplexity']:.2f}"]
        cells += [f"{r['top1_agreement']:.1%}", *([f"{r['exact_answers']:.0%}"] if exact else [])]
        print(row([*cells, f"{r['prefill_seconds']:.3f} s"]))
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--text", type=Path, required=True, help="text that is not calibrated on")
    parser.add_argument("--calibration-text", type=Path, help="instead of the default text")
    parser.add_argument("--prefill-depth", action="append", help="12 or 0.7; by default two thirds and a half")
    parser.add_argument("--refine", type=int, default=0, metavar="STEPS")
    parser.add_argument("--output", type=Path, help="also write all rows to this file, as JSON")
    arguments = parser.parse_args()
    depths = [x for depth in arguments.prefill_depth or ("0.67", "0.5") for x in ("--prefill-depth", depth)]
    name = arguments.model.name
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calibration.safetensors"
        text = ("--text", arguments.calibration_text) if arguments.calibration_text else ()
        provenance = json.loads(
            pop("calibrate", arguments.model, *depths, *text, "--output", file, "--refine", arguments.refine, "--json")
        )
        print(
            f"{name}: calibrated on {provenance['tokens']} tokens in {provenance['seconds']:.0f} s, "
            f"after {provenance['sampling_seconds']:.0f} s of sampling (nothing where it was cached); "
            f"a full pass over them takes {full_pass(arguments.model, provenance['tokens']):.0f} s"
        )
        common = ("evaluate", arguments.model, *depths, "--calibration", file, "--text", arguments.text, "--json")
        results = {"methods": json.loads(pop(*common, "--baselines"))}
        show("Methods", results["methods"])
        methods = ("--method", "pop_uncalibrated", "--method", "pop_calibrated")
        lengths = [x for length in CONTEXTS for x in ("--prompt-tokens", length)]
        results["contexts"] = json.loads(pop(*common, *methods, *lengths, "--prompts", 8))
        show("Context length, 8 prompts each", results["contexts"])
        for task in ("retrieval", "copying"):
            results[task] = json.loads(pop(*common, *methods, "--synthetic-task", task))
            show(f"{task.capitalize()} from the prompt", results[task], exact=True)
    if arguments.output:
        atomic_write(arguments.output, lambda file: Path(file).write_text(json.dumps(results, indent=1) + "\n"))


if __name__ == "__main__":
    main()
