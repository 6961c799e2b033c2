"""What prefill plans lose beside prefill depths: fidelity on text, retrieval and copying, and multiplications.

python bench/plans.py MODEL_FOLDER --text FILE --plan FILE [FILE ...] --prefill-depth P [P ...] [--calibration FILE]
    [--output FILE]

Prompts of 256 tokens. A plan or depth that the calibration is for has a second row. Multiplications are of all prompt
tokens, as shares of full depth's.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from deep_tokens import CONTINUATION, PROMPT, measure

import pop_ext
from pop_ext.analysis.plans import multiplications, with_plan
from pop_ext.analysis.speed import processor_name
from pop_ext.analysis.tasks import synthetic_task
from pop_ext.analysis.text import read_text, windows
from pop_ext.checkpoints.files import atomic_write
from pop_ext.checkpoints.prefill_plan import PrefillPlan


def settings(model, plans: list[Path], depths: list[int]) -> list[tuple]:
    """(name, projections, plan, model, prefill depth to run it at) of every row."""
    layers, own, found = model.spec.num_layers, copy.copy(model), []
    own.calibration = None
    named = [(f"depth {depth}", PrefillPlan.suffix(depth, layers), depth) for depth in depths]
    for path in plans:
        plan = PrefillPlan.load(path, model.spec)
        plan.check(model.folder)
        named.append((f"{path.stem}, {plan.depth} layers", plan, None))
    for name, plan, depth in named:
        found.append((name, "own", plan, with_plan(own, plan), depth))
        if model.calibration is not None and plan.depth in model.calibration.depths:
            found.append((name, "calibrated", plan, with_plan(model, plan), depth))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--text", type=Path, required=True, help="text that was not searched or calibrated on")
    parser.add_argument("--plan", type=Path, nargs="+", required=True, help="files of `pop plan`")
    parser.add_argument("--prefill-depth", type=int, nargs="+", default=[], help="layers, to compare with")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--output", type=Path, help="also write the rows to this file, as JSON")
    arguments = parser.parse_args()

    model = pop_ext.load(arguments.model, calibration=arguments.calibration, prefill_depth=1.0)
    spec, layers = model.spec, model.spec.num_layers
    found = windows(model.tokenizer, read_text(arguments.text), PROMPT + CONTINUATION, arguments.prompts)
    prompts = [w[:PROMPT] for w in found]
    tasks = {"text": (prompts, [w[PROMPT:] for w in found])}
    tasks |= {kind: synthetic_task(kind, prompts, model.tokenizer) for kind in ("retrieval", "copying")}
    named = settings(model, arguments.plan, arguments.prefill_depth)
    runs = [("full", layers, model, layers), *(("pop", plan.depth, variant, at) for _, _, plan, variant, at in named)]
    with torch.no_grad():
        measured = {task: measure(runs, pairs, 0) for task, pairs in tasks.items()}
    print(
        f"{arguments.model.name}, {processor_name(model)}; {arguments.prompts} prompts of {PROMPT} tokens of each kind"
    )
    header = ["runs", "projections", "multiplications", "KL: text (95%)", "retrieval", "copying", "retrieved", "copied"]
    print("", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}", sep="\n")
    rows, full = [], multiplications(spec, PrefillPlan.suffix(layers, layers), PROMPT)
    for i, (name, projections, plan, _, _) in enumerate(named):
        text, retrieval, copying = (measured[task][i] for task in tasks)
        share = multiplications(spec, plan, PROMPT) / full
        rows.append({"name": name, "projections": projections, "multiplications": share, "plan": plan.to_json()})
        rows[-1] |= {task: measured[task][i] for task in tasks}
        kl = f"{text['kl']:.3f} ({text['kl_ci95'][0]:.3f} to {text['kl_ci95'][1]:.3f})"
        cells = [name, projections, f"{share:.3f}", kl, *(f"{task['kl']:.3f}" for task in (retrieval, copying))]
        cells += [f"{task['kept']} of {task['full_right']}" for task in (retrieval, copying)]
        print(f"| {' | '.join(cells)} |")
    if arguments.output:
        atomic_write(arguments.output, lambda file: Path(file).write_text(json.dumps(rows, indent=1) + "\n"))


if __name__ == "__main__":
    main()
