"""Speed of a loaded engine: prompts and decode steps at given depths, and the machine's copy bandwidth beside them."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from octo_run.engine import system_memory
from octo_run.engine.energy import EnergyMeter
from octo_run.engine.sampling import SamplingParams
from octo_run.models.dense_and_experts import DenseAndExperts
from octo_run.models.experts import Experts

if TYPE_CHECKING:
    from collections.abc import Callable

    from octo_run.engine.engine import Engine

T = TypeVar("T")
#: ``("pp", N)``: read a prompt of N tokens; ``("tg", N)``: generate N; ``("pg", P, G)``: read P, then generate G.
Test = tuple[str, int] | tuple[str, int, int]


@dataclass(frozen=True)
class Row:
    """One measurement: tokens per second of all sequences together over the repetitions."""

    weights: str  # what they are stored as
    kv: str
    test: str  # pp: tokens of a prompt, tg: tokens generated, pg: both, one after the other
    depth: int  # tokens in the cache before
    batch: int
    tokens_per_s: float  # median
    mean: float
    stdev: float | None  # of the repetitions; None for one
    least: float
    most: float
    first_token_ms: float | None  # median time from the beginning to the first sequence's first token; None for tg
    ms_per_token: float  # of one sequence; of a prompt: milliseconds divided by its tokens
    gb_per_s: float | None  # tg: weights, states and packed pages that a step must read
    of_bandwidth: float | None  # the same, as a share of the copy bandwidth
    joules_per_token: float | None  # of the GPU, over all rounds; None without NVML or for less than a second


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second read and written together by the best of ten copies of 1 GiB (CPU: 256 MiB)."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source).zero_()
    best = min(_seconds(device, lambda: target.copy_(source)) for _ in range(10))
    return 2 * source.numel() / best


def forget_peak(device: torch.device) -> None:
    """Let the peak begin at what is held now: loading, earlier engines and measurements are no part of it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        system_memory.forget_peak()


def name_of(test: Test) -> str:
    """A test as it is written: ``pp512``, ``tg128``, ``pg512+128``."""
    return test[0] + "+".join(map(str, test[1:]))


def measure(
    engine: Engine,
    test: Test,
    *,
    depth: int,
    batch: int,
    repetitions: int,
    bandwidth: float,
    on_round: Callable[[], None] | None = None,
) -> Row:
    """Time a test of ``batch`` sequences that hold ``depth`` random tokens each.

    One round that is not counted warms up. Prompts of several sequences are read one after the other.

    Args:
        bandwidth: Bytes per second, as :func:`copy_bandwidth` gives them.
        on_round: Called after each round, the one that warms up too.
    """
    kind, tokens = test[0], sum(test[1:])
    source, ordinary = random.Random(0), ordinary_ids(engine)
    seconds, energy, meter = [], [], EnergyMeter(engine.device)
    first: list[float] = []  # seconds until the first token of each round
    begun = 0.0

    def clock(work: Callable[[], None]) -> None:
        nonlocal begun
        before = meter.joules()
        begun = time.perf_counter()
        seconds.append(_seconds(engine.device, work))
        after = meter.joules()
        energy.append(None if before is None or after is None else after - before)

    def have_first() -> None:
        first.append(time.perf_counter() - begun)

    for _ in range(repetitions + 1):
        ids = source.choices(ordinary, k=max(tokens, batch))
        run_round(engine, test, ids, depth=depth, batch=batch, clock=clock, on_first=have_first)
        if on_round is not None:
            on_round()
    rates = sorted(batch * tokens / taken for taken in seconds[1:])
    median = statistics.median(rates)
    spent = [joules for joules in energy[1:] if joules is not None]
    joules = None
    if len(spent) == repetitions and sum(seconds[1:]) >= 1:  # the driver's counter is too coarse for less
        joules = sum(spent) / (batch * tokens * repetitions)
    gb_per_s = share = None
    if kind == "tg":
        held = batch * (engine.plan.bytes_read(depth + tokens / 2) + _state_bytes(engine))
        read = (step_weight_bytes(engine, batch) + held) * median / batch
        gb_per_s, share = read * 1e-9, read / bandwidth
    return Row(
        weights=engine.plan.weight_format,
        kv=engine.plan.kv,
        test=name_of(test),
        depth=depth,
        batch=batch,
        tokens_per_s=median,
        mean=statistics.mean(rates),
        stdev=statistics.stdev(rates) if len(rates) > 1 else None,
        least=rates[0],
        most=rates[-1],
        first_token_ms=1e3 * statistics.median(first[1:]) if first else None,
        ms_per_token=1e3 * batch / median,
        gb_per_s=gb_per_s,
        of_bandwidth=share,
        joules_per_token=joules,
    )


