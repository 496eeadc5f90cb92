"""``octo-run completion``, and what a shell is answered."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from octo_run.cli.completion import SHELLS, names

PROGRAM = [sys.executable, "-m", "octo_run"]


def run(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *args], capture_output=True, text=True, env=os.environ | variables, timeout=120)


def answered(words: str, tmp_path: Path) -> list[str]:
    """What bash gets for a line whose last word is being completed."""
    line = f"octo-run {words}"
    shown = run(
        _OCTO_RUN_COMPLETE="bash_complete",
        COMP_WORDS=line,
        COMP_CWORD=str(len(line.split(" ")) - 1),
        XDG_CACHE_HOME=str(tmp_path),
        XDG_STATE_HOME=str(tmp_path),
    )
    assert not shown.stderr
    return [row.partition(",")[2] for row in shown.stdout.splitlines() if row]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_names_the_program_and_the_variable(shell: str) -> None:
    shown = run("completion", shell)
    assert shown.returncode == 0 and not shown.stderr
    assert "octo-run" in shown.stdout and f"_OCTO_RUN_COMPLETE={shell}_complete" in shown.stdout


def test_an_unknown_shell_is_refused() -> None:
    shown = run("completion", "tcsh")
    assert shown.returncode == 2 and "bash" in shown.stderr and "Traceback" not in shown.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_takes_the_script() -> None:
    script = run("completion", "bash").stdout
    shown = subprocess.run(["bash", "-c", f"{script}\ncomplete -p octo-run"], capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.strip().endswith("octo-run"), shown.stderr


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("gen", ["generate"]),
        ("chat --mod", ["--model"]),
        ("chat -m oc", ["octo-demo"]),
        ("bench --kv oct", None),
        ("show octo", ["octo-demo"]),
        ("sessions show x", []),
        ("completion z", ["zsh"]),
    ],
)
def test_words_are_completed(words: str, found: list[str] | None, tmp_path: Path) -> None:
    given = answered(words, tmp_path)
    if found is None:
        assert {"oct2", "oct3", "oct4"} <= {*given} and all(name.startswith("oct") for name in given)
    else:
        assert given == found


def test_a_failure_completes_nothing() -> None:
    def failing() -> list[str]:
        raise OSError("no disk")

    assert names(failing)(None, None, "") == []  # type: ignore[arg-type]
