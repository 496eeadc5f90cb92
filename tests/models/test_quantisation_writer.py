"""Folders of quantised weights, read by the format's description and by other programs, against what loading makes."""

import json
import re
import runpy
from collections.abc import Callable
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from octo_run.engine.quantise import quantise
from octo_run.errors import OctoError, UsageError
from octo_run.kernels.linear import PackedWeight
from octo_run.models import safetensors_writer
from octo_run.models.config import load_config
from octo_run.models.decoder import Decoder
from octo_run.models.plain_attention import attend_plain
from octo_run.models.quantisation.importance import random_ids
from octo_run.models.quantisation.schemes import SCHEMES
from octo_run.models.weights import StoredWeights

#: The dtype and the shape of a tensor.
Place = tuple[torch.dtype, tuple[int, ...]]
experts = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "engine" / "test_expert_families.py")))


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as data:
            found |= {name: data.get_tensor(name) for name in data.keys()}  # noqa: SIM118
    return found


def on_load(path: Path, weights: str) -> Decoder:
    cfg, scheme = load_config(path), SCHEMES[weights]
    source = StoredWeights(path, cfg, "cpu", torch.float32)
    with torch.inference_mode():
        return Decoder(source.cfg, source, None, None, scheme, random_ids(cfg) if scheme.weighted else None)


def described(folder: Path, prefix: str, found: dict[str, Tensor]) -> Tensor:
    """A matrix by the description of the format: (code - zero) * scale, codes being words of two or eight of them."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    about, scale = config["config_groups"]["group_0"]["weights"], found[f"{prefix}.weight_scale"]
    if config["format"] == "float-quantized":
        return found[f"{prefix}.weight"].float() * scale
    bits = about["num_bits"]
    shifts, out = torch.arange(0, 32, bits), int(found[f"{prefix}.weight_shape"][0])

    def integers(words: Tensor) -> Tensor:  # the first in the lowest bits, each with half the range added
        return (words[..., None] >> shifts & (1 << bits) - 1).flatten(1) - (1 << bits - 1)

    codes = integers(found[f"{prefix}.weight_packed"])[:, : int(found[f"{prefix}.weight_shape"][1])]
    zeros = torch.zeros_like(scale)
    if not about["symmetric"]:  # along rows
        zeros = integers(found[f"{prefix}.weight_zero_point"].T).T[:out]
    group = about["group_size"] or codes.shape[1]
    return (codes - zeros.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)


def decompressed(folder: Path, prefix: str, found: dict[str, Tensor]) -> Tensor:
    """A matrix as the compressed-tensors package reads it, by what config.json says."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    (scheme,) = config.config_groups.values()
    compressor: Any = BaseCompressor.get_value_from_registry(config.format)
    parts = {name.removeprefix(f"{prefix}."): part for name, part in found.items() if name.startswith(f"{prefix}.w")}
    result: Tensor = compressor.decompress(parts, scheme)["weight"]
    # What the package itself writes of these values is the same, tensor by tensor.
    wide = {"weight": result, "weight_scale": parts["weight_scale"]}
    if "weight_zero_point" in parts:
        codes = parts["weight_zero_point"].T[..., None] >> torch.arange(0, 32, 4) & 15
        wide["weight_zero_point"] = (codes.flatten(1).T - 8).to(torch.int8)
    again = compressor.compress(wide, scheme)
    assert again.keys() == parts.keys()
    assert all(torch.equal(again[name].float(), parts[name].float()) for name in parts)
    return result


