"""Heads of keys and values as configurations describe them. Nothing here imports torch."""

from typing import NamedTuple

from octo_run.models.fields import Fields

_MAX_HEAD_DIM = 4096


class KVHeads(NamedTuple):
    """Keys and values of a layer: how many heads there are, and numbers of each."""

    number: int
    size: int


def head_size(fields: Fields, name: str, default: int) -> int:
    """Numbers of a head that a field says."""
    size = fields.integer(name, default, high=_MAX_HEAD_DIM)
    if size % 2:
        raise fields.fail(name, f"is {size}, which is odd: rotary embeddings turn pairs of coordinates")
    return size
