# ruff: noqa: E501
"""Launches, warps, divergence, barriers and calls."""

import numpy as np
import pytest
import torch
from ptx_kernels import HEADER, each_thread, kernel

import ptx_emulator


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
    module = ptx_emulator.load(text)
    assert module.keys() == ["saxpy"]
    x, y = np.arange(1000, dtype=np.float32), torch.ones(1000)
    assert module["saxpy"](4, 256, 0, x, y, 2.0, 1000) > 0
    assert torch.equal(y, torch.from_numpy(2 * x + 1))
    with pytest.raises(TypeError):
        module["saxpy"](4, 256, 0, x, y, 2.0)
    with pytest.raises(KeyError):
        module["nothing"]
    with pytest.raises(ptx_emulator.EmulatorError, match="configuration"):
        module["saxpy"](4, 2048, 0, x, y, 2.0, 1000)


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


def test_exit_and_ret_of_a_part():
    assert (
        each_thread("mov.u32 %r0, 1; setp.lt.u32 %q0, %t, 7; @%q0 exit; bar.warp.sync -1; mov.u32 %r0, 2;").tolist()
        == [0] * 7 + [2] * 25
    )
    with pytest.raises(ptx_emulator.EmulatorError, match="brkpt"):
        each_thread("brkpt; mov.u32 %r0, 1;")


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
    with pytest.raises(ptx_emulator.EmulatorError, match=r"deadlock(.|\n)*barrier 0 \(32 threads of 64\)") as caught:
        kernel("setp.ge.u32 %q0, %t, 32; @%q0 bra END; bar.sync 0, 64; END:")(1, 64, 0, np.zeros(4))
    assert caught.value.code == 702
    with pytest.raises(ptx_emulator.EmulatorError, match=r"deadlock(.|\n)*ld.volatile"):
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
