"""Checkpoints as they are published, of many families: transformers' random models, packed as the publishers do it."""
# ruff: noqa: E501

import json
import re
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from octo_run.engine import Engine
from octo_run.errors import OctoError
from octo_run.kernels.cpu import native as compiled
from octo_run.models.cache import DEMO_PATH

from .test_families import SMALL, TWO, YARN, heads, randomised, relative
from .test_text_parts import PIXTRAL, VISION

files = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "models" / "quantised_files.py")))
Writer = Any
#: Widths of whole groups.
WIDE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
DELTA = {
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "head_dim": 64, "num_hidden_layers": 4, "shared_expert_intermediate_size": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
                        "mrope_section": [3, 3, 2], "mrope_interleaved": True},
}  # fmt: skip
G4 = {**heads(4, 2, 64), "global_head_dim": 128, "sliding_window": 70, "layer_types": TWO, "num_hidden_layers": 4}


def ct(
    form: str, ignore: list[str], targets: list[str] | None = None, inputs: Any = None, **weights: Any
) -> dict[str, Any]:
    args = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "group_size": None} | weights
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "ignore": ignore,
        "kv_cache_scheme": None, "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {},
        "version": "0.13.0",
        "config_groups": {"group_0": {"targets": targets or ["Linear"], "weights": args, "input_activations": inputs,
                                      "output_activations": None, "format": form}},
    }  # fmt: skip


def four(ignore: list[str], **more: Any) -> dict[str, Any]:
    return ct("pack-quantized", ignore, num_bits=4, strategy="group", group_size=32, **more)


def nvfp4(ignore: list[str], **more: Any) -> dict[str, Any]:
    return ct("nvfp4-pack-quantized", ignore, inputs={"num_bits": 4, "type": "float", "dynamic": "local", "strategy": "tensor_group", "group_size": 16},
              num_bits=4, type="float", strategy="tensor_group", group_size=16, **more)  # fmt: skip


def dynamic8(ignore: list[str], **more: Any) -> dict[str, Any]:
    inputs = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    return ct("float-quantized", ignore, inputs=inputs, num_bits=8, type="float", strategy="channel", **more)


def gptq(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False,
            "checkpoint_format": "gptq", "pack_dtype": "int32", "meta": {"quantizer": ["gptqmodel:2.2.0"]}} | fields  # fmt: skip


def awq(left_out: list[str] | None, group: int = 32) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": left_out}  # fmt: skip


def fp8(left_out: list[str], **more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [32, 32],
            "modules_to_not_convert": left_out} | more  # fmt: skip


def layers(names: str, count: int = 4, prefix: str = "model.layers") -> list[str]:
    return [f"{prefix}.{index}.{name}" for index in range(count) for name in names.split()]


