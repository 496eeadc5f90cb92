"""Bytes of the codecs: bit streams, sizes, and the layout of a row, read by an independent slow Python decoder."""

import hashlib
import json
import math
import struct
from importlib import resources

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octo_run.kernels.codec import OctopusCodec, get
from octo_run.kernels.codec.packing import pack_codes, packed_bytes, unpack_codes

NOMINAL_BITS = {"octopus2": 2, "octopus3": 3, "octopus4": 4}
BYTES = {
    64: (22, 30, 38),
    80: (26, 36, 46),
    96: (30, 42, 54),
    112: (36, 50, 64),
    128: (40, 56, 72),
    256: (78, 110, 142),
}


@given(bits=st.integers(1, 16), num_codes=st.integers(1, 90), vectors=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_codes_survive_packing_bit_by_bit(bits: int, num_codes: int, vectors: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (num_codes, vectors), generator=generator, dtype=torch.int32)
    rows = pack_codes(codes, bits)
    assert rows.dtype == torch.uint8
    assert rows.shape == (vectors, packed_bytes(num_codes, bits))
    for row, column in zip(rows, codes.t().tolist(), strict=True):
        stream = sum(code << (i * bits) for i, code in enumerate(column))
        assert int.from_bytes(bytes(row.tolist()), "little") == stream  # the padding bits are zero
    assert torch.equal(unpack_codes(rows, num_codes, bits), codes)
    trailed = torch.cat((rows, torch.full((vectors, 2), 0xA5, dtype=torch.uint8)), dim=1)
    assert torch.equal(unpack_codes(trailed, num_codes, bits), codes)


@given(data=st.binary(min_size=38, max_size=38))
@settings(max_examples=100, deadline=None)
def test_any_bytes_survive_unpacking(data: bytes) -> None:
    stream = int.from_bytes(data, "little") & ((1 << 301) - 1)  # 43 codes of 7 bits leave 3 bits of padding
    row = torch.tensor([list(stream.to_bytes(38, "little"))], dtype=torch.uint8)
    assert torch.equal(pack_codes(unpack_codes(row, 43, 7), 7), row)


@pytest.mark.parametrize("bits", [0, 17])
def test_impossible_code_sizes_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 16"):
        pack_codes(torch.zeros(3, 2, dtype=torch.int32), bits)


@pytest.mark.parametrize("head_dim", BYTES)
def test_sizes_are_exact(head_dim: int) -> None:
    for name, expected in zip(NOMINAL_BITS, BYTES[head_dim], strict=True):
        codec = get(name, head_dim)
        assert codec.bytes_per_vector == expected
        assert codec.bits == 3 * NOMINAL_BITS[name] + 1
        assert codec.num_triplets == -(-head_dim // 3)
        assert codec.encode(torch.ones(2, 5, head_dim)).shape == (2, 5, expected)
    assert get("bf16", head_dim).bytes_per_vector == 2 * head_dim


def slow_decode(row: bytes, nominal_bits: int, head_dim: int) -> list[float]:
    """One row to coordinates in the rotated basis, in plain Python from the description of the format."""
    text = resources.files("octo_run.kernels.codec").joinpath("octopus_codebooks.json").read_text(encoding="utf-8")
    book = json.loads(text)[str(nominal_bits)]
    (gamma,) = struct.unpack("<e", row[-2:])
    stream = int.from_bytes(row[:-2], "little")
    field = nominal_bits + 1
    out: list[float] = []
    for _ in range(-(-head_dim // 3)):
        code = stream & ((1 << (3 * nominal_bits + 1)) - 1)
        stream >>= 3 * nominal_bits + 1
        xi = book["xi"][code & ((1 << field) - 1)]
        eta = book["xi"][(code >> field) & ((1 << field) - 1)]
        rho = book["rho"][str(head_dim)][code >> (2 * field)]
        z = 1 - abs(xi) - abs(eta)
        if z >= 0:
            point = (xi, eta, z)
        else:
            point = (math.copysign(1 - abs(eta), xi), math.copysign(1 - abs(xi), eta), z)
        out += [gamma * rho * c / math.hypot(*point) for c in point]
    assert stream == 0
    return out[:head_dim]


@pytest.mark.parametrize("head_dim", BYTES)
@pytest.mark.parametrize("name", NOMINAL_BITS)
def test_rows_are_read_by_an_independent_decoder(name: str, head_dim: int) -> None:
    codec = get(name, head_dim, seed=6)
    y = torch.randn(5, head_dim, generator=torch.Generator().manual_seed(head_dim), dtype=torch.float64)
    packed = codec.encode_rotated(y)
    read = [slow_decode(bytes(row.tolist()), NOMINAL_BITS[name], head_dim) for row in packed]
    slow = torch.tensor(read, dtype=torch.float64)
    torch.testing.assert_close(codec.decode_rotated(packed, torch.float64), slow, rtol=1e-13, atol=0)
    torch.testing.assert_close(codec.decode_rotated(packed).double(), slow, rtol=1e-6, atol=0)
    back = codec.rotation.T.double()
    torch.testing.assert_close(codec.decode(packed, torch.float64), slow @ back.T, rtol=0, atol=1e-13)
    stored = packed[:, -2:].contiguous().view(torch.float16)[:, 0]
    assert torch.equal(stored, y.norm(dim=-1).to(torch.float32).to(torch.float16))


def slow_scalar_codes(unit: list[float], codec: OctopusCodec) -> list[int]:
    """Codes of one rotated unit vector with scalar rounding, by trying every level, in plain Python."""
    tables = codec.tables(torch.float64)
    xi_levels, rho_levels = tables.xi_levels.tolist(), tables.rho_levels.tolist()

    def nearest(value: float, levels: list[float]) -> int:
        return min(range(len(levels)), key=lambda i: abs(levels[i] - value))

    codes = []
    padded = unit + [0.0] * (-len(unit) % 3)
    for x, y, z in zip(padded[::3], padded[1::3], padded[2::3], strict=True):
        length = abs(x) + abs(y) + abs(z)
        xi, eta = x / length, y / length
        if z < 0:
            xi, eta = (1 - abs(eta)) * (1 if xi >= 0 else -1), (1 - abs(xi)) * (1 if eta >= 0 else -1)
        cell = nearest(xi, xi_levels) | nearest(eta, xi_levels) << (codec.nominal_bits + 1)
        codes.append(cell | nearest(math.hypot(x, y, z), rho_levels) << (2 * codec.nominal_bits + 2))
    return codes


@pytest.mark.parametrize("name", NOMINAL_BITS)
def test_scalar_rounding_agrees_with_an_independent_encoder(name: str) -> None:
    codec = OctopusCodec(name, 80, seed=0, rounding="scalar")
    y = torch.randn(8, 80, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    codes = unpack_codes(codec.encode_rotated(y), codec.num_triplets, codec.bits)
    slow = [slow_scalar_codes((row / row.norm()).tolist(), codec) for row in y]
    assert codes.t().tolist() == slow


def test_bytes_stay_what_they_are() -> None:
    """Pages may outlive a version of the program: a change of these digests is a change of the format."""
    steps = torch.arange(8 * 128)
    y = ((steps * steps * 31 + steps * 7) % 257 - 128).to(torch.float64).view(8, 128) / 64
    rows = {name: bytes(get(name).encode_rotated(y).flatten().tolist()) for name in NOMINAL_BITS}
    digests = {name: hashlib.sha256(data).hexdigest()[:16] for name, data in rows.items()}
    assert digests == {"octopus2": "92bdb7f782c41f27", "octopus3": "9bcb91830fd128cc", "octopus4": "0ec57d11862654a3"}
