"""The examples, each run as a user runs it: a process of its own, on the CPU."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SECONDS = 120


def generate(lines: list[str]) -> None:
    prompt = "It was a dark and stormy night, and"
    text, reason = "\n".join(lines[:-1]), lines[-1]
    assert text.startswith(f"{prompt} ") and len(text.split()) > len(prompt.split()) + 2
    assert reason in ("[stop]", "[length]")


def chat(lines: list[str]) -> None:
    first, booking, told_first, second, answer, told_second = lines
    assert first.startswith("> I want to book a table") and second == "> Italian food, please, at 7 pm."
    assert re.search(r"time|restaurant|table|food|city|cuisine", booking, re.I) and "7 pm" in answer
    prompt, reused = numbers(told_first)
    longer, reused_later = numbers(told_second)
    assert reused == 0 and prompt < reused_later < longer, "the second turn reads only what is new"


def batch(lines: list[str]) -> None:
    found = [re.fullmatch(r"(\d): (['\"])(\w+) opened the old door and saw (.+)\2 \[(\d+) tokens, length\]", line)
             for line in lines]  # fmt: skip
    order = [int(match[1]) for match in found if match]
    assert sorted(order) == list(range(6)) and len(lines) == 6, lines
    assert [int(match[5]) for match in found if match] == [8 * (1 + index % 3) for index in order]
    assert order.index(3) < order.index(2), "prompt 3 takes the place of prompt 0 and ends before prompt 2"


def formats(lines: list[str]) -> None:
    found = {line.split()[0]: numbers(line.split(maxsplit=1)[1]) for line in lines}
    layers_and_heads = 8 * 2
    for kv, both in {"bf16": 512, "oct4": 144, "oct3": 112, "oct2": 80, "oct3:oct2": 96}.items():
        token, pages, whole = found[kv]
        assert token == layers_and_heads * both and 4096 * token * 0.9 < pages < whole


def sequences(lines: list[str]) -> None:
    prompts = ("The captain looked at the sea and", "In the morning she")
    for line, prompt in zip(lines, prompts, strict=True):
        match = re.fullmatch(r"(['\"])(.*)\1 \[(\d+) tokens held, the next one has log-probability (-\d+\.\d+)\]", line)
        assert match is not None, line
        assert match[2].startswith(prompt) and len(match[2]) > len(prompt) + 10
        assert int(match[3]) >= len(prompt.split()) + 12


def transformers_cache(lines: list[str]) -> None:
    pattern = r"OctoCache\((\w+), 8 layers, ([\d,]+) tokens, ([\d,]+) bytes\) (['\"])(.+)\4"
    found = [re.fullmatch(pattern, line) for line in lines]
    assert [match[1] for match in found if match] == ["bf16", "oct4", "oct3"], lines
    plain, oct4, oct3 = (numbers(match[3])[0] for match in found if match)
    assert oct3 < oct4 < plain / 2 and len({match[2] for match in found if match}) == 1


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "batch.py": batch,
    "chat.py": chat,
    "formats.py": formats,
    "generate.py": generate,
    "sequences.py": sequences,
    "transformers_cache.py": transformers_cache,
}


def numbers(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)]


def test_every_example_is_checked() -> None:
    assert [path.name for path in EXAMPLES] == sorted(CHECKS)


@pytest.mark.few("chat")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path, statistics: Path) -> None:
    if path.name == "transformers_cache.py":
        pytest.importorskip("transformers", minversion="5.24", reason="transformers 5.24 is not installed")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "statistics").symlink_to(statistics)  # measured once for all tests
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment |= {"OCTO_RUN_CACHE": str(tmp_path / "cache"), "PYTHONUTF8": "1"}
    environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # of transformers, which go to standard error
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    CHECKS[path.name](done.stdout.splitlines())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith(('"""',))]
    assert len(lines) <= 14, "an example shows one thing"
