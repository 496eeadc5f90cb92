"""The kernels of the trellis formats: encoding against the codec, bit for bit, and attention over their blocks.

The Triton cases run where there is a GPU, or interpreted (see test_attention_interpreted.py).
"""

import os
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from octo_run.kernels import page_bytes
from octo_run.kernels.codec import PageFormat, get, parse_kv
from octo_run.kernels.trellis_tables import WORD_BITS, inverse_bits, read_map, search_tables

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
triton_only = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="Triton kernels need a GPU or TRITON_INTERPRET=1"
)
NAMES = ("oct2", "oct3", "oct4")
CPU = torch.device("cpu")
cases = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "test_attention_kernels.py")))


def vectors(layers, count, kv_heads, dim, dtype=torch.float32):
    """k and v [L, N, H, 64, d] with strides; zero, sparse, tiny and long vectors, -0 and numbers that are not exact."""
    torch.manual_seed(0)
    both = torch.randn(2, count, 64, kv_heads, layers, dim) * 10 ** torch.empty(64, 1, 1, 1).uniform_(-3, 2)
    both[:, 0, 5] = 0
    both[0, 0, 6] = -0.0
    both[:, 0, 7, :, :, 1:] = 0
    both[:, 0, 8] *= 1e-9
    both[:, 0, 9] *= 1e-25
    return both.to(dtype).permute(0, 4, 1, 3, 2, 5).unbind(0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 256, 512])
def test_maps_agree_with_the_layout(name, dim):
    """Every stored bit has one source, and the read map finds what the inverse map put there."""
    codec = get(name, dim)
    triplets = codec.num_triplets
    for side in ("k", "v"):
        inverse = inverse_bits(codec, side, CPU).flatten()
        used = inverse[inverse >= 0]
        assert len(used.unique()) == len(used)
        stored = dim if codec.signed else 0
        assert len(used) == 64 * (triplets * codec.stream + stored + codec.norm_bits)
        search_tables(codec, CPU)
        codes = read_map(codec, side, CPU)[260 : 260 + 64 * triplets]
        place = (codes & ((1 << WORD_BITS) - 1)) * 32 + (codes >> 2 * WORD_BITS)
        field = torch.arange(64)[:, None] * (triplets + 1) + torch.arange(triplets)
        assert torch.equal(inverse[place.view(64, -1)], (field * 16).int())


@triton_only
@pytest.mark.parametrize(
    ("name", "dim", "dtype"),
    [
        ("oct3", 128, torch.float32),
        ("oct2", 128, torch.bfloat16),
        ("oct4", 128, torch.float32),
        ("oct3", 64, torch.float16),
        ("oct2", 80, torch.float32),
        ("oct4", 112, torch.bfloat16),
        ("oct3", 256, torch.float32),
        ("oct3", 512, torch.float32),
        ("oct4", 512, torch.bfloat16),
    ],
)
def test_triton_blocks(name, dim, dtype, monkeypatch):
    from octo_run.kernels.encode.launch import encode_pages_triton

    if INTERPRETED:  # fewer programs: they run one by one
        monkeypatch.setattr("octo_run.kernels.encode.trellis_launch._ROWS", 64)
    heads = 2 if name == "oct3" and dim == 128 else 1
    k, v = vectors(1, 1, heads, dim, dtype)
    fmt = parse_kv(name, dim)
    pages = torch.full((3, 2, heads, page_bytes(fmt)), 0xEE, dtype=torch.uint8)[:, 1:].to(DEVICE)
    encode_pages_triton(k.to(DEVICE), v.to(DEVICE), pages, torch.tensor([1], device=DEVICE), fmt)
    assert torch.equal(pages[1].cpu(), PageFormat(fmt, "lanes").encode_rotated(k, v)[:, 0])
    assert (pages[[0, 2]] == 0xEE).all()


@triton_only
@pytest.mark.parametrize(("layers", "count"), [(1, 2), (2, 1), (2, 2)])
def test_triton_searches_keys_and_values_of_one_tensor_together(layers, count, monkeypatch):
    """As the arena has them, with strides of their own; but where layers and pages cannot be counted as one."""
    from octo_run.kernels.encode import launch

    searched, search = [], launch._search
    monkeypatch.setattr(launch, "_search", lambda y, codec: (searched.append(y.shape), search(y, codec))[1])
    if INTERPRETED:
        monkeypatch.setattr("octo_run.kernels.encode.trellis_launch._ROWS", 64)
    store = torch.randn(2, layers, count, 1, 64 + 8, 64, generator=torch.Generator().manual_seed(layers)).to(DEVICE)
    k, v = store[..., 8:, :]
    fmt = parse_kv("oct2", 64)
    ids = torch.arange(count, device=DEVICE)
    pages = torch.full((count, layers, 1, page_bytes(fmt)), 0xEE, dtype=torch.uint8, device=DEVICE)
    launch.encode_pages_triton(k, v, pages, ids, fmt)
    wanted = PageFormat(fmt, "lanes").encode_rotated(k.cpu(), v.cpu()).transpose(0, 1)
    assert torch.equal(pages.cpu(), wanted)
    together = layers * count <= 2
    assert len(searched) == (1 if together else 2) and searched[0][0] == 2
    for other in ((v, k), (k, v.clone()), (k.clone(), v)):
        assert launch._together(*other) is None


@triton_only
@pytest.mark.parametrize("name", NAMES)
def test_triton_fields(name):
    from octo_run.kernels.encode.trellis_launch import encode_fields

    codec = get(name, 64)
    k, _ = vectors(1, 1, 1, 64)
    fields = encode_fields(k.to(DEVICE), codec).cpu().to(torch.int32)
    assert torch.equal(fields, codec.encode_fields(k))


@triton_only
@pytest.mark.parametrize(
    ("kv", "dim", "count", "dtype"),
    [
        ("oct3", 128, 1, torch.float16),
        ("oct2", 128, 1, torch.float32),
        ("oct4", 128, 1, torch.float16),
        ("oct3", 128, 9, torch.float16),
        ("oct2", 128, 9, torch.float16),
        ("oct4", 128, 9, torch.float32),
        ("oct3:oct2", 128, 5, torch.float16),
        ("oct3", 64, 1, torch.float16),
        ("oct4", 80, 5, torch.float16),
        ("oct2", 96, 1, torch.float16),
        ("oct3", 112, 5, torch.float16),
        ("oct4", 256, 5, torch.float16),
        ("octopus3:oct3", 128, 1, torch.float16),
    ],
)
def test_triton_attention(kv, dim, count, dtype):
    lengths = [count + 4 + 8 + 63, count + 4 + 8 + 128 + 5]
    case = cases.make_case(kv, lengths, count, 3, 1, dim, dtype, sink=4, window=8)
    for got, want in zip(cases.run_triton(case), case.want, strict=True):
        assert cases.relative_error(got, want) < (1e-5 if dtype == torch.float32 else 2e-3)
