"""The script of the quality report: settings that differ as they say, a report made of measured parts."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from octo_run.engine import Engine
from octo_run.engine.evaluation.perplexity import cache_bytes_per_token
from octo_run.kernels.codec import get

SCRIPT = Path(__file__).parents[2] / "scripts" / "report_quality.py"
IDS = list(range(5, 205))


@pytest.fixture(scope="module")
def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
        return importlib.import_module("report_quality")


def row(kv: str, group: str, change: float) -> dict[str, Any]:
    return {
        "group": group, "kv": kv, "perplexity": 28.5, "stderr": 0.5, "delta_percent": change, "delta_stderr": 0.05,
        "kl_mean": 0.001, "kl_p99": 0.01, "top1_agreement": 0.98, "bytes_per_token": 2048.0, "tokens_per_s": 9.0,
        "tokens": 20000,
    }  # fmt: skip


CPU = {"max_context": 256, "device": "cpu"}


KIND = {"conditioning": "full"}


@pytest.mark.slow
def test_codes_in_passing_are_those_of_the_real_pages(script: Any) -> None:
    """Pages of bf16 into which everything goes by way of a code give what coded pages give; exact layers differ."""
    real = script.load_case("octo-demo", script.Case("formats", "a", "octopus2", KIND), CPU).logits(IDS, 64)
    engine = script.load_case("octo-demo", script.Case("formats", "b", "oct2", KIND, tuple(range(8))), CPU)
    exact = engine.logits(IDS, 64)
    script._code_in_passing(engine, get("octopus2"), set())
    passing = engine.logits(IDS, 64)
    assert torch.allclose(passing, real, atol=0.05) and not torch.allclose(exact, real, atol=0.05)
    edges = script.load_case("octo-demo", script.Case("boundary", "c", "octopus2", KIND, (0, -1)), CPU)
    assert not torch.allclose(edges.logits(IDS, 64), passing, atol=0.05)
    assert edges.plan.shape.token_bytes == edges.config.num_kv_heads * 2 * (2 * 512 + 6 * 40)


@pytest.mark.slow
def test_conditioning_without_a_text_reads_no_text_and_keeps_the_function(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    exact = Engine.load("octo-demo", kv="bf16", **CPU)
    case = script.Case("weights", "a", "octopus3", KIND, of_weights=True)
    engine = script.load_case("octo-demo", case, CPU)
    maps = engine.forward.decoder.layers[0].attention.maps
    found = script.measure_weights(exact.forward.decoder, [])
    assert maps is not None and not list(tmp_path.rglob("*.npz"))  # nothing of it is kept for later loads
    assert all(
        bool(mean.abs().max() < 0.2 * shape.norm()) for mean, shape in zip(found.means, found.shapes, strict=True)
    )
    change = (engine.logits(IDS, 64) - exact.logits(IDS, 64)).abs().mean()
    assert 0 < change < 0.1


@pytest.mark.slow
def test_needles_become_a_part_of_the_report(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, out, doc = tmp_path / "text.txt", tmp_path / "part.json", tmp_path / "quality.md"
    text.write_text("The boats left at dawn, and the harbour was quiet again. Nobody spoke. " * 40)
    argv = ["report_quality.py", "needle", str(out), "--model", "demo=octo-demo", "--text", str(text), "--skip", "0",
            "--ctx", "384", "--questions", "4", "--per-text", "2", "--only", "oct3", "--device", "cpu"]  # fmt: skip
    monkeypatch.setattr("sys.argv", argv)
    assert script.main() == 0
    part = json.loads(out.read_text())
    assert [(row["kv"], row["trials"], row["texts"], row["partial"]) for row in part["rows"]] == [
        ("bf16", 4, 2, False), ("oct3", 4, 2, False),
    ]  # fmt: skip
    assert part["rows"][0]["correct"] >= 3
    script.write(doc, [out])
    report = doc.read_text()
    assert "### One number among 2, asked for at 384 tokens" in report and "\n| oct3 | " in report
    assert "text.txt, 2 texts of 384 tokens, each asked for 2 numbers hidden in it" in report


def test_the_report_begins_with_a_summary_of_what_was_measured(script: Any, tmp_path: Path) -> None:
    parts = [
        {"kind": "ppl", "model": "demo", "where": "CPU", "text": "books.txt", "tokens": 20000, "skip": 0,
         "stride": 2047, "rows": [row("bf16", "formats", 0), row("oct3", "formats", 0.44), row("oct2", "formats", 1.7),
                  row("turbo3", "formats", 2.0), row("oct2, as they are", "off", 1.0)]},
        {"kind": "needle", "model": "demo", "where": "CPU", "text": "a.txt", "per_text": 5, "length": 2048, "rows": [
            {"kv": kv, "depth": None, "trials": 20, "texts": 4, "correct": found, "recall": found / 20, "low": 0.7,
             "high": 1.0, "stderr": 0.05, "delta": found / 20 - 1, "delta_stderr": 0.025}
            for kv, found in (("bf16", 20), ("oct3", 19), ("oct2", 19))]},
    ]  # fmt: skip
    files = [tmp_path / f"{number}.json" for number in range(2)]
    for file, part in zip(files, parts, strict=True):
        file.write_text(json.dumps(part))
    script.write(tmp_path / "quality.md", files)
    report = (tmp_path / "quality.md").read_text().splitlines()
    title = report.index("## demo model")
    assert report[title + 2 : title + 7] == [
        "| format | perplexity change % | keys as they are | recall against bf16, points |",
        "|---|---|---|---|",
        "| oct3 | +0.44 ± 0.05 | - | -5.0 ± 2.5 |",
        "| oct2 | +1.70 ± 0.05 | +1.00 ± 0.05 | -5.0 ± 2.5 |",
        "",
    ]
    assert not {"aim", "reached", "target"} & {*re.findall("[a-z]+", "\n".join(report).lower())}
    assert any(line.startswith("| oct2, as they are | 40 | 28.500 ") for line in report)
    assert "| oct3 | 19/20 | 95.0 | 5.0 | 70.0 - 100.0 | -5.0 | 2.5 |" in report
    assert (tmp_path / "quality-demo.png").exists()


def test_codes_in_passing_have_the_bytes_of_the_real_pages(script: Any) -> None:
    real, passing = (
        script.load_case("octo-demo", script.Case("formats", "a", "octopus2", KIND), CPU),
        script.load_case("octo-demo", script.Case("boundary", "b", "octopus2", KIND, (0, -1)), CPU),
    )
    assert cache_bytes_per_token(passing) > cache_bytes_per_token(real)
    script._code_in_passing(passing, get("octopus2"), set())
    assert cache_bytes_per_token(passing) == cache_bytes_per_token(real)
