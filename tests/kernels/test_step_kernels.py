"""The small operations of a step: references against the decoder's own, Triton kernels against the references.

The Triton cases run where there is a GPU, or interpreted (see test_attention_interpreted.py).
"""

import os
from dataclasses import replace

import pytest
import torch

from octo_run.kernels import step as ops
from octo_run.kernels.attention import key_mean
from octo_run.kernels.codec.rotation import rotation_matrix
from octo_run.kernels.step import reference
from octo_run.kernels.step.reference import normed as rms_norm
from octo_run.models import rope

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
triton_only = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="Triton kernels need a GPU or TRITON_INTERPRET=1"
)
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter cuts bfloat16 off instead of rounding it
SHAPES = [(1, 6, 2, 128, False), (3, 7, 1, 64, True), (5, 32, 8, 80, True), (2, 4, 4, 256, False)]


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape) * scale).to(device=DEVICE, dtype=dtype)


def close(got, want, dtype):
    bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error < bound, error


def integers(values):
    return torch.tensor(values, dtype=torch.int32).to(DEVICE)


def turn(rows, d, normed, rotated, dtype, v_rotated=False, kv_heads=None):
    """`kv_heads`: each has maps and a mean of its own."""
    positions = torch.randint(0, 5000, (rows,)).to(DEVICE)
    inv_freq = (1e4 ** -(torch.arange(0, d, 2) / d)).to(DEVICE)
    cos, sin = rope.cos_sin(positions, inv_freq, dtype)
    norms = [1 + random(d, dtype=dtype, scale=0.1) for _ in range(2)] if normed else [None, None]
    maps, mean = None, None
    if kv_heads is not None:
        maps = random(2, kv_heads, d, d, dtype=dtype, scale=d**-0.5) if rotated else None
        mean = random(kv_heads, d)
    elif rotated:
        maps = rotation_matrix(d, 0).to(device=DEVICE, dtype=dtype).T.contiguous().expand(2, 64, -1, -1)
    v_rotation = rotation_matrix(d, 1).to(device=DEVICE, dtype=dtype).T.contiguous() if v_rotated else None
    return ops.HeadTransform(cos.contiguous(), sin.contiguous(), *norms, 1e-5, maps, v_rotation, mean)


def append(run, qkv, how, heads, kv_heads, d, rows=None):
    """What ``run`` writes: queries, keys, values, those of filler 7; every other element stays 7."""
    batch = len(qkv)
    torch.manual_seed(3)
    slots = torch.randint(0, 9, (batch,), dtype=torch.int32).to(DEVICE)
    full = torch.full((2, 3, batch + 2, kv_heads, 9, d), 7.0, dtype=qkv.dtype, device=DEVICE)[:, 1]
    q = torch.full((batch, 1, heads, d), torch.nan, dtype=qkv.dtype, device=DEVICE)
    run(qkv, how, slots, full[0], full[1], q, *(() if rows is None else (integers(rows),)))
    places = list(range(batch) if rows is None else rows)
    live = [row >= 0 for row in places]
    picked = torch.stack([full[:, row, :, slot] for row, slot in zip(places, slots.tolist(), strict=True)])
    picked[[not one for one in live]] = 7
    assert int((full != 7).any(-1).sum()) == 2 * sum(live) * kv_heads
    return q, picked[:, 0], picked[:, 1]


@pytest.mark.parametrize(("rows", "heads", "kv_heads", "d", "normed"), SHAPES)
@pytest.mark.parametrize("rotated", [False, True])
def test_reference_of_queries_keys_values(rows, heads, kv_heads, d, normed, rotated):
    torch.manual_seed(0)
    qkv = random(rows, (heads + 2 * kv_heads) * d)
    how = turn(rows, d, normed, rotated, torch.float32)
    q, k, v = append(reference.qkv_rope_append, qkv, how, heads, kv_heads, d)
    parts = list(qkv.view(rows, 1, -1, d).split([heads, kv_heads, kv_heads], dim=2))
    if normed:
        parts[:2] = rms_norm(parts[0], how.q_norm, 1e-5), rms_norm(parts[1], how.k_norm, 1e-5)
    parts[:2] = (rope.apply(x, how.cos[:, None], how.sin[:, None]) for x in parts[:2])
    if rotated:
        parts[:2] = parts[0] @ how.maps[0, 0], parts[1] @ how.maps[0, 0]
    for got, want in zip((q[:, 0], k, v), parts, strict=True):
        torch.testing.assert_close(got, want[:, 0])


