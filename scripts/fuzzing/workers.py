"""Mutants before their reader, in processes of their own that may hang, die or eat memory.

A worker is forked for a few hundred mutants. It writes each into a folder, lets the kind's reader have it, and reports
an :class:`Outcome`. It is ended by a timer of CPU time when a mutant takes too long, and by its parent, which watches
its memory and the clock on the wall; the next worker goes on behind that mutant.
"""

import faulthandler
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from fuzzing.kinds import Kind, Trial, Wrong
from octo_run.errors import OctoError

ROOT = Path(__file__).resolve().parents[2]
BATCH = 400
_POLL = 0.05
_STEERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@dataclass(frozen=True)
class Limits:
    """What a mutant may take.

    Attributes:
        seconds: CPU time for each step of the check. The whole may take twice as many on the wall if it waits, twenty
            times if it works on a busy machine.
        memory: Bytes beyond what the worker had before.
        message: Characters of an error's text.
    """

    seconds: float = 5.0
    memory: int = 1 << 30
    message: int = 500


class Fault(NamedTuple):
    """What went wrong.

    Attributes:
        what: An exception's name, "hang", ...
        place: Where in the project's code.
        detail: One line.
        trace: The traceback.
    """

    what: str
    place: str
    detail: str
    trace: str = ""


class Outcome(NamedTuple):
    """What became of a mutant.

    Attributes:
        status: "accepted", "refused" or "failed".
        memory: In bytes.
        notes: The listed differences from a reference reader.
        message: The refusal.
        usage: The worker's, by now.
    """

    number: int
    status: str
    seconds: float
    memory: int
    fault: Fault | None = None
    notes: tuple[str, ...] = ()
    message: str = ""
    usage: tuple[int, float] = (0, 0.0)


@dataclass
class Failure:
    """A distinct fault: its first mutant and how often it was met."""

    fault: Fault
    number: int
    base: str
    count: int = 1


@dataclass
class Report:
    """A campaign's results for one kind of file."""

    kind: str
    mutants: int = 0
    accepted: int = 0
    refused: int = 0
    failed: int = 0
    slowest: tuple[float, int] = (0.0, 0)
    largest: tuple[int, int] = (0, 0)
    elapsed: float = 0.0
    differences: dict[str, int] = field(default_factory=dict)
    failures: dict[tuple[str, str], Failure] = field(default_factory=dict)

    def take(self, outcome: Outcome, base: str) -> bool:
        """Count an outcome.

        Returns:
            Whether it is a fault not met before.
        """
        self.mutants += 1
        self.slowest = max(self.slowest, (outcome.seconds, outcome.number))
        self.largest = max(self.largest, (outcome.memory, outcome.number))
        for note in outcome.notes:
            self.differences[note] = self.differences.get(note, 0) + 1
        if outcome.fault is None:
            self.accepted += outcome.status == "accepted"
            self.refused += outcome.status == "refused"
            return False
        self.failed += 1
        known = self.failures.get(outcome.fault[:2])
        if known is not None:
            known.count += 1
            return False
        self.failures[outcome.fault[:2]] = Failure(outcome.fault, outcome.number, base)
        return True


def campaign(
    kind: Kind,
    first: int = 0,
    count: int | None = None,
    seconds: float | None = None,
    limits: Limits = Limits(),
    on_fault: Callable[[Failure], None] = lambda _: None,
) -> Report:
    """Try the mutants from ``first`` on: ``count`` of them, or as many as ``seconds`` allow, or what comes first."""
    report, started = Report(kind.name), time.monotonic()
    deadline = None if seconds is None else started + seconds
    number, end = first, sys.maxsize if count is None else first + count
    with _scratch() as scratch:
        while number < end and (deadline is None or time.monotonic() < deadline):
            batch = number
            for outcome in _batch(kind, number, min(BATCH, end - number), limits, scratch, deadline):
                number = outcome.number + 1
                fault = outcome.fault
                if (
                    fault is not None
                    and fault.what.split()[0] in ("crash", "hang", "memory")
                    and outcome.number > batch
                ):
                    outcome = _again(kind, outcome, report, limits, scratch)
                base = kind.seeds[kind.mutant(outcome.number).seed].name if outcome.fault is not None else ""
                if report.take(outcome, base):
                    on_fault(report.failures[outcome.fault[:2]])  # type: ignore[index]
    report.elapsed = time.monotonic() - started
    return report


