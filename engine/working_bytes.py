"""Bytes that are taken for a while only: while a chunk goes through the layers, and while weights are loaded."""

import math
from collections import Counter

import torch
from torch import Tensor

from octo_run import kernels
from octo_run.engine import sensitivity
from octo_run.engine.allocation import AutoFormats
from octo_run.engine.arena import ArenaShape
from octo_run.engine.calibration import FEWER
from octo_run.kernels.codec import LayerFormats
from octo_run.kernels.cpu import library
from octo_run.kernels.cpu.linear import product_bytes
from octo_run.kernels.experts.reference import SLAB_PAIRS
from octo_run.kernels.linear import BLOCK
from octo_run.kernels.linear.reference import SLAB_BYTES
from octo_run.kernels.recurrent import host_bytes
from octo_run.models.config import ModelConfig
from octo_run.models.decoder import Decoder, Layer
from octo_run.models.linear import Linear, PackedLinear, SingleLinear
from octo_run.models.quantisation.importance import TOKENS as MEASURED
from octo_run.models.quantisation.schemes import CODE_BYTES, PIECE, WORKING_BYTES
from octo_run.models.quantisation.stored import SLAB_BYTES as STORED_SLAB
from octo_run.models.tensors import expected_tensors


def temporary_bytes(decoder: Decoder, shape: ArenaShape, fmt: LayerFormats, device: torch.device) -> int:
    """Bytes that a chunk takes beside the buffers that are kept, and the matrix-product library's workspace."""
    if device.type == "cuda":
        return library_workspace(device) + _slab(decoder) + _joining(decoder) + _lent_bytes(shape)
    return _cpu_temporaries(decoder, shape, fmt) + _lent_bytes(shape)


def library_workspace(device: torch.device) -> int:
    """Bytes that the matrix-product library takes through the allocator for a stream (PyTorch's own defaults)."""
    if device.type == "cpu":
        return 0
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    return (32 * 1024 if hopper else 8 * 1024 + 128) * 1024


def _cpu_temporaries(decoder: Decoder, shape: ArenaShape, fmt: LayerFormats) -> int:
    """Bytes of the largest set of tensors alive at once for a chunk beside the kept buffers: in the MLP, a norm, the
    attention, or a product with a packed weight (``_slab``). What the compiled kernels work on they keep."""
    cfg = decoder.cfg
    rows, size = shape.chunk, shape.dtype.itemsize
    norm = rows * cfg.hidden_size * (3 * 4 + 2 * size)
    attention = max(
        kernels.attention_host_bytes(
            shape.chunk, cfg.num_heads, *heads, (shape.max_pages, shape.ring + shape.chunk), one, shape.dtype,
            mean=bool(shape.mean_heads) and one.k.bits > 0,
        )
        for heads, one in {*zip(shape.heads, fmt, strict=True)}
    )  # fmt: skip
    recurrent = 0
    if shape.recurrent is not None:
        recurrent = host_bytes(shape.recurrent.delta, shape.chunk)
    inner = cfg.intermediate_size * (2 if cfg.double_wide else 1)
    products = _cpu_products(decoder, rows) + _cpu_experts(cfg, rows, size)
    return max(rows * inner * size, norm, attention, recurrent, products)


def _cpu_products(decoder: Decoder, rows: int) -> int:
    """Bytes that products of a chunk with packed weights take, if there are such."""
    parts = [part for layer in decoder.layers for part in products_of(layer)]
    narrow = any(isinstance(part, Linear) and part.weight.dtype != decoder.dtype for part in parts)
    if not _slab(decoder) or library() is None or narrow:
        return _slab(decoder)
    return product_bytes(rows, max(part.weight.shape[1] for part in parts))


def _cpu_experts(cfg: ModelConfig, rows: int, size: int) -> int:
    """Bytes of the largest set of tensors alive at once for a chunk in a layer of experts, if there are such: in the
    router, for some pairs of token and expert, or in the sum of what the experts make."""
    experts, hidden = cfg.experts, cfg.hidden_size
    if experts is None:
        return 0
    wide = 0 if size == 4 else 4  # a copy in float32
    pairs = min(rows * experts.chosen, SLAB_PAIRS)
    expert = pairs * (hidden * size + experts.inner * (3 * size + 2 * wide + 8)) + 24 * rows * experts.chosen
    router = (rows + experts.count) * hidden * wide + 20 * rows * experts.count
    return max(expert, router, 8 * rows * hidden)