def test_reference_appends_to_the_rows_of_a_batch():
    """Each sequence's key and value go to its row; filler's go nowhere; values are rotated where no weight does it."""
    torch.manual_seed(0)
    qkv = random(5, 8 * 64)
    how = turn(5, 64, True, True, torch.float32, v_rotated=True)
    q, k, v = append(reference.qkv_rope_append, qkv, how, 4, 2, 64)
    rows = [6, -1, 0, -1, 3]
    moved = append(reference.qkv_rope_append, qkv, how, 4, 2, 64, rows)
    assert torch.equal(moved[0], q)
    for got, want in zip(moved[1:], (k, v), strict=True):
        assert torch.equal(got[[0, 2, 4]], want[[0, 2, 4]]) and bool((got[[1, 3]] == 7).all())
    torch.testing.assert_close(v, qkv.view(5, 8, 64)[:, 6:] @ how.v_rotation)
    mixed, out = random(3, 4 * 64), torch.full((3, 4 * 64), torch.nan, device=DEVICE)
    turned = (mixed.view(3, 4, 64) @ how.v_rotation).flatten(1)
    reference.rotate_back(turned, how.v_rotation, out)
    torch.testing.assert_close(out, mixed)


def test_reference_of_norms_and_products():
    torch.manual_seed(0)
    x, residual, weight, out = random(3, 48), random(3, 48), random(48), random(3, 48)
    reference.add_rms_norm(x, None, weight, 1e-5, out)
    assert torch.equal(out, rms_norm(x, weight, 1e-5))
    before = residual.clone()
    reference.add_rms_norm(x, residual, weight, 1e-5, out)
    assert torch.equal(residual, before + x) and torch.equal(out, rms_norm(before + x, weight, 1e-5))
    reference.swiglu(torch.cat((x, residual), 1), out)
    torch.testing.assert_close(out, torch.nn.functional.silu(x) * residual)
    reference.embed(torch.tensor([2, 0], device=DEVICE, dtype=torch.int32), x, out[:2])
    assert torch.equal(out[:2], x[[2, 0]])


@triton_only
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "d", "normed"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("rotated", [False, True])
def test_triton_queries_keys_values(rows, heads, kv_heads, d, normed, dtype, rotated):
    from octo_run.kernels.step import launch

    torch.manual_seed(0)
    qkv = random(rows, (heads + 2 * kv_heads) * d, dtype=dtype)
    how = turn(rows, d, normed, rotated, dtype)
    got = append(launch.qkv_rope_append, qkv, how, heads, kv_heads, d)
    want = append(reference.qkv_rope_append, qkv, how, heads, kv_heads, d)
    for ours, theirs in zip(got, want, strict=True):
        close(ours, theirs, dtype)
    assert torch.equal(got[2], want[2])


@triton_only
@pytest.mark.parametrize(("heads", "kv_heads", "d", "normed"), [(6, 2, 128, False), (7, 1, 64, True), (32, 8, 80, True),
                                                               (4, 4, 256, False)])  # fmt: skip