def single(kind: Kind, number: int, limits: Limits = Limits()) -> Outcome:
    """The outcome of one mutant, in a worker of its own."""
    with _scratch() as scratch:
        return next(_batch(kind, number, 1, limits, scratch, None))


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="octo-fuzz-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _again(kind: Kind, outcome: Outcome, report: Report, limits: Limits, scratch: Path) -> Outcome:
    """The outcome without the mutants that came before in its worker, for a fault of a worker met the first time."""
    fault = outcome.fault
    assert fault is not None
    if fault[:2] in report.failures:
        return outcome
    alone = next(_batch(kind, outcome.number, 1, limits, scratch, None))
    if alone.fault is not None:
        return alone
    return outcome._replace(fault=fault._replace(what=f"{fault.what} (not alone)"))


def _batch(
    kind: Kind, first: int, count: int, limits: Limits, scratch: Path, deadline: float | None
) -> Iterator[Outcome]:
    """The outcomes of the mutants from ``first`` on, up to the one that ended the worker, or to the deadline."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    process = context.Process(target=_work, args=(kind, first, count, limits, folder, sender), daemon=True)
    process.start()
    sender.close()
    number, since, largest, ended = first, time.monotonic(), 0, ""
    usual, used = _usage(process.pid)
    try:
        while deadline is None or time.monotonic() < deadline:
            if not receiver.poll(_POLL):
                (resident, cpu), waited = _usage(process.pid), time.monotonic() - since
                largest = max(largest, resident - usual)
                if largest > limits.memory:
                    ended = "memory"
                elif waited > limits.seconds * (2 if cpu - used < waited / 20 else 20):
                    ended = "hang"
                else:
                    continue
                os.kill(process.pid or 0, signal.SIGPROF)  # it writes down where it is, and ends
                process.join(2.0)
                yield _death(number, process, ended, time.monotonic() - since, largest, folder)
                return
            try:
                message = receiver.recv()
            except EOFError:
                process.join()
                yield _death(number, process, "", limits.seconds, largest, folder)
                return
            if message is None:
                return
            if isinstance(message, str):
                raise RuntimeError(f"The fuzzer itself fails at {kind.name}:{number}.\n{message}")
            number, since, largest = message.number + 1, time.monotonic(), 0
            usual, used = message.usage
            yield message
    finally:
        process.kill()
        process.join()
        receiver.close()
        shutil.rmtree(folder, ignore_errors=True)


def _death(number: int, process: BaseProcess, ended: str, seconds: float, memory: int, folder: Path) -> Outcome:
    """The outcome of a mutant that its worker did not survive. ``ended``: what the parent ended it for, if it did."""
    code = -(process.exitcode or 0)
    if ended == "memory":
        fault = Fault("memory", "", f"{memory / 2**20:,.0f} MB when it was stopped")
    elif ended:
        fault = Fault("hang", "", f"nothing came for {seconds:.0f} s")
    elif code == signal.SIGPROF:
        fault = Fault("hang", "", f"stopped after {seconds:g} s of CPU time")
    else:
        seconds = 0.0
        name = signal.Signals(code).name if code > 0 else f"exit code {-code}"
        fault = Fault(f"crash {name}", "", " ".join((folder / "printed").read_text(errors="replace").split())[:300])
    trace = (folder / "trace").read_text(errors="replace")
    places = [(Path(name), line, where) for name, line, where in _FRAME.findall(trace)]
    return Outcome(number, "failed", seconds, memory, fault._replace(place=_place(places), trace=trace))


_FRAME = re.compile(r'File "(.*?)", line (\d+) in (.*)')


def _place(frames: list[tuple[Path, Any, str]]) -> str:
    """The first of these frames, innermost first, that is in the project's code: ``folder/file.py:line (function)``."""
    for name, line, where in frames:
        path = name.resolve()
        if (
            path.is_relative_to(ROOT)
            and path.suffix == ".py"
            and not path.is_relative_to(ROOT / "scripts")
            and path.name != "errors.py"
        ):
            return f"{path.relative_to(ROOT)}:{line} ({where})"
    return f"{frames[0][0].name}:{frames[0][1]} ({frames[0][2]})" if frames else "unknown place"


