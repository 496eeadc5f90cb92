"""Checkpoints that see or hear: their text part against transformers, with the tensor names that its classes make."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from octo_run.engine import Engine
from octo_run.engine.quantise import quantise
from octo_run.errors import OctoError, UsageError
from octo_run.models.cache import DEMO_PATH
from octo_run.models.families import WRAPPERS

from .test_families import SMALL, TWO, YARN, heads, randomised, relative, tokens

VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
PIXTRAL = {"model_type": "pixtral", "head_dim": 16}
QWEN = {"depth": 1, "num_heads": 2, "out_hidden_size": 64}
MROPE = {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [12, 10, 10]}
DELTA = {
    "head_dim": 64, "linear_key_head_dim": 32, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}  # fmt: skip
#: Of ``kind + "ForConditionalGeneration"``: the text part's architecture, its fields, those of images, of the whole.
WRAPPED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
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
    assert compared == {(wrapper, decoder) for wrapper, decoders in WRAPPERS.items() for decoder in decoders}


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
    config = getattr(transformers, f"{kind}Config")(
        text_config=SMALL | text, vision_config=VISION | vision, tie_word_embeddings=tied, **whole
    )
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
    assert any("lm_head" in one for one in stored) != tied
    found = [
        stored,
        {one.replace("language_model.model.", "model.language_model."): tensor for one, tensor in stored.items()},
        {one: tensor.contiguous().clone() for one, tensor in state.items() if not (tied and "lm_head" in one)},
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
