"""Attention over the arena against float64 attention over `codec.decode`, for the reference and the Triton kernels.

The Triton cases run where there is a GPU, or interpreted (see test_attention_interpreted.py).
"""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octo_run.kernels import AttentionInputs, AttentionSpec, attend, attend_reference, page_bytes
from octo_run.kernels.attention.arguments import strides
from octo_run.kernels.attention.key_mean import (
    AngleTables,
    KeyMean,
    coefficients,
    launch_options,
    mean_maps,
    put_back,
)
from octo_run.kernels.codec import KVFormat, PageFormat, parse_kv

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
triton_only = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="Triton kernels need a GPU or TRITON_INTERPRET=1"
)
SINK = 64
LARGE = 3.4  # means of twenty times the energy of the other part of the keys
SPEC = AttentionSpec(64**-0.5)


if DEVICE == "cuda" or INTERPRETED:
    import triton
    import triton.language as tl

    from octo_run.kernels.attention.general.parts import my_part

    @triton.jit
    def ask(
        OUT, NUM_PACKED, STARTS, TAIL_ORIGIN, sink, capacity, batch, programs, BATCH: tl.constexpr, WINDOW: tl.constexpr
    ):  # fmt: skip
        """What a program learns of its part, to OUT [programs, 3]."""
        flat = tl.program_id(0)
        b, part, parts = my_part(flat, NUM_PACKED, STARTS, TAIL_ORIGIN, sink, capacity, batch, programs, BATCH, 64, 64,
                                 WINDOW)  # fmt: skip
        tl.store(OUT + 3 * flat, b)
        tl.store(OUT + 3 * flat + 1, part)
        tl.store(OUT + 3 * flat + 2, parts)


@dataclass
class Case:
    """A batch of sequences in an arena, with the same vectors in float64."""

    q: torch.Tensor
    kv: AttentionInputs
    fmt: KVFormat
    want: torch.Tensor
    max_length: int
    spec: AttentionSpec


def _integers(values):
    return torch.tensor(values, dtype=torch.int32)


