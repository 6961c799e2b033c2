# ruff: noqa: E501
"""Rules of mbarriers, bulk copies and wgmma: each broken by a kernel, kept by its twin."""

import itertools

import numpy as np
import pytest
from hopper_kernels import FENCE_INIT, copy_tile, text, wait

import ptx_emulator

pytestmark = [pytest.mark.usefixtures("hopper", "checked")]
SCHEDULES = [("roundrobin", 0), *itertools.product(("random", "adversarial"), range(12))]

INIT = f"setp.ne.u32 %q0, %t, 0; @!%q0 mbarrier.init.shared::cta.b64 [%bar], 1; @!%q0 mbarrier.init.shared::cta.b64 [%bar+8], 1; {FENCE_INIT} bar.sync 0;\n"
EXPECT = "@!%q0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 1024;\n"
LOAD = "@!%q0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%p0], 1024, [%bar];\n"
BOX = "mov.u32 %r60, 0; @!%q0 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%p7, {%r60, %r60}], [%bar];\n"
# Each thread's word of the tile, at %r1; of p1, at %x2.
MINE = "shl.b32 %r0, %t, 2; add.u32 %r1, %s, %r0; cvt.u64.u32 %x1, %r0; add.s64 %x2, %p1, %x1;\n"
READ = "ld.shared.u32 %r2, [%r1];\n"
WRITE = "st.shared.u32 [%r1], %t;\n"
OUT = "st.global.u32 [%x2], %r2;\n"
FENCE = "fence.proxy.async.shared::cta;\n"
BARRIER = "bar.sync 0;\n"
STORE = "@!%q0 cp.async.bulk.global.shared::cta.bulk_group [%p1], [%s], 512;\n"
COMMIT = "cp.async.bulk.commit_group;\n"
STORED = "cp.async.bulk.wait_group.read 0;\n"
VISIBLE = "cp.async.bulk.wait_group 0;\n"
# 64 x 8 x 16, A and B from the tile (128 bytes a row, swizzled).
D = "{%f0, %f1, %f2, %f3}"
DESCRIPTORS = (
    "shr.u32 %r96, %s, 4; cvt.u64.u32 %x10, %r96; or.b64 %x10, %x10, 0x4000004000010000; setp.eq.u32 %q1, %t, %t;\n"
)
ZERO = "".join(f"mov.f32 %f{k}, 0f00000000;" for k in range(4)) + "\n"
OPEN, CLOSE, DONE = (
    "wgmma.fence.sync.aligned;\n",
    "wgmma.commit_group.sync.aligned;\n",
    "wgmma.wait_group.sync.aligned 0;\n",
)
MULTIPLY = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {D}, %x10, %x10, %q1, 1, 1, 0, 0;\n"
A_REGISTERS = (
    f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {D}, {{%r70, %r71, %r72, %r73}}, %x10, %q1, 1, 1, 0;\n"
)
SUMS = "st.global.f32 [%x2], %f0;\n"
FILL = copy_tile(True, 8192)
LEFT = "setp.lt.u32 %q2, %t, 32;\n"

