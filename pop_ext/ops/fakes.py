"""Fake (meta) kernels: the outputs' shapes and dtypes, for `torch.compile` and `torch.library.opcheck`. Each takes the
arguments of the function it is named after.
"""

import functools
import inspect

import torch
from torch import Tensor

from .decode import decode_advance, embedding, rope_gather, sample
from .layers import attention, gated_linear, linear, project_kv, qkv_project, rms_norm
from .native import no_cuda, why_no_cuda


def fake(public):
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

        if no_cuda:
            no_cuda.impl(name, on_cuda)
        torch.library.register_fake(f"pop::{name}")(checked)
        return checked

    return register


@fake(rms_norm)
def _fake_rms_norm(*, x, **_):
    return x.new_empty(x.shape)


@fake(linear)
def _fake_linear(*, x, weight, out_dtype, **_):
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


@fake(gated_linear)
def _fake_gated_linear(*, x, gate_up_weight, **_):
    return x.new_empty((x.shape[0], gate_up_weight.shape[0] // 2))


@fake(qkv_project)
def _fake_qkv_project(*, x, weight, key_cache, **_):
    _, _, kv_heads, head_size = key_cache.shape
    return x.new_empty((x.shape[0], weight.shape[0] // head_size - 2 * kv_heads, head_size))


@fake(attention)
def _fake_attention(*, query, **_):
    return query.new_empty(query.shape)


@fake(project_kv)
def _fake_project_kv(**_):
    return None


@fake(embedding)
def _fake_embedding(*, token_ids, weight, **_):
    return weight.new_empty((token_ids.shape[0], weight.shape[1]))


@fake(rope_gather)
def _fake_rope_gather(*, cos_table, positions, **_):
    return cos_table.new_empty((2, cos_table.shape[0], positions.shape[-1], cos_table.shape[2]))


@fake(decode_advance)
def _fake_decode_advance(**_):
    return None


@fake(sample)
def _fake_sample(**_):
    return None
