"""octo-run beside llama.cpp on a CPU: speed and memory, every contestant in a process of its own, rounds interleaved.

    python scripts/bench_cpu.py MODEL --ours int8/oct3,int4/oct3,fp32/bf16 --peer f16=FILE.gguf --peer Q4_1=FILE.gguf \
        --peer-kv f16,q8_0 --peer-python PYTHON --threads 1 --rounds 5 --markdown OUT.md

Speeds are tokens by the second of CPU time (user and system, of all threads), so that a busy machine decides less, and
tokens by the second by the clock beside them; medians over the rounds. PYTHON is an interpreter with llama-cpp-python.
The peer's cache is filled once for each depth and format and restored from a file; ours is filled with random keys and
values.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

#: ``test(kind, tokens, depth)`` gives seconds of CPU and by the clock.
Test = Callable[[str, int, int], tuple[float, float]]


def clock(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of this process's CPU time, and by the clock."""
    begun, start = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - start, time.perf_counter() - begun


def ours(given: dict[str, Any]) -> tuple[Test, dict[str, Any]]:
    """octo-run's test, and facts about it."""
    import torch

    from octo_run.engine import benchmark
    from octo_run.engine.engine import Engine
    from octo_run.kernels.cpu import path_name

    torch.set_num_threads(given["threads"])
    weights, kv = given["name"].split("/")
    options = {"dtype": "float32", "weights": weights, "head": "bf16" if weights in ("fp32", "bf16") else "int8"}
    engine = Engine.load(given["model"], kv=kv, max_context=given["context"], device="cpu", **options)
    ids = benchmark.ordinary_ids(engine)

    def test(kind: str, tokens: int, depth: int) -> tuple[float, float]:
        return benchmark.run_round(engine, (kind, tokens), ids[:tokens], depth=depth, batch=1, clock=clock)

    plan = engine.memory_plan()
    return test, {"path": path_name(), "plan": plan["total"], "before": engine.memory_now()["before_loading"]}


def peer(given: dict[str, Any]) -> tuple[Test, dict[str, Any]]:
    """llama.cpp's test, and facts about it."""
    import llama_cpp as library  # type: ignore[import-not-found]
    import llama_peer

    cache = given["cache"]
    options = {"flash_attn": True} if cache != "f16" else {}
    model = llama_peer.load(given["file"], kv=cache, context=given["context"], threads=given["threads"], **options)
    context, folder = model._ctx.ctx, Path(given["folder"])

    def begin(depth: int) -> None:
        model.reset()
        library.llama_cpp.llama_memory_clear(library.llama_cpp.llama_get_memory(context), True)
        if not depth:
            return
        state = folder / f"{given['cache']}-{depth}"  # of whichever weights: only its size counts
        if not state.exists():
            model.eval(list(range(100, 100 + depth)))
            none = (ctypes.c_int32 * 0)()
            assert library.llama_cpp.llama_state_seq_save_file(context, bytes(state), 0, none, 0)
            return
        count, room = ctypes.c_size_t(), (ctypes.c_int32 * 1)()
        assert library.llama_cpp.llama_state_seq_load_file(context, bytes(state), 0, room, 1, ctypes.byref(count))
        model.n_tokens = depth

    def test(kind: str, tokens: int, depth: int) -> tuple[float, float]:
        begin(depth)
        ids = list(range(100, 100 + tokens))
        if kind == "pp":
            return clock(lambda: model.eval(ids))
        return clock(lambda: [model.eval([one]) for one in ids])

    return test, {"version": library.__version__}


