"""What POP does not do inside vLLM: whether a config asks for it, and what to say."""

from __future__ import annotations

REFUSALS = (
    (lambda c: c.model_config.runner_type == "pooling", "pooling models read the last hidden state of every token"),
    (lambda c: c.parallel_config.pipeline_parallel_size > 1, "pipeline parallelism is not supported"),
    (lambda c: c.parallel_config.decode_context_parallel_size > 1, "decode context parallelism is not supported"),
    (lambda c: c.parallel_config.prefill_context_parallel_size > 1, "prefill context parallelism is not supported"),
    (lambda c: c.parallel_config.enable_dbo, "dual-batch overlap is not supported"),
    (lambda c: c.speculative_config is not None, "speculative decoding reads hidden states that are not computed"),
    (lambda c: c.lora_config is not None, "LoRA would change keys and values that are projected without it"),
    (lambda c: c.model_config.quantization is not None, "quantised weights are not supported"),
    (lambda c: c.cache_config.cache_dtype != "auto", "a key/value cache of another dtype is not supported"),
    (lambda c: c.model_config.enable_prompt_embeds, "prompt embeddings are not supported"),
    (lambda c: c.scheduler_config.scheduler_cls is not None, "it needs a scheduler class of its own"),
    (
        lambda c: c.kv_transfer_config is not None and "calibration" in c.additional_config["pop"],
        "blocks from elsewhere lack what calibrated projections take of the token before",
    ),
    (lambda c: not getattr(c.model_config.hf_config, "is_causal", True), "bidirectional attention is not supported"),
    (
        lambda c: getattr(c.model_config.hf_config, "dual_chunk_attention_config", None) is not None,
        "dual chunk attention is not supported",
    ),
    (lambda c: c.use_v2_model_runner, "model runner V2 is not supported; set VLLM_USE_V2_MODEL_RUNNER=0"),
)


def refuse(vllm_config) -> None:
    """ValueError if a config asks for something that POP does not do."""
    for asked, why in REFUSALS:
        if asked(vllm_config):
            raise ValueError(f"pop: {why}")