@pytest.mark.few(3)
@pytest.mark.parametrize("weights", SCHEMES)
@pytest.mark.parametrize("tied", [True, False])
def test_another_reader_finds_what_loading_makes(
    make_checkpoint: Callable[..., Path], tmp_path: Path, weights: str, tied: bool
) -> None:
    path = make_checkpoint(hidden_size=256, intermediate_size=384, tie_word_embeddings=tied, attention_bias=True)
    out = tmp_path / "out"
    size = quantise(path, out, weights, device="cpu")
    assert size == sum(file.stat().st_size for file in out.iterdir())
    found, decoder = tensors(out), on_load(path, weights)
    cfg, original = decoder.cfg, tensors(path)
    assert ("lm_head.weight" in found) == (not tied)
    for name, tensor in original.items():  # all that is not quantised is as it was
        if not name.endswith("_proj.weight"):
            assert torch.equal(found[name], tensor), name
    rows = cfg.num_heads * cfg.head_dim
    for index, layer in enumerate(decoder.layers):
        qkv = layer.attention.qkv.parts[0].weight
        assert isinstance(qkv, PackedWeight)
        k = qkv.part(rows, rows + cfg.num_kv_heads * cfg.head_dim)
        down = layer.mlp.down.weight
        assert isinstance(down, PackedWeight)
        for name, packed in (("self_attn.k_proj", k), ("mlp.down_proj", down)):
            assert torch.equal(described(out, f"model.layers.{index}.{name}", found), packed.dequantised())
            if util.find_spec("compressed_tensors") is not None:
                assert torch.equal(decompressed(out, f"model.layers.{index}.{name}", found), packed.dequantised())


@pytest.mark.parametrize("weights", SCHEMES)
def test_transformers_computes_the_same(make_checkpoint: Callable[..., Path], tmp_path: Path, weights: str) -> None:
    pytest.importorskip("compressed_tensors", reason="the package by which transformers reads these files")
    from transformers import AutoModelForCausalLM

    path, out = make_checkpoint(hidden_size=256, intermediate_size=384, attention_bias=True), tmp_path / "out"
    quantise(path, out, weights, device="cpu")
    theirs: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    cfg, ids = load_config(out), torch.arange(5, 45)[None]
    with torch.inference_mode():
        ours = Decoder(cfg, StoredWeights(out, cfg, "cpu", torch.float32), None, None)
        hidden = ours.hidden(
            ids, torch.arange(40)[None], lambda layer, q, k, v: attend_plain(q, k, v, ours.specs[layer].attention)
        )
        torch.testing.assert_close(theirs(ids).logits, ours.logits(hidden), rtol=0, atol=1e-3)
        assert theirs.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 43)


