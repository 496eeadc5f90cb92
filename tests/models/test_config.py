"""Configuration files: what is understood, and one sentence naming file and field for everything else."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octo_run.errors import OctoError
from octo_run.models.config import (
    GenerationDefaults,
    ModelConfig,
    RopeScaling,
    load_config,
    load_generation_defaults,
    parse_config,
)
from octo_run.models.hub import DEMO_PATH

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "qwen2": LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def parse(family: str = "llama", **changes: Any) -> ModelConfig:
    """The family's small configuration with some fields replaced (``...``: left out)."""
    values = {key: value for key, value in (FAMILIES[family] | changes).items() if value is not ...}
    return parse_config(values, Path("somewhere/config.json"))


def refused(*args: str, **changes: Any) -> str:
    with pytest.raises(OctoError) as error:
        parse(*args, **changes)
    text = str(error.value)
    assert text.startswith("somewhere/config.json: ") and text.endswith(".") and "\n" not in text
    return text


def test_embedded_model() -> None:
    cfg = load_config(DEMO_PATH)
    assert (cfg.architecture, cfg.vocab_size, cfg.num_layers, cfg.head_dim) == ("LlamaForCausalLM", 8192, 8, 128)
    assert cfg.tie_word_embeddings and cfg.dtype == "bfloat16" and cfg.eos_token_ids == (4,)
    assert load_generation_defaults(DEMO_PATH) == GenerationDefaults(eos_token_ids=(4, 2))


def test_defaults_of_left_out_fields() -> None:
    cfg = parse()
    assert cfg.head_dim == 16 and cfg.rope_theta == 10_000.0 and cfg.rope_scaling is None
    assert not cfg.tie_word_embeddings and cfg.bos_token_id is None and cfg.eos_token_ids == ()
    assert parse(num_key_value_heads=...).num_kv_heads == 4
    assert parse(architectures=...).architecture == "LlamaForCausalLM"


def test_of_several_architectures_the_known_one_counts() -> None:
    """That of ``model_type``, if several are known."""
    for names in (
        ["LlamaForCausalLM", "OtherForCausalLM"],
        ["OtherForCausalLM", "LlamaForCausalLM"],
        ["Qwen2ForCausalLM", "LlamaForCausalLM"],
    ):
        assert parse(architectures=names).architecture == "LlamaForCausalLM"
    assert parse(architectures=names, model_type=...).architecture == "Qwen2ForCausalLM"


def test_families_differ_in_biases_and_norms() -> None:
    def marks(cfg: ModelConfig) -> tuple[bool, bool, bool, bool]:
        return cfg.qkv_bias, cfg.o_bias, cfg.mlp_bias, cfg.qk_norm

    assert marks(parse()) == marks(parse("mistral")) == (False, False, False, False)
    assert marks(parse("qwen2")) == (True, False, False, False)
    assert marks(parse("qwen3")) == (False, False, False, True)
    assert marks(parse(attention_bias=True, mlp_bias=True)) == (True, True, True, False)
    assert marks(parse("qwen3", attention_bias=True)) == (True, True, False, True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama-3.1-8B-Instruct", {"num_kv_heads": 8, "head_dim": 128, "eos_token_ids": (128001, 128008, 128009)}),
        ("Llama-3.2-1B-Instruct", {"head_dim": 64, "tie_word_embeddings": True, "rope_theta": 500000.0}),
        ("Meta-Llama-3-8B-Instruct", {"max_position_embeddings": 8192, "rope_scaling": None}),
        ("Mistral-7B-v0.1", {"sliding_window": 4096, "vocab_size": 32000, "head_dim": 128}),
        ("Qwen2-1.5B-Instruct", {"qkv_bias": True, "o_bias": False, "sliding_window": None, "num_kv_heads": 2}),
        ("Qwen2.5-7B-Instruct", {"num_heads": 28, "num_kv_heads": 4, "tie_word_embeddings": False}),
        ("Qwen3-0.6B", {"qk_norm": True, "head_dim": 128, "num_heads": 16, "hidden_size": 1024}),
        ("SmolLM2-135M", {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64}),
    ],
)
def test_published_configurations(shared_dir: Path, name: str, expected: dict[str, Any]) -> None:
    path = shared_dir / "data" / "configs" / f"{name}.config.json"
    cfg = parse_config(json.loads(path.read_text()), path)
    assert {field: getattr(cfg, field) for field in expected} == expected


