"""`oct2/3/4`: rows read by an independent slow decoder, sizes, quality, and vectors codecs usually get wrong."""

import hashlib
import math
import struct
from importlib import resources

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octo_run.kernels.codec import TrellisCodec, get
from octo_run.kernels.codec.packing import pack_streams, packed_bytes, unpack_streams
from octo_run.kernels.codec.trellis import FORMATS, norm_numbers, norm_values

BYTES = {
    64: (22, 30, 38),
    80: (26, 36, 46),
    96: (30, 42, 54),
    112: (36, 50, 64),
    128: (40, 56, 72),
    256: (78, 110, 142),
}
MOST = {"oct2": 0.0570, "oct3": 0.0162, "oct4": 0.0043}


def codec_of(name: str, head_dim: int = 128, seed: int = 0) -> TrellisCodec:
    codec = get(name, head_dim, seed)
    assert isinstance(codec, TrellisCodec)
    return codec


def gaussian(count: int, head_dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, head_dim, generator=torch.Generator().manual_seed(seed))


def relative_mse(decoded: torch.Tensor, x: torch.Tensor) -> float:
    return float(((decoded - x).square().sum(-1) / x.square().sum(-1)).mean())


@pytest.mark.parametrize("name", FORMATS)
def test_distortion_of_gaussian_vectors(name: str) -> None:
    x = gaussian(2000, 128, seed=4711)
    codec = codec_of(name, seed=3)
    assert relative_mse(codec.decode(codec.encode(x)), x) < MOST[name]


@pytest.mark.parametrize("head_dim", BYTES)
@pytest.mark.parametrize("name", FORMATS)
def test_other_head_dims_are_near(name: str, head_dim: int) -> None:
    """The table is fitted on 128 coordinates; more extras (memoryless) in a vector cost something."""
    x = gaussian(200, head_dim, seed=head_dim)
    codec = codec_of(name, head_dim)
    assert relative_mse(codec.decode(codec.encode(x)), x) < MOST[name] * 1.18


@pytest.mark.parametrize("head_dim", BYTES)
def test_sizes_are_exact(head_dim: int) -> None:
    for name, expected in zip(FORMATS, BYTES[head_dim], strict=True):
        codec = codec_of(name, head_dim)
        assert codec.bytes_per_vector == expected
        assert codec.bits == {"oct2": 7, "oct3": 10, "oct4": 13}[name]
        assert codec.encode(torch.ones(2, 5, head_dim)).shape == (2, 5, expected)


