"""Families of models by their configuration files: spellings, fields that are left out, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from octo_run.errors import OctoError
from octo_run.models import rope
from octo_run.models.config import ModelConfig, parse_config
from octo_run.models.families import FAMILIES
from octo_run.models.specs import layer_specs
from octo_run.models.text_parts import LEFT_OUT, WRAPPERS
from octo_run.models.unbuilt import UNBUILT, refusal

FAMILIES_PAGE = Path(__file__).parents[2] / "docs" / "families.md"
SIZES: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 8192,
}  # fmt: skip
FULL = "full_attention"
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


def parse(architecture: str, **fields: Any) -> ModelConfig:
    values = SIZES | {"architectures": [architecture]} | fields
    values = {name: value for name, value in values.items() if value is not ...}
    return parse_config(values, Path("somewhere/config.json"))


def refused(architecture: str, **fields: Any) -> str:
    with pytest.raises(OctoError) as error:
        parse(architecture, **fields)
    text = str(error.value)
    assert text.startswith("somewhere/config.json: ") and text.endswith(".") and "\n" not in text
    return text


GRANITE_4 = {"shared_intermediate_size": 128, "num_local_experts": 0}


@pytest.mark.parametrize(
    ("architecture", "older", "newer"),
    [
        (
            "Gemma3ForCausalLM",
            {
                "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "sliding_window": 1024, "sliding_window_pattern": 6,
            },
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
                "sliding_window": 1024, "layer_types": [*["sliding_attention"] * 5, "full_attention",
                                                        *["sliding_attention"] * 2],
            },
        ),
        ("Gemma3ForCausalLM", {}, {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
        ("Qwen2ForCausalLM", {"rope_theta": 1e6, "rope_scaling": YARN},
         {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 1e6}}),
        ("Qwen3ForCausalLM", {"rope_scaling": YARN}, {"rope_scaling": YARN | {"beta_fast": 32, "beta_slow": 1}}),
        ("Olmo3ForCausalLM", {"rope_theta": 5e5, "rope_scaling": YARN},
         {"rope_parameters": {"full_attention": YARN | {"rope_type": "yarn", "rope_theta": 5e5},
                              "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}}),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "su", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}},
         {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}}),
        ("Glm4ForCausalLM", {"head_dim": 64}, {"head_dim": 64, "partial_rotary_factor": 0.5}),
        ("Gemma4ForCausalLM", {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "layer_types": None},
         {"attention_k_eq_v": True, "per_layer_config": {str(one): {"head_dim": 512, "num_key_value_heads": 1}
                                                         for one in (5, 7)},
          "layer_types": [*["sliding_attention"] * 5, FULL, "sliding_attention", "sliding_attention"],
          "rope_parameters": {
              FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
              "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
        ("Qwen2ForCausalLM", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {}),
        # What newer files say of the kinds of layers wins over what older ones say beside it.
        (
            "Gemma3ForCausalLM",
            {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
        ("Gemma3ForCausalLM", {"rope_local_base_freq": 2e4, "rope_parameters": {FULL: {"rope_theta": 1e6}}},
         {"rope_theta": 1e6, "rope_local_base_freq": 2e4}),
        ("Gemma3ForCausalLM", {"rope_parameters": {FULL: {"rope_theta": 2e6}}}, {"rope_theta": 2e6}),
        ("Gemma3ForCausalLM",
         {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_parameters": {
             FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
         {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("Gemma4ForCausalLM", {"rope_parameters": {
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}}, {}),
        ("Gemma4ForCausalLM", {"rope_scaling": {}}, {}),
        ("Gemma4ForCausalLM", {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {
            "rope_type": "proportional", "partial_rotary_factor": 0.25}}, {}),
        ("Qwen3ForCausalLM", {"rope_scaling": {"factor": 1.0}}, {}),
        ("Qwen3ForCausalLM", {"rope_scaling": {"mrope_section": [8, 12, 12]}}, {}),
        ("Qwen3MoeForCausalLM", {"use_sliding_window": True, "sliding_window": None}, {}),
        ("Qwen3MoeForCausalLM", {"num_experts": 0}, {"num_local_experts": 0}),
        ("Qwen2MoeForCausalLM", {}, {"qkv_bias": True}),
        ("GemmaForCausalLM", {"hidden_act": "gelu", "hidden_activation": None}, {"hidden_act": "gelu_pytorch_tanh"}),
        ("LlamaForCausalLM", {"model_type": "internlm3"}, {"architectures": ["InternLM3ForCausalLM"]}),
        ("SmolLM3ForCausalLM", {}, {"no_rope_layers": [1, 1, 1, 0] * 2, "rope_theta": 2e6}),
    ],
)  # fmt: skip
def test_two_spellings_of_one_model(architecture: str, older: dict[str, Any], newer: dict[str, Any]) -> None:
    assert parse(architecture, **older) == parse(architecture, **newer)


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "context", "scaling", "longest"),
    [
        # As model cards have it added.
        ("Qwen2ForCausalLM", 32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ("Qwen3ForCausalLM", 40960, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ("Qwen3ForCausalLM", 32768, {"type": "yarn", "factor": 4.0}, 131072),
        ("Qwen3ForCausalLM", 32768, {"type": "yarn", "factor": 1e6}, 2**31 - 1),
        ("LlamaForCausalLM", 4096, {"type": "linear", "factor": 4.0}, 16384),
        ("LlamaForCausalLM", 4096, {"type": "dynamic", "factor": 4.0}, 4096),
        # Published scaled.
        ("LlamaForCausalLM", 163840, {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, 163840),
        ("LlamaForCausalLM", 16384, {"type": "linear", "factor": 4, "original_max_position_embeddings": 4096}, 16384),
        ("LlamaForCausalLM", 131072, LLAMA3, 131072),
        ("Gemma3ForCausalLM", 131072, {"rope_type": "linear", "factor": 8.0}, 131072),
        ("GptOssForCausalLM", 131072, {"type": "yarn", "factor": 32, "original_max_position_embeddings": 4096}, 131072),
        ("Olmo3ForCausalLM", 65536, {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}, 65536),
        ("Ministral3ForCausalLM", 262144, None, 262144),
        ("Phi3ForCausalLM", 131072, {"type": "longrope", "factor": 32.0, "short_factor": [1.0] * 32,
                                     "long_factor": [2.0] * 32, "original_max_position_embeddings": 8192}, 131072),
    ],
)  # fmt: skip
def test_the_longest_context(architecture: str, context: int, scaling: dict[str, Any] | None, longest: int) -> None:
    fields = {"num_local_experts": 4, "num_experts_per_tok": 2} if architecture.startswith("GptOss") else {}
    cfg = parse(architecture, max_position_embeddings=context, rope_scaling=scaling, head_dim=64, **fields)
    assert (cfg.max_position_embeddings, cfg.context_limit) == (context, longest)


def test_a_window_as_long_as_the_unscaled_context_stays() -> None:
    window = {"use_sliding_window": True, "max_window_layers": 4, "sliding_window": 8192}
    assert parse("Qwen2ForCausalLM", **window).sliding_window is None
    scaled = parse("Qwen2ForCausalLM", rope_scaling={"type": "yarn", "factor": 4.0}, **window)
    assert [spec.attention.window for spec in layer_specs(scaled)] == [None] * 4 + [8192] * 4


ROPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "yarn": {"rope_scaling": YARN | {"rope_type": "yarn"}, "rope_theta": 1e6},
    "yarn, further": {"rope_scaling": YARN | {"rope_type": "yarn", "beta_fast": 8, "beta_slow": 2, "truncate": False}},
    "yarn, factor": {"rope_scaling": YARN | {"rope_type": "yarn", "attention_factor": 0.7}},
    "yarn, scales": {"rope_scaling": YARN | {"rope_type": "yarn", "mscale": 0.7, "mscale_all_dim": 1.2}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_frequencies_are_those_of_transformers(name: str, head_dim: int) -> None:
    transformers = pytest.importorskip("transformers")
    cfg = parse("Qwen2ForCausalLM", head_dim=head_dim, **ROPES[name])
    theirs = transformers.Qwen2Config(**json.loads(json.dumps(SIZES | ROPES[name])), head_dim=head_dim)
    embedding = transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding(theirs)
    ours = rope.inverse_frequencies(cfg, torch.device("cpu"))
    assert torch.allclose(ours, embedding.inv_freq, rtol=1e-6, atol=0)
    assert rope.attention_factor(cfg.rope) == pytest.approx(embedding.attention_scaling, rel=1e-12)


def test_the_context_chooses_the_factors_of_longrope() -> None:
    """Up to the original context the short ones, for all tokens; beyond it the long ones."""
    transformers = pytest.importorskip("transformers")
    scaling = {"rope_type": "longrope", "short_factor": [1.0 + i / 99 for i in range(24)],
               "long_factor": [1.0 + i for i in range(24)]}  # fmt: skip
    fields = {"rope_scaling": scaling, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75}
    cfg = parse("Phi3ForCausalLM", **fields)
    theirs = transformers.Phi3Config(**json.loads(json.dumps(SIZES | fields)))
    embedding = transformers.models.phi3.modeling_phi3.Phi3RotaryEmbedding(theirs)
    for count in (4096, 4097):
        embedding(torch.zeros(1, 1), torch.tensor([[count - 1]]))
        ours = rope.frequencies(cfg.rope, 64, torch.device("cpu"), count)
        assert torch.allclose(ours[:24], embedding.inv_freq, rtol=1e-6, atol=0) and bool((ours[24:] == 0).all())
    assert rope.attention_factor(cfg.rope) == pytest.approx(embedding.attention_scaling)


def test_every_causal_language_model_of_transformers_is_read_or_refused_by_a_sentence() -> None:
    """By its own configuration, all of whose fields are left as they are."""
    pytest.importorskip("transformers")
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    said: dict[str, str] = {}
    for model_type, architecture in NAMES.items():
        if isinstance(architecture, str) and architecture not in (*FAMILIES, *WRAPPERS):
            said[architecture] = refused(architecture, model_type=model_type)
            assert f"architectures names '{architecture}', which" in said[architecture]
    assert len(said) > 100
    named = sum("the nearest that it runs is" in text for text in said.values())
    assert named > len(said) * 0.8, f"{named} of {len(said)} say what such a model has, and the nearest that works"
    for model_type, architecture in NAMES.items():
        known = FAMILIES.get(architecture)
        if known is None or known.model_type != model_type:
            continue
        values = json.loads(CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
        if architecture == "GraniteMoeHybridForCausalLM":  # means Mamba layers where nothing is said of them
            with pytest.raises(OctoError, match="which octo-run does not compute here"):
                parse_config(values | {"architectures": [architecture]}, Path("somewhere/config.json"))
            continue
        cfg = parse_config(values | {"architectures": [architecture]}, Path("somewhere/config.json"))
        assert cfg.architecture == architecture


@pytest.mark.parametrize("architecture", [name for name, family in FAMILIES.items() if family.rope.left_out])
def test_rotary_parameters_that_are_left_out_are_those_of_transformers(architecture: str) -> None:
    transformers = pytest.importorskip("transformers")
    values = json.loads(transformers.CONFIG_MAPPING[FAMILIES[architecture].model_type]().to_json_string(use_diff=False))
    assert values["rope_parameters"]
    without = values | {"rope_parameters": None}
    ours, left_out = (parse_config(one | {"architectures": [architecture]}, Path("c")) for one in (values, without))
    assert ours == left_out and (ours.rope_scaling or ours.sliding_rope)


def test_the_nearest_that_is_named_is_there() -> None:
    for words, _, nearest in UNBUILT:
        assert nearest.split(",")[0] in (*FAMILIES, *WRAPPERS) or "distillation" in nearest, words


OF_TEXT = {"Olmoe", "Mixtral", "GraniteMoeHybrid"}


@pytest.mark.few(2)
@pytest.mark.parametrize("architecture", [name for name in FAMILIES if not any(word in name for word in OF_TEXT)])
def test_left_out_fields_mean_what_they_mean_to_transformers(architecture: str) -> None:
    transformers = pytest.importorskip("transformers")
    family = FAMILIES[architecture]
    kind = {value.model_type: value for value in transformers.CONFIG_MAPPING.values()}[family.model_type]
    sizes = {name: SIZES[name] for name in SIZES if name != "num_key_value_heads"} | {
        "num_attention_heads": 160, "hidden_size": 160 * 64,
    }  # fmt: skip
    theirs = kind(**sizes)
    if architecture.startswith("Gemma4"):  # what layers differ in is asked of a layer there
        for index, one in enumerate(layer_specs(parse_config(sizes | {"architectures": [architecture]}, Path("c")))):
            other = theirs.per_layer_config[index]
            assert (one.kv_heads, one.head_dim) == (other.num_key_value_heads, other.head_dim)
        theirs.allow_global_per_layer_attribute_access = True
    ours = parse_config(sizes | {"architectures": [architecture]}, Path("config.json"))
    assert (ours.num_kv_heads, ours.tie_word_embeddings) == (theirs.num_key_value_heads, theirs.tie_word_embeddings)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64)
    assert ours.rms_norm_eps == getattr(theirs, family.eps[0])
    assert ours.hidden_act == getattr(theirs, family.activation[0])
    assert ours.qkv_bias == (getattr(theirs, "attention_bias", False) or getattr(theirs, "qkv_bias", family.qkv_bias))
    kinds = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    for index, spec in enumerate(layer_specs(ours)):
        if spec.kind == "linear_attention":
            assert kinds[index] == "linear_attention"
            continue
        slides = kinds[index] == "sliding_attention" if kinds else family.sliding == "always"
        assert spec.attention.window == (window if slides and window is not None and window < 8192 else None)
        parameters = theirs.rope_parameters
        if "full_attention" in parameters:
            parameters = parameters["sliding_attention" if slides else "full_attention"]
        if spec.rope is not None:
            assert spec.rope.theta == parameters["rope_theta"]
            assert spec.rope.share == parameters.get("partial_rotary_factor", 1.0)


def test_text_parts_of_checkpoints() -> None:
    """Sizes that the text part leaves out are the family's; what the whole says of tokens holds for it, too."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}  # fmt: skip
    values = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text,
              "eos_token_id": [1, 106], "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152}}  # fmt: skip
    cfg = parse_config(values, Path("config.json"))
    assert (cfg.architecture, cfg.wrapper) == ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
    assert (cfg.vocab_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim) == (262_208, 8, 4, 256)
    assert (cfg.max_position_embeddings, cfg.eos_token_ids, cfg.tie_word_embeddings) == (131_072, (1, 106), True)
    kinds = [spec.attention.window for spec in layer_specs(cfg)]
    assert kinds[:7] == [1024] * 5 + [None, 1024] and kinds.count(None) == 5
    assert layer_specs(cfg)[0].rope != layer_specs(cfg)[5].rope
    for wrapper, one in WRAPPERS.items():
        missing = "vocab_size is missing" if one.flat else "text_config is missing, though architectures names"
        with pytest.raises(OctoError, match=rf"config\.json: {missing}"):
            parse_config(values | {"architectures": [wrapper], "text_config": None}, Path("config.json"))
        with pytest.raises(OctoError, match=r"text_config\.model_type is 'bert', and octo-run knows"):
            parse_config(values | {"architectures": [wrapper], "text_config": {"model_type": "bert"}}, Path("c"))
    with pytest.raises(OctoError, match=r"text_config\.hidden_size is missing"):
        parse_config(values | {"text_config": {"model_type": "gemma3_text"}}, Path("config.json"))


