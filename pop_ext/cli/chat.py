"""`pop chat`."""

import sys
from typing import Annotated

import typer

from ..runtime.prefill_depth import parse_depth
from .common import (
    Calibration,
    Device,
    DeviceName,
    DType,
    Model,
    Paper,
    Plan,
    app,
    expect_template,
    load_model,
    one_line_errors,
    settings_of,
    stderr,
)
from .generate import describe_depth, sampling_settings


def read_line() -> str | None:
    """The next message; "" where Ctrl-C threw the line away, None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except KeyboardInterrupt:
        print()
        return ""
    except EOFError:
        return None


def describe(model, times) -> str:
    """The depth and the times of one answer."""
    line = f"{describe_depth(model)}; first token after {times.time_to_first_token:.2f} s"
    rate = times.decode_tokens_per_second
    return line if rate is None else f"{line}, then {rate:.1f} tokens a second"


@app.command()
@one_line_errors()
def chat(
    ctx: typer.Context,
    model: Model,
    prefill_depth: Annotated[
        str | None,
        typer.Option(
            help="Layers that prompts run through (12), or their share (0.7).  [default: the calibration's, else 1.0]"
        ),
    ] = None,
    calibration: Calibration = None,
    prefill_plan: Plan = None,
    paper: Paper = False,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature; 0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    dtype: Annotated[DType, typer.Option(help="Data type of weights and cache.")] = DType.bfloat16,
    device: Device = DeviceName.auto,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D ends.

    After each answer a line on standard error says how many layers the prompt ran through, and how long it took.
    """
    depth = None if prefill_depth is None else parse_depth(prefill_depth)
    stages = settings_of(ctx, paper, calibration=calibration, prefill_plan=prefill_plan)
    expect_template(model)
    loaded = load_model(model, dtype, prefill_depth=depth, **stages, device=device)
    import transformers

    if sys.stdin.isatty():
        import readline  # noqa: F401  gives input() a history and keys that edit the line

        stderr.print("Ctrl-C stops an answer, Ctrl-D ends.", style="dim")
    settings = {"max_new_tokens": max_new_tokens, "seed": seed, **sampling_settings(temperature, None, None)}
    start = [{"role": "system", "content": system}] if system else []
    conversation = loaded.new_sequence()
    while (text := read_line()) is not None:
        if not text:
            continue
        messages = [] if conversation.token_ids else start
        streamer = transformers.TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            output = loaded.generate(
                [*messages, {"role": "user", "content": text}], sequences=[conversation], keep=True, streamer=streamer,
                **settings,
            )  # fmt: skip
            stderr.print(describe(loaded, output.times), style="dim", markup=False)
        except KeyboardInterrupt:  # the conversation goes on from what of the answer is in the cache
            stderr.print("stopped", style="dim")
        except (ValueError, RuntimeError) as error:  # the conversation is full, for the most part
            stderr.print(f"pop: {error}", markup=False)
            stderr.print("A new conversation begins.", style="dim")
            conversation.close()
            conversation = loaded.new_sequence()
