"""Pages as one object: layouts that convert exactly, bytes that stay what they are, tags that say which they are."""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octo_run.errors import OctoError
from octo_run.kernels import PAGE_TOKENS, encode_pages, page_bytes
from octo_run.kernels.codec import KVFormat, PageFormat, PlainCodec, TrellisCodec, get, parse_kv
from octo_run.kernels.codec.page_format import LAYOUTS, SIDES
from octo_run.kernels.codec.page_layout import Side, lane_bits

FORMATS = ("oct2", "oct3", "oct4")
KINDS = (*FORMATS, "oct4:oct2", "oct2:oct3", "octopus3", "octopus2:octopus4", "octopus3:oct3", "oct3:bf16", "bf16")
HEAD_DIMS = (64, 80, 96, 112, 128, 256, 512)


def both(kv: str, head_dim: int, seed: int = 0) -> tuple[PageFormat, PageFormat]:
    """The pages of a format in rows and in lanes."""
    fmt = parse_kv(kv, head_dim, seed)
    return PageFormat(fmt, "rows"), PageFormat(fmt, "lanes")


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    """K and V [2, ..., PAGE_TOKENS, d], some vectors zero, one long, one tiny."""
    both = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    both[..., 5, :] = 0
    both[..., 6, :] *= 1e3
    both[..., 7, :] *= 1e-9
    return both


@pytest.mark.few(14)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kv", KINDS)
def test_layouts_convert_exactly_both_ways(kv: str, head_dim: int) -> None:
    rows, lanes = both(kv, head_dim)
    k, v = vectors(2, 1, PAGE_TOKENS, head_dim)
    written = rows.encode_rotated(k, v)
    converted = rows.convert(written, lanes)
    assert converted.shape == written.shape == (2, 1, rows.page_bytes)
    assert rows.page_bytes == lanes.page_bytes == page_bytes(rows.kv)
    assert torch.equal(lanes.convert(converted, rows), written)
    assert torch.equal(rows.convert(lanes.convert(converted, "rows"), "lanes"), converted)
    coded = any(isinstance(codec, TrellisCodec) for codec in (rows.kv.k, rows.kv.v))
    assert torch.equal(converted, written) is not coded
    assert torch.equal(lanes.encode_rotated(k, v), converted)
    for mine, theirs, codec, source in zip(
        rows.decode_rotated(written), lanes.decode_rotated(converted), (rows.kv.k, rows.kv.v), (k, v), strict=True
    ):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine, codec.decode_rotated(codec.encode_rotated(source)))


@pytest.mark.parametrize("kv", KINDS)
def test_the_writer_of_a_cpu_writes_rows(kv: str) -> None:
    fmt = parse_kv(kv, 64)
    page_format = PageFormat.on(fmt, torch.device("cpu"))
    assert page_format.layout == "rows"
    assert PageFormat.on(fmt, torch.device("cuda")).layout == "lanes"
    k, v = vectors(2, 3, 2, PAGE_TOKENS, 64)  # [L, N, Hkv, 64, d]
    pages = torch.full((5, 2, 2, page_format.page_bytes), 0xEE, dtype=torch.uint8)
    encode_pages(k, v, pages, torch.tensor([4, 0, 2]), fmt)
    assert torch.equal(pages[[4, 0, 2]].transpose(0, 1), page_format.encode_rotated(k, v))
    k_rows, v_rows = page_format.rows(pages[[4, 0, 2]].transpose(0, 1))
    assert torch.equal(k_rows, fmt.k.encode_rotated(k))
    assert torch.equal(v_rows, fmt.v.encode_rotated(v))


@pytest.mark.parametrize("kv", ["oct3", "octopus3", "bf16"])
def test_the_original_basis(kv: str) -> None:
    for page_format in both(kv, 80, seed=3):
        k, v = vectors(2, PAGE_TOKENS, 80)
        codec = page_format.kv.k
        pages = page_format.encode(k, v)
        for source, found in zip((k, v), page_format.decode(pages, torch.float64), strict=True):
            assert found.dtype == torch.float64
            assert torch.equal(found, codec.decode(codec.encode(source), torch.float64))