TEXT_PARTS = [(wrapper, kind) for wrapper, one in WRAPPERS.items() for kind in one.decoders if kind in LEFT_OUT]


@pytest.mark.parametrize(("wrapper", "kind"), TEXT_PARTS)
def test_what_a_text_part_leaves_out_means_what_it_means_to_transformers(wrapper: str, kind: str) -> None:
    """All fields, where the file must not name sizes; else all others."""
    transformers = pytest.importorskip("transformers")
    whole = {one.model_type: one for one in transformers.CONFIG_MAPPING.values()}[WRAPPERS[wrapper].model_type]
    given = {} if "hidden_size" in LEFT_OUT[kind] else {"num_attention_heads": 64} | {
        name: value for name, value in SIZES.items() if not name.endswith("heads")
    }  # fmt: skip
    for named in (
        ({"model_type": kind}, {}) if kind == next(iter(WRAPPERS[wrapper].decoders)) else [{"model_type": kind}]
    ):
        ours = parse_config({"architectures": [wrapper], "text_config": {**named, **given}}, Path("config.json"))
        theirs = whole(text_config={**named, **given}).text_config
        assert (ours.vocab_size, ours.hidden_size, ours.intermediate_size, ours.num_layers, ours.num_heads) == (
            theirs.vocab_size, theirs.hidden_size, theirs.intermediate_size, theirs.num_hidden_layers,
            theirs.num_attention_heads,
        )  # fmt: skip
        assert ours.num_kv_heads == theirs.num_key_value_heads and ours.rms_norm_eps == theirs.rms_norm_eps
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or ours.hidden_size // ours.num_heads)
        assert ours.max_position_embeddings == theirs.max_position_embeddings
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        window = getattr(theirs, "sliding_window", None) if kind == "mistral" else None
        assert ours.sliding_window == window


