"""Compiles the kernels of decode over trellis codes for sm_90 (no GPU needed) and reports what their loops cost.

    python scripts/sass_report.py [--variants oct3-4-128,oct3-4-128+mean2,...] [--json] [--markdown FILE]

For every variant (format, query heads a KV head, head_dim, fast steps of the key mean if there is one): instructions
of the loop over pages (64 tokens of a KV head) by pipe, warp instructions a token, lane instructions a triplet,
cycles that the busiest pipe takes for a token, registers, spilled bytes, barriers, shared memory. Needs Triton with its
NVIDIA tools.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from octo_run.kernels.attention.hopper import wide_launch
from octo_run.kernels.attention.hopper.decode import table_decode_kernel
from octo_run.kernels.attention.hopper.launch import constants, options
from octo_run.kernels.attention.hopper.mean_bias import pages_ahead
from octo_run.kernels.attention.hopper.wide_decode import wide_decode_kernel
from octo_run.kernels.codec import TrellisCodec, parse_kv

VARIANTS = [f"{kv}-{shape}" for shape in ("4-128", "7-128", "4-64", "4-256") for kv in ("oct2", "oct3", "oct4")]
VARIANTS += [
    "oct3:oct2-4-128",
    "oct4:oct3-4-128",
    "oct3-1-128",
    "oct3-8-128",
    "oct3-4-80",
    "oct3-4-96",
    "oct2-8-64",
    "oct3-8-64",
    "oct4-8-64",
]
# The usual fast steps: of theta 1e4 (2 at head_dim 64, 3 at 128), of 1e5 and more (1 and 2; 3 or 4 at 256).
MEANS = (
    "4-128+mean2",
    "4-128+mean3",
    "7-128+mean2",
    "4-64+mean1",
    "4-64+mean2",
    "8-64+mean1",
    "8-128+mean2",
    "4-256+mean4",
)
VARIANTS += [f"{kv}-{shape}" for shape in MEANS for kv in ("oct2", "oct3", "oct4")]
WIDE = ("4-512", "8-512", "16-512", "8-512+mean6", "16-512+mean6")
VARIANTS += [f"{kv}-{shape}" for shape in WIDE for kv in ("oct2", "oct3", "oct4")]
#: Pipes by the beginnings of instructions' names, and the cycles for which a scheduler's pipe has one: integers run at
#: half the rate of floats (multiplications in a pipe of their own), special functions at an eighth.
PIPES = {
    "tensor": (("IMMA", "HMMA"), 4),
    "imad": (("IMAD", "IDP"), 2),
    "fma": (("FFMA", "FMUL", "FADD", "HFMA", "HADD", "HMUL"), 1),
    "special": (("MUFU", "I2F", "F2I", "F2F", "POPC"), 8),
    "memory": (("LDS", "STS", "LDG", "STG", "LDL", "STL", "LDC", "SHFL", "ATOM", "RED", "LDSM", "STSM"), 4),
    "control": (
        ("BAR", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "BRA", "NOP", "EXIT", "BSSY", "BSYNC", "ERRBAR", "MEMBAR"),
        0,
    ),
    "uniform": (("U", "R2UR", "S2UR"), 0),
    "alu": (("",), 2),
}
#: What pointers point to, if not int32; in the kernel's signature they have names in capitals, strides s.._...
POINTERS = dict.fromkeys(("Q", "OUT", "SINK_K", "SINK_V", "TAIL_K", "TAIL_V"), "bf16")
POINTERS |= {"SINK_LOGITS": "fp32", "PAGES": "u8", "PARTIAL": "fp32", "LSE": "fp32", "COEF": "fp32", "WEIGHTS": "fp32"}
STRIDE = re.compile(r"s[a-z]{1,2}_[a-z]+")
TOKENS = 64


@dataclass(frozen=True)
class Report:
    """Costs of one variant's main loop.

    Attributes:
        code: Instructions of the loop, each once, of 16 bytes: those that a multiprocessor's cache has to hold.
        instructions: Of a page, on average: of those for the key mean's components of four pages a quarter counts (of
            two, half).
            Of the wide kernel those of four warps, which share a page.
        kinds: How many instructions of each name it has.
        mean: Fast steps of the key mean's tables, 0 without a mean.
    """

    kv: str
    group: int
    head_dim: int
    code: int
    instructions: float
    per_token: float
    per_triplet: float
    registers: int
    spilled_bytes: int
    barriers: int
    shared_bytes: int
    kinds: dict[str, float]
    pipes: dict[str, float]
    mean: int = 0

    @property
    def busiest(self) -> tuple[str, float]:
        """The pipe that is busy longest, or issue, and its cycles for a token on one of four schedulers."""
        cycles: dict[str, float] = {name: self.pipes[name] * cost / TOKENS for name, (_, cost) in PIPES.items()}
        cycles["issue"] = self.per_token
        return max(cycles.items(), key=lambda item: item[1])


PLAIN: dict[str, int | float] = {"WINDOW": 0, "CAP": 0.0, "SINKS": False}


def compile_variant(
    kv: str, group: int = 4, head_dim: int = 128, mean: int = 0, spec: dict[str, int | float] = PLAIN
) -> tuple[bytes, int]:
    """The kernel's cubin for ``group`` query heads a KV head, and its bytes of shared memory; ``spec``: constants of
    `AttentionSpec`."""
    fmt = parse_kv(kv, head_dim)
    assert isinstance(fmt.k, TrellisCodec) and isinstance(fmt.v, TrellisCodec)
    wide = head_dim > 256
    decode = wide_decode_kernel if wide else table_decode_kernel
    if wide:
        fixed = wide_launch.constants(fmt.k, fmt.v, group, "bf16", mean, batched=True)
    else:
        fixed = constants(fmt.k, fmt.v, 8, group, "bf16", mean, batched=True)
    fixed = fixed | {"EARLY": True} | spec
    names = decode.arg_names
    signature = {}
    for name in names:
        pointer = POINTERS.get(name, "i32") if name.isupper() else ""
        number = "fp32" if name in ("step_k", "step_v", "scale_log2") else "i32"
        signature[name] = "constexpr" if name in fixed else f"*{pointer}" if pointer else number
    aligned = [i for i, n in enumerate(names) if n not in fixed and (n.isupper() or STRIDE.fullmatch(n))]
    source = GluonASTSource(decode, signature, fixed, {(i,): [["tt.divisibility", 16]] for i in aligned})
    launch = wide_launch.options() if wide else options(head_dim)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
    return kernel.asm["cubin"], int(kernel.metadata.shared)


def pages_at_once(kv: str, group: int, head_dim: int, mean: int) -> int:
    """Pages whose components of the key mean a warp makes together."""
    fmt = parse_kv(kv, head_dim)
    assert isinstance(fmt.k, TrellisCodec) and isinstance(fmt.v, TrellisCodec)
    tight = head_dim <= 256 and bool(constants(fmt.k, fmt.v, 1, group, "bf16", mean, True)["TIGHT"])
    return int(pages_ahead(tight))


def blocks_of_heads(kv: str, group: int, head_dim: int, mean: int) -> int:
    """Blocks of four heads of a program of the wide kernel."""
    fmt = parse_kv(kv, head_dim)
    assert isinstance(fmt.k, TrellisCodec) and isinstance(fmt.v, TrellisCodec)
    return int(wide_launch.constants(fmt.k, fmt.v, group, "bf16", mean, True)["NT"])


def by_pipe(names: list[str], weights: list[float] | None = None) -> dict[str, float]:
    """Instructions of each pipe, each with its weight."""
    counts: dict[str, float] = dict.fromkeys(PIPES, 0)
    for name, weight in zip(names, weights or [1] * len(names), strict=True):
        # Before U.., LDS.., F2F and others that a beginning would take.
        exact = "control" if name in PIPES["control"][0] else "alu" if name in ("F2FP", "I2FP") else None
        pipe = exact or next(p for p, (starts, _) in PIPES.items() if name.startswith(starts))
        counts[pipe] += weight
    return counts


@dataclass(frozen=True)
class Machine:
    """A kernel's disassembly.

    Attributes:
        names: The instructions'.
        loops: Slices of them, each up to a conditional jump back.
        returns: The same up to an unconditional jump back, which may be the way back from a detour too.
        skips: Slices that a conditional jump leaves out.
        leaps: Of unconditional jumps ahead the place behind them, and where they go.
    """

    names: list[str]
    loops: list[tuple[int, int]]
    returns: list[tuple[int, int]]
    skips: list[tuple[int, int]]
    leaps: dict[int, int]
    registers: int
    spilled_bytes: int


def _told(tool: str, option: str, cubin: bytes) -> str:
    """What a tool in Triton's package says of a kernel."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def machine_code(cubin: bytes) -> str:
    """The instructions of a kernel (SASS)."""
    return _told("nvdisasm", "-c", cubin)


