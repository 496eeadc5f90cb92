"""GGUF files of every family that is imported: tiny random models of transformers, written as llama.cpp's converter
writes them, have transformers' logits."""

import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from octo_run.engine import Engine
from octo_run.engine.quantise import quantise
from octo_run.errors import OctoError, UsageError
from octo_run.models.cache import cache_folder
from octo_run.models.gguf import importer, tensors
from octo_run.models.gguf.architectures import ARCHITECTURES
from octo_run.models.gguf.header import read_model
from octo_run.models.gguf.importer import import_model
from octo_run.models.names import HubName

Converter = runpy.run_path(str(Path(__file__).parent / "gguf_converter.py"))["Converter"]
COUNT = 150
SMALL: dict[str, Any] = {
    "vocab_size": 330, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e5}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 5e5,
}  # fmt: skip
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}


def longrope(original: int) -> dict[str, Any]:
    factors = {"short_factor": [1.0 + 0.02 * i for i in range(12)], "long_factor": [1.0 + 0.3 * i for i in range(12)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": original, **factors}
    return {
        "rope_parameters": {**rope, "partial_rotary_factor": 0.75}, "original_max_position_embeddings": original,
        "partial_rotary_factor": 0.75,
    }  # fmt: skip


ROUTED = {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
    "norm_topk_prob": True,
}  # fmt: skip


def delta(keys: int, values: int, **fields: Any) -> dict[str, Any]:
    return {
        "head_dim": 64, "linear_key_head_dim": 32, "linear_value_head_dim": 16, "linear_num_key_heads": keys,
        "linear_num_value_heads": values, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        }, **fields,
    }  # fmt: skip


#: Configuration class without "Config", and its fields beside SMALL.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", EXPERTS),
    "mixtral-llama3": ("Mixtral", {**EXPERTS, "rope_parameters": LLAMA3}),
    "gpt-oss": (
        "GptOss",
        {
            **EXPERTS, "sliding_window": 70, "head_dim": 64, "intermediate_size": 64,
            "rope_parameters": YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
        },
    ),
    "qwen35": ("Qwen3_5", delta(2, 6)),
    "qwen35-tied": ("Qwen3_5", delta(3, 3, tie_word_embeddings=True)),
    "qwen35moe": ("Qwen3_5Moe", delta(2, 6, **ROUTED)),
    "qwen3next": ("Qwen3Next", delta(2, 6, **ROUTED)),
    "phi3": ("Phi3", {"sliding_window": 90, "num_key_value_heads": 4}),
    "phi3-short": ("Phi3", longrope(512)),
    "phi4-mini": ("Phi3", {**longrope(64), "sliding_window": None, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 70}),
    "mistral3": ("Mistral", {"head_dim": 48, "sliding_window": None}),
    "ministral3": (
        "Ministral3",
        {"head_dim": 64, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0,
                                                    "beta_slow": 1.0, "llama_4_scaling_beta": 0.1}},
    ),
    "granite": (
        "Granite",
        {"embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "logits_scaling": 8.0,
         "residual_multiplier": 0.22, "tie_word_embeddings": True},
    ),
    "smollm3": ("SmolLM3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 4}),
    "olmo3": ("Olmo3", {"sliding_window": 70, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        "full_attention": YARN | {"rope_theta": 5e5, "attention_factor": 1.2},
    }}),
    "glm4": ("Glm4", {"head_dim": 64}),
    "exaone4": ("Exaone4", {"sliding_window": 70, "rope_parameters": LLAMA3}),
    "exaone4-whole": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4,
                                  "tie_word_embeddings": True}),
    "seed-oss": ("SeedOss", {"head_dim": 64}),
    "seed-oss-out": ("SeedOss", {"head_dim": 64, "attention_out_bias": True}),
    "cohere2": ("Cohere2", {"sliding_window": 70, "logit_scale": 0.25}),
}  # fmt: skip


