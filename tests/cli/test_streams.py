"""Standard streams that are closed or full, text that would steer a terminal, results that must not be lost."""

import io
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octo_run.cli import console
from octo_run.cli.output import OutputFile, check_writable, deliver
from octo_run.errors import OctoError, UsageError

EVIL = "\x1b]52;c;aGk=\x07\x9b2J\u202eevil"
PROGRAM = f"{sys.executable} -m octo_run"


def shell(command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=120)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("list >&-", 1, "standard output cannot be written: it is closed;"),
        ("list --json >&-", 1, "standard output cannot be written: it is closed;"),
        ("--help >&-", 1, "standard output cannot be written: it is closed;"),
        ("list >/dev/full", 1, "standard output cannot be written: No space left on device;"),
        ("--version >/dev/full", 1, "standard output cannot be written: No space left on device;"),
        ("generate -p x >&-", 1, "standard output cannot be written: it is closed;"),
        ("bench >&-", 1, "standard output cannot be written: it is closed;"),
        ("eval codec --no-model >&-", 1, "standard output cannot be written: it is closed;"),
        ("chat <&-", 2, "standard input is closed: chat reads its questions there"),
        ("generate <&-", 2, "standard input is closed: give -p TEXT"),
        ("generate 0>/dev/null", 2, "standard input is closed: give -p TEXT"),
        ("rm org/name <&-", 1, "nothing to remove"),
        ("bogus 2>&-", 2, ""),
        ("bogus 2>/dev/full", 2, ""),
        ("list 2>&- <&-", 0, ""),
        ("chat <&- >&- 2>&-", 2, ""),
        ("list <&- >&- 2>&-", 1, ""),
    ],
)
def test_streams_that_are_closed_or_full(command: str, code: int, says: str) -> None:
    done = shell(f"{PROGRAM} {command}")
    assert done.returncode == code, done.stderr
    assert says in done.stderr and done.stderr.count("\n") == (1 if says else 0)


def test_a_file_does_not_take_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    program = (
        "import sys; from octo_run import process; process.prepare()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); sys.stderr.write('lost'); sys.exit(file.fileno() < 3)"
    )
    assert shell(f"{sys.executable} -c {json.dumps(program)} <&- >&- 2>&-".replace("\\n", "; ")).returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_a_notice_that_nobody_can_read_ends_nothing() -> None:
    done = shell(f"{PROGRAM} bogus 2>&1 >/dev/null | true; echo ${{PIPESTATUS[0]}}")
    assert done.stdout == "2\n" and done.stderr == ""


@pytest.mark.parametrize(
    "argv",
    [
        (EVIL,),
        ("list", EVIL),
        ("list", f"--{EVIL}"),
        ("generate", "--dtype", EVIL),
        ("generate", "--ctx", EVIL),
        ("generate", "--threads", EVIL),
        ("generate", "--temp", EVIL),
        ("show", f"./{EVIL}"),
        ("chat", "-m", f"./{EVIL}"),
        ("eval", EVIL),
        ("eval", "needle", "--lengths", EVIL),
        ("eval", "ppl", "--text", f"no{EVIL}"),
        ("eval", "ppl", "--csv", f"no/{EVIL}/x"),
        ("bench", "--tests", EVIL),
        ("bench", "--kv", EVIL),
    ],
)
def test_arguments_in_messages_are_escaped_and_short(octo: Callable[..., Any], argv: tuple[str, ...]) -> None:
    shown = octo(*argv)
    assert shown.code in (1, 2) and shown.out == ""
    assert shown.err.count("\n") == 1 and "\\x1b" in shown.err
    assert not set(shown.err) & set("\x1b\x07\x9b\u202e")
    long = octo(*argv[:-1], argv[-1] + "x" * 5000)
    assert len(long.err) < 520 and long.err.count("\n") == 1


def test_a_traceback_is_escaped_too(octo: Callable[..., Any]) -> None:
    shown = octo("--debug", "show", f"./{EVIL}")
    assert "Traceback" in shown.err and not set(shown.err) & set("\x1b\x07\x9b\u202e")


def test_what_is_printed_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    console.echo(f"a\n{EVIL}")
    console.notice(EVIL)
    console.echo(console.table([EVIL, "b"], [[EVIL, "c\nd"]]))
    value = {EVIL: ["\udce9", "\x7f", "naïve ☃\n"]}
    out, err = capsys.readouterr()
    assert not set(out + err) & set("\x1b\x07\x9b\u202e") and out.count("\n") == 4 and "c\\nd" in out
    console.print_json(value)
    printed = capsys.readouterr().out
    assert json.loads(printed) == value and "naïve ☃" in printed
    assert not set(printed) & set("\x1b\x07\x9b\u202e\x7f\udce9") and printed.count("\n") == 1


