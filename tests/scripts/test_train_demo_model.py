"""A training run of some steps on small files: its loss falls, and the engine runs what it wrote."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from octo_run import Engine, SamplingParams
from octo_run.models.cache import DEMO_PATH
from octo_run.models.weights import load_weights

Script = Callable[[str], ModuleType]
# fmt: off
SIZES = [
    "--vocab", "360", "--hidden", "32", "--layers", "2", "--heads", "2", "--kv-heads", "1", "--head-dim", "64",
    "--inner", "64", "--context", "128", "--batch-tokens", "1024", "--micro-tokens", "512", "--steps", "24",
    "--long-steps", "4", "--warmup", "4", "--log-every", "4", "--device", "cpu",
]
WORDS = [
    "the", "old", "ferry", "came", "late", "that", "morning", "and", "nobody", "on", "quay", "had", "seen", "pilot",
    "or", "his", "dog", "since", "winter", "1984",
]
# fmt: on


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Text of two documents and ten dialogues."""
    folder, source = tmp_path_factory.mktemp("texts"), random.Random(5)
    sentences = [" ".join(source.choices(WORDS, k=9)).capitalize() + "." for _ in range(500)]
    half = len(sentences) // 2
    text = "\n<|endoftext|>\n".join(" ".join(part) for part in (sentences[:half], sentences[half:]))
    (folder / "text.txt").write_text(text)
    user, answer = {"role": "user", "content": "When is the ferry?"}, {"role": "assistant", "content": "It came late."}
    system = {"role": "system", "content": "You know the quay."}
    lines = [json.dumps({"messages": [system, user, answer] if i % 5 == 0 else [user, answer]}) for i in range(10)]
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "text.txt", folder / "chat.jsonl"


