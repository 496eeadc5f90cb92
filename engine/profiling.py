"""Where the time of a decode step or of a prompt goes: by part, by kernel, and as a trace that Perfetto opens.

PyTorch's profiler says which kernels ran and when (on a CPU: which of its operators). A recorded step holds no ranges
of the host, so on a GPU the part that a kernel belongs to follows from its name and, for products, from its place
between kernels whose names say it: :func:`assign_parts`. On a CPU the functions that make up a part are wrapped in
ranges while a profile is taken, and an operator belongs to the innermost one around it.

Every moment of the profiled time counts once: for one kernel, or as a gap, in which none ran (on a CPU: the time of
Python and of calling operators). Parts and gaps therefore sum to the wall-clock time.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import os
import random
import re
import tempfile
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, record_function

from octo_run import kernels
from octo_run.engine import benchmark
from octo_run.engine.arena import PAGE, Chunk
from octo_run.engine.key_means import KeyMeans
from octo_run.errors import OctoError
from octo_run.kernels import experts as routed
from octo_run.kernels import linear as packed_ops
from octo_run.kernels import recurrent
from octo_run.kernels import step as ops
from octo_run.kernels.cpu.native import COMPILED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from octo_run.engine.engine import Engine

ATTENTION, PROJECTIONS, MLP, HEAD, SAMPLING = "attention", "projections", "mlp", "head", "sampling"
#: Norms with their residual sums; RoPE, rotation and keys and values on their way into the arena; coding of full pages.
NORMS, APPEND, CODING = "norms", "rope and append", "page coding"
#: Convolution, delta rule and states of recurrent layers.
RECURRENT = "recurrent"
#: Embedding, angles, copies, state of the next step; time in which no kernel ran.
OTHER, GAPS = "other", "gaps"
PARTS = (ATTENTION, RECURRENT, PROJECTIONS, MLP, HEAD, SAMPLING, NORMS, APPEND, CODING, OTHER, GAPS)

_PRODUCT = "product"  # whose part follows from its place

#: What our kernels do, by the beginnings of their names.
KERNELS = {
    "add_rms_norm_kernel": NORMS,
    "angles_kernel": OTHER,
    "choose_kernel": MLP,
    "combine_kernel": MLP,
    "count_kernel": MLP,
    "norm_heads_kernel": NORMS,
    **{f"delta_{name}_kernel": RECURRENT for name in ("step", "heads", "block", "scan", "finish")},
    "dequantise_kernel": _PRODUCT,
    "down_vector_kernel": MLP,
    "embed_kernel": OTHER,
    "embed_packed_kernel": OTHER,
    "flash_kernel": ATTENTION,
    "gate_kernel": ATTENTION,
    "gate_up_vector_kernel": MLP,
    "general_decode_kernel": ATTENTION,
    "grouped_kernel": MLP,
    "lane_search_kernel": CODING,
    "merge_kernel": ATTENTION,
    "merge_places_kernel": ATTENTION,
    "move_on_kernel": SAMPLING,
    "octopus_pages_kernel": CODING,
    "pack_kernel": CODING,
    "packed_experts_kernel": MLP,
    "place_kernel": MLP,
    "plain_decode_kernel": ATTENTION,
    "plain_pages_kernel": CODING,
    "put_back_kernel": ATTENTION,
    "qkv_rope_append_kernel": APPEND,
    "rotate_back_kernel": PROJECTIONS,
    "router_kernel": MLP,
    "router_rows_kernel": MLP,
    "sample_merge_kernel": SAMPLING,
    "sample_slice_kernel": SAMPLING,
    "streamed_product_kernel": _PRODUCT,
    "swiglu_kernel": MLP,
    "table_decode_kernel": ATTENTION,
    "take_out_kernel": CODING,
    "trellis_kernel": CODING,
    "unpack_kernel": ATTENTION,
    "vector_kernel": _PRODUCT,
    "wide_decode_kernel": ATTENTION,
}
_LIBRARY_PRODUCT = re.compile(r"gemm|gemv|nvjet|cutlass|xmma|split_?k|dot_kernel", re.IGNORECASE)
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_REGION = "octo-run: profiled"

Event = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """A kernel or an operator, or a piece of one, in microseconds."""

    name: str
    part: str
    start: float
    end: float


@dataclass(frozen=True)
class PartTime:
    """Milliseconds of a part in one step or prompt, and its share of it."""

    part: str
    ms: float
    share: float


@dataclass(frozen=True)
class KernelTime:
    """A kernel in one part: calls in a step or prompt, microseconds of a call, milliseconds in all, share of it."""

    name: str
    part: str
    calls: float
    us: float
    ms: float
    share: float


@dataclass(frozen=True)
class Profile:
    """What steps or prompts spent their time on, as the mean of one.

    Attributes:
        weights: What they are stored as.
        unit: Step or prompt.
        count: How many of them there were.
        ms: Wall-clock time under the profiler, which is longer than without it.
        kernels: With the costliest first.
    """

    weights: str
    kv: str
    test: str
    depth: int
    batch: int
    unit: str
    count: int
    ms: float
    parts: list[PartTime]
    kernels: list[KernelTime]
    trace: list[Event] = dataclasses.field(repr=False)

    @property
    def title(self) -> str:
        """The case in words."""
        sequences = f", {self.batch} sequences" if self.batch > 1 else ""
        return f"{self.weights} {self.kv} {self.test} at depth {self.depth:,}{sequences}"

    def report(self) -> dict[str, Any]:
        """All but the trace, as plain values."""
        plain = dataclasses.asdict(dataclasses.replace(self, trace=[]))
        del plain["trace"]
        return plain


def profile(engine: Engine, test: tuple[str, int], *, depth: int, batch: int) -> Profile:
    """Profile one round of a test like those of ``benchmark.measure``, of at most 64 steps.

    64 steps, because one of them codes a page. Rounds that are not profiled come first: on a GPU kernels are compiled
    in the first one, and steps recorded in the second.

    Args:
        test: ``("pp" or "tg", tokens)``.

    Raises:
        OctoError: The profiler sees no kernel on the GPU.
    """
    kind, tokens = test
    played = min(tokens, PAGE) if kind == "tg" else tokens
    ids = random.Random(0).choices(benchmark.ordinary_ids(engine), k=max(tokens, batch))
    cuda = engine.device.type == "cuda"

    def run(clock: Callable[[Callable[[], None]], T]) -> T:
        return benchmark.run_round(engine, (kind, played), ids, depth=depth, batch=batch, clock=clock)

    for _ in range(2 if cuda else 1):
        run(lambda work: work())
    _record(engine.device, lambda: torch.zeros(1, device=engine.device))  # the profiler's own start
    with nullcontext() if cuda else _ranges(engine):
        events = run(functools.partial(_record, engine.device))
    region = next(e for e in events if e.get("cat") == "user_annotation" and e["name"] == _REGION)
    start, end = region["ts"], region["ts"] + region["dur"]
    if cuda:
        spans = on_gpu(events)
        if not spans:
            raise OctoError(
                f"PyTorch's profiler saw no kernel on {engine.device}: CUPTI is missing, or another profiler holds the"
                " GPU; run without --profile."
            )
        start, end = min(start, spans[0].start), max(end, *(s.end for s in spans))  # two clocks, a little apart
        pieces, calls = exclusive(spans), Counter((s.name, s.part) for s in spans)
    else:
        pieces, calls = on_cpu(events, region["tid"])
    unit, count = ("step", played) if kind == "tg" else ("prompt", batch)
    parts, lines = summarise(pieces, calls, end - start, count)
    return Profile(engine.plan.weight_format, engine.plan.kv, f"{kind}{tokens}", depth, batch, unit, count,
                   1e-3 * (end - start) / count, parts, lines, _trace(events, pieces, start, end))  # fmt: skip


def assign_parts(names: list[str]) -> list[str]:
    """The part that each kernel of a stream belongs to.

    Norms divide them into pieces of four kinds. With RoPE: a layer's projections, what brings keys and values into the
    arena, attention, coding of pages, the output's projection. With the delta rule: the same of a recurrent layer. With
    SwiGLU: its MLP. With none of these: the end of a step or prompt (the head, sampling) and the beginning of the next.

    Args:
        names: The kernels in order of their start.
    """
    parts: list[str] = []
    piece: list[str] = []
    for role in map(_role, names):
        if role == NORMS:
            parts += [*_piece(piece, first=not parts), NORMS]
            piece = []
        else:
            piece.append(role)
    return parts + _piece(piece, first=not parts)


def _role(name: str) -> str:
    """The part of one of our kernels, ``_PRODUCT``, or ``OTHER``."""
    name = name.removeprefix("void ")
    own = next((role for beginning, role in KERNELS.items() if name.startswith(beginning)), None)
    if own is not None:
        return own
    return _PRODUCT if _LIBRARY_PRODUCT.search(name) else OTHER


def _piece(roles: list[str], first: bool) -> list[str]:
    if MLP in roles:
        return [MLP] * len(roles)
    if RECURRENT in roles:
        return [PROJECTIONS if role == _PRODUCT else RECURRENT for role in roles]
    return _mixing(roles) if APPEND in roles else _between(roles, first)


def _mixing(roles: list[str]) -> list[str]:
    """Parts of the kernels between a layer's two norms."""
    turned, attended, coded = roles.index(APPEND), _last(roles, ATTENTION), _last(roles, CODING)
    parts = []
    for i, role in enumerate(roles):
        if i < turned:
            parts.append(PROJECTIONS)
        elif role in (APPEND, ATTENTION, CODING):
            parts.append(role)
        elif attended < i < coded:
            parts.append(CODING)  # means of a first page's keys
        else:
            parts.append(PROJECTIONS if role == _PRODUCT else APPEND)
    return parts


