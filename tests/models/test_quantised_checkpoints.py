"""Checkpoints as published: logits of each format against those of its values, and damaged files."""
# ruff: noqa: E501

import json
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from octo_run.engine import Engine, plan_memory
from octo_run.engine.parts import held_bytes
from octo_run.engine.quantise import quantise
from octo_run.errors import OctoError
from octo_run.kernels.linear import PackedWeight
from octo_run.models.config import load_config
from octo_run.models.files import SMALL_NAMES
from octo_run.models.linear import Linear, PackedLinear, SplitLinear
from octo_run.models.quantisation import names
from octo_run.models.quantisation.config import OLDER_NAMES, Quantisation, Rule, StoredScheme
from octo_run.models.tensors import stored_config
from octo_run.models.weights import StoredWeights, load_weights

files = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "quantised_files.py")))
Writer = files.Writer

Make = Callable[..., Path]
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "torch_dtype": "float32", "tie_word_embeddings": False}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def ct(form: str, *, ignore: list[str] | None = None, activations: bool = False, **weights: Any) -> dict[str, Any]:
    args = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False} | weights
    inputs = {"num_bits": 8, "type": args["type"], "dynamic": True, "strategy": "token"} if activations else None
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head"] if ignore is None else ignore, "kv_cache_scheme": None,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args, "input_activations": inputs}},
    }  # fmt: skip


def four(group: int | None, **more: Any) -> dict[str, Any]:
    return ct("pack-quantized", num_bits=4, strategy="group" if group else "channel", group_size=group, **more)


def gptq(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False} | fields


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


