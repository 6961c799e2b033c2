"""The weights of a checkpoint, as the runner reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .families import MODEL_FAMILIES, ModelSpec
from .tensors import CheckpointTensors, TensorEntry

VISION_MODULES = {"gemma3": ("vision_tower", "multi_modal_projector"), "qwen3_vl": ("visual",)}


@dataclass
class LayerWeights:
    """One layer. Weights and biases are in the dtype asked for; gains are float32, the family's offset added."""

    input_norm: torch.Tensor  # [D]
    qkv: torch.Tensor  # [(Hq + 2 Hkv) E, D]: the rows of Q, then K, then V
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None  # [E]
    k_norm: torch.Tensor | None  # [E]
    output: torch.Tensor  # [D, Hq E]
    output_bias: torch.Tensor | None
    post_attention_norm: torch.Tensor | None  # [D], sandwich norms only
    mlp_norm: torch.Tensor  # [D]
    gate_up: torch.Tensor  # [2 F, D]: the rows of the gate, then of up
    down: torch.Tensor  # [D, F]
    post_mlp_norm: torch.Tensor | None  # [D], sandwich norms only


@dataclass
class ModelWeights:
    """A model. `embedding`, `lm_head`, `output` and `down` may be views of their file: leave that as it is."""

    embedding: torch.Tensor  # [V, D]
    layers: list[LayerWeights]
    final_norm: torch.Tensor  # [D] float32
    lm_head: torch.Tensor  # [V, D]; the embedding itself where the two are tied
    projection: torch.Tensor  # [L - F, 2 Hkv E, D]: the K and V rows of qkv times the input norm's gain
    projection_bias: torch.Tensor | None  # [L, 2 Hkv E]
    first_projection: int = 0  # F: the layer of projection[0]

    def projections_from(self, layer: int) -> torch.Tensor:
        """Those of the layers from `layer` on. The ones before the first that is kept are made, and then kept too."""
        if layer < self.first_projection:
            rows = self.projection.shape[1]
            made = [
                (w.qkv[-rows:].float() * w.input_norm).to(self.projection.dtype)
                for w in self.layers[layer : self.first_projection]
            ]
            self.projection = torch.cat([torch.stack(made), self.projection])
            self.first_projection = layer
        return self.projection[layer - self.first_projection :]


