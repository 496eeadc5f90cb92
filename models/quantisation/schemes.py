"""How matrices are quantised: from numbers to a packed weight, chosen by the error that it makes.

- ``fp8``: E4M3 codes and a factor for each row, its largest magnitude / 448.
- ``int8``: codes -127 to 127 and a factor for each row, its largest magnitude / 127.
- ``int4``: codes 0 to 15, with a scale and a zero (a code, 0 to 15) for each group of 64 (``int4-128``: 128) columns.
- Symmetric ones, which files have for experts: the zero is 8, and the scale may be negative, so that the longer side of
  the codes, down to -8, is that of the numbers that need it. Groups are half as long: as much memory, and less is lost.

The scale and zero of a group are those of the least squared error among some that cut off its extremes, made better by
turns: the best scale for the codes, the best codes for the scale. Each column counts as much as the mean square of what
it is multiplied by on a text; that is the squared error of the product, columns being independent.

All factors and scales are bfloat16 numbers, so that files hold them exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run.errors import OctoError, UsageError, nearest, quoted
from octo_run.kernels.cpu import linear as compiled
from octo_run.kernels.linear import BLOCK, PackedWeight, empty, pack
from octo_run.models.config import HEADS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from octo_run.models.config import ModelConfig

#: Shares of a group's range that are tried.
CUTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
#: Shares that are tried without zeros: the scale may have either sign.
SIGNED_CUTS = (*CUTS, *(-cut for cut in CUTS))
#: Turns of scale and codes after that.
TURNS = 3
#: Scales of a row at least, as a share of its largest: what is smaller would not be exact in float16 beside it.
_LEAST = 2.0**-14
_LARGEST = {"int8": 127.0, "fp8": 448.0}
#: Elements of a matrix that are worked on at once: what a CPU's cache holds; what fills a GPU.
PIECE = {"cpu": 1 << 16, "cuda": 1 << 22}
#: Bytes that an element of a piece takes meanwhile.
WORKING_BYTES = 40
#: Bytes of a matrix's codes while they are put in lane order, for each element: by column, padded, ordered.
CODE_BYTES = 4


@dataclass(frozen=True)
class Scheme:
    """A way to quantise.

    Attributes:
        kind: Of the codes (`kernels.linear.packed.BITS`).
        group: Columns that share a scale; None: all of a row.
        weighted: Whether columns count by what they are multiplied by; else all alike.
        fitted: Whether scales are chosen by error; else they are the range of a group (plain round to nearest).
        symmetric: Whether groups have no zero of their own.
        experts: How routed experts are quantised; None: like the other matrices.
    """

    name: str
    kind: str
    group: int | None = None
    weighted: bool = False
    fitted: bool = False
    symmetric: bool = False
    experts: Scheme | None = None

    @property
    def in_files(self) -> Scheme:
        """The same, with experts as files hold them: other programs leave their zeros out, or refuse them."""
        if self.group is None:
            return self
        half = replace(self, name=f"{self.name}, experts", group=self.group // 2, symmetric=True)
        return replace(self, experts=half)

    @property
    def takes_rotation(self) -> bool:
        """Whether the rotation of values goes into the matrices before they are quantised.

        Not with 4 bits: a rotated value projection costs SmolLM2 several per cent more of perplexity. With 8 bits too
        little is lost to be seen, and no step needs to rotate.
        """
        return self.group is None

    @property
    def plain(self) -> Scheme:
        """The same by plain rounding, a tenth of the work: for random numbers, of which only the speed counts."""
        return replace(self, fitted=False, weighted=False)

    def __call__(self, weight: Tensor, importance: Tensor | None = None) -> PackedWeight:
        """See :func:`quantised`."""
        return quantised(weight, self, importance)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp8", "fp8"),
        Scheme("int8", "int8"),
        Scheme("int4", "int4", 64, weighted=True, fitted=True),
        Scheme("int4-128", "int4", 128, weighted=True, fitted=True),
    )
}
#: What ``--weights`` takes. Weights of ``fp32`` and ``bf16`` are not quantised; see :func:`matrix_dtype`.
WEIGHTS = ("fp32", "bf16", *SCHEMES)


def format_name(weight: PackedWeight) -> str:
    """The name of a packed weight's format: that of a scheme, else its codes and the columns of a group."""
    group = None if weight.scales is None else weight.group
    names = [scheme.name for scheme in SCHEMES.values() if (scheme.kind, scheme.group) == (weight.kind, group)]
    return names[0] if names else weight.kind if group is None else f"{weight.kind}-{group}"


