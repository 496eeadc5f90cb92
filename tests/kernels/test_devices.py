"""Kernels run on the device of their tensors, and work is divided by that device's processors, whichever is current.

There is no second GPU here: tensors lie on the device "meta", and what is looked at is each launch's surroundings. That
kernels are compiled is told.
"""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from octo_run.kernels import AttentionInputs, AttentionSpec, attention_workspace_bytes, devices, page_bytes
from octo_run.kernels import step as ops
from octo_run.kernels.attention import key_mean, parts, workspace
from octo_run.kernels.attention.hopper import launch as table_launch
from octo_run.kernels.attention.hopper import wide_launch
from octo_run.kernels.attention.launch import attend_triton
from octo_run.kernels.codec import parse_kv
from octo_run.kernels.encode.launch import encode_pages_triton
from octo_run.kernels.step import launch, layer_kernels

META = torch.device("meta")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.device | None]]:
    """Kernels that were launched, each with the device that was made the current one around it."""
    found: list[tuple[str, torch.device | None]] = []
    guards: list[torch.device | None] = [None]

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        guards.append(tensor.device)
        yield
        guards.pop()

    def run(self: Any, *unnamed: Any, grid: Any, warmup: bool, **named: Any) -> None:
        assert not unnamed and named.keys() >= set(self.arg_names), "an argument does not go by its name"
        found.append((self.fn.__name__, guards[-1]))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(JITFunction, "run", run)
    return found


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def numbers(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int32)


def arena(kv: str, batch: int, count: int, mean: bool) -> tuple[torch.Tensor, AttentionInputs, Any]:
    fmt, q = parse_kv(kv, 64, plain_dtype=torch.float16), meta(batch, count, 4, 64)
    means = None
    if mean:
        tables = key_mean.AngleTables.build(torch.ones(32), 64, 3).to(META)
        means = key_mean.KeyMean(meta(2, 64, 64, dtype=torch.float32), tables,
                                 meta(*q.shape, dtype=torch.float32))  # fmt: skip
    pages = meta(3, 2, page_bytes(fmt), dtype=torch.uint8)
    full = [meta(5, 2, size, 64) for size in (64, 64, 128, 128)]
    return q, AttentionInputs(pages, numbers(5, 3), *(numbers(batch) for _ in range(3)), *full, numbers(batch), 64,
                              means), fmt  # fmt: skip


def attend(kv: str, count: int, mean: bool = False, batch: int = 2) -> Callable[[], Any]:
    def call() -> None:
        q, inputs, fmt = arena(kv, batch, count, mean)
        attend_triton(q, inputs, fmt, spec=AttentionSpec(0.1), max_length=1000)

    return call


def attend_by_teams() -> None:
    fmt = parse_kv("oct3", 512)
    q, pages = meta(2, 1, 4, 512), meta(3, 2, page_bytes(fmt), dtype=torch.uint8)
    full = [meta(5, 2, size, 512) for size in (64, 64, 128, 128)]
    inputs = AttentionInputs(pages, numbers(5, 3), *(numbers(2) for _ in range(3)), *full, numbers(2), 64)
    room = workspace.Workspace.of(None, 2, 4, 2, 512, META)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]  # its caller's, `attend_triton`
        wide_launch.launch_wide_decode(q, inputs, fmt, torch.empty_like(q), room, spec=AttentionSpec(0.1),
                                       max_length=1000)  # fmt: skip


def attend_by_table() -> None:
    q, inputs, fmt = arena("oct3", 2, 1, False)
    room = workspace.Workspace.of(None, 2, 4, 2, 64, META)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]  # its caller's, `attend_triton`
        table_launch.launch_table_decode(q, inputs, fmt, torch.empty_like(q), room, spec=AttentionSpec(0.1),
                                         max_length=1000)  # fmt: skip


