"""vLLM with POP beside plain vLLM, under a load of long prompts and short answers: `make bench-vllm`.

Each engine runs in a process of its own, one after the other, in several rounds; the table has the medians of the
rounds. Four requests are in the engine at any time, so that prompts are computed while others decode. Prefill's rate is
measured apart, with one new token a prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ENGINES = {"vLLM": None, "POP, 2/3 of the layers": 2 / 3, "POP, 1/2 of the layers": 0.5}


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def run(engine, prompts, new_tokens: int, concurrent: int) -> dict:
    """Keeps `concurrent` requests in the engine until all are through. Seconds, and tokens a second."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    waiting, begun, last, seen = list(enumerate(prompts)), {}, {}, {}
    first, between = [], []
    start = time.perf_counter()
    while waiting or engine.has_unfinished_requests():
        while waiting and len(begun) - sum(n == new_tokens for n in seen.values()) < concurrent:
            index, prompt = waiting.pop(0)
            engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
            begun[str(index)] = time.perf_counter()
        for output in engine.step():
            now, name = time.perf_counter(), output.request_id
            count = len(output.outputs[0].token_ids)
            if count == seen.get(name, 0):
                continue
            (between if name in last else first).append(now - last.get(name, begun[name]))
            last[name], seen[name] = now, count
    seconds = time.perf_counter() - start
    return {"first": first, "between": between, "seconds": seconds, "tokens": sum(map(len, prompts))}


def worker(args) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    from vllm import LLM

    options = {"prefill_depth": args.worker} | ({"calibration": args.calibration} if args.calibration else {})
    llm = LLM(
        str(args.model), dtype=args.dtype, enforce_eager=not args.compile, max_model_len=2048, max_num_seqs=8,
        max_num_batched_tokens=512, kv_cache_memory_bytes=512 << 20, enable_prefix_caching=False, seed=0,
        additional_config={"pop": options} if args.worker else {},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def prompts(count: int) -> list[list[int]]:
        lengths = torch.randint(384, 1280, (count,), generator=generator).tolist()
        return [torch.randint(1000, 40000, (length,), generator=generator).tolist() for length in lengths]

    run(llm.llm_engine, prompts(2), 8, 2)
    prefill = run(llm.llm_engine, prompts(args.requests), 1, 4)
    mixed = run(llm.llm_engine, prompts(args.requests), 24, 4)
    print(json.dumps({
        "prefill": prefill["tokens"] / prefill["seconds"],
        "ttft": statistics.median(mixed["first"]),
        "ttft95": percentile(mixed["first"], 0.95),
        "itl95": percentile(mixed["between"], 0.95),
        "throughput": (mixed["tokens"] + args.requests * 24) / mixed["seconds"],
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }))  # fmt: skip


def processor() -> str:
    from pop_ext import ops

    return f"{ops.build_info()['processor']}, {len(os.sched_getaffinity(0))} processors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=12, help="of each part of the load")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--calibration", help="a file of `pop calibrate` for both depths, else own weights")
    parser.add_argument("--compile", action="store_true", help="with torch.compile; starting takes longer")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return worker(args)
    found: dict[str, list[dict]] = {name: [] for name in ENGINES}
    for number in range(args.rounds):
        for name, depth in ENGINES.items():
            # -P: this file has the name of the package that it imports
            command = [sys.executable, "-P", __file__, *sys.argv[1:], "--worker", str(depth or 0)]
            out = subprocess.run(command, capture_output=True, text=True)
            if out.returncode:
                sys.exit(f"{name}: {out.stderr[-2000:]}")
            found[name].append(json.loads(out.stdout.splitlines()[-1]))
            print(f"round {number + 1}: {name}: {found[name][-1]['prefill']:.0f} prompt tokens/s", file=sys.stderr)
    print(f"{args.model.name}, {args.dtype}, {processor()}; medians of {args.rounds} rounds\n")
    print("| engine | prompt tokens/s | TTFT, median | TTFT, p95 | between tokens, p95 | all tokens/s | memory |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, rounds in found.items():

        def cell(key: str, form: str, rounds=rounds) -> str:
            value = statistics.median(r[key] for r in rounds)
            ratio = statistics.median(r[key] / plain[key] for r, plain in zip(rounds, found["vLLM"], strict=True))
            return f"{value:{form}}" + ("" if rounds is found["vLLM"] else f" ({ratio:.2f}x)")

        cells = [cell("prefill", ".0f"), cell("ttft", ".3f"), cell("ttft95", ".3f"), cell("itl95", ".3f"),
                 cell("throughput", ".0f"), cell("memory", ".2f")]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |")
    print("\nSeconds; GiB of the process at its peak. In brackets the median ratio to vLLM in the same round.")


if __name__ == "__main__":
    main()
