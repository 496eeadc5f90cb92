"""Reading safetensors: exact values, and one sentence for every defect of a file, an index or a set of tensors."""

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from octo_run.cli.show import describe
from octo_run.engine.engine import Engine
from octo_run.errors import OctoError
from octo_run.models import tensors as tensors_module
from octo_run.models.config import load_config, load_generation_defaults
from octo_run.models.files import missing_files
from octo_run.models.hub import DEMO_PATH
from octo_run.models.safetensors_file import read_header
from octo_run.models.tensors import expected_tensors, num_parameters, stored_config
from octo_run.models.weights import load_weights, random_weights

Make = Callable[..., Path]


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return load_weights(folder, load_config(folder), "cpu", dtype)


def refused(folder: Path, dtype: torch.dtype = torch.bfloat16) -> str:
    with pytest.raises(OctoError) as error:
        load(folder, dtype)
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and str(folder) in text
    return text


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite the single weight file with tensors replaced, added or (None) left out; ``__`` stands for a dot."""
    path = folder / "model.safetensors"
    tensors: dict[str, Any] = load_file(path) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def test_embedded_model() -> None:
    cfg = load_config(DEMO_PATH)
    weights = load_weights(DEMO_PATH, cfg, "cpu", torch.bfloat16)
    assert {name: tuple(value.shape) for name, value in weights.items()} == expected_tensors(cfg)
    for path in DEMO_PATH.glob("*.safetensors"):
        for name, value in load_file(path).items():
            assert torch.equal(weights[name], value)
    assert sum(value.nbytes for value in weights.values()) == 2 * num_parameters(cfg) == 37_761_792
    assert num_parameters(cfg) == 37_761_792 // 2


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_in_every_dtype(make_checkpoint: Make, shards: int, dtype: torch.dtype) -> None:
    folder = make_checkpoint(shards=shards, torch_dtype="float32")
    stored = random_weights(load_config(folder), "cpu", torch.float32, 0)
    loaded = load(folder, dtype)
    assert list(loaded) == list(expected_tensors(load_config(folder)))
    for name, value in loaded.items():
        assert value.dtype == dtype and value.is_contiguous() and torch.equal(value, stored[name].to(dtype))


def test_weights_do_not_depend_on_the_file_afterwards(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    loaded = load(folder)
    stored = random_weights(load_config(folder), "cpu", torch.bfloat16, 0)
    (folder / "model.safetensors").write_bytes(b"")
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)
    loaded["model.norm.weight"].zero_()  # ordinary memory, not a read-only mapping


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "head_dim": 80},
    ],
)
def test_expected_tensors_are_those_of_transformers(make_checkpoint: Make, changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make_checkpoint(**changes)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    cfg = load_config(folder)
    if cfg.tie_word_embeddings:
        del theirs["lm_head.weight"]
    assert theirs == expected_tensors(cfg)


def test_random_weights_are_repeatable_and_scaled(make_checkpoint: Make) -> None:
    cfg = load_config(make_checkpoint())
    one, same, other = (random_weights(cfg, "cpu", torch.float32, seed) for seed in (1, 1, 2))
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
    assert one[name].std().item() == pytest.approx(96**-0.5, rel=0.05)
    assert one["model.norm.weight"].mean().item() == pytest.approx(1.0, abs=0.1)


def test_harmless_extras(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    change(
        folder,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(32),
        model__rotary_emb__inv_freq=torch.ones(32),
        model__layers__0__self_attn__k_scale=torch.tensor(0.5),
        model__layers__0__self_attn__v_proj__v_scale=torch.tensor([0.5]),
        model__layers__1__self_attn__attn__kv_scale=torch.tensor(0.5),
        mtp__layers__0__mlp__up_proj__weight=torch.ones(4, 4),
    )
    assert list(load(folder)) == list(expected_tensors(load_config(folder)))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.k_proj.weight_scale",
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.0.self_attn.k_norm.weight",
        "model.layers.2.mlp.up_proj.weight",
        "lm_head.bias",
        "k_scale",
    ],
)
def test_tensors_that_would_change_the_result_are_refused_by_name(make_checkpoint: Make, name: str) -> None:
    folder = make_checkpoint()
    change(folder, **{name: torch.ones(4)})
    assert f"1 unexpected ({name})" in refused(folder)


def embedding_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"]


@pytest.mark.slow
def test_a_stored_head_of_its_own_counts(make_checkpoint: Make) -> None:
    """The configuration ties it, the file holds another one: logits, plan and description are those of the head."""
    tied, untied = make_checkpoint("tied"), make_checkpoint("untied")
    head = torch.randn(8192, 64).bfloat16()
    for folder in (tied, untied):
        change(folder, lm_head__weight=head)
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    cfg = stored_config(tied, load_config(tied))
    assert cfg == load_config(untied) and cfg != load_config(tied)
    assert torch.equal(load(tied)["lm_head.weight"], head)
    engines = [Engine.load(folder, device="cpu", max_context=512) for folder in (tied, untied)]
    assert engines[0].plan.weights == engines[1].plan.weights
    logits = [engine.logits([1, 2, 3]) for engine in engines]
    assert torch.equal(*logits)
    facts = [describe(str(folder), "cpu", None) for folder in (tied, untied)]
    assert facts[0]["parameters"] == facts[1]["parameters"] == num_parameters(cfg)


@pytest.mark.few(4)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["first", "last", "nowhere"])
def test_heads_are_compared_by_value(make_checkpoint: Make, dtype: torch.dtype, where: str) -> None:
    """An equal copy loads as one, of whatever dtype; one item that differs anywhere makes two."""
    folder = make_checkpoint(shards=1, hidden_size=512, head_dim=64)
    head = embedding_of(folder).clamp(-1, 1).mul(8).round().div(8)  # values that every dtype holds
    change(folder, model__embed_tokens__weight=head.clone())
    head = head.to(dtype)
    if where != "nowhere":
        head.view(-1)[0 if where == "first" else -1] += 1
    change(folder, lm_head__weight=head)
    cfg = stored_config(folder, load_config(folder))
    assert cfg.tie_word_embeddings == (where == "nowhere")
    assert ("lm_head.weight" in load(folder)) == (where != "nowhere")


def test_heads_in_several_files(make_checkpoint: Make) -> None:
    folder = make_checkpoint("sharded", shards=3, tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert not stored_config(folder, load_config(folder)).tie_word_embeddings


def test_a_head_without_an_embedding_is_both(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    embedding = embedding_of(folder)
    change(folder, lm_head__weight=embedding, model__embed_tokens__weight=None)
    assert stored_config(folder, load_config(folder)).tie_word_embeddings
    loaded = load(folder)
    assert torch.equal(loaded["model.embed_tokens.weight"], embedding) and "lm_head.weight" not in loaded
    change(folder, lm_head__weight=None)
    assert "1 missing (model.embed_tokens.weight)" in refused(folder)


def test_an_untied_copy_stays_as_the_file_has_it(make_checkpoint: Make) -> None:
    folder = make_checkpoint(tie_word_embeddings=False)
    change(folder, lm_head__weight=embedding_of(folder).clone())
    cfg = load_config(folder)
    assert stored_config(folder, cfg) == cfg and "lm_head.weight" in load(folder)


def test_a_stored_head_that_cannot_be_used_is_refused(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    change(folder, lm_head__weight=torch.zeros(100, 64))
    assert "1 misshapen (lm_head.weight is [100, 64] instead of [8192, 64])" in refused(folder)
    change(folder, lm_head__weight=torch.zeros(8192, 64, dtype=torch.int8))
    assert "(lm_head.weight is I8)" in refused(folder)


def test_heads_as_transformers_ties_them(make_checkpoint: Make) -> None:
    transformers = pytest.importorskip("transformers")
    for name, head in (("equal", lambda e: e.clone()), ("other", lambda e: e * 2), ("none", lambda e: None)):
        folder = make_checkpoint(name, torch_dtype="float32")
        change(folder, lm_head__weight=head(embedding_of(folder)))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
        loaded = load(folder, torch.float32)
        assert torch.equal(loaded.get("lm_head.weight", loaded["model.embed_tokens.weight"]), theirs), name


def test_missing_unexpected_and_misshapen_tensors_are_listed(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    change(
        folder,
        model__norm__weight=None,
        model__layers__0__self_attn__q_proj__bias=torch.zeros(256),
        model__layers__1__mlp__up_proj__weight=torch.zeros(64, 96),
        model__layers__1__mlp__down_proj__weight=torch.zeros(64, 96, dtype=torch.int8),
    )
    text = refused(folder)
    assert "1 missing (model.norm.weight)" in text
    assert "1 unexpected (model.layers.0.self_attn.q_proj.bias)" in text
    assert "1 misshapen (model.layers.1.mlp.up_proj.weight is [64, 96] instead of [96, 64])" in text
    assert "1 of a dtype other than F64/F32/F16/BF16 (model.layers.1.mlp.down_proj.weight is I8)" in text


def test_dtypes_that_are_no_weights_are_refused_by_name(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    for dtype, name in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e8m0fnu, "F8_E8M0"), (torch.complex64, "C64")):
        change(folder, model__norm__weight=torch.ones(64).to(dtype))
        assert f"1 of a dtype other than F64/F32/F16/BF16 (model.norm.weight is {name})" in refused(folder)


def test_long_lists_are_cut(make_checkpoint: Make) -> None:
    folder = make_checkpoint(num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "18 missing (model.layers.1." in (text := refused(folder)) and "and 14 more" in text


def test_untied_model_needs_its_head(make_checkpoint: Make) -> None:
    folder = make_checkpoint(tie_word_embeddings=False)
    change(folder, lm_head__weight=None)
    assert "1 missing (lm_head.weight)" in refused(folder)


def test_float16_overflow_is_refused(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    change(folder, model__norm__weight=torch.full((64,), 1e6, dtype=torch.bfloat16))
    assert "model.norm.weight has values that float16 cannot hold" in refused(folder, torch.float16)
    assert load(folder)["model.norm.weight"][0] > 9e5


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 5000, -1])
def test_truncated_file(make_checkpoint: Make, keep: int) -> None:
    folder = make_checkpoint()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is no complete safetensors file" in refused(folder)


def test_wrong_files(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"PK\x03\x04 a zip archive", b"<html>404</html>" * 9, whole + b"\0", b"\0" * 8, b"\xff" * 64):
        path.write_bytes(content)
        assert f"{path} is no complete safetensors file" in refused(folder)


def header_file(path: Path, header: Any, data: bytes = b"\0" * 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ([], "a JSON list where an object is needed"),
        (b'{"a": 1, "a": 2}', "a name occurs twice"),
        (b"{" * 60_000, "not valid JSON"),
        ({"a": 3}, "lacks dtype, shape or data_offsets"),
        ({"a": {"dtype": "F32"}}, "lacks dtype, shape or data_offsets"),
        ({"a": entry("F33")}, "has the dtype 'F33'"),
        ({"a": entry(["F32"])}, "has the dtype"),
        ({"a": entry(shape=[-2])}, "the shape of 'a'"),
        ({"a": entry(shape=[2**40, 2**40])}, "not those of F32"),
        ({"a": entry(shape=[True, 2])}, "the shape of 'a'"),
        ({"a": entry(offsets=[0, 16])}, "'a' ends at byte"),
        ({"a": entry(offsets=[8, 0])}, "'a' ends at byte"),
        ({"a": entry(offsets=[0, 2**70])}, "the data_offsets of 'a'"),
        ({"a": entry(offsets=[0, 4])}, "has 4 bytes, not those of F32 [2]"),
        ({"a": entry(shape=[1], offsets=[4, 8])}, "starts at byte"),
        ({"a": entry(shape=[1], offsets=[0, 4])}, "its tensors end at byte"),
        ({"a": entry(), "b": entry()}, "starts at byte"),
        ({"a": entry(), "b": entry(shape=[1], offsets=[4, 8])}, "starts at byte"),
    ],
)
def test_bad_headers(tmp_path: Path, header: Any, words: str) -> None:
    path = header_file(tmp_path / "x.safetensors", header)
    with pytest.raises(OctoError) as error:
        read_header(path)
    assert words in str(error.value) and str(path) in str(error.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_of_the_header_is_noticed_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    """With bytes of the file changed, inserted or cut, a header is refused or stays inside the file."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3, 5), "b": torch.ones(7, dtype=torch.int8)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content)))
        end = position + data.draw(st.integers(0, 4))
        content[position:end] = data.draw(st.binary(max_size=4) | st.sampled_from([b"9", b"0", b"-", b"1e3", b"]"]))
    path.write_bytes(content)
    try:
        header = read_header(path)
    except OctoError:
        return
    assert all(0 < item.start <= item.end <= len(content) for item in header.values())


