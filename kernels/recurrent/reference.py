"""Gated DeltaNet in plain PyTorch. Sums are float32, float64 where the inputs are; rounding points are the kernels'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: Tokens that are worked on together (the WY form, Yang et al. 2024, "Parallelizing Linear Transformers with the Delta
#: Rule").
BLOCK = 64
#: Of the norm of queries and keys.
NORM_EPS = 1e-6


@dataclass(frozen=True)
class DeltaShape:
    """Heads and sizes of a layer.

    Attributes:
        taps: Inputs that an output of the convolution sees.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int = 4

    @property
    def channels(self) -> int:
        """Of the convolution: those of queries, keys, values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def values(self) -> int:
        """Numbers of a token's values."""
        return self.value_heads * self.value_dim

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of one sequence's state in one layer."""
        return self.taps * self.channels * itemsize + 4 * self.value_heads * self.key_dim * self.value_dim


@dataclass(frozen=True)
class DeltaWeights:
    """What a layer's mixer has beside its projections.

    Attributes:
        conv: ``[taps, channels]`` in the compute dtype, that of the newest input last.
        decay: ``-exp(A)``, float32 ``[value_heads]``.
        bias: Added to the decay's gate, float32 ``[value_heads]``.
        norm: Of a head's outputs, ``[dv]`` in the compute dtype.
        eps: Of that norm.
    """

    shape: DeltaShape
    conv: Tensor
    decay: Tensor
    bias: Tensor
    norm: Tensor
    eps: float


@dataclass(frozen=True)
class LayerState:
    """The states of R sequences in one layer.

    Attributes:
        conv: ``[R, taps, channels]`` in the compute dtype, contiguous in the last two dimensions.
        memory: ``S``, float32 ``[R, value_heads, dk, dv]``, contiguous in all but the first dimension.
    """

    conv: Tensor
    memory: Tensor

    def row(self, row: int) -> LayerState:
        """That of one sequence, R = 1."""
        return LayerState(self.conv[row : row + 1], self.memory[row : row + 1])


@dataclass(frozen=True)
class Saving:
    """Where a state is copied to.

    Attributes:
        position: That of the token before which it is copied, not the chunk's first one.
        state: Of one row.
    """

    position: int
    state: LayerState


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _heads(convolved: Tensor, shape: DeltaShape) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys ``[T, Hv, dk]`` and values ``[T, Hv, dv]`` of the convolution's outputs ``[T, channels]``."""
    kind, keys = wide(convolved.dtype), shape.key_heads * shape.key_dim
    activated = F.silu(convolved).to(kind)
    q, k, v = activated.split([keys, keys, shape.values], dim=1)  # type: ignore[no-untyped-call]
    q, k = (x.reshape(len(x), shape.key_heads, shape.key_dim) for x in (q, k))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS) for x in (q, k))
    group = shape.value_heads // shape.key_heads
    q = q * shape.key_dim**-0.5
    if group > 1:
        q, k = (x.repeat_interleave(group, dim=1) for x in (q, k))
    return q, k, v.reshape(len(v), shape.value_heads, shape.value_dim)


def _gates(gates: Tensor, weights: DeltaWeights) -> tuple[Tensor, Tensor]:
    """``beta`` and the logarithm of the decay, ``[T, Hv]``."""
    kind = wide(gates.dtype)
    strength, fading = gates.chunk(2, dim=1)
    decay = weights.decay.to(kind) * F.softplus(fading.to(kind) + weights.bias.to(kind))
    return strength.sigmoid().to(kind), decay


def _finished(mixed: Tensor, gate: Tensor, weights: DeltaWeights, out: Tensor) -> None:
    """Norm the heads' outputs ``[T, Hv, dv]``, multiply them by their gates ``[T, Hv dv]``."""
    kind = wide(out.dtype)
    mixed = mixed.to(out.dtype).to(kind)
    normed = (mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + weights.eps)).to(out.dtype)
    out.copy_((weights.norm * normed).flatten(1) * F.silu(gate.to(kind)))


