"""The six operations, documented and callable: each function below runs the kernel `torch.ops.pop.<name>`.

T tokens (of all sequences, flattened), D hidden size, Hq and Hkv query and key/value heads, E head size, F intermediate
size, S sequences.

Activations, weights and caches of one call share one dtype: float32 or bfloat16 on the CPU, bfloat16 or float16 on
CUDA. Sums, softmax, gains, cos and sin are float32. The last dimension of every tensor is contiguous. On CUDA, rows
start at multiples of 16 bytes, hidden sizes are multiples of 8, and heads have 32, 64, 128 or 256 elements.

Bad arguments raise RuntimeError "x is V, expected Y", naming the argument. On the CPU that covers what index tensors
hold (slot_mapping, block_tables, cu_seqlens_q, seqlens_k, rope_index). On CUDA the check of their values waits for the
device, so it runs only with the environment variable POP_CHECK_INDICES=1, and never in a stream that is being captured.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
from pathlib import Path

import torch
from torch import Tensor

from . import _C

cpu_isas, cpu_isa, set_cpu_isa = _C.cpu_isas, _C.cpu_isa, _C.set_cpu_isa
CUDA_LIBRARY = Path(_C.__file__).parent / "libpop_cuda.so"
_pop = torch.ops.pop


def _load_cuda() -> str | None:
    """Loads the CUDA kernels; returns why not, and what to do about it, where they cannot be."""
    if not CUDA_LIBRARY.exists():
        return (
            "this build of pop_ext has no CUDA kernels (pop_ext.build_info()['cuda'] is False); build it where nvcc 13 "
            "and the package nvidia-cutlass are installed"
        )
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a build for CUDA 13"
    try:
        torch.ops.load_library(CUDA_LIBRARY)
    except OSError as error:
        return (
            f"{CUDA_LIBRARY.name} cannot be loaded ({error}); it needs libcudart.so.13, which comes with a torch for "
            f"CUDA 13 (this one is for {torch.version.cuda})"
        )
    return None


why_no_cuda = _load_cuda()
# What CUDA tensors get where there are no kernels for them.
_no_cuda = torch.library.Library("pop", "IMPL", "CUDA") if why_no_cuda else None


def make_way_for_cuda() -> None:
    """Takes back what CUDA tensors get without kernels: for a caller that loads CUDA_LIBRARY itself."""
    if _no_cuda:
        _no_cuda._destroy()


def _cuda_library() -> ctypes.CDLL:
    """The loaded CUDA library; RuntimeError says why there is none."""
    if why_no_cuda:
        raise RuntimeError(f"no CUDA kernels: {why_no_cuda}")
    return ctypes.CDLL(str(CUDA_LIBRARY))


def load_cuda_kernels(device: int | torch.device | None = None) -> int:
    """Loads every CUDA kernel onto a device (default: the current one); returns how many there are.

    The first operation on a device does the same. Call it before the first graph capture, during which nothing may be
    loaded. RuntimeError where the kernels cannot run on the device.
    """
    library = _cuda_library()
    message = ctypes.create_string_buffer(1024)
    with torch.cuda.device(device):
        count = library.pop_cuda_load_kernels(message, len(message))
    if count < 0:
        raise RuntimeError(message.value.decode())
    return count


def cuda_image(device: int | torch.device | None = None) -> dict:
    """What a GPU (default: the current one) runs of this library: {"sm": 90, "ptx": 80, "compiled_by_driver": False}.

    sm: the compute capability that the loaded machine code is for; ptx: of the PTX that it was made from;
    compiled_by_driver: whether the driver made it, as the library holds none for this GPU.
    """
    library = _cuda_library()
    message = ctypes.create_string_buffer(1024)
    sm, ptx = ctypes.c_int(), ctypes.c_int()
    with torch.cuda.device(device):
        failed = library.pop_cuda_image(ctypes.byref(sm), ctypes.byref(ptx), message, len(message))
    if failed:
        raise RuntimeError(message.value.decode())
    return {"sm": sm.value, "ptx": ptx.value, "compiled_by_driver": f"sm_{sm.value}" not in _C.cuda_architectures()}


def _processor() -> str:
    """The processor as Linux names it; the family and model tell apart those that share a name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.is_file() else []
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    numbers = f"family {entries.get('cpu family', '?')}, model {entries.get('model', '?')}"
    return f"{entries.get('model name', 'unknown processor')} ({numbers})"