@pytest.mark.few(8)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", FORMATS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=2, deadline=None)
def test_every_number_has_its_place_in_lanes(name: str, head_dim: int, side: Side, seed: int) -> None:
    """Any numbers, put into rows by arithmetic and read in lanes bit by bit where the layout says; nothing else is
    there, and they come back."""
    codec = get(name, head_dim)
    assert isinstance(codec, TrellisCodec)
    random, shift = np.random.default_rng(seed), 15 - codec.norm_bits
    codes = random.integers(0, 1 << codec.stream, (PAGE_TOKENS, codec.num_triplets))
    signs = random.integers(0, 2, (PAGE_TOKENS, 3 * codec.num_triplets))
    signs[:, head_dim if codec.signed else 0 :] = 0
    norms = random.integers(0, 1 << codec.norm_bits, PAGE_TOKENS)
    rows = []
    for token in range(PAGE_TOKENS):
        row = sum(int(code) << codec.stream * i for i, code in enumerate(codes[token]))
        row |= sum(int(sign) << codec.stream * codec.num_triplets + i for i, sign in enumerate(signs[token]))
        row |= int(norms[token]) << 8 * (codec.bytes_per_vector - 2) + shift
        rows += row.to_bytes(codec.bytes_per_vector, "little")
    block = torch.tensor(rows, dtype=torch.uint8)
    other = torch.zeros_like(block)
    parts = (block, other) if side == "k" else (other, block)
    fmt = PageFormat(KVFormat(name, codec, codec), "rows")
    moved = fmt.convert(torch.cat(parts), "lanes")
    assert torch.equal(PageFormat(fmt.kv, "lanes").convert(moved, "rows"), torch.cat(parts))
    found = moved.view(2, -1)[SIDES.index(side)]
    bits, places = np.unpackbits(found.numpy(), bitorder="little"), lane_bits(codec, side)

    def read(addresses: Any) -> Any:
        return (bits[addresses].astype(np.int64) << np.arange(addresses.shape[-1])).sum(-1)

    assert np.array_equal(read(places.code), codes)
    assert np.array_equal(read(places.norm), norms)
    real = places.sign.reshape(PAGE_TOKENS, -1)
    assert np.array_equal(real >= 0, np.broadcast_to(np.arange(real.shape[1]) < head_dim * codec.signed, real.shape))
    assert np.array_equal(bits[real[real >= 0]], signs[real >= 0])
    addresses = np.concatenate([places.code.ravel(), places.norm.ravel(), real[real >= 0]])
    assert len(np.unique(addresses)) == len(addresses)
    bits[addresses] = 0
    assert not bits.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_and_many_pages(layout: str) -> None:
    """Inner slices of an arena, several chunks of blocks, none at all."""
    rows, lanes = both("oct3:oct2", 64)
    source, target = (rows, lanes) if layout == "rows" else (lanes, rows)
    arena = torch.zeros(150, 3, 2, rows.page_bytes + 8, dtype=torch.uint8)[:, 1:2, :, 4:-4]
    k, v = vectors(5, PAGE_TOKENS, 64)
    arena[:] = source.encode_rotated(k, v).repeat(60, 1).view(arena.shape)
    converted = source.convert(arena, target)
    assert torch.equal(converted.flatten(0, 2), target.encode_rotated(k, v).repeat(60, 1))
    assert source.convert(arena[:0], target).shape == arena[:0].shape
    assert source.convert(arena, source) is arena


