"""`pop importance`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..checkpoints.files import atomic_write
from ..runtime.prefill_depth import layers_of
from .common import (
    Anchor,
    Boundary,
    Continuation,
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
    load_model,
    one_line_errors,
    output_console,
    progress_bar,
    read_texts,
    stderr,
)


@app.command()
@one_line_errors()
def importance(
    model: Model,
    text: Text = None,
    samples: Samples = None,
    prompts: Prompts = 16,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each prompt.")] = 384,
    continuation_tokens: Continuation = 64,
    boundary_tokens: Boundary = 1,
    anchor_tokens: Anchor = 1,
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
    """Measure every layer's importance for prefill and for decode, and suggest a prefill depth.

    Virtual gates, on any causal language model of transformers. The suggested depth is the smallest whose measured KL
    (own weights) is within the budget.
    """
    check_outputs(output, plot)
    source = read_texts(text, samples)
    with stderr.status(f"loading {model}"):
        import transformers

        from pop_ext.analysis import importance as gates
        from pop_ext.analysis import text as texts
        from pop_ext.checkpoints.files import resolve_folder
        from pop_ext.checkpoints.tokenizer import load_tokenizer

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        loaded = gates.load_transformers(model)
        tokenizer = load_tokenizer(resolve_folder(model))
    layers = len(gates.decoder_layers(loaded))
    asked_depths = [layers_of(depth, layers) for depth in prefill_depth or []]
    images, counts = None, prompt_tokens
    if samples:
        from pop_ext.analysis.samples import load_samples
        from pop_ext.vision.encoder import transformers_inputs

        asked, answers, media = load_samples(samples, load_model(model, DType.float32))
        windows, counts = [a + b for a, b in zip(asked, answers, strict=True)], [len(a) for a in asked]
        images = [transformers_inputs(loaded.config, *pair) for pair in zip(windows, media, strict=True)]
        prompt_tokens = sum(counts) / len(counts)
        continuation_tokens = sum(map(len, answers)) / len(answers)
    else:
        windows = texts.windows(tokenizer, source, prompt_tokens + continuation_tokens, prompts)
    stage = {"boundary_tokens": boundary_tokens, "anchor_tokens": anchor_tokens}
    with progress_bar("importance") as report:
        result = gates.measure(
            loaded, windows, counts, images=images, **stage, branches=branches, draws=draws, batch_size=batch_size,
            seed=seed, progress=report,
        )  # fmt: skip
    with progress_bar("depth") as report:
        visited, full = [], {}

        def kl_at(depth: int) -> float:
            report(len(visited), layers.bit_length() + 2, f"{depth}")
            visited.append(depth)
            return gates.truncation_kl(loaded, windows, counts, depth, **stage, images=images, full=full)

        depth, measured = gates.suggest_depth(layers, budget, kl_at)
        measured |= {p: kl_at(p) for p in asked_depths if p not in measured}
    sums = gates.gate_sums(result)
    summary = {
        "model": str(model),
        "prompts": len(windows),
        "prompt_tokens": prompt_tokens,
        "continuation_tokens": continuation_tokens,
        "draws": draws,
        "seed": seed,
        "importance": gates.to_json(result),
        "budget": budget,
        "suggested_depth": depth,
        "depths": [
            {"prefill_depth": p, "kl": kl, "gate_sum_per_token": sums[p] / continuation_tokens}
            for p, kl in sorted(measured.items())
        ],
    }
    if plot:
        gates.plot(result, plot, Path(model).name)
    if output:
        atomic_write(output, lambda temporary: Path(temporary).write_text(json.dumps(summary, indent=1) + "\n"))
    if as_json:
        print(json.dumps(summary))
        return
    table = Table(
        title=f"{Path(model).name}: nats per continuation of {continuation_tokens:g} tokens", title_justify="left"
    )
    table.add_column("layer", justify="right")
    columns = [(stage, branch) for stage in gates.STAGES for branch in (gates.BRANCHES if branches else (None,))]
    for stage_name, branch in columns:
        table.add_column(f"{stage_name} {branch or ''}".strip(), justify="right")
    rows = {(r["layer"], r["stage"], r.get("branch")): r for r in summary["importance"]}
    for layer in range(layers):
        cells = [rows[(layer, *column)] for column in columns]
        table.add_row(str(layer), *(f"{c['importance']:.4f} ± {c['standard_error'] or 0:.4f}" for c in cells))
    output_console().print(table)
    table = Table("prefill depth", "KL, nats a token", "gate sum, nats a token")
    for row in summary["depths"]:
        table.add_row(str(row["prefill_depth"]), f"{row['kl']:.4f}", f"{row['gate_sum_per_token']:.4f}")
    output_console().print(table)
    output_console().print(f"Within {budget} nats a token: prefill depth {depth} of {layers}.")
