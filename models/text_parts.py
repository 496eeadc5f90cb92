"""Checkpoints that see or hear, whose text part is a decoder of a known family. Nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from octo_run.errors import quoted
from octo_run.models.fields import Fields

_TIED, _ENDS = "tie_word_embeddings", "eos_token_id"
_OF_THE_WHOLE = ("bos_token_id", "dtype", "torch_dtype", "quantization_config")


@dataclass(frozen=True)
class Wrapper:
    """A checkpoint that is more than its text.

    Attributes:
        model_type: Of the whole.
        decoders: The ``model_type`` that ``text_config`` may have, and the architecture that such a text part is; the
            first one where the field is left out.
        flat: Older files have no ``text_config``: its fields stand among those of the whole.
        defaults: What fields of ``text_config`` mean that are left out, where it is neither what they mean in the
            family nor what `LEFT_OUT` says.
    """

    model_type: str
    decoders: Mapping[str, str]
    flat: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_LLAMA, _MISTRAL = {"llama": "LlamaForCausalLM"}, {"mistral": "MistralForCausalLM"}
_QWEN2 = {"qwen2": "Qwen2ForCausalLM"}

WRAPPERS: Mapping[str, Wrapper] = {
    "Gemma3ForConditionalGeneration": Wrapper("gemma3", {"gemma3_text": "Gemma3ForCausalLM"}),
    "Gemma4ForConditionalGeneration": Wrapper("gemma4", {"gemma4_text": "Gemma4ForCausalLM"}),
    "Gemma4UnifiedForConditionalGeneration": Wrapper(
        "gemma4_unified", {"gemma4_unified_text": "Gemma4UnifiedForCausalLM"}
    ),
    "Idefics3ForConditionalGeneration": Wrapper("idefics3", _LLAMA),
    "InternVLForConditionalGeneration": Wrapper("internvl", {**_QWEN2, "qwen3": "Qwen3ForCausalLM", **_LLAMA}),
    "LlavaForConditionalGeneration": Wrapper("llava", {**_LLAMA, **_MISTRAL, **_QWEN2}),
    "LlavaNextForConditionalGeneration": Wrapper("llava_next", {**_LLAMA, **_MISTRAL, **_QWEN2}),
    "LlavaOnevisionForConditionalGeneration": Wrapper("llava_onevision", _QWEN2),
    "Mistral3ForConditionalGeneration": Wrapper(
        "mistral3", {**_MISTRAL, "ministral": "MinistralForCausalLM", "ministral3": "Ministral3ForCausalLM"}
    ),
    "Qwen2AudioForConditionalGeneration": Wrapper("qwen2_audio", _QWEN2),
    "Qwen2VLForConditionalGeneration": Wrapper("qwen2_vl", {"qwen2_vl_text": "Qwen2ForCausalLM"}, flat=True),
    "Qwen2_5_VLForConditionalGeneration": Wrapper("qwen2_5_vl", {"qwen2_5_vl_text": "Qwen2ForCausalLM"}, flat=True),
    "Qwen3VLForConditionalGeneration": Wrapper("qwen3_vl", {"qwen3_vl_text": "Qwen3ForCausalLM"}),
    "Qwen3_5ForConditionalGeneration": Wrapper("qwen3_5", {"qwen3_5_text": "Qwen3_5ForCausalLM"}),
    "Qwen3_5MoeForConditionalGeneration": Wrapper("qwen3_5_moe", {"qwen3_5_moe_text": "Qwen3_5MoeForCausalLM"}),
    "SmolVLMForConditionalGeneration": Wrapper("smolvlm", _LLAMA),
    "VoxtralForConditionalGeneration": Wrapper(
        "voxtral",
        _LLAMA,
        defaults={
            "vocab_size": 131_072, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 30,
            "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 1e8,
            "head_dim": 128,
        },
    ),
}  # fmt: skip

_USUAL = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_QWEN2_VL = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_window_layers": 80, "rope_theta": 1e6}
#: What fields of a text part mean that are left out and that a model of the family itself must have, or whose meaning
#: is another one there; by its ``model_type``. Published LLaVA and Pixtral files leave such out.
LEFT_OUT: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_USUAL, "vocab_size": 32_000, "intermediate_size": 11_008, "max_position_embeddings": 2048},
    "mistral": {**_USUAL, "vocab_size": 32_000, "intermediate_size": 14_336, "max_position_embeddings": 131_072},
    "qwen2": {**_USUAL, "vocab_size": 151_936, "intermediate_size": 22_016, "max_position_embeddings": 32_768},
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3_vl_text": {"rope_theta": 500_000.0},
}


def text_part(fields: Fields, name: str) -> tuple[str, Fields]:
    """The architecture of the decoder in the checkpoint ``name``, one of `WRAPPERS`, and its fields.

    Raises:
        OctoError: There is no such part, or it is of another family.
    """
    wrapper = WRAPPERS[name]
    text = fields.sub("text_config")
    first = next(iter(wrapper.decoders))
    if text is None and wrapper.flat:
        text, kind = fields, first
    elif text is None:
        raise fields.fail("text_config", f"is missing, though architectures names {quoted(name)}")
    else:
        kind = text.text("model_type") or first
    if kind not in wrapper.decoders:
        kinds = ", ".join(wrapper.decoders)
        raise text.fail("model_type", f"is {quoted(kind)}, and octo-run knows {kinds} in {quoted(name)}")
    meant = {**LEFT_OUT.get(kind, {}), **wrapper.defaults}
    for rope in (text.raw("rope_scaling"), text.raw("rope_parameters")):
        if isinstance(rope, dict) and rope.get("rope_theta") is not None:
            meant.pop("rope_theta", None)
    # What a file says of the whole model holds for its text, too.
    outer = {one: fields.values[one] for one in _OF_THE_WHOLE if fields.raw(one) is not None}
    inner = {one: value for one, value in text.values.items() if value is not None or one not in outer}
    # An answer ends with the tokens of both: newer files name that of a turn in the one place and not in the other.
    named = [at.raw(_ENDS) for at in (fields, text) if at.raw(_ENDS) is not None]
    ends = [one for value in named for one in (value if isinstance(value, list) else [value])]
    # Whether the head is tied either place may say, and wrongly: where it is, a stored head of other values counts.
    said = [at.raw(_TIED) for at in (fields, text) if at.raw(_TIED) is not None]
    tied = next((one for one in said if one is not False), not said)
    values = {**meant, **outer, **inner, _ENDS: ends, _TIED: tied}
    return wrapper.decoders[kind], Fields(fields.path, values, text.prefix)
