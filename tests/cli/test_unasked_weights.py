"""What weights are stored as when nobody says: int8 on a CPU with compiled kernels, and it is told."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octo_run import UsageError
from octo_run.cli import checks, runtime
from octo_run.cli.evaluate import common
from octo_run.cli.options import EngineOptions
from octo_run.kernels import cpu
from octo_run.kernels.cpu import native

ASKED = EngineOptions("octo-demo", "oct3", None, 256, "cpu", None, True, None)


def stored(**changes: Any) -> tuple[str | None, str | None]:
    found = runtime.resolved(replace(ASKED, **changes))
    return found.weights, found.head


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: object())


def test_unasked_they_are_int8_on_a_cpu() -> None:
    assert stored() == ("int8", "int8")
    assert stored(weights="auto") == ("auto", "bf16") and stored(weights="bf16") == ("bf16", "bf16")
    assert stored(weights="fp8") == ("fp8", "bf16")
    assert stored(head="bf16") == ("int8", "bf16") and stored(head="int8") == ("int8", "int8")


def test_beside_packed_layers_the_head_is_int8_unless_asked() -> None:
    for weights in ("int8", "int4", "int4-128"):
        assert stored(weights=weights) == (weights, "int8")
        assert stored(weights=weights, head="bf16") == (weights, "bf16")


@pytest.mark.parametrize(
    ("quantised", "head"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "int8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, "int8"),
        ({"quant_method": "fp8"}, "bf16"),
    ],
)
def test_files_of_4_and_8_bits_have_it_too(
    quantised: dict[str, Any], head: str, make_checkpoint: Callable[..., Path]
) -> None:
    path = str(make_checkpoint(quantization_config=quantised))
    assert stored(model=path) == ("auto", head)
    assert stored(model=path, head="bf16") == ("auto", "bf16") == stored(model=path, weights="auto")


def test_it_is_read_in_the_plan(octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(runtime, "_planned", set())
    if cpu.library() is None:
        pytest.skip("the CPU's kernels are not compiled here")
    run = ("generate", "-p", "Once", "-n", "1", "--ctx", "256", "--device", "cpu", "--weights", "int4")
    assert "weights int4, head int8, KV cache" in octo(*run).err
    runtime._planned.clear()
    err = octo(*run, "--head", "bf16").err
    assert "weights int4" in err and "head int8" not in err


def test_eval_measures_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EngineOptions] = []
    monkeypatch.setattr(runtime, "load_engine", lambda options, **_: seen.append(runtime.resolved(options)))
    common.loader(ASKED, common.CacheOptions(64, 64, 0), 256)("int8/oct3")
    common.loader(ASKED, common.CacheOptions(64, 64, 0), 256)("oct3")
    assert [(one.weights, one.head) for one in seen] == [("int8", "bf16"), ("auto", "bf16")]


def test_what_is_resolved_stays_so() -> None:
    found = runtime.resolved(ASKED)
    assert runtime.resolved(found) == found


def test_without_compiled_kernels_they_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert stored() == ("auto", "bf16") and stored(weights="int4") == ("int4", "bf16")
    assert stored(head="int8") == ("auto", "int8")


def test_random_weights_are_those_of_their_shape() -> None:
    assert runtime.resolved(replace(ASKED, model="none/such"), "llama-3.1-8b").weights == "int8"
    assert runtime.resolved(replace(ASKED, model="none/such"), "mixtral-8x7b").weights == "auto", "it has experts"
    assert runtime.resolved(replace(ASKED, model="none/such"), "mixtral-8x7b").head == "bf16"


def test_it_is_told_once(octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(runtime, "_said", set())
    monkeypatch.setattr(runtime, "_planned", set())
    if cpu.library() is None:
        pytest.skip("the CPU's kernels are not compiled here")
    shown = octo("generate", "-p", "Once", "-n", "2", "--ctx", "256", "--device", "cpu", "--temp", "0")
    assert shown.code == 0 and shown.err.count("weights in int8, as a CPU is slow to read them; --weights bf16") == 1
    runtime._planned.clear()
    asked = octo("generate", "-p", "Once", "-n", "2", "--ctx", "256", "--device", "cpu", "--weights", "fp32")
    assert asked.code == 0 and "as a CPU is slow" not in asked.err and "weights fp32" in asked.err


@pytest.mark.few("experts")
@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 3, "num_experts_per_tok": 2}, 1),
        (
            {
                "architectures": ["Qwen3_5ForCausalLM"], "num_hidden_layers": 4, "linear_key_head_dim": 32,
                "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
            },
            1,
        ),
        ({}, 0),
    ],
    ids=["experts", "recurrent", "dense"],
)  # fmt: skip
def test_16_bits_that_change_nothing_are_told(
    octo: Callable[..., Any], make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    model: dict[str, Any], told: int,
) -> None:  # fmt: skip
    monkeypatch.undo()
    monkeypatch.setattr(runtime, "_said", set())
    monkeypatch.setattr(runtime, "_planned", set())
    path = make_checkpoint(**({"model_type": None} | model if model else {}))
    argv = ("-p", "Once", "-n", "1", "--ctx", "256", "--device", "cpu", "--conditioning", "off", "--weights", "bf16")
    run = octo("generate", "-m", str(path), *argv)
    said = "--weights bf16 changes nothing: weights of a model with experts or recurrent layers are in the dtype of the"
    assert run.code == 0 and run.err.count(said) == told, run.err
    assert ("weights fp32" if told else "weights bf16") in run.err


def test_a_benchmark_names_threads_and_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "path_name", lambda: "AVX2")
    engine = SimpleNamespace(device=torch.device("cpu"))
    assert re.fullmatch(r"cpu \(\d+ threads?, AVX2\)", runtime.device_name(engine))  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", [None, "int8"])
def test_missing_kernels_are_told_once(
    octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: str | None
) -> None:
    """Without a compiler, with one that fails, in a folder that cannot be: each with what to do."""
    monkeypatch.undo()
    broken, file = tmp_path / "c++", tmp_path / "file"
    broken.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    broken.chmod(0o755)
    file.write_text("")
    run = ("generate", "-p", "Once", "-n", "1", "--ctx", "256", "--device", "cpu")
    run += ("--weights", weights) if weights else ()
    for named, folder, why in (
        ("/none", tmp_path / "a", "there is no C++ compiler (CXX is '/none', which is no program here)"),
        (str(broken), tmp_path / "b", f"{broken} fails: no such option (CXX names another compiler)"),
        (str(broken), file / "c", "OCTO_RUN_CPU_KERNELS=FOLDER names a place"),
    ):
        monkeypatch.setattr(runtime, "_said", set())
        monkeypatch.setenv("CXX", named)
        monkeypatch.setenv("OCTO_RUN_CPU_KERNELS", str(folder))
        native._found.cache_clear()
        shown = octo(*run)
        assert shown.code == 0 and shown.err.count("slow: PyTorch does the work of compiled kernels, as ") == 1
        assert why in shown.err
        meant = "--weights bf16 is faster there than int8" if weights else "weights are not quantised"
        assert f"; {meant}\n" in shown.err
    monkeypatch.setattr(runtime, "_said", set())
    monkeypatch.setenv("OCTO_RUN_CPU_KERNELS", "0")
    assert "slow: " not in octo(*run).err, "as asked"


def test_names_may_be_in_capital_letters(octo: Callable[..., Any], engine: Any, tmp_path: Path) -> None:
    engine.answers("once")
    assert octo("generate", "-p", "x", "--weights", "INT4", "--head", "INT8", "--conditioning", "OFF").code == 0
    assert (engine.loaded.weights, engine.loaded.head) == ("int4", "int8")
    assert octo("bench", "--weights", "BF16, Int8", "--tests", "tg8").code == 0 and engine.weights[1:] == [
        "bf16",
        "int8",
    ]
    assert "no folder" in octo("quantize", "octo-demo", str(tmp_path / "none" / "out"), "--weights", "INT8").err
    assert "there is no format" not in octo("import", str(tmp_path / "no.gguf"), "--weights", "INT8").err.lower()


def test_unasked_heads_without_a_code_have_a_cache_in_bf16(
    make_checkpoint: Callable[..., Path],
) -> None:
    plain = replace(ASKED, model=str(make_checkpoint(head_dim=40)), kv=None)
    assert runtime.resolved(plain).kv == "bf16"
    assert runtime.resolved(replace(ASKED, kv=None)).kv == "oct3"
    assert runtime.resolved(replace(plain, kv="oct4")).kv == "oct4", "what is asked for is not changed, but refused"
    with pytest.raises(UsageError, match=r"oct4 cannot store head_dim 40.*use --kv bf16"):
        checks.loadable(replace(plain, kv="oct4"))
    assert checks.loadable(plain).head_dim == 40
    assert checks.several_formats(None, checks.loadable(plain)) == ["bf16"]
    with pytest.raises(UsageError, match="unknown KV format ''"):
        checks.several_formats("", checks.loadable(plain))
