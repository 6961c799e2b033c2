"""A loaded model, and what one forward pass over its layers is made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .. import ops
from ..checkpoints.calibration import Calibration
from ..checkpoints.config import load_config
from ..checkpoints.families import ModelSpec
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.prefill_plan import PrefillPlan
from ..checkpoints.tokenizer import load_generation_config, load_tokenizer
from ..checkpoints.weights import load_weights
from ..vision.encoder import Vision, vision_bytes
from .checks import check_count, check_plan, check_share
from .device import cache_capacity, check_kernels, resolve_device, weight_bytes
from .forward_batch import ForwardBatch
from .kv_cache import BLOCK_SIZE, KVCache, Sequence
from .prefill_depth import resolve_depth
from .rope import RotaryEmbedding

pop = torch.ops.pop
Partial = dict[int, tuple[bool, bool]]  # layer -> whether attention and MLP run for truncated tokens
P = ParamSpec("P")
R = TypeVar("R")
DEFAULT_MAX_CACHE_TOKENS = 32768  # of the cache, where the model's own context is longer


def in_turn(method: Callable[P, R]) -> Callable[P, R]:
    """A method of a model that runs when no other thread is in one: they share the cache."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        model: Any = args[0]
        with model.cache.lock:
            return method(*args, **kwargs)

    return call


