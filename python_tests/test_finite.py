"""NaN and infinity in a model: an error that names the layer, never empty text."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import pop_ext
from pop_ext.analysis.calibration import calibrate
from pop_ext.runtime.finite import NonFiniteError

BAD = {
    "model.layers.2.mlp.up_proj.weight": "layer 2, gate_up",
    "model.layers.4.self_attn.v_proj.weight": "layer 4, qkv",
    "model.norm.weight": "the final norm",
}


def spoilt(tiny_llama, tmp_path, name: str, value: float):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", BAD)
def test_weights(tiny_llama, tmp_path, name, value):
    folder = spoilt(tiny_llama, tmp_path, name, value)
    with pytest.raises(NonFiniteError, match=rf"^the weights have NaN or infinity in {BAD[name]}$"):
        pop_ext.load(folder, check_weights=True)
    model = pop_ext.load(folder, prefill_depth=5, dtype=torch.float32)
    message = f"the logits are not finite: the weights have NaN or infinity in {BAD[name]}"
    free = len(model.cache.free_blocks) if hasattr(model.cache, "free_blocks") else None
    for settings in ({}, {"do_sample": True, "seed": 1}, {"repetition_penalty": 1.3}):
        with pytest.raises(NonFiniteError, match=message):
            model.generate([[1, 2, 3], [4, 5]], max_new_tokens=3, **settings)
    with pytest.raises(NonFiniteError, match=message):
        model.logits([[1, 2, 3]], [[4, 5]])
    if name != "model.norm.weight":  # which no projection sees
        windows = torch.randint(200, (4, 12)).tolist()
        with pytest.raises(NonFiniteError, match=rf"hidden states are not finite: .*{BAD[name]}"):
            calibrate(model, windows, [2])
    assert free is None or len(model.cache.free_blocks) == free


def test_overflow(tiny_llama, tmp_path):
    """Finite weights whose product is not: the layer is named."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors")
    model = pop_ext.load(folder, dtype=torch.float32, check_weights=True)
    with pytest.raises(NonFiniteError, match=r"the weights are finite, but what layer 3 makes of them is not"):
        model.generate([1, 2, 3], max_new_tokens=3)


def test_sound(tiny_llama):
    model = pop_ext.load(tiny_llama, check_weights=True)
    assert len(model.generate([1, 2, 3], max_new_tokens=3).tokens[0]) == 3