def _lent_bytes(shape: ArenaShape) -> int:
    """Bytes of the tails that chunks keep of layers whose keys and values later layers see, too: each chunk's own."""
    tokens = shape.sequences * shape.ring + shape.chunk
    heads = (shape.heads[layer] for layer in shape.lent)
    return sum(2 * tokens * one.number * one.size * shape.dtype.itemsize for one in heads)


def _slab(decoder: Decoder) -> int:
    """Bytes of the rows that products of many tokens with packed weights decode at a time, if there are such; on a CPU
    also those of weights in another dtype than the arithmetic's."""
    layers = [part for layer in decoder.layers for part in products_of(layer)]
    decoded = (isinstance(part, PackedLinear) or part.weight.dtype != decoder.dtype for part in (*layers, decoder.head))
    return SLAB_BYTES if any(decoded) else 0


def _joining(decoder: Decoder) -> int:
    """Bytes in which the slices of products with packed weights of many columns meet on a GPU, if there are such."""
    from octo_run.kernels.linear import launch

    parts = [part for layer in decoder.layers for part in products_of(layer)] + [decoder.head]
    packed = [part.weight for part in parts if isinstance(part, PackedLinear)]
    return 4 * launch.PARTS if any(launch.tiling(weight.padded // BLOCK).slices > 1 for weight in packed) else 0


def products_of(layer: Layer) -> tuple[SingleLinear, ...]:
    """The matrices of a layer, experts but for their shared one left out."""
    return (*layer.mixer.parts, *layer.mlp.parts)


def loading_bytes(decoder: Decoder, weights: int, fmt: LayerFormats, device: torch.device, quantised: bool) -> int:
    """Bytes of the weights and of the largest copies made while a layer is read, fused, rotated (in float32) and packed
    (in float32), or of what choosing formats takes."""
    cfg, size = decoder.cfg, decoder.dtype.itemsize
    copies = sensitivity.working_bytes(cfg, FEWER, device) if isinstance(fmt, AutoFormats) else 0
    heads = cfg.num_heads * max(spec.head_dim for spec in decoder.specs)
    for layer in decoder.layers:
        dense = quantised or any(isinstance(part, Linear) for part in layer.mixer.parts)
        fused = max(layer.mixer.joined_bytes, layer.mlp.joined_bytes)
        if cfg.quantisation is not None:
            fused += _stored(decoder.head, *products_of(layer))
        copies = max(copies, fused, cfg.hidden_size * heads * (8 + size) * dense)
    table = cfg.vocab_size * cfg.hidden_size
    if quantised:
        # The whole layer is there when its largest matrix is packed: codes in order, in lane order, and pieces.
        layers = Counter[str]()
        for name, shape in expected_tensors(cfg).items():
            if name.startswith("model.layers."):
                layers[name.split(".")[2]] += math.prod(shape)
        wide = cfg.intermediate_size * (2 if cfg.double_wide else 1)
        inner = max(wide, 0 if cfg.experts is None else cfg.experts.inner)
        largest = cfg.hidden_size * max(2 * inner, heads)
        pieces = WORKING_BYTES * min(PIECE[device.type], largest)
        inputs = MEASURED * max(3 * inner, 6 * heads) * (4 + size)
        if cfg.experts is not None:  # pairs of token and expert
            inputs += MEASURED * cfg.experts.chosen * (cfg.experts.inner + 3 * cfg.hidden_size) * size
        copies = max(layers.values()) * size + max(copies, CODE_BYTES * largest + pieces, inputs)
    # The embedding is packed first, then a head of its own beside it.
    first = 0 if isinstance(decoder.embedding, Tensor) else table * (size + CODE_BYTES) + decoder.embedding.nbytes
    return max(weights + copies, first)


def _stored(*parts: SingleLinear) -> int:
    """Bytes at most that reading the largest of some layers takes beside its packed weight if its file holds it packed:
    its tensors as they are stored, their scales and zeros in float32, and codes that are put in order."""
    packed = [part for part in parts if isinstance(part, PackedLinear)]
    groups = (part.weight.nbytes + 12 * part.weight.codes.numel() // part.weight.group for part in packed)
    return max(groups, default=-STORED_SLAB) + STORED_SLAB