def work(given: dict[str, Any]) -> None:
    """A contestant's process: answer tests, one a line, until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    test, facts = (peer if given["file"] else ours)(given)
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        found = test(*json.loads(line))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps([*found, peak]), file=answers, flush=True)


class Contestant:
    """A process that runs tests on demand."""

    def __init__(self, python: str, given: dict[str, Any]) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(given["threads"])}
        self.name = str(given["title"])
        self._process = subprocess.Popen(
            [python, __file__, "--work", json.dumps(given)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment,
        )  # fmt: skip
        self.facts: dict[str, Any] = self._answer()
        self.peak = 0

    def _answer(self) -> Any:
        line = cast("IO[str]", self._process.stdout).readline()
        if not line:
            raise SystemExit(f"{self.name} has ended with {self._process.wait()}")
        return json.loads(line)

    def test(self, kind: str, tokens: int, depth: int) -> tuple[float, float]:
        """Tokens by the second of CPU time and by the clock."""
        asked = cast("IO[str]", self._process.stdin)
        print(json.dumps([kind, tokens, depth]), file=asked, flush=True)
        cpu, wall, self.peak = self._answer()
        return tokens / cpu, tokens / wall

    def end(self) -> None:
        cast("IO[str]", self._process.stdin).close()
        self._process.wait()


def report(contestants: list[Contestant], found: dict[str, dict[str, list[tuple[float, float]]]], given: Any) -> str:
    """The tables in Markdown."""
    columns = list(next(iter(found.values())))
    path = next((one.facts["path"] for one in contestants if "path" in one.facts), "-")
    version = next((one.facts["version"] for one in contestants if "version" in one.facts), None)
    peers = f", llama-cpp-python {version}" if version else ""
    date = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    lines = [
        f"`python scripts/{shlex.join([Path(__file__).name, *given.shown])}`, {date} (UTC){peers}; our instructions: "
        f"{path}; {os.cpu_count()} CPUs, mean load when it ended {os.getloadavg()[0]:.0f}.",
    ]
    titles = ("tokens by the second of CPU time", "tokens by the second by the clock")
    for number, title in enumerate(titles):
        lines += ["", f"{given.threads} thread{'s' * (given.threads > 1)}, {title}, medians of {given.rounds}:", ""]
        last = " peak memory |" if not number else ""
        lines += [f"| | {' | '.join(columns)} |{last}", f"|---|{'---|' * (len(columns) + (not number))}"]
        for one in contestants:
            middle = [statistics.median(rates[number] for rates in found[one.name][column]) for column in columns]
            peak = f" {one.peak / 1e6:,.0f} MB |" if not number else ""
            lines.append(f"| {one.name} | {' | '.join(f'{rate:.1f}' for rate in middle)} |{peak}")
    for one in contestants:
        if "plan" in one.facts:
            before, plan = one.facts["before"] / 1e6, one.facts["plan"] / 1e6
            lines += ["", f"- {one.name}: {before:,.0f} MB before loading (Python, PyTorch), planned {plan:,.0f} MB"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print tables."""
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ours", default="int8/oct3,int8/bf16", help="WEIGHTS/KV, several by commas")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FILE", help="weights of the peer, a GGUF")
    parser.add_argument("--peer-kv", default="f16,q8_0")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--depth", default="0,1024,4096")
    parser.add_argument("--tokens", type=int, default=32, help="generated at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="a file to append to")
    given = parser.parse_args()
    given.shown = [Path(part).name if Path(part).exists() else part for part in sys.argv[1:]]
    given.shown = [
        "=".join(Path(word).name for word in part.split("=")) if "=" in part else part for part in given.shown
    ]
    depths = [int(depth) for depth in given.depth.split(",")]
    tests = [("pp", 512, 0), *(("tg", given.tokens, depth) for depth in depths)]
    with tempfile.TemporaryDirectory() as folder:
        common = {"threads": given.threads, "context": max(depths) + 576, "folder": folder, "model": given.model}
        contestants = [
            Contestant(sys.executable, {**common, "name": name, "file": None,
                                        "title": "octo-run {} weights, {} cache".format(*name.split("/"))})
            for name in given.ours.split(",")
        ]  # fmt: skip
        for weights, file in (one.split("=", 1) for one in given.peer):
            for cache in given.peer_kv.split(","):
                title = f"llama.cpp {weights} weights, {cache} cache"
                wanted = {**common, "file": file, "cache": cache, "title": title}
                contestants.append(Contestant(given.peer_python, wanted))
        found: dict[str, dict[str, list[tuple[float, float]]]] = {one.name: {} for one in contestants}
        for number in range(given.rounds + 1):  # the first one warms up
            for kind, tokens, depth in tests:
                for one in contestants:
                    rates = one.test(kind, tokens, depth)
                    print(f"{number} {one.name}: {kind}{tokens} at {depth:,}: {rates[0]:.1f}", file=sys.stderr)
                    if number:
                        found[one.name].setdefault(f"{kind}{tokens} at {depth:,}", []).append(rates)
        for one in contestants:
            one.end()
    text = report(contestants, found, given)
    print(text)
    if given.markdown is not None:
        with given.markdown.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
