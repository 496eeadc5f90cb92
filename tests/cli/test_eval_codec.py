"""``octo-run eval codec`` from the outside."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_json_plot_and_report(octo: Callable[..., Any], tmp_path: Path) -> None:
    report, plot = tmp_path / "codec.md", tmp_path / "codec.svg"
    shown = octo("eval", "codec", "--kv", "octopus2,turbo2", "--vectors", "256", "--no-model", "--json",
                 "--markdown", str(report), "--plot", str(plot))  # fmt: skip
    assert shown.code == 0, shown.err
    rows = json.loads(shown.out)
    assert [(row["data"], row["codec"], row["bytes"]) for row in rows] == [
        ("gaussian", "octopus2", 40),
        ("gaussian", "turbo2", 34),
    ]
    title = plot.read_text("utf-8")
    assert "<!-- random vectors" in title and "bundled sample" not in title, "no text was read"
    assert "## Gaussian" in report.read_text("utf-8")


def test_wrong_arguments(octo: Callable[..., Any], tmp_path: Path) -> None:
    for arguments, expected in (
        (["--kv", "octopus9"], "octopus9"),
        (["--head-dim", "100"], "--head-dim 100"),
        (["--text", str(tmp_path / "none.txt")], "there is no such file"),
        (["--plot", "figure.bmp"], "figure.bmp"),
        (["--markdown", str(tmp_path / "no" / "report.md")], "there is no folder"),
        (["--vectors", "1"], "--vectors"),
    ):
        shown = octo("eval", "codec", "--no-model", *arguments)
        assert shown.code == 2 and expected in shown.err, (arguments, shown.err)


def test_ctrl_c_prints_the_rows_that_there_are(
    octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from octo_run.engine.evaluation import codec_report

    measure = codec_report.gaussian

    def interrupted(*args: Any) -> Any:
        yield next(measure(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(codec_report, "gaussian", interrupted)
    report, argv = tmp_path / "a.md", ("eval", "codec", "--kv", "octopus2,turbo2", "--vectors", "256", "--no-model")
    shown = octo(*argv, "--markdown", str(report))
    assert shown.code == 130 and "octopus2" in shown.out and "turbo2" not in shown.out
    assert "eval codec was interrupted at 50 %: these figures are incomplete" in shown.err
    assert shown.out.endswith("partial: not all codecs were measured\n") and "\npartial: not all" in report.read_text()
    assert [row["codec"] for row in json.loads(octo(*argv, "--json").out)] == ["octopus2"]
