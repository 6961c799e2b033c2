"""`pop convert`."""

from pathlib import Path
from typing import Annotated

import typer

from .common import app, one_line_errors, stderr


@app.command()
@one_line_errors()
def convert(
    gguf: Annotated[Path, typer.Argument(help="GGUF file.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write the checkpoint to.")],
) -> None:
    """Turn a GGUF file into a checkpoint folder.

    Its weights are dequantized; the folder is an ordinary Hugging Face checkpoint.
    """
    if not gguf.is_file():
        raise ValueError(f"{gguf} is not a file: expected a GGUF file")
    with stderr.status(f"converting {gguf.name}"):
        import transformers

        from pop_ext.checkpoints.gguf import convert_gguf

        transformers.utils.logging.disable_progress_bar()
        convert_gguf(gguf, folder)
    stderr.print(f"wrote {folder}", markup=False)
