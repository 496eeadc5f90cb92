"""Compiles both searches of the trellis encoder for sm_90 (no GPU needed) and counts the instructions of their loops.

    python scripts/sass_encode.py [--head-dim D] [--markdown FILE]

For every format and search: the loops that have products (one over the slots of a chain within one over chains; with
two states one over groups of codes within these), outermost first: instructions, those of the integer pipe, barriers;
what a warp needs for a turn of each. Sixteen vectors take four warps of the portable search and one of the lanes'.
Needs Triton with its NVIDIA tools.
"""

import argparse
import sys
from pathlib import Path

import triton
from sass_report import Machine, by_pipe, disassemble, markdown, save
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from octo_run.kernels.codec import TrellisCodec, get
from octo_run.kernels.encode.lane_search import LANE_WARPS, lane_search_kernel
from octo_run.kernels.encode.trellis_launch import _REGISTERS, _ROWS, _WARPS, lane_constants
from octo_run.kernels.encode.triton_trellis import trellis_kernel
from octo_run.kernels.trellis_tables import SEARCH_COLUMNS

FORMATS = ("oct2", "oct3", "oct4")
SMALLEST = 60  # instructions of a loop that is shown
TARGET = GPUTarget("cuda", 90, 32)


def compile_lanes(kv: str, head_dim: int) -> triton.compiler.CompiledKernel:
    """The search by lanes as its launcher asks for it."""
    codec = get(kv, head_dim)
    assert isinstance(codec, TrellisCodec)
    fixed = lane_constants(codec)
    names = lane_search_kernel.arg_names
    pointers = {"y_ptr": "*bf16", "fields_ptr": "*u16", "values_ptr": "*fp32", "units_ptr": "*fp64"}
    pointers |= dict.fromkeys(("keys_ptr", "extra_ptr", "last_ptr"), "*i32")
    kinds = dict.fromkeys(names, "i32") | pointers | dict.fromkeys(fixed, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or "stride" in n}
    source = GluonASTSource(lane_search_kernel, kinds, fixed, aligned)
    return triton.compile(source, target=TARGET, options={"num_warps": LANE_WARPS})


def compile_portable(kv: str, head_dim: int) -> triton.compiler.CompiledKernel:
    """The portable search as its launcher asks for it."""
    codec = get(kv, head_dim)
    assert isinstance(codec, TrellisCodec)
    fixed = {
        "D": head_dim,
        "CHAINS": codec.chains,
        "STREAM": codec.stream,
        "STATE": codec.state_bits,
        "SIGNED": codec.signed,
    }
    fixed |= {"NORM": codec.norm_bits, "COLUMNS": SEARCH_COLUMNS, "ROWS": _ROWS}
    pointers = {"Y": "*bf16", "FIELDS": "*u16", "KEYS": "*fp16", "VALUES": "*fp32", "UNITS": "*fp64"}
    names = trellis_kernel.arg_names
    kinds = dict.fromkeys(names, "i32") | pointers | dict.fromkeys(fixed, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers or n.startswith("sy_")}
    options = {"num_warps": _WARPS, "maxnreg": _REGISTERS[codec.state_bits]}
    return triton.compile(ASTSource(trellis_kernel, kinds, fixed, aligned), target=TARGET, options=options)


def loops_of_a_chain(machine: Machine) -> list[list[str]]:
    """The loop over chains and those with products within it, the outermost first."""
    with_products = [
        loop for loop in machine.loops if "HMMA" in machine.names[slice(*loop)] and loop[1] - loop[0] > SMALLEST
    ]
    outer = max(with_products, key=lambda loop: loop[1] - loop[0])
    inside = [loop for loop in with_products if outer[0] <= loop[0] and loop[1] <= outer[1]]
    return [machine.names[slice(*loop)] for loop in sorted(inside, key=lambda loop: loop[0] - loop[1])]


def line(search: str, kv: str, machine: Machine) -> list[str]:
    """A row of the table."""
    loops = loops_of_a_chain(machine)
    counts = [str(len(loop)) for loop in loops], [str(by_pipe(loop)["alu"]) for loop in loops]
    barriers = [str(loop.count("BAR")) for loop in loops]
    return [kv, search, *(" > ".join(part) for part in (*counts, barriers)), str(machine.registers),
            str(machine.spilled_bytes)]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    rows = [["format", "search", "instructions", "integer pipe", "barriers", "registers", "spilled B"], ["---"] * 7]
    for kv in FORMATS:
        for search, compiled in (("portable", compile_portable), ("by lanes", compile_lanes)):
            rows.append(line(search, kv, disassemble(compiled(kv, args.head_dim).asm["cubin"])))
    text = markdown(rows)
    print(text)
    if args.markdown:
        about = (
            f", {args.head_dim} coordinates. Loops with products, the outer one > the one within it; sixteen vectors"
            " take four warps of the portable search, one of that by lanes."
        )
        save(args.markdown, "Instructions of the encoder's searches", about, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
