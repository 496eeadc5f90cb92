"""The fuzzer finds planted faults of every kind, tries the same for the same seed, and is content with the readers."""

import ctypes
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from octo_run.errors import OctoError

Script = Callable[[str], ModuleType]
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fuzz.py"
STEERING = "\x1b]52;c;b2N0bw==\x07"
BAD = 3  # the number of the mutant at which planted readers fail


def planted(script: Script, reader: Callable[[bytes], None], compare: Callable[..., None] | None = None) -> Any:
    """A kind of file whose mutants hold their number, and this reader of theirs."""
    kinds, corpora = script("fuzzing.kinds"), script("fuzzing.corpora")

    class Numbered(kinds.Kind):  # type: ignore[misc, name-defined]
        def mutant(self, number: int) -> Any:
            return kinds.Mutant(0, "file", str(number).encode())

    def check(folder: Path, _trial: object) -> None:
        reader((folder / "file").read_bytes())

    def mutator(_seeds: object) -> Callable[[random.Random, object], bytes]:
        return lambda _rng, _seed: b""

    extra = {} if compare is None else {"compare": compare}
    return Numbered("planted", [corpora.Seed("a valid file", "file", b"")], mutator, check, **extra)


def key_error(data: bytes) -> None:
    if int(data) == BAD:
        {}["missing"]


def panic(data: bytes) -> None:
    if int(data) == BAD:
        raise type("PanicException", (BaseException,), {})("called `Option::unwrap()` on a `None` value")


def spin(data: bytes) -> None:
    while int(data) == BAD:
        pass


def block(data: bytes) -> None:
    if int(data) == BAD:
        time.sleep(60)


def eat(data: bytes) -> None:
    if int(data) == BAD:
        bytearray(os.urandom(1 << 20) * 300)  # let go of at once


def eat_and_hold(data: bytes) -> None:
    held = []
    while int(data) == BAD:
        held.append(bytearray(b"x" * (8 << 20)))
        time.sleep(0.005)


def crash(data: bytes) -> None:
    if int(data) == BAD:
        ctypes.string_at(0)


def leave(data: bytes) -> None:
    if int(data) == BAD:
        os._exit(0)


def print_escapes(data: bytes) -> None:
    if int(data) == BAD:
        os.write(2, STEERING.encode())


def say_much(data: bytes) -> None:
    if int(data) == BAD:
        error = OctoError("short")
        error.args = ("long " * 101,)
        raise error


def say_escapes(data: bytes) -> None:
    error = OctoError("plain")
    if int(data) == BAD:
        error.args = (f"The file names {STEERING}.",)
    raise error


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("reader", "what"),
    [
        (key_error, "KeyError"),
        (panic, "PanicException"),
        (spin, "hang"),
        (block, "hang"),
        (eat, "memory"),
        (eat_and_hold, "memory"),
        (crash, "crash SIGSEGV"),
        (leave, "crash exit code 0"),
        (print_escapes, "printed control characters"),
        (say_much, "message too long"),
        (say_escapes, "message with control characters"),
    ],
)
def test_planted_fault(script: Script, reader: Callable[[bytes], None], what: str) -> None:
    workers = script("fuzzing.workers")
    limits = workers.Limits(seconds=0.5 if what == "hang" else 20, memory=200 << 20, message=500)
    told = []
    report = workers.campaign(planted(script, reader), 0, 8, limits=limits, on_fault=told.append)
    assert (report.mutants, report.failed, report.accepted + report.refused) == (8, 1, 7), "the others are tried, too"
    (failure,) = report.failures.values()
    assert told == [failure]
    assert (failure.fault.what, failure.number, failure.base) == (what, BAD, "a valid file")
    if what in ("hang", "KeyError"):
        assert reader.__name__ in failure.fault.trace
    if what == "memory":
        assert report.largest[0] > limits.memory and report.largest[1] == BAD


