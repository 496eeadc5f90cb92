"""Checks the Triton kernels on a GPU, then times decode attention at the size at which the OCTOPUS paper times its own.

    python scripts/gpu_check.py [--processes N] [--skip-shapes]

Checks: attention (decode and prefill, outputs and workspaces filled with NaN) against float64 attention over
`codec.decode`, for head dims x group sizes x lengths around page edges x formats, with filler in the batch and with key
means too; page encoding against the codecs; the step's kernels that go by rows against their references; the replay of
a CUDA graph, for which the map of rows changes, against the same calls made one by one; on a second GPU, if there is
one, while the first is current. Sequences own rows of the arena in no order, and rows of nobody are full of NaN. The
cases are spread over processes, because most of their time is compilation. Nothing is timed whose result is wrong.
Exit code 1 if anything differs.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import torch
from gpu_cases import (
    PAGE,
    SINK,
    WINDOW,
    arena_inputs,
    dense,
    error_of,
    make_case,
    workspace_for,
)
from torch import Tensor

from octo_run.kernels import AttentionSpec, attend, encode_pages, page_bytes
from octo_run.kernels import step as ops
from octo_run.kernels.codec import KVFormat, PageFormat, parse_kv
from octo_run.kernels.codec.rotation import rotation_matrix
from octo_run.kernels.step import reference

HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = (1, 4, 5, 7, 8)
TRELLIS = ("oct2", "oct3", "oct4")
FORMATS = (*TRELLIS, "octopus2", "octopus3", "octopus4", "bf16")
BEYOND_SINK = (0, 1, 63, 64, 65, 127, 128, 129, 1000)
PUBLISHED_MS = 0.55  # the paper's kernel: 4 KV heads, 28 query heads, 65,536 tokens, d = 128, 10 bits, one H200
BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 4e-3, torch.float32: 2e-5}  # bf16 outputs are themselves rounded to 2e-3


def check_attention(kv: str, dim: int, group: int, dtype: torch.dtype) -> list[tuple[str, float, float]]:
    """(name, error, bound) for decode and prefill of one shape and format."""
    name = f"{kv} d={dim} group={group} {str(dtype).removeprefix('torch.')}"
    decode = make_case(kv, [1, 2, SINK, *(SINK + n for n in BEYOND_SINK)], 1, group, 2, dim, dtype)
    results = [(f"decode {name}", error_of(decode), BOUNDS[dtype])]
    count = 37
    prefill = make_case(kv, [count + n for n in (0, *BEYOND_SINK, SINK + 1000)], count, group, 2, dim, dtype)
    return [*results, (f"prefill {name}", error_of(prefill), BOUNDS[dtype])]


def check_rows(kv: str, dim: int, group: int, mean: float) -> list[tuple[str, float, float]]:
    """Decode and prefill of batches with filler, alone and beside sequences, with a key mean or without."""
    dtype, results = torch.float16, []
    for lengths in ([0, 1100, 0, 0, 193, 64, 0, 700, 0], [0], [0, 0, 0], [0, 900]):
        for what, count in (("decode", 1), ("prefill", 37)):
            case = make_case(kv, [n + (count - 1 if n else 0) for n in lengths], count, group, 2, dim, dtype, mean)
            case.max_length = max(case.max_length, 2000)
            name = f"{what} {kv} d={dim} group={group} mean={mean:g} lengths {lengths}"
            results.append((name, error_of(case), 1.5 * BOUNDS[dtype] if mean else BOUNDS[dtype]))
    return results


def appended(
    run: Callable[..., None], qkv: Tensor, transform: ops.HeadTransform, rows: list[int], kv_heads: int
) -> list[Tensor]:
    """Queries, coefficients, and all of K and V as `run` leaves them: 7 where it wrote nothing."""
    d = 2 * transform.cos.shape[1]
    index = torch.tensor(rows, dtype=torch.int32, device="cuda")
    full = torch.full((2, len(rows) + 2, kv_heads, 9, d), 7.0, dtype=qkv.dtype, device="cuda")
    q = torch.full((len(rows), 1, qkv.shape[1] // d - 2 * kv_heads, d), float("nan"), dtype=qkv.dtype, device="cuda")
    found = torch.full_like(q, float("nan"), dtype=torch.float32)
    run(qkv, transform, torch.arange(len(rows), device="cuda").int() % 9, full[0], full[1], q, index, found)
    return [q[index >= 0], found[index >= 0], full[0], full[1]]


def check_step(dim: int, group: int, dtype: torch.dtype) -> list[tuple[str, float, float]]:
    """Queries, keys and values of a step by rows, and the way back of rotated values, against the references."""
    results, rows, kv_heads = [], [7, -1, 0, 3, -1, 5], 2
    live = [row >= 0 for row in rows]
    v_rotation = rotation_matrix(dim, 1).to("cuda", dtype).T.contiguous()
    shared = rotation_matrix(dim, 0).to("cuda", dtype).T.contiguous().expand(2, kv_heads, -1, -1)
    maps = (torch.randn(2, kv_heads, dim, dim, device="cuda") / dim**0.5).to(dtype)
    mean = torch.randn(kv_heads, dim, device="cuda")
    angles = torch.rand(len(rows), dim // 2, device="cuda") * 6
    norms = [(1 + 0.1 * torch.randn(dim, device="cuda")).to(dtype) for _ in range(2)]
    name = f"d={dim} group={group} {str(dtype).removeprefix('torch.')}"
    bound = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}[dtype]
    for keys, values, normed in itertools.product((shared, maps, None), (v_rotation, None), (norms, [None, None])):
        transform = ops.HeadTransform(angles.cos().to(dtype), angles.sin().to(dtype), *normed, 1e-5, keys, values, mean)
        qkv = torch.randn(len(rows), (group + 2) * kv_heads * dim, device="cuda").to(dtype)
        qkv[[not one for one in live]] = float("nan")
        ours, theirs = (
            appended(run, qkv, transform, rows, kv_heads) for run in (ops.qkv_rope_append, reference.qkv_rope_append)
        )
        error = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in
                    zip(ours, theirs, strict=True))  # fmt: skip
        touched = float(any(bool(((a != 7) != (b != 7)).any()) for a, b in zip(ours[2:], theirs[2:], strict=True)))
        how = "plain" if keys is None else "mapped" if keys is maps else "rotated"
        which = f"{name} K {how}, V rotated {values is not None}, normed {normed[0] is not None}"
        results += [(f"step append {which}", error, bound), (f"step append {which}: other slots touched", touched, 0.0)]
    mixed = torch.randn(3, 2 * group * dim, device="cuda").to(dtype)
    out = torch.full_like(mixed, float("nan"))
    ops.rotate_back(mixed, v_rotation, out)
    want = (mixed.double().view(-1, dim) @ v_rotation.double().T).view(3, -1)
    return [*results, (f"step rotate back {name}", float((out.double() - want).norm() / want.norm()), bound)]


def check_sampling(vocab: int) -> list[tuple[str, float, float]]:
    """Drawn tokens, counts and counters of a batch with filler against the reference: how many differ."""
    batch, results = 6, []
    logits = 3 * torch.randn(batch, vocab, device="cuda")
    logits[[1, 4]] = float("nan")
    floor = logits.nan_to_num().sort(descending=True).values[:, 9].contiguous()

    def fresh(counted: bool, noisy: bool) -> ops.Draws:
        ones = torch.ones(batch, device="cuda")
        return ops.Draws(
            rows=torch.tensor([7, -1, 0, 3, -1, 5], dtype=torch.int32, device="cuda"),
            temperature=torch.tensor([0.0, 1.0, 0.5, 1.0, 1.0, 2.0], device="cuda"),
            penalties=torch.stack((1.2 * ones, 0.5 * ones, 0.25 * ones)),
            seeds=torch.arange(batch, device="cuda") * 2**59, counters=torch.arange(batch, device="cuda"),
            counts=(torch.arange(8 * vocab, device="cuda").view(8, vocab) % 6).int(),
            slices=torch.full((batch, 4, -(-vocab // ops.SLICE_TOKENS)), float("nan"), device="cuda"),
            tokens=torch.full((8,), -1, dtype=torch.int32, device="cuda"),
            logprobs=torch.full((8,), 9.0, device="cuda"), counted=counted, noisy=noisy,
        )  # fmt: skip

    for counted, noisy, floored in itertools.product((False, True), repeat=3):
        ours, theirs = fresh(counted, noisy), fresh(counted, noisy)
        for _ in range(3):
            ops.sample(ours, logits, floor if floored else None)
            reference.sample(theirs, logits, floor if floored else None)
        different = sum(int((getattr(ours, name) != getattr(theirs, name)).sum())
                        for name in ("tokens", "counts", "counters"))  # fmt: skip
        name = f"step sample vocab={vocab} counted={counted} noisy={noisy} floored={floored}"
        results.append((f"{name}: differing", float(different), 0.0))
        results.append((f"{name}: log-probabilities", float((ours.logprobs - theirs.logprobs).abs().max()), 1e-4))
    return results


def check_second_card(kv: str) -> list[tuple[str, float, float]]:
    """Decode, prefill and append on cuda:1 while cuda:0 is current; nothing where there is one GPU."""
    if torch.cuda.device_count() < 2:
        return []
    results = []
    for what, count in (("decode", 1), ("prefill", 37)):
        case = make_case(kv, [1100, 0, 300], count, 4, 2, 128, torch.float16)
        moved = {name: x.to("cuda:1") for name, x in vars(case.kv).items() if isinstance(x, Tensor)}
        case = replace(case, q=case.q.to("cuda:1"), kv=replace(case.kv, **moved), want=case.want.to("cuda:1"))
        results.append((f"{what} {kv} on the second GPU", error_of(case), BOUNDS[torch.float16]))
    x, weight = torch.randn(3, 256, device="cuda:1"), torch.ones(256, device="cuda:1")
    out = torch.full_like(x, float("nan"))
    ops.add_rms_norm(x, None, weight, 1e-5, out)
    torch.cuda.synchronize(1)
    error = float((out - x * x.square().mean(-1, keepdim=True).add(1e-5).rsqrt()).abs().max())
    return [*results, ("step norm on the second GPU", error, 1e-4)]


def check_one_part(kv: str) -> list[tuple[str, float, float]]:
    """Decode in one part (no merge), and a batch so large that there is one part, and a prefill of many rows."""
    short = make_case(kv, [SINK], 1, 7, 1, 128, torch.float16)
    large = make_case(kv, [300] * 600, 1, 2, 2, 64, torch.float16)
    wide = make_case(kv, [1100, 517], 512, 4, 2, 128, torch.float16)
    cases = {"one part": short, "600 sequences": large, "prefill of 512": wide}
    return [(f"{what} {kv}", error_of(case), 2e-3) for what, case in cases.items()]


def check_portable(kv: str, dim: int) -> list[tuple[str, float, float]]:
    """Decode and prefill without the kernels' PTX: what GPUs run that have none."""
    from octo_run.kernels.attention import constants

    results = []
    for what, count in (("decode", 1), ("prefill", 37)):
        case = make_case(kv, [count, count + 129, count + 1000], count, 7, 2, dim, torch.float16)
        with mock.patch.object(constants, "ptx_immediates", return_value=None):
            results.append((f"{what} {kv} d={dim} portable", error_of(case), BOUNDS[torch.float16]))
    return results