def _between(roles: list[str], first: bool) -> list[str]:
    """Parts of the kernels from the last norm of a step to the first one of the next; ``first``: of all kernels."""
    begin = len(roles) if first or _PRODUCT not in roles else roles.index(_PRODUCT)
    drawn = _last(roles, SAMPLING)
    sampling = roles.index(SAMPLING) if drawn >= 0 else len(roles)
    parts = []
    for i, role in enumerate(roles):
        if role in (SAMPLING, CODING):
            parts.append(role)
        elif role == _PRODUCT:
            parts.append(HEAD if begin <= i < sampling else CODING)  # the latter: means of a first page's keys
        else:
            parts.append(SAMPLING if begin < i < drawn else OTHER)
    return parts


def _last(roles: list[str], role: str) -> int:
    """Index of the last ``role``, -1 if there is none."""
    return max((i for i, other in enumerate(roles) if other == role), default=-1)


def on_gpu(events: list[Event]) -> list[Span]:
    """The kernels, copies and fills of a trace, in order of their start and with their parts."""
    found = sorted((e for e in events if e["ph"] == "X" and e.get("cat") in _ON_GPU), key=lambda e: float(e["ts"]))
    parts = assign_parts([e["name"] for e in found])
    return [Span(e["name"], part, e["ts"], e["ts"] + e["dur"]) for e, part in zip(found, parts, strict=True)]


