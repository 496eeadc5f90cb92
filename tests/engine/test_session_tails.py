"""Conversations that are saved after each turn: only what is new is written, and a kill leaves one of the states."""

import gc
import os
import random
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from octo_run.engine import Engine, Session, background_save
from octo_run.engine.background_save import BackgroundSave
from octo_run.engine.saved_session import SavedSession, Snapshot, tail_of
from octo_run.errors import OctoError

from .test_saved_session import GREEDY, LONG, _set, hostile, one_model, talk

__all__ = ["one_model"]  # a fixture for every test here


def save_turns(session: Session, path: Path, save: BackgroundSave, *questions: str) -> list[int]:
    """Ask, and save after each answer; returns the bytes written each time."""
    sizes = []
    for question in questions:
        list(session.ask(question, GREEDY))
        before = {place: place.stat().st_ino for place in (path, tail_of(path)) if place.exists()}
        save.begin(Snapshot.take(session, GREEDY), path)
        save.finish()
        assert save.failure() is None
        now = [place for place in (path, tail_of(path)) if place.exists()]
        sizes.append(sum(place.stat().st_size for place in now if before.get(place) != place.stat().st_ino))
    return sizes


def held(engine: Engine) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """What the first row of an engine has: tokens, pages, the full-precision part."""
    sequence = engine.arena.table.rows[0]
    assert sequence is not None
    full = torch.cat([part.flatten() for part in engine.arena.row_state(0)])
    return sequence.ids, engine.arena.pages[sequence.page_ids].clone(), full


def test_a_turn_writes_only_what_is_new(tiny: Callable[..., Engine], tmp_path: Path) -> None:
    """And what is read is what one file has."""
    path, save, session = tmp_path / "s.safetensors", BackgroundSave(), Session(tiny("oct3", 2048))
    sizes = save_turns(session, path, save, LONG, "one", "two", "three")
    page = session.engine.arena.pages.shape[1]
    pages = SavedSession.read(path).pages
    assert tail_of(path).exists() and pages > 15 and path in save.in_parts
    assert all(size < sizes[0] - (pages - 8) * page for size in sizes[1:]), sizes
    parts, other = SavedSession.read(path), tiny("oct3", 2048)
    assert parts.restore(other) == parts.tokens and [*parts.turns] == session.turns
    Snapshot.take(session, GREEDY).write(path)
    assert not tail_of(path).exists()
    whole, another = SavedSession.read(path), tiny("oct3", 2048)
    assert whole.restore(another) == parts.tokens and whole.pages == parts.pages
    for mine, theirs in zip(held(other), held(another), strict=True):
        assert mine == theirs if isinstance(mine, list) else torch.equal(mine, theirs)  # type: ignore[arg-type]
    one, two = parts.session(other).ask("more", GREEDY), session.ask("more", GREEDY)
    assert [*one] == [*two] and one.ids == two.ids


def test_a_tail_that_grows_is_folded(tiny: Callable[..., Engine], tmp_path: Path) -> None:
    path, save, session = tmp_path / "s.safetensors", BackgroundSave(), Session(tiny("oct3", 2048))
    kinds = []
    for size in (200, 250, 250, 250, 250, 250):
        save_turns(session, path, save, LONG[:size])
        pages = SavedSession.read(path).pages
        new = pages - (SavedSession.read(path).shared or (None, pages))[1]
        assert new**2 <= background_save.TAIL_FACTOR * pages
        kinds.append(tail_of(path).exists())
    assert kinds[0] is False and True in kinds and False in kinds[kinds.index(True) :], kinds


def test_what_is_taken_back_is_no_part_of_a_tail(tiny: Callable[..., Engine], tmp_path: Path) -> None:
    """After /undo the pages of the answer that is gone have other numbers, or other tokens."""
    path, save, session = tmp_path / "s.safetensors", BackgroundSave(), Session(tiny("oct3", 2048))
    save_turns(session, path, save, LONG, LONG[:400])
    session.undo()
    save_turns(session, path, save, "quite another question " * 10)
    parts, other = SavedSession.read(path), tiny("oct3", 2048)
    assert parts.restore(other) == parts.tokens and [*parts.turns] == session.turns
    Snapshot.take(session, GREEDY).write(path)
    another = tiny("oct3", 2048)
    SavedSession.read(path).restore(another)
    assert torch.equal(held(other)[1], held(another)[1])


