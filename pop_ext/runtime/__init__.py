"""The runner: prefill, decode and generation."""
