"""Thoughts of a model with channels, by the real program: shown, hidden, ended, kept, and switched."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conftest import SMALL_CONFIG, save_weights

SPECIAL = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|endoftext|>", "<|return|>"]
#: What follows what in the model's answers: it thinks without end. What is behind the forced end of a thought is the
#: same, as a model of this kind sees one token.
WORDS = ("assistant", "<|channel|>", "analysis", "<|message|>", " hm", " hm")


@pytest.fixture
def model(byte_tokenizer: Callable[..., Path], shared_dir: Path) -> Path:
    """A model with the template of gpt-oss whose next token depends on the last one alone."""
    import torch

    from octo_run.models.config import load_config
    from octo_run.models.weights import random_weights
    from octo_run.tokenizer import load_tokenizer

    template = (shared_dir / "data/chat_templates/openai-gpt-oss-120b.jinja").read_text()
    folder = byte_tokenizer(template, SPECIAL, ["assistant", "analysis", " hm"])
    tok = load_tokenizer(folder)
    size = 288
    own = {"vocab_size": tok.vocab_size, "hidden_size": size, "torch_dtype": "float32", "tie_word_embeddings": False}
    ends = {"eos_token_id": tok.eos_ids[0], "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(SMALL_CONFIG | own | ends))
    weights = random_weights(load_config(folder), "cpu", torch.float32, 0)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    weights["model.embed_tokens.weight"] = torch.eye(tok.vocab_size, size)
    weights["model.norm.weight"].fill_(1.0)
    head = weights["lm_head.weight"].zero_()
    for last, following in itertools.pairwise(WORDS):
        one, two = (tok.encode(text, allow_special=True) for text in (last, following))
        head[two[0], one[0]] = 1.0
    save_weights(folder, weights)
    return folder


def test_thoughts_of_channels(environment: dict[str, str], programs: Any, model: Path, tmp_path: Path) -> None:
    def octo(*argv: str, text: str = "Hello\n") -> Any:
        options = ("--ctx", "1024", "--kv", "bf16", "--conditioning", "off", "--temp", "0", "-m", str(model))
        done = programs.run([argv[0], *options, *argv[1:]], environment, text)
        assert done.returncode == 0, done
        return done

    chat = ("chat", "-n", "10")
    assert octo(*chat).stdout == "<think>\n" + " hm" * 7 + "\n"
    assert octo(*chat, "--hide-thinking").stdout == "\n", "it is all thought"
    ended = octo(*chat, "--think-budget", "5")
    assert ended.stdout == "<think>\n hm hm\n</think>\n\n" + " hm" * 5 + "\n"
    exported = tmp_path / "talk.json"
    hidden = octo(
        *chat, "--think-budget", "5", "--hide-thinking", "--session", "talk",
        text=f"Hello\n/think low\n/export {exported}\n/export {tmp_path / 'talk.md'}\nMore\n",
    )  # fmt: skip
    assert hidden.stdout == (" hm" * 5 + "\n") * 2 and "thinking is low" in hidden.stderr
    question, answer = json.loads(exported.read_text())["messages"]
    assert question == {"role": "user", "content": "Hello"}
    assert answer == {"role": "assistant", "content": " hm" * 5, "thinking": " hm hm"}
    assert "<think>\n hm hm\n</think>\n\n hm" in (tmp_path / "talk.md").read_text()
    again = octo(*chat, "--think-budget", "5", "--hide-thinking", "--session", "talk", text="Third\n/regen\n")
    assert again.stdout == (" hm" * 5 + "\n") * 2 and "2 questions" in again.stderr
    assert "\n<think>\n hm hm\n</think>\n\n hm" in programs.run(["sessions", "show", "talk"], environment, "").stdout
    state = octo(*chat, "--think-budget", "5", text="/think\n/think HIGH\n/think\n").stderr
    assert "thinking is medium; /think low or high changes it; a thought ends after 5 tokens (--think-budget)" in state
    assert "thinking is high; /think low or medium changes it; " in state
    wrong = programs.run(["chat", "-m", str(model), "--ctx", "512"], environment, "/think off\n")
    assert wrong.returncode == 2 and "give low, medium or high: /think low" in wrong.stderr
    (line,) = octo("generate", "--chat", "--json", "-n", "5", "-p", "Hello").stdout.splitlines()
    assert json.loads(line)["text"] == "<think>\n hm hm"
    (tmp_path / "batch.jsonl").write_text('{"prompt": "Hello"}\n')
    (line,) = octo("generate", "--chat", "--batch", str(tmp_path / "batch.jsonl"), "-n", "5").stdout.splitlines()
    assert json.loads(line)["text"] == "<think>\n hm hm"
