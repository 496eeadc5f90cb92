"""The table that says which attention kernel runs when: every combination has one entry, and the one expected."""

import ast
import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octo_run.kernels import AttentionInputs, AttentionSpec, attend, page_bytes
from octo_run.kernels.attention import dispatch
from octo_run.kernels.attention.dispatch import Call, Device, Element, Kernel, Pages, Queries, Stored, Width
from octo_run.kernels.codec import parse_kv
from octo_run.kernels.codec.rotation import HEAD_DIMS

ROOT = Path(__file__).parents[2] / "kernels" / "attention"
CALLS = [Call(*facts) for facts in itertools.product(Device, Stored, Element, Queries, Pages, Width)]
GROUPS = (1, 2, 3, 4, 5, 7, 8, 16)
FORMATS = {
    Stored.PLAIN: ["bf16"],
    Stored.TRELLIS: ["oct2", "oct3", "oct4", "oct3:oct2", "oct4:oct3"],
    Stored.HALF_TRELLIS: ["oct3:bf16", "bf16:oct2", "octopus3:oct3", "oct4:octopus4"],
    Stored.OTHER: ["octopus2", "octopus3", "octopus4", "octopus4:octopus2", "bf16:octopus3", "octopus2:bf16"],
}
DTYPES = {torch.float16: Element.HALF, torch.bfloat16: Element.HALF, torch.float32: Element.SINGLE,
          torch.float64: Element.OTHER}  # fmt: skip


def expected(call: Call) -> Kernel | None:
    """The rules once more, as a text would put them; None: a GPU's kernels do not take the type."""
    if call.device is Device.CPU:
        return Kernel.REFERENCE
    if call.element is Element.OTHER:
        return None
    if call.queries is Queries.SEVERAL:
        return Kernel.PREFILL
    if call.stored is Stored.PLAIN or call.pages is Pages.NONE:
        return Kernel.PLAIN_DECODE
    fast = call.device is Device.HOPPER and call.stored is Stored.TRELLIS and call.element is Element.HALF
    if not fast:
        return Kernel.GENERAL_DECODE
    return Kernel.TABLE_DECODE if call.width is Width.UP_TO_256 else Kernel.WIDE_DECODE


def test_exactly_one_entry_applies() -> None:
    for call in CALLS:
        entries = [entry for entry in dispatch.KERNELS if entry.applies(call)]
        want = expected(call)
        assert [entry.kernel for entry in entries] == ([] if want is None else [want]), call
        if want is None:
            with pytest.raises(ValueError, match="take fp16, bf16 and fp32, not float64"):
                dispatch.choose(call)
        else:
            assert dispatch.choose(call) is want, call


def test_every_entry_is_of_use_and_says_why() -> None:
    for entry in dispatch.KERNELS:
        assert any(entry.applies(call) for call in CALLS) and entry.why
    assert {entry.kernel for entry in dispatch.KERNELS} == set(Kernel)


def test_every_kernel_s_file_has_the_kernels_named() -> None:
    for kernel in Kernel:
        file, _, names = kernel.value.partition(": ")
        functions = {n.name for path in (ROOT / file, ROOT / "general" / "parts.py")
                     for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)}  # fmt: skip
        assert set(re.findall(r"\w+_kernel", names)) <= functions