def encode(kv: str) -> Callable[[], Any]:
    def call() -> None:
        fmt, source = parse_kv(kv, 64), meta(1, 2, 2, 64, 64)
        pages, ids = meta(4, 1, 2, page_bytes(fmt), dtype=torch.uint8), meta(2, dtype=torch.int64)
        encode_pages_triton(source, source, pages, ids, fmt)

    return call


def encode_by_lanes() -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("octo_run.kernels.encode.launch.runs_ptx", lambda _: True)
        encode("oct3")()


def append() -> None:
    transform = ops.HeadTransform(meta(3, 32), meta(3, 32), None, None, 1e-5, meta(2, 2, 64, 64), meta(64, 64),
                                  meta(2, 64, dtype=torch.float32))  # fmt: skip
    full_k, full_v = meta(5, 2, 9, 64), meta(5, 2, 9, 64)
    q, found = meta(3, 1, 4, 64), meta(3, 1, 4, 64, dtype=torch.float32)
    launch.qkv_rope_append(meta(3, 8 * 64), transform, numbers(3), full_k, full_v, q, numbers(3), found)


def sample() -> None:
    wide, one = meta(2, dtype=torch.int64), meta(2, dtype=torch.float32)
    draws = ops.Draws(
        rows=numbers(2), temperature=one, penalties=meta(3, 2, dtype=torch.float32), seeds=wide, counters=wide,
        counts=numbers(5, 3000), slices=meta(2, 4, 3, dtype=torch.float32), tokens=numbers(5),
        logprobs=meta(5, dtype=torch.float32),
    )  # fmt: skip
    launch.sample(draws, meta(2, 3000), None)


def put_back() -> None:
    _, inputs, _ = arena("oct3", 2, 1, True)
    assert inputs.mean is not None
    key_mean.put_back(meta(2, 2, 128, 64), inputs.num_packed, 0, inputs.mean)


def take_out() -> None:
    tables, k = key_mean.AngleTables.build(torch.ones(32), 64, 3).to(META), meta(3, 2, 2, 64, 64)
    maps = meta(3, 2, 64, 64, dtype=torch.float32)
    key_mean.take_out(k, maps, numbers(1), tables, torch.empty_like(k))


