"""`pop evaluate`."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..runtime.prefill_depth import parse_depth
from .common import (
    Anchor,
    Boundary,
    Continuation,
    Depths,
    DType,
    Json,
    Model,
    Plot,
    Prompts,
    Samples,
    Seed,
    Text,
    app,
    check_outputs,
    encoded_samples,
    load_model,
    one_line_errors,
    output_console,
    progress_bar,
    read_texts,
)


class SyntheticTask(str, Enum):
    retrieval = "retrieval"
    copying = "copying"


@app.command()
@one_line_errors()
def evaluate(
    model: Model,
    text: Text = None,
    samples: Samples = None,
    prefill_depth: Depths = ["0.67"],  # noqa: B006
    calibration: Annotated[Path | None, typer.Option(help="File of `pop calibrate`.")] = None,
    prompts: Prompts = 32,
    prompt_tokens: Annotated[
        list[int], typer.Option(min=2, help="Tokens of each prompt; may be given several times.")
    ] = [384],  # noqa: B006
    continuation_tokens: Continuation = 64,
    synthetic_task: Annotated[
        SyntheticTask | None, typer.Option(help="Plant something in the prompts that the continuations ask for.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method; may be given several times. By default all.")
    ] = None,
    boundary_tokens: Boundary = 1,
    anchor_tokens: Anchor = 1,
    seed: Seed = 0,
    dtype: Annotated[DType, typer.Option(help="Data type of weights and cache.")] = DType.bfloat16,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Compare next-token distributions after truncated prompts with the full model's, and prefill times.

    Beside POP: the last layers removed from both stages, ShortGPT's and Gromov's choice of layers removed from both,
    and SPEED without its training.
    """
    check_outputs(plot)
    source = read_texts(text, samples)
    if samples and synthetic_task:
        raise ValueError("--synthetic-task plants in text, expected it without --samples")
    loaded = load_model(
        model, dtype, boundary_tokens=boundary_tokens, anchor_tokens=anchor_tokens, calibration=calibration
    )
    from pop_ext.analysis import evaluation, tasks
    from pop_ext.analysis import text as texts

    depths = sorted({loaded.resolve_prefill_depth(parse_depth(depth)) for depth in prefill_depth})
    rows, results = [], []
    for length in [0] if samples else prompt_tokens:
        visuals = None
        if samples:
            *pairs, visuals = encoded_samples(samples, loaded)
            length = round(sum(map(len, pairs[0])) / len(pairs[0]))
        elif synthetic_task:
            filler = texts.windows(loaded.tokenizer, source, length, prompts)
            pairs = tasks.synthetic_task(synthetic_task.value, filler, loaded.tokenizer, seed)
        else:
            windows = texts.windows(loaded.tokenizer, source, length + continuation_tokens, prompts)
            pairs = [w[:length] for w in windows], [w[length:] for w in windows]
        with progress_bar(f"evaluating, {length} prompt tokens") as report:
            results = evaluation.evaluate(
                loaded, *pairs, depths, method or evaluation.METHODS, visuals=visuals, seed=seed, progress=report
            )
        rows += [{**row, "prompt_tokens": length} for row in evaluation.to_json(results)]
        if not as_json:
            what = f"{synthetic_task.value}, " if synthetic_task else ""
            output_console().print(
                evaluation_table(results, f"{Path(model).name}, {what}{length} prompt tokens", synthetic_task)
            )
    if plot:
        evaluation.plot(results, plot, f"{Path(model).name}, {length} prompt tokens")
    if as_json:
        print(json.dumps(rows))


def evaluation_table(results, title: str, synthetic_task) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("depth", "method", "perplexity", "KL, nats a token", "above the best", "top-1", "first-token KL"):
        table.add_column(name, justify="left" if name == "method" else "right")
    if synthetic_task:
        table.add_column("all exact", justify="right")
    table.add_column("prefill", justify="right")
    for r in results:
        low, high = r.excess_interval
        # a difference that its interval does not separate from nothing is none
        excess = "" if r.method == "full" else f"{low:.3f} to {high:.3f}" if low > 0 else "best" if high == 0 else "no"
        table.add_row(
            str(r.prefill_depth),
            r.method,
            f"{r.perplexity:.2f}",
            f"{r.kl:.4f} ({r.kl_ci95[0]:.4f} to {r.kl_ci95[1]:.4f})",
            excess,
            f"{r.top1_agreement:.1%}",
            f"{r.first_token_kl:.4f}",
            *([f"{r.exact_answers:.0%}"] if synthetic_task else []),
            f"{r.prefill_seconds:.3f} s",
        )
    return table
