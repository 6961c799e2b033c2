"""What to run on a machine with a GPU and a torch for CUDA 13, in parts: `python bench/gpu.py PART... [--json FILE]`.

    tests       the CUDA operations' tests, and the runner's on device="cuda"
    sanitizer   compute-sanitizer's four tools over tests of the operations
    kernels     the microbenchmark programs
    end-to-end  prefill and decode of a random model of Llama-3.1-8B's shape: POP at full depth, 2/3 and 1/2, and
                transformers, eager and compiled

Each part has a limit of ten minutes. The result is JSON, and a table under the device's name. `--tiny` takes a small
model and short prompts; with `--device gpudouble` (python_tests/device_double.py) that is the rehearsal without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds a part
TOKENS = (512, 2048, 8192, 32768)
DECODE = 64
LLAMA_8B = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, rope_theta=500000.0, tie_word_embeddings=False,
)  # fmt: skip
TINY = LLAMA_8B | dict(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


def run(command: list, environment: dict | None = None) -> dict:
    """Runs a command under the limit; the last lines of what it printed."""
    start = time.perf_counter()
    try:
        result = subprocess.run(
            command, cwd=ROOT, env=os.environ | (environment or {}), capture_output=True, text=True, timeout=LIMIT
        )
        status, output = result.returncode, result.stdout + result.stderr
    except subprocess.TimeoutExpired as error:
        status, output = f"longer than {LIMIT} s", (error.stdout or b"").decode()
    lines = output.splitlines()[-25:]
    print(*lines, sep="\n", flush=True)
    return {"command": list(map(str, command)), "status": status, "seconds": time.perf_counter() - start, "end": lines}


def tests(arguments) -> list[dict]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-x"]
    files = ["python_tests/test_cuda_ops.py", "python_tests/test_decode_ops.py", "python_tests/test_cuda_runtime.py"]
    files = [file for file in files if (ROOT / file).exists()]
    return [
        run([*pytest, *files]),
        run([*pytest, "python_tests/test_runner_on_device.py"], {"POP_TEST_DEVICE": arguments.device}),
    ]


def sanitizer(arguments) -> list[dict]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return [{"status": "compute-sanitizer is not installed"}]
    few = ["python_tests/test_decode_ops.py", "-k", "cuda and (embedding or greedy or advance or gather)"]
    command = [sys.executable, "-m", "pytest", "-q", *few]
    return [
        run([tool, "--tool", name, "--error-exitcode", "9", *command])
        for name in ("memcheck", "racecheck", "initcheck", "synccheck")
    ]


def kernels(arguments) -> list[dict]:
    return [run(["make", "bench-kernels"])]


def make_model(folder: Path, sizes: dict, device: str) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None)
    with torch.device("cuda" if device == "cuda" else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def medians(measure, repeats: int = 3) -> dict:
    measure()  # loads, compiles, captures
    rows = [measure() for _ in range(repeats)]
    return {key: sorted(row[key] for row in rows)[repeats // 2] for key in rows[0]}


def measure_pop(folder: Path, arguments, lengths, decode: int) -> list[dict]:
    import torch

    import pop_ext
    from pop_ext.runtime import device as devices

    model = pop_ext.load(folder, device=arguments.device, prefill_depth=0.5, max_cache_tokens=max(lengths) + 256)
    results = []
    for length in lengths:
        prompt = torch.randint(0, model.spec.vocab_size, (length,)).tolist()
        for depth in (1.0, 2 / 3, 0.5):

            def measure(prompt=prompt, depth=depth):
                sequence = model.new_sequence()
                devices.synchronize(model.device)
                start = time.perf_counter()
                model.prefill([sequence], [prompt], prefill_depth=depth)
                devices.synchronize(model.device)
                prefill = time.perf_counter() - start
                model.free(sequence)
                output = model.generate([prompt], prefill_depth=depth, max_new_tokens=decode, do_sample=False)
                return {"prefill": prefill, "decode": output.times.decode / max(1, output.times.decode_tokens)}

            results.append({"engine": f"POP {depth:.2f}", "tokens": length} | medians(measure))
    return results


def measure_transformers(folder: Path, arguments, lengths, decode: int, compiled: bool) -> list[dict]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(arguments.device).eval()
    forward, results = torch.compile(model) if compiled else model, []
    for length in lengths:
        ids = torch.randint(0, model.config.vocab_size, (1, length), device=arguments.device)

        @torch.no_grad()
        def measure(ids=ids):
            cache = transformers.DynamicCache(config=model.config)
            torch.cuda.synchronize()
            start = time.perf_counter()
            token = forward(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
            torch.cuda.synchronize()
            middle = time.perf_counter()
            for _ in range(decode - 1):
                token = forward(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            return {"prefill": middle - start, "decode": (time.perf_counter() - middle) / (decode - 1)}

        name = "transformers, compiled" if compiled else "transformers"
        results.append({"engine": name, "tokens": length} | medians(measure))
    return results


def end_to_end(arguments) -> list[dict]:
    import torch

    lengths, decode = ((24, 70), 4) if arguments.tiny else (TOKENS, DECODE)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "model"
        make_model(folder, TINY if arguments.tiny else LLAMA_8B, arguments.device)
        results = measure_pop(folder, arguments, lengths, decode)
        if arguments.device.startswith("cuda"):
            torch.cuda.empty_cache()
            results += measure_transformers(folder, arguments, lengths, decode, compiled=False)
            results += measure_transformers(folder, arguments, lengths, decode, compiled=True)
    return results


PARTS = {"tests": tests, "sanitizer": sanitizer, "kernels": kernels, "end-to-end": end_to_end}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "gpu.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    import torch

    if arguments.device == "gpudouble":
        sys.path[:0] = [str(ROOT / "python_tests"), str(ROOT / "tools" / "ptx-emulator")]
        import device_double

        from pop_ext.runtime import device as devices

        devices.ACCELERATORS.add(device_double.NAME)
        device_double.DeviceTensor.__repr__ = lambda tensor: "DeviceTensor"
    name = torch.get_device_module(arguments.device).get_device_name()
    report = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    for part in arguments.parts or PARTS:
        print(f"{part}, on {name}", flush=True)
        report[part] = {"device": name, "torch": torch.__version__, "results": PARTS[part](arguments)}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1))
    rows = report.get("end-to-end", {}).get("results", [])
    if rows:
        print(f"\n{report['end-to-end']['device']}\n")
        print("| engine | tokens | prefill ms | decode ms a token |\n| - | - | - | - |")
    for row in rows:
        print(f"| {row['engine']} | {row['tokens']} | {1000 * row['prefill']:.1f} | {1000 * row['decode']:.2f} |")


if __name__ == "__main__":
    main()