def test_published_llama31_scaling(shared_dir: Path) -> None:
    path = shared_dir / "data" / "configs" / "Llama-3.1-8B-Instruct.config.json"
    assert parse_config(json.loads(path.read_text()), path).rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def test_rope_scaling_old_and_new_form() -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 512)
    assert parse(rope_theta=5e5, rope_scaling=LLAMA3).rope_scaling == scaling
    new = parse(rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    assert (new.rope_theta, new.rope_scaling) == (5e5, scaling)
    assert parse(rope_scaling={"type": "linear", "factor": 2.5}).rope_scaling == RopeScaling("linear", 2.5)
    assert parse(rope_scaling={"rope_type": "default"}).rope_scaling is None
    assert parse(rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope_theta == 7.0
    assert parse(rope_scaling=None).rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "beta_fast": 1.0}}, "beta_fast (1) is not greater than beta_slow (1)"),
        ({"rope_scaling": {"type": "other", "factor": 4.0}}, "is 'other'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.short_factor is no list of 8 numbers"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "is 'proportional', which this family has not"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.rope_type is missing"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor is 0.5, not a number from 1 to"),
        ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}}, "low_freq_factor is missing"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor (1) is not greater than"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings is 0"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', not an object"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, "are both given and differ"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "contradicts rope_theta"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one rotary embedding for all layers"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
    ],
)
def test_rope_refusals(changes: dict[str, Any], words: str) -> None:
    assert words in refused(**changes)


@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ],
)
def test_missing_fields(field: str) -> None:
    assert f"{field} is missing" in refused(**{field: ...})


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"architectures": ["FooForCausalLM"]}, "architectures names 'FooForCausalLM'"),
        ("llama", {"architectures": ..., "model_type": "foo"}, "model_type is 'foo'"),
        ("llama", {"architectures": ..., "model_type": ...}, "architectures is missing, and so is model_type"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "not a list of names"),
        ("llama", {"architectures": ["LlamaForCausalLM", 3]}, "not a list of names"),
        ("llama", {"architectures": ["OtherForCausalLM", "FooForCausalLM"]}, "architectures names 'OtherForCausalLM'"),
        ("llama", {"model_type": "mistral"}, "model_type is 'mistral', which contradicts architectures"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads (4) is no multiple of num_key_value_heads (3)"),
        ("qwen2", {"num_key_value_heads": ...}, "no multiple of num_key_value_heads (32, which is left out)"),
        ("llama", {"head_dim": 15}, "head_dim is 15, which is odd"),
        ("llama", {"hidden_size": 63}, "hidden_size (63) is no multiple of num_attention_heads (4)"),
        ("llama", {"hidden_size": "64"}, "hidden_size is '64', not a whole number"),
        ("llama", {"hidden_size": 64.0}, "hidden_size is 64.0"),
        ("llama", {"hidden_size": True}, "hidden_size is True"),
        ("llama", {"vocab_size": 0}, "vocab_size is 0"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps is 1"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', not true or false"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, not true or false"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and octo-run computes silu, swish, gelu"),
        ("llama", {"hidden_act": 3}, "hidden_act is 3, not a text"),
        ("llama", {"quantization_config": {"quant_method": "hqq"}}, "quantized (hqq), which cannot be loaded: take"),
        ("llama", {"layer_types": ["sliding_attention"] * 2}, "layer_types holds 'sliding_attention'"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types is no list of num_hidden_layers (2) names"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
        ("llama", {"eos_token_id": 1000}, "eos_token_id holds 1000, which is no token id below 1000"),
        ("llama", {"eos_token_id": [1, "2"]}, "eos_token_id holds '2'"),
        ("llama", {"bos_token_id": -2}, "bos_token_id is -2"),
        ("llama", {"torch_dtype": "float8"}, "dtype is 'float8', not one of bfloat16, float16, float32"),
    ],
)
def test_refusals(family: str, changes: dict[str, Any], words: str) -> None:
    assert words in refused(family, **changes)