class Layers:
    """A causal language model with its tokenizer and key/value cache, and of a vision-language checkpoint `vision`, its
    vision tower and processing; and the steps of a forward pass, which `PrefillModel` puts in order.

    A variant of the method overrides `project`, which writes the skipped layers' keys and values, or `attention`.
    """

    def __init__(
        self,
        folder: Path,
        prefill_depth,
        boundary_tokens: int,
        anchor_tokens: int,
        dtype: torch.dtype,
        max_cache_tokens: int | None,
        calibration: str | Path | None = None,
        device: str | torch.device = "cpu",
        prefix_cache: bool = False,
        deep_tokens: float = 0.0,
        prefill_plan: str | Path | None = None,
    ):
        if max_cache_tokens is not None:
            check_count("max_cache_tokens", max_cache_tokens, 1)
        self.folder = folder
        self.config = load_config(folder)
        self.spec = ModelSpec.from_config(self.config)
        self.dtype, self.device = dtype, resolve_device(device)
        check_kernels(self.spec, dtype, self.device)
        self.prefill_depth = prefill_depth
        self.boundary_tokens, self.anchor_tokens, self.chunk_tokens = boundary_tokens, anchor_tokens, 2048
        self.deep_tokens, self.prefix_cache = deep_tokens, prefix_cache
        self.prefill_plan = None if prefill_plan is None else PrefillPlan.load(prefill_plan, self.spec)
        self.check_settings()
        self.calibration = None if calibration is None else Calibration.load(calibration, self.spec, dtype)
        depth = self.resolve_prefill_depth()
        if self.calibration is not None:
            self.calibration.check(folder)
        if self.prefill_plan is not None:
            self.prefill_plan.check(folder)
        if self.device.type == "cpu":
            first, capacity = 0, max_cache_tokens or min(self.spec.max_position_embeddings, DEFAULT_MAX_CACHE_TOKENS)
        else:  # projections of layers below the depth asked for take memory that a GPU has better uses for
            ops.load_cuda_kernels(self.device)  # which a capture must not
            first = min(depth, self.spec.num_layers - 1)
            if self.prefill_plan is not None:
                first = min(first, self.prefill_plan.first_projected)
            extra = 0 if self.calibration is None else self.calibration.nbytes
            if self.spec.vision_type:
                extra += vision_bytes(folder, self.config, self.spec, dtype.itemsize)
            needed = weight_bytes(self.spec, dtype.itemsize, first, extra)
            capacity = cache_capacity(self.spec, dtype.itemsize, self.device, needed, BLOCK_SIZE, max_cache_tokens)
        self.max_cache_tokens = capacity
        self.weights = load_weights(folder, self.spec, dtype, self.device, first)
        self.rope = RotaryEmbedding(self.config, self.device)
        self.rope_index = torch.tensor(self.spec.rope_index, dtype=torch.int32, device=self.device)
        self._no_gain = torch.ones(self.spec.hidden_size, device=self.device)
        if self.calibration is not None:
            self.calibration = self.calibration.to(self.device)
        norms: list[Any] = [layer.k_norm for layer in self.weights.layers]
        self.k_norms = torch.stack(norms) if self.spec.qk_norm else None
        self.tokenizer: Any = load_tokenizer(folder)
        self.vision: Any = Vision(folder, self.config, self.spec, dtype, self.device) if self.spec.vision_type else None
        self.generation_config = load_generation_config(folder, self.config)
        self.decode_buffers, self.cuda_graphs = {}, True  # on a GPU: see `decoding`
        self.cache = KVCache(
            self.spec.num_layers, self.spec.num_kv_heads, self.spec.head_dim, capacity, dtype, self.device
        )

    def resolve_prefill_depth(self, prefill_depth=None) -> int:
        """The prefill depth P in layers: of an int itself, of a float the nearest share of all layers; None is the
        model's own, or its plan's.
        """
        layers = self.spec.num_layers
        if prefill_depth is None:
            check_plan(self.prefill_plan, self.spec, self.deep_tokens)
            prefill_depth = self.prefill_depth if self.prefill_plan is None else self.prefill_plan.depth
        depth = resolve_depth(prefill_depth, layers)
        if self.calibration is not None and depth < layers - 1:  # at the last layer's input nothing needs projecting
            self.calibration.at(depth)
        return depth

    def partial_layers(self, prefill_depth=None) -> Partial:
        """The layers below P that truncated tokens do not run through whole, and whether attention and MLP run there:
        the plan's, whose place a prefill depth takes where one is given.
        """
        return {} if self.prefill_plan is None or prefill_depth is not None else self.prefill_plan.partial

    def fingerprint(self) -> str:
        """Identifies the weights, in whatever dtype they were loaded: a SHA-256 over the spec and a sample of every
        tensor.
        """
        weights = self.weights
        tables = [{"embedding": weights.embedding, "final_norm": weights.final_norm, "lm_head": weights.lm_head}]
        return fingerprint(self.spec, tables + [vars(layer) for layer in weights.layers])

    # The steps of a forward pass

    def batch(self, runs: list[tuple[Sequence, int, int]]) -> ForwardBatch:
        return ForwardBatch(runs, self.rope.axes is not None, self.spec.bidirectional_images)

    def rope_tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin of every position that a cached token may have."""
        return self.rope.tables(min(self.max_cache_tokens + BLOCK_SIZE, self.spec.max_position_embeddings))

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [rows, D] after the last layer -> [rows, vocabulary] float32."""
        hidden = pop.rms_norm(hidden, self.weights.final_norm, self.spec.rms_norm_eps)
        return pop.linear(hidden, self.weights.lm_head, out_dtype=torch.float32)

    def features(self, depth: int) -> Tensor | None:
        """What projections at `depth` take of the token before, [rank, D] as in `Calibration`; None: nothing."""
        if self.calibration is None or depth >= self.spec.num_layers - 1:  # whose input is exact
            return None
        features = self.calibration.at(depth)[1]
        return features if len(features) else None

    def project(
        self,
        depth: int,
        hidden: Tensor,
        before: list[Tensor | None],
        batch: ForwardBatch,
        slot_mapping: Tensor,
        previous: Tensor | None,
    ) -> None:
        """Keys and values of the layers from `depth` up, projected from hidden [T, D] and the hidden state [D] before
        each run of tokens (None where its first is deep), to the cache. previous [T] int64: where the token before each
        is among those of `before` and then those of `hidden`.
        """
        weights, features = self.weights, self.features(depth)
        calibration = self.calibration if depth < self.spec.num_layers - 1 else None  # the last layer's input is exact
        if features is not None:
            rows = torch.stack([hidden[0] if row is None else row for row in before])
            x = pop.rms_norm(torch.cat([rows, hidden]), self._no_gain, self.spec.rms_norm_eps)
            hidden = torch.cat([x[len(rows) :], pop.linear(x, features)[previous]], 1)
        projections = weights.projections_from(depth) if calibration is None else calibration.at(depth)[0]
        self.write_kv(slice(depth, None), projections, hidden, batch, slot_mapping)

    def write_kv(self, layers: slice, projections: Tensor, hidden: Tensor, batch: ForwardBatch, slot_mapping: Tensor):
        """Keys and values of some layers from hidden [T, D], which is not normed, to the cache."""
        bias = self.weights.projection_bias
        pop.project_kv(
            hidden,
            projections,
            None if bias is None else bias[layers],
            None if self.k_norms is None else self.k_norms[layers],
            self.spec.rms_norm_eps,
            batch.cos,
            batch.sin,
            self.rope_index[layers],
            slot_mapping,
            self.cache.keys[layers],
            self.cache.values[layers],
        )

    def embed(self, token_ids: Tensor, batch: ForwardBatch) -> Tensor:
        """The hidden states [T, D] before layer 0: embeddings, and for the tokens of images their features."""
        hidden = pop.embedding(token_ids, self.weights.embedding, self.spec.embedding_scale)
        if batch.visual_features is not None:
            hidden[batch.visual_rows] = batch.visual_features[0]
        return hidden

    def add_visual(self, index: int, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """DeepStack (arXiv 2406.04334): visual features added, in place, after layer `index`, if it is of the first."""
        if batch.visual_features is not None and index + 1 < len(batch.visual_features):
            hidden[batch.visual_rows] += batch.visual_features[index + 1]
        return hidden

    def layer(self, index: int, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """hidden [T, D] before layer `index` -> after it; the tokens' keys and values go to the cache."""
        return self.mlp_branch(index, self.attention_branch(index, hidden, batch))

    def partial_layer(
        self,
        index: int,
        runs: tuple[bool, bool],
        hidden: Tensor,
        batch: ForwardBatch,
        slot_mapping: Tensor,
        deep: Tensor,
        deep_batch: ForwardBatch | None,
    ) -> Tensor:
        """`layer`, of which truncated tokens run attention and MLP only if `runs` says so, and the rows `deep`, those
        of `deep_batch` (None without any), run everything. slot_mapping [T]: where truncated tokens' keys and values
        go, which have their own true input whatever runs. Changes `hidden`.
        """
        attention, mlp = runs
        through = None
        if attention:
            hidden = self.attention_branch(index, hidden, batch)
            if deep_batch is not None and not mlp:
                through = self.mlp_branch(index, hidden[deep])
        else:
            own = self.weights.projections_from(index)[:1]
            self.write_kv(slice(index, index + 1), own, hidden, batch, slot_mapping)
            if deep_batch is not None:
                through = self.layer(index, hidden[deep], deep_batch)
        if mlp:
            hidden = self.mlp_branch(index, hidden)
        return hidden if through is None else hidden.index_copy_(0, deep, through)

    def attention_branch(self, index: int, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """hidden [T, D] before layer `index` -> before its MLP; the tokens' keys and values go to the cache."""
        spec, w = self.spec, self.weights.layers[index]
        eps = spec.rms_norm_eps
        cos, sin = batch.angles[spec.rope_index[index]]
        keys, values = self.cache.layers[index]
        x = pop.rms_norm(hidden, w.input_norm, eps)
        query = pop.qkv_project(
            x, w.qkv, w.qkv_bias, w.q_norm, w.k_norm, eps, cos, sin, batch.slot_mapping, keys, values
        )
        x = self.attention(index, query, batch).flatten(1)
        if spec.sandwich_norms:
            return pop.rms_norm(pop.linear(x, w.output, w.output_bias), w.post_attention_norm, eps, hidden)
        return pop.linear(x, w.output, w.output_bias, hidden)

    def mlp_branch(self, index: int, hidden: Tensor) -> Tensor:
        """hidden [T, D] before the MLP of layer `index` -> after the layer."""
        spec, w = self.spec, self.weights.layers[index]
        eps = spec.rms_norm_eps
        x = pop.gated_linear(pop.rms_norm(hidden, w.mlp_norm, eps), w.gate_up, spec.activation)
        if spec.sandwich_norms:
            return pop.rms_norm(pop.linear(x, w.down), w.post_mlp_norm, eps, hidden)
        return pop.linear(x, w.down, None, hidden)

    def attention(self, index: int, query: Tensor, batch: ForwardBatch) -> Tensor:
        """query [T, Hq, E] -> what it attends to in the cache of layer `index`, [T, Hq, E]."""
        return pop.attention(
            query,
            *self.cache.layers[index],
            batch.block_tables,
            batch.cu_seqlens_q,
            batch.seqlens_k,
            batch.max_seqlen_q,
            batch.max_seqlen_k,
            self.spec.attention_scale,
            self.spec.windows[index],
            batch.spans,
        )

    def check_settings(self) -> None:
        """The attributes that may be set at any time."""
        check_count("boundary_tokens", self.boundary_tokens, 0)
        check_count("anchor_tokens", self.anchor_tokens, 0)
        check_count("chunk_tokens", self.chunk_tokens, 1)
        check_share("deep_tokens", self.deep_tokens)
        check_plan(self.prefill_plan, self.spec, self.deep_tokens)
        if self.deep_tokens and self.device.type != "cpu":
            raise ValueError(
                f"deep_tokens is {self.deep_tokens}, expected 0 on {self.device}: only the CPU chooses tokens"
            )
        if self.deep_tokens and not self.boundary_tokens:
            raise ValueError(
                f"deep_tokens is {self.deep_tokens}, expected 0 with boundary_tokens=0: no prompt token is deep"
            )
        if self.deep_tokens and self.prefix_cache:
            raise ValueError(
                f"deep_tokens is {self.deep_tokens}, expected 0 with prefix_cache: which tokens of a shared prefix are "
                "deep depends on what follows it"
            )