def disassemble(cubin: bytes) -> Machine:
    """By the tools in Triton's package."""
    sass, usage = machine_code(cubin), _told("cuobjdump", "-res-usage", cubin)
    labels: dict[str, int] = {}
    names: list[str] = []
    back: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    ahead: dict[bool, list[tuple[int, str]]] = {True: [], False: []}
    for line in sass.splitlines():
        if label := re.match(r"\s*\.(L_x?_?\w+):", line):
            labels[label.group(1)] = len(names)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*);", line):
            names.append(found.group(2).split(".")[0])
            target = re.search(r"\.(L_x?_?\w+)", found.group(3))
            if names[-1] == "BRA" and target and target.group(1) in labels:
                back[bool(found.group(1))].append((labels[target.group(1)], len(names)))
            elif names[-1] == "BRA" and target:
                ahead[bool(found.group(1))].append((len(names), target.group(1)))
    registers, stack = (int(re.findall(rf"{what}:(\d+)", usage)[-1]) for what in ("REG", "STACK"))
    skips = [(start, labels[label]) for start, label in ahead[True]]
    leaps = {start: labels[label] for start, label in ahead[False]}
    return Machine(names, back[True], back[False], skips, leaps, registers, stack)


def _halve_choices(machine: Machine, weights: list[float], start: int, end: int) -> None:
    """Of the instructions ``start`` to ``end``, those of either branch of a choice run in half of the warps."""
    for first, other in sorted(machine.skips):
        join = machine.leaps.get(other, 0)  # the first branch ends with a jump over the other one
        if start <= first < other < min(join, end):
            last = min(join, end)
            for at in range(first, last):
                weights[at] /= 2
            _halve_choices(machine, weights, first, other)
            _halve_choices(machine, weights, other, last)
            start = last