def one_token(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The delta rule for one token of B sequences: outputs ``[B, Hv, dv]`` and new memories.

    Args:
        q, k, v: ``[B, Hv, d]``.
        beta, decay: ``[B, Hv]``, the decay's logarithm.
        memory: ``[B, Hv, dk, dv]``.
    """
    memory = memory * decay.exp()[..., None, None]
    error = (v - (k[..., None, :] @ memory)[..., 0, :]) * beta[..., None]
    memory = torch.addcmul(memory, k[..., None], error[..., None, :])
    return (q[..., None, :] @ memory)[..., 0, :], memory


def many_tokens(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, memory: Tensor, lead: int = 0,
    save: Callable[[int, Tensor], None] = lambda block, memory: None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same for T tokens of one sequence, blocks at a time.

    Within a block, the errors ``u`` that its tokens write solve a triangular system: what a token's key finds is the
    old memory, decayed, and what the tokens before it in the block have written.

    Args:
        q, k, v: ``[T, Hv, d]``.
        beta, decay: ``[T, Hv]``.
        memory: ``[Hv, dk, dv]``.
        lead: The first block has ``BLOCK - lead`` tokens.
        save: Is given the memory before each block, with the block's number, and the one behind the last block.

    Returns:
        ``[T, Hv, dv]`` and the memory after the last token.
    """
    count, short = len(q), -(lead + len(q)) % BLOCK

    def blocks(x: Tensor) -> Tensor:
        """``[blocks, Hv, BLOCK, ...]``; tokens that are not there write nothing and forget nothing."""
        padding = (x.new_zeros(missing, *x.shape[1:]) for missing in (lead, short))
        padded = torch.cat((next(padding), x, next(padding))) if lead or short else x
        return padded.view(-1, BLOCK, *x.shape[1:]).transpose(1, 2)

    q, k, v, beta, decay = map(blocks, (q, k, v, beta, decay))
    summed = decay.cumsum(-1)  # [blocks, Hv, BLOCK]
    upper = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu(1)
    between = (summed[..., :, None] - summed[..., None, :]).masked_fill(upper, -torch.inf).exp()
    keys = k.transpose(-1, -2)
    system = beta[..., None] * (k @ keys) * between  # its diagonal counts as ones
    wanted = torch.cat((beta[..., None] * v, (beta * summed.exp())[..., None] * k), -1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    u, w = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    scores, read = (q @ keys) * between, q * summed.exp()[..., None]
    written = (k * (summed[..., -1:] - summed).exp()[..., None]).transpose(-1, -2)
    faded = summed[..., -1].exp()[..., None, None]
    out = torch.empty_like(v)
    for block in range(len(q)):
        save(block, memory)
        errors = u[block] - w[block] @ memory
        torch.baddbmm(read[block] @ memory, scores[block], errors, out=out[block])
        memory = faded[block] * memory + written[block] @ errors
    save(len(q), memory)
    return out.transpose(1, 2).flatten(0, 1)[lead : lead + count], memory


def step(
    projected: Tensor,
    gates: Tensor,
    weights: DeltaWeights,
    state: LayerState,
    positions: Tensor,
    rows: Tensor,
    out: Tensor,
) -> None:
    """See ``kernels.recurrent.step``."""
    shape, kind = weights.shape, wide(projected.dtype)
    live = rows >= 0
    if not bool(live.all()):
        projected, gates, positions, rows = projected[live], gates[live], positions[live], rows[live]
        out.zero_()
        if not len(rows):
            return
    mixed, index, at = projected[:, : shape.channels], rows.long(), positions.long()
    newest = at % shape.taps
    state.conv[index, newest] = mixed
    back = at[:, None] - torch.arange(shape.taps - 1, -1, -1, device=at.device)  # positions, the newest last
    inputs = state.conv[index[:, None], back % shape.taps].to(kind)
    if bool((at < shape.taps - 1).any()):
        inputs = inputs.masked_fill((back < 0)[..., None], 0)
    q, k, v = _heads((inputs * weights.conv.to(kind)).sum(1).to(mixed.dtype), shape)
    memory = state.memory[index].to(kind)
    if bool((at == 0).any()):
        memory = torch.where((at > 0)[:, None, None, None], memory, 0.0)
    found, memory = one_token(q, k, v, *_gates(gates, weights), memory)
    state.memory[index] = memory.to(state.memory.dtype)
    done = out if len(rows) == len(out) else torch.empty_like(out[: len(rows)])
    _finished(found, projected[:, shape.channels :], weights, done)
    if done is not out:
        out[live] = done


def chunk(
    projected: Tensor,
    gates: Tensor,
    weights: DeltaWeights,
    state: LayerState,
    row: int,
    start: int,
    out: Tensor,
    savings: Sequence[Saving] = (),
) -> None:
    """See ``kernels.recurrent.chunk``."""
    shape, kind, count = weights.shape, wide(projected.dtype), len(projected)
    mixed = projected[:, : shape.channels]
    before = torch.arange(start - shape.taps + 1, start, device=mixed.device)
    history = state.conv[row, before % shape.taps].masked_fill((before < 0)[:, None], 0)
    inputs = torch.cat((history, mixed)).to(kind)
    convolved = sum(inputs[tap : tap + count] * weights.conv[tap].to(kind) for tap in range(shape.taps))
    assert isinstance(convolved, Tensor)
    q, k, v = _heads(convolved.to(mixed.dtype), shape)
    beta, decay = _gates(gates, weights)
    memory = state.memory[row].to(kind) if start else torch.zeros_like(state.memory[row], dtype=kind)
    lead = first_lead(start, savings)
    wanted = {(lead + saving.position - start) // BLOCK: saving for saving in savings}

    def save(block: int, memory: Tensor) -> None:
        if block in wanted:
            wanted[block].state.memory[0] = memory.to(state.memory.dtype)

    found, memory = many_tokens(q, k, v, beta, decay, memory, lead, save)
    for saving in savings:
        keep_inputs(mixed[: saving.position - start], saving.position, saving.state.conv[0], state.conv[row])
    state.memory[row] = memory.to(state.memory.dtype)
    keep_inputs(mixed, start + count, state.conv[row])
    _finished(found, projected[:, shape.channels :], weights, out)


def first_lead(start: int, savings: Sequence[Saving]) -> int:
    """How many tokens a chunk's first block lacks at its beginning: blocks end where states are saved."""
    return (start - savings[0].position) % BLOCK if savings else 0


def keep_inputs(mixed: Tensor, end: int, conv: Tensor, older: Tensor | None = None) -> None:
    """Put the last inputs into their slots ``conv [taps, channels]``.

    Args:
        mixed: ``[C, channels]``: those of the positions up to ``end``.
        older: Slots of the inputs before these, for a ``conv`` that does not have them.
    """
    taps = len(conv)
    if older is not None and len(mixed) < taps:
        conv.copy_(older)
    first = max(end - taps, end - len(mixed))
    while first < end:
        slot = first % taps
        some = min(taps - slot, end - first)
        at = len(mixed) - (end - first)
        conv[slot : slot + some] = mixed[at : at + some]
        first += some
