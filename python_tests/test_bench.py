"""The comparison of engines: what its counts, its lines and its processes promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import prefill  # noqa: E402

from pop_ext.families import ModelSpec  # noqa: E402

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
    assert prefill.decode_bytes(spec) == 2 * parameters
    assert prefill.plain_multiplications(spec, 1) == parameters + 30 * 2 * 9 * 64
    for tokens, ratio in (512, 1.41), (2048, 1.42):
        plain, full, truncated = (
            prefill.plain_multiplications(spec, tokens),
            prefill.pop_multiplications(spec, tokens, 30),
            prefill.pop_multiplications(spec, tokens, 20),
        )
        assert plain > full == prefill.pop_multiplications(spec, tokens, 29)
        assert full / truncated == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("window", [0, 1, 5, 12, 99])
def test_visible_pairs(window):
    pairs = sum((j > i - window or not window) for i in range(12) for j in range(i + 1))
    assert prefill._visible(12, window) == pairs


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
    for line in lines:
        numbers = "tokens_per_second", "limit_share", "relative", "decode_tokens_per_second", "decode_bandwidth_share"
        assert all(line[key] > 0 for key in numbers)
        slow, fast = line["tokens_per_second_range"]
        assert slow <= line["tokens_per_second"] <= fast
        assert line["other_load"] >= 0
        assert line["decode_context_tokens"] == line["prompt_tokens"]
        assert ("predicted_relative" in line) == (line["engine"] == "pop")
    assert all(line["relative"] == 1 for line in lines if line["engine"] == "pop" and line["prefill_depth"] == 4)


def test_worker_failures_name_their_cause(folder):
    worker = prefill.Worker("transformers", str(folder), {}, sys.executable, {})
    try:
        with pytest.raises(prefill.EngineError, match=r"transformers: TypeError.*prompts"):
            worker.run(prompts=3)
        assert worker.run(prompt_tokens=4, decode_tokens=1)["prefill_seconds"] > 0
    finally:
        worker.close()
    worker = prefill.Worker("transformers", str(folder / "absent"), {}, sys.executable, {})
    try:
        with pytest.raises(prefill.EngineError, match="absent"):
            worker.run(prompt_tokens=4, decode_tokens=1)
    finally:
        worker.close()
    worker = prefill.Worker("nothing", str(folder), {}, sys.executable, {})
    try:
        with pytest.raises(prefill.EngineError, match="nothing"):
            worker.run(prompt_tokens=4, decode_tokens=1)
    finally:
        worker.close()
