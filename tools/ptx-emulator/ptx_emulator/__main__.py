"""`python -m ptx_emulator PROGRAM`: runs a compiled program, and reports."""

import json
import os
import pathlib
import subprocess
import tempfile
from typing import Annotated

import typer

from . import sass
from .library import library_path


def print_library_path(wanted: bool) -> None:
    if wanted:
        print(library_path())
        raise typer.Exit


def main(
    program: Annotated[list[str], typer.Argument(help="A program that nvcc compiled, and its arguments.")],
    annotate: Annotated[bool, typer.Option("--annotate", help="The PTX with counts beside each line.")] = False,
    static: Annotated[bool, typer.Option("--static", help="Facts from ptxas and nvdisasm beside the counts.")] = False,
    check: Annotated[str, typer.Option(help="Check for memory, init, race, barrier (by commas) or all.")] = "",
    path: Annotated[
        bool,
        typer.Option("--library-path", is_eager=True, callback=print_library_path, help="Print LD_LIBRARY_PATH, only."),
    ] = False,
) -> None:
    """Runs a program on the PTX emulator, and prints what was found and counted after its own output."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PTX_EMULATOR_COUNT": "1", "PTX_EMULATOR_REPORT": folder}
        environment |= {"LD_LIBRARY_PATH": str(library_path()), "PTX_EMULATOR_CHECK": check}
        status = subprocess.run(program, env=os.environ | environment).returncode
        files = pathlib.Path(folder)
        if not (files / "report.json").exists():
            raise RuntimeError(f"{program[0]} left no report (exit status {status}): does it use libcudart.so.13?")
        print((files / ("annotated.txt" if annotate else "report.txt")).read_text(), end="")
        seen: dict[tuple, list[dict]] = {}
        for launch in json.loads((files / "report.json").read_text())["launches"] if static else []:
            key = (launch["kernel"], launch["module"], *launch["grid"], *launch["block"], launch["dynamic_shared"])
            seen.setdefault(key, []).append(launch)
        for first, *others in seen.values():
            ptx = (files / f"module{first['module']}.ptx").read_text()
            alike = f" and {len(others)} alike" if others else ""
            print(f"launch {first['launch']}{alike}, {first['kernel']}:")
            print(sass.text(first, ptx, int(os.environ.get("PTX_EMULATOR_SM", "80"))), end="")
        raise typer.Exit(status)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(context_settings={"allow_interspersed_args": False})(main)
    try:
        app()
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"ptx_emulator: {error}") from None
