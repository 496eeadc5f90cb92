"""Routed experts: the reference against float64; the Triton kernels, in the interpreter or on a GPU, likewise."""

import os
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octo_run.kernels import experts as routed
from octo_run.kernels.experts import ACTIVATIONS, Activation, ExpertWeights, Scratch, reference
from octo_run.kernels.linear import PackedWeight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
made = runpy.run_path(str(Path(__file__).parent / "packed_weights.py"))["made"]
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="Triton kernels need a GPU or TRITON_INTERPRET=1"
)
#: Kinds of codes with the columns of a group.
PACKED = (("int4", 64), ("int4", 128), ("int8", None), ("fp8", None), ("fp4", 32), ("fp4", 16))


class Layer:
    """A layer of random experts, its inputs, and all in float64."""

    def __init__(
        self, rows: int, *, experts: int = 6, chosen: int = 2, hidden: int = 72, inner: int = 40, packed: Any = None,
        biased: bool = False, activation: str = "silu", shared: bool = False, dtype: torch.dtype = torch.float32,
        seed: int = 0, favourite: int | None = None,
    ) -> None:  # fmt: skip
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=random) * scale).to(dtype)

        def matrix(out: int, columns: int, number: int) -> Tensor | PackedWeight:
            if packed is None:
                return normal(out, columns, scale=columns**-0.5)
            kind, group = packed
            weight: PackedWeight = made(kind, out, columns, group, True, seed + number)
            return replace(weight, rows=weight.rows / float(weight.dequantised().std()) * columns**-0.5)

        self.x, self.normalised = normal(rows, hidden), bool(seed % 2)
        self.router = normal(experts + shared, hidden, scale=hidden**-0.5)
        self.bias = normal(experts + shared, scale=0.1) if biased else None
        if favourite is not None:
            self.bias = torch.zeros(experts + shared, dtype=dtype)
            self.bias[favourite] = 100
        self.shared = normal(rows, hidden) if shared else None
        self.weights = ExpertWeights(
            experts, matrix(experts * 2 * inner, hidden, 1), matrix(experts * hidden, inner, 2),
            normal(experts * 2 * inner) if biased else None, normal(experts * hidden) if biased else None,
            Activation(activation, limit=1.5),
        )  # fmt: skip
        shapes = Scratch.shapes(rows, experts, chosen, experts + shared, hidden, inner, dtype)
        self.scratch = poisoned(Scratch.make(shapes, "cpu"))
        self.out = torch.full((rows, hidden), float("nan"), dtype=dtype)

    def to(self, device: str) -> "Layer":
        """Move it."""
        for name in ("x", "router", "bias", "shared", "out"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.to(device))
        self.scratch = Scratch(**{name: value.to(device) for name, value in vars(self.scratch).items()})
        w = self.weights
        moved = {name: getattr(w, name) for name in ("gate_up", "down", "gate_up_bias", "down_bias")}
        self.weights = replace(w, **{name: None if v is None else v.to(device) for name, v in moved.items()})
        return self

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Experts [R, chosen], their weights and the outputs, by float64 and one token after the other."""
        experts, chosen, w = self.weights.experts, self.scratch.indices.shape[1], self.weights
        dense = {
            name: (part if isinstance(part := getattr(w, name), Tensor) else part.dequantised(torch.float64)).double()
            for name in ("gate_up", "down")
        }
        x, router = self.x.double(), self.router.double()
        logits = x @ router.T + (0 if self.bias is None else self.bias.double())
        all_indices, all_weights, outs = [], [], []
        for token in range(len(x)):
            best = sorted(range(experts), key=lambda e: (-float(logits[token, e]), e))[:chosen]
            shares = logits[token, :experts].exp() / logits[token, :experts].exp().sum()
            shares = shares[best] / (shares[best].sum() if self.normalised else 1)
            total = torch.zeros(w.hidden, dtype=torch.float64, device=x.device)
            for share, expert in zip(shares, best, strict=True):
                both = dense["gate_up"].view(experts, -1, w.hidden)[expert] @ x[token]
                if w.gate_up_bias is not None:
                    both += w.gate_up_bias.double().view(experts, -1)[expert]
                out = dense["down"].view(experts, w.hidden, -1)[expert] @ made_of(both, w.activation)
                if w.down_bias is not None:
                    out += w.down_bias.double().view(experts, -1)[expert]
                total += share * out
            if self.shared is not None:
                total += self.shared[token].double() / (1 + (-logits[token, experts]).exp())
            all_indices.append(best)
            all_weights.append(shares)
            outs.append(total)
        return torch.tensor(all_indices), torch.stack(all_weights), torch.stack(outs)

    def check(self, tolerance: float) -> None:
        """Hold what was computed to that."""
        indices, shares, outs = (part.to(self.out.device) for part in self.exact())
        assert torch.equal(self.scratch.indices.long(), indices)
        torch.testing.assert_close(self.scratch.weights.double(), shares, rtol=tolerance, atol=tolerance)
        error = (self.out.double() - outs).norm(dim=1) / outs.norm(dim=1)
        assert float(error.max()) < tolerance


def made_of(both: Tensor, how: Activation) -> Tensor:
    """An expert's activation, in float64, column by column."""
    gate, up = both.chunk(2)
    if how.kind == "clamped_silu":
        gate, up = gate.clamp(max=how.limit), up.clamp(-how.limit, how.limit)
        return gate / (1 + (-how.alpha * gate).exp()) * (up + 1)
    if how.kind == "gelu_tanh":
        return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    return gate / (1 + (-gate).exp()) * up