@torch.no_grad()
def randomised(model: Any) -> Any:
    """The model with weights that leave no part of it without effect, and that bfloat16 holds."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and not name.endswith("bias"):
            weight.normal_(0, 0.7 * weight.shape[-1] ** -0.5, generator=generator)
        else:
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
        if "gemma" in model.config.model_type and name.endswith("norm.weight"):  # 1 is added to it
            weight.mul_(8).round_().div_(8)
        if not (".linear_attn." in name and weight.dim() == 1):  # of which published files have more digits
            weight.copy_(weight.to(torch.bfloat16))
    return model


def made(name: str, folder: Path) -> Any:
    """Transformers' model of ``MODELS``, which is in the folder, too."""
    import transformers

    kind, fields = MODELS[name]
    of = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    config = of(**(SMALL | fields))
    config._attn_implementation = "eager"
    model = randomised(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()
    model.save_pretrained(folder)
    return model


def tokens() -> list[int]:
    return torch.randint(0, 300, (COUNT,), generator=torch.Generator().manual_seed(7)).tolist()


@torch.inference_mode()
def difference(model: Any, folder: Path) -> float:
    """Of the logits at every position, as a share of the greatest."""
    theirs = model(torch.tensor([tokens()])).logits[0]
    engine = Engine.load(folder, kv="bf16", device="cpu", max_context=256)
    assert engine.dtype == torch.float32
    ours = engine.logits(tokens(), None)
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture
def vocabulary(small_gguf: Callable[..., Any]) -> dict[str, Any]:
    return {key: value for key, value in small_gguf("llama").metadata.items() if key.startswith("tokenizer.")}


@pytest.mark.few(
    "mixtral", "gpt-oss", "qwen35", "qwen3next", "phi4-mini", "gemma2", "ministral3", "granite", "olmo3", "cohere2"
)
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name: str, vocabulary: dict[str, Any], tmp_path: Path) -> None:
    model = made(name, tmp_path / "model")
    path = Converter(tmp_path / "model", vocabulary).write(tmp_path / f"{name}.gguf")
    assert difference(model, import_model(path).path) < 1e-4


@pytest.mark.parametrize("quant", ["Q8_0", "BF16", "MXFP4"])
@torch.inference_mode()
def test_gpt_oss(quant: str, vocabulary: dict[str, Any], tmp_path: Path) -> None:
    """Experts of other types become bfloat16; MXFP4 stays, number for number, as gpt-oss is published. Transformers
    reads the folder, too."""
    import transformers

    model = made("gpt-oss", tmp_path / "model")
    converter = Converter(tmp_path / "model", vocabulary, quant)
    folder = import_model(converter.write(tmp_path / "model.gguf")).path
    stored, written = converter.stored(), load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts."
    gate, up, down = (stored[f"blk.1.ffn_{which}_exps.weight"] for which in ("gate", "up", "down"))
    gate_up = torch.stack((gate, up), 2).flatten(1, 2)
    if quant == "MXFP4":
        assert written[f"{name}gate_up_proj_blocks"].shape == (5, 128, 4, 16)
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
        found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=torch.float32
        )
        experts = found.model.layers[1].mlp.experts
        assert torch.equal(experts.gate_up_proj.mT, gate_up) and torch.equal(experts.down_proj.mT, down)
    else:
        assert torch.equal(written[f"{name}gate_up_proj"].mT, gate_up.to(torch.bfloat16))
        assert torch.equal(written[f"{name}down_proj"].mT, down.to(torch.bfloat16))
        found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert 0 < difference(model, folder) < (0.5 if quant == "MXFP4" else 0.2)
    assert difference(found, folder) < 1e-4


def test_gpt_oss_is_not_quantised_to_a_folder(vocabulary: dict[str, Any], tmp_path: Path) -> None:
    made("gpt-oss", tmp_path / "model")
    path = Converter(tmp_path / "model", vocabulary, "MXFP4").write(tmp_path / "model.gguf")
    with pytest.raises(UsageError, match="quantised GptOssForCausalLM models are not written"):
        import_model(path, weights="int8")
    assert not [*cache_folder().glob("models--*/snapshots/*")]


def test_scales_that_are_no_numbers(vocabulary: dict[str, Any], tmp_path: Path) -> None:
    made("gpt-oss", tmp_path / "model")
    path = Converter(tmp_path / "model", vocabulary, "MXFP4").write(tmp_path / "model.gguf")
    data = bytearray(path.read_bytes())
    data[read_model(path).tensors["blk.2.ffn_up_exps.weight"].start + 17 * 5] = 255
    path.write_bytes(data)
    with pytest.raises(OctoError, match=r"layers\.2\.mlp\.experts\.0\.gate_up_proj\.weight holds values that"):
        import_model(path)
    assert not [*cache_folder().glob("models--*/snapshots/*")]


def test_experts_one_by_one(vocabulary: dict[str, Any], tmp_path: Path) -> None:
    """Older files of Mixtral have a tensor for each expert. The folder has the names of published ones."""
    model = made("mixtral", tmp_path / "model")
    converter = Converter(tmp_path / "model", vocabulary)
    for name in [name for name in converter.tensors if "_exps." in name]:
        for number, one in enumerate(converter.tensors.pop(name)):
            converter.tensors[name.replace("_exps.", f".{number}.")] = one
    folder = import_model(converter.write(tmp_path / "model.gguf")).path
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "model"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name].float(), theirs[name]) for name in theirs)
    assert difference(model, folder) < 1e-4


