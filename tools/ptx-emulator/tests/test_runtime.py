# ruff: noqa: E501
"""Programs compiled by nvcc run unmodified on the PTX emulator: memory, streams, errors, attributes, capture, printf, assert."""

import ctypes
import pathlib

import pytest
import torch

import ptx_emulator

HERE = pathlib.Path(__file__).parent
PRELUDE = (HERE / "check.h").read_text().replace("#pragma once", "")


def test_memory(run_cuda):
    assert run_cuda(HERE / "memory.cu").stdout == "fine\n"


def test_errors_printf_assert_and_attributes(run_cuda):
    done = run_cuda(HERE / "errors.cu")
    assert done.stdout == "4 text  1.50 x 1099511627776 %\n" * 2 + "8.0 108 166912\n"
    assert "illegal memory access at 0x40" in done.stderr and "Assertion `n == 3` failed" in done.stderr
    assert "cudaGraphicsUnregisterResource is not supported" in done.stderr


def test_capture_graphs_and_libraries(run_cuda):
    assert run_cuda(HERE / "graphs.cu").stdout == "fine\n"


@pytest.mark.parametrize("mode", ["none", "speed", "balance", "size"])
def test_every_compression_of_the_fatbinary(run_cuda, mode):
    source = (
        PRELUDE
        + '__global__ void k(int* p) { *p = 9; } int main() { int* p; OK(cudaMallocManaged(&p, 4)); k<<<1, 1>>>(p); printf("%d\\n", *p); }'
    )
    assert run_cuda(source, flags=("-arch=sm_80", f"--compress-mode={mode}")).stdout == "9\n"


def test_other_devices_on_request(run_cuda):
    source = (
        PRELUDE
        + 'int main() { cudaDeviceProp p; OK(cudaGetDeviceProperties(&p, 0)); printf("%d%d %d %zu\\n", p.major, p.minor, p.multiProcessorCount, p.sharedMemPerBlockOptin); }'
    )
    assert run_cuda(source, environment={"PTX_EMULATOR_SM": "86"}).stdout == "86 84 101376\n"
    assert run_cuda(source, environment={"PTX_EMULATOR_SM": "90"}).stdout == "90 132 232448\n"


def test_ptx_for_a_newer_device_is_refused(run_cuda):
    source = (
        PRELUDE
        + '__global__ void k() {} int main() { k<<<1, 1>>>(); printf("%s\\n", cudaGetErrorName(cudaGetLastError())); }'
    )
    assert run_cuda(source, flags=("-arch=sm_90",)).stdout == "cudaErrorNoKernelImageForDevice\n"


def test_language_features_in_every_kind_of_build(run_cuda):
    outputs = {
        run_cuda(HERE / "features.cu", flags=("-arch=sm_80", *extra)).stdout
        for extra in ((), ("-lineinfo",), ("-G",), ("-Xcicc", "-O0"))
    }
    assert len(outputs) == 1 and outputs.pop().endswith("fine\n")


def test_a_library_in_python_runs_on_tensors(nvcc, tmp_path):
    """What libpop_cuda.so needs: the device loaded first is the libcudart.so.13 that later libraries get."""
    ptx_emulator.load(".version 8.0\n.target sm_80\n.address_size 64\n")
    (tmp_path / "double.cu").write_text(
        "__global__ void twice(float* x, int n) { for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] *= 2; }\n"
        'extern "C" int run(float* x, int n) { twice<<<1, 128>>>(x, n); return cudaDeviceSynchronize(); }\n'
    )
    nvcc(
        "-arch=sm_80",
        "-cudart",
        "shared",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        "-o",
        tmp_path / "double.so",
        tmp_path / "double.cu",
    )
    x = torch.arange(1000, dtype=torch.float32)
    assert ctypes.CDLL(str(tmp_path / "double.so")).run(ctypes.c_void_p(x.data_ptr()), 1000) == 0
    assert torch.equal(x, 2 * torch.arange(1000))
