"""The `pop` command. torch and transformers are imported where a command needs them, so that `pop --help` is quick."""

from . import calibrate, convert, evaluate, generate, importance, info, tune  # noqa: F401  registers the commands
from .common import app

__all__ = ["app"]