def loop_over_pages(
    machine: Machine, warps: int = 1, at_once: int = 4, blocks: int = 1
) -> tuple[list[str], list[float]]:
    """The instructions of the shortest loop that has all int8 products, and how often each runs for a page.

    A loop around it that has more products of floats is taken whole: these make the key mean's components. So do those
    that a branch leaves out, where a page has several warps.

    Args:
        warps: Those that share a page; of a choice between branches half of them take either.
        at_once: Pages whose components are made together.
        blocks: Blocks of heads, for each of which one of several warps makes them.
    """
    names, products = machine.names, machine.names.count("IMMA")
    whole = [loop for loop in machine.loops + machine.returns if names[slice(*loop)].count("IMMA") == products]
    inner = start, end = min(whole, key=lambda loop: loop[1] - loop[0])
    if warps == 1:
        floats = names[slice(*inner)].count("HMMA")
        around = [loop for loop in whole if names[slice(*loop)].count("HMMA") > floats]
        start, end = min(around, key=lambda loop: loop[1] - loop[0], default=inner)
        weights = [1.0 if inner[0] <= at < inner[1] else 1 / at_once for at in range(start, end)]
        return names[start:end], weights
    weights = [float(warps)] * len(names)
    _halve_choices(machine, weights, start, end)
    for first, last in machine.skips:
        if start <= first < last <= end and "HMMA" in names[first:last] and "IMMA" not in names[first:last]:
            weights[first:last] = [blocks / at_once] * (last - first)
    return names[start:end], weights[start:end]