def slow_decode(row: bytes, name: str, head_dim: int) -> list[float]:
    """One row to coordinates in the rotated basis, in plain Python from the description of the format."""
    with resources.files("octo_run.kernels.codec").joinpath("trellis_tables.npz").open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        table, step = stored[name].tolist(), float(stored[f"{name}_step"])
    bits, state, signed = {"oct2": (7, 3, False), "oct3": (7, 3, True), "oct4": (10, 1, True)}[name]
    (gamma,) = struct.unpack("<e", row[-2:])
    stream = int.from_bytes(row[:-2], "little")
    triplets = -(-head_dim // 3)
    codes = [stream >> (bits * i) & ((1 << bits) - 1) for i in range(triplets)]
    stream >>= bits * triplets
    chains = 4 if head_dim == 64 else 8
    chain = triplets // chains
    out: list[float] = []
    for i, code in enumerate(codes):
        if i < chains * chain:
            first = i // chain * chain
            above = codes[first + (i - first + 1) % chain]
            entry = (above % (1 << state)) << bits | code
        else:
            entry = (1 << (bits + state)) + code
        for v in table[entry]:
            if signed and stream & 1:
                v = ~v
            if len(out) < head_dim:
                out.append(gamma * step * (v + 0.5))
                stream >>= signed
    assert stream == 0
    return out


@pytest.mark.parametrize("head_dim", BYTES)
@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_read_by_an_independent_decoder(name: str, head_dim: int) -> None:
    codec = codec_of(name, head_dim, seed=6)
    y = gaussian(4, head_dim, seed=head_dim).double()
    packed = codec.encode_rotated(y)
    slow = torch.tensor([slow_decode(bytes(row.tolist()), name, head_dim) for row in packed], dtype=torch.float64)
    torch.testing.assert_close(codec.decode_rotated(packed, torch.float64), slow, rtol=1e-13, atol=0)
    torch.testing.assert_close(codec.decode_rotated(packed).double(), slow, rtol=1e-6, atol=0)
    numbers = packed[:, -2:].contiguous().view(torch.int16)[:, 0]
    assert torch.all(numbers & ((1 << (15 - codec.norm_bits)) - 1) == 0)
    unscaled = slow / packed[:, -2:].contiguous().view(torch.float16).double()
    gain = y.square().sum(1) / (unscaled * y).sum(1)  # what the stored norm rounds
    stored = packed[:, -2:].contiguous().view(torch.float16)[:, 0].double()
    assert float((stored / gain - 1).abs().max()) <= 2.0 ** -(codec.norm_bits - 4)


@pytest.mark.parametrize("name", FORMATS)
def test_fields_say_what_rows_say(name: str) -> None:
    codec = codec_of(name, 112)
    y = gaussian(6, 112, seed=1).view(2, 3, 112)
    packed, fields = codec.encode_rotated(y).view(6, -1), codec.encode_fields(y)
    assert fields.shape == (2, 3, 39)
    assert fields.dtype == torch.int32
    stream = codec.stream
    for row, found, source in zip(packed, fields.view(6, -1).tolist(), y.view(6, -1), strict=True):
        bits = int.from_bytes(bytes(row.tolist()), "little")
        codes = [bits >> stream * i & (1 << stream) - 1 for i in range(38)]
        signs = [0] * 38
        if codec.signed:
            negative = [*(source < 0).tolist(), False, False]
            signs = [sum(negative[3 * i + axis] << axis for axis in range(3)) for i in range(38)]
            assert signs == [bits >> 38 * stream + 3 * i & 7 for i in range(38)]
        assert found[:-1] == [code | sign << 10 for code, sign in zip(codes, signs, strict=True)]
        assert found[-1] == int.from_bytes(bytes(row[-2:].tolist()), "little")
    assert codec.encode_fields(torch.zeros(0, 112)).shape == (0, 39)


def test_table_words() -> None:
    codec = codec_of("oct2")
    words = codec.table_words()
    assert words.dtype == torch.int32
    assert words.shape == (1024 + 128,)
    bytes_ = torch.stack([words >> (8 * axis) for axis in range(4)], 1).to(torch.uint8)
    assert torch.equal(bytes_[:, :3].view(torch.int8), codec.table)
    assert not bytes_[:, 3].any()


def test_wrong_tables_are_refused() -> None:
    table = codec_of("oct3").table
    with pytest.raises(ValueError, match=r"int8 \[1152, 3\]"):
        TrellisCodec("oct3", 128, 0, table[:-1], 0.03)
    with pytest.raises(ValueError, match="from 0"):
        TrellisCodec("oct3", 128, 0, ~table, 0.03)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 16)), min_size=1, max_size=3),
    vectors=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, deadline=None)
