"""The runner on a device: on a double (device_double.py), or with POP_TEST_DEVICE=cuda on a GPU, against the CPU.

On the double every operation runs its CUDA kernel on the PTX emulator, mixing devices raises, and each copy and wait
is counted by file and line.
"""

from __future__ import annotations

import os

import pytest
import torch
from helpers import COMMON, TINY, Tiny, cuda_operations, normwise, real_model
from test_cuda_model import NEAR_TIE, SIZES
from test_decode_ops import distribution
from test_real_models import text_ids

import pop_ext
from pop_ext import ops
from pop_ext.runtime import decoding
from pop_ext.runtime import device as devices

DEVICE = os.environ.get("POP_TEST_DEVICE", "gpudouble")
on_the_double = pytest.mark.skipif(DEVICE != "gpudouble", reason="counts and refusals are the double's")
CACHE = 2048  # tokens


def bound(layers: int) -> float:
    """How far bfloat16 may take the logits, normwise: about eight roundings a layer, and two for norm and logits, each
    of 2^-8 at most; errors of either sign add up as the root of their number.
    """
    return 2**-8 * (8 * layers + 2) ** 0.5


@pytest.fixture(scope="module", autouse=True)
def double():
    """The double beside CUDA among the devices with kernels."""
    if DEVICE != "gpudouble":
        return (yield None)
    cuda_operations()  # skips where there are none
    if torch.cuda.is_available():
        pytest.skip("on a machine with a GPU: POP_TEST_DEVICE=cuda")
    import device_double

    devices.ACCELERATORS.add(device_double.NAME)
    yield device_double
    devices.ACCELERATORS.discard(device_double.NAME)


@pytest.fixture
def log(double):
    """What the double counted since now."""
    double.log.clear()
    return double.log


_folders = {}


def tiny_folder(family: str, tmp_path_factory):
    if family not in _folders:
        tiny = TINY[family]
        folder = tmp_path_factory.mktemp("device") / family
        _folders[family] = Tiny(tiny.config, tiny.sizes | SIZES[family]).make(folder, seed=7)
    return _folders[family]


@pytest.fixture(params=list(SIZES))
def folder(request, tmp_path_factory):
    return tiny_folder(request.param, tmp_path_factory)


@pytest.fixture
def llama(tmp_path_factory):
    return tiny_folder("llama", tmp_path_factory)


