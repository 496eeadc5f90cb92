"""``octo-run doctor``: is everything here that a chat needs, and if not, what to do."""

import importlib.util
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import click

from octo_run import __version__
from octo_run.cli import EXIT_FAILURE, console, debug_option
from octo_run.cli.options import offline_option
from octo_run.errors import OctoError, shown

LEAST_PYTHON = (3, 10)
#: Of a product with a quantised matrix; 4 bits err by about a tenth.
_LARGEST_ERROR = 0.2
#: Seconds that the Hub has for an answer.
_HUB_SECONDS = 8.0
#: Parts that need not be installed: what they are for, and where they come from.
_PARTS = {
    "llguidance": ("--json-schema, --regex and --grammar are refused", "grammar"),
    "matplotlib": ("--plot is refused", "plots"),
}
#: Where other programs keep GGUF files, below the home folder.
_GGUF_FOLDERS = {
    "llama.cpp": (".cache/llama.cpp",),
    "LM Studio": (".lmstudio/models", ".cache/lm-studio/models"),
    "Jan": ("jan/models", ".local/share/Jan/data/llamacpp/models"),
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        status: ``ok``, ``note`` (works, with a limit) or ``wrong`` (a chat would fail).
        instead: What is done in place of what is missing.
    """

    subject: str
    status: str
    detail: str
    instead: str = ""


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@offline_option
@debug_option
def command(as_json: bool, offline: bool) -> int:
    """Look whether everything a chat needs is here.

    Python, PyTorch and the devices are looked at; a kernel is compiled and checked on each, memory bandwidth is
    measured, the Hub is asked, and the embedded model answers. For what is missing it says what happens instead. The
    caches of other programs are looked through for models. Ends with exit code 1 if something is wrong.
    """
    findings = []
    for finding in examine(offline):
        findings.append(finding)
        if not as_json:
            console.echo(_line(finding))
    healthy = all(finding.status != "wrong" for finding in findings)
    if as_json:
        console.print_json({"healthy": healthy, "findings": [asdict(finding) for finding in findings]})
    else:
        console.echo("everything needed is here" if healthy else "something is wrong: see above")
    return 0 if healthy else EXIT_FAILURE


def _line(finding: Finding) -> str:
    instead = f"; instead: {finding.instead}" if finding.instead else ""
    return f"{finding.status:5}  {finding.subject:13}  {finding.detail}{instead}"


def examine(offline: bool = False) -> Iterator[Finding]:
    """All findings, in the order in which one would look. A look that fails is a finding, too; the others go on."""
    # A chat does without what is only noted.
    looks: tuple[tuple[str, str, Callable[[], Iterator[Finding]]], ...] = (
        ("python", "wrong", _python),
        ("torch", "wrong", _torch),
        ("CPU kernels", "wrong", _cpu_kernels),
        ("triton", "note", _triton),
        ("CUDA device", "wrong", _cuda),
        ("weights", "wrong", _weights),
        ("memory", "note", _bandwidth),
        ("parts", "note", _parts),
        ("model cache", "wrong", _cache),
        ("Hub", "note", lambda: _hub(offline)),
        ("Hugging Face", "note", _hugging_face),
        *((program, "note", partial(_gguf_files, program)) for program in _GGUF_FOLDERS),
        ("Ollama", "note", _ollama),
        ("demo model", "wrong", _demo),
        ("answer", "wrong", _answer),
    )
    for subject, status, look in looks:
        try:
            yield from look()
        except Exception as error:
            yield Finding(subject, status, f"cannot be looked at ({_reason(error)})")


def _reason(error: Exception) -> str:
    if isinstance(error, OctoError):
        return str(error).rstrip(".")
    if isinstance(error, OSError) and error.strerror:
        named = "" if error.filename is None else f"{error.filename}: "
        return shown(named + error.strerror, 200)
    return shown(f"{type(error).__name__}: {error}", 200)


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
        yield Finding("triton", "note", "not installed", "only the CPU path runs here")
        return
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield Finding("triton", "note", f"{version}, but TRITON_INTERPRET=1 is set", "kernels run interpreted")
    else:
        yield Finding("triton", "ok", version)


def _cuda() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError):
        return
    if not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no usable device"
        yield Finding("CUDA device", "note", f"none ({why})", "models run on the CPU")
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
    begun = time.perf_counter()
    compiled = library() is not None
    seconds = f", there after {time.perf_counter() - begun:.1f} s" if compiled else ""
    instead = "" if compiled else "PyTorch does the same, slower"
    yield Finding("CPU kernels", "ok" if compiled else "note", path_name() + seconds, instead)


def _weights() -> Iterator[Finding]:
    """Quantise a small matrix in every format, on every device, and look at what a product with it gives: on a GPU this
    compiles a kernel."""
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
            yield Finding("weights", "ok", f"products with {', '.join(SCHEMES)} are right on {device}")


def _bandwidth() -> Iterator[Finding]:
    """What each device's memory copies: how fast answers can be written follows from that."""
    try:
        import torch

        from octo_run.engine.benchmark import copy_bandwidth
    except (ImportError, OSError):
        return
    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        try:
            rate = copy_bandwidth(torch.device(device))
        except (RuntimeError, MemoryError) as error:
            yield Finding("memory", "note", f"{device}: not measured ({shown(str(error), 80)})")
            continue
        yield Finding("memory", "ok", f"{device} copies {rate * 1e-9:,.1f} GB/s (read and written)")


def _parts() -> Iterator[Finding]:
    for name, (without, extra) in _PARTS.items():
        if importlib.util.find_spec(name) is None:
            yield Finding(name, "note", f'not installed (`pip install "octo-run[{extra}]"`)', without)
        else:
            yield Finding(name, "ok", metadata.version(name))


def _hub(offline: bool) -> Iterator[Finding]:
    """Whether the Hub answers, and takes the token."""
    from octo_run.models import hub

    unreachable = "models that are on this machine work, `octo-run pull` fails"
    if offline or hub.is_offline():
        why = "--offline is given" if offline else "HF_HUB_OFFLINE is set"
        yield Finding("Hub", "note", f"not asked: {why}", unreachable)
        return
    begun = time.perf_counter()
    try:
        known = hub.try_hub(_HUB_SECONDS)
    except OctoError as error:
        yield Finding("Hub", "note", str(error).rstrip("."), unreachable)
        return
    took = f"{hub.endpoint()} answers after {time.perf_counter() - begun:.1f} s"
    yield Finding("Hub", "ok", f"{took}, {'your token is taken' if known else 'without a token: public models only'}")


def _hugging_face() -> Iterator[Finding]:
    """Models in the cache of Hugging Face's tools."""
    from octo_run.models import cache

    shared = [entry for entry in cache.list_models() if entry.shared and entry.complete]
    if shared:
        size = console.human_bytes(sum(entry.bytes for entry in shared))
        detail = f"{len(shared):,} that octo-run can use, {size}, in {cache.shared_folder()}: `octo-run list`"
        yield Finding("Hugging Face", "ok", detail)


def _gguf_files(program: str) -> Iterator[Finding]:
    """Models of a program that keeps GGUF files."""
    for folder in (Path.home() / place for place in _GGUF_FOLDERS[program]):
        files = [path for path in folder.rglob("*.gguf") if "mmproj" not in path.name] if folder.is_dir() else []
        if files:
            detail = (
                f"{len(files):,} GGUF files in {folder}: `octo-run import {shown(shlex.quote(str(files[0])), 200)}`"
            )
            yield Finding(program, "ok", detail)


def _ollama() -> Iterator[Finding]:
    manifests = Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models") / "manifests"
    names = [path for path in manifests.rglob("*") if path.is_file()] if manifests.is_dir() else []
    if names:
        blobs = manifests.with_name("blobs")
        detail = f"{len(names):,} models; the largest files of {blobs} are GGUF: `octo-run import FILE NAME`"
        yield Finding("Ollama", "ok", detail)


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


def _answer() -> Iterator[Finding]:
    """The main job: the embedded model reads a question and says something."""
    from octo_run.cli.options import DEFAULT_MODEL

    try:
        from octo_run.engine import Engine, SamplingParams, Session
    except (ImportError, OSError) as error:
        yield Finding("answer", "wrong", f"the engine cannot be imported ({shown(str(error), 200)})")
        return
    try:
        # Without conditioning, which would measure the model once and keep the result.
        with Engine.load(DEFAULT_MODEL, conditioning="off", max_context=512) as engine:
            reply = Session(engine).ask("I want to book a table.", SamplingParams(max_tokens=8, temperature=0.0))
            text = "".join(reply)
            rate = console.rate(reply.decoded_tokens, reply.decode_seconds)
            device = str(engine.device)
    except Exception as error:
        yield Finding("answer", "wrong", f"{DEFAULT_MODEL} cannot answer ({shown(str(error), 300)})")
        return
    if not text.strip():
        yield Finding("answer", "wrong", f"{DEFAULT_MODEL} says nothing on {device}")
    else:
        yield Finding("answer", "ok", f"{DEFAULT_MODEL} on {device}: {rate} tokens/s, {shown(repr(text), 60)}")
