"""`pop verify`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..runtime.prefill_depth import parse_depth
from .common import (
    Calibration,
    DeepTokens,
    Device,
    DeviceName,
    DType,
    Json,
    Model,
    Paper,
    Plan,
    Seed,
    app,
    load_model,
    one_line_errors,
    output_console,
    progress_bar,
    settings_of,
)


@app.command()
@one_line_errors(status=3)
def verify(
    ctx: typer.Context,
    model: Model,
    prefill_depth: Annotated[
        str | None,
        typer.Option(help="Layers (12) or their share (0.7).  [default: what the calibration recommends]"),
    ] = None,
    calibration: Calibration = None,
    deep_tokens: DeepTokens = 0.0,
    prefill_plan: Plan = None,
    paper: Paper = False,
    prompts: Annotated[int, typer.Option(min=8, help="Prompts of each use.")] = 20,
    prompt_tokens: Annotated[int, typer.Option(min=128, help="Tokens of each prompt.")] = 256,
    seed: Seed = 0,
    dtype: Annotated[DType, typer.Option(help="Data type of weights and cache.")] = DType.bfloat16,
    device: Device = DeviceName.auto,
    as_json: Json = False,
) -> None:
    """Say what a prefill depth is safe for: chat, prose, code, maths, retrieval, copying.

    Checks that ship with the package compare the truncated model with the full one. Exit status 0: safe; 1: safe for
    some uses; 2: not safe; 3: it could not be checked.
    """
    stages = settings_of(ctx, paper, calibration=calibration, deep_tokens=deep_tokens, prefill_plan=prefill_plan)
    if prefill_depth is None and calibration is None and prefill_plan is None:
        raise ValueError("prefill_depth is not given, expected layers or their share, or a calibration with one")
    depth = None if prefill_depth is None else parse_depth(prefill_depth)
    loaded = load_model(model, dtype, prefill_depth=depth, **stages, device=device)
    from ..analysis.verification import verify

    with progress_bar("verifying:") as report:
        result = verify(loaded, prompts=prompts, prompt_tokens=prompt_tokens, seed=seed, progress=report)
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        show(result, f"{Path(model).name}: {prompts} prompts of each use")
    raise typer.Exit(result.exit_code)


def show(result, title: str) -> None:
    from .tables import KL, TOP1, plain_table, plus_minus, print_legend, print_sentences

    if result.checks:
        console = output_console()
        table = plain_table(console, title, "use", "KL", "top-1", "kept", "safe")
        for check in result.checks:
            kept = f"{check.kept} of {check.full_right}" if check.counts else ""
            kl, top1 = plus_minus(check.kl, check.kl_ci95, 3), f"{100 * check.top1_agreement:.1f}"
            table.add_row(check.use, kl, top1, kept, "yes" if check.safe else "no")
        console.print(table)
        print_legend("", KL, TOP1, "kept: answers that the full model gets right and the truncated one, too.", "")
    print_sentences(*result.sentences())
