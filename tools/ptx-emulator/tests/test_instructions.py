# ruff: noqa: E501
"""Every instruction by itself, in a small PTX text, against what the PTX ISA says."""

import math
import struct

import numpy as np
import ptx_emulator as emulator
import pytest

HEADER = ".version 8.5\n.target sm_80\n.address_size 64\n"
NAN = float("nan")
INF = float("inf")
SIZES = {"b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8}
SIZES |= {"u64": 8, "s64": 8, "f64": 8, "pred": 4}
DTYPES = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def to_bits(value, kind: str) -> int:
    if isinstance(value, float):
        if kind == "f64":
            return struct.unpack("<Q", struct.pack("<d", value))[0]
        if kind in ("f32", "b32", "u32"):
            return int(np.float32(value).view(np.uint32))
        if kind == "f16":
            return int(np.float16(value).view(np.uint16))
        if kind == "bf16":
            return int(np.float32(value).view(np.uint32)) >> 16
    return int(value) & ((1 << 8 * SIZES[kind]) - 1)


def evaluate(body: str, kinds: str, rows) -> list[int]:
    """Runs `body` (destination %d, sources %a %b %c of the `kinds`, destination first) with a row of sources in each lane."""
    out, *sources = kinds.split()
    names = "abcde"[: len(sources)]
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    count = len(rows)
    assert count <= 1024
    arrays = [np.array([to_bits(row[k], s) for row in rows], DTYPES[SIZES[s]]) for k, s in enumerate(sources)]
    result = np.zeros(count, DTYPES[SIZES[out]])
    text = HEADER + ".visible .entry k(" + ", ".join(f".param .u64 p{k}" for k in range(len(sources) + 1)) + ") {\n"
    text += (
        ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<9>; .reg .b64 %x<9>; .reg .b32 %thread; .reg .b64 %ad, %of;\n"
    )
    for name, kind in zip(("d", *names), (out, *sources), strict=True):
        text += f".reg .{'pred' if kind == 'pred' else 'b' + str(8 * SIZES[kind])} %{name};\n"
    text += "mov.u32 %thread, %tid.x;\n"
    for k, (name, kind) in enumerate(zip(names, sources, strict=True)):
        text += f"ld.param.u64 %ad, [p{k + 1}]; mul.wide.u32 %of, %thread, {SIZES[kind]}; add.s64 %ad, %ad, %of;\n"
        text += f"ld.global.b{8 * SIZES[kind]} %{name}, [%ad];\n"
    text += body + "\n"
    text += f"ld.param.u64 %ad, [p0]; mul.wide.u32 %of, %thread, {SIZES[out]}; add.s64 %ad, %ad, %of;\n"
    if out == "pred":
        text += "selp.u32 %r8, 1, 0, %d; st.global.u32 [%ad], %r8;\nret;\n}"
    else:
        text += f"st.global.b{8 * SIZES[out]} [%ad], %d;\nret;\n}}"
    emulator.load(text)["k"](1, count, 0, result, *arrays)
    return [int(v) for v in result]


def is_nan(bits: int, kind: str) -> bool:
    exponent, fraction = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52)}[kind]
    return bits >> fraction & ((1 << exponent) - 1) == (1 << exponent) - 1 and bits & ((1 << fraction) - 1) != 0


def check(body: str, kinds: str, cases) -> None:
    """`cases` maps sources to results; a list of pairs tells 0.0 from -0.0."""
    out = kinds.split()[0]
    cases = list(cases.items()) if isinstance(cases, dict) else cases
    got = evaluate(body, kinds, [sources for sources, _ in cases])
    for (sources, expected), bits in zip(cases, got, strict=True):
        if isinstance(expected, float) and math.isnan(expected):
            assert is_nan(bits, out), f"{body} of {sources}: {bits:#x} is no NaN"
        else:
            assert bits == to_bits(expected, out), f"{body} of {sources}: {bits:#x}, not {to_bits(expected, out):#x}"


def up(x: float) -> float:
    """The least float that is not below x."""
    y = np.float32(x)
    return float(y if float(y) >= x else np.nextafter(y, np.float32(INF)))


def down(x: float) -> float:
    return -up(-x)


M = 0xFFFFFFFF
INTEGER = [
    ("add.s32 %d, %a, %b;", "s32 s32 s32", {(1, 2): 3, (0x7FFFFFFF, 1): 0x80000000, (-1, -1): -2}),
    ("add.sat.s32 %d, %a, %b;", "s32 s32 s32", {(0x7FFFFFFF, 1): 0x7FFFFFFF, (-(2**31), -1): -(2**31), (3, 4): 7}),
    ("add.u16 %d, %a, %b;", "u16 u16 u16", {(65535, 2): 1}),
    ("add.u64 %d, %a, %b;", "u64 u64 u64", {(2**64 - 1, 2): 1}),
    ("sub.s32 %d, %a, %b;", "s32 s32 s32", {(1, 2): -1, (-(2**31), 1): 0x7FFFFFFF}),
    ("sub.sat.s32 %d, %a, %b;", "s32 s32 s32", {(-(2**31), 1): -(2**31)}),
    ("mul.lo.s32 %d, %a, %b;", "s32 s32 s32", {(-3, 5): -15, (65536, 65536): 0}),
    ("mul.hi.s32 %d, %a, %b;", "s32 s32 s32", {(-1, 1): -1, (65536, 65536): 1}),
    ("mul.hi.u32 %d, %a, %b;", "u32 u32 u32", {(M, M): 0xFFFFFFFE}),
    ("mul.wide.s32 %d, %a, %b;", "s64 s32 s32", {(-3, 5): -15, (-(2**31), -(2**31)): 2**62}),
    ("mul.wide.u16 %d, %a, %b;", "u32 u16 u16", {(65535, 65535): 65535**2}),
    ("mul.hi.u64 %d, %a, %b;", "u64 u64 u64", {(2**64 - 1, 2**64 - 1): 2**64 - 2}),
    ("mul.hi.s64 %d, %a, %b;", "s64 s64 s64", {(-1, 1): -1, (2**62, 4): 1}),
    ("mad.lo.s32 %d, %a, %b, %c;", "s32 s32 s32 s32", {(3, 4, 5): 17, (65536, 65536, 7): 7}),
    ("mad.hi.sat.s32 %d, %a, %b, %c;", "s32 s32 s32 s32", {(65536, 65536, 0x7FFFFFFF): 0x7FFFFFFF}),
    ("mad.wide.u32 %d, %a, %b, %c;", "u64 u32 u32 u64", {(M, M, 1): (M * M + 1) % 2**64}),
    ("mul24.lo.u32 %d, %a, %b;", "u32 u32 u32", {(0x1000003, 5): 15}),
    ("mul24.hi.s32 %d, %a, %b;", "s32 s32 s32", {(0xFFFFFF, 0x10000): -1}),
    ("mad24.lo.u32 %d, %a, %b, %c;", "u32 u32 u32 u32", {(3, 5, 7): 22}),
    ("sad.s32 %d, %a, %b, %c;", "s32 s32 s32 s32", {(3, 5, 7): 9, (5, -3, 1): 9}),
    ("sad.u32 %d, %a, %b, %c;", "u32 u32 u32 u32", {(0, M, 0): M}),
    ("div.s32 %d, %a, %b;", "s32 s32 s32", {(7, -2): -3, (-7, 2): -3, (-(2**31), -1): -(2**31)}),
    ("div.u64 %d, %a, %b;", "u64 u64 u64", {(2**64 - 1, 10): (2**64 - 1) // 10}),
    ("rem.s32 %d, %a, %b;", "s32 s32 s32", {(7, -2): 1, (-7, 2): -1, (-(2**31), -1): 0}),
    ("rem.u32 %d, %a, %b;", "u32 u32 u32", {(M, 10): 5}),
    ("abs.s32 %d, %a;", "s32 s32", {-5: 5, 5: 5, -(2**31): -(2**31)}),
    ("neg.s64 %d, %a;", "s64 s64", {5: -5, -(2**63): -(2**63)}),
    ("min.s32 %d, %a, %b;", "s32 s32 s32", {(-1, 1): -1}),
    ("min.u32 %d, %a, %b;", "u32 u32 u32", {(M, 1): 1}),
    ("max.s64 %d, %a, %b;", "s64 s64 s64", {(-1, 1): 1}),
    ("max.u16 %d, %a, %b;", "u16 u16 u16", {(65535, 1): 65535}),
    ("popc.b32 %d, %a;", "u32 u32", {0: 0, M: 32, 0x80000001: 2}),
    ("popc.b64 %d, %a;", "u32 u64", {2**64 - 1: 64}),
    ("clz.b32 %d, %a;", "u32 u32", {0: 32, 1: 31, M: 0}),
    ("clz.b64 %d, %a;", "u32 u64", {0: 64, 1: 63}),
    ("bfind.u32 %d, %a;", "u32 u32", {0: M, 1: 0, 0x80000000: 31}),
    ("bfind.s32 %d, %a;", "u32 s32", {0: M, -1: M, -2: 0, 5: 2}),
    ("bfind.shiftamt.u32 %d, %a;", "u32 u32", {0: M, 1: 31, 0x80000000: 0}),
    ("bfind.u64 %d, %a;", "u32 u64", {1 << 40: 40}),
    (
        "fns.b32 %d, %a, %b, %c;",
        "u32 u32 u32 s32",
        {(0xAAAA, 3, 1): 3, (0xAAAA, 3, 0): 3, (0xAAAA, 2, 0): M, (0xAAAA, 3, -2): 1, (0xAAAA, 3, 3): 7},
    ),
    ("brev.b32 %d, %a;", "u32 u32", {1: 0x80000000, 0xF0: 0x0F000000}),
    ("brev.b64 %d, %a;", "u64 u64", {1: 1 << 63}),
    (
        "bfe.u32 %d, %a, %b, %c;",
        "u32 u32 u32 u32",
        {(0xABCD1234, 8, 8): 0x12, (M, 28, 8): 0xF, (M, 0, 0): 0, (M, 40, 4): 0, (M, 0, 32): M},
    ),
    (
        "bfe.s32 %d, %a, %b, %c;",
        "s32 s32 u32 u32",
        {(0x80, 4, 4): -8, (0x70, 4, 4): 7, (-(2**31), 28, 8): -8, (-1, 5, 0): 0, (-(2**31), 40, 4): -1},
    ),
    ("bfe.u64 %d, %a, %b, %c;", "u64 u64 u32 u32", {(0xAB << 40, 40, 8): 0xAB}),
    (
        "bfi.b32 %d, %a, %b, %c, 8;",
        "u32 u32 u32 u32",
        {(0xFF, 0, 8): 0xFF00, (0, M, 28): 0x0FFFFFFF, (M, 0x123, 32): 0x123},
    ),
    ("bfi.b64 %d, %a, %b, %c, 64;", "u64 u64 u64 u32", {(5, 9, 0): 5}),
    ("szext.wrap.s32 %d, %a, %b;", "s32 s32 u32", {(0xFF, 8): -1, (0xFF, 40): -1, (0x7F, 8): 0x7F}),
    ("szext.clamp.u32 %d, %a, %b;", "u32 u32 u32", {(M, 8): 0xFF, (M, 40): M, (M, 0): 0}),
    ("bmsk.clamp.b32 %d, %a, %b;", "u32 u32 u32", {(4, 4): 0xF0, (4, 60): 0xFFFFFFF0, (33, 4): 0}),
    ("bmsk.wrap.b32 %d, %a, %b;", "u32 u32 u32", {(36, 4): 0xF0}),
    ("dp4a.s32.s32 %d, %a, %b, %c;", "s32 s32 s32 s32", {(0x01020304, 0xFFFFFFFF, 100): 90}),
    ("dp4a.u32.s32 %d, %a, %b, %c;", "s32 u32 s32 s32", {(0xFF000000, 0xFF000000, 0): -255}),
    ("dp2a.lo.s32.s32 %d, %a, %b, %c;", "s32 s32 s32 s32", {(0x00020003, 0x0000FF05, 1): 14}),
    ("dp2a.hi.u32.u32 %d, %a, %b, %c;", "s32 u32 u32 s32", {(0x00020003, 0x04050000, 1): 24}),
    ("and.b32 %d, %a, %b;", "b32 b32 b32", {(0xF0F0, 0xFF00): 0xF000}),
    ("or.b64 %d, %a, %b;", "b64 b64 b64", {(1 << 63, 1): (1 << 63) | 1}),
    ("xor.b16 %d, %a, %b;", "b16 b16 b16", {(0xFF, 0xF): 0xF0}),
    ("not.b32 %d, %a;", "b32 b32", {0: M}),
    ("cnot.b32 %d, %a;", "b32 b32", {0: 1, 5: 0}),
    ("shl.b32 %d, %a, %b;", "b32 b32 u32", {(1, 31): 1 << 31, (1, 32): 0, (1, 1000): 0}),
    ("shr.s32 %d, %a, %b;", "s32 s32 u32", {(-8, 1): -4, (-8, 99): -1, (8, 99): 0}),
    ("shr.u64 %d, %a, %b;", "u64 u64 u32", {(1 << 63, 63): 1, (1 << 63, 64): 0}),
    ("shf.l.wrap.b32 %d, %a, %b, %c;", "b32 b32 b32 u32", {(0x80000000, 1, 1): 3, (5, 6, 32): 6}),
    ("shf.l.clamp.b32 %d, %a, %b, %c;", "b32 b32 b32 u32", {(5, 6, 40): 5}),
    ("shf.r.wrap.b32 %d, %a, %b, %c;", "b32 b32 b32 u32", {(2, 1, 1): 0x80000001}),
    ("shf.r.clamp.b32 %d, %a, %b, %c;", "b32 b32 b32 u32", {(5, 6, 40): 6}),
    (
        "prmt.b32 %d, %a, %b, %c;",
        "b32 b32 b32 b32",
        {(0x33221100, 0x77665544, 0x7531): 0x77553311, (0x80, 0, 0x8888): M},
    ),
    ("prmt.b32.f4e %d, %a, %b, %c;", "b32 b32 b32 b32", {(0x33221100, 0x77665544, 1): 0x44332211}),
    ("prmt.b32.b4e %d, %a, %b, %c;", "b32 b32 b32 b32", {(0x33221100, 0x77665544, 1): 0x66770011}),
    ("prmt.b32.rc8 %d, %a, %b, %c;", "b32 b32 b32 b32", {(0x33221100, 0, 2): 0x22222222}),
    ("prmt.b32.ecl %d, %a, %b, %c;", "b32 b32 b32 b32", {(0x33221100, 0, 1): 0x33221111}),
    ("prmt.b32.ecr %d, %a, %b, %c;", "b32 b32 b32 b32", {(0x33221100, 0, 1): 0x11111100}),
    ("prmt.b32.rc16 %d, %a, %b, %c;", "b32 b32 b32 b32", {(0x33221100, 0, 1): 0x33223322}),
    ("add.cc.u32 %d, %a, %b; addc.u32 %d, 0, 0;", "u32 u32 u32", {(M, 1): 1, (M, 0): 0}),
    ("sub.cc.u32 %d, %a, %b; subc.u32 %d, 0, 0;", "u32 u32 u32", {(0, 1): M, (1, 0): 0}),
    (
        "mad.lo.cc.u32 %d, %a, %b, %c; madc.hi.u32 %d, %a, %b, 0;",
        "u32 u32 u32 u32",
        {(M, M, M): 0xFFFFFFFF, (2, 3, 4): 0},
    ),
    ("setp.lt.s32 %d, %a, %b;", "pred s32 s32", {(-1, 0): 1, (0, 0): 0}),
    ("setp.lo.u32 %d, %a, %b;", "pred u32 u32", {(M, 0): 0, (0, M): 1}),
    ("setp.eq.u32 %p1, %a, 5; setp.ge.and.s32 %d, %a, %b, !%p1;", "pred s32 s32", {(5, 0): 0, (6, 0): 1, (-1, 0): 0}),
    ("setp.eq.s32 %p1|%d, %a, %b;", "pred s32 s32", {(1, 1): 0, (1, 2): 1}),
    ("set.gt.u32.s32 %d, %a, %b;", "u32 s32 s32", {(1, 0): M, (0, 1): 0}),
    ("set.gt.f32.s32 %d, %a, %b;", "f32 s32 s32", {(1, 0): 1.0, (0, 1): 0.0}),
    ("setp.ne.u32 %p1, %c, 0; selp.b32 %d, %a, %b, %p1;", "b32 b32 b32 u32", {(1, 2, 3): 1, (1, 2, 0): 2}),
    ("slct.u32.s32 %d, %a, %b, %c;", "u32 u32 u32 s32", {(1, 2, 0): 1, (1, 2, -1): 2}),
    ("slct.b32.f32 %d, %a, %b, %c;", "b32 b32 b32 f32", {(1, 2, -0.0): 1, (1, 2, -1.0): 2, (1, 2, NAN): 2}),
    ("lop3.b32 %d, %a, %b, %c, 0x96;", "b32 b32 b32 b32", {(0xFF, 0x0F, 0x33): 0xFF ^ 0x0F ^ 0x33}),
    ("lop3.b32 %d, %a, %b, %c, 0xCA;", "b32 b32 b32 b32", {(0xF0, 0xAA, 0x55): 0xA5}),
    ("mov.b32 {%h1, %h2}, %a; mov.b32 %d, {%h2, %h1};", "b32 b32", {0x12345678: 0x56781234}),
    ("mov.b64 {%r1, %r2}, %a; mov.b64 %d, {%r2, %r1};", "b64 b64", {0x1111111122222222: 0x2222222211111111}),
    ("mov.b64 {%h1, %h2, %h3, _}, %a; cvt.u32.u16 %d, %h3;", "u32 b64", {0x4444333322221111: 0x3333}),
    ("mad.hi.u32 %d, %a, %b, %c;", "u32 u32 u32 u32", {(M, M, 5): 3, (65536, 65536, M): 0}),
    ("mad.lo.u64 %d, %a, %b, %c;", "u64 u64 u64 u64", {(2**63, 2, 7): 7, (2**32, 2**31, 1): 2**63 + 1}),
    ("mad24.hi.s32 %d, %a, %b, %c;", "s32 s32 s32 s32", {(0xFFFFFF, 0x10000, 5): 4}),
    ("mul24.hi.u32 %d, %a, %b;", "u32 u32 u32", {(0xFFFFFF, 0xFFFFFF): 0xFFFFFE00}),
    ("sad.u64 %d, %a, %b, %c;", "u64 u64 u64 u64", {(0, 2**64 - 1, 1): 0, (9, 5, 1): 5}),
    ("rem.s64 %d, %a, %b;", "s64 s64 s64", {(-7, 2): -1, (7, -2): 1}),
    ("div.s16 %d, %a, %b;", "s16 s16 s16", {(-7, 2): -3, (7, 7): 1}),
    ("abs.s16 %d, %a;", "s16 s16", {-5: 5, -32768: -32768}),
    ("neg.s32 %d, %a;", "s32 s32", {-(2**31): -(2**31), 7: -7}),
    ("min.s64 %d, %a, %b;", "s64 s64 s64", {(-1, 1): -1}),
    ("max.s32 %d, %a, %b;", "s32 s32 s32", {(-1, 1): 1}),
    ("clz.b32 %d, %a;", "u32 u32", {0xFFFF: 16}),
    ("bfind.shiftamt.s64 %d, %a;", "u32 s64", {-2: 63, 5: 61, 0: M}),
    ("bfe.s64 %d, %a, %b, %c;", "s64 s64 u32 u32", {(0x80, 4, 4): -8, (-(2**63), 60, 9): -8}),
    ("not.b64 %d, %a;", "b64 b64", {0: 2**64 - 1}),
    ("cnot.b64 %d, %a;", "b64 b64", {0: 1, 2**40: 0}),
    ("shl.b64 %d, %a, %b;", "b64 b64 u32", {(1, 63): 1 << 63, (1, 64): 0}),
    ("shr.u16 %d, %a, %b;", "u16 u16 u32", {(0x8000, 15): 1, (0x8000, 16): 0}),
    ("subc.cc.u32 %r1, 0, 0; sub.cc.u64 %x1, %a, %b; subc.u64 %d, 9, 0;", "u64 u64 u64", {(0, 1): 8, (1, 1): 9}),
    ("add.cc.u64 %x1, %a, %b; addc.u64 %d, 5, 0;", "u64 u64 u64", {(2**64 - 1, 1): 6, (1, 1): 5}),
    ("setp.hs.u64 %d, %a, %b;", "pred u64 u64", {(2**64 - 1, 0): 1, (0, 0): 1, (0, 1): 0}),
    ("setp.le.s16 %d, %a, %b;", "pred s16 s16", {(-1, 0): 1, (1, 0): 0, (0, 0): 1}),
    ("setp.eq.u32 %p1, %a, 5; setp.gt.or.s32 %d, %a, %b, %p1;", "pred s32 s32", {(5, 9): 1, (6, 0): 1, (-1, 0): 0}),
    ("setp.eq.u32 %p1, %a, 5; setp.gt.xor.s32 %d, %a, %b, %p1;", "pred s32 s32", {(5, 9): 1, (5, 0): 0, (6, 0): 1}),
    ("setp.eq.b64 %d, %a, %b;", "pred b64 b64", {(2**40, 2**40): 1, (2**40, 0): 0}),
    (
        "setp.eq.u32 %p1, %a, 1; setp.eq.u32 %p2, %b, 1; and.pred %p3, %p1, %p2; xor.pred %p4, %p1, %p2; not.pred %p5, %p3; or.pred %d, %p5, %p4;",
        "pred u32 u32",
        {(1, 1): 0, (1, 0): 1, (0, 0): 1},
    ),
    ("selp.b64 %d, %a, %b, 1;", "b64 b64 b64", {(1, 2): 1}),
    ("prmt.b32 %d, %a, %b, 0x9ABC;", "b32 b32 b32", {(0x00800000, 0x80): 0x00FF00FF}),
]
FLOAT = [
    (
        "add.f32 %d, %a, %b;",
        "f32 f32 f32",
        [((1.0, 2.0), 3.0), ((INF, -INF), NAN), ((0.0, -0.0), 0.0), ((-0.0, -0.0), -0.0), ((1e-45, 1e-45), 3e-45)],
    ),
    ("add.ftz.f32 %d, %a, %b;", "f32 f32 f32", {(1e-45, 1e-45): 0.0, (-1e-45, -1e-45): -0.0}),
    ("add.sat.f32 %d, %a, %b;", "f32 f32 f32", {(1.0, 2.0): 1.0, (-1.0, 0.0): 0.0, (NAN, 0.0): 0.0, (0.25, 0.5): 0.75}),
    ("add.rn.f32 %d, %a, %b;", "f32 f32 f32", {(1.0, 2.0**-24): 1.0, (1.0, 2.0**-23): 1 + 2.0**-23}),
    ("add.rp.f32 %d, %a, %b;", "f32 f32 f32", {(1.0, 2.0**-30): 1 + 2.0**-23, (-1.0, 2.0**-30): -1 + 2.0**-24}),
    ("add.rm.f32 %d, %a, %b;", "f32 f32 f32", {(1.0, -(2.0**-30)): 1 - 2.0**-24, (1.0, -1.0): -0.0}),
    ("add.rz.f32 %d, %a, %b;", "f32 f32 f32", {(1.0, 2.0**-23 * 0.75): 1.0, (-1.0, 2.0**-30): -1 + 2.0**-24}),
    ("sub.f32 %d, %a, %b;", "f32 f32 f32", {(1.0, 2.0): -1.0, (INF, INF): NAN}),
    ("mul.f32 %d, %a, %b;", "f32 f32 f32", {(3.0, -2.0): -6.0, (0.0, INF): NAN, (2.0**-100, 2.0**-45): 2.0**-145}),
    ("mul.ftz.f32 %d, %a, %b;", "f32 f32 f32", {(2.0**-100, 2.0**-45): 0.0}),
    ("mul.rz.f32 %d, %a, %b;", "f32 f32 f32", {(1 + 2.0**-23, 1 + 2.0**-23): 1 + 2.0**-22}),
    ("mul.rp.f32 %d, %a, %b;", "f32 f32 f32", {(1 + 2.0**-23, 1 + 2.0**-23): 1 + 3 * 2.0**-23}),
    (
        "fma.rn.f32 %d, %a, %b, %c;",
        "f32 f32 f32 f32",
        {(1 + 2.0**-12, 1 - 2.0**-12, -1.0): -(2.0**-24), (INF, 0.0, 1.0): NAN},
    ),
    ("fma.rz.f32 %d, %a, %b, %c;", "f32 f32 f32 f32", {(1.0, 1.0, -(2.0**-30)): 1 - 2.0**-24}),
    ("fma.rn.f64 %d, %a, %b, %c;", "f64 f64 f64 f64", {(1 + 2.0**-30, 1 - 2.0**-30, -1.0): -(2.0**-60)}),
    ("add.rp.f64 %d, %a, %b;", "f64 f64 f64", {(1.0, 2.0**-80): 1 + 2.0**-52}),
    (
        "div.rn.f32 %d, %a, %b;",
        "f32 f32 f32",
        {(1.0, 3.0): float(np.float32(1) / np.float32(3)), (1.0, 0.0): INF, (0.0, 0.0): NAN},
    ),
    ("div.rm.f64 %d, %a, %b;", "f64 f64 f64", {(1.0, 3.0): math.nextafter(1 / 3, 0) if 1 / 3 * 3 > 1 else 1 / 3}),
    ("div.approx.f32 %d, %a, %b;", "f32 f32 f32", {(6.0, 3.0): 2.0}),
    ("div.full.ftz.f32 %d, %a, %b;", "f32 f32 f32", {(6.0, 3.0): 2.0}),
    ("rcp.rn.f32 %d, %a;", "f32 f32", {4.0: 0.25, -0.0: -INF, INF: 0.0}),
    ("rcp.approx.ftz.f32 %d, %a;", "f32 f32", {4.0: 0.25, 1e-45: INF}),
    ("sqrt.rn.f32 %d, %a;", "f32 f32", {4.0: 2.0, -1.0: NAN, -0.0: -0.0, 2.0: float(np.sqrt(np.float32(2)))}),
    ("sqrt.rp.f64 %d, %a;", "f64 f64", {2.0: 1.4142135623730951, 4.0: 2.0}),
    ("rsqrt.approx.f32 %d, %a;", "f32 f32", [(4.0, 0.5), (0.0, INF), (-0.0, -INF), (-1.0, NAN), (INF, 0.0)]),
    ("abs.f32 %d, %a;", "f32 f32", {-1.5: 1.5, -0.0: 0.0}),
    ("neg.f32 %d, %a;", "f32 f32", {1.5: -1.5, 0.0: -0.0}),
    (
        "min.f32 %d, %a, %b;",
        "f32 f32 f32",
        [((0.0, -0.0), -0.0), ((-0.0, 0.0), -0.0), ((NAN, 1.0), 1.0), ((1.0, NAN), 1.0), ((NAN, NAN), NAN)],
    ),
    (
        "max.f32 %d, %a, %b;",
        "f32 f32 f32",
        [((0.0, -0.0), 0.0), ((-0.0, 0.0), 0.0), ((NAN, 1.0), 1.0), ((2.0, 1.0), 2.0)],
    ),
    ("min.NaN.f32 %d, %a, %b;", "f32 f32 f32", {(NAN, 1.0): NAN, (2.0, 1.0): 1.0}),
    ("max.xorsign.abs.f32 %d, %a, %b;", "f32 f32 f32", {(-3.0, 2.0): -3.0, (-3.0, -4.0): 4.0}),
    ("min.f64 %d, %a, %b;", "f64 f64 f64", {(NAN, 1.0): 1.0}),
    ("copysign.f32 %d, %a, %b;", "f32 f32 f32", {(-1.0, 2.0): -2.0, (1.0, -2.0): 2.0}),
    ("ex2.approx.f32 %d, %a;", "f32 f32", {3.0: 8.0, -INF: 0.0, INF: INF, 0.0: 1.0}),
    ("ex2.approx.ftz.f32 %d, %a;", "f32 f32", {-140.0: 0.0}),
    ("lg2.approx.f32 %d, %a;", "f32 f32", {8.0: 3.0, 0.0: -INF, -1.0: NAN}),
    ("sin.approx.f32 %d, %a;", "f32 f32", [(0.0, 0.0), (-0.0, -0.0), (INF, NAN)]),
    ("cos.approx.f32 %d, %a;", "f32 f32", {0.0: 1.0, INF: NAN}),
    ("tanh.approx.f32 %d, %a;", "f32 f32", {0.0: 0.0, INF: 1.0, -INF: -1.0}),
    ("testp.finite.f32 %d, %a;", "pred f32", {1.0: 1, INF: 0, NAN: 0}),
    ("testp.subnormal.f32 %d, %a;", "pred f32", {1e-45: 1, 1.0: 0, 0.0: 0}),
    ("setp.eq.f32 %d, %a, %b;", "pred f32 f32", {(NAN, NAN): 0, (0.0, -0.0): 1}),
    ("setp.ne.f32 %d, %a, %b;", "pred f32 f32", {(NAN, 1.0): 0, (2.0, 1.0): 1}),
    ("setp.neu.f32 %d, %a, %b;", "pred f32 f32", {(NAN, 1.0): 1, (1.0, 1.0): 0}),
    ("setp.equ.f32 %d, %a, %b;", "pred f32 f32", {(NAN, 1.0): 1, (1.0, 2.0): 0, (1.0, 1.0): 1}),
    ("setp.ltu.f64 %d, %a, %b;", "pred f64 f64", {(NAN, 1.0): 1, (2.0, 1.0): 0}),
    ("setp.gtu.f32 %d, %a, %b;", "pred f32 f32", {(NAN, 1.0): 1, (0.5, 1.0): 0}),
    ("setp.num.f32 %d, %a, %b;", "pred f32 f32", {(NAN, 1.0): 0, (2.0, 1.0): 1}),
    ("setp.nan.f32 %d, %a, %b;", "pred f32 f32", {(NAN, 1.0): 1, (2.0, 1.0): 0}),
    ("setp.gt.ftz.f32 %d, %a, %b;", "pred f32 f32", {(1e-45, 0.0): 0}),
    ("setp.gt.f16 %d, %a, %b;", "pred f16 f16", {(2.0, 1.0): 1, (NAN, 1.0): 0}),
    (
        "add.f16 %d, %a, %b;",
        "f16 f16 f16",
        {
            (1.0, 2.0**-11): 1.0,
            (1.0, 3 * 2.0**-11): 1 + 2 * 2.0**-10,
            (65504.0, 65504.0): INF,
            (2.0**-24, 2.0**-24): 2.0**-23,
        },
    ),
    ("add.sat.f16 %d, %a, %b;", "f16 f16 f16", {(1.0, 1.0): 1.0}),
    ("add.ftz.f16 %d, %a, %b;", "f16 f16 f16", {(2.0**-24, 0.0): 0.0}),
    ("mul.rn.bf16 %d, %a, %b;", "bf16 bf16 bf16", {(3.0, 0.5): 1.5}),
    (
        "fma.rn.f16 %d, %a, %b, %c;",
        "f16 f16 f16 f16",
        {(1 + 2.0**-10, 1 - 2.0**-10, -1.0): -(2.0**-20), (1.0, 1.0, 2.0**-24): 1.0},
    ),
    ("fma.rn.bf16 %d, %a, %b, %c;", "bf16 bf16 bf16 bf16", {(1 + 2.0**-7, 1 - 2.0**-7, -1.0): -(2.0**-14)}),
    ("fma.rn.relu.bf16 %d, %a, %b, %c;", "bf16 bf16 bf16 bf16", {(1.0, -1.0, 0.0): 0.0, (1.0, 2.0, 1.0): 3.0}),
    ("max.f16 %d, %a, %b;", "f16 f16 f16", {(NAN, 1.0): 1.0, (2.0, 3.0): 3.0}),
    ("add.f16x2 %d, %a, %b;", "b32 b32 b32", {(0x3C003C00, 0x40003C00): 0x42004000}),
    ("fma.rn.bf16x2 %d, %a, %b, %c;", "b32 b32 b32 b32", {(0x3F804000, 0x3F804000, 0x3F803F80): 0x400040A0}),
    ("neg.bf16x2 %d, %a;", "b32 b32", {0x3F80BF80: 0xBF803F80}),
    ("min.NaN.bf16x2 %d, %a, %b;", "b32 b32 b32", {(0x3F804000, 0x40003F80): 0x3F803F80}),
    ("ex2.approx.ftz.bf16x2 %d, %a;", "b32 b32", {0x3F800000: 0x40003F80}),
    # Each directed rounding of each operation that has one.
    ("sub.rz.f32 %d, %a, %b;", "f32 f32 f32", {(1.0, 2.0**-30): down(1 - 2.0**-30), (-1.0, 2.0**-30): -1.0}),
    ("sub.rp.f32 %d, %a, %b;", "f32 f32 f32", {(1.0, 2.0**-30): 1.0, (1.0, 1.0): 0.0}),
    ("sub.rm.f32 %d, %a, %b;", "f32 f32 f32", {(1.0, 2.0**-30): down(1 - 2.0**-30), (1.0, 1.0): -0.0}),
    (
        "mul.rm.f32 %d, %a, %b;",
        "f32 f32 f32",
        {(1 + 2.0**-23, -1 - 2.0**-23): -1 - 3 * 2.0**-23, (3e38, 10.0): 2.0**128 - 2.0**104},
    ),
    ("mul.rz.ftz.f32 %d, %a, %b;", "f32 f32 f32", {(1e-40, 1e10): 0.0, (3e38, -10.0): 2.0**104 - 2.0**128}),
    (
        "fma.rp.f32 %d, %a, %b, %c;",
        "f32 f32 f32 f32",
        {(1.0, 1.0, 2.0**-30): 1 + 2.0**-23, (-1.0, 1.0, 2.0**-30): down(-1 + 2.0**-30) + 2.0**-24},
    ),
    (
        "fma.rm.f32 %d, %a, %b, %c;",
        "f32 f32 f32 f32",
        {(1.0, 1.0, -(2.0**-30)): down(1 - 2.0**-30), (1.0, 1.0, 2.0**-30): 1.0},
    ),
    (
        "fma.rn.sat.f32 %d, %a, %b, %c;",
        "f32 f32 f32 f32",
        {(2.0, 2.0, 0.0): 1.0, (1.0, 0.5, 0.25): 0.75, (NAN, 1.0, 1.0): 0.0},
    ),
    ("fma.rz.f64 %d, %a, %b, %c;", "f64 f64 f64 f64", {(1.0, 1.0, -(2.0**-80)): 1 - 2.0**-53}),
    ("div.rz.f32 %d, %a, %b;", "f32 f32 f32", {(1.0, 3.0): down(1 / 3), (-1.0, 3.0): -down(1 / 3)}),
    ("div.rp.f32 %d, %a, %b;", "f32 f32 f32", {(1.0, 3.0): up(1 / 3), (-1.0, 3.0): -down(1 / 3)}),
    ("div.rm.f32 %d, %a, %b;", "f32 f32 f32", {(1.0, 3.0): down(1 / 3), (-1.0, 3.0): -up(1 / 3), (1.0, -0.0): -INF}),
    ("div.rn.ftz.f32 %d, %a, %b;", "f32 f32 f32", {(1e-40, 1.0): 0.0, (1.0, 1e-40): INF}),
    ("div.rn.f64 %d, %a, %b;", "f64 f64 f64", {(1.0, 3.0): 1 / 3, (-0.0, 5.0): -0.0}),
    ("rcp.rz.f32 %d, %a;", "f32 f32", {3.0: down(1 / 3), -3.0: -down(1 / 3)}),
    ("rcp.rm.f32 %d, %a;", "f32 f32", {3.0: down(1 / 3), -3.0: -up(1 / 3)}),
    ("rcp.rp.f32 %d, %a;", "f32 f32", {3.0: up(1 / 3), -3.0: -down(1 / 3)}),
    ("rcp.rn.f64 %d, %a;", "f64 f64", {3.0: 1 / 3, -0.0: -INF}),
    ("rcp.approx.ftz.f64 %d, %a;", "f64 f64", {4.0: 0.25}),
    ("sqrt.rz.f32 %d, %a;", "f32 f32", {2.0: down(math.sqrt(2)), 3.0: down(math.sqrt(3))}),
    ("sqrt.rm.f32 %d, %a;", "f32 f32", {2.0: down(math.sqrt(2)), 3.0: down(math.sqrt(3))}),
    ("sqrt.rp.f32 %d, %a;", "f32 f32", {2.0: up(math.sqrt(2)), 3.0: up(math.sqrt(3))}),
    ("sqrt.rn.ftz.f32 %d, %a;", "f32 f32", {1e-40: 0.0, -1e-40: -0.0}),
    ("rsqrt.approx.ftz.f64 %d, %a;", "f64 f64", {4.0: 0.5}),
    ("add.rm.f64 %d, %a, %b;", "f64 f64 f64", {(1.0, -(2.0**-80)): 1 - 2.0**-53, (1.0, -1.0): -0.0}),
    ("mul.rz.f64 %d, %a, %b;", "f64 f64 f64", {(1 + 2.0**-52, 1 + 2.0**-52): 1 + 2.0**-51}),
    ("sub.rn.f64 %d, %a, %b;", "f64 f64 f64", {(1.0, 2.0): -1.0}),
    # Signs, extremes and properties in every type.
    ("abs.ftz.f32 %d, %a;", "f32 f32", {-1e-40: 0.0, -2.0: 2.0}),
    ("abs.f64 %d, %a;", "f64 f64", {-0.0: 0.0, -2.0: 2.0}),
    ("neg.f64 %d, %a;", "f64 f64", {0.0: -0.0}),
    ("abs.f16 %d, %a;", "f16 f16", {-1.5: 1.5, -0.0: 0.0}),
    ("abs.bf16x2 %d, %a;", "b32 b32", {0xBF803F80: 0x3F803F80}),
    ("neg.f16x2 %d, %a;", "b32 b32", {0x3C00BC00: 0xBC003C00}),
    ("max.f64 %d, %a, %b;", "f64 f64 f64", [((0.0, -0.0), 0.0), ((NAN, 1.0), 1.0), ((NAN, NAN), NAN)]),
    ("max.NaN.f16 %d, %a, %b;", "f16 f16 f16", {(NAN, 1.0): NAN, (2.0, 3.0): 3.0}),
    ("min.f16x2 %d, %a, %b;", "b32 b32 b32", {(0x3C004000, 0x40003C00): 0x3C003C00}),
    ("min.xorsign.abs.f32 %d, %a, %b;", "f32 f32 f32", {(-3.0, 2.0): -2.0, (-3.0, -4.0): 3.0}),
    ("min.ftz.f32 %d, %a, %b;", "f32 f32 f32", {(1e-40, 1.0): 0.0}),
    ("copysign.f64 %d, %a, %b;", "f64 f64 f64", {(-1.0, 2.0): -2.0}),
    ("testp.infinite.f32 %d, %a;", "pred f32", {-INF: 1, 1.0: 0, NAN: 0}),
    ("testp.number.f32 %d, %a;", "pred f32", {INF: 1, NAN: 0}),
    ("testp.notanumber.f64 %d, %a;", "pred f64", {INF: 0, NAN: 1}),
    ("testp.normal.f64 %d, %a;", "pred f64", {1.0: 1, 5e-324: 0, 0.0: 0, INF: 0}),
    ("sub.f16 %d, %a, %b;", "f16 f16 f16", {(1.0, 2.0**-12): 1.0, (1.0, 2.0**-10): 1 - 2.0**-10}),
    ("sub.bf16x2 %d, %a, %b;", "b32 b32 b32", {(0x40004000, 0x3F803F80): 0x3F803F80}),
    ("mul.f16x2 %d, %a, %b;", "b32 b32 b32", {(0x40003C00, 0x40004200): 0x44004200}),
    ("fma.rn.sat.f16 %d, %a, %b, %c;", "f16 f16 f16 f16", {(2.0, 2.0, 0.0): 1.0, (-1.0, 1.0, 0.0): 0.0}),
    ("fma.rn.ftz.f16x2 %d, %a, %b, %c;", "b32 b32 b32 b32", {(0x3C003C00, 0x40000001, 0x3C000000): 0x42000000}),
    ("ex2.approx.f16 %d, %a;", "f16 f16", {3.0: 8.0, -INF: 0.0}),
    ("tanh.approx.f16 %d, %a;", "f16 f16", {0.0: 0.0, INF: 1.0}),
    ("tanh.approx.bf16x2 %d, %a;", "b32 b32", {0x7F80FF80: 0x3F80BF80}),
    ("set.lt.u32.f32 %d, %a, %b;", "u32 f32 f32", {(1.0, 2.0): M, (NAN, 2.0): 0}),
    ("set.le.f32.f32 %d, %a, %b;", "f32 f32 f32", {(1.0, 1.0): 1.0}),
    ("selp.f32 %d, %a, %b, 0;", "f32 f32 f32", {(1.0, 2.0): 2.0}),
    ("mov.f64 %d, %a;", "f64 f64", {1.5: 1.5}),
]
CONVERSION = [
    ("cvt.s32.s16 %d, %a;", "s32 s16", {-1: -1, 5: 5}),
    ("cvt.u32.u16 %d, %a;", "u32 u16", {65535: 65535}),
    ("cvt.u64.u32 %d, %a;", "u64 u32", {M: M}),
    ("cvt.s64.s32 %d, %a;", "s64 s32", {-1: -1}),
    ("cvt.u16.u32 %d, %a;", "u16 u32", {0x12345678: 0x5678}),
    ("cvt.sat.u8.s32 %d, %a;", "u32 s32", {-5: 0, 300: 255, 7: 7}),
    ("cvt.sat.s16.s32 %d, %a;", "s16 s32", {70000: 32767, -70000: -32768}),
    ("cvt.s8.s32 %d, %a;", "s32 s32", {0xFF: -1, 0x7F: 127}),
    ("cvt.rni.s32.f32 %d, %a;", "s32 f32", {2.5: 2, 3.5: 4, -2.5: -2, NAN: 0, 1e20: 0x7FFFFFFF, -INF: -(2**31)}),
    ("cvt.rzi.s32.f32 %d, %a;", "s32 f32", {2.9: 2, -2.9: -2, NAN: 0, 2.0**31: 0x7FFFFFFF}),
    ("cvt.rmi.s32.f32 %d, %a;", "s32 f32", {-2.1: -3}),
    ("cvt.rpi.s32.f32 %d, %a;", "s32 f32", {2.1: 3}),
    ("cvt.rzi.u32.f32 %d, %a;", "u32 f32", {-1.0: 0, 1e20: M, 3e9: 3000000000}),
    ("cvt.rzi.u64.f64 %d, %a;", "u64 f64", {-1.0: 0, 2.0**64: 2**64 - 1, 2.0**63: 2**63}),
    ("cvt.rzi.s64.f32 %d, %a;", "s64 f32", {-(2.0**63): -(2**63), NAN: 0}),
    ("cvt.rn.f32.s32 %d, %a;", "f32 s32", {-3: -3.0, 16777217: 16777216.0}),
    ("cvt.rp.f32.s32 %d, %a;", "f32 s32", {16777217: 16777218.0}),
    ("cvt.rz.f32.u64 %d, %a;", "f32 u64", {2**64 - 1: 2.0**64 - 2.0**40}),
    ("cvt.rn.f32.u64 %d, %a;", "f32 u64", {2**64 - 1: 2.0**64, 2**24 + 1: 2.0**24}),
    ("cvt.rn.f64.u64 %d, %a;", "f64 u64", {2**53 + 1: 2.0**53}),
    ("cvt.rn.f16.s32 %d, %a;", "f16 s32", {2049: 2048.0, 70000: INF}),
    ("cvt.f64.f32 %d, %a;", "f64 f32", {1.5: 1.5, NAN: NAN}),
    ("cvt.rn.f32.f64 %d, %a;", "f32 f64", {1 + 2.0**-30: 1.0, 1e300: INF}),
    ("cvt.rp.f32.f64 %d, %a;", "f32 f64", {1 + 2.0**-30: 1 + 2.0**-23}),
    ("cvt.rz.f32.f64 %d, %a;", "f32 f64", {1e300: float(np.finfo(np.float32).max)}),
    (
        "cvt.rn.f16.f32 %d, %a;",
        "f16 f32",
        {1 + 2.0**-11: 1.0, 65519.0: 65504.0, 65520.0: INF, 2.0**-25: 0.0, 1.5 * 2.0**-25: 2.0**-24},
    ),
    ("cvt.rz.f16.f32 %d, %a;", "f16 f32", {1 + 2.0**-10 * 0.99: 1.0, 1e30: 65504.0}),
    ("cvt.rn.f16.f32 %d, %a;", "u16 f32", {NAN: 0x7FFF}),
    ("cvt.rn.bf16.f32 %d, %a;", "u16 f32", {1 + 2.0**-8: 0x3F80, 1 + 3 * 2.0**-8: 0x3F82, NAN: 0x7FFF, 3.4e38: 0x7F80}),
    ("cvt.rn.relu.bf16.f32 %d, %a;", "u16 f32", {-1.0: 0, 1.0: 0x3F80}),
    ("cvt.f32.bf16 %d, %a;", "f32 bf16", {1.5: 1.5}),
    ("cvt.f32.f16 %d, %a;", "f32 f16", {2.0**-24: 2.0**-24, INF: INF, -0.0: -0.0, NAN: NAN}),
    ("cvt.rn.bf16x2.f32 %d, %a, %b;", "b32 f32 f32", {(1.0, 2.0): 0x3F804000}),
    ("cvt.rz.bf16x2.f32 %d, %a, %b;", "b32 f32 f32", {(1 + 2.0**-7 * 0.9, -2.0): 0x3F80C000}),
    ("cvt.rn.relu.f16x2.f32 %d, %a, %b;", "b32 f32 f32", {(1.0, -2.0): 0x3C000000}),
    ("cvt.rna.tf32.f32 %d, %a;", "b32 f32", {1 + 2.0**-11: 0x3F802000, 1 + 2.0**-12: 0x3F800000}),
    ("cvt.rni.f32.f32 %d, %a;", "f32 f32", {2.5: 2.0, -0.4: -0.0, INF: INF}),
    ("cvt.rzi.f32.f32 %d, %a;", "f32 f32", {-2.5: -2.0}),
    ("cvt.rmi.f64.f64 %d, %a;", "f64 f64", {-2.5: -3.0}),
    ("cvt.sat.f32.f32 %d, %a;", "f32 f32", {2.0: 1.0, -1.0: 0.0, NAN: 0.0, 0.5: 0.5}),
    ("cvt.ftz.f32.f32 %d, %a;", "f32 f32", {1e-45: 0.0}),
    (
        "cvt.rn.satfinite.e4m3x2.f32 %d, %a, %b;",
        "u16 f32 f32",
        {(1.0, 448.0): 0x387E, (1e9, -1e9): 0x7EFE, (NAN, 0.0): 0x7F00, (2.0**-9, 2.0**-10): 0x0100},
    ),
    ("cvt.rn.satfinite.e5m2x2.f32 %d, %a, %b;", "u16 f32 f32", {(1.0, 57344.0): 0x3C7B, (1e9, -1e9): 0x7BFB}),
    ("cvt.rn.f16x2.e4m3x2 %d, %a;", "b32 u16", {0x387E: 0x3C005F00}),
    ("cvt.rn.f16x2.e5m2x2 %d, %a;", "b32 u16", {0x3C7B: 0x3C007B00}),
    ("cvt.pack.sat.u16.s32 %d, %a, %b;", "b32 s32 s32", {(70000, -1): 0xFFFF0000}),
    ("cvt.rn.f32.u32 %d, %a;", "f32 u32", {M: 2.0**32, 2**24 + 1: 2.0**24}),
    ("cvt.rm.f32.s32 %d, %a;", "f32 s32", {16777217: 16777216.0, -16777217: -16777218.0}),
    ("cvt.rz.f32.s32 %d, %a;", "f32 s32", {-16777217: -16777216.0}),
    ("cvt.rm.f32.f64 %d, %a;", "f32 f64", {1 + 2.0**-30: 1.0, -1 - 2.0**-30: down(-1 - 2.0**-30), -1e300: -INF}),
    ("cvt.rp.f64.s64 %d, %a;", "f64 s64", {2**53 + 1: 2.0**53 + 2}),
    ("cvt.rpi.f32.f32 %d, %a;", "f32 f32", {0.1: 1.0, -0.1: -0.0}),
    ("cvt.rmi.f32.f32 %d, %a;", "f32 f32", {0.9: 0.0, -0.1: -1.0}),
    ("cvt.rzi.s16.f32 %d, %a;", "s16 f32", {1e9: 32767, -1e9: -32768, -2.5: -2}),
    ("cvt.rzi.u8.f32 %d, %a;", "u32 f32", {300.0: 255, -5.0: 0, 7.9: 7}),
    ("cvt.rni.s64.f64 %d, %a;", "s64 f64", {2.5: 2, -3.5: -4, 1e300: 2**63 - 1}),
    ("cvt.rzi.s32.f16 %d, %a;", "s32 f16", {-2.5: -2, INF: 2**31 - 1}),
    ("cvt.rm.f16.f32 %d, %a;", "f16 f32", {1 + 2.0**-11: 1.0, -1 - 2.0**-11: -1 - 2.0**-10}),
    ("cvt.rp.f16.f32 %d, %a;", "f16 f32", {1 + 2.0**-13: 1 + 2.0**-10}),
    ("cvt.rn.f16.f64 %d, %a;", "f16 f64", {1 + 2.0**-11 + 2.0**-40: 1 + 2.0**-10}),
    ("cvt.rz.bf16.f32 %d, %a;", "u16 f32", {1 + 2.0**-7 * 0.99: 0x3F80, 3.4e38: 0x7F7F}),
    ("cvt.rn.sat.f16.f32 %d, %a;", "f16 f32", {2.0: 1.0, -2.0: 0.0}),
    ("cvt.rn.relu.f16.f32 %d, %a;", "f16 f32", {-2.0: 0.0, 2.0: 2.0}),
    ("cvt.rn.relu.bf16x2.f32 %d, %a, %b;", "b32 f32 f32", {(-1.0, 2.0): 0x00004000}),
    ("cvt.rn.f16x2.f32 %d, %a, %b;", "b32 f32 f32", {(1.0, -2.0): 0x3C00C000}),
    ("cvt.u32.s8 %d, %a;", "u32 s32", {0xFF: M}),
    ("cvt.rn.satfinite.relu.e4m3x2.f32 %d, %a, %b;", "u16 f32 f32", {(-1.0, 1.0): 0x0038}),
    ("cvt.rn.satfinite.e4m3x2.f16x2 %d, %a;", "u16 b32", {0x3C005F00: 0x387E}),
    ("cvt.pack.sat.u8.s32.b32 %d, %a, %b, %c;", "b32 s32 s32 b32", {(300, -1, 0x1234): 0x1234FF00}),
    ("cvt.pack.sat.s16.s32 %d, %a, %b;", "b32 s32 s32", {(70000, -70000): 0x7FFF8000}),
    ("cvt.pack.sat.s8.s32.b32 %d, %a, %b, %c;", "b32 s32 s32 b32", {(200, -200, 0x1234): 0x12347F80}),
]


@pytest.mark.parametrize(
    "body, kinds, cases",
    INTEGER + FLOAT + CONVERSION,
    ids=lambda v: v.split(" %")[0] if isinstance(v, str) and "%" in v else "",
)
def test_value(body, kinds, cases):
    check(body, kinds, cases)


@pytest.mark.parametrize(
    "name, limit",
    [
        ("div", 2.0**-22),
        ("ex2", 2.0**-22),
        ("lg2", 2.0**-22),
        ("sin", 2.0**-20.9),
        ("cos", 2.0**-20.9),
        ("tanh", 2.0**-11),
        ("rcp", 2.0**-23),
        ("rsqrt", 2.0**-22.9),
        ("sqrt", 2.0**-23),
    ],
)
def test_approximations_within_the_error_of_the_isa(name, limit):
    x = np.random.default_rng(0).uniform(0.5, 2, 1000).astype(np.float32)
    exact = {
        "div": lambda v: 3 / v,
        "ex2": np.exp2,
        "lg2": np.log2,
        "sin": np.sin,
        "cos": np.cos,
        "tanh": np.tanh,
        "rcp": lambda v: 1 / v,
        "rsqrt": lambda v: v**-0.5,
        "sqrt": np.sqrt,
    }
    operands = "0f40400000, %a" if name == "div" else "%a"
    got = np.array(evaluate(f"{name}.approx.f32 %d, {operands};", "f32 f32", [float(v) for v in x]), np.uint32).view(
        np.float32
    )
    want = exact[name](x.astype(np.float64))
    assert np.max(np.abs(got - want) / np.maximum(np.abs(want), 1)) <= limit


@pytest.mark.parametrize(
    "body",
    [
        "frobnicate.u32 %d, %a;",
        "add.u33 %d, %a, %a;",
        "add.s32.wobble %d, %a, %a;",
        "add.sat.u32 %d, %a, %a;",
        "mma.sync.aligned.m16n8k7.row.col.f32.f16.f16.f32 {%d}, {%a}, {%a}, {%a};",
        "cvt.f16.f32 %h1, %a;",
        "add.s32 %d, %a, %nowhere;",
        "add.s32 %d, %a;",
        "mov.u64 %d, %a;",
        "bra NOWHERE;",
        "ld.global.u32 %d, %a;",
        "fma.f32 %d, %a, %a, %a",
    ],
)
def test_unknown_text_is_an_error_with_its_line(body):
    with pytest.raises(emulator.EmulatorError, match="line "):
        evaluate(body, "u32 u32", [1])