BLOCKS = files.fp8(32, 32, "weight_scale_inv", torch.bfloat16)
ROUTERS = r"\.(gate|router|shared_expert_gate|in_proj_ba|in_proj_a|in_proj_b|router\.proj)$|embed|lm_head|conv1d"
#: transformers' class without its ending, fields, what config.json says, what is packed how (the first pattern that is
#: found in a name), other tensors.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Writer], dict[str, Any]]] = {
    "qwen3-moe gptq": ("Qwen3Moe", MOE | heads(4, 2, 64), gptq(), {ROUTERS: None, ".": files.gptq()}, {}),
    "qwen3-moe gptqmodel": (
        "Qwen3Moe", MOE | heads(4, 2, 64), gptq(dynamic={r"-:.*\.mlp\.gate$": {}}), {ROUTERS: None, ".": files.gptq()}, {},
    ),
    "qwen3-moe awq": ("Qwen3Moe", MOE | heads(4, 2, 64), awq(["gate"]), {ROUTERS: None, ".": files.awq(32)}, {}),
    "qwen3-moe w4a16": (
        "Qwen3Moe", MOE | heads(4, 2, 64), four(["lm_head", "re:.*mlp.gate$"]), {ROUTERS: None, ".": files.ct_packed()}, {},
    ),
    "qwen3-moe nvfp4": (
        "Qwen3Moe", MOE | heads(4, 2, 64), nvfp4(["lm_head", *layers("mlp.gate")]), {ROUTERS: None, ".": files.nvfp4()},
        {"input_global_scale": r"_proj$"},
    ),
    "qwen3-moe fp8": (
        "Qwen3Moe", MOE | heads(4, 2, 64), fp8(["lm_head", *layers("input_layernorm mlp.gate post_attention_layernorm")]),
        {ROUTERS: None, ".": BLOCKS}, {},
    ),
    "qwen3-moe fp8 dynamic": (
        "Qwen3Moe", MOE | heads(4, 2, 64), dynamic8(["lm_head", "re:.*mlp.gate$"]), {ROUTERS: None, ".": files.fp8(1, None, dtype=torch.bfloat16)}, {},
    ),
    "qwen3-moe modelopt": (
        "Qwen3Moe", MOE | heads(4, 2, 64),
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
         "ignore": ["lm_head", *layers("mlp.gate")], "producer": {"name": "modelopt"},
         "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}}},
        {ROUTERS: None, ".": files.nvfp4(True)},
        {"input_scale": r"_proj$", "k_scale": r"k_proj$", "v_scale": r"v_proj$"},
    ),
    "qwen3-next fp8": (
        "Qwen3Next", MOE | DELTA | heads(4, 2, 64),
        fp8(["lm_head", "model.embed_tokens", *layers("linear_attn.conv1d linear_attn.in_proj_ba mlp.gate mlp.shared_expert_gate")]),
        {ROUTERS: None, ".": BLOCKS}, {},
    ),
    "qwen3-next gptq": (
        "Qwen3Next", MOE | DELTA | heads(4, 2, 64),
        gptq(dynamic={"-:.*mtp.*": {}, "-:.*linear_attn.in_proj_ba.*": {}, "-:.*shared_expert_gate.*": {}, "-:.*mlp.gate.*": {}}),
        {r"mlp\.gate|shared_expert_gate|in_proj_ba|embed|lm_head|conv1d": None, ".": files.gptq()}, {},
    ),
    "qwen3.5 fp8": (
        "Qwen3_5ForConditionalGeneration", DELTA | heads(4, 2, 64),
        fp8(["lm_head", "model.visual.patch_embed.proj", "model.language_model.embed_tokens",
             *layers("linear_attn.conv1d linear_attn.in_proj_a linear_attn.in_proj_b", prefix="model.language_model.layers")]),
        {ROUTERS: None, ".": BLOCKS}, {},
    ),
    "qwen3.5-moe fp8": (
        "Qwen3_5MoeForConditionalGeneration", MOE | DELTA | heads(4, 2, 64),
        fp8(["lm_head", *layers("linear_attn.in_proj_a linear_attn.in_proj_b mlp.gate mlp.shared_expert_gate", prefix="model.language_model.layers")]),
        {ROUTERS: None, ".": BLOCKS}, {"unstacked": True},
    ),
    "qwen3.5-moe fp8, stacked": (
        "Qwen3_5MoeForConditionalGeneration", MOE | DELTA | heads(4, 2, 64), fp8(["lm_head", "visual"]), {ROUTERS: None, ".": BLOCKS},
        {"stacked": True, "experts.gate_up_proj_activation_scale": "mlp$", "experts.down_proj_activation_scale": "mlp$"},
    ),
    "qwen3.5-moe fp8, stacked, a scale an expert": (
        "Qwen3_5MoeForConditionalGeneration", MOE | DELTA | heads(4, 2, 64), fp8(["lm_head", "visual"], weight_block_size=None, activation_scheme="static"),
        {ROUTERS: None, "experts": files.fp8(None, None, "weight_scale_inv"), ".": files.fp8(None, None, "weight_scale_inv", shape=())},
        {"stacked": True},
    ),
    "qwen3.5-moe nvfp4": (
        "Qwen3_5MoeForConditionalGeneration", MOE | DELTA | heads(4, 2, 64),
        nvfp4(["lm_head", "re:.*visual.*", "re:.*linear_attn.*", "re:.*mlp.gate$", "re:.*shared_expert_gate$"]),
        {ROUTERS + "|linear_attn": None, ".": files.nvfp4()}, {"unstacked": True, "input_global_scale": r"_proj$"},
    ),
    "qwen3.6-moe mixed": (
        "Qwen3_5MoeForConditionalGeneration",
        MOE | DELTA | heads(4, 2, 64),
        nvfp4(["re:.*visual.*", "re:.*mlp.gate$", "re:.*shared_expert_gate$"], targets=[r"re:.*mlp\.(experts\.\d+|shared_expert)\.(gate|up|down)_proj$"]),
        {
            r"\.(gate|shared_expert_gate|in_proj_a|in_proj_b)$|embed|conv1d": None,
            "self_attn|linear_attn|lm_head": files.fp8(1, None, dtype=torch.bfloat16),
            ".": files.nvfp4(),
        },
        {
            "input_global_scale": r"(gate|up|down)_proj$",
            "k_scale": r"self_attn$",
            "v_scale": r"self_attn$",
            "groups": dynamic8([], targets=[r"re:.*self_attn\.(q|k|v|o)_proj$", r"re:.*linear_attn\.(in_proj_qkv|in_proj_z|out_proj)$", "re:.*lm_head$"]),
        },
    ),
    "qwen3.5-moe auto-round": (
        "Qwen3_5MoeForConditionalGeneration",
        MOE | DELTA | heads(4, 2, 64),
        {
            "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32, "sym": True,
            "data_type": "int", "block_name_to_quantize": "model.language_model.layers,model.visual.blocks",
            "extra_config": {
                **{key: {"bits": 16} for key in layers("mlp.gate", prefix="model.language_model.layers")},
                ".*shared_expert_gate.*": {"bits": 16, "data_type": "fp"}, ".*linear_attn\\.in_proj_[ab].*": {"bits": 16, "data_type": "fp"},
                ".*self_attn.*": {"bits": 8},
            },
        },
        {ROUTERS: None, "self_attn": files.auto_round(8), ".": files.auto_round()},
        {},
    ),
    "ministral3 fp8": (
        "Mistral3ForConditionalGeneration",
        {**heads(2, 1, 64), "model_type": "ministral3", "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
        fp8(["model.vision_tower", "model.multi_modal_projector", "lm_head"], activation_scheme="static", weight_block_size=None, dequantize=False),
        {ROUTERS: None, ".": files.fp8(None, None, "weight_scale_inv", torch.bfloat16, shape=())},
        {"activation_scale": r"_proj$"},
    ),
    "mistral-small fp8": (
        "Mistral3ForConditionalGeneration", {**heads(4, 2, 64), "model_type": "mistral", "sliding_window": None},
        dynamic8(["re:.*lm_head", "re:vision_tower.*", "re:multi_modal_projector.*"]) | {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False, "strategy": "tensor"}},
        {ROUTERS: None, ".": files.fp8(1, None, dtype=torch.bfloat16)}, {"k_scale": r"self_attn$", "v_scale": r"self_attn$"},
    ),
    "gemma3 w4a16": (
        "Gemma3ForConditionalGeneration", {**heads(2, 1, 64), "sliding_window": 64, "layer_types": TWO[:2]},
        four(["lm_head", "re:vision_tower.*", "re:multi_modal_projector.*"], targets=["re:.*language_model.*proj"]),
        {ROUTERS: None, ".": files.ct_packed()}, {},
    ),
    "gemma3 awq": (
        "Gemma3ForConditionalGeneration", {**heads(2, 1, 64), "sliding_window": 64, "layer_types": TWO[:2]},
        awq(["vision_tower", "multi_modal_projector"]), {ROUTERS: None, ".": files.awq(32, symmetric=True)}, {},
    ),
    "gemma4 w4a16": (
        "Gemma4ForConditionalGeneration",
        G4 | {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 8192, "num_kv_shared_layers": 2, "tie_word_embeddings": True},
        four(["lm_head", "re:.*vision_tower.*", "re:.*audio_tower.*", "re:.*embed_vision.*", "re:.*embed_audio.*"]),
        {ROUTERS: None, ".": files.ct_packed()}, {},
    ),
    "gemma4 experts mixed": (
        "Gemma4ForConditionalGeneration",
        G4 | {"hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
              "moe_intermediate_size": 64, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "tie_word_embeddings": True},
        nvfp4(["lm_head", "re:.*router.*", "re:.*vision_tower.*", "re:.*embed_vision.*"], targets=["re:.*mlp.*", "re:.*experts.*"]),
        {ROUTERS: None, "self_attn": files.fp8(1, None, dtype=torch.bfloat16), ".": files.nvfp4()},
        {"unstacked": True, "input_global_scale": r"(gate|up|down)_proj$", "groups": dynamic8([], targets=["re:.*self_attn.*"])},
    ),
    "phi4 gptq": ("Phi3", {"num_attention_heads": 4, "num_key_value_heads": 2}, gptq(desc_act=True), {ROUTERS: None, ".": files.gptq(act_order=True)}, {}),
    "phi4 w4a16": ("Phi3", {"num_attention_heads": 4, "num_key_value_heads": 2}, four(["lm_head"], symmetric=False), {ROUTERS: None, ".": files.ct_packed(symmetric=False)}, {}),
    "mixtral awq": ("Mixtral", {**heads(4, 2, 32), "num_local_experts": 3}, awq(["gate"]), {ROUTERS: None, ".": files.awq(32)}, {}),
    "mixtral gptq": ("Mixtral", {**heads(4, 2, 32), "num_local_experts": 3}, gptq(), {ROUTERS: None, ".": files.gptq()}, {}),
    "mixtral fp8": (
        "Mixtral", {**heads(4, 2, 32), "num_local_experts": 3}, ct("float-quantized", ["lm_head", "re:.*block_sparse_moe.gate"], type="float", strategy="tensor", inputs={"num_bits": 8, "type": "float", "dynamic": False}),
        {ROUTERS: None, ".": files.fp8(None, None, shape=(1,))}, {"input_scale": r"_proj$|\.w\d$"},
    ),
    "granite-moe fp8": (
        "GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}, dynamic8(["lm_head", "re:.*block_sparse_moe.router.*"]),
        {ROUTERS + "|block_sparse_moe": None, ".": files.fp8(1, None, dtype=torch.bfloat16)}, {},
    ),
    "olmo2 gptq": ("Olmo2", {}, gptq(), {ROUTERS: None, ".": files.gptq()}, {}),
    "smollm3 awq": ("SmolLM3", {"tie_word_embeddings": True}, awq(None), {ROUTERS: None, ".": files.awq(32)}, {}),
    "exaone4 awq": ("Exaone4", {"sliding_window": 70, "layer_types": TWO[:2]}, awq(None), {ROUTERS: None, ".": files.awq(32)}, {}),
    "cohere2 fp8": ("Cohere2", {"sliding_window": 70, "layer_types": TWO[:2], "tie_word_embeddings": True}, dynamic8(["lm_head"]), {ROUTERS: None, ".": files.fp8(1, None, dtype=torch.bfloat16)}, {}),
    "qwen3-moe asymmetric": (
        "Qwen3Moe", MOE | heads(4, 2, 64), four(["lm_head", *layers("mlp.gate")], symmetric=False), {ROUTERS: None, ".": files.ct_packed(symmetric=False)}, {},
    ),
    "qwen3-next gptq, all": (
        "Qwen3Next", MOE | DELTA | heads(4, 2, 64), gptq(), {r"mlp\.gate|shared_expert_gate|embed|lm_head|conv1d": None, ".": files.gptq()}, {},
    ),
    "qwen3.5 asymmetric, all": (
        "Qwen3_5ForConditionalGeneration", DELTA | heads(4, 2, 64), four(["lm_head", "re:.*visual.*", "re:.*conv1d"], symmetric=False),
        {"embed|lm_head|conv1d": None, ".": files.ct_packed(symmetric=False)}, {},
    ),
    "qwen3.5 modelopt": (
        "Qwen3_5ForConditionalGeneration", DELTA | heads(4, 2, 64),
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "model.visual*", "mtp*", *layers("linear_attn.in_proj_a linear_attn.in_proj_b linear_attn.conv1d", prefix="model.language_model.layers")]},
        {ROUTERS: None, ".": files.fp8(None, None, shape=())}, {"input_scale": r"_proj$"},
    ),
    "exclusions that are wrong": ("Qwen3Moe", MOE | heads(4, 2, 64), fp8(["lm_head", "self_attn", "model.layers.0.mlp.experts.1"]), {ROUTERS: None, ".": BLOCKS}, {}),
    "exclusions that are wrong, ct": ("Qwen3", heads(4, 2, 64), four(["lm_head", "re:.*self_attn.*"]), {ROUTERS: None, ".": files.ct_packed()}, {}),
    "gpt-oss bf16": (
        "GptOss", {**heads(4, 2, 64), "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128},
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]},
        {".": None}, {},
    ),
    "qwen2 fp8, the head too": ("Qwen2", {"tie_word_embeddings": True}, dynamic8([]), {"embed": None, ".": files.fp8(1, None, dtype=torch.bfloat16)}, {"head": True}),
    "llama gptq, the head too": ("Llama", {}, gptq(lm_head=True), {"embed": None, ".": files.gptq()}, {}),
}  # fmt: skip