@pytest.mark.parametrize(("wrapper", "kind"), TEXT_PARTS)
def test_where_a_text_part_says_the_base_of_its_rope(wrapper: str, kind: str) -> None:
    """Beside the rotary parameters or in them, of either name; where they do not have it, it is left out."""
    transformers = pytest.importorskip("transformers")
    whole = {one.model_type: one for one in transformers.CONFIG_MAPPING.values()}[WRAPPERS[wrapper].model_type]
    inner = {"rope_type": "default", "mrope_section": [8, 12, 12]}
    for fields in (
        {"rope_theta": 7e6, "rope_scaling": inner},
        {"rope_scaling": inner | {"rope_theta": 7e6}},
        {"rope_parameters": inner | {"rope_theta": 7e6}},
        {"rope_parameters": inner},
        {"rope_scaling": inner},
    ):
        text = SIZES | {"model_type": kind, "head_dim": 64} | fields
        ours = parse_config({"architectures": [wrapper], "text_config": text}, Path("config.json"))
        theirs = whole(text_config=json.loads(json.dumps(text))).text_config.rope_parameters
        assert (ours.rope_theta, ours.rope_scaling) == (theirs["rope_theta"], None), fields


def test_a_checkpoint_is_known_by_its_model_type() -> None:
    """Without ``architectures``."""
    for wrapper, one in WRAPPERS.items():
        kind = next(iter(one.decoders))
        text = SIZES | {"model_type": kind, "head_dim": 64}
        more = {"num_experts_per_tok": 2, "num_experts": 4} if "moe" in kind else {}
        cfg = parse_config({"model_type": one.model_type, "text_config": text | more}, Path("config.json"))
        assert (cfg.wrapper, cfg.architecture) == (wrapper, one.decoders[kind])


