"""Writing a quantised model as a folder that other programs load, too: compressed-tensors in safetensors files.

The layers' matrices are quantised as they are on load, with the rotation of values left out: it belongs to a format of
the cache, which a file does not know. Experts of int4 are symmetric (``Scheme.in_files``). The embedding, the output
head, norms and biases stay dense.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octo_run.errors import OctoError, UsageError
from octo_run.kernels.linear import PackedWeight
from octo_run.models.config import CONFIG_NAME
from octo_run.models.decoder import AttentionWeights, Decoder, spec_order
from octo_run.models.expert_tensors import published_name
from octo_run.models.experts import SHARED, Experts
from octo_run.models.families import MLPNames
from octo_run.models.files import INDEX_NAME, SMALL_NAMES
from octo_run.models.foreign import present, read_bytes, read_json_object
from octo_run.models.linear import PackedLinear, SplitLinear, head_order, joined
from octo_run.models.mlp import DenseMLP
from octo_run.models.quantisation.config import OLDER_NAMES
from octo_run.models.quantisation.importance import random_ids
from octo_run.models.safetensors_writer import Item, index_of, plan_shards
from octo_run.models.tensors import EMBEDDING, HEAD
from octo_run.models.weights import Weights
from octo_run.unfinished import unfinished

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from octo_run.models.config import ModelConfig
    from octo_run.models.decoder import Layer
    from octo_run.models.linear import SingleLinear
    from octo_run.models.quantisation.schemes import Scheme


#: Routed experts, by the names of their matrices in files.
_EXPERTS = r"re:.*\.experts\.[0-9]+\.(gate_proj|up_proj|down_proj|w1|w2|w3)$"


def quantization_config(scheme: Scheme, experts: bool = False) -> dict[str, Any]:
    """What ``config.json`` says about the weights, as compressed-tensors writes it; ``experts``: there are routers."""
    groups = [_config_group(["Linear"], _numbers(scheme))]
    if experts and scheme.kind == "fp8":
        # vLLM has fp8 experts with inputs of fp8 alone; transformers and octo-run leave the inputs as they are.
        inputs = _numbers(scheme) | {"strategy": "token", "dynamic": True, "observer": None}
        groups.append(_config_group([_EXPERTS], _numbers(scheme), inputs))
    elif experts and (routed := scheme.in_files.experts) is not None:
        groups.append(_config_group([_EXPERTS], _numbers(routed)))
    # transformers makes the places of packed tensors before it reads them, and those of packed zeros in the shape of
    # unpacked ones; told to dequantise, it reads each matrix whole.
    whole = {} if scheme.group is None else {"dequantize": True}
    return whole | {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if scheme.kind == "fp8" else "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head", *(("re:.*\\.gate$", "re:.*shared_expert_gate$") if experts else ())],
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
    }


def _numbers(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": 8 if scheme.kind in ("int8", "fp8") else 4,
        "type": "float" if scheme.kind == "fp8" else "int",
        "symmetric": scheme.group is None or scheme.symmetric,
        "strategy": "channel" if scheme.group is None else "group",
        "group_size": scheme.group,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _config_group(targets: list[str], weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"targets": targets, "weights": weights, "input_activations": inputs, "output_activations": None}


def check_shapes(cfg: ModelConfig, scheme: Scheme) -> None:
    """Refuse a model whose matrices have no whole number of groups, which the format does not allow, and a text part.

    Raises:
        OctoError: It says which.
        UsageError: A checkpoint that is more than its text.
    """
    if cfg.wrapper:
        raise UsageError(
            f"A checkpoint of {cfg.wrapper} holds more than its text, which alone octo-run knows, so that no quantised "
            "folder of it can be written: give --weights to the command that loads it."
        )
    if not cfg.plain_layers or cfg.recurrent:
        raise _unwritten(cfg)
    unit = scheme.group or 8
    inputs = {cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.intermediate_size}
    if cfg.experts is not None:
        if cfg.experts.naming == "stacked":  # which compressed-tensors has no layout for
            raise _unwritten(cfg)
        inputs |= {cfg.experts.inner, cfg.experts.shared} - {0}
    if broken := sorted(columns for columns in inputs if columns % unit):
        raise OctoError(
            f"A matrix of this model has {broken[0]:,} columns, no multiple of {unit}, and files of {scheme.name} have "
            "whole groups only: choose other --weights."
        )


def quantised_items(cfg: ModelConfig, weights: Weights, scheme: Scheme, dtype: torch.dtype) -> dict[str, Item]:
    """All tensors of a model in the format that :func:`quantization_config` describes.

    The packed weights are made now, layer by layer, and held; what is written is made of them piece by piece.

    Args:
        weights: Where they come from, in the dtype that they are measured in.
        dtype: Of the tensors that stay dense.
    """
    check_shapes(cfg, scheme)
    with torch.inference_mode():
        watched = _Watched(weights)
        decoder = Decoder(cfg, watched, None, None, scheme.in_files, random_ids(cfg) if scheme.weighted else None)
    items: dict[str, Item] = {}

    def dense(name: str, tensor: Tensor | PackedWeight | None) -> None:
        if isinstance(tensor, Tensor):
            items[name] = _item(dtype, tuple(tensor.shape), lambda: tensor.to(dtype).cpu())

    def packed(prefix: str, weight: Tensor | PackedWeight, bias: Tensor | None) -> None:
        assert isinstance(weight, PackedWeight)
        items.update({f"{prefix}.{name}": item for name, item in _packed_items(weight).items()})
        dense(f"{prefix}.bias", bias)

    dense(EMBEDDING, decoder.embedding)
    for index, layer in enumerate(decoder.layers):
        for name, linear in _matrices(cfg, layer):
            assert isinstance(linear, PackedLinear)
            packed(f"model.layers.{index}.{name}", linear.weight, linear.bias)
    for name, tensor in watched.taken.items():
        dense(name, tensor)
    if not cfg.tie_word_embeddings:
        dense(HEAD, decoder.head.weight)
    if cfg.experts is not None and cfg.experts.naming == "w123":
        items = {published_name(name): item for name, item in items.items()}
    return items


class _Watched(Weights):
    """Weights of which norms, routers and sinks are kept as they stand in the files."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self.has_head, self.taken = weights, weights.has_head, dict[str, Tensor]()

    def take(self, name: str) -> Tensor:
        tensor = self._weights.take(name)
        if name not in (EMBEDDING, HEAD):
            self.taken[name] = tensor
        return tensor

    def linear(self, prefix: str, bias: bool = False) -> SingleLinear:
        return self._weights.linear(prefix, bias)


