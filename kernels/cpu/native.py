"""Compiling, keeping and loading the CPU kernels."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from octo_run.errors import OctoError, quoted, shown
from octo_run.folders import own_folder
from octo_run.unfinished import unfinished

SWITCH = "OCTO_RUN_CPU_KERNELS"
"""``0`` turns the compiled kernels off; another value is the folder where they are kept."""
NATIVE = "native"
"""The target that stands for the machine's own instruction set."""
COMPILED = "octo_run::"
"""What the profiler's names of compiled kernels begin with."""
_SOURCE = Path(__file__).parent / "source"
_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
    "-pthread",
)
_LINK = ("-shared", "-pthread")
_INSTEAD = "PyTorch: "
_ELSEWHERE = f"{SWITCH}=FOLDER names a place that can be written, and run from"
_ANOTHER = "CXX names another compiler"
_DIGEST = 32  # bytes at a library's end, SHA-256 of those before it
_TIME_LIMIT = 300  # seconds that the compiler may take
_listeners: list[Callable[[str], object]] = []
Long, Pointer, Double = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
"""What numbers and addresses are in the kernels."""


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's elements begin, for a structure."""
    return None if tensor is None else tensor.data_ptr()


class KernelError(Exception):
    """The kernels cannot be compiled or loaded; the message says why in one sentence."""


def on_compile(tell: Callable[[str], object]) -> None:
    """Have ``tell`` called with a sentence whenever kernels are about to be compiled, which takes seconds."""
    if tell not in _listeners:
        _listeners.append(tell)


