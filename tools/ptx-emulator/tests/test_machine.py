# ruff: noqa: E501
"""Memory, warps, tensor cores and control flow in raw PTX."""

import numpy as np
import ptx_emulator as emulator
import pytest
import torch

HEADER = ".version 8.5\n.target sm_80\n.address_size 64\n"


def kernel(body: str, parameters: int = 1, declarations: str = "", outside: str = ""):
    """A kernel k(p0, p1, ...) of pointers; %p0 ... hold them, %t the thread's index."""
    text = HEADER + outside + ".visible .entry k(" + ", ".join(f".param .u64 a{k}" for k in range(parameters)) + ") {\n"
    text += (
        ".reg .pred %q<20>; .reg .b16 %h<20>; .reg .b32 %r<99>; .reg .f32 %f<99>; .reg .b64 %x<40>; .reg .f64 %e<20>;\n"
    )
    text += ".reg .b32 %t; .reg .b64 %p<9>;\n" + declarations + "mov.u32 %t, %tid.x;\n"
    text += "".join(f"ld.param.u64 %p{k}, [a{k}];\n" for k in range(parameters))
    return emulator.load(text + body + "\nret;\n}")["k"]


def each_thread(body: str, count: int = 32, dtype=np.uint32, block=None, **options) -> np.ndarray:
    """Runs `body`, which leaves a value of 32 bits a thread in %r0, and returns them."""
    out = np.zeros(count, dtype)
    store = "mul.wide.u32 %x39, %t, 4; add.s64 %x39, %p0, %x39; st.global.b32 [%x39], %r0;"
    kernel(body + store, **options)(1, block or count, 0, out)
    return out


def test_arguments_of_all_kinds():
    text = (
        HEADER
        + """
    .visible .entry saxpy(.param .u64 x, .param .u64 y, .param .f32 a, .param .u32 n) {
      .reg .pred %p; .reg .b32 %i, %n; .reg .f32 %a, %u, %v; .reg .b64 %x, %y, %o;
      ld.param.u64 %x, [x]; ld.param.u64 %y, [y]; ld.param.f32 %a, [a]; ld.param.u32 %n, [n];
      mov.u32 %i, %ctaid.x; mov.u32 %o32, %ntid.x; mad.lo.u32 %i, %i, %o32, %thread;
    }""".replace(
            "mov.u32 %o32, %ntid.x; mad.lo.u32 %i, %i, %o32, %thread;",
            """
      { .reg .b32 %size, %lane; mov.u32 %size, %ntid.x; mov.u32 %lane, %tid.x; mad.lo.u32 %i, %i, %size, %lane; }
      setp.ge.u32 %p, %i, %n; @%p bra DONE;
      mul.wide.u32 %o, %i, 4; add.s64 %x, %x, %o; add.s64 %y, %y, %o;
      ld.global.f32 %u, [%x]; ld.global.f32 %v, [%y]; fma.rn.f32 %v, %a, %u, %v; st.global.f32 [%y], %v;
      DONE: ret;""",
        )
    )
    module = emulator.load(text)
    assert module.keys() == ["saxpy"]
    x, y = np.arange(1000, dtype=np.float32), torch.ones(1000)
    assert module["saxpy"](4, 256, 0, x, y, 2.0, 1000) > 0
    assert torch.equal(y, torch.from_numpy(2 * x + 1))
    with pytest.raises(TypeError):
        module["saxpy"](4, 256, 0, x, y, 2.0)
    with pytest.raises(KeyError):
        module["nothing"]
    with pytest.raises(emulator.EmulatorError, match="configuration"):
        module["saxpy"](4, 2048, 0, x, y, 2.0, 1000)


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
    with pytest.raises(emulator.EmulatorError, match=r"misaligned.*line 9") as caught:
        kernel("ld.global.u32 %r0, [%p0+2];")(1, 1, 0, np.zeros(4))
    assert caught.value.code == 716
    with pytest.raises(emulator.EmulatorError, match=r"illegal memory access.*ld.global.u32") as caught:
        kernel("mov.u64 %x0, 64; ld.global.u32 %r0, [%x0];")(1, 1, 0, np.zeros(4))
    assert caught.value.code == 700
    with pytest.raises(emulator.EmulatorError, match="shared memory address out of range"):
        kernel("mov.u32 %r1, 4096; st.shared.u32 [%r1], %t;")(1, 1, 0, np.zeros(4))
    with pytest.raises(emulator.EmulatorError, match="trap"):
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