def _usage(pid: int | None) -> tuple[int, float]:
    """Bytes of a process in memory, and the seconds of CPU time that it has had; 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, 0.0
    ticks = int(fields[11]) + int(fields[12])
    return int(fields[21]) * resource.getpagesize(), ticks / os.sysconf("SC_CLK_TCK")


# In the worker


def _work(kind: Kind, first: int, count: int, limits: Limits, scratch: Path, results: Connection) -> None:
    """What a worker does: each mutant into its seed's folder, read, and its outcome sent; None at the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    trace = (scratch / "trace").open("w")
    faulthandler.enable(trace, all_threads=False)
    faulthandler.register(signal.SIGPROF, trace, all_threads=False, chain=True)
    printed = os.open(scratch / "printed", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(printed, descriptor)
        setattr(sys, name, os.fdopen(descriptor, "w", buffering=1, errors="backslashreplace", closefd=False))
    usual = peak = _peak()
    folders: dict[int, Path] = {}
    for number in range(first, first + count):
        try:
            mutant = kind.mutant(number)
            folder = folders.get(mutant.seed)
            if folder is None:
                folder = folders[mutant.seed] = scratch / str(mutant.seed)
                folder.mkdir()
                kind.lay_out(folder, mutant.seed)
            mutant.write(folder)
        except BaseException:
            results.send(traceback.format_exc())
            return
        before, usual = peak, _usage(os.getpid())[0] or usual
        outcome = judge(kind, number, folder, limits)
        peak = _peak()
        if outcome.fault is None:
            outcome = _check_printed(outcome, printed)
        os.ftruncate(printed, 0)
        os.lseek(printed, 0, os.SEEK_SET)
        memory = peak - usual if peak > before else 0
        if memory > limits.memory and outcome.fault is None:
            outcome = outcome._replace(fault=Fault("memory", "unknown place", f"{memory / 2**20:,.0f} MB at most"))
        results.send(outcome._replace(memory=memory, usage=_usage(os.getpid())))
        if memory > limits.memory:
            break  # the peak tells nothing any more
    results.send(None)


def _peak() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def judge(kind: Kind, number: int, folder: Path, limits: Limits) -> Outcome:
    """Let the reader have the folder, in this process, and look at what comes out."""
    trial = Trial(limits.seconds)
    fault: Fault | None = None
    try:
        with trial.step():
            kind.check(folder, trial)
    except Wrong as error:
        fault = _wrong(error)
    except BaseException as error:
        text = " ".join(str(error).split())[:300]
        fault = Fault(type(error).__name__, _place(_frames(error)), text, "".join(traceback.format_exception(error)))
    finally:
        trial.end()
    for refusal in (*trial.refusals, *trial.aside) if fault is None else ():
        fault = fault or _check_message(refusal, limits)
    if fault is None:
        with suppress(OctoError):
            try:
                kind.compare(folder, trial)
            except Wrong as error:
                fault = _wrong(error)
    status = "failed" if fault is not None else "refused" if trial.refusals else "accepted"
    message = str(trial.refusals[0]) if trial.refusals else ""
    return Outcome(number, status, trial.slowest, 0, fault, tuple(trial.notes), message)


_DETAILS = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|`[^`]*`|/\S+|0x[0-9a-f]+|-?\d[\d,.]*|\[.*\]")


def _wrong(error: Wrong) -> Fault:
    """A wrong result as a fault: its place is what it says, without what differs from mutant to mutant."""
    return Fault(error.what, _DETAILS.sub("_", str(error))[:120], str(error))


def _frames(error: BaseException) -> list[tuple[Path, Any, str]]:
    stack = traceback.extract_tb(error.__traceback__)
    return [(Path(frame.filename), frame.lineno, frame.name) for frame in reversed(stack)]


def _check_message(error: OctoError, limits: Limits) -> Fault | None:
    text = str(error)
    if len(text) > limits.message:
        return Fault("message too long", _place(_frames(error)), f"{len(text):,} characters: {text[:100]!r}")
    if steers(text):
        return Fault("message with control characters", _place(_frames(error)), repr(text)[:300])
    return None


def _check_printed(outcome: Outcome, printed: int) -> Outcome:
    """A fault if what was written to standard output or error could steer a terminal."""
    size = os.lseek(printed, 0, os.SEEK_CUR)
    text = os.pread(printed, min(size, 1 << 20), 0).decode("utf-8", "replace")
    if not steers(text.replace("\n", " ").replace("\t", " ")):
        return outcome
    fault = Fault("printed control characters", "unknown place", repr(text)[:300])
    return outcome._replace(status="failed", fault=fault)


def steers(text: str) -> bool:
    """Whether a terminal could take a part of this text for something else than characters to show."""
    return any(
        unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(char) in _STEERING
        for char in set(text)
    )
