"""Calibration files: whose they are, which depth they recommend, and what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_folder
from vision_models import TINY_VISION
from windows import random_windows

import pop_ext
from pop_ext.analysis import calibration
from pop_ext.checkpoints.calibration import Calibration
from pop_ext.checkpoints.fingerprint import checkpoint_fingerprint
from pop_ext.integrations.vllm.settings import Settings
from pop_ext.runtime import layers


def test_fingerprint_is_of_the_weights(tiny_llama, tmp_path_factory):
    first, second = (pop_ext.load(tiny_llama, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert first.fingerprint() == second.fingerprint()
    first.weights.layers[3].down = first.weights.layers[3].down * 1.01
    assert first.fingerprint() != second.fingerprint()


def test_fingerprint_of_files(tiny):
    """It is the loaded model's, in either dtype."""
    found = {pop_ext.load(tiny, dtype=dtype).fingerprint() for dtype in (torch.float32, torch.bfloat16)}
    assert found == {checkpoint_fingerprint(tiny)}


@pytest.mark.parametrize("name", TINY_VISION)
def test_fingerprint_of_vision_files(name, tmp_path):
    test_fingerprint_of_files(TINY_VISION[name].make(tmp_path / name, seed=1))


def test_refused_files(tiny_llama, tmp_path_factory, tmp_path, monkeypatch):
    model = pop_ext.load(tiny_llama, dtype=torch.float32)
    result = calibration.calibrate(model, random_windows(4, 50), [2])
    path = tmp_path / "c.safetensors"
    result.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]
    with pytest.raises(pop_ext.CalibrationError, match="prefill_depth is 3 layers, but the calibration was made for 2"):
        pop_ext.load(tiny_llama, prefill_depth=3, calibration=path)
    loaded = pop_ext.load(tiny_llama, prefill_depth=2, calibration=path)
    with pytest.raises(pop_ext.CalibrationError, match="made for 2"):
        loaded.generate([[1, 2, 3]], prefill_depth=0.5, max_new_tokens=1)
    with pytest.raises(pop_ext.CalibrationError, match=r"made for another model: depth 2 has a tensor"):
        pop_ext.load(tiny_folder("mistral_full", tmp_path_factory), calibration=path)
    result.provenance["fingerprint"] = "of another"
    result.save(path)
    with monkeypatch.context() as patch, pytest.raises(pop_ext.CalibrationError, match="another model"):
        patch.setattr(layers, "load_weights", None)  # it is refused before that
        pop_ext.load(tiny_llama, calibration=path)
    data = path.read_bytes()
    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"c\.safetensors"):
            pop_ext.load(tiny_llama, calibration=path)
    with pytest.raises(pop_ext.CalibrationError, match="not a calibration"):
        pop_ext.load(tiny_llama, calibration=tiny_llama / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="no such calibration"):
        pop_ext.load(tiny_llama, calibration=tmp_path / "none")


def test_the_depth_follows_the_file(tiny_llama, tmp_path):
    """What it recommends, else its only depth, in `load` and in vLLM's settings; with several, a message lists them."""
    model, path = pop_ext.load(tiny_llama, dtype=torch.float32), tmp_path / "c.safetensors"
    result = calibration.calibrate(model, random_windows(4, 50), [2, 3])
    for depths, recommended, expected in (([2], None, 2), ([2, 3], 3, 3), ([2, 3], 2, 2), ([2, 3], None, None)):
        tables = ({depth: table[depth] for depth in depths} for table in (result.projections, result.features))
        Calibration(*tables, result.provenance | {"recommended": recommended}).save(path)
        section = {"pop": {"calibration": str(path)}}
        if expected is not None:
            assert pop_ext.load(tiny_llama, calibration=path).resolve_prefill_depth() == expected
            assert Settings.read(section).prefill_depth == expected
            assert pop_ext.load(tiny_llama, calibration=path, prefill_depth=1.0).resolve_prefill_depth() == 6
            continue
        for load in (
            lambda: pop_ext.load(tiny_llama, calibration=path),
            lambda section=section: Settings.read(section),
        ):
            with pytest.raises(
                pop_ext.CalibrationError, match="holds several and recommends none: expected one of 2, 3"
            ):
                load()
    assert Settings.read({"pop": {"calibration": str(path), "prefill_depth": 3}}).prefill_depth == 3
    Calibration(result.projections, result.features, result.provenance | {"recommended": 5}).save(path)
    with pytest.raises(pop_ext.CalibrationError, match="it recommends 5, expected one of its depths"):
        pop_ext.load(tiny_llama, calibration=path)


def test_what_is_no_calibration_is_called_that(tiny_llama, tmp_path):
    (tmp_path / "notes.txt").write_text("These are notes, and no calibration.")
    for path, message in (
        (tmp_path / "notes.txt", "not a calibration file"),
        (tmp_path, "is a folder, expected a calibration file"),
        (tiny_llama / "model.safetensors", "not a calibration of this version"),
    ):
        with pytest.raises(pop_ext.CalibrationError, match=message):
            pop_ext.load(tiny_llama, calibration=path)