def test_text_parts_as_published() -> None:
    """Qwen2.5-VL, whose text has no object of its own; LLaVA and Pixtral, which leave sizes out."""
    qwen = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 128000,
        "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_sliding_window": False, "vision_config": {"hidden_size": 1280},
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 152064,
    }  # fmt: skip
    cfg = parse_config(qwen, Path("config.json"))
    assert (cfg.architecture, cfg.hidden_size, cfg.rope_theta, cfg.rope_scaling) == (
        "Qwen2ForCausalLM",
        3584,
        1e6,
        None,
    )
    assert cfg.sliding_window is None and not cfg.tie_word_embeddings and cfg.head_dim == 128
    llava = {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064}
    cfg = parse_config({"architectures": ["LlavaForConditionalGeneration"], "text_config": llava}, Path("config.json"))
    assert (cfg.hidden_size, cfg.num_layers, cfg.vocab_size, cfg.head_dim) == (4096, 32, 32064, 128)
    pixtral = {"head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336, "max_position_embeddings": 1024000,
               "model_type": "mistral", "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
               "rope_theta": 1e9, "sliding_window": None, "vocab_size": 131072}  # fmt: skip
    cfg = parse_config({"architectures": ["LlavaForConditionalGeneration"], "text_config": pixtral}, Path("c"))
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.sliding_window) == (32, 8, None)


