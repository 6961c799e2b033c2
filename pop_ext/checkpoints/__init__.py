"""Checkpoints: a Hugging Face folder (config.json, safetensors) becomes a config and the weights that the runner reads.

Nothing in a folder is trusted. Its JSON is checked before transformers builds anything from it, the headers of its
safetensors files before anything is allocated, and nothing is ever unpickled. Whatever is wrong with a folder is a
CheckpointError that names the file.
"""
