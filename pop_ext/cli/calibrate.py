"""`pop calibrate`."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .common import (
    Anchor,
    Boundary,
    Chats,
    Depths,
    Device,
    DeviceName,
    DType,
    Json,
    Model,
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
    output_console,
    progress_bar,
    read_data,
)


@app.command()
@one_line_errors()
def calibrate(
    model: Model,
    prefill_depth: Depths,
    output: Annotated[Path, typer.Option(help="The calibration file to write.")],
    text: Text = None,
    chats: Chats = None,
    tokens: Tokens = 50_000,
    rank: Rank = None,
    refine: Annotated[int, typer.Option(min=0, help="Gradient steps that follow the closed form.")] = 0,
    boundary_tokens: Boundary = 1,
    anchor_tokens: Anchor = 1,
    seed: Seed = 0,
    dtype: Annotated[DType, typer.Option(help="Data type of the model.")] = DType.bfloat16,
    device: Device = DeviceName.auto,
    as_json: Json = False,
) -> None:
    """Fit the projections of the skipped layers to what the full model computes, for one or several prefill depths.

    The file goes to `--calibration` of the other commands, and to `pop_ext.load`. `pop tune` also finds out which depth
    is safe. Without --text or --chats, on text that needs no file.
    """
    check_outputs(output)
    data = read_data(text, chats)
    if chats and refine:
        raise ValueError("--refine works on text, expected it without --samples or --chats")
    encoder = load_encoder(model)
    depths = layer_counts(prefill_depth, encoder.spec)
    if refine and encoder.spec.vision_type:
        raise ValueError(f"--refine takes models of text alone, {model} has a vision tower")
    fit = data.windows(encoder, tokens) if data is not None and not data.has_images else None
    room = None if data else 32_768  # of the cache: for many samples at a time
    stages = {"boundary_tokens": boundary_tokens, "anchor_tokens": anchor_tokens}
    loaded = load_model(model, dtype, **stages, max_cache_tokens=room, device=device)
    from ..analysis import workflows

    start = time.perf_counter()
    if fit is None:
        with progress_bar("sampling text") as report:
            fit = (data or workflows.default_data(loaded, tokens, seed, report)).windows(loaded, tokens)
    encode_images(loaded, fit)
    names = [file.name for file in text or chats or []] or ["default"]
    with progress_bar("calibrating:") as report:
        result = workflows.calibrate_on(
            loaded, depths, fit, rank=rank, source=names, waited=time.perf_counter() - start, refine=refine,
            state=output, seed=seed, progress=report,
        )  # fmt: skip
    result.save(output)
    if as_json:
        print(json.dumps(result.provenance))
    else:
        show(result, output)


def show(result, output: Path) -> None:
    table = Table("prefill depth", "layer", "error before", "after", title=f"{output}", title_justify="left")
    for depth, entry in result.provenance["depths"].items():
        for layer, before in entry["error_before"].items():
            table.add_row(str(depth), str(layer), f"{before:.4f}", f"{entry['error_after'][layer]:.4f}")
    output_console().print(table)