@pytest.mark.parametrize(
    ("outer", "inner", "ends"),
    [([1, 106], 1, (1, 106)), (None, 5, (5,)), (7, None, (7,)), (7, [8, 7], (7, 8)), (None, None, ())],
)
def test_an_answer_ends_with_the_tokens_that_either_place_names(outer: Any, inner: Any, ends: tuple[int, ...]) -> None:
    text = SIZES | {"eos_token_id": inner}
    values = {"architectures": ["LlavaForConditionalGeneration"], "text_config": text, "eos_token_id": outer}
    assert parse_config(values, Path("config.json")).eos_token_ids == ends


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [(None, None, True), (True, False, True), (False, True, True), (False, None, False), (None, False, False)],
)
def test_a_head_is_tied_where_either_place_says_so(outer: bool | None, inner: bool | None, tied: bool) -> None:
    """Files say it in one place or the other; if it is wrong, a stored head of other values counts."""
    text = SIZES | {"tie_word_embeddings": inner}
    values = {"architectures": ["LlavaForConditionalGeneration"], "text_config": text, "tie_word_embeddings": outer}
    assert parse_config(values, Path("config.json")).tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("name", "what", "nearest"),
    [
        ("DeepseekV3ForCausalLM", "multi-head latent attention", "DeepSeek-R1 distillation"),
        ("DeepseekVLForConditionalGeneration", "parts beside its text", "LlavaForConditionalGeneration"),
        ("FlexOlmoForCausalLM", "experts in layers whose norms come after", "OlmoeForCausalLM"),
        ("OlmoForCausalLM", "norms without weights", "Olmo2ForCausalLM"),
        ("ModernBertDecoderForCausalLM", "a head with a layer of its own", "Gemma3ForCausalLM"),
        ("PaliGemmaForConditionalGeneration", "prompts whose tokens see each other", "Gemma3ForConditionalGeneration"),
        ("InternVLChatModel", "parts beside its text", "InternVLForConditionalGeneration"),
        ("Qwen2_5OmniModel", "parts beside its text", "Qwen2_5_VLForConditionalGeneration"),
        ("Glm4MoeLiteForCausalLM", "multi-head latent attention", "Glm4ForCausalLM"),
        ("NemotronHForCausalLM", "Mamba layers", "LlamaForCausalLM"),
        ("BambaForCausalLM", "Mamba layers", "GraniteForCausalLM"),
        ("FalconH1ForCausalLM", "Mamba layers", "LlamaForCausalLM"),
        ("T5ForConditionalGeneration", "an encoder", "Gemma3ForCausalLM"),
        ("BertForMaskedLM", "an encoder", "LlamaForCausalLM"),
        ("Gemma4AssistantForCausalLM", "only drafts of another model's tokens", "Gemma4ForCausalLM"),
        ("Gemma3nForCausalLM", "per-layer embeddings", "Gemma4ForCausalLM"),
        ("LlamaForCausalLMEagle3", "only drafts of another model's tokens", "LlamaForCausalLM"),
        ("Qwen3Model", "no head that gives the next token", "Qwen3ForCausalLM"),
        ("Gemma3TextModel", "no head that gives the next token", "Gemma3ForCausalLM"),
        ("Qwen2ForSequenceClassification", "no head that gives the next token", "Qwen2ForCausalLM"),
        ("Qwen2ForProcessRewardModel", "no head that gives the next token", "Qwen2ForCausalLM"),
        ("Qwen2VLModel", "no head that gives the next token", "Qwen2VLForConditionalGeneration"),
        ("MPNetModel", "an encoder", "LlamaForCausalLM"),
        ("Phi4FlashForCausalLM", "Mamba layers", "Phi3ForCausalLM"),
        ("BaichuanForCausalLM", "q, k and v fused", "LlamaForCausalLM"),
        ("Exaone4_5_ForConditionalGeneration", "parts beside its text", "Exaone4ForCausalLM"),
    ],
)
def test_what_is_not_built_is_refused_by_name(name: str, what: str, nearest: str) -> None:
    text = refused(name)
    assert repr(name) in text and what in text and "the nearest that it runs is " in text and nearest in text


