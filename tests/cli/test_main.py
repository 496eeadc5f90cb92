"""The group: lazy loading, speed of --help, exit codes, one sentence per failure."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import octo_run
from octo_run.cli import _COMMANDS, cli, console, list_models
from octo_run.cli.examples import EXAMPLES
from octo_run.errors import OctoError, UsageError

HEAVY = ("torch", "triton", "huggingface_hub", "transformers", "tokenizers", "sentencepiece", "prompt_toolkit", "rich")
HELP_SECONDS = 0.3
IMPORTS = "import asyncio, click, http.client, json, unittest.mock, xml.dom.minidom"
"""Work of the same kind, 0.08 s where --help takes 0.14: a slow or busy machine slows both."""


def processor_seconds(argv: list[str]) -> tuple[str, float]:
    """What a program prints, and the processor's time that it takes: the machine may be busy."""
    begun = sum(os.times()[2:4])
    shown = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return shown, sum(os.times()[2:4]) - begun


@pytest.mark.few(1)
@pytest.mark.parametrize("command", [None, *_COMMANDS])
def test_help_is_fast(command: str | None) -> None:
    argv = [sys.executable, "-m", "octo_run", *([command] if command else []), "--help"]
    for _ in range(5):
        _, imports = processor_seconds([sys.executable, "-c", IMPORTS])
        shown, seconds = processor_seconds(argv)
        assert "Usage: octo-run" in shown and "--debug" in shown
        if fast := seconds < max(HELP_SECONDS, 4 * imports):
            break
    assert fast, f"{seconds:.2f} s; the imports that it is measured by: {imports:.2f} s"


def all_commands(group: click.Group = cli, path: str = "") -> "Iterator[tuple[str, click.Command]]":
    """Every command with its words behind ``octo-run``."""
    yield path, group
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        words = f"{path} {name}".strip()
        if isinstance(command, click.Group):
            yield from all_commands(command, words)
        else:
            yield words, command


def test_every_help_has_examples_that_are_understood(octo: Callable[..., Any]) -> None:
    commands = dict(all_commands())
    assert set(EXAMPLES) == set(commands)
    for path in commands:
        shown = octo(*path.split(), "--help")
        assert shown.code == 0 and "Examples:\n" in shown.out and "--quiet" in shown.out, path
        for example in EXAMPLES[path]:
            assert f"  {example}\n" in shown.out, "in one line"
            words = shlex.split(re.split(r" > ", re.split(r"\| ?", example)[-1])[0])
            words = words[words.index("octo-run") + 1 :]
            context, command = click.Context(cli), cli
            while isinstance(command, click.Group):
                found = command.get_command(context, words.pop(0))
                assert found is not None, example
                command = found  # type: ignore[assignment]
            command.make_context("octo-run", words, parent=click.Context(cli, obj=octo_run.cli.Invocation()))


@pytest.mark.slow
def test_quiet_leaves_results_and_failures(octo: Callable[..., Any]) -> None:
    loud = octo("generate", "-p", "Once", "-n", "3")
    for argv in (("generate", "-q", "-p", "Once", "-n", "3"), ("-q", "generate", "-p", "Once", "-n", "3")):
        quiet = octo(*argv)
        assert (quiet.code, quiet.out, quiet.err) == (0, loud.out, "")
    failed = octo("--quiet", "show", "org/none")
    assert failed.code == 1 and "is not in" in failed.err
    assert octo("list").code == 0 and not console.is_quiet(), "the next run is not quiet"