def test_sliding_window() -> None:
    assert parse("mistral", sliding_window=512).sliding_window == 512
    assert parse("mistral", sliding_window=2048).sliding_window is None
    assert parse("mistral").sliding_window is None
    assert parse("mistral", sliding_window=..., max_position_embeddings=8192).sliding_window == 4096
    assert parse("qwen2", sliding_window=512, use_sliding_window=False).sliding_window is None
    assert parse(sliding_window=512).sliding_window is None  # Llama has no such field
    # Mistral's window is there whatever layer_types says; Qwen's layers are of the kinds it lists.
    assert parse("mistral", sliding_window=512, layer_types=["full_attention"] * 2).sliding_window == 512
    switched = {"sliding_window": 512, "use_sliding_window": True}
    assert parse("qwen2", **switched, max_window_layers=1).sliding_window == 512
    assert parse("qwen2", **switched, max_window_layers=2).sliding_window is None
    assert parse("qwen3", **switched, layer_types=["full_attention"] * 2).sliding_window is None
    assert parse("qwen3", **switched, layer_types=["full_attention", "sliding_attention"]).sliding_window == 512


def test_token_ids_and_dtype() -> None:
    cfg = parse(eos_token_id=[5, 6, 5], bos_token_id=1, dtype="float32")
    assert (cfg.eos_token_ids, cfg.bos_token_id, cfg.dtype) == ((5, 6), 1, "float32")
    assert parse(torch_dtype="torch.float16").dtype == "float16"
    assert parse().dtype == "bfloat16"


def test_minus_one_is_no_token() -> None:
    cfg = parse(eos_token_id=-1, bos_token_id=-1, pad_token_id=-1)
    assert (cfg.eos_token_ids, cfg.bos_token_id) == ((), None)
    assert parse(eos_token_id=[7, -1]).eos_token_ids == (7,)


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        # float32 breaks: infinite, 0, or all logits equal
        ("rms_norm_eps", [1e39, 1e10, 5e-324, 1e-39, 0, -1e-5, float("inf"), 10**400]),
        ("rope_theta", [5e-324, 1e-30, 0.5, 1e31, 1e308, 10**400]),
        ("rope_scaling", [{"type": "linear", "factor": 1e39}, {"type": "linear", "factor": 10**400}]),
        ("rope_scaling", [LLAMA3 | {"factor": 1e39}, LLAMA3 | {"low_freq_factor": 1e-320}]),
        ("rope_scaling", [LLAMA3 | {"high_freq_factor": 1e39}, LLAMA3 | {"original_max_position_embeddings": 2**40}]),
        ("rope_parameters", [{"rope_type": "default", "rope_theta": 5e-324}]),
        ("partial_rotary_factor", [5e-324, 1e300]),
        # no machine holds or computes these
        ("head_dim", [2**30, 4098]),
        ("num_hidden_layers", [10**6]),
        ("max_position_embeddings", [2**31, 10**400]),
    ],
)
def test_numbers_with_which_arithmetic_breaks(field: str, bad: list[Any]) -> None:
    for value in bad:
        assert field in refused(**{field: value})


def test_arithmetic_works_at_the_limits() -> None:
    """Norms and rotary frequencies stay finite and positive at the ends of what is accepted."""
    import torch

    from octo_run.kernels.step.reference import normed
    from octo_run.models import rope

    for eps in (2.0**-126, 1.0):
        cfg = parse(rms_norm_eps=eps)
        for x in (torch.zeros(1, 64), torch.full((1, 64), 1e4)):
            assert normed(x, torch.ones(64), cfg.rms_norm_eps).isfinite().all()
    linear = [{"type": "linear", "factor": factor} for factor in (1.0, 1e6)]
    ends = [(1e-6, 2e-6), (1e-6, 1e6), (9e5, 1e6)]
    llama3 = [LLAMA3 | {"factor": 1e6, "low_freq_factor": low, "high_freq_factor": high} for low, high in ends]
    for theta in (1.0, 1e30):
        for scaling in (None, *linear, *llama3):
            freq = rope.inverse_frequencies(parse(rope_theta=theta, rope_scaling=scaling), torch.device("cpu"))
            assert freq.isfinite().all() and (freq > 0).all() and freq.max() <= 1.0


JUNK = [[], {}, [[]], {"a": 1}, "x", "\x1b[31m" * 1000, True, -3, 1.5, float("nan"), 10**400, ["x" * 5000], [{}] * 99]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_field_with_every_kind_of_value(family: str) -> None:
    """Lists, objects, texts and huge numbers anywhere: a configuration or one short sentence."""
    rope_fields = [*LLAMA3, "type", "rope_theta", "partial_rotary_factor"]
    names = [*FAMILIES[family], "architectures", "attention_bias", "mlp_bias", "head_dim", "rope_theta", "rope_scaling",
             "rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "dtype",
             "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id", "quantization_config",
             "original_max_position_embeddings"]  # fmt: skip
    changes = [{name: value} for name in names for value in JUNK]
    changes += [{"rope_scaling": LLAMA3 | {name: value}} for name in rope_fields for value in JUNK]
    changes += [{"rope_parameters": {"rope_type": "default", "\x1b]52;" * 99: value}} for value in JUNK]
    changes += [{"quantization_config": {"quant_method": value}} for value in JUNK]
    changes += [{"layer_types": [value] * 2, "use_sliding_window": True} for value in JUNK]
    for change in changes:
        try:
            parse(family, **change)
        except OctoError as error:
            text = str(error)
            assert text.startswith("somewhere/config.json: ") and text.endswith(".")
            assert len(text) <= 300 and text.isprintable(), text