def exclusive(spans: list[Span]) -> list[Span]:
    """``spans`` in order of their start, cut so that none overlaps another.

    Time in which several run belongs to the one that began first: a kernel that is launched early waits for the one in
    front of it. One that runs wholly within another's time gets none.
    """
    pieces, reached = [], float("-inf")
    for span in spans:
        if span.end > reached:
            pieces.append(dataclasses.replace(span, start=max(span.start, reached)))
            reached = span.end
    return pieces


def on_cpu(events: list[Event], thread: int) -> tuple[list[Span], Counter[tuple[str, str]]]:
    """What of a thread's time belongs to which operator.

    Time belongs to the innermost operator; an operator's part is that of the innermost range around it.

    Returns:
        Pieces that do not overlap, and calls by (name, part).
    """
    found = [e for e in events if e["ph"] == "X" and e["tid"] == thread]
    found = [e for e in found if _is_operator(e) or (e["cat"] == "user_annotation" and e["name"] in PARTS)]
    pieces: list[Span] = []
    calls: Counter[tuple[str, str]] = Counter()
    open_spans: list[tuple[Span, bool]] = []  # with whether it is an operator; the innermost last
    reached = 0.0

    def advance(to: float) -> None:
        nonlocal reached
        while open_spans:
            span, operator = open_spans[-1]
            end = min(span.end, to)
            if operator and end > reached:
                pieces.append(Span(span.name, span.part, reached, end))
            reached = max(reached, end)
            if span.end > to:
                break
            open_spans.pop()
        reached = max(reached, to)

    for event in sorted(found, key=lambda e: (e["ts"], -e["dur"])):
        advance(event["ts"])
        operator = _is_operator(event)
        part = (open_spans[-1][0].part if open_spans else OTHER) if operator else event["name"]
        open_spans.append((Span(event["name"], part, event["ts"], event["ts"] + event["dur"]), operator))
        if operator:
            calls[event["name"], part] += 1
    advance(float("inf"))
    return pieces, calls


