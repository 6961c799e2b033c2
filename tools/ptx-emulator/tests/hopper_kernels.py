# ruff: noqa: E501
"""Kernels for sm_90a from a body of PTX, and matrices as wgmma finds them in shared memory."""

import numpy as np

import ptx_emulator

HEADER = ".version 8.5\n.target sm_90a\n.address_size 64\n"
PRELUDE = """
.reg .pred %q<20>; .reg .b32 %r<99>; .reg .f32 %f<99>; .reg .b64 %x<40>; .reg .b32 %t, %s, %bar; .reg .b64 %p<9>;
mov.u32 %t, %tid.x; mov.u32 %s, tile; mov.u32 %bar, bars;
"""
# Waits for a phase of the mbarrier at %bar + `at`, of the parity `phase`.
WAIT = "{{ .reg .pred done; WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [{at}], {phase}; @!done bra WAIT; }}\n"
FENCE_INIT = "fence.mbarrier_init.release.cluster;"


def wait(at: str = "%bar", phase: str = "0") -> str:
    return WAIT.format(at=at, phase=phase)


def text(body: str, arrays: int = 1, maps: int = 0, tile: int = 16384, head: str = "") -> str:
    """A kernel k(p0, p1, ..., map0, ...): %p0 ... hold the arrays' addresses, %p7 that of map0; `tile` lies on 1024
    bytes, %s is its address, %bar that of eight mbarriers."""
    parameters = [f".param .u64 a{k}" for k in range(arrays)]
    parameters += [f".param .align 64 .b8 map{k}[128]" for k in range(maps)]
    result = HEADER + ".visible .entry k(" + ", ".join(parameters) + ") " + head + "{\n"
    result += f".shared .align 1024 .b8 tile[{tile}];\n.shared .align 8 .b64 bars[8];\n" + PRELUDE
    result += "".join(f"ld.param.u64 %p{k}, [a{k}];\n" for k in range(arrays))
    result += "".join(f"mov.b64 %p{7 - k}, map{k};\ncvta.param.u64 %p{7 - k}, %p{7 - k};\n" for k in range(maps))
    return result + body + "\nret;\n}"


def kernel(body: str, *arguments, **options):
    return ptx_emulator.load(text(body, *arguments, **options))["k"]


# All threads of 128 copy the tile's bytes from p0, or to it.
def copy_tile(to_shared: bool, size: int, array: str = "%p0", label: str = "COPY") -> str:
    load, store = ("global", "shared") if to_shared else ("shared", "global")
    at_load, at_store = ("%x31", "%r91") if to_shared else ("%r91", "%x31")
    return f"""
    shl.b32 %r90, %t, 4;
    {label}: setp.ge.u32 %q19, %r90, {size}; @%q19 bra {label}_DONE;
    cvt.u64.u32 %x30, %r90; add.s64 %x31, {array}, %x30; add.u32 %r91, %s, %r90;
    ld.{load}.v4.u32 {{%r92, %r93, %r94, %r95}}, [{at_load}]; st.{store}.v4.u32 [{at_store}], {{%r92, %r93, %r94, %r95}};
    add.u32 %r90, %r90, 2048; bra {label}; {label}_DONE:
    """


def swizzled(offset, swizzle: int):
    """16-byte chunks are exchanged by the bits of the address that say which row of 128 bytes they are in."""
    return offset ^ (offset >> 7 & (swizzle // 16 - 1)) << 4 if swizzle else offset


class Layout:
    """A matrix of [rows, k] in shared memory as a descriptor describes it."""

    def __init__(self, matrix: np.ndarray, swizzle: int, transposed: bool = False):
        rows, depth = matrix.shape
        size = matrix.itemsize
        width = swizzle or 16
        row, k = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
        if not transposed:
            byte = k * size
            if swizzle:
                self.leading, self.stride = 16, 8 * width
                offset = row // 8 * self.stride + row % 8 * width + byte
            else:  # 8 rows of 16 bytes, the next 16 bytes of k, the next 8 rows
                self.leading, self.stride = 128, 256
                offset = row // 8 * self.stride + row % 8 * 16 + byte // 16 * self.leading + byte % 16
        else:
            chunk, inside = row // 8, row % 8 * size
            if swizzle:
                per = width // 16
                self.stride = 8 * width  # the next 8 of k
                self.leading = 16 * width  # the next `per` chunks of rows
                offset = chunk % per * 16 + chunk // per * self.leading + k % 8 * width + k // 8 * self.stride + inside
            else:
                self.leading, self.stride = 128, 256
                offset = chunk * self.stride + k % 8 * 16 + k // 8 * self.leading + inside
        offset = swizzled(offset, swizzle)
        self.bytes = np.zeros((int(offset.max()) + size + 1023) // 1024 * 1024, np.uint8)
        flat = np.ascontiguousarray(matrix).view(np.uint8).reshape(rows, depth, size)
        for b in range(size):
            self.bytes[offset + b] = flat[:, :, b]
        mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
        self.descriptor = self.leading >> 4 << 16 | self.stride >> 4 << 32 | mode << 62

    def put(self, register: str, offset: int) -> str:
        """Leaves the descriptor in a register, for the matrix at this offset in the tile."""
        return f"""
        add.u32 %r96, %s, {offset}; shr.u32 %r96, %r96, 4; cvt.u64.u32 {register}, %r96;
        or.b64 {register}, {register}, {self.descriptor:#x};
        """
