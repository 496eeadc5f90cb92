"""Time decode steps and prompts of a shape in octo-run and in Hugging Face transformers, on one device in one process.

    python scripts/bench_vs_transformers.py [--shape llama-3.1-8b] [--kv oct3,bf16] [--markdown FILE] [--json FILE]

Both run the same random weights, one sequence at a time. Decode is greedy, after a prompt of --depth tokens:
octo-run's recorded steps against transformers' forward with a StaticCache under torch.compile(mode="reduce-overhead",
fullgraph=True), as its guide to optimising inference has it. A prompt of --prompt tokens is read up to the last token's
logits: by octo-run with the coding of its pages, by transformers with SDPA as it comes and, with --compile-prefill,
under torch.compile. Compilation and warm-up are not timed. A peer that fails is named with its error and has no row.
The files are written after every row.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from bench_report import output_options, provenance, table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from octo_run.engine import Engine, benchmark
from octo_run.engine.engine import choose_device, choose_dtype
from octo_run.engine.random_model import read_shape
from octo_run.engine.shapes import SHAPES
from octo_run.errors import OctoError, UsageError
from octo_run.models.foreign import read_json_object
from octo_run.models.weights import random_weights

WARM_UP = 2  # rounds: torch.compile may compile a second time once it has seen a second input
ATTENTION = {
    "default": None,  # what SDPA chooses by itself
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Row:
    """One measurement of ``test`` (decode or prefill): tokens per second as median, least and most of the rounds."""

    test: str
    name: str
    ours: bool
    tokens: int  # of a round
    tokens_per_s: float
    least: float
    most: float

    @property
    def milliseconds(self) -> float:
        """Median milliseconds: of a decode step, or of a whole prompt."""
        return (1e3 if self.test == "decode" else 1e3 * self.tokens) / self.tokens_per_s


def ratios(rows: Sequence[Row]) -> list[tuple[str, str, str, float]]:
    """(test, our row's name, the peer's name, the peer's time divided by ours) for all pairs of a test."""
    return [
        (ours.test, ours.name, peer.name, peer.milliseconds / ours.milliseconds)
        for ours in rows
        if ours.ours
        for peer in rows
        if not peer.ours and peer.test == ours.test
    ]


@dataclass
class Report:
    """What was measured so far.

    Attributes:
        run: By which command, where and when.
        bandwidth: Of copies, in bytes per second.
        step_bytes: The weights that a decode step reads (None: not known yet).
    """

    run: str
    dtype: str
    bandwidth: float
    args: argparse.Namespace
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    chunk: int | None = None  # tokens that octo-run reads at a time
    step_bytes: int | None = None

    def add(self, row: Row) -> None:
        """Print a row and write the files with it."""
        self.rows.append(row)
        print(f"{row.test}, {row.name}: {row.tokens_per_s:,.1f} tokens/s, {row.milliseconds:,.3f} ms", flush=True)
        self.write()

    def fail(self, name: str, error: Exception) -> None:
        """Print that a peer failed and write the files with it."""
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        self.failures.append(f"{name}: {type(error).__name__}: {reason}")
        print(f"not measured: {self.failures[-1]}", flush=True)
        self.write()

    def write(self) -> None:
        """Write the files that were asked for."""
        if self.args.markdown:
            self.args.markdown.write_text(self.markdown(), encoding="utf-8")
        if self.args.json:
            plain = {"run": self.run, "shape": self.args.shape, "dtype": self.dtype, "depth": self.args.depth,
                     "repetitions": self.args.repetitions, "copy_bytes_per_s": self.bandwidth,
                     "step_weight_bytes": self.step_bytes, "octo_run_chunk": self.chunk,
                     "rows": [asdict(row) | {"ms": row.milliseconds} for row in self.rows],
                     "failures": self.failures}  # fmt: skip
            self.args.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")

    def markdown(self) -> str:
        """The report: what ran where and when, what the rows are, the rows, and the ratios of their times."""
        args = self.args
        parts = [
            "# octo-run and transformers, the whole model",
            f"{self.run}. Shape `{args.shape}`, the same random {self.dtype} weights for both, batch 1; medians of"
            f" {args.repetitions} rounds in wall-clock time, the device waited for at both ends; compilation and"
            f" warm-up are not timed. Copy bandwidth measured in the same run: {self.bandwidth * 1e-12:.2f} TB/s.",
        ]
        if any(row.test == "decode" for row in self.rows):
            parts += ["## Decode", self._decode_text(), self._table("decode", "ms a step")]
        if any(row.test == "prefill" for row in self.rows):
            parts += ["## Prefill", self._prefill_text(), self._table("prefill", "ms a prompt")]
        if pairs := ratios(self.rows):
            lines = [(test, ours, peer, f"{ratio:.2f}") for test, ours, peer, ratio in pairs]
            parts += ["## Ratios", table(["test", "ours", "peer", "peer's time / ours"], lines)]
        if self.failures:
            parts += ["## Not measured", "\n".join(f"- {failure}" for failure in self.failures)]
        return "\n\n".join(parts) + "\n"

    def _decode_text(self) -> str:
        floor = ""
        if self.step_bytes is not None:
            floor = (
                f" A step reads {self.step_bytes * 1e-9:.2f} GB of weights, which takes"
                f" {1e3 * self.step_bytes / self.bandwidth:.3f} ms at the copy bandwidth; the last column is the share"
                " of a step that this is."
            )
        return (
            f"{self.args.tokens} greedy tokens after {self.args.depth:,} in the cache. octo-run: the engine's decode"
            " steps, every token read back by the host, one step behind. transformers: the forward of one token and the"
            ' argmax, both in `torch.compile(mode="reduce-overhead", fullgraph=True)` over a `StaticCache` of exactly'
            " the tokens needed, no token read back; its `generate`, which adds work to every step, is not measured."
            " `math attention`: with PyTorch's own decomposition of SDPA." + floor
        )

    def _prefill_text(self) -> str:
        chunk = "" if self.chunk is None else f" in chunks of {self.chunk:,}"
        return (
            f"A prompt of {self.args.prompt:,} tokens into an empty cache, logits of its last token alone. octo-run"
            f" reads it{chunk}, the coding of the pages included. transformers reads it at once with SDPA into a"
            " `DynamicCache`, which keeps keys and values in the dtype of the weights; `compiled`: its forward in"
            " `torch.compile(fullgraph=True)`, with the SDPA backend that was fastest without."
        )

    def _table(self, test: str, unit: str) -> str:
        header, lines = ["", "tokens/s", "least", "most", unit], []
        for row in self.rows:
            if row.test == test:
                numbers = [f"{n:,.1f}" for n in (row.tokens_per_s, row.least, row.most)]
                lines.append([row.name, *numbers, f"{row.milliseconds:,.3f}"])
                if test == "decode" and self.step_bytes is not None:
                    lines[-1].append(f"{1e5 * self.step_bytes / self.bandwidth / row.milliseconds:.0f}")
        if test == "decode" and self.step_bytes is not None:
            header.append("% of copy speed")
        return table(header, lines)


def free() -> None:
    """Give back what is no longer used: cycles, compiled code with its CUDA graphs, the allocator's blocks."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_ours(kv: str, device: torch.device, report: Report) -> None:
    """Load octo-run with a cache format and add its rows."""
    args = report.args
    needed = max(args.depth + args.tokens, args.prompt)
    engine = Engine.load(args.shape, kv=kv, device=str(device), max_context=needed, random_weights=args.shape)
    report.chunk, report.step_bytes = engine.plan.shape.chunk, benchmark.step_weight_bytes(engine)
    for name, test, depth in (("decode", ("tg", args.tokens), args.depth), ("prefill", ("pp", args.prompt), 0)):
        row = benchmark.measure(engine, test, depth=depth, batch=1, repetitions=args.repetitions,
                                bandwidth=report.bandwidth)  # fmt: skip
        report.add(Row(name, f"octo-run, {kv}", True, test[1], row.tokens_per_s, row.least, row.most))


def load_peer(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' model of a shape with the weights that octo-run makes up for it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(shape)
    fields = SHAPES.get(shape) or read_json_object(path / "config.json" if path.is_dir() else path)
    config = AutoConfig.for_model(**fields)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    missing, unexpected = model.load_state_dict(random_weights(read_shape(shape), device, dtype), strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        raise RuntimeError(f"other tensors than octo-run's: {', '.join([*missing, *unexpected])}")
    return model


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Wall-clock seconds of a call, the device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def attention(backend: str) -> contextlib.AbstractContextManager[Any]:
    """SDPA by one of ``ATTENTION``."""
    chosen = ATTENTION[backend]
    return contextlib.nullcontext() if chosen is None else sdpa_kernel(chosen)


def suffix(backend: str) -> str:
    """What a row's name says of an SDPA backend."""
    return "" if backend == "default" else f", {backend} attention"


def rounds(test: str, name: str, tokens: int, run: Callable[[], float], repetitions: int) -> Row:
    """A peer's row.

    Args:
        run: Makes a round of ``tokens`` tokens and gives its seconds.
    """
    for _ in range(WARM_UP):
        run()
    rates = sorted(tokens / run() for _ in range(repetitions))
    return Row(test, name, False, tokens, statistics.median(rates), rates[0], rates[-1])


def measure_decode(model: Any, ids: Tensor, backend: str, args: argparse.Namespace) -> Row:
    """Greedy tokens after the prompt ``ids`` [1, depth], each by one compiled forward over a static cache."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + args.tokens)

    def step(ids: Tensor) -> Tensor:
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)

    def generate(token: Tensor) -> None:
        for _ in range(args.tokens):
            token = compiled(token.clone())  # a copy: the next replay overwrites what this one returned

    def run() -> float:
        cache.reset()
        first = step(ids)
        with attention(backend):
            return seconds(ids.device, lambda: generate(first))

    counters = torch._dynamo.utils.counters["inductor"]
    skipped = counters["cudagraph_skips"]
    row = rounds("decode", f"transformers, compiled{suffix(backend)}", args.tokens, run, args.repetitions)
    if ids.is_cuda and counters["cudagraph_skips"] > skipped:  # torch.compile only warns of it
        return replace(row, name=f"{row.name} (CUDA graphs skipped)")
    return row


def measure_prefill(model: Any, ids: Tensor, backend: str, compiled: bool, args: argparse.Namespace) -> Row:
    """Last-token logits of the prompt ``ids`` [1, n] from an empty cache."""
    from transformers import DynamicCache

    def read(cache: Any) -> Tensor:
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    call = torch.compile(read, fullgraph=True) if compiled else read

    def run() -> float:
        with attention(backend):
            return seconds(ids.device, lambda: call(DynamicCache(config=model.config)))

    name = f"transformers, {'compiled' if compiled else 'eager'}{suffix(backend)}"
    return rounds("prefill", name, args.prompt, run, args.repetitions)


def attempt(name: str, report: Report, measure: Callable[[], Row]) -> Row | None:
    """Add a peer's row, or say why there is none."""
    try:
        row = measure()
    except Exception as error:  # whatever stops a peer: memory, another version's interface, the compiler
        report.fail(name, error)
        return None
    finally:
        free()
    report.add(row)
    return row


@torch.no_grad()
def measure_peers(device: torch.device, dtype: torch.dtype, report: Report) -> None:
    """Load the model in transformers and add its rows, those that take long to compile last."""
    args = report.args
    try:
        model = load_peer(args.shape, device, dtype)
    except Exception as error:  # as in `attempt`
        return report.fail("transformers", error)
    free()
    generator = torch.Generator().manual_seed(0)
    prompt, before = (
        torch.randint(model.config.vocab_size, (1, n), generator=generator).to(device)
        for n in (args.prompt, args.depth)
    )
    rates: dict[str, float] = {}
    for backend in args.prefill_attention:
        name = f"prefill, eager{suffix(backend)}"
        row = attempt(name, report, lambda: measure_prefill(model, prompt, backend, False, args))  # noqa: B023
        if row is not None:
            rates[backend] = row.tokens_per_s
    for backend in args.decode_attention:
        name = f"decode, compiled{suffix(backend)}"
        attempt(name, report, lambda: measure_decode(model, before, backend, args))  # noqa: B023
    if args.compile_prefill and rates:
        fastest = max(rates, key=lambda backend: rates[backend])
        name = f"prefill, compiled{suffix(fastest)}"
        attempt(name, report, lambda: measure_prefill(model, prompt, fastest, True, args))


def count(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def backends(text: str) -> list[str]:
    """A list of names in ``ATTENTION``."""
    names = text.split(",")
    if wrong := [name for name in names if name not in ATTENTION]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(ATTENTION)}")
    return names


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", help=f"a config.json, or one of {', '.join(SHAPES)}")
    parser.add_argument("--kv", default="oct3,bf16", help="cache formats of octo-run (%(default)s)")
    parser.add_argument("--device", help="cuda, cuda:N or cpu; default: CUDA where there is one")
    parser.add_argument("--depth", type=count, default=16, help="tokens in the cache before decode (%(default)s)")
    parser.add_argument("--tokens", type=count, default=128, help="tokens decoded in a round (%(default)s)")
    parser.add_argument("--prompt", type=count, default=8192, help="tokens of the prompt (%(default)s)")
    parser.add_argument("--repetitions", type=count, default=5, help="measured rounds (%(default)s)")
    parser.add_argument("--prefill-attention", type=backends, default=["default", "cudnn"], metavar="LIST",
                        help=f"SDPA in the peer's prefill: {', '.join(ATTENTION)} (default,cudnn)")  # fmt: skip
    parser.add_argument("--decode-attention", type=backends, default=["default"], metavar="LIST",
                        help="the same for decode; each is compiled, in about a minute at 8B (default)")  # fmt: skip
    parser.add_argument("--compile-prefill", action="store_true", help="time the peer's compiled prefill too")
    output_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing of the Hub is needed
    try:
        import transformers
    except ImportError as error:
        reason = str(error).splitlines()[0]
        print(
            f"The package transformers cannot be imported ({reason}): pip install 'transformers>=5'.", file=sys.stderr
        )
        return 1
    try:
        device = choose_device(args.device)
        dtype = choose_dtype(None, read_shape(args.shape), device)
        run = provenance([__file__, *argv], device, [torch, triton, transformers])
        report = Report(run, str(dtype).removeprefix("torch."), benchmark.copy_bandwidth(device), args)
        print(f"{run}; copy bandwidth {report.bandwidth * 1e-12:.2f} TB/s", flush=True)
        for kv in dict.fromkeys(name.strip() for name in args.kv.split(",")):
            measure_ours(kv, device, report)
            free()
    except OctoError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    measure_peers(device, dtype, report)
    print(f"\n{report.markdown()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
