"""Gated DeltaNet in the place of attention (`specs.MixerSpec`); `kernels.recurrent` has its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from octo_run.kernels import recurrent
from octo_run.kernels.recurrent import DeltaShape, DeltaWeights, LayerState, Saving
from octo_run.models.linear import joined, pack_any, pack_one, parts_first
from octo_run.models.mlp import mean_squares

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from octo_run.engine.arena import Chunk
    from octo_run.engine.recurrent_state import RecurrentStates
    from octo_run.engine.step import StepState
    from octo_run.models.linear import AnyLinear, Quantise, SingleLinear
    from octo_run.models.weights import Weights


@dataclass(frozen=True)
class DeltaNet:
    """A layer's mixer with its weights.

    Attributes:
        number: Of the model's recurrent layers the how-manieth it is, from 0 on.
        projected: Inputs of the convolution (queries, keys, values), then output gates.
        gates: For ``beta``, then for the decay. Few rows, which stay as they are stored.
    """

    number: int
    projected: AnyLinear
    gates: AnyLinear
    weights: DeltaWeights
    out: SingleLinear

    @property
    def joined_bytes(self) -> int:
        """See `specs.FeedForward`."""
        return self.projected.nbytes

    @property
    def parts(self) -> tuple[SingleLinear, ...]:
        """The layers with a matrix of their own that it is made of."""
        return (*self.projected.parts, *self.gates.parts, *self.out.parts)

    def chunks(self, normed: Tensor, out: Tensor, buffers: Mapping[str, Tensor], chunks: Sequence[Chunk]) -> None:
        """See `decoder.Mixer`."""
        self._project(normed, buffers)
        first, scratch = 0, buffers["scratch"].flatten().view(torch.uint8)
        for chunk in chunks:
            states = chunk.arena.states
            assert states is not None
            state, rows = states.layer(self.number), slice(first, first + chunk.count)
            savings = [Saving(position, state.row(place)) for position, place in chunk.snapshots]
            projected, gates, mixed = (buffers[name][rows] for name in ("projected", "gates", "mixed"))
            recurrent.chunk(projected, gates, self.weights, state, chunk.row, chunk.start, mixed, scratch, savings)
            first = rows.stop
        self.out.apply(buffers["mixed"], out)

    def step(
        self, normed: Tensor, out: Tensor, buffers: Mapping[str, Tensor], state: StepState, states: RecurrentStates
    ) -> None:
        """See `decoder.Mixer`."""
        self._project(normed, buffers)
        recurrent.step(
            buffers["projected"], buffers["gates"], self.weights, states.layer(self.number), state.positions,
            state.rows, buffers["mixed"],
        )  # fmt: skip
        self.out.apply(buffers["mixed"], out)

    def _project(self, normed: Tensor, buffers: Mapping[str, Tensor]) -> None:
        self.projected.apply(normed, buffers["projected"])
        self.gates.apply(normed, buffers["gates"])

    def __call__(self, x: Tensor) -> Tensor:
        """See `decoder.Mixer`."""
        return self.out(self.mixed(x))

    def mixed(self, x: Tensor) -> Tensor:
        """What the output projection takes, ``[B, C, values]`` of ``x [B, C, hidden]``."""
        projected, gates, shape = self.projected(x), self.gates(x), self.weights.shape
        out = x.new_empty(*x.shape[:2], shape.values)
        memory = shape.value_heads, shape.key_dim, shape.value_dim
        for number in range(len(x)):
            state = LayerState(
                x.new_zeros(1, shape.taps, shape.channels), x.new_zeros(1, *memory, dtype=self.weights.decay.dtype)
            )
            recurrent.reference.chunk(projected[number], gates[number], self.weights, state, 0, 0, out[number])
        return out

    def packed(self, quantise: Quantise, index: int, seen: Tensor | None) -> DeltaNet:
        """See `specs.FeedForward`."""
        squares, of_mixed = None, None
        if seen is not None:
            squares, of_mixed = mean_squares(seen), mean_squares(self.mixed(seen.view(1, -1, seen.shape[-1])))
        return replace(
            self,
            projected=pack_any("in_proj", index, self.projected, quantise, squares),
            out=pack_one("out_proj", index, self.out, quantise, of_mixed),
        )


@dataclass(frozen=True)
class DeltaNetSpec:
    """What a Gated DeltaNet is, without its weights.

    Attributes:
        number: See `DeltaNet`.
        eps: Of the norm of the heads' outputs.
        grouped: In the files, the rows of one matrix are queries, keys, values and output gates of the first key head,
            then those of the second, and so on; likewise those of the gates.
    """

    number: int
    hidden: int
    shape: DeltaShape
    eps: float
    grouped: bool = False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """See `specs.MixerSpec`."""
        shape = self.shape
        matrices = {"in_proj_qkv": shape.channels, "in_proj_z": shape.values}
        matrices |= dict.fromkeys(("in_proj_b", "in_proj_a"), shape.value_heads)
        if self.grouped:
            matrices = {"in_proj_qkvz": shape.channels + shape.values, "in_proj_ba": 2 * shape.value_heads}
        return {
            **{f"linear_attn.{name}.weight": (rows, self.hidden) for name, rows in matrices.items()},
            "linear_attn.conv1d.weight": (shape.channels, 1, shape.taps),
            "linear_attn.A_log": (shape.value_heads,),
            "linear_attn.dt_bias": (shape.value_heads,),
            "linear_attn.norm.weight": (shape.value_dim,),
            "linear_attn.out_proj.weight": (self.hidden, shape.values),
        }

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """See `specs.MixerSpec`."""
        shape = self.shape
        # two bytes a number at least: float32 numbers may take two of them
        scratch = -(-recurrent.scratch_bytes(shape, 1, 2) // 2)
        return {
            "projected": (rows, shape.channels + shape.values),
            "gates": (rows, 2 * shape.value_heads),
            "mixed": (rows, shape.values),
            "scratch": (rows, scratch),
        }

    def load(self, weights: Weights, prefix: str) -> DeltaNet:
        """See `specs.MixerSpec`."""
        prefix, shape = f"{prefix}linear_attn.", self.shape

        def linear(name: str) -> SingleLinear:
            return weights.linear(prefix + name)

        projected: AnyLinear
        gates: AnyLinear
        if self.grouped:
            group = shape.value_heads // shape.key_heads
            values = group * shape.value_dim
            sizes = (shape.key_dim, shape.key_dim, values, values)
            projected = linear("in_proj_qkvz").reordered(parts_first(shape.key_heads, sizes))
            gates = linear("in_proj_ba").reordered(parts_first(shape.key_heads, (group, group)))
        else:
            projected = joined(linear("in_proj_qkv"), linear("in_proj_z"))
            gates = joined(linear("in_proj_b"), linear("in_proj_a"))
        conv = weights.take(f"{prefix}conv1d.weight")
        decay, bias = (weights.take(prefix + name) for name in ("A_log", "dt_bias"))
        if not conv.is_meta:
            wide = recurrent.reference.wide(conv.dtype)
            decay, bias = -decay.to(wide).exp(), bias.to(wide)
            conv = conv[:, 0].T.contiguous()
        else:
            conv = torch.empty(shape.taps, shape.channels, dtype=conv.dtype, device=conv.device)
            decay, bias = (torch.empty_like(x, dtype=torch.float32) for x in (decay, bias))
        norm = weights.take(f"{prefix}norm.weight")
        out = weights.linear(f"{prefix}out_proj")
        return DeltaNet(self.number, projected, gates, DeltaWeights(shape, conv, decay, bias, norm, self.eps), out)