def check_encode(kv: str, dim: int, dtype: torch.dtype) -> list[tuple[str, float, float]]:
    """Share of rows whose bytes differ from the codec's, and how MSEs compare.

    Such rows are vectors at a boundary between codes; there are none in the trellis formats.
    """
    fmt = parse_kv(kv, dim)
    source = torch.randn(2, 3, 5, PAGE, 2, dim, device="cuda").to(dtype).transpose(3, 4)  # [2, L, N, H, 64, d], strided
    source[:, 0, 0, 0, 5] = 0
    pages = torch.full((7, 4, 2, page_bytes(fmt)), 0xEE, dtype=torch.uint8, device="cuda")[:, 1:]
    ids = torch.tensor([6, 0, 3, 1, 5], device="cuda")
    encode_pages(source[0], source[1], pages, ids, fmt)
    page_format = PageFormat.on(fmt, pages.device)
    written, wanted = pages[ids].transpose(0, 1), page_format.encode_rotated(*source)
    rows = zip(page_format.rows(written), page_format.rows(wanted), strict=True)
    differing, errors = max(float((got != want).any(-1).double().mean()) for got, want in rows), []
    decoded = (page_format.decode_rotated(one, torch.float64) for one in (written, wanted))
    for x, *of_part in zip(source.double(), *decoded, strict=True):
        mse = [float((y - x).square().mean()) for y in of_part]
        errors.append(abs(mse[0] - mse[1]) / max(mse[1], 1e-30))
    untouched = float((pages[[2, 4]] != 0xEE).any())
    name = f"encode {kv} d={dim} {str(dtype).removeprefix('torch.')}"
    return [
        (f"{name}: rows that differ", differing, 0.0 if kv in TRELLIS else 5e-3),
        (f"{name}: MSE", max(errors), 1e-5),
        (f"{name}: other pages touched", untouched, 0.0),
    ]


