"""Packed weights that are kept in a file: a decoder made of it is the one that was packed, whatever the family."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octo_run import folders
from octo_run.engine import Engine, SamplingParams, calibration
from octo_run.models import kept_weights, store
from octo_run.models.cache import name_of, packed_folder, statistics_folder
from octo_run.models.decoder import Decoder
from octo_run.models.kept_weights import KeptWeights
from octo_run.models.weights import StoredWeights

from .test_families import MODELS, written

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTO_RUN_CACHE", str(tmp_path / "cache"))


def load(path: Path | str, weights: str = "int8", **options: Any) -> Engine:
    options = {"kv": "oct3", "max_context": 256} | options
    return Engine.load(path, device="cpu", weights=weights, head="int8", **options)


def differences(one: Any, other: Any, where: str = "decoder") -> list[str]:
    """Where two objects are not the same, attributes and all."""
    if isinstance(one, Decoder):
        _ = one.embedding_scale, other.embedding_scale  # which is computed when it is first asked for
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return [] if same and one.stride() == other.stride() and torch.equal(one, other) else [where]
    if isinstance(one, dict):
        found = [where] if one.keys() != other.keys() else []
        return found + [each for key in one for each in differences(one[key], other.get(key), f"{where}[{key!r}]")]
    if isinstance(one, (list, tuple)):
        found = [where] if len(one) != len(other) else []
        for index, pair in enumerate(zip(one, other, strict=False)):
            found += differences(*pair, f"{where}[{index}]")
        return found
    if type(one).__module__.startswith("octo_run.") and hasattr(one, "__dict__"):
        return differences(vars(one), vars(other), where)
    return [] if one == other or callable(one) else [f"{where}: {one!r} and {other!r}"]


@pytest.mark.few("qwen3-yarn-int8", "gemma4-small-int4", "llama3-biases-int4")
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_decoder_of_the_file_is_the_one_that_was_packed(
    name: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every attribute; its tensors lie as tensors of their own would."""
    kind, fields = MODELS[name]
    written(tmp_path / "model", kind, fields)
    addresses = []
    original = KeptWeights.load

    def seen(self: KeptWeights, shapes: Any) -> Any:
        if (made := original(self, shapes)) is not None:
            addresses.extend(old.data_ptr() for _, _, old in kept_weights._places(made) if isinstance(old, Tensor))
        return made

    monkeypatch.setattr(KeptWeights, "load", seen)
    first = load(tmp_path / "model", weights)
    assert not addresses
    second = load(tmp_path / "model", weights)
    assert len([*packed_folder().iterdir()]) == 1
    assert differences(first._decoder, second._decoder) == []
    assert len(addresses) > 20 and not any(address % 64 for address in addresses)
    assert [t.id for t in first.generate([1, 2, 3], GREEDY)] == [t.id for t in second.generate([1, 2, 3], GREEDY)]


