"""``octo-run eval``: small runs from end to end, what is printed and written, one sentence for what is wrong."""

import csv
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KEYS = [
    "kv",
    "perplexity",
    "stderr",
    "delta_percent",
    "kl_mean",
    "kl_p99",
    "top1_agreement",
    "bytes_per_token",
    "tokens_per_s",
    "partial",
]
TEXT = "The boats left at dawn. Gulls followed them out to sea! Was it cold? It was, and nobody spoke of it. "
PPL = ("eval", "ppl", "--device", "cpu", "--ctx", "224", "--tokens", "230")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 10)
    return str(path)


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    path = tmp_path / "tasks.jsonl"
    path.write_text(
        '{"question": "What is 3 + 4?", "answer": "3 + 4 = 7\\n#### 7"}\n{"question": "Hi", "answer": "1"}\n'
    )
    return str(path)


@pytest.mark.slow
def test_perplexity_as_json_csv_and_plot(octo: Callable[..., Any], text: str, tmp_path: Path) -> None:
    table, plot = tmp_path / "rows.csv", tmp_path / "plot.svg"
    shown = octo(*PPL, "--text", text, "--kv", "octopus2,octopus4", "--json", "--csv", str(table), "--plot", str(plot))
    assert shown.code == 0, shown.err
    rows = json.loads(shown.out)
    assert [row["kv"] for row in rows] == ["bf16", "octopus2", "octopus4"]
    for row in rows:
        assert set(KEYS) <= set(row) and row["tokens"] == 230 and row["partial"] is False
        assert row["tokens_per_s"] > 0 and row["stderr"] > 0
    exact, coarse, fine = rows
    assert (exact["delta_percent"], exact["kl_mean"], exact["top1_agreement"]) == (0, 0, 1)
    assert 0 < fine["kl_mean"] < coarse["kl_mean"] and coarse["kl_mean"] < coarse["kl_p99"]
    assert coarse["bytes_per_token"] < fine["bytes_per_token"] < exact["bytes_per_token"]
    ratio = 100 * (coarse["perplexity"] / exact["perplexity"] - 1)
    assert coarse["delta_percent"] == pytest.approx(ratio, abs=1e-6)
    with table.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["kv"] for row in written] == ["bf16", "octopus2", "octopus4"]
    assert float(written[1]["kl_mean"]) == coarse["kl_mean"]
    assert "<svg" in plot.read_text()


def test_perplexity_of_the_bundled_sample_as_a_table(octo: Callable[..., Any]) -> None:
    shown = octo(*PPL, "--kv", "octopus4", "--sink", "0", "--window", "0", "--codec-seed", "1")
    assert shown.code == 0, shown.err
    header, exact, coded, note = shown.out.splitlines()
    assert header.split()[:2] == ["kv", "perplexity"]
    assert (exact.split()[0], coded.split()[0]) == ("bf16", "octopus4")
    assert note == "230 tokens scored; ± is one standard error"
    assert "the bundled sample is small (230 tokens scored)" in shown.err


@pytest.mark.slow
def test_needles_as_table_and_files(octo: Callable[..., Any], text: str, tmp_path: Path) -> None:
    argv = (
        "eval",
        "needle",
        "--device",
        "cpu",
        "--kv",
        "octopus4",
        "--text",
        text,
        "--lengths",
        "256",
        "--depths",
        "2",
    )
    table, plot = tmp_path / "cells.csv", tmp_path / "map.png"
    shown = octo(*argv, "--questions", "2", "--distractors", "1", "--csv", str(table), "--plot", str(plot), "--json")
    assert shown.code == 0, shown.err
    cells = json.loads(shown.out)
    assert [(cell["kv"], cell["depth"], cell["trials"]) for cell in cells] == [
        (kv, depth, trials) for kv in ("bf16", "octopus4") for depth, trials in ((0.0, 1), (1.0, 1), (None, 2))
    ]
    assert all(cell["low"] <= cell["recall"] <= cell["high"] for cell in cells)
    assert cells[2]["recall"] == 1.0  # the demo model finds them
    assert len(table.read_text().splitlines()) == 7 and plot.read_bytes().startswith(b"\x89PNG")


