"""The small operations of a step: kernels (Triton, and compiled for the CPU) and PyTorch references behind one call.

All write into given outputs. On CUDA they allocate nothing, so that steps can be recorded. B is the sequences of a
decode step or the tokens of a prompt; the rounding points are those of ``models.decoder``.

A live sequence owns a row of what lasts from step to step. A step works on a batch, whose map ``rows`` int32 ``[B]``
lies on the device: number b of the batch owns row ``rows[b]``. -1 is filler, for which nothing is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run.kernels.cpu import linear as compiled_linear
from octo_run.kernels.cpu import step as compiled
from octo_run.kernels.step import reference
from octo_run.kernels.step.reference import SLICE_TOKENS, Draws, HeadTransform, count_drawn, mapped, penalised, share

if TYPE_CHECKING:
    from octo_run.kernels.linear import PackedWeight

__all__ = [
    "SLICE_TOKENS",
    "Draws",
    "HeadTransform",
    "add_rms_norm",
    "angles",
    "count_drawn",
    "embed",
    "gate",
    "linear",
    "mapped",
    "move_on",
    "norm_heads",
    "penalised",
    "qkv_rope_append",
    "rotate_back",
    "sample",
    "share",
    "swiglu",
]


def angles(positions: Tensor, inv_freq: Tensor, factor: float, cos: Tensor, sin: Tensor) -> None:
    """RoPE's cosines and sines ``cos, sin [B, d / 2]`` at ``positions`` int32 ``[B]``, computed in float32.

    Args:
        inv_freq: Radians a position, float32 ``[d / 2]``.
        factor: Both are multiplied by it where ``inv_freq`` is not 0.
    """
    if cos.is_cuda:
        from octo_run.kernels.step import launch

        launch.angles(positions, inv_freq, factor, cos, sin)
    else:
        reference.angles(positions, inv_freq, factor, cos, sin)


def move_on(positions: Tensor, places: Tensor, active: Tensor, sink: int, ring: int) -> None:
    """Add ``active`` (0 or 1) to the ``positions`` of sequences, and write to ``places`` which full-precision slots
    these have: the first ``sink`` positions one each, then a ring of ``ring`` slots. All int32 ``[B]``."""
    if positions.is_cuda:
        from octo_run.kernels.step import launch

        launch.move_on(positions, places, active, sink, ring)
    else:
        reference.move_on(positions, places, active, sink, ring)


def embed(ids: Tensor, table: Tensor | PackedWeight, out: Tensor, scale: float = 1.0) -> None:
    """``out [B, hidden] = scale * table[ids]``; ``ids`` int32 or int64 ``[B]``.

    Args:
        table: ``[vocab, hidden]`` of the dtype of ``out`` (on a CPU bfloat16, too), or packed: int8 with a factor for
            each row.
    """
    if out.is_cuda:
        from octo_run.kernels.step import launch

        if isinstance(table, Tensor):
            launch.embed(ids, table, out, scale)
        else:
            launch.embed_packed(ids, table, out, scale)
    elif not (out.is_cpu and compiled.embed(ids, table, out, scale)):
        reference.embed(ids, table, out, scale)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    out: Tensor | None,
    post: Tensor | None = None,
    multiplier: float = 1.0,
    centred: bool = False,
    scale: float = 1.0,
) -> None:
    """``residual = (residual + x) * scale`` in place, then ``out = rms_norm(residual) * weight``; without a residual
    that of ``x``.

    All are of one dtype, but for weights, which may be float32 (see ``reference.normed``).

    Args:
        x, residual, out: ``[B, hidden]``, contiguous; ``out`` is none of the others.
        weight: ``[hidden]``; None: nothing is written but ``residual``.
        post: ``[hidden]``: the weight of a norm of ``x`` that comes first.
        multiplier: What is added is multiplied by it.
        centred: The norms are LayerNorms without bias.
    """
    if x.is_cuda:
        from octo_run.kernels.step import launch

        if scale == 1.0 or residual is None:
            launch.add_rms_norm(x, residual, weight, eps, out, post, multiplier, centred)
            return
        launch.add_rms_norm(x, residual, None, eps, out, post, multiplier, centred)
        residual.mul_(scale)
        if weight is not None:
            launch.add_rms_norm(residual, None, weight, eps, out, None, 1.0, centred)
    elif not compiled.add_rms_norm(x, residual, weight, eps, out, post, multiplier, centred, scale):
        reference.add_rms_norm(x, residual, weight, eps, out, post, multiplier, centred, scale)


def norm_heads(x: Tensor, weight: Tensor, eps: float) -> None:
    """``x [B, n] = rms_norm(x) * weight`` in place: a norm over all heads of queries, or of keys.

    Args:
        x: Its rows are contiguous, of any stride.
        weight: ``[n]``, of the dtype of ``x`` or float32 (see ``reference.normed``).
    """
    if x.is_cuda:
        from octo_run.kernels.step import launch

        launch.norm_heads(x, weight, eps)
    elif not compiled.norm_heads(x, weight, eps):
        reference.norm_heads(x, weight, eps)


def _is_vector(x: Tensor) -> bool:
    """Whether a product of ``x [B, k]`` goes to our own kernel: one row of a 16-bit dtype on CUDA."""
    return x.is_cuda and len(x) == 1 and x.element_size() == 2


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out [B, n] = x [B, k] weight^T + bias`` with ``weight [n, k]``, all contiguous and of one dtype; on a CPU the
    weight may be bfloat16 where the others are float32.

    A single row of a 16-bit dtype on CUDA goes to our own kernel, which fetches weights while the kernel in front of it
    ends; the rest to the library. A step of an 8B shape on an H200: 3.99 ms, all by the library 4.47.
    """
    if _is_vector(x):
        from octo_run.kernels.step import launch

        launch.vector(x, weight, bias, out)
    elif not (
        weight.dtype in (torch.float32, torch.bfloat16)
        and x.is_cpu
        and len(x) <= 4
        and compiled_linear.dense_linear(x, weight, bias, out)
    ):
        reference.linear(x, weight, bias, out)