@pytest.mark.slow
def test_models_with_names_that_steer_a_terminal(
    octo: Callable[..., Any], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint(EVIL.replace("/", ""))
    for argv in (("show", str(folder)), ("show", "--json", str(folder)), ("generate", "-m", str(folder), "-p", "x")):
        shown = octo(*argv, *(("-n", "1", "--device", "cpu") if argv[0] == "generate" else ()))
        assert shown.code == 0, shown.err
        assert not set(shown.out + shown.err) & set("\x1b\x07\x9b\u202e")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--threads", "1000000"], "'1000000' is no whole number from 1 to 512"),
        (["--threads", "0"], "'0' is no whole number from 1 to 512"),
        (["--threads", "-1"], "'-1' is no whole number from 1 to 512"),
        (["--top-k", str(2**63)], "no whole number from 0 to 2,147,483,647"),
        (["--max-tokens", "1" + "0" * 30], "no whole number from 1 to 2,147,483,647"),
        (["--max-tokens", "9" * 5000], "no whole number from 1 to 2,147,483,647"),
        (["--seed", str(2**63)], "no whole number from 0 to 9,223,372,036,854,775,807"),
        (["--seed", "-1"], "no whole number from 0"),
        (["--ctx", "9" * 5000], "is no number of tokens (like 8192 or 8k) and not 'auto'"),
        (["--ctx", "-5"], "is no number of tokens (like 8192 or 8k) and not 'auto'"),
        (["--ctx", "²"], "is no number of tokens (like 8192 or 8k) and not 'auto'"),
        (["--temp", "nan"], "'nan' is no number"),
        (["--temp", "inf"], "'inf' is no number"),
        (["--repetition-penalty", "inf"], "'inf' is no number"),
        (["--top-p", "nan"], "'nan' is no number"),
        (["--min-p", "nan"], "'nan' is no number"),
        (["--presence-penalty", "nan"], "'nan' is no number"),
        (["--stop", "\udce9"], "is not UTF-8 text: character 1"),
        (["-p", "caf\udce9"], "is not UTF-8 text: character 4"),
        (["--chat", "--system", "\udce9"], "is not UTF-8 text: character 1"),
    ],
)
def test_numbers_and_texts_that_make_no_sense(
    octo: Callable[..., Any], engine: Any, argv: list[str], says: str
) -> None:
    shown = octo("generate", "-p", "x", *argv)
    assert shown.code == 2 and says in shown.err and shown.err.count("\n") == 1
    assert engine.loaded is None


@pytest.mark.parametrize(
    "argv",
    [
        ("bench", "--batch", str(2**63)),
        ("bench", "-r", "1" + "0" * 30),
        ("bench", "--tests", "pp" + "9" * 5000),
        ("bench", "--tests", "tg0"),
        ("bench", "--depth", "9" * 5000),
        ("bench", "--depth", "1,,2"),
        ("eval", "ppl", "--sink", str(2**63)),
        ("eval", "ppl", "--window", str(2**63)),
        ("eval", "ppl", "--codec-seed", str(2**64)),
        ("eval", "ppl", "--stride", str(2**63)),
        ("eval", "needle", "--lengths", "9" * 5000),
        ("eval", "needle", "--trials", str(2**63)),
        ("eval", "codec", "--vectors", "1" + "0" * 30),
        ("eval", "codec", "--seed", str(2**64)),
        ("eval", "codec", "--head-dim", "1" + "0" * 30),
    ],
)
def test_numbers_of_the_other_commands(octo: Callable[..., Any], engine: Any, argv: tuple[str, ...]) -> None:
    shown = octo(*argv)
    assert shown.code == 2 and shown.err.count("\n") == 1 and len(shown.err) < 520 and engine.loaded is None


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file can grow past 1,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_outputs_are_tried_before(tmp_path: Path, full_disk: None) -> None:
    with pytest.raises(UsageError, match="cannot be written in"):
        check_writable(tmp_path / "a.csv")
    for path, says in (
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "a.csv", "there is no folder"),
        (Path("/proc/a.csv"), "cannot be written in /proc"),
    ):
        with pytest.raises(UsageError, match=says):
            check_writable(path)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "argv",
    [
        ("eval", "ppl", "--csv", "/proc/a.csv"),
        ("eval", "ppl", "--plot", "/proc/a.png"),
        ("eval", "needle", "--csv", "/proc/a.csv"),
        ("eval", "needle", "--plot", "/proc/a.png"),
        ("eval", "codec", "--markdown", "/proc/a.md"),
        ("eval", "codec", "--plot", "/proc/a.svg"),
        ("eval", "tasks", "TASKS", "--output", "/proc/a.jsonl"),
        ("bench", "--profile", "--trace", "/proc/a.json"),
    ],
)
def test_every_output_is_tried_before_anything_is_loaded(
    octo: Callable[..., Any], engine: Any, argv: tuple[str, ...]
) -> None:
    shown = octo(*argv)
    assert shown.code == 2 and "cannot be written in /proc" in shown.err and engine.loaded is None


