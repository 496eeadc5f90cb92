"""A loaded conversation goes back to its turns without being read again, where layers have a state or a window."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from octo_run.engine import Engine, SamplingParams, Session, plan, session_identity, window_pages
from octo_run.engine.saved_session import SavedSession, SessionMismatch, Snapshot, earlier
from octo_run.engine.saved_session.snapshot import _item
from octo_run.models.config import ModelConfig

from .test_snapshots import BOTH, RECURRENT, WINDOWED, remember

pytestmark = pytest.mark.usefixtures("coded_windows")

KINDS = pytest.mark.parametrize("cfg", [RECURRENT, WINDOWED, BOTH], ids=["recurrent", "windowed", "both"])
#: Answers in letters, so that an answer's text has the tokens that were drawn.
LETTERS = tuple((token, -100.0) for token in range(260) if not 97 <= token <= 122)
GREEDY = SamplingParams(max_tokens=90, temperature=0.0, logit_bias=LETTERS)
QUESTIONS = [f"{number}: " + "the gulls followed the boats out to sea. " * (5 + 3 * number) for number in range(6)]

Make = Callable[..., Engine]


@pytest.fixture(autouse=True)
def _common(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small models have no files; little but snapshots is kept behind windows."""
    monkeypatch.setattr(session_identity, "fingerprint", lambda engine: str(hash(repr(engine.config))))
    monkeypatch.setattr(window_pages, "HISTORY", 2)


@pytest.fixture
def make(tiny: Callable[..., Engine]) -> Make:
    def made(cfg: ModelConfig, kv: str = "bf16", **options: Any) -> Engine:
        engine = tiny(kv, context=5000, cfg=cfg, change=remember, **options)
        engine.end_ids = frozenset()
        return engine

    return made


def talk(engine: Engine, questions: list[str]) -> Session:
    session = Session(engine)
    for question in questions:
        read(session, question)
    return session


def read(session: Session, question: str) -> tuple[list[int], int]:
    """What is said to a question, and how many tokens are read for it."""
    reply = session.ask(question, GREEDY)
    "".join(reply)
    return reply.ids, reply.prompt_tokens - reply.reused_tokens


def taken_back(session: Session, turns: int) -> int:
    """Take back the last turns; the tokens of the first question of these."""
    for _ in range(turns):
        question = session.undo()
    assert question is not None
    return len(question)


def saved(session: Session, path: Path) -> SavedSession:
    Snapshot.take(session, GREEDY).write(path)
    return SavedSession.read(path)


