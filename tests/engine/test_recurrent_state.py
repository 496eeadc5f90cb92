"""States of recurrent layers: rows, snapshots, and what a cut goes back to."""

import itertools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

from octo_run.engine.arena import ArenaShape, KVArena
from octo_run.engine.recurrent_state import RecurrentShape, RecurrentStates
from octo_run.engine.sequence import Sequence
from octo_run.kernels.codec import LayerFormats, parse_kv
from octo_run.kernels.recurrent import DeltaShape
from octo_run.models.config import KVHeads

DELTA = DeltaShape(1, 2, 8, 4)
CPU = torch.device("cpu")


def states(rows: int = 2, snapshots: int = 3, sink: int = 64) -> RecurrentStates:
    return RecurrentStates(RecurrentShape(DELTA, 2, snapshots), rows, sink, torch.float32, CPU)


def value(of: RecurrentStates, place: int) -> float:
    """What :func:`write` wrote there; the same in all layers."""
    (number,) = {float(x) for index in range(2) for x in (*of.layer(index).conv[place].unique(),
                 *of.layer(index).memory[place].unique())}  # fmt: skip
    return number


def write(of: RecurrentStates, place: int, number: float) -> None:
    for index in range(2):
        of.layer(index).conv[place], of.layer(index).memory[place] = number, number


def move(of: RecurrentStates, row: int, start: int, end: int, marks: tuple[int, ...] = ()) -> None:
    """A chunk; the state at position p is p."""
    assert of.stands(row, start)
    snapshots = of.plan(row, start, end, marks)
    of.writing(row)
    for position, place in snapshots:
        write(of, place, position)
    write(of, row, end)
    of.stand(row, end)
    of.keep(row, snapshots)


def test_snapshots_lie_at_the_last_page_boundary_before_the_end() -> None:
    one = states()
    assert [one.boundary(length) for length in (1, 64, 65, 128, 129, 130, 192, 193)] == [
        0,
        0,
        64,
        64,
        128,
        128,
        128,
        192,
    ]
    assert [states(sink=10).boundary(length) for length in (5, 10, 11, 75, 76)] == [0, 0, 10, 74, 74]
    for end, positions in ((50, []), (100, [64]), (120, [64]), (300, [64, 256]), (321, [64, 256, 320])):
        move(one, 0, one._at[0], end)
        assert one.snapshots(0) == positions


def test_a_snapshot_is_taken_where_a_chunk_begins_on_a_boundary() -> None:
    one = states()
    move(one, 0, 0, 64)
    move(one, 0, 64, 65)
    assert one.snapshots(0) == [64]
    one.cut(0, 64)
    assert value(one, 0) == 64


def test_a_cut_goes_to_the_nearest_snapshot() -> None:
    one = states()
    for start, end in ((0, 100), (100, 200), (200, 300)):
        move(one, 0, start, end)
    assert one.snapshots(0) == [64, 192, 256]
    assert [one.reachable(0, length) for length in (0, 63, 64, 191, 255, 299, 300, 400)] == [
        0,
        0,
        64,
        64,
        192,
        256,
        300,
        300,
    ]
    one.cut(0, 300)
    assert value(one, 0) == 300 and one.snapshots(0) == [64, 192, 256]
    one.cut(0, 192)
    assert value(one, 0) == 192 and one.snapshots(0) == [64, 192]
    move(one, 0, 192, 260)
    assert one.snapshots(0) == [64, 192, 256]
    one.cut(0, 0)
    assert one.snapshots(0) == [] and one.stands(0, 0) and not one.stands(0, 260)


def test_a_state_that_is_being_written_does_not_count() -> None:
    one = states()
    move(one, 0, 0, 100)
    one.writing(0)
    assert one.reachable(0, 100) == 64 and not one.stands(0, 100)
    one.cut(0, 64)
    assert value(one, 0) == 64 and one.stands(0, 64)


def test_rows_share_snapshots() -> None:
    one = states()
    move(one, 0, 0, 100)
    move(one, 0, 100, 300)
    one.share(0, 1, 64)
    assert one.snapshots(1) == [64] and value(one, 1) == 64 and value(one, 0) == 300
    one.share(0, 1, 300)  # the state itself
    assert one.snapshots(1) == [64, 256] and value(one, 1) == 300
    one.cut(0, 0)
    one.cut(1, 256)
    assert value(one, 1) == 256


