"""Routed experts in files: every spelling and format, what is counted of them, and what is refused."""

import json
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from octo_run.cli import show
from octo_run.cli.show import describe
from octo_run.engine import Engine, benchmark, profiling
from octo_run.engine.parts import held_bytes
from octo_run.engine.quantise import quantise
from octo_run.errors import OctoError, UsageError
from octo_run.models.config import load_config, parse_config
from octo_run.models.decoder import Decoder
from octo_run.models.experts import LEAST_TOKENS, Experts
from octo_run.models.families import FAMILIES
from octo_run.models.plain_attention import attend_plain
from octo_run.models.quantisation.schemes import SCHEMES
from octo_run.models.tensors import expected_tensors, num_parameters
from octo_run.models.weights import RandomWeights, StoredWeights, random_weights

HERE = Path(__file__).parent
files = SimpleNamespace(**runpy.run_path(str(HERE / "quantised_files.py")))
models = SimpleNamespace(**runpy.run_path(str(HERE.parent / "engine" / "test_expert_families.py")))
#: Sizes of whole groups.
WIDE = {"intermediate_size": 128, "moe_intermediate_size": 128, "initializer_range": 0.05}
#: Of whole groups of every scheme.
EVEN = WIDE | {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "shared_expert_intermediate_size": 128}
IDS = models.tokens(40)
EXPERT = re.compile(r"(.+\.experts\.\d+\.\w+)\.weight")


def logits(folder: Path, **options: Any) -> Tensor:
    engine = Engine.load(folder, **({"kv": "bf16", "device": "cpu", "max_context": 128} | options))
    return engine.logits(IDS)


def edited(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)


def configured(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def stacked(tensors: dict[str, Tensor], names: dict[str, str], prefix: str) -> dict[str, Tensor]:
    """The experts' matrices by layer in one tensor, gate above up; ``names`` of gate, up and down in the files."""
    found, rest = dict[str, dict[str, list[Tensor]]](), dict[str, Tensor]()
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.experts\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            rest[name] = tensor
        else:
            layer = found.setdefault(match[1], {part: [] for part in ("gate", "up", "down")})
            layer[names[match[3]]].append((int(match[2]), tensor))  # type: ignore[arg-type]
    for layer, parts in found.items():
        gate, up, down = (torch.stack([tensor for _, tensor in sorted(parts[part], key=lambda one: one[0])])  # type: ignore[arg-type, index]
                          for part in ("gate", "up", "down"))  # fmt: skip
        rest[layer + prefix.format("gate_up_proj")] = torch.cat((gate, up), 1)
        rest[layer + prefix.format("down_proj")] = down
    return rest


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_stacked_experts_are_those_of_a_list(suffix: str, tmp_path: Path) -> None:
    models.save("qwen3-moe", tmp_path)
    wanted = logits(tmp_path)
    names = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    edited(tmp_path, lambda tensors: stacked(tensors, names, ".experts.{}" + suffix))
    assert torch.equal(logits(tmp_path), wanted)


def test_mixtral_by_new_names(tmp_path: Path) -> None:
    models.save("mixtral", tmp_path)
    wanted = logits(tmp_path)
    assert any("block_sparse_moe.experts.0.w1" in name for name in load_file(tmp_path / "model.safetensors"))
    names = {"w1": "gate", "w3": "up", "w2": "down"}

    def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k.replace("block_sparse_moe", "mlp"): v for k, v in stacked(tensors, names, ".experts.{}").items()}

    edited(tmp_path, renamed)
    assert torch.equal(logits(tmp_path), wanted)


CT = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*gate$"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}}},
}  # fmt: skip
FP8 = {"quant_method": "fp8", "weight_block_size": [64, 64], "modules_to_not_convert": ["lm_head"]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "modules_to_not_convert": ["gate"]}
FORMATS = {
    "fp8 block": (FP8, files.fp8(64, 64, "weight_scale_inv")), "ct int4": (CT, files.ct_packed(4, 32)),
    "gptq": (GPTQ, files.gptq(4, 64)), "awq": (AWQ, files.awq(64)),
}  # fmt: skip


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "qwen2-moe"])
@pytest.mark.parametrize("name", FORMATS)
def test_experts_that_files_hold_packed(name: str, family: str, tmp_path: Path) -> None:
    """Against files of their values. Of the rest only q_proj is packed: the other layers may be what they are."""
    config, write = FORMATS[name]
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    models.save(family, packed, **WIDE)
    shutil.copytree(packed, dense)
    exact = load_file(packed / "model.safetensors")
    stored = dict[str, Tensor]()
    for tensor, content in exact.items():
        match = re.fullmatch(r"(.+\.(experts\.\d+\.\w+|q_proj|shared_expert\.\w+))\.weight", tensor)
        if match is None:
            stored[tensor] = content
            continue
        parts, values = write(content.double().numpy())
        stored |= {f"{match[1]}.{part}": made.contiguous() for part, made in parts.items()}
        exact[tensor] = torch.from_numpy(np.ascontiguousarray(values)).float()
    save_file(stored, packed / "model.safetensors")
    save_file(exact, dense / "model.safetensors")
    configured(packed, quantization_config=config)
    ours, wanted = logits(packed), logits(dense)
    assert float((ours - wanted).abs().max() / wanted.abs().max()) < 1e-3
    held = Engine.load(packed, kv="bf16", device="cpu", max_context=128).forward.decoder.layers[0].mlp
    assert isinstance(held, Experts) and not isinstance(held.weights.gate_up, Tensor)


