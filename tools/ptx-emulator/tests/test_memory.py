# ruff: noqa: E501
"""Loads, stores, atomics, variables and asynchronous copies."""

import numpy as np
import pytest
from ptx_kernels import each_thread, kernel

import ptx_emulator


def test_loads_and_stores_of_every_width():
    data = np.arange(256, dtype=np.uint8)
    out = np.zeros(16, np.uint64)
    kernel(
        """
        ld.global.s8 %r0, [%p0+200]; cvt.s64.s32 %x0, %r0; st.global.u64 [%p1], %x0;
        ld.global.u8 %h0, [%p0+200]; cvt.u64.u16 %x0, %h0; st.global.u64 [%p1+8], %x0;
        ld.global.s16 %x0, [%p0+250]; st.global.u64 [%p1+16], %x0;
        ld.global.v2.u32 {%r0, %r1}, [%p0+8]; mov.b64 %x0, {%r1, %r0}; st.global.u64 [%p1+24], %x0;
        ld.global.v4.u8 {%r0, %r1, %r2, %r3}, [%p0+4]; shl.b32 %r3, %r3, 8; or.b32 %r0, %r0, %r3; st.global.u32 [%p1+32], %r0;
        ld.global.nc.L1::no_allocate.L2::128B.v2.u64 {%x0, %x1}, [%p0+16]; st.global.v2.u64 [%p1+48], {%x1, %x0};
        ld.volatile.global.u32 %r0, [%p0]; st.relaxed.gpu.global.u32 [%p1+64], %r0; fence.acq_rel.gpu; membar.gl;
        ld.acquire.gpu.global.u32 %r0, [%p0+4]; st.release.sys.global.u32 [%p1+68], %r0;
        ld.u16 %h1, [%p0+2]; st.u8 [%p1+72], %h1; prefetch.global.L2 [%p0];
        """,
        2,
    )(1, 1, 0, data, out)
    raw = out.view(np.uint8)
    assert out.view(np.int64)[0] == -56 and out[1] == 200 and out.view(np.int64)[2] == np.int16(0xFBFA - 65536)
    assert out[3] == int.from_bytes(bytes([12, 13, 14, 15, 8, 9, 10, 11]), "little") and raw[32:36].tolist() == [
        4,
        7,
        0,
        0,
    ]
    assert (
        raw[48:64].tolist() == [*range(24, 32), *range(16, 24)]
        and raw[64:72].tolist() == list(range(8))
        and raw[72] == 2
    )


@pytest.mark.parametrize("space", ["shared", "local"])
def test_windows_in_generic_space(space):
    body = f"""
        mov.u64 %x0, buffer; cvta.{space}.u64 %x1, %x0; st.u32 [%x1+4], %t; ld.{space}.u32 %r0, [buffer+4];
        isspacep.{space} %q0, %x1; @!%q0 mov.u32 %r0, 99; cvta.to.{space}.u64 %x2, %x1; ld.{space}.u32 %r1, [%x2+4];
        setp.ne.u32 %q1, %r0, %r1; @%q1 mov.u32 %r0, 98;
    """
    assert each_thread(body, 1, declarations=f".{space} .align 8 .b8 buffer[16];\n").tolist() == [0]


def test_faults_name_the_place():
    with pytest.raises(ptx_emulator.EmulatorError, match=r"misaligned.*line 9") as caught:
        kernel("ld.global.u32 %r0, [%p0+2];")(1, 1, 0, np.zeros(4))
    assert caught.value.code == 716
    with pytest.raises(ptx_emulator.EmulatorError, match=r"illegal memory access.*ld.global.u32") as caught:
        kernel("mov.u64 %x0, 64; ld.global.u32 %r0, [%x0];")(1, 1, 0, np.zeros(4))
    assert caught.value.code == 700
    with pytest.raises(ptx_emulator.EmulatorError, match="shared memory address out of range"):
        kernel("mov.u32 %r1, 4096; st.shared.u32 [%r1], %t;")(1, 1, 0, np.zeros(4))
    with pytest.raises(ptx_emulator.EmulatorError, match="trap"):
        kernel("trap;")(1, 1, 0, np.zeros(4))


