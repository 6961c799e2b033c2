"""What to run on a machine with a GPU and a torch for CUDA 13, in parts: `python bench/gpu.py [PART ...]`.

    tests       the CUDA operations' tests, and the runner's on device="cuda"
    sanitizer   compute-sanitizer's four tools over tests of the operations
    kernels     the microbenchmark programs, and our operations beside cuBLAS and FlashAttention
    end-to-end  prefill and decode of a random model of Llama-3.1-8B's shape: POP at full depth, 2/3 and 1/2,
                transformers, eager and compiled, and vLLM if it is installed

Each part ends within its limit, all of them within 25 minutes; a step that its part has no time for is left out, by
name. After every step the results are written whole to one JSON file; the tables come at the end. Exits with 1 where
a step failed. `--rehearse` runs every step without a GPU, in tiny shapes: kernels on the PTX emulator, the runner on
the tests' double of a GPU, peers on the CPU. Only times mean nothing then.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pop_ext.checkpoints.files import atomic_write  # noqa: E402

LIMITS = {"tests": 480, "sanitizer": 240, "kernels": 240, "end-to-end": 540}  # seconds
LLAMA_8B = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, rope_theta=500000.0, tie_word_embeddings=False,
)  # fmt: skip
TINY = LLAMA_8B | dict(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
PROGRAMS = "rms_norm", "linear", "gated_linear", "qkv_project", "attention", "project_kv"
OPERATION_TESTS = [f"python_tests/test_{name}.py" for name in ("cuda_ops", "cuda_attention", "cuda_runtime")]
OPERATION_TESTS += ["python_tests/test_decode_ops.py", "python_tests/test_cuda_model.py"]
RUNNER_TESTS = "python_tests/device"
SANITIZED = ["python_tests/test_cuda_runtime.py", "python_tests/test_decode_ops.py"]
SANITIZED_NAMES = "public_functions or int32_slots or (cuda and (embedding or rope_gather or advance or greedy))"


class Part:
    """The steps of a part, one after the other under its limit; each result is written as it comes."""

    def __init__(self, name: str, report: dict, path: Path, rehearse: bool):
        self.report, self.path, self.rehearse = report, path, rehearse
        self.end = time.monotonic() + LIMITS[name] * (4 if rehearse else 1)  # emulation is slow
        device = "PTX emulator" if rehearse else torch.cuda.get_device_name()
        self.steps = []
        report[name] = {"device": device, "torch": torch.__version__, "rehearsal": rehearse, "steps": self.steps}

    def note(self, name: str, status, **more) -> None:
        self.steps.append({"step": name, "status": status} | more)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, lambda file: Path(file).write_text(json.dumps(self.report, indent=1)))
        print(f"  {name}: {status}", flush=True)

    def run(self, name: str, command: list, environment: dict | None = None, json_lines: bool = False) -> bool:
        """A command; what it printed at last, or with `json_lines` each line as an object. True where it succeeded."""
        left, start = self.end - time.monotonic(), time.monotonic()
        if left < 1:
            self.note(name, "left out: the part's time is over")
            return False
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=os.environ | (environment or {}), stdout=out, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(timeout=left)
            except subprocess.TimeoutExpired:
                status = f"stopped after {left:.0f} s, the rest of the part's time"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, 9)  # with what it started
                    process.wait()
            out.seek(0), errors.seek(0)
            text, complaints = out.read(), errors.read()
        result = {"command": " ".join(map(str, command)), "seconds": round(time.monotonic() - start, 1)}
        if json_lines:
            result["rows"] = [
                json.loads(line) for line in text.splitlines() if line.startswith("{") and line[-1] == "}"
            ]
        if status != 0 or not json_lines:
            result["end"] = (text + complaints).splitlines()[-25:]
        self.note(name, "passed" if status == 0 else status, **result)
        return status == 0


def emulated() -> dict:
    """The environment of a program that the emulator runs."""
    sys.path.append(str(ROOT / "tools" / "ptx-emulator"))
    import ptx_emulator

    return {"LD_LIBRARY_PATH": str(ptx_emulator.library_path())}


def tests(part: Part) -> None:
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = {"PYTHONPATH": str(ROOT / "tools" / "ptx-emulator")}
    few = ["-k", "float32 or errors or advance or head_sizes_without"] if part.rehearse else []
    part.run("operations", [*pytest, *OPERATION_TESTS, *few], environment)
    few = ["-k", "float16 or devices or one_step_too_many"] if part.rehearse else []
    device = "gpudouble" if part.rehearse else "cuda"
    part.run("runner", [*pytest, RUNNER_TESTS, *few], environment | {"POP_TEST_DEVICE": device})


def sanitizer(part: Part) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return part.note("compute-sanitizer", "is not installed")
    names = "float32" if part.rehearse else SANITIZED_NAMES
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SANITIZED, "-k", names]
    # Each tensor an allocation of its own: an access beyond it is beyond an allocation.
    environment = {"PYTHONPATH": str(ROOT / "tools" / "ptx-emulator"), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in ("memcheck", "racecheck", "initcheck", "synccheck"):
        part.run(name, [tool, "--tool", name, "--error-exitcode", "9", *command], environment)


def kernels(part: Part) -> None:
    sizes, lengths = (TINY, (24, 70)) if part.rehearse else (LLAMA_8B, (512, 2048, 8192))
    device = "gpudouble" if part.rehearse else "cuda"
    options = json.dumps({"lengths": lengths, "decode": 0, "sizes": sizes})
    command = [sys.executable, "bench/gpu_engines.py", "operations", ".", device, options]
    part.run("cuBLAS and FlashAttention", command, json_lines=True)
    build = ROOT / "build" / "cmake"
    environment = {"PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]}
    configure = ["cmake", "-S", ".", "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    if not part.run("configure", configure, environment):
        return
    if not part.run("build", ["cmake", "--build", build, "--target", "bench_kernels"], environment):
        return
    few, environment = [], {}
    if part.rehearse:
        few, environment = ["--model", "SmolLM2-135M", "--tokens", "3", "--context", "99"], emulated()
    for name in PROGRAMS:
        # one object over many lines
        with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
            command = ["sh", "-c", f'"{build / "bench" / name}" --json "$@" >"{file.name}"', name, *few]
            if part.run(name, command, environment):
                part.steps[-1]["report"] = json.load(file)


def has_vllm() -> bool:
    """As a package: bench/vllm.py, which a script of this folder would import, is none."""
    return any(True for _ in distributions(name="vllm"))


def end_to_end(part: Part) -> None:
    sizes, lengths, decode = (TINY, (24, 70), 3) if part.rehearse else (LLAMA_8B, (512, 2048, 8192, 32768), 64)
    ours, peers = ("gpudouble", "cpu") if part.rehearse else ("cuda", "cuda")
    options = json.dumps({"lengths": lengths, "decode": decode, "depths": [1.0, 2 / 3, 0.5]})
    engines = [("pop", ours), ("transformers", peers), ("transformers-compiled", peers)]
    if has_vllm():
        engines.append(("vllm", peers))
    with tempfile.TemporaryDirectory(dir=ROOT / "build" if (ROOT / "build").is_dir() else None) as folder:
        model = Path(folder) / "model"
        command = [sys.executable, "bench/gpu_engines.py"]
        if not part.run("model", [*command, "make", model, peers, json.dumps(sizes)]):
            return
        for engine, device in engines:
            part.run(engine, [*command, engine, model, device, options], json_lines=True)
    if not has_vllm():
        part.note("vllm", "is not installed")


PARTS = {"tests": tests, "sanitizer": sanitizer, "kernels": kernels, "end-to-end": end_to_end}


def tables(report: dict) -> str:
    """The times of a report as Markdown, each under its device's name."""
    rows = {name: [row for step in part["steps"] for row in step.get("rows", ())] for name, part in report.items()}
    lines = []
    if found := rows.get("kernels"):
        lines += [f"\n{report['kernels']['device']}\n", "| operation | tokens | ours, us | torch, us | torch is |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for row in found:
            times = f"{1e6 * row['seconds']:.1f} | {1e6 * row['torch_seconds']:.1f}"
            lines.append(f"| {row['operation']} | {row['tokens']} | {times} | {row['beside']} |")
    if found := rows.get("end-to-end"):
        lines += [
            f"\n{report['end-to-end']['device']}\n",
            "| engine | prompt tokens | prefill, ms | decode, ms a token |",
        ]
        lines += ["| --- | --- | --- | --- |"]
        for row in found:
            times = f"{1000 * row['prefill']:.1f} | {1000 * row['decode']:.2f}"
            lines.append(f"| {row['engine']} | {row['tokens']} | {times} |")
    return "\n".join(lines)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # Part.run then ends its step
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; by default all")
    parser.add_argument("--output", type=Path, help="build/gpu.json, or gpu-rehearsal.json; what is there is added to")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, in tiny shapes")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"PART is {sorted(unknown)[0]!r}, expected {', '.join(PARTS)}")
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --rehearse needs none")
    path = arguments.output or ROOT / "build" / ("gpu-rehearsal.json" if arguments.rehearse else "gpu.json")
    report = json.loads(path.read_text()) if path.exists() else {}
    for name in arguments.parts or PARTS:
        part = Part(name, report, path, arguments.rehearse)
        print(f"{name}, on {report[name]['device']}", flush=True)
        PARTS[name](part)
    print(tables(report))
    statuses = [step["status"] for name in arguments.parts or PARTS for step in report[name]["steps"]]
    return int(any(status not in ("passed", "is not installed") for status in statuses))


if __name__ == "__main__":
    sys.exit(main())
