# ruff: noqa: E501
"""Races: within a warp, a block, a grid."""

import pytest
from checked_kernels import (
    BARRIER,
    MARK,
    OTHER,
    PRODUCE,
    READ_OTHER,
    STORE,
    Case,
    check_alone,
    check_broken,
    check_right,
    flag_protocol,
    last_arrival,
    lock,
    many_readers,
    shared_flag,
    zeroed,
)

pytestmark = pytest.mark.usefixtures("checked")

CASES = [
    Case(
        "missing_barrier",
        "race",
        "st.shared.u32 [%s1], %t;" + OTHER + MARK.replace("//!", "") + READ_OTHER + MARK + STORE,
        "st.shared.u32 [%s1], %t;" + OTHER + BARRIER + READ_OTHER + STORE,
    ),
    Case(
        "second_barrier_missing",
        "race",
        "st.shared.u32 [%s1], %t;"
        + OTHER
        + BARRIER
        + READ_OTHER
        + "\nst.shared.u32 [%s1], 1;".replace("1;", "%b;")
        + MARK
        + STORE,
        "st.shared.u32 [%s1], %t;" + OTHER + BARRIER + READ_OTHER + BARRIER + "st.shared.u32 [%s1], %b;" + STORE,
    ),
    Case(
        "lanes_of_a_warp",
        "race",
        "st.shared.u32 [%s1], %t; xor.b32 %r1, %s1, 4;\nld.shared.f32 %f1, [%r1];" + MARK + STORE,
        "st.shared.u32 [%s1], %t; xor.b32 %r1, %s1, 4; bar.warp.sync 0xffffffff; ld.shared.f32 %f1, [%r1];" + STORE,
        block=32,
    ),
    Case("one_address_two_lanes", "race", "st.shared.u32 [%s0], %t;" + MARK, "st.shared.u32 [%s0], %b;", block=32),
    Case(
        "two_blocks_one_address",
        "race",
        "st.global.u32 [%x2], %b;" + MARK,
        "setp.eq.u32 %q1, %b, 0; @%q1 st.global.u32 [%x2], %b;",
        grid=2,
    ),
    Case(
        "block_reads_another",
        "race",
        "shl.b32 %r1, %b, 8; cvt.u64.u32 %x4, %r1; add.s64 %x4, %x4, %x2; st.global.u32 [%x4], %t; xor.b32 %r1, %r1, 256; cvt.u64.u32 %x4, %r1; add.s64 %x4, %x4, %x2;\nld.global.u32 %r2, [%x4];"
        + MARK,
        "shl.b32 %r1, %b, 8; cvt.u64.u32 %x4, %r1; add.s64 %x4, %x4, %x2; st.global.u32 [%x4], %t; ld.global.u32 %r2, [%x4];",
        grid=2,
    ),
    Case(
        "atomic_and_plain",
        "race",
        "red.global.add.u32 [%p2], 1;\nld.global.u32 %r1, [%p2];" + MARK,
        "red.global.add.u32 [%p2], 1; ld.relaxed.gpu.global.u32 %r1, [%p2];",
        grid=2,
        block=1,
    ),
    Case(
        "atomic_of_block_scope",
        "race",
        "red.relaxed.cta.global.add.u32 [%p2], 1;" + MARK,
        "red.relaxed.gpu.global.add.u32 [%p2], 1;",
        grid=2,
    ),
    Case(
        "missing_fence",
        "race",
        flag_protocol(
            "st.relaxed.gpu.global.u32 [%p2], 1;", "ld.relaxed.gpu.global.u32 %r2, [%p2];", "fence.acq_rel.gpu;"
        ),
        flag_protocol(
            "fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%p2], 1;",
            "ld.relaxed.gpu.global.u32 %r2, [%p2];",
            "fence.acq_rel.gpu;",
        ),
        grid=2,
        block=1,
    ),
    Case(
        "volatile_alone",
        "race",
        flag_protocol("st.volatile.global.u32 [%p2], 1;", "ld.volatile.global.u32 %r2, [%p2];", ""),
        flag_protocol("st.release.gpu.global.u32 [%p2], 1;", "ld.acquire.gpu.global.u32 %r2, [%p2];", ""),
        grid=2,
        block=1,
    ),
    Case(
        "fence_of_block_scope",
        "race",
        flag_protocol(
            "membar.cta; st.volatile.global.u32 [%p2], 1;", "ld.volatile.global.u32 %r2, [%p2];", "membar.gl;"
        ),
        flag_protocol(
            "membar.gl; st.volatile.global.u32 [%p2], 1;", "ld.volatile.global.u32 %r2, [%p2];", "membar.gl;"
        ),
        grid=2,
        block=1,
    ),
    Case(
        "acquire_missing",
        "race",
        flag_protocol("membar.gl; atom.global.exch.b32 %r3, [%p2], 1;", "ld.volatile.global.u32 %r2, [%p2];", ""),
        flag_protocol(
            "membar.gl; atom.global.exch.b32 %r3, [%p2], 1;", "atom.global.add.u32 %r2, [%p2], 0;", "membar.gl;"
        ),
        grid=2,
        block=1,
    ),
    Case(
        "one_thread_waits",
        "race",
        flag_protocol("", "ld.acquire.gpu.global.u32 %r2, [%p2];", "")
        .replace("setp.ne.u32 %q0, %b, 0;", "mov.u32 %r2, 1; setp.ne.u32 %q0, %b, 0;")
        .replace(
            "st.global.f32 [%p1], %f1;",
            "setp.eq.u32 %q3, %t, 0; @%q3 st.global.f32 [%p1], %f1; @%q3 st.release.gpu.global.u32 [%p2], 1;",
        )
        .replace("READER: LOOP: ld", "READER: setp.eq.u32 %q3, %t, 0; LOOP: @%q3 ld")
        .replace("st.global.f32 [%p1+4]", "@%q3 st.global.f32 [%p1+4]"),
        flag_protocol("", "ld.acquire.gpu.global.u32 %r2, [%p2];", "bar.sync 0;")
        .replace("setp.ne.u32 %q0, %b, 0;", "mov.u32 %r2, 1; setp.ne.u32 %q0, %b, 0;")
        .replace(
            "st.global.f32 [%p1], %f1;",
            "setp.eq.u32 %q3, %t, 0; @%q3 st.global.f32 [%p1], %f1; @%q3 st.release.gpu.global.u32 [%p2], 1;",
        )
        .replace("READER: LOOP: ld", "READER: setp.eq.u32 %q3, %t, 0; LOOP: @%q3 ld")
        .replace("st.global.f32 [%p1+4]", "@%q3 st.global.f32 [%p1+4]"),
        grid=2,
        block=64,
    ),
    Case(
        "shuffle_orders_no_memory",
        "race",
        PRODUCE
        + "xor.b32 %r1, %s1, 4; shfl.sync.idx.b32 %r2, %t, 0, 31, -1;\nld.shared.f32 %f1, [%r1];"
        + MARK
        + STORE,
        PRODUCE
        + "xor.b32 %r1, %s1, 4; shfl.sync.idx.b32 %r2, %t, 0, 31, -1; bar.warp.sync -1; ld.shared.f32 %f1, [%r1];"
        + STORE,
        block=32,
    ),
    Case(
        "last_warp_of_a_reduction",
        "race",
        PRODUCE
        + BARRIER
        + "setp.ge.u32 %q1, %t, 16; @%q1 bra DONE; ld.shared.u32 %r1, [%s1]; ld.shared.u32 %r2, [%s1+64]; add.u32 %r1, %r1, %r2; st.shared.u32 [%s1], %r1; setp.ge.u32 %q1, %t, 8; @%q1 bra DONE;\nld.shared.u32 %r2, [%s1+32];"
        + MARK
        + "st.global.u32 [%x2], %r2; DONE:",
        PRODUCE
        + BARRIER
        + "setp.ge.u32 %q1, %t, 16; @%q1 bra DONE; ld.shared.u32 %r1, [%s1]; ld.shared.u32 %r2, [%s1+64]; add.u32 %r1, %r1, %r2; st.shared.u32 [%s1], %r1; bar.warp.sync 0xffff; setp.ge.u32 %q1, %t, 8; @%q1 bra DONE; ld.shared.u32 %r2, [%s1+32]; st.global.u32 [%x2], %r2; DONE:",
    ),
    Case(
        "overlapping_vectors",
        "race",
        "add.u32 %r2, %t, 9; shr.u32 %r1, %t, 1; shl.b32 %r1, %r1, 3; add.u32 %r1, %r1, %s0;\nst.shared.v2.u32 [%r1], {%t, %r2};"
        + MARK,
        "add.u32 %r2, %t, 9; shl.b32 %r1, %t, 3; add.u32 %r1, %r1, %s0; st.shared.v2.u32 [%r1], {%t, %r2};",
        block=32,
    ),
    Case(
        "acquire_of_block_scope",
        "race",
        flag_protocol("st.release.gpu.global.u32 [%p2], 1;", "ld.acquire.cta.global.u32 %r2, [%p2];", ""),
        flag_protocol("st.release.gpu.global.u32 [%p2], 1;", "ld.acquire.sys.global.u32 %r2, [%p2];", ""),
        grid=2,
        block=1,
    ),
    Case(
        "count_without_a_fence",
        "race",
        flag_protocol("red.relaxed.gpu.global.add.u32 [%p2], 1;", "ld.acquire.gpu.global.u32 %r2, [%p2];", ""),
        flag_protocol("red.release.gpu.global.add.u32 [%p2], 1;", "ld.acquire.gpu.global.u32 %r2, [%p2];", ""),
        grid=2,
        block=1,
    ),
    Case("lock_without_fences", "race", lock("", ""), lock("membar.gl;", "membar.gl;"), grid=3, block=1),
    Case(
        "lock_without_an_acquire",
        "race",
        lock("membar.gl;", ""),
        lock("fence.acq_rel.gpu;", "fence.acq_rel.gpu;"),
        grid=3,
        block=1,
    ),
    Case("flag_in_shared_memory", "race", zeroed(shared_flag("")), zeroed(shared_flag("membar.cta;"))),
    Case("last_arrival_reads", "race", zeroed(last_arrival("")), zeroed(last_arrival("fence.acq_rel.cta;"))),
    Case("one_of_many_readers", "race", many_readers(5), many_readers(6), grid=7, block=1),
]

BY_NAME = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@BY_NAME
def test_broken_kernels_are_found(case):
    check_broken(case)


@BY_NAME
def test_right_twins_are_without_a_finding(case):
    check_right(case)


@pytest.mark.parametrize("check", ["memory", "init", "race", "barrier"])
def test_each_check_alone(check):
    check_alone(CASES, check)


def test_a_finding_names_both_parties():
    case = next(c for c in CASES if c.name == "missing_barrier")
    finding = next(f for f in case.run(case.broken)[0] if f.line == case.line)
    assert (finding.kernel, finding.line, finding.space, finding.second_role) == (
        "k",
        case.line,
        "shared",
        "written at",
    )
    assert finding.text == "ld.shared.f32 %f1, [%r1]" and finding.second.text == "st.shared.u32 [%s1], %t"
    assert finding.block == (0, 0, 0) and abs(finding.thread[0] - finding.second.thread[0]) == 32


def test_a_schedule_repeats():
    case = next(c for c in CASES if c.name == "missing_barrier")
    for schedule in (("random", 7), ("adversarial", 7)):
        assert case.run(case.broken, schedule)[0] == case.run(case.broken, schedule)[0]
