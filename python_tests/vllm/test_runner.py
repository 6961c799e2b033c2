"""Tokens and log-probabilities of vLLM with POP, in float32, are those of `pop_ext`'s runner."""

from __future__ import annotations

import pytest
from engines import (
    TOLERANCE,
    assert_equal,
    differences,
    engine,
    generate,
    metric,
    runner,
    sampling,
    text_ids,
    tiny_folder,
    tokens,
)


def prompts_of(folder, lengths):
    ids, prompts, start = text_ids(folder), [], 0
    for length in lengths:
        prompts.append(ids[start : start + length])
        start += length
    return prompts


def check(llm, folder, model, lengths):
    """Cold, then from the prefix cache, then with prompts that share a part, then a second turn."""
    prompts = prompts_of(folder, lengths)
    cold = generate(llm, prompts)
    assert_equal(cold, model)
    warm = generate(llm, prompts)
    assert max(output.num_cached_tokens for output in warm) >= 32
    assert_equal(warm, model)
    longest = max(prompts, key=len)
    turn = longest + tokens(cold)[prompts.index(longest)] + prompts[-1][:40]
    mixed = generate(llm, [longest[: len(longest) // 2], longest[:-20] + prompts[0], turn])
    assert mixed[1].num_cached_tokens >= 32
    assert_equal(mixed, model)


@pytest.mark.parametrize(
    "depth, calibrated, chunk, block",
    [(30, False, 2048, 128), (20, False, 67, 32), (15, True, 67, 128), (20, True, 2048, 32), (15, False, 2048, 32)],
)
def test_smollm2(smollm2, calibrate, depth, calibrated, chunk, block):
    file = calibrate(smollm2, [15, 20]) if calibrated else None
    pop = {"prefill_depth": depth} | ({"calibration": str(file)} if calibrated else {})
    with engine(smollm2, pop, max_num_batched_tokens=chunk, block_size=block) as llm:
        check(llm, smollm2, runner(smollm2, depth, file), [1, 33, 67, 160])


@pytest.mark.parametrize(
    "depth, calibrated, chunk, block, boundary, anchors",
    [
        (4, False, 2048, 128, 1, 1),
        (3, False, 67, 128, 40, 0),
        (3, True, 67, 32, 3, 5),
        (2, True, 2048, 128, 1, 0),
    ],
)
def test_heads8(heads8, calibrate, depth, calibrated, chunk, block, boundary, anchors):
    file = calibrate(heads8, [2, 3]) if calibrated else None
    pop = {"prefill_depth": depth, "boundary_tokens": boundary, "anchor_tokens": anchors}
    if calibrated:
        pop["calibration"] = str(file)
    model = runner(heads8, depth, file)
    model.boundary_tokens, model.anchor_tokens = boundary, anchors
    try:
        with engine(heads8, pop, max_num_batched_tokens=chunk, block_size=block) as llm:
            check(llm, heads8, model, [1, 2, 33, 67, 68, 135, 300, 64, 128])
    finally:
        model.boundary_tokens, model.anchor_tokens = 1, 1


# Of head sizes that vLLM has on the CPU.
FAMILIES = ["llama_untied_bias", "mistral", "qwen2", "qwen3", "gemma3", "gemma3_gqa"]
CALIBRATED = ["llama_untied_bias", "mistral", "qwen3", "gemma3_gqa"]  # bias, windows, K-norms, two RoPEs


@pytest.mark.parametrize(
    "name, calibrated", [*((name, False) for name in FAMILIES), *((name, True) for name in CALIBRATED)]
)
def test_families(name, calibrated, tmp_path, calibrate):
    folder = tiny_folder(name, tmp_path)
    file = calibrate(folder, [3]) if calibrated else None
    pop = {"prefill_depth": 3} | ({"calibration": str(file)} if calibrated else {})
    with engine(folder, pop, max_num_batched_tokens=67, block_size=32) as llm:
        check(llm, folder, runner(folder, 3, file), [1, 2, 40, 67, 140])


def test_full_depth_is_plain_vllm(heads8):
    prompts = prompts_of(heads8, [1, 2, 40, 67, 140])
    with engine(heads8, None) as llm:
        plain = generate(llm, prompts)
    assert_equal(plain, runner(heads8, 6))
    with engine(heads8, {"prefill_depth": 1.0}, max_num_batched_tokens=67, block_size=32) as llm:
        assert tokens(generate(llm, prompts)) == tokens(plain)
        llm.reset_prefix_cache()
        check(llm, heads8, runner(heads8, 6), [1, 2, 33, 67, 68, 135, 300, 64, 128])


def test_staggered_arrivals(heads8, calibrate):
    """A request arrives at every second step, while others are in the middle of their prompts or decode."""
    file = calibrate(heads8, [2, 3])
    prompts = prompts_of(heads8, [150, 20, 90, 1, 200, 67, 130])
    pop = {"prefill_depth": 3, "calibration": str(file)}
    with engine(heads8, pop, max_num_batched_tokens=40, block_size=32) as llm:
        vllm_engine, waiting, finished, step = llm.llm_engine, list(enumerate(prompts)), [], 0
        while waiting or vllm_engine.has_unfinished_requests():
            if waiting and step % 2 == 0:
                index, prompt = waiting.pop(0)
                vllm_engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling(12))
            finished += [output for output in vllm_engine.step() if output.finished]
            step += 1
    assert len(finished) == len(prompts)
    assert_equal(finished, runner(heads8, 3, file))


def test_preemption(heads8, calibrate):
    """More tokens than the cache holds: a request is thrown out in the middle of decoding and computed again."""
    file = calibrate(heads8, [2, 3])
    pop = {"prefill_depth": 3, "calibration": str(file)}
    block = 6 * 2 * 4 * 32 * 32 * 4  # bytes: layers, keys and values, heads, head size, tokens, float32
    prompts = prompts_of(heads8, [60, 61, 62, 63])
    with engine(heads8, pop, block_size=32, kv_cache_memory_bytes=12 * block, max_model_len=256) as llm:
        outputs = generate(llm, prompts, count=60)
        assert metric(llm, "vllm:num_preemptions") > 0
    assert_equal(outputs, runner(heads8, 3, file))


def test_prefix_cache_knows_generated_tokens(heads8):
    """What a block holds depends on whether its tokens were prompt or generated. With the stock hash, which is that of
    `reuse_generated`, a second turn finds the first one's generated tokens and differs.
    """
    model, (prompt,) = runner(heads8, 2), prompts_of(heads8, [120])
    found = {}
    for reuse in (False, True):
        with engine(heads8, {"prefill_depth": 2, "reuse_generated": reuse}, block_size=32) as llm:
            (first,) = generate(llm, [prompt], count=48)
            turn = prompt + tokens([first])[0] + text_ids(heads8)[500:540]
            outputs = generate(llm, [turn])
            found[reuse] = differences(outputs, model, greedy=not reuse)[0], outputs[0].num_cached_tokens
    assert found[False][0] < TOLERANCE and found[False][1] == 96
    assert found[True][0] > 10 * TOLERANCE and found[True][1] == 160


def test_compiled(heads8):
    with engine(heads8, {"prefill_depth": 3}, enforce_eager=False, max_num_batched_tokens=67, block_size=32) as llm:
        check(llm, heads8, runner(heads8, 3), [1, 2, 33, 67, 135, 300])


def test_tensor_parallel(heads8, calibrate):
    file = calibrate(heads8, [2, 3])
    prompts = prompts_of(heads8, [1, 33, 67, 135, 300])
    pop = {"prefill_depth": 3, "calibration": str(file)}
    with engine(heads8, pop, tensor_parallel_size=2, max_num_batched_tokens=67, block_size=32) as llm:
        two = generate(llm, prompts)
    assert_equal(two, runner(heads8, 3, file))
    with engine(heads8, pop, max_num_batched_tokens=67, block_size=32) as llm:
        assert tokens(generate(llm, prompts)) == tokens(two)