def test_nothing_heavy_is_imported_before_a_command_runs() -> None:
    program = (
        "import sys, contextlib, io\n"
        "from octo_run.cli import main, _COMMANDS\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(['--help'])\n"
        "    for name in _COMMANDS: main([name, '--help'])\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"


def test_list_imports_neither_torch_nor_the_hub_client() -> None:
    program = (
        "import sys; from octo_run.cli import main; main(['list'])\n"
        "print([name for name in ('torch', 'huggingface_hub') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert shown.splitlines()[-1] == "[]"


def test_a_model_that_is_not_there_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    """Which is most of a start."""
    (tmp_path / "tasks").write_text('{"prompt": "x", "answer": "1"}')
    lines = [
        "generate -p x", "chat --single -p x", "bench", "eval ppl", "eval needle", f"eval tasks {tmp_path}/tasks",
        "eval codec",
    ]  # fmt: skip
    commands = [f"{line} -m a/none --offline".split() for line in lines]
    commands += [["show", "a/none"], ["quantize", "a/none", "x"]]
    program = f"import sys; from octo_run.cli import main; print([main(argv) for argv in {commands!r}])\n"
    program += "print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert shown.stdout.splitlines() == [str([1] * len(commands)), "False"], shown
    assert shown.stderr.count("fetch it with `octo-run pull a/none`.") == len(commands), shown.stderr


def test_version(octo: Callable[..., Any]) -> None:
    shown = octo("--version")
    assert (shown.code, shown.out, shown.err) == (0, f"octo-run {octo_run.__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["caht"], "did you mean 'chat'?"),
        (["help"], "did you mean '--help'?"),
        (["frobnicate"], "the commands are chat, generate, "),
        (["chat", "--bogus"], "--bogus"),
        (["generate", "--temp", "-1"], "--temp"),
        (["generate", "--top-p", "0"], "--top-p"),
        (["generate", "--ctx", "many"], "'many' is no number of tokens (like 8192 or 8k) and not 'auto'"),
        (["generate", "--ctx", "0"], "'0' is no number of tokens (like 8192 or 8k) and not 'auto'"),
        (["generate", "--dtype", "int3"], "--dtype"),
        (["pull"], "ORG/NAME[@REV]"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(octo: Callable[..., Any], argv: list[str], says: str) -> None:
    shown = octo(*argv)
    assert shown.code == 2
    assert shown.out == ""
    assert shown.err.startswith("octo-run: ") and says in shown.err
    assert shown.err.count("\n") == 1


def test_options_of_other_programs_are_told_with_ours(octo: Callable[..., Any], engine: Any) -> None:
    """Also where a letter of theirs is one of ours; what is a value stays one."""
    cases = {
        "chat -ngl 99": "No such option '-ngl': did you mean --device?",
        "chat -c 4096": "did you mean --max-context?",
        "chat --ctx-size 4096": "did you mean --max-context?",
        "chat -t 4": "did you mean --threads?",
        "generate -p x -ctk q8_0": "No such option '-ctk': did you mean --kv?",
        "generate -p x -ctv q8_0": "No such option '-ctv': did you mean --kv?",
        "chat -sys x": "did you mean --system?",
        "chat -st": "did you mean --single?",
        "generate -p x -np 2": "did you mean --sequences?",
        "chat -np 2": "No such option '-np'; `octo-run chat --help` lists",
        "list -ngl 2": "No such option '-ngl'; `octo-run list --help` lists",
        "eval ppl -ngl 2": "No such option '-ngl': did you mean --device?",
        "chat -cb": "No such option '-cb'; `octo-run chat --help` lists",
        "chat -fa on": "No such option '-fa': attention always works that way; leave it out.",
        "chat -hf a/b": "then -m ORG/NAME names it.",
        "chat --no-mmap": "leave it out.",
        "chat -b 512": "leave it out.",
        "chat -ub 512": "leave it out.",
        "chat -cnv": "leave it out.",
    }
    for line, says in cases.items():
        shown = octo(*line.split())
        assert shown.code == 2 and says in shown.err and shown.err.count("\n") == 1, (line, shown)
        assert not shown.out and engine.loads == [], line
    for line in ("generate -qn 1 -p -ngl", "generate -qp -c", "generate -mocto-demo -p -ngl"):
        engine.answers("a")
        assert octo(*line.split()).code == 0, line


def test_without_a_command_the_help_is_shown(octo: Callable[..., Any]) -> None:
    shown = octo()
    assert shown.code == 2 and "Commands:" in shown.err


class OutOfMemoryError(RuntimeError):
    """Named as PyTorch names it."""


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OctoError("The disk is full."), 1, "octo-run: The disk is full.\n"),
        (UsageError("There is no model 'x'."), 2, "octo-run: There is no model 'x'.\n"),
        (KeyboardInterrupt(), 130, ""),
        (PermissionError(13, "Permission denied", "/cache"), 1, "octo-run: /cache: Permission denied.\n"),
        (OutOfMemoryError("CUDA out of memory\n\nlong"), 1, "the GPU's memory ran out"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            1,
            "the memory ran",
        ),
        (RuntimeError("std::bad_alloc"), 1, "the memory ran out"),
        (OSError(12, "Cannot allocate memory"), 1, "the memory ran out"),
        (MemoryError(), 1, "the memory ran out"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
            *(1, "the memory ran out"),
        ),
        (ZeroDivisionError("division\nby zero"), 1, "unexpected failure (ZeroDivisionError: division by zero)"),
    ],
)
def test_failures_become_sentences(
    octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
) -> None:
    def fail(**_values: Any) -> None:
        raise error

    monkeypatch.setattr(list_models.command, "callback", fail)
    shown = octo("list")
    assert shown.code == code
    assert says in shown.err and "Traceback" not in shown.err
    assert shown.err.count("\n") <= 1
    for argv in (("--debug", "list"), ("list", "--debug")):
        shown = octo(*argv)
        assert shown.code == code
        if isinstance(error, Exception):
            assert "Traceback" in shown.err and says in shown.err


def test_a_reader_that_went_away_is_no_failure_to_explain() -> None:
    program = "import sys; from octo_run.cli import main; sys.exit(main(['list']))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() in (0, 1)


def test_text_that_the_terminal_cannot_encode_is_replaced() -> None:
    program = "import sys; from octo_run.cli import main; main(['--version']); print('caf\\xe9 \\u2603')"
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env={"PYTHONIOENCODING": "ascii", "PATH": ""}
    )
    assert shown.returncode == 0 and b"caf? ?" in shown.stdout


def test_json_has_no_numbers_that_json_has_not() -> None:
    assert (
        console.as_json({"a": [float("inf"), 1.5, (float("nan"),)], "b": "\u00e9"})
        == '{"a": [null, 1.5, [null]], "b": "\u00e9"}'
    )
