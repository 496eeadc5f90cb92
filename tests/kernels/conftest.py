"""What the tests of kernels share."""

import functools
import os
import runpy
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
#: Files whose tests compile kernels for a GPU, or run them lane by lane or in Triton's interpreter: minutes altogether.
COSTLY = ("_compiled.py", "_emulated.py", "_interpreted.py")
#: Instruction sets other than the machine's own: each is half a minute of the C++ compiler.
FOREIGN = {*runpy.run_path(str(HERE / "cpu_targets.py"))["TARGETS"]} - {"native"}


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a costly test the first case is quick, the others are slow; so are other instruction sets than this one's.
    Where there is a GPU, the tests of files that use it then (``DEVICE``) are marked ``gpu``, so that ``-m gpu`` has
    them."""
    seen = set[object]()
    for item in items:
        if getattr(getattr(item, "module", None), "DEVICE", None) == "cuda":
            item.add_marker(pytest.mark.gpu)
        if item.path.parent != HERE or item.get_closest_marker("slow") is not None:
            continue
        case = getattr(item, "callspec", None)
        foreign = case is not None and any(isinstance(one, str) and one in FOREIGN for one in case.params.values())
        costly = item.path.name.endswith(COSTLY) and (item.path, getattr(item, "originalname", None)) in seen
        if foreign or costly:
            item.add_marker(pytest.mark.slow)
        seen.add((item.path, getattr(item, "originalname", None)))


@functools.cache
def _looking_at_machine_code() -> tuple[Callable[[bytes], str], Callable[[str], list[str]]]:
    report = runpy.run_path(str(HERE.parents[1] / "scripts" / "sass_report.py"))
    return report["machine_code"], runpy.run_path(str(HERE / "machine_code.py"))["unwritten_registers"]


@pytest.fixture(autouse=True)
def _uniform_registers_are_written(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test of machine code compiles for sm_90 is looked at (`machine_code`)."""
    if not request.path.name.endswith("_compiled.py") or os.environ.get("TRITON_INTERPRET") == "1":
        return
    import triton

    original, (machine_code, unwritten_registers) = triton.compile, _looking_at_machine_code()

    def checked(*args, **options):
        compiled = original(*args, **options)
        if "cubin" in compiled.asm:
            assert unwritten_registers(machine_code(compiled.asm["cubin"])) == []
        return compiled

    monkeypatch.setattr(triton, "compile", checked)


@pytest.fixture(autouse=True)
def _same_numbers(request: pytest.FixtureRequest) -> None:
    """PyTorch's random numbers depend on the test alone, not on those that ran before it in the same process."""
    import torch

    torch.manual_seed(zlib.crc32(request.node.nodeid.rpartition("/")[2].encode()))


@pytest.fixture(autouse=True)
def _interpreter_with_new_numpy(monkeypatch):
    """Triton 3.6's interpreter turns one-element arrays into loop bounds by int(), which NumPy 2.4 no longer does."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime import interpreter

        original = interpreter._patch_lang_tensor

        def patch(tensor, scope):
            original(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
