"""The means of the keys before RoPE, one a layer and KV head, that never enter the code (`models.conditioning`)."""

import torch
from torch import Tensor

from octo_run.engine.arena import PAGE, ArenaShape
from octo_run.kernels.attention import key_mean
from octo_run.kernels.attention.key_mean import AngleTables, KeyMean


class KeyMeans:
    """What is needed to take means out of pages of keys and to give them back in attention."""

    def __init__(
        self, shape: ArenaShape, means: list[Tensor], key_maps: list[Tensor], frequencies: list[Tensor]
    ) -> None:
        """Make the tables.

        Args:
            means: Of each layer, float32 ``[kv_heads, d]``.
            key_maps: Of each layer, ``[kv_heads, d, d]``: keys after RoPE times them are stored.
            frequencies: Of each layer, ``[d / 2]`` on the device that all of this is to lie on. Layers of one kind
                have one tensor.
        """
        device, s = frequencies[0].device, shape
        made: dict[int, AngleTables] = {}
        for one in frequencies:
            if id(one) not in made:
                made[id(one)] = AngleTables.build(one, s.sink, s.max_pages)
                if s.on_gpu:
                    _ = made[id(one)].lanes  # made now: a recorded step cannot
        #: The angles of each layer; layers of one kind have one table.
        self.tables = [made[id(one)] for one in frequencies]
        self.maps = torch.empty(s.layers, s.kv_heads, s.head_dim, s.head_dim, device=device)
        for layer, (mean, key_map) in enumerate(zip(means, key_maps, strict=True)):
            self.maps[layer] = key_mean.mean_maps(mean, key_map)
        pages = max(s.layers, (s.ring + s.chunk) // PAGE)
        self._rows = torch.zeros(pages, s.kv_heads, PAGE, s.head_dim, dtype=s.dtype, device=device)

    def take_out(self, k: Tensor, layer: int, first: Tensor) -> Tensor:
        """Pages of keys without their means.

        Args:
            k: ``[L, N, kv_heads, 64, d]`` of the layers from ``layer`` on.
            first: The number of the first page, int32 ``[1]``.

        Returns:
            Pages like ``k``, good until the next call.
        """
        out = self._rows[: k.shape[0] * k.shape[1]].view(k.shape)
        done, count = 0, k.shape[0]
        while done < count:  # neighbouring layers of one kind by one call
            tables, end = self.tables[layer + done], done + 1
            while end < count and self.tables[layer + end] is tables:
                end += 1
            part = slice(done, end)
            key_mean.take_out(k[part], self.maps[layer + done : layer + end], first, tables, out[part])
            done = end
        return out

    def of_queries(self, layer: int, coefficients: Tensor | None) -> KeyMean:
        """What attention takes for queries ``[B, C, heads, d]`` with coefficients of this shape."""
        return KeyMean(self.maps[layer], self.tables[layer], coefficients)