def test_long_numbers_in_the_file(tmp_path: Path) -> None:
    for digits, words in ((400, "vocab_size is 9"), (5000, "is not valid JSON")):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA).replace("1000", "9" * digits))
        with pytest.raises(OctoError, match=words):
            load_config(tmp_path)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_left_out_and_null_fields_mean_what_they_mean_to_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    base = FAMILIES[family] | {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 32, "hidden_size": 64}
    variants: list[dict[str, Any]] = [{name: ...} for name in ("num_key_value_heads", "head_dim", "rms_norm_eps")]
    variants += [{"hidden_act": ...}, {"sliding_window": ...}, {"sliding_window": 100}]
    variants += [{"sliding_window": None}, {"use_sliding_window": True, "sliding_window": 64}]
    variants += [
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": value} for value in (64, None, ...)
    ]
    variants += [{"attention_bias": True, "mlp_bias": True}, {"rope_scaling": {}, "rope_parameters": None}]
    variants += [{"rope_scaling": LLAMA3, "rope_theta": 5e5, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}}]
    variants += [{"rope_scaling": {key: value for key, value in LLAMA3.items() if not key.startswith("original")}}]
    variants += [
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 256},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"architectures": []},
    ]
    if family != "mistral":  # whose configuration the library refuses
        variants.append({"num_key_value_heads": None})
    for change in variants:
        values = {key: value for key, value in (base | change).items() if value is not ...}
        ours = parse_config(values, Path("somewhere/config.json"))
        theirs = getattr(transformers, FAMILIES[family]["architectures"][0].replace("ForCausalLM", "Config"))(
            **copy.deepcopy(values)
        )
        assert ours.hidden_act == theirs.hidden_act and ours.rms_norm_eps == theirs.rms_norm_eps, change
        assert (ours.num_kv_heads, ours.head_dim) == (
            theirs.num_key_value_heads,
            getattr(theirs, "head_dim", 64 // 32),
        ), change
        assert (
            ours.o_bias == getattr(theirs, "attention_bias", False) if family in ("llama", "qwen3") else not ours.o_bias
        )
        rope, scaling = theirs.rope_parameters, ours.rope_scaling
        assert ours.rope_theta == rope["rope_theta"], change
        assert (scaling.kind if scaling else "default") == rope["rope_type"], change
        if scaling is not None and scaling.kind == "llama3":
            assert scaling.original_max_position_embeddings == rope["original_max_position_embeddings"], change
        window = None if family == "llama" else theirs.sliding_window
        if family in ("qwen2", "qwen3") and "sliding_attention" not in theirs.layer_types:
            window = None
        assert ours.sliding_window == (window if window is not None and window < 2048 else None), change


def test_rope_scaling_beside_rope_parameters() -> None:
    """Two spellings of one meaning are no contradiction; two meanings are."""
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 512)
    old_type = {("type" if key == "rope_type" else key): value for key, value in LLAMA3.items()}
    new = LLAMA3 | {"rope_theta": 5e5}
    for old in (LLAMA3, old_type, old_type | {"rope_type": "llama3"}, new, LLAMA3 | {"factor": 8}, None, {}):
        cfg = parse(rope_theta=5e5, rope_scaling=old, rope_parameters=new)
        assert (cfg.rope_theta, cfg.rope_scaling) == (5e5, scaling)
    assert parse(rope_scaling=None, rope_parameters={"rope_type": "default"}).rope_scaling is None
    differ = "are both given and differ"
    assert differ in refused(rope_scaling=LLAMA3 | {"factor": 4.0}, rope_parameters=LLAMA3)
    assert differ in refused(rope_scaling=LLAMA3, rope_parameters=new)  # one says 10,000, the other 500,000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not (valid JSON|UTF-8 text)"),
        (b"{", "is not (valid JSON|UTF-8 text)"),
        (b"\xff\xfe", "is not (valid JSON|UTF-8 text)"),
        (b"[1]", "holds a JSON list where an object is needed"),
        (b"[" * 100_000, "is not (valid JSON|UTF-8 text)"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(OctoError, match=words) as error:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(OctoError, match=r"has no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(OctoError, match="no regular file"):
        load_config(tmp_path)


def test_same_fields_as_transformers_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    scaling = LLAMA3 | {"rope_theta": 5e5}
    theirs = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, rope_parameters=scaling
    )
    theirs.save_pretrained(tmp_path)
    cfg = load_config(tmp_path)
    assert (cfg.head_dim, cfg.num_kv_heads, cfg.rope_theta) == (32, 2, 5e5)
    assert cfg.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 512)
    for name, kind in (("Qwen2Config", "qwen2"), ("Qwen3Config", "qwen3"), ("MistralConfig", "mistral")):
        getattr(transformers, name)(num_hidden_layers=2).save_pretrained(tmp_path / kind)
        assert load_config(tmp_path / kind).num_layers == 2


