"""Headers of GGUF files: read as the gguf package reads them, and damaged ones refused in one sentence at once."""

import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octo_run.errors import OctoError
from octo_run.models.gguf.header import read_header, read_model


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(
    entries: list[bytes],
    tensors: list[bytes],
    *,
    data: int = 128,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    count = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, *count) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


NAME = entry("general.architecture", 8, text("llama"))
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the magic ends at byte 4 and the file at 0"),
    "magic": (b"GGML" + bytes(100), "is no GGUF file: it begins with b'GGML'"),
    "old version": (header([NAME], [], version=1), "is GGUF of version 1, and"),
    "big-endian": (header([NAME], [], version=3 << 24), "or of big-endian byte order"),
    "version alone": (header([], [])[:8], "a count ends at byte 16 and the file at 8"),
    "entries": (header([NAME], [], counts=(0, 2**60)), "its header has more than 2,500,000 items"),
    "entries beyond": (
        header([NAME], [], counts=(0, 10_000)),
        "the list of metadata claims 10,000 items and the file has 224",
    ),
    "tensors": (header([NAME], [], counts=(2**63, 1)), "has 9,223,372,036,854,775,808 tensors, and octo-run reads"),
    "tensors beyond": (header([NAME], [], counts=(99_999, 1)), "the list of tensors claims 99,999 items"),
    "a huge text": (header([text("a") + struct.pack("<IQ", 8, 2**62)], []), "metadata 'a' ends at byte 4,611,686,018,"),
    "a huge name": (header([struct.pack("<Q", 2**64 - 1)], []), "a name in the metadata ends at byte"),
    "a huge list": (header([entry("a", 9, struct.pack("<IQ", 0, 2**61))], []), "more than 2,500,000 items"),
    "a long list": (header([entry("a", 9, struct.pack("<IQ", 12, 1000))], []), "'a' claims 1,000 items"),
    "a long list of texts": (header([entry("a", 9, struct.pack("<IQ", 8, 1000))], []), "'a' claims 1,000 items"),
    "a list of lists": (header([entry("a", 9, struct.pack("<IQ", 9, 1))], []), "'a' is a list of the type 9"),
    "an unknown type": (header([entry("a", 13, bytes(8))], []), "'a' has the unknown type 13"),
    "twice": (header([NAME, NAME], []), "its metadata have 'general.architecture' twice"),
    "no text": (header([entry("a", 8, text(b"\xff\xfe"))], []), "metadata 'a' is not UTF-8 text"),
    "control characters": (header([entry("\x1b[2J", 13, b"")], []), r"metadata '\x1b[2J' has the unknown type"),
    "alignment": (
        header([entry("general.alignment", 4, struct.pack("<I", 24))], []),
        "general.alignment is 24, no power",
    ),
    "no alignment": (header([entry("general.alignment", 4, bytes(4))], []), "general.alignment is 0, no power"),
    "alignment of text": (header([entry("general.alignment", 8, text("x"))], []), "general.alignment is 'x'"),
    "no dimensions": (header([], [tensor("t", ())]), "'t' has 0 dimensions"),
    "dimensions": (header([], [text("t") + struct.pack("<I", 2**31) + bytes(40)]), "'t' has 2,147,483,648 dimensions"),
    "a type": (header([], [tensor("t", kind=77)]), "'t' is of the GGML type 77, which octo-run does not know"),
    "a removed type": (header([], [tensor("t", kind=4)]), "'t' is of the GGML type 4,"),
    "nothing": (header([], [tensor("t", (0, 32))]), "'t' has the dimensions [0, 32], not those of F32"),
    "half a block": (header([], [tensor("t", (33,), 2)]), "'t' has the dimensions [33], not those of Q4_0"),
    "a huge tensor": (header([], [tensor("t", (2**63, 2**63, 2**63, 2**63))]), "'t' ends at byte"),
    "beyond": (header([], [tensor("t", offset=32)]), "'t' ends at byte 224 and the file at 192"),
    "far beyond": (header([], [tensor("t", offset=2**64 - 32)]), "'t' ends at byte 18,446,744,073,"),
    "askew": (header([], [tensor("t", (4,), offset=8)]), "'t' begins at 8, no multiple of 32"),
    "over another": (header([], [tensor("t"), tensor("u", offset=96)], data=256), "'u' begins at byte"),
    "the same name": (header([], [tensor("t"), tensor("t", offset=128)], data=256), "it has the tensor 't' twice"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_told_in_one_sentence(name: str, tmp_path: Path) -> None:
    data, problem = DAMAGED[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(OctoError) as error:
        read_header(path)
    message = str(error.value)
    assert problem in message and str(path) in message and message.endswith("."), message
    assert message.isprintable() and time.process_time() - start < 1


def test_a_header_is_read_as_the_gguf_package_reads_it(small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    from gguf import GGUFReader

    small = small_gguf("qwen3", quant="Q8_0")
    small.metadata |= {"a.list": [1.5, -2.0], "a.flag": True, "a.text": "ä \U0001f600", "a.number": 2**31}
    path = small.write(tmp_path / "model.gguf")
    ours, theirs = read_header(path), GGUFReader(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
    places = {t.name: (t.tensor_type.name, t.data_offset, t.data_offset + t.n_bytes) for t in theirs.tensors}
    assert {name: (t.dtype, t.start, t.end) for name, t in ours.tensors.items()} == places
    assert all(ours.tensors[t.name].shape == tuple(reversed(t.shape.tolist())) for t in theirs.tensors)


@pytest.mark.slow
def test_a_file_cut_anywhere_is_refused(small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    small = small_gguf("llama")
    path = small.write(tmp_path / "model.gguf")
    whole = path.read_bytes()
    for length in [*range(0, 3000, 7), *range(3000, len(whole) - 1, 4001), len(whole) - 64]:
        path.write_bytes(whole[:length])
        with pytest.raises(OctoError, match=r"model\.gguf is no complete GGUF file") as error:
            read_model(path)
        assert len(str(error.value)) <= 480


@pytest.mark.slow
def test_flipped_bytes_never_raise_anything_else(small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    path = small_gguf("llama").write(tmp_path / "model.gguf")
    whole = path.read_bytes()
    rng = random.Random(5)
    refused = 0
    start = time.process_time()
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(len(data), 12_000))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        path.write_bytes(data)
        try:
            read_model(path)
        except OctoError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) <= 480
    assert refused > 50 and time.process_time() - start < 60


@pytest.mark.slow
def test_a_header_takes_no_more_memory_than_its_file_justifies(tmp_path: Path) -> None:
    """A sparse file of a terabyte that claims texts and lists of all of it."""
    path = tmp_path / "model.gguf"
    for claim in (struct.pack("<IQ", 8, 2**39), struct.pack("<IIQ", 9, 0, 2**39), struct.pack("<IIQ", 9, 8, 2**36)):
        path.write_bytes(header([], [], data=0, counts=(0, 1))[:24] + text("a") + claim)
        with path.open("r+b") as file:
            file.truncate(2**40)
        code = (
            "import sys, resource; from pathlib import Path; from octo_run.models.gguf.header import read_header\n"
            "from octo_run.errors import OctoError\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "try: read_header(Path(sys.argv[1]))\n"
            "except OctoError as error: print(error)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
        *message, kilobytes = done.stdout.split("\n")[:-1]
        assert len(message) == 1 and "its header has more than" in message[0], done.stderr
        assert int(kilobytes) < 100_000
