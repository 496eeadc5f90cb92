"""The report of the measurement of prefill; the measurement itself needs a GPU."""

from collections.abc import Callable
from types import ModuleType

import torch


def test_report_says_what_ran_and_what_the_rows_are(script: Callable[[str], ModuleType]) -> None:
    bench, common = script("bench_prefill"), script("bench_report")
    run = common.provenance(["/a/bench_prefill.py", "--past", "0"], torch.device("cpu"), [torch])
    rows = [bench.Row("4 tokens after 0", "SDPA flash", 1.5, 1.0), bench.Row("4 tokens after 0", "ours, oct3", 3, 0.5)]
    text = bench.report(rows, {"oct3": 2.4e-3, "bf16": 2e-3}, run)
    assert text.startswith("# Prefill attention and coding")
    assert "`python scripts/bench_prefill.py --past 0` on one CPU (" in text
    assert f"torch {torch.__version__}, 20" in text and "(UTC). 32 query and 8 KV heads" in text
    assert "relative errors: oct3 2.4e-03, bf16 2.0e-03." in text
    assert text.endswith(
        "| case | kernel | ms | SDPA's time / this |\n| --- | --- | --- | --- |\n"
        "| 4 tokens after 0 | SDPA flash | 1.500 | 1.00 |\n| 4 tokens after 0 | ours, oct3 | 3.000 | 0.50 |\n"
    )
