"""`pop calibrate`."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..runtime.prefill_depth import parse_depth
from .common import (
    Anchor,
    Boundary,
    Depths,
    DType,
    Json,
    Model,
    Samples,
    Seed,
    app,
    check_outputs,
    encoded_samples,
    load_model,
    one_line_errors,
    output_console,
    progress_bar,
    read_texts,
)


@app.command()
@one_line_errors()
def calibrate(
    model: Model,
    prefill_depth: Depths,
    output: Annotated[Path, typer.Option(help="The calibration file to write.")],
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="File of UTF-8 text; by default text that needs no file.")
    ] = None,
    samples: Samples = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to use at most.")] = 50_000,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Features of the token before; 0: none, and no cost.", show_default="64")
    ] = None,
    refine: Annotated[int, typer.Option(min=0, help="Gradient steps that follow the closed form.")] = 0,
    boundary_tokens: Boundary = 1,
    anchor_tokens: Anchor = 1,
    seed: Seed = 0,
    dtype: Annotated[DType, typer.Option(help="Data type of the model.")] = DType.bfloat16,
    as_json: Json = False,
) -> None:
    """Fit the projections of the skipped layers to what the full model computes, for one or several prefill depths.

    The file goes to `--calibration` of the other commands, and to `pop_ext.load`.
    """
    check_outputs(output)
    depths = [parse_depth(depth) for depth in prefill_depth]
    source = read_texts(text, samples) if text or samples else None
    if samples and refine:
        raise ValueError("--refine works on text, expected it without --samples")
    room = None if text or samples else 32_768  # of the cache: for many samples at a time
    loaded = load_model(
        model, dtype, boundary_tokens=boundary_tokens, anchor_tokens=anchor_tokens, max_cache_tokens=room
    )
    from pop_ext.analysis import calibration as calibrations
    from pop_ext.analysis import text as texts

    depths = [loaded.resolve_prefill_depth(depth) for depth in depths]
    if refine and loaded.vision is not None:
        raise ValueError(f"--refine takes models of text alone, {model} has a vision tower")
    start = time.perf_counter()
    if source is None and not samples:
        with progress_bar("sampling text") as report:
            source = texts.default_text(loaded, tokens, seed, report)
    sampled = time.perf_counter()
    length = min(calibrations.WINDOW, loaded.spec.max_position_embeddings)
    visuals = None
    if samples:
        prompts, continuations, visuals = encoded_samples(samples, loaded)
        windows = [prompt + continuation for prompt, continuation in zip(prompts, continuations, strict=True)]
    else:
        windows = texts.windows(loaded.tokenizer, source, length)[: max(2, tokens // length)]
    with progress_bar("calibrating") as report:
        result = calibrations.calibrate(loaded, windows, depths, rank=rank, visuals=visuals, progress=report)
    result.provenance |= {
        "text": [file.name for file in text or [samples]] if text or samples else ["default"],
        "boundary_tokens": boundary_tokens,
        "anchor_tokens": anchor_tokens,
        "sampling_seconds": sampled - start,
        "seconds": time.perf_counter() - sampled,
    }
    if refine:
        from pop_ext.analysis import refinement

        with progress_bar("refining") as report:
            refinement.refine(loaded, result, windows, refine, state=output, seed=seed, progress=report)
    result.save(output)
    if as_json:
        print(json.dumps(result.provenance))
        return
    table = Table("prefill depth", "layer", "error before", "after", title=f"{output}", title_justify="left")
    for depth, entry in result.provenance["depths"].items():
        for layer, before in entry["error_before"].items():
            table.add_row(str(depth), str(layer), f"{before:.4f}", f"{entry['error_after'][layer]:.4f}")
    output_console().print(table)