def poisoned(scratch: Scratch) -> Scratch:
    """With NaN and places outside everything."""
    for part in vars(scratch).values():
        part.fill_(float("nan") if part.is_floating_point() else 2**31 - 1)
    return scratch


CASES = [
    {"rows": 1}, {"rows": 1, "chosen": 6, "shared": True, "seed": 1}, {"rows": 2, "biased": True, "seed": 1},
    {"rows": 3, "activation": "clamped_silu", "biased": True}, {"rows": 5, "activation": "gelu_tanh", "seed": 1},
    {"rows": 17, "shared": True, "seed": 2}, {"rows": 40, "experts": 16, "chosen": 4, "seed": 3},
    {"rows": 64, "experts": 3, "chosen": 1, "biased": True, "seed": 4}, {"rows": 9, "favourite": 4, "chosen": 1},
    {"rows": 33, "favourite": 0, "experts": 40, "chosen": 3, "seed": 5},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_the_sum_of_the_experts(case: dict[str, Any]) -> None:
    layer = Layer(**case)
    reference.route(layer.x, layer.router, layer.bias, layer.normalised, layer.scratch)
    reference.mix(layer.x, layer.weights, layer.scratch, layer.out, layer.shared)
    layer.check(2e-6)


@pytest.mark.parametrize("packed", PACKED, ids=str)
@pytest.mark.parametrize("rows", [1, 12])
def test_packed_experts_on_a_cpu(packed: Any, rows: int) -> None:
    layer = Layer(rows, packed=packed, hidden=128, inner=200, biased=True, seed=rows)
    routed.route(layer.x, layer.router, layer.bias, layer.normalised, layer.scratch)
    routed.mix(layer.x, layer.weights, layer.scratch, layer.out, layer.shared)
    layer.check(1e-4)


def test_experts_that_nobody_chose_are_not_read() -> None:
    layer = Layer(8, favourite=2, chosen=1)
    reference.route(layer.x, layer.router, layer.bias, layer.normalised, layer.scratch)
    exact = layer.exact()[2]
    assert isinstance(layer.weights.gate_up, Tensor)
    others = layer.weights.gate_up.view(6, -1)
    others[torch.arange(6) != 2] = float("nan")
    reference.mix(layer.x, layer.weights, layer.scratch, layer.out)
    torch.testing.assert_close(layer.out.double(), exact, rtol=1e-5, atol=1e-5)


def run(layer: Layer) -> None:
    from octo_run.kernels.experts import launch

    launch.route(layer.x, layer.router, layer.bias, layer.normalised, layer.scratch)
    launch.mix(layer.x, layer.weights, layer.scratch, layer.out, layer.shared)


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_compute_the_same(case: dict[str, Any]) -> None:
    layer = Layer(**case).to(DEVICE)
    run(layer)
    layer.check(1e-5)


@needs_triton
@pytest.mark.parametrize("packed", PACKED, ids=str)
@pytest.mark.parametrize("rows", [1, 12, 70])
def test_the_kernels_decode_packed_experts(packed: Any, rows: int) -> None:
    layer = Layer(rows, packed=packed, hidden=136, inner=200, biased=True, seed=rows, experts=5).to(DEVICE)
    run(layer)
    layer.check(1e-5)


@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 7])
def test_the_kernels_know_every_activation(activation: str, rows: int) -> None:
    layer = Layer(rows, activation=activation, biased=True, seed=3).to(DEVICE)
    run(layer)
    layer.check(1e-5)


