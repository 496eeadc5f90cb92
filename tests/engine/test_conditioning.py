"""Conditioned keys in the engine: one function without coding, nearer to it with coding, kept for the next load."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from octo_run import Engine, UsageError
from octo_run.engine import calibration, sensitivity
from octo_run.engine import plan as plan_module
from octo_run.engine.arena import ArenaShape
from octo_run.engine.calibration import FEWER, TOKENS
from octo_run.engine.parts import held_bytes
from octo_run.kernels.codec import LayerFormats
from octo_run.models import conditioning
from octo_run.models.cache import statistics_folder
from octo_run.models.conditioning import Conditioning
from octo_run.models.config import CONDITIONINGS, KVHeads
from octo_run.models.decoder import Decoder

TEXT = "The lighthouse keeper counted the ships that passed in the night and wrote their names in a long list. " * 24


def load(kv: str, kind: str | None = None) -> Engine:
    return Engine.load(kv=kv, device="cpu", max_context=512, conditioning=kind)


def logits(kv: str, kind: str | None, step: int | None = 64) -> torch.Tensor:
    with load(kv, kind) as engine:
        return engine.logits(engine.tokenizer.encode(TEXT, add_bos=True)[:460], step).double()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mean", "full"])
def test_without_coding_the_logits_stay(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = logits("bf16", None)

    def identities(formats: LayerFormats, side: str) -> list[torch.Tensor | None]:
        return [torch.eye(fmt.k.head_dim, dtype=torch.float64) if side == "k" else None for fmt in formats]

    monkeypatch.setattr(plan_module, "conditioning_kind", lambda *_: kind)
    monkeypatch.setattr(LayerFormats, "rotations", identities)
    conditioned = logits("bf16", None)
    assert not torch.equal(conditioned, exact), "means were taken out"
    assert float((conditioned - exact).abs().max() / exact.abs().max()) < 1e-5


@pytest.mark.slow
def test_with_coding_the_distribution_is_nearer() -> None:
    exact = logits("bf16", None).log_softmax(-1)
    divergence = {}
    for kind in CONDITIONINGS:
        coded = logits("octopus2", kind).log_softmax(-1)
        divergence[kind] = float((exact.exp() * (exact - coded)).sum(-1).mean())
    assert max(divergence["full"], divergence["mean"]) < 0.9 * divergence["off"]


HOSTILE: dict[str, Callable[[str, torch.Tensor], object]] = {
    "random": lambda name, weight: None,
    "zero keys": lambda name, weight: weight.zero_() if "k_proj" in name else None,
    "one huge channel": lambda name, weight: weight[3].mul_(100) if "k_proj" in name else None,
    "huge keys": lambda name, weight: weight.mul_(3000) if "k_proj" in name else None,
    "tiny keys": lambda name, weight: weight.mul_(1e-6) if "k_proj" in name else None,
    "constant values": lambda name, weight: (
        weight.copy_(weight[:1].clone().expand_as(weight)) if "v_proj" in name else None
    ),
    "zero values": lambda name, weight: weight.zero_() if "v_proj" in name else None,
}


@pytest.mark.few("random")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_model_is_never_worse_for_it(
    kind: str, tiny: Callable[..., Engine], random_ids: Callable[..., list[int]]
) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            HOSTILE[kind](name, weight)

    texts = [random_ids(500, seed=seed) for seed in (5, 6)]

    def logs(kv: str, conditioning: str | None = None) -> torch.Tensor:
        engine = tiny(kv, conditioning=conditioning, change=change)
        return torch.cat([engine.logits(ids, 64) for ids in texts]).double().log_softmax(-1)

    exact = logs("bf16")
    for kv in ("oct2", "octopus3"):
        off, full = (float((exact.exp() * (exact - logs(kv, one))).sum(-1).mean()) for one in ("off", "full"))
        assert full <= 1.1 * off + 1e-9, kv


@pytest.mark.slow
def test_coded_keys_are_conditioned_unless_it_is_off() -> None:
    for kv, kind, used in (("oct3", None, "full"), ("oct3:bf16", " Mean", "mean"), ("bf16:oct3", "full", "off")):
        with load(kv, kind) as engine:
            assert engine.plan.conditioning == used
            assert (engine.arena.means is not None) == (used != "off")
    with pytest.raises(UsageError, match=r"no conditioning 'some'; give --conditioning off, mean or full"):
        load("oct3", "some")


@pytest.mark.slow
def test_what_was_measured_is_kept_for_the_next_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OCTO_RUN_CACHE", str(tmp_path))
    first = logits("oct3", None)
    (kept,) = statistics_folder().iterdir()

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr(conditioning, "measure", refuse)
        assert torch.equal(logits("oct3", None), first)
        with pytest.raises(AssertionError, match="measured again"):
            Engine.load(kv="oct3", device="cpu", max_context=512, dtype="bfloat16")
    for damage in (b"", kept.read_bytes()[:-9], b"PK\x03\x04nothing"):
        kept.write_bytes(damage)
        assert torch.equal(logits("oct3", None), first), "what is damaged is measured again"
    assert [file.name for file in statistics_folder().iterdir()] == [kept.name]


def test_each_arithmetic_has_statistics_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OCTO_RUN_CACHE", str(tmp_path))
    measure, measured = conditioning.measure, []

    def observed(decoder: Decoder, ids: list[int]) -> Conditioning:
        measured.append(decoder.dtype)
        return measure(decoder, ids[:80])

    monkeypatch.setattr(conditioning, "measure", observed)
    for dtype in ("float32", "bfloat16", "float32"):
        Engine.load(kv="oct3", device="cpu", max_context=256, dtype=dtype, weights="bf16").close()
    assert measured == [torch.float32, torch.bfloat16], "both are called bf16: the dtype differs alone"


def test_statistics_with_any_damage_are_none_or_what_was_written(tmp_path: Path) -> None:
    file, shapes = tmp_path / "kept.npz", {"means0": (2, 4), "shapes0": (2, 4, 4)}
    written = {name: torch.ones(shape) for name, shape in shapes.items()}
    calibration._keep(file, written)
    good = file.read_bytes()
    places = [place for place in range(len(good)) if place % 3 == 0 or good[place : place + 2] == b"PK"]
    # Also the flags and the methods of entries: encrypted, compressed in a way that is not known.
    places += [good.rindex(b"PK\x01\x02") + offset for offset in (8, 10)]
    for place in places:
        for bit in range(8):
            damaged = bytearray(good)
            damaged[place] ^= 1 << bit
            file.write_bytes(damaged)
            found = calibration._read(file, shapes)
            assert found is None or all(torch.equal(found[name], written[name]) for name in shapes), (place, bit)
    for other in (np.float64, np.dtype("U5"), object):
        np.savez(file, **{name: part.numpy().astype(other) for name, part in written.items()})
        assert calibration._read(file, shapes) is None, other
    with file.open("wb") as out:
        np.save(out, np.ones(3))
    assert calibration._read(file, shapes) is None
    file.write_bytes(good + bytes(1 << 20))
    assert calibration._read(file, shapes) is None
    file.unlink()
    os.mkfifo(file)
    assert calibration._read(file, shapes) is None, "nobody writes there: it must not wait"


@pytest.mark.slow
def test_sensitivities_are_kept_as_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OCTO_RUN_CACHE", str(tmp_path))
    with load("auto:48") as engine:
        formats = engine.kv
    assert len(list(statistics_folder().iterdir())) == 2

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(sensitivity, "measure", refuse)
    for kv in ("auto:48", "auto:64"):
        with load(kv) as engine:
            assert (engine.kv == formats) == (kv == "auto:48")
    with pytest.raises(AssertionError, match="measured again"):
        load("auto:48", "off")


def test_keys_are_conditioned_by_the_whole_text_and_formats_chosen_by_a_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OCTO_RUN_CACHE", str(tmp_path))
    measure, seen = conditioning.measure, []

    def observed(decoder: Decoder, ids: list[int]) -> Conditioning:
        seen.append(ids)
        return measure(decoder, ids[:80])

    def chosen(decoder: Decoder, fmt: object, ids: list[int], *_: object) -> torch.Tensor:
        seen.append(ids)
        return torch.zeros(len(decoder.layers), 2)

    monkeypatch.setattr(conditioning, "measure", observed)
    monkeypatch.setattr(sensitivity, "measure", chosen)
    with load("auto:56") as engine:
        whole = engine.tokenizer.prompt(conditioning.calibration_text())
    assert seen == [whole[:TOKENS], whole[:FEWER]] and len(whole) >= TOKENS > FEWER


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OCTO_RUN_CACHE", str(tmp_path / "file"))
    assert bool(logits("oct3", None).isfinite().all())


def test_plan_counts_maps_and_means() -> None:
    engines = [load("oct3", kind) for kind in ("off", "full")]
    means = engines[1].arena.means
    assert means is not None
    layers = engines[1]._decoder.layers
    # One matrix for all layers against two, and a mean, for each KV head.
    assert layers[0].attention.maps is not None and layers[0].attention.key_mean is not None
    added = (
        len(layers) * (layers[0].attention.maps.nbytes + layers[0].attention.key_mean.nbytes)
        - 4 * layers[0].attention.maps[0, 0].numel()
    )
    assert engines[1].plan.arena - engines[0].plan.arena == sum(held_bytes(means)) + added
    assert engines[1].plan.weights == engines[0].plan.weights
    assert engines[1].plan.tokens_that_fit(engines[1].plan.total) >= 512


@pytest.mark.parametrize("on_gpu", [False, True])
def test_only_coefficients_that_attention_reads_are_kept(on_gpu: bool) -> None:
    shape = ArenaShape(
        (KVHeads(2, 64),) * 2, 240, torch.float32, 300, chunk=96, sequences=7, mean_heads=6, on_gpu=on_gpu
    )
    assert shape.coefficients_shape(96) == (7 if on_gpu else 96, 1, 6, 64)
    assert dataclasses.replace(shape, mean_heads=0).coefficients_shape(96)[0] == 0
