"""Profiles: parts by name and order, time that counts once, a real run on the CPU, the trace file."""

import ast
import gzip
import json
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octo_run import kernels
from octo_run.engine import Engine, benchmark, profiling
from octo_run.engine.arena import Chunk
from octo_run.engine.profiling import Profile, Span
from octo_run.errors import OctoError
from octo_run.kernels import step as ops

ROOT = Path(__file__).parents[2]
NVJET = "nvjet_tst_64x8_64x16_4x1_v_bz_TNT"
SPLIT = "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>(cublasLt::cublasSplitKParams)"
GEMV = "void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false>(cublasGemvParamsEx)"
COPY = "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<direct_copy_kernel_cuda>>(int)"
GATHER = "void at::native::(anonymous namespace)::indexSelectSmallIndex<c10::BFloat16, long, unsigned int, 2, 2, -2>()"
TO_HOST, SORT = "Memcpy DtoH (Device -> Pinned)", "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<long>()"

NORM, PRODUCT, TURN, SWIGLU = "add_rms_norm_kernel", "vector_kernel", "qkv_rope_append_kernel", "swiglu_kernel"
DRAW = [("sample_slice_kernel", "sampling"), ("sample_merge_kernel", "sampling"), ("move_on_kernel", "sampling")]
BEGIN = [(GATHER, "other"), ("angles_kernel", "other"), ("embed_kernel", "other"), (NORM, "norms")]
END = [(COPY, "other"), (TO_HOST, "other")]


def layer(product: str, *attention: str) -> list[tuple[str, str]]:
    """A layer's kernels after its input norm, the next norm included."""
    return [
        (product, "projections"), (TURN, "rope and append"), *((name, "attention") for name in attention),
        (product, "projections"), (NORM, "norms"), (product, "mlp"), (SWIGLU, "mlp"), (product, "mlp"), (NORM, "norms"),
    ]  # fmt: skip


def check_parts(expected: list[tuple[str, str]]) -> None:
    assert [*zip([n for n, _ in expected], profiling.assign_parts([n for n, _ in expected]), strict=True)] == expected