def test_a_result_is_printed_though_its_file_cannot_be_written(octo: Callable[..., Any], tmp_path: Path) -> None:
    argv = ("eval", "codec", "--no-model", "--kv", "oct3", "--vectors", "256", "--markdown", "/dev/full")
    shown = octo(*argv, "--plot", str(tmp_path / "plot.svg"))
    assert shown.code == 1 and "oct3" in shown.out
    assert "/dev/full cannot be written: No space left on device; the result is above" in shown.err
    assert "<svg" in (tmp_path / "plot.svg").read_text(), "the other file is written"


def test_a_file_is_never_there_in_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, link = tmp_path / "a.csv", tmp_path / "link.csv"
    target.write_text("before")
    link.symlink_to(target)

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OctoError, match=r"link.csv cannot be written: No space left"):
        deliver("result", [OutputFile(link, fail)])
    assert target.read_text() == "before" and capsys.readouterr().out == "result\n"
    deliver("result", [OutputFile(link, lambda path: path.write_text("after") and None)])
    assert target.read_text() == "after" and link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"a.csv", "link.csv"}


@pytest.mark.slow
def test_a_result_that_standard_output_does_not_take_is_shown_elsewhere(tmp_path: Path) -> None:
    command = f"{PROGRAM} eval codec --no-model --kv oct3 --vectors 256 --markdown {tmp_path}/a.md"
    done = shell(f"{command} >/dev/full")
    assert done.returncode == 1 and "standard output cannot be written: No space" in done.stderr.splitlines()[-1]
    assert "oct3" in done.stderr and "oct3" in (tmp_path / "a.md").read_text()


def test_memory_advice_names_options_that_there_are(octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from octo_run.cli import runtime

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(runtime, "load_engine", fail)
    shown = octo("bench")
    assert shown.code == 1 and "fault of octo-run" not in shown.err and shown.err.count("\n") == 1
    assert "the memory ran out; close other programs or choose a smaller --ctx, a smaller --batch" in shown.err
    monkeypatch.setattr("octo_run.engine.evaluation.codec_report.gaussian", fail)
    shown = octo("eval", "codec", "--no-model", "--kv", "oct3")
    assert shown.code == 1 and "choose a smaller --vectors" in shown.err and "--ctx" not in shown.err


def test_a_folder_that_was_deleted_is_no_fault(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    done = shell(f"cd {folder}; rmdir {folder}; PYTHONPATH={Path.cwd()} {PROGRAM} list")
    assert done.returncode == 0 and "octo-demo" in done.stdout, done.stderr


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_for_a_terminal_break_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command between backticks stays whole, as does a word that is longer than a line; a pipe gets lines as they
    are, and so does a terminal of few columns."""
    monkeypatch.setattr(console, "width", lambda: 30)
    text = "octo-run: there is nothing of that name; run `octo-run pull ORG/NAME again` first, or else " + "x" * 40
    lines = console.fitted(text, _Terminal()).split("\n")
    assert lines[:3] == ["octo-run: there is nothing of", "that name; run", "`octo-run pull ORG/NAME again`"]
    assert lines[-1] == "x" * 40 and " ".join(lines) == text
    assert console.fitted("  an example that is indented, too", _Terminal()) == "  an example that is\n  indented, too"
    assert console.fitted("one line\n\nanother", _Terminal()) == "one line\n\nanother"
    monkeypatch.setattr(console, "width", lambda: 22)
    assert console.fitted("the workspace takes 17.8 MB, 95 %", _Terminal()) == "the workspace takes\n17.8 MB, 95 %"
    columns = "/set NAME  set how answers are drawn"
    monkeypatch.setattr(console, "width", lambda: 32)
    assert console.fitted(columns, _Terminal()) == "/set NAME  set how answers are\n           drawn"
    monkeypatch.setattr(console, "width", lambda: 24)  # too narrow for that
    assert console.fitted(columns, _Terminal()) == "/set NAME  set how\n    answers are drawn"
    assert console.fitted(text, io.StringIO()) == text
    monkeypatch.setattr(console, "width", lambda: 19)
    assert console.fitted(text, _Terminal()) == text
