# ruff: noqa: E501
"""Bounds, freed memory, alignment."""

import gc

import numpy as np
import pytest
import torch
from checked_kernels import FREE, HEAP, MALLOC, MARK, STORE, WAIT, Case, check_alone, check_broken, check_right

import ptx_emulator

pytestmark = pytest.mark.usefixtures("checked")

CASES = [
    Case(
        "row_beyond",
        "out-of-bounds",
        "ld.global.f32 %f1, [%x1+772];" + MARK + STORE,
        "ld.global.f32 %f1, [%x1+768];" + STORE,
    ),
    Case(
        "store_beyond",
        "out-of-bounds",
        "mov.f32 %f1, 0f00000000;\nst.global.f32 [%x2+896], %f1;" + MARK,
        "mov.f32 %f1, 0f00000000; st.global.f32 [%x2+768], %f1;",
    ),
    Case(
        "element_before",
        "out-of-bounds",
        "ld.global.f32 %f1, [%x1+-4];" + MARK + STORE,
        "ld.global.f32 %f1, [%x1+4];" + STORE,
    ),
    Case(
        "vector_across_the_end",
        "out-of-bounds",
        "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%p0+1024];" + MARK + STORE,
        "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%p0+1008];" + STORE,
    ),
    Case(
        "misaligned_vector",
        "misaligned",
        "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%x1];" + MARK + STORE,
        "and.b64 %x1, %x1, -16; ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%x1];" + STORE,
    ),
    Case(
        "misaligned_shared",
        "misaligned",
        "mov.u64 %x5, 0;\nst.shared.u64 [%s1], %x5;" + MARK,
        "mov.u64 %x5, 0; and.b32 %s1, %s1, -8; st.shared.u64 [%s1], %x5;",
        block=2,
    ),
    Case(
        "shared_beyond",
        "out-of-bounds",
        "st.shared.u32 [%s1], %t;" + MARK,
        "setp.lt.u32 %q1, %t, 32; @%q1 st.shared.u32 [%s1], %t;",
        tile=128,
    ),
    Case(
        "matrix_row_beyond",
        "out-of-bounds",
        "shl.b32 %r1, %t, 4; add.u32 %r1, %r1, %s0;\nldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1];"
        + MARK,
        "",
        tile=256,
        block=32,
    ),
    Case(
        "local_beyond",
        "out-of-bounds",
        "mov.u64 %x4, stack; add.u64 %x5, %x4, 32;\nst.local.u32 [%x5], %t;" + MARK,
        "mov.u64 %x4, stack; add.u64 %x5, %x4, 28; st.local.u32 [%x5], %t;",
        inside=".local .align 8 .b8 stack[32];\n",
    ),
    Case(
        "constant_beyond",
        "out-of-bounds",
        "mov.u64 %x4, table; add.s64 %x4, %x4, %x0;\nld.const.f32 %f1, [%x4];" + MARK + STORE,
        "and.b64 %x0, %x0, 12; mov.u64 %x4, table; add.s64 %x4, %x4, %x0; ld.const.f32 %f1, [%x4];" + STORE,
        outside=".const .align 4 .f32 table[4] = {1.0, 2.0, 3.0, 4.0};\n",
    ),
    Case(
        "device_variable_beyond",
        "out-of-bounds",
        "mov.u64 %x4, table; add.s64 %x4, %x4, %x0;\nld.global.f32 %f1, [%x4];" + MARK + STORE,
        "and.b64 %x0, %x0, 12; mov.u64 %x4, table; add.s64 %x4, %x4, %x0; ld.global.f32 %f1, [%x4];" + STORE,
        outside=".global .align 4 .f32 table[4];\n",
    ),
    Case(
        "copy_source_beyond",
        "out-of-bounds",
        "cp.async.ca.shared.global [%s1], [%x1+772], 4;" + MARK + WAIT.replace("group 0", "all"),
        "mov.u32 %r1, 4; setp.eq.u32 %q1, %t, 63; @%q1 mov.u32 %r1, 0; cp.async.ca.shared.global [%s1], [%x1+772], 4, %r1; cp.async.wait_all;",
    ),
    Case(
        "heap_after_free",
        "use-after-free",
        MALLOC + FREE + "\nst.global.u32 [%x4], 2;" + MARK,
        MALLOC + "st.global.u32 [%x4], 2;" + FREE,
        block=1,
        outside=HEAP,
    ),
    Case(
        "heap_beyond",
        "out-of-bounds",
        MALLOC + "\nst.global.u32 [%x4+64], 2;" + MARK + FREE,
        MALLOC + "st.global.u32 [%x4+60], 2;" + FREE,
        block=1,
        outside=HEAP,
    ),
    Case(
        "beyond_dynamic_shared_memory",
        "out-of-bounds",
        "mov.u32 %r1, dynamic; mad.lo.u32 %r1, %t, 8, %r1;\nst.shared.u32 [%r1], %t;" + MARK,
        "mov.u32 %r1, dynamic; mad.lo.u32 %r1, %t, 4, %r1; st.shared.u32 [%r1], %t;",
        outside=".extern .shared .align 16 .b8 dynamic[];\n",
        dynamic=256,
    ),
    Case(
        "local_before",
        "out-of-bounds",
        "mov.u64 %x4, stack;\nst.local.u32 [%x4+-4], %t;" + MARK,
        "mov.u64 %x4, stack; st.local.u32 [%x4], %t;",
        inside=".local .align 8 .b8 stack[32];\n",
    ),
    Case(
        "shared_of_another_window",
        "out-of-bounds",
        "mov.u64 %x4, 0x0800000000010000;\nst.u32 [%x4], %t;" + MARK,
        "mov.u32 %r1, tile; cvt.u64.u32 %x4, %r1; cvta.shared.u64 %x4, %x4; add.s64 %x4, %x4, %x0; st.u32 [%x4], %t;",
    ),
    Case("red_beyond", "out-of-bounds", "red.global.add.u32 [%p2+256], 1;" + MARK, "red.global.add.u32 [%p2+252], 1;"),
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


def test_a_finding_names_the_allocation():
    case = next(c for c in CASES if c.name == "row_beyond")
    finding = case.run(case.broken)[0][0]
    assert finding.thread == (63, 0, 0) and "0 bytes after" in finding.message and finding.allocation


def test_unknown_and_freed_memory():
    text = Case("", "", "", "ld.global.f32 %f1, [%x1];" + STORE).right
    source, flags = torch.zeros(256), torch.zeros(64, dtype=torch.int32)
    out = ptx_emulator.empty(256, torch.float32)
    ptx_emulator.load(text)["k"](1, 64, 0, source, out, flags)
    assert [f.rule for f in ptx_emulator.findings()] == ["out-of-bounds"]
    ptx_emulator.clear()
    freed = ptx_emulator.empty(256, torch.float32, name="freed")
    address = np.uint64(freed.data_ptr())
    del freed
    gc.collect()
    ptx_emulator.load(text)["k"](1, 64, 0, address, out, flags)
    (found,) = ptx_emulator.findings()
    assert found.rule == "use-after-free" and "'freed'" in found.message and found.count == 1


def test_overlapping_registrations_are_one_region():
    cache = torch.zeros(2, 2, 64)  # interleaved key and value caches: each extent leaves out part of the other
    keys, values = cache[:, 0], cache[:, 1]
    text = Case("", "", "", "ld.global.f32 %f1, [%x1]; ld.global.f32 %f1, [%x1+768];" + STORE).right
    out = ptx_emulator.empty(256, torch.float32)
    with ptx_emulator.registered(keys, values):
        ptx_emulator.load(text)["k"](1, 64, 0, cache, out, out)
        assert not ptx_emulator.findings()
    ptx_emulator.clear()
    with ptx_emulator.registered(keys):
        ptx_emulator.load(text)["k"](1, 64, 0, cache, out, out)
        (found,) = ptx_emulator.findings()  # the last 64 belong to the values
        assert found.rule == "out-of-bounds"
