"""Mutants of SentencePiece models, which are protocol buffers (sentencepiece_model.proto)."""

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

from fuzzing import hostile

PIECE, TRAINER, NORMALIZER, SELF_TEST, DENORMALIZER = 1, 2, 3, 4, 5


@dataclass
class Field:
    """A field: its number, its wire type, and its number or bytes (bytes for all wire types but 0)."""

    number: int
    wire: int
    value: int | bytes


def parse(data: bytes) -> list[Field]:
    """The fields of a valid message."""
    fields, position = [], 0
    while position < len(data):
        tag, position = _varint(data, position)
        wire = tag & 7
        value: int | bytes
        if wire == 0:
            value, position = _varint(data, position)
        else:
            size, position = _varint(data, position) if wire == 2 else ({1: 8, 5: 4}[wire], position)
            value, position = data[position : position + size], position + size
        fields.append(Field(tag >> 3, wire, value))
    return fields


def write(fields: list[Field]) -> bytes:
    """The message of these fields."""
    out = bytearray()
    for field in fields:
        out += varint(field.number << 3 | field.wire)
        if isinstance(field.value, int):
            out += varint(field.value)
        else:
            out += (varint(len(field.value)) if field.wire == 2 else b"") + field.value
    return bytes(out)


def varint(value: int) -> bytes:
    """A whole number as protocol buffers write it; negative ones as 64 bits."""
    value %= 2**64
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position, value, shift = position + 1, value | (byte & 0x7F) << shift, shift + 7
        if byte < 0x80:
            return value, position


def mutate(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A mutant of a valid model.

    Args:
        others: Models whose parts are put in.
    """
    if rng.random() < 0.2:
        return hostile.damage(rng, data, others)
    fields = parse(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        rng.choice(_CHANGES)(rng, fields, others)
    data = write(fields)
    choice = rng.random()
    if choice < 0.05:
        return hostile.damage(rng, data, others)
    if choice < 0.10:
        return data + _odd_end(rng)
    return data


def _odd_end(rng: random.Random) -> bytes:
    """Fields that a careless parser runs beyond, or never ends with."""
    wires = bytes([rng.choice((3, 4, 6, 7)) | rng.randrange(16) << 3])
    endless = b"\xff" * rng.choice((1, 9, 10, 11, 1_000))
    too_long = varint(PIECE << 3 | 2) + varint(rng.choice((1, 2**31, 2**32, 2**63 - 1, 2**64 - 1)))
    return rng.choice((wires, endless, too_long, b"\x00", b"\x08", varint(2**32 << 3) + b"\x01", b"\x0d\x00", b"\x09"))


def _pick(rng: random.Random, fields: list[Field], number: int) -> Field | None:
    found = [field for field in fields if field.number == number and isinstance(field.value, bytes)]
    return rng.choice(found) if found else None


def _change_within(rng: random.Random, field: Field | None, change: Callable[[list[Field]], None]) -> None:
    if field is None or not isinstance(field.value, bytes):
        return
    try:
        inner = parse(field.value)
    except (IndexError, KeyError):  # an earlier change left no message there
        return
    change(inner)
    field.value = write(inner)


def _set(inner: list[Field], number: int, wire: int, value: int | bytes) -> None:
    for field in inner:
        if field.number == number:
            field.wire, field.value = wire, value
            return
    inner.append(Field(number, wire, value))


def _change_piece(rng: random.Random, fields: list[Field], _others: list[bytes]) -> None:
    """A piece's text (1), score (2) or type (3)."""

    def change(inner: list[Field]) -> None:
        choice = rng.randrange(5)
        if choice == 0:
            text = rng.choice((hostile.text(rng), "▁" * 3, "<0x41>", "<0x4>", "<0x100>", "a" * 5_000, " a", "</s>"))
            _set(inner, 1, 2, text.encode("utf-8", "surrogatepass"))
        elif choice == 1:
            _set(inner, 1, 2, rng.choice((b"\xff\xfe", b"\xc3", b"\xe2\x96", b"\x00", rng.randbytes(4))))
        elif choice == 2:
            _set(inner, 2, 5, struct.pack("<f", rng.choice((0, -1, 1e30, -1e30, float("nan"), float("inf")))))
        elif choice == 3:
            _set(inner, 3, 0, rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 100, 2**31, 2**64 - 1)))
        elif inner:
            del inner[rng.randrange(len(inner))]

    _change_within(rng, _pick(rng, fields, PIECE), change)


