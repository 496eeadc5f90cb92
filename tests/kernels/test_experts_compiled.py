"""The kernels of routed experts compile for an H200 (sm_90), launched early too, without a GPU and without spills."""

import os
import runpy
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from octo_run.kernels.experts import launch, product_kernels, routing_kernels  # noqa: E402
from octo_run.kernels.experts.packed_product import packed_experts_kernel  # noqa: E402
from octo_run.kernels.linear.digit_parts import takes_digits  # noqa: E402
from octo_run.kernels.linear.streamed_parts import shared_bytes  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

disassembled = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "sass_report.py"))["disassemble"]
B, F, I, H = "*bf16", "*fp32", "*i32", "*fp16"
CHOSEN = {"INDICES": I, "WEIGHTS": F}
GROUPED = {
    "X": B, "ROWS": F, "SCALES": H, "OFFSETS": H, "BIAS": B, "ORDER": I, "TILES": I, "OUT": B, "alpha": "fp32",
    "limit": "fp32", "n": "i32", "columns": "i32", "padded": "i32", "stride_row": "i32", "stride_group": "i32",
}  # fmt: skip


def grouped(kind: str, bits: int, group: int, rows: int, wide: int, first: bool):
    dense = kind == "dense"
    constants = {
        "KIND": kind, "BITS": bits, "GROUP": group, "SCALED": group > 0, "HAS_OFFSETS": kind == "int4", "BIASED": True,
        "CHOSEN": 8, "FIRST": first, "ACTIVATION": "clamped_silu" if kind == "fp4" else "silu", "BM": rows, "BN": wide,
        "BK": 64 if dense else 128, "EARLY": True,
    }  # fmt: skip
    return product_kernels.grouped_kernel, GROUPED | {"WEIGHT": B if dense else I}, constants, 4


CASES = [  # the quick one, then the others
    (product_kernels.gate_up_vector_kernel,
     {"X": B, "WEIGHT": B, "BIAS": B, "INDICES": I, "OUT": B, "alpha": "fp32", "limit": "fp32"},
     {"N": 768, "K": 2048, "CHOSEN": 8, "BN": 2, "BK": 1024, "ACTIVATION": "silu", "BIASED": False, "EARLY": True}, 4),
    (routing_kernels.router_kernel,
     CHOSEN | {"X": B, "WEIGHT": B, "BIAS": B, "OUT": F, "COUNTERS": I, "TILES": I, "ORDER": I, "experts": "i32",
               "outputs": "i32"},
     {"K": 2880, "BN": 2, "BK": 2048, "BIASED": True, "CHOSEN": 10, "BE": 512, "PART": 32,
      "NORMALISED": True, "SINGLE": True, "EARLY": True}, 8),
    (routing_kernels.router_rows_kernel, {"X": B, "WEIGHT": B, "BIAS": B, "OUT": F, "rows": "i32", "outputs": "i32"},
     {"K": 2048, "BM": 32, "BN": 32, "BK": 64, "BIASED": False, "EARLY": True}, 4),
    (routing_kernels.choose_kernel, CHOSEN | {"LOGITS": F, "TILES": I, "ORDER": I, "experts": "i32", "outputs": "i32"},
     {"CHOSEN": 8, "BE": 128, "PART": 32, "NORMALISED": True, "SINGLE": True, "EARLY": True}, 4),
    (routing_kernels.count_kernel, {"INDICES": I, "COUNTS": I, "pairs": "i32"}, {"BLOCK": 1024, "EARLY": True}, 4),
    (routing_kernels.place_kernel,
     {"INDICES": I, "COUNTS": I, "ORDER": I, "TILES": I, "experts": "i32", "pairs": "i32", "tiles": "i32"},
     {"ROWS": 64, "BE": 128, "BLOCK": 1024, "EARLY": True}, 4),
    (routing_kernels.combine_kernel,
     {"PARTS": B, "WEIGHTS": F, "SHARED": B, "LOGITS": F, "OUT": B, "outputs": "i32", "experts": "i32"},
     {"N": 2048, "CHOSEN": 8, "BLOCK": 512, "HAS_SHARED": True, "EARLY": True}, 4),
    (product_kernels.down_vector_kernel,
     CHOSEN | {"X": B, "WEIGHT": B, "BIAS": B, "SHARED": B, "LOGITS": F, "OUT": B, "outputs": "i32", "experts": "i32",
               "ahead": "i32"},
     {"N": 2048, "K": 768, "CHOSEN": 8, "BN": 4, "BK": 256, "BIASED": True, "HAS_SHARED": True, "AHEAD": 128,
      "EARLY": True}, 4),
    (product_kernels.down_vector_kernel,
     CHOSEN | {"X": B, "WEIGHT": B, "BIAS": B, "SHARED": B, "LOGITS": F, "OUT": B, "outputs": "i32", "experts": "i32",
               "ahead": "i32"},
     {"N": 4096, "K": 14336, "CHOSEN": 2, "BN": 4, "BK": 1024, "BIASED": False, "HAS_SHARED": False, "AHEAD": 0,
      "EARLY": True}, 4),
    grouped("dense", 16, 0, 16, 64, True), grouped("dense", 16, 0, 64, 128, False),
    grouped("int4", 4, 64, 16, 64, True), grouped("int4", 4, 64, 64, 128, False),
    grouped("fp4", 4, 32, 64, 128, True), grouped("int8", 8, 0, 64, 128, False), grouped("fp8", 8, 0, 16, 64, True),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "types", "constants", "warps"), CASES)
