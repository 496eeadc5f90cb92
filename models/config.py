"""``config.json`` and ``generation_config.json``: read, checked, and turned into frozen descriptions.

Nothing here imports torch. Field meanings follow the Hugging Face configuration files of the families below; every
problem is one :class:`~octo_run.errors.OctoError` that names the file and the field.

A field that is left out means what it means to the transformers library, whose defaults differ between families; but
the sizes without which a file describes no model are required. A field that the library knows not of is passed over:
were there tensors to it, they would be unexpected.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from octo_run.errors import OctoError, quoted
from octo_run.models.expert_config import ExpertConfig
from octo_run.models.families import ACTIVATIONS, FAMILIES, DeltaFields, Family
from octo_run.models.fields import MAX_INT, Fields
from octo_run.models.foreign import present, read_json_object
from octo_run.models.kv_heads import KVHeads as KVHeads
from octo_run.models.kv_heads import head_size
from octo_run.models.quantisation.config import OLDER_NAMES, Quantisation, UnknownMethod, parse_quantisation
from octo_run.models.rope_config import FULL, LINEAR, SLIDING, Rope, RopeScaling, read_ropes
from octo_run.models.text_parts import WRAPPERS, text_part
from octo_run.models.unbuilt import refusal

CONFIG_NAME = "config.json"
#: What `--conditioning` takes: nothing, means alone, means and matrices (`models.conditioning`).
CONDITIONINGS = ("off", "mean", "full")
#: What `--head` takes: the embedding and the output head as they are, or packed (`models.quantisation.schemes`).
HEADS = ("bf16", "int8")
GENERATION_CONFIG_NAME = "generation_config.json"
DTYPES = ("bfloat16", "float16", "float32")
_MAX_LAYERS = 4096
# Numbers with which float32 arithmetic works: outside, something is 0, infinite or not a number, or all logits agree.
#: Dtypes that files of plain weights have: of these, of positions and of masks.
_PLAIN_DTYPES = frozenset(("F64", "F32", "F16", "BF16", "I64", "BOOL"))
_EPS = (2.0**-126, 1.0)  # from the smallest normal number on: GPUs take smaller ones for 0
_TEMPERATURE = (1e-10, 1e10)  # or 0
_PENALTY = (1e-3, 1e3)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder.

    Sizes are in elements; ``head_dim`` is even; ``num_heads % num_kv_heads == 0``. What kind of layer each is,
    `models.specs` makes of it and of its `Family`.

    Attributes:
        rope_theta, rope_scaling: The rotary embedding of layers without a window, and of all where ``sliding_rope`` is
            None.
        sliding_window: Tokens that a layer of the kind ``sliding_attention`` sees; None: no layer has a window shorter
            than the longest context.
        max_position_embeddings: Tokens of a context that nobody asked for. RoPE's scaling may allow more
            (:attr:`context_limit`).
        dtype: The dtype the weights were published in (``bfloat16`` where the file does not say).
        quantisation: How the files hold the layers' matrices; None: as plain ones.
        layer_types: The kind of each layer; empty: ``full_attention`` for all.
        delta: Of layers of the kind ``linear_attention``.
        rope_share: The part of a head's coordinates that RoPE turns.
        query_scaling: See `Rope`.
        no_rope: The layers without RoPE.
        attention_scale: Products of queries and keys times it; None: ``head_dim ** -0.5``.
        attention_cap: The soft cap of attention's logits, ``cap * tanh(logit / cap)``.
        logit_cap: That of the model's logits, which come after ``logit_multiplier``.
        experts: Those of layers that have experts; None: no layer has.
        embedding_scale, residual_multiplier, logit_multiplier: What embeddings, the outputs of attention and MLP, and
            logits are multiplied by.
        wrapper: The architecture of a checkpoint of which this is the text part; "": it is the whole.
        layer_heads: Keys and values of each layer; empty: ``num_kv_heads`` of ``head_dim`` in all. Queries have the
            size of their keys.
        values_are_keys: The layers whose values are what their keys are made of, before norm and RoPE.
        kv_sources: For each layer the layer whose keys and values it sees, itself but for the last ones; empty: each
            has its own.
        double_wide: Layers that see another one's keys and values have an MLP of twice ``intermediate_size``.
        per_layer_input: Numbers of the vector that every token has for each layer; 0: there are no such vectors.
        per_layer_vocab: Tokens that have such vectors.
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
    layer_types: tuple[str, ...] = ()
    delta: DeltaFields | None = None
    rope_share: float = 1.0
    query_scaling: tuple[float, int] | None = None
    sliding_rope: Rope | None = None
    no_rope: frozenset[int] = frozenset()
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    experts: ExpertConfig | None = None
    embedding_scale: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    wrapper: str = ""
    layer_heads: tuple[KVHeads, ...] = ()
    values_are_keys: frozenset[int] = frozenset()
    kv_sources: tuple[int, ...] = ()
    double_wide: bool = False
    per_layer_input: int = 0
    per_layer_vocab: int = 0

    @property
    def context_limit(self) -> int:
        """The longest context, in tokens: what RoPE's scaling gives, if it gives more than the file says."""
        return self.family.rope.longest(self.rope_scaling, self.max_position_embeddings)

    @property
    def recurrent(self) -> bool:
        """Whether some layers keep a state in place of keys and values."""
        return LINEAR in self.layer_types

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The numbers of the layers that have keys and values of their own."""
        kinds = self.layer_types or (FULL,) * self.num_layers
        return tuple(index for index, kind in enumerate(kinds) if kind != LINEAR and self.kv_source(index) == index)

    def kv_source(self, layer: int) -> int:
        """The layer whose keys and values a layer sees."""
        return self.kv_sources[layer] if self.kv_sources else layer

    def kv_heads(self, layer: int) -> KVHeads:
        """The keys and values that a layer sees."""
        return self.layer_heads[layer] if self.layer_heads else KVHeads(self.num_kv_heads, self.head_dim)

    @property
    def cached_heads(self) -> tuple[KVHeads, ...]:
        """The keys and values of :attr:`attention_layers`."""
        return tuple(map(self.kv_heads, self.attention_layers))

    @property
    def plain_layers(self) -> bool:
        """Whether all layers have keys and values of one size and of their own, tokens have one vector, and layers end
        with a sum."""
        return not (self.layer_heads or self.kv_sources or self.per_layer_input or self.family.layer_scale)

    @property
    def family(self) -> Family:
        """What the architecture's name settles."""
        return FAMILIES[self.architecture]

    @property
    def rope(self) -> Rope:
        """The rotary embedding of layers without a window."""
        return Rope(self.rope_theta, self.rope_scaling, self.rope_share, self.query_scaling)

    @property
    def rope_switch(self) -> int | None:
        """The longest context with the first of RoPE's two lists of factors; None: there are no two."""
        scaling = self.rope_scaling
        return scaling.original_max_position_embeddings if scaling and scaling.kind == "longrope" else None

    def rope_factors(self, context: int) -> str:
        """Which of RoPE's lists of factors a context chooses: "short", "long", or "" where there is no choice."""
        if self.rope_switch is None:
            return ""
        return "long" if context > self.rope_switch else "short"


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
    elsewhere = _said_elsewhere(path, values) if values.get("quantization_config") is None else None
    try:
        return parse_config(values, path, elsewhere)
    except UnknownMethod:
        if _are_packed(path.parent):
            raise
        return parse_config(values, path, plain=True)


