"""``octo-run completion``, and what a shell is answered."""

import json
import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from octo_run.cli.completion import FORMATS, SHAPES, SHELLS, WEIGHTS, items, names
from octo_run.cli.options import DTYPES

PROGRAM = [sys.executable, "-m", "octo_run"]


def run(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *args], capture_output=True, text=True, env=os.environ | variables, timeout=120)


def answered(words: str, tmp_path: Path) -> list[str]:
    """What bash gets for a line whose last word is being completed."""
    line = f"octo-run {words}"
    shown = run(
        _OCTO_RUN_COMPLETE="bash_complete",
        COMP_WORDS=line,
        COMP_WORDBREAKS=" \t\n\"'><=;|&(:@",
        XDG_CACHE_HOME=str(tmp_path),
        XDG_STATE_HOME=str(tmp_path),
    )
    assert not shown.stderr
    rows = [row.partition(",") for row in shown.stdout.splitlines() if row]
    return [value if kind == "plain" else kind for kind, _, value in rows]


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


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("gen", ["generate"]),
        ("bench --kv oct3,octopus", ["oct3,octopus2", "oct3,octopus3", "oct3,octopus4"]),
        ("bench --kv oct3:b", ["bf16"]),  # bash keeps what stands before a colon
        ("eval tasks file --weights=int4-", ["int4-128"]),
        ("show ./x", ["dir"]),
        ("chat --mod", ["--model"]),
        ("chat -m oc", ["octo-demo"]),
        ("sessions show x", []),
        ("completion z", ["zsh"]),
        ("chat --head ", ["bf16", "int8"]),
        ("chat --conditioning m", ["mean"]),
        ("chat --dtype f", ["float16", "float32", "fp16", "fp32"]),
        ("chat --device c", ["cpu", "cuda"]),
        ("import x --weights b", ["bf16"]),
        ("quantize x y --weights f", ["fp8"]),
        ("bench --random-weights mis", ["mistral-7b"]),
        ("bench --random-weights ./c", ["file"]),
        *((f"{words} ./x", ["file"]) for words in (
            "import", "eval tasks", "eval ppl --text", "eval codec --text", "eval needle --text", "generate -f",
            "generate --batch", "generate -o", "generate --json-schema", "generate --chat-template", "bench --trace",
        )),
    ],
)  # fmt: skip
def test_words_are_completed(words: str, found: list[str], tmp_path: Path) -> None:
    assert answered(words, tmp_path) == found


@pytest.mark.parametrize(("shell", "current"), [("zsh", "2"), ("fish", "--kv=bf")])
def test_a_value_behind_its_option(shell: str, current: str) -> None:
    """These shells replace the word as a whole, the option included."""
    words = {"COMP_WORDS": "octo-run bench --kv=bf", "COMP_CWORD": current}
    shown = run(_OCTO_RUN_COMPLETE=f"{shell}_complete", **words)
    assert "--kv=bf16" in shown.stdout.replace(",", "\n").splitlines(), shown


def test_names_are_those_of_the_engine() -> None:
    from octo_run.engine.shapes import SHAPES as ENGINE_SHAPES
    from octo_run.kernels import codec
    from octo_run.models.quantisation.schemes import WEIGHTS as ENGINE_WEIGHTS

    assert {*FORMATS} == {*codec.names(), "auto:56"} and {*WEIGHTS} == {*ENGINE_WEIGHTS, "auto"}
    assert {*SHAPES} == {*ENGINE_SHAPES}
    assert [item.value for item in items(DTYPES, "FLOAT16")] == ["float16"]


#: How a shell is started without anybody's settings, and what it has to read first.
INTERACTIVE = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], 'eval "$(octo-run completion bash)"'),
    "zsh": (["zsh", "-f", "-i"], 'autoload -Uz compinit; compinit -u -D; eval "$(octo-run completion zsh)"'),
    "fish": (["fish", "--no-config", "-i"], "octo-run completion fish | source"),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_tab_key_completes(shell: str, tmp_path: Path) -> None:
    """What the real shell gives the program after the tab key: values beside = and after : and , and files."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    program, log = tmp_path / "octo-run", tmp_path / "log"
    asked = f'[ -n "$_OCTO_RUN_COMPLETE" ] || [ "$1" = completion ]; then exec {shlex.join(PROGRAM)} "$@"; fi'
    told = f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\" >> {log}"
    program.write_text(f"#!/bin/sh\nif {asked}\n{told}\n")
    program.chmod(0o755)
    (tmp_path / "prompts.jsonl").touch()
    (tmp_path / "folder").mkdir()
    lines = {
        "benc\t--k\tbf\t": ["bench", "--kv", "bf16"],
        "bench --kv=bf\t": ["bench", "--kv=bf16"],
        "bench --kv oct3:bf\t": ["bench", "--kv", "oct3:bf16"],
        "bench --kv oct3,bf\t": ["bench", "--kv", "oct3,bf16"],
        "chat -m octo-d\t": ["chat", "-m", "octo-demo"],
        "show fol\t": ["show", "folder/"],
        "generate --batch pro\t": ["generate", "--batch", "prompts.jsonl"],
    }
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "TERM": "dumb", "PS1": "$ ",
        "OCTO_RUN_CACHE": str(tmp_path / "cache"), "XDG_STATE_HOME": str(tmp_path), "HISTFILE": "/dev/null",
    }  # fmt: skip
    argv, first = INTERACTIVE[shell]
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(tmp_path)
        os.execvpe(argv[0], argv, os.environ | variables)
    screen = b""
    try:
        os.write(terminal, f"{first}\n".encode())
        for number, line in enumerate(lines, start=1):
            os.write(terminal, f"octo-run {line}\n".encode())
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and (not log.exists() or log.read_text().count("\n") < number):
                if select.select([terminal], [], [], 0.1)[0]:
                    screen += os.read(terminal, 4096)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(terminal)
    assert log.exists(), screen
    assert [json.loads(line) for line in log.read_text().splitlines()] == [*lines.values()], screen


def test_a_failure_completes_nothing() -> None:
    def failing() -> list[str]:
        raise OSError("no disk")

    assert names(failing)(None, None, "") == []  # type: ignore[arg-type]