def scheme_of(weights: str | Scheme | None) -> Scheme | None:
    """The scheme of that name; None for weights that are not quantised (None, ``auto``, ``bf16``, ``fp32``).

    Raises:
        UsageError: There is no such name.
    """
    if isinstance(weights, Scheme):
        return weights
    if weights in (None, "auto", "bf16", "fp32"):
        return None
    if not isinstance(weights, str) or weights not in SCHEMES:
        near = nearest(weights, WEIGHTS) if isinstance(weights, str) else None
        known = ", ".join((*WEIGHTS, "auto"))
        hint = f"did you mean {near}, of {known}?" if near else f"give one of {known}."
        raise UsageError(f"There is no format of weights {quoted(weights)}: {hint}")
    return SCHEMES[weights]


def matrix_dtype(
    weights: str | Scheme | None, cfg: ModelConfig, device: torch.device, dtype: torch.dtype
) -> torch.dtype:
    """What matrices that are not quantised are held in: the dtype of the arithmetic, but for ``bf16`` on a CPU that
    computes in float32. There they take half of the memory and of the time to read them.

    A model with experts or recurrent layers has the dtype of the arithmetic all over.

    Raises:
        UsageError: ``fp32`` where the arithmetic is in 16 bits.
    """
    if weights == "fp32" and dtype != torch.float32:
        raise UsageError("--weights fp32 is for arithmetic in float32: give --dtype float32, too, or leave it out.")
    narrow = weights == "bf16" and device.type == "cpu" and dtype == torch.float32
    plain = cfg.experts is None and not cfg.recurrent
    return torch.bfloat16 if narrow and plain else dtype


def head_scheme(head: str) -> Scheme | None:
    """The scheme of the embedding and the output head; None: they stay as they are.

    Raises:
        UsageError: They cannot be stored so.
    """
    if head not in HEADS:
        raise UsageError(f"There is no format of the head {quoted(head)}; give --head bf16 or int8.")
    return SCHEMES["int8"] if head == "int8" else None


def refuse_packed(path: Path, cfg: ModelConfig, weights: str | Scheme | None) -> None:
    """Refuse a format for weights that their files hold quantised.

    Raises:
        OctoError: It names the method.
    """
    from octo_run.models.tensors import stored_config  # which knows schemes

    if weights in (None, "auto") or cfg.quantisation is None:
        return
    if (found := stored_config(path, cfg).quantisation) is not None:
        name = weights.name if isinstance(weights, Scheme) else weights
        raise OctoError(
            f"The weights in {path} are quantised already ({found.method}) and cannot become {name}: leave "
            "--weights out, or take the model's unquantised files."
        )