def test_warp_instructions():
    lanes = np.arange(32)
    assert (each_thread("shfl.sync.bfly.b32 %r0, %t, 3, 31, -1;") == lanes ^ 3).all()
    assert (
        each_thread("shfl.sync.down.b32 %r0|%q0, %t, 4, 31, -1; @!%q0 mov.u32 %r0, 99;")
        == np.where(lanes < 28, lanes + 4, 99)
    ).all()
    assert (
        each_thread("shfl.sync.up.b32 %r0|%q0, %t, 4, 0, -1; @!%q0 mov.u32 %r0, 99;")
        == np.where(lanes >= 4, lanes - 4, 99)
    ).all()
    assert (each_thread("shfl.sync.idx.b32 %r0, %t, 2, 0x181f, -1;") == lanes // 8 * 8 + 2).all()
    assert (each_thread("setp.lt.u32 %q0, %t, 5; vote.sync.ballot.b32 %r0, %q0, -1;") == 31).all()
    assert (each_thread("setp.lt.u32 %q0, %t, 5; vote.sync.any.pred %q1, %q0, -1; selp.u32 %r0, 1, 0, %q1;") == 1).all()
    assert (each_thread("setp.lt.u32 %q0, %t, 5; vote.sync.all.pred %q1, %q0, -1; selp.u32 %r0, 1, 0, %q1;") == 0).all()
    assert (
        each_thread("setp.lt.u32 %q0, %t, 40; vote.sync.uni.pred %q1, %q0, -1; selp.u32 %r0, 1, 0, %q1;") == 1
    ).all()
    assert (
        each_thread("and.b32 %r1, %t, 1; match.any.sync.b32 %r0, %r1, -1;")
        == np.where(lanes % 2, 0xAAAAAAAA, 0x55555555)
    ).all()
    assert (each_thread("match.all.sync.b32 %r0|%q0, 5, -1;") == 0xFFFFFFFF).all()
    assert (each_thread("redux.sync.add.u32 %r0, %t, -1;") == 496).all()
    assert (each_thread("sub.s32 %r1, %t, 9; redux.sync.min.s32 %r0, %r1, -1;").view(np.int32) == -9).all()
    assert (each_thread("redux.sync.xor.b32 %r0, %t, -1;") == 0).all()
    assert (each_thread("setp.gt.u32 %q0, %t, 15; mov.u32 %r0, 0; @%q0 activemask.b32 %r0;")[16:] == 0xFFFF0000).all()
    assert (each_thread("mov.u32 %r0, %lanemask_lt;") == (1 << lanes) - 1).all()


def test_more_warp_instructions():
    lanes = np.arange(32)
    assert (each_thread("redux.sync.max.s32 %r0, %t, -1;") == 31).all()
    assert (each_thread("redux.sync.max.u32 %r0, %t, -1;") == 31).all()
    assert (each_thread("add.u32 %r1, %t, 3; redux.sync.min.u32 %r0, %r1, -1;") == 3).all()
    assert (each_thread("or.b32 %r1, %t, 32; redux.sync.and.b32 %r0, %r1, -1;") == 32).all()
    assert (each_thread("redux.sync.or.b32 %r0, %t, -1;") == 31).all()
    body = "mov.u32 %r0, 0; setp.lt.u32 %q0, %t, 16; @%q0 redux.sync.add.s32 %r0, %t, 0xffff;"
    assert (each_thread(body) == np.where(lanes < 16, 120, 0)).all()
    body = "cvt.u64.u32 %x1, %t; and.b64 %x1, %x1, 3; match.any.sync.b64 %r0, %x1, -1;"
    assert (each_thread(body) == (0x11111111 << (lanes % 4))).all()
    assert (each_thread("match.all.sync.b32 %r0|%q0, %t, -1; @%q0 mov.u32 %r0, 9;") == 0).all()
    assert (
        each_thread("setp.lt.u32 %q0, %t, 40; vote.sync.all.pred %q1, %q0, -1; selp.u32 %r0, 1, 0, %q1;") == 1
    ).all()
    assert (each_thread("setp.lt.u32 %q0, %t, 4; vote.sync.uni.pred %q1, %q0, -1; selp.u32 %r0, 1, 0, %q1;") == 0).all()
    assert (each_thread("elect.sync %r0|%q0, -1; @%q0 mov.u32 %r0, 77;") == np.where(lanes == 0, 77, 0)).all()
    # Lane l has elements 2 l and 2 l + 1 of the matrix.
    got = each_thread("mad.lo.u32 %r1, %t, 0x20002, 0x10000; movmatrix.sync.aligned.m8n8.trans.b16 %r0, %r1;")
    assert (got.view(np.uint16).reshape(8, 8) == np.arange(64).reshape(8, 8).T).all()


def test_special_registers():
    body = """
        mov.u32 %r0, %{name}; mov.u32 %r1, %ctaid.x; mad.lo.u32 %r1, %r1, 64, %t; mul.wide.u32 %x1, %r1, 4; add.s64 %x1, %p0, %x1; st.global.u32 [%x1], %r0;
    """
    threads, blocks = np.tile(np.arange(64), 3), np.repeat(np.arange(3), 64)
    expected = {"tid.x": threads, "ntid.x": 64, "ctaid.x": blocks, "nctaid.x": 3, "laneid": threads % 32}
    expected |= {"warpid": threads // 32, "nwarpid": 2, "smid": blocks, "nsmid": 108, "tid.y": 0, "ntid.z": 1}
    expected |= {"ctaid.z": 0, "nctaid.y": 1, "dynamic_smem_size": 0, "total_smem_size": 0}
    one = np.uint64(1) << (threads % 32).astype(np.uint64)
    masks = {"eq": one, "lt": one - np.uint64(1), "le": one * np.uint64(2) - np.uint64(1)}
    masks |= {"gt": 2**32 - 2 * one, "ge": 2**32 - one}
    expected |= {f"lanemask_{name}": mask & np.uint64(2**32 - 1) for name, mask in masks.items()}
    for name, value in expected.items():
        out = np.zeros(192, np.uint32)
        kernel(body.replace("{name}", name))(3, 64, 0, out)
        assert (out == value).all(), name
    # Clocks go forward, and the timer is the host's.
    body = "mov.u64 %x1, %clock64; mov.u32 %r1, %clock; add.u32 %r2, %r1, 1; mov.u64 %x2, %clock64; setp.lt.u64 %q0, %x1, %x2; mov.u64 %x3, %globaltimer; setp.ne.and.u64 %q0, %x3, 0, %q0; selp.u32 %r0, 1, 0, %q0;"
    assert each_thread(body).tolist() == [1] * 32


def test_hints_change_nothing():
    body = """
        createpolicy.fractional.L2::evict_last.b64 %x1, 1.0; createpolicy.range.global.L2::evict_last.L2::evict_unchanged.b64 %x2, [%p0], 128, 128;
        prefetch.global.L1 [%p0]; prefetch.L2 [%p0]; prefetchu.L1 [%p0]; applypriority.global.L2::evict_normal [%p0], 128;
        pmevent 3; nanosleep.u32 100; ldu.global.u32 %r1, [%p0]; ld.global.L2::cache_hint.u32 %r0, [%p0], %x1; add.u32 %r0, %r0, %r1; add.u32 %r0, %r0, 5;
    """
    assert each_thread(body, 32).tolist() == [5] * 32


def test_exit_and_ret_of_a_part():
    assert (
        each_thread("mov.u32 %r0, 1; setp.lt.u32 %q0, %t, 7; @%q0 exit; bar.warp.sync -1; mov.u32 %r0, 2;").tolist()
        == [0] * 7 + [2] * 25
    )
    with pytest.raises(emulator.EmulatorError, match="brkpt"):
        each_thread("brkpt; mov.u32 %r0, 1;")


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


def test_lanes_meet_at_a_sync_instruction_on_their_own_paths():
    body = """
        mov.u32 %r0, 0; setp.lt.u32 %q0, %t, 16; @%q0 bra LOW;
        bar.warp.sync -1; mov.u32 %r0, 1; bra JOIN;
        LOW: bar.warp.sync -1; mov.u32 %r0, 2;
        JOIN: shfl.sync.bfly.b32 %r0, %r0, 16, 31, -1;
    """
    assert each_thread(body).tolist() == [1] * 16 + [2] * 16


def test_divergence_loops_and_reconvergence():
    # Each lane loops its own number of times; afterwards all are together again.
    body = """
        mov.u32 %r0, 0; add.u32 %r1, %t, 1;
        LOOP: add.u32 %r0, %r0, 2; sub.u32 %r1, %r1, 1; setp.ne.u32 %q0, %r1, 0; @%q0 bra LOOP;
        activemask.b32 %r2; setp.ne.u32 %q1, %r2, -1; @%q1 mov.u32 %r0, 0;
    """
    assert (each_thread(body) == 2 * np.arange(1, 33)).all()
    body = """
        and.b32 %r1, %t, 3; targets: .branchtargets A, B, C, D; brx.idx %r1, targets;
        A: mov.u32 %r0, 10; bra E; B: mov.u32 %r0, 11; bra E; C: mov.u32 %r0, 12; bra E; D: mov.u32 %r0, 13;
        E: activemask.b32 %r2; setp.ne.u32 %q1, %r2, -1; @%q1 mov.u32 %r0, 0;
    """
    assert (each_thread(body) == 10 + np.arange(32) % 4).all()


def test_a_lock_between_lanes_of_a_warp():
    words = np.zeros(2, np.uint32)
    kernel(
        """
        SPIN: atom.global.cas.b32 %r1, [%p0], 0, 1; setp.ne.u32 %q0, %r1, 0; @%q0 bra SPIN;
        ld.volatile.global.u32 %r2, [%p0+4]; add.u32 %r2, %r2, 1; st.volatile.global.u32 [%p0+4], %r2; membar.gl;
        atom.global.exch.b32 %r3, [%p0], 0;
        """
    )(2, 64, 0, words)
    assert words.tolist() == [0, 128]


def test_blocks_wait_for_lower_blocks():
    words = np.zeros(64, np.uint32)
    kernel(
        """
        mov.u32 %r0, %ctaid.x; 
        WAIT: ld.acquire.gpu.global.u32 %r1, [%p0]; setp.ne.u32 %q0, %r1, %r0; @%q0 bra WAIT;
        add.u32 %r1, %r1, 1; st.release.gpu.global.u32 [%p0], %r1;
        """
    )(50, 1, 0, words)
    assert words[0] == 50


def test_deadlocks_are_reported(monkeypatch):
    with pytest.raises(emulator.EmulatorError, match=r"deadlock(.|\n)*barrier 0 \(32 threads of 64\)") as caught:
        kernel("setp.ge.u32 %q0, %t, 32; @%q0 bra END; bar.sync 0, 64; END:")(1, 64, 0, np.zeros(4))
    assert caught.value.code == 702
    with pytest.raises(emulator.EmulatorError, match=r"deadlock(.|\n)*ld.volatile"):
        kernel("WAIT: ld.volatile.global.u32 %r1, [%p0]; setp.eq.u32 %q0, %r1, 0; @%q0 bra WAIT;")(
            3, 32, 0, np.zeros(4)
        )


def test_barriers():
    body = """
        mul.wide.u32 %x1, %t, 4; mov.u64 %x0, buffer; add.s64 %x1, %x0, %x1; st.shared.u32 [%x1], %t; bar.sync 0;
        xor.b32 %r1, %t, 64; mul.wide.u32 %x1, %r1, 4; add.s64 %x1, %x0, %x1; ld.shared.u32 %r0, [%x1];
        setp.lt.u32 %q0, %t, 7; bar.red.popc.u32 %r2, 0, %q0; add.u32 %r0, %r0, %r2;
        bar.red.and.pred %q1, 0, %q0; @%q1 mov.u32 %r0, 0; barrier.sync.aligned 1, 128; barrier.cta.red.or.pred %q1, 2, %q0; @!%q1 mov.u32 %r0, 0;
    """
    assert (
        each_thread(body, 128, declarations=".shared .align 4 .b8 buffer[512];\n") == (np.arange(128) ^ 64) + 7
    ).all()
    # A producer warp arrives, a consumer warp waits.
    body = """
        mov.u32 %r0, 5; setp.ge.u32 %q0, %t, 32; @%q0 bra CONSUMER; st.shared.u32 [buffer], 42; bar.arrive 1, 64; bra END;
        CONSUMER: bar.sync 1, 64; ld.shared.u32 %r0, [buffer]; END:
    """
    assert each_thread(body, 64, declarations=".shared .align 4 .b8 buffer[4];\n").tolist() == [5] * 32 + [42] * 32


def test_functions_recursion_and_pointers():
    outside = """
    .func (.param .b32 result) factorial(.param .b32 n) {
      .reg .pred %p; .reg .b32 %n, %m;
      ld.param.u32 %n, [n]; setp.gt.u32 %p, %n, 1; @%p bra MORE; st.param.b32 [result], 1; ret;
      MORE: sub.u32 %m, %n, 1;
      { .param .b32 a; .param .b32 b; st.param.b32 [a], %m; call (b), factorial, (a); ld.param.b32 %m, [b]; }
      mul.lo.u32 %n, %n, %m; st.param.b32 [result], %n; ret;
    }
    .func (.param .b32 result) twice(.param .b32 n) { .reg .b32 %n; ld.param.u32 %n, [n]; add.u32 %n, %n, %n; st.param.b32 [result], %n; ret; }
    .global .align 8 .u64 table[2] = {factorial, twice};
    """
    body = """
        rem.u32 %r1, %t, 6;
        { .param .b32 a; .param .b32 b; st.param.b32 [a], %r1; call.uni (b), factorial, (a); ld.param.b32 %r0, [b]; }
        and.b32 %r2, %t, 1; mul.wide.u32 %x1, %r2, 8; mov.u64 %x2, table; add.s64 %x2, %x2, %x1; ld.global.u64 %x3, [%x2];
        proto: .callprototype (.param .b32 _) _ (.param .b32 _);
        { .param .b32 a; .param .b32 b; st.param.b32 [a], %r1; call (b), %x3, (a), proto; ld.param.b32 %r2, [b]; }
        mad.lo.u32 %r0, %r0, 1000, %r2;
    """
    factorial = [1, 1, 2, 6, 24, 120]
    want = [factorial[t % 6] * 1000 + (2 * (t % 6) if t % 2 else factorial[t % 6]) for t in range(32)]
    assert each_thread(body, outside=outside).tolist() == want


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


def fragment(matrix: np.ndarray, down: int) -> np.ndarray:
    """The registers of a matrix with k along its rows, each of 32 lanes by 4 bytes (8 for doubles)."""
    per = max(1, 4 // matrix.itemsize)
    rows, depth = matrix.shape
    tiles = [matrix[r * 8 : r * 8 + 8, k : k + 4 * per] for k in range(0, depth, 4 * per) for r in range(rows // 8)]
    return np.stack([np.ascontiguousarray(t).reshape(32, per) for t in tiles])


def bf16(x):
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def e4m3(x):
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def nibbles(x):
    low, high = (np.ascontiguousarray(x[:, k::2]) & 15 for k in range(2))
    return (low | high << 4).astype(np.uint8)


def e5m2(x):
    return (np.ascontiguousarray(x, np.float16).view(np.uint16) >> 8).astype(np.uint8)


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
