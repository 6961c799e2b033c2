"""`pop evaluate`."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    DEEP_TOKENS,
    Anchor,
    Boundary,
    Calibration,
    Chats,
    Continuation,
    Device,
    DeviceName,
    DType,
    Json,
    Model,
    Paper,
    Plan,
    Plot,
    Prompts,
    Seed,
    Text,
    app,
    check_outputs,
    encode_images,
    expected_data,
    layer_counts,
    load_encoder,
    load_model,
    one_line_errors,
    progress_bar,
    settings_of,
)


class SyntheticTask(str, Enum):
    retrieval = "retrieval"
    copying = "copying"


class Method(str, Enum):
    full = "full"
    pop_uncalibrated = "pop_uncalibrated"
    pop_calibrated = "pop_calibrated"
    last_layers_removed = "last_layers_removed"
    shortgpt = "shortgpt"
    gromov = "gromov"
    speed = "speed"


@app.command()
@one_line_errors()
def evaluate(
    ctx: typer.Context,
    model: Model,
    text: Text = None,
    chats: Chats = None,
    prefill_depth: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers (12) or their share (0.7); may be given several times.  "
            "[default: all that the calibration holds, else 0.67]"
        ),
    ] = None,
    calibration: Calibration = None,
    prefill_plan: Plan = None,
    prompts: Prompts = 32,
    prompt_tokens: Annotated[
        list[int], typer.Option(min=2, help="Tokens of each prompt of text; may be given several times.")
    ] = [384],  # noqa: B006
    continuation_tokens: Continuation = 64,
    synthetic_task: Annotated[
        SyntheticTask | None, typer.Option(help="Plant something in the prompts that the continuations ask for.")
    ] = None,
    method: Annotated[
        list[Method] | None,
        typer.Option(help="Only this method; may be given several times.  [default: own weights and calibrated]"),
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also layers removed from both stages, and SPEED without its training.")
    ] = False,
    boundary_tokens: Boundary = 1,
    anchor_tokens: Anchor = 1,
    deep_tokens: Annotated[
        list[float], typer.Option(min=0, max=1, help=f"{DEEP_TOKENS} May be given several times.")
    ] = [0.0],  # noqa: B006
    paper: Paper = False,
    seed: Seed = 0,
    dtype: Annotated[DType, typer.Option(help="Data type of weights and cache.")] = DType.bfloat16,
    device: Device = DeviceName.auto,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Compare next-token distributions after truncated prompts with the full model's, and prefill times.

    Own weights and, with --calibration, calibrated projections. --baselines adds the last layers removed from both
    stages, ShortGPT's and Gromov's choice of layers removed from both, and SPEED without its training.
    """
    stages = settings_of(
        ctx, paper, boundary_tokens=boundary_tokens, anchor_tokens=anchor_tokens, calibration=calibration,
        deep_tokens=deep_tokens, prefill_plan=prefill_plan,
    )  # fmt: skip
    check_outputs(plot=plot)
    data = expected_data(text, chats)
    methods = methods_of(method, baselines, calibration)
    if chats and synthetic_task:
        raise ValueError("--synthetic-task plants in text, expected it without --chats")
    encoder = load_encoder(model)
    depths = depths_of(prefill_depth, calibration, encoder.spec) if prefill_depth or not prefill_plan else []
    plan = None if prefill_plan is None else read_plan(prefill_plan, model, encoder.spec)
    sizes = [0] if chats else prompt_tokens
    cut = cutter(data, prompts, continuation_tokens, synthetic_task, seed)
    parts = None if data.has_images else [cut(encoder, size) for size in sizes]
    loaded = load_model(
        model, dtype, prefill_depth=1.0, device=device, **(stages | {"deep_tokens": 0.0, "prefill_plan": None})
    )
    from ..analysis import evaluation, workflows

    loaded.prefill_plan = plan
    rows, results = [], []
    for pairs in parts or [cut(loaded, size) for size in sizes]:
        encode_images(loaded, pairs)
        length = pairs.prompt_tokens
        title = f"{Path(model).name}, {f'{synthetic_task.value}, ' if synthetic_task else ''}{length} prompt tokens"
        with progress_bar(f"evaluating, {length} prompt tokens") as report:
            results = workflows.evaluate_on(
                loaded, pairs, depths, methods, deep_tokens=deep_tokens, seed=seed, progress=report
            )
        rows += [{**row, "prompt_tokens": length} for row in evaluation.to_json(results)]
        if not as_json:
            show(results, f"{title}, {len(pairs)} prompts", bool(synthetic_task))
    if plot:
        evaluation.plot(results, plot, title)
    if as_json:
        print(json.dumps(rows))


def methods_of(method: list[Method] | None, baselines: bool, calibration: Path | None) -> list[str]:
    if calibration is None and Method.pop_calibrated in (method or []):
        raise ValueError("--method pop_calibrated needs a calibration, expected --calibration FILE with it")
    if baselines:
        return [name.value for name in Method]
    return [name.value for name in method or (Method.pop_uncalibrated, Method.pop_calibrated)]


def read_plan(path: Path, model: str, spec):
    """A plan to compare with depths: a calibration in the same run need not be for its depth."""
    from ..checkpoints.files import resolve_folder
    from ..checkpoints.prefill_plan import PrefillPlan

    plan = PrefillPlan.load(path, spec)
    plan.check(resolve_folder(model))
    return plan


def depths_of(prefill_depth: list[str] | None, calibration: Path | None, spec) -> list[int]:
    from ..checkpoints.calibration import calibrated_depths

    held = None if calibration is None else calibrated_depths(calibration)
    if not prefill_depth:
        return held or layer_counts(["0.67"], spec)
    depths = layer_counts(prefill_depth, spec)
    for depth in depths:
        if held is not None and depth < spec.num_layers - 1 and depth not in held:
            listed = ", ".join(map(str, held))
            raise ValueError(f"--prefill-depth is {depth} layers, but the calibration was made for {listed}")
    return depths


def cutter(data, prompts: int, continuation_tokens: int, synthetic_task: SyntheticTask | None, seed: int):
    """A function from encoder and prompt tokens to what is measured on."""
    from ..analysis import tasks
    from ..analysis.samples import Pairs

    def cut(encoder, size: int) -> Pairs:
        if synthetic_task is None:
            return data.pairs(encoder, prompts, size, continuation_tokens)
        filler = data.pairs(encoder, prompts, size, 0).prompts
        return Pairs(*tasks.synthetic_task(synthetic_task.value, filler, encoder.tokenizer, seed))

    return cut


def show(results, title: str, exact: bool) -> None:
    from .tables import INTERVAL, KL, SPEEDUP, TOP1, print_evaluation, print_legend

    print_evaluation(results, title, exact)
    measure = "exact: prompts whose whole continuation is the likeliest." if exact else "ppl: perplexity of the text."
    print_legend("", KL, TOP1, measure, SPEEDUP, INTERVAL)
