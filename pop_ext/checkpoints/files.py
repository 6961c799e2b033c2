"""A checkpoint folder's files, read with care, and files written whole or not at all.

No file outside of the folder is read, and none that is larger than its limit.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .bounds import truncated_repr

ADAPTER = "adapter_config.json"
LFS_POINTER = b"version https://git-lfs"
SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG_LIMIT = 8 << 20  # bytes; the largest real ones stay below a tenth of these
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


class CheckpointError(ValueError):
    """Something is wrong with a checkpoint's folder or files. The message begins with the path."""


def resolve_folder(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a folder as it is, a hub id (owner/name) downloaded at `revision`.

    FileNotFoundError says what was tried where it is neither; CheckpointError for a file.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        hint = "; convert it with `pop convert`" if path.suffix == ".gguf" else ""
        raise CheckpointError(f"{path}: a file, expected a checkpoint's folder{hint}")
    name = str(path_or_hub_id)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise FileNotFoundError(f"{name}: no such folder, and not a hub id (owner/name) either")
    from huggingface_hub import snapshot_download

    try:
        # Weights in another layout (original/, consolidated.safetensors) would double the download.
        others = ["*/*", "consolidated*"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=others))
    except Exception as error:
        raise FileNotFoundError(f"{name}: no such folder, and not to be had from the hub: {error}") from error


def regular_file(folder: Path, name: str) -> Path:
    """A regular file of the folder. Its links may lead anywhere, as people arrange models so; those of a download in
    the hub's cache only to that model's blobs.
    """
    path = folder / name
    try:
        home, real = folder.resolve(), path.resolve()
        # models--owner--name/snapshots/revision, and blobs
        home = home.parent.parent if home.parent.name == "snapshots" else None
        if real.is_file() and (home is None or real.is_relative_to(home)):
            return path
        problem = "leads out of the folder" if real.is_file() else "is not a file" if path.exists() else "no such file"
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that no file can have
        problem = one_line(error)
    if folder.is_dir() and (folder / ADAPTER).is_file():
        problem += f"; the folder is a LoRA adapter ({ADAPTER}), not a model: merge it into its base model first"
    elif name == SINGLE_FILE and folder.is_dir():
        shards = sorted(file.name for file in folder.glob("*-of-*.safetensors"))
        if shards:
            problem += f"; there are shards ({some_of(shards)}), but not {INDEX}, which says what they hold"
        elif named := sorted(file.name for file in folder.glob("*.safetensors")):
            problem += f"; the weights are expected under that name, not {some_of(named)}"
        others = sorted(file.name for file in folder.iterdir() if file.suffix in (*PICKLES, ".gguf"))
        if any(name.endswith(PICKLES) for name in others):
            problem += f"; pickled files ({some_of(others)}) are never read: save the model as safetensors"
        elif others:
            problem += f"; {some_of(others)} can be converted with `pop convert`"
    raise CheckpointError(f"{path}: {problem}")


def read_json(path: Path, limit: int) -> dict:
    try:
        with path.open("rb") as file:
            text = file.read(limit + 1)
        if len(text) > limit:
            raise CheckpointError(f"{path}: more than {limit >> 20} MiB")
        check_no_pointer(path, text)
        text = text.removeprefix(codecs.BOM_UTF8)
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a {type(value).__name__}, expected a table")
    return value


def check_no_pointer(path: Path, start: bytes) -> None:
    """CheckpointError if a file begins as Git LFS's stand-in for one that was not fetched."""
    if start.startswith(LFS_POINTER):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")


def read_utf8(path: Path) -> str:
    """A text file without the byte-order mark that some editors begin it with; ValueError names file and line where it
    is not UTF-8.
    """
    return decoded_utf8(path.read_bytes(), str(path))


def decoded_utf8(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        hint = " (it looks like UTF-16)" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
        raise ValueError(f"{name}, line {line}, is not UTF-8 text{hint}: {error.reason}") from None


def some_of(names: Iterable[str]) -> str:
    """The first names of many, for an error message."""
    names = sorted(names)
    return ", ".join(truncated_repr(name) for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )


def one_line(error: Exception | str) -> str:
    """Another library's message about untrusted data, fit for a terminal."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in text)


def atomic_write(path: Path, write) -> None:
    """`write(temporary path)`, which then takes the place of `path`; nothing is left behind if it fails."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
