"""Kernels from a body of PTX."""

import numpy as np

import ptx_emulator

HEADER = ".version 8.5\n.target sm_80\n.address_size 64\n"


def kernel(body: str, parameters: int = 1, declarations: str = "", outside: str = ""):
    """A kernel k(p0, p1, ...) of pointers; %p0 ... hold them, %t the thread's index."""
    text = HEADER + outside + ".visible .entry k(" + ", ".join(f".param .u64 a{k}" for k in range(parameters)) + ") {\n"
    text += (
        ".reg .pred %q<20>; .reg .b16 %h<20>; .reg .b32 %r<99>; .reg .f32 %f<99>; .reg .b64 %x<40>; .reg .f64 %e<20>;\n"
    )
    text += ".reg .b32 %t; .reg .b64 %p<9>;\n" + declarations + "mov.u32 %t, %tid.x;\n"
    text += "".join(f"ld.param.u64 %p{k}, [a{k}];\n" for k in range(parameters))
    return ptx_emulator.load(text + body + "\nret;\n}")["k"]


def each_thread(body: str, count: int = 32, dtype=np.uint32, block=None, **options) -> np.ndarray:
    """Runs `body`, which leaves a value of 32 bits a thread in %r0, and returns them."""
    out = np.zeros(count, dtype)
    store = "mul.wide.u32 %x39, %t, 4; add.s64 %x39, %p0, %x39; st.global.b32 [%x39], %r0;"
    kernel(body + store, **options)(1, block or count, 0, out)
    return out
