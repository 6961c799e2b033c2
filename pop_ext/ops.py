"""`torch.ops.pop`: loads the compiled operations and describes them to torch.

Each function below is the operation's fake (meta) kernel, which gives the outputs' shapes and dtypes to `torch.compile`
and `torch.library.opcheck`; its docstring is the operation's documentation. T tokens (of all sequences, flattened), D
hidden size, Hq and Hkv heads, E head size, F intermediate size, S sequences.

Activations, weights and caches are all of one dtype, float32 or bfloat16 on the CPU, bfloat16 or float16 on CUDA; sums,
softmax, gains, cos and sin are float32. The last dimension of every tensor is contiguous. On CUDA, rows start at
multiples of 16 bytes, hidden sizes are multiples of 8, and heads have 32, 64, 128 or 256 elements; what index tensors
(slot_mapping, block_tables, cu_seqlens_q, seqlens_k, rope_index) hold is not looked at there, as that would wait for
the device. Bad arguments raise RuntimeError naming the argument, what it was and what was expected.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path

import torch
from torch import Tensor

from . import _C

cpu_isas, cpu_isa, set_cpu_isa = _C.cpu_isas, _C.cpu_isa, _C.set_cpu_isa
CUDA_LIBRARY = Path(_C.__file__).parent / "libpop_cuda.so"


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


_why_no_cuda = _load_cuda()
# What CUDA tensors get where there are no kernels for them.
_no_cuda = torch.library.Library("pop", "IMPL", "CUDA") if _why_no_cuda else None


def make_way_for_cuda() -> None:
    """Takes back what CUDA tensors get without kernels, as the software device is about to load them."""
    if _no_cuda:
        _no_cuda._destroy()


def build_info() -> dict:
    """What this library was built with, and what it runs on here. "cuda": CUDA kernels were built; "cuda_loaded": this
    torch runs them.
    """
    return _C.build_info() | {
        "cpu_isas": cpu_isas(),
        "cpu_isa": cpu_isa(),
        "cuda": CUDA_LIBRARY.exists(),
        "cuda_loaded": _why_no_cuda is None,
    }


def _fake(function):
    """Registers a fake kernel, which looks at devices as the real ones do; and, where there is no CUDA part, what CUDA
    tensors get.
    """
    parameters = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args, **kwargs):
        tensors = {n: v for n, v in [*zip(parameters, args, strict=False), *kwargs.items()] if isinstance(v, Tensor)}
        first, *others = tensors
        for name in others:
            if tensors[name].device != tensors[first].device:
                raise RuntimeError(
                    f"pop::{function.__name__}: {name} is on {tensors[name].device}, "
                    f"expected all tensors on one device ({first} is on {tensors[first].device})"
                )
        return function(*args, **kwargs)

    def on_cuda(*args, **kwargs):
        raise NotImplementedError(
            f"pop::{function.__name__}: {parameters[0]} is on a CUDA device, but {_why_no_cuda}; "
            "or move the tensors to the CPU"
        )

    if _no_cuda:
        _no_cuda.impl(function.__name__, on_cuda)
    return torch.library.register_fake(f"pop::{function.__name__}")(checked)


@_fake
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """`x * rsqrt(mean(x^2) + eps) * weight (+ residual)`, row by row.

    x, residual [T, D]; weight [D] float32 (for Gemma 1 + w, as checkpoints store w). Returns [T, D]. The residual is
    added after the norm, as sandwich norms need it; a residual before the norm is `linear`'s.
    """
    return x.new_empty(x.shape)


@_fake
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x @ weight.T (+ bias) (+ residual)`, rounded once. x [T, K], weight [N, K], bias [N], residual [T, N]; returns
    [T, N].

    `out_dtype=torch.float32` keeps the sums as they are (logits).
    """
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


@_fake
def gated_linear(x: Tensor, gate_up_weight: Tensor, activation: str) -> Tensor:
    """`act(x @ gate.T) * (x @ up.T)`. x [T, D]; gate_up_weight [2 F, D], the gate's rows first; returns [T, F].

    activation: "silu", or "gelu_tanh" (Hendrycks and Gimpel, arXiv 1606.08415, the tanh form).
    """
    return x.new_empty((x.shape[0], gate_up_weight.shape[0] // 2))


@_fake
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
    """Projects queries, keys and values; norms queries and keys per head; turns both by RoPE; writes keys and values to
    the cache.

    x [T, D], normed; weight [(Hq + 2 Hkv) E, D], rows of all q, then k, then v heads; bias [(Hq + 2 Hkv) E]; q_norm,
    k_norm [E] float32; cos, sin [T, E / 2] float32, rotate-half convention (Su et al., arXiv 2104.09864);
    slot_mapping [T] int64, token t goes to offset slot_mapping[t] % block_size of block slot_mapping[t] // block_size,
    -1 is not written; key_cache, value_cache [blocks, block_size, Hkv, E]. Returns the queries, [T, Hq, E].
    """
    head_size = key_cache.shape[3]
    return x.new_empty((x.shape[0], weight.shape[0] // head_size - 2 * key_cache.shape[2], head_size))


@_fake
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
    """Causal grouped-query attention over the paged cache: prefill, a chunk of it, boundary tokens and decode alike.

    query [T, Hq, E]; key_cache, value_cache [blocks, block_size, Hkv, E]; block_tables [S, blocks of a sequence] int32;
    cu_seqlens_q [S + 1] int32, sequence s has the queries cu_seqlens_q[s] to cu_seqlens_q[s + 1], which are the last of
    its seqlens_k[s] (int32, [S]) tokens. Query i of a context sees key j iff (j <= i or spans[s, i] == spans[s, j]
    >= 0) and (window_size == 0 or j > i - window_size); spans [S, >= max_seqlen_k] int32 is a group id per context
    token, -1 for text. Returns [T, Hq, E].
    """
    return query.new_empty(query.shape)


@_fake
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

    hidden [T, D], not normed; weight [R, 2 Hkv E, D], each layer's k rows then v rows with its input norm's gain folded
    in; bias [R, 2 Hkv E]; k_norm [R, E] float32; cos, sin [ropes, T, E / 2] float32, of which layer r uses
    rope_index[r] (int32, [R]); slot_mapping [T] int64, -1 is not written; key_caches, value_caches [R, blocks,
    block_size, Hkv, E].
    """
