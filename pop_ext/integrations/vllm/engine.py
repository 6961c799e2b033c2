"""POP in vLLM 0.32: everything that hangs on vLLM's insides.

Nothing of vLLM is replaced. What carries POP, by name:

- A logits processor, which changes no logits: vLLM tells it the prompt length of each row of the batch, and lets it
  refuse a request.
- A subclass of the attention backend for layers from P up, whose metadata is that of the deep tokens alone.
- A subclass of the scheduler, which hashes blocks that hold deep tokens as other blocks.
- The model's decoder in two halves, each compiled by itself; stage 2 runs between them, eagerly.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.attention.backend import AttentionCGSupport, subclass_attention_backend
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, hash_block_tokens
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

from . import ARCHITECTURES
from .projections import Carry, Projections, Shape, calibrated
from .refusals import refuse
from .settings import Settings
from .steps import split

logger = init_logger("vllm.pop")

# Configuration


def configure(settings: Settings, vllm_config: VllmConfig) -> None:
    """Makes a config one of POP. ValueError if it asks for something that POP does not do."""
    refuse(vllm_config)
    model_config = vllm_config.model_config
    settings.layers(model_config.hf_config.num_hidden_layers)
    model_config.hf_config.architectures = [f"Pop{model_config.architecture}"]
    model_config.logits_processors = [*(model_config.logits_processors or []), f"{__name__}:PromptLengths"]
    vllm_config.scheduler_config.scheduler_cls = f"{__name__}.scheduler"
    if vllm_config.device_config.device_type != "cpu":
        logger.warning("POP: no CUDA graphs; this integration has been run on CPUs only")
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE


# Requests


class PromptLengths(LogitsProcessor):
    """The prompt length of each row of a worker's batch. Logits stay as they are."""

    engines: ClassVar = weakref.WeakValueDictionary()  # id of an engine's config -> its PromptLengths

    @classmethod
    def validate_params(cls, sampling_params) -> None:
        if sampling_params.prompt_logprobs is not None:
            raise VLLMValidationError(
                "prompt_logprobs is set, but POP does not run prompt tokens through all layers",
                parameter="prompt_logprobs",
            )

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self.rows: dict[int, int] = {}
        self.engines[id(vllm_config)] = self

    def update_state(self, batch_update) -> None:
        process_dict_updates(self.rows, batch_update, lambda params, prompt, output: len(prompt))

    def of(self, count: int) -> list[int]:
        """Of the first `count` rows. A row of a warm-up has none: 0, as if all its tokens were generated."""
        return [self.rows.get(row, 0) for row in range(count)]

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True


class _PopScheduler:
    """What POP adds to a scheduler of vLLM: other blocks have other hashes.

    The same tokens have other keys and values in the middle of a prompt than at its end or where they were generated.
    A block's hash therefore says from where on its tokens are deep, and the first block's says the settings.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pop = Settings.read(self.vllm_config.additional_config)
        self.pop_identity = self.pop.identity(self.vllm_config.model_config.hf_config.num_hidden_layers)
        self.pop_hash = get_hash_fn_by_name(self.cache_config.prefix_caching_hash_algo)

    def add_request(self, request) -> None:
        if request._block_hasher is not None:
            request._block_hasher = self.pop_block_hashes
            request.block_hashes.clear()
            request.update_block_hashes()
        super().add_request(request)

    def pop_block_hashes(self, request) -> list:
        """The hashes of a request's full blocks that have none yet."""
        size, hashes, media = self.hash_block_size, [], 0
        start = len(request.block_hashes) * size
        previous = request.block_hashes[-1] if request.block_hashes else None
        deep = request.num_prompt_tokens - self.pop.boundary_tokens
        while (end := start + size) <= request.num_tokens:
            keys, media = generate_block_hash_extra_keys(request, start, end, media)
            keys = keys or ()
            if start == 0:
                keys += (("pop", self.pop_identity),)
            if deep < end and not self.pop.reuse_generated:
                keys += (("pop_deep", max(deep - start, 0)),)
            previous = hash_block_tokens(self.pop_hash, previous, request.all_token_ids[start:end], keys or None)
            hashes.append(previous)
            start = end
        return hashes


