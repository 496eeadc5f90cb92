"""``config.json`` and ``generation_config.json``: read, checked, and turned into frozen descriptions.

Nothing here imports torch. Field meanings follow the Hugging Face configuration files of the families below; every
problem is one :class:`~octo_run.errors.OctoError` that names the file and the field.

A field that is left out means what it means to the transformers library, whose defaults differ between families; but
the sizes without which a file describes no model are required. A field that the library knows not of is passed over:
were there tensors to it, they would be unexpected.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octo_run.errors import OctoError, quoted, shown
from octo_run.models.fields import Fields
from octo_run.models.foreign import present, read_json_object
from octo_run.models.quantisation.config import MODELOPT_NAME, Quantisation, parse_quantisation

CONFIG_NAME = "config.json"
#: What `--conditioning` takes: nothing, means alone, means and matrices (`models.conditioning`).
CONDITIONINGS = ("off", "mean", "full")
#: What `--head` takes: the embedding and the output head as they are, or packed (`models.quantisation.schemes`).
HEADS = ("bf16", "int8")
GENERATION_CONFIG_NAME = "generation_config.json"
DTYPES = ("bfloat16", "float16", "float32")
_MAX_LAYERS = 4096
_MAX_HEAD_DIM = 4096
# Numbers with which float32 arithmetic works: outside, something is 0, infinite or not a number, or all logits agree.
_EPS = (2.0**-126, 1.0)  # from the smallest normal number on: GPUs take smaller ones for 0
_THETA = (1.0, 1e30)
_FACTOR = (1.0, 1e6)
_FREQ_FACTOR = (1e-6, 1e6)
_TEMPERATURE = (1e-10, 1e10)  # or 0
_PENALTY = (1e-3, 1e3)
_DEFAULT_EPS = 1e-6
_DEFAULT_THETA = 10_000.0
_DEFAULT_WINDOW = 4096
_DEFAULT_WINDOW_LAYERS = 28


@dataclass(frozen=True)
class Family:
    """What an architecture name settles that its ``config.json`` does not say."""

    model_type: str
    attention_bias_field: bool = False
    """``attention_bias`` is a field of this family (for q, k, v and o alike)."""
    qkv_bias: bool = False
    mlp_bias_field: bool = False
    qk_norm: bool = False
    sliding: str = "none"
    """``none``: never; ``always``: wherever ``sliding_window`` is set; ``switch``: only with ``use_sliding_window``."""
    kv_heads: int | None = None
    """``num_key_value_heads`` where the field is left out; None, and the field's null: ``num_attention_heads``."""
    head_dim: int | None = None
    """``head_dim`` where the field is left out; None: ``hidden_size / num_attention_heads``."""


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", attention_bias_field=True, mlp_bias_field=True),
    "MistralForCausalLM": Family("mistral", sliding="always", kv_heads=8),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, sliding="switch", kv_heads=32),
    "Qwen3ForCausalLM": Family(
        "qwen3", attention_bias_field=True, qk_norm=True, sliding="switch", kv_heads=32, head_dim=128
    ),
}


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are changed for long contexts.

    Attributes:
        kind: ``linear`` divides every frequency by ``factor``. ``llama3`` (Llama 3.1, section "RoPE scaling" of Meta's
            reference code) divides those whose wavelength exceeds
            ``original_max_position_embeddings / low_freq_factor`` tokens, leaves those below
            ``original_max_position_embeddings / high_freq_factor`` as they are, and interpolates between.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama shape.

    Sizes are in elements; ``head_dim`` is even; ``num_heads % num_kv_heads == 0``.

    Attributes:
        sliding_window: None when attention reaches back over the whole of ``max_position_embeddings``; otherwise the
            number of tokens (at least some of) the layers see, beyond which this engine must not go.
        dtype: The dtype the weights were published in (``bfloat16`` where the file does not say).
        quantisation: How the files hold the layers' matrices; None: as plain ones.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    hidden_act: str = "silu"
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    quantisation: Quantisation | None = None

    @property
    def context_limit(self) -> int:
        """The longest context, in tokens."""
        return self.max_position_embeddings if self.sliding_window is None else self.sliding_window


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling settings a model comes with. What its file leaves out is off (1.0 for temperature, 0 for ``top_k``)."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()


def load_config(model_dir: Path) -> ModelConfig:
    """Read and check ``model_dir/config.json``.

    Raises:
        OctoError: Something is not supported; it names file and field.
    """
    path = Path(model_dir) / CONFIG_NAME
    if not present(path):
        raise OctoError(f"{path.parent} has no {path.name}, so it is no model folder that octo-run can load.")
    values = read_json_object(path)
    older = path.parent / MODELOPT_NAME
    if values.get("quantization_config") is None and present(older):
        values["quantization_config"] = {"quant_method": "modelopt"} | read_json_object(older)
    return parse_config(values, path)


