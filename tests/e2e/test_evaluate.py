"""Long measurements: running figures while they last, and Ctrl-C, which leaves what is done, marked as partial."""

import csv
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # whole programs with a model

PPL = ("eval", "ppl", "--kv", "oct4", "--ctx", "256", "--device", "cpu", "--threads", "1")
NEEDLE = ("eval", "needle", "--kv", "oct4", "--device", "cpu", "--threads", "1", "--distractors", "1", "--depths", "2")
WIPED = re.compile(r"\x1b\[\?25h\r(\x1b\[1A\x1b\[2K)+")


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Some 30,000 tokens: minutes of work."""
    path = tmp_path / "text.txt"
    path.write_text("The boats left at dawn. Gulls followed them out to sea! Was it cold? Nobody spoke of it. " * 1200)
    return str(path)


def test_ctrl_c_at_a_terminal_leaves_the_windows_that_are_done(
    terminal: Callable[..., Any], text: str, tmp_path: Path
) -> None:
    table, out = tmp_path / "rows.csv", tmp_path / "out.json"
    with out.open("wb") as stdout:
        run = terminal(*PPL, "--text", text, "--json", "--csv", str(table), stdout=stdout, delay=0.0, columns=120)
        run.wait_for(r"eval ppl .*? 0 % ")
        at = run.wait_for(r"oct4 +[0-9.]+ +[0-9.]+ +[-+][0-9.]+ .*?tokens scored.*?eval ppl .*? left")
        run.wait_for(r"tokens scored", at)
        run.type("\x03")
        assert run.wait_for_end(30) == 130
    assert "Traceback" not in run.screen
    assert WIPED.search(run.screen[run.screen.rindex(" left") :]), "the figures are gone"
    rows = json.loads(out.read_text())
    assert [row["kv"] for row in rows] == ["bf16", "oct4"]
    (tokens,) = {row["tokens"] for row in rows}
    assert 255 <= tokens < 20_000 and all(row["partial"] is True for row in rows)
    assert rows[1]["kl_mean"] > 0 and rows[1]["tokens_per_s"] > 0
    with table.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [(row["kv"], row["tokens"], row["partial"]) for row in written] == [
        (kv, str(tokens), "True") for kv in ("bf16", "oct4")
    ]


def in_a_pipe(environment: dict[str, str], *argv: str, until: str) -> tuple[str, str]:
    """Output and errors of a program that gets SIGINT when ``until`` is on its standard error; it ends with 130."""
    code = "import sys; from octo_run.cli import main, progress; progress.LINE_SECONDS = 0.2; sys.exit(main())"
    program = "from octo_run import process; process.prepare(); " + code
    pipe = subprocess.PIPE
    run = subprocess.Popen([sys.executable, "-c", program, *argv], env=environment, stdout=pipe, stderr=pipe, text=True)
    assert run.stdout is not None and run.stderr is not None
    told = ""
    while until not in told:
        line = run.stderr.readline()
        assert line, told
        told += line
    run.send_signal(signal.SIGINT)
    out, rest = run.communicate(timeout=60)
    assert run.returncode == 130, told + rest
    assert "Traceback" not in told + rest
    return out, told + rest


def test_ctrl_c_in_a_pipe_prints_the_table(environment: dict[str, str], text: str) -> None:
    out, told = in_a_pipe(environment, *PPL, "--text", text, until="tokens scored")
    header, exact, coded, note = out.splitlines()
    assert header.split()[:2] == ["kv", "perplexity"] and (exact.split()[0], coded.split()[0]) == ("bf16", "oct4")
    scored = re.fullmatch(r"partial: ([0-9,]+) of ([0-9,]+) tokens scored; ± is one standard error", note)
    assert scored is not None
    some, whole = (int(count.replace(",", "")) for count in scored.groups())
    assert 255 <= some < whole
    assert re.search(r"eval ppl: [0-9]+ %, [0-9]+:[0-9]{2} left\nkv +perplexity", told)


def test_ctrl_c_before_anything_is_done_is_silent(environment: dict[str, str], text: str) -> None:
    out, told = in_a_pipe(environment, *PPL, "--text", text, "--json", until="memory:")
    assert out == "" and "octo-run:" not in told


def test_ctrl_c_while_numbers_are_looked_for(environment: dict[str, str], text: str, tmp_path: Path) -> None:
    table = tmp_path / "cells.csv"
    argv = (*NEEDLE, "--text", text, "--lengths", "192", "--questions", "200", "--json", "--csv", str(table))
    out, _ = in_a_pipe(environment, *argv, until="partial: not all questions")
    cells = json.loads(out)
    totals = [cell for cell in cells if cell["depth"] is None]
    assert [cell["kv"] for cell in totals] == ["bf16", "oct4"]
    assert totals[0]["trials"] == totals[1]["trials"] and totals[0]["trials"] % 8 == 0
    assert 8 <= totals[0]["trials"] < 200 and all(cell["partial"] is True for cell in cells)
    assert len(table.read_text().splitlines()) == 1 + len(cells)


def test_ctrl_c_in_a_benchmark_prints_the_rows_that_are_there(environment: dict[str, str]) -> None:
    argv = ("bench", "--tests", "tg4,pg8+2,tg3000", "-r", "1", "--device", "cpu", "--threads", "1")
    out, told = in_a_pipe(environment, *argv, until="case 3 of 3")
    assert re.search(r"^int8.* oct3 +tg4 ", out, re.M) and re.search(r"^int8.* oct3 +pg8\+2 ", out, re.M)
    assert "tg3000" not in out and "about" in told and "left" in told