def _matrices(cfg: ModelConfig, layer: Layer) -> Iterator[tuple[str, SingleLinear]]:
    """The matrices of a layer as files hold them, by their names behind the layer's prefix.

    Raises:
        UsageError: A layer that is more than attention and a dense MLP.
    """
    spec, mixer = layer.spec, layer.mixer
    if not isinstance(mixer, AttentionWeights):
        raise _unwritten(cfg)
    assert not isinstance(mixer.qkv, SplitLinear)
    order, (of_q, of_k, of_v) = spec_order(cfg, spec), spec.edges
    q, k, v = mixer.qkv.part(0, of_q), mixer.qkv.part(of_q, of_k), mixer.qkv.part(of_k, of_v)
    if order is not None:
        back = order.argsort()
        q, k = q.reordered(head_order(back, spec.heads)), k.reordered(head_order(back, spec.kv_heads))
    if cfg.family.fused_qkv:
        fused = joined(q, k, v)
        assert not isinstance(fused, SplitLinear)
        yield "self_attn.qkv_proj", fused
    else:
        yield from (("self_attn.q_proj", q), ("self_attn.k_proj", k), ("self_attn.v_proj", v))
    yield "self_attn.o_proj", mixer.out
    mlp = layer.mlp
    if isinstance(mlp, Experts):
        for name, linear in mlp.matrices():
            yield f"mlp.experts.{name}", linear
        if mlp.shared is not None:
            yield from _dense_mlp(SHARED, mlp.shared)
    elif isinstance(mlp, DenseMLP):
        yield from _dense_mlp(cfg.family.mlp, mlp)
    else:
        raise _unwritten(cfg)


def _dense_mlp(names: MLPNames, mlp: DenseMLP) -> Iterator[tuple[str, SingleLinear]]:
    gate_up = mlp.gate_up
    assert not isinstance(gate_up, SplitLinear)
    rows = 2 * mlp.down.weight.shape[1] // len(names.gate_up)
    for number, name in enumerate(names.gate_up):
        yield name, gate_up.part(number * rows, (number + 1) * rows)
    yield names.down, mlp.down


def _unwritten(cfg: ModelConfig) -> UsageError:
    return UsageError(
        f"Files of quantised {cfg.architecture} models are not written: load the model with --weights instead."
    )


