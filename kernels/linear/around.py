"""What a product of a few rows does beside multiplying, so that no kernel of its own has to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Around:
    """Done around a product, in its kernel.

    Attributes:
        norm: ``[k]`` of the inputs' dtype: the product is that of ``rms_norm(x) * norm``. It is rounded once less than
            where the norm is a kernel of its own: the root mean square divides the sums.
        eps: Of that norm.
        add: The outputs, rounded, are added to what is in ``out`` instead of being written there.
    """

    norm: Tensor | None = None
    eps: float = 0.0
    add: bool = False


ALONE = Around()