def draw_prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, COMMON["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def load_both(folder, **settings):
    settings = {"max_cache_tokens": CACHE, **settings}
    return pop_ext.load(folder, device="cpu", **settings), pop_ext.load(folder, device=DEVICE, **settings)


def assert_same_tokens(cpu, ours: list[list[int]], prompts, depth=None) -> int:
    """Each token is the CPU's for the tokens before it, but where its two best logits are near a tie. Returns how many
    are not."""
    agreed = 0
    for prompt, tokens in zip(prompts, ours, strict=True):
        logits = cpu.logits([prompt], [tokens], prefill_depth=depth)[0]
        top = logits.topk(2).values
        clear = top[:, 0] - top[:, 1] > NEAR_TIE * logits.std(dim=-1)
        assert torch.equal(logits.argmax(-1)[clear], torch.tensor(tokens)[clear])
        agreed += int(clear.sum())
    return agreed


# Tokens and logits


@pytest.mark.parametrize("depth", [3, 1.0])
def test_the_cpus_tokens(folder, depth):
    cpu, ours = load_both(folder, prefill_depth=depth)
    assert ours.device.type == torch.device(DEVICE).type
    prompts = draw_prompts(3, 90, 40)
    tokens = ours.generate(prompts, max_new_tokens=8, do_sample=False).tokens
    assert assert_same_tokens(cpu, tokens, prompts) > 12
    logits = [model.prefill([model.new_sequence() for _ in prompts], prompts)[0].cpu() for model in (cpu, ours)]
    assert normwise(logits[1], logits[0]) <= 2 * bound(cpu.spec.num_layers)


def test_chunks_and_turns(folder):
    """A second turn, and prompts cut into passes, have the logits of the CPU's."""
    cpu, ours = load_both(folder, prefill_depth=2, boundary_tokens=3)
    first, second, more = draw_prompts(70, 33, 80)
    for model in (cpu, ours):
        model.chunk_tokens = 37
    results = []
    for model in (cpu, ours):
        sequences = [model.new_sequence(), model.new_sequence()]
        model.prefill(sequences, [first, second])
        model.decode(sequences, [5, 6])
        results.append(torch.cat([model.prefill(sequences, [more, second])[0], model.decode(sequences, [7, 8])]).cpu())
    assert normwise(results[1], results[0]) <= 2 * bound(cpu.spec.num_layers)


def test_float16(llama):
    cpu = pop_ext.load(llama, device="cpu", dtype=torch.float32, prefill_depth=3)
    ours = pop_ext.load(llama, device=DEVICE, dtype=torch.float16, prefill_depth=3, max_cache_tokens=CACHE)
    prompts = draw_prompts(50, 9)
    logits = [model.prefill([model.new_sequence() for _ in prompts], prompts)[0].cpu() for model in (cpu, ours)]
    assert normwise(logits[1], logits[0]) <= bound(cpu.spec.num_layers) / 4


def test_projections_are_kept_from_the_depth_asked_for(llama):
    """And made for a smaller one that a call asks for."""
    cpu, ours = load_both(llama, prefill_depth=4)
    assert len(ours.weights.projection) == 2 < len(cpu.weights.projection) == 6
    prompts = draw_prompts(60)
    logits = [m.prefill([m.new_sequence()], prompts, prefill_depth=2)[0].cpu() for m in (cpu, ours)]
    assert normwise(logits[1], logits[0]) <= 2 * bound(6)
    kept, all_of_it = ours.weights.projection.cpu(), cpu.weights.projection[2:]
    assert torch.equal(kept[2:], all_of_it[2:])
    assert normwise(kept[:2], all_of_it[:2]) <= 2**-8  # from the weights in bfloat16: rounded twice


# Copies and waits


@on_the_double
@pytest.mark.parametrize("depth", [3, 1.0])
def test_a_forward_pass_is_one_copy(folder, log, depth):
    """Of a prefill in one pass and in four, and of a decode step; nothing waits, and nothing comes back."""
    model = pop_ext.load(folder, device=DEVICE, prefill_depth=depth, max_cache_tokens=CACHE)
    for chunk, passes in ((2048, 1), (37, 4)):
        model.chunk_tokens = chunk
        sequences = [model.new_sequence() for _ in range(3)]
        log.clear()
        _, times = model.prefill(sequences, draw_prompts(3, 90, 40))
        assert [(e.kind, e.where.partition(":")[0]) for e in log] == [("to device", "runtime/device.py")] * passes
        log.clear()
        model.decode(sequences, [1, 2, 3])
        assert [e.kind for e in log] == ["to device"]
        assert times.total > 0  # reading times waits
        assert log.count("wait") == 1


@on_the_double
def test_an_index_left_on_the_cpu_raises(llama, monkeypatch):
    """Planted: the deep rows are gathered by an index on the host."""
    model = pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=CACHE)
    upload = devices.to_device

    def leaves_one(tensors, device):
        return upload(tensors, device) | {"deep": tensors["deep"]}

    monkeypatch.setattr("pop_ext.runtime.model.to_device", leaves_one)
    with pytest.raises(RuntimeError, match=r"index.* at runtime/model.py:\d+ mixes devices: .*torch.int64 on cpu"):
        model.prefill([model.new_sequence()], draw_prompts(40))


# Decoding: one replay a step


@pytest.fixture
def small_buckets(monkeypatch):
    """Context buckets from 64 tokens on, and an upload at least every 5 steps."""
    monkeypatch.setattr(decoding, "LEAST_CONTEXT", 64)
    monkeypatch.setattr(decoding, "HORIZON", 5)


def generate(model, prompts, graphs=True, **settings):
    model.cuda_graphs, model.decode_buffers = graphs, {}
    return model.generate(prompts, **{"do_sample": False, "max_new_tokens": 8, **settings})