LAUNCHERS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "norm": (lambda: launch.add_rms_norm(meta(3, 64), meta(3, 64), meta(64), 1e-5, meta(3, 64)),
             {"add_rms_norm_kernel"}),
    "vector": (lambda: launch.vector(meta(1, 64), meta(9, 64), None, meta(1, 9)), {"vector_kernel"}),
    "swiglu": (lambda: launch.swiglu(meta(3, 64), meta(3, 32)), {"swiglu_kernel"}),
    "append": (append, {"qkv_rope_append_kernel"}),
    "rotate back": (lambda: launch.rotate_back(meta(3, 128), meta(64, 64), meta(3, 128)), {"rotate_back_kernel"}),
    "embed": (lambda: launch.embed(numbers(3), meta(9, 64), meta(3, 64), 2.0), {"embed_kernel"}),
    "angles": (lambda: launch.angles(numbers(3), meta(32, dtype=torch.float32), 1.0, meta(3, 32), meta(3, 32)),
               {"angles_kernel"}),
    "move on": (lambda: launch.move_on(numbers(3), numbers(3), numbers(3), 4, 8), {"move_on_kernel"}),
    "sample": (sample, {"sample_slice_kernel", "sample_merge_kernel"}),
    "decode": (attend("octopus3", 1), {"general_decode_kernel", "merge_kernel"}),
    "plain decode": (attend("bf16", 1), {"plain_decode_kernel", "merge_kernel"}),
    "table decode": (attend_by_table, {"table_decode_kernel"}),
    "wide decode": (attend_by_teams, {"wide_decode_kernel", "merge_places_kernel"}),
    "prefill": (attend("octopus3", 5, mean=True), {"unpack_kernel", "put_back_kernel", "flash_kernel"}),
    "put back": (put_back, {"put_back_kernel"}),
    "take out": (take_out, {"take_out_kernel"}),
    "encode octopus": (encode("octopus3"), {"octopus_pages_kernel"}),
    "encode plain": (encode("bf16"), {"plain_pages_kernel"}),
    "encode trellis": (encode("oct3"), {"trellis_kernel", "pack_kernel"}),
    "encode trellis by lanes": (encode_by_lanes, {"lane_search_kernel", "pack_kernel"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_kernel_is_launched_on_the_device_of_its_tensors(
    launches: list[tuple[str, torch.device | None]], name: str
) -> None:
    run, kernels = LAUNCHERS[name]
    run()
    assert {kernel for kernel, _ in launches} == kernels
    assert all(device == META for _, device in launches), launches


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda:0, the current device, has 100 processors, cuda:1 has 30. Both are made up."""

    def properties(device: Any) -> SimpleNamespace:
        index = device if isinstance(device, int) else torch.device(device).index
        return SimpleNamespace(multi_processor_count={0: 100, 1: 30}[index])

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices._processors.cache_clear()
    yield
    devices._processors.cache_clear()


def test_work_is_divided_by_the_processors_of_the_device_given(two_cards: None) -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert (devices.processors(first), devices.processors(second)) == (100, 30)
    assert devices.processors(torch.device("cuda")) == 100, "without a number it is the current one"
    assert devices.processors(torch.device("cpu")) == devices.INTERPRETED_PROCESSORS
    assert workspace.counter_words(second) == 30 * parts.PARTS_PER_PROCESSOR
    many, few = (parts.general_parts(device, 1, 2, 100_000, 1) for device in (first, second))
    assert many > 2 * few
    sizes = [attention_workspace_bytes(1, 8, 2, 128, device) for device in ("cuda:0", "cuda:1", "cuda")]
    assert sizes[0] > 3 * sizes[1] and sizes[2] == sizes[0]


@pytest.mark.parametrize("kv", ["oct3", "octopus3"])
def test_launchers_ask_for_the_processors_of_their_tensors(
    launches: list[tuple[str, torch.device | None]], monkeypatch: pytest.MonkeyPatch, kv: str
) -> None:
    asked = []

    def processors(device: torch.device) -> int:
        asked.append(device)
        return 30

    for module in (parts, workspace, table_launch):
        monkeypatch.setattr(module, "processors", processors)
    (attend_by_table if kv == "oct3" else attend(kv, 1))()
    assert asked and set(asked) == {META}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_it_is_told_once_that_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By Triton itself, for a GPU that is not here: not if its cache on the disk has them. Who listened before still
    does."""
    kernel, told, heard = layer_kernels.gate_kernel, list[int](), list[bool]()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **about: heard.append(about["cache_hit"]))
    former = triton.knobs.compilation.listener
    types = {"X": "*bf16", "GATES": "*bf16", "n": "i32", "BLOCK": "constexpr", "EARLY": "constexpr"}

    def compiled(block: int) -> None:
        source = ASTSource(kernel, types, {"BLOCK": block, "EARLY": False})
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})

    with devices.compiling(lambda: told.append(len(heard))):
        compiled(128)
        compiled(256)
    assert told == [1] and heard == [False, False] and triton.knobs.compilation.listener is former
    with devices.compiling(lambda: told.append(-1)):
        compiled(128)
    assert told == [1] and heard == [False, False, True], "the disk had it"
    with pytest.raises(ZeroDivisionError), devices.compiling(lambda: told.append(-1)):
        raise ZeroDivisionError
    assert triton.knobs.compilation.listener is former


def test_nothing_is_collected_while_kernels_are_compiled() -> None:
    """Whatever ends it; and nothing is switched on that was off."""
    assert gc.isenabled()
    with devices.without_collection():
        assert not gc.isenabled()
        with devices.without_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), devices.without_collection():
        raise ZeroDivisionError
    assert gc.isenabled()
