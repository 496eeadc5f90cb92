"""Headers of safetensors files: what the safetensors library accepts, no more and no less, but for a few things."""

import copy
import json
import os
import random
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, deserialize

from octo_run.errors import LONGEST, OctoError
from octo_run.models import foreign
from octo_run.models.safetensors_file import ITEM_BITS, read_header

MUTANTS = 4000

#: Why octo-run refuses what the library accepts.
REFUSED_ALONE = {
    "twice": "a name occurs twice in an object: which one counts is not said",
    "form": "an entry as a list, a dtype as an object: the library's parser takes them, the format does not have them",
    "dimensions": "more dimensions than any tensor has",
}
#: Why octo-run accepts what the library refuses.
ACCEPTED_ALONE = {"depth": "nested more than 127 deep where nothing is read"}


def file_of(header: Any, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


def ours(path: Path, content: bytes) -> str | None:
    """What octo-run says against the file, None if nothing. Anything but an OctoError passes through."""
    path.write_bytes(content)
    try:
        read_header(path)
    except OctoError as error:
        return str(error)
    return None


def theirs(content: bytes) -> str | None:
    try:
        deserialize(content)
    except SafetensorError as error:
        return str(error)
    return None


VALUES = [None, True, -1, 0, 1, 2, 3, 8, 24, 2**32, 2**63, 2**64 - 1, 2**64, 10**310, 0.5, 2.0, float("nan"), "", "F32",
          "C64", "F4", "F6_E2M3", "F8_E8M0", "F16", "pt", "\ud800", "é", [], {}, [0], [0, 8], [0, 2**63, 4],
          [2**63, 4, 0],
          [True, 2], [1] * 70, {"F32": None}, {"a": "b"}, ["F32", [2, 3], [0, 24]], {"x": 1}]  # fmt: skip
PIECES = [b"-", b"0", b"1", b"e1", b".0", b",", b":", b"{}", b"[", b"]", b"}", b'"', b" ", b"\n", b"\t", b"\0", b"\x7f",
          b"\xff", b"\\ud800", b"\\u0041", b"\\x", b"NaN", b"-0", b"null", b'"a":1,', b'"x":[[',
          b"\xef\xbb\xbf"]  # fmt: skip


def document() -> dict[str, Any]:
    return {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 3], [0, 24]),
        "b": entry("BF16", [4], [24, 32]),
        "c": entry("F64", [], [32, 40]),
        "d": entry("U8", [0, 7], [40, 40]),
        "e": entry("F4", [3, 4], [40, 46], note=[1, {"deep": "x"}]),
    }


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


def mutant(rng: random.Random) -> bytes:
    value, data = document(), b"\0" * 46
    for _ in range(rng.choice((0, 1, 1, 2))):
        container, key = rng.choice(list(places(value)))
        action = rng.random()
        if action < 0.75:
            container[key] = copy.deepcopy(rng.choice(VALUES))
        elif action < 0.85:
            del container[key]
        elif isinstance(container, dict):
            container[rng.choice(["a", "x", "dtype", "shape", "data_offsets", "__metadata__"])] = container.pop(key)
    dtype, count = rng.choice([*ITEM_BITS, "C128", "f32"]), rng.randrange(9)
    if rng.random() < 0.3:
        size = count * ITEM_BITS.get(dtype, 128) // 8
        value["z"] = entry(dtype, rng.choice([[count], [count, 1], [1, count]]), [46, 46 + size])
        data += b"\0" * size
    if rng.random() < 0.03:
        value["y"] = rng.choice(
            (["U8", [0], [0, 0]], entry({"F32": None}, [0], [0, 0]), entry("U8", [1] * 65 + [0], [0, 0]))
        )
    text = bytearray(json.dumps(value).encode())
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        start = rng.randrange(len(text) + 1)
        text[start : start + rng.choice((0, 0, 1, 2))] = rng.choice(PIECES)
    if rng.random() < 0.05:
        text = bytearray(b'{"a":' + json.dumps(entry()).encode() + b"," + bytes(text[1:]))
    if rng.random() < 0.05:
        depth = rng.choice((100, 125, 126, 300))
        text[1:1] = b'"deep":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":' + b"[" * depth + b"]" * depth + b"},"
    if rng.random() < 0.05:
        data = data[: rng.randrange(60)] + b"\0" * rng.randrange(3)
    length = len(text) if rng.random() > 0.05 else rng.choice((0, 1, 2, len(text) - 1, len(text) + 1, 10**8 + 1, 2**63))
    return struct.pack("<Q", length) + bytes(text) + data


def reason(content: bytes, said: str | None) -> str:
    """Which of the listed differences this is; ``said``: what octo-run says. KeyError for none."""
    if said is None:
        opened = {"[": 1, "{": 1, "]": -1, "}": -1}
        depth = deepest = 0
        for letter in content[8:].decode("latin-1"):
            depth += opened.get(letter, 0)
            deepest = max(deepest, depth)
        return "depth" if deepest > 127 else ""
    for words, name in (
        ("a name occurs twice", "twice"),
        ("lacks dtype, shape or data_offsets", "form"),
        ("has the dtype {'F32': None}", "form"),
        ("dimensions, more than", "dimensions"),
    ):
        if words in said:
            return name
    return ""


