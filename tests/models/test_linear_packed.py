"""Layers of packed weights: their outputs, several of one input, and a decoder that is made of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octo_run.engine import plan_memory
from octo_run.engine.parts import held_bytes
from octo_run.kernels.linear import PackedWeight, pack
from octo_run.models.config import ModelConfig, parse_config
from octo_run.models.decoder import Decoder
from octo_run.models.linear import Linear, PackedLinear, SplitLinear, joined
from octo_run.models.quantisation.schemes import SCHEMES
from octo_run.models.weights import RandomWeights, random_weights

#: Kind of codes -> a small set of codes and what they stand for, by the definition of the kind.
CODES: dict[str, dict[int, float]] = {
    "int4": {code: code - 8.0 for code in range(16)},
    "int8": {code: float(code if code < 128 else code - 256) for code in (0, 1, 7, 100, 127, 128, 200, 255)},
    "fp4": {0: 0, 1: 0.5, 2: 1, 3: 1.5, 4: 2, 5: 3, 6: 4, 7: 6, 8: 0, 9: -0.5, 10: -1, 11: -1.5, 13: -3, 15: -6},
    "fp8": {0: 0, 1: 2.0**-9, 0x38: 1, 0x39: 1.125, 0x7E: 448, 0xB8: -1, 0x40: 2},
}


def made(
    kind: str, out: int, columns: int, group: int, *, order: Tensor | None = None, seed: int = 0
) -> tuple[PackedWeight, Tensor]:
    """A packed weight of random codes, and its values in float64, worked out number by number."""
    generator = torch.Generator().manual_seed(seed)
    table = CODES[kind]
    picks = torch.randint(len(table), (out, columns), generator=generator)
    codes = torch.tensor(list(table), dtype=torch.uint8)[picks]
    values = torch.tensor(list(table.values()), dtype=torch.float64)[picks]
    groups = -(-columns // group)
    rows = torch.rand(out, generator=generator) + 0.5
    scales = (torch.rand(out, groups, generator=generator) + 0.5).half()
    offsets = torch.randint(-3, 4, (out, groups), generator=generator).half() if kind.startswith("int") else None
    weight = pack(kind, codes, group, rows, scales, offsets, order)
    dense = torch.zeros(out, columns, dtype=torch.float64)
    for column in range(columns):
        place = column // group
        shift = 0 if offsets is None else offsets[:, place].double()
        target = column if order is None else int(order[column])
        dense[:, target] = (values[:, column] - shift) * scales[:, place].double() * rows.double()
    return weight, dense


@pytest.mark.parametrize("kind", list(CODES))
@pytest.mark.parametrize(("columns", "group"), [(128, 32), (256, 128), (96, 96), (200, 16), (300, 300)])
@pytest.mark.parametrize("ordered", [False, True])
def test_outputs_are_those_of_the_values(kind: str, columns: int, group: int, ordered: bool) -> None:
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1)) if ordered else None
    weight, dense = made(kind, 37, columns, group, order=order)
    assert torch.allclose(weight.dequantised(torch.float64), dense, rtol=1e-12, atol=0)
    bias = torch.randn(37, generator=torch.Generator().manual_seed(2))
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(3))
    wanted = x.double() @ dense.T + bias.double()
    layer, out = PackedLinear(weight, bias), torch.full((5, 60), 7.0)
    layer.apply(x, out[:, 10:47])
    # A CPU's compiled kernels round inputs to 16 bits.
    for found, limit in ((layer(x), 1e-5), (layer(x[:, None])[:, 0], 1e-5), (out[:, 10:47], 1e-4)):
        assert (found.double() - wanted).abs().max() < limit * wanted.abs().max()
    assert bool((out[:, :10] == 7).all()) and bool((out[:, 47:] == 7).all())
    assert layer.nbytes == sum(part.nbytes for part in weight.tensors()) + bias.nbytes


def test_a_large_matrix_is_worked_on_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    from octo_run.kernels.linear import reference

    weight, dense = made("int4", 100, 256, 64)
    rows: list[int] = []
    original = PackedWeight.dequantised
    monkeypatch.setattr(reference, "SLAB_BYTES", 256 * reference._WORKING * 13)
    monkeypatch.setattr(
        PackedWeight, "dequantised", lambda self, dtype: (rows.append(len(self.codes)), original(self, dtype))[1]
    )
    x = torch.randn(3, 256)
    assert torch.allclose(PackedLinear(weight)(x), (x.double() @ dense.T).float(), atol=1e-3)
    assert rows == [13] * 7 + [9]


@pytest.mark.parametrize(
    ("second", "one"),
    [
        ({}, True),
        ({"group": 64}, False),
        ({"kind": "int8"}, False),
        ({"order": torch.arange(128).flip(0)}, False),
        (None, False),
    ],
)
def test_layers_of_one_input_are_one_matrix_where_they_can_be(second: dict[str, Any] | None, one: bool) -> None:
    options = {"kind": "int4", "out": 24, "columns": 128, "group": 32}
    first, dense = made(**options)  # type: ignore[arg-type]
    if second is None:
        other_dense = torch.randn(24, 128, dtype=torch.float64)
        other: Linear | PackedLinear = Linear(other_dense.float())
    else:
        weight, other_dense = made(**(options | second), seed=5)  # type: ignore[arg-type]
        other = PackedLinear(weight)
    layer = joined(PackedLinear(first), other)
    assert isinstance(layer, PackedLinear if one else SplitLinear)
    assert layer.nbytes == first.nbytes + other.nbytes
    x, out = torch.randn(4, 128), torch.empty(4, 48)
    layer.apply(x, out)
    wanted = x.double() @ torch.cat((dense, other_dense)).T
    for found, limit in ((out, 1e-4), (layer(x), 1e-5)):
        assert (found.double() - wanted).abs().max() < limit * wanted.abs().max()
    assert sum(part.nbytes for part in layer.parts) == layer.nbytes


def test_equal_orders_are_kept_once_and_biases_go_along() -> None:
    order = torch.randperm(128)
    parts = [made("int4", 16, 128, 32, order=order.clone(), seed=seed)[0] for seed in range(2)]
    biases = [torch.randn(16) for _ in parts]
    layer = joined(*(PackedLinear(part, bias) for part, bias in zip(parts, biases, strict=True)))
    assert isinstance(layer, PackedLinear) and layer.weight.order is not None and layer.weight.order.shape == (128,)
    assert layer.bias is not None and torch.equal(layer.bias, torch.cat(biases))
    half = joined(PackedLinear(parts[0], biases[0]), PackedLinear(parts[1]))
    assert isinstance(half, SplitLinear)


CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "vocab_size": 211,
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
CFG = parse_config(CONFIG, Path("config.json"))


def eight_bits(weight: Tensor, _squares: Tensor | None = None) -> PackedWeight:
    """Plain rounding, a scale for each row."""
    scale = weight.float().abs().amax(1) / 127
    codes = (weight.float() / scale[:, None]).round().to(torch.int8)
    return pack("int8", codes.view(torch.uint8), weight.shape[1], scale)


def logits(decoder: Decoder) -> Tensor:
    ids = torch.arange(40)[None]

    def attention(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2)

    with torch.inference_mode():
        return decoder.logits(decoder.hidden(ids, ids, attention))


def test_a_decoder_quantises_what_it_has_rotated() -> None:
    """The rotation of values is in the matrices before they are packed, so that nothing is left to be done online."""
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))[0]
    weights = random_weights(CFG, "cpu", torch.float32)
    exact = logits(Decoder(CFG, dict(weights), None, None))
    seen: list[Tensor] = []

    def quantise(weight: Tensor, _squares: Tensor | None) -> PackedWeight:
        seen.append(weight.clone())
        return eight_bits(weight)

    decoder = Decoder(CFG, dict(weights), None, [rotation] * CFG.num_layers, quantise)
    assert len(seen) == 4 * CFG.num_layers
    layer = decoder.layers[0]
    assert layer.attention.v_rotation is None and isinstance(decoder.head, Linear)
    assert all(
        isinstance(part, PackedLinear)
        for part in (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down)
    )
    v = weights["model.layers.0.self_attn.v_proj.weight"].view(2, 64, -1)
    assert torch.allclose(seen[0][-128:], (rotation @ v).view(128, -1), atol=1e-6)
    assert (logits(decoder) - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(("weights", "changed"), [("int4", False), ("int4-128", False), ("int8", True), ("fp8", True)])
def test_four_bits_are_not_given_rotated_matrices(weights: str, changed: bool) -> None:
    """A rotated value projection loses more in 4 bits: its codes are those without a rotation."""
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))[0]
    stored = random_weights(CFG, "cpu", torch.float32)
    scheme, ids = SCHEMES[weights], [*range(5, 69)]
    plain, rotated = (
        Decoder(CFG, dict(stored), None, turned, scheme, ids) for turned in (None, [rotation] * CFG.num_layers)
    )
    for one, other in zip(plain.layers, rotated.layers, strict=True):
        assert (other.attention.v_rotation is None) is changed
        for a, b in ((one.attention.qkv, other.attention.qkv), (one.attention.out, other.attention.out)):
            (first,), (second,) = a.parts, b.parts
            assert isinstance(first.weight, PackedWeight) and isinstance(second.weight, PackedWeight)
            assert torch.equal(first.weight.codes, second.weight.codes) is not changed
    if not changed:
        torch.testing.assert_close(logits(rotated), logits(plain), rtol=0, atol=1e-4)


class Packed(RandomWeights):
    """Random weights, those of the layers named by ``which`` packed as a file would have them."""

    which: tuple[str, ...] = ("self_attn.v_proj", "self_attn.o_proj", "self_attn.q_proj", "mlp.up_proj")

    def linear(self, prefix: str, bias: bool = False) -> Linear | PackedLinear:
        layer = super().linear(prefix, bias)
        assert isinstance(layer, Linear)
        return PackedLinear(eight_bits(layer.weight), layer.bias) if prefix.endswith(self.which) else layer


class Dequantised(Packed):
    def linear(self, prefix: str, bias: bool = False) -> Linear:
        layer = super().linear(prefix, bias)
        return layer if isinstance(layer, Linear) else Linear(layer.weight.dequantised(), layer.bias)


@pytest.mark.parametrize("which", [Packed.which, ("self_attn.v_proj",), ("self_attn.o_proj",)])
def test_values_are_rotated_online_where_weights_are_packed(
    which: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Packed, "which", which)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))[0]
    exact = logits(Decoder(CFG, Dequantised(CFG, "cpu", torch.float32), None, None))
    decoder = Decoder(CFG, Packed(CFG, "cpu", torch.float32), None, [rotation] * CFG.num_layers)
    assert all(layer.attention.v_rotation is not None for layer in decoder.layers)
    assert (logits(decoder) - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_plan_counts_packed_bytes(kv_heads: int) -> None:
    cfg: ModelConfig = replace(CFG, num_kv_heads=kv_heads)
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "max_context": 300}
    plan = plan_memory(cfg, "oct3", **options, quantise=eight_bits)
    decoder = Decoder(cfg, RandomWeights(cfg, "cpu", torch.bfloat16), None, None, eight_bits)
    held = sum(held_bytes(decoder.embedding, decoder.final_norm, decoder.head, decoder.layers))
    assert plan.weights == held < 0.7 * plan_memory(cfg, "oct3", **options).weights
    assert plan.loading > plan.weights


def test_random_weights_do_not_depend_on_the_order_of_taking() -> None:
    everything = random_weights(CFG, "cpu", torch.float32, seed=3)
    source = RandomWeights(CFG, "cpu", torch.float32, seed=3)
    for name in reversed(list(everything)):
        assert torch.equal(source.take(name), everything[name])
    assert not torch.equal(
        source.take("model.norm.weight"), random_weights(CFG, "cpu", torch.float32)["model.norm.weight"]
    )


def test_a_dict_is_emptied(make_checkpoint: Callable[..., Path]) -> None:
    weights = random_weights(CFG, "cpu", torch.float32)
    Decoder(CFG, weights, None, None)
    assert not weights
