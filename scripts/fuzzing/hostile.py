"""Values that readers of foreign files stumble over, and faults of bytes that fit every kind of file."""

import random
from collections.abc import Callable

#: Texts that steer a terminal, break lines or names, or are no valid Unicode.
TEXTS = (
    "",
    " ",
    "a",
    "0",
    "-1",
    "null",
    "../../etc/passwd",
    "a\nb\r\nc",
    "\x00",
    "\x1b]52;c;b2N0bw==\x07",
    "\x1b[2J\x1b[31m",
    "\x9b31m",
    "\u202egnp.exe",
    "\u2028",
    "\ufeff",
    "\ud800",
    "\udfff\ud800",
    "\U0001f642\u200d\u0301",
    "\u2581",
    "<s>",
    "</s>",
    "<unk>",
    "<|im_end|>",
    "<0x0A>",
    "<0xZZ>",
    "{{ 1 }}",
    "%s%n",
    "x" * 1_000,
    "\x1b" * 3_000,
    "Ä" * 100_000,
)
WHOLE = (0, 1, 2, 3, 7, 8, 255, 256, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64)
REAL = (0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 1e-5, 1e10, 1e-46, 1e-320, 5e-324, 1e38, 1e39, 1e300, 1.7e308)
#: JSON that no value of Python is written as.
RAW = (
    "-0",
    "1e999",
    "-1e999",
    "1E400",
    "NaN",
    "Infinity",
    "-Infinity",
    "5e-324",
    "1e-999",
    "0.0000001e7",
    "1" + "0" * 5_000,
    "-" + "9" * 5_000,
    "0." + "3" * 5_000,
    '"\\ud800"',
    '"\\udc00\\ud800"',
    '"\\u0000"',
    '"\x01"',
    "01",
    "+1",
    "1.",
    "'a'",
    "nul",
    "",
    "[,]",
    "{}{}",
    "[" * 2_000 + "]" * 2_000,
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 2_000 + "1" + "}" * 2_000,
    "[" * 100_000,
    "[" + "0," * 50_000 + "0]",
)


def whole(rng: random.Random) -> int:
    """A whole number: small, or at the edge of a machine's integer, or of any size."""
    choice = rng.random()
    if choice < 0.6:
        value = rng.choice(WHOLE) + rng.choice((0, 0, 0, -1, 1))
    elif choice < 0.8:
        value = rng.randrange(100)
    else:
        value = rng.getrandbits(rng.randrange(1, 130))
    return -value if rng.random() < 0.2 else value


def text(rng: random.Random) -> str:
    """A text of ``TEXTS``, or a few of them together."""
    if rng.random() < 0.8:
        return rng.choice(TEXTS)
    return "".join(rng.choice(TEXTS) for _ in range(rng.randrange(2, 5)))


def damage(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """``data`` with one to four faults: bits turned, bytes set, parts cut out, repeated, or put in from others."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(_FAULTS)(rng, out, others)
    return bytes(out)


def _span(rng: random.Random, data: bytearray) -> tuple[int, int]:
    """A part of ``data``, mostly a short one."""
    begin = rng.randrange(len(data) + 1)
    longest = len(data) - begin
    return begin, begin + min(longest, rng.choice((1, 2, 4, 8, 64, rng.randrange(longest + 1))))


def _turn_bit(rng: random.Random, data: bytearray, _others: list[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set_byte(rng: random.Random, data: bytearray, _others: list[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 0x7F, 0x80, 0xFF, 0x1B, 0x22, 0x5C, rng.randrange(256)))


def _set_length(rng: random.Random, data: bytearray, _others: list[bytes]) -> None:
    """A little-endian number of 1, 2, 4 or 8 bytes."""
    size = rng.choice((1, 2, 4, 8))
    place = rng.choice((0, rng.randrange(len(data) + 1)))
    data[place : place + size] = (whole(rng) % 256**size).to_bytes(size, "little")


def _truncate(rng: random.Random, data: bytearray, _others: list[bytes]) -> None:
    del data[rng.choice((rng.randrange(len(data) + 1), max(0, len(data) - rng.randrange(1, 9)))) :]


def _cut(rng: random.Random, data: bytearray, _others: list[bytes]) -> None:
    begin, end = _span(rng, data)
    del data[begin:end]


def _repeat(rng: random.Random, data: bytearray, _others: list[bytes]) -> None:
    begin, end = _span(rng, data)
    data[begin:begin] = data[begin:end] * min(rng.choice((1, 2, 50)), 1 + 1_000_000 // (1 + end - begin))


def _insert(rng: random.Random, data: bytearray, _others: list[bytes]) -> None:
    place = rng.randrange(len(data) + 1)
    data[place:place] = rng.choice((rng.randbytes(rng.randrange(1, 17)), text(rng).encode("utf-8", "surrogatepass")))


def _splice(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    other = bytearray(rng.choice(others))
    (begin, end), (first, last) = _span(rng, data), _span(rng, other)
    data[begin:end] = other[first:last]


_FAULTS: tuple[Callable[[random.Random, bytearray, list[bytes]], None], ...] = (
    _turn_bit, _set_byte, _set_length, _truncate, _cut, _repeat, _insert, _splice,
)  # fmt: skip