def _item(dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Item:
    """A tensor that is made whole."""
    return Item(dtype, shape, lambda: [make().contiguous()])


def _packed_items(weight: PackedWeight) -> dict[str, Item]:
    """The tensors of one packed matrix."""
    out, columns = weight.shape
    groups = 1 if weight.scales is None else columns // weight.group

    def codes() -> Tensor:
        return weight.unpacked()[:, :columns].cpu()

    def scales() -> Tensor:
        factors = weight.rows[:, None].cpu()
        return factors if weight.scales is None else factors * weight.scales[:, :groups].to(torch.float32).cpu()

    scale = _item(torch.float32, (out, groups), scales)  # readers multiply in the dtype of the scales
    if weight.kind == "fp8":
        values = _item(torch.float8_e4m3fn, (out, columns), lambda: codes().view(torch.float8_e4m3fn))
        return {"weight": values, "weight_scale": scale}
    bits = 4 if weight.kind == "int4" else 8

    def integers() -> Tensor:  # int8 of two's complement becomes what it is plus 128
        found = codes()
        return _in_words(found if bits == 4 else found ^ 128, bits)

    items = {
        "weight_packed": _item(torch.int32, (out, -(-columns * bits // 32)), integers),
        "weight_scale": scale,
        "weight_shape": _item(torch.int64, (2,), lambda: torch.tensor([out, columns])),
    }
    if (offsets := weight.offsets) is not None:
        items["weight_zero_point"] = _item(
            torch.int32,
            (-(-out * bits // 32), groups),
            lambda: _in_words((offsets[:, :groups].cpu() + 8).to(torch.uint8).T, bits).T,
        )
    return items


def _in_words(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 ``[rows, n]``, the first in the lowest bits of int32 words ``[rows, n * bits / 32]``."""
    each = 32 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each)).view(len(codes), -1, each)
    shifts = torch.arange(0, 32, bits)
    words = (codes.to(torch.int64) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def write_folder(
    source: Path, target: Path, cfg: ModelConfig, items: dict[str, Item], scheme: Scheme,
    progress: Callable[[int, int], None] | None = None,
) -> int:  # fmt: skip
    """Write a model folder, which has its name only once it is whole.

    Args:
        source: The model's folder, of which configuration and tokenizer are taken.
        progress: Told the bytes written and to be written.

    Returns:
        The bytes of the folder.

    Raises:
        OctoError: The folder cannot be written.
    """
    shards = plan_shards(items)
    values = read_json_object(source / CONFIG_NAME)
    quantization = quantization_config(scheme, cfg.experts is not None)
    values |= {"tie_word_embeddings": cfg.tie_word_embeddings, "quantization_config": quantization}
    names = [name for name in SMALL_NAMES if name != INDEX_NAME and name not in OLDER_NAMES]
    files = {name: read_bytes(source / name) for name in names if present(source / name)}
    files[CONFIG_NAME] = json.dumps(values, indent=1).encode()
    if len(shards) > 1:
        files[INDEX_NAME] = index_of(shards)
    total, done = sum(map(len, files.values())) + sum(shard.size for shard in shards), 0
    with _new_folder(target, total) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
            done += len(content)
        for shard in shards:
            with (folder / shard.name).open("xb") as out:

                def write(data: bytes | memoryview) -> None:
                    nonlocal done
                    out.write(data)
                    done += len(data)
                    if progress is not None:
                        progress(done, total)

                shard.write(write)
    return total


def check_target(target: Path) -> None:
    """Raise ``UsageError`` for a folder that is there already or whose parent is not."""
    if os.path.lexists(target):
        raise UsageError(f"{target} is there already: name a folder that is not.")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"There is no folder {target.absolute().parent} to write {target.name} into.")


@contextmanager
def _new_folder(target: Path, size: int) -> Iterator[Path]:
    """A folder beside ``target`` that takes its name at the end, or is gone."""
    check_target(target)
    parent = target.absolute().parent
    try:
        free = shutil.disk_usage(parent).free
        if size > free:
            raise OctoError(f"{target} needs {size / 1e9:,.1f} GB and its disk has {free / 1e9:,.1f} GB free.")
        with unfinished(target.absolute(), folder=True) as partial:
            yield partial
            partial.rename(target)
    except OSError as error:
        raise OctoError(f"{target} cannot be written ({error.strerror or error}).") from error
