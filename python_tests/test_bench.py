"""The comparison of engines: what its counts, its lines and its processes promise."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import deep_tokens  # noqa: E402
import prefill  # noqa: E402

import pop_ext  # noqa: E402
from bench import multiplications, workers  # noqa: E402
from pop_ext.checkpoints.families import ModelSpec  # noqa: E402

SMOLLM2 = transformers.LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, tie_word_embeddings=True, max_position_embeddings=8192,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("bench") / "tiny"
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
    return path


def test_counts_of_smollm2():
    spec = ModelSpec.from_config(SMOLLM2)
    parameters = 30 * (576 * (9 + 3 + 3) * 64 + 9 * 64 * 576 + 3 * 576 * 1536) + 49152 * 576
    assert multiplications.decode_bytes(spec) == 2 * parameters
    assert multiplications.plain_multiplications(spec, 1) == parameters + 30 * 2 * 9 * 64
    for tokens, ratio in (512, 1.41), (2048, 1.42):
        plain, full, truncated = (
            multiplications.plain_multiplications(spec, tokens),
            multiplications.pop_multiplications(spec, tokens, 30),
            multiplications.pop_multiplications(spec, tokens, 20),
        )
        assert plain > full == multiplications.pop_multiplications(spec, tokens, 29)
        assert full / truncated == pytest.approx(ratio, abs=0.01)


def test_counts_of_deep_tokens():
    """From POP's to a little more than full depth's, whose last layer runs for one token only."""
    spec = ModelSpec.from_config(SMOLLM2)
    truncated, full = (prefill.pop_multiplications(spec, deep_tokens.PROMPT, depth) for depth in (20, 30))
    assert deep_tokens.multiplications(spec, 20, 0.0) == truncated
    assert full < deep_tokens.multiplications(spec, 20, 1.0) < full * 31 / 30


@pytest.mark.parametrize("window", [0, 1, 5, 12, 99])
def test_visible_pairs(window):
    pairs = sum((j > i - window or not window) for i in range(12) for j in range(i + 1))
    assert multiplications.visible_pairs(12, window) == pairs


def test_json_lines(folder):
    command = [sys.executable, str(ROOT / "bench" / "prefill.py"), str(folder), "--json", "--rounds", "2"]
    command += ["--prompt-tokens", "8", "33", "--decode-tokens", "2", "--peers", "transformers"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # quiet in a pipe
    lines = json.loads(result.stdout)
    assert [(line["engine"], line["prefill_depth"], line["prompt_tokens"]) for line in lines] == [
        (engine, depth, tokens) for tokens in (8, 33) for engine, depth in [("pop", 4), ("pop", 3), ("transformers", 4)]
    ]
    assert all(line["dtype"] == ("bfloat16" if line["engine"] == "pop" else line["gemm_dtype"]) for line in lines)
    build = pop_ext.build_info()
    for line in lines:
        assert line["processor"] == prefill.processor()["processor"] and line["threads"] == 2
        assert (line["instruction_set"], line["cores"]) == (build["cpu_isa"], build["cpu_cores"])
        numbers = "tokens_per_second", "limit_share", "relative", "decode_tokens_per_second", "decode_bandwidth_share"
        assert all(line[key] > 0 for key in numbers)
        slow, fast = line["tokens_per_second_range"]
        assert slow <= line["tokens_per_second"] <= fast
        assert line.keys() >= {"other_load", "limit_tokens_per_second", "gemm_gigaflops", "read_gigabytes_per_second"}
        assert line["decode_context_tokens"] == line["prompt_tokens"]
        assert ("predicted_relative" in line) == (line["engine"] == "pop")
    assert all(line["relative"] == 1 for line in lines if line["engine"] == "pop" and line["prefill_depth"] == 4)


def test_kept_to_an_instruction_set(folder, monkeypatch):
    """Every engine, and ours in a dtype of the caller's."""
    environments, start = [], workers.Worker.__init__

    def recorded(self, engine, model, options, python, environment):
        environments.append((engine, environment))
        start(self, engine, model, options, python, environment)

    monkeypatch.setattr(workers.Worker, "__init__", recorded)
    peers, settings = [prefill.Peer("transformers", str(folder))], dict(prompt_tokens=[8], rounds=1, decode_tokens=1)
    lines = prefill.compare(str(folder), peers, isa="avx2", own={"dtype": "float32"}, **settings)
    assert all((line["instruction_set"], line["limited_to"]) == ("avx2", "avx2") for line in lines)
    assert all(line["dtype"] == "float32" for line in lines if line["engine"] == "pop")
    assert environments == [(name, prefill.LIMITS["avx2"]) for name in ("machine", "pop", "transformers")]
    assert prefill.LIMITS["avx2"]["ATEN_CPU_CAPABILITY"] == "avx2"
    console = Console(width=200, record=True, file=io.StringIO())
    prefill.show(lines, console)
    assert "pop with avx2, all engines kept to avx2" in console.export_text()


