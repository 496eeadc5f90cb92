"""The comparison with transformers: its report, how failures end, and a whole run of a small shape on the CPU."""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from octo_run.engine import Engine


@pytest.fixture
def bench(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("bench_vs_transformers")


@pytest.fixture
def report(bench: ModuleType, tmp_path: Path) -> Any:
    """A report without rows, whose files are `r.md` and `r.json`."""
    args = argparse.Namespace(shape="a-shape", depth=16, tokens=10, prompt=100, repetitions=3,
                              markdown=tmp_path / "r.md", json=tmp_path / "r.json")  # fmt: skip
    return bench.Report("`command` on one GPU", "bfloat16", 4e12, args)


def test_ratios_are_of_times_and_within_a_test(bench: ModuleType) -> None:
    ours = [
        bench.Row("decode", "a", True, 10, 200.0, 190.0, 210.0),
        bench.Row("prefill", "a", True, 100, 1e3, 1e3, 1e3),
    ]
    peers = [
        bench.Row("decode", "p", False, 10, 50.0, 50.0, 50.0),
        bench.Row("decode", "q", False, 10, 400.0, 1.0, 999.0),
    ]
    assert [row.milliseconds for row in ours] == [5.0, 100.0], "of a step, of a whole prompt"
    assert bench.ratios([*ours, *peers]) == [("decode", "a", "p", 4.0), ("decode", "a", "q", 0.5)]


def test_report_is_written_after_every_row(bench: ModuleType, report: Any, capsys: pytest.CaptureFixture[str]) -> None:
    files = report.args
    report.step_bytes = 8_000_000_000
    report.add(bench.Row("decode", "octo-run, oct3", True, 10, 250.0, 240.0, 260.0))
    text = files.markdown.read_text()
    assert "`command` on one GPU. Shape `a-shape`" in text and "medians of 3 rounds" in text
    assert "reads 8.00 GB of weights, which takes 2.000 ms" in text
    assert "| octo-run, oct3 | 250.0 | 240.0 | 260.0 | 4.000 | 50 |" in text
    assert "## Prefill" not in text and "## Ratios" not in text
    assert capsys.readouterr().out == "decode, octo-run, oct3: 250.0 tokens/s, 4.000 ms\n"
    report.add(bench.Row("decode", "transformers, compiled", False, 10, 125.0, 125.0, 125.0))
    assert "| decode | octo-run, oct3 | transformers, compiled | 2.00 |" in files.markdown.read_text()
    plain = json.loads(files.json.read_text())
    assert [(row["name"], row["ms"]) for row in plain["rows"]] == [
        ("octo-run, oct3", 4.0), ("transformers, compiled", 8.0)
    ]  # fmt: skip


def test_a_peer_that_fails_has_no_row(bench: ModuleType, report: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> Any:
        raise torch.OutOfMemoryError("\nout of memory\nTried to allocate 1 GiB")

    assert bench.attempt("prefill, eager", report, fail) is None
    assert capsys.readouterr().out == "not measured: prefill, eager: OutOfMemoryError: out of memory\n"
    plain = json.loads(report.args.json.read_text())
    assert (plain["rows"], plain["failures"]) == ([], ["prefill, eager: OutOfMemoryError: out of memory"])
    assert "## Not measured\n\n- prefill, eager: OutOfMemoryError" in report.args.markdown.read_text()


def test_without_transformers(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # what main sets ends with the test
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert bench.main(["--device", "cpu"]) == 1
    assert "The package transformers cannot be imported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tokens", "0"], "'0' is no number of at least 1"),
        (["--decode-attention", "default,slow"], "'slow' is none of default, cudnn, flash, math"),
        (["--shape", "no-shape"], "'no-shape' is no config.json"),
    ],
)
def test_wrong_arguments(bench: ModuleType, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch,
                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="0"))
    try:
        code = bench.main(["--device", "cpu", *arguments])
    except SystemExit as end:
        code = end.code
    assert code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}])
def test_both_run_the_same_model(
    bench: ModuleType, make_checkpoint: Callable[..., Path], changes: dict[str, Any]
) -> None:
    pytest.importorskip("transformers")
    shape = str(make_checkpoint(**changes) / "config.json")
    ids = [(7 * i) % 8000 for i in range(70)]
    with torch.no_grad():
        model = bench.load_peer(shape, torch.device("cpu"), torch.float32)
        theirs = model(torch.tensor([ids]), logits_to_keep=1).logits[0, 0]
    engine = Engine.load("shape", kv="bf16", device="cpu", dtype="float32", max_context=128, random_weights=shape)
    torch.testing.assert_close(engine.prefill(engine.sequence(), ids), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_run_on_the_cpu(bench: ModuleType, make_checkpoint: Callable[..., Path], tmp_path: Path,
                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    shape = make_checkpoint() / "config.json"
    files = ["--markdown", str(tmp_path / "r.md"), "--json", str(tmp_path / "r.json")]
    sizes = ["--kv", "oct3", "--depth", "3", "--tokens", "4", "--prompt", "70", "--repetitions", "1"]
    assert bench.main(["--device", "cpu", "--shape", str(shape), *sizes, "--compile-prefill", *files]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert [(row["test"], row["name"]) for row in found["rows"]] == [
        ("decode", "octo-run, oct3"),
        ("prefill", "octo-run, oct3"),
        ("prefill", "transformers, eager"),
        ("decode", "transformers, compiled"),
        ("prefill", "transformers, compiled"),
    ]
    assert all(0 < row["least"] <= row["tokens_per_s"] <= row["most"] for row in found["rows"])
    assert [failure.split(":")[0] for failure in found["failures"]] == ["prefill, eager, cudnn attention"], "on a CPU"
    assert "## Ratios" in (tmp_path / "r.md").read_text()