@pytest.mark.parametrize("kind", ["deepseek_v3", "olmo", "flex_olmo", "paligemma", "hunyuan_v1_dense"])
def test_a_model_type_is_refused_as_its_architecture_is(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    names = transformers.models.auto.modeling_auto
    every = names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    said = refusal(kind)
    assert "the nearest that it runs is" in said and said == refusal(every[kind])


def test_an_unknown_family_is_told_what_is_known() -> None:
    text = refused("NewForCausalLM")
    assert "which octo-run does not know: docs/families.md lists" in text
    for name in (*FAMILIES, *WRAPPERS):
        assert f"`{name}`" in FAMILIES_PAGE.read_text(), f"docs/families.md says nothing of {name}"


@pytest.mark.parametrize(
    ("architecture", "fields", "words"),
    [
        ("Gemma2ForCausalLM", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu', and octo-run computes"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, not a number from"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": -1}, "attn_logit_softcapping is -1, not a number"),
        ("Gemma3ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types is no list of num_hidden_layers (8)"),
        ("Gemma3ForCausalLM", {"rope_local_base_freq": 0.5}, "rope_local_base_freq is 0.5"),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}, "rope_scaling": YARN},
            "rope_scaling and rope_parameters.full_attention are both given and differ",
        ),
        ("Gemma4ForCausalLM", {"enable_moe_block": True}, "num_experts is missing"),
        (
            "Gemma4ForCausalLM",
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5, "moe_intermediate_size": 64},
            "top_k_experts is 5, more than the 4 experts that there are",
        ),
        ("Gemma4ForCausalLM", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention is not 'vision'"),
        ("Gemma4ForCausalLM", {"global_head_dim": 65}, "global_head_dim is 65, which is odd"),
        (
            "Gemma4ForCausalLM",
            {"num_global_key_value_heads": 3, "attention_k_eq_v": True},
            "num_global_key_value_heads is 3, and num_attention_heads (4) is no multiple of it",
        ),
        ("Gemma4ForCausalLM", {"num_kv_shared_layers": 4}, "leaves no layer of the kind full_attention with keys"),
        ("Gemma4ForCausalLM", {"num_kv_shared_layers": 8}, "leaves no layer of the kind"),
        ("Gemma4ForCausalLM", {"vocab_size_per_layer_input": 10}, "(10) is less than vocab_size (1000)"),
        ("Gemma4ForCausalLM", {"per_layer_config": {"8": {}}}, "per_layer_config.'8' is no number of a layer"),
        (
            "Gemma4ForCausalLM",
            {"per_layer_config": {"1": {"hidden_size": 3}}},
            "per_layer_config.1.'hidden_size' is nothing that octo-run lets layers differ in",
        ),
        (
            "Gemma4ForCausalLM",
            {"per_layer_config": {"7": {"head_dim": 32}}, "num_kv_shared_layers": 1, "layer_types": [FULL] * 8},
            "num_kv_shared_layers lets layer 7 see keys of 6, whose heads differ",
        ),
        ("GraniteForCausalLM", {"logits_scaling": 0}, "logits_scaling is 0"),
        ("GraniteMoeHybridForCausalLM", GRANITE_4, "layer_types is missing, which means Mamba layers"),
        (
            "GraniteMoeHybridForCausalLM",
            GRANITE_4 | {"layer_types": ["attention", "mamba"] * 4},
            "not compute Mamba layers",
        ),
        (
            "GraniteMoeHybridForCausalLM",
            GRANITE_4 | {"layer_types": ["attention"] * 8, "num_local_experts": 8},
            "num_local_experts is not 0",
        ),
        ("CohereForCausalLM", {"use_qk_norm": True}, "use_qk_norm is true"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 2]}, "no_rope_layers is no list of num_hidden_layers (8)"),
        ("SmolLM3ForCausalLM", {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window is true"),
        ("Glm4ForCausalLM", {"partial_rotary_factor": 0.001}, "leaves no pair of coordinates to turn"),
        (
            "Phi3ForCausalLM",
            {"partial_rotary_factor": 0.4, "rope_scaling": {"type": "su"}},
            "partial_rotary_factor is 0.4, so 25 coordinates turn, and 'longrope' is not defined for an odd number",
        ),
        ("Glm4ForCausalLM", {"partial_rotary_factor": 0.3, "rope_scaling": YARN, "head_dim": 64}, "so 19 coordinates"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "no list of 32 numbers"),
        (
            "Phi3ForCausalLM",
            {"rope_scaling": {"type": "longrope", "short_factor": [0.0] * 32, "long_factor": [1.0] * 32}},
            "short_factor holds 0.0, not a number from",
        ),
        ("Qwen2ForCausalLM", {"rope_scaling": {"type": "other", "factor": 2.0}}, "is 'other', and octo-run"),
        ("Qwen3_5ForCausalLM", {"hidden_act": "gelu_pytorch_tanh"}, "computes recurrent layers with silu only"),
        ("Qwen3NextForCausalLM", {"hidden_act": "gelu_pytorch_tanh"}, "computes recurrent layers with silu only"),
        ("Qwen2ForCausalLM", {"rope_scaling": {"factor": 2.0}}, "rope_type is missing, though the factor is 2"),
        ("Qwen3MoeForCausalLM", {"use_sliding_window": True}, "use_sliding_window is true"),
        ("InternLM3ForCausalLM", {"qkv_bias": True}, "qkv_bias is true"),
        ("IQuestCoderForCausalLM", {"clip_qkv": 8.0}, "clip_qkv is set"),
        ("IQuestCoderForCausalLM", {"use_sliding_window": True}, "use_sliding_window is true"),
    ],
)
def test_refusals(architecture: str, fields: dict[str, Any], words: str) -> None:
    assert words in refused(architecture, **fields)


