"""Prefill-only pruning inside vLLM: `vllm serve MODEL --additional-config '{"pop": {"prefill_depth": 20}}'`.

`register` is the package's entry point of the group `vllm.general_plugins`, which every process of vLLM calls. Without
a `pop` section in the additional config vLLM stays what it is. docs/vllm.md says what the section may hold.

- `settings`: the section, checked.
- `refusals`: what a config may not ask for.
- `steps`: which tokens of a step run through all layers.
- `projections`: the weights of stage 2, of one tensor-parallel rank, and its operation.
- `engine`: everything that hangs on vLLM's insides; imported by an engine that uses POP only.
"""

from __future__ import annotations

from .settings import Settings

VERSION = "0.32"  # of vLLM
ARCHITECTURES = {  # and the module of vLLM that has each
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
}


def register() -> None:
    """Adds POP's models to vLLM's registry, and for every architecture a config hook that looks for a `pop` section."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(f"Pop{architecture}", f"{__name__}.engine:Pop{architecture}")
    for architecture in ModelRegistry.get_supported_archs():
        MODELS_CONFIG_MAP[architecture] = _hook(architecture, MODELS_CONFIG_MAP.get(architecture))


def _hook(architecture: str, before: type | None) -> type:
    """The config hook of an architecture: vLLM's own, where it has one, then POP's."""

    class Hook:
        @staticmethod
        def verify_and_update_config(vllm_config) -> None:
            if before is not None:
                before.verify_and_update_config(vllm_config)
            settings = Settings.read(vllm_config.additional_config)
            if settings is None:
                return
            _check(architecture)
            from .engine import configure

            configure(settings, vllm_config)

        @staticmethod
        def verify_and_update_model_config(model_config) -> None:
            if before is not None:
                before.verify_and_update_model_config(model_config)

    return Hook


def _check(architecture: str) -> None:
    import vllm

    if vllm.__version__.split("+")[0].rpartition(".")[0] != VERSION:
        raise ValueError(f"pop: vLLM is {vllm.__version__}, expected {VERSION}")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"pop: the architecture is {architecture}, expected one of {', '.join(ARCHITECTURES)}")
