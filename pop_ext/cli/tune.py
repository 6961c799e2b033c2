"""`pop tune`."""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    Anchor,
    Boundary,
    Chats,
    Continuation,
    Device,
    DeviceName,
    DType,
    Json,
    Model,
    Plot,
    Prompts,
    Rank,
    Seed,
    Text,
    Tokens,
    app,
    check_outputs,
    encode_images,
    layer_counts,
    load_encoder,
    load_model,
    one_line_errors,
    progress_bar,
    read_data,
    stderr,
)


@app.command()
@one_line_errors()
def tune(
    model: Model,
    output: Annotated[Path, typer.Option(help="The calibration file to write.")],
    text: Text = None,
    chats: Chats = None,
    max_kl: Annotated[
        float | None, typer.Option(help="KL from the full model, nats a token, that is allowed.  [default: 0.05]")
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Instead: the share of tokens whose likeliest token must stay (0.9).")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Instead: the speed-up of prefill that is wanted (1.4).")
    ] = None,
    prefill_depth: Annotated[
        list[str] | None,
        typer.Option(
            help="A candidate, in layers (12) or their share (0.7); may be given several times.  [default: six]"
        ),
    ] = None,
    tokens: Tokens = 50_000,
    prompts: Prompts = 24,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each prompt of text.")] = 512,
    continuation_tokens: Continuation = 64,
    rank: Rank = None,
    boundary_tokens: Boundary = 1,
    anchor_tokens: Anchor = 1,
    seed: Seed = 0,
    verify: Annotated[bool, typer.Option(help="Check what the recommended depth is safe for.")] = True,
    dtype: Annotated[DType, typer.Option(help="Data type of the model.")] = DType.bfloat16,
    device: Device = DeviceName.auto,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Find the prefill depth that is safe for a model on your text, and calibrate for it.

    Calibrates several depths on three quarters of the data, measures them on the rest, times prefill, recommends one,
    and checks what it is safe for. The file goes to `--calibration` of the other commands. A run that was interrupted
    goes on when it is started again. Without --text or --chats, on text that the model writes itself.
    """
    check_outputs(output, plot=plot)
    from ..analysis import evaluation, workflows
    from ..analysis import tune as tuning

    goal, data = tuning.Goal.of(max_kl, min_top1, speedup), read_data(text, chats)
    encoder = load_encoder(model)
    layers = encoder.spec.num_layers
    depths = layer_counts(prefill_depth, encoder.spec) if prefill_depth else tuning.candidates(layers)
    sizes = (tokens, prompts, prompt_tokens, continuation_tokens)
    parts = data.split(encoder, *sizes) if data is not None and not data.has_images else None
    stages = {"boundary_tokens": boundary_tokens, "anchor_tokens": anchor_tokens}
    loaded = load_model(model, dtype, **stages, device=device)
    if parts is None:
        with progress_bar("sampling text") as report:
            data = data or workflows.default_data(loaded, tokens * 4 // 3, seed, report)
        parts = data.split(loaded, *sizes)
    encode_images(loaded, *parts)
    try:
        with progress_bar("tuning:") as report:
            options = {"rank": rank, "seed": seed, "verify": verify, "output": output}
            result = tuning.tune(loaded, *parts, depths, goal, **options, progress=report)
    except KeyboardInterrupt:
        stderr.print("pop: interrupted; the same command goes on from here", markup=False)
        raise
    if plot:
        evaluation.plot(
            result.rows, plot, f"{Path(model).name}, {result.prompt_tokens} prompt tokens", result.recommended
        )
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        show(result, model, output)


def show(result, model: str, output: Path) -> None:
    from .tables import INTERVAL, KL, SPEEDUP, TOP1, print_command, print_legend, print_sentences, print_tuning

    print_tuning(result, f"{Path(model).name}: {result.prompts} held-out prompts of {result.prompt_tokens} tokens")
    print_legend("", KL, TOP1, SPEEDUP, INTERVAL, "")
    command = f"pop generate {shlex.quote(model)} --calibration {shlex.quote(str(output))}"
    if result.recommended is None:
        command += f" --prefill-depth {result.calibration.depths[-1]}"
    print_sentences(*result.sentences(), "", f"{output} holds the calibrated projections. Next:")
    print_command(f"{command} --prompt 'What is prefill?'")