JUNK = [[], {}, [[]], {"a": 1}, "x", "\x1b[31m" * 1000, True, -3, 1.5, float("nan"), 10**400, [{}] * 99, None]


@pytest.mark.few(2)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_field_with_every_kind_of_value(architecture: str) -> None:
    """A configuration or one short sentence."""
    names = [
        "rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "partial_rotary_factor",
        "sliding_window", "sliding_window_pattern", "layer_types", "query_pre_attn_scalar", "attn_logit_softcapping",
        "final_logit_softcapping", "hidden_activation", "hidden_act", "embedding_multiplier", "logits_scaling",
        "residual_multiplier", "attention_multiplier", "logit_scale", "no_rope_layers", "no_rope_layer_interval",
        "attention_out_bias", "layer_norm_eps", "original_max_position_embeddings", "head_dim", "use_qk_norm",
        "global_head_dim", "num_global_key_value_heads", "per_layer_config", "num_kv_shared_layers",
        "hidden_size_per_layer_input", "vocab_size_per_layer_input", "use_double_wide_mlp", "attention_k_eq_v",
        "enable_moe_block", "use_bidirectional_attention",
    ]  # fmt: skip
    inner = [*YARN, "mscale", "mscale_all_dim", "attention_factor", "truncate", "beta_fast", "beta_slow",
             "short_factor", "long_factor", "llama_4_scaling_beta", "rope_theta", "partial_rotary_factor"]  # fmt: skip
    changes: list[dict[str, Any]] = [{name: value} for name in names for value in JUNK]
    changes += [{"rope_scaling": YARN | {name: value}} for name in inner for value in JUNK]
    changes += [{"rope_parameters": {"full_attention": value, "sliding_attention": value}} for value in JUNK]
    for change in changes:
        try:
            cfg = parse(architecture, **change)
        except OctoError as error:
            text = str(error)
            assert text.startswith("somewhere/config.json: ") and text.endswith(".") and text.isprintable()
        else:
            for spec in layer_specs(cfg):
                frequencies = rope.frequencies(spec.rope, spec.head_dim, torch.device("cpu"), cfg.context_limit)
                assert frequencies.isfinite().all() and frequencies.min() >= 0