@pytest.mark.parametrize("slow, fast", [("sdpa", "eager"), ("eager", "sdpa")])
def test_a_peer_runs_with_the_fastest_of_its_settings(folder, monkeypatch, slow, fast):
    """Whichever is tried first. The whole comparison takes what was found, and its lines say so."""
    peer = prefill.Peer("transformers", str(folder), [{"attention": "sdpa"}, {"attention": "eager"}])
    run = workers.Worker.run

    def slowed(self, **command):
        answer = run(self, **command)
        factor = 100 if f'"{slow}"' in " ".join(self.process.args) else 1
        return answer | {key: factor * answer[key] for key in answer if key.endswith("_seconds")}

    monkeypatch.setattr(workers.Worker, "run", slowed)
    if slow == "sdpa":
        lines = prefill.compare(str(folder), [peer], prompt_tokens=[8], rounds=1, decode_tokens=1)
        assert [line["settings"] for line in lines if line["engine"] == "transformers"] == [{"attention": fast}]
    else:
        plan = prefill.Plan([8], 1, 1, 0, False, None, print)
        assert prefill.fastest_settings(peer, "float32", plan) == {"attention": fast}


def test_an_engine_may_refuse_a_setting(monkeypatch):
    """Then another is taken; that all are refused is an error."""

    class Engine:
        def __init__(self, settings):
            self.settings = settings

        def run(self, **command):
            if self.settings["cache"] != "bf16":
                raise workers.EngineError("no such cache on this processor")
            return {"prefill_seconds": 1.0}

        def close(self):
            pass

    monkeypatch.setattr(prefill, "start_worker", lambda peer, settings, plan: Engine(settings))
    plan = prefill.Plan([8], 1, 1, 0, False, None, print)
    peer = prefill.Peer("engine", "model", [{"cache": "f32"}, {"cache": "bf16"}])
    assert prefill.fastest_settings(peer, "bfloat16", plan) == {"cache": "bf16"}
    with pytest.raises(workers.EngineError, match="no such cache"):
        prefill.fastest_settings(prefill.Peer("engine", "model", 2 * [{"cache": "f32"}]), "bfloat16", plan)


def test_a_low_share_of_the_machine_is_said(folder, capsys):
    lines = prefill.compare(str(folder), [], prompt_tokens=[8], rounds=1, decode_tokens=1)
    for share, said in ((0.59, True), (0.61, False)):
        prefill.show([line | {"gemm_share": share} for line in lines], prefill.Console())
        assert ("warning: 8 tokens at full depth reach" in capsys.readouterr().out) == said