def test_the_second_load_reads_no_weights(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another format of the cache with the same rotation, too; what changes the weights makes another file."""
    path = make_checkpoint()
    load(path)

    def taken(*_: object) -> None:
        raise AssertionError("a weight was read")

    with monkeypatch.context() as patch:
        patch.setattr(StoredWeights, "_taken", taken)
        load(path)
        load(path, kv="oct4")
        for changes in ({"weights": "int4"}, {"kv": "bf16"}, {"seed": 3}, {"dtype": "bfloat16"}):
            with pytest.raises(AssertionError, match="a weight was read"):
                load(path, **changes)
        (file,) = path.glob("*.safetensors")
        file.touch()
        with pytest.raises(AssertionError, match="a weight was read"):
            load(path)


def test_a_context_makes_another_file_only_where_it_chooses_factors(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_checkpoint()
    first = load(path, max_context=512)
    assert load(path, max_context=256).max_context == 256 and len([*packed_folder().iterdir()]) == 1
    assert differences(first._decoder, load(path, max_context=512)._decoder) == []
    kind, fields = MODELS["phi3-long"]  # long factors beyond 64 tokens
    written(tmp_path / "phi", kind, fields)
    for count, (context, factors) in enumerate([(64, "short"), (128, "long"), (256, "long"), (32, "short")]):
        decoder = load(tmp_path / "phi", max_context=context)._decoder
        assert decoder.rope_factors == factors and decoder.context == context
        assert len([*packed_folder().iterdir()]) == 2 + min(count, 1)


def damaged(file: Path, how: str) -> None:
    data = file.read_bytes()
    match how:
        case "half":
            file.write_bytes(data[: len(data) // 2])
        case "empty":
            file.write_bytes(b"")
        case "other":
            file.write_bytes(data.replace(b'"0":{', b'"x":{', 1))
        case "shape":
            file.write_bytes(re.sub(rb'"shape":\[(\d+),(\d+)\]', rb'"shape":[\2,\1]', data, count=1))


@pytest.mark.parametrize("how", ["half", "empty", "other", "shape"])
def test_a_damaged_file_is_written_again(make_checkpoint: Callable[..., Path], how: str) -> None:
    path = make_checkpoint()
    first = load(path)
    (file,) = packed_folder().iterdir()
    good = file.read_bytes()
    damaged(file, how)
    assert file.read_bytes() != good
    second = load(path)
    assert differences(first._decoder, second._decoder) == [] and file.read_bytes() == good
    assert [*packed_folder().iterdir()] == [file]


def test_few_files_are_kept(make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The ones used last, of models that are there; none where the disk has little room or takes nothing."""
    monkeypatch.setattr(kept_weights, "MOST", 2)
    paths = [make_checkpoint(name, seed=number) for number, name in enumerate(("a", "b", "c"))]
    load(paths[0])
    (oldest,) = packed_folder().iterdir()
    load(paths[1])
    load(paths[0])
    load(paths[2])
    kept = [*packed_folder().iterdir()]
    assert len(kept) == 2 and oldest in kept
    paths[0].rename(paths[0].with_name("elsewhere"))
    kept_weights.forget()
    assert len([*packed_folder().iterdir()]) == 1 and not oldest.exists()
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(kept_weights.shutil, "disk_usage", lambda _: full)
    load(paths[1])
    assert len([*packed_folder().iterdir()]) == 1
    packed_folder().rename(packed_folder().with_name("x"))
    packed_folder().write_text("no folder")
    load(paths[1])


def test_a_model_that_is_removed_takes_its_file_along(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, other = tmp_path / "cache" / "hub" / "models--org--name" / "snapshots" / ("a" * 40), make_checkpoint("other")
    name.parent.mkdir(parents=True)
    make_checkpoint("model").rename(name)
    load(name)
    load(other)
    folders = packed_folder(), statistics_folder()
    assert [len([*folder.iterdir()]) for folder in folders] == [2, 2]
    store.remove("org/name")
    for folder in folders:
        (kept,) = folder.iterdir()
        assert kept.name.startswith(name_of(other)) and not name.exists()


def test_few_measurements_are_kept(make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MOST", 2)
    paths = [make_checkpoint(name, seed=number) for number, name in enumerate(("a", "b", "c"))]
    for path in (paths[0], paths[1], paths[0], paths[2]):
        load(path)
    kept = {file.name.partition("-")[0] for file in statistics_folder().iterdir()}
    assert kept == {name_of(paths[0]), name_of(paths[2])}


def test_a_decoder_with_a_turned_matrix_is_not_kept(make_checkpoint: Callable[..., Path]) -> None:
    """A file has no strides."""
    path = make_checkpoint()
    kept = KeptWeights(path, ("x",))
    decoder = Decoder.__new__(Decoder)
    decoder.final_norm = torch.zeros(4, 3).T
    kept.keep(decoder)
    assert not packed_folder().exists()


@pytest.mark.parametrize("inside", [False, True])
def test_what_cannot_be_kept_is_told_with_what_helps(
    inside: bool, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it took long: of packed weights, of conditioning, and of what ``auto:N`` measures."""
    monkeypatch.setattr(folders, "NOTICEABLE", 0.0)
    model, cache = make_checkpoint(head_dim=64), tmp_path / "cache"
    if inside:
        model = model.rename(cache.mkdir() or cache / "a model")
    for folder in (packed_folder(), statistics_folder()):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.write_text("no folder")
    told: list[str] = []
    load(model, kv="auto:56", max_context=600, on_unkept=told.append)
    place = f" and give the model as '{model}'" if inside else ""
    advice = f"make it writable, or name another folder in OCTO_RUN_CACHE{place}"
    packed, measured = (f"{folder()} cannot be written (File exists)" for folder in (packed_folder, statistics_folder))
    again = f"{measured}, so each load measures the model again: {advice}"
    assert told == [f"{packed}, so each load packs the weights again: {advice}", again, again]
    monkeypatch.setenv("OCTO_RUN_CACHE", str(tmp_path / "elsewhere"))
    load(model, kv="auto:56", max_context=600, on_unkept=told.append)
    monkeypatch.setattr(folders, "NOTICEABLE", 1000.0)
    monkeypatch.setenv("OCTO_RUN_CACHE", str(cache))
    load(model, kv="auto:56", max_context=600, on_unkept=told.append)
    assert len(told) == 3