def test_the_needle_report_has_a_map_and_totals() -> None:
    from octo_run.cli.evaluate.needle import report
    from octo_run.engine.evaluation.needle import Haystack, Question, cells

    questions = [
        Question(512, depth, Haystack([1, 2], "Adam", "1", depth), text) for text, depth in enumerate((0.0, 1.0) * 2)
    ]
    exact, coded = [True, True, True, False], [True, False, False, True]
    shown = report(cells("bf16", questions, exact, exact) + cells("oct3", questions, coded, exact))
    assert "bf16\ndepth  512\n  0 %  ███ 100 %\n100 %  ▒▒▒  50 %\n" in shown
    first, second, note = shown.splitlines()[-3:]
    assert first.split() == ["bf16", "512", "3/4", "75.0", "21.7", "30.1", "-", "95.4", "-", "-"]
    assert second.split() == ["oct3", "512", "2/4", "50.0", "25.0", "15.0", "-", "85.0", "-25.0", "47.9"]
    assert note == "points: recall against bf16; ± is one standard error"
    one_text = [dataclasses.replace(question, text=0) for question in questions]
    assert report(cells("oct3", one_text, coded, exact)).splitlines()[-2].split()[3:5] == ["50.0", "-"]
    longer = [*questions, dataclasses.replace(questions[0], length=1024)]
    part = report(
        cells("bf16", [*longer, dataclasses.replace(questions[1], length=1024)], exact + [True], exact + [True])
    )
    assert "50 %  -\n" in part, "a place that was not asked yet"
    part = report(cells("bf16", questions, exact[:2], exact[:2]))
    assert part.endswith("; partial: not all questions were asked")


