"""`pop importance`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoints.files import atomic_write
from .common import (
    Anchor,
    Boundary,
    Chats,
    Continuation,
    DType,
    Json,
    Model,
    Paper,
    Plot,
    Prompts,
    Seed,
    Text,
    app,
    check_outputs,
    expected_data,
    layer_counts,
    load_encoder,
    load_model,
    one_line_errors,
    output_console,
    progress_bar,
    settings_of,
    stderr,
)


@app.command()
@one_line_errors()
def importance(
    ctx: typer.Context,
    model: Model,
    text: Text = None,
    chats: Chats = None,
    prompts: Prompts = 16,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each prompt of text.")] = 384,
    continuation_tokens: Continuation = 64,
    boundary_tokens: Boundary = 1,
    anchor_tokens: Anchor = 1,
    paper: Paper = False,
    branches: Annotated[bool, typer.Option("--branches", help="A gate for each attention and each MLP.")] = False,
    draws: Annotated[int, typer.Option(min=1, help="Draws of labels for each prompt.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    budget: Annotated[float, typer.Option(min=0, help="KL in nats a token that the suggested depth may cost.")] = 0.05,
    prefill_depth: Annotated[
        list[str] | None, typer.Option(help="Also measure the KL at this depth; may be given several times.")
    ] = None,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measure every layer's importance for prefill and for decode, and suggest a prefill depth for own weights.

    Virtual gates, on any causal language model of transformers. The suggested depth is the smallest whose measured KL
    with the layers' own weights is within the budget; calibrated projections allow fewer layers (`pop tune`).
    """
    stages = settings_of(ctx, paper, boundary_tokens=boundary_tokens, anchor_tokens=anchor_tokens)
    check_outputs(output, plot=plot)
    data = expected_data(text, chats)
    sizes = (prompts, prompt_tokens, continuation_tokens)
    encoder = load_encoder(model, any_model=True)
    depths = layer_counts(prefill_depth or [], encoder.spec)
    pairs = data.pairs(load_model(model, DType.float32) if data.has_images else encoder, *sizes)
    with stderr.status(f"loading {model}"):
        from ..analysis import importance as gates

        loaded = gates.load_transformers(model)
    with progress_bar("importance:") as report:
        result, summary = gates.summarise(
            loaded, pairs.windows, [len(prompt) for prompt in pairs.prompts], images=transformers_images(loaded, pairs),
            boundary_tokens=stages["boundary_tokens"], anchor_tokens=stages["anchor_tokens"], branches=branches,
            draws=draws,
            batch_size=batch_size, budget=budget, depths=depths, seed=seed, progress=report,
        )  # fmt: skip
    summary = {"model": str(model), "seed": seed, **summary}
    if plot:
        gates.plot(result, plot, Path(model).name, summary["suggested_depth"])
    if output:
        atomic_write(output, lambda temporary: Path(temporary).write_text(json.dumps(summary, indent=1) + "\n"))
    if as_json:
        print(json.dumps(summary))
    else:
        show(summary, Path(model).name, encoder.spec.num_layers)


def transformers_images(loaded, pairs) -> list[dict] | None:
    if not any(pairs.media or []):
        return None
    from ..vision.encoder import transformers_inputs

    return [transformers_inputs(loaded.config, *pair) for pair in zip(pairs.windows, pairs.media, strict=True)]


def show(summary: dict, name: str, layers: int) -> None:
    from .tables import plain_table, print_sentences

    stages = list(dict.fromkeys((r["stage"], r.get("branch")) for r in summary["importance"]))
    rows = {(r["layer"], r["stage"], r.get("branch")): r for r in summary["importance"]}
    console = output_console()
    title = f"{name}: nats per continuation of {summary['continuation_tokens']:g} tokens, ± standard error"
    table = plain_table(console, title, "layer", *(f"{stage} {branch or ''}".strip() for stage, branch in stages))
    for layer in range(layers):
        cells = [rows[(layer, *column)] for column in stages]
        table.add_row(str(layer), *(f"{c['importance']:.4f} ± {c['standard_error'] or 0:.4f}" for c in cells))
    console.print(table)
    table = plain_table(console, "", "prefill depth", "KL, nats a token", "gate sum, nats a token")
    for row in summary["depths"]:
        table.add_row(str(row["prefill_depth"]), f"{row['kl']:.4f}", f"{row['gate_sum_per_token']:.4f}")
    console.print(table)
    print_sentences(
        "",
        f"Within {summary['budget']:g} nats a token: prefill depth {summary['suggested_depth']} of {layers}, with the "
        "layers' own weights. Calibrated projections allow fewer layers: see `pop tune`.",
    )
