"""`pop bench`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..runtime.prefill_depth import parse_depth, resolve_depth
from .common import (
    Depths,
    Device,
    DeviceName,
    DType,
    Json,
    Model,
    Paper,
    app,
    load_encoder,
    load_model,
    one_line_errors,
    output_console,
    progress_bar,
    settings_of,
)


@app.command()
@one_line_errors()
def bench(
    ctx: typer.Context,
    model: Model,
    prompt_tokens: Annotated[
        list[int], typer.Option(min=1, help="Tokens of each prompt; may be given several times.")
    ] = [128, 512],  # noqa: B006
    prefill_depth: Depths = ["1.0", "0.67"],  # noqa: B006
    decode_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode after each prompt.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each, in turn.")] = 5,
    paper: Paper = False,
    dtype: Annotated[DType, typer.Option(help="Data type of weights and cache.")] = DType.bfloat16,
    device: Device = DeviceName.auto,
    as_json: Json = False,
) -> None:
    """Measure prefill and decode in tokens a second on this machine.

    Random prompts, one at a time. Each figure is the mean of the rounds and their standard deviation; the gain is over
    the first depth given, in the same rounds. Prefill includes the logits of the last token.
    """
    parsed = [parse_depth(depth) for depth in prefill_depth]
    spec = load_encoder(model).spec
    layers, longest = spec.num_layers, max(prompt_tokens) + decode_tokens
    depths = list(dict.fromkeys(resolve_depth(depth, layers) for depth in parsed))
    if longest > spec.max_position_embeddings:
        raise ValueError(
            f"prompt_tokens and decode_tokens make {longest}, expected at most the model's "
            f"{spec.max_position_embeddings}"
        )
    loaded = load_model(model, dtype, max_cache_tokens=longest, device=device, **settings_of(ctx, paper))
    from ..analysis import speed

    machine = speed.processor_name(loaded)
    with progress_bar("measuring") as report:
        results = speed.measure_speed(
            loaded, prompt_tokens, depths, decode_tokens=decode_tokens, rounds=rounds, progress=report
        )
    if as_json:
        about = {"machine": machine, "dtype": dtype.value, "layers": layers, "decode_tokens": decode_tokens}
        print(json.dumps({"model": model, **about, "results": [to_json(row) for row in results]}))
    else:
        show(results, f"{Path(model).name}, {dtype.value}, {machine}", layers)


def to_json(row) -> dict:
    return {
        "prompt_tokens": row.prompt_tokens,
        "prefill_depth": row.prefill_depth,
        "prefill_tokens_per_second": row.prefill,
        "decode_tokens_per_second": row.decode,
    }


def show(results, title: str, layers: int) -> None:
    from ..analysis import speed

    table = Table("prompt", "layers", "prefill, tokens/s", "gain", "decode, tokens/s", box=None)
    for row in results:
        first = next(other for other in results if other.prompt_tokens == row.prompt_tokens)
        ratios = [a / b for a, b in zip(row.prefill, first.prefill, strict=True)]
        gain = "" if row is first else "{:.2f} ± {:.2f}".format(*speed.spread(ratios))
        rates = ["{:.1f} ± {:.1f}".format(*speed.spread(rates)) for rates in (row.prefill, row.decode)]
        table.add_row(str(row.prompt_tokens), f"{row.prefill_depth} of {layers}", rates[0], gain, rates[1])
    console = output_console()
    console.print(title, markup=False)
    console.print(table)