@pytest.mark.parametrize(("rotated", "v_rotated"), [(False, False), (True, False), (False, True), (True, True)])
def test_triton_appends_to_the_rows_of_a_batch(heads, kv_heads, d, normed, rotated, v_rotated):
    from octo_run.kernels.step import launch

    torch.manual_seed(0)
    for rows in ([2], [-1], [6, -1, 0, -1, 3], [0, 1, 2], None):
        batch = 4 if rows is None else len(rows)
        qkv = random(batch, (heads + 2 * kv_heads) * d, dtype=HALF)
        if rows is not None:
            qkv[[row < 0 for row in rows]] = torch.nan  # filler's states are nobody's
        how = turn(batch, d, normed, rotated, HALF, v_rotated)
        got = append(launch.qkv_rope_append, qkv, how, heads, kv_heads, d, rows)
        want = append(reference.qkv_rope_append, qkv, how, heads, kv_heads, d, rows)
        live = list(range(batch)) if rows is None else [b for b, row in enumerate(rows) if row >= 0]
        for ours, theirs in zip(got, want, strict=True):
            if live:
                close(ours[live], theirs[live], HALF)
        assert v_rotated or torch.equal(got[2], want[2])


@triton_only
@pytest.mark.parametrize(("heads", "kv_heads", "d", "normed"), [(6, 2, 128, False), (7, 1, 64, True), (40, 2, 80, True),
                                                               (4, 4, 96, False)])  # fmt: skip
