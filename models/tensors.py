"""Which tensors a configuration needs, and where the safetensors files of a model hold them."""

import math
import re
from collections.abc import Container, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from octo_run.errors import OctoError, quoted, shown
from octo_run.models import per_layer
from octo_run.models.config import ModelConfig
from octo_run.models.expert_tensors import by_expert, published_name
from octo_run.models.files import INDEX_NAME, SINGLE_NAME, read_index, weight_files
from octo_run.models.foreign import AGAIN, present
from octo_run.models.quantisation.config import StoredScheme
from octo_run.models.quantisation.layouts import LAYOUTS
from octo_run.models.quantisation.stored import Needed, digest_of, order_of
from octo_run.models.safetensors_file import FLOAT_DTYPES, STORED_DTYPES, TensorEntry, TensorFile, read_header
from octo_run.models.specs import LayerSpec, layer_specs

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
#: A layer's, one number, behind its prefix.
LAYER_SCALE = "layer_scalar"
_LISTED = 4
# Tensors that checkpoints carry along and the decoder needs not: buffers that are computed from the configuration,
# scales of a quantised KV cache (octo-run has formats of its own), and heads that predict further tokens.
_HARMLESS = re.compile(
    r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)"
    r"|model\.layers\.\d+\.self_attn\.(attn\.)?([qkv]_proj\.|kv_proj\.|qkv_proj\.)?([qkv]|kv|prob)_(scale|zero_point)"
    r"|(model\.)?mtp\..+",
    re.DOTALL,
)
# What stands before the decoder's names in checkpoints that see and hear, too, of older and of newer files.
_TEXT_PARTS = ("language_model.", "model.language_model.", "language_model.model.", "model.text_model.")
_TEXT_PART = re.compile(f"(?:{'|'.join(map(re.escape, _TEXT_PARTS))})(?=.)", re.DOTALL)
# What such checkpoints have beside it.
_OTHER_PARTS = re.compile(
    r"(model\.)?(image_newline"
    r"|(vision_tower|vision_model|vision_embedder|visual|multi_modal_projector|connector|audio_tower|embed_vision"
    r"|embed_audio)\..+)",
    re.DOTALL,
)
# Keys and values that layers have no use for which see those of another layer.
_UNUSED_KEYS = re.compile(r"model\.layers\.(\d{1,4})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.\w+", re.ASCII)
# Scales by which the inputs and outputs of quantised layers were meant to be quantised, too.
_INPUT_SCALES = re.compile(
    r"(lm_head|model\.layers\.\d+\.(self_attn|linear_attn|mlp)(\.\w+)+)"
    r"[._](activation_scale|(input|output)_(scale(_ub)?|global_scale|zero_point))"
)


