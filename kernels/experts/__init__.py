"""Routed experts: a router chooses some experts for each token, and what these make of it is added up.

References (PyTorch) and kernels (Triton; Gluon for a few rows and packed weights) behind two calls. On CUDA nothing is
allocated and no value is read by the host, so that steps can be recorded; the same inputs give the same outputs,
because all sums have a fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from octo_run.kernels.experts import reference
from octo_run.kernels.experts.weights import ACTIVATIONS, Activation, ExpertWeights, Scratch, scratch_bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "ExpertWeights", "Scratch", "mix", "route", "scratch_bytes"]


def route(x: Tensor, router: Tensor, bias: Tensor | None, normalised: bool, scratch: Scratch) -> None:
    """Choose the experts of each token: ``logits``, ``indices`` and ``weights`` of ``scratch`` are written.

    The logits are sums of float32. The chosen experts are those of the largest ones, of equal ones the first; their
    weights are shares of the softmax over all experts, or of that over the chosen ones.

    Args:
        x: ``[R, hidden]``, contiguous.
        router: ``[outputs, hidden]`` of that dtype. There may be outputs behind the experts' (see ``mix``).
        bias: ``[outputs]`` of that dtype, or None.
        normalised: The weights of a token add up to 1.
        scratch: For R tokens.
    """
    if x.is_cuda:
        from octo_run.kernels.experts import launch

        launch.route(x, router, bias, normalised, scratch)
    else:
        reference.route(x, router, bias, normalised, scratch)


def mix(x: Tensor, experts: ExpertWeights, scratch: Scratch, out: Tensor, shared: Tensor | None = None) -> None:
    """``out [R, hidden]``: for each token the sum of its experts' outputs times their weights.

    Args:
        x: ``[R, hidden]``, contiguous, of the compute dtype.
        scratch: For R tokens, as ``route`` has left it.
        shared: ``[R, hidden]``, the outputs of an expert that all tokens have, or None. It is added times the sigmoid
            of the router's output behind those of the experts.
    """
    if x.is_cuda:
        from octo_run.kernels.experts import launch

        launch.mix(x, experts, scratch, out, shared)
    else:
        reference.mix(x, experts, scratch, out, shared)
