"""Compiling and keeping the CPU's kernels, with a compiler that copies what another one made."""

import ctypes
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from octo_run.kernels.cpu import native


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """A new folder for libraries, a compiler in ``$CXX`` that makes the machine's own; calls of it are counted."""
    if native.library() is None:
        pytest.skip(native.path_name())
    good, calls, script = tmp_path / "good.so", tmp_path / "calls", tmp_path / "a c++"
    good.write_bytes(native.build().read_bytes()[: -native._DIGEST])
    calls.write_text("")
    copy = f'while [ "$1" != -o ]; do shift; done; cp {shlex.quote(str(good))} "$2"; echo >> {shlex.quote(str(calls))}'
    script.write_text(f"#!/bin/sh\n{copy}\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", shlex.quote(str(script)))
    monkeypatch.setenv(native.SWITCH, str(tmp_path / "kernels"))
    native._found.cache_clear()
    yield lambda: len(calls.read_text())
    native._found.cache_clear()


def test_a_damaged_library_is_compiled_anew(kept: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded, one that was cut short ends the process with SIGBUS."""
    made = native.build()
    content, once = made.read_bytes(), kept()
    assert native.build() == made and kept() == once, "a whole one is used again"
    for number, damaged in enumerate(
        (b"", content[:20], content[:1000], content[:100_000], content[:-1], content[:5000] + b"?" + content[5001:])
    ):
        made.write_bytes(damaged)
        assert native.build() == made and kept() == (2 + number) * once
        assert made.read_bytes() == content
    assert ctypes.CDLL(str(made)).octo_path
    assert [*made.parent.iterdir()] == [made]


def test_a_kept_library_needs_no_compiler(kept: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    made, once = native.build(), kept()
    for named in ("/none", "'g++", " "):
        monkeypatch.setenv("CXX", named)
        assert native.compiler() is None and native.build() == made
    assert native.library() is not None and kept() == once
    made.unlink()
    with pytest.raises(native.KernelError, match="CXX is ' ', which is no program here"):
        native.build()


def test_a_compiler_may_have_options(kept: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    named = shlex.split(native.os.environ["CXX"])[0]
    monkeypatch.setenv("CXX", f"{shlex.quote(named)} -m64 '-DA=b c'")
    assert native.compiler() == [named, "-m64", "-DA=b c"]
    assert native.build().is_file() and kept() > 0
    monkeypatch.setenv("CXX", f"env {shlex.quote(named)}")
    assert native.compiler() == [shutil.which("env"), named]
