"""The means of the keys before RoPE, one a layer and KV head, that never enter the code (`models.conditioning`)."""

import torch
from torch import Tensor

from octo_run.engine.arena import PAGE, ArenaShape
from octo_run.kernels.attention import key_mean
from octo_run.kernels.attention.key_mean import AngleTables, KeyMean


class KeyMeans:
    """What is needed to take means out of pages of keys and to give them back in attention."""

    def __init__(
        self,
        shape: ArenaShape,
        means: dict[int, Tensor],
        key_maps: dict[int, Tensor],
        frequencies: dict[int, Tensor],
    ) -> None:
        """Make the tables.

        Args:
            means: Of each layer whose keys have a code, by its number in the arena: float32 ``[kv_heads, d]``.
            key_maps: Of the same layers, ``[kv_heads, d, d]``: keys after RoPE times them are stored.
            frequencies: Of the same layers, ``[d / 2]`` on the device that all of this is to lie on. Layers of one kind
                have one tensor.
        """
        device, s = next(iter(frequencies.values())).device, shape
        made: dict[int, AngleTables] = {}
        for one in frequencies.values():
            if id(one) not in made:
                made[id(one)] = AngleTables.build(one, s.sink, s.max_pages)
                if s.on_gpu:
                    _ = made[id(one)].lanes  # made now: a recorded step cannot
        #: The angles of each layer that has a mean; layers of one kind have one table.
        self.tables = {layer: made[id(one)] for layer, one in frequencies.items()}
        theirs = [[layer for layer in layers if layer in means] for layers in s.kinds.values()]
        #: For each kind of layers, ``[layers with a mean, kv_heads, d, d]``.
        self._maps = [
            torch.empty(len(layers), heads.number, heads.size, heads.size, device=device)
            for heads, layers in zip(s.kinds, theirs, strict=True)
        ]
        #: For each layer that has a mean its kind, and its number among such layers of that.
        self._places = {
            layer: (kind, number) for kind, layers in enumerate(theirs) for number, layer in enumerate(layers)
        }
        for layer, mean in means.items():
            self.adopt(layer, mean, key_maps[layer])
        pages = (s.ring + s.chunk) // PAGE
        #: For each kind of layers room for the pages of a chunk, or for one of all of them.
        self._rows = [
            torch.zeros(
                max(len(layers), pages) if some else 0, heads.number, PAGE, heads.size, dtype=s.dtype, device=device
            )
            for (heads, layers), some in zip(s.kinds.items(), theirs, strict=True)
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
            Pages like ``k``, good until the next call for layers of this kind; those of layers without a mean are the
            same. ``k`` itself if none has one.
        """
        kind = next((self._places[layer][0] for layer in layers if layer in self._places), None)
        if kind is None:
            return k
        out = self._rows[kind][: k.shape[0] * k.shape[1]].view(k.shape)
        done, count = 0, k.shape[0]
        while done < count:  # layers of one kind that follow one another by one call
            tables, end = self.tables.get(layers[done]), done + 1
            while end < count and self.tables.get(layers[end]) is tables:
                end += 1
            part = slice(done, end)
            if tables is None:
                out[part].copy_(k[part])
            else:
                _, place = self._places[layers[done]]
                maps = self._maps[kind][place : place + end - done]
                key_mean.take_out(k[part], maps, first, tables, out[part])
            done = end
        return out

    def of_queries(self, layer: int, coefficients: Tensor | None) -> KeyMean | None:
        """What attention takes for queries ``[B, C, heads, d]`` with coefficients of this shape; None: the layer has no
        mean."""
        if layer not in self._places:
            return None
        return KeyMean(self.maps(layer), self.tables[layer], coefficients)
