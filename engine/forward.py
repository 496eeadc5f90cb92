"""The one way forward, on every device: chunks of a prompt and decode steps through the layers, on kept buffers.

``Decoder.hidden`` computes the same in plain PyTorch, for tests to compare with; the rounding points are the same.
"""

import functools
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run import kernels
from octo_run.engine.arena import Chunk, KVArena
from octo_run.kernels import step as ops
from octo_run.kernels.cpu.memory import collapse_later
from octo_run.kernels.cpu.replay import Replays
from octo_run.models import rope
from octo_run.models.config import ModelConfig
from octo_run.models.decoder import Decoder

if TYPE_CHECKING:
    from octo_run.engine.step import StepState

#: ``mix(layer, qkv [R, (heads + 2 kv_heads) d]) -> [R, heads * d]``: from a layer's projections to its attention
Mix = Callable[[int, Tensor], Tensor]

_ANGLE_ROWS = 256  # angles worked on at a time
_ALIGNED = 128  # elements: every buffer begins on a multiple


Shapes = dict[str, tuple[int, ...]]


def _shapes(cfg: ModelConfig, rows: int) -> tuple[Shapes, Shapes, Shapes]:
    """Buffers that live through a layer, those of its attention, those of its MLP (the latter two share memory)."""
    q, kv = (cfg.num_heads, cfg.head_dim), (cfg.num_kv_heads, 1, cfg.head_dim)
    lasting: Shapes = dict.fromkeys(("residual", "normed", "delta"), (rows, cfg.hidden_size))
    lasting |= dict.fromkeys(("cos", "sin"), (rows, cfg.head_dim // 2))
    attention: Shapes = {"qkv": (rows, (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim), "q": (rows, 1, *q)}
    attention |= {"mixed": (rows, 1, *q), "kv": (2, rows, *kv)}
    mlp: Shapes = {"gate_up": (rows, 2 * cfg.intermediate_size), "inner": (rows, cfg.intermediate_size)}
    return lasting, attention, mlp


def _size(shapes: Shapes) -> int:
    return sum(-(-prod(shape) // _ALIGNED) * _ALIGNED for shape in shapes.values())


def buffer_bytes(cfg: ModelConfig, rows: int, dtype: torch.dtype) -> int:
    """Bytes that a :class:`Forward` of ``rows`` tokens holds."""
    lasting, attention, mlp = _shapes(cfg, rows)
    return (_size(lasting) + max(_size(attention), _size(mlp))) * dtype.itemsize + rows * (4 + 4 + 8)


class Forward:
    """Runs up to ``rows`` tokens through the layers of ``decoder`` over the sequences of ``arena``."""

    def __init__(self, decoder: Decoder, arena: KVArena, rows: int, workspace: Tensor | None) -> None:
        self.decoder, self.arena, self.workspace = decoder, arena, workspace
        cfg, device = decoder.cfg, arena.pages.device
        lasting, attention, mlp = _shapes(cfg, rows)
        kept = _size(lasting)
        flat = torch.empty(kept + max(_size(attention), _size(mlp)), dtype=arena.shape.dtype, device=device)
        self._buffers = {**_carve(flat, lasting), **_carve(flat[kept:], attention), **_carve(flat[kept:], mlp)}
        self._positions = torch.zeros(rows, dtype=torch.int32, device=device)
        self._no_slots = torch.zeros(rows, dtype=torch.int32, device=device)
        self._ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self._coefficients = torch.zeros(arena.shape.coefficients_shape(rows), device=device)
        #: Steps on a CPU, recorded. Where there is a second one, more will follow.
        self._replays = Replays(functools.partial(collapse_later, decoder))

    def _upload(self, ids: list[int]) -> Tensor:
        """``ids`` on the device, int64, without waiting for the device."""
        into = self._ids[: len(ids)]
        self.arena.upload(ids, into)
        return into

    def _coefficients_of(self, count: int) -> Tensor | None:
        """Where those of so many queries are written to, ``[count, 1, heads, d]``; None where nothing needs them."""
        return self._coefficients[:count] if 0 < count <= len(self._coefficients) else None

    def chunks(self, chunks: list[Chunk]) -> Tensor:
        """Run chunks of several sequences through the layers.

        Products and norms take all of them at once, attention each by itself.

        Returns:
            Normed hidden states ``[C, hidden]`` of the chunks, one after the other.
        """
        ids = self._upload([token for chunk in chunks for token in chunk.ids])
        count = len(ids)
        q, mixed, kv = self._buffers["q"][:count], self._buffers["mixed"][:count], self._buffers["kv"][:, :count]
        coefficients = self._coefficients_of(count)
        parts, first = list[tuple[Chunk, Tensor, Tensor, Tensor, Tensor | None]](), 0
        for chunk in chunks:
            last = first + chunk.count
            torch.arange(chunk.start, chunk.end, dtype=torch.int32, out=self._positions[first:last])
            queries, out = (x[first:last].transpose(0, 1) for x in (q, mixed))
            found = None if coefficients is None else coefficients[first:last].transpose(0, 1)
            parts.append((chunk, queries, out, kv[:, first:last, :, 0], found))
            first = last
        transforms = self._transforms(self._positions[:count])

        def mix(index: int, qkv: Tensor) -> Tensor:
            slots = self._no_slots[:count]
            ops.qkv_rope_append(qkv, transforms[index], slots, kv[0], kv[1], q, coefficients=coefficients)
            spec = self.decoder.specs[index].attention
            for chunk, queries, out, new, found in parts:
                chunk.attend(index, queries, new, spec, self.workspace, out=out, coefficients=found)
            return mixed

        return self._layers(ids, mix)

    def step(self, ids: Tensor, state: "StepState", max_length: int) -> Tensor:
        """Run one token in each of B sequences through the layers.

        Nothing here depends on a value of the host but the bound ``max_length``.

        Args:
            ids: Integers ``[B]``.

        Returns:
            Normed hidden states ``[B, hidden]``.
        """
        arena, batch = self.arena, len(ids)
        q, mixed = self._buffers["q"][:batch], self._buffers["mixed"][:batch]
        transforms = self._transforms(state.positions)
        coefficients = self._coefficients_of(batch)

        def mix(index: int, qkv: Tensor) -> Tensor:
            full_k, full_v = arena.full(index)
            ops.qkv_rope_append(qkv, transforms[index], state.places, full_k, full_v, q, state.rows, coefficients)
            inputs = arena.inputs(index, state, coefficients)
            spec = self.decoder.specs[index].attention
            return kernels.attend(
                q, inputs, arena.formats[index], spec=spec, max_length=max_length, out=mixed, workspace=self.workspace
            )

        if not ids.is_cpu:
            return self._layers(ids, mix)
        into = self._ids[:batch]  # what is recorded reads and writes kept buffers alone
        into.copy_(ids)
        return self._replays.run((batch, state.whole.data_ptr()), lambda: self._layers(into, mix))

    def logits(self, normed: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits ``[R, vocab]`` of normed hidden states ``[R, hidden]`` in the compute dtype."""
        if out is None:
            out = normed.new_empty(len(normed), self.decoder.cfg.vocab_size)
        self.decoder.head.apply(normed, out)
        return out

    def _transforms(self, positions: Tensor) -> list[ops.HeadTransform]:
        """For every layer what is done to its heads before attention at ``positions`` int32 ``[R]``."""
        decoder, count = self.decoder, len(positions)
        cos, sin = self._buffers["cos"][:count], self._buffers["sin"][:count]
        for first in range(0, count, _ANGLE_ROWS):
            rows = slice(first, first + _ANGLE_ROWS)
            cos[rows], sin[rows] = rope.cos_sin(positions[rows], decoder.inv_freq, cos.dtype)
        eps = decoder.cfg.rms_norm_eps
        return [
            ops.HeadTransform(cos, sin, layer.q_norm, layer.k_norm, eps, layer.maps, layer.v_rotation, layer.key_mean)
            for layer in decoder.layers
        ]

    def _layers(self, ids: Tensor, mix: Mix) -> Tensor:
        decoder, eps = self.decoder, self.decoder.cfg.rms_norm_eps
        part = {name: buffer[: len(ids)] for name, buffer in self._buffers.items()}
        residual, normed, delta = part["residual"], part["normed"], part["delta"]
        ops.embed(ids, decoder.embedding, residual)
        ops.add_rms_norm(residual, None, decoder.layers[0].input_norm, eps, normed)
        following = [layer.input_norm for layer in decoder.layers[1:]] + [decoder.final_norm]
        for index, (layer, next_norm) in enumerate(zip(decoder.layers, following, strict=True)):
            layer.qkv.apply(normed, part["qkv"])
            mixed = mix(index, part["qkv"])
            if layer.v_rotation is not None:
                mixed, rotated = part["q"], mixed  # the queries are not needed any more
                ops.rotate_back(rotated.flatten(1), layer.v_rotation, mixed.view(len(ids), -1))
            layer.out.apply(mixed.flatten(1), delta)
            ops.add_rms_norm(delta, residual, layer.mlp_norm, eps, normed)
            layer.gate_up.apply(normed, part["gate_up"])
            ops.swiglu(part["gate_up"], part["inner"])
            layer.down.apply(part["inner"], delta)
            ops.add_rms_norm(delta, residual, next_norm, eps, normed)
        return normed


def _carve(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Views of consecutive parts of ``flat``."""
    parts, first = {}, 0
    for name, shape in shapes.items():
        parts[name] = flat[first : first + prod(shape)].view(shape)
        first += -(-prod(shape) // _ALIGNED) * _ALIGNED
    return parts