def test_every_kernel_of_ours_has_a_part() -> None:
    found = {
        node.name
        for path in (ROOT / "kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list
    }
    assert len(found) > 10 and found == set(profiling.KERNELS)
    assert set(profiling.KERNELS.values()) <= {*profiling.PARTS, "product"}


def test_a_recurrent_layer_lies_between_two_norms() -> None:
    names = [NORM, PRODUCT, PRODUCT, "delta_step_kernel", PRODUCT, NORM, PRODUCT, "swiglu_kernel", PRODUCT, NORM]
    parts = ["norms", *["projections"] * 2, "recurrent", "projections", "norms", *["mlp"] * 3, "norms"]
    assert profiling.assign_parts(names) == parts


@pytest.mark.parametrize("attention", [["table_decode_kernel"], ["general_decode_kernel", "merge_kernel"]])
@pytest.mark.parametrize("product", [PRODUCT, NVJET, GEMV])
def test_products_of_two_steps_by_their_place(product: str, attention: list[str]) -> None:
    step = [*BEGIN, *layer(product, *attention) * 2, (product, "head"), *DRAW, *END]
    check_parts(step * 2)


def test_what_follows_a_product_belongs_to_it() -> None:
    check_parts([
        *BEGIN, (NVJET, "projections"), (SPLIT, "projections"), (TURN, "rope and append"),
        ("table_decode_kernel", "attention"), (NVJET, "projections"), (SPLIT, "projections"), (NORM, "norms"),
        (NVJET, "mlp"), (SWIGLU, "mlp"), ("Memset (Device)", "mlp"), (NVJET, "mlp"), (SPLIT, "mlp"), (NORM, "norms"),
        (NVJET, "head"), (SPLIT, "head"), (SORT, "sampling"), (COPY, "sampling"), *DRAW, *END,
    ])  # fmt: skip


def test_pages_coded_between_steps_and_before_the_first() -> None:
    """With key means: their product is neither the head's nor a layer's."""
    coding = [(GEMV, "page coding"), ("take_out_kernel", "page coding"), ("trellis_kernel", "page coding"),
              ("pack_kernel", "page coding")]  # fmt: skip
    step = [*BEGIN, *layer(PRODUCT, "table_decode_kernel"), (PRODUCT, "head"), *DRAW, *END]
    check_parts([*coding, *step, *coding, *step])


def test_a_prompt_in_two_chunks() -> None:
    """Copies bring keys and values into the arena; pages are coded after attention, before the output's product."""
    mixing = [
        (NVJET, "projections"), (TURN, "rope and append"), (COPY, "rope and append"), (GATHER, "rope and append"),
        ("unpack_kernel", "attention"), ("put_back_kernel", "attention"), ("flash_kernel", "attention"),
        ("flash_kernel", "attention"),
        (GEMV, "page coding"), (COPY, "page coding"), ("octopus_pages_kernel", "page coding"),
        ("plain_pages_kernel", "page coding"), (COPY, "rope and append"), (NVJET, "projections"), (NORM, "norms"),
        (NVJET, "mlp"), (SWIGLU, "mlp"), (NVJET, "mlp"), (NORM, "norms"),
    ]  # fmt: skip
    check_parts([*BEGIN, *mixing, *BEGIN, *mixing, (GATHER, "other"), (NVJET, "head"), *END[:1]])


def test_overlapping_time_belongs_to_the_kernel_that_began_first() -> None:
    spans = [Span("a", "mlp", 0, 10), Span("b", "mlp", 4, 12), Span("c", "mlp", 5, 8), Span("d", "mlp", 15, 16)]
    pieces = profiling.exclusive(spans)
    assert [(p.name, p.start, p.end) for p in pieces] == [("a", 0, 10), ("b", 10, 12), ("d", 15, 16)]


def test_the_parts_and_the_kernels_add_up() -> None:
    spans = [Span("p", "mlp", 0, 10), Span("p", "mlp", 8, 14), Span("p", "head", 20, 30), Span("q", "mlp", 21, 22)]
    calls = Counter((s.name, s.part) for s in spans)
    parts, lines = profiling.summarise(profiling.exclusive(spans), calls, wall=40, count=2)
    assert [(p.part, p.ms, p.share) for p in parts] == [
        ("mlp", pytest.approx(0.007), pytest.approx(0.35)),
        ("head", pytest.approx(0.005), pytest.approx(0.25)),
        ("gaps", pytest.approx(0.008), pytest.approx(0.4)),
    ]
    assert [(k.name, k.part, k.calls, k.us) for k in lines] == [
        ("p", "mlp", 1, 7), ("p", "head", 0.5, 10), ("q", "mlp", 0.5, 0),
    ]  # fmt: skip
    assert sum(k.ms for k in lines) + parts[-1].ms == pytest.approx(0.02)


def event(cat: str, name: str, start: float, end: float, pid: int = 7, tid: int = 7) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": start, "dur": end - start}


def test_an_operator_has_the_time_outside_those_it_calls() -> None:
    events = [
        event("user_annotation", "octo-run: profiled", 0, 100), event("user_annotation", "attention", 10, 60),
        event("cpu_op", "matmul", 20, 50), event("cpu_op", "mm", 25, 45), event("cpu_op", "add", 70, 75),
        event("user_annotation", "page coding", 51, 58), event("cpu_op", "mm", 52, 56),
        event("cpu_op", "elsewhere", 0, 100, tid=8),
    ]  # fmt: skip
    pieces, calls = profiling.on_cpu(events, 7)
    assert [(p.name, p.part, p.start, p.end) for p in pieces] == [
        ("matmul", "attention", 20, 25), ("mm", "attention", 25, 45), ("matmul", "attention", 45, 50),
        ("mm", "page coding", 52, 56), ("add", "other", 70, 75),
    ]  # fmt: skip
    assert calls == {("matmul", "attention"): 1, ("mm", "attention"): 1, ("mm", "page coding"): 1, ("add", "other"): 1}


def profile_on_fake_gpu(monkeypatch: pytest.MonkeyPatch, kernels_seen: list[dict[str, Any]]) -> Profile:
    host = [
        event("user_annotation", "octo-run: profiled", 100, 200),
        event("cuda_runtime", "cudaGraphLaunch", 101, 105),
    ]
    flow = [{"ph": "s", "cat": "ac2g", "name": "ac2g", "id": 5, "pid": 7, "tid": 7, "ts": 101}]
    flow += [flow[0] | {"ph": "f", "pid": 0, "tid": 20, "ts": kernels_seen[0]["ts"]}] if kernels_seen else []
    again = event("gpu_user_annotation", "octo-run: profiled", 110, 190, pid=0, tid=20)
    meta = {"ph": "M", "name": "process_name", "pid": 7, "tid": 0, "ts": 0, "args": {"name": "python"}}
    rounds: list[tuple[Any, int]] = []

    def run_round(_engine: Any, test: Any, ids: list[int], *, clock: Any, **_: Any) -> Any:
        rounds.append((test, len(ids)))
        return clock(lambda: None)

    engine: Any = SimpleNamespace(device=torch.device("cuda"), plan=SimpleNamespace(kv="oct3", weight_format="int4"))
    monkeypatch.setattr(profiling, "_record", lambda _device, _work: [meta, *host, *kernels_seen, *flow, again])
    monkeypatch.setattr(benchmark, "ordinary_ids", lambda _engine: [3])
    monkeypatch.setattr(benchmark, "run_round", run_round)
    profile = profiling.profile(engine, ("tg", 100), depth=4096, batch=2)
    assert rounds == [(("tg", 64), 100)] * 3, "two rounds compile and record, the third is profiled"
    return profile


GPU = [
    event("kernel", NORM, 110, 120, 0, 20), event("gpu_memcpy", TO_HOST, 185, 210, 0, 20),
    event("kernel", PRODUCT, 112, 140, 0, 20), event("kernel", TURN, 139, 150, 0, 20),
    event("kernel", "table_decode_kernel", 149, 180, 0, 20),
]  # fmt: skip


def test_a_profile_of_a_gpu_sums_to_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = profile_on_fake_gpu(monkeypatch, GPU)
    assert (profile.title, profile.unit, profile.count) == ("int4 oct3 tg100 at depth 4,096, 2 sequences", "step", 64)
    assert profile.ms * 64 == pytest.approx(0.110)
    assert {p.part: round(64e3 * p.ms) for p in profile.parts} == {
        "norms": 10, "projections": 20, "rope and append": 35, "attention": 30, "gaps": 15,
    }  # fmt: skip
    assert sum(p.share for p in profile.parts) == pytest.approx(1)
    kinds = Counter((e["ph"], e["pid"]) for e in profile.trace)
    assert kinds == {("X", 0): 5, ("X", 1): 2, ("s", 1): 1, ("f", 2): 1, ("X", 2): 5}
    runs = [(e["name"], e["ts"], e["dur"]) for e in profile.trace if e["pid"] == 0]
    assert runs[:2] == [("norms", 10, 10), ("projections", 20, 20)]


def test_a_gpu_without_kernels_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OctoError, match="saw no kernel on cuda"):
        profile_on_fake_gpu(monkeypatch, [])


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("octo-demo", kv="oct3", device="cpu", max_context=300, sequences=2)


