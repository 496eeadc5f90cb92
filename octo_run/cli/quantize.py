"""``octo-run quantize``: write a model with quantised weights."""

import shlex
import sys
from pathlib import Path

import click

from octo_run.cli import completion, console, debug_option, runtime
from octo_run.cli.options import Format, device_option, dtype_option
from octo_run.errors import shown


@click.command("quantize")
@click.argument("model", shell_complete=completion.models)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--weights", default="int4", show_default=True, metavar="FORMAT",
              type=Format("fp8", "int8", "int4", "int4-128"),
              help="fp8, int8, int4 or int4-128.")  # fmt: skip
@device_option
@dtype_option
@debug_option
def command(model: str, out: Path, weights: str, device: str | None, dtype: str | None) -> None:
    """Write MODEL with quantised weights to the new folder OUT.

    MODEL is a folder, ORG/NAME[@REV], imported/NAME or octo-demo. OUT is loaded like any model; it is in the format of
    compressed-tensors, which other programs read, too. The embedding and the output head are not quantised
    (--head int8 packs them when OUT is loaded). Loading MODEL with --weights saves this file, and with int8 and fp8 a
    small product in each layer: the rotation of values is then in the matrices before they are quantised.
    """
    runtime.model_config(model)  # a name that is none is told at once
    from octo_run.engine.quantise import quantise

    tell = None
    if sys.stderr.isatty() and not console.is_quiet():

        def tell(done: int, total: int) -> None:
            click.echo(f"\rwriting: {100 * done / total:.0f} %", err=True, nl=done == total)

    size = quantise(model, out, weights, device=device, dtype=dtype, progress=tell)
    console.notice(f"{shown(str(out))}: {console.human_bytes(size)}, weights {weights}")
    console.notice(f"chat with it: octo-run chat -m {shown(shlex.quote(str(out)))}")
