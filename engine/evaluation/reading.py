"""Texts read by the token, at the speed of prompts: what a decode step would attend to, for many tokens at once.

A decode step reads what has left the window from coded pages. A prompt's chunk does not: its own tokens see each other
in full precision, however many they are. Here the pages that a chunk fills are coded first, layer by layer, and every
token then attends to sinks, coded pages and tail as its own decode step would find them. So it makes no difference how
many tokens are read at once, except for rounding.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from octo_run import kernels
from octo_run.engine import sequence as sequences
from octo_run.engine.arena import PAGE, Chunk, KVArena
from octo_run.engine.engine import MAX_SEQUENCES, Engine
from octo_run.engine.forward import Forward, buffer_bytes
from octo_run.engine.plan import CHUNK, MemoryPlan, free_memory
from octo_run.errors import UsageError
from octo_run.models.config import ModelConfig

#: The format that the others are compared with.
REFERENCE = "bf16"
#: Bytes that a slice of logits takes at most, by device (less where an eighth of what is free is less).
SLICE_BYTES = {"cuda": 2**29, "cpu": 2**26}
#: Bytes that comparing logits takes for each token and word: three numbers of float32, and the logits.
WORD_BYTES = 16
#: Of an engine's needs, what must be free beyond them before another one is loaded.
_SPARE = 2**28


class DecodedChunk(Chunk):
    """Tokens of one sequence that attend to what decode steps would, one after the other.

    Query tokens whose decode steps would find the same coded pages are a block: 64 of them, fewer where the chunk
    begins or ends, more at the beginning of a text. To attention every block is a sequence of its own, whose tail is a
    part of the staged keys and values.
    """

    reads_its_pages = True

    def __init__(self, arena: KVArena, sequence: sequences.Sequence, ids: list[int]) -> None:
        super().__init__(arena, sequence, ids)
        s, device = arena.shape, arena.pages.device
        assert sequence.packed == self._pages(self.start)
        self._blocks = []
        for first, count, tokens in self._runs():
            packed = self._pages(first)
            numbers = torch.arange(count, dtype=torch.int32, device=device)
            slot = PAGE * (packed - sequence.packed)
            capacity = min(s.ring, s.ring + s.chunk - slot - PAGE * (count - 1))
            lengths = (numbers + packed, PAGE * numbers + first, PAGE * (numbers + packed))
            self._blocks.append((first - self.start, count, tokens, numbers, lengths, slot, capacity))

    def _pages(self, position: int) -> int:
        """Packed pages before the step of the token at ``position``."""
        s = self.arena.shape
        return max(0, (position - s.sink - s.window) // PAGE)

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        """Blocks of equal length: the first one's position, how many, and their tokens."""
        s = self.arena.shape
        whole = max(s.sink + s.ring, self.start + (s.sink - self.start) % PAGE)
        if self.start < whole:
            yield self.start, 1, min(whole, self.end) - self.start
        count, rest = divmod(max(0, self.end - whole), PAGE)
        if count:
            yield whole, count, PAGE
        if rest:
            yield self.end - rest, 1, rest

    def attend(
        self,
        layer: int,
        q: Tensor,
        kv: Tensor,
        spec: kernels.AttentionSpec,
        workspace: Tensor | None,
        out: Tensor | None = None,
        coefficients: Tensor | None = None,
    ) -> Tensor:
        staging = self._stage(layer, kv)
        if layer in self.arena.shape.lent:
            self._lent[layer] = staging.clone()
        self._code(layer, staging)
        out = self._attend(layer, q, staging, spec, workspace, out, coefficients)
        self._keep(layer, staging)
        return out

    def _attend(
        self, layer: int, q: Tensor, tail: Tensor, spec: kernels.AttentionSpec, workspace: Tensor | None,
        out: Tensor | None, coefficients: Tensor | None,
    ) -> Tensor:  # fmt: skip
        a = self.arena
        out = torch.empty_like(q) if out is None else out
        whole = a.chunk_inputs(layer, self.row, tail, coefficients)
        for first, count, tokens, numbers, (packed, starts, origins), slot, capacity in self._blocks:
            taken = slice(first, first + count * tokens)
            queries, mixed = (x[0, taken].view(count, tokens, *x.shape[2:]) for x in (q, out))
            mean = whole.mean
            if mean is not None and coefficients is not None:
                mean = dataclasses.replace(mean, of_queries=coefficients[0, taken].view(queries.shape))
            inputs = dataclasses.replace(
                whole,
                page_table=whole.page_table.expand(count, -1),
                rows=numbers,
                num_packed=packed,
                starts=starts,
                sink_k=whole.sink_k.expand(count, -1, -1, -1),
                sink_v=whole.sink_v.expand(count, -1, -1, -1),
                tail_k=_overlapping(whole.tail_k, slot, count, capacity),
                tail_v=_overlapping(whole.tail_v, slot, count, capacity),
                tail_origin=origins,
                mean=mean,
            )
            bound = self.start + first + count * tokens
            kernels.attend(
                queries, inputs, a.formats[layer], spec=spec, max_length=bound, workspace=workspace, out=mixed
            )
        return out


def _overlapping(staged: Tensor, slot: int, count: int, capacity: int) -> Tensor:
    """``count`` tails of ``capacity`` slots that begin a page apart, of what is staged: ``[count, kv_heads, ., d]``."""
    _, heads, _, dim = staged.shape
    _, head, token, one = staged.stride()
    place = staged.storage_offset() + slot * token
    return staged.as_strided((count, heads, capacity, dim), (PAGE * token, head, token, one), place)


@dataclasses.dataclass(frozen=True)
class Piece:
    """The tokens ``first .. end - 1`` of text number ``text``."""

    text: int
    first: int
    end: int


def pack(lengths: Sequence[int], rows: int, step: int) -> list[list[Piece]]:
    """Divide texts into passes through the layers.

    Args:
        lengths: Of the texts, in tokens.
        rows: Tokens of a pass at most.
        step: Tokens of a text that are read at once, at most ``rows``.

    Returns:
        The pieces of each pass, no two of one text; a text's pieces come in order.
    """
    passes: list[list[Piece]] = []
    for first in range(0, max(lengths, default=0), step):
        room = 0
        for text, length in enumerate(lengths):
            if first >= length:
                continue
            piece = Piece(text, first, min(first + step, length))
            if piece.end - first > room:
                passes.append([])
                room = rows
            passes[-1].append(piece)
            room -= piece.end - first
    return passes


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a measurement is: tokens read (or codecs, tasks), all formats together, and those in all."""

    done: int
    to_do: int


def check_step(step: int | None, most: int) -> None:
    """Check tokens that are read at once; None: as many as fit.

    Raises:
        UsageError: They are not 1 to ``most``.
    """
    if step is not None and not 1 <= step <= most:
        raise UsageError(f"--step is {step}; give 1 to {most} tokens.")


def rows_at_once(plan: MemoryPlan, cfg: ModelConfig) -> int:
    """Tokens that a reader of an engine takes through the layers at once: a chunk, or several sequences' tokens."""
    shape = plan.shape
    rows = min(CHUNK[torch.device(plan.device).type], shape.sequences * shape.context)
    while rows > shape.chunk and buffer_bytes(cfg, rows, plan.dtype) > plan.free // 16:
        rows //= 2
    return max(rows, shape.chunk)


