"""Timing of steps as CUDA graphs, which the measuring scripts share."""

import statistics
from collections.abc import Callable, Sequence

import torch


def recorded(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The step, run once, then recorded and replayed once."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    return graph


def in_turn(graphs: Sequence[torch.cuda.CUDAGraph], repeats: int) -> list[float]:
    """Median microseconds of each graph, replayed one after the other, every other time in reverse."""
    times: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in graphs]
    for turn in range(repeats):
        for i in range(len(graphs)) if turn % 2 else reversed(range(len(graphs))):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graphs[i].replay()
            end.record()
            times[i].append((start, end))
    torch.cuda.synchronize()
    return [statistics.median(a.elapsed_time(b) for a, b in one) * 1e3 for one in times]
