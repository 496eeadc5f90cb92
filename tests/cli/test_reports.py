"""``bench``, ``show``, ``list``, ``pull``, ``rm`` and ``doctor``."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octo_run.cli import console, doctor
from octo_run.models import hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OCTO_RUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (37_769_904, "37.8 MB"), (999_600, "1 MB"), (2 * 10**15, "2000 TB")],
)
def test_human_bytes(count: int, text: str) -> None:
    assert console.human_bytes(count) == text


def test_table_sets_numbers_flush_right() -> None:
    assert console.table(["name", "n"], [["a", "5"], ["long", "1,000"]]) == "name      n\na         5\nlong  1,000"


def test_bench_times_rounds_after_one_for_warming_up(octo: Callable[..., Any], engine: Any) -> None:
    argv = "bench --prompt-tokens 10 --tokens 5 --depth 20 -r 2 --json --kv octopus4"
    report = json.loads(octo(*shlex.split(argv)).out)
    assert [(len(ids), count) for ids, count in engine.runs] == [(20, 1), (30, 5)] * 3
    assert all(engine.runs[i + 1][0][:20] == engine.runs[i][0] for i in (0, 2, 4))
    assert len({ids[0] for ids, _ in engine.runs}) == 3, "no round may reuse the prefix of another"
    assert not {i for ids, _ in engine.runs for i in ids} & {0, 1, 2}, "special tokens stay out"
    assert engine.end_ids == frozenset()
    assert report["prompt_tokens_per_second"] == {"median": 20.0, "least": 20.0, "most": 20.0}
    generation = report["generation_tokens_per_second"]
    assert generation["most"] == 4.0 and generation["least"] == pytest.approx(4 / 1.5, abs=0.01)
    assert (report["kv"], report["depth"], report["repetitions"]) == ("octopus4", 20, 2)
    assert report["memory_plan"]["total"] == 1239 and report["memory_now"] == {"process_peak": 4_000_000}


def test_bench_text_names_speed_and_memory(octo: Callable[..., Any], engine: Any) -> None:
    out = octo("bench", "-r", "1").out
    assert "prompt      " in out and "generation  " in out and "median tokens/s" in out
    assert "memory planned: weights 1 kB, KV arena 200 B" in out and "process peak 4 MB" in out


def test_bench_that_does_not_fit_the_context(octo: Callable[..., Any], engine: Any) -> None:
    shown = octo("bench", "--depth", "4000")
    assert shown.code == 2 and "are 4,640 tokens and the context holds 4,096" in shown.err and not engine.runs


def test_show_json(octo: Callable[..., Any]) -> None:
    facts = json.loads(octo("show", "--json", "--device", "cpu").out)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["parameters"] == 18_880_896
    assert facts["weight_bytes"] == 4 * 18_880_896 and facts["dtype"] == "float32"
    rows = {row["kv"]: row for row in facts["kv"]}
    assert rows["octopus3"]["bytes_per_token"] == 8 * 2 * (56 + 56)
    assert rows["bf16"]["bytes_per_token"] == 8 * 2 * 2 * 128 * 4
    assert rows["octopus3"]["tokens_that_fit"] > rows["bf16"]["tokens_that_fit"] > 0
    assert all(row["all_in_bytes_per_token"] > row["bytes_per_token"] for row in facts["kv"])


def test_show_text_has_a_row_for_every_format(octo: Callable[..., Any]) -> None:
    from octo_run.kernels import codec

    out = octo("show").out
    assert "18,880,896" in out
    assert {line.split()[0] for line in out.splitlines() if line.split()} >= set(codec.names())


def test_show_of_a_model_that_does_not_fit(octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from octo_run.engine import plan

    monkeypatch.setattr(plan, "free_memory", lambda _device: 1_000_000)
    facts = json.loads(octo("show", "--json", "--device", "cpu").out)
    assert {(row["tokens_that_fit"], row["all_in_bytes_per_token"]) for row in facts["kv"]} == {(0, None)}
    assert octo("show", "--device", "cpu").code == 0


def test_list_and_rm(octo: Callable[..., Any], cache: Path) -> None:
    assert "octo-demo" in octo("list").out
    (demo,) = json.loads(octo("list", "--json").out)
    assert (demo["model"], demo["commit"], demo["complete"]) == ("octo-demo", None, True) and demo["bytes"] > 37e6
    for name, code, says in (("octo-demo", 2, "cannot be removed"), ("org/none", 1, "nothing to remove")):
        shown = octo("rm", "--yes", name)
        assert shown.code == code and says in shown.err and shown.err.count("\n") == 1


def test_list_names_incomplete_models(octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    entry = hub.ModelEntry("org/name", "v1", "0123456789abcdef" * 2 + "01234567", 5_000, Path("/x"), False)
    monkeypatch.setattr(hub, "list_models", lambda: [entry])
    out = octo("list").out
    assert "org/name@v1" in out and "0123456789ab " in out and "`octo-run pull org/name@v1` goes on" in out


def test_pull_is_quiet_in_a_pipe(octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pull(name: str, *, offline: bool, progress: Any) -> hub.ModelEntry:
        asked.append((name, offline, progress))
        return hub.ModelEntry("org/name", None, "a" * 40, 5_000, Path("/x"), True)

    monkeypatch.setattr(hub, "pull", pull)
    shown = octo("pull", "--offline", "org/name")
    assert asked == [("org/name", True, None)]
    assert shown.out == "" and "org/name at aaaaaaaaaaaa: 5 kB in /x" in shown.err and "\x1b" not in shown.err


def test_pull_draws_a_bar_at_a_terminal(octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def pull(name: str, *, offline: bool, progress: Any) -> hub.ModelEntry:
        progress(hub.PullProgress("config.json", 1, 3, 0, 0))
        progress(hub.PullProgress("model.safetensors", 3, 3, 2_000, 5_000))
        return hub.ModelEntry("org/name", None, "a" * 40, 5_000, Path("/x"), True)

    monkeypatch.setattr(hub, "pull", pull)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert octo("pull", "org/name").code == 0


@pytest.mark.parametrize("name", ["octo-demo", "no-slash", "a/b/c", "../x"])
def test_pull_of_a_wrong_name(octo: Callable[..., Any], cache: Path, name: str) -> None:
    shown = octo("pull", name)
    assert shown.code == 2 and shown.err.count("\n") == 1


def test_doctor_finds_all_here(octo: Callable[..., Any], cache: Path) -> None:
    shown = octo("doctor", "--json")
    report = json.loads(shown.out)
    assert shown.code == 0 and report["healthy"]
    subjects = {finding["subject"]: finding for finding in report["findings"]}
    assert {"python", "processor", "torch", "triton", "CUDA device", "model cache", "demo model"} <= set(subjects)
    assert str(cache) in subjects["model cache"]["detail"]
    assert not cache.exists(), "looking changes nothing"
    assert "everything needed is here" in octo("doctor").out


def test_doctor_says_plainly_what_is_wrong(
    octo: Callable[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache.write_text("a file where the folder should be")
    monkeypatch.setattr("octo_run.models.hub.resolve", lambda _name: tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    shown = octo("doctor")
    assert shown.code == 1 and "something is wrong" in shown.out
    assert "cannot be written" in shown.out and "Reinstall octo-run" in shown.out and "interpreted" in shown.out


def test_doctor_without_torch_or_a_new_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert [finding.status for finding in (*doctor._torch(), *doctor._cuda())] == ["wrong"]
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 0))
    assert next(doctor._python()).status == "wrong"
