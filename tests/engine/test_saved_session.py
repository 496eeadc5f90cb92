"""Conversations in files: they go on as they would have, whatever is read is checked, nothing is half there."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from octo_run.engine import Engine, SamplingParams, Session, session_identity, window_pages
from octo_run.engine.background_save import BackgroundSave
from octo_run.engine.random_model import NoTokenizer
from octo_run.engine.saved_session import SavedSession, SessionMismatch, Snapshot, layout, reading
from octo_run.engine.saved_session.snapshot import _item
from octo_run.errors import OctoError
from octo_run.kernels.codec import PageFormat
from octo_run.models.config import parse_config
from octo_run.models.rope_config import RopeScaling
from octo_run.models.safetensors_file import read_headers

from .conftest import TINY

pytestmark = pytest.mark.usefixtures("coded_windows")

GREEDY = SamplingParams(max_tokens=12)
LONG = "The boats left at dawn, and the gulls followed them out to sea. " * 20


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small models have no files; each is known by its configuration."""
    monkeypatch.setattr(session_identity, "fingerprint", lambda engine: str(hash(repr(engine.config))))


def talk(engine: Engine, *questions: str, system: str | None = None) -> Session:
    session = Session(engine, system)
    for question in questions:
        for _ in session.ask(question, GREEDY):
            pass
    return session


def saved(session: Session, path: Path) -> SavedSession:
    Snapshot.take(session, GREEDY).write(path)
    return SavedSession.read(path)


@pytest.mark.few("4-oct3", "1-oct2/oct3")
@pytest.mark.parametrize("kv", ["oct3", "bf16", "oct2:oct4", "oct2/oct3"])
@pytest.mark.parametrize("length", [1, 4])
def test_a_loaded_conversation_goes_on_as_the_unsaved_one(
    tiny: Callable[..., Engine], tmp_path: Path, kv: str, length: int
) -> None:
    """The same tokens, log-probabilities and no token read again but those that any next question reads."""
    questions = [LONG[: 300 * length], "and then?"]
    before = talk(tiny(kv, 2048), *questions, system="be brief")
    file = saved(before, tmp_path / "s.safetensors")
    after_engine = tiny(kv, 2048)
    assert file.restore(after_engine) == file.tokens > 0
    after = file.session(after_engine)
    assert after.messages == before.messages and file.settings == GREEDY
    one, other = before.ask("more", GREEDY), after.ask("more", GREEDY)
    assert [*one] == [*other] and one.ids == other.ids
    assert one.reused_tokens == other.reused_tokens > 200


