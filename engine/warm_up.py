"""What the first answer on a GPU would wait for, done before: kernels are compiled, the step is recorded."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from octo_run.engine.benchmark import ordinary_ids
from octo_run.kernels import PAGE_TOKENS as PAGE
from octo_run.kernels.devices import compiling, without_collection

if TYPE_CHECKING:
    from collections.abc import Callable

    from octo_run.engine.engine import Engine
    from octo_run.engine.sampling import SamplingParams

#: Decode steps: the first of a kind runs as it is, the second is recorded, the third is like all that follow.
STEPS = 3


@torch.inference_mode()
def warm_up(engine: Engine, params: SamplingParams, on_compile: Callable[[], object]) -> None:
    """Read made-up prompts and run some steps behind each, of which nothing stays.

    The first one is so short that there are no pages yet, which has steps of its own (`step.length_bound`). Of the
    second one a first chunk fills packed pages, a second chunk reads them, and a page is coded between the steps. Call
    this when the engine has just been loaded: it takes a sequence of the engine, and a parked one would have to make
    room for it.

    Args:
        params: How tokens will be drawn: other kernels draw with noise, penalties or filters.
        on_compile: Called once if kernels have to be compiled, which takes many seconds (`kernels.devices.compiling`).

    Raises:
        Exception: Whatever the compiler or the device raises.
    """
    shape = engine.arena.shape
    first = shape.sink + shape.window + 3 * PAGE
    most = max(1, engine.max_context - STEPS)
    count = min(first + PAGE - 1, most)  # the ring is full after one step
    ids = random.Random(0).choices(ordinary_ids(engine), k=count)
    with compiling(on_compile), without_collection():
        if count > (few := min(PAGE // 2, most)):
            _answer(engine, params, [ids[:few]])
        _answer(engine, params, [ids[:first], ids[first:]] if count > first else [ids])


def _answer(engine: Engine, params: SamplingParams, chunks: list[list[int]]) -> None:
    """Read a prompt in these chunks, and run the steps behind it."""
    ids = [token for chunk in chunks for token in chunk]
    sequence = engine.sequence()
    try:
        for chunk in chunks:
            hidden = engine.feed(sequence, chunk)
        engine.step.begin(sequence, params, ids)
        engine.step.first([sequence], hidden)
        for _ in range(min(STEPS, engine.max_context - len(ids))):
            engine.step.launch([sequence])
        sequence.unread[-1].wait(sequence.row)  # what fails on the device fails here
    finally:
        sequence.discard()
