"""Checks of programs that nvcc compiled: findings with source lines, streams, copies to the host, CUTLASS."""

import json
import pathlib

import pytest

SOURCE = pathlib.Path(__file__).with_name("checks.cu")
LINES = SOURCE.read_text().split("\n")


@pytest.fixture(scope="module")
def check(run_cuda):
    program = run_cuda(SOURCE, "none", flags=("-arch=sm_80", "-lineinfo")).args[0]

    def run(mode, folder, schedule="roundrobin", seed=0):
        report = folder / "report.json"
        environment = {"PTX_EMULATOR_CHECK": "all", "PTX_EMULATOR_REPORT": str(report), "PTX_EMULATOR_QUIET": "1"}
        environment |= {"PTX_EMULATOR_SCHEDULE": schedule, "PTX_EMULATOR_SEED": str(seed)}
        assert run_cuda.execute(program, mode, environment=environment).stdout == "done\n"
        return json.loads(report.read_text())["findings"]

    return run


@pytest.mark.parametrize("mode, rule", [("accumulator", "uninitialized"), ("transpose", "race")])
def test_source_lines(check, tmp_path, mode, rule):
    found = check(mode, tmp_path)
    assert {f["rule"] for f in found} == {rule}
    assert all(f["source"].endswith("checks.cu") and f["allocation"] == "" for f in found)
    (line,) = [k for k, text in enumerate(LINES, 1) if text.endswith("// " + mode)]
    assert line in {f["source_line"] for f in found}


@pytest.mark.parametrize(
    "mode, rule", [("output", "uninitialized-copy"), ("freed", "use-after-free"), ("streams", "race"), ("event", None)]
)
def test_the_runtime_checks(check, tmp_path, mode, rule):
    assert {f["rule"] for f in check(mode, tmp_path)} == ({rule} if rule else set())


def test_races_between_streams_name_both(check, tmp_path):
    (found,) = check("streams", tmp_path)
    lines = {k for k, text in enumerate(LINES, 1) if "void fill(" in text}
    assert {found["source_line"], found["second"]["source_line"]} == lines and "fill" in found["second"]["kernel"]
    for mode, first, second in [
        ("copies_kernel_first", "a fill", "fill"),
        ("copies_kernel_first_both", "a copy", "fill"),
        ("copies", "fill", "a fill"),
        ("copies_both", "a copy", "a fill"),
    ]:
        (found,) = check(mode, tmp_path)
        assert found["rule"] == "race" and found["allocation"], mode
        assert first in found["kernel"] and second in found["second"]["kernel"], mode
        if "kernel_first" in mode:
            assert found["second"]["source_line"] in lines, mode
        assert check(mode + "_event", tmp_path) == [], mode


def test_launches_on_an_unexpected_stream(check, tmp_path):
    (found,) = check("stream", tmp_path)
    assert found["rule"] == "stream" and "fill" in found["kernel"]


@pytest.mark.parametrize("schedule", ["roundrobin", "random", "adversarial"])
def test_right_programs_are_without_a_finding(check, tmp_path, schedule):
    for seed in range(1 if schedule == "roundrobin" else 5):
        assert check("right", tmp_path, schedule, seed) == []
