"""Checkpoints: a folder's config and weights, and GGUF conversion."""
