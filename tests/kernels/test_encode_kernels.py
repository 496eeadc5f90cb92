"""Packing pages: the reference and the Triton kernels against the codecs' own rows.

The Triton cases run where there is a GPU, or interpreted (see test_attention_interpreted.py).
"""

import os

import pytest
import torch

from octo_run.kernels import encode_pages, encode_pages_reference, page_bytes
from octo_run.kernels.codec import LayerFormats, PageFormat, parse_kv

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
triton_only = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="Triton kernels need a GPU or TRITON_INTERPRET=1"
)


def vectors(layers, count, kv_heads, dim, dtype=torch.float32):
    """k and v [L, N, H, 64, d], views with strides, some vectors zero and some tiny or large."""
    torch.manual_seed(0)
    both = torch.randn(2, count, 64, kv_heads, layers, dim)
    both *= 10 ** torch.empty(2, count, 64, kv_heads, layers, 1).uniform_(-3, 2)
    both[:, 0, 5] = 0
    both[0, 0, 7, :, :, 1:] = 0
    return both.to(dtype).permute(0, 4, 1, 3, 2, 5).unbind(0)


def arena(fmt, layers, kv_heads, count=5):
    """Pages filled with 0xEE, as an inner slice of a larger tensor."""
    return torch.full((count, layers + 1, kv_heads, page_bytes(fmt)), 0xEE, dtype=torch.uint8)[:, 1:]


def check_rows(pages, ids, k, v, fmt, same):
    """Rows of the written pages by `same(got, codec, vectors)`; all other pages untouched."""
    k_rows, v_rows = PageFormat(fmt, "rows").rows(pages)
    for n, page in enumerate(ids.tolist()):
        for layer in range(k.shape[0]):
            for h in range(k.shape[2]):
                same(k_rows[page, layer, h], fmt.k, k[layer, n, h])
                same(v_rows[page, layer, h], fmt.v, v[layer, n, h])
    untouched = [p for p in range(len(pages)) if p not in ids.tolist()]
    assert (pages[untouched] == 0xEE).all()


def identical(got, codec, source):
    assert torch.equal(got, codec.encode_rotated(source))


def nearly_identical(got, codec, source):
    """The same bytes but for vectors at a boundary between codes, and those decode as well."""
    want = codec.encode_rotated(source)
    other = (got != want).any(1)
    assert other.sum() <= 2
    for row in other.nonzero().flatten().tolist():
        errors = [(codec.decode_rotated(r[row], torch.float64) - source[row]).square().sum() for r in (got, want)]
        assert abs(errors[0] - errors[1]) <= 1e-4 * errors[1]


def runs_of_layers(names, kv_heads, count=5):
    """Pages of layers of several formats, one after the other: ``(format, first layer, end, pages)``."""
    formats = LayerFormats("mixed", tuple(parse_kv(name, 64) for name in names))
    pool = torch.full((count, 64 * kv_heads * formats.vector_bytes), 0xEE, dtype=torch.uint8, device=DEVICE)
    at, views = 0, []
    for first, end, fmt in formats.runs:
        shape = (count, end - first, kv_heads, page_bytes(fmt))
        views.append((fmt, first, end, pool.as_strided(shape, (pool.shape[1], kv_heads * shape[3], shape[3], 1), at)))
        at += (end - first) * kv_heads * shape[3]
    assert at == pool.shape[1]
    return views


@triton_only
@pytest.mark.parametrize("names", [("oct2", "oct2:oct3", "oct2:oct3"), ("oct3", "oct3", "octopus2")])
@pytest.mark.parametrize("count", [1, 2])
def test_triton_pages_of_layers_of_several_formats(names, count):
    """Neighbours of one format by one call, as the arena does it: the bytes are those of each layer alone."""
    from octo_run.kernels.encode.launch import encode_pages_triton

    k, v = (x.to(DEVICE) for x in vectors(3, count, 2, 64))
    ids, views = torch.tensor([4, 1][:count], device=DEVICE), runs_of_layers(names, 2)
    assert len(views) == 2
    for fmt, first, end, pages in views:
        assert pages.storage_offset() % 128 == 0 and all(stride % 128 == 0 for stride in pages.stride()[:3])
        encode_pages_triton(k[first:end], v[first:end], pages, ids, fmt)
    for fmt, first, end, pages in views:
        written = PageFormat(fmt, "lanes").convert(pages[ids].cpu(), "rows")
        want = PageFormat(fmt, "rows").encode_rotated(k[first:end].cpu(), v[first:end].cpu()).transpose(0, 1)
        assert (written != want).sum() <= 8  # vectors at a boundary between codes
        untouched = [page for page in range(5) if page not in ids.tolist()]
        assert (pages[untouched] == 0xEE).all()


@pytest.mark.parametrize("kv", ["octopus3", "bf16", "octopus2:octopus4", "octopus3:bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_pages(kv, dtype):
    fmt = parse_kv(kv, 64)
    k, v = vectors(2, 3, 2, 64, dtype)
    pages, ids = arena(fmt, 2, 2), torch.tensor([4, 0, 2])
    encode_pages(k, v, pages, ids, fmt)
    check_rows(pages, ids, k, v, fmt, identical)


def test_misfits_are_named():
    fmt = parse_kv("octopus3", 64)
    k, v = vectors(2, 1, 2, 64)
    pages, ids = arena(fmt, 2, 2), torch.tensor([1])
    with pytest.raises(ValueError, match="k and v must be alike"):
        encode_pages(k, v[:, :, :1], pages, ids, fmt)
    with pytest.raises(ValueError, match="pages must be uint8"):
        encode_pages(k, v, pages[:, :1], ids, fmt)
    with pytest.raises(ValueError, match="page_ids must hold 1"):
        encode_pages(k, v, pages, torch.tensor([1, 2]), fmt)
    with pytest.raises(ValueError, match="nan"):
        encode_pages_reference(k * float("nan"), v, pages, ids, fmt)


@triton_only
@pytest.mark.parametrize(
    ("kv", "dim", "dtype"),
    [
        ("octopus2", 64, torch.float32),
        ("octopus3", 128, torch.float32),
        ("octopus4", 80, torch.float32),
        ("octopus3", 256, torch.float16),
        ("octopus2:octopus4", 96, torch.bfloat16),
        ("octopus3:bf16", 112, torch.bfloat16),
        ("bf16", 80, torch.bfloat16),
    ],
)
def test_triton_pages(kv, dim, dtype):
    from octo_run.kernels.encode.launch import encode_pages_triton

    fmt = parse_kv(kv, dim)
    k, v = vectors(2, 2, 1, dim, dtype)
    index = torch.int32 if dim == 64 else torch.int64
    pages, ids = arena(fmt, 2, 1).to(DEVICE), torch.tensor([4, 1], dtype=index, device=DEVICE)
    encode_pages_triton(k.to(DEVICE), v.to(DEVICE), pages, ids, fmt)
    check_rows(pages.cpu(), ids.cpu(), k, v, fmt, nearly_identical)


@triton_only
def test_triton_takes_no_pages_and_refuses_float64():
    from octo_run.kernels.encode.launch import encode_pages_triton

    fmt = parse_kv("octopus3", 64)
    k, v = vectors(1, 1, 1, 64)
    pages, ids = arena(fmt, 1, 1), torch.tensor([1])
    encode_pages_triton(k[:, :0], v[:, :0], pages, ids[:0], fmt)
    assert (pages == 0xEE).all()
    with pytest.raises(ValueError, match="fp16, bf16 and fp32"):
        encode_pages_triton(k.double(), v.double(), pages, ids, fmt)
