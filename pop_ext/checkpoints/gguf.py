"""GGUF files become checkpoint folders."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

from .config import load_config
from .families import family_of
from .files import CheckpointError, one_line


def convert_gguf(gguf_file: str | Path, output_folder: str | Path) -> Path:
    """Writes the model of a GGUF file as a checkpoint folder (config, tokenizer, bfloat16 safetensors); returns it.

    bfloat16, as GGUF files are made of models published so: what they leave unquantised comes back exactly, the
    rounding of the rest is far below the quantisation's own, and the runner maps the file as it is, without a copy.
    The folder appears whole or not at all. FileNotFoundError, FileExistsError if the folder holds anything,
    ImportError without `accelerate` and `gguf`, CheckpointError if the file is no GGUF or of no supported model.
    """
    gguf_file, output_folder = Path(gguf_file), Path(output_folder)
    if not gguf_file.is_file():
        raise FileNotFoundError(f"{gguf_file}: no such file")
    if output_folder.exists() and (not output_folder.is_dir() or any(output_folder.iterdir())):
        raise FileExistsError(f"{output_folder}: exists already")
    for package in ("accelerate", "gguf"):
        if find_spec(package) is None:
            raise ImportError(f"reading a GGUF file needs the package {package}: pip install {package}")
    with gguf_file.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{gguf_file}: not a GGUF file")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    output_folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_folder.parent, prefix=f".{output_folder.name}-") as temporary:
        folder = Path(temporary) / "checkpoint"
        source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
        try:
            with _read_gguf_once():
                family_of(AutoConfig.from_pretrained(**source).model_type)
                model = AutoModelForCausalLM.from_pretrained(
                    **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
                )
                tokenizer = AutoTokenizer.from_pretrained(**source)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except Exception as error:
            raise CheckpointError(f"{gguf_file}: {one_line(error)}") from error
        load_config(folder)
        for path in folder.iterdir():  # safetensors are written for their owner only
            path.chmod((folder / "config.json").stat().st_mode)
        folder.rename(output_folder)
    return output_folder


@contextmanager
def _read_gguf_once():
    """Within it, transformers parses a GGUF once, not for config, weights and tokenizer each.

    It also builds the table of tensor names once, not for each of hundreds of modules. Halves the time of a conversion.
    """
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    try:
        for name in names:
            setattr(gguf, name, lru_cache(originals[name]))
        yield
    finally:
        for name in names:
            setattr(gguf, name, originals[name])
