"""`python -m pop_ext.cli` is the command `pop`."""

from . import app

app()