def _workspace_bytes(plan: MemoryPlan, cfg: ModelConfig) -> int:
    """Of attention, with every block of a chunk for a sequence."""
    blocks, length = -(-plan.shape.chunk // PAGE) + 1, plan.shape.context
    return max(
        kernels.attention_workspace_bytes(blocks, cfg.num_heads, *heads, plan.device, plan.shape.chunk, length)
        for heads in plan.shape.kinds
    )


def reader_bytes(plan: MemoryPlan, cfg: ModelConfig) -> int:
    """Bytes that a reader holds beside the plan of its engine."""
    rows = rows_at_once(plan, cfg)
    if rows <= plan.shape.chunk:
        return _workspace_bytes(plan, cfg)
    coefficients = 4 * math.prod(plan.shape.coefficients_shape(rows))
    return _workspace_bytes(plan, cfg) + buffer_bytes(cfg, rows, plan.dtype) + coefficients


def slice_rows(plan: MemoryPlan, cfg: ModelConfig) -> int:
    """Tokens whose logits are computed and compared at a time."""
    return max(1, min(SLICE_BYTES[torch.device(plan.device).type], plan.free // 8) // (WORD_BYTES * cfg.vocab_size))


def fits(plan: MemoryPlan, cfg: ModelConfig, free: int) -> bool:
    """Whether so many free bytes hold an engine of this plan, its reader and a slice of logits."""
    held = plan.total + reader_bytes(plan, cfg) + slice_rows(plan, cfg) * WORD_BYTES * cfg.vocab_size
    return max(held, plan.loading) <= free


class Reader:
    """Reads texts into sequences of an engine as decode steps would, and measures the time that it takes.

    Beside the engine's plan it holds attention's workspace for its blocks and, where several sequences are read at
    once, the buffers of the layers for ``rows`` tokens.
    """

    def __init__(self, engine: Engine, rows: int) -> None:
        self.engine = engine
        count = _workspace_bytes(engine.plan, engine.config)
        workspace = torch.zeros(count // 4, dtype=torch.float32, device=engine.device) if count else None
        if rows > engine.plan.shape.chunk:
            self._forward = Forward(engine.forward.decoder, engine.arena, rows, workspace)
        else:
            self._forward = copy.copy(engine.forward)
            self._forward.workspace = workspace
        self._clock = _Clock(engine.device)

    @property
    def tokens_per_s(self) -> float:
        """Tokens read per second of the device's work."""
        return self._clock.rate()

    @torch.inference_mode()
    def read(self, opened: Sequence[sequences.Sequence], texts: Sequence[list[int]], pieces: Sequence[Piece]) -> Tensor:
        """Read pieces of texts, each into the sequence of its text. Waits for nothing.

        Returns:
            Normed states ``[n, hidden]``, good until the next call.
        """
        arena = self.engine.arena
        self._clock.start()
        chunks = [DecodedChunk(arena, opened[p.text], texts[p.text][p.first : p.end]) for p in pieces]
        hidden = self._forward.chunks(list[Chunk](chunks))
        for chunk in chunks:
            chunk.commit()
        self._clock.stop(len(hidden))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[n, vocab]`` of normed states, in the compute dtype."""
        return self._forward.logits(hidden)


class _Clock:
    """Work of a device and the seconds that it takes there; on a GPU, measuring waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun: float | torch.cuda.Event = 0.0
        self._done, self._seconds = 0, 0.0
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] = []

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def start(self) -> None:
        """Work begins."""
        self._begun = self._mark() if self._device.type == "cuda" else time.perf_counter()

    def stop(self, amount: int) -> None:
        """So much was done since the start."""
        if isinstance(self._begun, float):
            self._done += amount
            self._seconds += time.perf_counter() - self._begun
        else:
            self._open.append((self._begun, self._mark(), amount))

    def rate(self) -> float:
        """What was done per second, as far as the device is through with it; 0 before that."""
        while self._open and self._open[0][1].query():  # type: ignore[no-untyped-call]
            first, last, amount = self._open.pop(0)
            self._done += amount
            self._seconds += first.elapsed_time(last) / 1000
        return self._done / self._seconds if self._seconds else 0.0


def sequences_at_once(device: torch.device, tokens: int) -> int:
    """Texts of so many tokens that are read together."""
    return max(1, min(MAX_SEQUENCES, CHUNK[device.type] // tokens))


def groups(load: Callable[[str], Engine], kvs: Sequence[str]) -> Iterator[list[tuple[str, Engine]]]:
    """The engines of ``bf16`` and of the other formats, as many at a time as fit into memory.

    Args:
        load: Gives the engine of a format. Those that it gives are closed here, but for the first.

    Yields:
        Formats with their engines, ``bf16``, which stays loaded, first.
    """
    reference = load(REFERENCE)
    waiting = [kv for kv in dict.fromkeys(kvs) if kv != REFERENCE]
    while True:
        group = [(REFERENCE, reference)]
        while waiting and (len(group) == 1 or _has_room(reference)):
            group.append((waiting[0], load(waiting[0])))
            del waiting[0]
        yield group
        for _, engine in group[1:]:
            engine.close()
        if not waiting:
            return


def _has_room(engine: Engine) -> bool:
    """Whether one more engine like this one fits."""
    return fits(engine.plan, engine.config, free_memory(engine.device) - _SPARE)