def test_compiles_for_hopper(kernel, types, constants, warps):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    assert set(types) | set(constants) == set(kernel.arg_names)
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 3})
    text = compiled.asm["ptx"]
    assert ".local" not in text
    assert "griddepcontrol.wait" in text
    assert compiled.metadata.shared <= 227 * 1024


def test_all_programs_of_down_are_there_at_once():
    """Those of Qwen3-30B-A3B, 512 of 128 threads, on the 132 multiprocessors of an H200: four on each, of 65,536
    registers. Threads never wait for each other but in the sum at the end."""
    kernel, types, constants, warps = next(case for case in CASES if case[2].get("N") == 2048 and "BIASED" in case[2])
    constants = constants | {"BIASED": False, "HAS_SHARED": False}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if "*" in signature[name]}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    found = disassembled(compiled.asm["cubin"])
    assert found.registers <= 128 and found.spilled_bytes == 0
    assert "UBLKPF" in found.names and found.names.count("BAR") <= 2


@pytest.mark.parametrize(
    ("kind", "bits", "group", "turns"),
    [("int4", 4, 64, 2), ("int4", 4, 64, 4), ("int8", 8, 0, 2), ("fp8", 8, 0, 1), ("fp4", 4, 32, 3)],
)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("digits", [True, False])
def test_fused_products_compile_for_hopper(kind, bits, group, turns, first, digits):
    if digits and not takes_digits(kind, group):
        pytest.skip("such codes are no whole numbers")
    sizes = ("n", "columns", "blocks", "row_bytes", "stride_group", "outputs", "programs", "step", "half")
    types = {
        "X": B, "CODES": "*u8", "ROWS": F, "SCALES": H, "OFFSETS": H, "BIAS": B, "ORDER": I, "TILES": I, "OUT": B,
        "alpha": "fp32", "limit": "fp32", **dict.fromkeys(sizes, "i32"),
    }  # fmt: skip
    offsets, how = kind == "int4", launch._tiling(8 * turns)
    shared = int(shared_bytes(bits, group, offsets, 1, digits, 8, turns, how.ahead))
    fixed = {
        "KIND": kind, "BITS": bits, "ELEMENT": "bf16", "GROUP": group, "DIGITS": digits, "HAS_OFFSETS": offsets,
        "BIASED": kind == "fp4", "PADDED": kind == "fp4", "UNEVEN": kind == "fp4", "TURNS": turns,
        "AHEAD": how.ahead, "CHOSEN": 8, "FIRST": first,
        "ACTIVATION": "clamped_silu" if kind == "fp4" else "silu", "WARPS": 8,
        "SMEM_WORDS": -(-shared // 1024) * 256, "EARLY": True, "KNOWN": not first,
    }  # fmt: skip
    names = packed_experts_kernel.arg_names
    assert set(types) | set(fixed) == set(names)
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = [i for i, name in enumerate(names) if types.get(name, "").startswith("*")]
    source = GluonASTSource(packed_experts_kernel, signature, fixed, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8} | how.registers)
    text = compiled.asm["ptx"]
    assert ".local" not in text
    assert text.index("griddepcontrol.wait") < text.index("griddepcontrol.launch_dependents")
    assert (text.index("cp.async") < text.index("griddepcontrol.wait")) == (not first)
    found = disassembled(compiled.asm["cubin"])
    few = turns == 3 and not digits  # inputs of three blocks leave too few of 128 registers
    assert found.spilled_bytes <= (32 if few else 0)
    assert found.registers <= (128 if turns < 4 else 255)