def test_missing_shard_is_named(make_checkpoint: Make) -> None:
    folder = make_checkpoint(shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "1 of 3 weight files missing (model-00002-of-00003.safetensors)" in refused(folder)


def test_index_and_shards_must_agree(make_checkpoint: Make) -> None:
    folder = make_checkpoint(shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    name = next(item for item, file in index["weight_map"].items() if file == first)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {name: second}}))
    assert f"places {name!r} in {second}, which does not hold it" in refused(folder)
    path.write_text(json.dumps(index))
    both = load_file(folder / second) | {name: load_file(folder / first)[name]}
    save_file(both, folder / second)
    assert f"the tensor {name!r} is in {first} and in {second}" in refused(folder)


@pytest.mark.parametrize(
    "name", ["mtp.fc.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight", "x" * 5000]
)
def test_index_entries_that_nobody_holds_or_needs(make_checkpoint: Make, name: str) -> None:
    folder = make_checkpoint(shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": index | {name: next(iter(index.values()))}}))
    assert list(load(folder)) == list(expected_tensors(load_config(folder)))
    # one that is needed is missing all the same
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert "1 missing (lm_head.weight)" in refused(folder)


def test_foreign_names_of_tensors_and_files_are_shown_short(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    change(folder, **{"\x1b]52;c;aGk=\x07" + "n" * 5000: torch.ones(1), "model.norm.weight": torch.ones([1] * 9)})
    text = refused(folder)
    assert text.isprintable() and "1 unexpected (\\x1b]52;" in text
    assert "1 misshapen (model.norm.weight is a list of 9 instead of [64])" in text
    folder = make_checkpoint("sharded", shards=2)
    index = folder / "model.safetensors.index.json"
    for weight_map, words in (
        ({"\x1b" * 5000: "../" * 2000}, "not a plain .safetensors name"),
        ({"a": "x" * 5000 + ".safetensors"}, "File name too long"),
        ({str(i): f"{i}.safetensors" for i in range(10_001)}, "names more than 10,000 files"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert words in (text := refused(folder)) and text.isprintable()
        missing_files(folder)  # no exception


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "endless", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(make_checkpoint: Make, name: str, kind: str) -> None:
    folder = make_checkpoint(shards=2 if "index" in name else 1)
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "endless":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    with pytest.raises(OctoError, match=rf"{re.escape(name)} is no regular file"):
        load_generation_defaults(folder)
        load(folder)


def test_too_large_a_configuration(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    with (folder / "config.json").open("r+b") as file:
        file.truncate(200 << 20)
    with pytest.raises(OctoError, match="more than any file of its kind"):
        load_config(folder)
    (folder / "config.json").write_text('{"a":[' + "0," * 2_600_000 + "0]}")
    with pytest.raises(OctoError, match="more than 2,500,000 items"):
        load_config(folder)


def test_a_replaced_file_is_not_read_as_the_new_one(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the headers and the data every file becomes another one of the same tensors."""
    folder, other = make_checkpoint(), make_checkpoint("other", seed=1)
    check = tensors_module.check_tensors

    def replace_after(*args: Any) -> Any:
        result = check(*args)
        (other / "model.safetensors").replace(folder / "model.safetensors")
        return result

    monkeypatch.setattr(tensors_module, "check_tensors", replace_after)
    assert "model.safetensors was changed or replaced while it was read" in refused(folder)


DAMAGE = {
    "cut": "os.truncate(path, 20_000)",
    "emptied": "os.truncate(path, 0)",
    "written": "open(path, 'r+b').write(b'x')",
    "grown": "open(path, 'ab').write(b'x')",
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_file_that_changes_while_it_is_read_is_refused(make_checkpoint: Make, damage: str) -> None:
    """After the first tensor; in a process of its own, which a mapped file that shrinks would end by SIGBUS."""
    folder = make_checkpoint()
    code = f"""
import os, torch
from pathlib import Path
from octo_run.errors import OctoError
from octo_run.models.config import load_config
from octo_run.models.weights import load_weights
folder = Path({str(folder)!r}); path = folder / "model.safetensors"
original, done = torch.Tensor.isfinite, []
def isfinite(self):
    if not done:
        done.append(1); {DAMAGE[damage]}
    return original(self)
torch.Tensor.isfinite = isfinite
try:
    load_weights(folder, load_config(folder), "cpu", torch.float16)
except OctoError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    assert "model.safetensors was changed or replaced while it was read" in done.stdout


@pytest.mark.parametrize("file", ["../../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "pytorch.bin", 3])
def test_index_names_plain_safetensors_files_only(make_checkpoint: Make, file: Any) -> None:
    folder = make_checkpoint(shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    assert "not a plain .safetensors name" in refused(folder)


def test_broken_index(make_checkpoint: Make) -> None:
    folder = make_checkpoint(shards=2)
    for content in ("{}", '{"weight_map": {}}', '{"weight_map": []}'):
        (folder / "model.safetensors.index.json").write_text(content)
        assert "weight_map is missing or no object with entries" in refused(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    assert "is not valid JSON" in refused(folder)


def test_no_weights(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickled weights such as pytorch_model.bin are never opened" in refused(folder)
    (folder / "gptq_model-4bit-128g.safetensors").write_bytes(b"")
    assert "(weights such as gptq_model-4bit-128g.safetensors are not read)" in refused(folder)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc/self/status")
def test_loading_does_not_hold_the_model_twice(make_checkpoint: Make) -> None:
    """Peak memory of loading 0.2 GB, in a process of its own, stays well below two copies."""
    folder = make_checkpoint(hidden_size=1024, intermediate_size=4096, num_hidden_layers=6)
    code = f"""
import re, torch
from pathlib import Path
from octo_run.models.config import load_config
from octo_run.models.tensors import num_parameters
from octo_run.models.weights import load_weights
folder = Path({str(folder)!r}); cfg = load_config(folder)
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
weights = load_weights(folder, cfg, "cpu", torch.bfloat16)
print((peak() - before) / (2 * num_parameters(cfg)))
"""
    ratio = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 0.95 < ratio < 1.35, ratio


@pytest.mark.gpu
def test_load_to_the_gpu(make_checkpoint: Make) -> None:
    folder = make_checkpoint(shards=2)
    cfg = load_config(folder)
    on_gpu = load_weights(folder, cfg, "cuda", torch.float16)
    on_cpu = load_weights(folder, cfg, "cpu", torch.float16)
    assert all(value.is_cuda and torch.equal(value.cpu(), on_cpu[name]) for name, value in on_gpu.items())