@on_the_double
def test_a_decode_step_is_one_copy_to_the_host(folder, log):
    """And one wait, for the tokens of the step before; to the device one copy for all steps, as no row ends early."""
    model = pop_ext.load(folder, device=DEVICE, prefill_depth=3, max_cache_tokens=CACHE)
    prompts = draw_prompts(3, 90, 40)
    log.clear()
    generate(model, prompts, max_new_tokens=12)
    assert {entry.where.partition(":")[0] for entry in log if entry.kind == "to host"} <= {
        "runtime/decoding.py", "runtime/sampling.py"}  # fmt: skip
    loop = [entry for entry in log if not entry.where.startswith("runtime/sampling.py")]  # before prefill: its ids
    assert sum(e.kind == "to host" for e in loop) == 12
    assert [e.what for e in loop if e.kind == "wait"] == ["event"] * 13  # and one for the stages' times
    assert sum(e.kind == "to device" for e in loop) == 2  # prefill, and the state of the decode batch


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9])
def test_replay_is_eager(llama, small_buckets, rows):
    """In every batch bucket, padded or full, across the edge of a context bucket: the same tokens and logprobs."""
    model = pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=CACHE)
    prompts = draw_prompts(*[58, 3, 61, 17, 40, 62, 1, 30, 5][:rows])
    eager = generate(model, prompts, graphs=False, return_logprobs=True, max_new_tokens=14)
    replayed = generate(model, prompts, return_logprobs=True, max_new_tokens=14)
    assert replayed.tokens == eager.tokens and replayed.logprobs == eager.logprobs
    (buffers,) = model.decode_buffers.values()
    assert buffers.rows == decoding.batch_bucket(rows) and {key[0] for key in buffers.steps} == {64, 128}
    assert all(step.graph is not None for step in buffers.steps.values())
    again = generate(model, prompts, return_logprobs=True, max_new_tokens=14)
    assert again.tokens == eager.tokens
    cpu = pop_ext.load(llama, device="cpu", prefill_depth=3)
    assert assert_same_tokens(cpu, replayed.tokens, prompts) > 7 * rows


