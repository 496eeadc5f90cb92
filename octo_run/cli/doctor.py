"""``octo-run doctor``: is everything here that a chat needs, and if not, what to do."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import click

from octo_run import __version__
from octo_run.cli import EXIT_FAILURE, console, debug_option
from octo_run.errors import OctoError

LEAST_PYTHON = (3, 10)
#: Of a product with a quantised matrix; 4 bits err by about a tenth.
_LARGEST_ERROR = 0.2


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        status: ``ok``, ``note`` (works, with a limit) or ``wrong`` (a chat would fail).
    """

    subject: str
    status: str
    detail: str


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def command(as_json: bool) -> int:
    """Look whether everything a chat needs is here.

    Python, PyTorch, Triton, the GPU, the model cache and the demo model are looked at. Ends with exit code 1 if
    something is wrong.
    """
    findings = examine()
    healthy = all(finding.status != "wrong" for finding in findings)
    if as_json:
        console.print_json({"healthy": healthy, "findings": [asdict(finding) for finding in findings]})
    else:
        console.echo(console.table(["", "", ""], [[f.status, f.subject, f.detail] for f in findings]).lstrip("\n"))
        console.echo("everything needed is here" if healthy else "something is wrong: see above")
    return 0 if healthy else EXIT_FAILURE


def examine() -> list[Finding]:
    """All findings, in the order in which one would look."""
    looks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python, _torch, _cpu_kernels, _triton, _cuda, _weights, _cache, _demo
    )  # fmt: skip
    return [finding for look in looks for finding in look()]


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    if sys.version_info < LEAST_PYTHON:
        yield Finding("python", "wrong", f"{version} is too old: 3.10 or newer is needed")
    else:
        yield Finding("python", "ok", f"{version} at {sys.executable}, octo-run {__version__}, {platform.platform()}")
    yield Finding("processor", "ok", f"{platform.machine()}, {os.cpu_count()} cores")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("torch", "wrong", f"cannot be imported ({error}): reinstall octo-run")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    yield Finding("torch", "ok", f"{torch.__version__} ({build}), {torch.get_num_threads()} CPU threads")


def _triton() -> Iterator[Finding]:
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        yield Finding("triton", "note", "not installed: only the CPU path runs here")
        return
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield Finding("triton", "note", f"{version}, but TRITON_INTERPRET=1 is set: kernels run interpreted")
    else:
        yield Finding("triton", "ok", version)


def _cuda() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError):
        return
    if not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no usable device"
        yield Finding("CUDA device", "note", f"none ({why}): models run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        memory = f"{console.human_bytes(free)} of {console.human_bytes(total)} free"
        yield Finding("CUDA device", "ok", f"cuda:{index} {name}, {memory}")
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CC", "cc"), "gcc", "clang")):
        yield Finding("C compiler", "wrong", "none found, and Triton needs one to build its launchers: install gcc")


def _cpu_kernels() -> Iterator[Finding]:
    """Which instructions the CPU's kernels use, or why PyTorch does their work, slower."""
    try:
        from octo_run.kernels.cpu import library, path_name
    except (ImportError, OSError):
        return
    yield Finding("CPU kernels", "note" if library() is None else "ok", path_name())


def _weights() -> Iterator[Finding]:
    """Quantise a small matrix in every format, on every device, and look at what a product with it gives."""
    try:
        import torch

        from octo_run.kernels.linear import packed_linear
        from octo_run.models.quantisation.schemes import SCHEMES
    except (ImportError, OSError):
        return
    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        x, failed = weight[:1].contiguous(), []
        exact = x @ weight.T
        for name, scheme in SCHEMES.items():
            out = x.new_empty(1, 256)
            try:
                packed_linear(x, scheme(weight), None, out)
                error = float((out - exact).to(torch.float32).norm() / exact.to(torch.float32).norm())
            except Exception as fault:
                failed.append(f"{name} ({type(fault).__name__}: {str(fault)[:80]})")
                continue
            if not error < _LARGEST_ERROR:
                failed.append(f"{name} (wrong by {100 * error:.0f} %)")
        if failed:
            detail = f"quantised ones fail on {device}: {', '.join(failed)}; use --weights bf16"
            yield Finding("weights", "wrong", detail)
        else:
            yield Finding("weights", "ok", f"{', '.join(SCHEMES)} work on {device}")


def _cache() -> Iterator[Finding]:
    from octo_run.models.hub import cache_folder

    try:
        folder = cache_folder()
        nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OctoError as error:
        yield Finding("model cache", "wrong", str(error))
    except OSError as error:
        yield Finding(
            "model cache", "wrong", f"{folder} cannot be written ({error.strerror}): `octo-run pull` would fail"
        )
    else:
        free = console.human_bytes(shutil.disk_usage(nearest).free)
        state = "" if folder.exists() else " (made at the first pull)"
        yield Finding("model cache", "ok", f"{folder}{state}, {free} free")


def _demo() -> Iterator[Finding]:
    from octo_run.cli.options import DEFAULT_MODEL
    from octo_run.models.config import load_config
    from octo_run.models.hub import resolve

    try:
        path = Path(resolve(DEFAULT_MODEL))
        cfg = load_config(path)
    except OctoError as error:
        yield Finding("demo model", "wrong", f"{error} Reinstall octo-run.")
        return
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        yield Finding("demo model", "wrong", f"{path} holds no weights: reinstall octo-run")
        return
    size = console.human_bytes(sum(shard.stat().st_size for shard in shards))
    yield Finding("demo model", "ok", f"{path}, {cfg.architecture}, {size}")
