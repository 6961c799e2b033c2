# ruff: noqa: E501
"""sm_90a: mbarriers, bulk copies, boxes of tensors."""

import numpy as np
import pytest
from hopper_kernels import FENCE_INIT, copy_tile, kernel, swizzled, text, wait

import ptx_emulator

pytestmark = pytest.mark.usefixtures("hopper")
FIRST = "setp.ne.u32 %q0, %t, 0; "


def test_target_is_for_one_device():
    module = text("")
    ptx_emulator.load(module)
    for target, sm in (("sm_90a", 80), ("sm_80a", 90), ("sm_100a", 90)):
        ptx_emulator.device(sm)
        with pytest.raises(ptx_emulator.EmulatorError, match=f"for {target}"):
            ptx_emulator.load(module.replace("sm_90a", target))
    ptx_emulator.device(90)
    with pytest.raises(ptx_emulator.EmulatorError, match=r"needs \.target sm_90a"):
        ptx_emulator.load(text("wgmma.fence.sync.aligned;").replace("sm_90a", "sm_90"))


@pytest.mark.parametrize(
    "line",
    [
        "mbarrier.arrive.noComplete.shared::cta.b64 %x1, [%bar], 1;",
        "mbarrier.try_wait.parity.gpu.shared::cta.b64 %q1, [%bar], 0;",
        "cp.async.bulk.tensor.2d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%s], [%p0, {%r1, %r1}], [%bar];",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%s], [%p0], 16, [%bar], %h1;",
        "griddepcontrol.later;",
        "setmaxnreg.inc.sync.aligned.u32 100;",
        "wgmma.wait_group.sync.aligned 8;",
        "fence.mbarrier_init.acquire.cluster;",
    ],
)
def test_unknown_qualifiers_name_the_line(line):
    module = text(line.replace("%h1", "%r1"))
    number = next(k for k, row in enumerate(module.split("\n"), 1) if line.split()[0] in row)
    with pytest.raises(ptx_emulator.EmulatorError, match=f"line {number}: "):
        ptx_emulator.load(module)


def test_mbarrier_phases():
    """Three arrivals end a phase; a state and a parity say when; the fourth arrival is of the next phase."""
    out = np.zeros(9, np.uint32)
    test = "mbarrier.test_wait{form}.shared::cta.b64 %q1, [%bar], {with_}; selp.u32 %r1, 1, 0, %q1; st.global.u32 [%p0+{at}], %r1;"
    parity = lambda p, at: test.format(form=".parity", with_=p, at=at)  # noqa: E731
    kernel(
        f"""mbarrier.init.shared::cta.b64 [%bar], 3; {parity(0, 0)} {parity(1, 4)}
        mbarrier.arrive.shared::cta.b64 %x1, [%bar]; mbarrier.arrive.shared::cta.b64 _, [%bar], 1;
        {parity(0, 8)} {test.format(form="", with_="%x1", at=12)}
        mbarrier.pending_count.b64 %r2, %x1; st.global.u32 [%p0+16], %r2;
        mbarrier.arrive.release.cta.shared::cta.b64 _, [%bar]; {parity(0, 20)} {parity(1, 24)} {test.format(form="", with_="%x1", at=28)}
        mbarrier.arrive_drop.shared::cta.b64 _, [%bar]; mbarrier.arrive.shared::cta.b64 _, [%bar], 2;
        mbarrier.arrive.shared::cta.b64 _, [%bar], 2; {parity(0, 32)}
        mbarrier.inval.shared::cta.b64 [%bar];"""
    )(1, 1, 0, out)
    assert out.tolist() == [0, 1, 0, 0, 3, 1, 0, 1, 1]