def test_rows_that_end_early(folder, small_buckets):
    """By an end-of-sequence token and by length: the others go on as before, and the next turn is the CPU's."""
    cpu, ours = load_both(folder, prefill_depth=3)
    prompts = draw_prompts(30, 61, 7)
    whole = generate(ours, prompts, max_new_tokens=12).tokens
    ends = whole[1][4]
    output = generate(ours, prompts, max_new_tokens=12, eos_token_id=ends, pad_token_id=0, keep=True)
    for tokens, all_of_them in zip(output.tokens, whole, strict=True):
        length = all_of_them.index(ends) + 1 if ends in all_of_them else 12
        assert tokens == all_of_them[:length]
    assert [len(s.token_ids) - s.num_cached for s in output.sequences] == [1, 1, 1]
    turn = draw_prompts(9, 20, 4, seed=2)
    again = ours.generate(turn, sequences=output.sequences, max_new_tokens=4, do_sample=False, keep=True).tokens
    sequences = [cpu.new_sequence() for _ in prompts]
    for sequence, prompt, tokens, more, chosen in zip(sequences, prompts, output.tokens, turn, again, strict=True):
        cpu.prefill([sequence], [prompt])
        for token in tokens[:-1]:
            cpu.decode([sequence], [token])
        sequence.token_ids.append(tokens[-1])
        logits = cpu.prefill([sequence], [more])[0][0]
        top = logits.topk(2).values
        assert top[0] - top[1] <= NEAR_TIE * logits.std() or int(logits.argmax()) == chosen[0]
    assert all(len(s.blocks) == -(-len(s.token_ids) // 64) for s in output.sequences)


SAMPLED = [
    dict(),
    dict(temperature=0.7, top_k=20, top_p=0.9),
    dict(min_p=0.05, repetition_penalty=1.5),
    dict(do_sample=False, repetition_penalty=1.5),
    dict(min_new_tokens=3, eos_token_id=5, pad_token_id=0),  # a processor that only transformers has
    dict(no_repeat_ngram_size=2, do_sample=False),
]


@pytest.mark.parametrize("settings", SAMPLED, ids=lambda s: "-".join(s) or "plain")
def test_sampling_is_the_cpus(llama, small_buckets, settings):
    """Each token is where the CPU's running sum of probabilities passes the seed's next number, but for the little that
    bfloat16's order of sums moves it; on the device, captured or not, and after it transformers' own rules hold.
    """
    cpu, ours = load_both(llama, prefill_depth=3)
    prompts = draw_prompts(30, 61, 7, 20)
    arguments = {"do_sample": True, "top_k": 0, "max_new_tokens": 10, "seed": 3, **settings}
    replayed = generate(ours, prompts, **arguments).tokens
    assert replayed == generate(ours, prompts, graphs=False, **arguments).tokens
    if settings.get("min_new_tokens"):
        assert all(5 not in row[:2] for row in replayed)
    if not arguments["do_sample"] or settings.get("min_new_tokens"):
        return
    known = {key: value for key, value in settings.items() if key != "do_sample"}
    for i, (prompt, tokens) in enumerate(zip(prompts, replayed, strict=True)):
        numbers = torch.rand(10, generator=torch.Generator().manual_seed(3 + i), dtype=torch.float64)
        for k, logits in enumerate(cpu.logits([prompt], [tokens])[0]):
            sums = distribution(logits, torch.tensor(prompt + tokens[:k]), **known).cumsum(0)
            low, high = (torch.searchsorted(sums, numbers[k] * sums[-1] + e, right=True) for e in (-0.03, 0.03))
            assert low <= tokens[k] <= high


def test_processors_and_criteria_of_the_caller(llama):
    """Each row's own, on the device: of its ids and scores; criteria see what was read, no token more."""
    ours = pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=CACHE)
    prompts, seen = draw_prompts(30, 7), []

    def only_even(ids, scores):
        scores[:, 1::2] = float("-inf")
        return scores

    def stop(ids, scores):
        seen.append(ids.shape[1])
        return torch.tensor([ids.shape[1] == 12], device=ids.device)

    output = generate(ours, prompts, logits_processor=[only_even], stopping_criteria=[stop], max_new_tokens=9)
    assert all(token % 2 == 0 for row in output.tokens for token in row) and [*map(len, output.tokens)] == [9, 5]
    assert [n for n in seen if n <= 12] == [8, 9, 10, 11, 12]


def test_a_cache_without_room_for_the_step_too_many(llama):
    """The last token of a full cache is found to end its row, as on the CPU."""
    ours = pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=64)
    prompts = draw_prompts(60)
    whole = generate(pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=128), prompts).tokens[0]
    if whole[4] not in whole[:4]:
        assert generate(ours, prompts, eos_token_id=whole[4], pad_token_id=0).tokens[0] == whole[:5]
    with pytest.raises(pop_ext.CacheFullError):
        generate(ours, prompts)
    assert len(ours.cache.free_blocks) == 1


@on_the_double
def test_a_wait_in_the_loop_is_seen(llama, log, monkeypatch):
    """Planted: an .item() beside each step."""
    model = pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=CACHE)
    run = decoding.Step.run
    monkeypatch.setattr(decoding.Step, "run", lambda step: (run(step), step.buffers.tokens[0].item()))
    log.clear()
    generate(model, draw_prompts(20), max_new_tokens=5)
    assert sum(entry.what == "_local_scalar_dense" for entry in log) >= 4


@on_the_double
def test_a_stale_slot_in_a_replay_is_seen(llama, monkeypatch):
    """Planted: the replay writes where the step before did."""
    model = pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=CACHE)
    prompts = draw_prompts(20, 50)
    eager = generate(model, prompts, graphs=False, return_logprobs=True)
    run = decoding.Step.run

    def stale(step):
        if step.runs > 1:
            step.views["seqlens_k"].sub_(1)  # as if the step had not advanced
        run(step)

    monkeypatch.setattr(decoding.Step, "run", stale)
    assert generate(model, prompts, return_logprobs=True).logprobs != eager.logprobs


@on_the_double
def test_torch_in_a_capture_raises(llama, monkeypatch):
    model = pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=CACHE)
    head = type(model).head
    monkeypatch.setattr(type(model), "head", lambda self, hidden: head(self, hidden * 1))
    with pytest.raises(RuntimeError, match=r"mul.* at runtime/.* cannot be captured"):
        generate(model, draw_prompts(20))


# Bad input