def _is_operator(event: Event) -> bool:
    """Whether it is an operator of PyTorch's or a compiled kernel of ours."""
    return event["cat"] == "cpu_op" or str(event["name"]).startswith(COMPILED)


def summarise(
    pieces: list[Span], calls: Counter[tuple[str, str]], wall: float, count: int
) -> tuple[list[PartTime], list[KernelTime]]:
    """Times of parts and of kernels, as the mean of ``count``.

    A kernel's time and that of a call leave out what overlaps an earlier one.

    Args:
        pieces: They do not overlap.
        wall: In microseconds.

    Returns:
        The parts in the order of ``PARTS``, and the kernels, the costliest first.
    """
    times = dict.fromkeys(calls, 0.0)
    by_part = dict.fromkeys(PARTS, 0.0)
    for piece in pieces:
        times[piece.name, piece.part] += piece.end - piece.start
        by_part[piece.part] += piece.end - piece.start
    by_part[GAPS] = wall - sum(by_part.values())
    parts = [PartTime(p, 1e-3 * t / count, t / wall) for p, t in by_part.items() if t or p == GAPS]
    lines = [
        KernelTime(name, part, calls[name, part] / count, t / calls[name, part], 1e-3 * t / count, t / wall)
        for (name, part), t in times.items()
    ]
    return parts, sorted(lines, key=lambda line: -line.ms)


