"""A format for each layer: what the model reads, what the arena holds, how it is told."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from octo_run.engine import Engine
from octo_run.kernels.attention.angle_tables import AngleTables
from octo_run.kernels.codec import LayerFormats, parse_kv
from octo_run.models import rope

Tiny = Callable[..., Engine]
SINK, WINDOW, PAGE = 64, 64, 64


def reference_logits(engine: Engine, ids: list[int]) -> Tensor:
    """Logits by plain PyTorch, with old keys and values of each layer sent through that layer's codecs."""
    decoder, cfg, count = engine.forward.decoder, engine.config, len(ids)
    positions = torch.arange(count)
    cos, sin = rope.cos_sin(positions, decoder.inv_freq(0), torch.float32)
    # Means are turned as the tables have it, which is not quite RoPE.
    coded = slice(SINK, SINK + (count - SINK) // PAGE * PAGE)
    angles = AngleTables.build(decoder.inv_freq(0), SINK, count // PAGE).of_pages(0, (count - SINK) // PAGE)
    turn_cos, turn_sin = cos.clone(), sin.clone()
    turn_cos[coded], turn_sin[coded] = angles.flatten(0, 1).chunk(2, -1)
    query, key = positions[:, None], positions[None]
    old = (key >= SINK) & ((key - SINK) // PAGE < (query - SINK - WINDOW) // PAGE)

    def attention(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer, fmt = decoder.layers[index], engine.kv[index]
        mean = torch.zeros_like(k)
        if layer.attention.key_mean is not None and layer.attention.maps is not None:
            turned = rope.apply(layer.attention.key_mean.expand_as(k), turn_cos[None], turn_sin[None])
            mean = torch.einsum("bnhd,hde->bnhe", turned, layer.attention.maps[1])
        coded_k = fmt.k.decode_rotated(fmt.k.encode_rotated(k - mean)) + mean
        coded_v = fmt.v.decode_rotated(fmt.v.encode_rotated(v))
        group = cfg.num_heads // cfg.num_kv_heads
        q, k, v, coded_k, coded_v = (
            x[0].transpose(0, 1).double().repeat_interleave(cfg.num_heads // x.shape[2], 0)
            for x in (q, k, v, coded_k, coded_v)
        )
        assert len(q) == len(k) == group * cfg.num_kv_heads
        scores = torch.where(old, q @ coded_k.mT, q @ k.mT) * cfg.head_dim**-0.5
        weights = scores.masked_fill(key > query, -torch.inf).softmax(-1)
        return ((weights * old) @ coded_v + (weights * ~old) @ v).transpose(0, 1)[None].float()

    with torch.inference_mode():
        return decoder.logits(decoder.hidden(torch.tensor([ids]), positions[None], attention))[0]


@pytest.mark.few("oct4:oct2/octopus2:oct3-off", "bf16/oct3-full")
@pytest.mark.parametrize("conditioning", ["off", "full"])
@pytest.mark.parametrize(
    "kv", ["oct3", "oct2/oct4:oct3", "oct4:oct2/octopus2:oct3", "oct2:bf16/oct3:bf16", "bf16/oct3"]
)
def test_logits_are_those_of_a_model_with_each_layers_codec(
    kv: str, conditioning: str, tiny: Tiny, random_ids: Any
) -> None:
    engine = tiny(kv, conditioning=conditioning)

    def agrees(seed: int, step: int) -> bool:
        ids = random_ids(330, seed=seed)
        ours, exact = engine.logits(ids, step), reference_logits(engine, ids)
        rows = slice(0, None) if step == 1 else slice(0, 192)  # a chunk reads older tokens as they are
        return float((ours[rows] - exact[rows]).abs().max() / exact.abs().max()) < 2e-5

    # Where two codes are equally near, rounding decides between them: one in a dozen texts has such a place.
    for step in (1, 64):
        assert any(agrees(seed, step) for seed in range(3)), step
    ids = random_ids(330)
    exact = reference_logits(engine, ids)
    assert float((tiny("bf16").logits(ids, 1)[192:] - exact[192:]).abs().max() / exact.abs().max()) > 1e-4


def test_the_pages_of_layers_lie_one_after_the_other(tiny: Tiny, random_ids: Any) -> None:
    """Every byte of a page belongs to one layer, and pages begin at multiples of 128 bytes."""
    engine = tiny("oct2:oct4/octopus3")
    engine.logits(random_ids(400), 1)
    arena, at = engine.arena, 0
    for pages, page_format in zip(arena.layer_pages, arena.page_formats, strict=True):
        assert (pages.storage_offset(), pages.shape[2]) == (at, page_format.page_bytes)
        assert pages.storage_offset() % 128 == 0 and all(stride % 128 == 0 for stride in pages.stride()[:2])
        at += pages.shape[1] * pages.shape[2]
    assert at == arena.pages.shape[1] == 64 * engine.plan.bytes_per_token


def test_neighbours_of_one_format_are_coded_by_one_call(
    tiny: Tiny, random_ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octo_run import kernels

    calls: list[int] = []
    encode = kernels.encode_pages
    monkeypatch.setattr(kernels, "encode_pages", lambda k, *rest: calls.append(len(k)) or encode(k, *rest))
    for kv, wanted in (("oct3", [2]), ("oct3/oct3", [2]), ("oct3/oct3:oct2", [1, 1])):
        engine = tiny(kv)
        sequence = engine.sequence()
        engine.prefill(sequence, random_ids(192))
        calls.clear()
        with torch.inference_mode():
            engine.arena.code_oldest(sequence)
        assert calls == wanted


def test_formats_as_text() -> None:
    oct2, both, oct3 = (parse_kv(name, 64) for name in ("oct2", "oct3:oct2", "oct3"))
    assert str(LayerFormats.uniform(both, 4)) == "oct3:oct2"
    mixed = LayerFormats("mine", (oct2, both, both, oct3))
    assert str(mixed) == "mine (K 1 x oct2, 3 x oct3; V 3 x oct2, 1 x oct3)"
    assert [(run.first, run.end) for run in mixed.runs] == [(0, 1), (1, 3), (3, 4)]
    assert mixed.vector_bytes == 44 + 52 + 52 + 60


@pytest.mark.parametrize("others", [("oct3", 128, 1), ("oct3", 64, 1), ("bf16:oct3", 64, 1)])
def test_codes_have_one_seed(others: tuple[str, int, int]) -> None:
    with pytest.raises(ValueError, match=r"must have one seed, not those of \[0, 1\]"):
        LayerFormats("mixed", (parse_kv("oct2", 64), parse_kv(*others)))


def test_what_has_no_code_is_not_rotated() -> None:
    formats = LayerFormats("mixed", (parse_kv("bf16", 64, 1), parse_kv("oct2:bf16", 64), parse_kv("oct3", 128)))
    sizes = [[None if one is None else len(one) for one in formats.rotations(side)] for side in ("k", "v")]
    assert sizes == [[None, 64, 128], [None, None, 128]] and formats.coded
    assert not LayerFormats.uniform(parse_kv("bf16:oct3", 64), 2).coded
