"""What kind of attention a layer computes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention, beside the shapes of its inputs. None is "without" for every field but ``scale``.

    Attributes:
        scale: Multiplies the products of queries and keys.
        window: A query sees so many of the newest tokens, itself included.
        logit_cap: Logits become ``cap * tanh(logit / cap)``.
        sink_logits: float32 ``[H]``: a logit for each head that takes its share of the softmax and has no value.
        rotary: RoPE turns so many of the first coordinates (None: all of them).
    """

    scale: float
    window: int | None = None
    logit_cap: float | None = None
    sink_logits: Tensor | None = None
    rotary: int | None = None

    def require_plain(self) -> None:
        """Refuse any field but ``scale``: for kernels that know nothing else.

        Raises:
            ValueError: Another field is set; the message names it.
        """
        for field in fields(self):
            if field.name != "scale" and getattr(self, field.name) is not None:
                raise ValueError(f"no attention kernel knows the field {field.name} of AttentionSpec: leave it None")