def build_info() -> dict:
    """What this library was built with, and what it runs on here.

    "cuda": CUDA kernels were built; "cuda_architectures": what they were compiled to, machine code ("sm_90") and PTX
    ("compute_80"); "cuda_loaded": this torch runs them; "cuda_image": `cuda_image()` of the present GPU, or why
    there is none.
    """
    built = CUDA_LIBRARY.exists()
    if why_no_cuda:
        image = why_no_cuda
    elif not torch.cuda.is_available():
        image = "no GPU"
    else:
        image = cuda_image()
    return _C.build_info() | {
        "processor": _processor(),
        "cpu_isas": cpu_isas(),
        "cpu_isa": cpu_isa(),
        "cuda": built,
        "cuda_architectures": _C.cuda_architectures() if built else [],
        "cuda_loaded": why_no_cuda is None,
        "cuda_image": image,
    }


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Root-mean-square norm of each row: `x * rsqrt(mean(x^2) + eps) * weight (+ residual)`.

    Zhang and Sennrich, arXiv 1910.07467. The residual is added after the norm, as models with sandwich norms need it;
    `linear` adds one before it.

    Args:
        x: [T, D].
        weight: [D] float32, the gain (for Gemma 1 + w, where checkpoints store w).
        eps: 0 or more.
        residual: [T, D] or None.

    Returns:
        [T, D], x's dtype.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or layout.
    """
    return _pop.rms_norm(x, weight, eps, residual)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Matrix product `x @ weight.T (+ bias) (+ residual)`, summed in float32 and rounded once.

    Args:
        x: [T, K].
        weight: [N, K].
        bias: [N] or None.
        residual: [T, N] or None.
        out_dtype: torch.float32 keeps the sums as they are, for logits; None is x's dtype.

    Returns:
        [T, N], out_dtype.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or layout.
    """
    return _pop.linear(x, weight, bias, residual, out_dtype=out_dtype)


def gated_linear(x: Tensor, gate_up_weight: Tensor, activation: str) -> Tensor:
    """Gated feed-forward projection `act(x @ gate.T) * (x @ up.T)` (Shazeer, arXiv 2002.05202).

    Args:
        x: [T, D].
        gate_up_weight: [2 F, D], the gate's F rows first.
        activation: "silu", or "gelu_tanh" (Hendrycks and Gimpel, arXiv 1606.08415, the tanh form).

    Returns:
        [T, F], x's dtype.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or layout, or the activation is another.
    """
    return _pop.gated_linear(x, gate_up_weight, activation)


