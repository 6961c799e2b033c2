# ruff: noqa: E501
"""Tensor cores and their matrices."""

import numpy as np
import pytest
from ptx_kernels import kernel
from tensor_values import bf16, e4m3, e5m2, fragment, nibbles


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count, trans):
    out = np.zeros(256, np.uint16)
    registers = ", ".join(f"%r{10 + k}" for k in range(count))
    fill = "".join(f"add.u32 %r{10 + k}, %r2, {k * 0x00400040:#x};" for k in range(count))
    kernel(
        f"""
        mul.wide.u32 %x1, %t, 16; mov.u64 %x0, buffer; add.s64 %x3, %x0, %x1; cvt.u32.u64 %r1, %x3;
        shl.b32 %r2, %t, 1; mad.lo.u32 %r2, %r2, 0x10001, 0x10000; {fill}
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r1], {{{registers}}}; bar.sync 0;
        add.s64 %x2, %p0, %x1; ld.shared.v2.u64 {{%x5, %x6}}, [%x3]; st.global.v2.u64 [%x2], {{%x5, %x6}};
        """,
        declarations=".shared .align 16 .b8 buffer[512];\n",
    )(1, 32, 0, out)
    tiles = np.arange(64 * count, dtype=np.uint16).reshape(count, 8, 8)
    assert (out.reshape(4, 8, 8)[:count] == (tiles.transpose(0, 2, 1) if trans else tiles)).all()


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans):
    data = np.arange(256, dtype=np.uint16)
    out = np.zeros((4, 32, 2), np.uint16)
    registers = ", ".join(f"%r{10 + k}" for k in range(count))
    stores = "".join(f"st.global.u32 [%x4+{128 * k}], %r{10 + k};" for k in range(count))
    kernel(
        f"""
        mul.wide.u32 %x1, %t, 16; add.s64 %x2, %p0, %x1; mov.u64 %x0, buffer; add.s64 %x3, %x0, %x1;
        ld.global.v2.u64 {{%x5, %x6}}, [%x2]; st.shared.v2.u64 [%x3], {{%x5, %x6}}; bar.sync 0; cvt.u32.u64 %r1, %x3;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r1];
        mul.wide.u32 %x4, %t, 4; add.s64 %x4, %p1, %x4; {stores}
        """,
        2,
        declarations=".shared .align 16 .b8 buffer[512];\n",
    )(1, 32, 0, data, out)
    tiles = data.reshape(4, 8, 8)
    for k in range(count):
        assert (out[k].reshape(8, 8) == (tiles[k].T if trans else tiles[k])).all()


MMAS = [
    ("m16n8k8", "f32.f16.f16.f32", np.float16),
    ("m16n8k16", "f32.f16.f16.f32", np.float16),
    ("m16n8k16", "f16.f16.f16.f16", np.float16),
    ("m16n8k8", "f32.bf16.bf16.f32", bf16),
    ("m16n8k16", "f32.bf16.bf16.f32", bf16),
    ("m16n8k4", "f32.tf32.tf32.f32", np.float32),
    ("m16n8k8", "f32.tf32.tf32.f32", np.float32),
    ("m8n8k4", "f64.f64.f64.f64", np.float64),
    ("m8n8k16", "s32.s8.s8.s32", np.int8),
    ("m16n8k16", "s32.u8.s8.s32", (np.uint8, np.int8)),
    ("m16n8k32", "s32.s8.u8.s32", (np.int8, np.uint8)),
    ("m16n8k32", "f32.e5m2.e5m2.f32", e5m2),
    ("m16n8k32", "f32.e4m3.e4m3.f32", e4m3),
    ("m16n8k32", "f32.e4m3.e5m2.f32", (e4m3, e5m2)),
    ("m16n8k8", "f16.f16.f16.f16", np.float16),
    ("m16n8k4", "f64.f64.f64.f64", np.float64),
    ("m16n8k8", "f64.f64.f64.f64", np.float64),
    ("m16n8k16", "f64.f64.f64.f64", np.float64),
    ("m16n8k32", "s32.u8.u8.s32", np.uint8),
    ("m8n8k32", "s32.s4.s4.s32", nibbles),
    ("m16n8k32", "s32.u4.s4.s32", nibbles),
    ("m16n8k64", "s32.s4.u4.s32", nibbles),
    ("m16n8k64", "s32.u4.u4.s32", nibbles),
]


def multiply(shape: str, types: str, fa: np.ndarray, fb: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Runs one mma of fragments A and B, and C as a matrix; returns D."""
    m, n = c.shape
    wide = {"f32": np.float32, "f16": np.float16, "f64": np.float64, "s32": np.int32}[
        types.removeprefix("satfinite.").split(".")[0]
    ]
    # C: 8 x 8 tiles of pairs, a register for each half of the pair, or one for both in half precision.
    cs = c.astype(wide).reshape(m // 8, 32, 2)
    fc = np.ascontiguousarray(cs if wide == np.float16 else cs.transpose(0, 2, 1))
    out = np.zeros_like(fc)
    bytes_ = 8 if wide == np.float64 else 4
    prefix, bits = ("%e", "b64") if bytes_ == 8 else ("%r", "b32")
    counts = [
        fc.size * fc.itemsize // (32 * bytes_),
        fa.size * fa.itemsize // (32 * bytes_),
        fb.size * fb.itemsize // (32 * bytes_),
    ]
    names, at, loads = [], 10, ""
    for pointer, number in zip((3, 1, 2), counts, strict=True):
        group = (
            [f"{prefix}{at + j}" for j in range(number)]
            if bytes_ == 4
            else [f"{prefix}{at - 10 + j}" for j in range(number)]
        )
        at += number
        loads += f"add.s64 %x2, %p{pointer}, %x1;" + "".join(
            f"ld.global.{bits} {r}, [%x2+{32 * bytes_ * j}];" for j, r in enumerate(group)
        )
        names.append("{" + ", ".join(group) + "}")
    acc, ra, rb = names
    stores = "add.s64 %x2, %p0, %x1;" + "".join(
        f"st.global.{bits} [%x2+{32 * bytes_ * j}], {r};" for j, r in enumerate(acc[1:-1].split(", "))
    )
    body = f"mul.wide.u32 %x1, %t, {bytes_}; {loads} mma.sync.aligned.{shape}.row.col.{types} {acc}, {ra}, {rb}, {acc}; {stores}"
    kernel(body, 4)(1, 32, 0, out, fa, fb, fc)
    got = out if wide == np.float16 else out.transpose(0, 2, 1)
    return got.reshape(m, n)


def dimensions(shape: str) -> tuple[int, int, int]:
    return tuple(int(v) for v in shape.replace("m", "").replace("n", " ").replace("k", " ").split())


@pytest.mark.parametrize("shape, types, element", MMAS, ids=lambda v: v if isinstance(v, str) else "")
def test_mma(shape, types, element):
    m, n, k = dimensions(shape)
    element_a, element_b = element if isinstance(element, tuple) else (element, element)
    random = np.random.default_rng(0)
    low = 0 if "u8" in types or "u4" in types else -4
    a, b, c = random.integers(low, 5, (m, k)), random.integers(low, 5, (n, k)), random.integers(-9, 9, (m, n))
    cast = lambda x, e: x.astype(e) if isinstance(e, type) else e(x)  # noqa: E731
    got = multiply(shape, types, fragment(cast(a, element_a), m // 8), fragment(cast(b, element_b), 1), c)
    assert (got == c + a @ b.T).all()


@pytest.mark.parametrize("shape", ["m8n8k128", "m16n8k128", "m16n8k256"])
@pytest.mark.parametrize("operation", ["xor", "and"])
def test_mma_of_bits(shape, operation):
    m, n, k = dimensions(shape)
    random = np.random.default_rng(0)
    a, b, c = random.integers(0, 2, (m, k)), random.integers(0, 2, (n, k)), random.integers(-9, 9, (m, n))
    pack = lambda x: np.packbits(x.astype(np.uint8), axis=1, bitorder="little")  # noqa: E731
    got = multiply(shape, f"s32.b1.b1.s32.{operation}.popc", fragment(pack(a), m // 8), fragment(pack(b), 1), c)
    both = a @ b.T
    assert (got == c + (both if operation == "and" else a.sum(1)[:, None] + b.sum(1) - 2 * both)).all()


def test_mma_saturates_on_request():
    a, c = np.full((16, 32), 127, np.int8), np.full((16, 8), 2**31 - 5)
    fragments = fragment(a, 2), fragment(a[:8], 1)
    assert (multiply("m16n8k32", "satfinite.s32.s8.s8.s32", *fragments, c) == 2**31 - 1).all()
    assert (multiply("m16n8k32", "s32.s8.s8.s32", *fragments, c) == 32 * 127**2 - 5 - 2**31).all()