@pytest.fixture(scope="module")
def trained(script: Script, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("models") / "tiny"
    text, chat = map(str, files)
    assert script("train_demo_model").main([str(out), "--text", text, "--chat", chat, "--heldout", text, *SIZES]) == 0
    return out


def test_loss_falls(trained: Path) -> None:
    record = json.loads((trained / "training.json").read_text())
    assert [line["step"] for line in record["log"]] == list(range(4, 29, 4))
    first, last = record["log"][0], record["log"][-1]
    assert 5.5 < first["plain"] < 6.5, "nothing is known at first: log 360 = 5.9"
    for kind, fall in (("plain", 1.0), ("chat", 0.7)):
        assert last[kind] < first[kind] - fall, (kind, record["log"])
    assert record["heldout_loss"] < first["plain"] - 1.0
    assert record["tokens"] == 28 * 1024


def test_form_is_the_embedded_models(trained: Path) -> None:
    names = {path.name for path in trained.iterdir() if path.suffix != ".safetensors"}
    assert names - {"training.json"} == {
        path.name for path in DEMO_PATH.iterdir() if path.suffix in (".json", ".model")
    }
    assert [path.name for path in trained.parent.iterdir()] == ["tiny"], "nothing unfinished is left"
    assert trained.stat().st_mode & 0o700 == 0o700
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (trained, DEMO_PATH))
    assert ours.keys() == theirs.keys()
    assert ours["max_position_embeddings"] == 256
    index = json.loads((trained / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model-00001-of-00001.safetensors"}
    generation = "generation_config.json"
    assert (trained / generation).read_bytes() == (DEMO_PATH / generation).read_bytes()


def test_engine_runs_it(trained: Path, script: Script) -> None:
    engine = Engine.load(trained, kv="octopus3", sink=0, window=64)
    tokenizer = engine.tokenizer
    text = "The  old ferry, 1984.\n\nÄ?"
    assert tokenizer.decode(tokenizer.encode(text)) == text, "spaces, line ends and unknown letters are kept"
    prompt = tokenizer.chat([{"role": "user", "content": "When is the ferry?"}])
    assert prompt[:2] == [3, *tokenizer.encode("user")[:1]]
    assert len(list(engine.generate(prompt, SamplingParams(max_tokens=6)))) >= 1

    full = Engine.load(trained, kv="bf16", dtype="float32")
    ids = [1, *full.tokenizer.encode(" ".join(WORDS * 3))][:100]
    model = script("demo_training.model").LanguageModel(full.config)
    model.load_state_dict(load_weights(trained, full.config, "cpu", torch.float32))
    with torch.inference_mode():
        want = model.logits(torch.tensor([ids]))[0]
    torch.testing.assert_close(full.logits(ids), want, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def corpus(script: Script, files: tuple[Path, Path]) -> Any:
    texts = script("demo_training.texts")
    documents, chats = texts.read_documents(files[:1]), texts.read_chats(files[1:])
    return texts.encode_corpus(texts.load_processor(texts.train_tokenizer(documents, chats, 360, 0)), documents, chats)


def draw(script: Script, corpus: Any, seed: int) -> Iterator[Any]:
    rows = script("demo_training.rows").Rows(corpus, seed)
    while True:
        yield rows.batch(500, (1, 1, 4))


def test_rows_are_seeded(script: Script, corpus: Any) -> None:
    one, same, other = (draw(script, corpus, seed) for seed in (3, 3, 4))
    for _ in range(3):
        batch, again, another = next(one), next(same), next(other)
        assert np.array_equal(batch.ids, again.ids)
        assert np.array_equal(batch.weights, again.weights)
        assert not np.array_equal(batch.ids, another.ids)


def test_needle_rows_ask_for_what_they_hide(script: Script, corpus: Any) -> None:
    seen, source = 0, draw(script, corpus, 1)
    for _ in range(6):
        batch = next(source)
        assert batch.ids.shape == (6, 501)
        assert batch.kinds.tolist() == [0, 1, 2, 2, 2, 2]
        assert (batch.weights[:2] == 1).all()
        for ids, weights in zip(batch.ids[2:, 1:], batch.weights[2:], strict=True):
            hidden = corpus.processor.decode(ids[weights == 0].tolist())
            edges = np.flatnonzero(np.diff((weights == 4).astype(int), prepend=0, append=0)).reshape(-1, 2)
            for first, end in edges[edges[:, 1] < len(ids)]:
                value = corpus.processor.decode(ids[first:end].tolist()).strip()
                assert f"is {value}." in hidden, (value, hidden)
                seen += 1
    assert seen > 20


def test_schedule(script: Script) -> None:
    factors = [script("demo_training.model").schedule(step, 100, 10) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.01


@pytest.mark.parametrize(
    ("chat", "options", "message"),
    [
        (None, ["--text", "nowhere.txt"], "nowhere.txt cannot be read: No such file"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}\n{"messages": [', [], "chat, line 2 is not JSON"),
        ('{"messages": []}', [], 'chat, line 1 has no list "messages"'),
        ('{"messages": [{"role": "bot", "content": "Hi"}]}', [], 'line 1: a message needs a "role"'),
        (None, ["--vocab", "5000"], "No vocabulary of 5,000 pieces can be made from this text"),
        (None, ["--context", "8000", "--batch-tokens", "20000"], "need more than 32,000: give more text"),
        (None, ["--batch-tokens", "100"], "less than one row"),
        (None, ["--steps", "0"], "--steps is 0; give at least 1"),
        (None, ["--mix", "0", "1", "1"], "the first above 0"),
        (None, ["--device", "tpu"], "There is no device 'tpu'"),
    ],
)
def test_errors_leave_nothing_behind(
    script: Script, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    chat: str | None, options: list[str], message: str,
) -> None:  # fmt: skip
    arguments = [str(tmp_path / "out"), "--text", str(files[0]), *SIZES, *options]
    if chat is not None:
        (tmp_path / "chat").write_text(chat)
        arguments += ["--chat", str(tmp_path / "chat")]
    assert script("train_demo_model").main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"chat"}


def test_refuses_a_full_folder_and_broken_text(
    script: Script, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = script("train_demo_model").main
    assert run([str(files[0].parent), "--text", str(files[0]), *SIZES]) == 2
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "latin").write_bytes("Brontë".encode("latin-1"))
    assert run([str(tmp_path / "out"), "--text", str(tmp_path / "latin"), *SIZES]) == 2
    assert "latin is not UTF-8 text (byte 5)" in capsys.readouterr().err


def test_diverging_run_says_so(
    script: Script, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "out"), "--text", str(files[0]), *SIZES, "--lr", "1e30", "--matrix-lr", "1e30"]
    assert script("train_demo_model").main(arguments) == 1
    assert "The loss is not finite at step 4: lower --matrix-lr" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
