"""Timing of steps as CUDA graphs, which the measuring scripts share.

With TRITON_INTERPRET=1 their device is the CPU, on which Triton interprets its kernels and a step is called as it is:
so a script runs as a whole without a GPU. Such times say nothing.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from octo_run.engine.benchmark import wait

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


class Clock:
    """A `torch.cuda.Event` of the CPU."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "Clock") -> float:
        return 1e3 * (end.seconds - self.seconds)


@dataclass(frozen=True)
class Called:
    """A step of the CPU in place of a graph."""

    replay: Callable[[], object]


Graph = torch.cuda.CUDAGraph | Called


def event() -> torch.cuda.Event | Clock:
    """What takes the time on `DEVICE`."""
    return torch.cuda.Event(enable_timing=True) if DEVICE.type == "cuda" else Clock()


def recorded(step: Callable[[], object]) -> Graph:
    """The step, run once, then recorded and replayed once."""
    step()
    if DEVICE.type == "cpu":
        return Called(step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    return graph


def in_turn(graphs: Sequence[Graph], repeats: int) -> list[float]:
    """Median microseconds of each graph, replayed one after the other, every other time in reverse."""
    times: list[list[tuple[torch.cuda.Event | Clock, torch.cuda.Event | Clock]]] = [[] for _ in graphs]
    for turn in range(repeats):
        for i in range(len(graphs)) if turn % 2 else reversed(range(len(graphs))):
            start, end = event(), event()
            start.record()
            graphs[i].replay()
            end.record()
            times[i].append((start, end))
    wait(DEVICE)
    return [statistics.median(a.elapsed_time(b) for a, b in one) * 1e3 for one in times]
