"""Compiles the encoder by lanes for sm_90 without a GPU: no spills, no barriers in its loops, its own products."""

import os
from collections.abc import Callable
from types import ModuleType

import pytest

from octo_run.kernels.codec import get

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
SHARED_MEMORY = 227 * 1024  # bytes that a program may have (sm_90)


@pytest.mark.parametrize("name", ["oct2", "oct3", "oct4"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_lane_encoder_compiles_for_hopper(name: str, dim: int, script: Callable[[str], ModuleType]) -> None:
    """Its products are those of one slot of a chain and of one extra triplet."""
    tool = script("sass_encode")
    kernel = tool.compile_lanes(name, dim)
    constants = tool.lane_constants(get(name, dim))
    machine = tool.disassemble(kernel.asm["cubin"])
    assert machine.spilled_bytes <= 64
    assert kernel.metadata.shared == 4 * constants["SMEM_WORDS"] <= SHARED_MEMORY
    extras = get(name, dim).extras
    products = kernel.asm["ptx"].count("mma.sync.aligned.m16n8k8")
    assert products == (16 * extras + (128 if constants["STATE"] == 3 else 16))
    assert kernel.asm["ptx"].count("bar.sync") <= 3
    loops = tool.loops_of_a_chain(machine)
    assert len(loops) == (2 if constants["STATE"] == 3 else 3) and all("BAR" not in loop for loop in loops)
