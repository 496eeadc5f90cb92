"""``octo-run import``: make a model of a GGUF file."""

import click

from octo_run.cli import console, debug_option
from octo_run.cli.options import Format
from octo_run.cli.pull import progress_bar
from octo_run.errors import shown


@click.command("import")
@click.argument("file", metavar="FILE", type=click.Path())
@click.argument("name", required=False)
@click.option("--weights", default="bf16", show_default=True, metavar="FORMAT",
              type=Format("bf16", "fp8", "int8", "int4", "int4-128"),
              help="Store the layers' matrices so: bf16 (not quantised), fp8, int8, int4 or int4-128.")  # fmt: skip
@debug_option
def command(file: str, name: str | None, weights: str) -> None:
    """Make a model of a GGUF file.

    FILE is a .gguf file (of a split model the first), a folder with one, or a .whl or .zip that holds one. Its weights
    become bfloat16 (or what --weights says), its metadata the configuration, the tokenizer and the chat template. The
    model is called imported/NAME, by default after the file. FILE is needed no more then.
    """
    from octo_run.models.gguf.importer import import_model

    with progress_bar("reading") as progress:
        entry = import_model(file, name, weights=weights, progress=progress)
    console.notice(f"{entry.label}: {console.human_bytes(entry.bytes)} in {shown(str(entry.path))}")
    console.notice(f"chat with it: octo-run chat -m {entry.label}")
