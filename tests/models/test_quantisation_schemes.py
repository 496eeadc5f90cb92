"""The schemes of quantised weights against their references in float64, and what they lose."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octo_run.engine import Engine, SamplingParams
from octo_run.engine.quantise import quantise
from octo_run.errors import OctoError, UsageError
from octo_run.kernels.linear import PackedWeight
from octo_run.models import kept_weights
from octo_run.models.config import ModelConfig
from octo_run.models.decoder import Decoder
from octo_run.models.quantisation import schemes
from octo_run.models.quantisation.importance import random_ids
from octo_run.models.quantisation.schemes import SCHEMES, Scheme, quantised, reference
from octo_run.models.weights import random_weights

CFG = ModelConfig(
    architecture="LlamaForCausalLM", dtype="bfloat16", vocab_size=200, hidden_size=128, intermediate_size=192,
    num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64, max_position_embeddings=256, rms_norm_eps=1e-5,
    rope_theta=1e4,
)  # fmt: skip
NEAREST = Scheme("nearest", "int4", 128)
#: Of experts in files: symmetric groups of 32 and 64.
EXPERTS = [scheme.in_files.experts for scheme in (SCHEMES["int4"], SCHEMES["int4-128"])]
SHOWN = [scheme for scheme in (*SCHEMES.values(), NEAREST, *EXPERTS) if scheme is not None]


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Gaussian with some large weights, as those of models are."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    return normal * torch.exp(0.5 * torch.randn(rows, columns, generator=generator)) * 0.02


def squares(columns: int) -> Tensor:
    return torch.exp(1.5 * torch.randn(columns, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("scheme", SHOWN, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(("rows", "columns"), [(5, 128), (3, 200), (2, 33)])
def test_values_are_those_of_the_reference(scheme: Scheme, rows: int, columns: int) -> None:
    weight, weigh = matrix(rows, columns), squares(columns)
    got, want = quantised(weight, scheme, weigh).dequantised(torch.float64), reference(weight, scheme, weigh)
    # Where two choices are equally good, float32 may take the other one: nearly all values agree, and the error does.
    same = (got - want).abs() <= 1e-6 * want.abs().max()
    assert same.double().mean() > 0.98

    def lost(values: Tensor) -> float:
        return float(((values - weight.double()).square() * weigh.double()).sum())

    assert math.isclose(lost(got), lost(want), rel_tol=2e-3)


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_are_quantised_by_themselves_and_alike_each_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, weigh, scheme = matrix(40, 192), squares(192), SCHEMES[name]
    whole = quantised(weight, scheme, weigh)
    monkeypatch.setitem(schemes.PIECE, "cpu", 192 * 7)
    again, half = quantised(weight, scheme, weigh), quantised(weight[20:], scheme, weigh)
    for one, other, part in zip(whole.tensors(), again.tensors(), half.tensors(), strict=True):
        assert torch.equal(one, other) and torch.equal(one[20:], part)


@pytest.mark.parametrize("scheme", SHOWN, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("columns", [64, 200, 576])
def test_meta_has_the_shapes(scheme: Scheme, columns: int) -> None:
    real, shape = quantised(matrix(6, columns), scheme), quantised(torch.empty(6, columns, device="meta"), scheme)
    assert [(x.shape, x.dtype) for x in real.tensors()] == [(x.shape, x.dtype) for x in shape.tensors()]
    assert (real.kind, real.group, real.nbytes) == (shape.kind, shape.group, shape.nbytes)


@pytest.mark.parametrize("scheme", SHOWN, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_rows(scheme: Scheme, dtype: torch.dtype) -> None:
    """Rows of zeros, of one sign, of tiny and of large numbers, and groups far smaller than their neighbours."""
    weight = matrix(8, 256)
    weight[0], weight[1], weight[2] = 0, weight[1].abs(), -weight[2].abs() - 1
    weight[3] *= 1e-4
    weight[4] *= 1e4
    weight[5, :128] *= 1e-6
    weight[6] = torch.eye(256)[3]
    weight = weight.to(dtype)
    got, exact = quantised(weight, scheme).dequantised(torch.float64), weight.double()
    assert bool(got.isfinite().all()) and not got[0].any()
    error = (got - exact).abs().amax(1) / exact.abs().amax(1).clamp_min(1e-30)
    assert float(error.max()) < {"int8": 0.005, "fp8": 0.04}.get(scheme.name, 0.3)
    assert float(got[6, 3]) == pytest.approx(1, rel=0.01)


def test_scales_are_bfloat16_numbers_and_zeros_are_codes() -> None:
    packed = quantised(matrix(16, 256) * 3.7, SCHEMES["int4"], squares(256))
    assert packed.scales is not None and packed.offsets is not None
    scales = packed.scales.float() * packed.rows[:, None]
    assert torch.equal(scales, scales.bfloat16().float())
    zeros = packed.offsets + 8
    assert torch.equal(zeros, zeros.round()) and int(zeros.min()) >= 0 and int(zeros.max()) <= 15
    for name in ("int8", "fp8"):
        rows = quantised(matrix(16, 256), SCHEMES[name]).rows
        assert torch.equal(rows, rows.bfloat16().float())


def test_symmetric_groups_of_half_the_columns_lose_less_in_as_much_memory() -> None:
    """Why files have them for experts, beside that other programs read no zeros of experts."""
    weight, weigh = matrix(64, 512), squares(512)
    for scheme in (SCHEMES["int4"], SCHEMES["int4-128"]):
        half = scheme.in_files.experts
        assert half is not None
        one, other = quantised(weight, scheme, weigh), quantised(weight, half, weigh)
        assert other.offsets is None and other.nbytes == one.nbytes
        lost = [float(((x.dequantised() - weight).square() * weigh).sum()) for x in (one, other)]
        assert lost[1] < 0.97 * lost[0]
        assert other.scales is not None and bool((other.scales < 0).any()) and bool((other.scales > 0).any())
    assert SCHEMES["int8"].in_files is SCHEMES["int8"]


def test_weighted_errors_are_smaller_than_those_of_rounding_to_nearest() -> None:
    weight, weigh = matrix(64, 512), squares(512)

    def lost(scheme: Scheme) -> float:
        error = quantised(weight, scheme, weigh).dequantised(torch.float64) - weight
        return float((error.square() * weigh).sum())

    base = lost(NEAREST)
    assert lost(SCHEMES["int4"]) < 0.6 * base
    assert lost(SCHEMES["int4-128"]) < 0.85 * base
    assert lost(SCHEMES["int4"]) < lost(replace(SCHEMES["int4"], weighted=False)) < base


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_importance_that_says_nothing_is_left_out(bad: float) -> None:
    weight, scheme = matrix(4, 128), SCHEMES["int4"]
    plain = quantised(weight, scheme)
    for weigh in (torch.full((128,), bad), torch.zeros(128)):
        assert torch.equal(quantised(weight, scheme, weigh).codes, plain.codes)


def test_what_columns_are_multiplied_by_is_measured_as_the_model_computes() -> None:
    """Mean squares of the inputs of every product, the rotation of values in them."""
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))[0]
    seen: list[Tensor] = []

    def quantise(weight: Tensor, squares: Tensor | None) -> PackedWeight:
        assert squares is not None and squares.shape == (weight.shape[1],)
        seen.append(squares)
        return quantised(weight, SCHEMES["int8"])

    weights, ids = random_weights(CFG, "cpu", torch.float32), random_ids(CFG)
    assert ids == random_ids(CFG) and len(ids) == 256
    dense = Decoder(CFG, dict(weights), None, [rotation] * CFG.num_layers)
    with torch.inference_mode():
        Decoder(CFG, dict(weights), None, [rotation] * CFG.num_layers, quantise, ids)
        inputs: list[Tensor] = []

        def attention(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
            mixed = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
            inputs.append(mixed.transpose(1, 2).flatten(2)[0])
            return mixed.transpose(1, 2)

        dense.hidden(torch.tensor([ids]), torch.arange(len(ids))[None], attention)
    assert len(seen) == 4 * CFG.num_layers
    for layer in range(CFG.num_layers):
        torch.testing.assert_close(seen[4 * layer + 1], inputs[layer].square().mean(0), rtol=1e-4, atol=1e-9)


def test_a_matrix_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(CFG, "cpu", torch.float32)
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.nan
    with pytest.raises(OctoError, match=r"down_proj of layer 1 .* no finite numbers"):
        Decoder(CFG, weights, None, None, SCHEMES["int4"])


@pytest.mark.few("int8-int8")
@pytest.mark.parametrize("head", ["bf16", "int8"])
@pytest.mark.parametrize("weights", ["fp32", "bf16", *SCHEMES])
def test_the_plan_says_what_is_held(weights: str, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OCTO_RUN_CACHE")  # what is measured on the model is there, or other tests will need it
    monkeypatch.setattr(kept_weights, "packed_folder", lambda: tmp_path)  # nothing is mapped; the next load maps a file
    with Engine.load("octo-demo", device="cpu", weights=weights, head=head, max_context=256) as engine:
        decoder = engine.forward.decoder
        storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in held(decoder)}
        # Weights in bf16 and in 4 bits stay as they are: values are rotated on their way into the cache.
        rotations = sum(x.nbytes for layer in decoder.layers if (x := layer.attention.v_rotation) is not None)
        assert (rotations > 0) == (weights in ("bf16", "int4", "int4-128"))
        assert sum(storages.values()) + rotations == engine.plan.weights < engine.plan.loading
        expected = {"int8": f"{weights}, head int8", "bf16": weights}
        assert engine.plan.weight_format == expected[head]
        assert decoder.head.weight is decoder.embedding
        assert isinstance(decoder.embedding, PackedWeight) == (head == "int8")
        assert len([*engine.generate("Once upon a time", SamplingParams(max_tokens=3))]) <= 3
    assert all(0 <= file.stat().st_size - engine.plan.weights < 0.001 * engine.plan.weights for file in kept(tmp_path))
    assert len(kept(tmp_path)) == (weights in SCHEMES)


def kept(folder: Path) -> list[Path]:
    """The files of packed weights, whose headers and gaps the plan does not count."""
    return [*folder.glob("*.safetensors")]


def held(decoder: Decoder) -> list[Tensor]:
    found: list[Tensor] = [decoder.final_norm]
    for layer in decoder.layers:
        found += [layer.norms.before_attention, layer.norms.before_mlp]
        for linear in (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down):
            for part in linear.parts:
                found += [part.weight] if isinstance(part.weight, Tensor) else [*part.weight.tensors()]
    return found + ([decoder.embedding] if isinstance(decoder.embedding, Tensor) else [*decoder.embedding.tensors()])


@pytest.mark.parametrize("options", [{"weights": "int3"}, {"weights": "int8,int4"}, {"weights": ""}, {"head": "int4"}])
def test_formats_that_do_not_exist_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"There is no format of .*(give|of) .*(bf16|int8)"):
        Engine.load("octo-demo", device="cpu", **options)


def test_weights_that_are_quantised_already_are_not_quantised_again(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    quantise(make_checkpoint(), tmp_path / "packed", "fp8", device="cpu")
    words = r"quantised already \(compressed-tensors\) and cannot become int8: leave --weights out"
    with pytest.raises(OctoError, match=words):
        Engine.load(tmp_path / "packed", device="cpu", weights="int8")
    with pytest.raises(
        OctoError, match=r"quantised already \(compressed-tensors\): take the model's unquantised files"
    ):
        quantise(tmp_path / "packed", tmp_path / "again", "int8", device="cpu")