def test_attached_lines(folder):
    command = [sys.executable, str(ROOT / "bench" / "attach.py"), str(folder), "--rounds", "2", "--prompt-tokens", "9"]
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = json.loads(result.stdout)
    keys = [(line["attached"], line["prefill_depth"], line["prompt_tokens"]) for line in lines]
    assert keys == [(False, 4, 9), (True, 3, 9), (True, 2, 9)]
    assert lines[0]["relative"] == 1 and all(line["tokens_per_second"] > 0 for line in lines)
    result = subprocess.run([*command, "--shares", "0.5"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "POP, 2 layers" in result.stdout and "plain, 4 layers" in result.stdout


# As torch sees a processor whose instructions end with AVX2.
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def test_yardstick_without_bf16_instructions(folder):
    """It multiplies in float32 there: in bfloat16 it would take minutes."""
    worker = workers.Worker("machine", str(folder), {}, sys.executable, AVX2)
    try:
        answer = worker.run()
    finally:
        worker.close()
    assert answer["dtype"] == "float32"
    assert 2048**3 / answer["multiplications_per_second"] < 60


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


BUSY = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
sys.path.insert(0, sys.argv[1])
from bench.workers import Worker
worker = Worker("transformers", sys.argv[2], {}, sys.executable, {})
print(worker.process.pid, flush=True)
worker.run(prompt_tokens=4, decode_tokens=10**8)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_benchmark_leaves_no_worker(folder, number):
    command = [sys.executable, "-c", BUSY, str(ROOT), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            worker = int(process.stdout.readline())
            time.sleep(0.5)
            assert running(worker)
            process.send_signal(number)
            assert process.wait(20) != 0
        finally:
            process.kill()
    end = time.monotonic() + 20
    while running(worker) and time.monotonic() < end:
        time.sleep(0.05)
    left = running(worker)
    if left:
        os.kill(worker, signal.SIGKILL)
    assert not left


STEP = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import gpu
_, _, started, report = sys.argv
command = ["sh", "-c", "echo $$ >$0.new; mv $0.new $0; sleep 600", started]
gpu.PARTS["tests"] = lambda part: part.run("wait", command)
sys.argv[1:] = ["--rehearse", "--output", report, "tests"]
gpu.main()
"""


def test_stopped_gpu_run_leaves_no_step(tmp_path):
    started = tmp_path / "pid"
    command = [sys.executable, "-c", STEP, str(ROOT / "bench"), str(started), str(tmp_path / "gpu.json")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 60
            while not started.exists() and time.monotonic() < end:
                time.sleep(0.05)
            step = int(started.read_text())
            assert running(step)
            process.terminate()
            assert process.wait(20) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert not running(step)


def test_worker_failures_name_their_cause(folder):
    worker = workers.Worker("transformers", str(folder), {}, sys.executable, {})
    try:
        with pytest.raises(workers.EngineError, match=r"transformers: TypeError.*prompts"):
            worker.run(prompts=3)
        assert worker.run(prompt_tokens=4, decode_tokens=1)["prefill_seconds"] > 0
    finally:
        worker.close()
    worker = workers.Worker("transformers", str(folder / "absent"), {}, sys.executable, {})
    try:
        with pytest.raises(workers.EngineError, match="absent"):
            worker.run(prompt_tokens=4, decode_tokens=1)
    finally:
        worker.close()
    worker = workers.Worker("nothing", str(folder), {}, sys.executable, {})
    try:
        with pytest.raises(workers.EngineError, match="nothing"):
            worker.run(prompt_tokens=4, decode_tokens=1)
    finally:
        worker.close()


def test_depth(folder):
    command = [sys.executable, str(ROOT / "bench" / "depth.py"), str(folder), "--json", "--rounds", "2"]
    result = subprocess.run([*command, "--prompt-tokens", "8", "33"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # quiet in a pipe
    lines = json.loads(result.stdout)
    assert [(line["prompt_tokens"], line["prefill_depth"]) for line in lines] == [
        (tokens, depth) for tokens in (8, 33) for depth in (4, 3, 2, 1)
    ]
    for line in lines:
        fast, slow = line["seconds_range"]
        assert fast <= line["seconds"] <= slow
        assert set(line["stages_seconds"]) == {"truncated_prefill", "selection", "projection", "boundary"}
        assert 0 < sum(line["stages_seconds"].values()) < 2 * slow
        assert line["relative"] > 0 and line["gemm_share"] > 0
    predicted = [line["predicted_relative"] for line in lines[4:]]
    assert predicted[0] == predicted[1] == 1 < predicted[2] < predicted[3]  # a depth of 4 counts as 3


# What runs on a GPU, rehearsed.


def test_gpu_rehearsal(run_kernel, tmp_path):
    """Every step of every part, on the emulator and the double; compute-sanitizer's place is taken by a stand-in."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\n[ "$1 $3 $4" = "--tool --error-exitcode 9" ] || exit 2\nshift 4\nexec "$@"\n')
    tool.chmod(0o755)
    report = tmp_path / "gpu.json"
    environment = os.environ | {"PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--rehearse", "--output", str(report)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    parts = json.loads(report.read_text())
    steps = {name: [step["step"] for step in part["steps"]] for name, part in parts.items()}
    assert steps == {
        "tests": ["operations", "runner"],
        "sanitizer": ["memcheck", "racecheck", "initcheck", "synccheck"],
        "kernels": ["cuBLAS and FlashAttention", "configure", "build", *KERNELS],
        "end-to-end": ["model", "pop", "transformers", "transformers-compiled", "vllm"],
    }
    assert all(part["rehearsal"] and part["device"] == "PTX emulator" for part in parts.values())
    rows = [row for step in parts["end-to-end"]["steps"] for row in step.get("rows", ())]
    engines = [f"POP, {depth} layers" for depth in (6, 4, 3)]
    assert {(row["engine"], row["tokens"]) for row in rows} == {
        (engine, tokens) for tokens in (24, 70) for engine in (*engines, "transformers", "transformers, compiled")
    }
    assert all(row["prefill"] > 0 and row["decode"] > 0 for row in rows)
    beside = parts["kernels"]["steps"][0]["rows"]
    assert {row["operation"] for row in beside} == {"linear", "attention"}
    assert all(row["difference"] < 0.01 and row["seconds"] > 0 < row["torch_seconds"] for row in beside)
    assert all(step["report"]["lines"] for step in parts["kernels"]["steps"][3:])
    assert "| POP, 4 layers | 70 |" in result.stdout and "| attention | 24 |" in result.stdout


def test_a_part_keeps_its_time(tmp_path, monkeypatch):
    """A step is ended with what it started, later ones are left out, and what was measured is written."""
    import gpu

    monkeypatch.setitem(gpu.LIMITS, "kernels", 4)  # of a rehearsal four times that
    report = {}
    part = gpu.Part("kernels", report, tmp_path / "gpu.json", rehearse=True)
    assert part.run("quick", ["echo", '{"tokens": 1}'], json_lines=True)
    assert not part.run("failing", ["sh", "-c", "echo broken >&2; exit 1"])
    assert not part.run("slow", ["sh", "-c", "sleep 60; true"])
    assert not part.run("late", ["true"])
    steps = json.loads((tmp_path / "gpu.json").read_text())["kernels"]["steps"]
    assert [step["step"] for step in steps] == ["quick", "failing", "slow", "late"]
    assert steps[0]["status"] == "passed" and steps[0]["rows"] == [{"tokens": 1}]
    assert steps[1]["status"] == 1 and steps[1]["end"] == ["broken"]
    assert "stopped after" in steps[2]["status"] and "left out" in steps[3]["status"]
    assert sum(gpu.LIMITS.values()) - 4 + 240 <= 25 * 60 and max(gpu.LIMITS.values()) <= 600


def test_gpu_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("the device is another one already")
    for arguments, message in (
        ([], "torch finds no GPU; --rehearse needs none"),
        (["speed"], "PART is 'speed', expected"),
    ):
        command = [sys.executable, str(ROOT / "bench" / "gpu.py"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 2 and message in result.stderr


# The kernels' microbenchmark programs, on the PTX emulator.

KERNELS = "rms_norm", "linear", "gated_linear", "qkv_project", "attention", "project_kv"


@pytest.fixture(scope="module")
def run_kernel():
    """Runs one of the programs, which are built with what pip built, and returns the finished process."""
    import ptx_emulator

    try:
        device = ptx_emulator.library_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    build = ROOT / "build" / "cmake"
    if not (build / "build.ninja").exists():
        pytest.skip(f"{build} is not there: pip was run without POP_BUILD_DIR={build}")
    if "bench_kernels:" not in (build / "build.ninja").read_text():
        pytest.skip("the build has no CUDA kernels: nvcc or the package nvidia-cutlass was missing")
    tools = os.environ | {"PATH": sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]}
    tools.pop("LD_PRELOAD", None)
    subprocess.run(["cmake", "--build", build, "--target", "bench_kernels"], check=True, env=tools)

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"LD_LIBRARY_PATH": str(device)}
        command = [build / "bench" / name, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.parametrize("name", KERNELS)
def test_kernels(run_kernel, name):
    result = run_kernel(
        name, "--json", "--model", "SmolLM2-135M", "Gemma-3-4B", "--tokens", "3", "70", "--context", "99"
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["software"] and "PTX emulator" in report["device"]
    lines = report["lines"]
    assert {(line["model"], line["tokens"]) for line in lines} == {
        (model, tokens) for model in ("SmolLM2-135M", "Gemma-3-4B") for tokens in (3, 70)
    }
    for line in lines:
        assert line["operation"] == name
        assert 0 < line["error"] <= 1
        assert line["warp_instructions"] > line["compulsory_mma"] + line["compulsory_accesses"] > 0
        assert "seconds" not in line  # times there mean nothing
    expected = {
        "rms_norm": (0, 2 * 2 * 3 * 576 + 4 * 576),
        "linear": (2 * 3 * 576 * 6 * 64, 2 * (3 * 6 * 64 + 576 * 6 * 64 + 2 * 3 * 576)),
        "gated_linear": (2 * 3 * 2 * 1536 * 576, 2 * (3 * 576 + 2 * 1536 * 576 + 3 * 1536)),
        "qkv_project": (2 * 3 * 10 * 64 * 576, 2 * (3 * 576 + 10 * 64 * 576 + 3 * 10 * 64) + 4 * 3 * 64 + 8 * 3),
        "attention": (4 * 3 * 6 * 64 * 99, 2 * (2 * 3 * 6 * 64 + 2 * 3 * 99 * 2 * 64)),
        "project_kv": (2 * 3 * 8 * 64 * 576, 2 * (3 * 576 + 8 * 64 * 576 + 3 * 8 * 64) + 4 * 3 * 64 + 8 * 3),
    }
    assert (lines[0]["operations"], lines[0]["bytes"]) == expected[name]


def test_kernels_with_times(run_kernel):
    """The part that takes times on a GPU: rotation, capture, events, ceilings."""
    result = run_kernel("linear", "--json", "--time", "--model", "SmolLM2-135M", "--tokens", "70")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["gemm_by"] == "linear"
    for line in report["lines"]:
        assert 0 < line["seconds_p10"] <= line["seconds"] <= line["seconds_p90"]
        assert line["operations_per_second"] == pytest.approx(line["operations"] / line["seconds"])
        rates = {"gemm": line["operations"] / report["gemm_operations_per_second"]}
        rates["copy"] = line["bytes"] / report["copy_bytes_per_second"]
        assert line["limited_by"] == max(rates, key=rates.get)
        assert line["limit_share"] == pytest.approx(max(rates.values()) / line["seconds"])


def test_kernels_refuse(run_kernel):
    for arguments, message in [
        (["--model", "GPT"], "--model takes Llama-3.1-8B, Qwen3-VL-8B, Gemma-3-4B, SmolLM2-135M, not GPT"),
        (["--tokens", "0"], "--tokens takes numbers from 1 to 1048576, not 0"),
        (["--tokens", "--json"], "--tokens needs a value"),
        (["--context", "7x"], "--context takes numbers from 1 to 1048576, not 7x"),
        (["--speed"], "unknown argument --speed"),
    ]:
        result = run_kernel("linear", *arguments)
        assert result.returncode == 1 and result.stdout == ""
        assert result.stderr.startswith(f"error: {message}")
