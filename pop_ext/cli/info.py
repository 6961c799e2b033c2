"""`pop info`."""

import json
from typing import Annotated

import typer
from rich.table import Table

from .common import app, one_line_errors, output_console


@app.command()
@one_line_errors()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how the native library was built."""
    import pop_ext

    build = pop_ext.build_info()
    if as_json:
        print(json.dumps(build, default=str))
        return
    table = Table(box=None, show_header=False)
    for name, value in build.items():
        table.add_row(name.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
    output_console().print(table)