def write_trace(path: Path, profiles: list[Profile], about: dict[str, str]) -> None:
    """Write all profiles to one file in the Chrome trace format, which Perfetto opens; compressed if it ends in .gz.

    Each profile is processes of its own (its parts, the host's thread, the GPU) and begins at time 0. A file of this
    name is replaced, in one step.
    """
    events = [event for number, profile in enumerate(profiles) for event in _numbered(profile, number)]
    trace = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}
    text = json.dumps(trace, separators=(",", ":"))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with gzip.open(temporary, "wb") if path.suffix == ".gz" else temporary.open("wb") as file:
            file.write(text.encode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


#: Processes of a profile in the trace, with what their threads are called.
_PROCESSES = {"parts": "parts", "host": "thread", "GPU": "stream"}


def _numbered(profile: Profile, number: int) -> Iterator[Event]:
    """The profile's events in processes of their own, after the names of these."""
    names, threads = [*_PROCESSES], [*_PROCESSES.values()]
    for index, thread in sorted({(event["pid"], event["tid"]) for event in profile.trace}):
        pid = len(_PROCESSES) * number + index + 1
        name = f"{threads[index]} {thread}" if index else threads[index]
        for kind, args in (
            ("process_name", {"name": f"{profile.title}: {names[index]}"}),
            ("process_sort_index", {"sort_index": pid}),
            ("thread_name", {"name": name}),
        ):
            yield {"ph": "M", "name": kind, "pid": pid, "tid": thread, "args": args}
    for event in profile.trace:
        numbered = event | {"pid": len(_PROCESSES) * number + event["pid"] + 1}
        if "id" in event:
            numbered["id"] = (number << 32) + event["id"]  # arrows join what has one number
        yield numbered


def _trace(events: list[Event], pieces: list[Span], start: float, end: float) -> list[Event]:
    """What the profiler recorded between ``start`` and ``end``, and the parts, each from the beginning of its first
    kernel to the end of its last one in a row. Time is from ``start``, ``pid`` an index into ``_PROCESSES``."""
    inside = [e for e in events if e["ph"] in "Xstf" and isinstance(e["pid"], int) and start <= e["ts"] <= end]
    devices = {e["pid"] for e in inside if e.get("cat") in _ON_GPU}
    kept = [
        e | {"pid": 2 if e["pid"] in devices else 1, "ts": round(e["ts"] - start, 3)}
        for e in inside
        if e.get("cat") != "gpu_user_annotation"
    ]
    for operator in (e for e in kept if e.get("cat") == "cpu_op"):
        del operator["args"]  # numbers of the profiler's own, half of the file
    runs: list[Event] = []
    for piece in pieces:
        if runs and runs[-1]["name"] == piece.part:
            runs[-1]["dur"] = round(piece.end - start - runs[-1]["ts"], 3)
        else:
            ts, dur = round(piece.start - start, 3), round(piece.end - piece.start, 3)
            runs.append({"ph": "X", "cat": "part", "name": piece.part, "pid": 0, "tid": 1, "ts": ts, "dur": dur})
    return runs + kept


def _record(device: torch.device, work: Callable[[], object]) -> list[Event]:
    """The events of PyTorch's trace of ``work``, times in microseconds."""
    # Kineto writes of its start and stop to standard error; and where it detaches from a GPU after a profile, the next
    # one may see nothing (github.com/pytorch/kineto/pull/1554).
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    benchmark.wait(device)
    with torch.profiler.profile(activities=activities) as profiler, record_function(_REGION):
        work()
        benchmark.wait(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[Event] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


@contextmanager
def _ranges(engine: Engine) -> Iterator[None]:
    """Put ranges around what makes up the parts of steps and of prompts on a CPU."""
    decoder = engine.forward.decoder
    products = {id(decoder.head.weight): HEAD}
    for layer in decoder.layers:
        for part, linears in ((PROJECTIONS, layer.mixer.parts), (MLP, layer.mlp.parts)):
            products |= {id(linear.weight): part for linear in linears}
    wrapped: list[tuple[Any, str, Callable[..., str]]] = [
        (owner, name, functools.partial(_named, part)) for part, owners in _RANGES.items() for owner, name in owners
    ]
    for owner, name in ((ops, "linear"), (packed_ops, "packed_linear")):
        # Of an expert there is no matrix but where it is used.
        wrapped.append((owner, name, lambda _x, weight, *_: products.get(id(weight), MLP)))
    with ExitStack() as stack:
        for owner, name, part_of in wrapped:
            function = getattr(owner, name)
            stack.callback(setattr, owner, name, function)
            setattr(owner, name, _within(function, part_of))
        yield


_RANGES: dict[str, Iterable[tuple[Any, str]]] = {
    ATTENTION: [(kernels, "attend"), (ops, "gate")],
    RECURRENT: [(recurrent, "step"), (recurrent, "chunk")],
    MLP: [(ops, "swiglu"), (routed, "route"), (routed, "mix")],
    SAMPLING: [(ops, "sample")],
    NORMS: [(ops, "add_rms_norm"), (ops, "norm_heads")],
    APPEND: [(ops, "qkv_rope_append"), (Chunk, "attend")],
    CODING: [(kernels, "encode_pages"), (KeyMeans, "take_out")],
}


def _named(part: str, *_: Any, **__: Any) -> str:
    return part


def _within(function: Callable[..., Any], part_of: Callable[..., str]) -> Callable[..., Any]:
    """``function`` in a range with the name of its part."""

    @functools.wraps(function)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(part_of(*args, **kwargs)):
            return function(*args, **kwargs)

    return ranged