def test_layers_that_predict_further_tokens_are_left_out(vocabulary: dict[str, Any], tmp_path: Path) -> None:
    model = made("qwen35", tmp_path / "model")
    converter = Converter(tmp_path / "model", vocabulary)
    for name in ("attn_norm", "nextn.eh_proj", "attn_q"):
        converter.tensors[f"blk.4.{name}.weight"] = torch.ones(8, 4)
    changes = {"qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1}
    folder = import_model(converter.write(tmp_path / "model.gguf", **changes)).path
    assert difference(model, folder) < 1e-4
    converter.tensors["blk.3.nextn.eh_proj.weight"] = torch.ones(8, 4)
    with pytest.raises(OctoError, match=r"the tensor 'blk\.3\.nextn\.eh_proj\.weight'"):
        import_model(converter.write(tmp_path / "other.gguf", **changes))
    with pytest.raises(UsageError, match="quantised Qwen3_5ForCausalLM models are not written"):
        import_model(tmp_path / "model.gguf", "packed", weights="int8")


def test_rows_of_several_tensors_are_read_in_pieces(
    vocabulary: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("qwen3next", tmp_path / "model")
    path = Converter(tmp_path / "model", vocabulary, "Q8_0").write(tmp_path / "model.gguf")
    whole = load_file(import_model(path, "whole").path / "model.safetensors")
    monkeypatch.setattr(tensors, "PIECE_ITEMS", 128 * 7)
    pieces = load_file(import_model(path, "pieces").path / "model.safetensors")
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)


@pytest.mark.parametrize("name", ["mixtral", "phi4-mini"])
def test_quantised_imports(name: str, vocabulary: dict[str, Any], tmp_path: Path) -> None:
    made(name, tmp_path / "model")
    path = Converter(tmp_path / "model", vocabulary).write(tmp_path / "model.gguf")
    plain, out = import_model(path, "plain"), tmp_path / "out"
    quantise(plain.path, out, "int8", device="cpu")
    want, got = (
        load_file(place / "model.safetensors") for place in (out, import_model(path, "p", weights="int8").path)
    )
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)


#: Model -> metadata to be changed, and what is said then.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("granite", {"granite.rope.scaling.finetuned": False}, r"granite\.rope\.scaling\.finetuned is False"),
    ("granite", {"granite.logit_scale": None}, r"granite\.logit_scale is missing"),
    ("gpt-oss", {"gpt-oss.attention.sliding_window": None}, r"attention\.sliding_window is missing"),
    ("gpt-oss", {"gpt-oss.attention.sliding_window_pattern": [True, False]}, r"not true or false for each of 4 layers"),
    ("gpt-oss", {"gpt-oss.attention.sliding_window_pattern": 0}, r"sliding_window_pattern is 0"),
    ("gpt-oss", {"gpt-oss.expert_used_count": 6}, "num_experts_per_tok is 6, more than the 5 experts"),
    ("gpt-oss", {"gpt-oss.expert_gating_func": 2}, "expert_gating_func is 2"),
    ("mixtral", {"llama.expert_used_count": None}, r"llama\.expert_used_count is missing"),
    ("mixtral", {"llama.expert_count": 6}, r"ffn_gate_inp\.weight has the shape \[5, 128\]"),
    ("phi3", {"phi3.attention.sliding_window": None}, r"phi3\.attention\.sliding_window is missing"),
    ("phi3", {"phi3.rope.scaling.attn_factor": 1.5}, r"rope\.scaling\.attn_factor is 1\.5"),
    ("phi3", {"phi3.rope.dimension_count": 48}, r"rope\.dimension_count is 48 where 32"),
    ("phi3", {"phi3.rope.dimension_count": 15}, r"rope\.dimension_count is 15, and octo-run turns an even number"),
    ("phi3-short", {"phi3.rope.scaling.attn_factor": None}, r"rope\.scaling\.attn_factor is missing"),
    ("phi3-short", {"phi3.rope.dimension_count": 28}, r"rope_factors_short\.weight is F32 \[12\], not F32 \[14\]"),
    ("gemma2", {"gemma2.final_logit_softcapping": None}, r"final_logit_softcapping is missing"),
    ("ministral3", {"mistral3.attention.temperature_length": 128}, r"attention\.temperature_length is 128"),
    ("glm4", {"glm4.nextn_predict_layers": 1}, r"glm4\.nextn_predict_layers is 1"),
    ("glm4", {"glm4.rope.dimension_sections": [8, 12, 12, 0]}, r"glm4\.rope\.dimension_sections is"),
    ("olmo3", {"olmo2.attention.sliding_window": None}, r"rope\.scaling\.yarn_attn_factor is 1\.2"),
    ("qwen35", {"qwen35.ssm.inner_size": 97}, r"ssm\.inner_size is 97, no multiple of the 6 heads"),
    ("qwen35", {"qwen35.ssm.time_step_rank": 0}, r"ssm\.inner_size is 96, no multiple of the 0 heads"),
    ("qwen35", {"qwen35.ssm.state_size": 16}, r"ssm_conv1d\.weight has the shape \[224, 4\] where"),
    ("qwen35", {"qwen35.ssm.group_count": 4}, r"linear_num_value_heads \(6\) is no multiple of"),
    ("qwen35", {"qwen35.full_attention_interval": 0}, r"full_attention_interval is 0"),
    ("qwen3next", {"qwen3next.ssm.inner_size": 48}, r"ssm_\w+(\.weight)? has the shape .* where"),
    ("qwen3next", {"qwen3next.nextn_predict_layers": 1}, r"nextn_predict_layers is 1"),
    ("qwen35moe", {"qwen35moe.expert_shared_feed_forward_length": None}, "expert_shared_feed_forward_length is miss"),
    ("olmo3", {"olmo2.rope.freq_base_swa": 10000.0}, r"rope\.freq_base_swa is 10000\.0"),
    ("exaone4", {"exaone4.attention.sliding_window_pattern": None}, r"attention\.sliding_window_pattern is missing"),
    ("cohere2", {"cohere2.attention.layer_norm_epsilon": None}, r"attention\.layer_norm_epsilon is missing"),
]  # fmt: skip


