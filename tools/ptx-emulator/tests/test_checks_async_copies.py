# ruff: noqa: E501
"""Asynchronous copies, and pipelines of them."""

import pytest
from checked_kernels import (
    BARRIER,
    COMMIT,
    COPY,
    COPY_ROW,
    MARK,
    MATRIX,
    MATRIX_STORE,
    OTHER,
    OTHER_ROW,
    PIPELINE,
    READ_OTHER,
    RING,
    ROW,
    STORE,
    WAIT,
    Case,
    buffers,
    check_alone,
    check_broken,
    check_right,
)

pytestmark = pytest.mark.usefixtures("checked")

CASES = [
    Case(
        "read_before_the_wait",
        "async-race",
        COPY + COMMIT + "\nld.shared.f32 %f1, [%s1];" + MARK + WAIT + STORE,
        COPY + COMMIT + WAIT + "ld.shared.f32 %f1, [%s1];" + STORE,
    ),
    Case(
        "barrier_before_the_wait",
        "async-race",
        COPY + COMMIT + OTHER + BARRIER + WAIT + "\n" + READ_OTHER + MARK + STORE,
        COPY + COMMIT + OTHER + WAIT + BARRIER + READ_OTHER + STORE,
    ),
    Case(
        "wait_off_by_one",
        "async-race",
        PIPELINE
        + "cp.async.wait_group 1;"
        + BARRIER
        + "\nld.shared.f32 %f1, [%s1+256];"
        + MARK
        + "cp.async.wait_all;"
        + STORE,
        PIPELINE + "cp.async.wait_group 0;" + BARRIER + "ld.shared.f32 %f1, [%s1+256];" + STORE,
    ),
    Case(
        "refilled_too_early",
        "async-race",
        COPY
        + COMMIT
        + WAIT
        + BARRIER
        + OTHER
        + READ_OTHER
        + "\ncp.async.ca.shared.global [%s1], [%x1+256], 4;"
        + MARK
        + COMMIT
        + WAIT
        + STORE,
        COPY
        + COMMIT
        + WAIT
        + BARRIER
        + OTHER
        + READ_OTHER
        + BARRIER
        + "cp.async.ca.shared.global [%s1], [%x1+256], 4;"
        + COMMIT
        + WAIT
        + STORE,
    ),
    Case(
        "source_overwritten",
        "async-race",
        COPY + COMMIT + "\nst.global.u32 [%x1], %t;" + MARK + WAIT,
        COPY + COMMIT + WAIT + "st.global.u32 [%x1], %t;",
    ),
    Case(
        "target_overwritten",
        "async-race",
        COPY + COMMIT + "\nst.shared.u32 [%s1], %t;" + MARK + WAIT,
        COPY + COMMIT + WAIT + "st.shared.u32 [%s1], %t;",
    ),
    Case(
        "never_committed",
        "async-race",
        COPY + WAIT + "\nld.shared.f32 %f1, [%s1];" + MARK + "cp.async.wait_all;" + STORE,
        COPY + "cp.async.wait_all; ld.shared.f32 %f1, [%s1];" + STORE,
    ),
    Case("pending_at_exit", "async-pending", COPY + MARK + COMMIT, COPY + COMMIT + WAIT),
    Case(
        "tail_of_a_ring",
        "async-race",
        RING
        + "cp.async.wait_group 2; ld.shared.f32 %f1, [%s1]; cp.async.wait_group 1; ld.shared.f32 %f2, [%s1+256]; cp.async.wait_group 1;\nld.shared.f32 %f3, [%s1+512];"
        + MARK
        + "cp.async.wait_all; add.f32 %f1, %f1, %f2; add.f32 %f1, %f1, %f3;"
        + STORE,
        RING
        + "cp.async.wait_group 2; ld.shared.f32 %f1, [%s1]; cp.async.wait_group 1; ld.shared.f32 %f2, [%s1+256]; cp.async.wait_group 0; ld.shared.f32 %f3, [%s1+512]; add.f32 %f1, %f1, %f2; add.f32 %f1, %f1, %f3;"
        + STORE,
    ),
    Case(
        "matrix_of_copies_without_a_barrier",
        "async-race",
        ROW + OTHER_ROW + COPY_ROW + WAIT + "\n" + MATRIX + MARK + MATRIX_STORE,
        ROW + OTHER_ROW + COPY_ROW + WAIT + BARRIER + MATRIX + MATRIX_STORE,
    ),
    Case(
        "matrix_of_another_warp",
        "race",
        ROW + OTHER_ROW + "st.shared.v4.u32 [%r1], {%t, %t, %t, %t};\n" + MATRIX + MARK + MATRIX_STORE,
        ROW + OTHER_ROW + "st.shared.v4.u32 [%r1], {%t, %t, %t, %t};" + BARRIER + MATRIX + MATRIX_STORE,
    ),
    Case(
        "one_target_two_copies",
        "async-race",
        "cp.async.ca.shared.global [%s0], [%x1], 4;" + MARK + "cp.async.wait_all;",
        "setp.eq.u32 %q1, %t, 9; @%q1 cp.async.ca.shared.global [%s0], [%x1], 4; cp.async.wait_all;",
    ),
    Case(
        "misaligned_copy",
        "misaligned",
        ROW + "\ncp.async.cg.shared.global [%r1], [%x1], 16;" + MARK + "cp.async.wait_all;",
        ROW + "and.b64 %x1, %x1, -16; cp.async.cg.shared.global [%r1], [%x1], 16; cp.async.wait_all;",
    ),
    Case(
        "parity_of_two_buffers",
        "race",
        buffers(0),
        buffers(256),
    ),
    Case(
        "stored_matrix_read_too_early",
        "race",
        ROW
        + OTHER_ROW
        + "mov.u32 %r3, %t;\nstmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%r3}; ld.shared.u32 %r4, [%r1];"
        + MARK
        + "st.global.u32 [%x2], %r4;",
        ROW
        + OTHER_ROW
        + "mov.u32 %r3, %t; stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%r3}; bar.warp.sync -1; setp.lt.u32 %q1, %t, 8; @%q1 ld.shared.u32 %r4, [%r1]; @%q1 st.global.u32 [%x2], %r4;",
        block=32,
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