def report(kv: str, group: int = 4, head_dim: int = 128, mean: int = 0, spec: dict[str, int | float] = PLAIN) -> Report:
    """Compile one variant and count."""
    cubin, shared = compile_variant(kv, group, head_dim, mean, spec)
    machine = disassemble(cubin)
    at_once = pages_at_once(kv, group, head_dim, mean) if mean else 1
    warps, blocks = (4, blocks_of_heads(kv, group, head_dim, mean)) if head_dim > 256 else (1, 1)
    loop, weights = loop_over_pages(machine, warps, at_once, blocks)
    if mean and len({weight for name, weight in zip(loop, weights, strict=True) if name == "HMMA"}) < 2:
        raise RuntimeError("the key mean's products for four pages were not found in the loop over pages")
    kinds: dict[str, float] = Counter()
    for name, weight in zip(loop, weights, strict=True):
        kinds[name] += weight
    instructions = sum(weights)
    return Report(
        kv=kv,
        group=group,
        head_dim=head_dim,
        code=len(loop),
        instructions=instructions,
        per_token=instructions / TOKENS,
        per_triplet=instructions * 32 / TOKENS / (2 * -(-head_dim // 3)),
        registers=machine.registers,
        spilled_bytes=machine.spilled_bytes,
        barriers=loop.count("BAR"),
        shared_bytes=shared,
        kinds=dict(sorted(kinds.items(), key=lambda item: -item[1])),
        pipes=by_pipe(loop, weights),
        mean=mean,
    )


def parse(variant: str) -> tuple[str, int, int, int]:
    """``oct3-4-128``, or ``oct3-4-128+mean2`` with two fast steps, as the arguments of `report`."""
    name, _, mean = variant.partition("+mean")
    kv, group, head_dim = name.split("-")
    return kv, int(group), int(head_dim), int(mean or 0)


def table(reports: list[Report]) -> str:
    """A markdown table."""
    header = ["format", "group", "d", "code", "loop", "a token", "a triplet", *PIPES, "busiest: cycles a token",
              "registers", "spilled B", "barriers", "shared B"]  # fmt: skip
    lines = [header, ["---"] * len(header)]
    for r in reports:
        pipe, cycles = r.busiest
        name = f"{r.kv}+mean{r.mean}" if r.mean else r.kv
        lines.append([name, str(r.group), str(r.head_dim), str(r.code), f"{r.instructions:.0f}", f"{r.per_token:.1f}",
                      f"{r.per_triplet:.2f}", *(f"{r.pipes[name]:.0f}" for name in PIPES), f"{pipe}: {cycles:.1f}",
                      str(r.registers), str(r.spilled_bytes), str(r.barriers), f"{r.shared_bytes:,}"])  # fmt: skip
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """A markdown table; the second line parts the header from the rows."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save(path: Path, title: str, about: str, text: str) -> None:
    """Write a report: the command, the compiler and the date, what the table is, the table."""
    command = " ".join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    today = datetime.datetime.now(datetime.timezone.utc).date()
    path.write_text(
        f"# {title}\n\n`{command}`, triton {triton.__version__}, compiled for sm_90 without a GPU, {today}"
        f" (UTC){about}\n\n{text}\n",
        encoding="utf-8",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", default=",".join(VARIANTS), help="format-group-head_dim, with +mean and its fast steps"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    reports = [report(*parse(variant)) for variant in args.variants.split(",")]
    if args.json:
        print(json.dumps([asdict(r) for r in reports]))
        return 0
    text = table(reports)
    print(text)
    if args.markdown:
        costs = ", ".join(f"{name} {cost}" for name, (_, cost) in PIPES.items() if cost)
        about = (
            f". A turn of the loop is {TOKENS} tokens of a KV head, by one warp; for heads of 512 by four, whose"
            " instructions are added up; `code`: instructions that the loop has, 16 bytes each."
            " Pipes: instructions of a turn; the busiest one with the cycles that a scheduler's pipe takes for a token,"
            f" at {costs} cycles an instruction (memory: without bank conflicts, 32 bits a lane, four schedulers to one"
            " pipe). `+mean2`: with the key mean, two steps of eight frequencies being fast; of the instructions that"
            " make the components of four pages at a time a quarter counts, of two half."
        )
        save(args.markdown, "Instructions of the decode kernel's loop", about, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
