"""The times of a start: the report, what is found on a screen, and a round with the embedded model."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def bench(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("bench_start")


def test_report_has_the_machine_and_every_row(bench: ModuleType) -> None:
    text = bench.report([bench.Row("a start", 1.234, 1.0, 2.0)], "`a command` on one CPU", "a busy machine")
    assert "`a command` on one CPU. a busy machine. Seconds by the clock" in text
    assert text.endswith("| a start | 1.23 | 1.00 | 2.00 |\n")


def test_what_comes_is_waited_for_in_order(bench: ModuleType) -> None:
    """Patterns are found past earlier ones; a program that ends before is an error that says what it wrote."""
    program = "import sys, time; print('one two', flush=True); sys.stdin.readline(); print('one'); time.sleep(0.3)"
    chat = bench.Chat([sys.executable, "-c", program], {})
    first = chat.seconds_until(b"one")
    chat.type(b"x\r")
    assert 0 < first < chat.seconds_until(rb"two.*one")
    with pytest.raises(RuntimeError, match="the chat failed"):
        chat.seconds_until(b"one")
    chat.leave()


@pytest.mark.slow
def test_a_round(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "rows"
    assert bench.main(["--rounds", "1", "--json", str(out)]) == 0
    rows = {row["what"]: row["median"] for row in json.loads(out.read_text())}
    assert len(rows) == 5
    nothing, _, generate, prompt, answer = rows.values()
    assert 0 < nothing < prompt < answer and nothing < generate
    assert capsys.readouterr().out.count("| octo-run ") == 3