def expected_tensors(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the decoder needs.

    Returns:
        Name -> shape, named as in Hugging Face checkpoints. Matrices are ``[out, in]``. With tied embeddings there is
        no ``lm_head.weight``.
    """
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (cfg.vocab_size, cfg.hidden_size)}
    for index, spec in enumerate(layer_specs(cfg)):
        prefix = f"model.layers.{index}."
        mixer = _attention_tensors(cfg, spec) if spec.mixer is None else spec.mixer.tensors()
        shapes |= {prefix + name: shape for name, shape in (*mixer.items(), *spec.mlp.tensors().items())}
        for norm in vars(spec.norms).values():
            if norm is not None:
                shapes[f"{prefix}{norm}.weight"] = (cfg.hidden_size,)
        if cfg.per_layer_input:
            more = per_layer.layer_tensors(cfg.hidden_size, cfg.per_layer_input)
            shapes |= {prefix + name: shape for name, shape in more.items()}
        if cfg.family.layer_scale:
            shapes[prefix + LAYER_SCALE] = (1,)
    if cfg.per_layer_input:
        shapes |= per_layer.tensors(cfg)
    shapes[FINAL_NORM] = (cfg.hidden_size,)
    if not cfg.tie_word_embeddings:
        shapes[HEAD] = (cfg.vocab_size, cfg.hidden_size)
    return shapes


def _attention_tensors(cfg: ModelConfig, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
    hidden, q, kv = cfg.hidden_size, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    rows_of = {"q": 2 * q if spec.gated else q}
    if spec.kv_source is None:
        rows_of |= {"k": kv} if spec.values_are_keys else {"k": kv, "v": kv}
    linear = {f"{name}_proj": (rows, hidden, cfg.qkv_bias) for name, rows in rows_of.items()}
    if cfg.family.fused_qkv:
        linear = {"qkv_proj": (q + 2 * kv, hidden, cfg.qkv_bias)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns, bias) in {**linear, "o_proj": (hidden, q, cfg.o_bias)}.items():
        shapes[f"self_attn.{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"self_attn.{name}.bias"] = (rows,)
    if cfg.family.sinks:
        shapes["self_attn.sinks"] = (spec.heads,)
    if spec.qk_norm:
        whole = spec.qk_norm == "all"
        shapes["self_attn.q_norm.weight"] = (q if whole else spec.head_dim,)
        if spec.kv_source is None:
            shapes["self_attn.k_norm.weight"] = (kv if whole else spec.head_dim,)
    return shapes


def num_parameters(cfg: ModelConfig) -> int:
    """Parameters of the model; tied embeddings count once."""
    return sum(math.prod(shape) for shape in expected_tensors(cfg).values())


def active_parameters(cfg: ModelConfig) -> int:
    """Parameters that a token meets: of routed experts those of as many as it is given to."""
    if cfg.experts is None:
        return num_parameters(cfg)
    idle = range(cfg.experts.chosen, cfg.experts.count)
    return sum(
        math.prod(shape)
        for name, shape in expected_tensors(cfg).items()
        if (found := re.search(r"\.experts\.(\d+)\.", name)) is None or int(found[1]) not in idle
    )


def locate_tensors(model_dir: Path) -> dict[str, TensorEntry]:
    """Name -> place of every tensor in the model folder's weight files, all headers checked, no data read."""
    model_dir = Path(model_dir)
    files = weight_files(model_dir)
    missing = [path.name for path in files if not present(path)]
    if missing:
        count = f"{len(missing)} of {len(files)} weight files missing"
        raise OctoError(f"{model_dir} is not complete: {count} ({_listing(missing)}), so fetch the model again.")
    found: dict[str, TensorEntry] = {}
    for path in files:
        for name, entry in read_header(path).items():
            name = _plain_name(name)
            if name in found:
                first, second = shown(found[name].path.name, 60), shown(path.name, 60)
                raise OctoError(f"{model_dir}: the tensor {quoted(name)} is in {first} and in {second}.")
            found[name] = entry
    if files[0].name != SINGLE_NAME:
        for name, file in read_index(model_dir / INDEX_NAME).items():
            name = _plain_name(name)
            # An entry that no file holds is of no account, unless the tensor is needed and then missing.
            if name in found and found[name].path.name != file:
                raise OctoError(
                    f"{model_dir}: {INDEX_NAME} places {quoted(name)} in {shown(file, 60)}, which does not hold it."
                )
    return found


def _plain_name(name: str) -> str:
    """The name of a decoder's tensor, in whatever checkpoint it is a part of."""
    match = _TEXT_PART.match(name)
    if match is None:
        return name
    rest = name[match.end() :].removeprefix("model.")
    return rest if rest.startswith("lm_head.") else f"model.{rest}"


def stored_config(model_dir: Path, cfg: ModelConfig) -> ModelConfig:
    """``cfg`` as the stored tensors have it: whether the head is tied, and which layers are quantised.

    Where ``cfg`` ties the output head to the embedding and the files hold a head of other values, the stored head
    counts and the result is not tied. A head with the embedding's values (of whatever dtype) stays tied, and so is one
    without an embedding beside it. A layer whose file holds a plain matrix is not quantised, one whose file holds codes
    is, and a model without such is not. Reads headers, both tensors of a tied head as far as they agree, and the groups
    of columns.

    Raises:
        OctoError: As :func:`checked`.
    """
    if not cfg.tie_word_embeddings and cfg.quantisation is None:
        return cfg
    return _stored_config(cfg, _named(cfg, locate_tensors(model_dir)))


def checked(model_dir: Path, cfg: ModelConfig) -> tuple[ModelConfig, dict[str, TensorEntry]]:
    """``cfg`` as :func:`stored_config` has it, and where each tensor lies that it needs.

    Raises:
        OctoError: Headers, names, shapes or dtypes of the files are not those of the configuration.
    """
    found = _named(cfg, locate_tensors(model_dir))
    cfg = _stored_config(cfg, found)
    return cfg, check_tensors(model_dir, cfg, found)


def _named(cfg: ModelConfig, found: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors of files by the names of :func:`expected_tensors`."""
    if cfg.experts is None:
        return found
    schemes = [] if cfg.quantisation is None else [rule.scheme for rule in cfg.quantisation.rules]
    block = max((scheme.rows or 1 for scheme in schemes if scheme is not None), default=1)
    return by_expert(found, cfg.experts, cfg.hidden_size, block)


def _stored_config(cfg: ModelConfig, found: dict[str, TensorEntry]) -> ModelConfig:
    cfg = _with_stored_head(_with_packed(cfg, found), found)
    if cfg.quantisation is None:
        return cfg
    dense, orders, layers = set[str](), dict[str, str](), quantised_layers(cfg)
    for prefix, (scheme, shape) in layers.items():
        layout = LAYOUTS[scheme.layout]
        if not _is_packed(prefix, scheme, found) and f"{prefix}.weight" in found:
            dense.add(prefix)
        elif layout.order is not None and (name := f"{prefix}.{layout.order}") in found:
            orders[prefix] = digest_of(column_order(name, found[name], scheme, shape[1]))
    if len(dense) == len(layers):
        return replace(cfg, quantisation=None)
    orders = {prefix: digest for prefix, digest in orders.items() if digest}
    quantisation = replace(cfg.quantisation, dense=cfg.quantisation.dense | dense, orders=orders)
    return replace(cfg, quantisation=quantisation)


def _with_packed(cfg: ModelConfig, found: dict[str, TensorEntry]) -> ModelConfig:
    """With the layers that are quantised though the configuration leaves them out: published lists are wrong at times,
    and libraries mean different names by them."""
    if cfg.quantisation is None:
        return cfg
    packed = set[str]()
    for name, shape in expected_tensors(replace(cfg, tie_word_embeddings=False)).items():
        prefix = name.removesuffix(".weight")
        plain = name in found and found[name].dtype in FLOAT_DTYPES
        if len(shape) == 2 and name != EMBEDDING and not plain:
            names = _names(cfg, prefix)
            if cfg.quantisation.scheme(prefix, *names) is None:
                scheme = cfg.quantisation.if_quantised(*names)
                if scheme is not None and _is_packed(prefix, scheme, found):
                    packed.add(prefix)
    return replace(cfg, quantisation=replace(cfg.quantisation, packed=frozenset(packed))) if packed else cfg


def _with_stored_head(cfg: ModelConfig, found: dict[str, TensorEntry]) -> ModelConfig:
    if not cfg.tie_word_embeddings:
        return cfg
    apart = replace(cfg, tie_word_embeddings=False)
    scheme = None if cfg.quantisation is None else cfg.quantisation.scheme("lm_head", *_names(cfg, "lm_head"))
    if scheme is not None and _is_packed("lm_head", scheme, found):
        return apart
    if HEAD not in found or EMBEDDING not in found or _same_values(found[EMBEDDING], found[HEAD]):
        return cfg
    return apart


def quantised_layers(cfg: ModelConfig) -> dict[str, tuple[StoredScheme, tuple[int, int]]]:
    """Scheme and shape of every layer that files hold quantised, by name without ``.weight``."""
    if cfg.quantisation is None:
        return {}
    found = {}
    for name, shape in expected_tensors(cfg).items():
        prefix = name.removesuffix(".weight")
        if len(shape) == 2 and name != EMBEDDING:
            scheme = cfg.quantisation.scheme(prefix, *_names(cfg, prefix))
            if scheme is not None:
                found[prefix] = scheme, (shape[0], shape[1])
    return found


def _names(cfg: ModelConfig, prefix: str) -> list[str]:
    """What files call a layer."""
    if cfg.experts is not None and cfg.experts.naming == "w123":
        prefix = published_name(prefix)
    parts = [f"{part}{prefix.removeprefix('model.')}" for part in _TEXT_PARTS] if cfg.wrapper else []
    return [prefix, *parts]


def _is_packed(prefix: str, scheme: StoredScheme, found: dict[str, TensorEntry]) -> bool:
    marker = found.get(f"{prefix}.{LAYOUTS[scheme.layout].marker}")
    return marker is not None and marker.dtype not in FLOAT_DTYPES


def column_order(name: str, entry: TensorEntry, scheme: StoredScheme, columns: int) -> Tensor | None:
    """The order of a layer's columns that a tensor of their groups says (``stored.order_of``).

    Raises:
        OctoError: It says none.
    """
    if entry.dtype not in ("I32", "I64") or entry.shape != (columns,):
        return None  # which check_tensors refuses
    with TensorFile(entry.file) as data:
        groups = data.read(entry, torch.device("cpu"), STORED_DTYPES[entry.dtype])
    try:
        return order_of(groups, scheme, columns)
    except ValueError as error:
        raise damaged(entry, name, str(error)) from None


def damaged(entry: TensorEntry, name: str, problem: str) -> OctoError:
    """The error of a stored tensor that has wrong values."""
    return OctoError(f"{entry.path}: {shown(name, 80)} {problem}: {AGAIN}, or take another copy of it.")


def _same_values(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two stored tensors have one shape and the same values; compared piece by piece."""
    if one.shape != other.shape or not {one.dtype, other.dtype} <= FLOAT_DTYPES.keys():
        return False
    with TensorFile(one.file) as first, TensorFile(other.file) as second:
        for left, right in zip(first.pieces(one), second.pieces(other), strict=True):
            if left.dtype == right.dtype:
                same = torch.equal(left.view(torch.uint8), right.view(torch.uint8))
            else:
                same = torch.equal(left.to(torch.float64), right.to(torch.float64))
            if not same:
                return False
    return True


def needed_tensors(cfg: ModelConfig, found: Container[str]) -> dict[str, Needed]:
    """What :func:`expected_tensors` are stored as, given the names of what is stored."""
    layers = quantised_layers(cfg)
    needed: dict[str, Needed] = {}
    for name, shape in expected_tensors(cfg).items():
        prefix = name.removesuffix(".weight")
        if prefix not in layers:
            needed[name] = Needed(tuple(FLOAT_DTYPES), (shape,))
            continue
        scheme, (out, columns) = layers[prefix]
        tensors = LAYOUTS[scheme.layout].tensors(scheme, out, columns, partial(_has, found, prefix))
        needed |= {f"{prefix}.{part}": what for part, what in tensors.items()}
        if scheme.layout == "gptq":  # older files have biases of zeros where the model has none
            needed.setdefault(f"{prefix}.bias", Needed(tuple(FLOAT_DTYPES), ((out,),), optional=True))
    return needed


def _has(found: Container[str], prefix: str, part: str) -> bool:
    return f"{prefix}.{part}" in found


def check_tensors(model_dir: Path, cfg: ModelConfig, found: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The entries of ``found`` that the decoder needs.

    Raises:
        OctoError: Tensors are missing, unexpected, misshapen or of a wrong dtype; it lists them.
    """
    if cfg.tie_word_embeddings and EMBEDDING not in found and HEAD in found:
        found = found | {EMBEDDING: found[HEAD]}
    prefix = EMBEDDING.removesuffix("weight")
    if cfg.quantisation is not None and any(
        name.startswith(prefix) and (name != EMBEDDING or entry.dtype not in FLOAT_DTYPES)
        for name, entry in found.items()
    ):
        raise OctoError(
            f"The embedding in {model_dir} is quantised, which cannot be loaded: take a copy of the model in which it "
            "is not."
        )
    needed = needed_tensors(cfg, found)
    there = {name: what for name, what in needed.items() if name in found}
    missing = [name for name, what in needed.items() if name not in found and not what.optional]
    unexpected = [name for name in found if name not in needed and not _harmless(name, cfg)]
    shapes = [
        f"{name} is {quoted(list(found[name].shape))} instead of {list(what.shapes[0])}"
        for name, what in there.items()
        if found[name].shape not in what.shapes
    ]
    wrong = {name: what for name, what in there.items() if found[name].dtype not in what.dtypes}
    plain = tuple(FLOAT_DTYPES)
    dtypes = [f"{name} is {found[name].dtype}" for name, what in wrong.items() if what.dtypes == plain]
    codes = [
        f"{name} is {found[name].dtype} instead of {'/'.join(what.dtypes)}"
        for name, what in wrong.items()
        if what.dtypes != plain
    ]
    problems = [
        f"{len(items)} {kind} ({_listing(items)})"
        for kind, items in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", shapes),
            ("of a dtype other than " + "/".join(plain), dtypes),
            ("of another dtype", codes),
        )
        if items
    ]
    if problems:
        advice = "" if cfg.quantisation is None else f": {AGAIN}, or mend its quantization_config"
        raise OctoError(
            f"The weights in {model_dir} do not fit its config.json: tensors {'; '.join(problems)}{advice}."
        )
    return {name: found[name] for name in there}


def _harmless(name: str, cfg: ModelConfig) -> bool:
    if cfg.quantisation is not None and _INPUT_SCALES.fullmatch(name):
        return True
    if cfg.wrapper and _OTHER_PARTS.fullmatch(name):
        return True
    borrower = _UNUSED_KEYS.fullmatch(name)
    if borrower is not None and (layer := int(borrower[1])) < cfg.num_layers and cfg.kv_source(layer) != layer:
        return True
    return _HARMLESS.fullmatch(name) is not None or (cfg.tie_word_embeddings and name == HEAD)


def _listing(names: Iterable[str]) -> str:
    items = list(names)
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(shown(item, 80) for item in items[:_LISTED]) + more