def parse_config(values: Mapping[str, Any], path: Path) -> ModelConfig:
    """The description in ``values``, the content of a configuration file.

    Args:
        path: The file, named in complaints.
    """
    fields = Fields(path, values)
    architecture = _architecture(fields)
    family = FAMILIES[architecture]
    _refuse_variants(fields)
    vocab_size = fields.integer("vocab_size")
    hidden_size = fields.integer("hidden_size")
    num_layers = fields.integer("num_hidden_layers", high=_MAX_LAYERS)
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = _kv_heads(fields, family, num_heads)
    context = fields.integer("max_position_embeddings")
    theta, scaling = _rope(fields, context)
    bias = family.attention_bias_field and fields.boolean("attention_bias")
    bos = fields.raw("bos_token_id")
    quantization = fields.sub("quantization_config")
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(fields, family, hidden_size, num_heads),
        max_position_embeddings=context,
        rms_norm_eps=fields.number("rms_norm_eps", _DEFAULT_EPS, low=_EPS[0], high=_EPS[1]),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        qkv_bias=bias or family.qkv_bias,
        o_bias=bias,
        mlp_bias=family.mlp_bias_field and fields.boolean("mlp_bias"),
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(fields, family, num_layers, context),
        bos_token_id=None if bos is None or bos == -1 else fields.integer("bos_token_id", low=0, high=vocab_size - 1),
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
        dtype=_dtype(fields),
        quantisation=None if quantization is None else parse_quantisation(quantization),
    )


def _architecture(fields: Fields) -> str:
    """The architecture's name, from ``architectures`` or else ``model_type``; the two must agree."""
    names = fields.raw("architectures")
    model_type = fields.text("model_type")
    known = ", ".join(FAMILIES)
    if names is None or names == []:
        for architecture, family in FAMILIES.items():
            if family.model_type == model_type:
                return architecture
        if model_type is None:
            raise fields.fail("architectures", "is missing, and so is model_type")
        raise fields.fail("model_type", f"is {quoted(model_type)}, which octo-run does not know (it knows {known})")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.fail("architectures", f"is {quoted(names)}, not a list with one name")
    if names[0] not in FAMILIES:
        raise fields.fail("architectures", f"names {quoted(names[0])}, which octo-run does not know (it knows {known})")
    if model_type is not None and model_type != FAMILIES[names[0]].model_type:
        raise fields.fail("model_type", f"is {quoted(model_type)}, which contradicts architectures {quoted(names[0])}")
    return str(names[0])


def _refuse_variants(fields: Fields) -> None:
    """Refuse what changes the computation in a way this decoder does not follow."""
    act = fields.text("hidden_act")
    if act not in (None, "silu", "swish"):
        raise fields.fail("hidden_act", f"is {quoted(act)}, and octo-run computes 'silu' only")


def _kv_heads(fields: Fields, family: Family, num_heads: int) -> int:
    left_out = "num_key_value_heads" not in fields.values
    num_kv_heads = fields.integer("num_key_value_heads", (family.kv_heads if left_out else None) or num_heads)
    if num_heads % num_kv_heads:
        meant = ", which is left out" if left_out else ""
        problem = f"({num_heads}) is no multiple of num_key_value_heads ({num_kv_heads}{meant})"
        raise fields.fail("num_attention_heads", problem)
    return num_kv_heads


