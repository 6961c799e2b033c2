# ruff: noqa: E501
"""Barriers, named ones included, and other instructions that threads execute together."""

import pytest
from checked_kernels import (
    BARRIER,
    MARK,
    OTHER,
    PRODUCE,
    READ_OTHER,
    STORE,
    WARPS,
    Case,
    check_alone,
    check_broken,
    check_right,
)

pytestmark = pytest.mark.usefixtures("checked")

CASES = [
    Case(
        "divergent_barrier",
        "divergent-barrier",
        "setp.lt.u32 %q1, %t, 16;\n@%q1 bar.sync 0;" + MARK + "@!%q1 bar.sync 0;",
        BARRIER,
        block=32,
    ),
    Case(
        "barriers_on_both_ways_to_the_exit",
        "divergent-barrier",
        "setp.lt.u32 %q1, %t, 16; @%q1 bra LOW;\nbar.sync 0;" + MARK + "ret; LOW: st.global.u32 [%x2], %t; bar.sync 0;",
        "setp.lt.u32 %q1, %t, 16; @%q1 bra LOW; bar.sync 0; ret; LOW: st.global.u32 [%x2], %t;",
    ),
    Case(
        "mismatched_counts",
        "mismatched-barrier",
        "setp.lt.u32 %q1, %t, 32; @%q1 bra ONE; bar.sync 1, 64; bra DONE;\nONE: bar.sync 1, 128;" + MARK + "DONE:",
        "bar.sync 1, 64;",
    ),
    Case(
        "different_places",
        "mismatched-barrier",
        "setp.lt.u32 %q1, %t, 32; @%q1 bra ONE; bar.sync 0; bra DONE;\nONE: bar.sync 0;" + MARK + "DONE:",
        "bar.sync 0;",
    ),
    Case(
        "wait_that_never_ends",
        "deadlock",
        "setp.lt.u32 %q1, %t, 32; @%q1 bra DONE;\nbar.sync 1, 64;" + MARK + "DONE:",
        "bar.sync 1, 64; DONE:",
    ),
    Case(
        "spin_that_never_ends",
        "deadlock",
        "\nLOOP: ld.volatile.global.u32 %r2, [%p2]; setp.eq.u32 %q1, %r2, 0; @%q1 bra LOOP;" + MARK,
        "LOOP: ld.volatile.global.u32 %r2, [%p2]; setp.ne.u32 %q1, %r2, 0; @%q1 bra LOOP;",
        block=1,
    ),
    Case(
        "matrix_by_half_a_warp",
        "divergent-aligned",
        "shl.b32 %r1, %t, 4; add.u32 %r1, %r1, %s0; setp.lt.u32 %q1, %t, 16;\n@%q1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];"
        + MARK,
        "shl.b32 %r1, %t, 4; add.u32 %r1, %r1, %s0; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];",
        block=32,
    ),
    Case(
        "mask_without_itself",
        "warp-mask",
        "\nshfl.sync.idx.b32 %r1, %t, 0, 31, 0xffff;" + MARK,
        "shfl.sync.idx.b32 %r1, %t, 0, 31, 0xffffffff;",
        block=32,
    ),
    Case(
        "the_other_producer's_barrier",
        "race",
        WARPS
        + "@%q0 bra FIRST; @%q1 bra SECOND; bar.sync 1, 64;\nld.shared.u32 %r1, [%s1+-128];"
        + MARK
        + "bar.sync 2, 64; st.global.u32 [%x2], %r1; bra DONE; FIRST: "
        + PRODUCE
        + "bar.arrive 1, 64; bra DONE; SECOND: "
        + PRODUCE
        + "bar.arrive 2, 64; DONE:",
        WARPS
        + "@%q0 bra FIRST; @%q1 bra SECOND; bar.sync 1, 64; ld.shared.u32 %r1, [%s1+-256]; bar.sync 2, 64; ld.shared.u32 %r1, [%s1+-128]; st.global.u32 [%x2], %r1; bra DONE; FIRST: "
        + PRODUCE
        + "bar.arrive 1, 64; bra DONE; SECOND: "
        + PRODUCE
        + "bar.arrive 2, 64; DONE:",
        block=96,
    ),
    Case(
        "arrival_before_the_write",
        "race",
        WARPS
        + "@%q0 bra FIRST; bar.sync 1, 64;\nld.shared.u32 %r1, [%s1+-128];"
        + MARK
        + "st.global.u32 [%x2], %r1; bra DONE; FIRST: bar.arrive 1, 64; "
        + PRODUCE
        + "DONE:",
        WARPS
        + "@%q0 bra FIRST; bar.sync 1, 64; ld.shared.u32 %r1, [%s1+-128]; st.global.u32 [%x2], %r1; bra DONE; FIRST: "
        + PRODUCE
        + "bar.arrive 1, 64; DONE:",
    ),
    Case(
        "barrier_for_half_the_threads",
        "race",
        PRODUCE + OTHER + "barrier.sync 1, 32;\n" + READ_OTHER + MARK + STORE,
        PRODUCE + OTHER + "barrier.sync 1, 64;" + READ_OTHER + STORE,
    ),
    Case(
        "arrival_that_never_comes",
        "deadlock",
        WARPS + "@!%q0 bra DONE;\nbar.sync 3, 64;" + MARK + "DONE:",
        WARPS + "@%q0 bra WAIT; bar.arrive 3, 64; bra DONE; WAIT: bar.sync 3, 64; DONE:",
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