def make_case(
    kv, lengths, count, heads, kv_heads, dim, dtype=torch.float32, sink=SINK, window=64, seed=0, mean=0.0,
    layout="lanes", theta=1e4, sees=None, cap=None, sinking=False, silent=0,
):  # fmt: skip
    """Sequences of `lengths` tokens whose last `count` are the queries; length 0 is filler. They own rows of the arena
    in no order, with rows of nobody between them. Whatever must not be read is NaN, or page 0.

    `mean`: size of the means that the packed keys get back, `theta`: of their frequencies; `layout`: of the pages.
    `sees`, `cap`, `sinking`: window, cap and sink logits; pages and sinks before the window must not be read either.
    `silent`: of so many tokens one has a value of zero.
    """
    torch.manual_seed(seed)
    sink_logits = 4 * torch.randn(heads, generator=torch.Generator().manual_seed(seed)) if sinking else None
    spec = AttentionSpec(dim**-0.5, sees, cap, sink_logits)
    fmt = parse_kv(kv, dim, plain_dtype=dtype)
    page_format = PageFormat(fmt, layout)
    batch = len(lengths)
    owned = batch + 2  # rows
    rows = [row if n else -1 for row, n in zip(torch.randperm(owned).tolist(), lengths, strict=False)]
    starts = [max(0, n - count) for n in lengths]
    packed = [max(0, s - sink - window) // 64 for s in starts]
    capacity = window + 64 + (count if count > 1 else 0)
    order = iter((torch.randperm(sum(packed)) + 1).tolist())
    pages = torch.full((sum(packed) + 1, 3, kv_heads, page_bytes(fmt)), 255, dtype=torch.uint8)
    table = torch.full((owned, max(packed) + 1), 2**30, dtype=torch.int32)
    sinks = torch.full((2, owned, kv_heads, sink, dim), float("nan")).to(dtype)
    tails = torch.full((2, owned, kv_heads, capacity, dim), float("nan")).to(dtype)
    origin = [64 * p if count > 1 else 0 for p in packed]
    q = (3 * torch.randn(batch, count, heads, dim)).to(dtype)
    want = torch.empty(batch, count, heads, dim, dtype=torch.float64)
    tables = AngleTables.build(theta ** (-torch.arange(0, dim, 2) / dim), sink, max(packed) + 1)
    means = mean * torch.randn(kv_heads, dim)
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        if row < 0:
            want[b] = 0
            continue
        vectors = (torch.randn(2, kv_heads, n, dim) * (0.2 + torch.rand(2, kv_heads, n, 1))).to(dtype)
        if silent:
            vectors[1, :, ::silent] = 0
        stored = vectors.double()
        top = min(n, sink)
        sinks[:, row, :, :top] = vectors[:, :, :top]
        if packed[b]:
            ids, coded = [next(order) for _ in range(packed[b])], slice(sink, sink + 64 * packed[b])
            made = page_format.encode_rotated(*vectors[:, :, coded].reshape(2, kv_heads, packed[b], 64, dim))
            table[row, : packed[b]], pages[ids, 1] = _integers(ids), made.transpose(0, 1)
            stored[:, :, coded] = torch.stack(page_format.decode_rotated(made, torch.float64)).flatten(2, 3)
        for p in range(packed[b]):
            at = slice(sink + 64 * p, sink + 64 * p + 64)
            stored[0, :, at] += rotated_mean(means.double(), tables, p, fmt.k.rotation)
        for j in range(sink + 64 * packed[b], n):
            tails[:, row, :, (j - sink - origin[b]) % capacity] = vectors[:, :, j]
        want[b] = dense(q[b].double(), stored[0], stored[1], starts[b], spec)
        earliest = spec.earliest(starts[b])
        if earliest >= sink:
            sinks[:, row] = float("nan")
        table[row, : min(packed[b], max(0, earliest - sink) // 64)] = 2**30
    kv_inputs = AttentionInputs(
        pages[:, 1], table, _integers(rows), _integers(packed), _integers(starts), *sinks, *tails, _integers(origin),
        sink)  # fmt: skip
    if mean:
        rotation = fmt.k.rotation.float()
        of_queries = coefficients(q.float() @ rotation, means)
        of_queries[[n == 0 for n in lengths]] = float("nan")  # filler's are nobody's
        kv_inputs = replace(kv_inputs, mean=KeyMean(mean_maps(means, rotation.T), tables, of_queries))
    return Case(q, kv_inputs, fmt, want, max(lengths), spec)


def rotated_mean(means, tables, page, rotation):
    """RoPE of `means` [Hkv, d] at the positions of a page by complex numbers, then the rotation: [Hkv, 64, d]."""
    half = means.shape[-1] // 2
    middles, offsets = (torch.complex(*x.double().split(half, -1)) for x in (tables.base[page], tables.offset))
    turned = torch.complex(*means.split(half, -1))[:, None] * (middles[:, None] * offsets).flatten(0, 1)
    return torch.cat((turned.real, turned.imag), -1) @ rotation.T


def dense(q, k, v, start, spec):
    """Plain causal attention in float64: q [C, H, d], k and v [Hkv, n, d]."""
    count, heads, _ = q.shape
    out = torch.empty_like(q)
    for h in range(heads):
        g = h // (heads // k.shape[0])
        for c in range(count):
            first = 0 if spec.window is None else max(0, start + c + 1 - spec.window)
            logits = k[g, first : start + c + 1] @ q[c, h] * spec.scale
            if spec.logit_cap is not None:
                logits = spec.logit_cap * torch.tanh(logits / spec.logit_cap)
            if spec.sink_logits is not None:
                logits = torch.cat((logits, spec.sink_logits[h : h + 1].double()))
            out[c, h] = logits.softmax(0)[: start + c + 1 - first] @ v[g, first : start + c + 1]
    return out


def relative_error(got, want):
    return float((got.double().cpu() - want).norm() / (want.norm() or 1))  # what filler has is 0


def run_triton(case):
    from octo_run.kernels.attention.launch import attend_triton
    from octo_run.kernels.attention.workspace import counter_words, workspace_bytes

    batch, count, heads, dim = case.q.shape
    kv = replace(case.kv, **{k: v.to(DEVICE) for k, v in vars(case.kv).items() if isinstance(v, torch.Tensor)})
    if kv.mean is not None:
        mean = kv.mean
        tables = mean.tables.to(DEVICE)
        of_queries = None if mean.of_queries is None or count > 1 else mean.of_queries.to(DEVICE)
        kv = replace(kv, mean=KeyMean(mean.maps.to(DEVICE), tables, of_queries))
    q = case.q.to(DEVICE)
    out = torch.full_like(q, float("nan"))
    size = workspace_bytes(q.device, batch, heads, kv.pages.shape[1], dim, max(2, batch * count)) // 4
    workspace = torch.full((size,), float("nan"), device=DEVICE)
    workspace[: counter_words(q.device)] = 0
    got = attend_triton(
        q, kv, case.fmt, spec=spec_on(case.spec, DEVICE), max_length=case.max_length, out=out, workspace=workspace
    )
    assert got is out
    return out


def spec_on(spec, device):
    return replace(spec, sink_logits=None if spec.sink_logits is None else spec.sink_logits.to(device))


LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 257, 400]


@pytest.mark.parametrize("count", [1, 70])
@pytest.mark.parametrize("kv", ["octopus3", "bf16"])
def test_reference_adds_the_mean_back(kv, count):
    case = make_case(kv, [129, 400], count, 6, 2, 64, dtype=torch.float64, mean=3.0)
    got = attend(case.q, case.kv, case.fmt, spec=SPEC, max_length=400)
    assert relative_error(got, case.want) < 1e-6  # coefficients and angles are float32
    without = attend(case.q, replace(case.kv, mean=None), case.fmt, spec=SPEC, max_length=400)
    assert relative_error(without, case.want) > 0.1


@triton_only
@pytest.mark.parametrize(("kv", "dim", "group", "count", "dtype"), [
    ("octopus3", 64, 3, 1, torch.float32),
    ("octopus3", 80, 1, 1, torch.bfloat16),
    ("octopus2", 64, 4, 20, torch.float32),
    ("bf16", 64, 2, 20, torch.float16),
    ("oct3", 80, 4, 20, torch.float16),
    ("oct3", 512, 2, 1, torch.float16),
])  # fmt: skip
def test_triton_adds_the_mean_back(kv, dim, group, count, dtype):
    case = make_case(kv, [150, 300], count, 2 * group, 2, dim, dtype=dtype, mean=2.0)
    assert relative_error(run_triton(case), case.want) < {torch.float32: 1e-5, torch.float16: 3e-3}.get(dtype, 6e-3)


@triton_only
@pytest.mark.parametrize("kv", ["octopus3", "oct3", "bf16"])
def test_triton_reads_one_token_without_its_coefficients(kv):
    """As prompts do, whose chunks may be of one token."""
    for lengths in ([150, 64, 300], [300]):
        case = make_case(kv, lengths, 1, 4, 2, 64, dtype=torch.float16, mean=2.0)
        case.kv = replace(case.kv, mean=replace(case.kv.mean, of_queries=None))
        assert relative_error(run_triton(case), case.want) < 3e-3


@triton_only
@pytest.mark.parametrize("dim", [64, 80])
def test_triton_takes_the_mean_out_and_puts_it_back(dim):
    from octo_run.kernels.attention.general.key_mean_kernels import take_out_kernel

    torch.manual_seed(5)
    tables = AngleTables.build(10000.0 ** (-torch.arange(0, dim, 2) / dim), SINK, 9)
    tables = tables.to(DEVICE)
    maps = mean_maps(torch.randn(2, 2, dim), torch.randn(2, 2, dim, dim) / dim**0.5).to(DEVICE)
    k, first = torch.randn(2, 2, 3, 64, dim, device=DEVICE), 4  # [sequence or layer, head, page, token, coordinate]
    rows = (tables.of_pages(first, 3).flatten(0, 1) @ maps).view(k.shape)
    pages, out = k.transpose(1, 2), torch.empty_like(k.transpose(1, 2), memory_format=torch.contiguous_format)
    take_out_kernel[(3, 2, 2)](
        K=pages, OUT=out, MAPS=maps, FIRST=_integers([first]).to(DEVICE), BASE=tables.base, OFFSET=tables.offset,
        **strides("sk", pages, l=0, n=1, h=2, t=3), **strides("so", out, l=0, n=1, h=2),
        **launch_options(dim))  # fmt: skip
    assert torch.allclose(out, (k - rows).transpose(1, 2), atol=1e-5)
    slab = k.clone()
    put_back(slab.view(2, 2, -1, dim), _integers([first + 2, 9]).to(DEVICE), first, KeyMean(maps[1], tables))
    rows = rows[1].expand(2, -1, -1, -1, -1).clone()  # both sequences have the means of the layer
    rows[0, :, 2] = 0  # a page that the first sequence does not have
    assert torch.allclose(slab, k + rows, atol=1e-5)


@pytest.mark.parametrize("kv", ["octopus2", "octopus3", "octopus4", "bf16", "octopus3:bf16", "octopus4:octopus2"])
def test_reference_decode_lengths(kv):
    case = make_case(kv, LENGTHS, 1, 6, 2, 64, dtype=torch.float64)
    assert relative_error(attend(case.q, case.kv, case.fmt, spec=SPEC, max_length=400), case.want) < 1e-12


@pytest.mark.parametrize(("count", "sink", "window"), [(2, 64, 64), (70, 64, 64), (130, 0, 0), (65, 4, 128)])
def test_reference_prefill(count, sink, window):
    lengths = [count, count + 1, count + 63, count + 64, count + 65, count + 200]
    case = make_case("octopus3", lengths, count, 4, 1, 64, dtype=torch.float64, sink=sink, window=window)
    assert relative_error(attend(case.q, case.kv, case.fmt, spec=SPEC, max_length=999), case.want) < 1e-12


@pytest.mark.parametrize("dim", [80, 96, 112, 128, 256, 512])
def test_reference_head_dims_and_dtypes(dim):
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        case = make_case("octopus3", [300], 1, 7, 1, dim, dtype=dtype)
        out = torch.full_like(case.q, float("nan"))
        assert attend_reference(case.q, case.kv, case.fmt, spec=AttentionSpec(dim**-0.5), out=out) is out
        assert relative_error(out, case.want) < bound


def test_reference_crosses_its_tiles(monkeypatch):
    monkeypatch.setattr("octo_run.kernels.attention.reference.TILE_PAGES", 2)
    case = make_case("octopus2", [700], 1, 2, 1, 64, dtype=torch.float64)
    assert relative_error(attend(case.q, case.kv, case.fmt, spec=SPEC, max_length=700), case.want) < 1e-12


@pytest.mark.parametrize(("kv", "mean"), [("octopus3", 0.0), ("bf16", 3.0)])
@pytest.mark.parametrize("count", [1, 5])
def test_reference_serves_any_rows_and_filler(kv, mean, count):
    """Rows in no order, rows of nobody (NaN) between them, filler in front, in the midst and at the end."""
    case = make_case(kv, [0, 300, 129, 0, 700, 64, 0], count, 4, 2, 64, dtype=torch.float64, mean=mean)
    rows = case.kv.rows.tolist()
    assert rows.count(-1) == 3 and [r for r in rows if r >= 0] != sorted(r for r in rows if r >= 0)
    out = torch.full_like(case.q, float("nan"))
    attend(case.q, case.kv, case.fmt, spec=SPEC, max_length=700, out=out)
    for got, want in zip(out, case.want, strict=True):
        assert relative_error(got, want) < 1e-6
    moved = torch.roll(torch.arange(7), 3)  # the same sequences at other places of the batch
    parts = {name: getattr(case.kv, name)[moved] for name in ("rows", "num_packed", "starts", "tail_origin")}
    if mean:
        parts["mean"] = replace(case.kv.mean, of_queries=case.kv.mean.of_queries[moved])
    again = attend(case.q[moved], replace(case.kv, **parts), case.fmt, spec=SPEC, max_length=700)
    assert torch.equal(again, out[moved])


SPECS = [
    {"sees": 1}, {"sees": 40}, {"sees": 64}, {"sees": 65}, {"sees": 128}, {"sees": 200}, {"sees": 999}, {"cap": 3.0},
    {"sinking": True}, {"sees": 130, "cap": 2.0, "sinking": True},
]  # fmt: skip


@pytest.mark.few(7)
@pytest.mark.parametrize("kinds", SPECS, ids=str)
@pytest.mark.parametrize(("kv", "mean"), [("octopus3", 0.0), ("bf16", 0.0), ("oct3", 3.0)])
@pytest.mark.parametrize("count", [1, 70])
def test_reference_windows_caps_and_sink_logits(monkeypatch, kinds, kv, mean, count):
    monkeypatch.setattr("octo_run.kernels.attention.reference.TILE_PAGES", 2)
    lengths = [*LENGTHS, 0, 700] if count == 1 else [70, 133, 134, 198, 0, 500]
    case = make_case(kv, lengths, count, 6, 2, 64, dtype=torch.float64, mean=mean, layout="rows", **kinds)
    out = torch.full_like(case.q, float("nan"))
    attend(case.q, case.kv, case.fmt, spec=case.spec, max_length=700, out=out)
    for got, want in zip(out, case.want, strict=True):
        assert relative_error(got, want) < (1e-6 if mean else 1e-12)


@pytest.mark.few(4)
@pytest.mark.parametrize(("sink", "window"), [(0, 0), (4, 128), (100, 64)])
@pytest.mark.parametrize("sees", [3, 5, 96, 101, 165, 300])
def test_reference_windows_beside_other_sinks(sink, window, sees):
    for count in (1, 66):
        case = make_case("octopus3", [count, 190, 700], count, 4, 1, 64, torch.float64, sink, window, sees=sees)
        got = attend(case.q, case.kv, case.fmt, spec=case.spec, max_length=700)
        assert relative_error(got, case.want) < 1e-12


def test_specs_that_mean_nothing_are_refused():
    case = make_case("octopus3", [200], 1, 4, 2, 64)
    with pytest.raises(ValueError, match="an attention window has 1 token at least, not 0"):
        AttentionSpec(0.125, window=0)
    for cap in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="a cap of logits is above 0"):
            AttentionSpec(0.125, logit_cap=cap)
    for wrong in (torch.zeros(3), torch.zeros(4).double(), torch.zeros(8)[::2]):
        spec = AttentionSpec(0.125, sink_logits=wrong)
        with pytest.raises(ValueError, match=r"sink_logits must be contiguous float32 \[4\]"):
            attend(case.q, case.kv, case.fmt, spec=spec, max_length=200)
    with pytest.raises(ValueError, match="another input is on meta"):
        attend(case.q, case.kv, case.fmt, max_length=200,
               spec=AttentionSpec(0.125, sink_logits=torch.zeros(4, device="meta")))  # fmt: skip


def test_misfits_are_named():
    case = make_case("octopus3", [200], 1, 4, 2, 64)
    good = {"spec": AttentionSpec(1.0), "max_length": 200}
    with pytest.raises(ValueError, match="query heads"):
        attend(case.q[:, :, :3], case.kv, case.fmt, **good)
    with pytest.raises(ValueError, match="pages must be uint8"):
        attend(case.q, case.kv, parse_kv("octopus4", 64), **good)
    with pytest.raises(ValueError, match="tail_k is"):
        attend(case.q, replace(case.kv, tail_k=case.kv.tail_k.half()), case.fmt, **good)
    with pytest.raises(ValueError, match="page_table must be int32"):
        attend(case.q, replace(case.kv, page_table=case.kv.page_table.long()), case.fmt, **good)
    with pytest.raises(ValueError, match=r"rows must be int32 \[1\]"):
        attend(case.q, replace(case.kv, rows=case.kv.rows.long()), case.fmt, **good)
    with pytest.raises(ValueError, match=r"rows must be int32 \[1\]"):
        attend(case.q, replace(case.kv, rows=torch.zeros(3, dtype=torch.int32)), case.fmt, **good)
    with pytest.raises(ValueError, match="num_packed must be int32"):
        attend(case.q, replace(case.kv, num_packed=case.kv.num_packed[None]), case.fmt, **good)
    with pytest.raises(ValueError, match=r"sink_v must be \[3, 2, slots, 64\]"):
        attend(case.q, replace(case.kv, sink_v=case.kv.sink_v[:2]), case.fmt, **good)
    with pytest.raises(ValueError, match=r"sink_k must be \[2, 2, slots, 64\]"):
        attend(case.q, replace(case.kv, page_table=case.kv.page_table[:2]), case.fmt, **good)
    with pytest.raises(ValueError, match="sink positions"):
        attend(case.q, replace(case.kv, sink=65), case.fmt, **good)
    case = make_case("octopus3", [200], 1, 4, 2, 64, mean=1.0)
    mean = case.kv.mean
    for wrong, message in (
        ({"maps": mean.maps[:1]}, "mean maps must be"),
        ({"maps": mean.maps.double()}, "mean maps must be"),
        ({"maps": mean.maps.mT}, "mean maps must be contiguous"),
        ({"of_queries": mean.of_queries[:, :, :2]}, "mean coefficients must be"),
        ({"of_queries": None}, "needs the coefficients"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(case.q, replace(case.kv, mean=replace(mean, **wrong)), case.fmt, **good)
    with pytest.raises(ValueError, match="out must be"):
        attend(case.q, case.kv, case.fmt, out=case.q[:, :, :1], **good)


@triton_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kv", ["octopus2", "octopus3", "octopus4", "bf16", "octopus3:bf16"])
def test_triton_decode_lengths(kv, dtype):
    bound = 1e-5 if dtype == torch.float32 else 2e-3
    for lengths in ([1, 64, 192, 193], [65, 256, 330]):
        case = make_case(kv, lengths, 1, 3, 1, 64, dtype=dtype)
        got = run_triton(case)
        for b in range(len(lengths)):
            assert relative_error(got[b], case.want[b]) < bound, lengths[b]


@triton_only
@pytest.mark.parametrize(("dim", "group"), [(64, 16), (80, 4), (96, 5), (112, 1), (128, 7), (256, 8), (512, 3)])
def test_triton_decode_shapes(dim, group):
    case = make_case("octopus3", [1, 450], 1, 2 * group, 2, dim, dtype=torch.float16)
    got = run_triton(case)
    for b in range(2):
        assert relative_error(got[b], case.want[b]) < 2e-3


@triton_only
@pytest.mark.parametrize(
    ("kv", "dim", "group", "dtype"),
    [
        ("octopus3", 64, 3, torch.float16),
        ("octopus2", 128, 1, torch.float32),
        ("octopus4", 96, 7, torch.float16),
        ("bf16", 80, 4, torch.float16),
        ("bf16", 100, 2, torch.float16),
        ("bf16", 120, 4, torch.float16),
        ("bf16:octopus3", 64, 2, torch.float16),
        ("oct4", 512, 1, torch.float16),
    ],
)
def test_triton_prefill(kv, dim, group, dtype):
    for count, lengths in ((2, [2, 65, 66, 194]), (37, [37, 63 + 37, 200 + 37])):
        case = make_case(kv, lengths, count, group, 1, dim, dtype=dtype)
        got = run_triton(case)
        for b in range(len(lengths)):
            assert relative_error(got[b], case.want[b]) < (1e-5 if dtype == torch.float32 else 2e-3)


@triton_only
@pytest.mark.parametrize(("dim", "mean", "dtype"), [
    (64, 0.0, torch.float16),
    (64, LARGE, torch.float16),
    (96, LARGE, torch.float16),
    (128, LARGE, torch.float16),
    (64, LARGE, torch.float32),
])  # fmt: skip
def test_triton_prefill_in_several_slabs(dim, mean, dtype, monkeypatch):
    from octo_run.kernels.attention import workspace

    monkeypatch.setattr(workspace, "SLAB_BYTES", 1)  # room for a page in float32, two in fp16
    case = make_case("octopus3", [40, 64 * 6 + 37, 64 * 3 + 37], 37, 4, 2, dim, dtype=dtype, mean=mean)
    got = run_triton(case)
    for b in range(3):
        assert relative_error(got[b], case.want[b]) < (1e-5 if dtype == torch.float32 else 2e-3)


@triton_only
@pytest.mark.parametrize("slabs", [1, 8, 32])
def test_triton_prefill_rounds_once_however_many_slabs(slabs, monkeypatch):
    """Slabs of two pages. The interpreter multiplies no bfloat16, so the inputs are float16 and only the output is
    bfloat16, whose own rounding is 1.7e-3, and 3.3e-3 in the interpreter, which cuts instead."""
    from octo_run.kernels.attention import dispatch, workspace
    from octo_run.kernels.attention.general import prefill_launch

    monkeypatch.setattr(workspace, "SLAB_BYTES", 1)
    launched = []
    flash = prefill_launch._flash
    monkeypatch.setattr(prefill_launch, "_flash", lambda *given: launched.append(given[7] is not None) or flash(*given))
    case = make_case("octopus3", [SINK + 64 + 128 * slabs + 5], 5, 2, 1, 64, dtype=torch.float16)
    assert int(case.kv.num_packed[0]) == 2 * slabs
    kv = replace(case.kv, **{k: v.to(DEVICE) for k, v in vars(case.kv).items() if isinstance(v, torch.Tensor)})
    q = case.q.to(DEVICE)
    out = torch.empty_like(q, dtype=torch.bfloat16)
    room = workspace.Workspace.of(None, 1, 2, 1, 64, q.device, 5, case.max_length)
    call = dispatch.describe(q, kv, case.fmt, case.max_length, dispatch.Device.GPU)
    prefill_launch.launch_prefill(call, q, kv, case.fmt, out, room, spec=SPEC, max_length=case.max_length)
    assert launched == [True] * (slabs + 1) + [False], "the bound on lengths knows no window: one slab is empty"
    assert relative_error(out, case.want) < (3.7e-3 if INTERPRETED else 2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies no bfloat16")
@pytest.mark.parametrize("mean", [0.0, LARGE])
@pytest.mark.parametrize("slabs", [1, 8, 64])
def test_bfloat16_prefill_is_as_exact_in_many_slabs(slabs, mean, monkeypatch):
    """Against float64: the output's rounding and that of the weights of the tail, whatever the slabs.

    Keys that a large mean is given back to are rounded a second time. Sums kept in the output's dtype would show here:
    an error of 3.5e-3 for 8 slabs, 9.6e-3 for 64.
    """
    from octo_run.kernels.attention import workspace

    monkeypatch.setattr(workspace, "SLAB_BYTES", 1)
    case = make_case("octopus3", [SINK + 64 + 128 * slabs + 40], 40, 4, 2, 128, dtype=torch.bfloat16, mean=mean)
    assert relative_error(run_triton(case), case.want) < (2.5e-3 if mean else 2e-3)


@triton_only
@pytest.mark.parametrize(
    ("dim", "group"), [(36, 5), (64, 16), (80, 4), (100, 1), (120, 4), (128, 7), (256, 1), (512, 4)]
)
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16])
def test_triton_plain_decode_shapes(dim, group, dtype):
    """The interpreter multiplies the bits of bfloat16 numbers: that type is for a GPU."""
    case = make_case("bf16", [1, 450], 1, 2 * group, 2, dim, dtype=dtype)
    got = run_triton(case)
    for b in range(2):
        assert relative_error(got[b], case.want[b]) < (2e-3 if dtype == torch.float16 else 5e-3)


@triton_only
@pytest.mark.parametrize("kv", ["bf16", "octopus3"])
@pytest.mark.parametrize(("sink", "window"), [(0, 0), (4, 128), (100, 64)])
def test_triton_sinks_and_windows(kv, sink, window):
    for count in (1, 5):
        case = make_case(kv, [300, 128, 5], count, 2, 1, 64, dtype=torch.float16, sink=sink, window=window)
        got = run_triton(case)
        for b in range(3):
            assert relative_error(got[b], case.want[b]) < 2e-3


@triton_only
@pytest.mark.parametrize("kv", ["bf16", "octopus3"])
def test_triton_many_sequences_of_unequal_lengths(kv):
    lengths = [1 + (37 * n * n) % 419 for n in range(20)]
    case = make_case(kv, lengths, 1, 2, 1, 64, dtype=torch.float16)
    got = run_triton(case)
    for b in range(len(lengths)):
        assert relative_error(got[b], case.want[b]) < 2e-3, lengths[b]


@triton_only
@pytest.mark.parametrize("kinds", SPECS, ids=str)
@pytest.mark.parametrize(("kv", "mean"), [("octopus3", 0.0), ("oct3", 2.0), ("bf16", 0.0)])
@pytest.mark.parametrize("count", [1, 37])
def test_triton_windows_caps_and_sink_logits(kinds, kv, mean, count):
    """Around the edges of pages and of windows, with filler."""
    lengths = [65, 193, 0, 257, 420] if count == 1 else [37, 0, 300]
    case = make_case(kv, lengths, count, 3, 1, 64, dtype=torch.float16, mean=mean, **kinds)
    got = run_triton(case)
    for b in range(len(lengths)):
        assert relative_error(got[b], case.want[b]) < 4e-3, lengths[b]


@triton_only
@pytest.mark.parametrize("kinds", SPECS, ids=str)
@pytest.mark.parametrize("kv", ["octopus3", "bf16"])
def test_triton_windows_of_one_sequence(kinds, kv):
    """In many parts."""
    case = make_case(kv, [451], 1, 4, 1, 64, dtype=torch.float16, **kinds)
    assert relative_error(run_triton(case), case.want) < 4e-3


@triton_only
@pytest.mark.parametrize(("dim", "group"), [(64, 1), (80, 3), (96, 4), (128, 5), (256, 7), (512, 8)])
@pytest.mark.parametrize("count", [1, 5])
def test_triton_windows_of_every_shape(dim, group, count):
    for kv, dtype, bound in (("octopus3", torch.float32, 1e-5), ("oct3:bf16", torch.float16, 4e-3)):
        kinds = {"sees": 150, "cap": 2.0, "sinking": True}
        case = make_case(kv, [count, 320], count, group, 1, dim, dtype=dtype, **kinds)
        got = run_triton(case)
        for b in range(2):
            assert relative_error(got[b], case.want[b]) < bound


@triton_only
@pytest.mark.parametrize(("sink", "window"), [(0, 0), (4, 128), (100, 64)])
@pytest.mark.parametrize("sees", [3, 96, 101, 165])
def test_triton_windows_beside_other_sinks(sink, window, sees):
    for kv, count in (("bf16", 1), ("octopus3", 1), ("octopus3", 66)):
        case = make_case(kv, [count, 190, 370], count, 2, 1, 64, torch.float16, sink, window, sees=sees)
        got = run_triton(case)
        for b in range(3):
            assert relative_error(got[b], case.want[b]) < 2e-3


@triton_only
@pytest.mark.parametrize("mean", [0.0, 2.0])
@pytest.mark.parametrize("sees", [70, 200, 300])
def test_triton_windows_in_several_slabs(monkeypatch, mean, sees):
    from octo_run.kernels.attention import workspace

    monkeypatch.setattr(workspace, "SLAB_BYTES", 1)
    case = make_case("octopus3", [40, 500, 0, 333], 40, 4, 1, 64, dtype=torch.float16, mean=mean, sees=sees)
    got = run_triton(case)
    for b in range(4):
        assert relative_error(got[b], case.want[b]) < 4e-3


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies no bfloat16")
@pytest.mark.parametrize("kinds", [{"sees": 130}, {"cap": 2.0}, {"sinking": True}, SPECS[-1]], ids=str)
@pytest.mark.parametrize(("kv", "dim", "group"), [
    ("oct3", 128, 4), ("oct2", 64, 8), ("oct4", 256, 5), ("oct3", 512, 8), ("octopus3", 128, 7), ("bf16", 128, 4),
    ("bf16", 512, 3),
])  # fmt: skip
@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_bfloat16_windows_on_a_gpu(kinds, kv, dim, group, mean):
    """Every kernel, as the engine calls it; in one part and in many, with filler, then prompts."""
    for lengths, count in (([700], 1), ([65, 0, 257, 1500], 1), ([300, 0, 1000], 70)):
        case = make_case(kv, lengths, count, 2 * group, 2, dim, dtype=torch.bfloat16, mean=mean, **kinds)
        got = run_triton(case)
        for b in range(len(lengths)):
            assert relative_error(got[b], case.want[b]) < 1e-2, lengths[b]


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter records nothing")
@pytest.mark.parametrize(("kv", "dim"), [("oct3", 128), ("oct3", 512), ("octopus3", 128), ("bf16", 128)])
def test_a_recorded_step_moves_its_window(kv, dim):
    """Programs find the window from the lengths on the device: a recording serves all of them."""
    from octo_run.kernels.attention.launch import attend_triton
    from octo_run.kernels.attention.workspace import workspace_bytes

    case = make_case(kv, [1500, 1490], 1, 8, 2, dim, dtype=torch.float16, sees=200, sinking=True)
    kv_inputs = replace(case.kv, **{k: v.cuda() for k, v in vars(case.kv).items() if isinstance(v, torch.Tensor)})
    kv_inputs.page_table.clamp_(max=len(kv_inputs.pages) - 1)  # windows of shorter sequences begin earlier
    full = {name: getattr(kv_inputs, name).nan_to_num(0.5) for name in ("sink_k", "sink_v", "tail_k", "tail_v")}
    kv_inputs, q, spec = replace(kv_inputs, **full), case.q.cuda(), spec_on(case.spec, "cuda")
    workspace = torch.zeros(workspace_bytes(q.device, 2, 8, 2, dim) // 4, device="cuda")
    out = torch.full_like(q, float("nan"))

    def step():
        return attend_triton(q, kv_inputs, case.fmt, spec=spec, max_length=2048, out=out, workspace=workspace)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for starts, packed in (((1499, 1489), (21, 21)), ((700, 1300), (9, 18)), ((150, 100), (1, 0))):
        kv_inputs.starts.copy_(_integers(starts))
        kv_inputs.num_packed.copy_(_integers(packed))
        out.fill_(float("nan"))
        graph.replay()
        replayed = out.clone()
        out.fill_(float("nan"))
        assert torch.equal(replayed, step()) and bool(replayed.isfinite().all())


@triton_only
def test_triton_merges_the_parts_that_places_names():
    """Of sequences with few parts and many; of filler, whose only part has seen nothing."""
    from octo_run.kernels.attention.general.parts import merge_places_kernel

    torch.manual_seed(3)
    places = torch.tensor([[0, 3], [3, 1], [4, 70], [74, 1]], dtype=torch.int32, device=DEVICE)
    partial, lse = torch.randn(80, 3, 96, device=DEVICE), 4 * torch.randn(80, 3, device=DEVICE)
    partial[74], lse[74] = 0, -1e30
    partial[75:] = lse[75:] = float("nan")
    out = torch.full((4, 1, 3, 96), float("nan"), device=DEVICE)
    merge_places_kernel[(3, 3, 4)](PARTIAL=partial, LSE=lse, OUT=out, PLACES=places, **strides("so", out, b=0, h=2),
                                   D=96, AT_ONCE=32, COLUMNS=32, EARLY=False)  # fmt: skip
    for b, (first, parts) in enumerate(places.tolist()):
        share = (lse[first : first + parts] * torch.log(torch.tensor(2.0))).softmax(0)[..., None]
        assert torch.allclose(out[b, 0], (partial[first : first + parts] * share).sum(0), atol=1e-5)


FILLED = [0, 193, 0, 64, 450, 0, 0]


@triton_only
@pytest.mark.parametrize(
    ("kv", "dim", "group", "mean"),
    [
        ("octopus3", 64, 4, 0.0),
        ("octopus3", 80, 1, 2.0),
        ("octopus2", 128, 7, 0.0),
        ("oct3", 96, 5, 0.0),
        ("bf16", 128, 8, 0.0),
        ("bf16", 64, 4, 2.0),
        ("bf16:octopus3", 256, 4, 0.0),
    ],
)
def test_triton_leaves_filler_out(kv, dim, group, mean):
    """Filler anywhere in the batch: zeros come out, and the sequences beside it are what they are."""
    case = make_case(kv, FILLED, 1, group, 1, dim, dtype=torch.float16, mean=mean)
    got = run_triton(case)
    for b in range(len(FILLED)):
        assert relative_error(got[b], case.want[b]) < 3e-3, b
    assert not got[[not n for n in FILLED]].any()


@triton_only
@pytest.mark.parametrize("kv", ["octopus3", "bf16"])
def test_triton_takes_a_batch_of_filler(kv):
    """Alone, with a bound that divides it in parts; the rows are nobody's, full of NaN."""
    for lengths in ([0], [0, 0, 0]):
        case = make_case(kv, lengths, 1, 4, 2, 64, dtype=torch.float16)
        got = run_triton(replace(case, max_length=4096))
        assert not got.any()


@triton_only
@pytest.mark.parametrize(("kv", "mean"), [("octopus3", 0.0), ("bf16", 2.0)])
def test_triton_prefill_leaves_filler_out(kv, mean):
    lengths = [0, 37 + 200, 0, 37]
    case = make_case(kv, lengths, 37, 4, 2, 64, dtype=torch.float16, mean=mean)
    got = run_triton(case)
    for b in range(len(lengths)):
        assert relative_error(got[b], case.want[b]) < 3e-3
    assert not got[[not n for n in lengths]].any()


@triton_only
@pytest.mark.parametrize("window", [0, 100, 1000, 40000])
@pytest.mark.parametrize("seed", range(12))
def test_triton_division(seed, window):
    """Every tile belongs to one program, at most `programs` have one, and no part is much longer than the mean."""
    rng = torch.Generator().manual_seed(seed)
    batch = 1 if seed % 4 == 0 else int(torch.randint(2, 33, (), generator=rng))
    packed = (torch.rand(batch, generator=rng) ** 3 * 2000).int()
    if seed % 4 == 1:
        packed[:] = packed[0]
    programs = batch * int(torch.randint(2, 9, (), generator=rng))
    starts = SINK + 64 * packed + 99
    out = torch.full((programs, 3), -1, dtype=torch.int32, device=DEVICE)
    ask[(programs,)](out, packed.to(DEVICE), starts.to(DEVICE), torch.zeros_like(packed).to(DEVICE), SINK, 128, batch,
                     programs, 1 if batch == 1 else 32, window)  # fmt: skip
    found = [(b, part, parts) for b, part, parts in out.tolist() if parts]
    each = {b: parts for b, _, parts in found}
    assert sorted(each) == list(range(batch))
    assert sorted(found) == [(b, part, parts) for b, parts in sorted(each.items()) for part in range(parts)]
    earliest = [max(0, int(start) + 1 - window) if window else 0 for start in starts]
    # Sinks and 100 newest tokens, in a ring of 128, make at least three.
    tiles = [min(int(n), int(n) - (e - SINK) // 64) + 2 + (e < SINK) for n, e in zip(packed, earliest, strict=True)]
    longest = max(tiles[b] / parts for b, parts in each.items())
    assert longest <= -(-sum(tiles) // (programs - (batch if batch > 1 else 0))) + 1


@triton_only
@pytest.mark.parametrize(
    ("kv", "dim", "dtype"),
    [("octopus3", 64, torch.bfloat16), ("bf16", 64, torch.float16), ("bf16", 100, torch.bfloat16),
     ("bf16", 120, torch.bfloat16)],
)  # fmt: skip
def test_triton_empty_arena(kv, dim, dtype):
    dtype = torch.float16 if INTERPRETED else dtype  # the interpreter multiplies the bits of bfloat16 numbers
    case = make_case(kv, [40], 1, 2, 1, dim, dtype=dtype)
    case.kv = replace(case.kv, pages=case.kv.pages[:0])
    assert relative_error(run_triton(case), case.want) < 5e-3


@given(st.integers(1, 3000), st.integers(1, 32), st.integers(1, 2**20), st.integers(1, 8))
def test_parts_fit_the_workspace(batch, kv_heads, length, at_once):
    from octo_run.kernels.attention.parts import general_parts
    from octo_run.kernels.attention.workspace import Workspace, workspace_bytes

    meta = torch.device("meta")
    parts = general_parts(meta, batch, kv_heads, length, at_once)
    assert 1 <= parts <= max(1, -(-length // 64))
    words = workspace_bytes(meta, batch, kv_heads, kv_heads, 16) // 4
    room = Workspace.of(torch.empty(words, device=meta), batch, kv_heads, kv_heads, 16, meta)
    partial, lse = room.partials(parts * batch, kv_heads, 16)
    assert lse.numel() == parts * batch * kv_heads and partial.numel() == 16 * lse.numel()


@triton_only
def test_triton_refuses_a_small_workspace():
    from octo_run.kernels.attention.launch import attend_triton

    case = make_case("octopus3", [300], 1, 2, 1, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="workspace must be"):
        attend_triton(case.q, case.kv, case.fmt, spec=AttentionSpec(1.0), max_length=300, workspace=torch.empty(4))
    case = make_case("octopus3", [300], 1, 2, 1, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match="fp16, bf16 and fp32"):
        attend_triton(case.q, case.kv, case.fmt, spec=AttentionSpec(1.0), max_length=300)
