"""What deep tokens gain and cost: fidelity on text, retrieval and copying, against prefill's processor time.

python bench/deep_tokens.py MODEL_FOLDER --calibration FILE --text FILE [--prefill-depth 20 ...] [--deep-tokens 0.1 ...]
    [--output FILE]

Prompts of 256 tokens. Processor time is of prefill, all threads together, all shares in turn, medians of rounds as
shares of full depth's: other programs disturb it less than wall time. Multiplications are counted.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from prefill import pop_multiplications

import pop_ext
from pop_ext.analysis.evaluation import RESAMPLES, interval, score, time_prefill, with_deep_tokens
from pop_ext.analysis.speed import processor_name
from pop_ext.analysis.tasks import synthetic_task
from pop_ext.analysis.text import read_text, windows
from pop_ext.checkpoints.files import atomic_write

PROMPT, CONTINUATION, ROUNDS = 256, 24, 5


def multiplications(spec, depth: int, share: float) -> float:
    """Of a prefill of PROMPT tokens: a deep token has what one has at full depth. The choice itself, 16 queries in 8
    layers, is left out: less than a thousandth.
    """
    truncated, full = pop_multiplications(spec, PROMPT, depth), pop_multiplications(spec, PROMPT, spec.num_layers)
    last = 1 / (spec.num_layers - depth)  # full depth leaves out most of the last layer, and deep tokens do not
    return truncated + share * (full - truncated) * (1 + last)


def measure(runs, pairs, seed: int) -> list[dict]:
    """A row for each run but the full model's: KL with its interval, the first token's, and right answers."""
    scores = np.array([score(runs, prompt, rest, []) for prompt, rest in zip(*pairs, strict=True)])
    resamples = np.random.default_rng(seed).integers(len(scores), size=(RESAMPLES, len(scores)))
    right = scores[:, :, 4] > 0
    return [
        {
            "kl": scores[:, run, 1].mean(),
            "kl_ci95": interval(scores[:, run, 1], resamples),
            "first_token_kl": scores[:, run, 0].mean(),
            "kept": int((right[:, 0] & right[:, run]).sum()),
            "full_right": int(right[:, 0].sum()),
        }
        for run in range(1, len(runs))
    ]


def processor_times(runs, prompts) -> np.ndarray:
    """Seconds of processor time of one prefill by each run, [ROUNDS, runs]."""
    seconds = np.zeros((ROUNDS, len(runs)))
    for i in range(ROUNDS):
        for run, (_, _, variant, depth) in enumerate(runs):
            start = time.process_time()
            time_prefill(variant, prompts[i % len(prompts)], [], depth)
            seconds[i, run] = time.process_time() - start
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="text that is not calibrated on")
    parser.add_argument("--prefill-depth", type=int, nargs="+", help="layers; by default all of the calibration")
    parser.add_argument("--deep-tokens", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.2], metavar="SHARE")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--output", type=Path, help="also write the rows to this file, as JSON")
    arguments = parser.parse_args()

    model = pop_ext.load(arguments.model, calibration=arguments.calibration, prefill_depth=1.0)
    layers, spec = model.spec.num_layers, model.spec
    depths = arguments.prefill_depth or model.calibration.depths
    found = windows(model.tokenizer, read_text(arguments.text), PROMPT + CONTINUATION, arguments.prompts)
    prompts = [w[:PROMPT] for w in found]
    tasks = {"text": (prompts, [w[PROMPT:] for w in found])}
    tasks |= {kind: synthetic_task(kind, prompts, model.tokenizer) for kind in ("retrieval", "copying")}
    settings = [(depth, share) for depth in depths for share in arguments.deep_tokens]
    runs = [("full", layers, model, layers)]
    runs += [("pop", depth, with_deep_tokens(model, share), depth) for depth, share in settings]
    with torch.no_grad():
        measured = {task: measure(runs, pairs, 0) for task, pairs in tasks.items()}
        seconds = processor_times(runs, prompts)
    print(
        f"{arguments.model.name}, {processor_name(model)}; {arguments.prompts} prompts of {PROMPT} tokens of each kind"
    )
    header = ["layers", "deep tokens", "KL: text (95%)", "retrieval", "copying", "first token, copying"]
    header += ["retrieved", "copied", "processor time", "multiplications"]
    print("", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}", sep="\n")
    rows = []
    for i, (depth, share) in enumerate(settings):
        text, retrieval, copying = (measured[task][i] for task in tasks)
        ratio = float(np.median(seconds[:, i + 1] / seconds[:, 0]))
        count = multiplications(spec, depth, share) / pop_multiplications(spec, PROMPT, layers)
        rows.append({"prefill_depth": depth, "deep_tokens": share, "processor_time": ratio, "multiplications": count})
        rows[-1] |= {task: measured[task][i] for task in tasks}
        cells = [f"{depth} of {layers}", f"{share:.0%}"]
        cells += [f"{text['kl']:.3f} ({text['kl_ci95'][0]:.3f} to {text['kl_ci95'][1]:.3f})"]
        cells += [f"{retrieval['kl']:.3f}", f"{copying['kl']:.3f}", f"{copying['first_token_kl']:.2f}"]
        cells += [f"{task['kept']} of {task['full_right']}" for task in (retrieval, copying)]
        print(f"| {' | '.join([*cells, f'{ratio:.2f}', f'{count:.2f}'])} |")
    if arguments.output:
        atomic_write(arguments.output, lambda file: Path(file).write_text(json.dumps(rows, indent=1) + "\n"))


if __name__ == "__main__":
    main()
