"""Rotary embeddings against transformers' own modules, bit for bit."""

import pytest
import torch
import transformers
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from pop_ext.checkpoints.families import ModelSpec
from pop_ext.runtime.rope import RotaryEmbedding

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
PARAMETERS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "llama3": LLAMA3,
    "llama3_short": LLAMA3 | {"original_max_position_embeddings": 64, "rope_theta": 10000.0},
    "yarn": YARN,
    "yarn_scaled": YARN | {"attention_factor": 1.25, "beta_fast": 16, "beta_slow": 2, "truncate": False},
}
POSITIONS = {
    "prompt": torch.arange(1000),
    "one": torch.tensor([77]),
    "none": torch.arange(0),
    "scattered": torch.randint(0, 131072, (333,), generator=torch.Generator().manual_seed(5)),
}


def reference(module, positions: torch.Tensor, *layer_type: str) -> torch.Tensor:
    """cos and sin of a transformers module, [2, T, E/2]: its second half repeats the first."""
    cos, sin = module(torch.empty(0), positions[None], *layer_type)
    half = cos.shape[-1] // 2
    assert torch.equal(cos[..., :half], cos[..., half:])
    return torch.stack([cos[0, :, :half], sin[0, :, :half]])


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
@pytest.mark.parametrize("head_dim", [32, 80, 128])
def test_one_rope(parameters, positions, head_dim):
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=131072,
        rope_parameters=dict(parameters),
    )  # fmt: skip
    cos, sin = RotaryEmbedding(config)(positions)
    assert cos.shape == sin.shape == (1, len(positions), head_dim // 2)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(torch.stack([cos[0], sin[0]]), reference(LlamaRotaryEmbedding(config), positions))


def test_head_size_by_division():
    config = transformers.Qwen2Config(hidden_size=96, num_attention_heads=3, num_key_value_heads=1)
    cos, _ = RotaryEmbedding(config)(torch.arange(9))
    assert torch.equal(cos[0], reference(Qwen3RotaryEmbedding(config), torch.arange(9))[0])


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("factor", [None, 8.0])
def test_rope_per_layer_type(positions, factor):
    full = {"rope_type": "linear", "factor": factor} if factor else {"rope_type": "default"}
    config = transformers.Gemma3TextConfig(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=256, num_hidden_layers=8,
        rope_parameters={
            "full_attention": full | {"rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )  # fmt: skip
    cos, sin = RotaryEmbedding(config)(positions)
    assert cos.shape == (2, len(positions), 128)
    module = Gemma3RotaryEmbedding(config)
    index = ModelSpec.from_config(config).rope_index
    for layer, layer_type in enumerate(config.layer_types):
        ours = torch.stack([cos[index[layer]], sin[index[layer]]])
        assert torch.equal(ours, reference(module, positions, layer_type))
    assert index == (1, 1, 1, 1, 1, 0, 1, 1)


def test_only_the_types_that_layers_have():
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=2, layer_types=["full_attention"] * 2, num_attention_heads=2, num_key_value_heads=1
    )
    assert ModelSpec.from_config(config).rope_index == (0, 0)
    rope = RotaryEmbedding(config)
    assert rope.inv_freq.shape == (1, 128)
    assert rope.inv_freq[0, 1] == 1.0 / 1e6 ** torch.tensor(2 / 256)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic'"),
        ({"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}, "longrope"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_type": "default", "mrope_section": [4, 6, 6]}, "mrope_section"),
        ({"rope_type": "linear", "factor": 0.0}, "factor is 0.0"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor is nan"),
        ({"rope_type": "default", "rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_type": "default", "rope_theta": "10000"}, "rope_theta is '10000', expected a number"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor is missing"),
        (YARN | {"rope_theta": 1.0}, "ZeroDivisionError"),
    ],
)
def test_unsupported(parameters, message):
    config = transformers.LlamaConfig(hidden_size=128, num_attention_heads=4)
    config.rope_parameters = {"rope_theta": 10000.0} | parameters
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(config)
