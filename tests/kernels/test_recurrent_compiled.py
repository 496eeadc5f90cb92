"""The kernels of Gated DeltaNet compile for an H200 (sm_90) without a GPU and without spills."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from octo_run.kernels.recurrent import delta_kernels as kernels  # noqa: E402
from octo_run.kernels.recurrent import launch  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

F, I = "*fp32", "*i32"
#: Of a 9B model.
HEADS = {"HK": 16, "HV": 32, "DK": 128, "DV": 128}
CASES = [  # the quick one, then the others
    (kernels.delta_heads_kernel, ("X", "GATES", "CONV_W", "CONV", "QK", "V"),
     {"DECAY": F, "BIAS": F, "BETA": F, "FADE": F, "start": "i32", "n": "i32"},
     HEADS | {"BD": 128, "TAPS": 4, "TOKENS": 32}, 4),
    (kernels.delta_step_kernel, ("X", "GATES", "CONV_W", "NORM", "CONV", "OUT"),
     {"DECAY": F, "BIAS": F, "MEMORY": F, "POSITIONS": I, "ROWS": I, "eps": "fp32", "s_conv": "i32",
      "s_memory": "i32"}, HEADS | {"BK": 128, "BV": 128, "TAPS": 4, "EARLY": True}, 8),
    (kernels.delta_block_kernel, ("QK", "V", "W", "SCORES"),
     {"BETA": F, "FADE": F, "n": "i32", "lead": "i32"}, HEADS | {"BK": 128, "BV": 128}, 8),
    (kernels.delta_scan_kernel, ("QK", "V", "W", "SCORES", "OUT"),
     {"FADE": F, "MEMORY": F, "SAVED": F} | dict.fromkeys(("start", "begin", "end", "lead", "blocks", "save"), "i32"),
     HEADS | {"BK": 128, "COLUMNS": 32, "SAVES": True}, 4),
    (kernels.delta_finish_kernel, ("OUT", "X", "NORM"), {"eps": "fp32", "lines": "i32"},
     {"HV": 32, "DV": 128, "BV": 128, "CHANNELS": 8192, "LINES": 16}, 4),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["*bf16", "*fp32"])
@pytest.mark.parametrize(("kernel", "computed", "types", "constants", "warps"), CASES)
def test_compiles_for_hopper(kernel, computed, types, constants, warps, kind):
    types = types | dict.fromkeys(computed, kind)
    assert set(types) | set(constants) == set(kernel.arg_names)
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    options = {"num_warps": warps}
    if kernel is kernels.delta_scan_kernel:
        options["num_stages"] = launch.stages(torch.float32 if kind == "*fp32" else torch.bfloat16)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    text = compiled.asm["ptx"]
    assert ".local" not in text
    assert constants.get("EARLY", False) == ("griddepcontrol.wait" in text)
    assert compiled.metadata.shared <= 227 * 1024


@pytest.mark.parametrize("kernel", [kernels.delta_heads_kernel, kernels.delta_block_kernel, kernels.delta_scan_kernel])
def test_lengths_are_no_constants(kernel):
    """Triton 3.6 took a scan of one block for a constant, and what it made of it read memory that is not there."""
    lengths = [one for one in kernel.params if one.name in ("start", "n", "begin", "end", "lead", "blocks", "save")]
    assert lengths and all(one.do_not_specialize for one in lengths)
