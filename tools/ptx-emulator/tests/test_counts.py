# ruff: noqa: E501
"""Counts against pencil and paper: one instruction of a warp in each access pattern."""

import pytest
import torch

import ptx_emulator

HEADER = ".version 8.5\n.target sm_80\n.address_size 64\n"


def count(body: str, grid=1, block=32) -> dict:
    """Counts one launch of a kernel whose %x0 points to 16 KB of global memory, %s0 to 16 KB of shared; %t: thread."""
    text = (
        HEADER
        + ".visible .entry k(.param .u64 a0) { .shared .align 128 .b8 tile[16384]; .reg .pred %q<9>; .reg .b32 %r<20>, %t, %s<9>; .reg .f32 %f<9>; .reg .b64 %x<20>;\n"
        "ld.param.u64 %x0, [a0]; mov.u32 %t, %tid.x; mov.u32 %s0, tile;\n" + body + "\nret; }"
    )
    memory = torch.zeros(4096 + 8)
    base = memory[(-memory.data_ptr() // 4) % 8 :]  # on a 32-byte sector
    ptx_emulator.clear()
    ptx_emulator.count()
    try:
        with ptx_emulator.registered(memory):
            ptx_emulator.load(text)["k"](grid, block, 0, base)
    finally:
        ptx_emulator.count(False)
    (launch,) = ptx_emulator.counts()
    return launch


def row(launch: dict, opcode: str) -> dict:
    (found,) = [i for i in launch["instructions"] if opcode in i["text"]]
    return found


# Bytes between lanes, offset, type: 32-byte sectors and distinct bytes of a warp's request.
GLOBAL = {
    "stride 1": (4, 0, "u32", 4, 128),
    "stride 2": (8, 0, "u32", 8, 128),
    "stride 32": (128, 0, "u32", 32, 128),
    "broadcast": (0, 0, "u32", 1, 4),
    "bytes": (1, 0, "u8", 1, 32),
    "doubles": (8, 0, "u64", 8, 256),
    "misaligned to the sector": (4, 4, "u32", 5, 128),
    "vectors": (16, 0, "v4.u32", 16, 512),
    "overlapping vectors": (4, 0, "u32", 4, 128),
}


@pytest.mark.parametrize("name", GLOBAL)
def test_global_sectors(name):
    stride, offset, kind, sectors, distinct = GLOBAL[name]
    target = {"u64": "%x5", "v4.u32": "{%r1, %r2, %r3, %r4}"}.get(kind, "%r1")
    launch = count(f"mul.wide.u32 %x1, %t, {stride}; add.s64 %x1, %x1, %x0; ld.global.{kind} {target}, [%x1+{offset}];")
    counted = row(launch, "ld.global")
    assert (counted["requests"], counted["sectors"], counted["bytes"]) == (1, sectors, distinct)
    (allocation,) = launch["allocations"]
    assert (allocation["sectors"], allocation["read_bytes"], allocation["distinct_read"]) == (
        sectors,
        distinct,
        distinct,
    )


# Bytes between lanes, type: groups of lanes, wavefronts.
SHARED = {
    "stride 1": (4, "u32", 1, 1),
    "stride 2": (8, "u32", 1, 2),
    "stride 32": (128, "u32", 1, 32),
    "stride 33": (132, "u32", 1, 1),
    "broadcast": (0, "u32", 1, 1),
    "bytes": (1, "u8", 1, 1),
    "doubles": (8, "u64", 2, 2),
    "doubles, stride 2": (16, "u64", 2, 4),
    "vectors": (16, "v4.u32", 4, 4),
    "vectors, stride 2": (32, "v4.u32", 4, 8),
    "vectors, padded rows": (144, "v4.u32", 4, 4),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_wavefronts(name):
    stride, kind, groups, wavefronts = SHARED[name]
    target = {"u64": "%x5", "v4.u32": "{%r1, %r2, %r3, %r4}"}.get(kind, "%r1")
    counted = row(count(f"mad.lo.u32 %s1, %t, {stride}, %s0; ld.shared.{kind} {target}, [%s1];"), "ld.shared")
    assert (counted["shared_requests"], counted["groups"], counted["wavefronts"]) == (1, groups, wavefronts)
    assert counted["conflicts"] == wavefronts - groups


@pytest.mark.parametrize("pitch, wavefronts", [(16, 1), (64, 4), (80, 1), (128, 8), (144, 1)])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_matrix_rows(pitch, wavefronts, matrices):
    registers = "{" + ", ".join(f"%r{k + 1}" for k in range(matrices)) + "}"
    launch = count(
        f"mad.lo.u32 %s1, %t, {pitch}, %s0; ldmatrix.sync.aligned.m8n8.x{matrices}.shared.b16 {registers}, [%s1];"
    )
    counted = row(launch, "ldmatrix")
    assert (counted["shared_requests"], counted["groups"], counted["wavefronts"]) == (
        1,
        matrices,
        matrices * wavefronts,
    )


def test_asynchronous_copies():
    launch = count(
        "mul.wide.u32 %x1, %t, 16; add.s64 %x1, %x1, %x0; shl.b32 %s1, %t, 4; add.u32 %s1, %s1, %s0; and.b32 %r1, %t, 1; shl.b32 %r1, %r1, 4;"
        "cp.async.cg.shared.global [%s1], [%x1], 16, %r1; cp.async.wait_all;"
    )
    counted = row(launch, "cp.async.cg")
    # Every other lane reads nothing and writes zeros.
    assert (counted["requests"], counted["sectors"], counted["bytes"]) == (1, 16, 256)
    assert (counted["shared_requests"], counted["groups"], counted["wavefronts"]) == (1, 4, 4)


def test_guards_divergence_and_loops():
    launch = count(
        "setp.lt.u32 %q1, %t, 8; @%q1 add.u32 %r1, %t, 1; setp.lt.u32 %q2, %t, 99; @!%q2 mov.u32 %r2, 0; mov.u32 %r3, 0;\n"
        "OUTER: mov.u32 %r4, 0;\n"
        "INNER: add.u32 %r4, %r4, 1; setp.lt.u32 %q3, %r4, 5; @%q3 bra INNER;\n"
        "add.u32 %r3, %r3, 1; setp.lt.u32 %q4, %r3, 3; @%q4 bra OUTER;",
        grid=2,
        block=64,
    )
    guarded = row(launch, "add.u32 %r1, %t, 1")
    assert (guarded["issued"], guarded["off"], guarded["lanes"]) == (4, 2, 16)
    assert (row(launch, "mov.u32 %r2")["issued"], row(launch, "mov.u32 %r2")["off"]) == (4, 4)
    outer, inner = sorted(launch["loops"], key=lambda loop: loop["depth"])
    assert (outer["trips"], inner["trips"]) == (4 * 3, 4 * 3 * 5)
    assert (outer["depth"], inner["depth"]) == (1, 2) and inner["issued"] == 4 * 3 * 5 * 3
    assert launch["classes"]["control"]["issued"] == 4 * (1 + 3 + 15)


def test_tensor_operations_main_loop_and_annotation():
    registers = "{%f1, %f2, %f3, %f4}"
    launch = count(
        "mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1; mov.u32 %r1, 0; mov.u32 %r9, 0;\n"
        f"LOOP: mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {registers}, {{%r1, %r1, %r1, %r1}}, {{%r1, %r1}}, {registers};\n"
        "add.u32 %r9, %r9, 1; setp.lt.u32 %q1, %r9, 10; @%q1 bra LOOP;"
    )
    assert launch["operations"] == 10 * 2 * 16 * 8 * 16
    (loop,) = launch["loops"]
    assert loop["main"] and loop["operations"] == launch["operations"] and loop["classes"]["tensor"]["issued"] == 10
    text = ptx_emulator.report(annotate=True)
    assert "main loop" in text and any(line.split()[0] == "10" and "mma.sync" in line for line in text.splitlines())


def test_counts_do_not_depend_on_the_schedule():
    body = (
        "mul.wide.u32 %x1, %t, 4; add.s64 %x1, %x1, %x0; shl.b32 %s1, %t, 2; add.u32 %s1, %s1, %s0; and.b32 %r1, %t, 5; setp.eq.u32 %q1, %r1, 0; @%q1 bra ODD;"
        "ld.global.u32 %r2, [%x1]; st.shared.u32 [%s1], %r2; bra DONE; ODD: st.shared.u32 [%s1], %t; DONE: bar.sync 0; ld.shared.u32 %r3, [%s1]; red.global.add.u32 [%x0], %r3;"
    )
    results = []
    for schedule in [
        ("roundrobin", 0),
        *(("random", seed) for seed in range(5)),
        *(("adversarial", seed) for seed in range(5)),
    ]:
        ptx_emulator.schedule(*schedule)
        launch = count(body, grid=5, block=96)
        results.append({key: value for key, value in launch.items() if key not in ("launch", "allocations")})
        results[-1]["allocations"] = [{k: v for k, v in a.items() if k != "name"} for a in launch["allocations"]]
    ptx_emulator.schedule()
    assert all(result == results[0] for result in results)
