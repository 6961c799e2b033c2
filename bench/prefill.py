"""Prompt and decode speed, ours and others': `python bench/prefill.py MODEL [--json]`.

Every engine runs in a process of its own (bench/engines.py) on two threads, writes a key/value cache, and computes the
last prompt token's logits; one runs at a time. "pop" runs as `load` chooses, the others in the dtype that torch
multiplies faster in here: bf16, or fp32 where the processor has no instructions for bf16. A peer with several settings
tries each at the start and keeps the fastest. Rounds are interleaved: in each, the machine's yardsticks are taken and
every engine runs every prompt length once, in an order that turns from round to round. Ratios are taken within a round;
what is reported are medians over the rounds.

A line of the result (an object of the list that --json prints) is one engine with one prompt length:

    processor, instruction_set, cores, threads      what it ran on; instruction_set is that of "pop"
    limited_to                 the instruction set that --isa keeps every engine to, else null
    dtype, settings            of the engine's weights and multiplications, and what it was started with
    engine, prefill_depth      "pop" is this project; prefill_depth layers run for all prompt tokens
    prompt_tokens              n
    tokens_per_second          n over the time to the last token's logits; tokens_per_second_range is [slowest, fastest]
    limit_share                of the limit: the plain model's multiplications, with one token's logits, at the rate of
                               a large GEMM in the faster dtype. One limit for all lines: truncation can pass 1
    gemm_share                 of the GEMM's rate, by the multiplications that "pop" does at this depth
    relative                   tokens_per_second over that of "pop" at full depth
    predicted_relative         the same by counting multiplications (of "pop")
    stages_seconds             the time of each stage (of "pop")
    decode_context_tokens      n: decoding goes on from the prompt
    decode_tokens_per_second   of one sequence, greedily
    decode_bandwidth_share     bytes of weights per second, over the machine's rate of reading memory
    other_load                 processors that other programs kept busy meanwhile (mean). Above 0.1, absolute numbers
                               mean little; --patience repeats such samples
    gemm_dtype, limit_tokens_per_second, gemm_gigaflops, read_gigabytes_per_second     the yardsticks of these rounds
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from statistics import mean, median

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pop_ext  # noqa: E402
from bench.engines import THREADS  # noqa: E402
from bench.multiplications import decode_bytes, plain_multiplications, pop_multiplications  # noqa: E402
from bench.workers import EngineError, Worker  # noqa: E402
from pop_ext.checkpoints.config import load_config  # noqa: E402
from pop_ext.checkpoints.families import ModelSpec  # noqa: E402
from pop_ext.checkpoints.files import resolve_folder  # noqa: E402

# How other engines' libraries are kept to an instruction set: ATen, oneDNN (OpenVINO's too, though not all of its own
# kernels ask it), MKL.
LIMITS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
LOW_SHARE = 0.6  # of the machine's large GEMM: below it, "pop" does not serve this processor well


def processor() -> dict:
    """The machine's fields of a line."""
    build = pop_ext.build_info()
    return {
        "processor": build["processor"],
        "cores": build["cpu_cores"],
        "threads": THREADS,
    }


@dataclass
class Peer:
    """An engine to compare with: its name in bench/engines.py, the model's form, the settings to choose from by trial,
    and the Python that it wants.
    """

    engine: str
    model: str
    settings: list[dict] = field(default_factory=lambda: [{}])
    python: str = sys.executable


@dataclass
class Contender:
    """A line of the table: an engine at a prefill depth, with the samples of each prompt length."""

    engine: str
    prefill_depth: int
    dtype: str
    settings: dict
    worker: Worker
    arguments: dict
    samples: dict[int, list[dict]] = field(default_factory=dict)