def auto_round(packing: str | None, **fields: Any) -> dict[str, Any]:
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int", "iters": 200,
              "autoround_version": "0.9.2", "block_name_to_quantize": "model.layers"}  # fmt: skip
    return config | ({"packing_format": packing} if packing else {}) | fields


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
BLOCK = {"strategy": "block", "block_structure": [128, 128], "type": "float"}
FORMATS: dict[str, tuple[dict[str, Any], Writer]] = {
    "gptq": (gptq(), files.gptq()),
    "gptq 8 bits, 64": (gptq(bits=8, group_size=64), files.gptq(8, 64)),
    "gptq group 128, the last one half": (gptq(group_size=128), files.gptq(4, 128)),
    "gptq a group a row": (gptq(group_size=-1), files.gptq(4, None)),
    "gptq 8 bits, a group a row, asymmetric": (gptq(bits=8, group_size=-1, sym=False), files.gptq(8, None, symmetric=False)),
    "gptq asymmetric": (gptq(sym=False), files.gptq(symmetric=False)),
    "gptq v2": (gptq(checkpoint_format="gptq_v2", sym=False), files.gptq(symmetric=False, version=2)),
    "gptq v2 symmetric": (gptq(checkpoint_format="gptq_v2"), files.gptq(version=2)),
    "gptq act-order": (gptq(desc_act=True), files.gptq(act_order=True)),
    "gptq act-order, 8 bits, asymmetric": (
        gptq(bits=8, sym=False, desc_act=True), files.gptq(8, symmetric=False, act_order=True),
    ),
    "awq": (AWQ, files.awq()),
    "awq 32": (AWQ | {"group_size": 32}, files.awq(32)),
    "awq a group a row": (AWQ | {"group_size": -1}, files.awq(None)),
    "auto-round": (auto_round("auto_round:auto_gptq"), files.auto_round()),
    "auto-round, older": (auto_round(None, block_name_to_quantize=None), files.auto_round()),
    "auto-round 8 bits, asymmetric": (
        auto_round("auto_round:gptq", bits=8, group_size=64, sym=False), files.auto_round(8, 64, symmetric=False),
    ),
    "auto-round, zeros as they are": (auto_round("auto_round"), files.auto_round(less=0)),
    "auto-round, zeros as they are, asymmetric": (
        auto_round("auto_round:gptqmodel", sym=False, act_bits=16), files.auto_round(symmetric=False, less=0),
    ),
    "auto-round awq": (auto_round("auto_round:auto_awq", group_size=64, sym=False), files.awq()),
    "auto-round awq, symmetric": (auto_round("auto_round:awq"), files.awq(32, symmetric=True)),
    "ct w4a16": (four(32), files.ct_packed()),
    "ct w4a16 128, the last one half": (four(128), files.ct_packed(4, 128)),
    "ct w4a16, scales in float16": (four(32), files.ct_packed(dtype=torch.float16)),
    "ct w4a16 asymmetric": (four(64, symmetric=False), files.ct_packed(4, 64, symmetric=False)),
    "ct w4a16 a row": (four(None), files.ct_packed(4, None)),
    "ct w4a16 act-order": (four(32, actorder="group"), files.ct_packed(act_order=True)),
    "ct w8a16": (
        ct("pack-quantized", strategy="group", group_size=64), files.ct_packed(8, 64),
    ),
    "ct w8a16 a row, asymmetric": (
        ct("pack-quantized", strategy="channel", symmetric=False), files.ct_packed(8, None, symmetric=False),
    ),
    "ct w8a8": (ct("int-quantized", strategy="channel", activations=True), files.ct_int8()),
    "ct naive int8 asymmetric": (ct("naive-quantized", strategy="channel", symmetric=False), files.ct_int8(symmetric=False)),
    "ct naive int8 in groups": (ct("naive-quantized", strategy="group", group_size=32), files.ct_int8(32)),
    "ct fp8 tensor": (ct("float-quantized", strategy="tensor", type="float"), files.fp8(None, None, shape=(1,))),
    "ct fp8 channel": (
        ct("float-quantized", strategy="channel", type="float", activations=True), files.fp8(1, None, dtype=torch.bfloat16),
    ),
    "ct fp8 block": (ct("float-quantized", **BLOCK), files.fp8(128, 128)),
    "ct naive fp8": (ct("naive-quantized", strategy="channel", type="float"), files.fp8(1, None)),
    "ct nvfp4": (
        ct("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16), files.nvfp4(),
    ),
    "ct mxfp4": (ct("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32), files.mxfp4()),
    "ct mxfp8": (ct("mxfp8-quantized", type="float", strategy="group", group_size=32), files.mxfp8),
    "fp8 block": (FP8 | {"weight_block_size": [128, 128]}, files.fp8(128, 128, "weight_scale_inv")),
    "fp8 block, scales in bf16": (
        FP8 | {"weight_block_size": [64, 32]}, files.fp8(64, 32, "weight_scale_inv", torch.bfloat16),
    ),
    "fp8 block, scales are powers of two": (
        FP8 | {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        files.fp8(128, 128, "weight_scale_inv", torch.float8_e8m0fnu),
    ),
    "fp8 tensor": (FP8 | {"weight_block_size": None}, files.fp8(None, None, "weight_scale_inv", shape=())),
    "fp8 tensor, AutoFP8": (FP8 | {"activation_scheme": "static"}, files.fp8(None, None, shape=(1,))),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, files.fp8(1, None)),
    "mxfp4": ({"quant_method": "mxfp4"}, files.mxfp4(blocks=True)),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, files.fp8(None, None, shape=())),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_*"]}, files.nvfp4(True)),
}  # fmt: skip


def quantised(
    make: Make, config: dict[str, Any], write: Writer | Callable[[str], Writer | None], **changes: Any
) -> tuple[Path, Path]:
    """A folder of quantised weights, and one of their values."""
    dense = make("dense", **(SHAPE | changes))
    packed = shutil.copytree(dense, dense.parent / "packed")
    values = json.loads((dense / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    stored, exact = dict[str, Tensor](), load_file(dense / "model.safetensors")
    for name, tensor in list(exact.items()):
        prefix = name.removesuffix(".weight")
        writer = write
        if not isinstance(config, dict) or name == prefix or tensor.ndim != 2 or "embed" in name:
            writer = None  # type: ignore[assignment]
        elif getattr(write, "by_name", False):
            writer = write(prefix)  # type: ignore[assignment, arg-type]
        elif not prefix.endswith(LAYERS):
            writer = None  # type: ignore[assignment]
        if writer is None:
            stored[name] = tensor
            continue
        parts, found = writer(tensor.double().numpy())  # type: ignore[arg-type, misc]
        stored |= {f"{prefix}.{part}": content.contiguous() for part, content in parts.items()}  # type: ignore[union-attr]
        exact[name] = torch.from_numpy(np.ascontiguousarray(found)).float()
    save_file(stored, packed / "model.safetensors")
    save_file(exact, dense / "model.safetensors")
    return packed, dense


def by_name(choose: Callable[[str], Writer | None]) -> Any:
    choose.by_name = True  # type: ignore[attr-defined]
    return choose


IDS = [5, 900, 33, 8000, 17, 256, 1, 4000, 77, 3] * 4


def loaded(folder: Path, **options: Any) -> Engine:
    return Engine.load(folder, **({"kv": "oct3", "device": "cpu", "conditioning": "off", "max_context": 128} | options))


def same_logits(packed: Path, dense: Path, **options: Any) -> Engine:
    """The engine of the packed folder, whose logits are those of the dense one."""
    ours, wanted = loaded(packed, **options), loaded(dense, **options).logits(IDS)
    error = (ours.logits(IDS) - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-3, float(error)
    return ours


def edited(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def configured(folder: Path, **fields: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(values))


#: Of the formats one of each way to pack numbers.
ONE_OF_A_KIND = ("gptq", "gptq act-order", "awq", "auto-round, zeros as they are, asymmetric", "ct w4a16", "ct w8a8", "ct fp8 block", "ct nvfp4", "ct mxfp4", "ct mxfp8",
                 "fp8 block", "mxfp4")  # fmt: skip


@pytest.mark.few(*ONE_OF_A_KIND)
@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_values(name: str, make_checkpoint: Make) -> None:
    """Two query heads a KV head; values are rotated online, because packed weights do not take the rotation in."""
    packed, dense = quantised(make_checkpoint, *FORMATS[name])
    engine = same_logits(packed, dense)
    decoder = engine.forward.decoder
    for layer in decoder.layers:
        assert layer.attention.v_rotation is not None and isinstance(layer.mlp.down, PackedLinear)
        assert isinstance(layer.attention.qkv, PackedLinear) and isinstance(layer.mlp.gate_up, PackedLinear)
    assert isinstance(decoder.head, Linear)
    held = held_bytes(decoder.embedding, decoder.head, decoder.final_norm, decoder.layers, but=(decoder.key_tensors,))
    assert sum(held) == engine.plan.weights
    matrices = load_weights(packed, load_config(packed), "cpu", torch.float32)
    for tensor, exact in load_file(dense / "model.safetensors").items():
        rtol = 2**-21 if "nvfp4" in name else 2**-11  # scales of E4M3 are exact in float16, those of 24 bits are not
        assert torch.allclose(matrices[tensor], exact, rtol=rtol, atol=1e-7 * float(exact.abs().max()))


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["gptq act-order", "ct w4a16 asymmetric", "fp8 block"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 1)])
def test_other_groups_of_heads_and_biases(name: str, heads: tuple[int, int], make_checkpoint: Make) -> None:
    changes = QWEN2 | {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    same_logits(*quantised(make_checkpoint, *FORMATS[name], **changes))


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gptq", "awq", "ct nvfp4", "fp8 block"])
def test_arithmetic_in_16_bits(name: str, dtype: str, make_checkpoint: Make) -> None:
    packed, dense = quantised(make_checkpoint, *FORMATS[name])
    ours, wanted = loaded(packed, dtype=dtype).logits(IDS), loaded(dense).logits(IDS)
    assert (ours - wanted).abs().max() < (0.05 if dtype == "bfloat16" else 0.01) * wanted.abs().max()


def test_queries_keys_and_values_of_different_kinds(make_checkpoint: Make) -> None:
    """One dense, one in 4 and one in 8 bits, by name, by pattern and by class; the head is packed, too."""
    config = four(32, ignore=["re:.*k_proj$", "model.layers.1.mlp.up_proj"])
    group = {"targets": ["re:.*layers\\.\\d+\\.self_attn\\.(v|o)_proj"], "format": "int-quantized"}
    config["config_groups"]["group_1"] = group | {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    config["format"] = "mixed-precision"
    config["config_groups"]["group_0"]["format"] = "pack-quantized"

    def choose(name: str) -> Writer | None:
        if name.endswith("k_proj") or name == "model.layers.1.mlp.up_proj":
            return None
        return files.ct_int8() if name.endswith(("v_proj", "o_proj")) else files.ct_packed()

    decoder = same_logits(*quantised(make_checkpoint, config, by_name(choose))).forward.decoder
    layer = decoder.layers[1]
    assert isinstance(layer.attention.qkv, SplitLinear) and isinstance(layer.mlp.gate_up, SplitLinear)
    kinds = [part.weight.kind if isinstance(part.weight, PackedWeight) else None for part in layer.attention.qkv.parts]
    assert kinds == ["int4", None, "int8"]
    assert isinstance(decoder.layers[0].mlp.gate_up, PackedLinear) and isinstance(decoder.head, PackedLinear)


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_head_counts_though_the_configuration_ties_it(tied: bool, make_checkpoint: Make) -> None:
    config = gptq(lm_head=True)
    packed, dense = quantised(make_checkpoint, config, by_name(lambda _name: files.gptq()))
    for folder in (packed, dense):
        values = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
        (folder / "config.json").write_text(json.dumps(values))
    assert isinstance(same_logits(packed, dense).forward.decoder.head, PackedLinear)
    assert loaded(packed, head="int8").forward.decoder.head.weight.kind == "int4"  # as it is stored


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_modules_that_are_not_converted(key: str, make_checkpoint: Make) -> None:
    config = FP8 | {"weight_block_size": [128, 128], key: ["lm_head", "model.layers.1", "self_attn"]}

    def choose(name: str) -> Writer | None:
        return files.fp8(128, 128, "weight_scale_inv") if "layers.0.mlp" in name else None

    decoder = same_logits(*quantised(make_checkpoint, config, by_name(choose))).forward.decoder
    assert isinstance(decoder.layers[1].mlp.down, Linear) and isinstance(decoder.layers[0].mlp.down, PackedLinear)
    assert isinstance(decoder.layers[0].attention.qkv, Linear) and decoder.layers[0].attention.v_rotation is None


def test_a_layer_whose_file_holds_a_plain_matrix_is_plain(make_checkpoint: Make) -> None:
    choose = by_name(lambda name: None if "layers.1" in name or "lm_head" in name else files.awq())
    packed, dense = quantised(make_checkpoint, AWQ, choose)
    engine = same_logits(packed, dense)
    assert isinstance(engine.forward.decoder.layers[1].attention.out, Linear)
    plan = plan_memory(
        stored_config(packed, load_config(packed)), "oct3", device=torch.device("cpu"), dtype=torch.float32
    )
    assert plan.weights == engine.plan.weights


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_layers_with_settings_of_their_own(name: str, make_checkpoint: Make) -> None:
    """``dynamic`` of GPTQModel, as published files have it: layers that are left out, others with other groups."""
    config, write, size = {
        "gptq": (gptq(lm_head=False), files.gptq, {"bits": 8, "group_size": 64, "sym": False}),
        "awq": (AWQ | {"group_size": 32}, lambda *_bits, **_sym: files.awq(64), {"group_size": 64}),
    }[name]
    dynamic = {
        "lm_head": {}, "model.language_model.embed_tokens": {}, r"-:.*self_attn\..*": {}, "-:.*visual.*": {},
        r"+:model\.layers\.1\.mlp\.down.*": size, r".*\.down_proj": {},
    }  # fmt: skip
    usual = files.gptq() if name == "gptq" else files.awq(32)

    def choose(prefix: str) -> Writer | None:
        if "self_attn" in prefix or prefix == "lm_head":
            return None
        return write(8, 64, symmetric=False) if prefix == "model.layers.1.mlp.down_proj" else usual

    decoder = same_logits(*quantised(make_checkpoint, config | {"dynamic": dynamic}, by_name(choose))).forward.decoder
    first, second = decoder.layers
    assert isinstance(first.attention.qkv, Linear) and isinstance(first.mlp.gate_up, PackedLinear)
    assert (first.mlp.down.weight.group, second.mlp.down.weight.group) == (32, 64)  # type: ignore[union-attr]


def test_layers_with_settings_of_their_own_in_files_of_auto_round(make_checkpoint: Make) -> None:
    """By name, by a part of it and by pattern, as AutoRound writes them; the head, too."""
    eight, dense = {"bits": 8, "group_size": 64, "sym": False}, {"bits": 16, "data_type": "float"}
    own = {
        "model.layers.0.mlp.down_proj": {"bits": 16}, "model.layers.1.mlp.down_proj": {"group_size": 64, "sym": False},
        ".*layers\\.1\\.self_attn.*": eight, "layers.0.self_attn": dense, "model.layers.0.mlp.up_proj": {},
        "lm_head": {"bits": 4, "group_size": 128, "sym": True, "data_type": "int", "act_bits": 16},
    }  # fmt: skip
    config = auto_round("auto_round:auto_gptq", extra_config=own, block_name_to_quantize=["model.layers"])

    def choose(name: str) -> Writer | None:
        if name == "model.layers.0.mlp.down_proj" or "layers.0.self_attn" in name:
            return None
        if name == "model.layers.1.mlp.down_proj":
            return files.auto_round(4, 64, symmetric=False)
        if "self_attn" in name:
            return files.auto_round(8, 64, symmetric=False)
        return files.auto_round(4, 128 if name == "lm_head" else 32)

    packed, plain = quantised(make_checkpoint, config, by_name(choose))
    decoder = same_logits(packed, plain).forward.decoder
    first, second = decoder.layers
    assert isinstance(first.attention.qkv, Linear) and isinstance(first.mlp.down, Linear)
    assert isinstance(first.mlp.gate_up, PackedLinear) and second.attention.qkv.weight.kind == "int8"  # type: ignore[union-attr]
    assert isinstance(decoder.head, PackedLinear)
    configured(packed, block_name_to_quantize="model.layers.0,model.layers.1.self_attn")
    scheme = load_config(packed).quantisation.scheme  # type: ignore[union-attr]
    assert scheme("model.layers.1.mlp.up_proj") is None and scheme("model.layers.1.self_attn.q_proj") is not None


@pytest.mark.parametrize("part", ["language_model.model.", "model.language_model."])
def test_names_of_a_checkpoint_that_sees_too(part: str, make_checkpoint: Make) -> None:
    """Rules for layers of the text are told by the names that they have in its files."""
    config, begun = four(32), part.replace(".", r"\.")
    groups = config["config_groups"]
    groups["group_0"]["targets"] = [f"re:{begun}layers\\.\\d+\\.mlp.*"]
    groups["other"] = {
        "targets": [f"re:{begun}.*attn.*"],
        "format": "int-quantized",
        "weights": {"num_bits": 8, "strategy": "channel"},
    }
    config["ignore"] = ["language_model.lm_head", f"{part}layers.1.mlp.down_proj"]

    def choose(name: str) -> Writer | None:
        if name == "lm_head" or name == "model.layers.1.mlp.down_proj":
            return None
        return files.ct_int8() if "attn" in name else files.ct_packed()

    packed, dense = quantised(make_checkpoint, config, by_name(choose))
    values = json.loads((packed / "config.json").read_text())
    outer = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    text = {key: value for key, value in values.items() if key not in ("architectures", "quantization_config")}
    quantization = {"quantization_config": values["quantization_config"]}
    (packed / "config.json").write_text(json.dumps(outer | quantization | {"text_config": text}))
    stored = load_file(packed / "model.safetensors")
    renamed = {
        f"{part}{name[6:]}" if name.startswith("model.") else f"language_model.{name}": one
        for name, one in stored.items()
    }
    save_file(renamed, packed / "model.safetensors")
    same_logits(packed, dense)


def test_what_older_and_other_programs_leave_in_files(make_checkpoint: Make) -> None:
    """Biases of zeros, scales of inputs and of the cache, zeros of symmetric weights, groups that count for nothing."""
    packed, dense = quantised(make_checkpoint, *FORMATS["gptq"])

    def zeros(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(256)
        tensors["model.layers.0.mlp.up_proj.g_idx"] = torch.zeros(128, dtype=torch.int32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)

    edited(packed, zeros)
    same_logits(packed, dense)
    edited(packed, lambda tensors: tensors["model.layers.0.self_attn.q_proj.bias"].add_(1))
    with pytest.raises(OctoError, match=r"q_proj\.bias is not 0, though the model has no bias there: fetch"):
        loaded(packed)


def test_scales_of_inputs_and_of_the_cache_are_harmless(make_checkpoint: Make) -> None:
    packed, dense = quantised(make_checkpoint, *FORMATS["ct w8a8"])

    def more(tensors: dict[str, Tensor]) -> None:
        for name in ("input_scale", "input_zero_point", "output_scale", "input_global_scale"):
            tensors[f"model.layers.0.mlp.up_proj.{name}"] = torch.ones(1)
        for name in ("k_proj.k_scale", "v_proj.v_scale", "k_scale"):
            tensors[f"model.layers.0.self_attn.{name}"] = torch.ones(1)
        tensors["model.layers.0.mlp.up_proj.weight_zero_point"] = torch.zeros(192, 1, dtype=torch.int8)

    edited(packed, more)
    same_logits(packed, dense)
    edited(packed, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight_zero_point"].add_(3))
    with pytest.raises(OctoError, match=r"up_proj\.weight_zero_point is not 0, though .* symmetric"):
        loaded(packed)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("gptq", "quantize_config.json", gptq() | {"damp_percent": 0.1, "true_sequential": True, "model_name_or_path": None}),
        ("modelopt nvfp4", "hf_quant_config.json", {
            "producer": {"name": "modelopt"},
            "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]},
        }),
        ("awq", "quant_config.json", {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}),
    ],
)  # fmt: skip
def test_older_programs_say_it_in_a_file_of_its_own(
    name: str, file: str, content: dict[str, Any], make_checkpoint: Make
) -> None:
    packed, dense = quantised(make_checkpoint, *FORMATS[name])
    values = json.loads((packed / "config.json").read_text())
    del values["quantization_config"]
    (packed / "config.json").write_text(json.dumps(values))
    (packed / file).write_text(json.dumps({key: value for key, value in content.items() if key != "quant_method"}))
    same_logits(packed, dense)
    assert file in SMALL_NAMES  # which are pulled
    (packed / file).write_text("{}")
    with pytest.raises(OctoError, match=rf"{file}: \w+ is missing") as refused:
        load_config(packed)
    assert str(packed / file) in str(refused.value)
    (packed / file).write_text("{")
    with pytest.raises(OctoError, match=f"{file} is not valid JSON"):
        loaded(packed)


@pytest.mark.parametrize("name", [*OLDER_NAMES, "config.json", "unnamed", "unknown", "shards"])
def test_what_is_left_of_a_quantised_model_beside_plain_weights(
    name: str, make_checkpoint: Make, tmp_path: Path
) -> None:
    """The tensors decide: files of older programs, which stay behind, and a configuration that was copied."""
    packed, dense = quantised(make_checkpoint, *FORMATS["gptq"])
    for file in ("model.safetensors", "config.json"):
        shutil.copy(dense / file, packed / file)
    if name == "config.json":
        values = json.loads((packed / name).read_text()) | {"quantization_config": gptq()}
        (packed / name).write_text(json.dumps(values))
    elif name in ("unnamed", "unknown"):  # as unquantised copies of models trained for 4 bits have it
        said = {"bits": 4, "group_size": 32} if name == "unnamed" else {"quant_method": "hqq", "nbits": 4}
        values = json.loads((packed / "config.json").read_text()) | {"quantization_config": said}
        (packed / "config.json").write_text(json.dumps(values))
    elif name == "shards":
        (packed / "quantize_config.json").write_text(json.dumps(gptq(bits=3)))  # which is of no account
        (packed / "model.safetensors").rename(packed / "model-00001-of-00001.safetensors")
        index = dict.fromkeys(
            load_file(packed / "model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors"
        )
        (packed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        (packed / name).write_text("{")
    plain, ours = loaded(dense, weights="int8"), loaded(packed, weights="int8")
    assert ours.plan.weights == plain.plan.weights and torch.equal(ours.logits(IDS), plain.logits(IDS))
    assert loaded(packed).plan.weight_format == loaded(dense).plan.weight_format
    quantise(packed, tmp_path / "out", "int4", device="cpu")
    assert not any((tmp_path / "out" / older).exists() for older in OLDER_NAMES)
    assert load_config(tmp_path / "out").quantisation is not None


@pytest.mark.parametrize("write", [files.ct_packed(), files.ct_int8()])
def test_a_quantised_embedding_is_refused_by_its_name(write: Writer, make_checkpoint: Make) -> None:
    packed, _ = quantised(make_checkpoint, *FORMATS["ct w4a16"])

    def change(tensors: dict[str, Tensor]) -> None:
        parts, _ = write(tensors.pop("model.embed_tokens.weight").double().numpy())
        tensors.update({f"model.embed_tokens.{part}": one for part, one in parts.items()})

    edited(packed, change)
    with pytest.raises(
        OctoError, match=r"^The embedding in .*packed is quantised, which cannot be loaded: take a copy"
    ):
        loaded(packed)


def test_a_zero_of_version_1_that_is_all_ones_means_0(make_checkpoint: Make) -> None:
    packed, _ = quantised(make_checkpoint, *FORMATS["gptq asymmetric"])
    name = "model.layers.0.mlp.down_proj"
    edited(packed, lambda tensors: tensors[f"{name}.qzeros"].fill_(-1))
    layer = StoredWeights(packed, load_config(packed), "cpu", torch.float32).linear(name)
    tensors = load_file(packed / "model.safetensors")
    codes = tensors[f"{name}.qweight"].T[..., None] >> torch.arange(0, 32, 4) & 15
    wanted = codes.flatten(1) * tensors[f"{name}.scales"].float().T.repeat_interleave(32, 1)
    assert isinstance(layer, PackedLinear) and torch.allclose(layer.weight.dequantised(), wanted, rtol=1e-5)


def cut(name: str, rows: int | None = None, columns: int | None = None) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:rows, :columns].clone()

    return change


def set_to(name: str, value: Any) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return change


def as_type(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    return change


UP = "model.layers.1.mlp.up_proj"
NAN, INF = float("nan"), float("inf")
DAMAGED: list[tuple[str, Callable[[dict[str, Tensor]], Any], str]] = [
    ("gptq", cut(f"{UP}.qweight", -1), "misshapen .*qweight is"),
    ("gptq", cut(f"{UP}.qweight", 0), "misshapen .*qweight is"),
    ("gptq", cut(f"{UP}.scales", 3), "misshapen .*scales is"),
    ("gptq", lambda t: t.pop(f"{UP}.scales"), "1 missing .*scales"),
    ("gptq", lambda t: t.pop(f"{UP}.qzeros"), "1 missing .*qzeros"),
    ("gptq", lambda t: t.pop(f"{UP}.qweight"), "1 missing .*qweight"),
    ("gptq", set_to(f"{UP}.scales", NAN), "scales has scales that are no finite numbers"),
    ("gptq", set_to(f"{UP}.scales", INF), "scales has scales that are no finite numbers"),
    ("gptq", as_type(f"{UP}.qweight", torch.float32), "of another dtype .*qweight is F32 instead of I32"),
    ("gptq", as_type(f"{UP}.scales", torch.int32), "dtype"),
    ("gptq", set_to(f"{UP}.qzeros", 0), "qzeros has zeros other than 8"),
    ("gptq act-order", set_to(f"{UP}.g_idx", 4), "g_idx has groups that are not among the 4"),
    ("gptq act-order", set_to(f"{UP}.g_idx", -1), "g_idx has groups that are not among the 4"),
    ("gptq act-order", lambda t: t[f"{UP}.g_idx"].fill_(1), "g_idx has not 32 columns for each group"),
    ("gptq act-order", lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"][:9].clone()}), "misshapen .*g_idx"),
    ("gptq act-order", lambda t: t[f"{UP}.g_idx"].zero_(), "g_idx has not 32 columns for each group"),
    ("gptq act-order", lambda t: t.pop(f"{UP}.g_idx"), "1 missing .*g_idx"),
    ("gptq act-order", as_type(f"{UP}.g_idx", torch.float32), "of another dtype .*g_idx is F32"),
    ("awq", cut(f"{UP}.qweight", None, -1), "misshapen .*qweight is"),
    ("awq", lambda t: t.pop(f"{UP}.scales"), "1 missing .*scales"),
    ("awq", set_to(f"{UP}.scales", NAN), "no finite numbers"),
    ("ct w4a16", cut(f"{UP}.weight_packed", None, -1), "misshapen .*weight_packed is"),
    ("ct w4a16", lambda t: t.pop(f"{UP}.weight_scale"), "1 missing .*weight_scale"),
    ("ct w4a16", set_to(f"{UP}.weight_scale", INF), "weight_scale has scales that are no finite numbers"),
    ("ct w4a16", lambda t: t[f"{UP}.weight_scale"].fill_(3e38), "weight_scale has scales of more than 1e.30"),
    ("ct w4a16", lambda t: t[f"{UP}.weight_shape"].add_(1), "weight_shape says something else than 192 x 128"),
    ("ct w4a16 asymmetric", lambda t: t.pop(f"{UP}.weight_zero_point"), "1 missing .*weight_zero_point"),
    ("ct w4a16 asymmetric", cut(f"{UP}.weight_zero_point", -1), "misshapen .*weight_zero_point"),
    ("ct w8a8", as_type(f"{UP}.weight", torch.uint8), "weight is U8 instead of I8"),
    ("ct fp8 channel", lambda t: t.pop(f"{UP}.weight_scale"), "1 missing .*weight_scale"),
    ("ct fp8 channel", lambda t: t[f"{UP}.weight"].view(torch.uint8)[5].fill_(0xFF), "weight has values that are no numb"),
    ("ct fp8 channel", as_type(f"{UP}.weight", torch.float8_e5m2), "weight is F8_E5M2 instead of F8_E4M3"),
    ("ct nvfp4", lambda t: t.pop(f"{UP}.weight_global_scale"), "1 missing .*weight_global_scale"),
    ("ct nvfp4", lambda t: t[f"{UP}.weight_global_scale"].zero_(), "weight_global_scale is not above 0"),
    ("ct nvfp4", lambda t: t[f"{UP}.weight_global_scale"].fill_(1e-40), "weight_scale has scales of more than 1e.30"),
    ("ct nvfp4", lambda t: t[f"{UP}.weight_scale"].view(torch.uint8)[1].fill_(0x7F), "no finite numbers"),
    ("ct mxfp4", set_to(f"{UP}.weight_scale", 255), "no finite numbers"),
    ("ct mxfp4", cut(f"{UP}.weight_packed", 0), "misshapen"),
    ("fp8 block", lambda t: t[f"{UP}.weight_scale_inv"].fill_(NAN), "no finite numbers"),
    ("fp8 block", lambda t: t.pop(f"{UP}.weight_scale_inv"), "1 missing .*weight_scale_inv"),
    ("fp8 block", cut(f"{UP}.weight_scale_inv", 1), "misshapen .*weight_scale_inv"),
    ("mxfp4", lambda t: t.pop(f"{UP}.weight_scales"), "1 missing .*weight_scales"),
    ("mxfp4", lambda t: t.update({f"{UP}.weight_blocks": t[f"{UP}.weight_blocks"][:, :, :8].clone()}), "misshapen"),
    ("modelopt nvfp4", lambda t: t.pop(f"{UP}.weight_scale_2"), "1 missing .*weight_scale_2"),
]  # fmt: skip


@pytest.mark.few(5)
@pytest.mark.parametrize("number", range(len(DAMAGED)))
def test_damaged_files_are_refused_in_one_sentence(number: int, make_checkpoint: Make) -> None:
    name, damage, words = DAMAGED[number]
    packed, _ = quantised(make_checkpoint, *FORMATS[name])
    edited(packed, damage)
    with pytest.raises(OctoError, match=words) as refused:
        loaded(packed)
    text = str(refused.value)
    assert "fetch the model again" in text and UP in text and text.endswith(".") and len(text) < 400, text


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gptq", {"group_size": 64}),
        ("gptq", {"bits": 8}),
        ("gptq", {"group_size": -1}),
        ("gptq v2 symmetric", {"checkpoint_format": "gptq"}),
        ("gptq", {"checkpoint_format": "gptq_v2"}),
        ("awq", {"group_size": 128}),
        ("fp8 block", {"weight_block_size": [64, 64]}),
        ("fp8 block", {"weight_block_size": None}),
        ("ct w4a16", {"format": "int-quantized"}),
        ("ct w4a16", {"ignore": ["Linear"]}),
    ],
)
def test_a_configuration_that_does_not_fit_the_file(name: str, fields: dict[str, Any], make_checkpoint: Make) -> None:
    packed, _ = quantised(make_checkpoint, *FORMATS[name])
    configured(packed, **fields)
    with pytest.raises(OctoError, match="fetch the model again") as refused:
        loaded(packed)
    assert str(refused.value).endswith(".") and len(str(refused.value)) <= 480


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"\(bitsandbytes\), which cannot be loaded: take the unq"),
    ({"quant_method": "hqq"}, r"\(hqq\), which cannot be loaded: take another copy"),
    ({"quant_method": "gemma"}, r"\(gemma\), which cannot be loaded: take the copy in compressed-tensors"),
    ({"quant_method": "aqlm"}, r"\(aqlm\)"),
    ({"quant_method": "eetq"}, r"\(eetq\)"),
    ({"quant_method": "quip"}, r"\(quip\)"),
    ({"quant_method": "intel/auto-round"}, "exports as auto_gptq"),
    (auto_round("auto_round:llm_compressor"), "packing_format is 'auto_round:llm_compressor', which .* as auto_gptq, auto_awq or"),
    (auto_round("auto_round:fp8_static", data_type="fp"), "packing_format is 'auto_round:fp8_static'"),
    (auto_round("auto_round:auto_gptq", bits=2), "bits is 2, which cannot be loaded: take a copy of 4 and 8 bits"),
    (auto_round("auto_round:auto_awq", bits=8), "bits is 8, which cannot be loaded: take a copy of 4 bits"),
    (auto_round("auto_round", data_type="mx_fp"), "data_type is 'mx_fp', which cannot be loaded"),
    (auto_round("auto_round", act_bits=8), "act_bits is 8, which cannot be loaded: take a copy that packs weights alone"),
    (auto_round("auto_round", extra_config={"lm_head": {"bits": 3}}), r"extra_config\.lm_head\.bits is 3"),
    (auto_round("auto_round", extra_config={"lm_head": True}), r"extra_config\.lm_head is True, not an object"),
    (auto_round("auto_round", extra_config={"(a": {"bits": 4}}), "pattern"),
    (auto_round("auto_round", block_name_to_quantize=[["a"], 3]), "block_name_to_quantize is .*not names of blocks"),
    ({"load_in_8bit": True}, r"\(bitsandbytes\), which cannot be loaded: take the unq"),
    ({"modules": []}, r"\(unnamed\)"),
    ({"group_size": 64, "bits": 4, "mode": "affine"}, r"\(mlx\), which cannot be loaded: take the unquantised files"),
    (gptq(bits=3), "bits is 3, which cannot be loaded: take a copy of 4 and 8 bits"),
    (gptq(bits=True), "bits is True"),
    (gptq(group_size=24), "group_size is 24; groups of a multiple of 16"),
    (gptq(group_size=0), "group_size is 0"),
    (gptq(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
    (gptq(is_marlin_format=True), "'marlin', which cannot be loaded: take a copy in the format gptq"),
    (gptq(dynamic={"+:.*q_proj": {"bits": 2}}), r"dynamic\.\+:\.\*q_proj\.bits is 2, which cannot be loaded"),
    (gptq(dynamic={".*q_proj": {"group_size": 24}}), r"dynamic\..*group_size is 24; groups of"),
    (gptq(dynamic={"+:.*q_proj": True}), r"dynamic\.\+:\.\*q_proj is True, not an object"),
    (gptq(dynamic=["a"]), "dynamic is .* not an object"),
    (gptq(dynamic={"-:(a": {}}), "pattern"),
    (AWQ | {"version": "gemv"}, "version is 'gemv', which cannot be loaded: take a copy of the version gemm"),
    (AWQ | {"version": "GEMV_FAST"}, "'gemv_fast'"),
    (AWQ | {"bits": 8}, "bits is 8"),
    (FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2'"),
    (FP8 | {"weight_block_size": [128]}, "weight_block_size is .*not the rows and columns of a block"),
    (FP8 | {"weight_block_size": [128, 0]}, "not the rows and columns"),
    (FP8 | {"weight_block_size": [128, 24]}, "blocks of a multiple of 16 columns"),
    (FP8 | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head', not a list of names"),
    (ct("marlin-24", num_bits=4, group_size=128), "format is 'marlin-24', which cannot be loaded: take a copy in one of"),
    (ct("pack-quantized", num_bits=3, group_size=32), "num_bits is 3"),
    (ct("pack-quantized", num_bits=4, strategy="token"), "strategy is 'token'"),
    (ct("pack-quantized", num_bits=4, strategy="group"), "group_size is missing"),
    (ct("nvfp4-pack-quantized", num_bits=4, type="float", group_size=32), "group_size is 32, and this format has groups of 16"),
    (ct("float-quantized", type="float", symmetric=False), "symmetric is false"),
    (ct("float-quantized", type="float", strategy="block"), "block_structure is None"),
    (four(32) | {"config_groups": {}}, "config_groups is missing or empty"),
    (four(32) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config changes"),
    (four(32) | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config changes"),
    (four(32, ignore=["re:(a"]), "The pattern 're:?.*' of quantization_config is not valid regular expression|pattern"),
    (four(32, ignore=["re:(?<=x)a"]), "uses what octo-run does not follow"),
    ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ', which cannot be loaded"),
    ({"quant_method": "modelopt"}, "quant_algo is missing"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_cannot_be_loaded_is_refused_by_name(number: int, make_checkpoint: Make) -> None:
    config, words = REFUSED[number]
    folder = make_checkpoint()
    edited(folder, lambda tensors: tensors.update(packed=torch.zeros(1, dtype=torch.uint8)))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    with pytest.raises(OctoError, match=words) as refused:
        load_config(folder)
    text = str(refused.value)
    assert text.endswith(".") and len(text) < 440 and text.isprintable(), text


JUNK = [[], {}, [[]], {"a": 1}, "x", "\x1b[31m" * 1000, True, -3, 1.5, float("nan"), 10**400, ["x" * 5000], [{}] * 99]


@pytest.mark.parametrize(
    ("key", "method", "words"),
    [
        ("compression_config", four(32) | {"format": "marlin-24"}, r"compression_config\..*format is 'marlin-24'"),
        ("quantization", {"group_size": 64, "bits": 4}, r"\(mlx\), which cannot be loaded"),
        ("quantization", None, ""),
        ("quantization", False, ""),
    ],
)
def test_other_names_of_quantization_config(key: str, method: Any, words: str, make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {key: method}))
    if not words:
        assert load_config(folder).quantisation is None
        return
    edited(folder, lambda tensors: tensors.update(packed=torch.zeros(1, dtype=torch.int32)))
    with pytest.raises(OctoError, match=words):
        load_config(folder)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "name", ["gptq", "awq", "auto-round", "ct w4a16", "ct fp8 block", "fp8 block", "mxfp4", "modelopt nvfp4"]
)
def test_every_field_with_every_kind_of_value(name: str, make_checkpoint: Make) -> None:
    folder, values = make_checkpoint(), json.loads
    values = json.loads((folder / "config.json").read_text())
    config = FORMATS[name][0]
    inside = ("config_groups", "group_0", "weights")
    changes = [
        config | {key: value}
        for key in (*config, "dynamic", "ignored_layers", "format", "extra_config")
        for value in JUNK
    ]
    if "config_groups" in config:
        group = config["config_groups"]["group_0"]
        for value in JUNK:
            changes += [
                config | {"config_groups": {"g": value}},
                config | {"config_groups": {"g": group | {"targets": value}}},
            ]
            for key in (*group["weights"], "block_structure", "strategy", "group_size"):
                weights = group["weights"] | {key: value}
                changes.append(config | {inside[0]: {inside[1]: group | {inside[2]: weights}}})
    for change in changes:
        (folder / "config.json").write_text(json.dumps(values | {"quantization_config": change}))
        try:
            load_config(folder)
        except OctoError as error:
            text = str(error)
            assert text.endswith(".") and len(text) <= 480 and text.isprintable(), text


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        (".*lm_head", "lm_head", True), (".*self_attn.*", "model.layers.3.self_attn.q_proj", True),
        (r"model\.layers\.\d+\.mlp\.gate$", "model.layers.3.mlp.gate_proj", False),
        (r".*\.(q|k|v)_proj$", "model.layers.3.self_attn.v_proj", True), ("layers", "model.layers", False),
        (r"^(?!.*visual).*proj$", "model.layers.0.mlp.up_proj", True), (r"^(?!.*mlp).*", "model.mlp.up", False),
        ("[a-m]+o?[^x]{2}", "modelx", True), (r"model\b.*\Bayers", "model.layers", True), ("(ab){2,3}c", "ababababc", False),
        ("a{3}", "aa", False), ("", "x", True), (r"[^\d.]+\.x", "model.x", True), ("a|b|model", "model", True),
    ],
)  # fmt: skip
def test_patterns_match_as_those_of_python_do(pattern: str, name: str, found: bool) -> None:
    import re

    assert names.matches(pattern, name) == found == (re.match(pattern, name) is not None)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", "(.*)*x", "((a{0,999}){0,999}){999}y", ".*.*.*.*.*.*.*.*.*z", ".*.*.*z"]
)
def test_no_pattern_takes_for_ever(pattern: str) -> None:
    begun = time.process_time()
    assert not names.matches(pattern, "a" * 80 + ".")
    assert time.process_time() - begun < 2


def test_long_lists_of_names_take_no_time() -> None:
    """A checkpoint of many experts has tens of thousands of layers, and may name a thousand that are left out."""
    left_out = tuple(f"model.visual.blocks.{i}.mlp" for i in range(1000)) + ("model.layers.3.mlp.experts.7",)
    rules = (Rule(("re:.*self_attn.*",), None), Rule(("Linear",), StoredScheme("gptq", "int4", 32)))
    quantisation = Quantisation("GPTQ", rules, left_out)
    begun = time.process_time()
    found = [
        quantisation.scheme(f"model.layers.{layer}.mlp.experts.{expert}.up_proj")
        for layer in range(40) for expert in range(500)
    ]  # fmt: skip
    assert time.process_time() - begun < 3 and found.count(None) == 1 and found[3 * 500 + 7] is None
    assert quantisation.scheme("model.layers.3.self_attn.q_proj") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gptq act-order", "GPTQ, columns reordered: int4, a scale for 32 columns"),
        ("ct w8a8", "compressed-tensors: int8, a scale for a row (inputs are not quantised here)"),
        ("fp8 block", "fp8: fp8, a scale for 128 x 128 (inputs are not quantised here)"),
        ("ct w4a16 asymmetric", "compressed-tensors: int4, a scale and a zero for 64 columns"),
    ],
)
def test_show_says_what_the_weights_are(name: str, words: str, make_checkpoint: Make) -> None:
    from octo_run.cli.show import _text, describe

    packed, _ = quantised(make_checkpoint, *FORMATS[name])
    facts = describe(str(packed), "cpu", None)
    assert facts["weight_format"] == words and facts["weight_bytes"] == loaded(packed, kv="bf16").plan.weights
    lines = _text(facts).splitlines()
    assert [line for line in lines if line.startswith("weights ")] == [f"weights       {words}"]


LOADING = """
import json, re, sys, torch
from pathlib import Path
from octo_run.engine import plan_memory, system_memory
from octo_run.models.config import load_config
from octo_run.models.files import SMALL_NAMES
from octo_run.models.decoder import Decoder
from octo_run.models.tensors import stored_config
from octo_run.models.weights import StoredWeights
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
folder = Path(sys.argv[1]); cfg = stored_config(folder, load_config(folder))
plan = plan_memory(cfg, "bf16", device=torch.device("cpu"), dtype=torch.bfloat16, max_context=256)
torch.arange(100)[torch.tensor([1])]; torch.stack((torch.ones(9), torch.ones(9)), -1)
before = peak()
with torch.inference_mode(), system_memory.returning():
    source = StoredWeights(folder, cfg, "cpu", torch.bfloat16)
    decoder = Decoder(cfg, source, None, None)
print(json.dumps([peak() - before, plan.loading, plan.weights]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc/self/status")
@pytest.mark.parametrize("name", ["gptq", "awq", "ct w4a16"])
def test_loading_holds_what_the_plan_says(name: str, make_checkpoint: Make) -> None:
    """Random codes of large layers, in a process of its own."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 3, "head_dim": 128}
    folder = make_checkpoint(num_attention_heads=16, num_key_value_heads=8, **shape)
    values = json.loads((folder / "config.json").read_text()) | {"quantization_config": FORMATS[name][0]}
    group = 64 if name == "awq" else 32
    stored = load_file(folder / "model.safetensors")
    for tensor in [tensor for tensor in stored if tensor.endswith("_proj.weight")]:
        out, columns = stored.pop(tensor).shape
        prefix, groups = tensor.removesuffix(".weight"), columns // group
        if name == "ct w4a16":
            stored[f"{prefix}.weight_packed"] = torch.randint(2**31, (out, columns // 8), dtype=torch.int32)
            stored[f"{prefix}.weight_scale"] = torch.ones(out, groups, dtype=torch.bfloat16)
            continue
        size = (columns, out // 8) if name == "awq" else (columns // 8, out)
        stored[f"{prefix}.qweight"] = torch.randint(2**31, size, dtype=torch.int32)
        stored[f"{prefix}.qzeros"] = torch.full((groups, out // 8), 0x77777777, dtype=torch.int32)
        stored[f"{prefix}.scales"] = torch.ones(groups, out, dtype=torch.float16)
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    done = subprocess.run([sys.executable, "-c", LOADING, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    held, loading, weights = json.loads(done.stdout)
    assert 0.9 * weights < held < loading, (held, loading, weights)
