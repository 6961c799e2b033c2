"""POP in transformers' own `generate()`: `attach(model, prefill_depth=20)`. docs/transformers.md says what is refused.

The seam is `GenerationMixin._prefill`, replaced on the instance. While it runs, the decoder layers from P up have
another `forward`: layer P projects the keys and values of all of them from its input and hands only the deep tokens on,
and each layer puts theirs among the projected ones on the way into the cache. All else is the model's own: layers,
hooks, masks, rotary embedding and cache. Decoding runs the model as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints.calibration import Calibration, CalibrationError, default_depth
from ..checkpoints.families import ModelSpec
from ..checkpoints.fingerprint import checkpoint_fingerprint, tensors_fingerprint
from ..runtime.checks import check_count
from ..runtime.prefill_depth import resolve_depth

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
)
ATTENTION = ("sdpa", "eager")  # which take any mask
# What leaves prompts to other methods than `_prefill` -> its name for people.
OTHER_WAYS = {"_get_candidate_generator": "assisted generation", "init_continuous_batching": "continuous batching"}
_prefilling = threading.RLock()  # layers change for a prefill, so there is one at a time


def attach(
    model,
    prefill_depth: int | float | None = None,
    calibration: str | Path | None = None,
    boundary_tokens: int = 1,
    anchor_tokens: int = 1,
):
    """Makes a transformers model's `generate` prefill by POP, until `detach`. Attaching again replaces the settings.

    model: of the architectures in ARCHITECTURES, with sdpa or eager attention; its weights must stay what they are.
    prefill_depth: layers that prompt tokens run through: an int counts them, a float in (0, 1] is their share. By
        default what the calibration recommends, or its only depth. With all layers the model stays as it is.
    calibration: a file of `pop calibrate` for this model and depth; None: the layers' own weights project.
    boundary_tokens, anchor_tokens: how many of a prompt's last, and of a sequence's first, run through all layers.

    Returns the model. Raises TypeError, ValueError or CalibrationError, which name what was wrong; the model is
    unchanged then.
    """
    decoder, spec = _check_model(model)
    check_count("boundary_tokens", boundary_tokens, 1)
    check_count("anchor_tokens", anchor_tokens, 0)
    loaded = None if calibration is None else _load_calibration(calibration, model, decoder, spec)
    if prefill_depth is None:
        if calibration is None:
            raise ValueError("prefill_depth is not given, expected layers or a share of them")
        prefill_depth = default_depth(calibration)
    depth = resolve_depth(prefill_depth, spec.num_layers)
    attached = _Attached(decoder, spec, depth, boundary_tokens, anchor_tokens, loaded)
    if hasattr(model, "_pop"):
        detach(model)
    model._pop = attached
    if depth < spec.num_layers:
        model._prefill = MethodType(_prefill, model)
        for name in OTHER_WAYS:
            setattr(model, name, MethodType(_refusal(name), model))
    return model


def detach(model):
    """Undoes `attach`, and returns the model."""
    if not hasattr(model, "_pop"):
        raise ValueError(f"model is a {type(model).__name__} without POP, expected one given to pop_ext.attach")
    for name in ("_pop", "_prefill", *OTHER_WAYS):
        vars(model).pop(name, None)
    return model


def _check_model(model) -> tuple[Any, ModelSpec]:
    """The decoder and what it computes. ValueError names what POP cannot be attached to."""
    if not any(kind.__name__ in ARCHITECTURES for kind in type(model).__mro__):
        raise ValueError(f"model is a {type(model).__name__}, expected one of {', '.join(ARCHITECTURES)}")
    if not hasattr(type(model), "_prefill"):
        raise ValueError("model: this version of transformers has no GenerationMixin._prefill")
    spec, decoder = ModelSpec.from_config(model.config), model.get_decoder()
    _check_attention(decoder)
    for index, layer in enumerate(decoder.layers):
        for name in ("k_proj", "v_proj"):
            module = getattr(layer.self_attn, name)
            weight: Any = getattr(module, "weight", None)
            if type(module) is not nn.Linear or type(weight.detach()) is not Tensor or not weight.is_floating_point():
                what = type(module if type(module) is not nn.Linear else weight.detach()).__name__
                raise ValueError(
                    f"model: {name} of layer {index} is a {what}, expected a plain Linear: neither quantised, nor with "
                    "an adapter, nor distributed"
                )
    devices = {parameter.device for parameter in decoder.parameters()}
    if len(devices) > 1 or "meta" in {device.type for device in devices}:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model: the decoder is on {names}, expected one device that holds it")
    return decoder, spec


def _check_attention(decoder) -> None:
    if decoder.config._attn_implementation not in ATTENTION:
        raise ValueError(
            f"attn_implementation is {decoder.config._attn_implementation}, expected {' or '.join(ATTENTION)}: a "
            "prompt's deep tokens need a mask of their own"
        )


def _load_calibration(path: str | Path, model, decoder, spec: ModelSpec) -> Calibration:
    """A calibration file, if it was made for these weights."""
    calibration = Calibration.load(path, spec, decoder.layers[0].self_attn.k_proj.weight.dtype)

    def tensor(entry) -> Tensor:
        name = entry.name.removeprefix("model.")
        return decoder.get_parameter(name) if name != entry.name else model.get_output_embeddings().weight

    def weight(*entries) -> Tensor:
        return torch.cat([tensor(entry).detach() for entry in entries])

    expected = calibration.provenance["fingerprint"]
    found = tensors_fingerprint(spec, weight, lambda entry, offset: tensor(entry).detach().float() + offset)
    # Loading in a narrower dtype may round what the fingerprint reads; the files then say what model this is.
    rounded = model.dtype == torch.float16 or (model.dtype == torch.bfloat16 and spec.norm_offset)
    if found != expected and rounded and model.name_or_path:
        with suppress(FileNotFoundError):
            found = checkpoint_fingerprint(model.name_or_path)
    if found != expected:
        raise CalibrationError(f"{path}: the calibration was made for another model: its fingerprint differs")
    return calibration


def _refusal(name: str) -> Callable:
    def refuse(self, *args, **kwargs):
        raise ValueError(
            f"{OTHER_WAYS[name]} does not prefill by POP: call pop_ext.detach(model) first, or generate without it"
        )

    return refuse


def _prefill(self, input_ids: Tensor, generation_config, model_kwargs: dict, **kwargs):
    """`GenerationMixin._prefill` of an attached model. model_kwargs: what generate hands the model."""
    attached, plain = self._pop, type(self)._prefill
    cache = model_kwargs.get("past_key_values")
    if cache is None:
        raise ValueError("use_cache is False, expected True: POP needs a cache")
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(generation_config, name, False):
            raise ValueError(f"{name} is True, expected False: not every layer sees every token of the prompt")
    past = int(cache.get_seq_length())
    if generation_config.is_assistant and past:  # what the main model has accepted, not a prompt
        return plain(self, input_ids, generation_config, model_kwargs, **kwargs)
    _check_attention(self.get_decoder())
    _check_images(self, model_kwargs)
    mask = model_kwargs.get("attention_mask")
    if mask is None:  # generate drops one without padding, and notes its width
        embeds = model_kwargs.get("inputs_embeds")
        tokens = input_ids if embeds is None else embeds
        mask = torch.ones(len(tokens), getattr(generation_config, "_mask_length", tokens.shape[1]), dtype=torch.bool)
    turn = _Turn(attached, cache, past, mask.bool().cpu(), model_kwargs.get("token_type_ids"))
    with _prefilling, attached.truncated(turn), torch.compiler.set_stance("force_eager"):
        return plain(self, input_ids, generation_config, model_kwargs, **kwargs)


def _check_images(model, model_kwargs: dict) -> None:
    """DeepStack adds visual features to the hidden states of all tokens, which layers from P up do not have."""
    least = len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", ()))
    raw = [model_kwargs.get(key) for key in ("pixel_values", "pixel_values_videos")]
    encoded = (model_kwargs.get("mm_encoder_outputs") or {}).values()
    images = any(value is not None for value in (*raw, *encoded))
    if images and model._pop.depth < least:
        raise ValueError(
            f"prefill_depth is {model._pop.depth} layers, expected at least {least} for a prompt with images: "
            f"DeepStack adds visual features to the hidden state after each of the first {least} layers"
        )


class _Attached:
    """The settings of an attached model, and the projections of its layers from P up.

    weight [(L - P) 2 Hkv E, D + rank]: the input norm's gain folded in; bias [(L - P) 2 Hkv E] or None; features
    [rank, D] as in `Calibration`, or None.
    """

    def __init__(self, decoder, spec: ModelSpec, depth: int, boundary: int, anchors: int, calibration):
        self.spec, self.depth, self.boundary, self.anchors = spec, depth, boundary, anchors
        self.layers = list(decoder.layers[depth:])
        self.features = None
        if not self.layers:
            return
        attention = [layer.self_attn for layer in self.layers]
        if calibration is None or depth == spec.num_layers - 1:  # whose input is exact
            gains = [spec.norm_offset + layer.input_layernorm.weight.float() for layer in self.layers]
            weights = [torch.cat([a.k_proj.weight, a.v_proj.weight]) for a in attention]
            folded = [(w.float() * gain).to(w.dtype) for w, gain in zip(weights, gains, strict=True)]
            self.weight = torch.cat(folded).detach()
        else:
            weight, features = calibration.at(depth)
            self.weight = weight.flatten(0, 1)
            self.features = features if len(features) else None
        biases = [linear.bias for a in attention for linear in (a.k_proj, a.v_proj)]
        self.bias = None if biases[0] is None else torch.cat(biases).detach()
        self.to(attention[0].k_proj.weight)

    def to(self, like: Tensor) -> None:
        """Follows the model to a device and dtype."""
        for name in ("weight", "bias", "features"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.to(like))

    @contextmanager
    def truncated(self, turn: _Turn) -> Iterator[None]:
        """The layers from P up run as `turn` has it."""
        with ExitStack() as undo:
            for index, layer in enumerate(self.layers):
                before = vars(layer).get("forward")
                undo.callback(_restore, layer, before)
                layer.forward = turn.forward_of(index, layer.forward)
            yield


def _restore(layer: nn.Module, forward: Callable | None) -> None:
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward


class _Turn:
    """A prompt on its way into a cache: which of its tokens are deep, and in the layers from P up, what it is there.

    mask [B, total] bool, on the host: False for padding, of the cache's tokens and the prompt's. Columns of the
    prompt's tokens are counted from its first.
    """

    def __init__(self, attached: _Attached, cache, past: int, mask: Tensor, token_types: Tensor | None):
        self.attached, self.cache, self.past = attached, cache, past
        self.real = real = mask[:, past:]
        self.done = 0  # columns that earlier chunks ran
        if real.shape[1] == 0:
            raise ValueError(f"attention_mask has {mask.shape[1]} columns, expected more than the cache's {past}")
        if not real[:, -1].all():
            row = int(real[:, -1].int().argmin())
            raise ValueError(f"attention_mask[{row}] ends with padding, expected it on the left (padding_side)")
        anchor = mask.cumsum(1)[:, past:] <= attached.anchors
        if attached.spec.bidirectional_images and token_types is not None:
            anchor = _with_images(anchor & real, token_types[:, -real.shape[1] :].cpu() == 1)
        boundary = real.flip(1).cumsum(1).flip(1) <= attached.boundary
        # With a cache the first token is the last one sampled, as a rule; and features need the token before.
        first = (real.cumsum(1) <= 1) if past or attached.features is not None else torch.zeros(())
        self.deep = real & (anchor | boundary | (first > 0))
        self.before: Tensor | None = None  # [B, rank]: features of the last token of the chunk before

    def forward_of(self, index: int, plain: Callable) -> Callable:
        """The forward of layer P + index."""

        def forward(hidden_states, *args, past_key_values=None, **kwargs):
            if past_key_values is not self.cache:  # another thread's
                return plain(hidden_states, *args, past_key_values=past_key_values, **kwargs)
            return self.layer(index, plain, hidden_states, *args, **kwargs)

        return forward

    def layer(self, index: int, plain: Callable, hidden: Tensor, attention_mask=None, position_embeddings: Any = None,
              position_ids=None, **kwargs) -> Tensor:  # fmt: skip
        """Layer P + index for the deep tokens among hidden [B, T, D]; from layer P + 1 on it holds no others."""
        if index == 0:
            self.begin(hidden, position_embeddings)
        if self.all_deep:
            return plain(hidden, attention_mask=attention_mask, position_embeddings=position_embeddings,
                         position_ids=position_ids, past_key_values=self.cache, **kwargs)  # fmt: skip
        keys, values = self.projected(index, position_embeddings)
        layer = self.attached.depth + index
        if not len(self.rows):  # no deep token in this chunk, whose output nobody reads
            self.cache.update(keys, values, layer)
            return hidden[:, -1:]
        if attention_mask is None:  # plain causal attention
            width, offset = self.cache.get_mask_sizes(self.tokens, layer)
            columns = torch.arange(offset, offset + width, device=hidden.device)
            attention_mask = (columns <= (self.start + self.index)[..., None])[:, None]
        else:
            attention_mask = _rows(attention_mask, self.index, 2)
        return plain(
            _rows(hidden, self.index, 1) if index == 0 else hidden,
            attention_mask=attention_mask,
            position_embeddings=tuple(_rows(table, self.index, 1) for table in position_embeddings),
            position_ids=None if position_ids is None else _rows(position_ids, self.index, 1),
            past_key_values=_Merging(self, keys, values),
            **kwargs,
        )

    def begin(self, hidden: Tensor, position_embeddings) -> None:
        """A chunk, hidden [B, T, D] before layer P: finds its deep tokens and projects the others."""
        self.tokens, self.start = hidden.shape[1], self.past + self.done
        chunk = slice(self.done, self.done + self.tokens)
        self.done += self.tokens
        deep, real = self.deep[:, chunk], self.real[:, chunk]
        if deep.shape[1] != self.tokens:
            raise ValueError(
                f"attention_mask has {self.past + self.real.shape[1]} columns, expected {self.past + self.done}: those "
                "of the cache and of the prompt"
            )
        self.all_deep = bool((deep | ~real).all())
        # Each row's deep columns, on the right; where a row has fewer than others, its last column fills up.
        columns = torch.where(deep, torch.arange(self.tokens), -1).sort(1).values
        index = columns[:, self.tokens - int(deep.sum(1).max()) :]
        self.rows, self.slots = (index >= 0).nonzero(as_tuple=True)
        self.columns = index[self.rows, self.slots].to(hidden.device)
        self.index = index.masked_fill(index < 0, self.tokens - 1).to(hidden.device)
        self.rows, self.slots = self.rows.to(hidden.device), self.slots.to(hidden.device)
        if not self.all_deep or self.attached.features is not None:
            self.project(hidden, real)

    def project(self, hidden: Tensor, real: Tensor) -> None:
        """Stage 2: one multiplication for the keys and values of all layers from P up, before K-norm and RoPE."""
        attached, spec = self.attached, self.attached.spec
        attached.to(hidden)
        x = _normed(hidden, spec.rms_norm_eps)
        if attached.features is not None:
            z = F.linear(x, attached.features)
            before = z.new_zeros(len(z), 1, z.shape[2]) if self.before is None else self.before
            z = torch.cat([before, z], 1)  # column t + 1 is token t's
            last = torch.where(real, torch.arange(1, self.tokens + 1), 0).cummax(1).values  # real token up to each
            previous = F.pad(last[:, :-1], (1, 0)).to(z.device)
            self.before = _rows(z, last[:, -1:].to(z.device), 1)
            x = _normed(torch.cat([x, _rows(z, previous, 1)], 2), spec.rms_norm_eps)  # as they were fitted
        out = F.linear(x, attached.weight, attached.bias)
        self.out = out.unflatten(2, (len(attached.layers), 2, spec.num_kv_heads, spec.head_dim))

    def projected(self, index: int, position_embeddings) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, T, E] of layer P + index as they belong into the cache."""
        keys, values = self.out[:, :, index].unbind(2)
        attention = self.attached.layers[index].self_attn
        if self.attached.spec.qk_norm:
            keys = attention.k_norm(keys)
        cos, sin = (table.unsqueeze(1) for table in position_embeddings)
        keys = keys.transpose(1, 2)
        low, high = keys.chunk(2, -1)
        return keys * cos + torch.cat([-high, low], -1) * sin, values.transpose(1, 2)


