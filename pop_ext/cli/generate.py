"""`pop generate`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..runtime.prefill_depth import parse_depth
from .common import (
    Anchor,
    Boundary,
    Calibration,
    DeepTokens,
    Device,
    DeviceName,
    DType,
    Paper,
    Plan,
    app,
    expect_template,
    load_model,
    one_line_errors,
    settings_of,
    stderr,
)  # fmt: skip


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give the prompt either with --prompt TEXT or with --prompt-file FILE (- is standard input)")
    if prompt == "":
        raise ValueError("--prompt is empty: a prompt has at least one token")
    if prompt is not None:
        return prompt
    from pop_ext.checkpoints.files import decoded_utf8

    path = Path(prompt_file or "-")
    if str(path) != "-" and not path.is_file():
        raise ValueError(f"--prompt-file is {prompt_file}: no such file, expected one, or - for standard input")
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    # An editor's newline at the end of the file is no part of the prompt.
    text = decoded_utf8(data, f"--prompt-file {prompt_file}").removesuffix("\n").removesuffix("\r")
    if not text:
        raise ValueError(f"--prompt-file {prompt_file} is empty: a prompt has at least one token")
    return text


def sampling_settings(temperature: float | None, top_p: float | None, top_k: int | None) -> dict:
    """Settings for generate: any of the options asks for sampling, temperature 0 for greedy decoding."""
    if temperature == 0:
        return {"do_sample": False}
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in given.items() if value is not None}
    return {"do_sample": True, **given} if given else {}


def describe_times(times, prompt_tokens: int) -> str:
    vision = f"vision tower {times.vision:.3f}, " if times.vision else ""
    selection = f"selection {times.selection:.3f}, " if times.selection else ""
    line = (
        f"{prompt_tokens} prompt tokens, first token after {times.time_to_first_token:.3f} s "
        f"({vision}truncated prefill {times.truncated_prefill:.3f}, projection {times.projection:.3f}, "
        f"{selection}boundary {times.boundary:.3f})"
    )
    rate = times.decode_tokens_per_second
    return line if rate is None else f"{line}; {times.decode_tokens} tokens decoded at {rate:.1f} a second"


@app.command()
@one_line_errors()
def generate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face checkpoint, or a hub id.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the prompt; - is standard input.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="An image that the prompt is about; may be given several times.")
    ] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="A folder of frames or an animated GIF, PNG or WebP; likewise.")
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second of the videos.  [default: an animation's own]")
    ] = None,
    prefill_depth: Annotated[
        str | None,
        typer.Option(
            help="Layers that the prompt runs through (12), or their share (0.7). 1 is one, 1.0 is all.  "
            "[default: what the calibration recommends or its only depth, else 1.0]"
        ),
    ] = None,
    boundary_tokens: Boundary = 1,
    anchor_tokens: Anchor = 1,
    deep_tokens: DeepTokens = 0.0,
    prefill_plan: Plan = None,
    paper: Paper = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature; 0 is greedy.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this total share.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Sample from this many likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the tokenizer's chat template.  [default: if it has one]"),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Data type of weights and cache.")] = DType.bfloat16,
    max_cache_tokens: Annotated[int | None, typer.Option(help="Tokens that the cache may hold.")] = None,
    calibration: Calibration = None,
    device: Device = DeviceName.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
) -> None:
    """Answer or continue a prompt.

    The text streams to standard output; then a line of times goes to standard error.
    """
    depth = None if prefill_depth is None else parse_depth(prefill_depth)
    stages = settings_of(
        ctx, paper, boundary_tokens=boundary_tokens, anchor_tokens=anchor_tokens, deep_tokens=deep_tokens,
        calibration=calibration, prefill_plan=prefill_plan,
    )  # fmt: skip
    text = read_prompt(prompt, prompt_file)
    if fps is not None and not video:
        raise ValueError("--fps is the rate of a video's frames, expected it with --video")
    for path in image or []:
        if not path.is_file():
            raise ValueError(f"--image {path}: no such file")
    if chat:
        expect_template(model)
    videos = []
    if video:
        from pop_ext.vision.images import read_video

        videos = [read_video(path, fps) for path in video]

    loaded = load_model(
        model, dtype, prefill_depth=depth, max_cache_tokens=max_cache_tokens, device=device, **stages
    )  # fmt: skip
    import transformers

    if chat is None:
        chat = bool(loaded.tokenizer.chat_template)
    streamer = None
    if not as_json:
        streamer = transformers.TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = loaded.generate(
        [{"role": "user", "content": text}] if chat else text, images=image or [], videos=videos,
        max_new_tokens=max_new_tokens, seed=seed, streamer=streamer, **sampling_settings(temperature, top_p, top_k),
    )  # fmt: skip
    if as_json:
        print(json.dumps(to_json(loaded, output)))
    else:
        line = f"{describe_depth(loaded)}; {describe_times(output.times, output.prompt_tokens[0])}"
        stderr.print(line, style="dim", markup=False)


def to_json(loaded, output) -> dict:
    times = asdict(output.times) | {"decode_tokens_per_second": output.times.decode_tokens_per_second}
    return {
        "text": output.text[0],
        "tokens": output.tokens[0],
        "prompt_tokens": output.prompt_tokens[0],
        "prefill_depth": loaded.resolve_prefill_depth(),
        "deep_tokens": loaded.deep_tokens,
        "prefill_plan": None if loaded.prefill_plan is None else str(loaded.prefill_plan),
        "times": times,
    }


def describe_depth(loaded) -> str:
    """The prefill depth in use, and whose projections: of the last layer's input they are exact."""
    depth, layers = loaded.resolve_prefill_depth(), loaded.spec.num_layers
    plan = f" by a plan ({loaded.prefill_plan})" if loaded.partial_layers() else ""
    if depth == layers:
        return f"prefill depth {depth} of {layers}{plan}"
    calibrated = loaded.calibration is not None and depth < layers - 1
    deep = f", {loaded.deep_tokens:.0%} deep tokens" if loaded.deep_tokens else ""
    return f"prefill depth {depth} of {layers}{plan}, {'calibrated' if calibrated else 'own'} projections{deep}"
