"""`--kv auto:N` in the real program, with the embedded model."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHOSEN = re.compile(r"^formats: auto:56 \(K [1-8] x oct.*; V [1-8] x oct.*; 56\.00 bytes on average\)$", re.MULTILINE)


@pytest.fixture
def octo(programs: Any) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    def run(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
        return programs.run([*arguments, "--device", "cpu", "--threads", "1"], environment)  # type: ignore[no-any-return]

    return run


@pytest.mark.slow
def test_generate_says_what_was_chosen_and_answers_the_same_again(
    environment: dict[str, str], octo: Any, tmp_path: Path
) -> None:
    """The second time nothing is measured."""
    environment = environment | {"OCTO_RUN_CACHE": str(tmp_path / "new")}
    argv = ("generate", "-p", "The boats left at dawn. " * 40, "--kv", "auto:56", "--temp", "0", "-n", "24")
    runs = [octo(environment, *argv) for _ in range(2)]
    for run in runs:
        assert run.returncode == 0, run.stderr
        lines = run.stderr.splitlines()
        assert lines[0].startswith(
            "octo-demo on cpu, weights int8, head int8, KV cache auto:56: context 4,096 tokens, "
            "1,792 bytes per packed token"
        )
        told = "auto:56: measuring how precise the keys and values of 8 layers must be" in lines
        assert told == (run is runs[0])
        assert CHOSEN.search(run.stderr)
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout) > 20
    assert runs[0].stderr.splitlines()[-1] == runs[1].stderr.splitlines()[-1]
    with_bf16 = octo(environment, *argv[:3], "--kv", "bf16", *argv[5:])
    assert runs[0].stdout[:20] == with_bf16.stdout[:20]


@pytest.mark.slow
def test_bench_and_eval_take_it(environment: dict[str, str], octo: Any) -> None:
    run = octo(environment, "bench", "--kv", "auto:56", "--tests", "tg4", "-r", "1", "--depth", "300", "-o", "json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["rows"][0]["kv"] == "auto:56" and report["memory"]["int8, head int8 auto:56"]["formats"].startswith(
        "auto:56 (K "
    )
    run = octo(environment, "eval", "ppl", "--kv", "oct2,auto:56", "--ctx", "512", "--json")
    assert run.returncode == 0, run.stderr
    _, oct2, auto = json.loads(run.stdout)
    assert 0 < auto["kl_mean"] < oct2["kl_mean"] and auto["bytes_per_token"] > oct2["bytes_per_token"]


@pytest.mark.few(1)
@pytest.mark.parametrize("kv", ["auto:10", "auto:x", "auto:bf16"])
def test_what_is_no_budget(kv: str, environment: dict[str, str], octo: Any) -> None:
    for argv in (("generate", "-p", "x"), ("chat",), ("bench",), ("eval", "ppl")):
        run = octo(environment, *argv, "--kv", kv)
        assert (run.returncode, run.stdout) == (2, "") and run.stderr.count("\n") == 1
        assert f"--kv '{kv}': auto chooses formats" in run.stderr
