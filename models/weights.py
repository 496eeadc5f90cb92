"""Model weights: exactly the tensors that a configuration needs, taken from safetensors files one by one, or drawn."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from octo_run.errors import OctoError
from octo_run.kernels.linear import PackedWeight
from octo_run.kernels.linear.packed import values
from octo_run.models.config import ModelConfig
from octo_run.models.linear import Linear, PackedLinear, SingleLinear
from octo_run.models.quantisation.layouts import LAYOUTS
from octo_run.models.quantisation.stored import digest_of, empty_weight, packed
from octo_run.models.safetensors_file import STORED_DTYPES, TensorEntry, TensorFile
from octo_run.models.tensors import (
    HEAD,
    LAYER_SCALE,
    checked,
    column_order,
    damaged,
    expected_tensors,
    quantised_layers,
)


class Weights(ABC):
    """Where a decoder takes its weights from, each once, on one device and in the compute dtype.

    Attributes:
        has_head: Whether there is an output head beside the embedding.
    """

    has_head: bool

    @abstractmethod
    def take(self, name: str) -> Tensor:
        """The tensor of that name, named as in :func:`expected_tensors`."""

    def matrix(self, name: str) -> Tensor:
        """The same for a matrix of a layer, an embedding or a head, which may be stored in another dtype."""
        return self.take(name)

    def linear(self, prefix: str, bias: bool = False) -> SingleLinear:
        """The layer whose tensors' names begin with ``prefix``: dense, or packed as it is stored."""
        return Linear(self.matrix(f"{prefix}.weight"), self.take(f"{prefix}.bias") if bias else None)


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

    Args:
        matrices: The dtype of what is taken as a matrix (None: ``dtype``).

    Attributes:
        cfg: The configuration, as :func:`stored_config` has it.

    Raises:
        OctoError: Any defect, also a value that does not fit into float16 and a file that is changed or replaced
            meanwhile.
    """

    def __init__(
        self,
        model_dir: Path,
        cfg: ModelConfig,
        device: torch.device | str,
        dtype: torch.dtype,
        matrices: torch.dtype | None = None,
    ) -> None:
        self.cfg, self._entries = checked(model_dir, cfg)
        self.has_head = not self.cfg.tie_word_embeddings
        self._layers, self._orders = quantised_layers(self.cfg), dict[str, Tensor]()
        self._device, self._dtype, self._matrices = torch.device(device), dtype, matrices or dtype

    def take(self, name: str) -> Tensor:
        """See :class:`Weights`; a quantised matrix becomes a plain one."""
        return self._taken(name, self._dtype)

    def matrix(self, name: str) -> Tensor:
        """See :class:`Weights`."""
        return self._taken(name, self._matrices)

    def _taken(self, name: str, dtype: torch.dtype) -> Tensor:
        prefix = name.removesuffix(".weight")
        if prefix in self._layers:
            source = _LayerSource(self._entries, prefix, self._device)
            entry = source.entry(LAYOUTS[self._layers[prefix][0].layout].marker)
            return self._checked(name, entry, self._packed(prefix, source).dequantised(dtype))
        entry = self._entries[name]
        with TensorFile(entry.file) as data:
            tensor = data.read(entry, self._device, dtype)
        return self._checked(name, entry, tensor)

    def linear(self, prefix: str, bias: bool = False) -> SingleLinear:
        """See :class:`Weights`."""
        if prefix not in self._layers:
            return super().linear(prefix, bias)
        source = _LayerSource(self._entries, prefix, self._device)
        if not bias and source.has("bias") and bool((source("bias") != 0).any()):
            raise source.damaged("bias", "is not 0, though the model has no bias there")
        return PackedLinear(self._packed(prefix, source), self.take(f"{prefix}.bias") if bias else None)

    def _packed(self, prefix: str, source: "_LayerSource") -> PackedWeight:
        scheme, (out, columns) = self._layers[prefix]
        layout = LAYOUTS[scheme.layout]
        digest, order = self.cfg.quantisation.orders.get(prefix, "") if self.cfg.quantisation else "", None
        if digest and layout.order is not None:
            order = self._orders.get(digest)
            if order is None:
                name = f"{prefix}.{layout.order}"
                order = column_order(name, self._entries[name], scheme, columns)
                if order is None or digest_of(order) != digest:
                    raise source.damaged(layout.order, "was changed while it was read")
                order = self._orders[digest] = order.to(self._device)
        return packed(layout, scheme, out, columns, source, self._device, order)

    def _checked(self, name: str, entry: TensorEntry, tensor: Tensor) -> Tensor:
        if self._dtype == torch.float16 and entry.dtype != "F16" and not tensor.isfinite().all():
            raise OctoError(f"{entry.path}: {name} has values that float16 cannot hold: choose bfloat16 or float32.")
        return tensor


@dataclass(frozen=True)
class _LayerSource:
    """The tensors of a quantised layer (``stored.Source``)."""

    entries: Mapping[str, TensorEntry]
    prefix: str
    device: torch.device

    def __call__(self, name: str) -> Tensor:
        entry = self.entry(name)
        with TensorFile(entry.file) as data:
            return data.read(entry, self.device, STORED_DTYPES[entry.dtype])

    def entry(self, name: str) -> TensorEntry:
        return self.entries[f"{self.prefix}.{name}"]

    def has(self, name: str) -> bool:
        return f"{self.prefix}.{name}" in self.entries

    def damaged(self, name: str, problem: str) -> OctoError:
        return damaged(self.entry(name), f"{self.prefix}.{name}", problem)


class RandomWeights(Weights):
    """Random ones of a shape, quantised as the configuration says.

    Matrices and embeddings are N(0, 1 / columns), weights of norms near 1 (near 0 where 1 is added to them), biases
    near 0, so that activations and logits have a
    scale of about 1. The same seed gives the same values on the same type of device; on ``meta`` there are none.

    Args:
        matrices: See :class:`StoredWeights`.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        device: torch.device | str,
        dtype: torch.dtype,
        seed: int = 0,
        matrices: torch.dtype | None = None,
    ) -> None:
        self._shapes, self.has_head = expected_tensors(cfg), not cfg.tie_word_embeddings
        self._numbers = {name: number for number, name in enumerate(self._shapes)}
        self._layers, self._orders = quantised_layers(cfg), dict[str, Tensor]()
        self._digests: Mapping[str, str] = {} if cfg.quantisation is None else cfg.quantisation.orders
        self._device, self._dtype, self._seed, self._matrices = torch.device(device), dtype, seed, matrices or dtype
        self._norm = 0.0 if cfg.family.norm == "one_plus" else 1.0

    def take(self, name: str) -> Tensor:
        """See :class:`Weights`."""
        return self._drawn(name, self._dtype)

    def matrix(self, name: str) -> Tensor:
        """See :class:`Weights`."""
        return self._drawn(name, self._matrices)

    def _drawn(self, name: str, dtype: torch.dtype) -> Tensor:
        shape = self._shapes[name]
        # drawn in the target dtype when it is a 16-bit one: a float32 copy of a large matrix would double the peak
        drawn = torch.empty(shape, device=self._device, dtype=dtype)
        if drawn.is_meta:
            return drawn
        drawn.normal_(generator=self._generator(name))
        if name.endswith(LAYER_SCALE):
            return drawn.mul_(0.1).add_(1)
        if len(shape) == 1 and name.endswith(".weight"):  # of a norm
            return drawn.mul_(0.1).add_(self._norm)
        return drawn.mul_(0.1 if len(shape) == 1 else shape[1] ** -0.5)

    def linear(self, prefix: str, bias: bool = False) -> SingleLinear:
        """See :class:`Weights`."""
        if prefix not in self._layers:
            return super().linear(prefix, bias)
        scheme, (out, columns) = self._layers[prefix]
        order = None
        if digest := self._digests.get(prefix):
            order = self._orders.setdefault(digest, torch.arange(columns, dtype=torch.int32, device=self._device))
        weight = empty_weight(scheme, out, columns, self._device, order)
        if not weight.codes.is_meta:
            self._fill(f"{prefix}.weight", weight)
        return PackedLinear(weight, self.take(f"{prefix}.bias") if bias else None)

    def _generator(self, name: str) -> torch.Generator:
        seed = (self._seed * 1_000_003 + self._numbers[name]) % 2**63
        return torch.Generator(self._device).manual_seed(seed)

    def _fill(self, name: str, weight: PackedWeight) -> None:
        weight.codes.random_(0, 256, generator=self._generator(name))
        numbers = values(weight.kind)
        if weight.kind == "fp8":  # small ones, and no NaN
            weight.codes.bitwise_and_(0xBF)
            numbers = numbers[torch.arange(256) & 0xBF]
        weight.rows.fill_(weight.columns**-0.5 / float(numbers.std()))
        if weight.scales is not None:
            weight.scales.fill_(1)
        if weight.offsets is not None:
            weight.offsets.zero_()


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
