"""Prompt and decode speed, ours and others': `python bench/prefill.py MODEL [--json]`.

Every engine runs in a process of its own (bench/engines.py) on two threads, writes a key/value cache, and computes the
last prompt token's logits; one runs at a time. "pop" runs as `load` chooses, the others in the dtype that torch
multiplies faster in here: bf16, or fp32 where the processor has no instructions for bf16. A peer with several settings
tries each at the start and keeps the fastest. Rounds are interleaved: in each, the machine's yardsticks are taken and
every engine runs every prompt length once, in an order that turns from round to round. Ratios are taken within a round;
what is reported are medians over the rounds.

A line of the result (an object of the list that --json prints) is one engine with one prompt length:

    processor, instruction_set, cores, threads      what it ran on; instruction_set is that of "pop"
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
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pop_ext  # noqa: E402
from bench.engines import THREADS  # noqa: E402
from pop_ext.checkpoints.config import load_config  # noqa: E402
from pop_ext.checkpoints.families import ModelSpec  # noqa: E402
from pop_ext.checkpoints.files import resolve_folder  # noqa: E402

# Counting


def _visible(tokens: int, window: int) -> int:
    """Query-key pairs of causal attention, with the last `window` keys visible (0: all)."""
    short = min(tokens, window or tokens)
    return short * (short + 1) // 2 + (tokens - short) * short


def _query_and_mlp(spec: ModelSpec) -> int:
    return 2 * spec.hidden_size * spec.num_heads * spec.head_dim + 3 * spec.hidden_size * spec.intermediate_size


def _keys_and_values(spec: ModelSpec) -> int:
    return 2 * spec.hidden_size * spec.num_kv_heads * spec.head_dim


def plain_multiplications(spec: ModelSpec, tokens: int) -> int:
    """Of the plain model for a prompt: every layer for every token, logits of the last one."""
    attention = sum(2 * spec.num_heads * spec.head_dim * _visible(tokens, window) for window in spec.windows)
    linear = spec.num_layers * tokens * (_query_and_mlp(spec) + _keys_and_values(spec))
    return linear + attention + spec.vocab_size * spec.hidden_size


def pop_multiplications(spec: ModelSpec, tokens: int, depth: int) -> int:
    """Of POP with one boundary and one anchor token: layers from `depth` up do the rest than keys and values for these.

    The last layer is always like that, for the boundary only: an exact shortcut, so a depth of L counts as L - 1.
    """
    depth = min(depth, spec.num_layers - 1)
    total = spec.vocab_size * spec.hidden_size
    for layer, window in enumerate(spec.windows):
        if layer < depth:
            rows, pairs = tokens, _visible(tokens, window)
        else:
            rows = min(tokens, 2 if layer < spec.num_layers - 1 else 1)
            pairs = rows * min(tokens, window or tokens)
        total += tokens * _keys_and_values(spec) + rows * _query_and_mlp(spec)
        total += 2 * spec.num_heads * spec.head_dim * pairs
    return total


def decode_bytes(spec: ModelSpec, weight_bytes: int = 2) -> int:
    """Bytes of weights that one token reads: every layer and the vocabulary projection."""
    return weight_bytes * (
        spec.num_layers * (_query_and_mlp(spec) + _keys_and_values(spec)) + spec.vocab_size * spec.hidden_size
    )


# Running

QUIET = 0.1  # processors that others may use during an undisturbed sample
LOW_SHARE = 0.6  # of the machine's large GEMM: below it, "pop" does not serve this processor well


def processor() -> dict:
    """The machine's fields of a line."""
    build = pop_ext.build_info()
    return {
        "processor": build["processor"],
        "instruction_set": build["cpu_isa"],
        "cores": build["cpu_cores"],
        "threads": THREADS,
    }


class EngineError(RuntimeError):
    pass