def test_the_snapshot_that_is_missed_least_goes() -> None:
    one = states(snapshots=3)
    for start, end in ((0, 1000), (1000, 2000), (2000, 2100), (2100, 3200)):
        move(one, 0, start, end)
    assert one.snapshots(0) == [960, 2048, 3136]  # 1984 was close to its neighbour
    move(one, 1, 0, 100)
    assert one.snapshots(1) == [64] and one.snapshots(0) == [2048, 3136]
    for row, position in ((0, 3136), (1, 64)):
        one.cut(row, position)
        assert value(one, row) == position


def test_a_long_chunk_leaves_snapshots_on_the_way() -> None:
    """One every 16 pages, none close to the one before its end; where places are few, those that lie far apart."""
    one = states(snapshots=30)
    move(one, 0, 0, 4096)
    move(one, 0, 4096, 9000)
    assert one.snapshots(0) == [1088, 2112, 3136, 4032, 5184, 6208, 7232, 8256, 8960]


@pytest.mark.parametrize("snapshots", [4, 16])
def test_a_long_prompt_leaves_snapshots_far_apart(snapshots: int) -> None:
    """They lie evenly, and hardly more are taken than there are places: each costs a little."""
    one, beside = states(rows=1, snapshots=snapshots), 0
    for start in range(0, 131_072, 4096):
        planned = one.plan(0, start, start + 4096)
        beside += len(planned) - 1
        one.keep(0, planned)
        one.stand(0, start + 4096)
    assert 0 < beside < snapshots + 3
    held = [0, *one.snapshots(0)]
    assert len(held) == 1 + snapshots and held[-1] == 131_008
    steps = [later - before for before, later in itertools.pairwise(held)]
    assert max(steps) < 3.1 * min(steps)


def test_snapshots_are_taken_where_texts_part() -> None:
    one = states(snapshots=30)
    move(one, 0, 0, 1000, (700,))
    assert one.snapshots(0) == [640, 960]
    move(one, 0, 1000, 1300, (1000, 1100, 1300, 2000))
    assert one.snapshots(0) == [640, 960, 1088, 1280]
    move(one, 0, 1300, 1344, (1344,))
    assert one.snapshots(0) == [640, 960, 1088, 1280, 1344]
    move(one, 1, 0, 64)
    move(one, 1, 64, 70, (64,))
    assert one.snapshots(1) == [64]
    for row, position in ((0, 1344), (0, 1088), (0, 640), (1, 64)):
        one.cut(row, position)
        assert value(one, row) == position


@pytest.mark.parametrize("snapshots", [0, 1])
def test_few_snapshots(snapshots: int) -> None:
    one = states(snapshots=snapshots)
    move(one, 0, 0, 200)
    move(one, 0, 200, 400)
    assert one.snapshots(0) == [384][:snapshots]
    assert one.reachable(0, 399) == 384 * snapshots


def test_an_interrupted_chunk_leaves_its_place_to_the_next() -> None:
    one = states(rows=1, snapshots=1)
    for _ in range(3):
        assert one.plan(0, 0, 100) == [(64, 1)]
        one.writing(0)
    assert one.snapshots(0) == []


def test_steps_keep_every_fourth_page_and_the_last() -> None:
    one = states(snapshots=9)
    for position in range(2000):
        one.passing(0, position)
        write(one, 0, position + 1)
        one.stand(0, position + 1)
    assert value(one, 0) == 2000
    assert one.snapshots(0) == [*range(64 + 256, 2000, 256), 1984]
    one.cut(0, 1856)
    assert value(one, 0) == 64 + 7 * 256


def test_steps_keep_boundaries_up_to_the_end_of_the_sinks() -> None:
    """An answer that ends within the first page can be gone back to; later the first of these boundaries are let go."""
    one = states(snapshots=9)
    for position in range(200):
        one.passing(0, position)
        write(one, 0, position + 1)
        one.stand(0, position + 1)
        assert one.snapshots(0) == [64 * (position // 64)] * (position >= 64), position
    one.cut(0, 192)
    assert value(one, 0) == 192


def test_steps_leave_snapshots_that_were_asked_for() -> None:
    """One where texts part, which is where a prompt ends and steps begin."""
    one = states(snapshots=9)
    planned = one.plan(0, 0, 128, [128])
    write(one, planned[-1][1], 128)
    one.keep(0, planned)
    assert one.snapshots(0) == [64, 128]
    for position in range(128, 300):
        one.passing(0, position)
        write(one, 0, position + 1)
        one.stand(0, position + 1)
    assert one.snapshots(0) == [64, 128, 256]


def arena(rows: int = 2, snapshots: int = 6) -> KVArena:
    fmt = LayerFormats("bf16", (parse_kv("bf16", 8, plain_dtype=torch.float32),))
    shape = ArenaShape(
        heads=(KVHeads(1, 8),), token_bytes=fmt.vector_bytes, dtype=torch.float32, context=1000,
        chunk=512, sequences=rows, recurrent=RecurrentShape(DELTA, 2, snapshots),
    )  # fmt: skip
    return KVArena(shape, fmt, CPU)


def feed(of: KVArena, sequence: Sequence, ids: list[int]) -> None:
    assert of.states is not None
    chunk = of.prefill(sequence, ids)
    for position, place in chunk.snapshots:
        write(of.states, place, position)
    write(of.states, sequence.row, chunk.end)
    chunk.commit()


def check(of: KVArena, sequence: Sequence, length: int) -> None:
    assert of.states is not None
    assert len(sequence) == length and of.states.stands(sequence.row, length)
    if length:
        assert value(of.states, sequence.row) == length


@torch.inference_mode()
def test_sequences_are_cut_where_pages_and_states_allow() -> None:
    of, ids = arena(), list(range(500))
    one = of.open()
    feed(of, one, ids[:300])
    feed(of, one, ids[300:])
    assert one.packed == 5  # up to 384
    for length, left in ((500, 500), (499, 448), (447, 256), (255, 0)):
        assert one.cut(length) == left
        check(of, one, left)


@torch.inference_mode()
def test_prompts_go_on_from_parked_sequences_and_share_with_running_ones() -> None:
    of, ids = arena(), list(range(500))
    one = of.open(ids[:300])
    feed(of, one, ids[:300])
    two = of.open([*ids[:280], 7, 7])
    check(of, two, 256)
    assert of.table.reusable(ids[:400]) == 300
    feed(of, two, [*ids[256:280], 7, 7])
    check(of, one, 300)
    one.close()
    again = of.open(ids[:400])
    assert not one.alive and again.row == 0
    check(of, again, 300)
    again.close()
    edited = of.open([*ids[:290], 9, 9])
    check(of, edited, 256)


@pytest.mark.parametrize(("end", "left"), [(430, 384), (460, 256)])
@torch.inference_mode()
def test_an_interrupted_chunk_goes_back(end: int, left: int) -> None:
    """The second one has filled a page: slots of the tail may have been written over."""
    of, ids = arena(), list(range(500))
    one = of.open()
    feed(of, one, ids[:300])
    feed(of, one, ids[300:400])
    chunk = of.prefill(one, ids[400:end])  # and no more of it
    assert chunk.start == 400 and of.table.reusable(ids) == left
    assert one.cancel() == left
    check(of, one, left)


def interrupted_at(line: int, work: Callable[[], object]) -> bool:
    """Run ``work`` until so many lines of the engine's files on sequences and states have run; whether it ended."""
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(("recurrent_state.py", "sequence.py", "pool.py")):
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(None)
    return True


def consistent(of: KVArena) -> None:
    """What rows and snapshots are said to hold is there."""
    states_of = of.states
    assert states_of is not None
    for row, (at, held) in enumerate(zip(states_of._at, states_of._held, strict=True)):
        for position, place in held:
            assert value(states_of, place) == position
        if at > 0:
            assert value(states_of, row) == at
        assert [position for position, _ in held] == sorted({position for position, _ in held})


@pytest.mark.parametrize("kind", ["cut", "chunk", "share", "go on"])
@torch.inference_mode()
def test_an_interrupt_at_any_line_leaves_what_can_be_gone_on_from(kind: str) -> None:
    """Then everything is as it would have been, after what is lacking was read again."""
    ids = list(range(500))

    def prepared() -> tuple[KVArena, Sequence]:
        of = arena(snapshots=2)
        one = of.open()
        for first, end in ((0, 200), (200, 300), (300, 400)):
            feed(of, one, ids[first:end])
        if kind in ("share", "go on"):
            one.close()
        return of, one

    def work(of: KVArena, one: Sequence) -> None:
        if kind == "cut":
            one.cut(399)
        elif kind == "chunk":
            feed(of, one, ids[400:450])
        else:
            of.open([*ids[:390], 7, 7] if kind == "share" else ids)

    for line in range(0, 4000, 5 if kind == "share" else 1):  # sharing compares tokens for long
        of, one = prepared()
        ended = interrupted_at(line, lambda of=of, one=one: work(of, one))  # type: ignore[misc]
        consistent(of)
        for sequence in of.table.rows:
            if sequence is not None:
                sequence.close()
        consistent(of)
        again = of.open(ids)
        check(of, again, len(again))
        feed(of, again, ids[len(again) :])
        check(of, again, 500)
        if ended:
            assert line > 20
            return
    raise AssertionError("it never ended")
