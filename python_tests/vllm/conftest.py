"""Tests of POP inside vLLM. They run in an environment of their own, which `make vllm-test` makes: vLLM pins other
versions than the rest of this project. Elsewhere they are not collected.
"""

from __future__ import annotations

import importlib.util
import os

# Engines run in this process, and leave the machine's other work alone.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

installed = importlib.util.find_spec("vllm") is not None and importlib.util.find_spec("vllm").origin is not None
collect_ignore_glob = [] if installed else ["test_*.py"]

if installed:
    import pytest
    from engines import calibration_of, tiny_folder
    from helpers import real_model

    @pytest.fixture(scope="session")
    def smollm2():
        return real_model("smollm2-135m")

    @pytest.fixture(scope="session")
    def heads8(tmp_path_factory):
        """A tiny Llama with 8 heads, 4 of keys and values."""
        return tiny_folder("heads8", tmp_path_factory.mktemp("tiny"))

    @pytest.fixture(scope="session")
    def calibrate(tmp_path_factory):
        """(folder, depths) -> a calibration file, made once."""
        files, home = {}, tmp_path_factory.mktemp("calibrations")

        def made(folder, depths):
            key = (folder, tuple(depths))
            if key not in files:
                files[key] = calibration_of(folder, depths, home / f"{len(files)}.safetensors")
            return files[key]

        return made
