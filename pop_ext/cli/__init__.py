"""The `pop` command. torch and transformers are imported where a command needs them, so that `pop --help` is quick."""

from . import bench, calibrate, chat, convert, evaluate, generate, importance, info  # noqa: F401  registers the commands
from .common import app

__all__ = ["app"]