def compiler() -> list[str] | None:
    """The C++ compiler that there is: its command, which ``$CXX`` may give with options."""
    named = os.environ.get("CXX")
    if not named:
        return next(([found] for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    try:
        words = shlex.split(named)
    except ValueError:  # a quotation mark without its other one
        return None
    found = shutil.which(words[0]) if words else None
    return None if found is None else [found, *words[1:]]


def folder() -> Path:
    """Where compiled kernels are kept."""
    if named := os.environ.get(SWITCH):
        return Path(named)
    return own_folder() / "kernels"


def _machine() -> str:
    """What the compiler's "native" depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        facts = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    except OSError:
        facts = [platform.processor()]
    return "\n".join((platform.system(), platform.machine(), *facts))


def build(target: str = NATIVE) -> Path:
    """The compiled library for a target, a value of the compiler's ``-march`` (on ARM ``-mcpu``).

    It is compiled if it is not in the cache folder yet, or damaged there. Several processes may try at once.

    Raises:
        KernelError: It is not there and there is no compiler, it fails, or the folder cannot be written.
    """
    sources = sorted(_SOURCE.glob("*.cpp"))
    name = "-mcpu=" if platform.machine() in ("arm64", "aarch64") else "-march="
    options = [*_FLAGS, name + target]
    known = hashlib.sha256(repr((options, _LINK, _machine())).encode())
    for file in (*sources, *sorted(_SOURCE.glob("*.h"))):
        known.update(file.name.encode() + file.read_bytes())
    try:
        made = folder() / f"cpu-{known.hexdigest()[:20]}.so"
        if not _whole(made):
            _compile(made, sources, options)
    except (OctoError, OSError) as error:
        why = shown(str(error).rstrip("."), 200)
        raise KernelError(f"the CPU kernels cannot be compiled: {why} ({_ELSEWHERE})") from error
    return made


def _whole(library: Path) -> bool:
    """Whether a library is there as it was written: what is cut short or altered would end the process when it is
    loaded, so its end is a digest of the rest."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return content[-_DIGEST:] == hashlib.sha256(content[:-_DIGEST]).digest()


def _compile(made: Path, sources: list[Path], options: list[str]) -> None:
    found = compiler()
    if found is None:
        named = os.environ.get("CXX")
        why = (
            f"CXX is {quoted(named)}, which is no program here"
            if named
            else "install g++ or clang++, or name one in CXX"
        )
        raise KernelError(f"there is no C++ compiler ({why})")
    made.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(made, folder=True) as place:
        for tell in _listeners:
            tell(f"compiling the CPU's kernels, once for this machine (kept in {shown(str(made.parent), 200)})")
        objects = [str(place / f"{source.stem}.o") for source in sources]
        _run([[*found, *options, "-c", str(file), "-o", to] for file, to in zip(sources, objects, strict=True)])
        partial = place / made.name
        _run([[*found, *_LINK, *objects, "-o", str(partial)]])
        with partial.open("r+b") as out:
            out.write(hashlib.sha256(out.read()).digest())
        partial.replace(made)


def _run(commands: list[list[str]]) -> None:
    """Run compilers side by side.

    Raises:
        KernelError: One fails or takes too long; the others are ended.
    """
    end = time.monotonic() + _TIME_LIMIT
    with contextlib.ExitStack() as stack:
        running = []
        for command in commands:
            errors = stack.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
            stack.callback(process.wait)
            stack.callback(process.kill)  # one that has ended is not harmed
            running.append((command[0], process, errors))
        for name, process, errors in running:
            try:
                code = process.wait(max(0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                took = f"{shown(name, 100)} took more than {_TIME_LIMIT} seconds"
                raise KernelError(f"{took} ({_ANOTHER})") from None
            if code:
                errors.seek(0)
                text = errors.read(4096).decode(errors="replace").strip()
                raise KernelError(f"{shown(name, 100)} fails: {shown(text, 200)} ({_ANOTHER})")


def load(path: Path) -> ctypes.CDLL:
    """A compiled library with its functions declared.

    Raises:
        KernelError: It cannot be loaded.
    """
    try:
        found = ctypes.CDLL(str(path))
        found.octo_path.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        why = shown(str(error), 200)
        raise KernelError(f"the compiled CPU kernels cannot be loaded: {why} ({_ELSEWHERE})") from error
    return found


@functools.cache
def _found(switch: str | None) -> tuple[Kernels | None, str]:
    if switch == "0":
        return None, f"PyTorch ({SWITCH}=0)"
    try:
        found = load(build())
    except KernelError as error:
        return None, f"{_INSTEAD}{error}"
    return Kernels(found), found.octo_path().decode()


class Kernels:
    """The library's functions, each of which takes a reference to its arguments; PyTorch's profiler sees their calls
    while it runs.

    Attributes:
        recorded: What was called and on what, while a recording is made (`kernels.cpu.replay`).
    """

    def __init__(self, functions: ctypes.CDLL) -> None:
        self.functions = functions
        self.recorded: list[tuple[Any, ctypes.Structure]] | None = None

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        function = getattr(self.functions, name)
        size = ctypes.c_int64.in_dll(self.functions, name + "_size").value

        def call(arguments: Any) -> None:
            if ctypes.sizeof(arguments._obj) != size:
                raise OctoError("The CPU kernels are those of another version: octo-run was updated; start it again.")
            if self.recorded is not None:
                self.recorded.append((function, arguments._obj))
            if not profiled():
                function(arguments)
                return
            with record_function(COMPILED + name):
                function(arguments)

        vars(self)[name] = call
        return call


def profiled() -> bool:
    """Whether PyTorch's profiler is at work."""
    return bool(torch._C._autograd._profiler_enabled())


def library() -> Kernels | None:
    """The machine's kernels, compiled on first use; None where PyTorch has to do."""
    return _found(os.environ.get(SWITCH))[0]


def path_name() -> str:
    """Which instructions the CPU's kernels use, or that PyTorch runs and why."""
    return _found(os.environ.get(SWITCH))[1]


def failure() -> str | None:
    """Why PyTorch has to do the kernels' work, and what to do about it; None where it does not, or was asked to."""
    switch = os.environ.get(SWITCH)
    found, text = _found(switch)
    return None if found is not None or switch == "0" else text.removeprefix(_INSTEAD)