def unstacked(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacked experts as a list, as llm-compressor and ModelOpt write them."""
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(".experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                found |= {f"{name[:-12]}{expert}.gate_proj.weight": gate, f"{name[:-12]}{expert}.up_proj.weight": up}
        elif name.endswith(".experts.down_proj"):
            found |= {f"{name[:-9]}{expert}.down_proj.weight": one for expert, one in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def stacked(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse."""
    rest = {name: tensor for name, tensor in found.items() if not re.search(r"\.experts\.\d+\.", name)}
    for prefix in {name[: name.index(".experts.") + 9] for name in found if re.search(r"\.experts\.\d+\.", name)}:
        count = 1 + max(int(name[len(prefix) :].split(".")[0]) for name in found if name.startswith(prefix))

        def part(expert: int, what: str, prefix: str = prefix) -> Tensor:
            return found[f"{prefix}{expert}.{what}.weight"]

        rest[f"{prefix}gate_up_proj"] = torch.stack(
            [torch.cat((part(i, "gate_proj"), part(i, "up_proj"))) for i in range(count)]
        )
        rest[f"{prefix}down_proj"] = torch.stack([part(i, "down_proj") for i in range(count)])
    return rest


def published(folder: Path, name: str) -> Any:
    """Write a case's checkpoint; transformers' model of the values."""
    import transformers

    kind, fields, quantization, rules, more = CASES[name]
    fields = SMALL | WIDE | fields
    if kind.endswith("ForConditionalGeneration"):
        tied, kind = fields["tie_word_embeddings"], kind.removesuffix("ForConditionalGeneration")
        vision = {
            "Qwen3_5": {"depth": 1, "num_heads": 2, "out_hidden_size": 128},
            "Mistral3": PIXTRAL,
            "Gemma4": {"num_key_value_heads": 2, "head_dim": 16, "image_size": None},
        }
        own = vision.get(kind.removesuffix("Moe"), {})
        config = getattr(transformers, f"{kind}Config")(
            text_config=fields, vision_config=VISION | own, tie_word_embeddings=tied
        )
        made: Any = getattr(transformers, f"{kind}ForConditionalGeneration")
    else:
        config = getattr(transformers, f"{kind}Config")(**fields)
        made = getattr(transformers, f"{kind}ForCausalLM")
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = randomised(made(config).to(torch.float32)).eval()
    model.save_pretrained(folder)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(DEMO_PATH / file, folder / file)
    stored = load_file(folder / "model.safetensors")
    if more.get("head"):
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    stored = unstacked(stored) if more.get("unstacked") else stacked(stored) if more.get("stacked") else stored
    packed, exact = dict[str, Tensor](), dict(stored)
    for tensor, content in stored.items():
        prefix = tensor.removesuffix(".weight")
        if more.get("stacked") and tensor.endswith(("experts.gate_up_proj", "experts.down_proj")):
            write = next(rules[one] for one in rules if re.search(one, prefix))
            each = [write(expert.double().numpy()) for expert in content]
            packed[tensor] = torch.stack([parts["weight"] for parts, _ in each])
            packed[f"{tensor}_scale_inv"] = torch.stack([parts["weight_scale_inv"] for parts, _ in each])
            exact[tensor] = torch.stack([torch.from_numpy(values).float() for _, values in each])
            continue
        write = next((rules[one] for one in rules if re.search(one, prefix)), None)
        if write is None or content.dim() != 2 or tensor == prefix or re.search("vis|audio|projector", tensor):
            packed[tensor] = content
            continue
        parts, values = write(content.double().numpy())
        exact[tensor] = torch.from_numpy(np.ascontiguousarray(values)).float()
        packed |= {f"{prefix}.{part}": one.contiguous() for part, one in parts.items()}
    for part, where in more.items():
        if isinstance(where, str):
            modules = {tensor.removesuffix(".weight") for tensor in stored}
            modules |= {one.rpartition(".")[0] for one in modules}
            packed |= {f"{one}.{part}": torch.ones(1) for one in modules if re.search(where, one)}
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    if "groups" in more:
        quantization["config_groups"]["group_1"] = more["groups"]["config_groups"]["group_0"]
        quantization["format"] = "mixed-precision"
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": quantization}))
    exact = stacked(exact) if more.get("unstacked") else exact
    plain = folder / "plain"
    plain.mkdir()
    if more.get("head"):
        values["tie_word_embeddings"] = False
    (plain / "config.json").write_text(json.dumps(values))
    save_file(
        {one: tensor.contiguous() for one, tensor in exact.items()},
        plain / "model.safetensors",
        metadata={"format": "pt"},
    )
    return made.from_pretrained(plain, attn_implementation="eager").eval()


#: Of the cases those that something of their own is needed for.
ONE_OF_A_KIND = (
    "qwen3.5-moe fp8, stacked", "qwen3.5-moe fp8, stacked, a scale an expert", "qwen3.5 asymmetric, all",
    "exclusions that are wrong", "exclusions that are wrong, ct", "gemma4 experts mixed", "ministral3 fp8",
)  # fmt: skip


@pytest.mark.few(*ONE_OF_A_KIND)
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_published_checkpoints(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiled kernels, which round activations to 16 bits: what is read is exact."""
    monkeypatch.setenv(compiled.SWITCH, "0")
    model = published(tmp_path, name)
    ids = torch.randint(0, 8192, (90,), generator=torch.Generator().manual_seed(7)).tolist()
    engine = Engine.load(tmp_path, kv="bf16", device="cpu", max_context=128, dtype="float32")
    assert relative(engine.logits(ids, 60), model(torch.tensor([ids])).logits[0]) < 1e-4


@pytest.mark.parametrize(
    ("change", "fields", "words"),
    [
        (lambda scales: scales[:3], {}, "is [3, 4, 4], no scales for 4 experts."),
        (lambda scales: scales[:, 0], {}, "is [4, 4], no scales for 4 experts."),
        (lambda scales: scales[:, :3], {}, "is [4, 3, 4], no scales for 4 experts."),
        (
            lambda scales: scales[:, :2],
            {"weight_block_size": [48, 32]},
            "has blocks of 48 rows that belong to gate and up",
        ),
        (lambda scales: scales[..., :2], {}, "misshapen"),
    ],
)
def test_scales_of_stacked_experts_that_cannot_be(change: Any, fields: Any, words: str, tmp_path: Path) -> None:
    published(tmp_path, "qwen3.5-moe fp8, stacked")
    stored = load_file(tmp_path / "model.safetensors")
    name = next(one for one in stored if one.endswith("experts.gate_up_proj_scale_inv"))
    stored[name] = change(stored[name]).contiguous()
    save_file(stored, tmp_path / "model.safetensors")
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"] |= fields
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(OctoError, match=re.escape(words)) as refused:
        Engine.load(tmp_path, kv="bf16", device="cpu", max_context=128)
    assert str(refused.value).endswith(".") and len(str(refused.value)) <= 480