def test_atomics():
    words = np.zeros(16, np.uint32)
    kernel(
        """
        atom.global.add.u32 %r0, [%p0], 2; red.global.max.s32 [%p0+4], %t; atom.global.inc.u32 %r1, [%p0+8], 9;
        atom.global.exch.b32 %r2, [%p0+12], 7; atom.global.cas.b32 %r3, [%p0+16], %t, 77; red.global.or.b32 [%p0+20], %t;
        mov.f32 %f0, 0f3f800000; atom.global.add.f32 %f1, [%p0+24], %f0; red.global.dec.u32 [%p0+28], 5;
        mov.b32 %r4, 0x3f803f80; red.global.add.noftz.bf16x2 [%p0+32], %r4; mov.b32 %r4, 0x3c003c00; red.global.add.noftz.f16x2 [%p0+36], %r4;
        mov.u64 %x0, 3; atom.relaxed.gpu.global.add.u64 %x1, [%p0+40], %x0; red.global.min.s32 [%p0+48], -5;
        """
    )(2, 64, 0, words)
    assert (
        words[:4].tolist() == [256, 63, 8, 7]
        and words[4] == 77
        and words[5] == 63
        and words[6:7].view(np.float32)[0] == 128
    )
    assert (
        words[7] == (0 - 128) % 6
        and words[8] == 0x43004300
        and words[9] == 0x58005800
        and words[10] == 384
        and words[12] == 2**32 - 5
    )


# Type, operation and operands, old value, what atom returns besides it, new value.
ATOMICS = [
    ("add.s32", "-3", 1, -2),
    ("add.u64", "%x1", 2**64 - 1, 6),
    ("and.b32", "12", 10, 8),
    ("or.b64", "%x1", 8, 15),
    ("xor.b32", "12", 10, 6),
    ("xor.b64", "%x1", 5, 2),
    ("min.u32", "7", 2**32 - 1, 7),
    ("min.s32", "7", -1, -1),
    ("max.u64", "%x1", 3, 7),
    ("max.s64", "%x1", -3, 7),
    ("inc.u32", "7", 7, 0),
    ("inc.u32", "7", 6, 7),
    ("dec.u32", "7", 0, 7),
    ("dec.u32", "7", 9, 7),
    ("dec.u32", "7", 5, 4),
    ("exch.b64", "%x1", 3, 7),
    ("cas.b32", "5, 7", 5, 7),
    ("cas.b32", "5, 7", 6, 6),
    ("cas.b64", "%x2, %x1", 5, 7),
    ("cas.b16", "%h1, %h2", 5, 7),
    ("add.f64", "0d3FF8000000000000", 0x3FF0000000000000, 0x4004000000000000),
    ("add.noftz.f16", "%h3", 0x3C00, 0x4000),
    ("add.noftz.bf16", "%h4", 0x3F80, 0x4000),
]