@pytest.mark.slow
def test_agrees_with_the_library(tmp_path: Path) -> None:
    path, rng, verdicts = tmp_path / "x.safetensors", random.Random(20261127), Counter[str]()
    for _ in range(MUTANTS):
        content = mutant(rng)
        mine, other = ours(path, content), theirs(content)
        assert mine is None or (len(mine) <= LONGEST and "\n" not in mine and mine.endswith(".")), mine
        if (mine is None) == (other is None):
            verdicts["accepted" if mine is None else "refused"] += 1
            continue
        name = reason(content, mine)
        allowed = ACCEPTED_ALONE if mine is None else REFUSED_ALONE
        assert name in allowed, (content[8:], mine, other)
        verdicts[name] += 1
    assert verdicts["accepted"] > MUTANTS / 20 and verdicts["refused"] > MUTANTS / 4, verdicts
    assert all(verdicts[name] for name in REFUSED_ALONE | ACCEPTED_ALONE), verdicts


@pytest.mark.parametrize("metadata", [1, [], "x", {"a": 1}, {"a": None}, {"a": {}}, {"a": "\ud800"}])
def test_metadata_is_an_object_of_texts(tmp_path: Path, metadata: Any) -> None:
    content = file_of({"__metadata__": metadata, "a": entry()})
    assert theirs(content) is not None
    assert "x.safetensors" in str(ours(tmp_path / "x.safetensors", content))


@pytest.mark.parametrize(
    "dtype", ["C64", "F8_E8M0", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3"]
)
def test_every_dtype_of_the_library(tmp_path: Path, dtype: str) -> None:
    content = file_of({"a": entry(dtype, [8 * 24 // ITEM_BITS[dtype]], [0, 24])}, b"\0" * 24)
    assert theirs(content) is None and ours(tmp_path / "x.safetensors", content) is None


def test_items_of_less_than_a_byte_fill_bytes(tmp_path: Path) -> None:
    content = file_of({"a": entry("F4", [15], [0, 8])})
    assert theirs(content) is not None and "has 8 bytes, not those of F4 [15]" in str(ours(tmp_path / "x", content))


def test_zero_beside_huge_dimensions(tmp_path: Path) -> None:
    """As the library multiplies: nothing may overflow before the 0 comes; no exception either way."""
    path = tmp_path / "x.safetensors"
    for shape, good in (([0, 2**62, 2**62], True), ([2**62, 2**62, 0], False), ([2**64 - 1, 0], True)):
        content = file_of({"a": entry(shape=shape, offsets=[0, 0])}, b"")
        assert (theirs(content) is None) == good == (ours(path, content) is None)


@pytest.mark.slow
def test_limits_take_no_time(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    start = time.process_time()
    assert "100,000 dimensions, more than 64" in str(ours(path, file_of({"a": entry(shape=[3] * 100_000)})))
    assert "dimensions" in str(ours(path, file_of({"a": entry(shape=[2**40] * 100_000)})))
    empty = ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(100_001))
    assert "has 100,001 tensors, and octo-run reads 100,000 at most" in str(
        ours(path, file_of(f"{{{empty}}}".encode(), b""))
    )
    assert time.process_time() - start < 5
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000) + b"{" + b'"a":{},' * 5_000_000)
        file.truncate(100_000_000)
    start = time.process_time()
    with pytest.raises(OctoError, match="more than 2,500,000 items"):
        read_header(path)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("digits", [400, 5000])
def test_long_numbers(tmp_path: Path, digits: int) -> None:
    text = json.dumps({"a": entry(shape=["N"])}).replace('"N"', "9" * digits).encode()
    assert theirs(file_of(text)) is not None
    assert "out of range" in str(ours(tmp_path / "x.safetensors", file_of(text)))


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "zero", "folder"):
        with pytest.raises(OctoError, match="is no regular file"):
            read_header(tmp_path / name)
    with pytest.raises(OctoError, match="cannot be read: File name too long"):
        read_header(tmp_path / ("x" * 300))


def test_foreign_names_are_shown_short_and_escaped(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    name = "\x1b]52;c;aGk=\x07" + "n" * 5000 + "\u202e"
    for bad, words in (
        (3, "' lacks dtype, shape or data_offsets)"),
        (entry("F33" * 999), "has the dtype 'F33F33"),
        (entry(shape=[-1] * 5000), "' is a list of 5,000)"),
        (entry(offsets=["\x1b" * 999]), "the data_offsets of '"),
        (entry(offsets=[0, 4]), "has 4 bytes, not those of F32 [2])"),
        (entry(shape=[2**63] * 9), "has 8 bytes, not those of F32 a list of 9)"),
    ):
        said = str(ours(path, file_of({name: bad})))
        assert len(said) <= LONGEST and str(path) in said and said.isprintable()
        assert words in said and said.endswith((": fetch the model again.", "which octo-run does not know.")), said


def test_the_limits_are_those_of_one_place() -> None:
    assert foreign.MAX_HEADER_BYTES == 100_000_000  # the safetensors library's own
    for name in (
        "MAX_FILE_BYTES",
        "MAX_JSON_ITEMS",
        "MAX_HEADER_BYTES",
        "MAX_TENSORS",
        "MAX_DIMENSIONS",
        "MAX_WEIGHT_FILES",
    ):
        assert name in str(foreign.__doc__)
