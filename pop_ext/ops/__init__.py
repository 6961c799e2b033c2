"""The operations, documented and callable: each function runs the kernel `torch.ops.pop.<name>`.

T tokens (of all sequences, flattened), D hidden size, Hq and Hkv query and key/value heads, E head size, F intermediate
size, S sequences.

Activations, weights and caches of one call share one dtype: float32 or bfloat16 on the CPU, bfloat16 or float16 on
CUDA. Sums, softmax, gains, cos and sin are float32. The last dimension of every tensor is contiguous. On CUDA, rows
start at multiples of 16 bytes, hidden sizes are multiples of 8, and heads have 32, 64, 128 or 256 elements.

Bad arguments raise RuntimeError "x is V, expected Y", naming the argument. On the CPU that covers what index tensors
hold (slot_mapping, block_tables, cu_seqlens_q, seqlens_k, rope_index). On CUDA the check of their values waits for the
device, so it runs only with the environment variable POP_CHECK_INDICES=1, and never in a stream that is being captured.
"""

from . import fakes  # noqa: F401 (registers the fake kernels)
from .decode import decode_advance, embedding, rope_gather, sample
from .layers import attention, gated_linear, linear, project_kv, qkv_project, rms_norm
from .native import (
    CUDA_LIBRARY,
    build_info,
    cpu_isa,
    cpu_isas,
    cuda_image,
    load_cuda_kernels,
    make_way_for_cuda,
    set_cpu_isa,
    why_no_cuda,
)

__all__ = [
    "CUDA_LIBRARY",
    "attention",
    "build_info",
    "cpu_isa",
    "cpu_isas",
    "cuda_image",
    "decode_advance",
    "embedding",
    "gated_linear",
    "linear",
    "load_cuda_kernels",
    "make_way_for_cuda",
    "project_kv",
    "qkv_project",
    "rms_norm",
    "rope_gather",
    "sample",
    "set_cpu_isa",
    "why_no_cuda",
]