def qkv_project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    """Projects queries, keys and values, norms queries and keys per head, applies RoPE, writes keys and values.

    RoPE is the rotate-half form (Su et al., arXiv 2104.09864). Keys and values go to the paged cache in place: token t
    to offset slot_mapping[t] % block_size of block slot_mapping[t] // block_size.

    Args:
        x: [T, D], already normed.
        weight: [(Hq + 2 Hkv) E, D], contiguous: rows of all query, then key, then value heads.
        bias: [(Hq + 2 Hkv) E] or None.
        q_norm: [E] float32, gain of the queries' RMS norm, or None for no norm.
        k_norm: [E] float32, the same for keys.
        eps: of those norms, 0 or more.
        cos: [T, E / 2] float32, contiguous.
        sin: [T, E / 2] float32, contiguous.
        slot_mapping: [T] int64 or int32; -1 is not written.
        key_cache: [blocks, block_size, Hkv, E], written.
        value_cache: [blocks, block_size, Hkv, E], written.

    Returns:
        The queries, [T, Hq, E], x's dtype.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or layout, or (see the module) a wrong index.
    """
    return _pop.qkv_project(x, weight, bias, q_norm, k_norm, eps, cos, sin, slot_mapping, key_cache, value_cache)


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    window_size: int = 0,
    spans: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention over the paged cache, for prefill, a chunk of it, boundary tokens and decode.

    The queries of sequence s are rows cu_seqlens_q[s] to cu_seqlens_q[s + 1] and are the last of its seqlens_k[s]
    tokens. Query i of a sequence sees key j iff (j <= i or spans[s, i] == spans[s, j] >= 0) and (window_size == 0 or
    j > i - window_size). A sequence with seqlens_k[s] == 0 is padding: its rows of the output are zeros.

    Args:
        query: [T, Hq, E].
        key_cache: [blocks, block_size, Hkv, E].
        value_cache: [blocks, block_size, Hkv, E].
        block_tables: [S, blocks of a sequence] int32.
        cu_seqlens_q: [S + 1] int32, from 0 to T, not decreasing.
        seqlens_k: [S] int32, tokens of each sequence in the cache, its queries included; 0 is padding.
        max_seqlen_q: an upper bound of the queries of a sequence.
        max_seqlen_k: an upper bound of seqlens_k, at most block_tables' columns times block_size.
        softmax_scale: factor of the scores, above 0.
        window_size: keys that a query sees, itself included; 0 is all.
        spans: [S, >= max_seqlen_k] int32, a group id per token, below 0 for none, or None.

    Returns:
        [T, Hq, E], query's dtype.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or layout, or (see the module) a wrong index.
    """
    return _pop.attention(
        query, key_cache, value_cache, block_tables, cu_seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, window_size, spans,
    )  # fmt: skip


def project_kv(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    rope_index: Tensor,
    slot_mapping: Tensor,
    key_caches: Tensor,
    value_caches: Tensor,
) -> None:
    """Keys and values of R skipped layers from one hidden state, in one multiplication, straight into their caches.

    Args:
        hidden: [T, D], not normed.
        weight: [R, 2 Hkv E, D], contiguous: each layer's key rows, then value rows, with the gain of the layer's input
            norm multiplied in.
        bias: [R, 2 Hkv E] or None.
        k_norm: [R, E] float32, gain of the keys' RMS norm, or None for no norm.
        eps: of both norms, 0 or more.
        cos: [ropes, T, E / 2] float32, contiguous.
        sin: [ropes, T, E / 2] float32, contiguous.
        rope_index: [R] int32, which of the ropes each layer uses.
        slot_mapping: [T] int64 or int32; -1 is not written.
        key_caches: [R, blocks, block_size, Hkv, E], written.
        value_caches: [R, blocks, block_size, Hkv, E], written.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or layout, or (see the module) a wrong index.
    """
    _pop.project_kv(hidden, weight, bias, k_norm, eps, cos, sin, rope_index, slot_mapping, key_caches, value_caches)


# What a decode step needs beside the layers, so that all of it is one graph. Arguments marked "in place" are written.


def embedding(token_ids: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """`scale * weight[token_ids]`, rounded once. token_ids [T] int64; weight [V, D]; returns [T, D].

    Rows of ids outside of the vocabulary are zeros.
    """
    return _pop.embedding(token_ids, weight, scale)


def rope_gather(cos_table: Tensor, sin_table: Tensor, positions: Tensor, axes: Tensor | None = None) -> Tensor:
    """The cos and sin of each token from tables, [2, ropes, T, E / 2] float32.

    cos_table, sin_table [ropes, positions, E / 2] float32; positions [T] int64, or [A, T] with axes [E / 2] int64, the
    one that each frequency turns with (multimodal RoPE). A position outside of the tables gives zeros.
    """
    return _pop.rope_gather(cos_table, sin_table, positions, axes)


def decode_advance(
    block_tables: Tensor,
    block_size: int,
    shifts: Tensor,
    seqlens_k: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    step: Tensor | None = None,
) -> None:
    """Room for one more token of every sequence: what `qkv_project` and `attention` of a decode step take.

    block_tables [S, blocks of a sequence] int32; seqlens_k [S] int32, in place: the number of tokens, which grows by
    one; 0 marks a padded row and stays. The new token, number n of its sequence from 0, gives positions[s] = n +
    shifts[s] and its slot by the block table, -1 for a padded row or where the table ends; shifts, positions and
    slot_mapping [S] int64, the last two in place. step [1] int32, in place, grows by one.
    """
    _pop.decode_advance(block_tables, block_size, shifts, seqlens_k, positions, slot_mapping, step)


def sample(
    logits: Tensor,
    settings: Tensor | None,
    seen: Tensor | None,
    uniforms: Tensor | None,
    step: Tensor | None,
    tokens: Tensor,
) -> None:
    """The next token of every row, in place in tokens [B] int64, the same on every device; -1 where none can be chosen.

    logits [B, V] float32, V at most 2^23. settings [B, 5] float32: temperature (0: greedy, the first of the largest),
    top_k (0: all), top_p (1: all), min_p (0: all), repetition penalty (1: none), applied as transformers' processors
    do: penalty, temperature, top-k, top-p, min-p; None is greedy for all. seen [B, V] uint8, in place: the tokens that
    the penalty is for; the chosen one is added. uniforms [N, B] float64 in [0, 1): the token is where the running sum
    of probabilities over the vocabulary exceeds uniforms[step, b] of their total; step [1] int32, None is 0.
    """
    _pop.sample(logits, settings, seen, uniforms, step, tokens)


# Fake (meta) kernels: the outputs' shapes and dtypes, for `torch.compile` and `torch.library.opcheck`. Each takes the
# arguments of the function it is named after.


def _fake(public):
    """Registers the decorated function as the fake kernel of `public`'s operation. It refuses tensors on several
    devices as the real kernels do. Where there are no CUDA kernels, it also registers what CUDA tensors get.
    """
    name = public.__name__
    signature = inspect.signature(public)
    first = next(iter(signature.parameters))

    def register(function):
        @functools.wraps(public)
        def checked(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            expected = bound.arguments[first].device
            for argument, value in bound.arguments.items():
                if isinstance(value, Tensor) and value.device != expected:
                    raise RuntimeError(
                        f"pop::{name}: {argument} is on {value.device}, expected all tensors on one device "
                        f"({first} is on {expected})"
                    )
            return function(**bound.arguments)

        def on_cuda(*args, **kwargs):
            raise NotImplementedError(
                f"pop::{name}: {first} is on a CUDA device, but {why_no_cuda}; or move the tensors to the CPU"
            )

        if _no_cuda:
            _no_cuda.impl(name, on_cuda)
        torch.library.register_fake(f"pop::{name}")(checked)
        return checked

    return register


@_fake(rms_norm)
def _fake_rms_norm(*, x, **_):
    return x.new_empty(x.shape)


@_fake(linear)
def _fake_linear(*, x, weight, out_dtype, **_):
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


@_fake(gated_linear)
def _fake_gated_linear(*, x, gate_up_weight, **_):
    return x.new_empty((x.shape[0], gate_up_weight.shape[0] // 2))


@_fake(qkv_project)
def _fake_qkv_project(*, x, weight, key_cache, **_):
    _, _, kv_heads, head_size = key_cache.shape
    return x.new_empty((x.shape[0], weight.shape[0] // head_size - 2 * kv_heads, head_size))


@_fake(attention)
def _fake_attention(*, query, **_):
    return query.new_empty(query.shape)


@_fake(project_kv)
def _fake_project_kv(**_):
    return None


@_fake(embedding)
def _fake_embedding(*, token_ids, weight, **_):
    return weight.new_empty((token_ids.shape[0], weight.shape[1]))


@_fake(rope_gather)
def _fake_rope_gather(*, cos_table, positions, **_):
    return cos_table.new_empty((2, cos_table.shape[0], positions.shape[-1], cos_table.shape[2]))


@_fake(decode_advance)
def _fake_decode_advance(**_):
    return None


@_fake(sample)
def _fake_sample(**_):
    return None
