"""Compiles the attention kernels for sm_90 without a GPU: they build, hardly spill, have one loop of products.

A kernel with warp-group products (wgmma) in two loops is miscompiled by ptxas 12.8: descriptors that the second loop
uses are computed where the first one begins, and undefined if that is skipped.
"""

import importlib.util
import math
import os
import re
import subprocess
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from octo_run.kernels.codec import get, parse_kv

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

TABLES = ("levels_k", "radii_k", "levels_v", "radii_v")
POINTERS = {
    **dict.fromkeys(("Q", "OUT", "SINK_K", "SINK_V", "TAIL_K", "TAIL_V", "SLAB_K", "SLAB_V"), "bf16"),
    **dict.fromkeys(("PARTIAL", "LSE", "COEF", "BASE", "OFFSET", "SINK_LOGITS", *TABLES), "fp32"),
    **dict.fromkeys(("PAGE_TABLE", "ROWS", "NUM_PACKED", "STARTS", "TAIL_ORIGIN"), "i32"),
    "PAGES": "u8",
}
Options = namedtuple("Options", ("warps", "stages"))
PLAIN = {"EARLY": True, "WINDOW": 0, "CAP": 0.0, "SINKS": False}
EVERYTHING = {"EARLY": True, "WINDOW": 4096, "CAP": 50.0, "SINKS": True}
WIDE_SPILLS = 1024  # bytes a thread at 512 coordinates, whose tiles are not tuned yet
SHARED_MEMORY = 227 * 1024  # bytes that a program may have (sm_90)
UNALIGNED = ("scale", "count", "sink", "capacity", "batch", "programs", "st_r", "first", "first_page", "pages")


def compile_for_hopper(kernel, constants, options, dtype, tables="fp32", types=None):
    """A kernel compiled as its launcher would launch it, with the `warps` and `stages` of its options; returns the
    Triton object and bytes of stack a thread."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    element = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    signature = {}
    for name in kernel.arg_names:
        pointer = (
            tables if name in TABLES else (types or {}).get(name) or POINTERS.get(name, "").replace("bf16", element)
        )
        signature[name] = "constexpr" if name in constants else f"*{pointer}" if pointer else "i32"
    signature |= {"scale": "fp32"} if "scale" in kernel.arg_names else {}
    places = enumerate(kernel.arg_names)
    unaligned = {*UNALIGNED, *constants}
    if constants.get("D", 16) % 16:  # so are strides, but for those of pages
        unaligned |= {name for name in kernel.arg_names if re.fullmatch(r"s(?!p)[a-z]+_[a-z]", name)}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in places if n not in unaligned}
    source = ASTSource(kernel, signature, constants, attributes)
    launch = {"num_warps": options.warps, "num_stages": options.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
    return compiled, stack_bytes(compiled.asm["cubin"])


def format_constants(kv, dim, group, dtype, mean):
    """Constants that the kernels over pages share, and the element type of their tables."""
    import triton
    import triton.language as tl

    from octo_run.kernels.attention.constants import codec_constants, run_widths
    from octo_run.kernels.attention.general.octopus_ptx import decode_immediates
    from octo_run.kernels.attention.general.planes import OCTOPUS

    codec = get(kv, dim)
    kind, bits, levels, _ = codec_constants(codec, "k", torch.device("cpu"))
    first, second, third = run_widths(dim)
    ptx = decode_immediates(codec) if kind == OCTOPUS.value and dtype != torch.float32 else None
    constants = {
        "G": group, "D": dim, "KIND_K": kind, "KIND_V": kind, "BYTES_K": codec.bytes_per_vector,
        "BYTES_V": codec.bytes_per_vector, "BITS_K": bits, "BITS_V": bits, "ELEMENT": tl.bfloat16,
        "DOT": tl.float32 if dtype == torch.float32 else tl.float16, "T0": first, "T1": second, "T2": third,
        "BATCH": 16,
        "MEAN": mean, "HALF": max(16, triton.next_power_of_2(dim // 2)), "PTX_K": ptx, "PTX_V": ptx,
    }  # fmt: skip
    return constants, "i32" if levels.dtype == torch.int32 else "fp32"


def stack_bytes(cubin):
    """Bytes of local memory a thread (spilled registers), by the tool in Triton's package."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", text).group(1))


def spill_bound(kv):
    """The tiles were chosen with Triton 3.6; newer compilers allocate registers otherwise (3.9: up to 704 bytes)."""
    import triton

    if not triton.__version__.startswith("3.6."):
        return 1024
    # The general kernel decodes only those vectors of trellis formats that the table-decode kernel does not take.
    return 256 if kv in ("oct2", "oct3", "oct4") else 128


