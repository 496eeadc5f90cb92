"""What the first answer on a GPU would wait for, done before: kernels are compiled, the step is recorded."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from octo_run.engine.benchmark import ordinary_ids
from octo_run.kernels import PAGE_TOKENS as PAGE
from octo_run.kernels.devices import compiling

if TYPE_CHECKING:
    from collections.abc import Callable

    from octo_run.engine.engine import Engine
    from octo_run.engine.sampling import SamplingParams

#: Decode steps: the first of a kind runs as it is, the second is recorded, the third is like all that follow.
STEPS = 3


@torch.inference_mode()
def warm_up(engine: Engine, params: SamplingParams, on_compile: Callable[[], object]) -> None:
    """Read a made-up prompt and run some steps, of which nothing stays.

    A first chunk fills packed pages, a second one reads them, and a page is coded between the steps. Call this when the
    engine has just been loaded: it takes a sequence of the engine, and a parked one would have to make room for it.

    Args:
        params: How tokens will be drawn: other kernels draw with noise, penalties or filters.
        on_compile: Called once if kernels have to be compiled, which takes many seconds (`kernels.devices.compiling`).

    Raises:
        Exception: Whatever the compiler or the device raises.
    """
    shape = engine.arena.shape
    first = shape.sink + shape.window + 3 * PAGE
    count = min(first + PAGE - 1, max(1, engine.max_context - STEPS))  # the ring is full after one step
    ids = random.Random(0).choices(ordinary_ids(engine), k=count)
    with compiling(on_compile):
        sequence = engine.sequence()
        try:
            hidden = engine.feed(sequence, ids[:first])
            if count > first:
                hidden = engine.feed(sequence, ids[first:])
            engine.step.begin(sequence, params, ids)
            engine.step.first([sequence], hidden)
            for _ in range(min(STEPS, engine.max_context - count)):
                engine.step.launch([sequence])
            sequence.unread[-1].wait(sequence.row)  # what fails on the device fails here
        finally:
            sequence.discard()
