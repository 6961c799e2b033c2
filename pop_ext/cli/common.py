"""What the commands share: options, errors, progress, loading."""

import io
import os
import sys
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

app = typer.Typer(
    help="POP: Prefill-Only Pruning. The prompt runs through the first layers only, the answer through all of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # a console that cannot show a character shows a replacement
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def output_console() -> Console:
    """Standard output: as wide as the terminal, and in a pipe as wide as what is printed."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 400)


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


def load_model(model: str, dtype: DType, **settings):
    """A model with a tokenizer, for a command."""
    with stderr.status(f"loading {model}"):
        import torch
        import transformers

        import pop_ext

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        loaded = pop_ext.load(model, dtype=getattr(torch, dtype.value), **settings)
    if loaded.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer: text cannot be turned into tokens")
    return loaded


@contextmanager
def progress_bar(description: str):
    """Yields a function (done, total) that moves a bar on a terminal, and does nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(description, total=None)

        def report(done: int, total: int, note: str = "") -> None:
            progress.update(task, completed=done, total=total, description=f"{description} {note}".strip())

        yield report


def read_texts(files: list[Path] | None, samples: Path | None) -> str | None:
    """The files' text; None where there are samples in its place."""
    from pop_ext.analysis.text import read_text

    if bool(files) == bool(samples):
        raise ValueError("give either --text FILE or --samples FILE")
    if samples:
        return None
    return "\n\n".join(read_text(file) for file in files)


def encoded_samples(path: Path, model) -> tuple[list, list, list]:
    """Prompts, continuations and the prompts' images, through the vision tower."""
    from pop_ext.analysis.samples import load_samples

    prompts, continuations, media = load_samples(path, model)
    with progress_bar("vision tower") as report:
        visuals = []
        for pictures in media:
            visuals.append([visual for picture in pictures for visual in model.vision.encode(picture)])
            report(len(visuals), len(media))
    return prompts, continuations, visuals


def check_outputs(*paths: Path | None) -> None:
    """Before any work: every folder that is to be written to is there."""
    for path in filter(None, paths):
        folder = path.absolute().parent
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"{path}: expected a file name in a folder that exists and can be written to")


Model = Annotated[str, typer.Argument(help="Folder of a Hugging Face checkpoint, or a hub id.")]
Text = Annotated[list[Path] | None, typer.Option("--text", help="File of UTF-8 text; may be given several times.")]
Samples = Annotated[
    Path | None,
    typer.Option(help="In place of text: a JSON lines file of image-text samples (images, prompt, continuation)."),
]
Depths = Annotated[
    list[str], typer.Option("--prefill-depth", help="Layers (12) or their share (0.7); may be given several times.")
]
Boundary = Annotated[int, typer.Option(help="Last prompt tokens that run through all layers.")]
Anchor = Annotated[int, typer.Option(help="First tokens that run through all layers.")]
Prompts = Annotated[int, typer.Option(min=1, help="Prompts, evenly spread over the text.")]
Continuation = Annotated[int, typer.Option(min=1, help="Tokens after each prompt.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Plot = Annotated[Path | None, typer.Option(help="Also draw a plot: a .png, .svg or .pdf file.")]