@dataclass
class Plan:
    """What every engine runs in every round, and the clock that it is timed by."""

    prompt_tokens: list[int]
    rounds: int
    decode_tokens: int
    patience: float
    processor_time: bool
    isa: str | None
    say: Callable[[str], None]

    @property
    def clock(self) -> str:
        return "cpu_seconds" if self.processor_time else "seconds"

    @property
    def environment(self) -> dict:
        # threads that wait for one another by spinning would count as busy
        return ({"OMP_WAIT_POLICY": "passive"} if self.processor_time else {}) | (LIMITS[self.isa] if self.isa else {})

    def rates(self, contender: Contender, count: int) -> list[float]:
        """Prompt tokens per second, a sample each. Of processor time, what all threads could do in a second."""
        scale = THREADS if self.processor_time else 1
        return [scale * count / sample[f"prefill_{self.clock}"] for sample in contender.samples[count]]

    def decode_rates(self, contender: Contender, count: int) -> list[float]:
        scale = THREADS if self.processor_time else 1
        return [scale * self.decode_tokens / sample[f"decode_{self.clock}"] for sample in contender.samples[count]]


def compare(
    model: str,
    peers: list[Peer],
    *,
    depths: list[int] | None = None,
    prompt_tokens: list[int],
    rounds: int,
    decode_tokens: int,
    patience: float = 0,
    processor_time: bool = False,
    isa: str | None = None,
    own: dict | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Runs the rounds and returns the lines described above. "pop" runs at full depth and `depths` (two thirds), with
    the settings `own`.
    """
    folder = resolve_folder(model)
    spec = ModelSpec.from_config(load_config(folder))
    layers = spec.num_layers
    depths = sorted({layers, *(depths or [max(1, round(layers * 2 / 3))])}, reverse=True)
    own = (own or {}) | ({"isa": isa} if isa else {})
    plan = Plan(prompt_tokens, rounds, decode_tokens, patience, processor_time, isa, say)
    with ExitStack() as running:

        def start(peer: Peer, settings: dict) -> Worker:
            return running.enter_context(closing(start_worker(peer, settings, plan)))

        machine = start(Peer("machine", str(folder)), {})
        dtype = machine.run()["dtype"]
        pop = start(Peer("pop", str(folder)), own)
        first = pop.run(prompt_tokens=1, decode_tokens=0, prefill_depth=layers)
        contenders = [Contender("pop", depth, first["dtype"], {}, pop, {"prefill_depth": depth}) for depth in depths]
        for peer in peers:
            settings = fastest_settings(peer, dtype, plan)
            worker = start(peer, {"dtype": dtype} | settings)
            contenders.append(Contender(peer.engine, layers, dtype, settings, worker, {}))
        yardsticks = run_rounds(plan, machine, contenders)
    ran_on = processor() | {"instruction_set": first["instruction_set"], "limited_to": isa}
    return result_lines(plan, spec, dtype, ran_on, contenders, yardsticks)


def start_worker(peer: Peer, settings: dict, plan: Plan) -> Worker:
    return Worker(peer.engine, peer.model, settings, peer.python, plan.environment)


def fastest_settings(peer: Peer, dtype: str, plan: Plan) -> dict:
    """The settings that read the longest prompt fastest, by trial where there are several; an engine may refuse some
    on a processor."""
    if len(peer.settings) == 1:
        return peer.settings[0]
    seconds, refusal = [], None
    for tried in peer.settings:
        plan.say(f"trying {peer.engine} with {tried}")
        with closing(start_worker(peer, {"dtype": dtype} | tried, plan)) as worker:
            try:
                runs = [worker.run(prompt_tokens=max(plan.prompt_tokens), decode_tokens=1) for _ in range(3)]
            except EngineError as error:
                seconds.append(inf)
                refusal = error
                continue
        seconds.append(min(run[f"prefill_{plan.clock}"] for run in runs[1:]))
    if min(seconds) == inf:
        raise refusal
    return peer.settings[seconds.index(min(seconds))]


def run_rounds(plan: Plan, machine: Worker, contenders: list[Contender]) -> list[dict]:
    """Fills the contenders' samples; returns the machine's yardsticks of each round."""
    for contender in contenders:  # twice: caches warm and compilers done, for every length
        for count in 2 * plan.prompt_tokens:
            plan.say(f"warming up {contender.engine} with {count} tokens")
            contender.worker.run(prompt_tokens=count, decode_tokens=4, **contender.arguments)
    yardsticks = []
    for i in range(plan.rounds):
        now = f"round {i + 1} of {plan.rounds}"
        plan.say(f"{now}: the machine")
        yardsticks.append(machine.patient_run(plan.patience))
        for contender in contenders[i % len(contenders) :] + contenders[: i % len(contenders)]:
            for count in plan.prompt_tokens:
                plan.say(f"{now}: {contender.engine} ({contender.prefill_depth}), {count} tokens")
                command = {"prompt_tokens": count, "decode_tokens": plan.decode_tokens} | contender.arguments
                sample = contender.worker.patient_run(plan.patience, **command)
                contender.samples.setdefault(count, []).append(sample)
    return yardsticks


def result_lines(
    plan: Plan, spec: ModelSpec, dtype: str, ran_on: dict, contenders: list[Contender], yardsticks: list[dict]
) -> list[dict]:
    unit = plan.clock.removesuffix("s")
    gemm = [y[f"multiplications_per_{unit}"] for y in yardsticks]
    bandwidth = [y[f"read_bytes_per_{unit}"] for y in yardsticks]
    lines = []
    for count in plan.prompt_tokens:
        limits = [rate * count / plain_multiplications(spec, count) for rate in gemm]
        full = plan.rates(contenders[0], count)
        for c in contenders:
            samples, rate, decode = c.samples[count], plan.rates(c, count), plan.decode_rates(c, count)
            weights = decode_bytes(spec, 2 if c.dtype == "bfloat16" else 4)
            line = ran_on | {
                "engine": c.engine,
                "prefill_depth": c.prefill_depth,
                "dtype": c.dtype,
                "settings": c.settings,
                "prompt_tokens": count,
                "tokens_per_second": median(rate),
                "tokens_per_second_range": [min(rate), max(rate)],
                "limit_share": median(map(float.__truediv__, rate, limits)),
                "relative": median(map(float.__truediv__, rate, full)),
                "decode_context_tokens": count,
                "decode_tokens_per_second": median(decode),
                "decode_bandwidth_share": weights * median(map(float.__truediv__, decode, bandwidth)),
                "other_load": mean(s["other_load"] for s in [*samples, *yardsticks]),
                "gemm_dtype": dtype,
                "limit_tokens_per_second": median(limits),
                "gemm_gigaflops": 2e-9 * median(gemm),
                "read_gigabytes_per_second": 1e-9 * median(bandwidth),
            }
            if c.engine == "pop":
                needed = pop_multiplications(spec, count, c.prefill_depth)
                line["gemm_share"] = median(r * needed / count / g for r, g in zip(rate, gemm, strict=True))
                line["predicted_relative"] = pop_multiplications(spec, count, spec.num_layers) / needed
                line["stages_seconds"] = {k: median(s["stages"][k] for s in samples) for k in samples[0]["stages"]}
            lines.append(line)
    return lines


def show(lines: list[dict], console: Console, processor_time: bool = False) -> None:
    gemm, memory = (lines[0][key] for key in ("gemm_gigaflops", "read_gigabytes_per_second"))
    load = mean(line["other_load"] for line in lines)
    on = f"{lines[0]['processor']}, {lines[0]['cores']} cores, pop with {lines[0]['instruction_set']}"
    if lines[0]["limited_to"]:
        on += f", all engines kept to {lines[0]['limited_to']}"
    rates = f"large GEMM ({lines[0]['gemm_dtype']}) {gemm:.0f} GFLOP/s, memory {memory:.1f} GB/s"
    title = f"{on}\n{THREADS} threads; {rates}"
    caption = f"by {'processor' if processor_time else 'wall'} time; others kept {load:.2f} processors busy"
    table = Table(title=title, caption=caption)
    for column in ("engine", "dtype", "depth", "prompt", "tokens/s", "range", "limit", "pop", "decode", "memory"):
        table.add_column(column, justify="left" if column in ("engine", "dtype") else "right", no_wrap=True)
    for i, line in enumerate(lines):
        slow, fast = line["tokens_per_second_range"]
        table.add_row(
            line["engine"],
            line["dtype"],
            str(line["prefill_depth"]),
            str(line["prompt_tokens"]),
            f"{line['tokens_per_second']:.0f}",
            f"{slow:.0f}-{fast:.0f}",
            f"{line['limit_share']:.0%}",
            f"{line['relative']:.2f}x",
            f"{line['decode_tokens_per_second']:.1f}",
            f"{line['decode_bandwidth_share']:.0%}",
            end_section=i + 1 == len(lines) or lines[i + 1]["prompt_tokens"] != line["prompt_tokens"],
        )
    console.print(table)
    console.print(
        "prompt: its tokens; limit: share of the plain model's limit; pop: over ours at full depth;"
        " decode: tokens/s after that prompt; memory: weights read, of the rate of reading memory",
        style="dim",
        soft_wrap=True,
    )
    for engine, settings in {line["engine"]: line["settings"] for line in lines if line["settings"]}.items():
        console.print(f"{engine} was fastest with {settings}", style="dim", soft_wrap=True)
    depths = [line["prefill_depth"] for line in lines if line["engine"] == "pop"]
    for line in lines:
        if line["engine"] == "pop" and line["prefill_depth"] == max(depths) and line["gemm_share"] < LOW_SHARE:
            console.print(
                f"warning: {line['prompt_tokens']} tokens at full depth reach {line['gemm_share']:.0%} of the large"
                f" GEMM here, expected at least {LOW_SHARE:.0%}",
                soft_wrap=True,
            )
    for line in lines:
        if line["engine"] == "pop" and line["prefill_depth"] < max(depths):
            ratio, prediction = line["relative"], line["predicted_relative"]
            console.print(
                f"{line['prefill_depth']} of {max(depths)} layers, {line['prompt_tokens']} tokens: multiplications"
                f" predict {prediction:.3f}x, measured {ratio:.3f}x, {ratio / prediction:.0%} of it",
                soft_wrap=True,
            )


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint folder or hub id")
    add("--json", action="store_true", help="print the result as JSON")
    add("--prompt-tokens", type=int, nargs="+", default=[128, 512, 2048], metavar="N")
    add("--prefill-depth", type=int, nargs="+", metavar="P", help="layers that ours keeps, besides all (two thirds)")
    add("--decode-tokens", type=int, default=16, metavar="N", help="tokens to decode after each prompt (default 16)")
    add("--rounds", type=int, default=7)
    add("--peers", nargs="*", default=["transformers", "transformers-compile"], metavar="ENGINE")
    add("--patience", type=float, default=0, metavar="SECONDS", help="how long a sample may wait for a quiet machine")
    add("--processor-time", action="store_true", help="rates by processor time: an approximation for a busy machine")
    add("--isa", choices=sorted(LIMITS), help="keep every engine to this instruction set")
    add("--dtype", choices=["bfloat16", "float32"], help="of ours, in place of what load takes by itself")
    return parser


def main(options: argparse.Namespace, peers: list[Peer]) -> None:
    progress = Console(stderr=True)
    try:
        with progress.status("starting") as status:  # shows nothing where stderr is not a terminal
            lines = compare(
                options.model,
                peers,
                depths=options.prefill_depth,
                prompt_tokens=options.prompt_tokens,
                rounds=options.rounds,
                decode_tokens=options.decode_tokens,
                patience=options.patience,
                processor_time=options.processor_time,
                isa=options.isa,
                own={"dtype": options.dtype} if options.dtype else {},
                say=status.update,
            )
    except EngineError as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps(lines, indent=2))
    else:
        show(lines, Console(width=None if sys.stdout.isatty() else 120), options.processor_time)


if __name__ == "__main__":
    options = arguments(__doc__.split(":")[0]).parse_args()
    main(options, [Peer(engine, options.model) for engine in options.peers])
