# ruff: noqa: E501
"""Small kernels for the checks: each breaks one rule, and has a twin that is right."""

import itertools

import torch

import ptx_emulator

HEADER = ".version 8.5\n.target sm_80\n.address_size 64\n"
SCHEDULES = [("roundrobin", 0), *itertools.product(("random", "adversarial"), range(20))]

# A kernel of a case reads p0 (256 floats 0, 1, ...), writes p1 (256 floats, never written) and uses p2 (64 zeros);
# %t is the thread, %b the block, %x1 and %x2 the thread's elements of p0 and p1, %s1 of `tile` (the wide one %x3).
PRELUDE = """
.reg .pred %q<20>; .reg .b16 %h<20>; .reg .b32 %r<60>; .reg .f32 %f<40>; .reg .b64 %x<40>; .reg .b32 %t, %b, %s<9>; .reg .b64 %p<4>;
ld.param.u64 %p0, [a0]; ld.param.u64 %p1, [a1]; ld.param.u64 %p2, [a2]; mov.u32 %t, %tid.x; mov.u32 %b, %ctaid.x;
mul.wide.u32 %x0, %t, 4; add.s64 %x1, %p0, %x0; add.s64 %x2, %p1, %x0; shl.b32 %s1, %t, 2; mov.u32 %s0, tile; add.u32 %s1, %s1, %s0;
"""


class Case:
    """`broken` has the mark //! on the line of the finding, `right` is without a finding."""

    def __init__(self, name, rule, broken, right, grid=1, block=64, tile=1024, outside="", inside="", dynamic=0):
        self.name, self.rule, self.grid, self.block, self.dynamic = name, rule, grid, block, dynamic
        head = (
            HEADER + outside + ".visible .entry k(.param .u64 a0, .param .u64 a1, .param .u64 a2) {\n"
            f".shared .align 16 .b8 tile[{tile}];\n" + inside + PRELUDE
        )
        self.broken, self.right = (head + body + "\nret;\n}" for body in (broken, right))
        self.line = next((k for k, text in enumerate(self.broken.split("\n"), 1) if "//!" in text), 0)

    def run(self, text, schedule=("roundrobin", 0)):
        source = torch.arange(256, dtype=torch.float32)
        out, flags = ptx_emulator.empty(256, torch.float32, name="out"), torch.zeros(64, dtype=torch.int32)
        ptx_emulator.schedule(*schedule)
        ptx_emulator.clear()
        with ptx_emulator.registered(source, flags):
            ptx_emulator.load(text)["k"](self.grid, self.block, self.dynamic, source, out, flags)
            return ptx_emulator.findings(), out.clone(), out


STORE = "st.global.f32 [%x2], %f1;"
COPY = "cp.async.ca.shared.global [%s1], [%x1], 4;"
COMMIT, WAIT, BARRIER = "cp.async.commit_group;", "cp.async.wait_group 0;", "bar.sync 0;"
# The next warp's element of the tile.
OTHER = "xor.b32 %r1, %t, 32; shl.b32 %r1, %r1, 2; add.u32 %r1, %r1, %s0;"
READ_OTHER = "ld.shared.f32 %f1, [%r1];"
MARK = " //!\n"
SPIN = "LOOP: {load}; setp.eq.u32 %q1, %r2, 0; @%q1 bra LOOP;"


def flag_protocol(publish, load, after, data="st.global.f32 [%p1], %f1;"):
    """Block 0 writes p1[0] and raises the flag; block 1 waits for it and copies p1[0] to p1[1]."""
    return f"""
    setp.ne.u32 %q0, %b, 0; @%q0 bra READER; mov.f32 %f1, 0f3F800000; {data} {publish}
    bra DONE;
    READER: LOOP: {load} setp.eq.u32 %q1, %r2, 0; @%q1 bra LOOP; {after}
    ld.global.f32 %f2, [%p1];{MARK}
    st.global.f32 [%p1+4], %f2;
    DONE:"""


PIPELINE = """
cp.async.ca.shared.global [%s1], [%x1], 4; cp.async.commit_group;
cp.async.ca.shared.global [%s1+256], [%x1+256], 4; cp.async.commit_group;
"""

# A third of the block's warps at a time: %q0 the first, %q1 the second warp.
WARPS = "setp.lt.u32 %q0, %t, 32; setp.lt.u32 %q1, %t, 64; "
PRODUCE = "st.shared.u32 [%s1], %t; "
ROW = "shl.b32 %r1, %t, 4; add.u32 %r1, %r1, %s0; "
OTHER_ROW = "xor.b32 %r2, %t, 32; shl.b32 %r2, %r2, 4; add.u32 %r2, %r2, %s0; "
MATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r3, %r4, %r5, %r6}, [%r2];"
COPY_ROW = (
    "and.b32 %r9, %t, 15; mul.wide.u32 %x3, %r9, 16; add.s64 %x3, %p0, %x3; cp.async.cg.shared.global [%r1], [%x3], 16;"
    + COMMIT
)
MATRIX_STORE = "st.global.u32 [%x2], %r3;"
ACCUMULATOR = "mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1; "
MULTIPLY = (
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2}, {%r1}, {%f1, %f2, %f3, %f4};"
)
RING = "".join(
    f"cp.async.ca.shared.global [%s1+{256 * k}], [%x1+{256 * k}], 4; cp.async.commit_group;" for k in range(3)
)
HEAP = (
    ".extern .func (.param .b64 p) malloc (.param .b64 n);\n.extern .func free (.param .b64 p);\n"
    ".extern .func (.param .b32 n) vprintf (.param .b64 f, .param .b64 v);\n.global .align 1 .b8 text[4] = {37, 100, 32, 0};\n"
)
MALLOC = "{ .param .b64 n; .param .b64 p; st.param.b64 [n], 64; call.uni (p), malloc, (n); ld.param.b64 %x4, [p]; } st.global.u32 [%x4], 1;"
FREE = "{ .param .b64 p; st.param.b64 [p], %x4; call.uni free, (p); }"
PRINT = "mov.u64 %x5, text; cvta.global.u64 %x5, %x5; mov.u64 %x6, stack; cvta.local.u64 %x6, %x6;\n{ .param .b64 f; .param .b64 v; .param .b32 n; st.param.b64 [f], %x5; st.param.b64 [v], %x6; call.uni (n), vprintf, (f, v); ld.param.b32 %r3, [n]; }"


