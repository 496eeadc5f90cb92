"""A long conversation of a real model in a file: it comes back as fast as its file is read, and goes on as it would."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from octo_run.engine import Engine, SamplingParams, Session
from octo_run.engine.saved_session import SavedSession, Snapshot, tail_of

pytestmark = pytest.mark.real
TEXT = "The boats left at dawn, and the gulls followed them out to sea. Nobody on the quay knew where they went. "
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)


def longer(folder: Path, target: Path) -> Path:
    """The model with a context of 16,384 tokens: what it says there is of no use, what it computes is the same."""
    target.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (target / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (target / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
    return target


@pytest.mark.slow
@pytest.mark.timeout(2400)  # two minutes of reading on an idle core
def test_10_000_tokens_come_back_20_times_faster_than_they_were_read(smollm2: Any, tmp_path: Path) -> None:
    folder = longer(smollm2.folder, tmp_path / "model")
    path = tmp_path / "s.safetensors"
    with Engine.load(folder, kv="oct3", device="cpu", max_context=12_000) as engine:
        session = Session(engine)
        reply = session.ask(TEXT * 440, GREEDY)
        list(reply)
        assert reply.prompt_tokens >= 10_000
        read = reply.prefill_seconds
        begun = time.perf_counter()
        snapshot = Snapshot.take(session, GREEDY)
        snapshot.write(path)
        written = time.perf_counter() - begun
        unsaved = session.ask("What left at dawn?", GREEDY)
        said = "".join(unsaved)
        other = tmp_path / "other.safetensors"  # the same turn in a tail, which a save after each turn writes
        other.hardlink_to(path)
        begun = time.perf_counter()
        Snapshot.take(session, GREEDY).write_tail(other, snapshot.as_base)
        turn = time.perf_counter() - begun
        sizes = [path.stat().st_size / 1e6, tail_of(other).stat().st_size / 1e6]
    with Engine.load(folder, kv="oct3", device="cpu", max_context=12_000) as engine:
        SavedSession.read(path).check(engine)  # so that the fingerprint is known, as it is in a chat
        begun = time.perf_counter()
        saved = SavedSession.read(path)
        assert saved.restore(engine) >= 10_000
        loaded = time.perf_counter() - begun
        session = saved.session(engine)
        continued = session.ask("What left at dawn?", GREEDY)
        assert "".join(continued) == said and continued.ids == unsaved.ids
        assert continued.read_tokens == unsaved.read_tokens < 200
        first = continued.prefill_seconds
        parts = SavedSession.read(other)
        assert parts.pages >= saved.pages and [*parts.turns][-1]["content"] == said
    figures = f"read {read:.1f} s, saved {written:.2f} s, loaded {loaded:.3f} s, next token {first:.2f} s"
    print(figures, f"{sizes[0]:.1f} MB; the next turn {turn:.3f} s, {sizes[1]:.1f} MB")
    assert sizes[1] < sizes[0] / 3
    assert loaded * 20 < read and first < 2, figures


def test_a_conversation_of_a_real_model_goes_on(smollm2: Any, tmp_path: Path) -> None:
    """With the words of an unsaved one, in coded and in plain pages."""
    for kv in ("oct3", "bf16"):
        path = tmp_path / f"{kv}.safetensors"
        with Engine.load(smollm2.folder, kv=kv, device="cpu", max_context=1024) as engine:
            session = Session(engine)
            list(session.ask(f"{TEXT * 20}What is the capital of France?", GREEDY))
            Snapshot.take(session, GREEDY).write(path)
            unsaved = "".join(session.ask("And of Italy?", GREEDY))
        with Engine.load(smollm2.folder, kv=kv, device="cpu", max_context=1024) as engine:
            saved = SavedSession.read(path)
            assert saved.restore(engine) > 400 and saved.pages > 3
            assert "".join(saved.session(engine).ask("And of Italy?", GREEDY)) == unsaved