CASES = {  # rule, broken, right; threads are 128
    "used_before_init": (
        "mbarrier",
        "mbarrier.arrive.shared::cta.b64 _, [%bar+16];",
        INIT + "@!%q0 mbarrier.arrive.shared::cta.b64 _, [%bar];",
    ),
    "load_before_init": ("mbarrier", "setp.ne.u32 %q0, %t, 0;" + LOAD, INIT + EXPECT + LOAD + wait()),
    "too_many_arrivals": (
        "mbarrier",
        INIT + "@!%q0 mbarrier.arrive.shared::cta.b64 _, [%bar], 2;",
        INIT + "@!%q0 mbarrier.arrive.shared::cta.b64 _, [%bar], 1;",
    ),
    "too_many_bytes": (
        "mbarrier",
        INIT + "@!%q0 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%bar], 1048576;",
        INIT + "@!%q0 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%bar], 1048575;",
    ),
    "overwritten": (
        "mbarrier",
        INIT + "@!%q0 st.shared.u64 [%bar], 0; bar.sync 0; @!%q0 mbarrier.arrive.shared::cta.b64 _, [%bar];",
        INIT + "@!%q0 mbarrier.arrive.shared::cta.b64 _, [%bar];",
    ),
    "init_unordered": (
        "mbarrier",
        "setp.ne.u32 %q0, %t, 0; @!%q0 mbarrier.init.shared::cta.b64 [%bar], 1; setp.eq.u32 %q2, %t, 1; bar.warp.sync -1; @!%q0 mbarrier.arrive.shared::cta.b64 _, [%bar]; setp.eq.u32 %q3, %t, 64; @!%q3 ret;"
        + wait(),
        INIT + "@!%q0 mbarrier.arrive.shared::cta.b64 _, [%bar];" + wait(),
    ),
    "a_phase_behind": (
        "mbarrier",
        INIT
        + LEFT
        + "@%q2 bra WAITER; setp.ne.u32 %q3, %t, 32; @%q3 ret; mbarrier.arrive.shared::cta.b64 _, [%bar]; mbarrier.arrive.shared::cta.b64 _, [%bar]; mbarrier.arrive.shared::cta.b64 _, [%bar]; ret; WAITER: @%q0 ret;"
        + wait(),
        INIT
        + LEFT
        + "@%q2 bra WAITER; setp.ne.u32 %q3, %t, 32; @%q3 ret; mbarrier.arrive.shared::cta.b64 _, [%bar];"
        + wait("%bar+8")
        + "mbarrier.arrive.shared::cta.b64 _, [%bar]; mbarrier.arrive.shared::cta.b64 _, [%bar]; ret; WAITER: @%q0 ret;"
        + wait()
        + "mbarrier.arrive.shared::cta.b64 _, [%bar+8];",
    ),
    "read_before_the_load_landed": (
        "async-race",
        INIT + MINE + EXPECT + LOAD + READ + OUT + wait(),
        INIT + MINE + EXPECT + LOAD + wait() + READ + OUT,
    ),
    "waits_for_the_wrong_phase": (
        "async-race",
        INIT + MINE + EXPECT + LOAD + wait("%bar", "1") + READ + OUT + wait(),
        INIT + MINE + EXPECT + LOAD + wait("%bar", "0") + READ + OUT,
    ),
    "bytes_expected_too_few": (
        "async-race",
        INIT
        + MINE
        + EXPECT.replace("1024", "512")
        + LOAD.replace("1024", "512")
        + LOAD.replace("1024", "512").replace("[%s]", "[%s+512]").replace("[%bar]", "[%bar+8]")
        + "@!%q0 mbarrier.expect_tx.shared::cta.b64 [%bar+8], 512;"
        + wait()
        + "ld.shared.u32 %r2, [%r1+512];"
        + OUT
        + "@!%q0 mbarrier.arrive.shared::cta.b64 _, [%bar+8];"
        + wait("%bar+8"),
        INIT + MINE + EXPECT + LOAD + wait() + "ld.shared.u32 %r2, [%r1+512];" + OUT,
    ),
    "refilled_while_read": (
        "async-race",
        INIT + MINE + EXPECT + LOAD + wait() + READ + OUT + EXPECT + LOAD + wait("%bar", "1"),
        INIT + MINE + EXPECT + LOAD + wait() + READ + OUT + BARRIER + EXPECT + LOAD + wait("%bar", "1"),
    ),
    "load_not_waited_for": ("async-pending", INIT + EXPECT + LOAD, INIT + EXPECT + LOAD + wait()),
    "written_without_a_fence": (
        "proxy-fence",
        INIT + MINE + WRITE + BARRIER + STORE + COMMIT + STORED,
        INIT + MINE + WRITE + FENCE + BARRIER + STORE + COMMIT + STORED,
    ),
    "fence_before_the_write": (
        "proxy-fence",
        INIT + MINE + FENCE + WRITE + BARRIER + STORE + COMMIT + STORED,
        INIT + MINE + WRITE + BARRIER + FENCE + STORE + COMMIT + STORED,
    ),
    "stored_without_a_barrier": (
        "async-race",
        INIT + MINE + WRITE + FENCE + STORE + COMMIT + STORED,
        INIT + MINE + WRITE + FENCE + BARRIER + STORE + COMMIT + STORED,
    ),
    "reused_while_stored": (
        "async-race",
        INIT + MINE + WRITE + FENCE + BARRIER + STORE + COMMIT + BARRIER + WRITE + STORED,
        INIT + MINE + WRITE + FENCE + BARRIER + STORE + COMMIT + STORED + BARRIER + WRITE,
    ),
    "read_back_without_a_wait": (
        "async-race",
        INIT + MINE + WRITE + FENCE + BARRIER + STORE + COMMIT + STORED + "ld.global.u32 %r3, [%p1];",
        INIT + MINE + WRITE + FENCE + BARRIER + STORE + COMMIT + VISIBLE + "@!%q0 ld.global.u32 %r3, [%p1];",
    ),
    "store_not_waited_for": (
        "async-pending",
        INIT + MINE + WRITE + FENCE + BARRIER + STORE + COMMIT,
        INIT + MINE + WRITE + FENCE + BARRIER + STORE + COMMIT + STORED,
    ),
    "accumulator_read_in_flight": (
        "wgmma-registers",
        MINE + FILL + FENCE + BARRIER + DESCRIPTORS + ZERO + OPEN + MULTIPLY + CLOSE + SUMS + DONE,
        MINE + FILL + FENCE + BARRIER + DESCRIPTORS + ZERO + OPEN + MULTIPLY + CLOSE + DONE + SUMS,
    ),
    "waits_for_an_older_group": (
        "wgmma-registers",
        MINE
        + FILL
        + FENCE
        + BARRIER
        + DESCRIPTORS
        + ZERO
        + OPEN
        + MULTIPLY
        + CLOSE
        + DONE.replace("0;", "1;")
        + SUMS
        + DONE,
        MINE
        + FILL
        + FENCE
        + BARRIER
        + DESCRIPTORS
        + ZERO
        + OPEN
        + MULTIPLY
        + CLOSE
        + CLOSE
        + DONE.replace("0;", "1;")
        + SUMS,
    ),
    "accumulator_without_a_fence": (
        "wgmma-registers",
        MINE + FILL + FENCE + BARRIER + DESCRIPTORS + OPEN + ZERO + MULTIPLY + CLOSE + DONE + SUMS,
        MINE + FILL + FENCE + BARRIER + DESCRIPTORS + ZERO + OPEN + MULTIPLY + MULTIPLY + CLOSE + DONE + SUMS,
    ),
    "a_changed_in_flight": (
        "wgmma-registers",
        MINE
        + FILL
        + FENCE
        + BARRIER
        + DESCRIPTORS
        + ZERO
        + "".join(f"mov.u32 %r{70 + k}, 0;" for k in range(4))
        + OPEN
        + A_REGISTERS
        + CLOSE
        + "mov.u32 %r70, 1;"
        + DONE
        + SUMS,
        MINE
        + FILL
        + FENCE
        + BARRIER
        + DESCRIPTORS
        + ZERO
        + "".join(f"mov.u32 %r{70 + k}, 0;" for k in range(4))
        + OPEN
        + A_REGISTERS
        + CLOSE
        + DONE
        + "mov.u32 %r70, 1;"
        + SUMS,
    ),
    "wgmma_reads_without_a_fence": (
        "proxy-fence",
        MINE + FILL + BARRIER + DESCRIPTORS + ZERO + OPEN + MULTIPLY + CLOSE + DONE + SUMS,
        MINE + FILL + FENCE + BARRIER + DESCRIPTORS + ZERO + OPEN + MULTIPLY + CLOSE + DONE + SUMS,
    ),
    "overwritten_while_wgmma_reads": (
        "async-race",
        INIT
        + MINE
        + FILL
        + FENCE
        + BARRIER
        + DESCRIPTORS
        + ZERO
        + EXPECT
        + OPEN
        + MULTIPLY
        + CLOSE
        + BARRIER
        + LOAD
        + DONE
        + SUMS
        + wait(),
        INIT
        + MINE
        + FILL
        + FENCE
        + BARRIER
        + DESCRIPTORS
        + ZERO
        + EXPECT
        + OPEN
        + MULTIPLY
        + CLOSE
        + DONE
        + BARRIER
        + LOAD
        + SUMS
        + wait(),
    ),
    "descriptor_outside": (
        "out-of-bounds",
        MINE
        + FILL
        + FENCE
        + BARRIER
        + DESCRIPTORS
        + "or.b64 %x10, %x10, 0x3fff;"
        + ZERO
        + OPEN
        + MULTIPLY
        + CLOSE
        + DONE
        + SUMS,
        MINE + FILL + FENCE + BARRIER + DESCRIPTORS + ZERO + OPEN + MULTIPLY + CLOSE + DONE + SUMS,
    ),
    "warps_diverge": (
        "divergent-warpgroup",
        MINE
        + FILL
        + FENCE
        + BARRIER
        + DESCRIPTORS
        + ZERO
        + LEFT
        + OPEN
        + "@%q2 bra OTHER;"
        + MULTIPLY
        + "bra JOINED; OTHER:"
        + MULTIPLY
        + "JOINED: "
        + CLOSE
        + DONE
        + SUMS,
        MINE + FILL + FENCE + BARRIER + DESCRIPTORS + ZERO + LEFT + OPEN + MULTIPLY + CLOSE + DONE + SUMS,
    ),
    "a_warp_stays_away": (
        "divergent-warpgroup",
        MINE
        + FILL
        + FENCE
        + BARRIER
        + DESCRIPTORS
        + ZERO
        + LEFT
        + OPEN
        + "@%q2 bra JOINED;"
        + MULTIPLY
        + "JOINED: "
        + CLOSE
        + DONE
        + SUMS,
        MINE + FILL + FENCE + BARRIER + DESCRIPTORS + ZERO + LEFT + OPEN + MULTIPLY + CLOSE + DONE + SUMS,
    ),
    "lanes_diverge": (
        "divergent-aligned",
        MINE
        + FILL
        + FENCE
        + BARRIER
        + DESCRIPTORS
        + ZERO
        + "setp.lt.u32 %q2, %t, 7; @%q2 bra JOINED;"
        + OPEN
        + "JOINED: ",
        MINE + FILL + FENCE + BARRIER + DESCRIPTORS + ZERO + OPEN,
    ),
    "multiplies_what_was_never_written": (
        "uninitialized",
        MINE + FENCE + BARRIER + DESCRIPTORS + ZERO + OPEN + MULTIPLY + CLOSE + DONE + SUMS,
        MINE + FILL + FENCE + BARRIER + DESCRIPTORS + ZERO + OPEN + MULTIPLY + CLOSE + DONE + SUMS,
    ),
    "box_outside_of_the_allocation": (
        "out-of-bounds",
        INIT + EXPECT.replace("1024", "2048") + BOX + wait(),
        INIT + EXPECT + LOAD + wait(),
    ),
    "more_bytes_than_counted": (
        "deadlock",
        INIT + EXPECT.replace("1024", "2048") + LOAD + wait(),
        INIT + EXPECT + LOAD + wait(),
    ),
    "too_few_registers": ("deadlock", "setmaxnreg.inc.sync.aligned.u32 256;", "setmaxnreg.dec.sync.aligned.u32 40;"),
}