class TestFacts:
    """What is made of a call's tensors."""

    @pytest.mark.parametrize(("stored", "kv"), [(stored, kv) for stored, names in FORMATS.items() for kv in names])
    def test_formats(self, stored: Stored, kv: str) -> None:
        for dtype, mean, dim in itertools.product(DTYPES, (False, True), HEAD_DIMS):
            fmt = parse_kv(kv, dim, plain_dtype=dtype)
            want = Stored.OTHER if stored is Stored.PLAIN and mean else stored
            assert dispatch.stored(fmt, dtype, mean=mean) is want

    def test_plain_pages_of_another_type(self) -> None:
        fmt = parse_kv("bf16", 64, plain_dtype=torch.bfloat16)
        assert dispatch.stored(fmt, torch.float16, mean=False) is Stored.OTHER

    def inputs(self, pages: int = 2, sink: int = 64) -> Any:
        return SimpleNamespace(mean=None, sink=sink, pages=torch.empty(pages, 2, 3840))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("count", [1, 2, 70])
    def test_queries_and_types(self, dtype: torch.dtype, count: int) -> None:
        fmt = parse_kv("oct3", 64)
        for group in GROUPS:
            q = torch.empty(3, count, 2 * group, 64, dtype=dtype)
            call = dispatch.describe(q, self.inputs(), fmt, 1000, Device.HOPPER)
            several = Queries.SEVERAL if count > 1 else Queries.ONE
            wanted = (Device.HOPPER, Stored.TRELLIS, DTYPES[dtype], several, Pages.SOME, Width.UP_TO_256)
            assert call == wanted, group

    @pytest.mark.parametrize(
        ("pages", "sink", "length", "want"),
        [(2, 64, 129, Pages.SOME), (2, 64, 128, Pages.NONE), (0, 64, 9999, Pages.NONE), (1, 0, 65, Pages.SOME)],
    )
    def test_pages(self, pages: int, sink: int, length: int, want: Pages) -> None:
        q, fmt = torch.empty(1, 1, 4, 64, dtype=torch.float16), parse_kv("oct3", 64)
        assert dispatch.describe(q, self.inputs(pages, sink), fmt, length, Device.HOPPER).pages is want

    @pytest.mark.parametrize(
        ("kibibytes", "version", "want"),
        [(228, "13.0", Device.HOPPER), (164, "13.0", Device.GPU), (228, None, Device.GPU)],
    )
    def test_devices(self, monkeypatch: pytest.MonkeyPatch, kibibytes: int, version: str | None, want: Device) -> None:
        """GPUs that are made up: enough shared memory, NVIDIA's."""
        properties = SimpleNamespace(shared_memory_per_multiprocessor=1024 * kibibytes)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
        monkeypatch.setattr(torch.version, "cuda", version)
        dispatch.kind_of_gpu.cache_clear()
        assert dispatch.kind(torch.device("cuda")) is want
        assert dispatch.kind(torch.device("cpu")) is Device.CPU
        assert dispatch.kind_of_gpu(torch.device("cpu")) is Device.GPU, "the interpreter"
        dispatch.kind_of_gpu.cache_clear()


@pytest.mark.parametrize("kernel", [Kernel.GENERAL_DECODE, Kernel.PLAIN_DECODE, Kernel.PREFILL])
@pytest.mark.parametrize("element", [Element.HALF, Element.SINGLE])
def test_one_row_of_tiles_applies(kernel: Kernel, element: Element) -> None:
    for stored, head_dim in itertools.product(Stored, [*HEAD_DIMS, 1, 48, 65, 129, 257]):
        found = dispatch.tiles(kernel, stored, element, head_dim)  # more or fewer than one are an error there
        assert all(n & (n - 1) == 0 for n in (found.rows, found.keys, found.full_keys, found.warps))
        assert 64 % found.keys == 0, "a page is whole tiles"


