"""Checkpoints that see or hear: their text part against transformers, with the tensor names that its classes make."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from octo_run.engine import Engine
from octo_run.engine.quantise import quantise
from octo_run.errors import OctoError, UsageError
from octo_run.models.cache import DEMO_PATH
from octo_run.models.text_parts import WRAPPERS

from .test_families import SMALL, TWO, YARN, heads, randomised, relative, tokens

VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
PIXTRAL = {"model_type": "pixtral", "head_dim": 16}
QWEN = {"depth": 1, "num_heads": 2, "out_hidden_size": 64}
QWEN2_VL = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 256}
CLIP = {"model_type": "clip_vision_model"}
INTERN = {"image_size": [28, 28], "patch_size": [14, 14]}
AUDIO = {"audio_config": {
    "hidden_size": 64, "intermediate_size": 256, "d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_source_positions": 16,
}}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [12, 10, 10]}
DELTA = {
    "head_dim": 64, "linear_key_head_dim": 32, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}  # fmt: skip
#: Of ``kind + "ForConditionalGeneration"``: the text part's architecture, its fields, those of images, of the whole.
WRAPPED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3", "Gemma3ForCausalLM", {**heads(2, 1, 64), "sliding_window": 64, "layer_types": TWO}, {}, {},
    ),
    "gemma4": (
        "Gemma4", "Gemma4ForCausalLM",
        {
            **heads(2, 1, 64), "global_head_dim": 128, "sliding_window": 64, "layer_types": TWO,
            "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 8192, "num_kv_shared_layers": 2,
            "enable_moe_block": True, "num_experts": 3, "top_k_experts": 2, "moe_intermediate_size": 40,
        },
        {"num_key_value_heads": 2, "head_dim": 16, "image_size": None},
        {"audio_config": {
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "subsampling_conv_channels": [8, 4],
            "output_proj_dims": 32,
        }},
    ),
    "gemma4-unified": (
        "Gemma4Unified", "Gemma4UnifiedForCausalLM",
        {**heads(4, 2, 64), "global_head_dim": 96, "sliding_window": 70, "layer_types": TWO, "attention_k_eq_v": True},
        {"mm_embed_dim": 32, "mm_posemb_size": 4},
        {"audio_config": {"audio_embed_dim": 40}},
    ),
    "qwen3-vl": (
        "Qwen3VL", "Qwen3ForCausalLM",
        {**heads(4, 2, 64), "rope_parameters": MROPE | {"mrope_interleaved": True}},
        QWEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, {},
    ),
    "qwen3.5": ("Qwen3_5", "Qwen3_5ForCausalLM", DELTA, QWEN, {}),
    "qwen3.5-moe": (
        "Qwen3_5Moe", "Qwen3_5MoeForCausalLM",
        {
            **DELTA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        },
        QWEN, {},
    ),
    "mistral": (
        "Mistral3", "MistralForCausalLM",
        {**heads(4, 2, 64), "model_type": "mistral", "sliding_window": None}, PIXTRAL, {},
    ),
    "ministral": (
        "Mistral3", "MinistralForCausalLM",
        {**heads(4, 2, 64), "model_type": "ministral", "sliding_window": 70, "layer_types": TWO}, PIXTRAL, {},
    ),
    "qwen2-vl": (
        "Qwen2VL", "Qwen2ForCausalLM", {"hidden_size": 256, "rope_parameters": MROPE}, QWEN2_VL, {},
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VL", "Qwen2ForCausalLM", {"hidden_size": 256, "rope_parameters": MROPE},
        QWEN2_VL | {"out_hidden_size": 256, "fullatt_block_indexes": [0]}, {},
    ),
    "llava": ("Llava", "LlamaForCausalLM", {**heads(4, 2, 64), "model_type": "llama"}, CLIP, {}),
    "llava-mistral": ("Llava", "MistralForCausalLM", {**heads(4, 2, 64), "model_type": "mistral"}, PIXTRAL, {}),
    "llava-qwen2": ("Llava", "Qwen2ForCausalLM", {"hidden_size": 256, "model_type": "qwen2"}, CLIP, {}),
    "llava-next": ("LlavaNext", "LlamaForCausalLM", {**heads(4, 2, 64), "model_type": "llama"}, CLIP, {}),
    "llava-next-mistral": (
        "LlavaNext", "MistralForCausalLM", {**heads(4, 2, 64), "model_type": "mistral"}, CLIP, {},
    ),
    "llava-next-qwen2": ("LlavaNext", "Qwen2ForCausalLM", {"hidden_size": 256, "model_type": "qwen2"}, CLIP, {}),
    "llava-onevision": (
        "LlavaOnevision", "Qwen2ForCausalLM", {"hidden_size": 256, "model_type": "qwen2"},
        {"model_type": "siglip_vision_model"}, {},
    ),
    "internvl": ("InternVL", "Qwen2ForCausalLM", {"hidden_size": 256, "model_type": "qwen2"}, INTERN, {}),
    "internvl-qwen3": ("InternVL", "Qwen3ForCausalLM", {**heads(4, 2, 64), "model_type": "qwen3"}, INTERN, {}),
    "internvl-llama": ("InternVL", "LlamaForCausalLM", {**heads(4, 2, 64), "model_type": "llama"}, INTERN, {}),
    "idefics3": ("Idefics3", "LlamaForCausalLM", {**heads(4, 2, 64), "model_type": "llama"}, {}, {}),
    "smolvlm": ("SmolVLM", "LlamaForCausalLM", {**heads(4, 2, 64), "model_type": "llama"}, {}, {}),
    "voxtral": ("Voxtral", "LlamaForCausalLM", {**heads(4, 2, 64), "model_type": "llama"}, None, AUDIO),
    "qwen2-audio": ("Qwen2Audio", "Qwen2ForCausalLM", {"hidden_size": 256, "model_type": "qwen2"}, None, AUDIO),
    "ministral3": (
        "Mistral3", "Ministral3ForCausalLM",
        {**heads(2, 1, 64), "model_type": "ministral3", "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
        PIXTRAL, {},
    ),
}  # fmt: skip
#: What tells a tensor that is no part of the text.
OTHERS = ("vision", "visual", "audio", "projector")


def test_every_text_part_is_compared() -> None:
    compared = {(f"{kind}ForConditionalGeneration", decoder) for kind, decoder, *_ in WRAPPED.values()}
    assert compared == {(wrapper, decoder) for wrapper, one in WRAPPERS.items() for decoder in one.decoders.values()}


@pytest.mark.few("Qwen2VL")
@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen2_5_VL"])
@torch.inference_mode()
def test_a_text_part_without_an_object_of_its_own(kind: str, tmp_path: Path) -> None:
    """As Qwen2-VL and Qwen2.5-VL were published: fields of the text among those of the whole, names of the decoder."""
    import transformers
    from safetensors.torch import save_file

    text = SMALL | {"hidden_size": 256, "rope_parameters": MROPE, "tie_word_embeddings": False}
    vision = VISION | QWEN2_VL | {"out_hidden_size": 256, "fullatt_block_indexes": [0]}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, tie_word_embeddings=False)
    config._attn_implementation = "eager"
    model = randomised(getattr(transformers, f"{kind}ForConditionalGeneration")(config).to(torch.float32)).eval()
    flat = {name: value for name, value in config.text_config.to_dict().items() if name not in ("model_type", "dtype")}
    flat |= {"architectures": [f"{kind}ForConditionalGeneration"], "model_type": config.model_type}
    flat |= {"rope_scaling": {"type": "mrope", "mrope_section": MROPE["mrope_section"]}, "rope_theta": 1e5}
    flat |= {"rope_parameters": None, "vision_config": vision, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    published = {
        re.sub(r"^model\.(visual\.)|^model\.language_model\.", lambda found: found[1] or "model.", one): tensor.clone()
        for one, tensor in model.state_dict().items()
    }
    assert {one.split(".")[0] for one in published} == {"model", "visual", "lm_head"}
    save_file(published, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(DEMO_PATH / file, tmp_path / file)
    engine = Engine.load(tmp_path, kv="bf16", device="cpu", max_context=512)
    assert relative(engine.logits(tokens(), 100), model(torch.tensor([tokens()])).logits[0]) < 1e-4


@pytest.mark.few("True-gemma3", "False-gemma4-unified")
@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("tied", [True, False])
@torch.inference_mode()
def test_text_parts_of_checkpoints_that_see(name: str, tied: bool, tmp_path: Path) -> None:
    """What belongs to images is passed over; tensors have the names of older files, of newer ones, and those that the
    library's own classes have."""
    import transformers
    from safetensors.torch import load_file, save_file

    kind, decoder, text, vision, whole = WRAPPED[name]
    parts = whole if vision is None else whole | {"vision_config": VISION | vision}
    text = SMALL | text | {"tie_word_embeddings": tied}
    config = getattr(transformers, f"{kind}Config")(text_config=text, tie_word_embeddings=tied, **parts)
    config._attn_implementation = "eager"
    model = randomised(getattr(transformers, f"{kind}ForConditionalGeneration")(config).to(torch.float32)).eval()
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(DEMO_PATH / file, tmp_path / file)
    ids = tokens()
    theirs = model(torch.tensor([ids])).logits[0]
    file = tmp_path / "model.safetensors"
    stored, state = load_file(file), model.state_dict()
    for names in (stored, state):
        assert any(other in one for one in names for other in OTHERS)
    head = any("lm_head" in one for one in stored)  # some of the library's classes have one whatever their file says
    assert head or tied
    found = [
        stored,
        {one.replace("language_model.model.", "model.language_model."): tensor for one, tensor in stored.items()},
        {one: tensor.contiguous().clone() for one, tensor in state.items() if head or "lm_head" not in one},
    ]
    for tensors in found:
        save_file(tensors, file, metadata={"format": "pt"})
        engine = Engine.load(tmp_path, kv="bf16", device="cpu", max_context=512)
        assert engine.config.architecture == decoder
        assert relative(engine.logits(ids, 100), theirs) < 1e-4
    with pytest.raises(UsageError, match=r"holds more than its text, which alone octo-run knows"):
        quantise(tmp_path, tmp_path / "out", device="cpu")
    save_file(stored | {"other.weight": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(OctoError, match=r"1 unexpected \(other\.weight\)"):
        Engine.load(tmp_path, kv="bf16", device="cpu")