def sample(draws: Draws, logits: Tensor, floor: Tensor | None) -> None:
    """Draw a token for each sequence of a batch; see ``Draws``.

    Penalties, edits, then ``floor``, then Gumbel noise times the temperature; the largest wins. Log-probabilities are
    those of the logits themselves, not finite if these are not.

    Args:
        logits: ``[B, vocab]`` of the model.
        floor: float32 ``[B]`` or None: scores below it are out.
    """
    if logits.is_cuda:
        from octo_run.kernels.step import launch

        launch.sample(draws, logits, floor)
    else:
        reference.sample(draws, logits, floor)


def qkv_rope_append(
    qkv: Tensor,
    transform: HeadTransform,
    slots: Tensor,
    full_k: Tensor,
    full_v: Tensor,
    q_out: Tensor,
    rows: Tensor | None = None,
    coefficients: Tensor | None = None,
) -> None:
    """Make what attention reads from a layer's projections.

    Args:
        qkv: ``[B, (H + 2 Hkv) d]``, contiguous.
        slots: int32 ``[B]``: keys and values of number b go to slot ``slots[b]``.
        full_k, full_v: ``[R, Hkv, slots, d]``: take keys, of the same kind as queries, and values.
        q_out: ``[B, 1, H, d]``: takes queries (normed, turned by RoPE, mapped).
        rows: int32 ``[B]``: keys and values of number b go to row ``rows[b]``; None: row b.
        coefficients: Float32 ``[B, 1, H, d]``, contiguous: takes what attention needs of the queries for
            ``transform.mean`` (``attention.key_mean``).
    """
    if qkv.is_cuda:
        from octo_run.kernels.step import launch

        launch.qkv_rope_append(qkv, transform, slots, full_k, full_v, q_out, rows, coefficients)
    elif not compiled.qkv_rope_append(qkv, transform, slots, full_k, full_v, q_out, rows, coefficients):
        reference.qkv_rope_append(qkv, transform, slots, full_k, full_v, q_out, rows, coefficients)


def rotate_back(mixed: Tensor, rotation: Tensor, out: Tensor) -> None:
    """``out [B, heads * d]``: each head of ``mixed [B, heads * d]`` times the transpose of ``rotation [d, d]``.

    The rotation is orthogonal, so that this undoes ``HeadTransform.v_rotation`` in attention's sums of values: for an
    output projection that cannot take the rotation in. All are contiguous and of one dtype.

    Args:
        out: Not ``mixed``.
    """
    if mixed.is_cuda:
        from octo_run.kernels.step import launch

        launch.rotate_back(mixed, rotation, out)
    elif not compiled.rotate_back(mixed, rotation, out):
        reference.rotate_back(mixed, rotation, out)


def gate(x: Tensor, gates: Tensor) -> None:
    """``x [B, n] *= sigmoid(gates [B, n])`` in place, both contiguous."""
    if x.is_cuda:
        from octo_run.kernels.step import launch

        launch.gate(x, gates)
    else:
        reference.gate(x, gates)


def swiglu(gate_up: Tensor, out: Tensor, activation: str = "silu") -> None:
    """``out [B, n] = activation(gate) * up`` of ``gate_up [B, 2 n]``, both contiguous.

    Args:
        activation: ``silu`` or ``gelu_tanh`` (GELU by its approximation with tanh).
    """
    if gate_up.is_cuda:
        from octo_run.kernels.step import launch

        launch.swiglu(gate_up, out, activation)
    elif not compiled.swiglu(gate_up, out, activation):
        reference.swiglu(gate_up, out, activation)
