"""Names, wrong arguments, and the vectors that codecs usually get wrong."""

import subprocess
import sys

import pytest
import torch

from octo_run.errors import UsageError
from octo_run.kernels import codec as codecs
from octo_run.kernels.codec import PlainCodec, get, names, parse_kv

CODED = ("octopus2", "octopus3", "octopus4")
HEAD_DIMS = (64, 80, 96, 112, 128, 256, 512)


def test_names() -> None:
    assert names() == ("oct2", "oct3", "oct4", *CODED, "bf16")
    assert all(get(name).name == name for name in names())


def test_get_returns_one_object() -> None:
    assert get("octopus3") is get("octopus3", 128) is get("octopus3", head_dim=128, seed=0)
    assert get("octopus3", seed=1) is not get("octopus3")


def test_wrong_names_and_sizes_name_the_choices() -> None:
    with pytest.raises(UsageError, match=r"octopus9.*oct2, oct3, oct4, octopus2, octopus3, octopus4, bf16"):
        get("octopus9")
    with pytest.raises(UsageError, match=r"72.*64, 80, 96, 112, 128, 256.*bf16"):
        get("octopus3", head_dim=72)
    with pytest.raises(UsageError, match="at least 1"):
        get("bf16", head_dim=0)
    for text in ("", "octopus3:", ":octopus3", "octopus3,octopus2", "Octopus3"):
        with pytest.raises(UsageError, match=r"choose one of|did you mean|is empty"):
            parse_kv(text, 128)
    with pytest.raises(UsageError, match="K:V"):
        parse_kv("octopus3:octopus2:octopus2", 128)


