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
        #: For each kind of layers, ``[layers, kv_heads, d, d]``.
        self._maps = [
            torch.empty(len(layers), heads.number, heads.size, heads.size, device=device)
            for heads, layers in s.kinds.items()
        ]
        #: For each layer its kind, and its number among the layers of that.
        self._places = [s.place(layer) for layer in range(s.layers)]
        for layer, (mean, key_map) in enumerate(zip(means, key_maps, strict=True)):
            self.adopt(layer, mean, key_map)
        pages = (s.ring + s.chunk) // PAGE
        self._rows = [
            torch.zeros(max(len(layers), pages), heads.number, PAGE, heads.size, dtype=s.dtype, device=device)
            for heads, layers in s.kinds.items()
        ]

    def adopt(self, layer: int, mean: Tensor, key_map: Tensor) -> None:
        """Take another mean ``[kv_heads, d]`` and map ``[kv_heads, d, d]`` of a layer."""
        self.maps(layer).copy_(key_mean.mean_maps(mean, key_map))

    def maps(self, layer: int) -> Tensor:
        """What is added to keys and queries of a layer is angles times it: ``[kv_heads, d, d]``."""
        kind, number = self._places[layer]
        return self._maps[kind][number]

    def take_out(self, k: Tensor, layers: tuple[int, ...], first: Tensor) -> Tensor:
        """Pages of keys without their means.

        Args:
            k: ``[L, N, kv_heads, 64, d]``.
            layers: Theirs: one, or all of one kind.
            first: The number of the first page, int32 ``[1]``.

        Returns:
            Pages like ``k``, good until the next call for layers of this kind.
        """
        kind, place = self._places[layers[0]]
        out = self._rows[kind][: k.shape[0] * k.shape[1]].view(k.shape)
        done, count = 0, k.shape[0]
        while done < count:  # layers of one kind that follow one another by one call
            tables, end = self.tables[layers[done]], done + 1
            while end < count and self.tables[layers[end]] is tables:
                end += 1
            part = slice(done, end)
            key_mean.take_out(k[part], self._maps[kind][place + done : place + end], first, tables, out[part])
            done = end
        return out

    def of_queries(self, layer: int, coefficients: Tensor | None) -> KeyMean:
        """What attention takes for queries ``[B, C, heads, d]`` with coefficients of this shape."""
        return KeyMean(self.maps(layer), self.tables[layer], coefficients)
