"""What grammars cost a step: a whole run of a small shape on the CPU, wrong answers, and the figures of a row."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from octo_run.engine.grammar import Guide
from octo_run.engine.step import Stepper
from octo_run.models.hub import resolve

pytest.importorskip("llguidance", reason="grammars need llguidance")
pytest.importorskip("triton", reason="Triton is not installed")
SMALL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 260, "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    "head_dim": 64, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture
def bench(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("bench_grammar")


@pytest.fixture
def run(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the script with a small shape and the tokenizer of the embedded model."""
    (tmp_path / "shape.json").write_text(json.dumps(SMALL))
    usual = ["--shape", str(tmp_path / "shape.json"), "--tokenizer", str(resolve("octo-demo")), "--device", "cpu",
             "--prompt-tokens", "4", "--tokens", "6", "--rounds", "1"]  # fmt: skip

    def start(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["scripts/bench_grammar.py", *usual, *argv])
        code = bench.main()
        assert isinstance(code, int)
        return code

    return start


def test_a_whole_run(run: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before, follow = Guide.fill, Stepper._follow
    files = tmp_path / "r.json", tmp_path / "r.md"
    assert run("--batches", "1,3", "--json", str(files[0]), "--markdown", str(files[1])) == 0
    found = json.loads(files[0].read_text())
    cases = [(row["grammar"], row["sequences"]) for row in found["rows"]]
    assert cases == [(name, batch) for batch in (1, 3) for name in ("json", "regex", "lark")]
    assert "`python scripts/bench_grammar.py --shape" in found["run"] and "llguidance " in found["run"]
    assert found["vocabulary"] % 64 == 0 and found["vocabulary"] > 260, "as many as the tokenizer has"
    for row in found["rows"]:
        assert row["free_ms"] > 0 and row["guided_ms"] > 0 and 0 < row["mask_us"] <= row["mask_99_us"]
        assert 0 < row["masks_ms"] <= row["wait_ms"] <= row["wait_99_ms"], "a CPU waits for all of it"
    printed = capsys.readouterr().out
    table = files[1].read_text().partition("| grammar")[2]
    assert table.strip() in printed and table.count("\n| ") == 7
    assert Guide.fill is before and Stepper._follow is follow, "nothing is watched any more"


class FakeEvent:
    """An event of a device that has done everything as soon as it is given."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, _stream: None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, later: "FakeEvent") -> float:
        return 1e3 * (later.time - self.time)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_measured_of_masks(
    bench: ModuleType, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """One for each sequence and token, and a wait for each step; on a GPU by its events."""
    found, make = list[Any](), bench.Watch
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(bench, "Watch", lambda _: make(torch.device(device)))
    monkeypatch.setattr(bench, "row_of", lambda *given: found.append(given) or SimpleNamespace(cells=lambda: []))
    begun = time.perf_counter()
    assert run("--batches", "3", "--grammars", "regex") == 0
    took = time.perf_counter() - begun
    ((name, batch, free, guided, watch),) = found
    assert (name, batch, len(free), len(guided)) == ("regex", 3, 1, 1)
    assert len(watch.masks) == 3 * 6 and len(watch.waits) == len(watch.of_steps) == 5
    assert 0 < sum(watch.of_steps) <= 1e-3 * sum(watch.waits) < took


def test_a_row_is_of_medians_means_and_a_free_step(bench: ModuleType) -> None:
    watch = bench.Watch(torch.device("cpu"), waits=[0.1, 0.1, 0.4], masks=[1e-4, 2e-4, 9e-4], of_steps=[1e-3, 3e-3])
    row = bench.row_of("json", 8, [10.0, 8.0, 90.0], [11.0, 12.0, 1.0], watch)
    assert (row.free_ms, row.guided_ms, row.more_percent) == (10.0, 11.0, 10.0)
    assert (row.wait_ms, row.wait_99_ms, row.wait_percent) == pytest.approx((0.2, 0.4, 2.0))
    assert (row.mask_us, row.mask_99_us, row.masks_ms) == pytest.approx((200, 900, 2.0))
    assert row.cells() == ["json", "8", "10.000", "11.000", "+10.0 %", "0.200", "0.400", "2.0 %", "200", "900", "2.000"]


def test_nothing_is_said_of_wrong_answers(
    bench: ModuleType, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = bench.Bench.round

    def wrong(self: Any, grammar: Any, *given: int) -> tuple[float, list[list[int]]]:
        took, answers = right(self, grammar, *given)
        answers[0][3] = max(self.engine.tokenizer.special_ids, default=0)
        return took, answers

    monkeypatch.setattr(bench.Bench, "round", wrong)
    assert run("--batches", "1", "--grammars", "json") == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("The token ") and "| json" not in printed.out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--grammars", "json,xml"), "there is no grammar xml; the grammars are json, regex, lark"),
        (("--batches", "1,0"), "'0' is no number of at least 1"),
        (("--tokens", "1"), "give 2 tokens or more"),
    ],
)
def test_what_cannot_be_measured(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], argv: tuple[str, str], says: str
) -> None:
    with pytest.raises(SystemExit):
        run(*argv)
    assert says in capsys.readouterr().err
    assert run("--tokenizer", "/none") != 0 and capsys.readouterr().err.count("\n") == 1
