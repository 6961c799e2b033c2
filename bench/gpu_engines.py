"""One engine's times on a GPU, in a process of its own: `python bench/gpu_engines.py ENGINE FOLDER DEVICE OPTIONS`.

OPTIONS is JSON: {"lengths": [prompt tokens], "decode": tokens, "depths": [of POP]}. Prints a JSON object a line for a
length: engine, tokens, seconds of a prefill and of a decoded token, medians of three after a warm-up. `make FOLDER
DEVICE SIZES` makes the random model instead. "operations" compares the kernels with torch's own: cuBLAS (torch.matmul)
and FlashAttention (torch's scaled_dot_product_attention).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 3


def install(device: str):
    """What a device's name needs: the double of the tests makes itself known."""
    if device == "gpudouble":
        sys.path[:0] = [str(ROOT / "python_tests"), str(ROOT / "tools" / "ptx-emulator")]
        import device_double

        return device_double.installed()
    from contextlib import nullcontext

    return nullcontext()


def make(folder: Path, device: str, sizes: dict) -> None:
    """A random Llama of `sizes`, in bfloat16."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.device("cuda" if device.startswith("cuda") else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def medians(measure) -> dict:
    measure()  # loads, compiles, captures
    rows = [measure() for _ in range(REPEATS)]
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def prompt_of(length: int, vocabulary: int) -> list[int]:
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def pop(folder: Path, device: str, lengths, decode: int, depths) -> Iterator[dict]:
    import pop_ext

    model = pop_ext.load(folder, device=device, prefill_depth=min(depths), max_cache_tokens=max(lengths) + decode + 64)
    synchronize = torch.get_device_module(model.device).synchronize
    for length in lengths:
        prompt = prompt_of(length, model.spec.vocab_size)
        for depth in depths:

            def measure(prompt=prompt, depth=depth) -> dict:
                sequence = model.new_sequence()
                synchronize()
                start = time.perf_counter()
                model.prefill([sequence], [prompt], prefill_depth=depth)
                synchronize()
                prefill = time.perf_counter() - start
                model.free(sequence)
                output = model.generate([prompt], prefill_depth=depth, max_new_tokens=decode + 1, do_sample=False)
                return {"prefill": prefill, "decode": output.times.decode / decode}

            yield {"engine": f"POP, {model.resolve_prefill_depth(depth)} layers", "tokens": length} | medians(measure)


def transformers_engine(folder: Path, device: str, lengths, decode: int, compiled: bool) -> Iterator[dict]:
    """With a DynamicCache, or compiled with a StaticCache, whose shapes stay."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    synchronize = torch.get_device_module(device).synchronize
    backend = "eager" if device == "cpu" else "inductor"  # a rehearsal traces, and spares the minutes of C++
    for length in lengths:
        if compiled:
            torch.compiler.reset()  # a graph for each length, none of dynamic shapes
        forward = torch.compile(model, dynamic=False, backend=backend) if compiled else model
        ids = torch.tensor([prompt_of(length, model.config.vocab_size)]).to(device)

        @torch.no_grad()
        def measure(ids=ids, forward=forward, length=length) -> dict:
            size = {"max_cache_len": length + decode}
            cache = (
                transformers.StaticCache(config=model.config, **size)
                if compiled
                else transformers.DynamicCache(config=model.config)
            )
            synchronize()
            start = time.perf_counter()
            token = forward(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
            synchronize()
            middle = time.perf_counter()
            for step in range(decode):
                more = {"position_ids": torch.full_like(token, length + step)}
                token = forward(token, past_key_values=cache, use_cache=True, **more).logits[:, -1:].argmax(-1)
            synchronize()
            return {"prefill": middle - start, "decode": (time.perf_counter() - middle) / decode}

        yield {"engine": "transformers" + (", compiled" if compiled else ""), "tokens": length} | medians(measure)


def vllm(folder: Path, lengths, decode: int) -> Iterator[dict]:
    here = Path(__file__).parent  # which has a vllm.py, too
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    from vllm import LLM, SamplingParams

    engine = LLM(str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=max(lengths) + decode + 8,
                 enable_prefix_caching=False, disable_log_stats=True)  # fmt: skip
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]

    def seconds(prompt: list[int], tokens: int) -> float:
        settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        engine.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
        return time.perf_counter() - start

    for length in lengths:
        prompt = prompt_of(length, vocabulary)

        def measure(prompt=prompt) -> dict:
            first = seconds(prompt, 1)
            return {"prefill": first, "decode": (seconds(prompt, decode + 1) - first) / decode}

        yield {"engine": "vLLM", "tokens": length} | medians(measure)


