"""Rows of codes as little-endian bit streams: code i of a vector takes bits [i * bits, (i + 1) * bits) of its row.

Both directions work on 16-bit words, coordinate-major (a row of the working arrays is one code of many vectors), which
is several times faster in PyTorch than row-major work. A row is padded with zero bits to whole words.
The byte order of the machine must be little-endian, as it is wherever PyTorch ships.
"""

import sys

import torch

if sys.byteorder != "little":
    raise ImportError("octo-run packs its codes on little-endian machines only")

MAX_BITS = 16


def packed_bytes(num_codes: int, bits: int) -> int:
    """Bytes of one row of `num_codes` codes of `bits` bits: whole 16-bit words, so always even."""
    return -(-num_codes * bits // 16) * 2


def _places(num_codes: int, bits: int, start: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Word index (int64) and bit shift (int32) of the first bit of every code; two tensors [num_codes]."""
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"codes of {bits} bits cannot be packed, only of 1 to {MAX_BITS}")
    first = torch.arange(num_codes, device=device) * bits + start
    return first // 16, (first % 16).to(torch.int32)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack `codes` int32 [num_codes, vectors], each in [0, 2**bits), to uint8 [vectors, packed_bytes]."""
    return pack_streams((codes, bits))


def pack_streams(*streams: tuple[torch.Tensor, int]) -> torch.Tensor:
    """Pack streams one directly behind the other.

    Args:
        *streams: Codes as for `pack_codes`, and their bits.

    Returns:
        uint8 [vectors, bytes]. The rows are padded with zero bits once, at the end: to `packed_bytes` of all bits
        together.
    """
    vectors = streams[0][0].shape[1]
    total = sum(len(codes) * bits for codes, bits in streams)
    num_words = packed_bytes(total, 1) // 2
    words = streams[0][0].new_zeros(num_words + 1, vectors)  # one more: the last code's empty upper half goes there
    start = 0
    for codes, bits in streams:
        word, shift = _places(len(codes), bits, start, codes.device)
        placed = codes << shift[:, None]
        words.index_add_(0, word, placed & 0xFFFF)  # the bits of different codes are disjoint: a sum is an or
        words.index_add_(0, word + 1, placed >> 16)
        start += len(codes) * bits
    return words[:num_words].t().to(torch.int16, memory_format=torch.contiguous_format).view(torch.uint8)


def unpack_codes(rows: torch.Tensor, num_codes: int, bits: int) -> torch.Tensor:
    """Read `num_codes` codes from each row: uint8 [vectors, row_bytes] -> int32 [num_codes, vectors].

    Args:
        rows: May be longer than their codes (what follows them is ignored); their length must be even. The last
            dimension is contiguous, and the storage starts at an even offset.
    """
    return unpack_streams(rows, (num_codes, bits))[0]


def unpack_streams(rows: torch.Tensor, *streams: tuple[int, int]) -> list[torch.Tensor]:
    """The inverse of `pack_streams` for streams (number of codes, their bits); otherwise as `unpack_codes`."""
    words = rows.view(torch.int16).t().to(torch.int32, memory_format=torch.contiguous_format)
    following = torch.cat((words[1:], torch.zeros_like(words[:1])))
    pairs = (words & 0xFFFF) | (following << 16)
    found, start = [], 0
    for num_codes, bits in streams:
        word, shift = _places(num_codes, bits, start, rows.device)
        codes = pairs.index_select(0, word)
        codes >>= shift[:, None]
        codes &= (1 << bits) - 1
        found.append(codes)
        start += num_codes * bits
    return found
