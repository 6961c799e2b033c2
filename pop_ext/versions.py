"""The versions of transformers that this package is tested with."""

from importlib.metadata import version

from packaging.version import Version

TRANSFORMERS = "5.23", "6"  # from the first to before the second, as pyproject.toml has it


def check_transformers(installed: str | None = None) -> None:
    """Raises ImportError where transformers (`installed`: its version) is outside the tested range; imports it not."""
    installed = version("transformers") if installed is None else installed
    first, end = TRANSFORMERS
    if not Version(first) <= Version(installed) < Version(end):
        raise ImportError(
            f"transformers is {installed}, expected {first} or later and before {end}: "
            f"pip install 'transformers>={first},<{end}'"
        )
