"""No test skips silently, in whichever folder it is: see python_tests/skips.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "python_tests"))
pytest_plugins = ["skips"]