def _without(items: dict[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in items.items() if not name.startswith(earlier.POSITIONS)}


def positions(file: SavedSession) -> int:
    entry = file.entries.get(earlier.POSITIONS)
    return 0 if entry is None else entry.shape[0]


@KINDS
def test_turns_are_gone_back_to_without_a_second_reading(make: Make, tmp_path: Path, cfg: ModelConfig) -> None:
    """An answer written again, a question taken back, one of an earlier turn that is edited: little more than what is
    new is read, and the tokens are those of an engine that has seen nothing else."""
    before = talk(make(cfg), QUESTIONS)
    file = saved(before, tmp_path / "s.safetensors")
    assert file.tokens > 3000 and positions(file) >= 10
    for turns, question in ((1, QUESTIONS[-1]), (1, "Who?"), (3, "When? " * 30)):
        engine = make(cfg)
        assert file.restore(engine) == file.tokens
        session = file.session(engine)
        old = taken_back(session, turns)
        messages = [dict(turn) for turn in session.turns]
        said, count = read(session, question)
        assert count <= (0 if question == QUESTIONS[-1] else len(question)) + 2 * 64 + 8, (turns, question, old)
        fresh = Session(make(cfg))
        fresh.turns = messages
        assert read(fresh, question)[0] == said, (turns, question)


@KINDS
def test_turns_that_end_within_the_sinks(make: Make, tmp_path: Path, cfg: ModelConfig) -> None:
    """A snapshot there is no number of whole pages behind the sinks, but before their end."""
    session = Session(make(cfg, sink=200))
    for question in ("the gulls followed the boats " * 2, QUESTIONS[0]):
        read(session, question)
    file = saved(session, tmp_path / "s.safetensors")
    engine = make(cfg, sink=200)
    assert file.restore(engine) == file.tokens > 400
    after = file.session(engine)
    taken_back(after, 1)
    held = len(engine.tokenizer.chat(after.messages, add_generation_prompt=False))
    said, count = read(after, "Who?")
    assert count <= 4 + 64 + 8 < held
    fresh = Session(make(cfg, sink=200))
    fresh.turns = after.messages[:-2]
    assert read(fresh, "Who?")[0] == said


def test_the_sequence_that_has_most_of_a_conversation_is_saved(make: Make, tmp_path: Path) -> None:
    """Not one that went on from the same tokens and cannot be cut to them."""
    engine = make(RECURRENT, sequences=2)
    session = Session(engine)
    session.turns = talk(make(RECURRENT), QUESTIONS[:1]).messages
    ids = session.rendered(session.turns)
    with engine.sequence() as longer, engine.sequence() as whole:
        engine.prefill(longer, [*ids, 7, 8, 9])
        engine.prefill(whole, ids)
    assert saved(session, tmp_path / "s.safetensors").tokens == len(ids)


@KINDS
def test_what_was_loaded_is_saved_again(make: Make, tmp_path: Path, cfg: ModelConfig) -> None:
    first = saved(talk(make(cfg, "oct3"), QUESTIONS[:4]), tmp_path / "s.safetensors")
    engine = make(cfg, "oct3")
    first.restore(engine)
    second = saved(first.session(engine), tmp_path / "t.safetensors")
    assert positions(second) == positions(first) > 3
    for name, entry in first.entries.items():
        other = second.entries[name]
        whole = [entry.path.read_bytes()[entry.start : entry.end], other.path.read_bytes()[other.start : other.end]]
        assert whole[0] == whole[1], name


@KINDS
def test_the_bytes_of_snapshots_have_a_limit(
    make: Make, tmp_path: Path, cfg: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest ones are in the file; where the last question begins and ends always is."""
    session = talk(make(cfg), QUESTIONS[:5])
    path = tmp_path / "s.safetensors"

    def written(most: int) -> tuple[SavedSession, int]:
        monkeypatch.setattr(earlier, "MOST_BYTES", most)
        file = saved(session, path)
        return file, sum(e.end - e.start for name, e in file.entries.items() if name.startswith(earlier.POSITIONS))

    all_of_them, whole = written(1 << 30)
    some, half = written(whole // 2)
    assert 2 < positions(some) < positions(all_of_them) and whole // 4 < half <= whole // 2
    file, _ = written(0)
    assert positions(file) == 2
    engine = make(cfg)
    file.restore(engine)
    after = file.session(engine)
    taken_back(after, 1)
    assert read(after, "Who?")[1] <= 4 + 2 * 64 + 8


@KINDS
def test_an_engine_with_few_places_takes_the_newest(
    make: Make, tmp_path: Path, cfg: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(talk(make(cfg), QUESTIONS), tmp_path / "s.safetensors")
    states, windows = plan._with_snapshots, plan.window_shapes
    monkeypatch.setattr(plan, "_with_snapshots", lambda *a: (s := states(*a)) and replace(s, snapshots=1))
    monkeypatch.setattr(plan, "window_shapes", lambda *a: tuple(replace(one, snapshots=1) for one in windows(*a)))
    engine = make(cfg)
    assert file.restore(engine) == file.tokens
    session = file.session(engine)
    question = session.undo()
    messages = [dict(turn) for turn in session.turns]
    assert question is not None
    said, count = read(session, question)
    assert count <= 2 * 64
    fresh = Session(make(cfg))
    fresh.turns = messages
    assert read(fresh, question)[0] == said


@KINDS
def test_snapshots_of_others_make_room(make: Make, tmp_path: Path, cfg: ModelConfig) -> None:
    """An engine that has many texts already takes those of the file."""
    file = saved(talk(make(cfg), QUESTIONS[:4]), tmp_path / "s.safetensors")
    engine = make(cfg, sequences=2)
    for seed in range(3):
        talk(engine, [f"{seed}" + question for question in QUESTIONS])
    file.restore(engine)
    session = file.session(engine)
    taken_back(session, 1)
    assert read(session, "Who?")[1] <= 4 + 2 * 64 + 8


def test_pages_that_other_layers_hold_need_no_snapshots(make: Make, tmp_path: Path) -> None:
    plain = replace(WINDOWED, layer_types=("full_attention",) * 3)
    assert positions(saved(talk(make(plain), QUESTIONS[:2]), tmp_path / "s.safetensors")) == 0


@KINDS
def test_a_file_without_snapshots_is_loaded(make: Make, tmp_path: Path, cfg: ModelConfig) -> None:
    """As older programs wrote it."""
    before = talk(make(cfg), QUESTIONS[:3])
    file = saved(before, tmp_path / "s.safetensors")
    for name in [name for name in file.entries if name.startswith(earlier.POSITIONS)]:
        del file.entries[name]
    engine = make(cfg)
    assert file.restore(engine) == file.tokens
    session = file.session(engine)
    one, other = read(before, "more"), read(session, "more")
    assert one == other
    taken_back(session, 2)
    taken_back(before, 2)
    assert read(session, "Who?")[0] == read(before, "Who?")[0]


@KINDS
def test_snapshots_that_cannot_be_are_refused(
    make: Make, tmp_path: Path, cfg: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, path, items = talk(make(cfg), QUESTIONS[:3]), tmp_path / "s.safetensors", Snapshot.items
    file = saved(session, path)
    count, engine = positions(file), make(cfg)
    names = [name for name in file.entries if name.startswith(earlier.POSITIONS)]
    for name in names:
        entry = file.entries[name]
        if name != earlier.POSITIONS and entry.shape[0]:
            file.entries[name] = replace(entry, shape=(entry.shape[0] - 1, *entry.shape[1:]))
            with pytest.raises(SessionMismatch, match="its file is damaged"):
                file.restore(engine)
            del file.entries[name]
            with pytest.raises(SessionMismatch, match="its file is damaged"):
                file.restore(engine)
            file.entries[name] = entry
    for values in ([0] * count, [64 * n for n in range(count)], [*range(320, 320 + 64 * (count - 1), 64), 2**31 - 1]):
        wrong = _item(torch.tensor(values, dtype=torch.int32))
        monkeypatch.setattr(Snapshot, "items", lambda *a, wrong=wrong: items(*a) | {earlier.POSITIONS: wrong})
        with pytest.raises(SessionMismatch, match="its snapshots are damaged"):
            saved(session, path).restore(engine)
    none = _item(torch.tensor([], dtype=torch.int32))
    monkeypatch.setattr(Snapshot, "items", lambda *a: _without(items(*a)) | {earlier.POSITIONS: none})
    assert saved(session, path).restore(engine) > 0
    monkeypatch.setattr(Snapshot, "items", items)
    assert saved(session, path).restore(engine) > 0


@KINDS
def test_a_tail_has_snapshots_too(make: Make, tmp_path: Path, cfg: ModelConfig) -> None:
    session, path = talk(make(cfg), QUESTIONS[:5]), tmp_path / "s.safetensors"
    base = Snapshot.take(session, GREEDY)
    base.write(path)
    read(session, "And then?")
    Snapshot.take(session, GREEDY).write_tail(path, base.as_base)
    file, engine = SavedSession.read(path), make(cfg)
    assert file.shared is not None and file.restore(engine) == file.tokens
    again = file.session(engine)
    taken_back(again, 2)
    assert read(again, "Who?")[1] <= 4 + 2 * 64 + 8


@KINDS
def test_a_conversation_that_had_lost_its_row_is_saved_with_its_turns(
    make: Make, tmp_path: Path, cfg: ModelConfig
) -> None:
    engine = make(cfg, cache_bytes=24 << 20)
    session = talk(engine, QUESTIONS[:5])
    talk(engine, ["Another one."])
    read(session, "And then?")
    file = saved(session, tmp_path / "s.safetensors")
    assert positions(file) > 6
    other = make(cfg)
    file.restore(other)
    again = file.session(other)
    taken_back(again, 3)
    assert read(again, "Who?")[1] <= 4 + 2 * 64 + 8


@KINDS
def test_a_tail_has_fewer_snapshots(
    make: Make, tmp_path: Path, cfg: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written after most turns. Those of the last question are always there, and so is what they need."""
    path, session = tmp_path / "s.safetensors", talk(make(cfg), QUESTIONS[:4])
    base = Snapshot.take(session, GREEDY)
    base.write(path)
    read(session, QUESTIONS[4])
    found = []
    for most in (1 << 30, 0):
        monkeypatch.setattr(earlier, "MOST_OF_TAIL", most)
        Snapshot.take(session, GREEDY).write_tail(path, base.as_base)
        found.append(positions(SavedSession.read(path)))
    assert found[0] > 3 and found[1] == 2
    file, engine = SavedSession.read(path), make(cfg)
    assert file.restore(engine) == file.tokens
    after = file.session(engine)
    taken_back(after, 1)
    messages = [dict(turn) for turn in after.turns]
    said, count = read(after, "Who?")
    assert count <= 4 + 2 * 64 + 8
    fresh = Session(make(cfg))
    fresh.turns = messages
    assert read(fresh, "Who?")[0] == said
