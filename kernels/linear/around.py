"""What a product of a few rows does beside multiplying, so that no kernel of its own has to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


LINE = 128  # bytes that are fetched at a time
#: What there is: norms of inputs and sums with what is in the output, in products of a vector with dense weights and of
#: a few rows with packed ones; SwiGLU in the former; what the next kernel reads fetched ahead.
WAYS = ("vector norm", "vector sum", "vector swiglu", "packed norm", "packed sum", "later")
#: What is done of it. `scripts/bench_folds.py` measures what each of them gains; those that gain belong here.
taken_in: set[str] = set()


@dataclass(frozen=True)
class Around:
    """Done around a product, in its kernel.

    Attributes:
        norm: ``[k]`` of the inputs' dtype: the product is that of ``rms_norm(x) * norm``. It is rounded once less than
            where the norm is a kernel of its own: the root mean square divides the sums.
        eps: Of that norm.
        add: The outputs, rounded, are added to what is in ``out`` instead of being written there.
        later: Constants that the next kernel reads, contiguous: they are brought into the second-level cache.
    """

    norm: Tensor | None = None
    eps: float = 0.0
    add: bool = False
    later: Tensor | None = None


ALONE = Around()
