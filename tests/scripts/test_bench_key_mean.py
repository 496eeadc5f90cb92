"""The report of the key mean's benchmark; the measurement itself needs a GPU."""

from collections.abc import Callable
from types import ModuleType


def test_report_has_the_run_and_every_row(script: Callable[[str], ModuleType]) -> None:
    bench = script("bench_key_mean")
    rows = [bench.Row("oct2", 64, 8, "1x32768", 10.0, 10.37, 0.037, 1.6e-3, 1.7e-3)]
    text = bench.report(rows, "`a command` on one GPU", 5e5)
    assert "`a command` on one GPU. 8 KV heads, theta 500000; medians of 41 graph replays in turn" in text
    assert text.endswith("| oct2 | 64 | 8 | 1x32768 | 10.0 | 10.4 | +3.7% | 1.6e-03 | 1.7e-03 |\n")