def busy_seconds() -> float:
    """Processor time that was not idle since the machine started, of all processors; taken by its host included."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, interrupts, soft_interrupts, stolen = map(int, file.readline().split()[1:9])
    return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")


class Worker:
    """An engine's process. Waits for commands without using a processor."""

    def __init__(self, engine: str, model: str, options: dict, python: str, environment: dict):
        self.name = engine
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        command = [python, str(ROOT / "bench" / "engines.py"), engine, model, json.dumps(options)]
        # torch's own compile cache spares later runs the minutes of compiling
        defaults = {"OMP_NUM_THREADS": str(THREADS), "TORCHINDUCTOR_CACHE_DIR": str(ROOT / "build" / "inductor")}
        defaults["POP_BENCH_PARENT"] = str(os.getpid())  # the worker ends with this process
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | defaults | environment,
        )

    def run(self, **command) -> dict:
        """The answer, and `other_load`: processors that were busy with something else meanwhile."""
        start, busy = time.perf_counter(), busy_seconds()
        answer = self._run(command)
        busy = busy_seconds() - busy - answer["cpu_seconds"]
        return answer | {"other_load": max(0.0, busy / (time.perf_counter() - start))}

    def patient_run(self, patience: float, **command) -> dict:
        """The quietest sample of `patience` seconds: waits for a quiet machine, and repeats what others disturbed."""
        end, quietest = time.perf_counter() + patience, None
        while quietest is None or (quietest["other_load"] > QUIET and time.perf_counter() < end):
            loaded = True
            while loaded and time.perf_counter() < end:
                busy = busy_seconds()
                time.sleep(0.2)
                loaded = busy_seconds() - busy > 0.2 * QUIET
            answer = self.run(**command)
            if quietest is None or answer["other_load"] < quietest["other_load"]:
                quietest = answer
        return quietest

    def _run(self, command: dict) -> dict:
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise EngineError(f"{self.name} ended with status {self.process.returncode}:\n{self.log.read()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


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
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Runs the rounds and returns the lines described above. "pop" runs at full depth and `depths` (two thirds)."""
    folder = resolve_folder(model)
    spec = ModelSpec.from_config(load_config(folder))
    layers = spec.num_layers
    depths = sorted({layers, *(depths or [max(1, round(layers * 2 / 3))])}, reverse=True)
    # Threads that wait for one another by spinning would count as busy
    environment = {"OMP_WAIT_POLICY": "passive"} if processor_time else {}
    kind = "cpu_seconds" if processor_time else "seconds"
    workers: list[Worker] = []

    def start(peer: Peer, settings: dict) -> Worker:
        workers.append(Worker(peer.engine, peer.model, settings, peer.python, environment))
        return workers[-1]

    def start_fastest(peer: Peer, dtype: str) -> tuple[dict, Worker]:
        """The settings that read the longest prompt fastest, by trial where there are several, and a worker of them."""
        settings = peer.settings[0]
        if len(peer.settings) > 1:
            seconds = []
            for tried in peer.settings:
                say(f"trying {peer.engine} with {tried}")
                worker = start(peer, {"dtype": dtype} | tried)
                runs = [worker.run(prompt_tokens=max(prompt_tokens), decode_tokens=1) for _ in range(3)]
                seconds.append(min(run[f"prefill_{kind}"] for run in runs[1:]))
                worker.close()
                workers.remove(worker)
            settings = peer.settings[seconds.index(min(seconds))]
        return settings, start(peer, {"dtype": dtype} | settings)

    try:
        machine = start(Peer("machine", str(folder)), {})
        dtype = machine.run()["dtype"]
        pop = start(Peer("pop", str(folder)), {})
        own = pop.run(prompt_tokens=1, decode_tokens=0, prefill_depth=layers)["dtype"]
        contenders = [Contender("pop", depth, own, {}, pop, {"prefill_depth": depth}) for depth in depths]
        for peer in peers:
            contenders.append(Contender(peer.engine, layers, dtype, *start_fastest(peer, dtype), {}))
        for contender in contenders:  # twice: caches warm and compilers done, for every length
            for count in 2 * prompt_tokens:
                say(f"warming up {contender.engine} with {count} tokens")
                contender.worker.run(prompt_tokens=count, decode_tokens=4, **contender.arguments)
        yardsticks = []
        for i in range(rounds):
            say(f"round {i + 1} of {rounds}: the machine")
            yardsticks.append(machine.patient_run(patience))
            for contender in contenders[i % len(contenders) :] + contenders[: i % len(contenders)]:
                for count in prompt_tokens:
                    say(f"round {i + 1} of {rounds}: {contender.engine} ({contender.prefill_depth}), {count} tokens")
                    command = {"prompt_tokens": count, "decode_tokens": decode_tokens} | contender.arguments
                    contender.samples.setdefault(count, []).append(contender.worker.patient_run(patience, **command))
    finally:
        for worker in workers:
            worker.close()

    unit = "cpu_second" if processor_time else "second"
    scale = THREADS if processor_time else 1  # of processor time, what all threads could do in a second
    gemm = [y[f"multiplications_per_{unit}"] for y in yardsticks]
    bandwidth = [y[f"read_bytes_per_{unit}"] for y in yardsticks]
    lines, machine_fields = [], processor()
    for count in prompt_tokens:
        limits = [rate * count / plain_multiplications(spec, count) for rate in gemm]
        rates = {id(c): [scale * count / s[f"prefill_{kind}"] for s in c.samples[count]] for c in contenders}
        full = rates[id(contenders[0])]
        for c in contenders:
            samples, rate = c.samples[count], rates[id(c)]
            decode = [scale * decode_tokens / s[f"decode_{kind}"] for s in samples]
            weights = decode_bytes(spec, 2 if c.dtype == "bfloat16" else 4)
            line = machine_fields | {
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
                line["predicted_relative"] = pop_multiplications(spec, count, layers) / needed
                line["stages_seconds"] = {k: median(s["stages"][k] for s in samples) for k in samples[0]["stages"]}
            lines.append(line)
    return lines


# Showing


def show(lines: list[dict], console: Console, processor_time: bool = False) -> None:
    gemm, memory = (lines[0][key] for key in ("gemm_gigaflops", "read_gigabytes_per_second"))
    load = mean(line["other_load"] for line in lines)
    on = f"{lines[0]['processor']}, {lines[0]['cores']} cores, pop with {lines[0]['instruction_set']}"
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
                say=status.update,
            )
    except EngineError as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps(lines, indent=2))
    else:
        show(lines, Console(), options.processor_time)


if __name__ == "__main__":
    options = arguments(__doc__.split(":")[0]).parse_args()
    main(options, [Peer(engine, options.model) for engine in options.peers])
