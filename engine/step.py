"""The decode step: one token for each sequence, from embedding to sampling, recorded as CUDA graphs and replayed.

A recorded step takes nothing from the host: tokens, positions, slots, lengths, seeds and counters lie on the device and
the step itself moves them on, so that the next step can be launched before the host has read the token of this one.
There is a graph for every bucket of sequences and bound on lengths (``arena.length_bound``): the first step of its kind
runs as it is, which compiles its kernels, the second is recorded. Coding full pages happens between steps, on the same
stream, recorded too. On a CPU every step runs as it is.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from octo_run.engine.arena import length_bound
from octo_run.engine.forward import Forward
from octo_run.engine.sampling import BatchSampler, SamplingParams
from octo_run.errors import OctoError, UsageError

#: Steps that may be launched and not yet read.
AHEAD = 8


def batch_buckets(sequences: int) -> list[int]:
    """Numbers of sequences that steps are recorded for: powers of two, and all of them."""
    return sorted({1 << i for i in range(sequences.bit_length())} | {sequences})


class DecodeStep:
    """Steps of the first sequences of an arena: :meth:`start`, then :meth:`launch` and :meth:`read` in turn, at most
    ``AHEAD`` launches ahead of the reads."""

    def __init__(self, forward: Forward, sampler: BatchSampler) -> None:
        self.forward, self.arena, self.sampler = forward, forward.arena, sampler
        arena, device = forward.arena, forward.arena.pages.device
        sequences, cfg = arena.shape.sequences, forward.decoder.cfg
        self._cuda = device.type == "cuda"
        self.logits = torch.zeros(sequences, cfg.vocab_size, dtype=arena.shape.dtype, device=device)
        self._active = torch.zeros(sequences, dtype=torch.int32, device=device)
        self._results = [_Result(sampler.drawn, self._cuda) for _ in range(AHEAD)]
        self._unread: deque[tuple[_Result, int]] = deque()  # with the number of tokens that the launch fed: 0 or 1
        self._next = 0
        self._batch = self._bucket = 0
        self._recorder = _Recorder(device, arena.shape.dtype) if self._cuda else None

    @torch.inference_mode()
    def start(self, tokens: list[int], params: list[SamplingParams], seen: list[list[int]] | None = None) -> None:
        """Begin steps of the first ``len(tokens)`` sequences, whose last tokens (not yet in the cache) are given.

        ``seen[i]`` are the tokens that sequence i's repetition penalty counts, the last one included (default: it
        alone). Raises ``UsageError`` for more sequences than the arena has.
        """
        self.prepare(params, [[token] for token in tokens] if seen is None else seen)
        self.sampler.tokens[: len(tokens)].copy_(self.forward.upload(tokens))

    @torch.inference_mode()
    def prepare(self, params: list[SamplingParams], seen: list[list[int]], drawn: int = 0) -> None:
        """Set the sampling of the first ``len(params)`` sequences, which have ``drawn`` tokens drawn already."""
        batch, sequences = len(params), self.arena.shape.sequences
        if not 1 <= batch <= sequences:
            raise UsageError(f"{batch} sequences were asked for; the engine was loaded for 1 to {sequences}.")
        self.cancel()
        self._batch = batch
        self._bucket = next(size for size in batch_buckets(sequences) if size >= batch)
        self.sampler.set(params, seen, drawn)
        self._active.zero_()
        self._active[:batch].fill_(1)
        self.arena.set_state(0, [self.arena.decode_state(seq) for seq in range(self._bucket)])

    @torch.inference_mode()
    def first(self, normed: Tensor) -> None:
        """Draw the first tokens from the states ``[batch, hidden]`` of the prompts' ends; read them like a step's."""
        self.sampler.draw(self.forward.logits(normed, self.logits[: len(normed)]))
        self._queue(0)

    @torch.inference_mode()
    def launch(self) -> None:
        """One step for all sequences of :meth:`start`. Waits for nothing.

        Raises ``UsageError`` before a :meth:`start`, if a sequence is full, or if ``AHEAD`` launches are unread.
        """
        arena = self.arena
        if not self._batch:
            raise UsageError("No sequence has been started: start the steps first.")
        if len(self._unread) == AHEAD:
            raise UsageError(f"{AHEAD} steps are launched and unread: read one first.")
        if max(arena.length[: self._batch]) >= arena.shape.context:
            raise UsageError(f"A sequence has reached the context of {arena.shape.context:,} tokens: no step follows.")
        for seq in range(self._bucket):
            if arena.ring_is_full(seq):
                self._flush(seq)
        bucket, bound = self._bucket, length_bound(max(arena.length[: self._bucket]) + 1, arena.shape.context)
        self._run((bucket, bound, self.sampler.kind), lambda: self._step(bucket, bound))
        for seq in range(self._batch):
            arena.length[seq] += 1
        self._queue(1)

    def read(self) -> list[tuple[int, float]]:
        """Token and log-probability of each sequence from the oldest unread launch; waits for it alone.

        Raises ``OctoError`` for logits that are not finite and ``UsageError`` if there is nothing to read.
        """
        if not self._unread:
            raise UsageError("There is no step to read: launch one first.")
        result, _ = self._unread[0]
        drawn = result.wait()[: self._batch]
        self._unread.popleft()
        if not all(math.isfinite(logprob) for _, logprob in drawn):
            raise OctoError("The model's logits are not finite; choose another --dtype, or check the model's files.")
        return drawn

    def cancel(self) -> None:
        """Forget what was launched and not read: the sequences are as if it had not been."""
        fed = sum(count for _, count in self._unread)
        self._unread.clear()
        if fed:
            for seq in range(self._batch):
                self.arena.truncate(seq, self.arena.length[seq] - fed)
        self._batch = 0

    def _queue(self, fed: int) -> None:
        result = self._results[self._next]
        self._next = (self._next + 1) % AHEAD
        result.copy(self.sampler.drawn)
        self._unread.append((result, fed))

    def _run(self, key: Hashable, work: Callable[[], None]) -> None:
        if self._recorder is None:
            work()
        else:
            self._recorder.run(key, work)

    def _step(self, batch: int, bound: int) -> None:
        """The whole step on the device; then its state is that of the next one."""
        normed = self.forward.step(self.sampler.tokens[:batch], bound)
        self.sampler.draw(self.forward.logits(normed, self.logits[:batch]))
        shape, state = self.arena.shape, self.arena.state[:, :batch]
        position = state[0].add_(self._active[:batch])
        torch.where(position < shape.sink, position, (position - shape.sink) % shape.ring + shape.sink, out=state[3])

    def _flush(self, seq: int) -> None:
        """Code the sequence's oldest page of the ring."""
        arena = self.arena
        slot = arena.oldest_slot(seq)
        pages = arena.take_pages(seq, 1)
        arena.learn_means(seq, slot)

        def code() -> None:
            packed = arena.state[1, seq : seq + 1]
            arena.code_slots(seq, slot, arena.page_table[seq].index_select(0, packed))
            packed.add_(1)

        self._run(("page", seq, slot), code)
        arena.add_pages(seq, pages)


