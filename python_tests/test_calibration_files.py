"""Calibration files: whose they are, which depth they recommend, and what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_folder
from windows import random_windows

import pop_ext
from pop_ext.analysis import calibration


def test_fingerprint_is_of_the_weights(tiny_llama, tmp_path_factory):
    first, second = (pop_ext.load(tiny_llama, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert first.fingerprint() == second.fingerprint()
    first.weights.layers[3].down = first.weights.layers[3].down * 1.01
    assert first.fingerprint() != second.fingerprint()


def test_refused_files(tiny_llama, tmp_path_factory, tmp_path):
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
    with pytest.raises(pop_ext.CalibrationError, match="another model"):
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
