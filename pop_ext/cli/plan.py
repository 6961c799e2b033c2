"""`pop plan`."""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    Calibration,
    Chats,
    Continuation,
    Device,
    DeviceName,
    DType,
    Json,
    Model,
    Seed,
    Text,
    app,
    check_outputs,
    expected_data,
    layer_counts,
    load_encoder,
    load_model,
    one_line_errors,
    progress_bar,
    stderr,
)

MORE_HELD_OUT = 3  # prompts held out for each that is searched on


@app.command()
@one_line_errors()
def plan(
    model: Model,
    output: Annotated[Path, typer.Option(help="The plan file to write.")],
    text: Text = None,
    chats: Chats = None,
    budget: Annotated[
        float | None, typer.Option(help="Share of the full model's multiplications for a prompt that may be spent.")
    ] = None,
    prefill_depth: Annotated[
        str | None, typer.Option(help="Instead: as many as with this prefill depth, in layers (12) or their share.")
    ] = None,
    calibration: Calibration = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to search on; three times as many are held out.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each prompt of text.")] = 384,
    continuation_tokens: Continuation = 64,
    shortlist: Annotated[int, typer.Option(min=1, help="Attentions and MLPs that are tried at a time.")] = 6,
    draws: Annotated[int, typer.Option(min=1, help="Draws of labels for each prompt, for the importance.")] = 4,
    seed: Seed = 0,
    dtype: Annotated[DType, typer.Option(help="Data type of weights and cache.")] = DType.bfloat16,
    device: Device = DeviceName.auto,
    as_json: Json = False,
) -> None:
    """Search which attentions and MLPs prompts need, for a plan that takes the place of one prefill depth.

    Closes one branch of a layer after the other, the least important first, within a budget of multiplications, and
    compares the result with the prefill depth of equal cost on text that was held out. The file goes to
    `--prefill-plan` of the other commands.
    """
    check_outputs(output)
    if (budget is None) == (prefill_depth is None):
        raise ValueError("budget and prefill_depth: expected one of them")
    data = expected_data(text, chats)
    from ..analysis import importance, plans

    encoder = load_encoder(model)
    if encoder.spec.vision_type is not None:
        raise ValueError(f"plans are for models of text, {model} has a vision tower")
    depth = None if prefill_depth is None else layer_counts([prefill_depth], encoder.spec)[0]
    sizes = (
        (prompts, prompt_tokens, continuation_tokens),
        (MORE_HELD_OUT * prompts, prompt_tokens, continuation_tokens),
    )
    search, held_out = (part.pairs(encoder, *size) for part, size in zip(plans.split(data), sizes, strict=True))
    plans.budget_of(encoder.spec, search.prompt_tokens, budget, depth)
    loaded = load_model(model, dtype, prefill_depth=1.0, calibration=calibration, device=device)
    with stderr.status(f"loading {model}"):
        peer = importance.load_transformers(model)
    lengths = [len(prompt) for prompt in search.prompts]
    with progress_bar("importance:") as report:
        gates = importance.measure(
            peer, search.windows, lengths, branches=True, draws=draws, seed=seed, progress=report
        ).values[:, 0]
    del peer
    with progress_bar("searching:") as report:
        found = plans.find(
            loaded, gates, search, held_out, budget=budget, prefill_depth=depth, shortlist=shortlist, seed=seed,
            progress=report,
        )  # fmt: skip
    found.plan.save(output)
    if as_json:
        print(json.dumps(found.plan.to_json()))
    else:
        show(found, model, output)


def show(found, model: str, output: Path) -> None:
    from .common import output_console
    from .tables import KL, TOP1, kl_text, plain_table, print_command, print_legend, print_sentences, top1_text

    console = output_console()
    title = f"{Path(model).name}: {found.prompts} held-out prompts of {found.prompt_tokens} tokens"
    table = plain_table(console, title, "", "multiplications", "KL", "top-1")
    depth = found.suffix_depth
    names = ("full model", f"plan, {found.plan.depth} layers", f"prefill depth {depth}")
    for name, row, share in zip(names, found.rows, found.shares, strict=True):
        table.add_row(name, f"{share:.1%}", kl_text(row), top1_text(row))
    console.print(table)
    print_legend("", KL, TOP1, "")
    print_sentences(*found.sentences(), "", f"{output} holds the plan. To use it:")
    print_command(f"pop generate {shlex.quote(model)} --prefill-plan {shlex.quote(str(output))} --prompt 'Hello'")
