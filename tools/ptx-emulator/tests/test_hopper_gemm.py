"""A GEMM of TMA and wgmma: right in every order, without a finding; and each of its orders left out is found."""

import pathlib
import time

import numpy as np
import pytest
from tensor_values import bf16

import ptx_emulator

SOURCE = pathlib.Path(__file__).with_name("hopper_gemm.cu")
SHARED = 3 * 2 * 128 * 64 * 2 + 2 * 2 * 64 * 128
BF16 = 9  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
SCHEDULES = [("roundrobin", 0), ("random", 1), ("random", 2), ("adversarial", 1), ("adversarial", 2)]
pytestmark = pytest.mark.usefixtures("hopper")


@pytest.fixture(scope="module")
def ptx(nvcc, tmp_path_factory):
    path = tmp_path_factory.mktemp("hopper") / "gemm.ptx"
    nvcc("-arch=sm_90a", "-std=c++17", "-ptx", "-o", path, SOURCE)
    return path.read_text()


def aligned(values: np.ndarray) -> np.ndarray:
    """A copy on 128 bytes, as device memory is."""
    memory = np.zeros(values.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 128
    result = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    result[...] = values
    return result


def run(text: str, m: int, n: int, k: int, grid: int):
    """The largest error against float64, in the last place of bf16; and the seconds of the launch."""
    rng = np.random.default_rng(m + n + k)
    a, b = (aligned(bf16(rng.standard_normal(shape))) for shape in ((m, k), (n, k)))
    out = aligned(np.zeros((m, n), np.uint16))
    with ptx_emulator.registered(a, b, out):
        tiled = ((a, [64, 128]), (b, [64, 128]), (out, [64, 64]))
        maps = [
            ptx_emulator.tensor_map(x.ctypes.data, BF16, x.shape[::-1], [x.shape[1] * 2], box, swizzle=128)
            for x, box in tiled
        ]
        kernel = ptx_emulator.load(text)["gemm"]
        began = time.perf_counter()
        kernel(grid, 384, SHARED, *maps, m, n, k)
        seconds = time.perf_counter() - began
    wide = [(x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for x in (a, b, out)]
    exact = wide[0] @ wide[1].T
    size = np.abs(wide[0]) @ np.abs(wide[1]).T
    return np.max(np.abs(wide[2] - exact) / (np.abs(exact) + size / 256)) * 256, seconds


@pytest.mark.parametrize(
    "m, n, k, grid", [(128, 128, 64, 1), (256, 384, 320, 4), (200, 136, 72, 2), (512, 512, 512, 16)]
)
def test_gemm(ptx, m, n, k, grid):
    error, seconds = run(ptx, m, n, k, grid)
    print(f"{m} x {n} x {k}: {error:.2f} in bf16's last place, {seconds:.3f} s")
    assert error < 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_checked(ptx, schedule, checked):
    ptx_emulator.schedule(*schedule)
    error, _ = run(ptx, 256, 256, 320, 3)
    assert ptx_emulator.findings() == []
    assert error < 1


# What is taken away, and the rule that this breaks.
MUTATIONS = {
    "no_wait_for_the_tile": ("bra WAIT;", "bra GO; GO:", {"async-race"}),
    "no_wgmma_wait": ("wgmma.wait_group.sync.aligned 0;", "", {"wgmma-registers"}),
    "stage_released_too_early": ("wgmma.wait_group.sync.aligned 1;", "", {"async-race"}),
    "no_wgmma_fence": ("wgmma.fence.sync.aligned;", "", {"wgmma-registers"}),
    "no_proxy_fence": ("fence.proxy.async.shared::cta;", "", {"proxy-fence"}),
    "store_not_waited_for": ("cp.async.bulk.wait_group.read 0;", "", {"async-race"}),
    "bytes_miscounted": (", 32768;", ", 32752;", {"mbarrier", "deadlock"}),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_found(ptx, name, checked):
    old, new, rules = MUTATIONS[name]
    assert old in ptx
    found = set()
    for schedule in SCHEDULES:
        ptx_emulator.schedule(*schedule)
        ptx_emulator.clear()
        try:
            run(ptx.replace(old, new), 256, 256, 320, 1)
        except ptx_emulator.EmulatorError as error:
            assert "deadlock" in str(error)
        found |= {f.rule for f in ptx_emulator.findings()}
    assert found & rules, found


def test_counts(ptx, checked):
    """256 x 256 x 320 in tiles of 128 x 128 x 64: 4 tiles of 5 steps, each of 2 x 4 wgmma and two boxes of 16 KB."""
    ptx_emulator.count()
    try:
        run(ptx, 256, 256, 320, 4)
        (launch,) = ptx_emulator.counts()
    finally:
        ptx_emulator.count(False)
    rows = {
        key: [r for r in launch["instructions"] if key in r["text"]]
        for key in ("wgmma.mma", "shared::cluster.global", "global.shared::cta", "stmatrix")
    }
    assert launch["operations"] == 2 * 256 * 256 * 320
    assert sum(r["issued"] for r in rows["wgmma.mma"]) == 4 * 5 * 2 * 4 * 4
    loads = rows["shared::cluster.global"]
    assert sum(r["bytes"] for r in loads) == 4 * 5 * 2 * 128 * 64 * 2
    assert sum(r["sectors"] for r in loads) == 4 * 5 * 2 * 128 * 64 * 2 // 32
    assert sum(r["bytes"] for r in rows["global.shared::cta"]) == 256 * 256 * 2
    assert sum(r["conflicts"] for r in rows["stmatrix"]) == 0 and sum(r["wavefronts"] for r in rows["stmatrix"]) > 0
    sizes = sorted(a["distinct_read"] for a in launch["allocations"])
    assert sizes == [0, 256 * 320 * 2, 256 * 320 * 2]
