"""What the commands share: options, errors, progress, loading."""

import functools
import inspect
import io
import os
import re
import sys
import warnings
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..runtime.prefill_depth import parse_depth

app = typer.Typer(
    help="POP: Prefill-Only Pruning. The prompt runs through the first layers only, the answer through all of them. "
    "POP_TRACEBACK=1 shows where an error happened.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # a console that cannot show a character shows a replacement
stderr = Console(stderr=True, highlight=False, soft_wrap=True)
PAPER: dict[str, Any] = {
    "boundary_tokens": 1,
    "anchor_tokens": 0,
    "deep_tokens": 0.0,
    "calibration": None,
    "prefill_plan": None,
}
PLOTS = (".png", ".svg", ".pdf")


def show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"pop {version('pop-ext')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def output_console() -> Console:
    """Standard output: as wide as the terminal, and in a pipe as wide as what is printed."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 400)


class DType(str, Enum):
    bfloat16 = "bfloat16"
    float32 = "float32"


class DeviceName(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def one_line_errors(status: int = 1):
    """A command's decorator: what goes wrong is one line on stderr and an exit status, and POP_TRACEBACK=1 shows where
    it happened; warnings are a line, too. Messages have options as they are typed.
    """

    def decorate(command):
        names = [name for name in inspect.signature(command).parameters if name != "as_json"]

        @functools.wraps(command)
        def run(*arguments, **options):
            with warnings.catch_warnings(), _errors_in_lines(names, status):
                return command(*arguments, **options)

        return run

    return decorate


@contextmanager
def _errors_in_lines(names: list[str], status: int):
    def show_warning(message, category, *_, **__) -> None:
        if issubclass(category, UserWarning):
            stderr.print(f"pop: {with_options(one_line(message), names)}", markup=False)

    warnings.showwarning = show_warning
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
        stderr.print(f"pop: {kind}{with_options(one_line(error), names)}", markup=False)
        raise typer.Exit(status) from None


def one_line(message: object) -> str:
    return " ".join(str(message).split()) or type(message).__name__


def with_options(message: str, names: list[str]) -> str:
    """A message with options as they are typed, in place of the names that they have in Python."""
    for name in names:
        option = f"--{name.replace('_', '-')}"
        # a word that can only be the argument, and is no part of a path; or what the message is about
        pattern = (
            rf"(?<![\w./-]){name}(?![\w/]|\.\w)" if "_" in name else rf"(?:^|(?<= and )){name}(?= (?:is|has|are|and) )"
        )
        message = re.sub(pattern, option, message)
    return message


def quiet_transformers() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_model(model: str, dtype: DType, *, device: DeviceName = DeviceName.auto, **settings):
    """A model with a tokenizer, for a command."""
    with stderr.status(f"loading {model}"):
        import torch

        import pop_ext

        quiet_transformers()
        loaded = pop_ext.load(model, dtype=getattr(torch, dtype.value), device=device.value, **settings)
    if loaded.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer: text cannot be turned into tokens")
    return loaded


def settings_of(ctx: typer.Context, paper: bool, **given) -> dict:
    """Settings of `pop_ext.load` from options of their names; with --paper the paper's. ValueError for an option that
    was typed and says otherwise.
    """
    if not paper:
        return given
    for name, value in given.items():
        source, wanted = ctx.get_parameter_source(name), PAPER[name]
        if source is not None and source.name == "COMMANDLINE" and value not in (wanted, [wanted]):
            raise ValueError(
                f"{name} is {value}, expected {'none' if wanted is None else wanted} with --paper: own weights, one "
                "boundary token, no anchor"
            )
    return PAPER


def load_encoder(model: str, any_model: bool = False):
    """The model's tokenizer and spec: what says, before any weights are loaded, whether depths and data will do."""
    with stderr.status(f"reading {model}"):
        from ..analysis.data import Encoder

        quiet_transformers()
        return Encoder(model, any_model)


def expect_template(model: str) -> None:
    """ValueError, before any weights are loaded, for a model that has no way to tell a chat. A tokenizer, which takes
    seconds where the vocabulary is large, is only loaded where the usual files have no template.
    """
    from ..checkpoints.files import resolve_folder

    folder = resolve_folder(model)
    config = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file() or (config.is_file() and b'"chat_template"' in config.read_bytes()):
        return
    tokenizer: Any = load_encoder(model).tokenizer
    if not tokenizer.chat_template:
        raise ValueError(f"{model} has no chat template: use `pop generate` with --no-chat")


def layer_counts(depths: list[str], spec) -> list[int]:
    """Depths as they were typed, in layers of a model that is truncated. ValueError for one out of range."""
    from ..runtime.loading import warn_of_one_layer
    from ..runtime.prefill_depth import layers_of

    for depth in depths:
        warn_of_one_layer(parse_depth(depth), spec.num_layers)
    return sorted({layers_of(depth, spec.num_layers) for depth in depths})


@contextmanager
def progress_bar(description: str):
    """Yields a function (done, total) that moves a bar on a terminal, and does nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(description, total=None)

        def report(done: int, total: int, note: str = "") -> None:
            said = f"{description} {note}".strip()
            new = said != progress.tasks[0].description  # shown at once, however soon the next one follows
            progress.update(task, completed=done, total=total, description=said, refresh=new)

        yield report


def read_data(text: list[Path] | None, chats: list[Path] | None):
    """The files' data; None where neither is given."""
    from ..analysis.data import Data

    if text and chats:
        raise ValueError("--text and --chats are given, expected one of them")
    return Data.read(text, chats) if text or chats else None


def expected_data(text: list[Path] | None, chats: list[Path] | None) -> Any:
    if not text and not chats:
        raise ValueError("give either --text FILE or --chats FILE")
    return read_data(text, chats)


def encode_images(loaded, *data) -> None:
    """Runs images through the vision tower."""
    for pairs in data:
        with progress_bar("vision tower") as report:
            pairs.encode_images(loaded, report)


def check_outputs(*paths: Path | None, plot: Path | None = None) -> None:
    """Before any work: every folder that is to be written to is there, and a plot can be drawn."""
    for path in filter(None, (*paths, plot)):
        folder = path.absolute().parent
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"{path}: expected a file name in a folder that exists and can be written to")
    if plot is not None and plot.suffix not in PLOTS:
        raise ValueError(f"--plot {plot}: no format for plots, expected a name that ends in .png, .svg or .pdf")
    if plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")


