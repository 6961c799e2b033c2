"""No test skips silently, in whichever folder it is: see python_tests/skips.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "python_tests"))
pytest_plugins = ["skips"]

# They take most of a minute each and start first, so that no process has one left when the others are through.
LONG = ("test_on_sm_", "test_gpu_rehearsal", "test_hopper_gemm", "test_blocks_run_as_printed")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.name.startswith(LONG))
