"""Runs Gluon kernels written lane by lane (`lanes.py`, `hopper/decode.py`) on a CPU, without Triton.

Triton's interpreter knows neither Gluon nor PTX. Here the kernels' own source is run as Python over NumPy, one program
after the other, all threads of a program in step, with Triton's rules for types and the machine instructions of
`lanes.py` done by hand: matrix products of fragments, byte permutations, shuffles, asynchronous copies (which arrive
when they are waited for, not before), atomics. Device memory is one array in which every tensor's storage lies between
guards: an access outside is an error. A `Watch` finds threads that meet in shared memory without a barrier.
What all this cannot show: races in device memory, and what the compiler makes of the source.
"""

import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch

FLOATS = ("bf16", "f16", "f32", "f64")
HELD = {"i1": np.bool_, "u8": np.uint8, "u16": np.uint16, "i32": np.int32, "u32": np.uint32, "i64": np.int64}
HELD |= {"bf16": np.float32, "f16": np.float32, "f32": np.float32, "f64": np.float64}  # 16-bit floats in 32 bits
SIZES = {"i1": 1, "u8": 1, "u16": 2, "i32": 4, "u32": 4, "i64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
KINDS = {torch.uint8: "u8", torch.uint16: "u16", torch.int32: "i32", torch.int64: "i64", torch.bfloat16: "bf16"}
KINDS |= {torch.float16: "f16", torch.float32: "f32", torch.float64: "f64"}
RANKS = ("i1", "u8", "u16", "i32", "u32", "i64", "bf16", "f16", "f32", "f64")
GUARD = 4096
STALE = 0xCD  # bytes of shared memory that nobody wrote


def rounded(values: np.ndarray, kind: str) -> np.ndarray:
    """Floats rounded to the kind."""
    if kind in ("f32", "f64"):
        return values.astype(HELD[kind])
    there = torch.bfloat16 if kind == "bf16" else torch.float16
    return torch.from_numpy(np.array(values, np.float32)).to(there).to(torch.float32).numpy()


class Value:
    """A scalar or one element a thread, of a Triton type."""

    def __init__(self, data: Any, kind: str) -> None:
        self.data, self.kind = np.asarray(data, HELD[kind]), kind

    def to(self, kind: str, bitcast: bool = False) -> "Value":
        if bitcast:
            return Value(self.data.view(HELD[kind]), kind)
        if kind in FLOATS:
            return Value(rounded(self.data, kind), kind)
        if self.kind in FLOATS:
            return Value(self.data.astype(np.int64), kind)
        return Value(self.data.astype(np.int64).astype(HELD[kind]), kind)

    def __index__(self) -> int:
        return int(self.data)

    __int__ = __index__

    def __bool__(self) -> bool:
        return bool(self.data)

    def __neg__(self) -> "Value":
        return Value(-self.data, self.kind)


def kind_of(a: Any, b: Any) -> str:
    """The type in which Triton computes with both."""
    kinds = [x.kind for x in (a, b) if isinstance(x, Value)]
    if any(isinstance(x, float) for x in (a, b)) and not set(kinds) & set(FLOATS):
        kinds.append("f32")
    kind = max(kinds, key=RANKS.index)
    return "i32" if kind == "i1" and any(type(x) is int for x in (a, b)) else kind


def numbers(x: Any, kind: str) -> np.ndarray:
    """A value or a Python number as an array of the kind."""
    if isinstance(x, Value):
        return x.to(kind).data
    if kind in FLOATS:
        return np.asarray(x, HELD[kind])
    return np.asarray(x, np.int64).astype(HELD[kind])


def binary(function: Callable[[np.ndarray, np.ndarray], np.ndarray], kind: str | None = None) -> Any:
    def forward(a: Any, b: Any) -> Any:
        if isinstance(b, Pointer):
            return NotImplemented
        common = kind_of(a, b)
        return Value(function(numbers(a, common), numbers(b, common)), kind or common)

    return forward


def reverse(method: Any) -> Any:
    return lambda a, b: method(Value(numbers(b, kind_of(a, b)), kind_of(a, b)), a)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Division as C does it: toward zero."""
    if np.issubdtype(a.dtype, np.unsignedinteger):
        return a // b
    return (np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)).astype(a.dtype)


OPERATIONS: dict[str, Any] = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and}
OPERATIONS |= {"or": np.bitwise_or, "xor": np.bitwise_xor, "lshift": np.left_shift, "rshift": np.right_shift}
OPERATIONS |= {"floordiv": quotient, "mod": lambda a, b: (a - quotient(a, b) * b).astype(a.dtype)}
OPERATIONS |= {"truediv": np.divide}
for name, operation in OPERATIONS.items():
    setattr(Value, f"__{name}__", binary(operation))
    setattr(Value, f"__r{name}__", reverse(getattr(Value, f"__{name}__")))
for name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{name}__", binary(getattr(np, {"lt": "less", "le": "less_equal", "gt": "greater",
            "ge": "greater_equal", "eq": "equal", "ne": "not_equal"}[name]), "i1"))  # fmt: skip


class Pointer:
    """Byte addresses in device memory, and what lies there."""

    def __init__(self, at: np.ndarray, kind: str) -> None:
        self.at, self.kind = np.asarray(at, np.int64), kind
        self.dtype = types.SimpleNamespace(element_ty=kind)

    def __add__(self, steps: Any) -> "Pointer":
        return Pointer(self.at + numbers(steps, "i64") * SIZES[self.kind], self.kind)

    __radd__ = __add__


class Memory:
    """Device memory that holds copies of tensors' storages."""

    def __init__(self) -> None:
        self.bytes = np.zeros(0, np.uint8)
        self.valid = np.zeros(0, np.bool_)
        self._places: dict[int, tuple[int, torch.Tensor]] = {}

    def pointer(self, tensor: torch.Tensor) -> Pointer:
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8).set_(storage)
        if storage.data_ptr() not in self._places:
            start = -(-len(self.bytes) // 256) * 256 + GUARD
            grown = np.full(start + len(whole) + GUARD, STALE, np.uint8)
            grown[: len(self.bytes)] = self.bytes
            grown[start : start + len(whole)] = whole.numpy()
            valid = np.zeros(len(grown), np.bool_)
            valid[: len(self.valid)] = self.valid
            valid[start : start + len(whole)] = True
            self.bytes, self.valid = grown, valid
            self._places[storage.data_ptr()] = (start, whole)
        start = self._places[storage.data_ptr()][0]
        return Pointer(np.asarray(start + tensor.storage_offset() * tensor.element_size()), KINDS[tensor.dtype])

    def give_back(self) -> None:
        """Write everything back to the tensors."""
        for start, whole in self._places.values():
            whole.copy_(torch.from_numpy(self.bytes[start : start + len(whole)]))

    def read(self, at: np.ndarray, size: int) -> np.ndarray:
        """uint8 [..., size] at byte addresses; they must be multiples of the size."""
        where = at[..., None] + np.arange(size)
        assert (at % size == 0).all() and self.valid[where].all(), "a read outside of every tensor, or not aligned"
        return self.bytes[where]

    def write(self, at: np.ndarray, data: np.ndarray) -> None:
        where = at[..., None] + np.arange(data.shape[-1])
        assert (at % data.shape[-1] == 0).all() and self.valid[where].all(), "a write outside of every tensor"
        self.bytes[where] = data


def unpack(data: np.ndarray, kind: str) -> Value:
    """Bytes [..., size] as values."""
    if kind in ("bf16", "f16"):
        there = torch.bfloat16 if kind == "bf16" else torch.float16
        halves = torch.from_numpy(np.ascontiguousarray(data)).view(there)[..., 0]
        return Value(halves.to(torch.float32).numpy(), kind)
    return Value(np.ascontiguousarray(data).view(HELD[kind])[..., 0], kind)


def pack(value: np.ndarray, kind: str) -> np.ndarray:
    """Values as bytes [..., size]."""
    if kind in ("bf16", "f16"):
        there = torch.bfloat16 if kind == "bf16" else torch.float16
        return torch.from_numpy(np.array(value, np.float32)).to(there)[..., None].view(torch.uint8).numpy()
    return np.array(value, HELD[kind])[..., None].view(np.uint8)


class Program:
    """The running program: its number, its threads, its shared memory and the copies under way."""

    memory: Memory
    ids: tuple[int, ...]
    grid: tuple[int, ...]
    threads: int
    shared: np.ndarray
    groups: list[list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]]
    rounds: int
    watch: "Watch | None" = None

    def start(self, ids: tuple[int, ...], shared_bytes: int, watched: bool) -> None:
        self.ids = ids
        self.shared = np.full(shared_bytes, STALE, np.uint8)
        self.groups = [[]]
        self.rounds = 0
        self.watch = Watch(shared_bytes, self.threads) if watched else None