@pytest.mark.few(5)
@pytest.mark.parametrize(("name", "changes", "sentence"), REFUSED)
def test_what_is_refused(
    name: str, changes: dict[str, Any], sentence: str, vocabulary: dict[str, Any], tmp_path: Path
) -> None:
    made(name, tmp_path / "model")
    path = Converter(tmp_path / "model", vocabulary).write(tmp_path / "model.gguf", **changes)
    with pytest.raises(OctoError, match=sentence) as error:
        import_model(path)
    text = str(error.value)
    assert str(path) in text and text.endswith(".") and "\n" not in text
    assert not [*cache_folder().glob("models--*/snapshots/*")]


VALUES: tuple[Any, ...] = (
    0, -1, 1, 3, 2**31, 2**63, True, 1e-40, 1e30, float("nan"), "", "\x1b[2J", [], ["x"], [1, 2],
    [True] * 4, [2**40] * 4,
)  # fmt: skip


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["gpt-oss", "phi4-mini", "qwen35", "qwen3next", "granite", "olmo3", "ministral3"])
def test_any_value_of_any_entry_is_taken_or_refused(name: str, vocabulary: dict[str, Any], tmp_path: Path) -> None:
    made(name, tmp_path / "model")
    path = Converter(tmp_path / "model", vocabulary).write(tmp_path / "model.gguf")
    model, wanted = read_model(path), HubName("imported/x")
    importer._Import(model, wanted, None, None)
    arch, refusals = model.metadata["general.architecture"], 0
    keys = [key for key in model.metadata if key.startswith(f"{arch}.")]
    more = "attention.sliding_window_pattern", "nextn_predict_layers", "full_attention_interval"
    keys += [f"{arch}.{key}" for key in more]
    for key in keys:
        for value in VALUES:
            try:
                importer._Import(replace(model, metadata=model.metadata | {key: value}), wanted, None, None)
            except OctoError as error:
                refusals += 1
                text = str(error)
                assert text.isprintable() and len(text) <= 480 and text.endswith(".") and str(model.path) in text, key
    assert refusals > len(keys) * len(VALUES) / 3


def test_every_architecture_is_tried_and_documented() -> None:
    elsewhere = {"llama", "qwen2", "qwen3", "qwen3moe", "gemma3"}  # test_gguf_import.py
    kinds = {kind for kind, _ in MODELS.values()} | {"Olmo3"}
    for name, arch in ARCHITECTURES.items():
        kind = arch.model.removesuffix("ForCausalLM")
        assert name in elsewhere or kind in kinds or name == "mistral3", name
    text = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    assert all(f"`{name}`" in text for name in ARCHITECTURES)
