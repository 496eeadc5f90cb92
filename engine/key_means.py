"""The means of the keys before RoPE, one a layer, row of the arena and KV head, that never enter the code.

A mean is taken from the tokens of the sequence's first packed page and stays; a sequence cut back to before that page
takes a new one with its next first page. That covers a k_proj bias as well: it is a part of every key.
"""

import torch
from torch import Tensor

from octo_run.engine.arena import PAGE, ArenaShape
from octo_run.kernels.attention import key_mean
from octo_run.kernels.attention.key_mean import AngleTables, KeyMean


class KeyMeans:
    """Means and what is needed to take them out of pages of keys and to give them back in attention."""

    def __init__(self, shape: ArenaShape, rotation: Tensor, inv_freq: Tensor) -> None:
        """Make room for the means, and the tables for taking them out.

        Args:
            rotation: ``[d, d]`` of the codec of K.
            inv_freq: ``[d / 2]`` on the device that all of this is to lie on.
        """
        device, s = inv_freq.device, shape
        self._on_gpu = s.on_gpu
        self.rotation = rotation.to(device=device, dtype=torch.float32).contiguous()
        self.tables = AngleTables.build(inv_freq, s.sink, s.max_pages)
        if s.on_gpu:
            _ = self.tables.lanes  # made now: a recorded step cannot
        self.means = torch.zeros(s.layers, s.sequences, s.kv_heads, s.head_dim, device=device)
        self._coefficients = torch.zeros(s.mean_queries, s.mean_heads, s.head_dim, device=device)
        pages = max(s.layers, (s.ring + s.chunk) // PAGE)
        self._rows = torch.zeros(pages, s.kv_heads, PAGE, s.head_dim, dtype=s.dtype, device=device)

    def learn(self, layer: int, row: int, keys: Tensor) -> None:
        """Take the means of a layer from its first page of keys.

        Args:
            keys: ``[kv_heads, 64, d]`` in the rotated basis.
        """
        angles = self.tables.of_pages(0, 1)[0]
        self.means[layer, row] = key_mean.estimate(keys, angles, self.rotation)

    def copy_row(self, donor: int, row: int) -> None:
        """Give a row the means of another one."""
        self.means[:, row].copy_(self.means[:, donor])

    def take_out(self, k: Tensor, layer: int, row: int, first: Tensor) -> Tensor:
        """Pages of keys without their means.

        Args:
            k: ``[L, N, kv_heads, 64, d]`` of the layers from ``layer`` on.
            first: The number of the first page, int32 ``[1]``.

        Returns:
            Pages like ``k``, good until the next call.
        """
        out = self._rows[: k.shape[0] * k.shape[1]].view(k.shape)
        means = self.means[layer : layer + k.shape[0], row]
        return key_mean.take_out(k, means, first, self.tables, self.rotation, out)

    def of_queries(self, layer: int, row: int | None, rows: Tensor, q: Tensor) -> KeyMean:
        """What attention takes for queries; good until the next call.

        Args:
            row: The one row whose means are used, from which ``rows`` then counts (None: all rows).
            rows: The rows of the sequences, int32 ``[B]``.
            q: Queries ``[B, C, heads, d]``.
        """
        means = self.means[layer] if row is None else self.means[layer, row : row + 1]
        found = None
        if q.shape[1] == 1 or not self._on_gpu:
            out = self._coefficients.view(-1)[: q.numel()].view(q.shape)
            found = key_mean.rotated_coefficients(q, means, rows, self.rotation, out)
        return KeyMean(means, self.rotation, self.tables, found)
