"""Speed of families: which depths are measured, and that no row is lost and the report is written once."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FACTS = {"device": "a GPU", "torch_version": "2", "date": "today", "weights": "bf16", "least": 1.0, "most": 3.0,
         "ms_per_token": 500.0, "of_bandwidth": 0.5}  # fmt: skip


@pytest.fixture
def bench(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("bench_families")


def row(model: str, kv: str, depth: int, speed: float) -> dict[str, Any]:
    return FACTS | {"model": model, "kv": kv, "depth": depth, "tokens_per_s": speed}


#: Of a token of a shape of nobody.
BYTES = {"bytes_per_token": 1234, "all_in_bytes_per_token": 2345.6}


def test_depths_end_with_the_context(bench: ModuleType) -> None:
    assert bench.places([0, 32768, 98304], 131072) == {0: 0, 32768: 32768, 98304: 98304}
    assert bench.places([0, 32768, 98304], 40960) == {0: 0, 32768: 32768, 40896: 98304}
    assert bench.places([0, 98304, 200000], 32768) == {0: 0, 32704: 98304}, "the same place once"


def test_rows_are_kept_when_they_come(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shape that fails takes no other one's rows along, and neither does the end of the run."""
    out, report = tmp_path / "rows", tmp_path / "report.md"
    commands = []

    def lines(command: list[str]) -> Iterator[str]:
        shape, depths = command[command.index("--random-weights") + 1], command[command.index("--depth") + 1]
        commands.append((shape, depths))
        yield json.dumps(row(shape, "oct3", 0, 2.0)) + "\n"
        assert json.loads(out.read_text().splitlines()[-1])["model"] == shape, "before the next one comes"
        if shape == "qwen3-0.6b":
            raise subprocess.CalledProcessError(3, command)
        yield json.dumps(row(shape, "oct3", 40896, 1.0)) + "\n"

    monkeypatch.setattr(bench, "lines", lines)
    argv = ["--depths", "0,98304", "--json", str(out), "--markdown", str(report)]
    assert bench.main(["--shapes", "qwen3-0.6b,qwen3-30b-a3b", *argv]) == 1
    assert commands == [("qwen3-0.6b", "0,40896"), ("qwen3-30b-a3b", "0,40896")]
    text = report.read_text()
    planned = bench.planned_bytes("qwen3-30b-a3b", "oct3")
    assert planned["bytes_per_token"] == 48 * 2 * 4 * 56 < planned["all_in_bytes_per_token"]
    cells = (
        f"{planned['bytes_per_token']:,} | {planned['all_in_bytes_per_token']:,.0f} | 40,896 (the context has no room"
    )
    assert f"| qwen3-30b-a3b | bf16 | oct3 | {cells} for 98,304) | 1.0 |" in text
    assert text.endswith("Not measured to the end:\n\n- qwen3-0.6b: exit code 3\n")
    assert capsys.readouterr().out == text + "\n"
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(found) == 3 and all(row.items() >= bench.planned_bytes(row["model"], "oct3").items() for row in found)


def test_bytes_of_a_token_are_the_plan_s(bench: ModuleType) -> None:
    """Layers with a window and recurrent layers add nothing to a token, and something to all that there is."""
    recurrent, windowed = bench.planned_bytes("qwen3.5-9b", "bf16"), bench.planned_bytes("gpt-oss-20b", "bf16")
    assert recurrent["bytes_per_token"] == 8 * 2 * 4 * 256 * 2 and windowed["bytes_per_token"] == 12 * 2 * 8 * 64 * 2
    states = 24 * (4 * 8192 * 2 + 32 * 128 * 128 * 4)
    assert recurrent["all_in_bytes_per_token"] > recurrent["bytes_per_token"] + 17 * states / 262_144
    assert windowed["all_in_bytes_per_token"] > windowed["bytes_per_token"]


def test_runs_are_merged(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is measured; of a case that was measured twice the later row counts."""
    files = [tmp_path / "one", tmp_path / "two"]
    files[0].write_text("".join(json.dumps(row("a", kv, 0, 10.0) | BYTES) + "\n" for kv in ("oct3", "bf16")))
    files[1].write_text(json.dumps(row("a", "oct3", 0, 11.0) | BYTES | {"date": "tomorrow"}) + "\n")
    assert bench.main([part for file in files for part in ("--rows", str(file))]) == 0
    text = capsys.readouterr().out
    assert "a GPU, torch 2, today; a GPU, torch 2, tomorrow (UTC)" in text
    assert [line.split(" | ")[2:7] for line in text.splitlines() if line.startswith("| a |")] == [
        ["oct3", "1,234", "2,346", "0", "11.0"], ["bf16", "1,234", "2,346", "0", "10.0"]
    ]  # fmt: skip


def test_an_unknown_shape(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--shapes", "qwen3-0.6b,no-shape"])
    assert "'no-shape' is no config.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_a_small_shape(
    bench: ModuleType, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    shape = str(make_checkpoint(max_position_embeddings=128) / "config.json")
    out = tmp_path / "rows"
    assert bench.main(["--shapes", shape, "--depths", "0,1000", "--json", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["kv"], row["depth"], row["asked_depth"]) for row in found] == [
        (kv, depth, asked) for kv in ("oct3", "bf16") for depth, asked in ((0, 0), (64, 1000))
    ]
