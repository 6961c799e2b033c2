"""The build backend that pyproject.toml names: scikit-build-core's hooks, which build CMakeLists.txt.

In an environment of its own, pip also takes the packages of the extra `cuda-build`: CUTLASS, and nvcc where none is on
the PATH. POP_CUDA=0 builds without CUDA.
"""

import os
import shutil
import sys
from pathlib import Path

from scikit_build_core import build as _build
from scikit_build_core._compat import tomllib
from scikit_build_core.build import *  # noqa: F403


def _cuda_requirements() -> list[str]:
    if os.environ.get("POP_CUDA") == "0" or sys.platform != "linux":
        return []
    project = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text())["project"]
    cutlass, *toolkit = project["optional-dependencies"]["cuda-build"]
    return [cutlass] if shutil.which("nvcc") else [cutlass, *toolkit]


def get_requires_for_build_wheel(config_settings=None):
    return [*_build.get_requires_for_build_wheel(config_settings), *_cuda_requirements()]


def get_requires_for_build_editable(config_settings=None):
    return [*_build.get_requires_for_build_editable(config_settings), *_cuda_requirements()]