def run(module: str, schedule) -> list:
    source = np.arange(2048, dtype=np.uint32)
    out = np.zeros(256, np.uint32)
    # A box that ends after its tensor's memory does.
    map_ = (
        ptx_emulator.tensor_map(source.ctypes.data, 2, [16, 4096], [64], [16, 32])
        if ", .param .align" in module
        else None
    )
    if map_:
        map_ = ptx_emulator.tensor_map(source[2048 - 64 :].ctypes.data // 64 * 64, 2, [16, 4096], [64], [16, 32])
    ptx_emulator.schedule(*schedule)
    ptx_emulator.clear()
    with ptx_emulator.registered(source, out):
        kernel = ptx_emulator.load(module)["k"]
        try:
            kernel(1, 128, 0, source, out, *([map_] if map_ else []))
        except ptx_emulator.EmulatorError as error:
            assert "deadlock" in str(error)
        return ptx_emulator.findings()


# What else the broken kernels of a rule break.
ALSO = {
    "mbarrier": {"async-pending", "deadlock", "race"},
    "async-race": {"deadlock", "mbarrier", "proxy-fence"},
    "out-of-bounds": {"deadlock"},
}
IN_SOME_ORDERS = {"a_phase_behind", "init_unordered"}


@pytest.mark.parametrize("name", CASES)
def test_broken_and_right(name):
    rule, broken, right = CASES[name]
    head = ".maxntid 128, 1, 1 .minnctapersm 4 " if "setmaxnreg" in broken else ""
    twins = [text(body, arrays=2, maps=int("%p7" in body), head=head) for body in (broken, right)]
    found = {schedule: {f.rule for f in run(twins[0], schedule)} for schedule in SCHEDULES}
    assert set.union(*found.values()) - ALSO.get(rule, set()) == {rule}, found
    assert name in IN_SOME_ORDERS or all(rule in rules for rules in found.values()), found
    for schedule in SCHEDULES:
        assert run(twins[1], schedule) == [], schedule


def test_malformed_tensor_map_is_a_finding():
    ptx_emulator.clear()
    with pytest.raises(ptx_emulator.EmulatorError):
        ptx_emulator.tensor_map(1 << 20, 2, [16, 16], [40], [16, 16])
    (found,) = ptx_emulator.findings()
    assert found.rule == "tensor-map" and "globalStrides[0] is 40, expected a multiple of 16" in found.message
    ptx_emulator.clear()
    ptx_emulator.tensor_map(1 << 20, 2, [16, 16], [48], [16, 16])
    assert ptx_emulator.findings() == []


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_findings_name_both_parties(schedule):
    broken = CASES["reused_while_stored"][1]
    found = next(f for f in run(text(broken, arrays=2), schedule) if f.rule == "async-race")
    assert "a bulk copy of another thread reads" in found.message
    assert "st.shared.u32" in found.text and "cp.async.bulk.global" in found.second.text
    assert found.second.thread == (0, 0, 0)