RECURRENT = {
    "architectures": ["Qwen3_5ForCausalLM"], "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.few(1)
@pytest.mark.parametrize("undone", [False, True])
def test_states_of_recurrent_layers_are_saved_too(tiny: Callable[..., Engine], tmp_path: Path, undone: bool) -> None:
    """Those behind the last token, or those that a cut falls back to."""
    cfg = parse_config(RECURRENT, Path("config.json"))
    before = talk(tiny("oct3", 2048, cfg=cfg), LONG[:900], "and then?")
    if undone:
        before.undo()
    file = saved(before, tmp_path / "s.safetensors")
    assert {"conv", "memory"} <= file.entries.keys()
    after_engine = tiny("oct3", 2048, cfg=cfg)
    assert file.restore(after_engine) == file.tokens > 800
    after = file.session(after_engine)
    one, other = before.ask("more", GREEDY), after.ask("more", GREEDY)
    assert [*one] == [*other] and one.ids == other.ids and one.reused_tokens == other.reused_tokens > 800


GEMMA = {
    "architectures": ["Gemma4ForCausalLM"], "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "global_head_dim": 128,
    "attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 2, "sliding_window": 100,
    "layer_types": ["sliding_attention", "full_attention"] * 3, "hidden_size_per_layer_input": 16,
    "max_position_embeddings": 4096,
}  # fmt: skip
WINDOWED = {
    "all": replace(TINY, layer_types=("sliding_attention",) * 2, sliding_window=100),
    "some": replace(TINY, layer_types=("sliding_attention", "full_attention"), sliding_window=300),
    "heads of two sizes": parse_config(GEMMA, Path("config.json")),
}


@pytest.mark.few("some-True-oct3")
@pytest.mark.parametrize("kv", ["oct3", "bf16"])
@pytest.mark.parametrize("undone", [False, True])
@pytest.mark.parametrize("name", WINDOWED)
def test_pages_of_layers_with_windows_are_saved_too(
    tiny: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, undone: bool, kv: str
) -> None:
    """What the next token sees; a conversation goes on with the same tokens, and none of them is read again."""
    monkeypatch.setattr(window_pages, "HISTORY", 2)
    cfg = WINDOWED[name]
    before = talk(tiny(kv, 2048, cfg=cfg), LONG[:1400], "and then?")
    if undone:
        before.undo()
    file = saved(before, tmp_path / "s.safetensors")
    stored = file.entries["window0"].shape[0]
    assert file.pages > 15 and -(-cfg.sliding_window // 64) - 1 <= stored <= -(-cfg.sliding_window // 64) + 3
    after_engine = tiny(kv, 2048, cfg=cfg)
    other = after_engine.arena.open([])  # so that pages have other numbers
    after_engine.prefill(other, [5] * 300)
    other.close()
    assert file.restore(after_engine) == file.tokens > 1200
    after = file.session(after_engine)
    for question in ("more", LONG[:500]):
        one, two = before.ask(question, GREEDY), after.ask(question, GREEDY)
        assert [*one] == [*two] and one.ids == two.ids and two.reused_tokens > 1200
        # The engine that was not left still holds what was taken back, which may begin like the next question.
        assert 0 <= one.reused_tokens - two.reused_tokens <= (2 if undone else 0)


@pytest.mark.parametrize("rows", [0, 1, 40])
def test_too_few_or_too_many_pages_of_a_window(tiny: Callable[..., Engine], tmp_path: Path, rows: int) -> None:
    engine = tiny("oct3", 2048, cfg=WINDOWED["some"])
    file = saved(talk(engine, LONG[:1400]), tmp_path / "s.safetensors")
    entry = file.entries["window0"]
    file.entries["window0"] = replace(entry, shape=(rows, entry.shape[1]))
    with pytest.raises(SessionMismatch, match=rf"its file is damaged \(window0 is U8 \[{rows}, "):
        file.restore(engine)


def test_loaded_pages_and_rows_are_the_saved_ones(tiny: Callable[..., Engine], tmp_path: Path) -> None:
    engine, other = tiny("oct3", 2048), tiny("oct3", 2048)
    file = saved(talk(engine, LONG[:900]), tmp_path / "s.safetensors")
    other.arena.open([]).take_pages(3)  # so that the pages have other numbers
    other.arena.table.rows[0].close()  # type: ignore[union-attr]
    file.restore(other)
    one, two = engine.arena.table.rows[0], other.arena.table.rows[0]
    assert one is not None and two is not None and one.packed == two.packed > 2
    assert one.ids[: len(two)] == two.ids
    assert torch.equal(engine.arena.pages[one.page_ids], other.arena.pages[two.page_ids])
    assert torch.equal(engine.arena.row_state(0)[0], other.arena.row_state(0)[0])
    table = other.arena.page_table[0, : two.packed].tolist()
    assert table == two.page_ids


def test_what_was_taken_back_is_not_saved(tiny: Callable[..., Engine], tmp_path: Path) -> None:
    session = talk(tiny(context=2048), LONG[:700], "SECRET " * 30)
    session.undo()
    path = tmp_path / "s.safetensors"
    file = saved(session, path)
    assert b"SECRET" not in path.read_bytes() and file.tokens < 800
    with path.open("rb") as data:
        entry = file.entries["ids"]
        data.seek(entry.start)
        ids = torch.frombuffer(bytearray(data.read(entry.end - entry.start)), dtype=torch.int32).tolist()
    assert b"SECRET" not in bytes(i for i in ids if i < 256)


def test_an_empty_conversation_has_no_pages(tiny: Callable[..., Engine], tmp_path: Path) -> None:
    file = saved(Session(tiny(), "be brief"), tmp_path / "s.safetensors")
    assert (file.tokens, file.pages, file.system) == (0, 0, "be brief")
    assert file.restore(tiny()) == 0


def test_pages_of_another_layout_and_dtype_are_converted(
    tiny: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU writes them: lanes, and plain values in bfloat16; keys conditioned by numbers that differ a little."""
    from octo_run.kernels.codec import parse_kv

    engine = tiny("oct3", 2048)
    session = talk(engine, LONG[:900])
    file = saved(session, tmp_path / "s.safetensors")
    assert file.identity is not None
    here = engine.arena.page_formats
    lanes = [PageFormat(page.kv, "lanes") for page in here]
    moved, at = [], 0
    rows = engine.arena.pages[engine.arena.table.rows[0].page_ids[: file.pages]]  # type: ignore[union-attr]
    for one, other in zip(here, lanes, strict=True):
        moved.append(one.convert(rows[:, at : at + one.page_bytes], other))
        at += one.page_bytes
    monkeypatch.setattr(Snapshot, "items", _with(Snapshot.items, pages=torch.cat(moved, 1)))
    snapshot = Snapshot.take(session, GREEDY)
    snapshot.header["identity"] = {**snapshot.header["identity"], "formats": [page.tag for page in lanes]}
    assert not torch.equal(rows, torch.cat(moved, 1))
    snapshot.write(tmp_path / "gpu.safetensors")
    other_engine = tiny("oct3", 2048)
    SavedSession.read(tmp_path / "gpu.safetensors").restore(other_engine)
    two = other_engine.arena.table.rows[0]
    assert two is not None and torch.equal(other_engine.arena.pages[two.page_ids], rows)
    plain = parse_kv("bf16", 64, plain_dtype=torch.bfloat16)
    wide = parse_kv("bf16", 64, plain_dtype=torch.float32)
    values = torch.randn(3, 2 * 64 * 64).to(torch.bfloat16)
    there = reading._convert(values.view(torch.uint8), PageFormat(plain, "lanes"), PageFormat(wide, "rows"))
    assert torch.equal(there.view(torch.float32), values.float())


def _with(items: Any, **changes: torch.Tensor) -> Any:
    def changed(self: Snapshot, were_read: Any) -> Any:
        found = items(self, were_read)
        return found | {name: _item(tensor) for name, tensor in changes.items()}

    return changed


@torch.inference_mode()
def test_an_engine_takes_the_file_s_conditioning(tiny: Callable[..., Engine], tmp_path: Path) -> None:
    """Measured elsewhere it differs; the answer is that of the engine that wrote the file."""
    engine, other = tiny("oct3", 2048), tiny("oct3", 2048)
    for layer in layout.attention_layers(engine):
        assert layer.maps is not None and layer.key_mean is not None
        turned = torch.eye(64) + 0.05 * torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
        layer.maps[0].copy_(layer.maps[0] @ torch.linalg.inv(turned).mT)
        layer.maps[1].copy_(layer.maps[1] @ turned)
        layer.key_mean.mul_(1.1)
    for number, layer in enumerate(layout.attention_layers(engine)):
        engine.arena.means.adopt(number, layer.key_mean, layer.maps[1])  # type: ignore[union-attr, index, arg-type]
    before = talk(engine, LONG[:900])
    talk(other, LONG[:900])
    file = saved(before, tmp_path / "s.safetensors")
    file.restore(other)
    layers = layout.attention_layers
    for one, two in zip(layers(engine), layers(other), strict=True):
        assert torch.equal(one.maps, two.maps) and torch.equal(one.key_mean, two.key_mean)  # type: ignore[arg-type]
    for layer in range(2):
        assert torch.equal(engine.arena.means.maps(layer), other.arena.means.maps(layer))  # type: ignore[union-attr]
    a, b = before.ask("more", GREEDY), file.session(other).ask("more", GREEDY)
    assert [*a] == [*b] and a.ids == b.ids and a.reused_tokens == b.reused_tokens > 800


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kv": "oct2"}, "was saved with the KV cache oct3 and this is oct2"),
        ({"kv": "oct3:oct4"}, "and this is oct3:oct4"),
        ({"kv": "oct3", "conditioning": "mean"}, "saved with --conditioning full and this is mean"),
        ({"kv": "oct3", "window": 128}, "window of 64 tokens"),
        ({"kv": "oct3", "context": 600}, "tokens and the context 600"),
    ],
)
def test_a_mismatch_is_one_sentence_and_the_text_is_there(
    tiny: Callable[..., Engine], tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    before = talk(tiny("oct3", 2048), LONG[:900])
    file = saved(before, tmp_path / "s.safetensors")
    other = tiny(**{"context": 2048, **options})
    with pytest.raises(SessionMismatch, match=says):
        file.restore(other)
    assert file.session(other).messages == before.messages


@pytest.mark.parametrize("version", [1, 3])
def test_pages_of_another_version_are_a_mismatch(tiny: Callable[..., Engine], tmp_path: Path, version: int) -> None:
    """Pages of 64 numbers were of version 1 when their vectors had eight chains."""
    path = tmp_path / "s.safetensors"
    before = talk(tiny("oct3", 2048), LONG[:900])
    saved(before, path)
    tags = [f"octo-page/{version} oct3:oct3 rows d64 seed0"] * 2
    hostile(path, _set("identity", "formats", tags))
    file = SavedSession.read(path)
    with pytest.raises(SessionMismatch, match=f"its pages, '{tags[0]}', are of another version") as caught:
        file.restore(tiny("oct3", 2048))
    assert "\n" not in str(caught.value)
    assert file.session(tiny("oct3", 2048)).messages == before.messages


def test_another_model_is_a_mismatch(tiny: Callable[..., Engine], tmp_path: Path) -> None:
    engine = tiny("oct3", 2048)
    file = saved(talk(engine, LONG[:900]), tmp_path / "s.safetensors")
    with pytest.raises(SessionMismatch, match="another model, 'tiny'"):
        file.restore(tiny("oct3", 2048, cfg=replace(engine.config, rope_theta=5000.0)))


@pytest.mark.slow
def test_keys_that_were_turned_otherwise_are_a_mismatch(tiny: Callable[..., Engine], tmp_path: Path) -> None:
    """longrope has two lists of factors, and the context decides: pages of one are of no use with the other."""
    factors = {"short_factors": (1.0,) * 32, "long_factors": tuple(1.0 + i for i in range(32))}
    scaling = RopeScaling("longrope", 1.0, original_max_position_embeddings=1024, **factors)
    cfg = replace(tiny("oct3", 1024).config, rope_scaling=scaling)
    file = saved(talk(tiny("oct3", 1024, cfg=cfg), LONG[:600]), tmp_path / "s.safetensors")
    with pytest.raises(SessionMismatch, match="RoPE's short factors and this context chooses the long ones"):
        file.restore(tiny("oct3", 2048, cfg=cfg))
    file.restore(tiny("oct3", 1000, cfg=cfg))


def test_a_failed_load_changes_nothing_but_what_is_held(tiny: Callable[..., Engine], tmp_path: Path) -> None:
    """The file shrinks after its header was read: the engine goes on."""
    path = tmp_path / "s.safetensors"
    file = saved(talk(tiny("oct3", 2048), LONG[:900]), path)
    other = tiny("oct3", 2048)
    session = talk(other, "hello")
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(OctoError, match="was changed or replaced"):
        file.restore(other)
    for _ in session.ask("more", GREEDY):
        pass
    assert other.arena.table.pool.free > 0


def hostile(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change the two JSON objects of a file's header and keep its data."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    session = json.loads(header["__metadata__"]["session"])
    change(header, session)
    header["__metadata__"]["session"] = json.dumps(session)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def _set(*places: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    *way, last, value = places

    def change(_header: dict[str, Any], session: dict[str, Any]) -> None:
        place: Any = session
        for name in way:
            place = place[name]
        place[last] = value

    return change


CHANGES: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "version": _set("version", 99),
    "version is text": _set("version", "1"),
    "no identity": _set("identity", None),
    "identity a list": _set("identity", []),
    "unknown tag": _set("identity", "formats", ["octo-page/1 evil:evil rows d64 seed0"] * 2),
    "escape in a tag": _set("identity", "formats", ["\x1b[2J"] * 2),
    "too many tags": _set("identity", "formats", ["octo-page/2 oct3:oct3 rows d64 seed0"] * 9),
    "no tags": _set("identity", "formats", []),
    "sink": _set("identity", "sink", 10**9),
    "turns a text": _set("turns", "hello"),
    "turns of texts": _set("turns", ["hello"]),
    "a role with escapes": _set("turns", [{"role": "\x1b[2J", "content": ""}]),
    "content a number": _set("turns", [{"role": "user", "content": 3}]),
    "half a surrogate": _set("turns", [{"role": "user", "content": "\ud800"}]),
    "settings": _set("settings", "temperature", -1),
    "settings a list": _set("settings", [1]),
    "settings nested": _set("settings", "stop", [[[]]]),
    "options a list": _set("options", [1]),
    "options nested": _set("options", {"kv": ["oct3"]}),
    "variables a text": _set("variables", "x"),
    "system a number": _set("system", 3),
    "ids of another shape": lambda header, _: header["ids"].update(shape=[1, *header["ids"]["shape"]]),
    "pages of another shape": lambda header, _: header["pages"].update(shape=header["pages"]["shape"][::-1]),
    "full of another dtype": lambda header, _: header["full0"].update(dtype="I32"),
    "no pages": lambda header, _: header.update(nothing=header.pop("pages")),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", CHANGES)
def test_a_hostile_header_is_one_sentence(tiny: Callable[..., Engine], tmp_path: Path, name: str) -> None:
    path = tmp_path / "s.safetensors"
    saved(talk(tiny("oct3", 2048), LONG[:900]), path)
    hostile(path, CHANGES[name])
    engine = tiny("oct3", 2048)
    with pytest.raises(OctoError) as failure:
        SavedSession.read(path).restore(engine)
    message = str(failure.value)
    assert message.endswith(".") and "\x1b" not in message and len(message) <= 480
    assert all(row is None for row in engine.arena.table.rows), "nothing was taken"


@pytest.mark.few(2)
@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1])
def test_a_damaged_file_is_one_sentence(tiny: Callable[..., Engine], tmp_path: Path, cut: int) -> None:
    path = tmp_path / "s.safetensors"
    saved(talk(tiny("oct3", 2048), LONG[:900]), path)
    os.truncate(path, cut if cut >= 0 else path.stat().st_size - 1)
    with pytest.raises(OctoError):
        SavedSession.read(path)
    path.write_bytes(b"\xff" * 4096)
    with pytest.raises(OctoError):
        SavedSession.read(path)


@pytest.mark.few(1)
@pytest.mark.parametrize("value", [-1, 260, 2**31 - 1])
def test_ids_that_there_are_not_are_refused(tiny: Callable[..., Engine], tmp_path: Path, value: int) -> None:
    path = tmp_path / "s.safetensors"
    file = saved(talk(tiny("oct3", 2048), LONG[:900]), path)
    with path.open("r+b") as data:
        data.seek(file.entries["ids"].start + 40)
        data.write(value.to_bytes(4, "little", signed=True))
    with pytest.raises(SessionMismatch, match="tokens that there are not"):
        SavedSession.read(path).restore(tiny("oct3", 2048))


def test_a_model_file_is_no_session(tmp_path: Path) -> None:
    from octo_run.models.cache import DEMO_PATH

    with pytest.raises(OctoError, match="is no session of octo-run"):
        SavedSession.read(next(DEMO_PATH.glob("*.safetensors")))


def test_a_file_is_private_and_whole(tiny: Callable[..., Engine], tmp_path: Path) -> None:
    path = tmp_path / "sessions" / "s.safetensors"
    saved(talk(tiny(), "hello"), path)
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert [*path.parent.iterdir()] == [path]
    assert read_headers(path)[1]["format"] == "octo-run session"


def test_a_full_disk_leaves_the_older_file(
    tiny: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.safetensors"
    session = talk(tiny(), "hello")
    saved(session, path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OctoError, match="cannot be written: No space left on device"):
        Snapshot.take(talk(tiny(), "another"), GREEDY).write(path)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_a_background_save_lets_the_arena_go_before_the_disk_has_it(
    tiny: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, go = tmp_path / "s.safetensors", threading.Event()
    monkeypatch.setattr(os, "fsync", lambda _descriptor: go.wait(20))
    save, session = BackgroundSave(), talk(tiny(context=2048), LONG[:900])
    save.begin(Snapshot.take(session, GREEDY), path)
    save.release()
    assert not path.exists()
    asked = [*session.ask("more", GREEDY)]  # while the disk is waited for
    go.set()
    save.finish()
    assert asked is not None and save.failure() is None
    assert [turn["role"] for turn in SavedSession.read(path).turns] == ["user", "assistant"]
    save.begin(Snapshot.take(session, GREEDY), tmp_path / "s.safetensors" / "no")
    save.finish()
    assert "cannot be written" in str(save.failure()) and save.failure() is None


KILLED = """
import os, sys, time
from pathlib import Path
from octo_run.engine import Engine, SamplingParams, Session
from octo_run.engine.saved_session import Snapshot
path = Path(sys.argv[1])
session = Session(Engine.load("octo-demo", max_context=512, conditioning="off"))
[*session.ask("one", SamplingParams(max_tokens=4))]
Snapshot.take(session, SamplingParams()).write(path)
[*session.ask("two", SamplingParams(max_tokens=4))]
real = os.fsync
def slow(descriptor):
    print("writing", flush=True)
    time.sleep(60)
os.fsync = slow
Snapshot.take(session, SamplingParams()).write(path)
"""


@pytest.mark.slow
def test_kill_9_during_a_save_leaves_the_older_one(tiny: Callable[..., Engine], tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    program = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert program.stdout is not None and program.stdout.readline() == "writing\n"
        program.send_signal(signal.SIGKILL)
        program.wait()
    finally:
        program.kill()
        program.stdout.close()  # type: ignore[union-attr]
    assert [turn["content"] for turn in SavedSession.read(path).turns if turn["role"] == "user"] == ["one"]
    assert len([*tmp_path.iterdir()]) == 2, "the killed program left a part"
    saved(talk(tiny(), "hello"), path)
    assert [*tmp_path.iterdir()] == [path], "the next save takes it away"


def test_the_fingerprint_tells_models_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from octo_run.models.cache import DEMO_PATH

    monkeypatch.undo()
    folder = tmp_path / "model"
    shutil.copytree(DEMO_PATH, folder, ignore=shutil.ignore_patterns("__pycache__"))
    with Engine.load("octo-demo", max_context=128, conditioning="off", device="cpu") as engine:
        first = session_identity.fingerprint(engine)
        engine.name = str(folder)
        assert session_identity.fingerprint(engine) == first, "the same files elsewhere"
        file = max(folder.glob("*.safetensors"))
        with file.open("r+b") as data:
            data.seek(-100, 2)
            data.write(bytes(100))
        assert session_identity.fingerprint(engine) != first
    engine.tokenizer = NoTokenizer(260)  # type: ignore[assignment]
    with pytest.raises(OctoError, match="random weights"):
        session_identity.fingerprint(engine)


@pytest.mark.slow
def test_loading_takes_the_read_only(demo: Callable[..., Engine], tmp_path: Path, monkeypatch: Any) -> None:
    """4,000 tokens of the demo model come back at least 20 times faster than they were read."""
    engine = demo("oct3")
    session = Session(engine)
    begun = time.perf_counter()
    reply = session.ask("The boats left at dawn, and the gulls followed them out to sea. " * 170, GREEDY)
    assert [*reply] and reply.prompt_tokens > 2500
    took = reply.prefill_seconds
    path = tmp_path / "s.safetensors"
    saved(session, path)
    other = Engine.load("octo-demo", kv="oct3", dtype="float32", device="cpu")
    loaded = []
    for _ in range(3):  # whatever else the machine does, one of them is not held up
        begun = time.perf_counter()
        SavedSession.read(path).restore(other)
        loaded.append(time.perf_counter() - begun)
    assert min(loaded) * 20 < took, (loaded, took)


@pytest.mark.slow
def test_random_damage_is_one_sentence_or_harmless(tiny: Callable[..., Engine], tmp_path: Path) -> None:
    """Bytes of the header and of the tensors are changed: nothing but an OctoError comes of it."""
    import random

    path, engine, chance = tmp_path / "s.safetensors", tiny("oct3", 2048), random.Random(3)
    saved(talk(tiny("oct3", 2048), LONG[:900]), path)
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 3, 20))):
            end = 8 + size if chance.random() < 0.7 else len(data)
            data[chance.randrange(end)] = chance.choice((0, 0x22, 0x7B, 0x5D, 0xFF, chance.randrange(256)))
        path.write_bytes(data)
        try:
            file = SavedSession.read(path)
            file.restore(engine)
            session = file.session(engine)
            "".join(session.ask("more", SamplingParams(max_tokens=1)))
        except OctoError as error:
            refused += 1
            assert str(error) and "\x1b" not in str(error)
    assert 100 < refused < 400


def test_a_conversation_may_change_while_its_snapshot_is_written(demo: Callable[..., Engine]) -> None:
    session = Session(demo("oct3"))
    list(session.ask("Hello.", SamplingParams(max_tokens=2)))
    snapshot = Snapshot.take(session, SamplingParams())
    session.undo()
    session.variables["enable_thinking"] = True
    assert len(snapshot.header["turns"]) == 2 and snapshot.header["variables"] == {}
