"""The kernels of the trellis formats: encoding against the codec, bit for bit, and attention over their blocks.

The Triton cases run where there is a GPU, or interpreted (see test_attention_interpreted.py).
"""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from octo_run.kernels import AttentionInputs, AttentionSpec, page_bytes
from octo_run.kernels.codec import KVFormat, TrellisCodec, get, parse_kv
from octo_run.kernels.trellis_tables import block_bits, inverse_bits, read_map, search_tables, table_format

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
triton_only = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="Triton kernels need a GPU or TRITON_INTERPRET=1"
)
NAMES = ("oct2", "oct3", "oct4")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _interpreter_with_new_numpy(monkeypatch):
    """Triton 3.6's interpreter turns one-element arrays into loop bounds by int(), which NumPy 2.4 no longer does."""
    if INTERPRETED:
        from triton.runtime import interpreter

        original = interpreter._patch_lang_tensor

        def patch(tensor, scope):
            original(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


def block_of(codec, side, codes, signs, norms):
    """Bytes of a block of 64 vectors in the codec's page layout, set bit by bit."""
    bits = np.zeros(64 * codec.bytes_per_vector * 8, np.uint8)
    layout = codec.page_layout
    codes, norms = codes.numpy(), norms.numpy()
    bits[getattr(layout, side + "_code")] = codes[:, :, None] >> np.arange(codec.stream) & 1
    if signs is not None:
        flat = getattr(layout, side + "_sign").reshape(64, -1)[:, : codec.head_dim]
        bits[flat] = signs.numpy().reshape(64, -1)[:, : codec.head_dim]
    bits[getattr(layout, side + "_norm")] = norms[:, None] >> np.arange(codec.norm_bits) & 1
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def blocks_of(codec, side, vectors):
    """Blocks uint8 [..., 64 * bytes] of vectors [..., 64, d], as the kernels must lay them out."""
    rows = codec.encode_rotated(vectors)
    if not isinstance(codec, TrellisCodec):
        return rows.flatten(-2)
    codes, signs, norms = codec.encode_fields(vectors)
    places = [block_of(codec, side, codes[at], None if signs is None else signs[at], norms[at])
              for at in np.ndindex(*vectors.shape[:-2])]  # fmt: skip
    return torch.stack(places).view(*vectors.shape[:-2], -1)


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
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 256])
def test_maps_agree_with_the_layout(name, dim):
    """Every stored bit has one source, and the read map finds what the inverse map put there."""
    form = table_format(get(name, dim))
    for side in ("k", "v"):
        inverse = inverse_bits(form, side, CPU).flatten()
        used = inverse[inverse >= 0]
        assert len(used.unique()) == len(used)
        bits = block_bits(form, side)
        stored = dim if form.signed else 0
        assert len(used) == 64 * (form.triplets * form.stream + stored + bits.norm.shape[1])
        search_tables(form, CPU)
        codes = torch.from_numpy(read_map(form, side, CPU).numpy()[260 : 260 + 64 * form.triplets])
        place = (codes & 0xFFF) * 32 + (codes >> 24)
        field = torch.arange(64)[:, None] * (form.triplets + 1) + torch.arange(form.triplets)
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
    ],
)
def test_triton_blocks(name, dim, dtype, monkeypatch):
    from octo_run.kernels.encode.launch import encode_pages_triton

    if INTERPRETED:  # fewer programs: they run one by one
        monkeypatch.setattr("octo_run.kernels.encode.trellis_launch._ROWS", 64)
    codec = get(name, dim)
    heads = 2 if name == "oct3" and dim == 128 else 1
    k, v = vectors(1, 1, heads, dim, dtype)
    fmt = KVFormat(name, codec, codec)
    pages = torch.full((3, 2, heads, page_bytes(fmt)), 0xEE, dtype=torch.uint8)[:, 1:].to(DEVICE)
    encode_pages_triton(k.to(DEVICE), v.to(DEVICE), pages, torch.tensor([1], device=DEVICE), fmt)
    want = torch.cat([blocks_of(codec, "k", k), blocks_of(codec, "v", v)], -1)
    assert torch.equal(pages[1].cpu(), want[:, 0])
    assert (pages[[0, 2]] == 0xEE).all()