def test_pages_stay_what_they_are() -> None:
    """A change of these digests is a change of the format: it needs a new version in the tags."""
    steps = torch.arange(2 * PAGE_TOKENS * 128)
    y = ((steps * steps * 31 + steps * 7) % 257 - 128).to(torch.float64).view(2, PAGE_TOKENS, 128) / 64
    digests = {}
    for dim in (64, 128):
        for name in FORMATS:
            data = bytes(PageFormat(parse_kv(name, dim), "lanes").encode_rotated(*y[..., :dim]).tolist())
            digests[name, dim] = hashlib.sha256(data).hexdigest()[:16]
    assert {name: digests[name, 128] for name in FORMATS} == {
        "oct2": "f89b99a1bede9b07", "oct3": "b148aea154ab6b43", "oct4": "07c77e4901b8b348",
    }  # fmt: skip
    assert {name: digests[name, 64] for name in FORMATS} == {
        "oct2": "e814121c037ff813", "oct3": "96843ca1c0e97bb4", "oct4": "5ee0657069dbca5b",
    }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv", KINDS)
def test_tags_are_read_back(kv: str, layout: Any) -> None:
    page_format = PageFormat(parse_kv(kv, 96, seed=7), layout)
    k, v = kv.split(":")[0], kv.split(":")[-1]
    assert page_format.tag == str(page_format) == f"octo-page/1 {k}:{v} {layout} d96 seed7"
    found = PageFormat.parse(page_format.tag)
    assert found == page_format and found.tag == page_format.tag and hash(found) == hash(page_format)
    assert found.kv.name == kv
    source = vectors(PAGE_TOKENS, 96)
    assert torch.equal(found.encode_rotated(*source), page_format.encode_rotated(*source))
    others = [(kv, 96, 8), (kv, 128, 7), ("oct3" if kv != "oct3" else "oct2", 96, 7)]
    assert all(page_format != PageFormat(parse_kv(*other), layout) for other in others)
    assert page_format != both(kv, 96, seed=7)[layout == "rows"]


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")]
)
def test_tags_of_plain_pages_name_the_stored_dtype(dtype: torch.dtype, name: str) -> None:
    """`--kv bf16` stores a model's own dtype: pages of two dtypes must not be taken for each other."""
    page_format = PageFormat(parse_kv("bf16", 100, plain_dtype=dtype), "rows")
    assert page_format.tag == f"octo-page/1 {name}:{name} rows d100 seed0"
    codec = PageFormat.parse(page_format.tag).kv.k
    assert isinstance(codec, PlainCodec) and codec.dtype == dtype


@pytest.mark.parametrize(
    ("tag", "text"),
    [
        (
            "octo-page/2 oct3:oct3 lanes d128 seed0",
            "of version 2, and this program reads oct3:oct3 at .* 128 in version 1",
        ),
        (
            "octo-page/1 oct3:oct3 lanes d64 seed0",
            "of version 1, and this program reads oct3:oct3 at .* 64 in version 2",
        ),
        (
            "octo-page/1 bf16:oct2 rows d64 seed0",
            "of version 1, and this program reads bf16:oct2 at .* 64 in version 2",
        ),
        ("octo-page/2 octopus3:octopus3 rows d64 seed0", "of version 2, and this program reads octopus3:octopus3 at"),
        ("octo-page/3 oct3:oct3 lanes d64 seed0", "of version 3, and this program reads versions 1 and 2 alone"),
        ("octo-page/0 oct3:oct3 lanes d128 seed0", r"of version 0"),
        ("octo-page/12 entirely, different", r"of version 12"),
        ("octo-page/1", "is not the tag"),
        ("octo-page/1 ", "is not the tag"),
        ("octo-page/01 oct3:oct3 lanes d128 seed0", "is not the tag"),
        ("octo-page/99999999999 oct3:oct3 lanes d128 seed0", "is not the tag"),
        ("octo-page/x oct3:oct3 lanes d128 seed0", "is not the tag"),
        ("", "is not the tag"),
        ("oct3", "is not the tag"),
        ("octo-page/1 oct3 lanes d128 seed0", "is not the tag"),
        ("octo-page/1 oct3:oct3:oct3 lanes d128 seed0", "is not the tag"),
        ("octo-page/1 oct3:oct3 lanes d128", "is not the tag"),
        ("octo-page/1 oct3:oct3 lanes d128 seed0 ", "is not the tag"),
        ("octo-page/1 oct3:oct3 lanes d128 seed0\n", "is not the tag"),
        ("octo-page/1 oct3:oct3  lanes d128 seed0", "is not the tag"),
        ("octo-page/1 oct3:oct3 lanes d0128 seed0", "is not the tag"),
        ("octo-page/1 oct3:oct3 lanes d128 seed-0", "is not the tag"),
        ("octo-page/1 oct3:oct3 lanes d١٢٨ seed0", "is not the tag"),
        ("octo-page/1 oct3:oct3 lanes d128 seed" + "9" * 5000, "is not the tag"),
        ("octo-page/1 oct3:\x1b[31m lanes d128 seed0", r"'octo-page/1 oct3:\\+x1b\[31m lanes d128 seed0' is not"),
        ("octo-page/1 oct3:oct9 lanes d128 seed0", "names the format 'oct9': the formats are oct2, .* and fp64"),
        ("octo-page/1 turbo3:oct3 lanes d128 seed0", "names the format 'turbo3'"),
        ("octo-page/1 oct3:oct3 tiles d128 seed0", "names the layout 'tiles': the layouts are rows and lanes"),
        ("octo-page/1 bf16:oct3 lanes d100 seed0", "has head_dim 100, and oct3 has only 64, .* and 512"),
        (None, "None is not the tag"),
        (7, "7 is not the tag"),
        (["octo-page/1"], "is not the tag"),
        (b"octo-page/1 oct3:oct3 lanes d128 seed0", "is not the tag"),
    ],
)
def test_wrong_tags_are_refused_in_one_sentence(tag: Any, text: str) -> None:
    with pytest.raises(OctoError, match=text) as caught:
        PageFormat.parse(tag)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 400 and message.isprintable()


