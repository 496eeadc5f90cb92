"""The report of the recurrent kernels' benchmark; the measurement itself needs a GPU."""

from collections.abc import Callable
from types import ModuleType

import torch


def test_report_has_the_run_and_every_row(script: Callable[[str], ModuleType]) -> None:
    bench = script("bench_recurrent")
    rows = [bench.Row("step", 8, 12.34, 2718.0, None, 1.5e-3), bench.Row("chunk", 4096, 345.6, None, 400.0, 2e-3)]
    text = bench.report(rows, "`a command` on one GPU")
    assert "`a command` on one GPU. bf16, medians of 41 graph replays" in text
    assert "| step | 8 | 12.3 | 2,718 |  | 1.5e-03 |\n" in text
    assert text.endswith("| chunk | 4,096 | 345.6 |  | 400.0 | 2.0e-03 |\n")


def test_what_is_not_written_is_wrong(script: Callable[[str], ModuleType]) -> None:
    bench = script("bench_recurrent")
    ones = torch.ones(3)
    assert bench.relative(ones, ones) == 0 and bench.relative(ones * torch.nan, ones) == float("inf")