def quantised(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> PackedWeight:
    """A matrix in few bits; on ``meta`` the tensors that it would have.

    Args:
        weight: ``[out, in]``, finite.
        importance: Float32 ``[in]``, what the squared errors of a column count; None: all alike. Only a ``weighted``
            scheme looks at it.
    """
    out, columns = weight.shape
    if weight.is_meta:
        asymmetric = scheme.group is not None and not scheme.symmetric
        return empty(scheme.kind, (out, columns), scheme.group, asymmetric, weight.device)
    if scheme.kind == "int8" and (made := compiled.packed_rows(weight)) is not None:
        return made
    codes = torch.empty(out, columns, dtype=torch.uint8, device=weight.device)
    if scheme.group is None:
        rows = torch.cat([_of_rows(piece, scheme.kind, into) for piece, into in _pieces(weight, codes)])
        return pack(scheme.kind, codes, -(-columns // BLOCK) * BLOCK, rows)
    counts = _counts(importance if scheme.weighted else None, columns, scheme.group, weight.device)
    fitted = [_of_groups(piece, scheme, counts, into) for piece, into in _pieces(weight, codes)]
    scales, zeros = (torch.cat(part) for part in zip(*fitted, strict=True))
    rows = torch.exp2(torch.log2(scales.abs().amax(1)).floor())
    offsets = None if scheme.symmetric else zeros - 8
    return pack("int4", codes, scheme.group, rows, scales / rows[:, None], offsets)


def _pieces(weight: Tensor, codes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time in float32, and where their codes go."""
    rows = max(1, PIECE[weight.device.type] // weight.shape[1])
    for piece, into in zip(torch.split(weight, rows), torch.split(codes, rows), strict=True):
        yield piece.to(torch.float32), into


def _bfloat16(values: Tensor) -> Tensor:
    """Float32 numbers rounded to those of bfloat16."""
    return values.to(torch.bfloat16).to(torch.float32)


def _of_rows(weight: Tensor, kind: str, codes: Tensor) -> Tensor:
    """Factors ``[out]``; the codes go to ``codes`` uint8 ``[out, in]``."""
    largest = weight.abs().amax(1)
    factors = _bfloat16(largest / _LARGEST[kind])
    factors = torch.where(factors > 0, factors, 1.0)
    scaled = (weight / factors[:, None]).clamp(-_LARGEST[kind], _LARGEST[kind])
    if kind == "fp8":
        codes.copy_(scaled.to(torch.float8_e4m3fn).view(torch.uint8))
    else:
        codes.copy_(scaled.round().to(torch.int8).view(torch.uint8))
    return factors


def _counts(importance: Tensor | None, columns: int, group: int, device: torch.device) -> Tensor:
    """What errors of columns count, mean 1, ``[groups, group]``; 0 for columns that only fill a group."""
    counts = torch.ones(columns, device=device)
    if importance is not None:
        shares = importance.to(device, torch.float32) / importance.mean()
        if bool(shares.isfinite().all()):
            counts = shares.clamp_min(1e-4)
    return torch.nn.functional.pad(counts, (0, -columns % group)).view(-1, group)


def _of_groups(weight: Tensor, scheme: Scheme, counts: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros ``[out, groups]`` in float32; the codes go to ``codes`` uint8 ``[out, in]``."""
    (out, columns), group = weight.shape, counts.shape[1]
    x = torch.nn.functional.pad(weight, (0, -columns % group)).view(out, -1, group)
    low, high = x.amin(-1, keepdim=True).clamp_max(0.0), x.amax(-1, keepdim=True).clamp_min(0.0)
    whole = torch.where(-low >= high, -low / 8, -high / 8) if scheme.symmetric else high / 15 - low / 15
    least = _bfloat16(whole.abs().amax(1, keepdim=True) * _LEAST)
    least = torch.where(least > 0, least, 1.0)

    def allowed(scale: Tensor) -> Tensor:
        return torch.maximum(_bfloat16(scale.abs()), least).copysign_(scale)

    def zero_of(scale: Tensor, cut: float) -> Tensor:
        return torch.full_like(scale, 8) if scheme.symmetric else (-low * cut / scale).round_().clamp_(0, 15)

    def levels(scale: Tensor, zero: Tensor) -> Tensor:
        return (x / scale + zero).round_().clamp_(0, 15).sub_(zero)

    scale = allowed(whole)
    zero = zero_of(scale, 1.0)
    if not scheme.fitted:
        codes.copy_((levels(scale, zero) + zero).flatten(1)[:, :columns])
        return scale[..., 0], zero[..., 0]
    lost = torch.full_like(whole, torch.inf)

    def tried(new: Tensor, origin: Tensor, best: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        found = levels(new, origin).mul_(new).sub_(x).square_().mul_(counts).sum(-1, keepdim=True)
        better = found < best[2]
        return tuple(torch.where(better, one, other) for one, other in zip((new, origin, found), best, strict=True))  # type: ignore[return-value]

    best = scale, zero, lost
    for cut in SIGNED_CUTS if scheme.symmetric else CUTS:
        new = allowed(whole * cut)
        best = tried(new, zero_of(new, cut), best)
    for _ in range(TURNS):
        scale, zero, _lost = best
        found = levels(scale, zero)
        counted = found * counts
        fit = (counted * x).sum(-1, keepdim=True) / (counted * found).sum(-1, keepdim=True)
        best = tried(allowed(torch.where(fit * scale > 0, fit, scale)), zero, best)
    scale, zero, _lost = best
    codes.copy_((levels(scale, zero) + zero).flatten(1)[:, :columns])
    return scale[..., 0], zero[..., 0]


def reference(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Tensor:
    """The values that :func:`quantised` stands for, by the same rules in float64, one row or group after the other."""
    wide = weight.to(torch.float64)
    counts = torch.ones(wide.shape[1], dtype=torch.float64)
    if importance is not None and scheme.weighted:
        counts = (importance.to(torch.float64) / importance.to(torch.float64).mean()).clamp_min(1e-4)

    def stored(scale: Tensor) -> Tensor:
        return scale.to(torch.float32).to(torch.bfloat16).to(torch.float64)

    def of_row(row: Tensor) -> Tensor:
        most = _LARGEST[scheme.kind]
        factor = stored(row.abs().max() / most)
        factor = factor if factor > 0 else torch.ones_like(factor)
        scaled = (row / factor).clamp(-most, most)
        return factor * (scaled.round() if scheme.kind == "int8" else scaled.to(torch.float8_e4m3fn).to(torch.float64))

    def of_group(x: Tensor, count: Tensor, least: Tensor) -> Tensor:
        low, high = x.min().clamp_max(0), x.max().clamp_min(0)
        whole = (high - low) / 15
        if scheme.symmetric:
            whole = -x[x.abs().argmax()] / 8

        def allowed(scale: Tensor) -> Tensor:
            return stored(scale.abs()).clamp_min(least).copysign(scale)

        def zero_of(scale: Tensor, cut: float) -> Tensor:
            return torch.full_like(scale, 8) if scheme.symmetric else (-low * cut / scale).round().clamp(0, 15)

        def levels(scale: Tensor, zero: Tensor) -> Tensor:
            return (x / scale + zero).round().clamp(0, 15) - zero

        def lost(pair: tuple[Tensor, Tensor]) -> float:
            return float(((levels(*pair) * pair[0] - x).square() * count).sum())

        pairs = []
        cuts = SIGNED_CUTS if scheme.symmetric else CUTS
        for cut in cuts if scheme.fitted else cuts[:1]:
            scale = allowed(whole * cut)
            pairs.append((scale, zero_of(scale, cut)))
        best = min(pairs, key=lost)
        for _ in range(TURNS if scheme.fitted else 0):
            found = levels(*best)
            energy = (count * found * found).sum()
            if energy > 0 and (fit := (count * found * x).sum() / energy) * best[0] > 0:
                best = min(best, (allowed(fit), best[1]), key=lost)
        return levels(*best) * best[0]

    if scheme.group is None:
        return torch.stack([of_row(row) for row in wide])
    result = []
    for row in wide:
        parts = torch.split(row, scheme.group)
        if scheme.symmetric:
            widest = row.abs().max() / 8
        else:
            widest = max((part.max().clamp_min(0) - part.min().clamp_max(0)) / 15 for part in parts)
        least = stored(widest * _LEAST)
        least = least if least > 0 else torch.ones_like(least)
        pairs = zip(parts, torch.split(counts, scheme.group), strict=True)
        result.append(torch.cat([of_group(part, count, least) for part, count in pairs]))
    return torch.stack(result)
