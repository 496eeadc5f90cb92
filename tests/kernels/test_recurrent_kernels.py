"""Gated DeltaNet: references against the recurrence in float64, Triton kernels against the references.

The Triton cases run where there is a GPU, or interpreted (see test_attention_interpreted.py).
"""

import os
import random

import pytest
import torch
import torch.nn.functional as F

from octo_run.kernels import recurrent
from octo_run.kernels.recurrent import DeltaShape, DeltaWeights, LayerState, Saving, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
triton_only = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="Triton kernels need a GPU or TRITON_INTERPRET=1"
)
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter cuts bfloat16 off instead of rounding it
BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 6e-3}
# key heads, value heads, key dim, value dim
SHAPES = [DeltaShape(1, 2, 64, 64), DeltaShape(2, 2, 128, 128), DeltaShape(1, 3, 64, 128), DeltaShape(2, 4, 48, 32)]
ROWS = 5


def close(got, want, dtype, factor=1.0):
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error < factor * BOUNDS[dtype], error


class Case:
    """Random weights, inputs and poisoned states of a shape."""

    def __init__(self, shape, tokens, dtype, seed=0, alike=False):
        torch.manual_seed(seed)
        self.shape, self.dtype = shape, dtype
        inputs = torch.randn(tokens, shape.channels + shape.values, dtype=torch.float64)
        if alike:  # one key again and again, with little decay: the systems' hardest case
            inputs[:, : shape.channels] = inputs[:1, : shape.channels] + 0.01 * inputs[:, : shape.channels]
        self.projected = inputs.to(DEVICE, dtype)
        gates = torch.randn(tokens, 2 * shape.value_heads, dtype=torch.float64)
        if alike:
            gates[:, : shape.value_heads] += 6
            gates[:, shape.value_heads :] -= 12
        self.gates = gates.to(DEVICE, dtype)
        wide = reference.wide(dtype)
        self.weights = DeltaWeights(
            shape,
            (torch.randn(shape.taps, shape.channels) * 0.5).to(DEVICE, dtype),
            -torch.rand(shape.value_heads).mul(2).exp().to(DEVICE, wide),
            torch.randn(shape.value_heads).to(DEVICE, wide),
            (1 + 0.1 * torch.randn(shape.value_dim)).to(DEVICE, dtype),
            1e-6,
        )
        self.state = self.fresh()

    def fresh(self):
        shape = self.shape
        memory = torch.full((ROWS, shape.value_heads, shape.key_dim, shape.value_dim), torch.nan)
        conv = torch.full((ROWS, shape.taps, shape.channels), torch.nan)
        return LayerState(conv.to(DEVICE, self.dtype), memory.to(DEVICE, reference.wide(self.dtype)))

    def out(self, tokens):
        return torch.full((tokens, self.shape.values), torch.nan, device=DEVICE, dtype=self.dtype)

    def exact(self, memories=None):
        """Outputs and memory after the last token, by the recurrence written down token by token, in float64; those
        before each token are appended to a list."""
        s, w = self.shape, self.weights
        x, gates = self.projected.double(), self.gates.double()
        inputs = F.pad(x[:, : s.channels], (0, 0, s.taps - 1, 0))
        memory = torch.zeros(s.value_heads, s.key_dim, s.value_dim, dtype=torch.float64, device=DEVICE)
        outs = []
        for t in range(len(x)):
            if memories is not None:
                memories.append(memory.clone())
            mixed = F.silu((inputs[t : t + s.taps] * w.conv.double()).sum(0))
            keys = s.key_heads * s.key_dim
            row = []
            for h in range(s.value_heads):
                kh = h // (s.value_heads // s.key_heads)
                q, k = (mixed[first + kh * s.key_dim :][: s.key_dim] for first in (0, keys))
                q, k = (y / (y.square().sum() + 1e-6).sqrt() for y in (q, k))
                v = mixed[2 * keys + h * s.value_dim :][: s.value_dim]
                beta = gates[t, h].sigmoid()
                fading = F.softplus(gates[t, s.value_heads + h] + w.bias[h].double())
                memory[h] *= (w.decay[h].double() * fading).exp()
                memory[h] += torch.outer(k, beta * (v - k @ memory[h]))
                o = (q * s.key_dim**-0.5) @ memory[h]
                o = o * torch.rsqrt(o.square().mean() + w.eps) * w.norm.double()
                row.append(o * F.silu(x[t, s.channels + h * s.value_dim :][: s.value_dim]))
            outs.append(torch.cat(row))
        return torch.stack(outs), memory


def run_chunks(chunk, case, lengths, row=2, savings=()):
    """Outputs of chunks of these lengths, one after the other."""
    outs, first = [], 0
    for count in lengths:
        part = slice(first, first + count)
        out = case.out(count)
        saved = [one for one in savings if first < one.position <= first + count]
        scratch = torch.full(
            (recurrent.scratch_bytes(case.shape, count, case.dtype.itemsize),), 255, dtype=torch.uint8, device=DEVICE
        )
        args = (case.projected[part].contiguous(), case.gates[part].contiguous(), case.weights, case.state, row, first)
        chunk(*args, out, scratch, saved)
        outs.append(out)
        first += count
    return torch.cat(outs)


def plain_chunk(projected, gates, weights, state, row, start, out, _scratch, savings):
    reference.chunk(projected, gates, weights, state, row, start, out, savings)


def integers(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def run_steps(step, case, tokens, row=2, first=0):
    outs = []
    for t in range(first, first + tokens):
        out = case.out(1)
        step(
            case.projected[t : t + 1],
            case.gates[t : t + 1],
            case.weights,
            case.state,
            integers([t]),
            integers([row]),
            out,
        )
        outs.append(out)
    return torch.cat(outs)


@pytest.mark.few(3)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alike", [False, True])
def test_reference_is_the_recurrence(shape, alike):
    case = Case(shape, 130, torch.float64, alike=alike)
    want, memory = case.exact()
    close(run_steps(reference.step, case, 130), want, torch.float64)
    close(case.state.memory[2], memory, torch.float64)
    assert bool(case.state.memory[[0, 1, 3, 4]].isnan().all())
    case.state = case.fresh()
    close(run_chunks(plain_chunk, case, [130]), want, torch.float64)
    close(case.state.memory[2], memory, torch.float64)


@pytest.mark.parametrize("lengths", [[1], [2, 1, 1, 3], [63, 64, 65], [64], [65, 2], [128, 1], [190, 3, 1]])
def test_reference_chunks_cut_anywhere_give_the_same_state(lengths):
    case = Case(SHAPES[0], sum(lengths) + 6, torch.float64)
    want, memory = case.exact()
    close(torch.cat((run_chunks(plain_chunk, case, lengths), run_steps(reference.step, case, 6, first=sum(lengths)))),
          want, torch.float64)  # fmt: skip
    close(case.state.memory[2], memory, torch.float64)


@pytest.mark.few(3)
@pytest.mark.parametrize("position", [1, 2, 63, 64, 100, 199, 200])
def test_reference_saves_the_state_inside_a_chunk(position):
    """Going on from it is going on from there."""
    case = Case(SHAPES[0], 210, torch.float64)
    want, _ = case.exact()
    saved = case.fresh().row(0)
    run_chunks(plain_chunk, case, [200], savings=[Saving(position, saved)])
    case.state.conv[2], case.state.memory[2] = saved.conv[0], saved.memory[0]
    close(run_steps(reference.step, case, 210 - position, first=position), want[position:], torch.float64)


def batch_step(step, case, rows, at):
    """One step of a batch at different positions, after chunks; filler's inputs are nobody's."""
    for row, position in zip(rows, at, strict=True):
        if row >= 0 and position:
            reference.chunk(case.projected[:position], case.gates[:position], case.weights, case.state, row, 0,
                            case.out(position))  # fmt: skip
    projected, gates = case.projected[at].clone(), case.gates[at].clone()
    filler = [row < 0 for row in rows]
    projected[filler], gates[filler] = torch.nan, torch.nan
    out = case.out(len(rows))
    step(projected, gates, case.weights, case.state, integers(at), integers(rows), out)
    return out


BATCHES = [([2], [0]), ([-1], [0]), ([4, -1, 0, -1, 3], [0, 0, 1, 0, 70]), ([0, 1, 2], [3, 2, 90])]


@pytest.mark.parametrize(("rows", "at"), BATCHES)
def test_reference_steps_the_rows_of_a_batch(rows, at):
    case = Case(SHAPES[2], 91, torch.float64)
    want, _ = case.exact()
    out = batch_step(reference.step, case, rows, at)
    for number, row in enumerate(rows):
        if row < 0:
            assert bool((out[number] == 0).all())
        else:
            close(out[number], want[at[number]], torch.float64)


@triton_only
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_triton_steps_the_rows_of_a_batch(shape, dtype):
    from octo_run.kernels.recurrent import launch

    for rows, at in BATCHES:
        case = Case(shape, 91, dtype)
        want = batch_step(reference.step, case, rows, at)
        kept = case.state
        case.state = case.fresh()
        got = batch_step(launch.step, case, rows, at)
        live = [number for number, row in enumerate(rows) if row >= 0]
        assert bool((got[[row < 0 for row in rows]] == 0).all())
        if live:
            close(got[live], want[live], dtype)
        for ours, theirs in zip((case.state.conv, case.state.memory), (kept.conv, kept.memory), strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan())
            if live:
                close(ours.nan_to_num(), theirs.nan_to_num(), dtype)


@triton_only
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_triton_chunks(shape, dtype):
    from octo_run.kernels.recurrent import launch

    for lengths in ([1], [2, 65], [64], [63, 70]):
        case = Case(shape, sum(lengths), dtype)
        want, memory = case.exact()
        got = run_chunks(launch.chunk, case, lengths)
        close(got, want, dtype)
        close(case.state.memory[2], memory, dtype)
        assert bool(case.state.memory[[0, 1, 3, 4]].isnan().all() and case.state.conv[[0, 1, 3, 4]].isnan().all())


@triton_only
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_triton_chunks_of_tokens_alike(dtype):
    """One key for all tokens, hardly any decay: the systems are full of ones."""
    from octo_run.kernels.recurrent import launch

    case = Case(SHAPES[0], 70, dtype, alike=True)
    want, memory = case.exact()
    close(run_chunks(launch.chunk, case, [70]), want, dtype, 4)
    close(case.state.memory[2], memory, dtype, 4)


@triton_only
@pytest.mark.parametrize("position", [1, 3, 64, 70, 100])
def test_triton_saves_the_state_inside_a_chunk(position):
    from octo_run.kernels.recurrent import launch

    saves = []
    for run in (launch.chunk, plain_chunk):
        case = Case(SHAPES[0], 100, torch.float32)
        saved = case.fresh().row(0)
        run_chunks(run, case, [100], savings=[Saving(position, saved)])
        slots = torch.arange(max(0, position - case.shape.taps), position) % case.shape.taps
        saves.append((saved.memory, saved.conv[:, slots], case.state.memory[2], case.state.conv[2]))
    for ours, theirs in zip(*saves, strict=True):
        close(ours, theirs, torch.float32)


SEVERAL = [
    (0, [64, 128, 192]), (0, [128]), (37, [101, 165]), (37, [165, 229]), (64, [128, 256]), (37, [64, 128]),
    (100, [128, 192, 320]), (0, [1, 65, 257]), (64, [127, 191]), (100, [360]),
]  # fmt: skip


@pytest.mark.few(3)
@pytest.mark.parametrize(("start", "positions"), SEVERAL)
def test_saving_several_states_changes_nothing(start, positions):
    """The output and the last state are those of a chunk that saves the last of them, to the bit; so is each state."""
    check_several(plain_chunk, start, positions)


@triton_only
@pytest.mark.few(2)
@pytest.mark.parametrize(("start", "positions"), SEVERAL)
def test_triton_saves_several_states(start, positions):
    from octo_run.kernels.recurrent import launch

    check_several(launch.chunk, start, positions)


@pytest.mark.few(6)
@pytest.mark.parametrize("seed", range(24))
def test_states_are_saved_anywhere(seed):
    check_anywhere(plain_chunk, seed, torch.float64, 420)


@triton_only
@pytest.mark.few(2)
@pytest.mark.parametrize("seed", range(6))
def test_triton_saves_states_anywhere(seed):
    from octo_run.kernels.recurrent import launch

    check_anywhere(launch.chunk, seed, torch.float32, 200)


def check_anywhere(run, seed, dtype, tokens):
    """Chunks of any lengths of two sequences by turns, whose states are saved at block edges of any alignment, those
    behind the first and the last token among them: every output, every state saved and every state left is that of the
    recurrence, and no other place is touched."""
    source = random.Random(seed)
    shape, rows = SHAPES[(3, 0, 2, 1)[seed % 4]], source.sample(range(ROWS), 2)
    cases = [Case(shape, tokens, dtype, seed=2 * seed + number) for number in range(2)]
    shared, saves = cases[0].fresh(), cases[0].fresh()
    at, outs, exact = [0, 0], [[], []], []
    for case in cases:
        case.state = shared
        memories = []
        out, last = case.exact(memories)
        exact.append((out, [*memories, last]))
    while min(at) < tokens:
        one = source.choice([number for number in range(2) if at[number] < tokens])
        case, row, start = cases[one], rows[one], at[one]
        count = min(source.choice([1, 2, source.randrange(1, 64), 64, source.randrange(64, 300), 300]), tokens - start)
        aligned = source.choice([0, start % 64, (start + count) % 64, source.randrange(64)])
        places = [position for position in range(start + 1, start + count + 1) if position % 64 == aligned]
        places = sorted(source.sample(places, source.randrange(min(len(places), ROWS) + 1)))
        saves.memory.fill_(torch.nan)
        saves.conv.fill_(torch.nan)
        savings = [Saving(position, saves.row(place)) for place, position in enumerate(places)]
        part, out = slice(start, start + count), case.out(count)
        size = recurrent.scratch_bytes(shape, count, dtype.itemsize)
        scratch = torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)
        run(case.projected[part].contiguous(), case.gates[part].contiguous(), case.weights, shared, row, start, out,
            scratch, savings)  # fmt: skip
        outs[one].append(out)
        at[one] += count
        for place, position in enumerate(places):
            close(saves.memory[place], exact[one][1][position], dtype)
            for back in range(1, min(shape.taps, position) + 1):
                kept = saves.conv[place, (position - back) % shape.taps]
                assert torch.equal(kept, case.projected[position - back, : shape.channels]), (position, back)
        assert bool(saves.memory[len(places) :].isnan().all() and saves.conv[len(places) :].isnan().all())
        close(shared.memory[row], exact[one][1][at[one]], dtype)
    for found, (want, _) in zip(outs, exact, strict=True):
        close(torch.cat(found), want, dtype)
    others = [row for row in range(ROWS) if row not in rows]
    assert bool(shared.memory[others].isnan().all() and shared.conv[others].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_of_the_scratch_memory_lie_where_vectors_may(shape, dtype):
    """Wherever they lay, the scan was compiled for scalar reads, and its results were wrong (Triton 3.6, sm_90)."""
    from octo_run.kernels.recurrent import launch

    for count in (1, 2, 3, 63, 64, 65, 127):
        scratch = torch.zeros(recurrent.scratch_bytes(shape, count, dtype.itemsize), dtype=torch.uint8)
        parts = launch._carved(scratch, shape, count, dtype)
        for number, part in enumerate(parts):
            assert (part.data_ptr() - scratch.data_ptr()) % 16 == 0
            part.fill_(number + 1)
        for number, part in enumerate(parts):
            assert bool((part == number + 1).all()), "parts do not overlap"


@pytest.mark.parametrize("positions", [[0], [9], [10, 10], [10, 73], [138, 74], [211], [83, 211]])
def test_states_that_cannot_be_saved(positions):
    """Before the chunk's second token, twice at one place or in one block, not in order, behind the chunk."""
    case = Case(SHAPES[0], 210, torch.float32)
    savings = [Saving(position, case.fresh().row(0)) for position in positions]
    scratch = torch.empty(recurrent.scratch_bytes(case.shape, 201, 4), dtype=torch.uint8, device=DEVICE)
    args = case.projected[9:], case.gates[9:], case.weights, case.state, 2, 9, case.out(201), scratch, savings
    with pytest.raises(ValueError, match="states cannot be saved at"):
        recurrent.chunk(*args)


def check_several(run, start, positions):
    found = []
    for several in (positions, *([position] for position in positions)):
        case = Case(SHAPES[0], start + 260, torch.float32)
        saved = [case.fresh().row(0) for _ in several]
        lengths = [start, 260] if start else [260]
        out = run_chunks(run, case, lengths, savings=list(map(Saving, several, saved)))
        found.append((out[start:], case.state.memory[2], case.state.conv[2], saved))
    (out, memory, conv, saved), *alone = found
    for position, one, (same_out, same_memory, same_conv, (same,)) in zip(positions, saved, alone, strict=True):
        assert torch.equal(out, same_out) and torch.equal(memory, same_memory) and torch.equal(conv, same_conv), (
            position
        )
        assert torch.equal(one.memory, same.memory), position
        assert torch.equal(one.conv.nan_to_num(), same.conv.nan_to_num()), position  # slots of nobody
