"""Mutants of GGUF files: entries of the metadata, the list of tensors, counts and lengths, the data."""

import random
import struct
from dataclasses import dataclass, field
from typing import Any

from fuzzing import hostile

#: Type of an entry -> struct's letter of a number of it.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9


@dataclass
class Tensor:
    name: str
    sizes: list[int]
    kind: int
    offset: int


@dataclass
class File:
    """A GGUF file taken apart. Entries are (name, type, value); a value of a list is (type, values)."""

    entries: list[tuple[str, int, Any]]
    tensors: list[Tensor] = field(default_factory=list)
    data: bytes = b""
    version: int = 3


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _number(letter: str, value: Any) -> bytes:
    if letter in "fd?":
        try:
            return struct.pack(f"<{letter}", value)
        except OverflowError:
            return struct.pack(f"<{letter}", 0)
    size = struct.calcsize(letter)
    return (int(value) % 2 ** (8 * size)).to_bytes(size, "little")


def _value(kind: int, value: Any) -> bytes:
    if kind == TEXT:
        return text(value)
    if kind == LIST:
        item, values = value
        return struct.pack("<IQ", item, len(values)) + b"".join(_value(item, one) for one in values)
    return _number(NUMBERS[kind], value)


def write(file: File, counts: tuple[int, int] | None = None) -> bytes:
    """The bytes of a file.

    Args:
        counts: How many tensors and entries it claims (None: the true ones).
    """
    tensors, entries = counts or (len(file.tensors), len(file.entries))
    out = bytearray(b"GGUF" + struct.pack("<IQQ", file.version, tensors % 2**64, entries % 2**64))
    for name, kind, value in file.entries:
        out += text(name) + struct.pack("<I", kind) + _value(kind, value)
    for tensor in file.tensors:
        out += text(tensor.name) + struct.pack("<I", len(tensor.sizes))
        out += b"".join(_number("Q", size) for size in tensor.sizes)
        out += _number("I", tensor.kind) + _number("Q", tensor.offset)
    return bytes(out + bytes(-len(out) % 32)) + file.data


def read(data: bytes) -> File:
    """A valid file taken apart."""
    position = 4

    def number(letter: str) -> Any:
        nonlocal position
        position += struct.calcsize(letter)
        return struct.unpack_from(f"<{letter}", data, position - struct.calcsize(letter))[0]

    def string() -> str:
        nonlocal position
        length = number("Q")
        position += length
        return data[position - length : position].decode()

    def value(kind: int) -> Any:
        if kind == TEXT:
            return string()
        if kind == LIST:
            item, count = number("I"), number("Q")
            return item, [value(item) for _ in range(count)]
        return number(NUMBERS[kind])

    version, tensors, entries = number("I"), number("Q"), number("Q")
    file = File([(string(), kind := number("I"), value(kind)) for _ in range(entries)], version=version)
    for _ in range(tensors):
        name, dimensions = string(), number("I")
        file.tensors.append(Tensor(name, [number("Q") for _ in range(dimensions)], number("I"), number("Q")))
    file.data = data[position + -position % 32 :]
    return file


def mutate(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A mutant of a valid file."""
    if rng.random() < 0.2:
        return hostile.damage(rng, data, others)
    file, counts = read(data), None
    for _ in range(rng.choice((1, 1, 2))):
        choice = rng.random()
        if choice < 0.6:
            _change_entry(rng, file)
        elif choice < 0.9 and file.tensors:
            _change_tensor(rng, file)
        elif choice < 0.95:
            counts = hostile.whole(rng), rng.choice((len(file.entries), hostile.whole(rng)))
        else:
            file.data = rng.choice((b"", file.data[:-1], file.data * 2, b"\xff" * len(file.data)))
    return write(file, counts)


def _change_entry(rng: random.Random, file: File) -> None:
    place = rng.randrange(len(file.entries))
    name, kind, value = file.entries[place]
    choice = rng.random()
    if choice < 0.1:
        del file.entries[place]
    elif choice < 0.15:
        file.entries.insert(place, file.entries[rng.randrange(len(file.entries))])
    elif choice < 0.2:
        file.entries[place] = rng.choice((hostile.text(rng), name + ".x", name[:-1])), kind, value
    elif kind == LIST and choice < 0.8:
        item, values = value
        values, where = list(values), rng.randrange(len(values))
        one = _any_value(rng, item)
        values = rng.choice(
            (values[:where], [*values, one], [*values[:where], one, *values[where + 1 :]], values[::-1])
        )
        file.entries[place] = name, kind, (item, values)
    elif choice < 0.8:
        file.entries[place] = name, kind, _any_value(rng, kind)
    else:
        kind = rng.choice((*NUMBERS, TEXT))
        file.entries[place] = name, kind, _any_value(rng, kind)


def _any_value(rng: random.Random, kind: int) -> Any:
    if kind == TEXT:
        return hostile.text(rng)
    if NUMBERS[kind] in "fd":
        return rng.choice((*hostile.REAL, float("nan"), float("inf"), float(rng.randrange(100))))
    return hostile.whole(rng)


def _change_tensor(rng: random.Random, file: File) -> None:
    tensor = rng.choice(file.tensors)
    choice = rng.random()
    if choice < 0.15:
        file.tensors.remove(tensor)
    elif choice < 0.3:
        tensor.name = rng.choice((hostile.text(rng), rng.choice(file.tensors).name, tensor.name + "x"))
    elif choice < 0.6:
        sizes = tensor.sizes
        other = [*sizes[:-1], hostile.whole(rng)]
        tensor.sizes = rng.choice((sizes[::-1], [*sizes, 1], sizes[1:], [0, *sizes], other, [2**62, 2**62, 4]))
    elif choice < 0.8:
        tensor.kind = rng.choice((*range(42), hostile.whole(rng)))
    else:
        tensor.offset = rng.choice(
            (tensor.offset + 1, tensor.offset + 32, rng.choice(file.tensors).offset, hostile.whole(rng))
        )
