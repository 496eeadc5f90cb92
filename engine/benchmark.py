"""Speed of a loaded engine: prompts and decode steps at given depths, and the machine's copy bandwidth beside them."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from octo_run.engine.energy import EnergyMeter
from octo_run.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable

    from octo_run.engine.engine import Engine


@dataclass(frozen=True)
class Row:
    """One measurement: tokens per second of all sequences together as median, least and most over the repetitions."""

    kv: str
    test: str  # pp: tokens of a prompt, tg: tokens generated
    depth: int  # tokens in the cache before
    batch: int
    tokens_per_s: float
    least: float
    most: float
    ms_per_token: float  # of one sequence; of a prompt: milliseconds divided by its tokens
    gb_per_s: float | None  # tg: weights and packed pages that a step must read
    of_bandwidth: float | None  # the same, as a share of the copy bandwidth
    joules_per_token: float | None  # of the GPU, over all rounds; None without NVML or for less than a second


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second read and written together by the best of ten copies of 1 GiB (CPU: 256 MiB)."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source).zero_()
    best = min(_seconds(device, lambda: target.copy_(source)) for _ in range(10))
    return 2 * source.numel() / best


def forget_peak(device: torch.device) -> None:
    """Let the allocator's peak begin at what is allocated now: earlier engines and measurements are not this one's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measure(
    engine: Engine, test: tuple[str, int], *, depth: int, batch: int, repetitions: int, bandwidth: float
) -> Row:
    """Time ``("pp" or "tg", tokens)`` for ``batch`` sequences that hold ``depth`` random tokens each.

    One round that is not counted warms up. Prompts of several sequences are read one after the other.
    """
    kind, tokens = test
    source = random.Random(0)
    ordinary = [i for i in range(engine.config.vocab_size) if i not in engine.tokenizer.special_ids]
    seconds, energy, meter = [], [], EnergyMeter(engine.device)
    for _ in range(repetitions + 1):
        for seq in range(batch):
            engine.fill(seq, depth, seed=seq)
        ids = source.choices(ordinary, k=max(tokens, batch))
        before = meter.joules()
        seconds.append(_prompts(engine, ids[:tokens], batch) if kind == "pp" else _steps(engine, ids[:batch], tokens))
        after = meter.joules()
        energy.append(None if before is None or after is None else after - before)
    rates = sorted(batch * tokens / taken for taken in seconds[1:])
    median = statistics.median(rates)
    spent = [joules for joules in energy[1:] if joules is not None]
    joules = None
    if len(spent) == repetitions and sum(seconds[1:]) >= 1:  # the driver's counter is too coarse for less
        joules = sum(spent) / (batch * tokens * repetitions)
    gb_per_s = share = None
    if kind == "tg":
        held = batch * engine.plan.bytes_per_token * (depth + tokens / 2)
        read = (step_weight_bytes(engine) + held) * median / batch
        gb_per_s, share = read * 1e-9, read / bandwidth
    return Row(engine.plan.kv, f"{kind}{tokens}", depth, batch, median, rates[0], rates[-1], 1e3 * batch / median,
               gb_per_s, share, joules)  # fmt: skip


def step_weight_bytes(engine: Engine) -> int:
    """Bytes of weights that a decode step reads: all but an embedding that is not the output layer too."""
    cfg = engine.config
    apart = 0 if cfg.tie_word_embeddings else cfg.vocab_size * cfg.hidden_size * engine.dtype.itemsize
    return engine.plan.weights - apart


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Wall-clock seconds of a call, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _prompts(engine: Engine, ids: list[int], batch: int) -> float:
    def read() -> None:
        for seq in range(batch):
            engine.prefill(ids, seq)

    return _seconds(engine.device, read)


def _steps(engine: Engine, first: list[int], count: int) -> float:
    """Seconds of ``count`` steps, each launched before the one in front of it is read."""
    step = engine.step
    step.start(first, [SamplingParams(temperature=0.0)] * len(first))

    def run() -> None:
        step.launch()
        for _ in range(count - 1):
            step.launch()
            step.read()
        step.read()

    taken = _seconds(engine.device, run)
    step.cancel()
    return taken
