"""What kind of attention a layer computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention, beside the shapes of its inputs. None is "without" for every field but ``scale``.

    Attributes:
        scale: Multiplies the products of queries and keys.
        window: A query sees so many of the newest tokens, itself included; the first tokens are no exception.
        logit_cap: Logits become ``cap * tanh(logit / cap)``, those of ``sink_logits`` not.
        sink_logits: float32 ``[H]``: a logit for each head that takes its share of the softmax and has no value.

    Raises:
        ValueError: A window or a cap that is not above 0.
    """

    scale: float
    window: int | None = None
    logit_cap: float | None = None
    sink_logits: Tensor | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"an attention window has 1 token at least, not {self.window}")
        if self.logit_cap is not None and not self.logit_cap > 0:
            raise ValueError(f"a cap of logits is above 0, not {self.logit_cap}")

    @property
    def plain(self) -> bool:
        """Whether there is nothing but a scale."""
        return self.window is None and self.logit_cap is None and self.sink_logits is None

    def check_heads(self, heads: int) -> None:
        """Refuse sink logits that are not those of so many query heads.

        Raises:
            ValueError: Such ones.
        """
        sinks = self.sink_logits
        if sinks is not None and (sinks.dtype != torch.float32 or sinks.shape != (heads,) or not sinks.is_contiguous()):
            raise ValueError(
                f"sink_logits must be contiguous float32 [{heads}], not {sinks.dtype} {tuple(sinks.shape)}"
            )

    def reach(self, length: int) -> int:
        """Of so many tokens at most those that a query sees."""
        return length if self.window is None else min(length, self.window)

    def earliest(self, position: int) -> int:
        """The first position that a query at ``position`` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)
