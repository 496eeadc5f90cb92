"""Routed experts: a router chooses some experts for each token, and what these make of it is added up.

References (PyTorch) and kernels (Triton; Gluon for a few rows and packed weights) behind two calls. On CUDA nothing is
allocated and no value is read by the host, so that steps can be recorded; the same inputs give the same outputs,
because all sums have a fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from octo_run.kernels import step as ops
from octo_run.kernels.experts import reference
from octo_run.kernels.experts.weights import ACTIVATIONS, Activation, ExpertWeights, Scratch, scratch_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from octo_run.kernels.step import AddNorm, Mixture

__all__ = ["ACTIVATIONS", "Activation", "ExpertWeights", "Scratch", "mix", "route", "scratch_bytes"]


def route(x: Tensor | AddNorm, router: Tensor, bias: Tensor | None, normalised: bool, scratch: Scratch) -> Tensor:
    """Choose the experts of each token: ``logits``, ``indices`` and ``weights`` of ``scratch`` are written.

    The logits are sums of float32. The chosen experts are those of the largest ones, of equal ones the first; their
    weights are shares of the softmax over all experts, or of that over the chosen ones.

    Args:
        x: ``[R, hidden]``, contiguous, or what makes it, which is then done: on CUDA and for a few tokens in the
            router's own kernel. Its results are then the same but for the order of float32 sums.
        router: ``[outputs, hidden]`` of that dtype. There may be outputs behind the experts' (see ``mix``).
        bias: ``[outputs]`` of that dtype, or None.
        normalised: The weights of a token add up to 1.
        scratch: For R tokens.

    Returns:
        What was given, or made.
    """
    if router.is_cuda:
        from octo_run.kernels.experts import launch

        return launch.route(x, router, bias, normalised, scratch)
    x = ops.now(x)
    reference.route(x, router, bias, normalised, scratch)
    return x


def mix(
    x: Tensor, experts: ExpertWeights, scratch: Scratch, out: Tensor, shared: Tensor | None = None, *,
    unsummed: bool = False,
) -> Tensor | Mixture:  # fmt: skip
    """``out [R, hidden]``: for each token the sum of its experts' outputs times their weights.

    Args:
        x: ``[R, hidden]``, contiguous, of the compute dtype.
        scratch: For R tokens, as ``route`` has left it.
        shared: ``[R, hidden]``, the outputs of an expert that all tokens have, or None. It is added times the sigmoid
            of the router's output behind those of the experts.
        unsummed: A sum that would take a kernel of its own may be left to be made, if there are few tokens.

    Returns:
        ``out``, or what it would be the sum of, in ``scratch`` and ``shared``; ``out`` is then not written.
    """
    if x.is_cuda:
        from octo_run.kernels.experts import launch

        return launch.mix(x, experts, scratch, out, shared, unsummed=unsummed)
    reference.mix(x, experts, scratch, out, shared)
    return out