@triton_only
@pytest.mark.parametrize("name", NAMES)
def test_triton_fields(name):
    from octo_run.kernels.encode.trellis_launch import encode_fields

    codec = get(name, 64)
    k, _ = vectors(1, 1, 1, 64)
    fields = encode_fields(k.to(DEVICE), table_format(codec)).cpu().to(torch.int32)
    codes, signs, norms = codec.encode_fields(k)
    if signs is not None:
        codes = codes | (signs.int() << torch.tensor([10, 11, 12])).sum(-1)
    assert torch.equal(fields[..., :-1], codes.int())
    assert torch.equal(fields[..., -1], norms.int() << (15 - codec.norm_bits))


def make_case(fmt, lengths, count, heads, kv_heads, dtype):
    """Queries, arena and the float64 result. What must not be read is NaN, an invalid page, or 255."""
    torch.manual_seed(1)
    dim, sink, window = fmt.k.head_dim, 4, 8
    starts = [n - count for n in lengths]
    packed = [max(0, s - sink - window) // 64 for s in starts]
    capacity = window + 64 + (count if count > 1 else 0)
    pages = torch.full((sum(packed) + 1, kv_heads, page_bytes(fmt)), 255, dtype=torch.uint8)
    table = torch.full((len(lengths), max(packed) + 1), 2**30, dtype=torch.int32)
    sinks = torch.full((2, len(lengths), kv_heads, sink, dim), float("nan")).to(dtype)
    tails = torch.full((2, len(lengths), kv_heads, capacity, dim), float("nan")).to(dtype)
    origin = [64 * p if count > 1 else 0 for p in packed]
    q = (3 * torch.randn(len(lengths), count, heads, dim)).to(dtype)
    want, free = torch.empty(q.shape, dtype=torch.float64), iter(range(sum(packed), 0, -1))
    for b, n in enumerate(lengths):
        new = (torch.randn(2, kv_heads, n, dim) * (0.2 + torch.rand(2, kv_heads, n, 1))).to(dtype)
        stored = new.double()
        sinks[:, b, :, : min(n, sink)] = new[:, :, :sink]
        for p in range(packed[b]):
            at = slice(sink + 64 * p, sink + 64 * p + 64)
            table[b, p] = next(free)
            pages[table[b, p]] = torch.cat([blocks_of(fmt.k, "k", new[0, :, at]), blocks_of(fmt.v, "v", new[1, :, at])],
                                           -1)  # fmt: skip
            for part, codec in enumerate((fmt.k, fmt.v)):
                stored[part, :, at] = codec.decode_rotated(codec.encode_rotated(new[part, :, at]), torch.float64)
        for j in range(sink + 64 * packed[b], n):
            tails[:, b, :, (j - sink - origin[b]) % capacity] = new[:, :, j]
        for h in range(heads):
            g = h // (heads // kv_heads)
            scores = q[b, :, h].double() @ stored[0, g].T * dim**-0.5
            late = torch.arange(n) > torch.arange(starts[b], n)[:, None]
            want[b, :, h] = scores.masked_fill(late, float("-inf")).softmax(-1) @ stored[1, g]
    index = [torch.tensor(x, dtype=torch.int32) for x in (packed, starts, origin)]
    rows = torch.arange(len(lengths), dtype=torch.int32)
    inputs = AttentionInputs(pages, table, rows, index[0], index[1], *sinks, *tails, index[2], sink)
    return q, inputs, want


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
    from octo_run.kernels.attention.launch import attend_triton

    fmt = parse_kv(kv, dim)
    lengths = [count + 4 + 8 + 63, count + 4 + 8 + 128 + 5]
    q, inputs, want = make_case(fmt, lengths, count, 3, 1, dtype)
    inputs = replace(inputs, **{k: v.to(DEVICE) for k, v in vars(inputs).items() if isinstance(v, torch.Tensor)})
    out = torch.full_like(q, float("nan")).to(DEVICE)
    attend_triton(q.to(DEVICE), inputs, fmt, spec=AttentionSpec(dim**-0.5), max_length=max(lengths), out=out)
    errors = (out.cpu().double() - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    assert float(errors.max()) < (1e-5 if dtype == torch.float32 else 2e-3)
