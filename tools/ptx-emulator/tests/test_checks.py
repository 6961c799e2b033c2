# ruff: noqa: E501
"""What holds for all checks."""

import pytest
import torch
from checked_kernels import SCHEDULES, STORE, Case

import ptx_emulator

pytestmark = pytest.mark.usefixtures("checked")

# Wrong results that break no rule: a body, and the one it should have been.
TILE = "ld.global.f32 %f1, [%x1]; st.shared.f32 [%s1], %f1; bar.sync 0;"
WRONG = {
    "swizzle": ("xor.b32 %r1, %s1, 8; ld.shared.f32 %f1, [%r1];", "ld.shared.f32 %f1, [%s1];"),
    "stale_buffer": (
        "ld.shared.f32 %f1, [%s1]; bar.sync 0; ld.global.f32 %f2, [%x1+256]; st.shared.f32 [%s1+256], %f2; bar.sync 0; ld.shared.f32 %f2, [%s1]; add.f32 %f1, %f1, %f2;",
        "ld.shared.f32 %f1, [%s1]; bar.sync 0; ld.global.f32 %f2, [%x1+256]; st.shared.f32 [%s1+256], %f2; bar.sync 0; ld.shared.f32 %f2, [%s1+256]; add.f32 %f1, %f1, %f2;",
    ),
    "dropped_scale": ("ld.shared.f32 %f1, [%s1];", "ld.shared.f32 %f1, [%s1]; mul.f32 %f1, %f1, 0f3F000000;"),
    "neighbour": (
        "sub.u32 %r1, 63, %t; shl.b32 %r1, %r1, 2; add.u32 %r1, %r1, %s0; ld.shared.f32 %f1, [%r1];",
        "ld.shared.f32 %f1, [%s1];",
    ),
    "sign": (
        "ld.shared.f32 %f1, [%s1]; sub.f32 %f1, 0f3F800000, %f1;",
        "ld.shared.f32 %f1, [%s1]; add.f32 %f1, 0f3F800000, %f1;",
    ),
    "one_step_too_few": (
        "mov.f32 %f1, 0f00000000; mov.u32 %r1, 0; LOOP: ld.shared.f32 %f2, [%s1]; add.f32 %f1, %f1, %f2; add.u32 %r1, %r1, 1; setp.lt.u32 %q1, %r1, 3; @%q1 bra LOOP;",
        "mov.f32 %f1, 0f00000000; mov.u32 %r1, 0; LOOP: ld.shared.f32 %f2, [%s1]; add.f32 %f1, %f1, %f2; add.u32 %r1, %r1, 1; setp.lt.u32 %q1, %r1, 4; @%q1 bra LOOP;",
    ),
    "wrong_lane": (
        "ld.shared.b32 %r1, [%s1]; shfl.sync.bfly.b32 %r1, %r1, 2, 31, -1; mov.b32 %f1, %r1;",
        "ld.shared.b32 %r1, [%s1]; shfl.sync.bfly.b32 %r1, %r1, 1, 31, -1; mov.b32 %f1, %r1;",
    ),
    "maximum_for_sum": (
        "ld.shared.f32 %f1, [%s1]; max.f32 %f1, %f1, 0f40000000;",
        "ld.shared.f32 %f1, [%s1]; add.f32 %f1, %f1, 0f40000000;",
    ),
    "transposed": (
        "and.b32 %r1, %t, 7; shl.b32 %r1, %r1, 3; shr.u32 %r2, %t, 3; add.u32 %r1, %r1, %r2; shl.b32 %r1, %r1, 2; add.u32 %r1, %r1, %s0; ld.shared.f32 %f1, [%r1];",
        "ld.shared.f32 %f1, [%s1];",
    ),
    "overwritten_result": (
        "ld.shared.f32 %f1, [%s1]; st.global.f32 [%x2], %f1; ld.shared.f32 %f1, [%s0];",
        "ld.shared.f32 %f1, [%s1];",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_results_are_no_findings(name):
    wrong, right = (Case(name, "", "", TILE + body + STORE) for body in WRONG[name])
    for schedule in (SCHEDULES[0], SCHEDULES[1], SCHEDULES[21]):
        found, got, _ = wrong.run(wrong.right, schedule)
        also_found, expected, _ = right.run(right.right, schedule)
        assert not found and not also_found
        assert not torch.equal(got[:64], expected[:64])


def test_settings_are_checked():
    for call in (lambda: ptx_emulator.checks("bounds"), lambda: ptx_emulator.schedule("fair")):
        with pytest.raises(ValueError, match="expected"):
            call()