class _Result:
    """A place in the host's memory for what a step drew, and the event that says it has come."""

    def __init__(self, drawn: Tensor, cuda: bool) -> None:
        self._host = torch.zeros(drawn.shape, dtype=drawn.dtype, pin_memory=cuda)
        self._event = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]

    def copy(self, drawn: Tensor) -> None:
        """Fetch ``drawn``, int32 ``[2, sequences]``: tokens and the bits of log-probabilities in float32."""
        self._host.copy_(drawn, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def wait(self) -> list[tuple[int, float]]:
        """(token, log-probability) of every sequence."""
        if self._event is not None:
            self._event.synchronize()
        return list(zip(self._host[0].tolist(), self._host[1].view(torch.float32).tolist(), strict=True))


@functools.cache
def _recording_stream(index: int) -> torch.cuda.Stream:
    """The stream that steps are recorded on, one for each device: the matrix-product library never gives back the
    workspace that it takes for a stream, so that every engine with one of its own would leave 32 MiB behind."""
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


class _Recorder:
    """Runs pieces of work by key: the first time as they are, then from a CUDA graph; all graphs share one pool."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _recording_stream(torch.cuda.current_device() if device.index is None else device.index)
        one = torch.zeros(16, 16, dtype=dtype, device=device)
        for stream in (torch.cuda.current_stream(device), self._stream):
            with torch.cuda.stream(stream):
                torch.mm(one, one)  # the library takes its workspace for a stream now, not while it is recorded

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        if key not in self._graphs:
            work()
            self._graphs[key] = None
            return
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = self._record(work)
        graph.replay()

    def _record(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Unlike ``torch.cuda.graph`` it neither waits for the device nor empties caches."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph
