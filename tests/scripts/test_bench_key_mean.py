"""The key mean's benchmark: its report, and a run in the interpreter; its times need a GPU."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from .conftest import THREAD


def test_report_has_the_run_and_every_row(script: Callable[[str], ModuleType]) -> None:
    bench = script("bench_key_mean")
    rows = [bench.Row("oct2", 64, 8, "1x32768", 10.0, 10.37, 0.037, 1.6e-3, 1.7e-3)]
    text = bench.report(rows, "`a command` on one GPU", 5e5)
    assert "`a command` on one GPU. 8 KV heads, theta 500000; medians of 41 graph replays in turn" in text
    assert text.endswith("| oct2 | 64 | 8 | 1x32768 | 10.0 | 10.4 | +3.7% | 1.6e-03 | 1.7e-03 |\n")


@pytest.mark.slow
def test_a_run_in_the_interpreter(interpreted: Callable[..., tuple[list[dict[str, Any]], str]]) -> None:
    of_checks = {"CHECKED": "[1, 0, 1]", "SINK": "16", "NEW": "10"}
    changes = {f"check.__globals__['{name}']": code for name, code in of_checks.items()}
    changes |= {"ProcessPoolExecutor": THREAD, "KV_HEADS": "1", "REPEATS": "1", "ROTATE_BYTES": "1"}
    argv = ("--formats", "oct2", "--dims", "64", "--groups", "8", "--contexts", "2x64")
    rows, _ = interpreted("bench_key_mean", *argv, **changes)
    (row,) = rows
    assert (row["kv"], row["head_dim"], row["group"]) == ("oct2", 64, 8)
    assert 0 < row["error_without"] < 4e-3 and 0 < row["error_with"] < 4e-3 and row["with_mean"] > 0