def test_what_cannot_be_converted_is_refused() -> None:
    rows, lanes = both("oct3", 64)
    pages = rows.encode_rotated(*vectors(PAGE_TOKENS, 64))
    with pytest.raises(ValueError, match=r"hold other codes than those of 'octo-page/2 oct2:oct2 lanes d64 seed0'"):
        rows.convert(pages, both("oct2", 64)[1])
    with pytest.raises(ValueError, match="seed5"):
        rows.convert(pages, both("oct3", 64, seed=5)[1])
    with pytest.raises(ValueError, match=rf"uint8 \[\.\.\., {rows.page_bytes}\], not torch.uint8 \[10\]"):
        rows.convert(pages[:10], lanes)
    with pytest.raises(ValueError, match=r"not torch.int8"):
        rows.convert(pages.view(torch.int8), lanes)
    with pytest.raises(ValueError, match="layout is one of rows, lanes, not 'tiles'"):
        rows.convert(pages, "tiles")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one head_dim and one seed"):
        PageFormat(KVFormat("oct3", get("oct3", 64), get("oct3", 128)), "rows")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", FORMATS)
def test_bits_that_would_be_lost_are_refused(name: str, side: Side) -> None:
    """A page that no writer made: a low bit of a norm in rows, an unused bit in lanes."""
    rows, lanes = both(name, 80)
    codec = rows.kv.k
    assert isinstance(codec, TrellisCodec)
    pages = rows.encode_rotated(*vectors(3, PAGE_TOKENS, 80))
    start = 0 if side == "k" else codec.block_bytes
    broken = pages.clone()
    broken[1, start + codec.bytes_per_vector - 2] ^= 1
    with pytest.raises(
        ValueError, match=f"a {side.upper()} block of 'octo-page/1 .* has bits where the layout has none"
    ):
        rows.convert(broken, lanes)
    places = lane_bits(codec, side)
    used = np.concatenate([places.code.ravel(), places.sign.ravel(), places.norm.ravel()])
    free = np.setdiff1d(np.arange(8 * codec.block_bytes), used)
    converted = rows.convert(pages, lanes)
    converted[2, start + int(free[0]) // 8] ^= 1 << int(free[0]) % 8
    with pytest.raises(ValueError, match="has bits where the layout has none"):
        lanes.convert(converted, rows)