def ordinary_ids(engine: Engine) -> list[int]:
    """The token ids that a random prompt is drawn from."""
    return [i for i in range(engine.config.vocab_size) if i not in engine.tokenizer.special_ids]


def run_round(
    engine: Engine,
    test: Test,
    ids: list[int],
    *,
    depth: int,
    batch: int,
    clock: Callable[[Callable[[], None]], T],
    on_first: Callable[[], None] | None = None,
) -> T:
    """One round of a test: fill ``batch`` sequences to ``depth`` tokens, then hand the work to ``clock``, to be called.

    Every step is launched before the one in front of it is read.

    Args:
        ids: The prompt, or the first token of each sequence.
        on_first: Called when the first sequence has read its prompt and its first token is there (not for ``tg``).

    Returns:
        What ``clock`` returns.
    """
    kind = test[0]
    steps = test[-1] - (kind == "pg")  # the prompt gives the first of a pg test's tokens
    step, sequences = engine.step, [engine.sequence() for _ in range(batch)]

    def read_prompts() -> None:
        for sequence in sequences:
            logits = engine.prefill(sequence, ids[: test[1]])
            if kind == "pg" or (on_first is not None and sequence is sequences[0]):
                token = int(logits.argmax())
                if on_first is not None and sequence is sequences[0]:
                    on_first()
                if kind == "pg":
                    step.start(sequence, token, SamplingParams(temperature=0.0))

    def read_and_run() -> None:
        read_prompts()
        run_steps()

    def read() -> None:
        for sequence in sequences:
            step.read(sequence)

    def run_steps() -> None:
        if not steps:
            return
        step.launch(sequences)
        for _ in range(steps - 1):
            step.launch(sequences)
            read()
        read()

    try:
        for seed, sequence in enumerate(sequences):
            engine.fill(sequence, depth, seed=seed)
        if kind == "pp":
            return clock(read_prompts)
        if kind == "pg":
            return clock(read_and_run)
        for sequence, token in zip(sequences, ids, strict=False):
            step.start(sequence, token, SamplingParams(temperature=0.0))
        return clock(run_steps)
    finally:
        for sequence in sequences:
            sequence.discard()


def step_weight_bytes(engine: Engine, batch: int = 1) -> int:
    """Bytes of weights that a decode step of ``batch`` sequences reads: all but an embedding that is not the output
    layer too, and of routed experts those that are chosen (of several sequences as many as chance would choose)."""
    decoder = engine.forward.decoder
    apart = 0 if decoder.head.weight is decoder.embedding else decoder.embedding.nbytes
    unread = sum(
        layer.mlp.unread_bytes(batch) for layer in decoder.layers if isinstance(layer.mlp, (Experts, DenseAndExperts))
    )
    return engine.plan.weights - apart - round(unread)


def _state_bytes(engine: Engine) -> int:
    """Bytes of a sequence's recurrent states."""
    states = engine.plan.shape.recurrent
    return 0 if states is None else states.state_bytes(engine.dtype.itemsize)


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Wall-clock seconds of a call, the device's work included."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