class _Merging:
    """A turn's cache as a layer from P up sees it: what it hands in are the deep tokens' keys and values, which take
    their places among the projected ones.
    """

    def __init__(self, turn: _Turn, keys: Tensor, values: Tensor):
        self.turn, self.keys, self.values = turn, keys, values

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        turn = self.turn
        for whole, deep in ((self.keys, keys), (self.values, values)):
            whole[turn.rows, :, turn.columns] = deep[turn.rows, :, turn.slots]
        return turn.cache.update(self.keys, self.values, layer, *args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self.turn.cache, name)


def _normed(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def _rows(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries index [B, d] along `dim` of a tensor [B or 1, ...], for each of the batch."""
    tensor = tensor.expand(len(index), *tensor.shape[1:])
    shape = [len(index)] + [1] * (tensor.ndim - 1)
    shape[dim] = index.shape[1]
    return torch.take_along_dim(tensor, index.view(shape), dim)


def _with_images(anchor: Tensor, image: Tensor) -> Tensor:
    """Anchors [B, T], and where one is of an image (image [B, T]), all of it, as its tokens see one another."""
    starts = image & ~F.pad(image[:, :-1], (1, 0))
    group = torch.where(image, starts.cumsum(1), 0)
    touched = [torch.isin(g, g[a & (g > 0)]) for g, a in zip(group, anchor, strict=True)]
    return anchor | (torch.stack(touched) & image)