def operations(device: str, lengths, sizes: dict) -> Iterator[dict]:
    """linear beside torch.matmul, attention beside scaled_dot_product_attention: seconds of a call, in turn, and how
    far apart their results are, relative to torch's.
    """
    from torch.nn.functional import scaled_dot_product_attention

    import pop_ext.ops  # noqa: F401

    ours, module = torch.ops.pop, torch.get_device_module(device)
    hidden, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    kv_heads, size = sizes["num_key_value_heads"], hidden // heads
    calls_a_time = 1 if device == "gpudouble" else 8  # on a GPU the host enqueues the next while one runs

    def draw(*shape: int):
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))
        return values.bfloat16().to(device)

    def compare(name: str, by: str, tokens: int, calls: list) -> dict:
        times = [[], []]
        results = [call() for call in calls]
        for _ in range(2 * REPEATS + 1):
            for call, mine in zip(calls, times, strict=True):
                start, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
                start.record()
                for _ in range(calls_a_time):
                    call()
                end.record()
                end.synchronize()
                mine.append(start.elapsed_time(end) / 1000 / calls_a_time)
        a, b = (result.float().cpu().flatten() for result in results)
        row = {"operation": name, "tokens": tokens, "beside": by, "difference": float((a - b).norm() / b.norm())}
        return row | {"seconds": statistics.median(times[0]), "torch_seconds": statistics.median(times[1])}

    weight = draw(inner, hidden)
    for tokens in (1, 8, 64, *lengths):
        x = draw(tokens, hidden)
        calls = [lambda x=x: ours.linear(x, weight), lambda x=x: torch.matmul(x, weight.T)]
        yield compare("linear", "cuBLAS", tokens, calls)
    for tokens in lengths:
        query, keys, values = draw(tokens, heads, size), draw(tokens, kv_heads, size), 2 * draw(tokens, kv_heads, size)
        ints = [torch.tensor(v, dtype=torch.int32).to(device) for v in ([[0]], [0, tokens], [tokens])]

        def flash(query=query, keys=keys, values=values):
            q, k, v = (x.transpose(0, 1)[None] for x in (query, keys, values))
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

        def paged(query=query, keys=keys, values=values, ints=ints, tokens=tokens):
            return ours.attention(query, keys[None], values[None], *ints, tokens, tokens, size**-0.5, 0)

        yield compare("attention", "FlashAttention (torch's SDPA)", tokens, [paged, flash])


def main() -> None:
    engine, folder, device, options = sys.argv[1], Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    with install(device):
        if engine == "make":
            return make(folder, device, options)
        lengths, decode = options["lengths"], options["decode"]
        rows = {
            "pop": lambda: pop(folder, device, lengths, decode, options["depths"]),
            "transformers": lambda: transformers_engine(folder, device, lengths, decode, compiled=False),
            "transformers-compiled": lambda: transformers_engine(folder, device, lengths, decode, compiled=True),
            "vllm": lambda: vllm(folder, lengths, decode),
            "operations": lambda: operations(device, lengths, options["sizes"]),
        }[engine]()
        for row in rows:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # for pop_ext where it is not installed
    main()