def test_parse_kv() -> None:
    same = parse_kv("octopus3", 96, seed=4)
    assert same.name == "octopus3"
    assert same.k is same.v is get("octopus3", 96, seed=4)
    mixed = parse_kv("octopus3:octopus2", 64)
    assert (mixed.name, mixed.k.name, mixed.v.name) == ("octopus3:octopus2", "octopus3", "octopus2")
    plain = parse_kv("bf16", 24, plain_dtype=torch.float32)
    assert plain.k.bytes_per_vector == 96
    assert parse_kv("octopus4:bf16", 128).v.bytes_per_vector == 256


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", CODED)
def test_zero_vectors_decode_to_zeros(name: str, head_dim: int) -> None:
    codec = get(name, head_dim)
    x = torch.randn(4, head_dim, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    x[2] = -0.0
    decoded = codec.decode(codec.encode(x))
    assert torch.all(decoded[1:3] == 0)
    assert torch.all(decoded[[0, 3]].norm(dim=-1) > 0)
    empty_rows = torch.zeros(2, codec.bytes_per_vector, dtype=torch.uint8)
    assert torch.all(codec.decode(empty_rows) == 0)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_vectors_with_zero_triplets(head_dim: int) -> None:
    codec = get("octopus4", head_dim)
    y = torch.zeros(1, head_dim)
    y[0, head_dim - 1] = -2.0  # alone in a triplet, in the last one
    decoded = codec.decode_rotated(codec.encode_rotated(y))
    assert torch.isfinite(decoded).all()
    assert float(decoded[0, head_dim - 1]) < 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", names())
def test_non_finite_values_are_refused_by_position(name: str, value: float) -> None:
    codec = get(name, 64)
    x = torch.ones(3, 5, 64)
    x[2, 1, 17] = value
    for encode in (codec.encode, codec.encode_rotated):
        with pytest.raises(ValueError, match=r"\[2, 1, 17\]"):
            encode(x)
        with pytest.raises(ValueError, match=r"\[17\]"):
            encode(x[2, 1])


def test_position_is_right_far_into_a_long_batch() -> None:
    x = torch.ones(5000, 64)
    x[4321, 63] = float("nan")
    with pytest.raises(ValueError, match=r"nan.*\[4321, 63\]"):
        get("octopus2", 64).encode(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_up_to_the_fp16_maximum(dtype: torch.dtype) -> None:
    codec = get("octopus3", 64)
    x = torch.ones(2, 3, 64, dtype=dtype) * (65503.0 / 8)
    decoded = codec.decode(codec.encode(x), dtype)
    assert torch.isfinite(decoded).all()
    x[1, 2] *= 1.01
    with pytest.raises(ValueError, match=r"\[1, 2\].*norm.*65504"):
        codec.encode(x)
    with pytest.raises(ValueError, match="vector: its norm"):
        codec.encode_rotated(torch.full((64,), 1e30, dtype=dtype))


@pytest.mark.parametrize("name", CODED)
def test_small_norms_become_subnormal_then_zero(name: str) -> None:
    codec = get(name, 128)
    direction = torch.randn(128, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    direction /= direction.norm()
    relative = codec.decode(codec.encode(direction), torch.float64)
    for norm in (2.0**-14, 2.0**-20, 1.3 * 2.0**-23, 1.01 * 2.0**-25):
        decoded = codec.decode(codec.encode(direction * norm), torch.float64)
        assert torch.isfinite(decoded).all()
        assert float((decoded - relative * norm).norm()) <= 2.0**-25 * 1.1  # |decoded direction| is near 1
        assert float(decoded.norm()) > 0
    for norm in (0.99 * 2.0**-25, 1e-30, 1e-300):
        assert torch.all(codec.decode(codec.encode(direction * norm)) == 0)


def test_inputs_of_any_layout() -> None:
    codec = get("octopus3", 128)
    x = torch.randn(6, 128, 10, generator=torch.Generator().manual_seed(6)).transpose(1, 2)
    packed = codec.encode(x)
    assert torch.equal(packed, codec.encode(x.contiguous()))
    arena = torch.zeros(6, 10, 3, codec.bytes_per_vector, dtype=torch.uint8)
    arena[:, :, 1] = packed
    assert torch.equal(codec.decode_rotated(arena[:, :, 1]), codec.decode_rotated(packed))
    odd = torch.zeros(packed.numel() + 1, dtype=torch.uint8)
    odd[1:] = packed.flatten()
    assert torch.equal(codec.decode_rotated(odd[1:].view(packed.shape)), codec.decode_rotated(packed))


@pytest.mark.parametrize("name", names())
def test_empty_batches(name: str) -> None:
    codec = get(name, 80)
    packed = codec.encode(torch.zeros(2, 0, 80))
    assert packed.shape == (2, 0, codec.bytes_per_vector)
    assert codec.decode(packed).shape == (2, 0, 80)


@pytest.mark.parametrize("name", names())
def test_wrong_shapes_and_dtypes_are_refused(name: str) -> None:
    codec = get(name, 64)
    packed = codec.encode(torch.ones(2, 64))
    with pytest.raises(ValueError, match="64 coordinates"):
        codec.encode(torch.ones(2, 63))
    with pytest.raises(ValueError, match="floating"):
        codec.encode(torch.ones(2, 64, dtype=torch.int32))
    with pytest.raises(ValueError, match="rows of"):
        codec.decode(packed[:, :-1])
    with pytest.raises(ValueError, match="rows of"):
        codec.decode(packed.to(torch.int32))
    with pytest.raises(ValueError, match="floating"):
        codec.decode(packed, torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain_codec_keeps_every_bit(dtype: torch.dtype) -> None:
    codec = PlainCodec(40, dtype=dtype)
    x = torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(7)).to(dtype)
    packed = codec.encode(x)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 7, 40 * dtype.itemsize)
    assert torch.equal(codec.decode(packed, dtype), x)
    assert torch.equal(codec.decode_rotated(packed, torch.float64), x.double())
    assert torch.equal(codec.rotate(x), x)
    assert torch.equal(codec.unrotate(x), x)
    assert torch.equal(codec.rotation, torch.eye(40, dtype=torch.float64))
    odd = torch.zeros(packed.numel() + 1, dtype=torch.uint8)
    odd[1:] = packed.flatten()
    assert torch.equal(codec.decode(odd[1:].view(packed.shape), dtype), x)


def test_plain_codec_refuses_overflow() -> None:
    with pytest.raises(ValueError, match=r"70000 as torch.float16 \(at position \[1, 2\]\)"):
        x = torch.ones(2, 4)
        x[1, 2] = 70000
        PlainCodec(4, dtype=torch.float16).encode(x)


def test_public_face() -> None:
    assert set(codecs.__all__) <= set(dir(codecs))
    assert repr(get("octopus3")) == "<octopus3: head_dim 128, 56 bytes a vector, seed 0>"


@pytest.mark.slow
def test_memory_is_bounded_for_many_vectors() -> None:
    program = """
import resource, torch
from octo_run.kernels.codec import get
codec = get("octopus3")
codec.decode(codec.encode(torch.ones(5000, 128)))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
x = torch.randn(200_000, 128)
before = peak()
packed = codec.encode(x)
after_encoding = peak()
codec.decode_rotated(packed)
print(after_encoding - before, peak() - after_encoding)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    encoding, decoding = map(int, ran.stdout.split())
    assert encoding < 200_000 * 56 + 32 * 2**20
    assert decoding < 200_000 * 129 * 4 + 32 * 2**20
