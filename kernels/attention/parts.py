"""How many parts a sequence is divided into in a decode step. No Triton needed.

A *part* is the share of a sequence's pages (and of its full-precision tokens) that one program does for the heads of
its program. With several parts each gives a partial result, an output and a log-sum-exp, and these are merged. The
counts here are functions of shapes and the device alone, so that graphs can be captured; which pages a part has,
programs find out on the device (`general.parts`, `hopper.parts`).
"""

from __future__ import annotations

import functools

import torch

from octo_run.kernels.devices import processors

PARTS_PER_PROCESSOR = 8
"""Partial results of a KV head's queries that the workspace has room for, and counters of finished parts."""
FEWEST_TOKENS = 64
"""A part shorter than this costs more in the merge than it saves."""
START_TOKENS = 128
"""Tokens that take as long as the beginning and the end of a program."""
HALF_ROUND = 0.65
"""Time of a round in which at most half of a program's warps have a page."""
TABLE_WARPS = 8
"""Warps of a program of the table-decode kernel: pages that it does at a time."""
WIDE_TEAMS = 2
"""Teams of four warps of a program of the wide decode kernel: pages that it does at a time."""


def room_for_parts(device: torch.device, batch: int, kv_heads: int) -> int:
    """Parts, each of one KV head, whose partial results the workspace has room for."""
    return max(processors(device) * PARTS_PER_PROCESSOR, 2 * batch * kv_heads)


def general_parts(device: torch.device, batch: int, kv_heads: int, max_length: int, at_once: int) -> int:
    """Parts of a sequence, if all are equally long, in the general kernels.

    Args:
        at_once: Programs of these kernels that share a multiprocessor.
    """
    lanes = batch * kv_heads
    most = min(room_for_parts(device, batch, kv_heads) // lanes, -(-max_length // FEWEST_TOKENS))
    return _best_general(lanes, max_length, processors(device) * at_once, max(1, most), 1.08 if batch > 1 else 1)


@functools.cache
def _best_general(lanes: int, length: int, slots: int, most: int, tolerance: float) -> int:
    """The most parts whose time, by a model, is at most `tolerance` times the least: several sequences, which may be
    unequal, had better have more."""

    def cost(parts: int) -> float:
        return -(-lanes * parts // slots) * (length / parts + START_TOKENS)

    costs = {parts: cost(parts) for parts in range(1, most + 1)}
    bound = min(costs.values()) * tolerance
    return max(parts for parts, time in costs.items() if time <= bound)


@functools.cache
def table_parts(lanes: int, pages: int, most: int, multiprocessors: int, at_once: int = TABLE_WARPS) -> int:
    """Parts of a sequence in the table-decode and the wide decode kernel: the least time by a model.

    Of equals it is the most, because sequences may be shorter. The model's unit is a round of a program's warps over as
    many pages (2.7 us on an H200). A round of at most half of eight warps takes less, because they wait less for each
    other. A program costs about one and a half whatever it does, a merge a quarter and a half for every sixteen parts.

    Args:
        lanes: Programs across the sequence (one fills a multiprocessor).
        pages: Of the sequence.
        most: Parts at most.
        at_once: Pages that a program does at a time.
    """

    def rounds(parts: int) -> float:
        waves = -(-lanes * parts // multiprocessors)
        merge = 0.25 + 0.5 * -(-parts // 16) if parts > 1 else 0
        whole, rest = divmod(-(-pages // parts), at_once)
        last = 0 if rest == 0 else HALF_ROUND if alone and 2 * rest <= at_once else 1
        return waves * (1.5 + whole + last) + merge

    alone = at_once >= 8
    fewest = at_once // 4 if alone else at_once  # pages of a part
    return min(range(1, max(1, min(most, -(-pages // fewest))) + 1), key=lambda parts: (rounds(parts), -parts))
