"""The means of the keys before RoPE, one a layer and KV head, that never enter the code (`models.conditioning`)."""

import torch
from torch import Tensor

from octo_run.engine.arena import PAGE, ArenaShape
from octo_run.kernels.attention import key_mean
from octo_run.kernels.attention.key_mean import AngleTables, KeyMean


class KeyMeans:
    """What is needed to take means out of pages of keys and to give them back in attention."""

    def __init__(self, shape: ArenaShape, means: list[Tensor], key_maps: list[Tensor], inv_freq: Tensor) -> None:
        """Make the tables.

        Args:
            means: Of each layer, float32 ``[kv_heads, d]``.
            key_maps: Of each layer, ``[kv_heads, d, d]``: keys after RoPE times them are stored.
            inv_freq: ``[d / 2]`` on the device that all of this is to lie on.
        """
        device, s = inv_freq.device, shape
        self.tables = AngleTables.build(inv_freq, s.sink, s.max_pages)
        if s.on_gpu:
            _ = self.tables.lanes  # made now: a recorded step cannot
        self.maps = torch.empty(s.layers, s.kv_heads, s.head_dim, s.head_dim, device=device)
        for layer, (mean, key_map) in enumerate(zip(means, key_maps, strict=True)):
            self.adopt(layer, mean, key_map)
        pages = max(s.layers, (s.ring + s.chunk) // PAGE)
        self._rows = torch.zeros(pages, s.kv_heads, PAGE, s.head_dim, dtype=s.dtype, device=device)

    def adopt(self, layer: int, mean: Tensor, key_map: Tensor) -> None:
        """Take another mean ``[kv_heads, d]`` and map ``[kv_heads, d, d]`` of a layer."""
        self.maps[layer].copy_(key_mean.mean_maps(mean, key_map))

    def take_out(self, k: Tensor, layer: int, first: Tensor) -> Tensor:
        """Pages of keys without their means.

        Args:
            k: ``[L, N, kv_heads, 64, d]`` of the layers from ``layer`` on.
            first: The number of the first page, int32 ``[1]``.

        Returns:
            Pages like ``k``, good until the next call.
        """
        out = self._rows[: k.shape[0] * k.shape[1]].view(k.shape)
        return key_mean.take_out(k, self.maps[layer : layer + k.shape[0]], first, self.tables, out)

    def of_queries(self, layer: int, coefficients: Tensor | None) -> KeyMean:
        """What attention takes for queries ``[B, C, heads, d]`` with coefficients of this shape."""
        return KeyMean(self.maps[layer], self.tables, coefficients)