def _said_elsewhere(path: Path, values: Mapping[str, Any]) -> Fields | None:
    """What older and other programs say of quantised weights in place of ``quantization_config``."""
    for name, method in {"compression_config": "compressed-tensors", "quantization": "mlx"}.items():
        if isinstance(said := values.get(name), dict) and said.keys() & {"config_groups", "bits"}:
            return Fields(path, {"quant_method": method} | said, f"{name}.")
    for name, method in OLDER_NAMES.items():
        if present(older := path.parent / name) and _are_packed(path.parent):
            return Fields(older, {"quant_method": method} | read_json_object(older))
    return None


def _are_packed(model_dir: Path) -> bool:
    """Whether the files of a folder hold quantised weights; also where they cannot be looked at.

    What says so stays behind where a model was made whole again, and lies beside the model that it was made of.
    """
    from octo_run.models.files import stored_dtypes  # which knows the names of this module

    try:
        return not stored_dtypes(model_dir) <= _PLAIN_DTYPES
    except OctoError:  # of which a load complains
        return True


def parse_config(
    values: Mapping[str, Any], path: Path, quantization: Fields | None = None, plain: bool = False
) -> ModelConfig:
    """The description in ``values``, the content of a configuration file.

    Args:
        path: The file, named in complaints.
        quantization: What counts as ``quantization_config`` where ``values`` have none.
        plain: The weights are not quantised, whatever is said.
    """
    fields = Fields(path, values)
    wrapper, architecture, fields = _architecture(fields)
    family = FAMILIES[architecture]

    def size(name: str, high: int = MAX_INT) -> int:
        return fields.integer(name, family.defaults.get(name), high=high)

    def flag(name: str) -> bool:
        return fields.boolean(name, bool(family.defaults.get(name)))

    vocab_size = size("vocab_size")
    hidden_size = size("hidden_size")
    num_layers = size("num_hidden_layers", _MAX_LAYERS)
    num_heads = size("num_attention_heads")
    num_kv_heads = _kv_heads(fields, family, num_heads)
    head_dim = _head_dim(fields, family, hidden_size, num_heads)
    context = size("max_position_embeddings")
    rope, sliding_rope = read_ropes(fields, family.rope, context, head_dim)
    window, kinds = _layer_types(fields, family, num_layers, family.rope.longest(rope.scaling, context))
    bias = family.attention_bias_field and flag("attention_bias")
    out_bias = family.out_bias_field
    bos = fields.raw("bos_token_id")
    quantization = fields.sub("quantization_config") or quantization
    config = ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=size(family.mlp.inner),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=fields.number(family.eps[0], family.eps[1], low=_EPS[0], high=_EPS[1]),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        tie_word_embeddings=flag("tie_word_embeddings"),
        qkv_bias=bias or (fields.boolean("qkv_bias", True) if family.qkv_bias_field else family.qkv_bias),
        o_bias=bias if out_bias == "attention_bias" else out_bias is not None and flag(out_bias),
        mlp_bias=family.mlp_bias_field and fields.boolean("mlp_bias"),
        qk_norm=bool(family.qk_norm),
        hidden_act=_activation(fields, family),
        sliding_window=window,
        bos_token_id=None if bos is None or bos == -1 else fields.integer("bos_token_id", low=0, high=vocab_size - 1),
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
        dtype=_dtype(fields),
        quantisation=None if quantization is None or plain else parse_quantisation(quantization),
        layer_types=kinds if LINEAR in kinds or (SLIDING in kinds and (window or sliding_rope)) else (),
        rope_share=rope.share,
        query_scaling=rope.query_scaling,
        sliding_rope=sliding_rope,
        embedding_scale=hidden_size**0.5 if family.embedding_scaled else 1.0,
        wrapper=wrapper,
    )
    return config if family.more is None else replace(config, **family.more(fields, kinds))


