"""The report of the attention benchmark; the measurement itself needs a GPU."""

from collections.abc import Callable
from types import ModuleType

import pytest


def test_report_has_the_run_the_errors_and_every_row(script: Callable[[str], ModuleType]) -> None:
    bench = script("bench_attention")
    rows = [
        bench.Row("16x32768", "8 x 4", 128, "cuDNN", 477.83, 4494.8, 1.058, 1.0, 0.81),
        bench.Row("mixed", "8 x 4", 128, "oct3", 169.4, 1806.2, 0.42, 1.96, None),
    ]
    text = bench.report(rows, 4.25e12, {"oct3": 0.0017}, "`a command` on one GPU")
    assert "`a command` on one GPU; copy bandwidth measured in the same run: 4.25 TB/s." in text
    assert "(bf16 outputs; worst of three lengths): oct3 1.7e-03." in text
    assert "| 16x32768 | 8 x 4 | 128 | cuDNN | 477.8 | 4,495 | 106% | 1.00 | 0.81 |" in text
    assert text.endswith("| mixed | 8 x 4 | 128 | oct3 | 169.4 | 1,806 | 42% | 1.96 |  |\n")


@pytest.mark.parametrize(("case", "lengths"), [("8x4x128@16x32768", [32768] * 16), ("4x7x128@1x65536", [65536])])
def test_cases_name_heads_and_lengths(script: Callable[[str], ModuleType], case: str, lengths: list[int]) -> None:
    shape = script("bench_attention").Shape.parse(case)
    assert f"{shape.kv_heads}x{shape.group}x{shape.dim}" == case.split("@")[0] and shape.lengths == lengths
