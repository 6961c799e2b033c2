"""Fixtures of the tests of the runner on a device: a double of a GPU (device_double.py), or a GPU with
POP_TEST_DEVICE=cuda.
"""

from __future__ import annotations

import pytest
import torch
from helpers import CUDA_SIZES, cuda_operations
from on_device import DEVICE, VISION_SIZES, device_folder, vision_device_folder

from pop_ext.runtime import decoding


@pytest.fixture(scope="module", autouse=True)
def double():
    """The double beside CUDA among the devices with kernels."""
    if DEVICE != "gpudouble":
        return (yield None)
    cuda_operations()  # skips where there are none
    if torch.cuda.is_available():
        pytest.skip("on a machine with a GPU: POP_TEST_DEVICE=cuda")
    import device_double

    with device_double.installed():
        yield device_double


@pytest.fixture
def log(double):
    """What the double counted since now."""
    double.log.clear()
    return double.log


@pytest.fixture(params=list(CUDA_SIZES))
def folder(request, tmp_path_factory):
    return device_folder(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return device_folder("llama", tmp_path_factory)


@pytest.fixture
def small_buckets(monkeypatch):
    """Context buckets from 64 tokens on, and an upload at least every 5 steps."""
    monkeypatch.setattr(decoding, "LEAST_CONTEXT", 64)
    monkeypatch.setattr(decoding, "HORIZON", 5)


@pytest.fixture(params=list(VISION_SIZES))
def vision_folder(request, tmp_path_factory):
    return vision_device_folder(request.param, tmp_path_factory)