CHATS = (
    "Chats and other samples, JSON lines: {messages}, or {prompt, continuation}, with {images} for a vision-language "
    "model. They go through the model's chat template: a chat model knows its marks, and prompts without them are "
    "other prompts. May be given several times."
)
DEEP_TOKENS = (
    "Share of the prompt's truncated tokens that run through all layers after all (0 to 1): the most attended to."
)
FILE: Any = {"exists": True, "dir_okay": False, "readable": True}
Model = Annotated[str, typer.Argument(help="Folder of a Hugging Face checkpoint, or a hub id.")]
Text = Annotated[
    list[Path] | None, typer.Option("--text", help="File of UTF-8 text; may be given several times.", **FILE)
]
Chats = Annotated[list[Path] | None, typer.Option("--chats", "--samples", help=CHATS, **FILE)]
Calibration = Annotated[Path | None, typer.Option(help="File of `pop tune` or `pop calibrate`.", **FILE)]
Plan = Annotated[
    Path | None,
    typer.Option(help="File of `pop plan`: attentions and MLPs that prompts run through, not one depth.", **FILE),
]
Depths = Annotated[
    list[str], typer.Option("--prefill-depth", help="Layers (12) or their share (0.7); may be given several times.")
]
Boundary = Annotated[int, typer.Option(help="Last prompt tokens that run through all layers; 0: none.")]
Anchor = Annotated[int, typer.Option(help="First tokens that run through all layers.")]
Paper = Annotated[
    bool, typer.Option("--paper", help="POP as the paper has it: own weights, one boundary token, no anchor.")
]
DeepTokens = Annotated[float, typer.Option(min=0, max=1, help=DEEP_TOKENS)]
Prompts = Annotated[int, typer.Option(min=1, help="Prompts, evenly spread over the data.")]
Continuation = Annotated[int, typer.Option(min=1, help="Tokens after each prompt; of chats at most.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of the data to calibrate on at most.")]
Rank = Annotated[
    int | None, typer.Option(min=0, help="Features of the token before; 0: none, and no cost.", show_default="64")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[DeviceName, typer.Option(help="Where to run; auto: a GPU where there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Plot = Annotated[Path | None, typer.Option(help="Also draw a plot: a .png, .svg or .pdf file.")]
