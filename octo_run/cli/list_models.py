"""``octo-run list``: the models on this machine."""

import time
from typing import TYPE_CHECKING

import click

from octo_run.cli import console, debug_option
from octo_run.errors import OctoError, shown

if TYPE_CHECKING:
    from octo_run.models.config import ModelConfig
    from octo_run.models.hub import ModelEntry


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@debug_option
def command(as_json: bool) -> None:
    """List the models on this machine: size, date, architecture, how their weights are stored.

    A model whose pull was interrupted, or that is damaged, is listed with what to do about it. Models in the cache of
    Hugging Face's tools are listed, too, where octo-run can use them.
    """
    from octo_run.models import hub

    entries = hub.list_models()
    if as_json:
        console.print_json([_facts(entry) for entry in entries])
        return
    header = ["model", "size", "date", "architecture", "weights", "commit", ""]
    console.echo(console.table(header, [_row(entry) for entry in entries]))


def _config(entry: "ModelEntry") -> "tuple[ModelConfig | None, str | None]":
    """The configuration of a whole model, and what is wrong with the model."""
    from octo_run.models.config import load_config

    try:
        return load_config(entry.path) if entry.complete else None, entry.damage
    except OctoError as error:
        return None, f"{str(error).rstrip('.')}; `{entry.command}` repairs it if it is damaged"


def _weights(cfg: "ModelConfig") -> str:
    return cfg.dtype if cfg.quantisation is None else cfg.quantisation.method


def _facts(entry: "ModelEntry") -> dict[str, object]:
    cfg, damage = _config(entry)
    date = None if entry.date is None else time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(entry.date))
    return {
        "model": entry.label,
        "name": entry.name,
        "revision": entry.revision,
        "commit": entry.commit,
        "bytes": entry.bytes,
        "date": date,
        "architecture": None if cfg is None else cfg.architecture,
        "weights": None if cfg is None else _weights(cfg),
        "path": str(entry.path),
        "complete": entry.complete,
        "damage": damage,
        "shared": entry.shared,
    }


def _row(entry: "ModelEntry") -> list[str]:
    cfg, damage = _config(entry)
    return [
        shown(entry.label),
        console.human_bytes(entry.bytes),
        "-" if entry.date is None else time.strftime("%Y-%m-%d", time.localtime(entry.date)),
        "-" if cfg is None else shown(cfg.architecture, 40),
        "-" if cfg is None else shown(_weights(cfg), 40),
        (entry.commit or "-")[:12],
        _remark(entry, damage),
    ]


def _remark(entry: "ModelEntry", damage: str | None) -> str:
    if damage is not None:
        return f"damaged: {shown(damage)}"
    if not entry.complete:
        return f"incomplete: `{shown(entry.command)}` goes on"
    if entry.commit is None:
        return "embedded"
    return "in the cache of Hugging Face's tools" if entry.shared else ""
