"""The attention benchmark: its report and names, and a run in the interpreter; its times need a GPU."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from .conftest import THREAD


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


def test_the_general_kernel_is_put_in_place_of_the_chosen_one(script: Callable[[str], ModuleType]) -> None:
    from octo_run.kernels.attention.dispatch import Call, Device, Element, Kernel, Pages, Queries, Stored, Width

    bench = script("bench_attention")
    call = Call(Device.HOPPER, Stored.TRELLIS, Element.HALF, Queries.ONE, Pages.SOME, Width.ABOVE_256)
    found = {kv: bench.kernel_for(call, bench.adds(kv, "general")) for kv in ("oct3", "oct3+mean", "oct3+mean+general")}
    assert found == {
        "oct3": Kernel.WIDE_DECODE, "oct3+mean": Kernel.WIDE_DECODE, "oct3+mean+general": Kernel.GENERAL_DECODE
    }  # fmt: skip
    assert bench.form("oct3+mean+general", 64).name == "oct3"


@pytest.mark.parametrize(
    ("argv", "says"),
    [(["--formats", "oct3+fast"], "oct3+fast adds fast"), (["--peers", "cuDNN,none"], "there are no peers none")],
)
def test_unknown_names(
    script: Callable[[str], ModuleType], argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script("bench_attention").main(argv)
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_in_the_interpreter(interpreted: Callable[..., tuple[list[dict[str, Any]], str]]) -> None:
    """The general kernel: those for Hopper are no Triton kernels, and the interpreter has no products of bf16."""
    formats = ["oct3", "oct3+mean+general"]
    rows, text = interpreted(
        "bench_attention", "--cases", "1x2x512@1x64,1x1x64@2x64", "--formats", ",".join(formats), "--peers", "",
        ProcessPoolExecutor=THREAD, copy_bandwidth="lambda: 1e9", CHECKED="[1, 0, 1]", SINK="16", NEW="10",
        ROTATE_BYTES="1", REPEATS="1",
    )  # fmt: skip
    assert [(row["heads"], row["kernel"]) for row in rows] == [(h, kv) for h in ("1 x 2", "1 x 1") for kv in formats]
    assert "kernels interpreted: no times" in text
    assert "| heads x group @ batch x tokens, us | head_dim | oct3 | oct3+mean+general |" in text
