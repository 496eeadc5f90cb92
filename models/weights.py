"""Model weights: which tensors a configuration needs, and taking exactly those from safetensors files, one by one."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from octo_run.errors import OctoError, quoted, shown
from octo_run.models.config import ModelConfig
from octo_run.models.files import INDEX_NAME, SINGLE_NAME, read_index, weight_files
from octo_run.models.foreign import present
from octo_run.models.linear import Linear, SingleLinear
from octo_run.models.safetensors_file import FLOAT_DTYPES, TensorEntry, TensorFile, read_header

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LISTED = 4
# Tensors that checkpoints carry along and the decoder needs not: buffers that are computed from the configuration,
# scales of a quantised KV cache (octo-run has formats of its own), and heads that predict further tokens.
_HARMLESS = re.compile(
    r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)"
    r"|model\.layers\.\d+\.self_attn\.(attn\.)?([qkv]_proj\.|kv_proj\.|qkv_proj\.)?([qkv]|kv|prob)_(scale|zero_point)"
    r"|(model\.)?mtp\..+",
    re.DOTALL,
)


def expected_tensors(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the decoder needs.

    Returns:
        Name -> shape, named as in Hugging Face checkpoints. Matrices are ``[out, in]``. With tied embeddings there is
        no ``lm_head.weight``.
    """
    hidden, inner = cfg.hidden_size, cfg.intermediate_size
    q_size, kv_size = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (cfg.vocab_size, hidden)}
    linear = {
        "self_attn.q_proj": (q_size, hidden, cfg.qkv_bias),
        "self_attn.k_proj": (kv_size, hidden, cfg.qkv_bias),
        "self_attn.v_proj": (kv_size, hidden, cfg.qkv_bias),
        "self_attn.o_proj": (hidden, q_size, cfg.o_bias),
        "mlp.gate_proj": (inner, hidden, cfg.mlp_bias),
        "mlp.up_proj": (inner, hidden, cfg.mlp_bias),
        "mlp.down_proj": (hidden, inner, cfg.mlp_bias),
    }
    for layer in range(cfg.num_layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns, bias) in linear.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        if cfg.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (cfg.head_dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (cfg.head_dim,)
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not cfg.tie_word_embeddings:
        shapes[HEAD] = (cfg.vocab_size, hidden)
    return shapes


def num_parameters(cfg: ModelConfig) -> int:
    """Parameters of the model; tied embeddings count once."""
    return sum(math.prod(shape) for shape in expected_tensors(cfg).values())


def weight_bytes(cfg: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights in ``dtype`` (without an allocator's rounding)."""
    return num_parameters(cfg) * dtype.itemsize


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
            if name in found:
                first, second = shown(found[name].path.name, 60), shown(path.name, 60)
                raise OctoError(f"{model_dir}: the tensor {quoted(name)} is in {first} and in {second}.")
            found[name] = entry
    if files[0].name != SINGLE_NAME:
        for name, file in read_index(model_dir / INDEX_NAME).items():
            # An entry that no file holds is of no account, unless the tensor is needed and then missing.
            if name in found and found[name].path.name != file:
                raise OctoError(
                    f"{model_dir}: {INDEX_NAME} places {quoted(name)} in {shown(file, 60)}, which does not hold it."
                )
    return found


def stored_config(model_dir: Path, cfg: ModelConfig) -> ModelConfig:
    """``cfg`` with ``tie_word_embeddings`` as the stored tensors have it.

    Where ``cfg`` ties the output head to the embedding and the files hold a head of other values, the stored head
    counts and the result is not tied. A head with the embedding's values (of whatever dtype) stays tied, and so is one
    without an embedding beside it. Reads headers, and both tensors as far as they agree.

    Raises:
        OctoError: As :func:`load_weights`.
    """
    return _stored_config(cfg, locate_tensors(model_dir)) if cfg.tie_word_embeddings else cfg


def _stored_config(cfg: ModelConfig, found: dict[str, TensorEntry]) -> ModelConfig:
    if not cfg.tie_word_embeddings or HEAD not in found or EMBEDDING not in found:
        return cfg
    return cfg if _same_values(found[EMBEDDING], found[HEAD]) else replace(cfg, tie_word_embeddings=False)


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


def check_tensors(model_dir: Path, cfg: ModelConfig, found: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The entries of ``found`` that the decoder needs.

    Raises:
        OctoError: Tensors are missing, unexpected, misshapen or of a dtype not in ``FLOAT_DTYPES``; it lists them.
    """
    expected = expected_tensors(cfg)
    if cfg.tie_word_embeddings and EMBEDDING not in found and HEAD in found:
        found = found | {EMBEDDING: found[HEAD]}
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and not _harmless(name, cfg)]
    shapes = [
        f"{name} is {quoted(list(found[name].shape))} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    dtypes = [
        f"{name} is {found[name].dtype}" for name in expected if name in found and found[name].dtype not in FLOAT_DTYPES
    ]
    problems = [
        f"{len(items)} {kind} ({_listing(items)})"
        for kind, items in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", shapes),
            ("of a dtype other than " + "/".join(FLOAT_DTYPES), dtypes),
        )
        if items
    ]
    if problems:
        raise OctoError(f"The weights in {model_dir} do not fit its config.json: tensors {'; '.join(problems)}.")
    return {name: found[name] for name in expected}


def _harmless(name: str, cfg: ModelConfig) -> bool:
    return _HARMLESS.fullmatch(name) is not None or (cfg.tie_word_embeddings and name == HEAD)


def _listing(names: Iterable[str]) -> str:
    items = list(names)
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(shown(item, 80) for item in items[:_LISTED]) + more


class Weights(ABC):
    """Where a decoder takes its weights from, each once, on one device and in the compute dtype.

    Attributes:
        has_head: Whether there is an output head beside the embedding.
    """

    has_head: bool

    @abstractmethod
    def take(self, name: str) -> Tensor:
        """The tensor of that name, named as in :func:`expected_tensors`."""

    def linear(self, prefix: str, bias: bool = False) -> SingleLinear:
        """The layer whose tensors' names begin with ``prefix``: dense, or packed as it is stored."""
        return Linear(self.take(f"{prefix}.weight"), self.take(f"{prefix}.bias") if bias else None)


class HeldWeights(Weights):
    """Those of a dict, which are taken out of it."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors, self.has_head = tensors, HEAD in tensors

    def take(self, name: str) -> Tensor:
        """See :class:`Weights`."""
        return self._tensors.pop(name)


class StoredWeights(Weights):
    """Those of a model folder, read when they are taken, straight into the memory that they are to have.

    Headers, names, shapes and dtypes of all files are checked when it is made, before any data is read.

    Attributes:
        cfg: The configuration, as :func:`stored_config` has it.

    Raises:
        OctoError: Any defect, also a value that does not fit into float16 and a file that is changed or replaced
            meanwhile.
    """

    def __init__(self, model_dir: Path, cfg: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        found = locate_tensors(model_dir)
        self.cfg = _stored_config(cfg, found)
        self.has_head = not self.cfg.tie_word_embeddings
        self._entries = check_tensors(model_dir, self.cfg, found)
        self._device, self._dtype = torch.device(device), dtype

    def take(self, name: str) -> Tensor:
        """See :class:`Weights`."""
        entry = self._entries[name]
        with TensorFile(entry.file) as data:
            tensor = data.read(entry, self._device, self._dtype)
        if self._dtype == torch.float16 and entry.dtype != "F16" and not tensor.isfinite().all():
            raise OctoError(f"{entry.path}: {name} has values that float16 cannot hold: choose bfloat16 or float32.")
        return tensor


class RandomWeights(Weights):
    """Random ones of a shape.

    Matrices and embeddings are N(0, 1 / columns), norms near 1, biases near 0, so that activations and logits have a
    scale of about 1. The same seed gives the same values on the same type of device; on ``meta`` there are none.
    """

    def __init__(self, cfg: ModelConfig, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> None:
        self._shapes, self.has_head = expected_tensors(cfg), not cfg.tie_word_embeddings
        self._numbers = {name: number for number, name in enumerate(self._shapes)}
        self._device, self._dtype, self._seed = torch.device(device), dtype, seed

    def take(self, name: str) -> Tensor:
        """See :class:`Weights`."""
        shape = self._shapes[name]
        # drawn in the target dtype when it is a 16-bit one: a float32 copy of a large matrix would double the peak
        values = torch.empty(shape, device=self._device, dtype=self._dtype)
        if values.is_meta:
            return values
        seed = (self._seed * 1_000_003 + self._numbers[name]) % 2**63
        values.normal_(generator=torch.Generator(self._device).manual_seed(seed))
        if name.endswith("norm.weight"):
            return values.mul_(0.1).add_(1.0)
        return values.mul_(0.1 if name.endswith(".bias") else shape[1] ** -0.5)


def load_weights(
    model_dir: Path, cfg: ModelConfig, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """All tensors of :class:`StoredWeights` by name.

    A stored output head counts as :func:`stored_config` says, so there is ``lm_head.weight`` exactly if that is not
    tied.

    Raises:
        OctoError: As :class:`StoredWeights` does.
    """
    weights = StoredWeights(model_dir, cfg, device, dtype)
    return {name: weights.take(name) for name in expected_tensors(weights.cfg)}


def random_weights(
    cfg: ModelConfig, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """All tensors of :class:`RandomWeights` by name."""
    weights = RandomWeights(cfg, device, dtype, seed)
    return {name: weights.take(name) for name in expected_tensors(cfg)}