@pytest.mark.slow
def test_a_failure_in_the_middle_leaves_what_is_done(
    octo: Callable[..., Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octo_run.engine.evaluation.reading import Reader
    from octo_run.errors import OctoError

    read = Reader.read
    calls: list[None] = []

    def fails(self: Any, *args: Any) -> Any:
        calls.append(None)
        if len(calls) > 6:
            raise OctoError("The disk is full.")
        return read(self, *args)

    monkeypatch.setattr(Reader, "read", fails)
    argv = (*PPL[:4], "--kv", "octopus4", "--ctx", "64", "--stride", "8", "--text", text, "--json")
    shown = octo(*argv)
    assert shown.code == 1 and shown.err.endswith("octo-run: The disk is full.\n")
    rows = json.loads(shown.out)
    assert [(row["kv"], row["partial"]) for row in rows] == [("bf16", True), ("octopus4", True)]
    calls[:] = [None] * 5
    shown = octo(*argv)
    assert (shown.code, shown.out) == (1, "")


@pytest.mark.slow
def test_a_step_makes_no_difference(octo: Callable[..., Any], text: str) -> None:
    """And `--max-context` is `--ctx`."""
    argv = (*PPL[:4], "--max-context", "224", "--tokens", "230", "--text", text, "--kv", "octopus2", "--json")
    whole, cut = (json.loads(octo(*argv, *more).out) for more in ((), ("--step", "50")))
    for one, other in zip(whole, cut, strict=True):
        assert one["tokens"] == other["tokens"] == 230
        assert other["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5)
        assert other["kl_mean"] == pytest.approx(one["kl_mean"], rel=1e-3, abs=1e-8)
    assert whole[1]["delta_percent"] != 0
    assert "--step is 300; give 1 to 224 tokens" in octo(*argv, "--step", "300").err


def test_tables_of_rounds_that_were_not_finished() -> None:
    from octo_run.cli.evaluate.ppl import table
    from octo_run.engine.evaluation.perplexity import Row

    def row(kv: str, tokens: int) -> Row:
        return Row(kv, 10.0, 0.1, 0.3, 0.1, 0.01, 0.1, 0.9, 2000.0, 100.0, tokens, tokens < 900)

    assert table([], 900) == ""
    assert table([row("bf16", 900)], 900).endswith("\n900 tokens scored; ± is one standard error")
    assert "\npartial: 300 of 900 tokens scored" in table([row("bf16", 300), row("oct3", 300)], 900)
    assert "\npartial: bf16 900, oct3 900, oct2 50 of 900 tokens scored" in table(
        [row("bf16", 900), row("oct3", 900), row("oct2", 50)], 900
    )


def test_as_many_sequences_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from octo_run.cli.evaluate.common import CacheOptions, sequences_that_fit
    from octo_run.cli.options import EngineOptions
    from octo_run.engine import plan
    from octo_run.engine.evaluation import reading

    load, cache = EngineOptions("octo-demo", "oct3", None, None, "cpu", None, False, None), CacheOptions(64, 64, 0)
    assert sequences_that_fit(load, cache, 256, 16) == 16
    needed: dict[int, int] = {}
    for count in (8, 4):
        made = plan.plan_memory(plan_config(), "bf16", device=reading.torch.device("cpu"), dtype=reading.torch.float32,
                                max_context=256, sequences=count)  # fmt: skip
        needed[count] = next(free for free in range(made.total, 2 * made.total, 2**20)
                             if reading.fits(dataclasses.replace(made, free=free), plan_config(), free))  # fmt: skip
    for free, count in ((needed[8], 8), (needed[8] - 2**21, 4), (needed[4], 4), (10, 1)):
        monkeypatch.setattr(plan, "free_memory", lambda _device, free=free: free)
        assert sequences_that_fit(load, cache, 256, 16) == count


def plan_config() -> Any:
    from octo_run.models.cache import DEMO_PATH
    from octo_run.models.config import load_config

    return load_config(DEMO_PATH)


def test_tasks_with_their_answers_in_a_file(octo: Callable[..., Any], tasks: str, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    argv = ("eval", "tasks", tasks, "--device", "cpu", "--kv", "bf16,octopus3", "--ctx", "128", "-n", "6")
    shown = octo(*argv, "--json", "--output", str(output))
    assert shown.code == 0, shown.err
    rows = json.loads(shown.out)
    assert [(row["kv"], row["tasks"]) for row in rows] == [("bf16", 2), ("octopus3", 2)]
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(a["kv"], a["line"], a["wanted"]) for a in answers[:2]] == [("bf16", 1, "7"), ("bf16", 2, "1")]
    assert rows[0]["correct"] == sum(a["correct"] for a in answers[:2])
    shown = octo(*argv[:5], "--kv", "bf16", "--ctx", "128", "-n", "2", "--raw", "--limit", "1")
    assert shown.code == 0 and shown.out.splitlines()[1].split()[:2] == ["bf16", "0/1"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["ppl", "--text", "no-such-file"], "no-such-file: there is no such file"),
        (["ppl", "--text", "."], ". is a folder"),
        (["ppl", "--text", "EMPTY"], "is empty; give a file with text"),
        (["ppl", "--text", "BYTES"], "is not UTF-8 text: byte 0"),
        (["ppl", "--ctx", "4000"], "The bundled sample has 1,551 tokens and a window of --ctx 4,000 takes 3,999"),
        (
            ["ppl", "--text", "TASKS", "--text", "WORD", "--ctx", "9"],
            "WORD has 1 token and a window of --ctx 9",
        ),
        (["ppl", "--stride", "5000"], "--stride is 5000 and the context 1024: give 1 to 1023"),
        (["ppl", "--kv", "octopus3,oct9"], "unknown KV format 'oct9'"),
        (["ppl", "--kv", "oct3,auto:10"], "--kv 'auto:10': auto chooses formats of keys and values by itself"),
        (["needle", "--kv", "auto"], "give auto:N with N = 40 to 72, the bytes of 128 numbers on average"),
        (["tasks", "TASKS", "--kv", "bf16:auto"], "give auto:N with N = 40 to 72"),
        (["ppl", "--plot", "a.gif"], "a figure's name ends in .png, .svg, .pdf"),
        (["ppl", "--csv", "no/a.csv"], "no/a.csv: there is no folder no"),
        (["ppl", "--model", "no/such"], "no/such"),
        (["needle", "--lengths", "60"], "do not fit into 60 tokens"),
        (["needle", "--lengths", "1,x"], "'1,x' is no list of lengths"),
        (["needle", "--distractors", "50"], "give 0 to 41"),
        (["needle", "--per-text", "50"], "give 1 to 42"),
        (["needle", "--ctx", "512"], "leave --ctx out"),
        (["tasks", "no-such-file"], "no-such-file: there is no such file"),
        (["tasks", "TASKS", "--extract", "regex"], "go together"),
        (["tasks", "TASKS", "--answer-key", "x"], "line 1: there is no field 'x'"),
        (["tasks", "TASKS", "--raw", "--system", "x"], "--system needs --chat"),
        (["tasks", "TASKS", "--output", "no/o"], "there is no folder no"),
        (["tasks", "BAD"], "line 2: this is no JSON"),
        (["frobnicate"], "the commands are ppl, needle, tasks"),
        (["pp"], "did you mean 'ppl'?"),
    ],
)
def test_wrong_usage_is_one_sentence_before_anything_is_loaded(
    octo: Callable[..., Any], tmp_path: Path, tasks: str, argv: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "EMPTY").write_text(" \n")
    (tmp_path / "WORD").write_text("a")
    (tmp_path / "BYTES").write_bytes(b"\xff\xfe")
    (tmp_path / "BAD").write_text('{"prompt": "a", "answer": 1}\n{oops\n')
    (tmp_path / "TASKS").write_text(Path(tasks).read_text())
    shown = octo("eval", *argv)
    assert shown.code == (1 if "no/such" in argv else 2)
    assert shown.out == "" and says in shown.err
    assert shown.err.startswith("octo-run: ") and shown.err.count("\n") == 1


@pytest.mark.parametrize("argv", [["ppl", "--ctx", "300"], ["needle", "--lengths", "300", "--questions", "1"]], ids=str)
def test_a_long_step_is_refused_before_weights_are_read(
    octo: Callable[..., Any], argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("octo_run.engine.engine.weight_files.StoredWeights", read)
    shown = octo("eval", *argv, "--step", "301", "--device", "cpu")
    assert shown.code == 2 and shown.err.endswith("octo-run: --step is 301; give 1 to 300 tokens.\n"), shown


@pytest.mark.parametrize(("tokens", "said"), [(65, True), (66, False)])
def test_texts_too_short_for_codes_are_said(octo: Callable[..., Any], tokens: int, said: bool) -> None:
    """All formats have the figures of bf16 there."""
    argv = ("--ctx", str(tokens), "--tokens", "70", "--sink", "0", "--window", "0", "--device", "cpu", "--json")
    shown = octo("eval", "ppl", "--kv", "oct2", *argv)
    assert shown.code == 0, shown
    assert (f"--ctx {tokens}: nothing is coded there, as --sink, --window and" in shown.err) == said
    bf16, oct2 = json.loads(shown.out)
    assert said or oct2["kl_mean"] > 1e-6 + bf16["kl_mean"]


def test_tasks_that_are_stopped_keep_their_answers(
    octo: Callable[..., Any], tmp_path: Path, tasks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octo_run.engine.evaluation import tasks as evaluation

    run, out = evaluation.run, tmp_path / "answers.jsonl"

    def stopped(*args: Any, **options: Any) -> Any:
        yield next(run(*args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "run", stopped)
    argv = ("tasks", tasks, "--device", "cpu", "--kv", "bf16", "--ctx", "128", "-n", "2", "--output", str(out))
    shown = octo("eval", *argv, "--json")
    assert shown.code == 130 and [row["tasks"] for row in json.loads(shown.out)] == [1], shown.err
    assert len(out.read_text().splitlines()) == 1


@pytest.mark.slow
def test_weights_are_compared_with_the_dense_model(octo: Callable[..., Any]) -> None:
    load = ("--weights", "bf16,int8", "--kv", "bf16,oct3", "--tokens", "300", "--ctx", "256", "--device", "cpu")
    rows = json.loads(octo("eval", "ppl", *load, "--json").out)
    assert [row["kv"] for row in rows] == ["bf16", "bf16/oct3", "int8/bf16", "int8/oct3"]
    by_name = {row["kv"]: row for row in rows}
    assert by_name["bf16"]["kl_mean"] == 0 < by_name["int8/bf16"]["kl_mean"] < 0.01
    assert by_name["int8/oct3"]["bytes_per_token"] < by_name["int8/bf16"]["bytes_per_token"]
    refused = octo("eval", "ppl", "--weights", "int8,int5", "--kv", "bf16")
    assert refused.code == 2 and "There is no format of weights 'int5'" in refused.err


@pytest.mark.few(1)
@pytest.mark.parametrize("form", ["table", "json"])
def test_ctrl_c_while_numbers_are_looked_for_prints_what_there_is(
    octo: Callable[..., Any], text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str
) -> None:
    """After the first questions about the shorter texts: the map has places that nobody asked about."""
    from octo_run.engine.evaluation.needle import Search

    ask = Search.run

    def interrupted(search: Search) -> Any:
        for state in ask(search):
            yield state
            if search.cells():
                raise KeyboardInterrupt

    monkeypatch.setattr(Search, "run", interrupted)
    plot = tmp_path / "a.png"
    shown = octo(
        "eval", "needle", "--device", "cpu", "--kv", "oct3", "--text", text, "--lengths", "192,256", "--depths", "2",
        "--questions", "9", "--distractors", "0", "--plot", str(plot), *["--json"] * (form == "json"),
    )  # fmt: skip
    assert shown.code == 130, shown.err
    assert re.search(r"eval needle was interrupted at \d+ %: these figures are incomplete", shown.err)
    assert plot.read_bytes().startswith(b"\x89PNG")
    if form == "json":
        cells = json.loads(shown.out)
        assert {cell["kv"] for cell in cells} == {"bf16", "oct3"} and all(cell["partial"] for cell in cells)
    else:
        assert "partial: not all questions were asked" in shown.out and "oct3" in shown.out


def test_ctrl_c_while_tasks_are_answered_prints_what_there_is(
    octo: Callable[..., Any], tasks: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from octo_run.engine.evaluation import tasks as evaluation

    reply, asked = evaluation.Reply, [0]

    def interrupted(generation: Any) -> Any:
        asked[0] += 1
        if asked[0] == 4:
            raise KeyboardInterrupt
        return reply(generation)

    monkeypatch.setattr(evaluation, "Reply", interrupted)
    out, argv = tmp_path / "answers.jsonl", ("eval", "tasks", tasks, "--device", "cpu", "-n", "2", "--kv", "oct4,oct3")
    shown = octo(*argv, "--output", str(out))
    assert shown.code == 130, shown.err
    assert "eval tasks was interrupted at 75 %: these figures are incomplete" in shown.err
    assert [line.split()[:2] for line in shown.out.splitlines()[1:3]] == [["oct4", "0/2"], ["oct3", "0/1"]]
    assert shown.out.endswith("partial: not all tasks were answered\n") and len(out.read_text().splitlines()) == 3
    asked[0] = 0
    rows = json.loads(octo(*argv, "--json").out)
    assert [(row["kv"], row["tasks"], row["partial"]) for row in rows] == [("oct4", 2, False), ("oct3", 1, True)]
    asked[0] = 3
    first = octo(*argv)
    assert (first.code, first.out) == (130, "") and "interrupted at" not in first.err
