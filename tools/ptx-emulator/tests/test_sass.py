"""Static facts beside a launch's counts: registers, occupancy, and SASS loops joined to the PTX's."""

import subprocess

import pytest
import torch

import ptx_emulator
from ptx_emulator import sass

# Two loops: one multiplies 10 times on the tensor cores, one copies through shared memory.
PTX = """.version 8.5
.target sm_80
.address_size 64
.visible .entry other() { ret; }
.visible .entry k(.param .u64 a0, .param .u32 n) {
.shared .align 4 .b8 tile[512];
.reg .pred %q<4>; .reg .b32 %r<20>; .reg .f32 %f<9>; .reg .b64 %x<4>;
ld.param.u64 %x0, [a0]; ld.param.u32 %r8, [n]; mov.u32 %r0, %tid.x; mul.wide.u32 %x1, %r0, 4; add.s64 %x0, %x0, %x1;
mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1; mov.u32 %r9, 0;
LOOP:
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r0, %r0, %r0, %r9}, {%r0, %r0}, {%f1, %f2, %f3, %f4};
add.u32 %r9, %r9, 1;
setp.lt.u32 %q1, %r9, %r8;
@%q1 bra LOOP;
shl.b32 %r1, %r0, 2; mov.u32 %r2, tile; add.u32 %r1, %r1, %r2;
AGAIN:
st.shared.f32 [%r1], %f1;
bar.sync 0;
ld.shared.f32 %f2, [%r2];
add.f32 %f1, %f1, %f2;
bar.sync 0;
sub.u32 %r9, %r9, 1;
setp.ne.u32 %q1, %r9, 0;
@%q1 bra AGAIN;
st.global.f32 [%x0], %f1;
ret;
}
"""  # noqa: E501


@pytest.fixture
def tools():
    for name in ("ptxas", "nvdisasm"):
        try:
            sass.tool(name)
        except FileNotFoundError as error:
            pytest.skip(str(error))


def line(text: str) -> int:
    (found,) = [k for k, row in enumerate(PTX.split("\n"), 1) if row.startswith(text)]
    return found


def test_a_small_kernel(tools):
    ptx_emulator.clear()
    ptx_emulator.count()
    try:
        ptx_emulator.load(PTX)["k"](3, 128, 0, torch.zeros(128), 10)
    finally:
        ptx_emulator.count(False)
    (launch,) = ptx_emulator.counts()
    assert ptx_emulator.module_text(launch["module"]) == PTX
    joined = sass.join(launch, PTX)
    facts = joined["facts"]
    assert 8 < facts.registers < 40 and facts.static_shared == 512 == launch["static_shared"]
    assert facts.spill_stores == facts.spill_loads == facts.stack == 0
    assert joined["occupancy"].blocks == 16 and joined["occupancy"].limits["warps"] == 16
    multiply = [loop for loop in joined["loops"] if loop[0].tensor]
    exchange = [loop for loop in joined["loops"] if not loop[0].tensor]
    assert multiply and exchange
    for loop, row in multiply:
        assert row["main"] and row["line"] == line("LOOP:") + 1 and set(loop.opcodes) & {"HMMA"}
    for loop, row in exchange:
        assert not row["main"] and row["line"] == line("AGAIN:") + 1
        assert loop.opcodes["STS"] == loop.opcodes["LDS"] == loop.opcodes["BAR"] / 2
    text = sass.text(launch, PTX)
    assert "main loop" in text and "120 warp trips of 4 instructions: " in text and "tensor 1" in text
    with pytest.raises(RuntimeError, match="ptxas failed"):
        sass.static_facts(PTX, "missing")


def test_spills(tools):
    registers = 40
    body = "".join(f"ld.volatile.global.f32 %f{k}, [%x0+{4 * k}];\n" for k in range(registers))
    body += "".join(f"st.volatile.global.f32 [%x0+{4 * k}], %f{k};\n" for k in range(registers))
    ptx = (
        ".version 8.5\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 a0) .maxnreg 24 {\n"
        f".reg .f32 %f<{registers}>; .reg .b64 %x<2>; ld.param.u64 %x0, [a0];\n{body}ret; }}"
    )
    facts = sass.static_facts(ptx, "k")
    assert facts.registers <= 24 and facts.spill_stores > 0 and facts.spill_loads > 0 and facts.stack > 0


def test_occupancy_agrees_with_the_toolkit(nvcc, tmp_path):
    cases = [
        (registers, threads, shared)
        for registers in (1, 8, 24, 32, 40, 63, 96, 128, 168, 255)
        for threads in (32, 96, 128, 160, 256, 384, 1024)
        for shared in (0, 1000, 8192, 33000, 49152, 81920, 100000, 166912)
    ]
    source = tmp_path / "occupancy.cpp"
    source.write_text(
        """#include <cstdio>
#include <cstdlib>
#include <cuda_occupancy.h>
int main(int, char** v) {
  cudaOccDeviceProp p;
  const int sm = std::atoi(v[1]);
  p.computeMajor = sm / 10, p.computeMinor = sm % 10, p.maxThreadsPerBlock = 1024;
  p.maxThreadsPerMultiprocessor = sm == 86 ? 1536 : 2048, p.warpSize = 32;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.sharedMemPerBlock = 49152, p.sharedMemPerMultiprocessor = (sm == 80 ? 164 : sm == 86 ? 100 : 228) * 1024;
  p.numSms = 1, p.sharedMemPerBlockOptin = p.sharedMemPerMultiprocessor - 1024, p.reservedSharedMemPerBlock = 1024;
  int registers, threads, shared;
  while (std::scanf("%d %d %d", &registers, &threads, &shared) == 3) {
    cudaOccFuncAttributes a;
    a.maxThreadsPerBlock = 1024, a.numRegs = registers, a.sharedSizeBytes = 0;
    a.maxDynamicSharedSizeBytes = 166912, a.numBlockBarriers = 1;
    a.partitionedGCConfig = PARTITIONED_GC_OFF, a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult r = {};
    cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &state, threads, shared);
    std::printf("%d\\n", r.activeBlocksPerMultiprocessor);
  }
}
"""
    )
    nvcc("-o", tmp_path / "occupancy", source)
    for sm in (80, 86, 90):
        done = subprocess.run(
            [str(tmp_path / "occupancy"), str(sm)],
            input="\n".join(" ".join(map(str, case)) for case in cases),
            capture_output=True,
            text=True,
            check=True,
        )
        ours = [sass.occupancy(*case, sm=sm).blocks for case in cases]
        assert ours == list(map(int, done.stdout.split())), sm