def test_mbarrier_counts_bytes():
    """A phase lasts until its bytes have come, too; they may come before they are expected."""
    out = np.zeros(3, np.uint32)
    see = "mbarrier.test_wait.parity.shared::cta.b64 %q1, [%bar], 0; selp.u32 %r1, 1, 0, %q1; st.global.u32 [%p0+{}], %r1;"
    kernel(
        f"""mbarrier.init.shared::cta.b64 [%bar], 1; mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%bar], 16; {see.format(0)}
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 48; {see.format(4)}
        mbarrier.complete_tx.shared::cta.b64 [%bar], 32; {see.format(8)}"""
    )(1, 1, 0, out)
    assert out.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "body, message",
    [
        ("mbarrier.arrive.shared::cta.b64 _, [%bar];", "not initialised"),
        ("mbarrier.init.shared::cta.b64 [%bar], 0;", "count"),
        ("mbarrier.init.shared::cta.b64 [%bar], 1; mbarrier.arrive.shared::cta.b64 _, [%bar], 2;", "more arrivals"),
        (
            "mbarrier.init.shared::cta.b64 [%bar], 1; mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%bar], 1048576;",
            "more bytes",
        ),
        ("mbarrier.init.shared::cta.b64 [%bar], 1;" + wait(), "waits for a phase of an mbarrier"),
        ("mbarrier.init.shared::cta.b64 [%bar+4], 1;", "misaligned"),
        ("mapa.shared::cluster.u32 %r1, %bar, 1;", "cluster of one"),
    ],
)
def test_mbarrier_misuse_fails(body, message):
    with pytest.raises(ptx_emulator.EmulatorError, match=message):
        kernel(body, 0)(1, 1, 0)


def test_warps_hand_over_through_mbarriers():
    """A ring of two slots: a producer warp, a consumer warp, 50 steps; only the mbarriers order them."""
    out = np.zeros(50, np.uint32)
    step = """and.b32 %r3, %r1, 1; shl.b32 %r4, %r3, 3; add.u32 %r5, %bar, %r4; add.u32 %r6, %r5, 16;
        shr.u32 %r7, %r1, 1; and.b32 %r7, %r7, 1; shl.b32 %r8, %r3, 2; add.u32 %r8, %r8, %s;"""
    kernel(
        f"""{FIRST} @!%q0 mbarrier.init.shared::cta.b64 [%bar], 32; @!%q0 mbarrier.init.shared::cta.b64 [%bar+8], 32;
        @!%q0 mbarrier.init.shared::cta.b64 [%bar+16], 32; @!%q0 mbarrier.init.shared::cta.b64 [%bar+24], 32; {FENCE_INIT} bar.sync 0;
        mov.u32 %r1, 0; setp.lt.u32 %q2, %t, 32; @!%q2 bra CONSUME;
        PRODUCE: {step} xor.b32 %r9, %r7, 1; {wait("%r6", "%r9")}
        elect.sync %r10|%q3, -1; @%q3 st.shared.u32 [%r8], %r1; mbarrier.arrive.shared::cta.b64 _, [%r5];
        add.u32 %r1, %r1, 1; setp.lt.u32 %q4, %r1, 50; @%q4 bra PRODUCE; ret;
        CONSUME: {step} {wait("%r5", "%r7")}
        ld.shared.u32 %r11, [%r8]; mul.wide.u32 %x1, %r1, 4; add.s64 %x1, %p0, %x1; setp.eq.u32 %q5, %t, 32; @%q5 st.global.u32 [%x1], %r11;
        mbarrier.arrive.shared::cta.b64 _, [%r6]; add.u32 %r1, %r1, 1; setp.lt.u32 %q4, %r1, 50; @%q4 bra CONSUME;"""
    )(1, 64, 0, out)
    assert (out == np.arange(50)).all()


def test_copies_arrive_on_mbarriers():
    data, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    kernel(
        f"""{FIRST} @!%q0 mbarrier.init.shared::cta.b64 [%bar], 32; bar.sync 0; shl.b32 %r1, %t, 2; add.u32 %r2, %s, %r1;
        cvt.u64.u32 %x1, %r1; add.s64 %x2, %p0, %x1; add.s64 %x3, %p1, %x1; cp.async.ca.shared.global [%r2], [%x2], 4;
        cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%bar]; {wait()}
        xor.b32 %r3, %r2, 64; ld.shared.u32 %r4, [%r3]; st.global.u32 [%x3], %r4;""",
        2,
    )(1, 32, 0, data, out)
    assert (out == data ^ 16).all()


def test_register_budget():
    """384 threads have 168 registers each: 40 + 232 + 232 is what three warpgroups can share, 40 + 240 + 240 is not."""
    body = """setp.lt.u32 %q1, %t, 128; @%q1 bra FEWER; setmaxnreg.inc.sync.aligned.u32 {more}; bra DONE;
        FEWER: setmaxnreg.dec.sync.aligned.u32 40; DONE:"""
    kernel(body.format(more=232), 0, head=".maxntid 384, 1, 1 ")(1, 384, 0)
    with pytest.raises(ptx_emulator.EmulatorError, match="waits for registers"):
        kernel(body.format(more=240), 0, head=".maxntid 384, 1, 1 ")(1, 384, 0)
    with pytest.raises(ptx_emulator.EmulatorError, match="the warp has 168"):
        kernel("setmaxnreg.inc.sync.aligned.u32 160;", 0, head=".maxntid 384, 1, 1 ")(1, 384, 0)


