"""The choice of means and matrices: the least expected error, the model's function unchanged, safe whatever is seen."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octo_run.models import conditioning, rope
from octo_run.models.conditioning import Conditioning, calibration_text, choose, measure
from octo_run.models.config import ModelConfig, parse_config
from octo_run.models.decoder import Decoder
from octo_run.models.weights import random_weights

CPU = torch.device("cpu")


def moments(generator: torch.Generator, *shape: int, dim: int, spread: float = 2.0) -> Tensor:
    """Second moments of very uneven directions."""
    scales = torch.exp(spread * torch.randn(*shape, dim, 1, generator=generator, dtype=torch.float64))
    basis = torch.linalg.qr(torch.randn(*shape, dim, dim, generator=generator, dtype=torch.float64))[0]
    return basis @ (scales * basis.mT)


def cost(shapes: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
    """The expected error of logits, to a factor."""
    inverse = torch.linalg.inv(shapes)
    energies = (shapes @ keys @ shapes.mT, inverse.mT @ queries @ inverse)
    first, second = (x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in energies)
    return first * second


def test_no_other_matrix_does_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditioning, "_EVEN", 0.0)
    generator = torch.Generator().manual_seed(1)
    keys, queries = (moments(generator, 3, 2, dim=16) for _ in range(2))
    best = choose(keys, queries)
    least = cost(best, keys, queries)
    # The bound: the square of the trace of (C_k^(1/2) C_q C_k^(1/2))^(1/2).
    roots = torch.linalg.eigvals(keys @ queries).real.clamp_min(0).sqrt().sum(-1)
    assert torch.allclose(least, roots.square(), rtol=1e-6)
    for _ in range(20):
        other = best + 0.05 * torch.randn(best.shape, generator=generator, dtype=torch.float64) * best.abs().mean()
        assert bool((cost(other, keys, queries) > least).all())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.floats(0, 8), size=st.floats(-18, 18))
def test_it_is_never_expected_to_be_worse(seed: int, spread: float, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys, queries = (10.0**size * moments(generator, 2, dim=8, spread=spread) for _ in range(2))
    found = choose(keys, queries)
    assert bool(found.isfinite().all())
    identity = torch.eye(8, dtype=torch.float64).expand_as(found)
    assert bool((cost(found, keys, queries) <= cost(identity, keys, queries) * (1 + 1e-9)).all())


def test_moments_that_say_nothing_leave_keys_as_they_are() -> None:
    generator = torch.Generator().manual_seed(2)
    good = moments(generator, 1, dim=8)[0]
    bad = [torch.zeros(8, 8), torch.full((8, 8), torch.nan), torch.full((8, 8), torch.inf), 1e40 * torch.eye(8)]
    for one in bad:
        for pair in ((one.double(), good), (good, one.double())):
            assert torch.equal(choose(*(part[None] for part in pair))[0], torch.eye(8, dtype=torch.float64))


def test_moments_over_positions_are_those_of_turned_vectors() -> None:
    generator = torch.Generator().manual_seed(3)
    frequencies = 100.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    moment = moments(generator, dim=8)
    got = conditioning._over_positions(moment, frequencies, 4096)
    steps = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    positions, total = 64 * 64.0**steps, torch.zeros(8, 8, dtype=torch.float64)
    for position in positions:
        angle = position * frequencies
        turn = rope.apply(
            torch.eye(8, dtype=torch.float64)[None, :, None], angle.cos()[None, None], angle.sin()[None, None]
        )
        matrix = turn[0, :, 0].T
        total += matrix @ moment @ matrix.T / 256
    assert torch.allclose(got, total, rtol=1e-9, atol=1e-12)


def tiny(**changes: object) -> ModelConfig:
    size = {
        "vocab_size": 300,
        "hidden_size": 192,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
    }
    return parse_config({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **size, **changes}, Path("x"))


def hostile(kind: str) -> dict[str, Tensor]:
    """Weights whose statistics are of no use or in the way."""
    torch.manual_seed(5)
    weights = random_weights(tiny(), CPU, torch.float32)
    for name, weight in weights.items():
        if kind == "zero keys" and "k_proj" in name:
            weight.zero_()
        if kind == "one huge channel" and "k_proj" in name:
            weight[3] *= 300
        if kind == "huge keys" and "k_proj" in name:
            weight *= 1e12
        if kind == "constant values" and "v_proj" in name:
            weight.copy_(weight[:1].expand_as(weight))
        if kind == "zero values" and "v_proj" in name:
            weight.zero_()
    return weights


@pytest.mark.parametrize(
    "kind", ["random", "zero keys", "one huge channel", "huge keys", "constant values", "zero values"]
)
def test_the_function_stays_and_statistics_may_be_hostile(kind: str) -> None:
    cfg = tiny()
    ids = torch.arange(7, 207) * 37 % 300
    results = []
    for conditioned in (False, True):
        decoder = Decoder(cfg, hostile(kind), None, None)
        found = measure(decoder, ids[:100].tolist()) if conditioned else None
        if found is not None:
            assert found.shapes is not None
            assert all(bool(part.isfinite().all()) for part in (*found.shapes, *found.means))
            decoder.store_keys([torch.eye(64, dtype=torch.float64)] * cfg.num_layers, found)

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (x.repeat_interleave(3, 2).transpose(1, 2) for x in (k, v))
            mixed = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2).double(), k.double(), v.double(), is_causal=True
            )
            return mixed.transpose(1, 2).to(q.dtype)

        with torch.inference_mode():
            results.append(decoder.logits(decoder.hidden(ids[None], torch.arange(200)[None], attention)).double())
    error = float((results[1] - results[0]).norm() / results[0].norm())
    # Large keys make large logits, of which float32 keeps so much; those of 1e12 have only ties.
    assert error < {"one huge channel": 1e-4, "huge keys": 1e-2}.get(kind, 1e-5), error


def test_kinds_have_their_parts() -> None:
    whole = Conditioning((torch.zeros(2, 8),) * 2, (torch.zeros(2, 8, 8),) * 2)
    assert whole.of_kind("off") is None and whole.of_kind("full") is whole
    mean = whole.of_kind("mean")
    assert mean is not None and mean.shapes is None and mean.means is whole.means
    assert len(calibration_text()) > 2000
