"""bench/prefill.py with OpenVINO GenAI as well: `python bench/peers.py MODEL [--json]`.

Makes what it needs under build/, once: an environment of its own (OpenVINO wants other versions than ours), and the
model exported by optimum-intel, in the dtype that its folder has. It multiplies in bf16 (in fp32 where the processor
has no bf16 instructions), with the paged-attention backend (its default; the other was slower at 2,048 tokens on two
AVX-512 bf16 cores). Its key/value cache is 8-bit by default, or in one of the float formats: a trial at the start
decides.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

from prefill import ROOT, Peer, arguments, main  # first: it puts the repository on the path

from bench.engines import die_with  # isort: skip
from rich.console import Console

from pop_ext.checkpoints.files import resolve_folder

# torch first: the packages that need it then keep this build
TORCH = "torch==2.13.0"
PACKAGES = ["openvino==2026.4.1", "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0"]
ENVIRONMENT = ROOT / "build" / "peers-venv"
SETTINGS = [{}, {"KV_CACHE_PRECISION": "bf16"}, {"KV_CACHE_PRECISION": "f32"}]


def run(*command: str) -> None:
    parent = os.getpid()
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=lambda: die_with(parent))
    if result.returncode:
        sys.exit(f"error: {' '.join(command[:4])} failed:\n{result.stderr[-2000:]}")


def make_environment(console: Console) -> Path:
    """The peers' Python."""
    python, done = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".done"
    if not done.exists() or done.read_text().split() != [TORCH, *PACKAGES]:
        console.print(f"making {ENVIRONMENT.relative_to(ROOT)} with {', '.join(PACKAGES)} (some minutes, once)")
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
        pip = (str(python), "-m", "pip", "--quiet", "--disable-pip-version-check")
        run(*pip, "install", TORCH)
        run(*pip, "install", TORCH, *PACKAGES)
        # Comes along for images, built for another torch, and then breaks the import of transformers
        run(*pip, "uninstall", "--yes", "torchvision")
        done.write_text("\n".join([TORCH, *PACKAGES]))
    return python


def export_openvino(folder: Path, python: Path, console: Console) -> Path:
    target = ROOT / "build" / "peers" / f"{folder.resolve().name}-openvino"
    weights = target / "openvino_model.bin"
    source = max(file.stat().st_mtime for file in folder.glob("*.safetensors"))
    if not weights.exists() or weights.stat().st_mtime < source:
        console.print(f"exporting {folder} for OpenVINO to {target.relative_to(ROOT)}")
        exporter = str(python.parent / "optimum-cli")
        run(exporter, "export", "openvino", "--model", str(folder), "--task", "text-generation-with-past", str(target))
    return target


if __name__ == "__main__":
    options = arguments("Prompt and decode speed, with OpenVINO GenAI").parse_args()
    console = Console(stderr=True)
    folder = resolve_folder(options.model)
    python = make_environment(console)
    openvino = Peer("openvino", str(export_openvino(folder, python, console)), SETTINGS, str(python))
    main(options, [*(Peer(engine, options.model) for engine in options.peers), openvino])
