"""Loading a model onto a device: its choice, its memory, and what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import TINY, Tiny
from on_device import DEVICE, on_the_double

import pop_ext
from pop_ext import ops
from pop_ext.runtime import device as devices


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
    assert "weights and cache in bfloat16" in caplog.text


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


@pytest.mark.parametrize("size", [80, 96, 112])
def test_head_sizes_without_kernels(tmp_path, monkeypatch, size):
    """Refused before weights are read."""
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=size)
    folder = Tiny(TINY["mistral"].config, TINY["mistral"].sizes | sizes).make(tmp_path / "model", seed=3)
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


@on_the_double
def test_memory_of_a_vision_tower(vision_folder, double, monkeypatch):
    """It counts as weights, before they are read."""
    model = pop_ext.load(vision_folder, device=DEVICE, max_cache_tokens=64)
    tower = sum(p.numel() * 2 for module in model.vision.modules.values() for p in module.parameters())
    assert tower > 10_000
    needed = devices.weight_bytes(model.spec, 2, model.spec.num_layers - 1, tower)
    monkeypatch.setattr(type(double.module), "free_memory", needed)
    monkeypatch.setattr("pop_ext.runtime.layers.load_weights", None)
    with pytest.raises(pop_ext.DeviceMemoryError, match=rf"\({needed / 2**30:.2f} GiB of weights"):
        pop_ext.load(vision_folder, device=DEVICE, max_cache_tokens=64)
    seen = []
    monkeypatch.setattr("pop_ext.runtime.layers.cache_capacity", lambda *args: seen.append(args[3]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pop_ext.load(vision_folder, device=DEVICE, max_cache_tokens=64)
    assert seen == [needed]
