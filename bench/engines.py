"""The engines of a comparison, each in a process of its own: `python bench/engines.py ENGINE MODEL [options as JSON]`.

The process reads a JSON command a line and answers each with a JSON line. {"prompt_tokens": n, "decode_tokens": d}
runs a random prompt of n tokens that no cache has seen, writing keys and values, to the logits of its last token,
then decodes d tokens greedily. The answer:

    prefill_seconds, decode_seconds             wall time; decode_seconds is of all d tokens
    prefill_cpu_seconds, decode_cpu_seconds     processor time of the whole process, all threads
    dtype, instruction_set, stages              of the weights, in use, and prefill_seconds by stage ("pop")
    cpu_seconds                                 processor time of the command altogether

"machine" is not an engine but the yardstick; to {} it answers with the rates of a large matrix multiplication and of
reading memory, and with the dtype of that multiplication: bfloat16 where a short trial finds it no slower than float32,
else float32 (without bf16 instructions torch takes 100 times as long). A failure is answered with {"error": text}.
Between commands a process waits and uses no processor. It ends with the process that started it, however that ends.
Each engine imports its own libraries only, so that it can run in an environment that has no others.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import time

THREADS = 2


def die_with(parent: int) -> None:
    """Linux kills this process as soon as `parent`, the process that started it, ends for whatever reason."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)


class Clock:
    """Wall and processor time of a block: `with Clock() as clock: ...; clock.seconds, clock.cpu_seconds`."""

    def __enter__(self):
        self.start, self.cpu_start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.seconds, self.cpu_seconds = time.perf_counter() - self.start, time.process_time() - self.cpu_start


def times(prefill: Clock, decode: Clock, **more) -> dict:
    return {
        "prefill_seconds": prefill.seconds,
        "prefill_cpu_seconds": prefill.cpu_seconds,
        "decode_seconds": decode.seconds,
        "decode_cpu_seconds": decode.cpu_seconds,
        **more,
    }


def random_prompt(vocab_size: int, tokens: int) -> list[int]:
    return [random.randrange(vocab_size) for _ in range(tokens)]


def fast_dtype(size: int = 512) -> str:
    """The name of the dtype in which torch multiplies matrices faster here, "bfloat16" or "float32"."""
    import torch

    seconds = {}
    for name in ("float32", "bfloat16"):
        a, b = (torch.randn(size, size).to(getattr(torch, name)) for _ in range(2))
        torch.mm(a[:8], b)  # wakes the threads
        trials = []
        for _ in range(3):
            with Clock() as clock:
                torch.mm(a, b)
            trials.append(clock.seconds)
        seconds[name] = min(trials)
    return min(reversed(seconds), key=seconds.get)


class Machine:
    """What the machine can do: multiply-adds of a large matrix multiplication, and bytes read, per second."""

    def __init__(self, model: str, read_bytes: int = 2**29):
        import torch

        torch.set_num_threads(THREADS)
        self.torch, self.dtype = torch, fast_dtype()
        size = 4096 if self.dtype == "bfloat16" else 2048  # a fraction of a second either way
        self.a, self.b = (torch.randn(size, size).to(getattr(torch, self.dtype)) for _ in range(2))
        self.memory = torch.ones(read_bytes // 8, dtype=torch.int64)

    def run(self) -> dict:
        self.torch.mm(self.a[:256], self.b)  # wakes the threads
        with Clock() as multiply:
            self.torch.mm(self.a, self.b)
        self.memory[: 2**20].sum()
        with Clock() as read:
            self.memory.sum()  # of the reductions, the one that is fastest here
        multiplications, read_bytes = len(self.a) ** 3, self.memory.nbytes
        return {
            "dtype": self.dtype,
            "multiplications_per_second": multiplications / multiply.seconds,
            "multiplications_per_cpu_second": multiplications * THREADS / multiply.cpu_seconds,
            "read_bytes_per_second": read_bytes / read.seconds,
            "read_bytes_per_cpu_second": read_bytes * THREADS / read.cpu_seconds,
        }


class Pop:
    """This project."""

    def __init__(self, model: str, dtype: str = "auto", isa: str | None = None):
        import torch

        import pop_ext

        torch.set_num_threads(THREADS)
        if isa:
            pop_ext.ops.set_cpu_isa(isa)
        self.model = pop_ext.load(model, device="cpu", dtype=dtype)
        self.settings = {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "instruction_set": pop_ext.ops.cpu_isa(),
        }

    def run(self, prompt_tokens: int, decode_tokens: int, prefill_depth: int) -> dict:
        prompt = random_prompt(self.model.spec.vocab_size, prompt_tokens)
        sequence = self.model.new_sequence()
        with Clock() as prefill:
            logits, stages = self.model.prefill([sequence], [prompt], prefill_depth=prefill_depth)
            token = logits[0].argmax().item()
        with Clock() as decode:
            for _ in range(decode_tokens):
                token = self.model.decode([sequence], [token])[0].argmax().item()
        self.model.free(sequence)
        stages = {name: getattr(stages, name) for name in stages.STAGES}
        return times(prefill, decode, stages=stages, **self.settings)


class Transformers:
    """transformers with a DynamicCache, the last token's logits only, and its fastest attention here."""

    def __init__(self, model: str, attention: str = "sdpa", dtype: str = "bfloat16"):
        import torch
        import transformers

        torch.set_num_threads(THREADS)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.torch, self.transformers = torch, transformers
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation=attention
        )
        self.model.eval()

    def prefill(self, ids, cache):
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    def decode(self, ids, cache):
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits

    def run(self, prompt_tokens: int, decode_tokens: int) -> dict:
        prompt = self.torch.tensor([random_prompt(self.model.config.vocab_size, prompt_tokens)])
        with self.torch.no_grad():
            with Clock() as prefill:
                cache = self.transformers.DynamicCache(config=self.model.config)
                token = self.prefill(prompt, cache)[:, -1].argmax(-1, keepdim=True)
            with Clock() as decode:
                for _ in range(decode_tokens):
                    token = self.decode(token, cache)[:, -1].argmax(-1, keepdim=True)
        return times(prefill, decode)


