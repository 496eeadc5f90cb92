"""Tables: numbers flush right, wide characters, terminals of few columns."""

import io
import re
import sys
from typing import Any

import pytest

from octo_run.cli import console
from octo_run.cli.tables import cell_width, table

HEADER = ["kv", "perplexity", "±", "change %", "±", "KL mean", "bytes/token"]
ROWS = [
    ["bf16", "25.445", "2.630", "-", "-", "0.00000", "18,432"],
    ["octopus2", "25.848", "2.654", "+1.58", "0.46", "0.00600", "7,104"],
    ["auto:52", "125.453", "2.634", "-0.03", "0.08", "0.00032", ""],
]


def test_numbers_are_flush_right_and_texts_flush_left() -> None:
    rows = [["a", "5", "-1.5", "37.8 MB", "41/100", "12ab"], ["7B-model", "-", "+22.5", "1 GB", "", "34cd"]]
    assert table(["name", "n", "%", "size", "found", "commit"], rows).splitlines() == [
        "name      n      %     size   found  commit",
        "a         5   -1.5  37.8 MB  41/100  12ab",
        "7B-model  -  +22.5     1 GB          34cd",
    ]
    assert table(["7B", "n"], [["7B", "-"]]) == "7B  n\n7B  -"


def test_a_narrow_terminal_gets_every_cell_and_no_broken_row() -> None:
    names = {row[0] for row in ROWS}
    for room in range(30, 75):
        lines = table(HEADER, ROWS, room).splitlines()
        assert max(map(cell_width, lines)) <= room
        assert all(line.split()[:1] == [] or line.split()[0] in names or not re.search("[0-9]", line) for line in lines)
        for row in ROWS:
            own = [cell for line in lines if line.split()[:1] == row[:1] for cell in line.split()[1:]]
            assert own == [cell for cell in row[1:] if cell], f"all cells, in their order, in {room} columns"
    assert table(HEADER, ROWS, 75) == table(HEADER, ROWS)


def test_errors_stay_beside_their_figures() -> None:
    assert table(HEADER, ROWS, 34).splitlines() == [
        "kv        perplexity      ±",
        "bf16          25.445  2.630",
        "octopus2      25.848  2.654",
        "auto:52      125.453  2.634",
        "",
        "kv        change %     ±  KL mean",
        "bf16             -     -  0.00000",
        "octopus2     +1.58  0.46  0.00600",
        "auto:52      -0.03  0.08  0.00032",
        "",
        "kv        bytes/token",
        "bf16           18,432",
        "octopus2        7,104",
        "auto:52",
    ]


def test_headings_are_broken_first_and_no_more_than_needed() -> None:
    header, rows = ["--kv", "bytes/token", "tokens that fit in memory"], [["oct3", "1,792", "12,967,359"]]
    assert table(header, rows, 32).splitlines() == [
        "                     tokens that",
        "--kv  bytes/token  fit in memory",
        "oct3        1,792     12,967,359",
    ]
    assert table(header, rows, 29).splitlines() == [
        "                       tokens",
        "                     that fit",
        "--kv  bytes/token   in memory",
        "oct3        1,792  12,967,359",
    ]


def test_every_part_tells_the_rows_apart() -> None:
    header = ["weights", "kv", "test", "tokens/s", "mean", "first token"]
    rows = [["int8", kv, test, "388.5", "1.0", "82.5"] for kv in ("oct3", "bf16") for test in ("pp32", "tg8")]
    parts = [part.splitlines() for part in table(header, rows, 40).split("\n\n")]
    assert len(parts) == 2
    assert all([line.split()[:3] for line in part[-4:]] == [row[:3] for row in rows] for part in parts)


def test_a_last_text_goes_on_below_itself() -> None:
    rows = [["a", "1", "a remark of quite some words that nothing can hold in one line"]]
    assert table(["model", "n", ""], rows, 40) == table(["model", "n", ""], rows)


def test_long_names_make_lists() -> None:
    rows = [["an-organisation/a-model-of-a-long-name", "37.8 MB", "llama"], ["b", "1 GB", ""]]
    assert table(["model", "size", "architecture"], rows, 45).splitlines() == [
        "model         an-organisation/a-model-of-a-long-name",
        "size          37.8 MB",
        "architecture  llama",
        "",
        "model         b",
        "size          1 GB",
    ]


@pytest.mark.parametrize("name", ["日本語モデル", "🤖-model", "ｆｕｌｌ", "e\N{COMBINING ACUTE ACCENT}té", "한국어"])
def test_wide_characters_keep_columns_aligned(name: str) -> None:
    from prompt_toolkit.utils import get_cwidth

    _, first, second = table(["model", "n"], [[name, "1"], ["plain-name-of-a-model", "22"]]).splitlines()
    assert get_cwidth(first) == len(second) == 25


def test_cells_cannot_steer_a_terminal() -> None:
    assert "\x1b" not in table(["a"], [["\x1b[31mred"]]) and "\\x1b[31mred" in table(["a"], [["\x1b[31mred"]])


@pytest.mark.parametrize("tty", [True, False])
def test_a_pipe_gets_the_whole_table(monkeypatch: pytest.MonkeyPatch, tty: bool) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return tty

    stream: Any = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(console, "width", lambda: 60)
    console.echo(console.table(HEADER, ROWS))
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    assert max(map(len, lines)) < 60 if tty else len(lines) == 4
