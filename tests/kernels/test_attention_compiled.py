"""Compiles the attention kernels for sm_90 without a GPU: they build, hardly spill, have one loop of products.

A kernel with warp-group products (wgmma) in two loops is miscompiled by ptxas 12.8: descriptors that the second loop
uses are computed where the first one begins, and undefined if that is skipped.
"""

import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from octo_run.kernels.codec import get

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

TABLES = ("levels_k", "radii_k", "levels_v", "radii_v")
POINTERS = {
    **dict.fromkeys(("Q", "OUT", "SINK_K", "SINK_V", "TAIL_K", "TAIL_V"), "bf16"),
    **dict.fromkeys(("PART", "LSE", "COEF", "BASE", "OFFSET", *TABLES), "fp32"),
    **dict.fromkeys(("TABLE", "PACKED", "STARTS", "ORIGIN"), "i32"),
    "PAGES": "u8",
}
UNALIGNED = ("scale", "count", "splits", "sink", "capacity", "st_b")


def compile_attend(kv, dim, group, causal, dtype, mean=False):
    """The kernel compiled as the launcher would launch it; returns the Triton object and bytes of stack a thread."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from octo_run.kernels.attention.launch import _tiling, codec_constants, part_widths
    from octo_run.kernels.attention.triton_attend import attend_kernel

    codec, plain = get(kv, dim), kv == "bf16"
    kind, bits, levels, _ = codec_constants(codec, "k", torch.device("cpu"))
    tiling, (first, second) = _tiling(dtype, plain, kind == 2, causal, group, dim), part_widths(dim)
    element = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    constants = {
        "G": group, "D": dim, "KIND_K": kind, "KIND_V": kind, "BYTES_K": codec.bytes_per_vector,
        "BYTES_V": codec.bytes_per_vector, "BITS_K": bits, "BITS_V": bits, "ELEMENT": tl.bfloat16,
        "DOT": tl.float32 if dtype == torch.float32 else tl.float16, "ROWS": tiling.rows, "BN": tiling.keys,
        "BF": tiling.full_keys, "T0": first, "T1": second, "CONTIGUOUS": plain, "CAUSAL": causal, "SPLIT": not causal,
        "FLIP": tiling.flip, "JOINT": tiling.joint, "MEAN": mean, "HALF": max(16, triton.next_power_of_2(dim // 2)),
    }  # fmt: skip
    signature = {}
    for name in attend_kernel.arg_names:
        pointer = POINTERS.get(name, "").replace("bf16", element)
        if name in TABLES and levels.dtype == torch.int32:
            pointer = "i32"
        signature[name] = "constexpr" if name in constants else f"*{pointer}" if pointer else "i32"
    signature["scale"] = "fp32"
    names = [n for n in attend_kernel.arg_names if n not in constants]
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in UNALIGNED}
    source = ASTSource(attend_kernel, signature, constants, attributes)
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return kernel, tiling, stack_bytes(kernel.asm["cubin"])


def stack_bytes(cubin):
    """Bytes of local memory a thread (spilled registers), by the tool in Triton's package."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", text).group(1))


@pytest.mark.parametrize(
    ("kv", "dim", "group", "causal", "dtype"),
    [
        ("octopus3", 128, 7, False, torch.bfloat16),
        ("octopus3", 128, 7, True, torch.bfloat16),
        ("octopus3", 256, 4, True, torch.bfloat16),
        ("bf16", 128, 7, False, torch.bfloat16),
        ("bf16", 256, 1, True, torch.bfloat16),
        ("octopus2", 64, 4, True, torch.float32),
        ("oct3", 128, 7, False, torch.bfloat16),
        ("oct3", 128, 7, True, torch.bfloat16),
        ("oct4", 256, 4, True, torch.bfloat16),
        ("oct2", 80, 4, False, torch.bfloat16),
    ],
)
def test_compiles_for_hopper(kv, dim, group, causal, dtype):
    import triton

    from octo_run.kernels.attention.launch import part_widths

    kernel, tiling, stack = compile_attend(kv, dim, group, causal, dtype)
    products = kernel.asm["ptx"].count("wgmma.mma_async")  # each is 16 deep
    first, second = part_widths(dim)
    one_loop = 3 * (first + second) // 16 + 3 * (2 if second else 1) * tiling.keys // 16
    assert products == (one_loop if tiling.joint else 0)
    # The tiles were chosen with Triton 3.6; newer compilers allocate registers otherwise (3.9: up to 704 bytes).
    # Decode of the trellis formats is the path for what the table-decode kernel does not take.
    bound = (256 if kv in ("oct2", "oct3", "oct4") else 128) if triton.__version__.startswith("3.6.") else 1024
    assert stack <= bound, f"{stack} bytes of registers spilled"


@pytest.mark.parametrize("name", ["oct2", "oct3", "oct4"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_trellis_encoder_compiles_for_hopper(name, dim):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from octo_run.kernels.blocks import SEARCH_COLUMNS
    from octo_run.kernels.encode.trellis_launch import _ROWS
    from octo_run.kernels.encode.triton_trellis import trellis_kernel

    codec = get(name, dim)
    constants = {
        "D": dim, "STREAM": codec.stream, "STATE": codec.state_bits, "SIGNED": codec.signed, "NORM": codec.norm_bits,
        "COLUMNS": SEARCH_COLUMNS, "ROWS": _ROWS,
    }  # fmt: skip
    pointers = {"Y": "*bf16", "FIELDS": "*u16", "KEYS": "*fp32", "VALUES": "*fp32", "UNITS": "*fp64"}
    kinds = dict.fromkeys(trellis_kernel.arg_names, "i32") | pointers | dict.fromkeys(constants, "constexpr")
    source = ASTSource(trellis_kernel, kinds, constants)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    bound = 0 if triton.__version__.startswith("3.6.") else 1024
    assert stack_bytes(kernel.asm["cubin"]) <= bound
