"""What the plugin refuses, what it leaves alone, its parts, and the real server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress

import numpy as np
import pytest
import torch
import vllm
from engines import engine, generate, runner, text_ids, tiny_folder
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

from pop_ext.checkpoints.fingerprint import checkpoint_fingerprint
from pop_ext.integrations.vllm.settings import Settings
from pop_ext.integrations.vllm.steps import split


def config_of(folder, pop, **options):
    additional = {} if pop is None else {"pop": pop}
    args = EngineArgs(str(folder), skip_tokenizer_init=True, dtype="float32", additional_config=additional, **options)
    return args.create_engine_config()


def test_config(heads8):
    config = config_of(heads8, {"prefill_depth": 4})
    assert config.model_config.hf_config.architectures == ["PopLlamaForCausalLM"]
    plain = config_of(heads8, None)
    assert plain.model_config.hf_config.architectures == ["LlamaForCausalLM"]
    assert plain.scheduler_config.scheduler_cls is None and not plain.model_config.logits_processors


@pytest.mark.parametrize(
    "pop, options, message",
    [
        ({"prefill_depth": 7}, {}, "prefill_depth is 7, expected 1 to 6"),
        ({"prefill_depth": 0.0}, {}, "prefill_depth is 0.0"),
        ({"prefill_depth": True}, {}, "prefill_depth is True"),
        ({}, {}, "no prefill_depth"),
        ({"prefill_depth": 3, "depth": 3}, {}, "pop has 'depth'"),
        ({"prefill_depth": 3, "boundary_tokens": 0}, {}, "boundary_tokens is 0"),
        ({"prefill_depth": 3, "anchor_tokens": -1}, {}, "anchor_tokens is -1"),
        ({"prefill_depth": 3, "reuse_generated": 1}, {}, "reuse_generated is 1"),
        ({"prefill_depth": 3, "calibration": "/none"}, {}, "calibration is /none"),
        (3, {}, "pop is 3, expected a table"),
        ({"prefill_depth": 3}, {"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"prefill_depth": 3}, {"enable_lora": True}, "LoRA"),
        ({"prefill_depth": 3}, {"kv_cache_dtype": "fp8"}, "key/value cache of another dtype"),
        ({"prefill_depth": 3}, {"runner": "pooling"}, "expected one of LlamaForCausalLM|pooling"),
        ({"prefill_depth": 3}, {"scheduler_cls": "a.B"}, "scheduler class"),
        (
            {"prefill_depth": 3},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative decoding",
        ),
    ],
)
def test_refusals(heads8, pop, options, message):
    with pytest.raises(Exception, match=message):
        config_of(heads8, pop, **options)


def test_unknown_version(heads8, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    with pytest.raises(Exception, match=r"vLLM is 0.33.1, expected 0.32"):
        config_of(heads8, {"prefill_depth": 3})
    config_of(heads8, None)  # without POP it is none of our business


def test_unknown_architecture(tmp_path):
    from transformers import OPTConfig

    OPTConfig(num_hidden_layers=2, hidden_size=64, architectures=["OPTForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(Exception, match="architecture is OPTForCausalLM, expected one of LlamaForCausalLM"):
        config_of(tmp_path, {"prefill_depth": 1})


def test_calibration_of_another_model(heads8, calibrate, tmp_path):
    file = calibrate(heads8, [2, 3])
    other = tiny_folder("heads8", tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    for folder, depth, message in ((other, 3, "made for another model"), (heads8, 4, "calibration was made for 2, 3")):
        with (
            pytest.raises(ValueError, match=message),
            engine(folder, {"prefill_depth": depth, "calibration": str(file)}),
        ):
            pass


def test_prompt_logprobs_are_refused(heads8):
    from vllm import SamplingParams

    with engine(heads8, {"prefill_depth": 3}) as llm:
        with pytest.raises(VLLMValidationError, match="prompt_logprobs is set"):
            llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(prompt_logprobs=1), use_tqdm=False)
        assert generate(llm, [[1, 2, 3]])  # and the engine goes on


def test_vllm_is_left_as_it_is():
    """Registering assigns nothing in vLLM's modules and classes: what it adds lies in two registries."""
    code = """
import sys
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import llama, gemma3
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched import scheduler
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.worker import cpu_model_runner, gpu_model_runner
modules = [m for name, m in sorted(sys.modules.items()) if name == "vllm" or name.startswith("vllm.")]
def state():
    found = {}
    for m in modules:
        for name, value in vars(m).items():
            found[m.__name__, name] = id(value)
            if isinstance(value, type) and value.__module__.startswith("vllm"):
                for key, entry in vars(value).items():
                    if callable(entry) or isinstance(entry, (classmethod, staticmethod, property)):
                        found[value.__module__, value.__qualname__, key] = id(entry)
    return found
before = state()
from pop_ext.integrations.vllm import register
register()
import pop_ext.integrations.vllm.engine as e
assert e.PopLlamaForCausalLM.__mro__[2] is llama.LlamaForCausalLM
changed = [key for key, value in state().items() if before.get(key, value) != value]
assert not changed, changed
print("unchanged", len(before))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0 and int(out.stdout.split()[-1]) > 1000, out.stderr[-2000:]


@pytest.mark.parametrize("seed", range(20))
def test_split(seed):
    """Against the rule, token by token."""
    rng = np.random.default_rng(seed)
    count, anchors, boundary = int(rng.integers(1, 6)), int(rng.integers(0, 4)), int(rng.integers(1, 5))
    starts, lengths = rng.integers(0, 12, count), rng.integers(1, 9, count)
    prompts = rng.integers(1, 25, count)
    query_starts = np.concatenate([[0], np.cumsum(lengths)])
    deep, row = [], 0
    for start, length, prompt in zip(starts, lengths, prompts, strict=True):
        for position in range(start, start + length):
            if position < anchors or position >= prompt - boundary:
                deep.append((row, position))
            row += 1
    runs = split(query_starts, starts + lengths, prompts, anchors, boundary)
    if runs is None:
        assert len(deep) == row
        return
    assert runs.deep.tolist() == [row for row, _ in deep]
    assert sorted([*runs.deep, *runs.shallow]) == list(range(row))
    positions = [p for start, end in zip(runs.start, runs.end, strict=True) for p in range(start, end)]
    assert positions == [position for _, position in deep]
    assert runs.query_starts[-1] == len(deep) and (runs.lengths > 0).all()
    assert np.bincount(runs.request, minlength=count).max() <= 2


def test_fingerprint_of_files(heads8, smollm2, tmp_path):
    for folder in (heads8, smollm2, *(tiny_folder(name, tmp_path) for name in ("qwen2", "qwen3", "gemma3"))):
        assert checkpoint_fingerprint(folder) == runner(folder, 1).fingerprint()


def test_identity():
    one = Settings(3)
    assert one.identity(6) == Settings(0.5).identity(6)
    others = [Settings(4), Settings(3, 2), Settings(3, 1, 0), Settings(3, calibration=__file__)]
    assert len({setting.identity(6) for setting in [one, *others]}) == 5


def test_server(smollm2, tmp_path):
    """The server with the additional config and nothing else of POP; a streamed completion over HTTP."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2), "--host", "127.0.0.1",
        "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--kv-cache-memory-bytes", str(64 << 20),
        "--served-model-name", "m", "--additional-config", json.dumps({"pop": {"prefill_depth": 20}}),
    ]  # fmt: skip
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"

    def post(**body):
        data = json.dumps({"model": "m", "temperature": 0, **body}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=120)

    try:
        deadline = time.monotonic() + 240
        while True:
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        prompt = text_ids(smollm2)[:150]
        with post(prompt=prompt, max_tokens=12, stream=True, ignore_eos=True) as response:
            lines = [line.decode()[6:] for line in response if line.startswith(b"data: ")]
        assert lines[-1].strip() == "[DONE]" and len(lines) > 6
        text = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
        model = runner(smollm2, 20)
        assert text == model.generate([prompt], max_new_tokens=12, min_new_tokens=12).text[0]
        with pytest.raises(urllib.error.HTTPError, match="400"):
            post(prompt=prompt, max_tokens=1, prompt_logprobs=1)
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(60)
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
    said = re.findall(r"POP: prompts run through 20 of 30 layers.*own weights", (tmp_path / "log").read_text())
    assert len(said) == 1