def test_wrong_results_and_listed_differences(script: Script) -> None:
    """A difference that a table lists is counted by its reason, another one is a fault."""
    kinds, workers = script("fuzzing.kinds"), script("fuzzing.workers")

    def compare(folder: Path, trial: Any) -> None:
        number = int((folder / "file").read_bytes())
        if number == BAD:
            raise kinds.Wrong("accepted, the library refuses", "no 12 at /x/y, 0x7f3a2e10, 'it\\'s' `1`")
        if number > BAD:
            trial.notes.append("listed")

    report = workers.campaign(planted(script, lambda _: None, compare), 0, 6)
    assert list(report.failures) == [("accepted, the library refuses", "no _ at _ _, _ _")]
    assert report.differences == {"listed": 2} and report.accepted == 5


def test_time_is_bounded(script: Script) -> None:
    workers = script("fuzzing.workers")
    started = time.monotonic()
    report = workers.campaign(planted(script, lambda _: time.sleep(0.05)), 0, seconds=1.0)
    assert 1.0 <= time.monotonic() - started < 10.0
    assert 1 < report.mutants <= 20 and not report.failures


def test_messages_that_steer(script: Script) -> None:
    steers = script("fuzzing.workers").steers
    assert not steers("Äpfel, 你好, 🙂, \\x1b[2J, ▁")
    for text in ("\x1b[2J", "\x9b31m", "a\nb", "\x7f", "\ud800", "\u202e", "\u2028", "\u2066"):
        assert steers(text), ascii(text)


@pytest.mark.slow
def test_same_seed_same_mutants(script: Script) -> None:
    """In another process too, with another hash of strings."""
    code = (
        "import hashlib, fuzz\n"
        "for name, make in fuzz.KINDS.items():\n"
        "    kind, digest = make(None), hashlib.sha256()\n"
        "    for number in range(40):\n"
        "        mutant = kind.mutant(number)\n"
        "        digest.update(repr((mutant.seed, mutant.file, mutant.node)).encode() + mutant.data)\n"
        "    print(name, digest.hexdigest())\n"
    )
    found = []
    for hashing in "12":
        environment = {
            **os.environ,
            "PYTHONHASHSEED": hashing,
            "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path]),
        }
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        found.append(done.stdout)
    assert found[0] == found[1] and len(found[0].splitlines()) == len(script("fuzzing.kinds").KINDS)


def test_real_files_change_every_fourth_mutant_alone(script: Script, shared_dir: Path) -> None:
    make = script("fuzzing.kinds").KINDS["template"]
    without, with_real = make(None), make(shared_dir / "data")
    for number in range(40):
        assert number % 4 == 3 or without.mutant(number) == with_real.mutant(number)
    assert any(with_real.seeds[with_real.mutant(number).seed].real for number in range(3, 100, 4))


@pytest.mark.slow
def test_short_run(script: Script, tmp_path: Path) -> None:
    """Valid files are accepted, and the first mutants of each kind are read or refused as they should be."""
    command = [sys.executable, str(SCRIPT), "--count", "60", "--seconds", "200"]
    command += ["--json", str(tmp_path / "results.json")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = json.loads((tmp_path / "results.json").read_text())["kinds"]
    assert [kind["kind"] for kind in kinds] == list(script("fuzzing.kinds").KINDS)
    for kind in kinds:
        assert kind["mutants"] == 60 == kind["accepted"] + kind["refused"]
        assert kind["accepted"] > 0 and kind["refused"] > 0 and not kind["faults"]
        assert kind["slowest_s"] <= 5 and kind["largest_bytes"] <= 1 << 30


@pytest.mark.slow
def test_replay_and_keep(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--replay", "config:5", "--keep", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("config:5 is a mutant of ")
    assert (tmp_path / "config-5" / "config.json").exists()
    assert subprocess.run([*command[:3], "config:x"], capture_output=True).returncode == 2