def mxfp4(folder: Path) -> None:
    """Give the experts of a gpt-oss folder as blocks and scales, and the other tensors in what they were."""

    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = dict[str, Tensor]()
        for name, tensor in tensors.items():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                found[name] = tensor
                continue
            parts = [files.mxfp4(blocks=True)(expert.T.double().numpy())[0] for expert in tensor]
            found[f"{name}_blocks"] = torch.stack([part["weight_blocks"] for part in parts])
            found[f"{name}_scales"] = torch.stack([part["weight_scales"] for part in parts])
        return found

    edited(folder, changed)
    ignored = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    configured(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ignored})


@pytest.mark.slow
@torch.inference_mode()
def test_gpt_oss_with_mxfp4_experts(tmp_path: Path) -> None:
    """Blocks and scales made by hand; transformers has their values."""
    model = models.save("gpt-oss", tmp_path, intermediate_size=96, initializer_range=0.05)
    for name, tensor in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            values = [files.mxfp4()(expert.T.double().numpy())[1].T for expert in tensor]
            tensor.copy_(torch.from_numpy(np.stack(values)).float())
    mxfp4(tmp_path)
    engine = Engine.load(tmp_path, kv="bf16", device="cpu", max_context=512)
    assert engine.plan.weight_format == "fp32+fp4-32"
    ids = models.tokens(300)
    theirs = model(torch.tensor([ids])).logits[0]
    for step in (None, 1):
        assert float((engine.logits(ids, step) - theirs).abs().max() / theirs.abs().max()) < 1e-4
    experts = engine.forward.decoder.layers[0].mlp
    assert isinstance(experts, Experts) and experts.weights.gate_up_bias is not None


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "qwen3-moe-dense-between", "gpt-oss"])
@pytest.mark.parametrize("weights", [None, "int4"])
def test_the_plan_counts_what_is_held(family: str, weights: str | None, tmp_path: Path) -> None:
    models.save(family, tmp_path)
    engine = Engine.load(tmp_path, kv="oct4", weights=weights, device="cpu", max_context=128)
    decoder = engine.forward.decoder
    held = held_bytes(decoder.embedding, decoder.head, decoder.final_norm, decoder.layers, but=(decoder.key_tensors,))
    assert sum(held) == engine.plan.weights
    assert num_parameters(engine.config) == sum(t.numel() for t in load_file(tmp_path / "model.safetensors").values())


@pytest.mark.slow
def test_a_layer_is_loaded_expert_by_expert() -> None:
    """On `meta`, too, where nothing is counted twice: 94 layers of 128 experts take no more than some seconds."""
    values = models.BASE | models.FAMILIES["qwen3-moe"][1] | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 128, "num_hidden_layers": 2,
        "num_experts_per_tok": 8,
    }  # fmt: skip
    cfg = parse_config(values, Path("config.json"))
    for scheme in (None, SCHEMES["int4"]):
        bytes_of = [
            sum(held_bytes(Decoder(cfg, RandomWeights(cfg, device, torch.bfloat16), None, None, scheme).layers))
            for device in ("meta", "cpu")
        ]
        assert bytes_of[0] == bytes_of[1]


def test_each_expert_is_shown_the_tokens_that_it_would_get() -> None:
    values = models.BASE | models.FAMILIES["mixtral"][1] | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 16,
    }  # fmt: skip
    cfg = parse_config(values, Path("config.json"))
    mlp = Decoder(cfg, random_weights(cfg, "cpu", torch.float32), None, None).layers[0].mlp
    assert isinstance(mlp, Experts)
    mlp.router[3] = mlp.router[:3].sum(0) * 5  # liked, or not at all
    seen = torch.randn(512, cfg.hidden_size)
    shown = mlp._shown(seen)
    chosen = (seen @ mlp.router.T).topk(2).indices
    counts = torch.bincount(chosen.flatten(), minlength=16)
    assert counts.min() < LEAST_TOKENS < counts.max()
    for expert, rows in enumerate(shown):
        given = (chosen == expert).any(1).nonzero().flatten()
        assert len(rows) == max(LEAST_TOKENS, len(given)) == len(rows.unique())
        assert set(given.tolist()) <= set(rows.tolist())
    assert all(len(rows) == 20 for rows in mlp._shown(seen[:20]))


