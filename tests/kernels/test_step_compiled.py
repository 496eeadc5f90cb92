"""The kernels of a step compile for an H200 (sm_90), launched early too, without a GPU and without spills."""

import os

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from octo_run.kernels.step import layer_kernels, sample_kernels  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

B, F, I, L = "*bf16", "*fp32", "*i32", "*i64"
HEAD = {"H": 32, "HKV": 8, "D": 128, "BD": 128, "HEADS": 4, "EARLY": True}
STRIDES = dict.fromkeys(("n", "sm_part", "sm_h", "sk_r", "sk_h", "sk_t", "sv_r", "sv_h", "sv_t"), "i32")
TRANSFORM = {"SLOTS": I, "ROWS": I, "MEAN": F, "COEF": F, "QUERIES": F, "eps": "fp32"} | dict.fromkeys(
    ("QKV", "COS", "SIN", "Q_NORM", "K_NORM", "MAPS", "V_ROTATION", "K", "V", "Q"), B
)
RULES = {
    "LOGITS": B,
    "ROWS": I,
    "COUNTS": I,
    "TEMPERATURE": F,
    "PENALTIES": F,
    "FLOOR": F,
    "SEEDS": L,
    "COUNTERS": L,
    "SLICES": F,
}
NORM = dict.fromkeys(("X", "RESIDUAL", "WEIGHT", "OUT", "POST"), B) | {"eps": "fp32", "multiplier": "fp32"}
ADDED = {"N": 4096, "BLOCK": 4096, "ADD": True, "NORM": True, "EARLY": True}
PLAIN = {"SCALED": False, "NORM_V": False}
CASES = [
    (layer_kernels.add_rms_norm_kernel, NORM, ADDED | dict.fromkeys(("POST_NORM", "SCALED", "CENTRED"), False), 8),
    (layer_kernels.add_rms_norm_kernel, NORM | {"WEIGHT": F, "POST": F},
     ADDED | {"POST_NORM": True, "SCALED": True, "CENTRED": True}, 8),
    (layer_kernels.norm_heads_kernel, {"X": B, "WEIGHT": F, "eps": "fp32", "s_row": "i32"},
     {"N": 4096, "BLOCK": 4096, "EARLY": True}, 8),
    (layer_kernels.swiglu_kernel, {"GATE_UP": B, "OUT": B, "n": "i32"}, {"BLOCK": 1024, "GELU": False, "EARLY": True},
     4),
    (layer_kernels.swiglu_kernel, {"GATE_UP": B, "OUT": B, "n": "i32"}, {"BLOCK": 1024, "GELU": True, "EARLY": True},
     4),
    (layer_kernels.qkv_rope_append_kernel, TRANSFORM | STRIDES | {"Q_NORM": F, "K_NORM": F},
     HEAD | {"TOKENS": 16, "COLUMNS": 32, "NORM": True, "MAP": True, "MAP_V": True, "TAKES_MEAN": True,
             "MAPPED": True, "SCALED": True, "NORM_V": True}, 4),
    (layer_kernels.gate_kernel, {"X": B, "GATES": B, "n": "i32"}, {"BLOCK": 1024, "EARLY": True}, 4),
    (layer_kernels.qkv_rope_append_kernel, TRANSFORM | STRIDES,
     HEAD | {"TOKENS": 1, "COLUMNS": 32, "NORM": True, "MAP": True, "MAP_V": False, "TAKES_MEAN": True,
             "MAPPED": True, **PLAIN}, 8),
    (layer_kernels.qkv_rope_append_kernel, TRANSFORM | STRIDES,
     HEAD | {"H": 8, "HEADS": 1, "TOKENS": 1, "COLUMNS": 32, "NORM": False, "MAP": True, "MAP_V": True,
             "TAKES_MEAN": True, "MAPPED": True, **PLAIN}, 8),
    (layer_kernels.qkv_rope_append_kernel, TRANSFORM | STRIDES,
     HEAD | {"TOKENS": 4, "COLUMNS": 128, "NORM": False, "MAP": False, "MAP_V": False, "TAKES_MEAN": False,
             "MAPPED": False, **PLAIN}, 4),
    (layer_kernels.qkv_rope_append_kernel, TRANSFORM | STRIDES,
     HEAD | {"TOKENS": 16, "COLUMNS": 32, "NORM": True, "MAP": True, "MAP_V": True, "TAKES_MEAN": False,
             "MAPPED": True, **PLAIN}, 4),
    (layer_kernels.qkv_rope_append_kernel, TRANSFORM | STRIDES,
     HEAD | {"TOKENS": 16, "COLUMNS": 32, "NORM": True, "MAP": False, "MAP_V": True, "TAKES_MEAN": True,
             "MAPPED": True, **PLAIN}, 4),
    (layer_kernels.qkv_rope_append_kernel, TRANSFORM | STRIDES,
     HEAD | {"TOKENS": 16, "COLUMNS": 32, "NORM": False, "MAP": True, "MAP_V": False, "TAKES_MEAN": True,
             "MAPPED": False, **PLAIN}, 4),
    (layer_kernels.rotate_back_kernel, {"X": B, "ROTATION": B, "OUT": B, "n": "i32"},
     {"D": 128, "BD": 128, "HEADS": 16, "COLUMNS": 32, "EARLY": True}, 4),
    (layer_kernels.embed_packed_kernel, {"IDS": I, "CODES": "*u8", "ROWS": F, "OUT": B, "scale": "fp32"},
     {"N": 4096, "PADDED": 4096, "BLOCK": 1024, "SCALED": True, "EARLY": True}, 4),
    (layer_kernels.embed_kernel, {"IDS": I, "TABLE": B, "OUT": B, "scale": "fp32"},
     {"N": 4096, "BLOCK": 1024, "EARLY": True}, 4),
    (layer_kernels.move_on_kernel,
     {"POSITIONS": I, "PLACES": I, "ACTIVE": I, "n": "i32", "sink": "i32", "ring": "i32"},
     {"BLOCK": 32, "EARLY": True}, 1),
    (layer_kernels.vector_kernel, {"X": B, "WEIGHT": B, "BIAS": B, "OUT": B, "n": "i32"},
     {"K": 4096, "BN": 2, "BK": 2048, "BIASED": False, "EARLY": True}, 4),
    (sample_kernels.sample_slice_kernel, RULES | {"EDITS": F, "vocab": "i32", "s_penalty": "i32"},
     {"BLOCK": 1024, "COUNTED": True, "EDITED": True, "NOISY": True, "FLOORED": True, "EARLY": True}, 4),
    (sample_kernels.sample_merge_kernel,
     {"LOGITS": B, "ROWS": I, "COUNTS": I, "COUNTERS": L, "SLICES": F, "TOKENS": I, "LOGPROBS": F, "vocab": "i32",
      "slices": "i32"},
     {"WIDTH": 128, "COUNTED": True, "NOISY": True, "EARLY": True}, 1),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "types", "constants", "warps"), CASES)
def test_compiles_for_hopper(kernel, types, constants, warps):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    assert set(types) | set(constants) == set(kernel.arg_names)
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    text = compiled.asm["ptx"]
    assert ".local" not in text
    assert constants.get("EARLY", False) == ("griddepcontrol.wait" in text)
