"""`pop reproduce`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoints.files import atomic_write
from .common import (
    FILE,
    Calibration,
    Device,
    DeviceName,
    DType,
    Json,
    Model,
    Seed,
    app,
    check_outputs,
    load_encoder,
    load_model,
    one_line_errors,
    output_console,
    progress_bar,
)

# Items and tokens of a prompt, tokens that calibrate, tokens of a timed prompt and decoded after it, rounds, tokens of
# an answer to a problem.
SIZES = {False: (32, 256, 50_000, 512, 16, 5, 256), True: (4, 224, 4096, 64, 4, 1, 16)}  # quick or not
CACHE_TOKENS = 32_768


@app.command()
@one_line_errors()
def reproduce(
    model: Model,
    skipped: Annotated[
        list[int] | None,
        typer.Option(help="Per cent of the layers; may be given several times.  [default: 20, 25, 33, 40, 50]"),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Of those that ship; may be given several times, `none` for none.  [default: all six]"),
    ] = None,
    multiple_choice: Annotated[
        list[Path] | None, typer.Option(help="JSON lines {question, choices, answer}, a task.", **FILE)
    ] = None,
    gsm8k: Annotated[Path | None, typer.Option(help="GSM8K's JSON lines as published, a task.", **FILE)] = None,
    calibration: Calibration = None,
    items: Annotated[int | None, typer.Option(min=2, help="Items of each task at most.", show_default="32")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A look at the tables: few items, tokens and rounds.")] = False,
    seed: Seed = 0,
    dtype: Annotated[DType, typer.Option(help="Data type of weights and cache.")] = DType.bfloat16,
    device: Device = DeviceName.auto,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables to this file, as Markdown.")] = None,
    as_json: Json = False,
) -> None:
    """Print the paper's tables for a model: scores, ablation, speed and drift at several shares of skipped layers.

    POP as in the paper and as it runs here (calibrated: without --calibration on text that needs no file), ShortGPT,
    and POP without projection or boundary, each against the full model on the same items.
    """
    check_outputs(markdown)
    count, prompt_tokens, calibration_tokens, timed_tokens, decode_tokens, rounds, answer_tokens = SIZES[quick]
    count = items or count
    uses = uses_of(tasks)
    encoder = load_encoder(model)
    from ..analysis import benchmarks, reproduction, workflows

    depths = reproduction.depths_of(skipped or list(reproduction.SKIPPED), encoder.spec.num_layers)
    check_calibration(calibration, depths, encoder.spec.num_layers)
    given = [benchmarks.choice_task(path, encoder, count) for path in multiple_choice or []]
    given += [benchmarks.gsm8k_task(gsm8k, encoder, count, answer_tokens)] if gsm8k else []
    loaded = load_model(
        model, dtype, prefill_depth=1.0, calibration=calibration, device=device, max_cache_tokens=CACHE_TOKENS
    )
    fitted = loaded.calibration
    if fitted is None:
        with progress_bar("calibrating:") as report:
            fitted = workflows.calibrate(loaded, depths, tokens=calibration_tokens, seed=seed, progress=report)
    with progress_bar("reproducing:") as report:
        shipped = [benchmarks.shipped_task(use, loaded, count, prompt_tokens, seed) for use in uses]
        result = reproduction.reproduce(
            loaded, fitted, depths, shipped + given, timed_tokens=timed_tokens, decode_tokens=decode_tokens,
            rounds=rounds, prompt_tokens=prompt_tokens, seed=seed, progress=report,
        )  # fmt: skip
    result = {"model": model, "dtype": dtype.value, "seed": seed, **result}
    found = tables(result, Path(model).name)
    if markdown:
        text = as_markdown(found, result)
        atomic_write(markdown, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
    if as_json:
        print(json.dumps(result))
    else:
        show(found, result)


def uses_of(tasks: list[str] | None) -> list[str]:
    from ..analysis.uses import USES

    for task in tasks or []:
        if task not in (*USES, "none"):
            raise ValueError(f"tasks is {task}, expected some of {', '.join(USES)}, or none")
    return [use for use in USES if not tasks or use in tasks]


def check_calibration(calibration: Path | None, depths: list[int], layers: int) -> None:
    from ..checkpoints.calibration import calibrated_depths

    held = depths if calibration is None else calibrated_depths(calibration)
    if missing := [depth for depth in depths if depth < layers - 1 and depth not in held]:
        raise ValueError(
            f"calibration is made for {', '.join(map(str, held))} layers, expected also "
            f"{', '.join(map(str, missing))}, which --skipped asks for"
        )


Tables = list[tuple[str, list[str], list[list[str]]]]  # title, columns, rows


def tables(result: dict, name: str) -> Tables:
    """All that is printed, as text."""
    layers, depths = result["layers"], result["prefill_depths"]
    columns = ["", *(f"{depth}/{layers}" for depth in depths)]
    found = []
    for task in result["tasks"]:
        full = next(row for row in task["scores"] if row["method"] == "full")
        rows = {(row["method"], row["prefill_depth"]): row for row in task["scores"]}
        methods = dict.fromkeys(row["method"] for row in task["scores"] if row is not full)
        title = (
            f"{name}, {task['name']}: {task['measure']}, %, of {task['items']} items; full {100 * full['score']:.1f}"
        )
        cells = [[SHORT[m], *(score_text(rows.get((m, depth))) for depth in depths)] for m in methods]
        found.append((title, columns, cells))
    tokens = result["speed_prompt_tokens"]
    rows = [[f"{SHORT[r['method']]}, {r['prefill_depth']}/{layers}, batch {r['batch']}", f"{r['prefill_seconds']:.3f}",
             f"{r['speedup']:.2f}", f"{r['decode_tokens_per_second']:.1f}", memory_text(r["peak_bytes"])]
            for r in result["speed"]]  # fmt: skip
    title = f"{name}, prompts of {tokens} tokens, {result['machine']}"
    found.append((title, ["", "prefill, s", "speed-up", "tokens/s", "peak, MiB"], rows))
    for row in result["drift"]:
        title = f"{name}, {SHORT[row['method']]}, {row['prefill_depth']}/{layers}: cosine distance from the full model"
        cells = [[str(layer), *(f"{row[name][layer]:.4f}" for name in DRIFT)] for layer in range(layers)]
        found.append((title, ["layer", *DRIFT.values()], cells))
    return found


SHORT = {
    "full": "full",
    "pop_paper": "POP, paper",
    "pop_calibrated": "POP, calibrated",
    "shortgpt": "ShortGPT",
    "no_projection": "no projection",
    "no_boundary": "no boundary",
}
DRIFT = {
    "prompt_hidden": "prompt",
    "prompt_values": "values",
    "answer_hidden": "answer",
    "answer_attention": "attention",
}
LEGEND = (
    "±: half the 95% interval of the difference from the full model, paired by item. Columns: layers that prompts run "
    "through.",
    "peak: the most memory that the process held, all methods' weights among it. speed-up: of prefill.",
    "prompt, values: hidden state before the layer, and values held, of truncated tokens; answer, attention: hidden "
    "state, and what attention gives, of generated tokens.",
)


def score_text(row: dict | None) -> str:
    if row is None:
        return ""
    low, high = row["difference_ci95"]
    return f"{100 * row['score']:.1f}±{50 * (high - low):.1f}"


def memory_text(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:.0f}"


def as_markdown(found: Tables, result: dict) -> str:
    parts = []
    for title, columns, rows in found:
        lines = [columns, ["---"] * len(columns), *rows]
        parts.append("\n".join([title, "", *("| " + " | ".join(cells) + " |" for cells in lines)]))
    methods = [f"- {SHORT[name]}: {said}." for name, said in result["methods"].items()]
    return "\n\n".join([*parts, "\n".join(methods), *LEGEND]) + "\n"


def show(found: Tables, result: dict) -> None:
    from .tables import plain_table, print_legend

    console = output_console()
    for title, columns, rows in found:
        console.print(title, markup=False, soft_wrap=not console.is_terminal)
        table = plain_table(console, "", *columns)
        for cells in rows:
            table.add_row(*cells)
        console.print(table, "")
    print_legend(*(f"{SHORT[name]}: {said}." for name, said in result["methods"].items()), *LEGEND)
