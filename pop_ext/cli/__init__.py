"""The `pop` command. torch and transformers are imported where a command needs them, so that `pop --help` is quick."""

import json
import os
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(
    help="POP: Prefill-Only Pruning. The prompt runs through the first layers only, the answer through all of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


class SyntheticTask(str, Enum):
    retrieval = "retrieval"
    copying = "copying"


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


def layers_of(text: str, layers: int) -> int:
    """A prefill depth in layers, of a model of `layers` whose prompts it truncates."""
    depth = parse_depth(text)
    if isinstance(depth, float) and 0 < depth <= 1:
        depth = max(1, int(depth * layers + 0.5))
    if depth not in range(1, layers):
        raise ValueError(f"prefill_depth is {text}, expected 1 to {layers - 1} layers, or their share")
    return depth


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
    video: Annotated[
        list[Path] | None, typer.Option(help="A folder of frames or an animated GIF, PNG or WebP; likewise.")
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second of the videos.  [default: an animation's own]")
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
    max_cache_tokens: Annotated[int | None, typer.Option(help="Tokens that the cache may hold.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="File of `pop calibrate` with this depth.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
) -> None:
    """Answer or continue a prompt.

    The text streams to standard output; then a line of times goes to standard error.
    """
    depth = parse_depth(prefill_depth)
    text = read_prompt(prompt, prompt_file)
    if fps is not None and not video:
        raise ValueError("--fps is the rate of a video's frames, expected it with --video")
    videos = []
    if video:
        from pop_ext.vision.encoder import read_video

        videos = [read_video(path, fps) for path in video]

    loaded = load_model(
        model,
        dtype,
        prefill_depth=depth,
        boundary_tokens=boundary_tokens,
        anchor_tokens=anchor_tokens,
        max_cache_tokens=max_cache_tokens,
        calibration=calibration,
    )
    import transformers

    if chat is None:
        chat = bool(loaded.tokenizer.chat_template)

    streamer = None
    if not as_json:
        streamer = transformers.TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = loaded.generate(
        [{"role": "user", "content": text}] if chat else text,
        images=image or [],
        videos=videos,
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
    from pop_ext.vision import encoder as vision

    prompts, continuations, media = vision.load_samples(path, model)
    with progress_bar("vision tower") as report:
        visuals = []
        for pictures in media:
            visuals.append([visual for picture in pictures for visual in model.vision.encode(picture)])
            report(len(visuals), len(media))
    return prompts, continuations, visuals


def check_outputs(*paths: Path | None) -> None:
    """Before any work: every folder that is to be written to is there."""
    for path in filter(None, paths):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: expected a file name in a folder that exists")


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

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        loaded = gates.load_transformers(model)
        tokenizer = texts.load_tokenizer(model)
    layers = len(gates.decoder_layers(loaded))
    asked_depths = [layers_of(depth, layers) for depth in prefill_depth or []]
    images, counts = None, prompt_tokens
    if samples:
        from pop_ext.vision import encoder as vision

        asked, answers, media = vision.load_samples(samples, load_model(model, DType.float32))
        windows, counts = [a + b for a, b in zip(asked, answers, strict=True)], [len(a) for a in asked]
        images = [vision.transformers_inputs(loaded.config, *pair) for pair in zip(windows, media, strict=True)]
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
        texts.atomic_write(output, lambda temporary: Path(temporary).write_text(json.dumps(summary, indent=1) + "\n"))
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
    Console().print(table)
    table = Table("prefill depth", "KL, nats a token", "gate sum, nats a token")
    for row in summary["depths"]:
        table.add_row(str(row["prefill_depth"]), f"{row['kl']:.4f}", f"{row['gate_sum_per_token']:.4f}")
    Console().print(table)
    Console().print(f"Within {budget} nats a token: prefill depth {depth} of {layers}.", highlight=False)


@app.command()
@one_line_errors()
def calibrate(
    model: Model,
    prefill_depth: Depths,
    output: Annotated[Path, typer.Option(help="The calibration file to write.")],
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="File of UTF-8 text; by default text that needs no file.")
    ] = None,
    samples: Samples = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to use at most.")] = 50_000,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Features of the token before; 0: none, and no cost.", show_default="64")
    ] = None,
    refine: Annotated[int, typer.Option(min=0, help="Gradient steps that follow the closed form.")] = 0,
    boundary_tokens: Boundary = 1,
    anchor_tokens: Anchor = 1,
    seed: Seed = 0,
    dtype: Annotated[DType, typer.Option(help="Data type of the model.")] = DType.bfloat16,
    as_json: Json = False,
) -> None:
    """Fit the projections of the skipped layers to what the full model computes, for one or several prefill depths.

    The file goes to `--calibration` of the other commands, and to `pop_ext.load`.
    """
    check_outputs(output)
    depths = [parse_depth(depth) for depth in prefill_depth]
    source = read_texts(text, samples) if text or samples else None
    if samples and refine:
        raise ValueError("--refine works on text, expected it without --samples")
    room = None if text or samples else 32_768  # of the cache: for many samples at a time
    loaded = load_model(
        model, dtype, boundary_tokens=boundary_tokens, anchor_tokens=anchor_tokens, max_cache_tokens=room
    )
    from pop_ext.analysis import calibration as calibrations
    from pop_ext.analysis import text as texts

    depths = [loaded.resolve_prefill_depth(depth) for depth in depths]
    if refine and loaded.vision is not None:
        raise ValueError(f"--refine takes models of text alone, {model} has a vision tower")
    start = time.perf_counter()
    if source is None and not samples:
        with progress_bar("sampling text") as report:
            source = texts.default_text(loaded, tokens, seed, report)
    sampled = time.perf_counter()
    length = min(calibrations.WINDOW, loaded.spec.max_position_embeddings)
    visuals = None
    if samples:
        prompts, continuations, visuals = encoded_samples(samples, loaded)
        windows = [prompt + continuation for prompt, continuation in zip(prompts, continuations, strict=True)]
    else:
        windows = texts.windows(loaded.tokenizer, source, length)[: max(2, tokens // length)]
    with progress_bar("calibrating") as report:
        result = calibrations.calibrate(loaded, windows, depths, rank=rank, visuals=visuals, progress=report)
    result.provenance |= {
        "text": [file.name for file in text or [samples]] if text or samples else ["default"],
        "boundary_tokens": boundary_tokens,
        "anchor_tokens": anchor_tokens,
        "sampling_seconds": sampled - start,
        "seconds": time.perf_counter() - sampled,
    }
    if refine:
        from pop_ext.analysis import refinement

        with progress_bar("refining") as report:
            refinement.refine(loaded, result, windows, refine, state=output, seed=seed, progress=report)
    result.save(output)
    if as_json:
        print(json.dumps(result.provenance))
        return
    table = Table("prefill depth", "layer", "error before", "after", title=f"{output}", title_justify="left")
    for depth, entry in result.provenance["depths"].items():
        for layer, before in entry["error_before"].items():
            table.add_row(depth, layer, f"{before:.4f}", f"{entry['error_after'][layer]:.4f}")
    Console().print(table)


@app.command()
@one_line_errors()
def evaluate(
    model: Model,
    text: Text = None,
    samples: Samples = None,
    prefill_depth: Depths = ["0.67"],  # noqa: B006
    calibration: Annotated[Path | None, typer.Option(help="File of `pop calibrate`.")] = None,
    prompts: Prompts = 32,
    prompt_tokens: Annotated[
        list[int], typer.Option(min=2, help="Tokens of each prompt; may be given several times.")
    ] = [384],  # noqa: B006
    continuation_tokens: Continuation = 64,
    synthetic_task: Annotated[
        SyntheticTask | None, typer.Option(help="Plant something in the prompts that the continuations ask for.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method; may be given several times. By default all.")
    ] = None,
    boundary_tokens: Boundary = 1,
    anchor_tokens: Anchor = 1,
    seed: Seed = 0,
    dtype: Annotated[DType, typer.Option(help="Data type of weights and cache.")] = DType.bfloat16,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Compare next-token distributions after truncated prompts with the full model's, and prefill times.

    Beside POP: the last layers removed from both stages, ShortGPT's and Gromov's choice of layers removed from both,
    and SPEED without its training.
    """
    check_outputs(plot)
    source = read_texts(text, samples)
    if samples and synthetic_task:
        raise ValueError("--synthetic-task plants in text, expected it without --samples")
    loaded = load_model(
        model, dtype, boundary_tokens=boundary_tokens, anchor_tokens=anchor_tokens, calibration=calibration
    )
    from pop_ext.analysis import evaluation
    from pop_ext.analysis import text as texts

    depths = sorted({loaded.resolve_prefill_depth(parse_depth(depth)) for depth in prefill_depth})
    rows, results = [], []
    for length in [0] if samples else prompt_tokens:
        visuals = None
        if samples:
            *pairs, visuals = encoded_samples(samples, loaded)
            length = round(sum(map(len, pairs[0])) / len(pairs[0]))
        elif synthetic_task:
            filler = texts.windows(loaded.tokenizer, source, length, prompts)
            pairs = evaluation.synthetic_task(synthetic_task.value, filler, loaded.tokenizer, seed)
        else:
            windows = texts.windows(loaded.tokenizer, source, length + continuation_tokens, prompts)
            pairs = [w[:length] for w in windows], [w[length:] for w in windows]
        with progress_bar(f"evaluating, {length} prompt tokens") as report:
            results = evaluation.evaluate(
                loaded, *pairs, depths, method or evaluation.METHODS, visuals=visuals, seed=seed, progress=report
            )
        rows += [{**row, "prompt_tokens": length} for row in evaluation.to_json(results)]
        if not as_json:
            what = f"{synthetic_task.value}, " if synthetic_task else ""
            Console().print(
                evaluation_table(results, f"{Path(model).name}, {what}{length} prompt tokens", synthetic_task)
            )
    if plot:
        evaluation.plot(results, plot, f"{Path(model).name}, {length} prompt tokens")
    if as_json:
        print(json.dumps(rows))


def evaluation_table(results, title: str, synthetic_task) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("depth", "method", "perplexity", "KL, nats a token", "above the best", "top-1", "first-token KL"):
        table.add_column(name, justify="left" if name == "method" else "right")
    if synthetic_task:
        table.add_column("all exact", justify="right")
    table.add_column("prefill", justify="right")
    for r in results:
        low, high = r.excess_interval
        # a difference that its interval does not separate from nothing is none
        excess = "" if r.method == "full" else f"{low:.3f} to {high:.3f}" if low > 0 else "best" if high == 0 else "no"
        table.add_row(
            str(r.prefill_depth),
            r.method,
            f"{r.perplexity:.2f}",
            f"{r.kl:.4f} ({r.kl_ci95[0]:.4f} to {r.kl_ci95[1]:.4f})",
            excess,
            f"{r.top1_agreement:.1%}",
            f"{r.first_token_kl:.4f}",
            *([f"{r.exact_answers:.0%}"] if synthetic_task else []),
            f"{r.prefill_seconds:.3f} s",
        )
    return table


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

        from pop_ext.checkpoints import weights as checkpoint

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