@needs_triton
def test_programs_of_a_router_count_to_zero_again() -> None:
    from octo_run.kernels.experts import launch

    for rows in (3, 1, 3):
        layer = Layer(rows, experts=9, shared=True, seed=rows).to(DEVICE)
        run(layer)
        layer.check(1e-5)
        assert not bool(launch._counters(layer.x.device).any())


@needs_triton
def test_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from octo_run.kernels.experts import launch

    monkeypatch.setattr(launch, "SMALL_TOKENS", 10)
    monkeypatch.setattr(launch, "ROUTER_TOKENS", 10)
    for seed, extra in enumerate(({}, {"packed": ("int4", 64)}, {"favourite": 1, "chosen": 1})):
        layer = Layer(150, seed=seed, experts=4, **extra).to(DEVICE)
        run(layer)
        layer.check(1e-5)


@needs_triton
def test_logits_that_are_no_numbers_choose_experts_that_are_there() -> None:
    layer = Layer(3).to(DEVICE)
    layer.x[1] = float("nan")
    run(layer)
    assert bool(((layer.scratch.indices >= 0) & (layer.scratch.indices < 6)).all())
    assert layer.out[1].isnan().all()
    assert layer.out[[0, 2]].isfinite().all()


@needs_triton
@pytest.mark.parametrize("experts", [7, 128, 200])
def test_the_largest_logits_choose_whatever_they_are(experts: int) -> None:
    """Of equal ones the first; what is no number before all. One comparison of all, and of some at a time."""
    from octo_run.kernels.experts import launch

    inf, nan = float("inf"), float("nan")
    values = [1.0, inf, nan, 2.0, -inf, 2.0, inf, nan, 0.0, -0.0, *range(-500, -300)][:experts]
    lists = [values, values[::-1], [-inf] * experts, [nan] * experts, [0.0] * (experts - 1) + [1.0]]
    for logits in lists:
        router = torch.zeros(experts, 8)
        router[:, 0] = torch.tensor([*logits, *[-1000.0] * (experts - len(logits))])
        x = torch.zeros(1, 8)
        x[:, 0] = 1
        scratch = poisoned(Scratch.make(Scratch.shapes(1, experts, 5, experts, 8, 8, x.dtype), DEVICE))
        launch.route(x.to(DEVICE), router.to(DEVICE), None, True, scratch)
        wanted = sorted(range(experts), key=lambda e: (-(inf if router[e, 0].isnan() else float(router[e, 0])), e))
        assert scratch.indices[0].tolist() == wanted[:5]
        assert scratch.tiles[:5].tolist() == [[e, i, i + 1] for i, e in enumerate(wanted[:5])]
        assert scratch.order.tolist() == [0, 1, 2, 3, 4]