def _architecture(fields: Fields) -> tuple[str, str, Fields]:
    """The architecture's name, from ``architectures`` or else ``model_type``, which must agree, and its fields.

    Returns:
        The name of a checkpoint of which the decoder is a part, if there is one; the decoder's; the fields.
    """
    names = fields.raw("architectures")
    model_type = fields.text("model_type")
    if names is None or names == []:
        for architecture, family in FAMILIES.items():
            if family.model_type == model_type:
                return "", architecture, fields
        for name, wrapper in WRAPPERS.items():
            if wrapper.model_type == model_type:
                return name, *text_part(fields, name)
        if model_type is None:
            raise fields.fail("architectures", "is missing, and so is model_type")
        raise fields.fail("model_type", f"is {quoted(model_type)}{refusal(model_type)}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise fields.fail("architectures", f"is {quoted(names)}, not a list of names")
    name = _named(names, model_type)
    if name in WRAPPERS:
        return name, *text_part(fields, name)
    if name not in FAMILIES:
        raise fields.fail("architectures", f"names {quoted(name)}{refusal(name)}")
    if model_type is not None and model_type != FAMILIES[name].model_type:
        for architecture, family in FAMILIES.items():
            if (family.model_type, family.saved_as) == (model_type, name):
                return "", architecture, fields
        raise fields.fail("model_type", f"is {quoted(model_type)}, which contradicts architectures {quoted(name)}")
    return "", name, fields


def _named(names: list[str], model_type: str | None) -> str:
    """Of several architectures the one that is known, first of all the one that ``model_type`` agrees with."""
    kinds = {name: one.model_type for name, one in FAMILIES.items()}
    kinds |= {name: one.model_type for name, one in WRAPPERS.items()}
    return max(names, key=lambda name: (name in kinds) + (kinds.get(name) == model_type))


def _activation(fields: Fields, family: Family) -> str:
    name, default = family.activation
    act = fields.text(name) or default
    if act == "gelu" and family.gelu_is_tanh:
        return "gelu_pytorch_tanh"
    if act not in ACTIVATIONS:
        raise fields.fail(name, f"is {quoted(act)}, and octo-run computes {', '.join(ACTIVATIONS)} only")
    return act


def _kv_heads(fields: Fields, family: Family, num_heads: int) -> int:
    left_out = "num_key_value_heads" not in fields.values
    default = family.defaults.get("num_key_value_heads") if left_out else None
    num_kv_heads = fields.integer("num_key_value_heads", default or num_heads)
    if num_heads % num_kv_heads:
        meant = ", which is left out" if left_out else ""
        problem = f"({num_heads}) is no multiple of num_key_value_heads ({num_kv_heads}{meant})"
        raise fields.fail("num_attention_heads", problem)
    return num_kv_heads


def _head_dim(fields: Fields, family: Family, hidden_size: int, num_heads: int) -> int:
    """Numbers of a head."""
    default = family.defaults.get("head_dim")
    if fields.raw("head_dim") is None and default is None and hidden_size % num_heads:
        problem = f"({hidden_size}) is no multiple of num_attention_heads ({num_heads}), and head_dim is missing"
        raise fields.fail("hidden_size", problem)
    return head_size(fields, "head_dim", default or hidden_size // num_heads)


def _layer_types(fields: Fields, family: Family, num_layers: int, context: int) -> tuple[int | None, tuple[str, ...]]:
    """The window in tokens where it is shorter than the context, and the kind of each layer."""
    kinds = fields.raw("layer_types")
    if kinds is not None:
        allowed = {"none": [FULL], "linear": [FULL, LINEAR]}.get(family.sliding, [FULL, SLIDING])
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise fields.fail("layer_types", f"is no list of num_hidden_layers ({num_layers}) names")
        kinds = [FULL if kind == "attention" else kind for kind in kinds]  # its older name
        for kind in kinds:
            if kind == "mamba":
                raise fields.fail("layer_types", f"holds {quoted(kind)}, and octo-run does not compute Mamba layers")
            if kind == LINEAR and kind not in allowed:
                raise fields.fail("layer_types", f"holds {quoted(kind)}, which octo-run does not compute here")
            if kind not in allowed:
                raise fields.fail("layer_types", f"holds {quoted(kind)}, which octo-run does not know here")
    everywhere = (FULL,) * num_layers
    if family.sliding == "linear":
        every = fields.integer("full_attention_interval", 4)
        pattern = [LINEAR if (index + 1) % every else FULL for index in range(num_layers)]
        kinds = pattern if kinds is None else kinds
        if FULL not in kinds:
            raise fields.fail("layer_types", f"holds no {quoted(FULL)}, and octo-run needs a layer of attention")
        return None, tuple(kinds)
    if family.sliding == "none" or (family.sliding == "switch" and not fields.boolean("use_sliding_window")):
        return None, everywhere
    default = family.defaults.get("sliding_window")
    # Left out, the field means the family's; null means that there is no window.
    given = fields.values.get("sliding_window", default)
    window = None if given is None else fields.integer("sliding_window", default)
    if family.sliding == "always":
        kinds = [SLIDING] * num_layers
    elif kinds is None and family.sliding == "switch":
        first = fields.integer("max_window_layers", family.defaults.get("max_window_layers"), low=0)
        kinds = [SLIDING if index >= first else FULL for index in range(num_layers)]
    elif kinds is None:
        kinds = _pattern(fields, family, num_layers, window)
    if SLIDING not in kinds:
        window = None
    return window if window is not None and window < context else None, tuple(kinds)


def _pattern(fields: Fields, family: Family, num_layers: int, window: int | None) -> list[str]:
    """Kinds of layers of which every so many-th sees all, or whose pattern is spelt out: L for a window, G for none; of
    these the last layer sees all."""
    default = family.defaults.get("sliding_window_pattern")
    spelt = fields.raw("sliding_window_pattern") if family.pattern_field else None
    if spelt is None and (default is None or window is None):
        return [SLIDING if window is not None else FULL] * num_layers
    if isinstance(spelt, str) and family.spelt_pattern:
        if not spelt or not {*spelt} <= {"L", "G"}:
            problem = f"is {quoted(spelt)}, no number and no text of the letters L and G"
            raise fields.fail("sliding_window_pattern", problem)
        kinds = [SLIDING if spelt[index % len(spelt)] == "L" else FULL for index in range(num_layers)]
        return [*kinds[:-1], FULL]
    every = fields.integer("sliding_window_pattern") if default is None or spelt is not None else default
    return [FULL if (index + 1) % every == 0 else SLIDING for index in range(num_layers)]


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