def test_other_engines_and_forgotten_files_get_whole_files(tiny: Callable[..., Engine], tmp_path: Path) -> None:
    path, save, session = tmp_path / "s.safetensors", BackgroundSave(), Session(tiny("oct3", 2048))
    save_turns(session, path, save, LONG, "one")
    assert tail_of(path).exists()
    save.forget()  # as when keys are stored in another way
    save_turns(session, path, save, "two")
    assert not tail_of(path).exists()
    save_turns(session, path, save, "three")
    assert tail_of(path).exists()
    other = talk(tiny("oct3", 2048), LONG)
    save.begin(Snapshot.take(other, GREEDY), path)
    save.finish()
    assert not tail_of(path).exists() and [*SavedSession.read(path).turns] == other.turns


def test_a_tail_of_another_file_counts_for_nothing(tiny: Callable[..., Engine], tmp_path: Path) -> None:
    """A kill between a new whole file and the removal of the tail leaves one."""
    path, save, session = tmp_path / "s.safetensors", BackgroundSave(), Session(tiny("oct3", 2048))
    save_turns(session, path, save, LONG, "one")
    old = tail_of(path).read_bytes()
    list(session.ask("two", GREEDY))
    Snapshot.take(session, GREEDY).write(path)
    tail_of(path).write_bytes(old)
    assert [*SavedSession.read(path).turns] == session.turns and SavedSession.read(path).shared is None


@pytest.mark.few(1)
@pytest.mark.parametrize("pages", [-1, 10**9, "1", None])
def test_a_hostile_tail_is_one_sentence(tiny: Callable[..., Engine], tmp_path: Path, pages: object) -> None:
    path, save, session = tmp_path / "s.safetensors", BackgroundSave(), Session(tiny("oct3", 2048))
    save_turns(session, path, save, LONG, "one")
    hostile(tail_of(path), _set("base", "pages", pages))
    with pytest.raises(OctoError) as error:
        SavedSession.read(path).restore(tiny("oct3", 2048))
    assert "\n" not in str(error.value)


def test_a_first_file_with_other_pages_is_noticed(tiny: Callable[..., Engine], tmp_path: Path) -> None:
    path, save, session = tmp_path / "s.safetensors", BackgroundSave(), Session(tiny("oct3", 2048))
    save_turns(session, path, save, LONG, "one")
    hostile(path, lambda header, _: header["pages"].update(shape=header["pages"]["shape"][::-1]))
    with pytest.raises(OctoError, match="its file is damaged"):
        SavedSession.read(path).restore(tiny("oct3", 2048))


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_state_that_was_there(
    tiny: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child saves turn after turn, in tails and whole files; what it had told to be saved is never lost."""
    path, engine, chance = tmp_path / "s.safetensors", tiny("oct3", 2048), random.Random(4)
    session = talk(engine, LONG)
    monkeypatch.setattr(
        "octo_run.engine.saved_session.snapshot.PIECE_BYTES", 1
    )  # many small writes, so that a kill comes between
    snapshot = Snapshot.take(session, GREEDY)
    snapshot.write(path)
    seen = set()
    for _ in range(24):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:  # pragma: no cover
            try:
                base = snapshot.as_base
                for number in range(2, 1_000_000):
                    session.turns[1]["content"] = str(number)
                    snapshot = Snapshot.take(session, GREEDY)
                    if number == 2 or not number % 5:
                        snapshot.write(path)
                        base = snapshot.as_base
                    else:
                        snapshot.write_tail(path, base)
                    os.write(writer, number.to_bytes(4, "little"))
            finally:
                os._exit(1)
        os.close(writer)
        first = os.read(reader, 4)
        time.sleep(chance.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told = first
        while data := os.read(reader, 4):
            told = data
        os.close(reader)
        found = SavedSession.read(path)
        number = int(found.turns[1]["content"])
        assert number in (int.from_bytes(told, "little"), int.from_bytes(told, "little") + 1)
        assert found.restore(tiny("oct3", 2048)) == found.tokens > 1000
        seen.add(found.shared is None)
    assert seen == {True, False}, "some kills found a tail, others one file"


def test_an_engine_that_nobody_has_any_more_is_let_go(tiny: Callable[..., Engine], tmp_path: Path) -> None:
    """A conversation of it that was saved does not hold its memory."""
    session = Session(tiny("oct3", 300))
    save_turns(session, tmp_path / "s.safetensors", BackgroundSave(), "one")
    engine = weakref.ref(session.engine)
    del session
    gc.collect()
    assert engine() is None
