# ruff: noqa: E501
"""Hostile PTX, fatbinaries and pointers: errors, never a crash."""

import ctypes
import pathlib
import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ptx_emulator

HERE = pathlib.Path(__file__).parent
VALID = """.version 8.0
.target sm_80
.address_size 64
.global .align 8 .u64 table[2] = {function, 3};
.extern .shared .align 16 .b8 dynamic[];
.func (.param .b32 result) function(.param .b32 n) { .reg .b32 %n; ld.param.u32 %n, [n]; add.u32 %n, %n, %n; st.param.b32 [result], %n; ret; }
.visible .entry k(.param .u64 p, .param .align 8 .b8 s[16]) .maxntid 128, 1, 1
{
  .reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<40>; .reg .f32 %f<9>; .reg .b64 %x<9>; .local .align 8 .b8 stack[32]; .shared .align 4 .b8 tile[128];
  ld.param.u64 %x1, [p]; mov.u32 %r1, %tid.x; setp.lt.and.u32 %p1|%p2, %r1, 16, %p0; @!%p1 bra LABEL;
  mad.lo.s32 %r2, %r1, -7, 0x1F; cvt.rn.f32.s32 %f1, %r2; fma.rn.ftz.f32 %f2, %f1, 0f3F800000, 0fBF000000; ld.global.nc.v2.u32 {%r3, %r4}, [%x1+8];
  LABEL: shfl.sync.bfly.b32 %r5|%p3, %r1, 1, 31, -1; bar.sync 0, 128; mov.b64 {%r6, %r7}, %x1; lop3.b32 %r8, %r5, %r6, %r7, 0xE8;
  { .param .b32 a; .param .b32 b; st.param.b32 [a], %r1; call.uni (b), function, (a); ld.param.b32 %r9, [b]; }
  mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%f1, %f2, %f3, %f4};
  targets: .branchtargets LABEL, END; brx.idx %r1, targets; atom.global.add.u32 %r10, [%x1], 1; cp.async.cg.shared.global [%r1], [%x1], 16;
  END: ret;
}
"""


def attempt(data: bytes) -> None:
    try:
        ptx_emulator.load(data)
    except ptx_emulator.EmulatorError as error:
        assert str(error)


def test_the_seed_is_valid():
    assert ptx_emulator.load(VALID).keys() == ["k"]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_mutated_ptx(data):
    text = bytearray(VALID.encode())
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(text) - 1))
        kind = data.draw(st.integers(0, 4))
        if kind == 0:
            text[at] = data.draw(st.integers(0, 255))
        elif kind == 1:
            del text[at : at + data.draw(st.integers(1, 40))]
        elif kind == 2:
            text[at:at] = data.draw(
                st.sampled_from(
                    [
                        b"{",
                        b"}",
                        b"(",
                        b"[",
                        b";",
                        b",",
                        b"-1",
                        b"99999999999",
                        b".b64",
                        b".v4",
                        b"%r1",
                        b"%p1",
                        b"0f1",
                        b"@",
                        b"!",
                    ]
                )
            )
        elif kind == 3:
            other = data.draw(st.integers(0, len(text) - 1))
            text[at:at] = text[other : other + data.draw(st.integers(1, 60))]
        else:
            text[at:] = b""
        text = text or bytearray(b" ")
    attempt(bytes(text))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes(data):
    attempt(b".version 8.0\n.target sm_80\n.address_size 64\n" + data)


def test_nesting_and_sizes():
    head = ".version 8.0\n.target sm_80\n.address_size 64\n"
    attempt((head + ".visible .entry k() {" + "{" * 100000).encode())
    attempt((head + ".global .b32 x[] = " + "{" * 100000).encode())
    attempt((head + ".visible .entry k() { mov.b32 " + "{" * 100000).encode())
    attempt((head + ".visible .entry k() { .reg .b32 %r<4294967295>; ret; }").encode())
    attempt((head + ".shared .b8 x[1099511627775]; .visible .entry k() { .reg .b64 %x; mov.u64 %x, x; ret; }").encode())
    attempt((head + ".global .b64 x[1099511627775];").encode())
    attempt((head + ".visible .entry k(.param .b8 x[1000000]) { ret; }").encode())
    attempt((head + ".visible .entry k() { L: bra L; }").encode())


def test_damaged_fatbinaries_and_foreign_pointers(run_cuda, nvcc, tmp_path):
    for mode in ("none", "speed", "balance"):
        (tmp_path / "k.cu").write_text("__global__ void k(int* p) { *p = 1; }")
        nvcc("-arch=sm_80", "-fatbin", f"--compress-mode={mode}", "-o", tmp_path / "k.fatbin", tmp_path / "k.cu")
        if mode == "none":
            done = run_cuda(HERE / "hostile.cu", str(tmp_path / "k.fatbin"), environment={"PTX_EMULATOR_QUIET": "1"})
            program = done.args[0]
        else:
            done = run_cuda.execute(program, str(tmp_path / "k.fatbin"), environment={"PTX_EMULATOR_QUIET": "1"})
        assert done.stdout == "alive 1\n"


def test_lz4_roundtrip_of_hostile_blocks():
    # The decompressor is reached through fatbinaries: a header around random payloads.
    library = ctypes.CDLL(str(ptx_emulator.library_path() / "libcudart.so.13"))
    generator = random.Random(3)
    for _ in range(300):
        payload = bytes(generator.randrange(256) for _ in range(generator.randrange(1, 200)))
        entry = (
            (1).to_bytes(2, "little")
            + (0x101).to_bytes(2, "little")
            + (64).to_bytes(4, "little")
            + len(payload).to_bytes(8, "little")
            + len(payload).to_bytes(4, "little")
            + bytes(8)
            + (80).to_bytes(4, "little")
        )
        entry += (
            bytes(8)
            + (0x2000).to_bytes(8, "little")
            + bytes(8)
            + generator.choice([10, 1000, 1 << 40]).to_bytes(8, "little")
        )
        image = (
            (0xBA55ED50).to_bytes(4, "little")
            + (1).to_bytes(2, "little")
            + (16).to_bytes(2, "little")
            + len(entry + payload).to_bytes(8, "little")
            + entry
            + payload
        )
        handle = ctypes.c_void_p()
        assert library.cudaLibraryLoadData(ctypes.byref(handle), image, None, None, 0, None, None, 0) in (0, 218)
