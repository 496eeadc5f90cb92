"""Model weights: which tensors a configuration needs, and reading exactly those from safetensors files."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from octo_run.errors import OctoError
from octo_run.models.config import ModelConfig
from octo_run.models.files import INDEX_NAME, SINGLE_NAME, read_index, weight_files
from octo_run.models.safetensors_file import FLOAT_DTYPES, MappedFile, TensorEntry, read_header

_LISTED = 4
# Buffers that older checkpoints carry along; they are computed from the configuration instead.
_HARMLESS = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


def expected_tensors(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor the decoder needs, named as in Hugging Face checkpoints.

    Matrices are ``[out, in]``. With tied embeddings there is no ``lm_head.weight``.
    """
    hidden, inner = cfg.hidden_size, cfg.intermediate_size
    q_size, kv_size = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (cfg.vocab_size, hidden)}
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
        shapes["lm_head.weight"] = (cfg.vocab_size, hidden)
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
    missing = [path.name for path in files if not path.exists()]
    if missing:
        count = f"{len(missing)} of {len(files)} weight files missing"
        raise OctoError(f"{model_dir} is not complete: {count} ({_listing(missing)}), so fetch the model again.")
    found: dict[str, TensorEntry] = {}
    for path in files:
        for name, entry in read_header(path).items():
            if name in found:
                raise OctoError(f"{model_dir}: the tensor {name!r} is in {found[name].path.name} and in {path.name}.")
            found[name] = entry
    if files[0].name != SINGLE_NAME:
        for name, file in read_index(model_dir / INDEX_NAME).items():
            if name not in found or found[name].path.name != file:
                raise OctoError(f"{model_dir}: {INDEX_NAME} places {name!r} in {file}, which does not hold it.")
    return found


def check_tensors(model_dir: Path, cfg: ModelConfig, found: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The entries of ``found`` that the decoder needs. OctoError listing missing, unexpected and misshapen tensors."""
    expected = expected_tensors(cfg)
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and not _harmless(name, cfg)]
    shapes = [
        f"{name} is {list(found[name].shape)} instead of {list(shape)}"
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
    return _HARMLESS.fullmatch(name) is not None or (cfg.tie_word_embeddings and name == "lm_head.weight")


def _listing(names: Iterable[str]) -> str:
    items = list(names)
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more


def load_weights(
    model_dir: Path, cfg: ModelConfig, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Read the tensors of :func:`expected_tensors` from ``model_dir`` to ``device`` in ``dtype``.

    Headers, names, shapes and dtypes of all files are checked before any data is read; then one tensor at a time is
    copied from the memory-mapped file, so at most one tensor exists twice. OctoError for every defect, also when a
    value does not fit into float16.
    """
    device = torch.device(device)
    entries = check_tensors(model_dir, cfg, locate_tensors(model_dir))
    by_file: dict[Path, list[str]] = {}
    for name, entry in entries.items():
        by_file.setdefault(entry.path, []).append(name)
    weights: dict[str, Tensor] = {}
    for path, names in by_file.items():
        mapped = MappedFile(path)
        for name in sorted(names, key=lambda item: entries[item].start):
            weights[name] = mapped.read(entries[name], device, dtype)
            if dtype == torch.float16 and entries[name].dtype != "F16" and not bool(weights[name].isfinite().all()):
                raise OctoError(f"{path}: {name} has values that float16 cannot hold: choose bfloat16 or float32.")
    return {name: weights[name] for name in entries}


def random_weights(
    cfg: ModelConfig, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """A dict like :func:`load_weights` makes, with random values: matrices and embeddings N(0, 1 / columns), norms
    near 1, biases near 0, so that activations and logits have a scale of about 1. The same seed gives the same values
    on the same type of device.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in expected_tensors(cfg).items():
        # drawn in the target dtype when it is a 16-bit one: a float32 copy of a large matrix would double the peak
        values = torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator)
        if name.endswith("norm.weight"):
            values.mul_(0.1).add_(1.0)
        elif name.endswith(".bias"):
            values.mul_(0.1)
        else:
            values.mul_(shape[1] ** -0.5)
        weights[name] = values
    return weights
