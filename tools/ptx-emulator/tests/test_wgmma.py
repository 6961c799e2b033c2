# ruff: noqa: E501
"""sm_90a: wgmma of every layout, width, type and sign."""

import itertools

import numpy as np
import pytest
from hopper_kernels import Layout, copy_tile, kernel
from tensor_values import bf16, e4m3, fragment

import ptx_emulator

pytestmark = pytest.mark.usefixtures("hopper")


class Multiplication:
    """wgmma of one tile: `names` are the types of D, A and B."""

    def __init__(
        self, n, names, make, depth, swizzle=128, a_turned=False, b_turned=False, registers=False, scale=1, signs=(1, 1)
    ):
        rng = np.random.default_rng(n)
        self.a, self.b = rng.integers(-4, 5, (64, depth)), rng.integers(-4, 5, (n, depth))
        if "u8" in names:
            self.a, self.b = abs(self.a), abs(self.b)
        half, floats = names.startswith("f16"), names[0] == "f"
        acc = np.float16 if half else np.float32 if floats else np.int32
        self.c = rng.integers(-9, 10, (64, n)).astype(acc)
        a, b = make(self.a), make(self.b)
        layouts = [Layout(a, swizzle, a_turned), Layout(b, swizzle, b_turned)]
        at_b = 0 if registers else layouts[0].bytes.size
        tile = layouts[1].bytes if registers else np.concatenate([layouts[0].bytes, layouts[1].bytes])
        count = n // 4 if half else n // 2
        d = [f"%d{k}" for k in range(count)]
        a_operand = "{%r70, %r71, %r72, %r73}" if registers else "%x1"
        fragments = np.concatenate([fragment(a[16 * w : 16 * w + 16], 2) for w in range(4)], axis=1)
        fragments = (
            np.ascontiguousarray(fragments).view(np.uint32).reshape(-1, 128)
            if registers
            else np.zeros((4, 128), np.uint32)
        )
        immediates = f", {signs[0]}, {signs[1]}" if floats else ""
        if make in (bf16, half_floats):
            immediates += ("" if registers else f", {int(a_turned)}") + f", {int(b_turned)}"
        self.out = self.pack(self.c, n)
        move = "shl.b32 %r80, %t, 2; cvt.u64.u32 %x20, %r80; add.s64 %x21, %p1, %x20; add.s64 %x22, %p2, %x20;"
        body = (
            f".reg .b32 %d<{count}>; {copy_tile(True, tile.size)} {move} fence.proxy.async; bar.sync 0;\n"
            + "".join(f"ld.global.u32 %r{70 + k}, [%x21+{512 * k}];" for k in range(4))
            + "".join(f"ld.global.u32 {r}, [%x22+{512 * k}];" for k, r in enumerate(d))
            + layouts[0].put("%x1", 0)
            + layouts[1].put("%x2", at_b)
            + f"setp.ne.u32 %q1, {scale}, 0;\nwgmma.fence.sync.aligned;\n"
            + f"wgmma.mma_async.sync.aligned.m64n{n}k{depth}.{names} {{{', '.join(d)}}}, {a_operand}, %x2, %q1{immediates};\n"
            + "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
            + "".join(f"st.global.u32 [%x22+{512 * k}], {r};" for k, r in enumerate(d))
        )
        kernel(body, 3, tile=tile.size)(1, 128, 0, tile, fragments, self.out)
        product = (self.a @ self.b.T) * signs[0] * signs[1]
        expected = (product + scale * self.c.astype(np.int64)).astype(acc)
        assert (self.out == self.pack(expected, n)).all()

    @staticmethod
    def pack(c: np.ndarray, n: int) -> np.ndarray:
        """The accumulators' registers: [register, thread]."""
        registers = []
        for column, half in itertools.product(range(0, n, 8), range(2)):
            tile = np.concatenate([c[16 * w + 8 * half : 16 * w + 8 * half + 8, column : column + 8] for w in range(4)])
            pairs = np.ascontiguousarray(tile.reshape(128, 2))
            registers += [pairs.view(np.uint32)[:, 0]] if c.dtype == np.float16 else list(pairs.view(np.uint32).T)
        return np.ascontiguousarray(np.stack(registers))


def half_floats(x):
    return np.ascontiguousarray(x, np.float16)


def bytes_of(x):
    return np.ascontiguousarray(x, np.int8).view(np.uint8)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("turned", list(itertools.product([False, True], repeat=2)))
def test_wgmma_layouts(swizzle, turned):
    Multiplication(128, "f32.bf16.bf16", bf16, 16, swizzle, *turned)


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_wgmma_widths(n):
    Multiplication(n, "f32.bf16.bf16", bf16, 16, registers=n % 16 == 0)


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize(
    "names, make, depth",
    [
        ("f32.f16.f16", half_floats, 16),
        ("f16.f16.f16", half_floats, 16),
        ("f32.e4m3.e4m3", e4m3, 32),
        ("f16.e4m3.e4m3", e4m3, 32),
        ("s32.s8.s8", bytes_of, 32),
        ("s32.u8.u8", bytes_of, 32),
    ],
)
def test_wgmma_types(names, make, depth, registers):
    Multiplication(64, names, make, depth, 64, registers=registers)
    Multiplication(96, names, make, depth, 128, registers=registers, scale=0)


def test_wgmma_signs():
    for signs in itertools.product((1, -1), repeat=2):
        Multiplication(32, "f32.bf16.bf16", bf16, 16, signs=signs)


def test_wgmma_descriptor_outside_of_shared_memory():
    d = ", ".join(f"%f{k}" for k in range(4))
    with pytest.raises(ptx_emulator.EmulatorError, match="descriptor of B leads to shared address"):
        kernel(
            f"mov.u64 %x1, 0; mov.u64 %x2, {0x3FFF | 8 << 16 | 8 << 32}; setp.eq.u32 %q1, 1, 1; wgmma.fence.sync.aligned;"
            f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{d}}}, %x1, %x2, %q1, 1, 1, 0, 0;",
            0,
        )(1, 128, 0)