def lock(before, after):
    return f"""
    LOOP: atom.global.cas.b32 %r1, [%p2], 0, 1; setp.ne.u32 %q1, %r1, 0; @%q1 bra LOOP; {after}
    ld.global.u32 %r2, [%p2+64]; add.u32 %r2, %r2, 1;{MARK} st.global.u32 [%p2+64], %r2;
    {before} atom.global.exch.b32 %r1, [%p2], 0;"""


def buffers(step):
    return f"""
    mov.u32 %r2, 0; mov.u32 %r3, 0;
    LOOP: add.u32 %r4, %s1, %r2; xor.b32 %r5, %r4, 128;
    st.shared.u32 [%r4], %r3;{MARK} bar.sync 0; ld.shared.u32 %r6, [%r5];
    xor.b32 %r2, %r2, {step}; add.u32 %r3, %r3, 1; setp.lt.u32 %q1, %r3, 4; @%q1 bra LOOP; st.global.u32 [%x2], %r6;"""


def shared_flag(fence, more=""):
    return f"""
    {WARPS} mov.u32 %r2, tile; add.u32 %r2, %r2, 512; setp.eq.u32 %q3, %t, 32; @%q0 bra WRITER;
    @!%q3 bra DONE; LOOP: ld.volatile.shared.u32 %r3, [%r2]; setp.ne.u32 %q4, %r3, 7; @%q4 bra LOOP; {fence}
    ld.shared.u32 %r4, [%r2+4];{MARK} st.global.u32 [%p1], %r4; bra DONE;
    WRITER: setp.eq.u32 %q3, %t, 0; @!%q3 bra DONE; st.shared.u32 [%r2+4], 5; {fence} st.volatile.shared.u32 [%r2], 7;
    DONE:"""


def many_readers(counted):
    """Blocks 0 to 5 read p0[0], and the first `counted` say so; block 6 waits for these, and writes."""
    return f"""
    setp.eq.u32 %q0, %b, 6; @%q0 bra LAST; ld.global.u32 %r1, [%p0]; setp.ge.u32 %q1, %b, {counted}; @%q1 bra DONE;
    red.release.gpu.global.add.u32 [%p2], 1; bra DONE;
    LAST: ld.acquire.gpu.global.u32 %r2, [%p2]; setp.ne.u32 %q2, %r2, {counted}; @%q2 bra LAST;
    st.global.u32 [%p0], %r2;{MARK} DONE:"""


def last_arrival(fence):
    return f"""
    {PRODUCE} {fence} mov.u32 %r2, tile; atom.shared.add.u32 %r3, [%r2+512], 1; setp.ne.u32 %q1, %r3, 63; @%q1 bra DONE; {fence}
    xor.b32 %r4, %s1, 128; ld.shared.u32 %r5, [%r4];{MARK} st.global.u32 [%p1], %r5; DONE:"""


def zeroed(body):
    """The counter at tile+512 starts at zero."""
    return "setp.eq.u32 %q5, %t, 0; @%q5 st.shared.u32 [tile+512], 0; bar.sync 0;" + body


def check_broken(case: Case) -> None:
    """The broken kernel is found as its rule at its line, whatever the schedule."""
    seeds = SCHEDULES[:1] if case.rule == "deadlock" else [SCHEDULES[0], SCHEDULES[1], SCHEDULES[2], SCHEDULES[21]]
    for schedule in seeds:
        try:
            found = case.run(case.broken, schedule)[0]
        except ptx_emulator.EmulatorError:
            found = ptx_emulator.findings()
        # A mismatch may go on to a deadlock.
        others = {"deadlock"} if case.rule == "mismatched-barrier" else set()
        assert {f.rule for f in found} - others == {case.rule}, (schedule, found)
        assert case.line in {line for f in found for line in (f.line, f.second.line if f.second else 0)}, (
            schedule,
            found,
        )
        assert all(f.kernel == "k" and f.text for f in found)


def check_right(case: Case) -> None:
    """The right twin is without a finding in every schedule."""
    for schedule in SCHEDULES:
        found = case.run(case.right, schedule)[0]
        assert not found, (schedule, found)


RULES = {
    "memory": {"out-of-bounds", "misaligned", "use-after-free"},
    "init": {"uninitialized"},
    "race": {"race", "async-race", "async-pending"},
    "barrier": {"divergent-barrier", "divergent-aligned", "warp-mask", "mismatched-barrier", "deadlock"},
}


def check_alone(cases: list[Case], check: str) -> None:
    """One check finds its own rules, and no others."""
    for case in cases:
        # Without the check these fail as on hardware, or break a second rule.
        if case.rule in ("deadlock", "mismatched-barrier") or case.name == "address":
            continue
        if check != "memory" and case.rule in RULES["memory"]:
            continue
        ptx_emulator.checks(check)
        found = case.run(case.broken)[0]
        assert {f.rule for f in found} == ({case.rule} if case.rule in RULES[check] else set()), case.name