def test_programmatic_launch_is_accepted():
    kernel("griddepcontrol.wait; griddepcontrol.launch_dependents;", 0)(1, 32, 0)


def test_plain_bulk_copies():
    data, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    kernel(
        f"""mbarrier.init.shared::cta.b64 [%bar], 1; {FENCE_INIT} mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 256;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s+16], [%p0], 256, [%bar]; {wait()}
        cp.async.bulk.global.shared::cta.bulk_group [%p1+16], [%s+32], 224; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;""",
        2,
    )(1, 1, 0, data, out)
    assert (out[4:60] == data[4:60]).all() and not out[:4].any() and not out[60:].any()
    for size, source in ((8, 0), (16, 8)):
        with pytest.raises(ptx_emulator.EmulatorError, match="not a multiple of 16"):
            kernel(
                f"mbarrier.init.shared::cta.b64 [%bar], 1; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%p0+{source}], {size}, [%bar];"
            )(1, 1, 0, data)


TYPES = {np.uint8: 0, np.uint16: 1, np.uint32: 2, np.int64: 5, np.float16: 6, np.float32: 7, np.float64: 8}
BOXES = [  # sizes, box, coordinates (innermost first), dtype, swizzle
    ([100], [32], [80], np.uint32, 0),
    ([100], [32], [-16], np.float32, 0),
    ([64, 20], [64, 8], [0, 4], np.uint16, 128),
    ([80, 20], [32, 8], [64, 16], np.uint16, 64),
    ([48, 20], [16, 16], [-8, -3], np.uint16, 32),
    ([40, 9, 5], [16, 4, 3], [28, 7, 3], np.uint32, 64),
    ([32, 5, 4, 3], [16, 2, 2, 2], [4, 4, 3, 1], np.float64, 128),
    ([32, 5, 4, 3, 3], [16, 2, 2, 2, 2], [4, -1, 3, 1, 2], np.uint8, 0),
    ([16, 200], [8, 100], [0, 120], np.int64, 64),
]