def test_bfloat16(smollm2):
    """In bfloat16 vLLM is no further from the runner than at full depth, where both are plain: KL of the next token's
    distribution, over the 20 likeliest, at most 1.5 times that.
    """
    import pop_ext

    # Of few tokens one alone decides: by 8 the ratio was 0.8 and 2.1, by 32 it was 1.2 and 1.7; by 64 prompts' six each
    # 1.22 and 1.28 on two texts, the first with a bootstrap interval (95%) of 1.04 to 1.45.
    prompts = [text_ids(smollm2)[start : start + 128] for start in range(0, 64 * 128, 128)]
    found = {}
    for depth in (30, 20):
        model = pop_ext.load(smollm2, prefill_depth=depth, dtype=torch.bfloat16)
        with engine(smollm2, {"prefill_depth": depth}, dtype="bfloat16") as llm:
            outputs = generate(llm, prompts, count=6)
        divergences = []
        for output, prompt in zip(outputs, prompts, strict=True):
            tokens = list(output.outputs[0].token_ids)
            rows = model.logits([prompt], [tokens])[0].log_softmax(-1)
            for reported, row in zip(output.outputs[0].logprobs, rows, strict=True):
                p = torch.tensor([entry.logprob for entry in reported.values()]).double()
                q = row[list(reported)].double()
                p, q = p - p.logsumexp(0), q - q.logsumexp(0)
                divergences.append(float((p.exp() * (p - q)).sum()))
        found[depth] = sum(divergences) / len(divergences)
    assert found[20] <= 1.5 * found[30] and found[30] < 1e-2, found