@pytest.mark.parametrize("space", ["global", "shared", "generic"])
def test_every_atomic(space):
    for operation, operands, old, new in ATOMICS:
        kind = operation.split(".")[-1]
        bits = int(kind.strip("usbf"))
        register = {16: "%h5", 32: "%r1", 64: "%x5"}[bits]
        dot = "" if space == "generic" else "." + space
        address = "%x8" if space == "shared" else "%p0"
        body = f"""
            mov.u64 %x1, 7; mov.u64 %x2, 5; mov.u16 %h1, 5; mov.u16 %h2, 7; mov.u16 %h3, 0x3C00; mov.u16 %h4, 0x3F80; mov.u64 %x8, buffer;
            ld.global.b{bits} {register}, [%p0]; st.shared.b{bits} [buffer], {register};
            atom{dot}.{operation} {register}, [{address}], {operands}; st.global.b{bits} [%p0+8], {register};
        """
        if space == "shared":
            body += f"ld.shared.b{bits} {register}, [buffer]; st.global.b{bits} [%p0], {register};"
        if "cas" not in operation and "exch" not in operation and space == "global":
            body += f"ld.global.b{bits} {register}, [%p0]; st.global.b{bits} [%p0+16], {register}; ld.global.b{bits} {register}, [%p0+8]; st.global.b{bits} [%p0], {register}; red.global.{operation} [%p0], {operands};"
        words = np.zeros(3, np.uint64)
        mask = 2**bits - 1
        words[0] = words[2] = old & mask
        kernel(body, declarations=".shared .align 8 .b8 buffer[8];\n")(1, 1, 0, words)
        assert (int(words[0]) & mask, int(words[1]) & mask) == (new & mask, old & mask), operation


def test_hints_change_nothing():
    body = """
        createpolicy.fractional.L2::evict_last.b64 %x1, 1.0; createpolicy.range.global.L2::evict_last.L2::evict_unchanged.b64 %x2, [%p0], 128, 128;
        prefetch.global.L1 [%p0]; prefetch.L2 [%p0]; prefetchu.L1 [%p0]; applypriority.global.L2::evict_normal [%p0], 128;
        pmevent 3; nanosleep.u32 100; ldu.global.u32 %r1, [%p0]; ld.global.L2::cache_hint.u32 %r0, [%p0], %x1; add.u32 %r0, %r0, %r1; add.u32 %r0, %r0, 5;
    """
    assert each_thread(body, 32).tolist() == [5] * 32


def test_variables_and_constants():
    outside = """
    .global .align 4 .u32 counter = 5; .const .align 4 .f32 half = 0f3F000000; .global .align 8 .u64 pointer = generic(counter)+0;
    .global .align 1 .b8 text[4] = {65, 66, 0x43};
    """
    body = """
        ld.global.u64 %x1, [pointer]; ld.u32 %r0, [%x1]; ld.const.f32 %f0, [half]; cvt.rni.s32.f32 %r1, %f0; add.u32 %r0, %r0, %r1;
        ld.global.u8 %r2, [text+2]; add.u32 %r0, %r0, %r2;
    """
    assert each_thread(body, 1, outside=outside).tolist() == [5 + 0x43]


def test_cp_async_fills_with_zeros_behind_the_source():
    source, out = np.arange(1, 33, dtype=np.uint32), np.full(12, 9, np.uint32)
    kernel(
        """
        mov.u64 %x0, buffer; cvt.u32.u64 %r1, %x0; mov.u32 %r2, 4; mov.u32 %r3, 0;
        cp.async.cg.shared.global.L2::128B [%r1], [%p0+16], 16; cp.async.cg.shared.global [%r1+16], [%p0], 16, %r2;
        cp.async.ca.shared.global [%r1+32], [%p0+4], 4; cp.async.ca.shared.global [%r1+40], [%p0+8], 8, %r3;
        cp.async.commit_group; cp.async.wait_group 0; cp.async.wait_all;
        ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [buffer]; st.global.v4.u32 [%p1], {%r4, %r5, %r6, %r7};
        ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [buffer+16]; st.global.v4.u32 [%p1+16], {%r4, %r5, %r6, %r7};
        ld.shared.u32 %r4, [buffer+32]; ld.shared.v2.u32 {%r5, %r6}, [buffer+40]; st.global.v2.u32 [%p1+32], {%r4, %r5};
        """,
        2,
        declarations=".shared .align 16 .b8 buffer[48];\n",
    )(1, 1, 0, source, out)
    assert out.tolist() == [5, 6, 7, 8, 1, 0, 0, 0, 2, 0, 9, 9]
