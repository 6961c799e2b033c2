# ruff: noqa: E501
"""Values that were never written."""

import pytest
from checked_kernels import (
    ACCUMULATOR,
    BARRIER,
    HEAP,
    MARK,
    MULTIPLY,
    PRINT,
    ROW,
    STORE,
    Case,
    check_alone,
    check_broken,
    check_right,
)

import ptx_emulator

pytestmark = pytest.mark.usefixtures("checked")

CASES = [
    Case(
        "accumulator",
        "uninitialized",
        "ld.global.f32 %f2, [%x1];\nfma.rn.f32 %f1, %f2, %f2, %f1;" + MARK + STORE,
        "ld.global.f32 %f2, [%x1]; mov.f32 %f1, 0f00000000; fma.rn.f32 %f1, %f2, %f2, %f1;" + STORE,
    ),
    Case(
        "mma_accumulator",
        "uninitialized",
        "mov.u32 %r1, 0; mov.u32 %r2, 0;\nmma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2}, {%r1}, {%f1, %f2, %f3, %f4};"
        + MARK
        + STORE,
        "mov.u32 %r1, 0; mov.u32 %r2, 0; mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1; mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2}, {%r1}, {%f1, %f2, %f3, %f4};"
        + STORE,
    ),
    Case(
        "shared_tile",
        "uninitialized",
        "setp.lt.u32 %q1, %t, 32; @%q1 st.shared.u32 [%s1], %t;"
        + BARRIER
        + "ld.shared.f32 %f1, [%s1];\nadd.f32 %f1, %f1, %f1;"
        + MARK
        + STORE,
        "st.shared.u32 [%s1], %t;" + BARRIER + "ld.shared.f32 %f1, [%s1]; add.f32 %f1, %f1, %f1;" + STORE,
    ),
    Case(
        "scratch",
        "uninitialized",
        "ld.global.f32 %f1, [%x2];\nadd.f32 %f1, %f1, 0f3F800000;" + MARK + STORE,
        "st.global.u32 [%x2], %t; ld.global.f32 %f1, [%x2]; add.f32 %f1, %f1, 0f3F800000;" + STORE,
    ),
    Case(
        "branch",
        "uninitialized",
        "setp.eq.u32 %q1, %r1, 7;" + MARK + "@%q1 bra DONE; st.global.u32 [%x2], %t; DONE:",
        "mov.u32 %r1, 8; setp.eq.u32 %q1, %r1, 7; @%q1 bra DONE; st.global.u32 [%x2], %t; DONE:",
    ),
    Case(
        "address",
        "uninitialized",
        "ld.global.f32 %f1, [%x9];" + MARK + STORE,
        "mov.u64 %x9, %x1; ld.global.f32 %f1, [%x9];" + STORE,
    ),
    Case(
        "local_array",
        "uninitialized",
        "ld.local.u32 %r1, [stack+8];\nadd.u32 %r1, %r1, 1;" + MARK + "st.global.u32 [%x2], %r1;",
        "st.local.u32 [stack+8], %t; ld.local.u32 %r1, [stack+8]; add.u32 %r1, %r1, 1; st.global.u32 [%x2], %r1;",
        inside=".local .align 8 .b8 stack[32];\n",
    ),
    Case("atomic_on_nothing", "uninitialized", "red.global.add.u32 [%p1], 1;" + MARK, "red.global.add.u32 [%p2], 1;"),
    Case(
        "half_of_a_word",
        "uninitialized",
        "mov.u16 %h1, 1; mov.b32 %r1, {%h1, %h2};\nadd.u32 %r1, %r1, 1;" + MARK + "st.global.u32 [%x2], %r1;",
        "mov.u16 %h1, 1; mov.b32 %r1, {%h1, %h2}; mov.b32 {%h3, %h4}, %r1; cvt.u32.u16 %r1, %h3; st.global.u32 [%x2], %r1;",
    ),
    Case(
        "half_of_a_vector",
        "uninitialized",
        ROW
        + "st.shared.v2.u32 [%r1], {%t, %t}; ld.shared.v4.u32 {%r2, %r3, %r4, %r5}, [%r1];\nadd.u32 %r5, %r5, %r2;"
        + MARK
        + "st.global.u32 [%x2], %r5;",
        ROW
        + "st.shared.v2.u32 [%r1], {%t, %t}; ld.shared.v4.u32 {%r2, %r3, %r4, %r5}, [%r1]; add.u32 %r3, %r3, %r2; st.global.u32 [%x2], %r3;",
    ),
    Case(
        "wrong_half_of_a_word",
        "uninitialized",
        "st.shared.u16 [%s1], 1; ld.shared.u32 %r1, [%s1]; shr.u32 %r2, %r1, 16;\nadd.u32 %r2, %r2, 1;"
        + MARK
        + "st.global.u32 [%x2], %r2;",
        "st.shared.u16 [%s1], 1; ld.shared.u32 %r1, [%s1]; shl.b32 %r2, %r1, 16; add.u32 %r2, %r2, 1; shr.s32 %r3, %r2, 16; st.global.u32 [%x2], %r3;",
    ),
    Case(
        "one_of_two_paths",
        "uninitialized",
        "setp.lt.u32 %q1, %t, 60; @!%q1 bra JOIN; mov.u32 %r1, 5; JOIN:\nadd.u32 %r1, %r1, 1;"
        + MARK
        + "st.global.u32 [%x2], %r1;",
        "setp.lt.u32 %q1, %t, 60; mov.u32 %r1, 4; @!%q1 bra JOIN; mov.u32 %r1, 5; JOIN: add.u32 %r1, %r1, 1; st.global.u32 [%x2], %r1;",
    ),
    Case(
        "predicate_of_one_path",
        "uninitialized",
        "setp.lt.u32 %q1, %t, 60; @%q1 setp.lt.u32 %q2, %t, 5;\n@%q2 st.global.u32 [%x2], %t;" + MARK,
        "setp.lt.u32 %q1, %t, 60; setp.lt.and.u32 %q2, %t, 5, %q1; @%q2 st.global.u32 [%x2], %t;",
    ),
    Case(
        "lane_that_is_not_there",
        "uninitialized",
        "setp.lt.u32 %q1, %t, 16; @!%q1 bra DONE;\nshfl.sync.idx.b32 %r1, %t, 20, 31, 0xffff;"
        + MARK
        + "st.global.u32 [%x2], %r1; DONE:",
        "setp.lt.u32 %q1, %t, 16; @!%q1 bra DONE; shfl.sync.idx.b32 %r1, %t, 10, 31, 0xffff; st.global.u32 [%x2], %r1; DONE:",
        block=32,
    ),
    Case(
        "matrix_rows_of_nothing",
        "uninitialized",
        ACCUMULATOR
        + ROW
        + "mov.u32 %r2, %s0; setp.lt.u32 %q1, %t, 15; @%q1 st.shared.v4.u32 [%r1], {0, 0, 0, 0}; bar.warp.sync -1; ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r3, %r4}, [%r1]; mov.u32 %r1, %r3; mov.u32 %r2, %r4;\n"
        + MULTIPLY
        + MARK
        + "mul.wide.u32 %x5, %t, 8; add.s64 %x5, %p1, %x5; st.global.v2.f32 [%x5], {%f1, %f3};",
        ACCUMULATOR
        + ROW
        + "mov.u32 %r2, %s0; setp.lt.u32 %q1, %t, 16; @%q1 st.shared.v4.u32 [%r1], {0, 0, 0, 0}; bar.warp.sync -1; ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r3, %r4}, [%r1]; mov.u32 %r1, %r3; mov.u32 %r2, %r4;"
        + MULTIPLY
        + "mul.wide.u32 %x5, %t, 8; add.s64 %x5, %p1, %x5; st.global.v2.f32 [%x5], {%f1, %f3};",
        block=32,
    ),
    Case(
        "printed_value",
        "uninitialized",
        PRINT.replace("call.uni (n)", "\ncall.uni (n)").replace("(f, v);", "(f, v);" + MARK),
        "st.local.u32 [stack], %t;" + PRINT,
        block=1,
        outside=HEAP,
        inside=".local .align 8 .b8 stack[8];\n",
    ),
    Case(
        "branch_table_of_nothing",
        "uninitialized",
        "targets: .branchtargets A, B;\nbrx.idx %r1, targets;" + MARK + "A: st.global.u32 [%x2], %t; B:",
        "and.b32 %r1, %t, 1; targets: .branchtargets A, B; brx.idx %r1, targets; A: st.global.u32 [%x2], %t; B:",
    ),
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


def test_never_written_output():
    case = Case("", "", "", "setp.lt.u32 %q1, %t, 63; @%q1 st.global.u32 [%x2], %t;")
    found, _, out = case.run(case.right)
    assert not found
    assert ptx_emulator.host_reads(out[:63]) and not ptx_emulator.host_reads(out[:64])
    assert [f.rule for f in ptx_emulator.findings()] == ["uninitialized-copy"]
    ptx_emulator.register(out)  # the host writes it
    ptx_emulator.unregister(out)
    assert ptx_emulator.host_reads(out)