def test_streams_survive_packing_bit_by_bit(sizes: list[tuple[int, int]], vectors: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    streams = [
        (torch.randint(0, 2**bits, (count, vectors), generator=generator, dtype=torch.int32), bits)
        for count, bits in sizes
    ]
    rows = pack_streams(*streams)
    assert rows.shape == (vectors, packed_bytes(sum(count * bits for count, bits in sizes), 1))
    for i, row in enumerate(rows):
        number, place = 0, 0
        for codes, bits in streams:
            for code in codes[:, i].tolist():
                number |= code << place
                place += bits
        assert int.from_bytes(bytes(row.tolist()), "little") == number
    for (codes, _), read in zip(streams, unpack_streams(rows, *sizes), strict=True):
        assert torch.equal(codes, read)


@pytest.mark.parametrize("norm_bits", [10, 12])
def test_norm_numbers_are_nearest(norm_bits: int) -> None:
    shift = 15 - norm_bits
    numbers = torch.arange(0x7C00 >> shift)
    values = norm_values(numbers, shift).double()
    assert torch.all(values.isfinite())
    assert torch.equal(norm_numbers(values, shift).long(), numbers)
    middle = (values[1:] + values[:-1]) / 2
    assert torch.equal(norm_numbers(middle, shift).long(), numbers[1:])
    assert torch.equal(norm_numbers(middle * (1 - 1e-6), shift).long(), numbers[:-1])
    assert int(norm_numbers(torch.tensor(1e9), shift)) == len(numbers) - 1


@pytest.mark.parametrize("exponent", [-9, -1, 3, 10])
@pytest.mark.parametrize("name", FORMATS)
def test_powers_of_two_scale_exactly(name: str, exponent: int) -> None:
    codec = codec_of(name, 80)
    x = gaussian(50, 80, seed=13)
    factor = math.ldexp(1.0, exponent)
    packed, scaled = codec.encode(x), codec.encode(x * factor)
    assert torch.equal(packed[:, :-2], scaled[:, :-2])
    assert torch.equal(codec.decode(scaled), codec.decode(packed) * factor)


@pytest.mark.parametrize("factor", [0.01, 0.7, 1234.5])
def test_any_scale_gives_the_same_relative_error(factor: float) -> None:
    codec = codec_of("oct3", 112)
    x = gaussian(300, 112, seed=14)
    plain = relative_mse(codec.decode(codec.encode(x)), x)
    assert relative_mse(codec.decode(codec.encode(x * factor)), x * factor) == pytest.approx(plain, rel=5e-3)


@pytest.mark.parametrize("head_dim", BYTES)
@pytest.mark.parametrize("name", FORMATS)
def test_zero_vectors_decode_to_zeros(name: str, head_dim: int) -> None:
    codec = codec_of(name, head_dim)
    x = gaussian(4, head_dim, seed=0)
    x[1] = 0
    x[2] = -0.0
    packed = codec.encode(x)
    decoded = codec.decode(packed)
    assert torch.all(decoded[1:3] == 0)
    assert torch.all(decoded[[0, 3]].norm(dim=-1) > 0)
    rotated = codec.encode_rotated(x[1:3])
    assert torch.equal(rotated[0], rotated[1])  # a negative zero has no sign
    assert torch.all(codec.decode(torch.zeros(2, codec.bytes_per_vector, dtype=torch.uint8)) == 0)


@pytest.mark.parametrize("name", FORMATS)
def test_small_norms_lose_bits_then_become_zero(name: str) -> None:
    codec = codec_of(name)
    direction = gaussian(1, 128, seed=5)[0].double()
    direction *= math.sqrt(128) / direction.norm()
    finest = 2.0 ** -(24 - (15 - codec.norm_bits))  # the smallest gain
    relative = codec.decode_rotated(codec.encode_rotated(direction), torch.float64)
    for gain in (2.0**-14, 2.0**-15, 1.3 * finest, 0.6 * finest):
        decoded = codec.decode_rotated(codec.encode_rotated(direction * gain), torch.float64)
        assert float((decoded - relative * gain).norm()) <= (finest / 2 + gain * 2.0**-5) * math.sqrt(128)
        assert float(decoded.norm()) > 0
    for gain in (0.4 * finest, 1e-30, 1e-42, 1e-300):
        assert torch.all(codec.decode_rotated(codec.encode_rotated(direction * gain)) == 0)
        assert torch.all(codec.decode(codec.encode((direction * gain).float())) == 0)
    mixed = torch.stack((direction.float(), direction.float() * 1e-41))
    assert torch.equal(codec.encode_rotated(mixed)[0], codec.encode_rotated(mixed[0]))


@pytest.mark.parametrize("name", FORMATS)
def test_long_vectors(name: str) -> None:
    codec = codec_of(name, 64)
    x = torch.ones(2, 3, 64) * (65503.0 / 8)
    decoded = codec.decode(codec.encode(x))
    assert torch.isfinite(decoded).all()
    assert relative_mse(decoded, x) < 0.2
    spike = torch.zeros(1, 64)
    spike[0, 63] = -65504.0  # alone in a triplet that two pad coordinates fill up
    assert torch.isfinite(codec.decode_rotated(codec.encode_rotated(spike))).all()
    x[1, 2] *= 1.01
    with pytest.raises(ValueError, match=r"\[1, 2\].*norm.*65504"):
        codec.encode(x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_refused_by_position(value: float) -> None:
    codec = codec_of("oct3", 64)
    x = torch.ones(3, 5, 64)
    x[2, 1, 17] = value
    for encode in (codec.encode, codec.encode_rotated, codec.encode_fields):
        with pytest.raises(ValueError, match=r"\[2, 1, 17\]"):
            encode(x)


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_depend_on_values_only(name: str) -> None:
    codec = codec_of(name)
    y = gaussian(150, 128, seed=9)
    packed = codec.encode_rotated(y)
    assert torch.equal(packed, codec.encode_rotated(y))
    assert torch.equal(packed[7:20], codec.encode_rotated(y[7:20]))
    assert torch.equal(packed, codec.encode_rotated(y.double()))
    assert torch.equal(packed, TrellisCodec(name, 128, 5).encode_rotated(y.t().contiguous().t()))
    half = y.to(torch.bfloat16)
    assert torch.equal(codec.encode_rotated(half), codec.encode_rotated(half.double()))


def test_bytes_stay_what_they_are() -> None:
    """Pages may outlive a version of the program: a change of these digests is a change of the format."""
    steps = torch.arange(8 * 128)
    y = ((steps * steps * 31 + steps * 7) % 257 - 128).to(torch.float64).view(8, 128) / 64
    rows = {name: bytes(get(name).encode_rotated(y).flatten().tolist()) for name in FORMATS}
    digests = {name: hashlib.sha256(data).hexdigest()[:16] for name, data in rows.items()}
    assert digests == {"oct2": "d9523c2fce9705c9", "oct3": "207ee6d9707b1034", "oct4": "c9da67bf4dcc2412"}