@pytest.mark.parametrize("mapped", [False, True])
def test_triton_maps_heads_and_finds_coefficients(heads, kv_heads, d, normed, mapped):
    """Each KV head has its own maps; the coefficients are those of queries before their map."""
    from octo_run.kernels.step import launch

    torch.manual_seed(0)
    for rows in (1, 5, 37):
        qkv = random(rows, (heads + 2 * kv_heads) * d, dtype=HALF)
        how = turn(rows, d, normed, mapped, HALF, kv_heads=kv_heads)
        slots, found = integers(range(rows)), []
        for run in (launch.qkv_rope_append, reference.qkv_rope_append):
            full = torch.full((2, 1, kv_heads, rows, d), torch.nan, dtype=HALF, device=DEVICE)
            q = torch.full((rows, 1, heads, d), torch.nan, dtype=HALF, device=DEVICE)
            coefficients = torch.full(q.shape, torch.nan, device=DEVICE)
            run(qkv, how, slots, *full, q, 0 * slots, coefficients)
            found.append((q, full[0], full[1], coefficients))
        for ours, theirs in zip(*found, strict=True):
            close(ours, theirs, HALF)
        plain = turn(rows, d, normed, False, HALF)
        plain = replace(plain, cos=how.cos, sin=how.sin, q_norm=how.q_norm, k_norm=how.k_norm)
        reference.qkv_rope_append(qkv, plain, slots, *full, q, 0 * slots)
        close(found[0][3], key_mean.coefficients(q, how.mean), HALF)
        if mapped:
            group = heads // kv_heads
            want = torch.stack([q[:, 0, h].double() @ how.maps[0, h // group].double() for h in range(heads)], 1)
            close(found[0][0][:, 0], want, HALF)
            want = torch.stack([full[0][0, h].double() @ how.maps[1, h].double() for h in range(kv_heads)])
            close(found[0][1][0], want, HALF)


@triton_only
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", [(1, 96), (3, 1500), (2, 1024)])
def test_triton_gates(shape, dtype):
    from octo_run.kernels.step import launch

    x, gates = random(*shape, dtype=dtype), random(*shape, dtype=dtype, scale=4)
    want = x.clone()
    reference.gate(want, gates)
    close(want, x.double() * gates.double().sigmoid(), dtype)
    launch.gate(x, gates)
    close(x, want, dtype)


@triton_only
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [1, 7, 40])
def test_triton_rotates_back(d, heads):
    from octo_run.kernels.step import launch

    torch.manual_seed(0)
    for dtype in (torch.float32, HALF):
        mixed, rotation = random(3, heads * d, dtype=dtype), rotation_matrix(d, 1).to(device=DEVICE, dtype=dtype)
        out = torch.full_like(mixed, torch.nan)
        launch.rotate_back(mixed, rotation.contiguous(), out)
        close(out, (mixed.double().view(3, heads, d) @ rotation.double().T).flatten(1), dtype)


@triton_only
def test_triton_refuses_rows_of_another_batch():
    from octo_run.kernels.step import launch

    def run(*given):
        launch.qkv_rope_append(*given[:-1], given[-1][:2])

    with pytest.raises(ValueError, match="rows must be of the shape of slots"):
        append(run, random(3, 8 * 64), turn(3, 64, False, False, torch.float32), 4, 2, 64, [0, 1, 2])


@triton_only
@pytest.mark.parametrize("width", [48, 384, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, HALF])
def test_triton_norms_and_swiglu(width, dtype):
    from octo_run.kernels.step import launch

    torch.manual_seed(0)
    x, weight = random(3, width, dtype=dtype), random(width, dtype=dtype)
    for residual in (None, random(3, width, dtype=dtype)):
        outs, sums = [torch.full_like(x, torch.nan) for _ in range(2)], []
        for out, run in zip(outs, (launch.add_rms_norm, reference.add_rms_norm), strict=True):
            sums.append(None if residual is None else residual.clone())
            run(x, sums[-1], weight, 1e-5, out)
        close(outs[0], outs[1], dtype)
        assert residual is None or torch.equal(sums[0], sums[1])
    gate_up = random(3, 2 * width, dtype=dtype, scale=4)
    for activation in ("silu", "gelu_tanh"):
        for out, run in zip(outs, (launch.swiglu, reference.swiglu), strict=True):
            run(gate_up, out.fill_(torch.nan), activation)
        close(outs[0], outs[1], dtype)


@triton_only
@pytest.mark.parametrize("width", [48, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_triton_norms_of_other_kinds(width, dtype, wide, centred):
    """A norm of what is added, a multiplier, LayerNorms, weights in float32; without a norm of the sum."""
    from octo_run.kernels.step import launch

    torch.manual_seed(0)
    x, before = random(3, width, dtype=dtype) + 1, random(3, width, dtype=dtype)
    weight, post = (1 + random(width, dtype=torch.float32 if wide else dtype, scale=0.3) for _ in range(2))
    for of_sum, of_x, multiplier in (
        (weight, post, 0.22),
        (weight, None, 0.22),
        (weight, post, 1.0),
        (None, post, 1.0),
    ):
        found = []
        for run in (launch.add_rms_norm, reference.add_rms_norm):
            out, residual = torch.full_like(x, 7), before.clone()
            run(x, residual, of_sum, 1e-5, out, of_x, multiplier, centred)
            found.append((out, residual))
        close(found[0][0], found[1][0], dtype)
        close(found[0][1], found[1][1], dtype)
        assert of_sum is not None or bool((found[0][0] == 7).all())


@triton_only
@pytest.mark.parametrize("wide", [False, True])
def test_triton_norm_over_all_heads(wide):
    from octo_run.kernels.step import launch

    torch.manual_seed(0)
    rows, weight = random(3, 500, dtype=HALF), 1 + random(200, dtype=torch.float32 if wide else HALF, scale=0.3)
    ours, theirs = rows.clone(), rows.clone()
    launch.norm_heads(ours[:, 60:260], weight, 1e-5)
    reference.norm_heads(theirs[:, 60:260], weight, 1e-5)
    close(ours[:, 60:260], theirs[:, 60:260], HALF)
    assert torch.equal(ours[:, :60], rows[:, :60]) and torch.equal(ours[:, 260:], rows[:, 260:])
    with pytest.raises(ValueError, match="rows of x must be contiguous"):
        launch.norm_heads(rows.T[:200].T[:, ::2], weight[:100], 1e-5)


@triton_only
@pytest.mark.parametrize(("rotated", "v_rotated"), [(False, False), (True, True)])
@pytest.mark.parametrize("d", [64, 80, 256])
def test_triton_scales_queries_and_norms_values(d, rotated, v_rotated):
    """Queries times a factor of their position, values with a norm, norms whose weights are float32."""
    from octo_run.kernels.step import launch

    torch.manual_seed(0)
    heads, kv_heads, rows = 6, 2, 5
    qkv = random(rows, (heads + 2 * kv_heads) * d, dtype=HALF)
    how = turn(rows, d, True, False, HALF, v_rotated, kv_heads=kv_heads)
    maps = turn(rows, d, True, True, HALF, kv_heads=kv_heads).maps if rotated else None
    how = replace(
        how, q_norm=how.q_norm.float() + 1e-4, k_norm=how.k_norm.float() - 1e-4, maps=maps,
        queries=0.5 + torch.rand(rows).to(DEVICE), v_norm=True,
    )  # fmt: skip
    slots, found = integers(range(rows)), []
    for run in (launch.qkv_rope_append, reference.qkv_rope_append):
        full = torch.full((2, 1, kv_heads, rows, d), torch.nan, dtype=HALF, device=DEVICE)
        q = torch.full((rows, 1, heads, d), torch.nan, dtype=HALF, device=DEVICE)
        coefficients = torch.full(q.shape, torch.nan, device=DEVICE)
        run(qkv, how, slots, *full, q, 0 * slots, coefficients)
        found.append((q, full[0], full[1], coefficients))
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs, HALF)


@pytest.mark.parametrize("biased", [False, True])
def test_products(biased):
    torch.manual_seed(0)
    x, weight, bias = random(3, 96), random(40, 96), random(40)
    out = torch.full((3, 40), torch.nan, device=DEVICE)
    ops.linear(x, weight, bias if biased else None, out)
    close(out, x.double() @ weight.double().T + (bias.double() if biased else 0), torch.float32)


@triton_only
@pytest.mark.parametrize(("n", "k"), [(40, 96), (7, 1000), (3, 4500)])
@pytest.mark.parametrize("biased", [False, True])
def test_triton_products_of_a_vector(n, k, biased):
    from octo_run.kernels.step import launch

    torch.manual_seed(0)
    x, weight, bias = random(1, k, dtype=HALF), random(n, k, dtype=HALF), random(n, dtype=HALF, scale=30)
    out = torch.full((1, n), torch.nan, dtype=HALF, device=DEVICE)
    launch.vector(x, weight, bias if biased else None, out)
    close(out, x.double() @ weight.double().T + (bias.double() if biased else 0), HALF)


def draws(batch, vocab, **changes):
    """Rules of a batch: the first sequence greedy, all penalised for some tokens."""
    state = ops.Draws(
        rows=torch.arange(batch, dtype=torch.int32, device=DEVICE),
        temperature=torch.tensor([0.0, 1e-38, 0.5, 1e30, 1.0][:batch], device=DEVICE),
        penalties=torch.tensor(
            [[1.3, 1.0, 0.7, 1.2, 1.1], [0.0, 1.5, 0.0, -0.5, 0.25], [0.0, 0.0, 0.75, 0.5, -0.125]], device=DEVICE
        )[:, :batch].contiguous(),
        seeds=torch.tensor([5, -6, 7, 8, 2**62][:batch], device=DEVICE),
        counters=torch.tensor([0, 1, 2**40, 3, 4][:batch], device=DEVICE),
        counts=(torch.arange(batch * vocab, device=DEVICE).view(batch, vocab) % 6).int(),
        slices=torch.full((batch, 4, -(-vocab // ops.SLICE_TOKENS)), torch.nan, device=DEVICE),
        tokens=torch.full((batch,), -1, dtype=torch.int32, device=DEVICE),
        logprobs=torch.full((batch,), torch.nan, device=DEVICE),
    )
    return replace(state, **changes)


ROWS = [5, -1, 2, -1, 6]  # of seven


def draws_of_rows(vocab, **changes):
    """A batch with filler in the midst: its rows hold what the sequences of `draws` hold, other rows other things."""
    plain = draws(5, vocab)
    counts = torch.full((7, vocab), 99, dtype=torch.int32, device=DEVICE)
    counts[[5, 2, 6]] = plain.counts[[0, 2, 4]]
    results = {"tokens": integers([-1] * 7), "logprobs": torch.full((7,), torch.nan, device=DEVICE)}
    return replace(plain, rows=integers(ROWS), counts=counts, **results, **changes)


def check_draws_of_rows(run, vocab, floored):
    """`run` draws for each row what it draws for the sequence alone, and touches nothing of filler or other rows."""
    torch.manual_seed(0)
    logits = random(5, vocab, scale=3)
    floor = logits.sort(descending=True).values[:, 9].contiguous() if floored else None
    beside = logits.clone()
    beside[1], beside[3] = torch.nan, -torch.inf  # filler's logits are nobody's
    for counted, noisy in ((False, False), (True, False), (True, True)):
        state, alone = draws_of_rows(vocab, counted=counted, noisy=noisy), draws(5, vocab, counted=counted, noisy=noisy)
        before = state.counts.clone()
        for _ in range(3):
            run(state, beside, floor)
            run(alone, logits, floor)
        live = [0, 2, 4]
        for name in ("tokens", "logprobs", "counts"):
            assert torch.equal(getattr(state, name)[[5, 2, 6]], getattr(alone, name)[live]), name
        assert torch.equal(state.counters[live], alone.counters[live])
        assert state.counters[[1, 3]].tolist() == [1, 3], "filler draws nothing"
        others = [0, 1, 3, 4]
        assert state.tokens[others].tolist() == [-1] * 4 and bool(state.logprobs[others].isnan().all())
        assert torch.equal(state.counts[others], before[others])


@pytest.mark.parametrize("floored", [False, True])
def test_reference_samples_the_rows_of_a_batch(floored):
    check_draws_of_rows(reference.sample, 2048, floored)


@triton_only
@pytest.mark.parametrize("vocab", [50, 2048, 5001])
@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize(("counted", "noisy", "floored"), [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 1), (0, 1, 1)])
def test_triton_samples(vocab, counted, noisy, floored, edited):
    from octo_run.kernels.step import launch

    torch.manual_seed(0)
    logits = random(5, vocab, scale=3)
    floor = logits.sort(descending=True).values[:, 9].contiguous() if floored else None
    changes = {"counted": bool(counted), "noisy": bool(noisy)}
    if edited:
        edits = random(5, vocab, scale=2)
        edits[:, ::3] = -torch.inf
        changes["edits"] = edits.contiguous()
    states = [draws(5, vocab, **changes) for _ in range(2)]
    for _ in range(4):
        for state, run in zip(states, (launch.sample, reference.sample), strict=True):
            run(state, logits, floor)
        ours, theirs = states
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=2e-5, rtol=1e-5)
        assert torch.equal(ours.counters, theirs.counters) and torch.equal(ours.counts, theirs.counts)


@triton_only
@pytest.mark.parametrize("vocab", [50, 5001])
@pytest.mark.parametrize("floored", [False, True])
def test_triton_samples_the_rows_of_a_batch(vocab, floored):
    from octo_run.kernels.step import launch

    check_draws_of_rows(launch.sample, vocab, floored)


@triton_only
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_triton_samples_of_broken_logits_show_it(bad):
    from octo_run.kernels.step import launch

    logits = random(2, 3000)
    logits[1, 2500] = bad
    state = draws(2, 3000)
    launch.sample(state, logits, None)
    assert bool(state.logprobs[0].isfinite()) and not bool(state.logprobs[1].isfinite())


@triton_only
def test_launchers_refuse_strided_inputs():
    from octo_run.kernels.step import launch

    x = random(4, 64)
    with pytest.raises(ValueError, match="x must be contiguous"):
        launch.add_rms_norm(x[:, ::2], None, x[0, :32], 1e-5, x[:, :32].contiguous())


def packed_table(vocab: int, width: int):
    from octo_run.kernels.linear import pack

    torch.manual_seed(0)
    codes = torch.randint(0, 256, (vocab, width), dtype=torch.uint8, device=DEVICE)
    return pack("int8", codes, width, torch.rand(vocab, device=DEVICE) / 100), codes.view(torch.int8)


@pytest.mark.parametrize("width", [48, 384, 1100])
def test_reference_of_a_packed_embedding(width):
    table, codes = packed_table(50, width)
    ids, out = (
        torch.tensor([2, 49, 2], device=DEVICE, dtype=torch.int32),
        torch.full((3, width), torch.nan, device=DEVICE),
    )
    reference.embed(ids, table, out)
    assert torch.equal(out, codes[ids].float() * table.rows[ids, None])


@triton_only
@pytest.mark.parametrize("width", [48, 384, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, HALF])
def test_triton_packed_embedding(width, dtype):
    from octo_run.kernels.step import launch

    table, _codes = packed_table(50, width)
    ids = torch.tensor([2, 49, 0, 2], device=DEVICE, dtype=torch.int32)
    out, want = (torch.full((4, width), torch.nan, device=DEVICE, dtype=dtype) for _ in range(2))
    for scale in (1.0, 3.140625):
        launch.embed_packed(ids, table, out.fill_(torch.nan), scale)
        reference.embed(ids, table, want, scale)
        assert torch.equal(out, want) and bool(out.isfinite().all())
    wrong = replace(table, kind="fp8")
    with pytest.raises(ValueError, match="an embedding is packed as int8"):
        launch.embed_packed(ids, wrong, out)


@triton_only
@pytest.mark.parametrize("width", [48, 384, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, HALF])
@pytest.mark.parametrize("scale", [1.0, 3.140625])
def test_triton_embedding(width, dtype, scale):
    from octo_run.kernels.step import launch

    table, out = random(50, width, dtype=dtype), torch.full((4, width), torch.nan, device=DEVICE, dtype=dtype)
    for ids in (integers([2, 49, 0, 2]), integers([2, 49, 0, 2]).long()):
        want = torch.empty_like(out)
        launch.embed(ids, table, out.fill_(torch.nan), scale)
        reference.embed(ids, table, want, scale)
        close(out, want, dtype) if scale != 1.0 else torch.testing.assert_close(out, want, rtol=0, atol=0)


@triton_only
@pytest.mark.parametrize(("rows", "half"), [(1, 64), (5, 40), (300, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("factor", [1.0, 1.3465735])
def test_triton_angles(rows, half, dtype, factor):
    """Positions to a million; frequencies of 0 turn nothing, and have no factor."""
    from octo_run.kernels.step import launch

    torch.manual_seed(0)
    positions = torch.randint(0, 1 << 20, (rows,), dtype=torch.int32).to(DEVICE)
    inv_freq = torch.cat((5e5 ** -(torch.arange(half - 7) / half), torch.zeros(7))).to(DEVICE)
    found, want = ([torch.full((rows, half), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)] for _ in "12")
    launch.angles(positions, inv_freq, factor, *found)
    reference.angles(positions, inv_freq, factor, *want)
    exact = (positions.float()[:, None] * inv_freq).double()
    factors = torch.where(inv_freq > 0, factor, 1.0)
    for ours, theirs, true in zip(found, want, (exact.cos() * factors, exact.sin() * factors), strict=True):
        bound = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
        assert float((ours.double() - true).abs().max()) < bound
        assert float((theirs.double() - true).abs().max()) < bound
    assert bool((found[0][:, -7:] == 1).all()) and bool((found[1][:, -7:] == 0).all())


@triton_only
@pytest.mark.parametrize("count", [1, 3, 40])
def test_triton_moves_on(count):
    """Through sinks and round the ring, as the reference and by the definition; filler stays."""
    from octo_run.kernels.step import launch

    sink, ring = 4, 6
    active = integers([int(n % 3 != 1) for n in range(count)])
    states = [[integers(range(count)), torch.full((count,), -7, dtype=torch.int32, device=DEVICE)] for _ in "12"]
    for step in range(1, 15):
        for (positions, places), run in zip(states, (launch.move_on, reference.move_on), strict=True):
            run(positions, places, active, sink, ring)
        now = [n + step * int(n % 3 != 1) for n in range(count)]
        for positions, places in states:
            assert positions.tolist() == now
            assert places.tolist() == [p if p < sink else (p - sink) % ring + sink for p in now]
