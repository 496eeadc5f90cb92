"""The formats by name, and the pair of them (K and V) that a KV cache uses."""

import functools
from dataclasses import dataclass

import torch

from octo_run.errors import UsageError, nearest, quoted
from octo_run.kernels.codec.base import Codec
from octo_run.kernels.codec.octopus import NOMINAL_BITS, OctopusCodec
from octo_run.kernels.codec.plain import PlainCodec
from octo_run.kernels.codec.rotation import HEAD_DIMS
from octo_run.kernels.codec.trellis import FORMATS as TRELLIS_FORMATS
from octo_run.kernels.codec.trellis import TrellisCodec

PLAIN = "bf16"


@dataclass(frozen=True)
class KVFormat:
    """How keys and values are stored: a codec for each. `name` is what `--kv` was given."""

    name: str
    k: Codec
    v: Codec


def names() -> tuple[str, ...]:
    """Every format name that `get` and `--kv` know: the trellis formats, the paper's, the uncompressed `bf16`."""
    return (*TRELLIS_FORMATS, *NOMINAL_BITS, PLAIN)


@functools.cache
def _build(name: str, head_dim: int, seed: int) -> Codec:
    """A new codec of a known name and a supported head dimension."""
    if name == PLAIN:
        return PlainCodec(head_dim, seed)
    return TrellisCodec(name, head_dim, seed) if name in TRELLIS_FORMATS else OctopusCodec(name, head_dim, seed)


def get(name: str, head_dim: int = 128, seed: int = 0) -> Codec:
    """The codec of that name; the same object for the same arguments.

    `bf16` takes any head dimension.

    Raises:
        UsageError: An unknown name or a head dimension the format has no rotation and codebook for; the message names
            the choices.
    """
    if name not in names():
        near = nearest(name, names())
        known = ", ".join(names())
        hint = f"did you mean {near}, of {known}?" if near else f"choose one of {known}."
        raise UsageError(f"unknown KV format {quoted(name)}: {hint}")
    if name != PLAIN and head_dim not in HEAD_DIMS:
        dims = ", ".join(map(str, HEAD_DIMS))
        raise UsageError(f"KV format {name} cannot store head_dim {head_dim}, only {dims}: use --kv {PLAIN}.")
    if head_dim < 1:
        raise UsageError(f"head_dim {head_dim} is not a number of coordinates: it must be at least 1.")
    return _build(name, head_dim, seed)


def parse_kv(text: str, head_dim: int, seed: int = 0, plain_dtype: torch.dtype = torch.bfloat16) -> KVFormat:
    """The formats named by `--kv`.

    Args:
        text: "NAME" for keys and values alike, or "KNAME:VNAME".
        plain_dtype: The dtype that `bf16` stores (the model's).

    Raises:
        UsageError: Any other text; the message names the choices.
    """
    parts = text.split(":")
    if len(parts) > 2:
        raise UsageError(
            f"--kv {quoted(text)} has too many parts: give one format, or one for keys and one for values, K:V."
        )

    def codec(name: str) -> Codec:
        found = get(name, head_dim, seed)
        return PlainCodec(head_dim, seed, plain_dtype) if name == PLAIN else found

    return KVFormat(text, codec(parts[0]), codec(parts[-1]))