def rows_of(data: np.ndarray, box, start, steps, fill=0) -> np.ndarray:
    """A box of the tensor (dimensions innermost first), `fill` outside."""
    extents = [-(-b // s) for b, s in zip(box, steps, strict=True)]
    result = np.full(extents[::-1], fill, data.dtype)
    for index in np.ndindex(*extents[::-1]):
        at = [c + k * s for c, k, s in zip(start, index[::-1], steps, strict=True)]
        if all(0 <= a < n for a, n in zip(at, data.shape[::-1], strict=True)):
            result[index] = data[tuple(at[::-1])]
    return result


def padded(sizes, dtype) -> tuple[np.ndarray, list[int]]:
    """A tensor of random values whose rows are longer than their sizes; its strides in bytes."""
    item = np.dtype(dtype).itemsize
    row = -(-sizes[0] * item // 16) * 16 + 32
    whole = np.random.default_rng(1).integers(1, 120, (*sizes[:0:-1], row // item)).astype(dtype)
    return whole[..., : sizes[0]], list(whole.strides[-2::-1])


LOAD = "cp.async.bulk.tensor.{n}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%s], [%p7, {{{c}}}], [%bar], %x9;"
STORE = "cp.async.bulk.tensor.{n}d.global.shared::cta.bulk_group [%p7, {{{c}}}], [%s];"


def start_at(coordinates) -> tuple[str, str]:
    registers = [f"%r{60 + k}" for k in range(len(coordinates))]
    return "".join(f"mov.u32 {r}, {c};" for r, c in zip(registers, coordinates, strict=True)), ", ".join(registers)


def load_box(map_, coordinates, size, arrays=1):
    moves, registers = start_at(coordinates)
    return kernel(
        f"""{FIRST} {moves} mov.u64 %x9, 0x14f0000000000000; @%q0 bra HERE; mbarrier.init.shared::cta.b64 [%bar], 1; {FENCE_INIT}
        prefetch.tensormap [%p7]; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {size};
        {LOAD.format(n=len(coordinates), c=registers)} HERE: bar.sync 0; {wait()} {copy_tile(False, size)}""",
        arrays,
        1,
    )


@pytest.mark.parametrize("fill", [0, 1])
@pytest.mark.parametrize("sizes, box, start, dtype, swizzle", BOXES)
def test_tensor_loads(sizes, box, start, dtype, swizzle, fill):
    if fill and not np.issubdtype(dtype, np.floating):
        fill = 0
    data, strides = padded(sizes, dtype)
    map_ = ptx_emulator.tensor_map(data.ctypes.data, TYPES[dtype], sizes, strides, box, swizzle=swizzle, fill=fill)
    expected = rows_of(data, box, start, [1] * len(box), np.nan if fill else 0)
    out = np.zeros(expected.nbytes, np.uint8)
    load_box(map_, start, expected.nbytes)(1, 128, 0, out, map_)
    plain = out[swizzled(np.arange(expected.nbytes), swizzle)].view(dtype).reshape(expected.shape)
    np.testing.assert_array_equal(plain, expected)


def test_tensor_load_with_steps():
    data, strides = padded([64, 24], np.uint16)
    map_ = ptx_emulator.tensor_map(data.ctypes.data, 1, [64, 24], strides, [32, 12], steps=[2, 3])
    expected = rows_of(data, [32, 12], [3, -2], [2, 3])
    out = np.zeros(expected.nbytes, np.uint8)
    load_box(map_, [3, -2], expected.nbytes)(1, 128, 0, out, map_)
    assert (out.view(np.uint16).reshape(expected.shape) == expected).all()


@pytest.mark.parametrize("sizes, box, start, dtype, swizzle", BOXES)
def test_tensor_stores(sizes, box, start, dtype, swizzle):
    """A box comes to the tensor, its outside goes nowhere, and nothing else changes."""
    data, strides = padded(sizes, dtype)
    whole = data.base if data.base is not None else data
    before = whole.copy()
    values = np.random.default_rng(2).integers(1, 120, box[::-1]).astype(dtype)
    image = np.zeros(values.nbytes, np.uint8)
    image[swizzled(np.arange(values.nbytes), swizzle)] = values.reshape(-1).view(np.uint8)
    map_ = ptx_emulator.tensor_map(data.ctypes.data, TYPES[dtype], sizes, strides, box, swizzle=swizzle)
    moves, registers = start_at(start)
    kernel(
        f"""{FIRST} {moves} {copy_tile(True, image.nbytes)} fence.proxy.async.shared::cta; bar.sync 0; @%q0 ret;
        {STORE.format(n=len(start), c=registers)} cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;""",
        1,
        1,
    )(1, 128, 0, image, map_)
    expected = before.copy()
    view = expected[..., : sizes[0]]
    for index in np.ndindex(*values.shape):
        at = tuple(c + k for c, k in zip(start[::-1], index, strict=True))
        if all(0 <= a < n for a, n in zip(at, view.shape, strict=True)):
            view[at] = values[index]
    assert (whole == expected).all()


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": [0, 20]},
        {"strides": [24]},
        {"strides": [1 << 40]},
        {"box": [300, 4]},
        {"box": [12, 4], "data_type": 0},
        {"box": [64, 4], "swizzle": 64},
        {"steps": [1, 9]},
        {"fill": 1},
        {"address": 8},
        {"sizes": [64] * 6, "strides": [128] * 5, "box": [8] * 6},
    ],
)
def test_malformed_tensor_maps_are_refused(change):
    arguments = {"address": 1 << 20, "data_type": 1, "sizes": [64, 20], "strides": [128], "box": [32, 4]} | change
    with pytest.raises(ptx_emulator.EmulatorError) as error:
        ptx_emulator.tensor_map(**arguments)
    assert error.value.code == 1
    ptx_emulator.tensor_map(
        **(
            arguments
            | {
                "address": 1 << 20,
                "data_type": 1,
                "sizes": [64, 20],
                "strides": [128],
                "box": [32, 4],
                "steps": [1, 1],
                "fill": 0,
            }
        )
    )


def test_wrong_tensor_maps_fail():
    with pytest.raises(ptx_emulator.EmulatorError, match="is no tensor map"):
        load_box(bytes(128), [0, 0], 256)(1, 128, 0, np.zeros(64, np.uint32), bytes(128))
    data, strides = padded([64, 20], np.uint16)
    map_ = ptx_emulator.tensor_map(data.ctypes.data, 1, [64, 20], strides, [32, 4])
    with pytest.raises(ptx_emulator.EmulatorError, match="3 dimensions has a tensor map of 2"):
        load_box(map_, [0, 0, 0], 256)(1, 128, 0, np.zeros(64, np.uint32), map_)
