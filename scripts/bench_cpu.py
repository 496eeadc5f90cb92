"""Tokens per CPU-second of octo-run and llama.cpp on the same machine, in one run, their rounds interleaved.

    python scripts/bench_cpu.py MODEL --gguf FILE --kv oct3,bf16 --rounds 5 --json out.json

CPU time, not time by the clock, so that a busy machine does not decide: of one thread unless ``--threads`` says more.
Needs llama-cpp-python for the peer; without ``--gguf`` octo-run is timed alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from octo_run.engine import benchmark
from octo_run.engine.engine import Engine
from octo_run.kernels.cpu import path_name

Rounds = dict[str, Callable[[str, int, int], float]]


def seconds(work: Callable[[], None]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def ours(model: str, kv: str, weights: str | None, context: int) -> Callable[[str, int, int], float]:
    """A round of octo-run: tokens per CPU-second."""
    chosen = {} if weights is None else {"weights": weights}
    if weights == "int8":
        chosen["head"] = "int8"
    engine = Engine.load(model, kv=kv, max_context=context, device="cpu", dtype="float32", **chosen)  # type: ignore[arg-type]
    ids = benchmark.ordinary_ids(engine)

    def round_of(kind: str, tokens: int, depth: int) -> float:
        return tokens / benchmark.run_round(engine, (kind, tokens), ids[:tokens], depth=depth, batch=1, clock=seconds)

    return round_of


def peers(file: Path, cache: str, threads: int, context: int) -> Callable[[str, int, int], float]:
    """A round of llama.cpp: tokens per CPU-second."""
    from llama_cpp import GGML_TYPE_Q8_0, Llama, llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def without_extra_buffers() -> object:
        """Its AMX buffers end in a segmentation fault on some virtual machines."""
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_model_default_params = without_extra_buffers
    eight = {"type_k": GGML_TYPE_Q8_0, "type_v": GGML_TYPE_Q8_0, "flash_attn": True} if cache == "q8_0" else {}
    model = Llama(
        str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False, **eight
    )

    def round_of(kind: str, tokens: int, depth: int) -> float:
        model.reset()
        if depth:
            model.eval(list(range(100, 100 + depth)))

        def work() -> None:
            if kind == "pp":
                model.eval(list(range(100, 100 + tokens)))
            else:
                for token in range(tokens):
                    model.eval([100 + token])

        return tokens / seconds(work)

    return round_of


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--kv", default="oct3,bf16")
    parser.add_argument("--weights", help="as `Engine.load` takes them, several by commas (none: as stored)")
    parser.add_argument("--peer-kv", default="f16,q8_0")
    parser.add_argument("--depth", default="0,1024,4096")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    depths = [int(depth) for depth in given.depth.split(",")]
    context = max(depths) + 700
    contestants: Rounds = {}
    for kv in given.kv.split(","):
        for weights in given.weights.split(",") if given.weights else [None]:
            contestants[f"octo-run {weights or 'float32'}, {kv}"] = ours(given.model, kv, weights, context)
    if given.gguf is not None:
        for cache in given.peer_kv.split(","):
            contestants[f"llama.cpp {given.gguf.name}, {cache}"] = peers(given.gguf, cache, given.threads, context)
    tests = [("pp", 512, 0), *(("tg", 32, depth) for depth in depths)]
    found = {name: {f"{kind}{n} at {depth}": list[float]() for kind, n, depth in tests} for name in contestants}
    for number in range(given.rounds + 1):  # the first one warms up
        for kind, n, depth in tests:
            for name, round_of in contestants.items():
                rate = round_of(kind, n, depth)
                if number:
                    found[name][f"{kind}{n} at {depth}"].append(rate)
    columns = [f"{kind}{n} at {depth}" for kind, n, depth in tests]
    print(f"Tokens per CPU-second, {given.threads} threads, medians of {given.rounds}; instructions: {path_name()}\n")
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, rows in found.items():
        print(f"| {name} | {' | '.join(f'{statistics.median(rows[column]):.1f}' for column in columns)} |")
    if given.json is not None:
        given.json.write_text(
            json.dumps({"threads": given.threads, "path": path_name(), "rates": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