RUNNING = Program()


class Watch:
    """Remembers who read and wrote shared memory since which barrier; an access that may overtake another thread's is
    an error. Two bytes are a cell. Writing what is there already is no harm, whoever does it."""

    SEVERAL = -2  # readers, or warps of readers

    def __init__(self, shared_bytes: int, threads: int) -> None:
        cells = shared_bytes // 2
        self.warp_barriers = self.barriers = 1
        self.writer, self.reader, self.readers_warp = (np.full(cells, -1) for _ in range(3))
        self.written, self.read = np.zeros((2, cells), np.int64), np.zeros((2, cells), np.int64)  # at which barriers
        self._thread = np.arange(threads)[:, None]

    def _unordered(self, cells: np.ndarray, warp: np.ndarray, when: np.ndarray, thread: np.ndarray) -> np.ndarray:
        """Whether no barrier lies between an access at ``when`` by (a thread of) ``warp`` and one of ``thread`` now."""
        since = np.where(warp == thread // 32, when[0][cells] == self.warp_barriers, True)
        return since & (when[1][cells] == self.barriers)

    def on_read(self, at: np.ndarray, size: int) -> None:
        cells = at[:, None] // 2 + np.arange(size // 2)
        writer = self.writer[cells]
        by_another = (writer >= 0) & (writer != self._thread)
        bad = by_another & self._unordered(cells, writer // 32, self.written, self._thread)
        assert not bad.any(), f"a thread reads what another one writes, bytes {2 * cells[bad][:4]}"
        now = np.array([[self.warp_barriers], [self.barriers]])
        stale = self.read[1][cells] != self.barriers
        for owner, mine in ((self.reader, self._thread), (self.readers_warp, self._thread // 32)):
            before = np.where(stale, mine, owner[cells])
            owner[cells] = np.broadcast_to(mine, cells.shape)
            several = (owner[cells] != mine) | ((before != mine) & (before != -1))
            owner[cells[several]] = self.SEVERAL
        self.read[:, cells] = now[..., None]

    def on_write(
        self, at: np.ndarray, data: np.ndarray, begins: bool = False, threads: np.ndarray | None = None
    ) -> None:
        """Bytes ``data [threads, size]`` go to ``at``; ``begins``: a copy that may land at once, or later. ``threads``:
        whose they are, if not all threads'."""
        cells = at[:, None] // 2 + np.arange(data.shape[1] // 2)
        thread = self._thread if threads is None else threads[:, None]
        there = RUNNING.shared[2 * cells[..., None] + np.arange(2)].reshape(data.shape)
        new = (there != data).reshape(*cells.shape, 2).any(-1)
        writer, reader = self.writer[cells], self.reader[cells]
        bad = (writer >= 0) & (writer != thread) & self._unordered(cells, writer // 32, self.written, thread)
        by_another = (reader != -1) & (reader != thread)
        bad |= by_another & self._unordered(cells, self.readers_warp[cells], self.read, thread)
        assert not (bad & new).any(), f"a thread writes what another one uses, bytes {2 * cells[bad & new][:4]}"
        if begins:
            return
        self.writer[cells] = np.broadcast_to(thread, cells.shape)
        self.written[:, cells] = np.array([[[self.warp_barriers]], [[self.barriers]]])


def warp_barrier(_lane: Any = None) -> None:
    if RUNNING.watch is not None:
        RUNNING.watch.warp_barriers += 1


def barrier() -> None:
    warp_barrier()
    if RUNNING.watch is not None:
        RUNNING.watch.barriers += 1


def threads_of(x: Value) -> np.ndarray:
    return np.broadcast_to(x.data, (RUNNING.threads,))


def shared_read(address: Any, size: int, offset: int = 0) -> np.ndarray:
    at = np.broadcast_to(numbers(address, "u32"), (RUNNING.threads,)).astype(np.int64) + offset
    assert (at % size == 0).all() and (at + size <= len(RUNNING.shared)).all(), "a read outside shared memory"
    if RUNNING.watch is not None:
        RUNNING.watch.on_read(at, size)
    return RUNNING.shared[at[:, None] + np.arange(size)]


def shared_words(address: Any, count: int, offset: int = 0) -> tuple[Value, ...]:
    words = shared_read(address, 4 * count, offset).view(np.uint32)
    return tuple(Value(words[:, i].copy(), "u32") for i in range(count))


def write_shared_words(address: Value, values: list[Value], wanted: Value | None = None) -> None:
    size = 4 * len(values)
    at = threads_of(address).astype(np.int64)
    assert (at % size == 0).all() and (at + size <= len(RUNNING.shared)).all(), "a write outside shared memory"
    words = np.stack([threads_of(v) for v in values], -1).astype(np.uint32)
    data = np.ascontiguousarray(words).view(np.uint8)
    threads = np.arange(len(at)) if wanted is None else np.flatnonzero(threads_of(wanted))
    if RUNNING.watch is not None:
        RUNNING.watch.on_write(at[threads], data[threads], threads=threads)
    RUNNING.shared[at[threads, None] + np.arange(size)] = data[threads]


def read_scalars(_x: Any, at: int) -> tuple[Value, ...]:
    if RUNNING.watch is not None:
        RUNNING.watch.on_read(np.full(RUNNING.threads, at), 16)
    return tuple(Value(int(n), "i32") for n in RUNNING.shared[at : at + 16].view(np.int32))


def global_words(pointer: Pointer, count: int) -> tuple[Value, ...]:
    words = RUNNING.memory.read(np.broadcast_to(pointer.at, (RUNNING.threads,)), 4 * count).view(np.uint32)
    return tuple(Value(words[:, i].copy(), "u32") for i in range(count))


def copy16(address: Value, pointer: Pointer) -> None:
    at = threads_of(address).astype(np.int64)
    assert (at % 16 == 0).all() and (at + 16 <= len(RUNNING.shared)).all(), "a copy outside shared memory"
    data = RUNNING.memory.read(np.broadcast_to(pointer.at, (RUNNING.threads,)), 16).copy()
    if RUNNING.watch is not None:
        RUNNING.watch.on_write(at, data, begins=True)
    RUNNING.groups[-1].append((at, data, None))


def copy16_if(address: Value, pointer: Pointer, wanted: Value, _whole_lines: bool, there: Any = None) -> None:
    """In the threads that want it; zeros where nothing is there."""
    threads = np.flatnonzero(np.broadcast_to(wanted.data, (RUNNING.threads,)))
    at = threads_of(address).astype(np.int64)[threads]
    assert (at % 16 == 0).all() and (at + 16 <= len(RUNNING.shared)).all(), "a copy outside shared memory"
    data = np.zeros((len(threads), 16), np.uint8)
    read = np.ones(len(threads), bool) if there is None else np.broadcast_to(there.data, (RUNNING.threads,))[threads]
    source = np.broadcast_to(pointer.at, (RUNNING.threads,))[threads]
    assert (source % 16 == 0).all(), "a copy of bytes that are not aligned"
    if read.any():
        data[read] = RUNNING.memory.read(source[read], 16)
    if RUNNING.watch is not None:
        RUNNING.watch.on_write(at, data, begins=True, threads=threads)
    RUNNING.groups[-1].append((at, data, threads))


def wait_for_copies(_lane: Value, pending: int) -> None:
    """All groups that are closed but for the youngest of them."""
    done, RUNNING.groups = RUNNING.groups[: -1 - pending], RUNNING.groups[-1 - pending :]
    land(done)
    warp_barrier()


def warp_arrives(_lane: Value, at: int) -> None:
    """All warps run in step, so that they arrive together; a round is over at once."""
    RUNNING.rounds += 1
    barrier()


def wait_for_warps(turn: Value, at: int) -> None:
    assert (threads_of(turn) == (RUNNING.rounds + 1) % 2).all(), "a wait for a round that has not begun"


def land(groups: list[list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]]) -> None:
    for at, data, threads in (copy for group in groups for copy in group):
        if RUNNING.watch is not None:
            RUNNING.watch.on_write(at, data, threads=threads)
        RUNNING.shared[at[:, None] + np.arange(16)] = data


def wait_for_all_copies(_lane: Value) -> None:
    done, RUNNING.groups = RUNNING.groups, [[]]
    land(done)


def commit_copies(_lane: Value) -> None:
    RUNNING.groups.append([])


def arrive(counter: Pointer, last: Any) -> Value:
    barrier()
    found = unpack(RUNNING.memory.read(counter.at, 4), "u32")
    new = 0 if int(found) >= int(last) else int(found) + 1
    RUNNING.memory.write(counter.at, pack(np.asarray(new), "u32"))
    return Value(int(found), "i32")


def permute(a: Any, b: Any, selector: Any) -> Value:
    """PRMT: four bytes of eight, or their top bits spread."""
    words = np.stack([np.broadcast_to(numbers(x, "u32"), (RUNNING.threads,)) for x in (a, b)], -1)
    source = np.ascontiguousarray(words).view(np.uint8)
    chosen = np.broadcast_to(numbers(selector, "u32"), (RUNNING.threads,))
    out = np.zeros((RUNNING.threads, 4), np.uint8)
    for i in range(4):
        nibble = chosen >> (4 * i) & 15
        byte = np.take_along_axis(source, (nibble & 7)[:, None].astype(np.int64), 1)[:, 0]
        out[:, i] = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
    return Value(out.view(np.uint32)[:, 0].copy(), "u32")


def shuffle(x: Value, lane: Any) -> Value:
    source = np.broadcast_to(numbers(lane, "i32"), (RUNNING.threads,)).reshape(-1, 32) & 31
    return Value(np.take_along_axis(threads_of(x).reshape(-1, 32), source.astype(np.int64), 1).reshape(-1), x.kind)


def largest_of_warp(x: Value) -> Value:
    warps = threads_of(x).reshape(-1, 32)
    return Value(np.broadcast_to(warps.max(1, keepdims=True), warps.shape).reshape(-1), x.kind)


def operand(registers: list[Any], kind: str) -> np.ndarray:
    """Registers of fragments as [warps, 8 (g), 4 (t), registers, elements]."""
    words = np.stack([np.broadcast_to(numbers(r, "u32"), (RUNNING.threads,)) for r in registers], -1)
    data = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 8, 4, len(registers), 4)
    if kind == "i8":
        return data.view(np.int8).astype(np.float64)
    halves = data.reshape(*data.shape[:-1], 4 // 2, 2)
    return unpack(halves, kind).data.astype(np.float64)


def product(c: tuple[Any, ...], a: list[Any], b: list[Any], kind: str) -> tuple[Value, ...]:
    """mma.sync m16n8: C + A B from fragments (PTX ISA, fragments of m16n8k16 and m16n8k32)."""
    rows, columns = operand(a, kind), operand(b, kind)
    warps, per = rows.shape[0], rows.shape[-1]
    k = 4 * per * len(b)
    left = rows.reshape(warps, 8, 4, len(b), 2, per)  # g, t, half of K, upper or lower rows, element
    left = left.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, k)
    right = columns.transpose(0, 3, 2, 4, 1).reshape(warps, k, 8)  # half of K, t, element; g
    out = left @ right
    number = "i32" if kind == "i8" else "f32"
    parts = out.reshape(warps, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)  # g, t; half of rows, column
    return tuple(Value(parts[:, i].astype(HELD[number]) + numbers(c[i], number), number) for i in range(4))


def pack_half(low: Value, high: Value, kind: str) -> Value:
    both = np.concatenate([pack(threads_of(x), kind) for x in (low, high)], -1)
    return Value(np.ascontiguousarray(both).view(np.uint32)[:, 0].copy(), "u32")


def fma_half2(a: Value, b: Value, c: Value, kind: str) -> Value:
    """Exact, then rounded once."""
    x, y, z = (operand([v], kind)[..., 0, :].reshape(RUNNING.threads, 2) for v in (a, b, c))
    both = x * y + z
    return pack_half(Value(both[:, 0], "f64"), Value(both[:, 1], "f64"), kind)


def pack_half_finite(low: Value, high: Value) -> Value:
    top = float(np.finfo(np.float16).max)
    return pack_half(*(Value(np.clip(threads_of(x), -top, top), "f32") for x in (low, high)), "f16")


def half_of(word: Value, which: int) -> Value:
    return Value(np.ascontiguousarray(threads_of(word)).view(np.float16)[which::2].astype(np.float32), "f32")


def flushed(values: np.ndarray) -> np.ndarray:
    tiny = np.finfo(np.float32).tiny
    return np.where(np.abs(values) < tiny, np.float32(0), values).astype(np.float32)


def exp2(x: Value) -> Value:
    with np.errstate(under="ignore", over="ignore"):
        return Value(flushed(np.exp2(flushed(x.data))), "f32")


def log2(x: Value) -> Value:
    with np.errstate(divide="ignore"):
        return Value(np.log2(flushed(x.data)), "f32")


def halves_of(word: Value) -> np.ndarray:
    """The numbers of 16 bits in registers."""
    return np.ascontiguousarray(threads_of(word))[:, None].view(np.uint16)


def by_role(
    _number: Value, role: Value, function: Callable[..., Any], stage: Value, lane: Value, shape: tuple[int, ...]
) -> tuple[Value, ...]:
    """All warps take every branch; each thread has what its own one leaves."""
    found = [function(stage, lane, number, *shape) for number in range(4)]
    chosen = []
    for a, b, c, d in zip(*found, strict=True):
        chosen.append(where(role < 2, where(role == 0, a, b), where(role == 2, c, d)))
    return tuple(chosen)


INSTRUCTIONS: dict[str, Any] = {
    "barrier": barrier,
    "load_shared": lambda address, offset: shared_words(address, 1, offset)[0],
    "read_shared": lambda address: shared_words(address, 1)[0],
    "read_shared_f": lambda address: shared_words(address, 1)[0].to("f32", bitcast=True),
    "read_shared2": lambda address: shared_words(address, 2),
    "read_shared4": lambda address: shared_words(address, 4),
    "read_shared4_at": lambda address, offset: shared_words(address, 4, offset),
    "read_shared_half": lambda address: unpack(np.pad(shared_read(address, 2), ((0, 0), (0, 2))), "u32"),
    "write_shared": lambda address, value: write_shared_words(address, [value]),
    "write_shared4": lambda address, value: write_shared_words(address, [value] * 4),
    "load_global4": lambda pointer: global_words(pointer, 4),
    "load_global2": lambda pointer, _in_order=False: global_words(pointer, 2),
    "load_global_l2_f": lambda pointer: unpack(global_words(pointer, 1)[0].data.view(np.uint8).reshape(-1, 4), "f32"),
    "load_global4_l2": lambda pointer: global_words(pointer, 4),
    "write_shared4_if": lambda address, a, b, c, d, wanted: write_shared_words(address, [a, b, c, d], wanted),
    "read_scalars": read_scalars,
    "runs_among": lambda _x, _first, _end: True,
    "own_warp": lambda _: Value(0, "i32"),  # all warps run in step
    "own_warp_backwards": lambda _x, _warps: Value(0, "i32"),
    "has_role": lambda _x, _role, _roles: True,
    "by_role": by_role,
    "team_barrier": lambda _: barrier(),
    "write_shared_if": lambda address, value, wanted: write_shared_words(address, [value], wanted),
    "let_next_kernel_start": lambda _: Value(0, "i32"),
    "wait_for_kernel_before": lambda _: Value(0, "i32"),
    "sync_warp": warp_barrier,
    "arrive": arrive,
    "write_shared2": lambda address, a, b: write_shared_words(address, [a, b]),
    "write_shared4_of": lambda address, *words: write_shared_words(address, list(words)),
    "shift_pair": lambda low, high, places: Value(
        low.data >> np.uint32(places) | high.data << np.uint32(32 - places), "u32"
    ),
    "permute_bytes": permute,
    "permute_bytes_by": permute,
    "shuffle": shuffle,
    "shuffle_f": shuffle,
    "largest_of_warp": largest_of_warp,
    "mma_int8_32": lambda c, a0, a1, a2, a3, b0, b1: product(c, [a0, a1, a2, a3], [b0, b1], "i8"),
    "mma_int8_16": lambda c, a0, a1, b0: product(c, [a0, a1], [b0], "i8"),
    "mma_half_8": lambda c, a0, a1, b0: product(c, [a0, a1], [b0], "f16"),
    "mma_half": lambda c, a0, a1, a2, a3, b0, b1, kind: product(c, [a0, a1, a2, a3], [b0, b1], kind),
    "fma_half2": fma_half2,
    "pack_half": pack_half,
    "pack_half_finite": pack_half_finite,
    "low_half": lambda word: half_of(word, 0),
    "high_half": lambda word: half_of(word, 1),
    "max_halves": lambda a, b: Value(np.maximum(halves_of(a), halves_of(b)).view(np.uint32)[..., 0], "u32"),
    "exp2": exp2,
    "log2": log2,
    "reciprocal": lambda x: Value(flushed(1 / flushed(x.data)), "f32"),
}
COPIES: dict[str, Callable[..., Any]] = {
    "copy16": copy16,
    "commit_copies": commit_copies,
    "wait_for_all_copies": wait_for_all_copies,
    "copy16_if": copy16_if,
    "copy16_or_clear": lambda to, pointer, there, wanted, lines: copy16_if(to, pointer, wanted, lines, there),
    "wait_for_copies": wait_for_copies,
    "expect_warps": lambda _lane, _at, _count: None,
    "warp_arrives": warp_arrives,
    "wait_for_warps": wait_for_warps,
}


def load(pointer: Pointer, mask: Any = None, other: Any = 0, cache_modifier: str = "") -> Value:
    at = pointer.at
    if mask is None:
        return unpack(RUNNING.memory.read(at, SIZES[pointer.kind]), pointer.kind)
    keep = np.broadcast_to(mask.data, np.broadcast_shapes(at.shape, mask.data.shape))
    at = np.broadcast_to(at, keep.shape)
    safe = np.where(keep, at, at[keep][0] if keep.any() else 0)
    if not keep.any():
        return Value(np.full(keep.shape, other), pointer.kind)
    found = unpack(RUNNING.memory.read(safe, SIZES[pointer.kind]), pointer.kind)
    return Value(np.where(keep, found.data, numbers(other, pointer.kind)), pointer.kind)


def store(pointer: Pointer, value: Value, mask: Value) -> None:
    keep = np.broadcast_to(mask.data, (RUNNING.threads,))
    at, data = np.broadcast_to(pointer.at, keep.shape), threads_of(value.to(pointer.kind))
    RUNNING.memory.write(at[keep], pack(data[keep], pointer.kind))


def where(condition: Value, a: Any, b: Any) -> Any:
    if isinstance(a, Pointer):
        return Pointer(np.where(condition.data, a.at, b.at), a.kind)
    if not isinstance(a, Value) and not isinstance(b, Value):
        kind = "f32" if isinstance(a, float) or isinstance(b, float) else "i32"
    else:
        kind = kind_of(a, b)
    return Value(np.where(condition.data, numbers(a, kind), numbers(b, kind)), kind)


def counted(*ends: Any) -> Iterator[Value]:
    """Numbers of a loop that is one in the machine too."""
    return (Value(number, "i32") for number in range(*(int(end) for end in ends)))


class Smem:
    """The kernel's one allocation: the address that it stores to only names it."""

    def index(self, _i: int) -> "Smem":
        return self

    def store(self, _value: Value) -> None:
        pass

    def _keep_alive(self) -> None:
        pass


class Constexpr(int):
    """A constant of a module; also what annotates a constexpr argument."""


def language() -> types.ModuleType:
    """What stands for `triton.experimental.gluon.language`."""
    gl: Any = types.ModuleType("emulated_language")
    names = {"i1": "int1", "u8": "uint8", "u16": "uint16", "i32": "int32", "u32": "uint32", "i64": "int64"}
    names |= {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}
    for kind, name in names.items():
        setattr(gl, name, kind)
    gl.constexpr = Constexpr
    gl.static_range = range
    gl.barrier = lambda: None
    gl.load, gl.store, gl.where = load, store, where
    gl.maximum, gl.minimum = binary(np.maximum), binary(np.minimum)
    gl.sqrt = lambda x: Value(np.sqrt(x.data), x.kind)
    gl.arange = lambda first, end, layout: Value(np.arange(first, end), "i32")
    gl.full = lambda shape, value, kind, layout: Value(np.full(shape, value), kind)
    gl.program_id = lambda axis: Value(RUNNING.ids[axis], "i32")
    gl.num_programs = lambda axis: Value(RUNNING.grid[axis], "i32")
    gl.BlockedLayout = gl.SwizzledSharedLayout = lambda *parts: None
    gl.allocate_shared_memory = lambda kind, shape, layout: Smem()

    def static_assert(condition: bool) -> None:
        assert condition

    gl.static_assert = static_assert
    return gl


PACKAGE = "octo_run.kernels"
HOPPER = ("codewords", "full_precision", "mean_bias", "parts", "products", "tables", "decode")
HOPPER += ("wide_full_precision", "wide_words", "wide_products", "wide_parts", "wide_decode")
MODULES = ("lanes", "lane_copies", *(f"attention.hopper.{name}" for name in HOPPER), "encode.lane_search")
MODULES += (
    "linear.unpack",
    "linear.input_parts",
    "linear.digit_parts",
    "linear.streamed_parts",
    "linear.streamed_product",
    "experts.packed_product",
)


@contextmanager
def _in_place_of_triton() -> Iterator[None]:
    """Modules of that name are the emulation's while the kernels' source is read."""
    gluon: Any = types.ModuleType("triton.experimental.gluon")
    gluon.jit = lambda function=None, **_options: function if function is not None else lambda f: f
    gluon.language = language()
    jit: Any = types.ModuleType("triton.runtime.jit")
    jit.constexpr_function = lambda function: function
    names = {"triton": types.ModuleType("triton"), "triton.experimental": types.ModuleType("triton.experimental")}
    names |= {"triton.experimental.gluon": gluon, "triton.experimental.gluon.language": gluon.language}
    names |= {"triton.runtime": types.ModuleType("triton.runtime"), "triton.runtime.jit": jit}
    names |= {f"{PACKAGE}.{name}": None for name in MODULES}
    before = {name: sys.modules.get(name) for name in names}
    for name, module in names.items():
        if module is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = module
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def kernel_modules() -> dict[str, types.ModuleType]:
    """The kernels' modules, read anew over the emulation."""
    found = {}
    with _in_place_of_triton():
        for name in MODULES:
            path = (Path(__file__).parents[2] / "kernels").joinpath(*name.split(".")).with_suffix(".py")
            spec = util.spec_from_file_location(f"{PACKAGE}.{name}", path)
            assert spec is not None and spec.loader is not None
            module = util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            vars(module)["range"] = counted
            if name in ("lanes", "lane_copies"):
                for instruction, done in (INSTRUCTIONS if name == "lanes" else COPIES).items():
                    assert hasattr(module, instruction), instruction
                    setattr(module, instruction, done)
            found[name.split(".")[-1]] = module
    return found


class Kernel:
    """``kernel[grid](*arguments, **named)`` for the kernel function ``run``, its programs in random order; ``watched``:
    with a `Watch`, which takes its time."""

    def __init__(self, run: Callable[..., None], seed: int = 0, watched: bool = False) -> None:
        self.run, self._order, self._watched = run, np.random.default_rng(seed), watched
        self.launches: list[dict[str, Any]] = []

    def _passed(self, memory: Memory, name: str, value: Any) -> Any:
        """An argument as the kernel sees it: a pointer, a number of the machine, or a constexpr as it is."""
        if isinstance(value, torch.Tensor):
            return memory.pointer(value)
        if inspect.signature(self.run).parameters[name].annotation is not inspect.Parameter.empty:
            return value
        return Value(value, "f32" if isinstance(value, float) else "i32")

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **named: Any) -> None:
            for option in ("maxnreg", "launch_pdl"):
                named.pop(option, None)
            self.launches.append({"grid": grid, **named})
            memory = Memory()
            bound = inspect.signature(self.run).bind(*args, **named).arguments
            passed = {name: self._passed(memory, name, value) for name, value in bound.items()}
            RUNNING.memory, RUNNING.grid, RUNNING.threads = memory, grid, 32 * num_warps
            programs = [(i, j) for i in range(grid[0]) for j in range(grid[1])]
            self._order.shuffle(programs)
            for ids in programs:
                RUNNING.start(tuple(ids), 4 * named["SMEM_WORDS"], self._watched)
                self.run(**passed)
            memory.give_back()

        return launch