on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
BOUNDS = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3}


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("packed", [None, *PACKED], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16, 64, 65, 300])
def test_experts_on_a_gpu(packed: Any, rows: int, dtype: torch.dtype) -> None:
    layer = Layer(
        rows, packed=packed, hidden=320, inner=264, experts=16, chosen=4, biased=True, shared=rows % 2 == 0,
        dtype=dtype, seed=rows, activation="clamped_silu" if rows % 3 else "silu",
    ).to(DEVICE)  # fmt: skip
    run(layer)
    layer.check(BOUNDS[dtype])


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("packed", [None, ("int4", 64), ("fp4", 32)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_recorded_experts_on_a_gpu(packed: Any, rows: int) -> None:
    """A graph follows new inputs, experts too, and gives what the launches give, bit by bit."""
    layer = Layer(rows, packed=packed, hidden=256, inner=256, experts=16, chosen=4, dtype=torch.bfloat16).to(DEVICE)
    run(layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(layer)
    for seed in range(3):
        layer.x.copy_(torch.randn(layer.x.shape, generator=torch.Generator().manual_seed(seed)))
        layer.out.fill_(float("nan"))
        graph.replay()
        recorded = layer.out.clone()
        layer.check(BOUNDS[torch.bfloat16])
        run(layer)
        assert torch.equal(recorded, layer.out)


def check_some(layer: Layer, rows: list[int], **kind: Any) -> None:
    """Some of a layer's tokens by themselves are what they were among the others; one alone, which is multiplied as
    whole numbers, up to the rounding of its dtype."""
    some = Layer(len(rows), **kind).to(DEVICE)
    some.x, some.router, some.bias, some.weights = layer.x[rows].clone(), layer.router, layer.bias, layer.weights
    some.normalised = layer.normalised
    run(some)
    assert torch.equal(some.scratch.indices, layer.scratch.indices[rows])
    if len(rows) > 1:
        assert torch.equal(some.out, layer.out[rows])
    else:
        difference = (some.out.double() - layer.out[rows].double()).norm()
        assert float(difference / layer.out[rows].double().norm()) < 2 * torch.finfo(layer.out.dtype).eps


@pytest.mark.gpu
@on_gpu
def test_packed_rows_on_a_gpu_do_not_depend_on_the_others() -> None:
    """Up to as many as are decoded fused."""
    kind: Any = {"packed": ("int4", 64), "hidden": 256, "inner": 256, "experts": 8, "dtype": torch.bfloat16}
    layer = Layer(64, **kind).to(DEVICE)
    run(layer)
    for rows in ([0], [7], [63], [0, 7], [63, 5, 6]):
        check_some(layer, rows, **kind)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("packed", [("fp4", 32), ("fp8", None), ("int4", 64)], ids=str)
def test_fused_products_on_a_gpu(packed: Any) -> None:
    """Right, the same when recorded, and the same for few tokens."""
    kind: Any = {"packed": packed, "hidden": 392, "inner": 264, "experts": 8, "dtype": torch.bfloat16, "biased": True}
    for rows in (1, 2, 9, 64):
        layer = Layer(rows, seed=rows, **kind).to(DEVICE)
        run(layer)
        layer.check(BOUNDS[torch.bfloat16])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(layer)
        launched = layer.out.clone()
        poisoned(layer.scratch)
        graph.replay()
        assert torch.equal(launched, layer.out)
    for some in ([7], [7, 3]):
        check_some(layer, some, seed=64, **kind)


@pytest.mark.parametrize("pairs", [1, 7, 30])
def test_pairs_are_computed_some_at_a_time(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    """An expert's may be cut in two."""
    monkeypatch.setattr(reference, "SLAB_PAIRS", pairs)
    layer = Layer(17, experts=4, chosen=3, biased=True, seed=6)
    reference.route(layer.x, layer.router, layer.bias, layer.normalised, layer.scratch)
    reference.mix(layer.x, layer.weights, layer.scratch, layer.out, layer.shared)
    layer.check(2e-6)