def test_generation_defaults(tmp_path: Path, shared_dir: Path) -> None:
    assert load_generation_defaults(tmp_path) == GenerationDefaults()
    source = shared_dir / "data" / "configs" / "Qwen2-1.5B-Instruct.generation_config.json"
    (tmp_path / "generation_config.json").write_bytes(source.read_bytes())
    assert load_generation_defaults(tmp_path) == GenerationDefaults(
        do_sample=True, temperature=0.5, top_k=40, top_p=0.7, repetition_penalty=1.1, eos_token_ids=(151645, 151643)
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 1.5}, "top_p is 1.5, not a number from 0 to 1"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": 10**400}, "top_k is 1"),
        ({"temperature": 1e39}, "temperature is 1e+39, not 0 or a number from"),
        ({"temperature": 1e-46}, "temperature is 1e-46, not 0 or a number from"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty is 1e-46, not a number from"),
        ({"repetition_penalty": 1e39}, "repetition_penalty is 1e+39, not a number from"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"eos_token_id": [[]]}, "eos_token_id holds []"),
        ({"eos_token_id": {"\x1b": "x" * 5000}}, "eos_token_id holds {"),
        ({"min_p": True}, "min_p is True"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
        ({"eos_token_id": -3}, "eos_token_id holds -3"),
    ],
)
def test_generation_refusals(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(OctoError) as error:
        load_generation_defaults(tmp_path)
    assert words in str(error.value) and "generation_config.json" in str(error.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"top_k": -1}, GenerationDefaults()),
        ({"top_p": 0.0}, GenerationDefaults(top_k=1)),
        ({"top_p": 0, "top_k": 50, "min_p": 0.1}, GenerationDefaults(top_k=1)),
        ({"min_p": 1.0}, GenerationDefaults(top_k=1)),
        ({"temperature": 0}, GenerationDefaults(temperature=0.0)),
        ({"eos_token_id": -1, "pad_token_id": -1, "bos_token_id": -1}, GenerationDefaults()),
        ({"eos_token_id": [-1, 3]}, GenerationDefaults(eos_token_ids=(3,))),
    ],
)
def test_generation_values_for_off_and_for_one(
    tmp_path: Path, values: dict[str, Any], expected: GenerationDefaults
) -> None:
    from octo_run.engine.sampling import SamplingParams

    (tmp_path / "generation_config.json").write_text(json.dumps(values | {"do_sample": True}))
    found = load_generation_defaults(tmp_path)
    assert found == replace(expected, do_sample=True)
    SamplingParams.from_defaults(found)  # what the file may say, the sampler takes


def test_top_p_0_is_the_most_probable_token_as_in_transformers() -> None:
    pytest.importorskip("transformers")
    import torch
    from transformers.generation.logits_process import MinPLogitsWarper, TopPLogitsWarper

    scores = torch.tensor([[0.1, 2.0, 1.9, -1.0]])
    for warper in (TopPLogitsWarper(0.0), MinPLogitsWarper(1.0)):
        assert warper(None, scores).isfinite().tolist() == [[False, True, False, False]]


def test_null_means_left_out(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": null, "top_k": null, "eos_token_id": null}')
    assert load_generation_defaults(tmp_path) == GenerationDefaults()
    assert load_config(make_checkpoint(rope_scaling=None)).rope_scaling is None
