"""Tries damaged files of every kind that octo-run reads; each must be read, or refused in one sentence.

    python scripts/fuzz.py [--only KIND ...] [--count N] [--seconds S] [--seed N] [--keep DIR] [--json FILE]
                           [--data DIR]
    python scripts/fuzz.py --replay KIND:SEED [--keep DIR]

Mutants are numbered; the number is the seed of all that is random in one. ``--seed`` is the first number, ``--count``
how many of each kind are tried, ``--seconds`` the time for all kinds together (60 where neither is given). ``--data``
is a folder of real files (chat_templates/, configs/, tokenizers/) of which every fourth mutant is made; without it
``../shared/data`` beside the checkout is taken, if it is there.

A fault is: any exception but octo-run's own, more than 5 s of CPU time, more than 1 GB of memory, a message of more
than 500 characters or with control characters, control characters printed, a wrong result, a difference from the
safetensors library that is not listed. Faults give exit code 1. ``--keep`` writes the first mutant of each fault into
a folder ``KIND-SEED``; ``--replay`` tries one mutant and tells all about it.
"""

import argparse
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path

# One thread: the workers are forked, and what they are measured by is CPU time.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}

from fuzzing.kinds import KINDS, Kind, Trial
from fuzzing.workers import Failure, Report, campaign, single

from octo_run.errors import OctoError, shown

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SECONDS = 60.0


def make_kind(name: str, data: Path | None) -> Kind:
    """The kind, its reader tried on every seed, so that workers find everything imported.

    Raises:
        OctoError: A seed written for the fuzzer is refused.
    """
    import tempfile

    kind = KINDS[name](data)
    for index, seed in enumerate(kind.seeds):
        with tempfile.TemporaryDirectory(prefix="octo-fuzz-") as folder:
            kind.lay_out(Path(folder), index)
            trial = Trial()
            with trial.step():
                kind.check(Path(folder), trial)
                kind.compare(Path(folder), trial)
            if trial.refusals and not seed.real:
                raise OctoError(f"The valid file {seed.name!r} of {name} is refused: {trial.refusals[0]}")
    gc.collect()
    gc.freeze()
    return kind


def keep(kind: Kind, number: int, folder: Path) -> Path:
    """Write a mutant and what stands beside it into ``folder/KIND-SEED``, and give that path."""
    target = folder / f"{kind.name}-{number}"
    target.mkdir(parents=True, exist_ok=True)
    mutant = kind.mutant(number)
    kind.lay_out(target, mutant.seed)
    mutant.write(target)
    return target


def describe(kind: str, failure: Failure) -> str:
    """A fault in one line."""
    fault = failure.fault
    where = f" at {fault.place}" if ".py:" in fault.place else ""
    return shown(f"{kind}:{failure.number} (of {failure.base}): {fault.what}{where}: {fault.detail}", 400)


def replay(name: str, number: int, data: Path | None, folder: Path | None) -> int:
    """Try one mutant and print what is known of it.

    Returns:
        1 if it is at fault, else 0.
    """
    kind = make_kind(name, data)
    mutant = kind.mutant(number)
    outcome = single(kind, number)
    what = mutant.node or f"{len(mutant.data):,} bytes"
    print(f"{name}:{number} is a mutant of {kind.seeds[mutant.seed].name}, {what}: {outcome.status}")
    print(f"{outcome.seconds:.3f} s, {outcome.memory / 2**20:.1f} MB")
    if outcome.message:
        print(shown(outcome.message))
    if outcome.fault is not None:
        print(shown(f"{outcome.fault.what} at {outcome.fault.place}: {outcome.fault.detail}"))
        print("\n".join(map(shown, outcome.fault.trace.splitlines())))
    for note in outcome.notes:
        print(note)
    if folder is not None:
        print(f"kept in {keep(kind, number, folder)}")
    return int(outcome.fault is not None)


def summary(reports: list[Report]) -> str:
    """The table of all kinds."""
    head = ("kind", "mutants", "accepted", "refused", "failed", "faults", "slowest", "largest", "time")
    rows: list[tuple[str, ...]] = [head]
    for r in reports:
        slowest, largest = f"{r.slowest[0]:.2f} s", f"{r.largest[0] / 2**20:.0f} MB"
        counts = (f"{n:,}" for n in (r.mutants, r.accepted, r.refused, r.failed, len(r.failures)))
        rows.append((r.kind, *counts, slowest, largest, f"{r.elapsed:.0f} s"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def as_json(reports: list[Report]) -> str:
    """All results as JSON."""
    kinds = [
        {
            **{key: getattr(r, key) for key in ("kind", "mutants", "accepted", "refused", "failed", "elapsed")},
            "slowest_s": r.slowest[0],
            "slowest_seed": r.slowest[1],
            "largest_bytes": r.largest[0],
            "largest_seed": r.largest[1],
            "differences": r.differences,
            "faults": [
                {"what": f.fault.what, "place": f.fault.place, "detail": f.fault.detail, "seed": f.number,
                 "base": f.base, "count": f.count}
                for f in r.failures.values()
            ],
        }
        for r in reports
    ]  # fmt: skip
    return json.dumps({"kinds": kinds}, indent=1) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(description="Try damaged files of every kind on octo-run's readers.")
    parser.add_argument("--only", action="append", choices=KINDS, help="a kind of file (may be given several times)")
    parser.add_argument("--count", type=int, help="mutants of each kind")
    parser.add_argument(
        "--seconds", type=float, help=f"time for all kinds together (default {SECONDS:.0f}, or --count)"
    )
    parser.add_argument("--seed", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--replay", metavar="KIND:SEED", help="try this mutant alone")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the first mutant of each fault there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of real files to make mutants of, too")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers and folders go, too
    if options.data is None and SHARED.is_dir():
        options.data = SHARED
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data: there is no folder {options.data}")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.absolute().parent}")
    if options.replay is not None:
        name, _, number = options.replay.partition(":")
        if name not in KINDS or not number.isdecimal():
            parser.error(f"--replay: give KIND:SEED with a kind of {', '.join(KINDS)}")
        return replay(name, int(number), options.data, options.keep)
    names = list(dict.fromkeys(options.only or KINDS))
    seconds = SECONDS if options.seconds is None and options.count is None else options.seconds
    end = None if seconds is None else time.monotonic() + seconds
    reports = []
    for place, name in enumerate(names):
        kind = make_kind(name, options.data)

        def tell(failure: Failure, kind: Kind = kind) -> None:
            print(describe(kind.name, failure), flush=True)
            if options.keep is not None:
                keep(kind, failure.number, options.keep)

        share = None if end is None else max(0.0, end - time.monotonic()) / (len(names) - place)
        reports.append(campaign(kind, options.seed, options.count, share, on_fault=tell))
    for report in reports:
        for reason, count in report.differences.items():
            print(f"{report.kind}, {count:,} times: {reason}")
    print(summary(reports))
    if options.json is not None:
        options.json.write_text(as_json(reports), encoding="utf-8")
    return int(any(report.failures for report in reports))


if __name__ == "__main__":
    sys.exit(main())