PRODUCTS = ("aten::mm", "octo_run::octo_dense_linear")
"""Products with matrices: of many rows, and of few."""


@pytest.fixture(scope="module")
def step_profile(engine: Engine) -> tuple[Profile, float]:
    """Steps of two sequences over the coding of a page, and the seconds that the last round of them took."""
    marks: list[float] = []
    launch, read = engine.step.launch, engine.step.read

    def timed_launch(sequences: Any) -> None:
        marks.append(time.perf_counter())
        launch(sequences)

    def timed_read(sequence: Any) -> Any:
        result = read(sequence)
        marks.append(time.perf_counter())
        return result

    patch = pytest.MonkeyPatch()
    patch.setattr(engine.step, "launch", timed_launch)
    patch.setattr(engine.step, "read", timed_read)
    profile = profiling.profile(engine, ("tg", 8), depth=190, batch=2)
    patch.undo()
    return profile, marks[-1] - marks[len(marks) // 2]


def test_the_parts_of_a_real_step_sum_to_its_time(step_profile: tuple[Profile, float]) -> None:
    profile, seconds = step_profile
    assert (profile.kv, profile.test, profile.unit, profile.count) == ("oct3", "tg8", "step", 8)
    assert profile.ms * 8 == pytest.approx(1e3 * seconds, rel=0.05)
    times = {p.part: p.ms for p in profile.parts}
    assert sum(times.values()) == pytest.approx(profile.ms)
    assert set(times) == set(profiling.PARTS) - {"recurrent"} and all(ms > 0 for ms in times.values())
    assert sum(k.ms for k in profile.kernels) + times["gaps"] == pytest.approx(profile.ms)
    products = {k.part: k.calls for k in profile.kernels if k.name in PRODUCTS}
    layers = 8
    assert (products["projections"], products["mlp"], products["head"]) == (2 * layers, 2 * layers, 1)


@pytest.mark.slow
def test_the_parts_of_a_real_prompt(engine: Engine) -> None:
    profile = profiling.profile(engine, ("pp", 150), depth=130, batch=2)
    assert (profile.unit, profile.count) == ("prompt", 2)
    times = {p.part: p.ms for p in profile.parts}
    assert set(times) == set(profiling.PARTS) - {"sampling", "recurrent"} and all(ms > 0 for ms in times.values())
    assert sum(times.values()) == pytest.approx(profile.ms)
    products = {k.part: k.calls for k in profile.kernels if k.name in PRODUCTS}
    assert (products["projections"], products["mlp"], products["head"]) == (16, 16, 1)


def test_nothing_stays_wrapped(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (kernels.attend, ops.linear, Chunk.attend)

    def fail(_device: Any, work: Any) -> Any:
        assert kernels.attend is not before[0] and Chunk.attend is not before[2]
        raise KeyboardInterrupt

    with profiling._ranges(engine), pytest.raises(KeyboardInterrupt):
        fail(None, None)
    assert (kernels.attend, ops.linear, Chunk.attend) == before
    with pytest.raises(ZeroDivisionError), profiling._ranges(engine):
        raise ZeroDivisionError
    assert (kernels.attend, ops.linear, Chunk.attend) == before


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_the_trace_file(
    name: str, step_profile: tuple[Profile, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiles = [step_profile[0], profile_on_fake_gpu(monkeypatch, GPU), profile_on_fake_gpu(monkeypatch, GPU)]
    path = tmp_path / name
    path.write_bytes(b"an earlier one")
    profiling.write_trace(path, profiles, {"model": "octo-demo"})
    assert [*tmp_path.iterdir()] == [path]
    trace = json.loads(gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes())
    assert trace["otherData"] == {"model": "octo-demo"}
    events = trace["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert [names[pid] for pid in sorted(names)] == [
        "fp32 oct3 tg8 at depth 190, 2 sequences: parts",
        "fp32 oct3 tg8 at depth 190, 2 sequences: host",
        *[f"int4 oct3 tg100 at depth 4,096, 2 sequences: {process}" for process in ("parts", "host", "GPU")] * 2,
    ]
    for e in (e for e in events if e["ph"] != "M"):
        assert e["pid"] in names and isinstance(e["tid"], int) and isinstance(e["name"], str) and e["ts"] >= 0
        assert e["ph"] in "sf" or e["dur"] >= 0
    ends = {name: max(e["ts"] + e["dur"] for e in events if e["ph"] == "X" and names[e["pid"]] == name)
            for name in names.values()}  # fmt: skip
    first = profiles[0]
    assert ends["fp32 oct3 tg8 at depth 190, 2 sequences: host"] == pytest.approx(
        1e3 * first.ms * first.count, rel=1e-3
    )
    assert len({e["id"] for e in events if e["ph"] in "sf"}) == 2, "arrows stay within their profile"


def test_a_trace_that_cannot_be_written_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "trace.json"
    folder.mkdir()
    with pytest.raises(OSError):
        profiling.write_trace(folder, [profile_on_fake_gpu(monkeypatch, GPU)], {})
    assert [*tmp_path.iterdir()] == [folder] and not [*folder.iterdir()]


def test_a_report_is_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads(json.dumps(profile_on_fake_gpu(monkeypatch, GPU).report()))
    assert "trace" not in report and report["parts"][0]["part"] == "attention"
    assert report["kernels"][0].keys() == {"name", "part", "calls", "us", "ms", "share"}
