"""``bench --profile``: when it runs, what it prints, where the trace goes, what is refused before a model is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = ("bench", "--tests", "pp512,tg128", "--depth", "0,3584", "--kv", "oct3,bf16", "--batch", "2", "--profile")


def test_every_case_is_profiled_after_all_are_timed(octo: Callable[..., Any], engine: Any, tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    report = json.loads(octo(*BENCH, "--trace", str(path), "-o", "json").out)
    assert engine.profiled == engine.runs and len(engine.profiled) == 8
    assert engine.loads == ["oct3", "bf16"] * 2, "no case is timed once a profiler has been attached"
    cases = [(row["kv"], row["test"], row["depth"]) for row in report["rows"]]
    assert [(one["kv"], one["test"], one["depth"]) for one in report["profile"]] == cases
    assert report["profile"][1]["parts"][0] == {"part": "mlp", "ms": 0.75, "share": 0.75}
    assert len(report["profile"][1]["kernels"]) == 20
    ((where, profiles, about),) = engine.traces
    assert (
        where == path.name and path.read_text() == "a trace" and [p.kv for p in profiles] == ["oct3"] * 4 + ["bf16"] * 4
    )
    assert about["model"] == "octo-demo" and about["device"] == "cpu (1 threads)" and "torch" in about
    assert [*tmp_path.iterdir()] == [path]


def test_one_format_is_loaded_once(
    octo: Callable[..., Any], engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = octo("bench", "--profile")
    assert engine.loads == ["oct3"] and engine.traces[0][0] == "octo-run-profile.json.gz"
    assert "octo-run-profile.json.gz: open it at https://ui.perfetto.dev" in shown.err


def test_without_the_option_there_is_no_profile(octo: Callable[..., Any], engine: Any) -> None:
    assert "profile" not in json.loads(octo("bench", "-o", "json").out)
    assert not engine.profiled and not engine.traces


def test_the_tables_add_up(octo: Callable[..., Any], engine: Any, tmp_path: Path) -> None:
    out = octo("bench", "--tests", "pp512,tg128", "--batch", "2", "--profile", "--trace", str(tmp_path / "t.json")).out
    prompt, step = out.split("\n\nfp32 oct3 ")[1:]
    # The fake row says 0.81 ms a token: of a prompt of 512 tokens, of which two are read, and of a step.
    assert prompt.startswith(
        "pp512 at depth 0, 2 sequences: 64 prompts, 1.000 ms a prompt under the profiler, 207.360 "
    )
    assert step.startswith("tg128 at depth 0, 2 sequences: 64 steps, 1.000 ms a step under the profiler, 0.810 without")
    lines = step.splitlines()
    kernel = lines.index(next(line for line in lines if line.startswith("kernel ")))
    assert lines[2].split() == ["part", "ms/step", "%"] and lines[kernel].split()[2] == "calls/step"
    assert [line.split() for line in lines[3:6]] == [
        ["mlp", "0.750", "75.0"], ["gaps", "0.250", "25.0"], ["step", "1.000", "100.0"],
    ]  # fmt: skip
    rows = [line.split() for line in lines[kernel + 1 :]]
    assert rows[0] == ["x" * 57 + "...", "mlp", "2", "18.8", "0.037", "3.8"]
    assert rows[15] == ["5", "others", "10", "18.8", "0.188", "18.8"]
    assert rows[16] == ["gaps", "-", "-", "0.250", "25.0"] and rows[17] == ["step", "-", "-", "1.000", "100.0"]
    assert len(rows) == 18 and prompt.splitlines()[2].split() == ["part", "ms/prompt", "%"]


def test_markdown_has_the_same_tables(octo: Callable[..., Any], engine: Any, tmp_path: Path) -> None:
    out = octo("bench", "--tests", "tg128", "--profile", "--trace", str(tmp_path / "t.json"), "-o", "markdown").out
    assert "\n\n| part | ms/step | % |\n| --- | --- | --- |\n| mlp | 0.750 | 75.0 |\n" in out
    assert "\n| `kernel 1` | mlp | 2 | 18.8 | 0.037 | 3.8 |\n" in out and "\n| 5 others |  | 10 | 18.8 | 0.188 " in out


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--profile", "--trace", "{}"], " must end in .json or .json.gz."),
        (["--profile", "--trace", "{}/folder.json"], "folder.json is a folder; name a file."),
        (["--profile", "--trace", "{}/none/t.json"], ": there is no folder "),
        (["--profile", "--trace", "{}/file/t.json"], ": there is no folder "),
        (["--profile", "--trace", "{}/t.json", "-o", "csv"], "--output csv has rows only and no profile; choose "),
        (["--profile", "--trace", "{}/t.json", "-o", "jsonl"], "--output jsonl has rows only and no profile; choose "),
        (["--trace", "{}/t.json"], "give --profile too."),
    ],
)
def test_refusals(octo: Callable[..., Any], engine: Any, tmp_path: Path, argv: list[str], error: str) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    shown = octo("bench", *(word.format(tmp_path) for word in argv))
    assert shown.code == 2 and error in shown.err and shown.err.count("\n") == 1
    assert engine.loaded is None and not shown.out
    assert {path.name for path in tmp_path.iterdir()} == {"folder.json", "file"}


def test_a_trace_that_cannot_be_written_after_all(
    octo: Callable[..., Any], engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables have been printed by then."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "t.json")

    monkeypatch.setattr("octo_run.cli.runtime.write_trace", full)
    shown = octo("bench", "--profile", "--trace", str(tmp_path / "t.json"))
    assert (
        shown.code == 1 and "t.json cannot be written: No space left on device" in shown.err and "ms/step" in shown.out
    )
