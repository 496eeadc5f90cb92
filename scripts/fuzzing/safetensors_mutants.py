"""Mutants of safetensors files: the header's tree, its length, the data, and faults that need all three."""

import json
import random
from collections.abc import Callable
from typing import Any

from fuzzing import hostile
from fuzzing.json_mutants import Document

#: Every dtype that a version of the safetensors library knows, and some that none does.
DTYPES = (
    "BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64", "C64", "F4", "F6_E2M3",
    "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "bf16", "F128", "",
)  # fmt: skip


def join(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A file of these parts.

    Args:
        length: The one that the file claims for its header (None: the true one).
    """
    return ((len(header) if length is None else length) % 2**64).to_bytes(8, "little") + header + data


def split(file: bytes) -> tuple[bytes, bytes]:
    """Header and data of a valid file."""
    length = int.from_bytes(file[:8], "little")
    return file[8 : 8 + length], file[8 + length :]


def mutate(rng: random.Random, file: bytes, donors: list[Any], words: list[str], others: list[bytes]) -> bytes:
    """A mutant of a valid file."""
    if rng.random() < 0.15:
        return hostile.damage(rng, file, others)
    header, data = split(file)
    doc = Document(rng, header, donors, words)
    if rng.random() < 0.6:
        for _ in range(rng.choice((1, 1, 2))):
            rng.choice(_CHANGES)(doc, len(data))
    else:
        doc.change()
    header = doc.data()
    length = None
    choice = rng.random()
    if choice < 0.04:
        header = hostile.damage(rng, header, others)
    elif choice < 0.08:
        length = rng.choice((len(header) - 1, len(header) + 1, len(header) + len(data), hostile.whole(rng)))
    elif choice < 0.14:
        header += b" " * rng.choice((1, 7, 8, 100))
    elif choice < 0.18:
        data = rng.choice((b"", data[:-1], data + b"\0", data * 2, data[: rng.randrange(len(data) + 1)]))
    elif choice < 0.19:
        header = rng.choice((b" ", b"\n", b"\xef\xbb\xbf", b"\0")) + header
    return join(header, data, length)


def _entry(doc: Document) -> dict[str, Any] | None:
    entries = [value for value in doc.root.values() if isinstance(value, dict)] if isinstance(doc.root, dict) else []
    return doc.rng.choice(entries) if entries else None


def _change_shape(doc: Document, _size: int) -> None:
    """Dimensions whose product stays, overflows, or vanishes."""
    entry, rng = _entry(doc), doc.rng
    if entry is None:
        return
    old = entry.get("shape")
    shape = list(old) if isinstance(old, list) else []
    many = rng.choice((10, 1_000, 100_000)) if rng.random() < 0.02 else 3
    entry["shape"] = rng.choice(
        (
            [*shape, 1],
            [1, *shape],
            shape[::-1],
            shape[1:],
            [*shape, 0],
            [0, 2**62, 2**62],
            [2**63 - 1, 2**63 - 1, 0],
            [2**32, 2**32],
            [2**63 - 1, 2],
            [-1, *shape],
            [hostile.whole(rng) for _ in range(3)],
            [rng.choice((0, 1, 2, 2**62, 2**63 - 1))] * many,
            [float(value) if isinstance(value, int) and value < 2**53 else value for value in shape],
            [True, *shape],
        )
    )


def _change_dtype(doc: Document, _size: int) -> None:
    if (entry := _entry(doc)) is not None:
        entry["dtype"] = doc.rng.choice(DTYPES)


def _resize(doc: Document, size: int) -> None:
    """Another dtype, with the shape that gives the same number of bytes for it, as far as there is one."""
    entry, rng = _entry(doc), doc.rng
    offsets = entry.get("data_offsets") if entry is not None else None
    if entry is None or not isinstance(offsets, list) or len(offsets) != 2:
        return
    try:
        count = int(offsets[1]) - int(offsets[0])
    except (TypeError, ValueError, OverflowError):
        return
    dtype = rng.choice(DTYPES)
    bits = {"F4": 4, "C64": 64, "BOOL": 8, "BF16": 16}.get(dtype, 6 if dtype.startswith("F6") else 8)
    bits = bits if not dtype[1:].isdigit() or dtype in ("F4", "C64") else int(dtype[1:])
    entry["dtype"], entry["shape"] = dtype, [count * 8 // bits if bits else 0]


def _change_offsets(doc: Document, size: int) -> None:
    entry, rng = _entry(doc), doc.rng
    if entry is None:
        return
    old = entry.get("data_offsets")
    begin, end = old if isinstance(old, list) and len(old) == 2 else (0, size)
    delta = rng.choice((-8, -1, 1, 8))
    if not (isinstance(begin, int) and isinstance(end, int)):
        begin, end = 0, size
    entry["data_offsets"] = rng.choice(
        (
            [begin + delta, end],
            [begin, end + delta],
            [begin + delta, end + delta],
            [end, begin],
            [end, end],
            [begin],
            [begin, end, end],
            [0, size],
            [begin, hostile.whole(rng)],
            [hostile.whole(rng), hostile.whole(rng)],
            [2**64 - 8, 2**64],
            [True, end],
            [str(begin), str(end)],
        )
    )


def _share(doc: Document, _size: int) -> None:
    """A second tensor at the place of the first, with or without bytes."""
    entry, rng = _entry(doc), doc.rng
    if entry is not None:
        doc.root[rng.choice((*doc.words, "again", hostile.text(rng)))] = dict(entry)


def _add_empty(doc: Document, size: int) -> None:
    place = doc.rng.choice((0, size, doc.rng.randrange(size + 1)))
    shape = doc.rng.choice(([0], [0, 2**62], [3, 0], [2**62, 0, 2**62], [2**62, 2**62, 0]))
    if isinstance(doc.root, dict):
        doc.root["empty"] = {"dtype": doc.rng.choice(DTYPES), "shape": shape, "data_offsets": [place, place]}


def _add_many(doc: Document, size: int) -> None:
    if isinstance(doc.root, dict):
        count = 150_000 if doc.rng.random() < 0.01 else doc.rng.choice((10, 100))
        entry = {"dtype": "U8", "shape": [0], "data_offsets": [size, size]}
        doc.root.update({f"t{number}": entry for number in range(count)})


def _change_metadata(doc: Document, _size: int) -> None:
    if isinstance(doc.root, dict):
        rng = doc.rng
        good = {"format": "pt", hostile.text(rng): hostile.text(rng)}
        doc.root["__metadata__"] = rng.choice((good, {}, {"format": doc.value()}, {"a": None}, {"a": 1}, doc.value()))


def _nameless(doc: Document, _size: int) -> None:
    if isinstance(doc.root, dict) and doc.root:
        name = doc.rng.choice(list(doc.root))
        doc.root[hostile.text(doc.rng)] = doc.root.pop(name)


def _extra_field(doc: Document, _size: int) -> None:
    if (entry := _entry(doc)) is not None:
        entry[doc.rng.choice(("stride", "dtype ", "Shape", ""))] = doc.value()


_CHANGES: tuple[Callable[[Document, int], None], ...] = (
    _change_shape, _change_shape, _change_dtype, _resize, _change_offsets, _change_offsets, _share, _add_empty,
    _add_many, _change_metadata, _nameless, _extra_field,
)  # fmt: skip


def tensors(sizes: list[tuple[str, str, list[int], int]], metadata: dict[str, str] | None = None) -> bytes:
    """A valid file of tensors (name, dtype, shape, bytes) whose bytes count up; the header is padded to 8 bytes."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    place = 0
    for name, dtype, shape, size in sizes:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    return join(text + b" " * (-len(text) % 8), bytes(i % 60 for i in range(place)))