def test_devices(llama):
    with pytest.raises(ValueError, match="device is 'tpu', expected 'auto', 'cpu', 'cuda'"):
        pop_ext.load(llama, device="tpu")
    with pytest.raises(ValueError, match="device is 'meta', expected"):
        pop_ext.load(llama, device="meta")
    with pytest.raises(ValueError, match=r"dtype is torch.float16, expected torch.float32 or torch.bfloat16 on cpu"):
        pop_ext.load(llama, device="cpu", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dtype is torch.float32, expected torch.bfloat16 or torch.float16 on "):
        pop_ext.load(llama, device=DEVICE, dtype=torch.float32)


@on_the_double
def test_cuda_that_is_not_there(llama, caplog):
    with pytest.raises(RuntimeError, match="device is 'cuda', but this torch is built without CUDA"):
        pop_ext.load(llama, device="cuda")
    with caplog.at_level("INFO", logger="pop_ext"):
        assert pop_ext.load(llama).device == torch.device("cpu")
    assert "running on cpu: this torch is built without CUDA" in caplog.text


@pytest.mark.parametrize(
    "version, count, capability, message",
    [
        ("12.8", 1, (9, 0), "this torch is built for CUDA 12.8, expected CUDA 13"),
        ("13.0", 1, (7, 5), "Card has compute capability 7.5, expected 8.0 or later"),
        ("13.0", 2, (9, 0), "this machine has 2 GPUs, cuda:0 to cuda:1"),
        ("13.0", None, None, r"torch finds no GPU that it can use \(The NVIDIA driver on your system is too old"),
    ],
)
def test_a_gpu_that_cannot_be_used(monkeypatch, llama, version, count, capability, message):
    def init():
        if count is None:
            raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nUpdate it.")

    monkeypatch.setattr(ops, "why_no_cuda", None)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    with pytest.raises(RuntimeError, match=f"device is 'cuda:2', but {message}" if count == 2 else f"but {message}"):
        pop_ext.load(llama, device="cuda:2" if count == 2 else "cuda:0")


@pytest.mark.parametrize("family, size", [("mistral", 80), ("qwen2", 96)])
def test_head_sizes_without_kernels(tmp_path, monkeypatch, family, size):
    """Refused before weights are read."""
    folder = TINY[family].make(tmp_path / family, seed=3)
    monkeypatch.setattr("pop_ext.runtime.layers.load_weights", None)
    with pytest.raises(ValueError, match=f"the model's head size is {size}, expected 32, 64, 128 or 256 on "):
        pop_ext.load(folder, device=DEVICE)


@on_the_double
def test_memory(llama, double, monkeypatch):
    """What is free decides the cache's size; too little is refused, with both figures, before weights are read."""
    gib = 1 << 30
    model = pop_ext.load(llama, device=DEVICE, prefill_depth=4, max_cache_tokens=64)
    tensors = {id(t): t for owner in (model.weights, *model.weights.layers) for t in vars(owner).values()
               if isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16}  # fmt: skip
    needed = devices.weight_bytes(model.spec, 2, 4)
    assert needed == sum(t.numel() * 2 for t in tensors.values())
    token = 2 * 6 * 3 * 32 * 2
    monkeypatch.setattr(type(double.module), "free_memory", needed + 100_000 * token)
    assert pop_ext.load(llama, device=DEVICE, prefill_depth=4).max_cache_tokens == 84992  # 85%, whole blocks
    monkeypatch.setattr("pop_ext.runtime.layers.load_weights", None)
    with pytest.raises(pop_ext.DeviceMemoryError, match=f"needs {(needed + 10**6 * token) / gib:.2f} GiB .* are free"):
        pop_ext.load(llama, device=DEVICE, prefill_depth=4, max_cache_tokens=10**6)
    monkeypatch.setattr(type(double.module), "free_memory", needed // 2)
    with pytest.raises(pop_ext.DeviceMemoryError, match=rf"but {needed / 2 / gib:.2f} GiB are free"):
        pop_ext.load(llama, device=DEVICE, prefill_depth=4)


def test_smollm2():
    """A real prompt, truncated: the CPU's tokens."""
    folder = real_model("smollm2-135m")
    cpu, ours = load_both(folder, prefill_depth=20)
    prompts = [text_ids(folder)[:96]]
    tokens = ours.generate(prompts, max_new_tokens=4, do_sample=False).tokens
    assert assert_same_tokens(cpu, tokens, prompts) >= 3