def _head_dim(fields: Fields, family: Family, hidden_size: int, num_heads: int) -> int:
    if fields.raw("head_dim") is None and family.head_dim is None and hidden_size % num_heads:
        problem = f"({hidden_size}) is no multiple of num_attention_heads ({num_heads}), and head_dim is missing"
        raise fields.fail("hidden_size", problem)
    head_dim = fields.integer("head_dim", family.head_dim or hidden_size // num_heads, high=_MAX_HEAD_DIM)
    if head_dim % 2:
        raise fields.fail("head_dim", f"is {head_dim}, which is odd: rotary embeddings turn pairs of coordinates")
    return head_dim


def _sliding_window(fields: Fields, family: Family, num_layers: int, context: int) -> int | None:
    """The window in tokens if any layer's attention is shorter than the context, else None."""
    kinds = fields.raw("layer_types")
    if kinds is not None:
        allowed = ["full_attention"] if family.sliding == "none" else ["full_attention", "sliding_attention"]
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise fields.fail("layer_types", f"is no list of num_hidden_layers ({num_layers}) names")
        for kind in kinds:
            if kind not in allowed:
                raise fields.fail("layer_types", f"holds {quoted(kind)}, which octo-run does not know here")
    if family.sliding == "none" or (family.sliding == "switch" and not fields.boolean("use_sliding_window")):
        return None
    # Left out, the field means 4096; null means that there is no window.
    given = fields.values.get("sliding_window", _DEFAULT_WINDOW)
    window = None if given is None else fields.integer("sliding_window", _DEFAULT_WINDOW)
    if family.sliding == "switch":
        if kinds is None and fields.integer("max_window_layers", _DEFAULT_WINDOW_LAYERS, low=0) >= num_layers:
            return None
        if kinds is not None and "sliding_attention" not in kinds:
            return None
    return window if window is not None and window < context else None


def _rope(fields: Fields, context: int) -> tuple[float, RopeScaling | None]:
    """Base frequency and scaling, from ``rope_theta`` + ``rope_scaling`` or from ``rope_parameters`` (newer files)."""
    theta = fields.number("rope_theta", _DEFAULT_THETA, low=_THETA[0], high=_THETA[1])
    _refuse_partial_rotary(fields)
    older, newer = fields.sub("rope_scaling"), fields.sub("rope_parameters")
    readings = [
        _rope_object(fields, rope, theta, context) for rope in (older, newer) if rope is not None and rope.values
    ]
    if len(readings) == 2 and readings[0] != readings[1]:
        raise fields.fail("rope_scaling", "and rope_parameters are both given and differ")
    return readings[0] if readings else (theta, None)


def _rope_object(fields: Fields, rope: Fields, top: float, context: int) -> tuple[float, RopeScaling | None]:
    """What ``rope_scaling`` or ``rope_parameters`` says beside the base frequency ``top`` of the file itself."""
    theta = rope.number("rope_theta", top, low=_THETA[0], high=_THETA[1])
    if fields.raw("rope_theta") is not None and theta != top:
        raise rope.fail("rope_theta", f"({theta:g}) contradicts rope_theta ({top:g})")
    kind = rope.text("rope_type") or rope.text("type")
    if kind is None and rope.prefix == "rope_scaling.":
        raise rope.fail("rope_type", "is missing")
    _refuse_partial_rotary(rope)
    if kind is None or kind == "default":
        nested = [name for name, value in rope.values.items() if isinstance(value, dict)]
        if nested:
            problem = "is an object: rotary parameters per layer kind are not supported"
            raise rope.fail(shown(nested[0], 60), problem)
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", rope.number("factor", low=_FACTOR[0], high=_FACTOR[1]))
    if kind == "llama3":
        return theta, _llama3(rope, context)
    raise rope.fail("rope_type", f"is {quoted(kind)}, and octo-run computes 'default', 'linear' and 'llama3' only")


def _refuse_partial_rotary(place: Fields) -> None:
    part = place.number("partial_rotary_factor", 1.0, low=0.0, high=1.0)
    if part != 1.0:
        raise place.fail("partial_rotary_factor", f"is {part:g}, and octo-run rotates whole heads only")


def _llama3(rope: Fields, context: int) -> RopeScaling:
    low, high = (
        rope.number(name, low=_FREQ_FACTOR[0], high=_FREQ_FACTOR[1]) for name in ("low_freq_factor", "high_freq_factor")
    )
    if high <= low:
        raise rope.fail("high_freq_factor", f"({high:g}) is not greater than low_freq_factor ({low:g})")
    original = rope.integer("original_max_position_embeddings", context)
    return RopeScaling("llama3", rope.number("factor", low=_FACTOR[0], high=_FACTOR[1]), low, high, original)


def _dtype(fields: Fields) -> str:
    name = fields.text("dtype") or fields.text("torch_dtype") or "bfloat16"
    name = name.removeprefix("torch.")
    if name not in DTYPES:
        raise fields.fail("dtype", f"is {quoted(name)}, not one of {', '.join(DTYPES)}")
    return name


def load_generation_defaults(model_dir: Path) -> GenerationDefaults:
    """Read ``model_dir/generation_config.json``; without the file: greedy.

    ``top_k`` -1 is off, as 0 is. ``top_p`` 0 and ``min_p`` 1 leave the most probable token: ``top_k`` 1.

    Raises:
        OctoError: A value is out of range.
    """
    path = Path(model_dir) / GENERATION_CONFIG_NAME
    if not present(path):
        return GenerationDefaults()
    fields = Fields(path, read_json_object(path))
    top_k = max(0, fields.integer("top_k", 0, low=-1))
    top_p = fields.number("top_p", 1.0, low=0.0, high=1.0)
    min_p = fields.number("min_p", 0.0, low=0.0, high=1.0)
    if top_p == 0.0 or min_p == 1.0:
        top_k, top_p, min_p = 1, 1.0, 0.0
    return GenerationDefaults(
        do_sample=fields.boolean("do_sample"),
        temperature=fields.number("temperature", 1.0, low=_TEMPERATURE[0], high=_TEMPERATURE[1], zero=True),
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=fields.number("repetition_penalty", 1.0, low=_PENALTY[0], high=_PENALTY[1]),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )
