# ruff: noqa: E501
"""Runs one instruction on rows of values, one row a thread, and compares bits."""

import math
import struct

import numpy as np
from ptx_kernels import HEADER

import ptx_emulator

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
    ptx_emulator.load(text)["k"](1, count, 0, result, *arrays)
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