@pytest.mark.parametrize(
    ("kv", "dim", "group", "dtype", "mean"),
    [
        ("octopus3", 128, 7, torch.bfloat16, False),
        ("octopus2", 64, 4, torch.float32, False),
        ("octopus2", 256, 4, torch.bfloat16, False),
        ("octopus3", 96, 16, torch.bfloat16, False),
        ("octopus4", 128, 4, torch.bfloat16, True),
        ("oct3", 128, 7, torch.bfloat16, False),
        ("oct2", 80, 4, torch.bfloat16, False),
        ("oct3", 512, 8, torch.bfloat16, True),
    ],
)
@pytest.mark.parametrize("kinds", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_decode_compiles_for_hopper(kv, dim, group, dtype, mean, kinds):
    from octo_run.kernels.attention import dispatch
    from octo_run.kernels.attention.general.decode import general_decode_kernel

    constants, tables = format_constants(kv, dim, group, dtype, mean)
    stored = dispatch.stored(parse_kv(kv, dim), dtype, mean=mean)
    tiles = dispatch.tiles(dispatch.Kernel.GENERAL_DECODE, stored, dispatch.ELEMENTS[dtype], dim)
    constants |= {"BM": max(tiles.rows, group), "BN": tiles.keys, "BF": tiles.full_keys, "DIVIDED": True}
    constants |= {"FLIP": tiles.flip, **kinds}
    kernel, stack = compile_for_hopper(general_decode_kernel, constants, tiles, dtype, tables)
    assert "wgmma" not in kernel.asm["ptx"]
    assert stack <= max(spill_bound(kv), WIDE_SPILLS if dim > 256 else 0), f"{stack} bytes of registers spilled"


@pytest.mark.parametrize(
    ("dim", "group"), [(64, 4), (80, 7), (100, 4), (120, 4), (128, 4), (128, 16), (256, 1), (512, 8)]
)
@pytest.mark.parametrize(("batch", "paged"), [(1, True), (16, True), (1, False)])
@pytest.mark.parametrize("kinds", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_plain_decode_compiles_for_hopper(dim, group, batch, paged, kinds):
    import triton

    from octo_run.kernels.attention.dispatch import Element, Kernel, Stored, tiles
    from octo_run.kernels.attention.general.plain_decode import plain_decode_kernel

    tiling, width = tiles(Kernel.PLAIN_DECODE, Stored.PLAIN, Element.HALF, dim), triton.next_power_of_2(dim)
    constants = {
        "G": group, "D": dim, "WIDTH": width, "BM": tiling.rows, "BN": tiling.keys, "BATCH": batch, "DIVIDED": paged,
        "PAGED": paged, "STEP": math.gcd(16, dim), **kinds,
    }  # fmt: skip
    kernel, stack = compile_for_hopper(plain_decode_kernel, constants, tiling, torch.bfloat16)
    ptx = kernel.asm["ptx"]
    # Each product is 16 deep, 64 wide; a second loop with products would double them. Tiles of 32 keys are too short
    # for scores by warp groups.
    products = width // 16 * (tiling.keys >= 64) + max(1, width // 64) * (tiling.keys // 16)
    assert ptx.count("wgmma.mma_async") == products
    size = 2 * math.gcd(8, dim)
    vectors = re.findall(rf"cp\.async\.c[ag]\.shared\.global[^;]*{size:#x}", ptx)
    assert len(vectors) >= 2 * tiling.keys * width * 2 // size // 128, f"keys and values come by copies of {size} bytes"
    at_once = tiling.at_once if paged else 1  # without pages there is one for each KV head of a sequence
    assert at_once * (kernel.metadata.shared + 1024) <= 228 * 1024, "as many programs as counted on"
    assert stack == 0


@pytest.mark.parametrize("kv", ["oct2", "oct3", "octopus3", "bf16"])
@pytest.mark.parametrize("dim", [64, 128])
def test_unpacking_compiles_for_hopper(kv, dim):
    from octo_run.kernels.attention.general.prefill import unpack_kernel

    shared, tables = format_constants(kv, dim, 4, torch.bfloat16, False)
    constants = {name: value for name, value in (shared | PLAIN).items() if name in unpack_kernel.arg_names}
    kernel, stack = compile_for_hopper(unpack_kernel, constants, Options(4, 3), torch.bfloat16, tables)
    assert kernel.metadata.shared <= SHARED_MEMORY
    assert stack <= spill_bound(kv), f"{stack} bytes of registers spilled"


@pytest.mark.parametrize(
    ("dim", "dtype", "past", "slab"),
    [
        (64, torch.bfloat16, True, False),
        (80, torch.bfloat16, True, True),
        (100, torch.bfloat16, False, False),
        (120, torch.bfloat16, True, True),
        (128, torch.bfloat16, False, False),
        (128, torch.bfloat16, True, False),
        (128, torch.bfloat16, False, True),
        (128, torch.bfloat16, True, True),
        (256, torch.bfloat16, True, True),
        (512, torch.bfloat16, True, True),
        (512, torch.bfloat16, True, False),
        (128, torch.float32, True, True),
    ],
)
@pytest.mark.parametrize("kinds", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_prefill_compiles_for_hopper(dim, dtype, past, slab, kinds):
    import triton
    import triton.language as tl

    from octo_run.kernels.attention.dispatch import ELEMENTS, Kernel, Stored, tiles
    from octo_run.kernels.attention.general.prefill import flash_kernel

    tiling = tiles(Kernel.PREFILL, Stored.OTHER, ELEMENTS[dtype], dim)
    width = max(16, triton.next_power_of_2(dim))
    constants = {
        "G": 4, "D": dim, "WIDTH": width, "BM": tiling.rows, "BN": tiling.keys, "PAST": past, "SLAB": slab,
        "STEP": math.gcd(16, dim),
        "DOT": tl.float32 if dtype == torch.float32 else tl.float16, **kinds,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in flash_kernel.arg_names}
    types = {name: "fp16" for name in ("SINK_K", "SINK_V", "TAIL_K", "TAIL_V") if slab and dtype != torch.float32}
    types |= {"ACC": "fp32"}
    kernel, stack = compile_for_hopper(flash_kernel, constants, tiling, dtype, types=types)
    ptx = kernel.asm["ptx"]
    # Each product is 16 deep; a second loop with products would double them.
    products = (width + tiling.keys) // 16
    assert ptx.count("wgmma.mma_async") == (0 if dtype == torch.float32 else products)
    assert ("cp.async.c" in ptx) == (dtype != torch.float32), "keys and values come by asynchronous copies"
    assert kernel.metadata.shared <= SHARED_MEMORY
    # At 256 coordinates the sum alone takes 128 registers of each thread; 3.6 spills 50 around the slab's loop.
    assert stack <= max(spill_bound("bf16"), WIDE_SPILLS if dim > 256 else dim), f"{stack} bytes of registers spilled"


@pytest.mark.parametrize("name", ["take_out_kernel", "put_back_kernel"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_the_key_mean_compiles_for_hopper(name, dim):
    from octo_run.kernels.attention.general import key_mean_kernels
    from octo_run.kernels.attention.key_mean import launch_options

    options = launch_options(dim)
    constants = {"D": options["D"], "WIDTH": options["WIDTH"], "WINDOW": 0}
    launch = Options(options["num_warps"], options["num_stages"])
    types = {"K": "bf16", "OUT": "bf16", "SLAB": "fp16", "MAPS": "fp32", "FIRST": "i32"}
    kernel = getattr(key_mean_kernels, name)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    compiled, stack = compile_for_hopper(kernel, constants, launch, torch.bfloat16, types=types)
    assert compiled.metadata.shared <= SHARED_MEMORY
    assert stack <= spill_bound("bf16"), f"{stack} bytes of registers spilled"


@pytest.mark.parametrize("name", ["oct2", "oct3", "oct4"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_trellis_encoder_compiles_for_hopper(name, dim):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from octo_run.kernels.encode.trellis_launch import _REGISTERS, _ROWS, _WARPS
    from octo_run.kernels.encode.triton_trellis import trellis_kernel
    from octo_run.kernels.trellis_tables import SEARCH_COLUMNS

    codec = get(name, dim)
    constants = {
        "D": dim, "CHAINS": codec.chains, "STREAM": codec.stream, "STATE": codec.state_bits, "SIGNED": codec.signed,
        "NORM": codec.norm_bits, "COLUMNS": SEARCH_COLUMNS, "ROWS": _ROWS,
    }  # fmt: skip
    pointers = {"Y": "*bf16", "FIELDS": "*u16", "KEYS": "*fp16", "VALUES": "*fp32", "UNITS": "*fp64"}
    kinds = dict.fromkeys(trellis_kernel.arg_names, "i32") | pointers | dict.fromkeys(constants, "constexpr")
    source = ASTSource(trellis_kernel, kinds, constants)
    kernel = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": _WARPS, "maxnreg": _REGISTERS[codec.state_bits]}
    )
    bound = 320 if triton.__version__.startswith("3.6.") else 1024
    assert stack_bytes(kernel.asm["cubin"]) <= bound