def check_graph(kv: str) -> list[tuple[str, float, float]]:
    """Replays of one captured decode step, while the sequences grow, against eager calls: largest difference."""
    lengths = ([1000, 1070, 0], [70, 0, 140], [0, 700, 770], [1, 71, 5])
    cases = [make_case(kv, each, 1, 7, 4, 128, torch.float16) for each in lengths]
    slots = max(case.kv.pages.shape[0] for case in cases)
    first = cases[0]
    pages = torch.zeros(slots, *first.kv.pages.shape[1:], dtype=torch.uint8, device="cuda")
    kv_static = replace(first.kv, pages=pages, **{k: v.clone() for k, v in vars(first.kv).items() if k in MOVING})
    q, out, workspace = first.q.clone(), torch.empty_like(first.q), workspace_for(first.q, first.kv)
    width = kv_static.page_table.shape[1]

    def step() -> None:
        attend(q, kv_static, first.fmt, spec=AttentionSpec(0.1), max_length=4096, out=out, workspace=workspace)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_allocated()
        step()
        allocated = float(torch.cuda.memory_allocated() - before)
    worst = 0.0
    for case in cases:
        for name in MOVING:
            moved = getattr(case.kv, name)
            if name == "page_table":
                kv_static.page_table[:, : min(width, moved.shape[1])] = moved[:, :width]
            else:
                getattr(kv_static, name).copy_(moved)
        pages[: case.kv.pages.shape[0]] = case.kv.pages
        q.copy_(case.q)
        out.fill_(float("nan"))
        graph.replay()
        replayed = out.clone()
        out.fill_(float("nan"))
        step()
        worst = max(worst, float((replayed - out).abs().max()))
        worst = worst if bool(replayed.isfinite().all()) else float("nan")
    return [(f"graph replay {kv}", worst, 0.0), (f"bytes allocated in the graph {kv}", allocated, 0.0)]