class TransformersCompile(Transformers):
    """The same through torch.compile with the weights frozen, which packs them once for oneDNN.

    Prefill is compiled for each prompt length, 10% faster than one graph for all lengths; decoding has one graph.
    """

    def __init__(self, model: str, attention: str = "sdpa", dtype: str = "bfloat16"):
        super().__init__(model, attention, dtype)
        from torch import _inductor

        _inductor.config.freezing = True
        self.compiled_prefill = self.torch.compile(super().prefill, dynamic=False)
        self.compiled_decode = self.torch.compile(super().decode, dynamic=True)

    def prefill(self, ids, cache):
        return self.compiled_prefill(ids, cache)

    def decode(self, ids, cache):
        return self.compiled_decode(ids, cache)


class OpenVINO:
    """OpenVINO GenAI, from a folder that optimum-intel exported; tokens are timed as they reach a streamer."""

    def __init__(self, model: str, dtype: str = "bfloat16", **properties):
        """properties: OpenVINO's own, over those that suit two threads."""
        import numpy
        import openvino
        import openvino_genai

        self.numpy, self.openvino, self.genai = numpy, openvino, openvino_genai
        defaults = {"INFERENCE_PRECISION_HINT": {"bfloat16": "bf16", "float32": "f32"}[dtype]}
        defaults |= {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": THREADS, "ATTENTION_BACKEND": "PA"}
        self.pipeline = openvino_genai.LLMPipeline(model, "CPU", **defaults | properties)
        with open(os.path.join(model, "config.json")) as file:
            self.vocab_size = json.load(file)["vocab_size"]

        class Streamer(openvino_genai.StreamerBase):
            def __init__(self):
                super().__init__()
                self.seconds, self.cpu_seconds = [], []

            def write(self, token):
                self.seconds.append(time.perf_counter())
                self.cpu_seconds.append(time.process_time())
                return openvino_genai.StreamingStatus.RUNNING

            def end(self):
                pass

        self.streamer = Streamer

    def run(self, prompt_tokens: int, decode_tokens: int) -> dict:
        ids = self.numpy.array([random_prompt(self.vocab_size, prompt_tokens)])
        inputs = self.genai.TokenizedInputs(self.openvino.Tensor(ids), self.openvino.Tensor(self.numpy.ones_like(ids)))
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = decode_tokens + 1, True, False
        streamer = self.streamer()
        seconds, cpu_seconds = time.perf_counter(), time.process_time()
        self.pipeline.generate(inputs, config, streamer)
        if len(streamer.seconds) != decode_tokens + 1:
            raise RuntimeError(f"{len(streamer.seconds)} tokens arrived, expected {decode_tokens + 1}")
        return {
            "prefill_seconds": streamer.seconds[0] - seconds,
            "prefill_cpu_seconds": streamer.cpu_seconds[0] - cpu_seconds,
            "decode_seconds": streamer.seconds[-1] - streamer.seconds[0],
            "decode_cpu_seconds": streamer.cpu_seconds[-1] - streamer.cpu_seconds[0],
        }


ENGINES = {
    "machine": Machine,
    "pop": Pop,
    "transformers": Transformers,
    "transformers-compile": TransformersCompile,
    "openvino": OpenVINO,
}


def serve(engine: str, model: str, options: dict) -> None:
    # Answers keep the real standard output; whatever a library prints goes to standard error
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        runner, failure = ENGINES[engine](model, **options), None
    except Exception as error:
        runner, failure = None, f"{type(error).__name__}: {error}"
    for line in sys.stdin:
        try:
            with Clock() as clock:
                answer = {"error": failure} if failure else runner.run(**json.loads(line))
            answer["cpu_seconds"] = clock.cpu_seconds
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    if "POP_BENCH_PARENT" in os.environ:
        die_with(int(os.environ["POP_BENCH_PARENT"]))
    sys.path[0] = os.path.dirname(sys.path[0])  # the repository, for pop_ext where it is not installed
    serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]) if len(sys.argv) > 3 else {})
