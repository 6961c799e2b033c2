"""The `pop` command. torch and transformers are imported where a command needs them, so that `pop --help` is quick."""

from . import (  # noqa: F401  registers the commands
    bench,
    calibrate,
    chat,
    convert,
    evaluate,
    generate,
    importance,
    info,
    plan,
    reproduce,
    tune,
    verify,
)
from .common import app

__all__ = ["app"]