def test_tiles_are_those_that_were_timed() -> None:
    def tiles(kernel: Kernel, stored: Stored, element: Element, dim: int) -> tuple[Any, ...]:
        return tuple(dispatch.tiles(kernel, stored, element, dim))

    half, single = Element.HALF, Element.SINGLE
    assert tiles(Kernel.GENERAL_DECODE, Stored.OTHER, half, 128) == (8, 32, 16, True, 1, 1, 8)
    assert tiles(Kernel.GENERAL_DECODE, Stored.OTHER, half, 256) == (8, 16, 16, True, 1, 1, 8)
    assert tiles(Kernel.GENERAL_DECODE, Stored.HALF_TRELLIS, half, 64) == (8, 16, 16, True, 1, 1, 8)
    assert tiles(Kernel.GENERAL_DECODE, Stored.TRELLIS, single, 64) == (16, 16, 16, False, 4, 1, 8)
    assert tiles(Kernel.PLAIN_DECODE, Stored.PLAIN, half, 64) == (16, 64, 64, True, 4, 5, 4)
    assert tiles(Kernel.PLAIN_DECODE, Stored.PLAIN, half, 128) == (16, 64, 64, True, 4, 3, 3)
    assert tiles(Kernel.PLAIN_DECODE, Stored.PLAIN, half, 256) == (16, 64, 64, True, 4, 3, 1)
    assert tiles(Kernel.PREFILL, Stored.OTHER, half, 128) == (128, 64, 64, False, 8, 3, 1)
    assert tiles(Kernel.PREFILL, Stored.OTHER, half, 256) == (128, 64, 64, False, 8, 2, 1)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_programs_of_the_table_kernel_have_all_heads(group: int, head_dim: int) -> None:
    blocks, programs = dispatch.head_blocks(group, head_dim)
    assert blocks in (1, 2) and 4 * blocks * (programs - 1) < group <= 4 * blocks * programs
    assert blocks == 1 or (group > 4 and head_dim <= 128)


LAUNCHED = {
    Kernel.PLAIN_DECODE: {"plain_decode_kernel"},
    Kernel.GENERAL_DECODE: {"general_decode_kernel"},
    Kernel.TABLE_DECODE: {"table_decode_kernel"},
    Kernel.WIDE_DECODE: {"wide_decode_kernel", "merge_places_kernel"},
    Kernel.PREFILL: {"unpack_kernel", "flash_kernel"},
}


@pytest.mark.few(24)
@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("dim", [64, 256, 512])
@pytest.mark.parametrize("kv", ["bf16", "octopus3", "oct3", "oct4:oct2", "oct3:bf16"])
def test_attend_launches_what_the_table_says(
    monkeypatch: pytest.MonkeyPatch, kv: str, dim: int, count: int, dtype: torch.dtype, hopper: bool
) -> None:
    """Tensors lie on the device "meta", which stands for a GPU; launches are counted, not run."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.runtime.jit import JITFunction

    device = Device.HOPPER if hopper else Device.GPU
    monkeypatch.setattr(dispatch, "kind", lambda _device: device)
    found = set()
    monkeypatch.setattr(JITFunction, "run", lambda self, **_: found.add(self.fn.__name__))
    for group in (1, 4, 7):
        found.clear()
        fmt = parse_kv(kv, dim, plain_dtype=dtype)
        q, inputs = arena(fmt, group, count, dim, dtype)
        attend(q, inputs, fmt, spec=AttentionSpec(0.1), max_length=1000)
        call = dispatch.describe(q, inputs, fmt, 1000, device)
        want = expected(call)
        assert want is not None and found - {"merge_kernel"} == LAUNCHED[want]  # merged if there are several parts


def arena(fmt: Any, group: int, count: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, AttentionInputs]:
    def meta(*shape: int, kind: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    full = [meta(5, 2, size, dim, kind=dtype) for size in (64, 64, 128, 128)]
    pages = meta(3, 2, page_bytes(fmt), kind=torch.uint8)
    inputs = AttentionInputs(pages, meta(5, 3), meta(2), meta(2), meta(2), *full, meta(2), 64)
    return meta(2, count, 2 * group, dim, kind=dtype), inputs


def test_nothing_else_decides() -> None:
    """Outside of the table no code of the launchers asks what a format is, how many queries or what device."""
    launchers = ["launch.py", "hopper/launch.py", "hopper/wide_launch.py", "general/decode_launch.py"]
    launchers += ["general/prefill_launch.py", "__init__.py", "workspace.py", "parts.py"]
    for name in launchers:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.If | ast.IfExp):
                asked = ast.unparse(node.test)
                assert not re.search(r"Codec|\bfmt\b|count|stored|element|get_device|is_nvidia", asked), (name, asked)
