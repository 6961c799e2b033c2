"""The `pop` command. torch and transformers are imported where a command needs them, so that `pop --help` is quick."""

import json
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="POP: Prefill-Only Pruning. The prompt runs through the first layers only, the answer through all of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


class DType(str, Enum):
    bfloat16 = "bfloat16"
    float32 = "float32"


@contextmanager
def one_line_errors():
    """What goes wrong in a command is one line on stderr and exit status 1; POP_TRACEBACK=1 shows where it happened."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:
        if os.environ.get("POP_TRACEBACK"):
            raise
        kind = "" if isinstance(error, (ValueError, TypeError, OSError, RuntimeError)) else f"{type(error).__name__}: "
        message = " ".join(str(error).split()) or type(error).__name__
        stderr.print(f"pop: {kind}{message}", markup=False)
        raise typer.Exit(1) from None


def parse_depth(text: str) -> float:
    """A prefill depth: "12" is 12 layers and "1" is one, "0.7" is a share of the layers and "1.0" is all of them."""
    if re.fullmatch(r"\s*[+-]?\d+\s*", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"--prefill-depth must be a number of layers (12) or a share of them (0.7), got {text!r}"
        ) from None


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give the prompt either with --prompt TEXT or with --prompt-file FILE (- is standard input)")
    if prompt is not None:
        return prompt
    data = sys.stdin.buffer.read() if prompt_file == "-" else Path(prompt_file).read_bytes()
    try:
        # An editor's newline at the end of the file is no part of the prompt.
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {prompt_file} is not UTF-8 text: {error}") from None


def sampling_settings(temperature: float | None, top_p: float | None, top_k: int | None) -> dict:
    """Settings for generate: any of the options asks for sampling, temperature 0 for greedy decoding."""
    if temperature == 0:
        return {"do_sample": False}
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in given.items() if value is not None}
    return {"do_sample": True, **given} if given else {}


def describe_times(times, prompt_tokens: int) -> str:
    vision = f"vision tower {times.vision:.3f}, " if times.vision else ""
    line = (
        f"{prompt_tokens} prompt tokens, first token after {times.time_to_first_token:.3f} s "
        f"({vision}truncated prefill {times.truncated_prefill:.3f}, projection {times.projection:.3f}, "
        f"boundary {times.boundary:.3f})"
    )
    rate = times.decode_tokens_per_second
    return line if rate is None else f"{line}; {times.decode_tokens} tokens decoded at {rate:.1f} a second"


@app.command()
@one_line_errors()
def generate(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face checkpoint, or a hub id.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[str | None, typer.Option(help="File with the prompt; - is standard input.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="An image that the prompt is about; may be given several times.")
    ] = None,
    prefill_depth: Annotated[
        str, typer.Option(help="Layers that the prompt runs through (12), or their share (0.7). 1 is one, 1.0 is all.")
    ] = "1.0",
    boundary_tokens: Annotated[int, typer.Option(help="Last prompt tokens that run through all layers.")] = 1,
    anchor_tokens: Annotated[int, typer.Option(help="First tokens that run through all layers.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens of this total share.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the tokenizer's chat template.  [default: if it has one]"),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Data type of weights and cache.")] = DType.bfloat16,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens that the cache may hold.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
) -> None:
    """Answer or continue a prompt.

    The text streams to standard output; then a line of times goes to standard error.
    """
    depth = parse_depth(prefill_depth)
    text = read_prompt(prompt, prompt_file)

    with stderr.status(f"loading {model}"):
        import torch
        import transformers

        import pop_ext

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        loaded = pop_ext.load(
            model,
            prefill_depth=depth,
            boundary_tokens=boundary_tokens,
            anchor_tokens=anchor_tokens,
            dtype=getattr(torch, dtype.value),
            max_tokens=max_tokens,
        )
    if loaded.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer: text cannot be turned into tokens")
    if chat is None:
        chat = bool(loaded.tokenizer.chat_template)

    streamer = None
    if not as_json:
        streamer = transformers.TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = loaded.generate(
        [{"role": "user", "content": text}] if chat else text,
        images=image or [],
        max_new_tokens=max_new_tokens,
        seed=seed,
        streamer=streamer,
        **sampling_settings(temperature, top_p, top_k),
    )
    if as_json:
        times = asdict(output.times) | {"decode_tokens_per_second": output.times.decode_tokens_per_second}
        result = {
            "text": output.text[0],
            "tokens": output.tokens[0],
            "prompt_tokens": output.prompt_tokens[0],
            "prefill_depth": depth,
            "times": times,
        }
        print(json.dumps(result))
    else:
        stderr.print(describe_times(output.times, output.prompt_tokens[0]), style="dim", markup=False)


@app.command()
@one_line_errors()
def convert(
    gguf: Annotated[Path, typer.Argument(help="GGUF file.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write the checkpoint to.")],
) -> None:
    """Turn a GGUF file into a checkpoint folder.

    Its weights are dequantized; the folder is an ordinary Hugging Face checkpoint.
    """
    if not gguf.is_file():
        raise ValueError(f"{gguf} is not a file: expected a GGUF file")
    with stderr.status(f"converting {gguf.name}"):
        import transformers

        from pop_ext import checkpoint

        transformers.utils.logging.disable_progress_bar()
        checkpoint.convert_gguf(gguf, folder)
    stderr.print(f"wrote {folder}", markup=False)


@app.command()
@one_line_errors()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how the native library was built."""
    import pop_ext

    build = pop_ext.build_info()
    if as_json:
        print(json.dumps(build, default=str))
        return
    table = Table(box=None, show_header=False)
    for name, value in build.items():
        table.add_row(name.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
    Console().print(table)


if __name__ == "__main__":
    app()