class PopScheduler(_PopScheduler, Scheduler):
    pass


class PopAsyncScheduler(_PopScheduler, AsyncScheduler):
    pass


def scheduler(**kwargs) -> Scheduler:
    """What `scheduler_cls` names: whether scheduling is asynchronous is decided after that is set."""
    asynchronous = kwargs["vllm_config"].scheduler_config.async_scheduling
    return (PopAsyncScheduler if asynchronous else PopScheduler)(**kwargs)


# Attention


@dataclass
class Step:
    """A step's tokens, seen from the layers from P up of one group of the key/value cache. Rows are the step's."""

    starts: Tensor  # [requests] int64: each request's first row
    firsts: Tensor  # [requests] int64: its position
    tables: Tensor  # [requests, blocks] int32
    slots: Tensor  # [T] int64
    block_size: int
    decoding: bool  # all tokens are generated ones
    deep: Tensor | None = None  # rows, int64; None where all are deep
    shallow: Tensor | None = None


@functools.lru_cache
def deep_backend(backend: type, anchors: int, boundary: int) -> type:
    """An attention backend whose queries are a step's deep tokens, and whose metadata has the `Step` as `pop`."""

    class DeepBuilder(backend.get_builder_cls()):
        @classmethod
        def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
            return AttentionCGSupport.NEVER  # a step has as many deep tokens as it has

        def build(self, common_prefix_len, common_attn_metadata, fast_build=False, **kwargs):
            common, count = common_attn_metadata, common_attn_metadata.num_reqs
            rows = common.query_start_loc_cpu[: count + 1].long()
            ends = common.seq_lens_cpu_upper_bound[:count].long()
            prompts = torch.tensor(PromptLengths.engines[id(self.vllm_config)].of(count))
            firsts, device = ends - rows.diff(), common.slot_mapping.device
            step = Step(
                rows[:-1].to(device),
                firsts.to(device),
                common.block_table_tensor[:count],
                common.slot_mapping[: int(rows[-1])],
                self.kv_cache_spec.block_size,
                bool((firsts >= prompts).all()),
            )
            runs = split(rows.numpy(), ends.numpy(), prompts.numpy(), anchors, boundary)
            if runs is not None:
                step.deep, step.shallow = (torch.from_numpy(rows).to(device) for rows in (runs.deep, runs.shallow))
                if len(runs.request):
                    common, common_prefix_len = _deep_only(common, runs, step.deep), 0
            metadata = super().build(common_prefix_len, common, fast_build, **kwargs)
            metadata.pop = step
            return metadata

    return subclass_attention_backend("Deep", backend, DeepBuilder)


def _deep_only(common, runs, deep: Tensor):
    """The metadata of the deep runs, each as a request of its own whose context ends with it."""
    device = deep.device
    query_starts, ends = torch.from_numpy(runs.query_starts), torch.from_numpy(runs.end).int()
    return common.replace(
        query_start_loc=query_starts.to(device),
        query_start_loc_cpu=query_starts,
        seq_lens=ends.to(device),
        seq_lens_cpu_upper_bound=ends,
        num_reqs=len(runs.request),
        num_actual_tokens=len(deep),
        max_query_len=int(runs.lengths.max()),
        max_seq_len=int(runs.end.max()),
        block_table_tensor=common.block_table_tensor[torch.from_numpy(runs.request).to(device)],
        slot_mapping=common.slot_mapping[deep],
        positions=None if common.positions is None else common.positions[deep],
        is_prefilling=None,
        req_idx=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


# The model

DIMS = {name: 0 for name in ("input_ids", "positions", "inputs_embeds", "hidden_states", "residual")}


@support_torch_compile(dynamic_arg_dims={name: DIMS[name] for name in ("input_ids", "positions", "inputs_embeds")})
class Lower(nn.Module):
    """The embedding and the layers that every token runs through."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", model: nn.Module, depth: int):
        super().__init__()
        self.model, self.depth = [model], depth  # in a list: its weights are registered where they were

    def forward(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None):
        model, residual = self.model[0], None
        hidden_states = inputs_embeds if inputs_embeds is not None else model.embed_input_ids(input_ids)
        for layer in model.layers[: self.depth]:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states, residual


@support_torch_compile(dynamic_arg_dims={name: DIMS[name] for name in ("positions", "hidden_states", "residual")})
class Upper(nn.Module):
    """The layers that deep tokens alone run through, and the final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", model: nn.Module, depth: int):
        super().__init__()
        self.model, self.depth = [model], depth

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor):
        model = self.model[0]
        for layer in model.layers[self.depth :]:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return model.norm(hidden_states, residual)[0]


class PopModel:
    """Mixed into a causal language model of vLLM: prompt tokens run through the first P layers of `self.model`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.settings = Settings.read(vllm_config.additional_config)
        self.pop_config = vllm_config.model_config
        layers = self.model.layers
        self.depth = min(self.settings.layers(len(layers)), len(layers) - 1)  # exact: the last layer's input suffices
        self.calibrated = self.settings.calibration is not None and self.depth < len(layers) - 1
        self.skipped = layers[self.depth :]
        anchors = max(self.settings.anchor_tokens, int(self.calibrated))  # the first token has none before it
        for layer in self.skipped:
            attention = layer.self_attn.attn
            attention.attn_backend = deep_backend(attention.attn_backend, anchors, self.settings.boundary_tokens)
        halves = dict(vllm_config=vllm_config, model=self.model, depth=self.depth)
        with set_model_tag("pop_lower"):
            self.lower = Lower(prefix=f"{prefix}.lower", **halves)
        with set_model_tag("pop_upper"):
            self.upper = Upper(prefix=f"{prefix}.upper", **halves)
        self.carry = None

    def load_weights(self, weights):
        loaded = super().load_weights(weights)
        self.projections = self.make_projections()
        if get_tensor_model_parallel_rank() == 0:
            rank = self.projections.rank
            how = f"of {self.settings.calibration}, rank {rank}" if self.calibrated else "of the layers' own weights"
            deep = f"{self.settings.anchor_tokens} anchor and {self.settings.boundary_tokens} boundary tokens"
            layers = f"{self.depth} of {len(self.model.layers)} layers"
            logger.info("POP: prompts run through %s, %s through all; projections %s", layers, deep, how)
        return loaded

    def make_projections(self) -> Projections:
        """From the weights as they were loaded: a device may pack them afterwards."""
        first = self.skipped[0].self_attn
        size, dtype = first.q_size, first.qkv_proj.weight.dtype
        features = None
        if self.calibrated:
            shape = Shape(len(self.model.layers), self.config.hidden_size, first.total_num_kv_heads, first.head_dim)
            start = (
                get_tensor_model_parallel_rank() * first.total_num_kv_heads // get_tensor_model_parallel_world_size()
            )
            heads = slice(start, start + first.num_kv_heads)
            weight, features = calibrated(
                self.settings.calibration, self.pop_config.model, self.depth, shape, heads, dtype
            )
        else:
            own = [
                layer.self_attn.qkv_proj.weight[size:].float() * _gain(layer.input_layernorm) for layer in self.skipped
            ]
            weight = torch.stack([rows.to(dtype) for rows in own])
        biases = [layer.self_attn.qkv_proj.bias for layer in self.skipped]
        k_norms = [getattr(layer.self_attn, "k_norm", None) for layer in self.skipped]
        ropes = [layer.self_attn.rotary_emb for layer in self.skipped]
        self.ropes = list({id(rope): rope for rope in ropes}.values())
        rope_index = [self.ropes.index(rope) for rope in ropes]
        return Projections(
            weight=weight,
            bias=None if biases[0] is None else torch.stack([bias[size:] for bias in biases]),
            k_norm=None if k_norms[0] is None else torch.stack([_gain(norm) for norm in k_norms]),
            rope_index=torch.tensor(rope_index, dtype=torch.int32, device=weight.device),
            eps=self.config.rms_norm_eps,
            head_dim=first.head_dim,
            features=features,
        )

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **_):
        hidden, residual = self.lower(input_ids, positions, inputs_embeds)
        context = get_forward_context()
        if not context.attn_metadata:  # a warm-up
            return self.upper(positions, hidden, residual)
        steps = [context.attn_metadata[layer.self_attn.attn.layer_name].pop for layer in self.skipped]
        inputs = hidden + residual if steps[0].deep is not None or self.projections.rank else None
        if self.projections.rank and not (steps[0].decoding and not self.settings.reuse_generated):
            inputs = self.with_features(inputs, steps)
        deep, shallow = steps[0].deep, steps[0].shallow
        if deep is None:
            return self.upper(positions, hidden, residual)
        self.project(inputs[shallow], positions[shallow], [step.slots[shallow] for step in steps])
        output = torch.zeros_like(hidden)  # a chunk's last token is sampled from and thrown away if it is shallow
        if len(deep):
            for layer, step in zip(self.skipped, steps, strict=True):
                context.slot_mapping[layer.self_attn.attn.layer_name] = step.slots[deep]
            output[deep] = self.upper(positions[deep], hidden[deep], residual[deep])
        return output

    def project(self, inputs: Tensor, positions: Tensor, slots: list[Tensor]) -> None:
        """Keys and values of the skipped layers, into the cache in whatever form the backend keeps it."""
        halves = [rope.cos_sin_cache[positions].float().chunk(2, -1) for rope in self.ropes]
        cos, sin = (torch.stack(tables) for tables in zip(*halves, strict=True))
        keys, values = self.projections.project(inputs, cos, sin)
        for layer, key, value, where in zip(self.skipped, keys, values, slots, strict=True):
            attention = layer.self_attn.attn
            attention.impl.do_kv_cache_update(attention, key, value, attention.kv_cache, where)

    def with_features(self, hidden: Tensor, steps: list[Step]) -> Tensor:
        """[T, D + rank]: each token's normed hidden state, and the features of the token before it."""
        # Blocks of a sliding window are freed once they are behind it, so those of a full layer, if there is one.
        windows = [layer.self_attn.attn.sliding_window for layer in self.skipped]
        index = windows.index(None) if None in windows else 0
        step, attention = steps[index], self.skipped[index].self_attn.attn
        if self.carry is None:
            cache = attention.kv_cache
            block = 2 * step.block_size * attention.num_kv_heads * attention.head_size
            self.carry = Carry(cache.numel() // block, self.projections.rank, hidden.dtype, hidden.device)
        tokens = len(step.slots)
        x, features = self.projections.normed(hidden[:tokens])
        previous = self.carry.previous(features, step.starts, step.firsts, step.tables, step.slots, step.block_size)
        return torch.cat([x, previous], 1)


def _gain(norm: nn.Module) -> Tensor:
    """A norm's gain in float32. Gemma's checkpoints store it less one."""
    return norm.weight.float() + (1.0 if type(norm).__name__.startswith("Gemma") else 0.0)


def __getattr__(name: str):
    """`PopLlamaForCausalLM` and the like, made of vLLM's classes when a worker loads one."""
    architecture = name.removeprefix("Pop")
    if name == architecture or architecture not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"vllm.model_executor.models.{ARCHITECTURES[architecture]}")
    return type(name, (PopModel, getattr(module, architecture)), {"__module__": __name__})