@torch.inference_mode()
def test_weighting_by_the_inputs_of_each_expert_helps() -> None:
    """Inputs of very different columns: with what experts are shown, four bits lose less of their outputs."""
    values = models.BASE | models.FAMILIES["mixtral"][1] | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "intermediate_size": 128,
    }  # fmt: skip
    cfg = parse_config(values, Path("config.json"))
    mlp = Decoder(cfg, random_weights(cfg, "cpu", torch.float32), None, None).layers[0].mlp
    assert isinstance(mlp, Experts)
    columns = torch.exp(2 * torch.randn(cfg.hidden_size, generator=torch.Generator().manual_seed(2)))
    x = torch.randn(512, cfg.hidden_size, generator=torch.Generator().manual_seed(3)) * columns / columns.max()
    wanted = mlp(x)
    errors = [float((mlp.packed(SCHEMES["int4"], 0, seen)(x) - wanted).norm() / wanted.norm()) for seen in (None, x)]
    assert errors[1] < 0.8 * errors[0], errors


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: value for key, value in tensors.items() if name not in key}


DAMAGES: list[tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    ("qwen3-moe", without("layers.1.mlp.experts.2.up_proj"), "1 missing .*layers.1.mlp.experts.2.up_proj.weight"),
    ("qwen3-moe", lambda t: t | {"model.layers.0.mlp.experts.7.up_proj.weight": torch.ones(2)}, "1 unexpected"),
    ("mixtral", without("layers.0.block_sparse_moe.gate"), "1 missing .*layers.0.mlp.gate.weight"),
    ("gpt-oss", lambda t: t | {(n := "model.layers.1.mlp.experts.down_proj"): t[n][:2]},
     "layers.1.mlp.experts.down_proj is .* instead of .6, 80, 192."),
    ("gpt-oss", without("layers.2.mlp.experts.gate_up_proj_bias"), "6 missing"),
    ("qwen2-moe", without("shared_expert_gate"), "2 missing .*shared_expert_gate"),
    ("mixtral", lambda t: t | {"model.layers.0.mlp.gate.weight": t["model.norm.weight"].clone()}, "by another name"),
]  # fmt: skip


@pytest.mark.few(2)
@pytest.mark.parametrize(("family", "damage", "message"), DAMAGES)
def test_damaged_files_are_refused(family: str, damage: Any, message: str, tmp_path: Path) -> None:
    models.save(family, tmp_path)
    edited(tmp_path, damage)
    with pytest.raises(OctoError, match=message):
        Engine.load(tmp_path, kv="bf16", device="cpu", max_context=128)


def test_experts_in_several_formats_are_refused(tmp_path: Path) -> None:
    models.save("qwen3-moe", tmp_path, **WIDE)

    def one_packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = "model.layers.0.mlp.experts.1.down_proj"
        parts, _ = files.ct_packed(4, 32)(tensors.pop(f"{name}.weight").double().numpy())
        return tensors | {f"{name}.{part}": made for part, made in parts.items()}

    edited(tmp_path, one_packed)
    configured(tmp_path, quantization_config=CT)
    with pytest.raises(OctoError, match="several formats"):
        Engine.load(tmp_path, kv="bf16", device="cpu", max_context=128)


FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, more than the 5 experts"),
    ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0"),
    ("qwen3-moe", {"mlp_only_layers": "1"}, "mlp_only_layers is '1'"),
    ("qwen3-moe", {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window is true"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is"),
    ("gpt-oss", {"swiglu_limit": 0}, "swiglu_limit is 0"),
]


@pytest.mark.parametrize(("family", "fields", "message"), FIELDS)
def test_configurations_that_are_refused(family: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    models.save(family, tmp_path)
    configured(tmp_path, **fields)
    with pytest.raises(OctoError, match=message):
        load_config(tmp_path)


def test_no_experts_are_a_dense_model(tmp_path: Path) -> None:
    models.save("qwen3-moe", tmp_path)
    configured(tmp_path, num_experts=0)
    cfg = load_config(tmp_path)
    assert cfg.experts is None
    assert not any("experts" in name for name in expected_tensors(cfg))


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "qwen3-moe-dense-between"])
@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_quantised_folders_are_what_loading_makes(family: str, weights: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 192, "head_dim": 64, "shared_expert_intermediate_size": 64}
    models.save(family, tmp_path / "model", **WIDE | sizes)
    quantise(tmp_path / "model", tmp_path / "packed", weights, device="cpu")
    assert torch.equal(logits(tmp_path / "packed"), logits(tmp_path / "model", weights=SCHEMES[weights].in_files))
    names = load_file(tmp_path / "packed" / "model.safetensors").keys()
    listed = "block_sparse_moe.experts.1.w3" if family == "mixtral" else "mlp.experts.1.up_proj"
    assert any(name.endswith(f".{listed}.weight_packed") for name in names)


@pytest.mark.few(4)
@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "qwen2-moe", "olmoe"])
@pytest.mark.parametrize("weights", SCHEMES)
@torch.inference_mode()
def test_transformers_computes_the_same_of_quantised_experts(family: str, weights: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="the package by which transformers reads these files")
    from transformers import AutoModelForCausalLM

    models.save(family, tmp_path / "model", **EVEN)
    quantise(tmp_path / "model", tmp_path / "packed", weights, device="cpu")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    ids, cfg = torch.tensor([IDS]), load_config(tmp_path / "packed")
    ours = Decoder(cfg, StoredWeights(tmp_path / "packed", cfg, "cpu", torch.float32), None, None)
    hidden = ours.hidden(
        ids, torch.arange(len(IDS))[None],
        lambda layer, q, k, v: attend_plain(q, k, v, ours.specs[layer].attention),
    )  # fmt: skip
    assert models.relative(ours.logits(hidden), theirs(ids).logits) < 1e-4


def test_stacked_experts_are_not_written(tmp_path: Path) -> None:
    models.save("gpt-oss", tmp_path / "model", **WIDE)
    with pytest.raises(UsageError, match="GptOssForCausalLM models are not written"):
        quantise(tmp_path / "model", tmp_path / "packed", "int4", device="cpu")


@pytest.mark.slow
def test_what_a_token_meets(tmp_path: Path) -> None:
    models.save("qwen3-moe", tmp_path)
    facts = describe(str(tmp_path), "cpu", None)
    expert = 3 * 40 * 192
    assert (facts["experts"], facts["experts_per_token"]) == (7, 3)
    assert facts["parameters"] - facts["active_parameters"] == 3 * 4 * expert
    assert f"7 of a layer, 3 for a token, which meets {facts['active_parameters']:,} parameters" in show._text(facts)
    engine = Engine.load(tmp_path, kv="bf16", device="cpu", max_context=128)
    apart = engine.forward.decoder.embedding.nbytes
    assert benchmark.step_weight_bytes(engine) == engine.plan.weights - apart - 4 * 3 * 4 * expert
    batch = round(engine.plan.weights - apart - 4 * 3 * 7 * expert * (4 / 7) ** 5)
    assert abs(benchmark.step_weight_bytes(engine, 5) - batch) <= 1


@pytest.mark.slow
def test_formats_are_chosen_and_times_are_taken_with_experts(tmp_path: Path) -> None:
    """What looks into layers looks into these, too."""
    models.save("qwen2-moe", tmp_path)
    engine = Engine.load(tmp_path, kv="auto:56", device="cpu", max_context=512)
    found = profiling.profile(engine, ("tg", 3), depth=70, batch=1)
    assert {part.part: part.share for part in found.parts}[profiling.MLP] > 0


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss"])
def test_left_out_fields_mean_what_they_mean_to_transformers(family: str) -> None:
    theirs = pytest.importorskip("transformers").CONFIG_MAPPING[family]()
    architecture = next(name for name, value in FAMILIES.items() if value.model_type == family)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values: dict[str, Any] = {name: getattr(theirs, name) for name in (*sizes, "max_position_embeddings")}
    values |= {"architectures": [architecture], "rope_scaling": theirs.rope_parameters if family == "gpt_oss" else None}
    ours = parse_config(values, Path("config.json"))
    experts = ours.experts
    assert experts is not None and not experts.dense
    count = getattr(theirs, "num_local_experts", None) or theirs.num_experts
    inner = getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    assert (experts.count, experts.chosen, experts.inner) == (count, theirs.num_experts_per_tok, inner)
    assert experts.shared == getattr(theirs, "shared_expert_intermediate_size", 0)
    assert experts.normalised == getattr(theirs, "norm_topk_prob", True)
    assert (ours.num_kv_heads, ours.rms_norm_eps) == (theirs.num_key_value_heads, theirs.rms_norm_eps)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.o_bias == getattr(theirs, "attention_bias", False)
    assert ours.qkv_bias == (ours.o_bias or getattr(theirs, "qkv_bias", False))
    if family == "gpt_oss":
        assert experts.clamped == (theirs.swiglu_alpha, theirs.swiglu_limit)
        assert list(ours.layer_types) == theirs.layer_types and ours.sliding_window == theirs.sliding_window
