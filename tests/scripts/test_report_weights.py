"""The report on formats of weights: its table has what is done, in the order of weights and caches."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from octo_run.engine.evaluation.perplexity import Row


@pytest.fixture(scope="module")
def report(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("report_weights")


def row(label: str, perplexity: float, **changes: Any) -> Row:
    values = {
        "kv": label, "perplexity": perplexity, "stderr": 0.1, "delta_percent": 10 * perplexity - 100,
        "delta_stderr": 0.1, "kl_mean": 0.0, "kl_p99": 0.0, "top1_agreement": 1.0, "bytes_per_token": 1.0,
        "tokens_per_s": 1.0, "tokens": 100,
    }  # fmt: skip
    return Row(**values | changes)


def cells(table: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]


def test_rows_stand_by_weights_then_cache(report: ModuleType) -> None:
    labels = {"bf16": 10.0, "nearest-128/bf16": 12.0, "int4/oct3": 11.1, "int4/bf16": 11.0, "oct3": 10.2}
    found = cells(report.table("m", "t", [row(label, value) for label, value in labels.items()]))
    assert [line[:2] for line in found] == [
        ["bf16", "bf16"], ["bf16", "oct3"], ["int4", "bf16"], ["int4", "oct3"], ["nearest-128", "bf16"]
    ]  # fmt: skip
    assert [line[5] for line in found] == ["-", "+2.00", "-", "+0.91", "-"]
    assert [line[6] for line in found] == ["-", "-", "50 %", "55 %", "100 %"]


def test_what_is_missing_is_not_compared_with(report: ModuleType) -> None:
    table = report.table("m", "t", [row("bf16", 10.0, partial=True), row("int8/oct3", 10.1, partial=True)])
    assert "scored (not all)" in table
    assert cells(table)[1][5:7] == ["-", "-"]


def test_a_table_is_written_behind_the_others(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.md"
    text.write_text("Once upon a time there was a ship, and the ship had a captain who liked to read. " * 30)
    monkeypatch.setattr(report, "CONTEXT", 128)
    monkeypatch.setattr(report, "STRIDE", 64)
    arguments = ["report_weights.py", "-o", str(out), "--tokens", "200", "--formats", "int8/bf16"]
    for name in ("one", "two"):
        monkeypatch.setattr(sys, "argv", [*arguments, f"{name}=octo-demo={text}"])
        report.main()
    written = out.read_text()
    assert written.index("# Quality") < written.index("## one") < written.index("## two")
    assert written.count("| int8 | bf16 |") == 2 and "(not all)" not in written