def _change_settings(rng: random.Random, fields: list[Field], _others: list[bytes]) -> None:
    """A number, a text or a fault in the settings of trainer or normaliser."""

    def change(inner: list[Field]) -> None:
        if not inner or rng.random() < 0.3:
            wire = rng.choice((0, 0, 2, 5))
            text = hostile.text(rng).encode("utf-8", "surrogatepass")
            value = hostile.whole(rng) if wire == 0 else text if wire == 2 else bytes(4)
            number = rng.choice((*range(1, 60), 1_000, 2**29 - 1))
            inner.insert(rng.randrange(len(inner) + 1), Field(number, wire, value))
            return
        field = rng.choice(inner)
        if isinstance(field.value, int):
            field.value = rng.choice((field.value ^ 1, field.value + 1, hostile.whole(rng)))
        elif rng.random() < 0.3:
            field.value = hostile.text(rng).encode("utf-8", "surrogatepass")
        elif field.value:
            field.value = hostile.damage(rng, field.value, [field.value])
            field.wire = 2

    _change_within(
        rng, _pick(rng, fields, rng.choice((TRAINER, TRAINER, NORMALIZER, NORMALIZER, DENORMALIZER))), change
    )


def _change_ids(rng: random.Random, fields: list[Field], _others: list[bytes]) -> None:
    """The trainer's unk, bos, eos and pad ids (40 to 43), their texts (45 to 49), model type (3), vocabulary size (4),
    byte fallback (35)."""

    def change(inner: list[Field]) -> None:
        number = rng.choice((40, 41, 42, 43, 45, 46, 47, 48, 3, 4, 35))
        if number >= 45:
            _set(inner, number, 2, hostile.text(rng).encode("utf-8", "surrogatepass"))
        else:
            _set(inner, number, 0, rng.choice((-1, 0, 1, 2, 3, 4, 5, 300, hostile.whole(rng))))

    _change_within(rng, _pick(rng, fields, TRAINER), change)


def _delete(rng: random.Random, fields: list[Field], _others: list[bytes]) -> None:
    if fields:
        first = rng.choice((0, rng.randrange(len(fields)), len(fields) - 1))
        del fields[first : first + rng.choice((1, 1, 1, 10, len(fields)))]


def _repeat(rng: random.Random, fields: list[Field], _others: list[bytes]) -> None:
    if fields:
        field = rng.choice(fields)
        fields.extend([Field(field.number, field.wire, field.value)] * rng.choice((1, 2, 100)))


def _swap(rng: random.Random, fields: list[Field], _others: list[bytes]) -> None:
    if fields:
        i, j = rng.randrange(len(fields)), rng.randrange(len(fields))
        fields[i], fields[j] = fields[j], fields[i]


def _retag(rng: random.Random, fields: list[Field], _others: list[bytes]) -> None:
    """Another number or wire type for what is there."""
    if not fields:
        return
    field = rng.choice(fields)
    if rng.random() < 0.5:
        field.number = rng.choice((0, 1, 2, 3, 4, 5, 6, 100, 2**29 - 1))
    elif isinstance(field.value, bytes):
        field.wire = rng.choice((1, 2, 3, 4, 5, 6, 7))


def _splice(rng: random.Random, fields: list[Field], others: list[bytes]) -> None:
    part = parse(rng.choice(others))
    begin = rng.randrange(len(part))
    place = rng.randrange(len(fields) + 1)
    fields[place:place] = part[begin : begin + rng.choice((1, 5, 100))]


_CHANGES: tuple[Callable[[random.Random, list[Field], list[bytes]], None], ...] = (
    *(_change_piece,) * 4, *(_change_settings,) * 3, *(_change_ids,) * 2, _delete, _repeat, _swap, _retag, _splice,
)  # fmt: skip