MOVING = ("page_table", "rows", "num_packed", "starts", "tail_origin", "sink_k", "sink_v", "tail_k", "tail_v")


def run_task(task: tuple[str, tuple[object, ...]]) -> list[tuple[str, float, float]]:
    """One check in a worker process; a crash becomes a mismatch that carries its message."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # a kernel of an earlier check, which was reported, broke this process's CUDA context
        return [(f"{task[0]}{task[1]}: not run, the process has lost its GPU", float("nan"), 0.0)]
    torch.manual_seed(0)
    try:
        results: list[tuple[str, float, float]] = globals()[task[0]](*task[1])
    except Exception as problem:
        where = " < ".join(f"{f.name}:{f.lineno}" for f in reversed(traceback.extract_tb(problem.__traceback__)[-4:]))
        text = f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
        return [(f"{task[0]}{task[1]}: {text} ({where})", float("nan"), 0.0)]
    return results


def all_tasks(formats: list[str]) -> list[tuple[str, tuple[object, ...]]]:
    """Every check of `formats` as (function name, arguments), the ones that compile longest first."""
    shapes = itertools.product(reversed(HEAD_DIMS), GROUPS, formats)
    tasks: list[tuple[str, tuple[object, ...]]] = [
        ("check_attention", (kv, 512, group, torch.float16)) for group in (16, 5) for kv in TRELLIS
    ]
    tasks += [("check_rows", ("oct3", 512, 16, mean)) for mean in (0.0, 2.0)]
    tasks += [("check_attention", (kv, dim, group, torch.float16)) for dim, group, kv in shapes]
    tasks += [("check_attention", (kv, dim, 7, torch.bfloat16)) for kv in ("octopus3", "bf16") for dim in (64, 128)]
    tasks += [("check_attention", (kv, dim, 4, torch.float32)) for kv in ("octopus3", "bf16") for dim in (64, 128)]
    tasks += [("check_attention", (kv, 128, 7, torch.float16)) for kv in ("octopus4:octopus2", "octopus3:bf16")]
    tasks += [("check_attention", (kv, 256, 4, torch.float16)) for kv in ("octopus3:bf16", "bf16:octopus3")]
    tasks += [("check_attention", (kv, 112, 16, torch.float16)) for kv in ("octopus3", "bf16")]
    tasks += [("check_portable", (f"octopus{bits}", dim)) for bits in (2, 3, 4) for dim in (80, 128)]
    tasks += [("check_one_part", (kv,)) for kv in ("octopus3", "bf16")]
    tasks += [("check_encode", (kv, dim, torch.float32)) for kv in formats for dim in (*HEAD_DIMS, 112)]
    tasks += [("check_encode", ("octopus3:bf16", 128, torch.bfloat16)), ("check_graph", ("octopus3",))]
    tasks += [("check_attention", (kv, 128, 7, torch.bfloat16)) for kv in (*TRELLIS, "oct3:oct2", "oct3:bf16")]
    tasks += [("check_attention", (kv, d, 4, torch.float16)) for kv in ("oct4:oct2", "oct2:oct3") for d in (64, 256)]
    tasks += [("check_one_part", ("oct3",)), ("check_encode", ("oct4:oct3", 128, torch.bfloat16))]
    tasks += [("check_graph", (kv,)) for kv in ("oct3", "bf16")]
    tasks += [("check_rows", (kv, 128, 4, mean)) for kv in formats for mean in (0.0, 2.0)]
    tasks += [("check_rows", (kv, dim, 7, 0.0)) for kv in ("oct3", "octopus3", "bf16") for dim in (64, 256)]
    tasks += [("check_second_card", (kv,)) for kv in ("oct3", "octopus3", "bf16")]
    tasks = [task for task in tasks if set(str(task[1][0]).split(":")) <= set(formats)]
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    tasks += [("check_step", (dim, group, dtype)) for dim in HEAD_DIMS for group in (1, 7) for dtype in kinds]
    return [*tasks, *(("check_sampling", (vocab,)) for vocab in (50, 5001, 128256))]


def check_everything(processes: int, formats: list[str]) -> bool:
    """Run all checks, print what differs as it comes and a summary; True if nothing does."""
    began, results, bad, told = time.monotonic(), list[tuple[str, float, float]](), 0, 0
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=6) as pool:
        for part in pool.imap_unordered(run_task, all_tasks(formats), chunksize=1):
            results += part
            for name, error, bound in part:
                if not error <= bound:
                    bad += 1
                    print(f"MISMATCH {name}: {error:.3g} (at most {bound:g})", flush=True)
            if len(results) >= told + 100:
                told = len(results)
                print(f"{told} checks, {bad} differ, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    for kind in ("decode", "prefill", "encode", "step"):
        measured = [r for r in results if r[0].startswith(f"{kind} ") and r[2] > 0]
        for name, error, bound in sorted(measured, key=lambda r: r[1] / r[2])[-1:]:
            print(f"worst {kind}: {error:.3g} of {bound:g} allowed ({name})")
    print(f"{len(results) - bad} of {len(results)} checks passed in {time.monotonic() - began:.0f} s", flush=True)
    return not bad


def timer() -> torch.cuda.Event:
    """An event that keeps the time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def full_arena(fmt: KVFormat, tokens: int, kv_heads: int, layers: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Pages [P, layers, Hkv, bytes] of random vectors, one sequence; and milliseconds of encoding one layer's."""
    count = tokens // PAGE
    pages = torch.empty(count, layers, kv_heads, page_bytes(fmt), dtype=torch.uint8, device="cuda")
    ids, spent = torch.randperm(count, device="cuda"), []
    for layer in range(layers):
        source = torch.randn(2, 1, count, kv_heads, PAGE, fmt.k.head_dim, device="cuda").to(dtype)
        start, end = timer(), timer()
        start.record()
        encode_pages(source[0], source[1], pages[:, layer : layer + 1], ids, fmt)
        end.record()
        torch.cuda.synchronize()
        spent.append(start.elapsed_time(end))
    return pages, min(spent)


def replay_times(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    """Milliseconds of each replay."""
    times = []
    for _ in range(replays):
        start, end = timer(), timer()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times


@dataclass(frozen=True)
class Timing:
    """One row of the table; milliseconds of one call, GB/s of packed bytes read."""

    kv: str
    tokens: int
    bytes_per_vector: int
    median_ms: float
    min_ms: float
    max_ms: float
    gb_per_s: float
    encode_ms: float
    relative_error: float


def time_decode(kv: str, tokens: int = 65536, kv_heads: int = 4, group: int = 7, layers: int = 8) -> Timing:
    """One decode step at d = 128: the median of 100 replays of `layers` calls, each on pages of its own, per call."""
    fmt, dtype, dim = parse_kv(kv, 128), torch.bfloat16, 128
    pages, encode_ms = full_arena(fmt, tokens, kv_heads, layers, dtype)
    count = pages.shape[0]
    table = torch.randperm(count, device="cuda").to(torch.int32)[None]
    ends = [torch.tensor([x], dtype=torch.int32, device="cuda") for x in (0, count, SINK + tokens + 30, 0)]
    full = torch.randn(4, 1, kv_heads, SINK + WINDOW, dim, device="cuda").to(dtype)
    q = torch.randn(1, 1, kv_heads * group, dim, device="cuda").to(dtype)
    sinks, tails = full[:2, :, :, :SINK], full[2:]
    calls = [arena_inputs(pages[:, n], table, ends, sinks, tails) for n in range(layers)]
    out, workspace = torch.full_like(q, float("nan")), workspace_for(q, calls[0])
    length = SINK + tokens + 31

    def step(layer: int) -> None:
        attend(q, calls[layer], fmt, spec=AttentionSpec(dim**-0.5), max_length=length, out=out, workspace=workspace)

    step(0)
    stored = pages[:, 0][table[0].long()].transpose(0, 1)
    decoded = PageFormat.on(fmt, stored.device).decode_rotated(stored, torch.float64)
    new = [torch.cat((s[0].double(), d.flatten(1, 2), t[0, :, :31].double()), 1)
           for s, d, t in zip(sinks, decoded, tails, strict=True)]  # fmt: skip
    want = dense(q[0], new[0], new[1], length - 1, dim**-0.5)
    error = float((out[0].double() - want).norm() / want.norm())
    del decoded, new
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            step(layer)
    replay_times(graph, 10)
    times = [t / layers for t in replay_times(graph, 100)]
    moved = tokens * kv_heads * (fmt.k.bytes_per_vector + fmt.v.bytes_per_vector)
    median = statistics.median(times)
    return Timing(kv, tokens, fmt.k.bytes_per_vector, median, min(times), max(times), moved / median / 1e6, encode_ms,
                  error)  # fmt: skip


def main() -> int:
    """Check, time, print; the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=max(1, min(16, os.cpu_count() or 1)))
    parser.add_argument("--formats", default=",".join(FORMATS), help="the formats to check and time, with commas")
    parser.add_argument("--skip-shapes", action="store_true", help="only the timed size (which is checked, too)")
    args = parser.parse_args()
    formats = args.formats.split(",")
    if unknown := set(formats) - set(FORMATS):
        parser.error(f"unknown formats {', '.join(sorted(unknown))}: choose from {', '.join(FORMATS)}")
    if not torch.cuda.is_available():
        print("gpu_check needs a CUDA GPU.", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    good = args.skip_shapes or check_everything(args.processes, formats)
    if not good:
        return 1
    rows = [time_decode(kv, tokens) for tokens in (8192, 65536) for kv in formats]
    print("decode attention, one new token: B = 1, 4 KV heads, 28 query heads, d = 128 (medians of 100 graph replays)")
    print("tokens  format    B/vector  median ms  min     max     GB/s   encode ms  rel. error")
    for r in rows:
        print(
            f"{r.tokens:6}  {r.kv:8}  {r.bytes_per_vector:8}  {r.median_ms:9.4f}  {r.min_ms:.4f}  {r.max_ms:.4f}  "
            f"{r.gb_per_s:5.0f}  {r.encode_ms:9.3f}  {r.relative_error:.1e}"
        )
    for ours in (r for r in rows if r.bytes_per_vector == 56 and r.tokens == 65536):
        faster = PUBLISHED_MS / ours.median_ms
        print(f"published kernel, 56 bytes, 65536 tokens: {PUBLISHED_MS} ms; {ours.kv} here {faster:.1f}x faster")
    print(json.dumps([vars(r) for r in rows]))
    return 0 if all(r.relative_error < BOUNDS[torch.bfloat16] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