def numbers(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The group of config.json that a matrix belongs to: by a pattern of its name, else as a linear layer."""
    if any(re.match(entry[3:], name) if entry.startswith("re:") else entry == name for entry in config["ignore"]):
        return None
    groups = {target: group for group in config["config_groups"].values() for target in group["targets"]}
    patterns = [target for target in groups if target.startswith("re:") and re.match(target[3:], name)]
    found: dict[str, Any] = groups[patterns[0] if patterns else "Linear"]
    return found


def places(
    form: str, weights: dict[str, Any], out: int, columns: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of a matrix as vLLM 0.33 makes places for them."""
    groups = columns // (weights["group_size"] or columns)
    scale = (torch.float32, (out, groups))
    if form == "float-quantized":
        assert weights["type"] == "float" and weights["strategy"] == "channel" and weights["symmetric"]
        return {"weight": (torch.float8_e4m3fn, (out, columns)), "weight_scale": scale}
    bits = weights["num_bits"]
    assert weights["type"] == "int" and not weights["dynamic"] and weights["actorder"] is None and 32 % bits == 0
    assert weights["strategy"] == ("channel" if weights["group_size"] is None else "group")
    found = {
        "weight_packed": (torch.int32, (out, columns * bits // 32)), "weight_scale": scale,
        "weight_shape": (torch.int64, (2,)),
    }  # fmt: skip
    if not weights["symmetric"]:
        assert out % (32 // bits) == 0  # zeros of fused matrices lie one behind the other, in whole words
        found["weight_zero_point"] = (torch.int32, (out * bits // 32, groups))
    return found


@pytest.mark.few(4)
@pytest.mark.parametrize("family", ["qwen3-moe", "llama", "mixtral", "qwen2-moe"])
@pytest.mark.parametrize("weights", SCHEMES)
def test_vllm_has_a_place_for_each_tensor(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, weights: str
) -> None:
    """By the rules of its reader of compressed-tensors, which are retold here."""
    path, packed = tmp_path / "model", tmp_path / "packed"
    if family == "llama":
        make_checkpoint(hidden_size=256, intermediate_size=384, tie_word_embeddings=False)
    else:
        sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "intermediate_size": 128}
        experts.save(family, path, **sizes, moe_intermediate_size=128, shared_expert_intermediate_size=128)
    quantise(path, packed, weights, device="cpu")
    config, found = json.loads((packed / "config.json").read_text())["quantization_config"], tensors(packed)
    wanted = dict[str, Place]()
    for name, tensor in tensors(path).items():
        module, part = name.rpartition(".")[::2]
        group = numbers(config, module) if part == "weight" and tensor.ndim == 2 and "embed" not in name else None
        if group is None:
            wanted[name] = (tensor.dtype, tuple(tensor.shape))
            continue
        made = places(config["format"], group["weights"], *tensor.shape)
        wanted |= {f"{module}.{each}": place for each, place in made.items()}
        if ".experts." in module:  # not all versions read zeros; with fp8 weights none leaves inputs as they are
            assert group["weights"]["symmetric"]
            dynamic = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
            assert dynamic.items() <= group["input_activations"].items() if weights == "fp8" else True
        else:
            assert group["input_activations"] is None
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()} == wanted


@pytest.mark.parametrize(("weights", "whole"), [("int4", True), ("int4-128", True), ("int8", False), ("fp8", False)])
def test_files_with_packed_zeros_tell_transformers_to_read_matrices_whole(
    make_checkpoint: Callable[..., Path], tmp_path: Path, weights: str, whole: bool
) -> None:
    path, out = make_checkpoint(hidden_size=256, intermediate_size=384), tmp_path / "out"
    quantise(path, out, weights, device="cpu")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config.get("dequantize", False) is whole
    assert any(name.endswith("weight_zero_point") for name in tensors(out)) is whole


def test_codes_are_those_of_loading(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path, out = make_checkpoint(hidden_size=256, intermediate_size=384), tmp_path / "out"
    quantise(path, out, "int4", device="cpu")
    words = tensors(out)["model.layers.1.mlp.down_proj.weight_packed"]
    codes = (words[..., None] >> torch.arange(0, 32, 4)) & 15
    down = on_load(path, "int4").layers[1].mlp.down.weight
    assert isinstance(down, PackedWeight)
    assert torch.equal(codes.flatten(1).to(torch.uint8), down.unpacked())


def test_large_models_have_several_files_and_an_index(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole, out = make_checkpoint(hidden_size=256, intermediate_size=384), tmp_path / "whole", tmp_path / "out"
    quantise(path, whole, "int8", device="cpu")
    monkeypatch.setattr(safetensors_writer, "SHARD_BYTES", 500_000)
    quantise(path, out, "int8", device="cpu")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len({*index["weight_map"].values()}) == len([*out.glob("*.safetensors")]) > 2
    one, other = tensors(whole), tensors(out)
    assert one.keys() == other.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_nothing_partial_takes_the_name(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, place = make_checkpoint(hidden_size=256, intermediate_size=384), tmp_path / "place"
    place.mkdir()

    def full(_shard: safetensors_writer.Shard, write: Callable[[bytes], object]) -> None:
        write(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_writer.Shard, "write", full)
    with pytest.raises(OctoError, match=r"out cannot be written \(No space left on device\)"):
        quantise(path, place / "out", "int8", device="cpu")
    assert not [*place.iterdir()]


def test_what_cannot_be_written_is_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path, there = make_checkpoint(hidden_size=192, intermediate_size=384), tmp_path / "there"
    there.mkdir()
    with pytest.raises(UsageError, match="there is there already"):
        quantise(path, there, "int4", device="cpu")
    with pytest.raises(UsageError, match=r"There is no folder .*nowhere to write out into"):
        quantise(path, tmp_path / "nowhere" / "out", "int4", device="cpu")
    with pytest.raises(UsageError, match="nothing to quantise"):
        quantise(path, tmp_path / "out", "bf16", device="cpu")
    with pytest.raises(OctoError, match=r"192 columns, no multiple of 128.* choose other --weights"):
        quantise(path, tmp_path / "out", "int4-128", device="cpu")
    assert not (tmp_path / "out").exists()