def test_a_pattern_of_windows_that_is_spelt_out() -> None:
    """L sees the window, G all; the last layer sees all in any case. What layer_types says comes first."""
    sliding = "sliding_attention"
    fields = {"sliding_window": 1024, "num_key_value_heads": 2}
    numbered = parse("Exaone4ForCausalLM", sliding_window_pattern=4, **fields)
    assert parse("Exaone4ForCausalLM", sliding_window_pattern="LLLG", **fields) == numbered
    assert numbered.layer_types == ((sliding,) * 3 + (FULL,)) * 2
    odd = parse("Exaone4ForCausalLM", sliding_window_pattern="LLG", **fields)
    assert odd.layer_types == (sliding, sliding, FULL, sliding, sliding, FULL, sliding, FULL)
    named = fields | {"layer_types": [FULL, *[sliding] * 7]}
    assert parse("Exaone4ForCausalLM", sliding_window_pattern="LLLG", **named).layer_types == (FULL, *[sliding] * 7)
    assert parse("Exaone4ForCausalLM", sliding_window_pattern="LLLG", sliding_window=None).layer_types == ()
    for wrong in ("LLXG", "", "lllg"):
        assert "no number and no text of the letters L and G" in refused(
            "Exaone4ForCausalLM", sliding_window_pattern=wrong, **fields
        )
    assert "not a whole number" in refused("Gemma3ForCausalLM", sliding_window_pattern="LLLG", sliding_window=1024)