def load_weights(
    folder: str | Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    first_projection: int = 0,
) -> ModelWeights:
    """The weights of a folder in `dtype` on `device`, with the projections of the layers from `first_projection` on.

    Files are mapped, not read: a tensor that is in `dtype` already and is used as it is stays a view of its file, and
    costs no memory of the process. The others are converted straight into their place, so that beside the result
    there is never more than one tensor. Values are taken as they are, NaN included.
    CheckpointError if any tensor is missing, unexpected, of another shape or not floating; nothing is allocated then.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}, expected a floating dtype")
    files = CheckpointTensors(Path(folder), dtype, torch.device(device), spec.vision_type)
    tensors, layer_tensors = tensor_names(spec)
    files.check([tensors, *layer_tensors], others=VISION_MODULES[spec.vision_type] if spec.vision_type else ())
    if spec.tie_word_embeddings:
        files.check_tied(tensors["embedding"], MODEL_FAMILIES[spec.model_type].lm_head)

    kv_rows = spec.num_kv_heads * spec.head_dim
    embedding = files.weight(tensors["embedding"])
    shape = (spec.num_layers, 2 * kv_rows)
    projection = torch.empty(shape[0] - first_projection, shape[1], spec.hidden_size, dtype=dtype, device=device)
    projection_bias = torch.empty(shape, dtype=dtype, device=device) if spec.qkv_bias else None
    layers = []
    for index, names in enumerate(layer_tensors):

        def weight(*keys: str, names=names) -> Any:
            return files.weight(*(names[key] for key in keys)) if keys[0] in names else None

        def gain(key: str, names=names) -> Any:
            return files.gain(names[key], spec.norm_offset) if key in names else None

        layer = LayerWeights(
            input_norm=gain("input_norm"),
            qkv=weight("q", "k", "v"),
            qkv_bias=weight("q_bias", "k_bias", "v_bias"),
            q_norm=gain("q_norm"),
            k_norm=gain("k_norm"),
            output=weight("output"),
            output_bias=weight("output_bias"),
            post_attention_norm=gain("post_attention_norm"),
            mlp_norm=gain("mlp_norm"),
            gate_up=weight("gate", "up"),
            down=weight("down"),
            post_mlp_norm=gain("post_mlp_norm"),
        )
        # The gain is folded into the values as they are stored, in float32, and the product rounded once.
        for rows, key in ((slice(0, kv_rows), "k"), (slice(kv_rows, None), "v")):
            if index < first_projection:
                break
            projection[index - first_projection, rows] = (
                files.read(names[key]).to(device, torch.float32) * layer.input_norm
            )
        if projection_bias is not None:
            assert layer.qkv_bias is not None  # as the spec says, and the names were checked by it
            projection_bias[index] = layer.qkv_bias[-2 * kv_rows :]
        layers.append(layer)
    return ModelWeights(
        embedding=embedding,
        layers=layers,
        final_norm=files.gain(tensors["final_norm"], spec.norm_offset),
        lm_head=embedding if spec.tie_word_embeddings else files.weight(tensors["lm_head"]),
        projection=projection,
        projection_bias=projection_bias,
        first_projection=first_projection,
    )


def load_vision_weights(
    folder: str | Path, spec: ModelSpec, modules: dict[str, torch.nn.Module], dtype: torch.dtype
) -> dict[str, dict[str, torch.Tensor]]:
    """The state of each of the vision modules (named as in VISION_MODULES, on the meta device) in `dtype`.

    CheckpointError as `load_weights`, for the vision tensors.
    """
    files = CheckpointTensors(Path(folder), dtype, torch.device("cpu"), spec.vision_type)
    tables = [
        {key: TensorEntry(f"{name}.{key}", tuple(value.shape)) for key, value in module.state_dict().items()}
        for name, module in modules.items()
    ]
    files.check(tables, others=("model", "lm_head"))
    return {
        name: {key: files.weight(entry) for key, entry in table.items()}
        for name, table in zip(modules, tables, strict=True)
    }


def tensor_names(spec: ModelSpec) -> tuple[dict[str, TensorEntry], list[dict[str, TensorEntry]]]:
    """What the checkpoint of a spec must hold: for the model and for each layer, our key -> name and shape."""
    family = MODEL_FAMILIES[spec.model_type]
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = {
        "input_norm": ("input_layernorm.weight", (hidden,)),
        "q": ("self_attn.q_proj.weight", (q, hidden)),
        "k": ("self_attn.k_proj.weight", (kv, hidden)),
        "v": ("self_attn.v_proj.weight", (kv, hidden)),
        "output": ("self_attn.o_proj.weight", (hidden, q)),
        "mlp_norm": ("post_attention_layernorm.weight", (hidden,)),  # before the MLP, in spite of the name
        "gate": ("mlp.gate_proj.weight", (inner, hidden)),
        "up": ("mlp.up_proj.weight", (inner, hidden)),
        "down": ("mlp.down_proj.weight", (hidden, inner)),
    }
    if spec.qkv_bias:
        for key, rows in (("q", q), ("k", kv), ("v", kv)):
            layer[f"{key}_bias"] = (f"self_attn.{key}_proj.bias", (rows,))
    if spec.output_bias:
        layer["output_bias"] = ("self_attn.o_proj.bias", (hidden,))
    if spec.qk_norm:
        layer["q_norm"] = ("self_attn.q_norm.weight", (spec.head_dim,))
        layer["k_norm"] = ("self_attn.k_norm.weight", (spec.head_dim,))
    if spec.sandwich_norms:
        layer["post_attention_norm"] = ("post_attention_layernorm.weight", (hidden,))
        layer["mlp_norm"] = ("pre_feedforward_layernorm.weight", (hidden,))
        layer["post_mlp_norm"] = ("post_feedforward_layernorm.weight", (hidden,))
    model = {
        "embedding": TensorEntry(f"{family.prefix}embed_tokens.weight", (spec.vocab_size, hidden)),
        "final_norm": TensorEntry(f"{family.prefix}norm.weight", (hidden,)),
    }
    if not spec.tie_word_embeddings:
        model["lm_head"] = TensorEntry(family.lm_head, (spec.vocab_size, hidden))
    return model, [
        {key: TensorEntry(f"{family.prefix}layers.{index}.{name}", shape) for key, (name, shape) in layer.items()}
        for index in range(spec.num_layers)
    ]
