"""Compiles the table-decode kernel for sm_90 (no GPU needed) and reports what its main loop costs.

    python scripts/sass_report.py [--json]

For every format: instructions of the loop over pages (64 tokens of a KV head a turn) by kind, warp instructions a token
and lane instructions a triplet, registers, spilled bytes, shared memory. Needs Triton with its NVIDIA tools.
"""

import argparse
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

from octo_run.kernels.attention.table_decode import table_decode_kernel
from octo_run.kernels.attention.table_launch import constants, options
from octo_run.kernels.codec import TrellisCodec, get

FORMATS = ("oct2", "oct3", "oct4")
POINTERS = dict.fromkeys(("q_ptr", "out_ptr", "sink_k_ptr", "sink_v_ptr", "tail_k_ptr", "tail_v_ptr"), "bf16")
POINTERS |= {"pages_ptr": "u8", "part_ptr": "fp32", "lse_ptr": "fp32", "coef_ptr": "fp32", "base_ptr": "fp32"}
TOKENS = 64


@dataclass(frozen=True)
class Report:
    """Costs of one variant's main loop; ``kinds`` counts its instructions by name."""

    kv: str
    group: int
    head_dim: int
    instructions: int
    per_token: float
    per_triplet: float
    registers: int
    spilled_bytes: int
    shared_bytes: int
    kinds: dict[str, int]


def compile_variant(kv: str, group: int = 4, head_dim: int = 128, mean: bool = False) -> tuple[bytes, int]:
    """The kernel's cubin for ``group`` query heads a KV head, and its bytes of shared memory."""
    codec = get(kv, head_dim)
    assert isinstance(codec, TrellisCodec)
    fixed = constants(codec, 8, group, "bf16", mean, batched=True)
    names = table_decode_kernel.arg_names
    signature = {}
    for name in names:
        pointer = POINTERS.get(name, "i32") if name.endswith("_ptr") else ""
        number = "fp32" if name in ("step_k", "step_v", "scale_log2") else "i32"
        signature[name] = "constexpr" if name in fixed else f"*{pointer}" if pointer else number
    aligned = [i for i, n in enumerate(names) if n.endswith("_ptr") or n.startswith("stride")]
    source = GluonASTSource(table_decode_kernel, signature, fixed, {(i,): [["tt.divisibility", 16]] for i in aligned})
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options(head_dim))
    return kernel.asm["cubin"], int(kernel.metadata.shared)


def longest_loop(sass: str) -> list[str]:
    """Names of the instructions of the longest loop in a disassembly."""
    labels: dict[str, int] = {}
    names: list[str] = []
    best = (0, 0)
    for line in sass.splitlines():
        if label := re.match(r"\s*\.(L_x?_?\w+):", line):
            labels[label.group(1)] = len(names)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*);", line):
            names.append(found.group(1).split(".")[0])
            target = re.search(r"\.(L_x?_?\w+)", found.group(2))
            if names[-1] == "BRA" and target and target.group(1) in labels:
                start = labels[target.group(1)]
                if len(names) - start > best[1] - best[0]:
                    best = (start, len(names))
    return names[slice(*best)]


def report(kv: str, group: int = 4, head_dim: int = 128, mean: bool = False) -> Report:
    """Compile one variant and count."""
    cubin, shared = compile_variant(kv, group, head_dim, mean)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    loop = longest_loop(sass)
    return Report(
        kv=kv,
        group=group,
        head_dim=head_dim,
        instructions=len(loop),
        per_token=len(loop) / TOKENS,
        per_triplet=len(loop) * 32 / TOKENS / (2 * get(kv, head_dim).num_triplets),
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        spilled_bytes=int(re.findall(r"STACK:(\d+)", usage)[-1]),
        shared_bytes=shared,
        kinds=dict(Counter(loop).most_common()),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    reports = [report(kv) for kv in FORMATS]
    if args.json:
        print(json.dumps([asdict(r) for r in reports]))
        return 0
    print("format  loop  per token  per triplet  registers  spilled B  shared B  most frequent")
    for r in reports:
        kinds = " ".join(f"{name} {count}" for name, count in list(r.kinds.items())[:8])
        numbers = f"{r.instructions:5} {r.per_token:10.1f} {r.per_triplet:12.2f} {r.registers:10} {r.spilled_bytes:10}"
        print(f"{r.kv:6} {numbers} {r.shared_bytes:9}  {kinds}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
