"""``bench``, ``show``, ``list``, ``pull``, ``rm`` and ``doctor``."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octo_run import OctoError, __version__
from octo_run.cli import bench, console, doctor
from octo_run.models import hub
from octo_run.models.cache import DEMO_PATH


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OCTO_RUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (37_769_904, "37.8 MB"), (999_600, "1 MB"), (2 * 10**15, "2000 TB")],
)
def test_human_bytes(count: int, text: str) -> None:
    assert console.human_bytes(count) == text


def test_table_sets_numbers_flush_right() -> None:
    assert console.table(["name", "n"], [["a", "5"], ["long", "1,000"]]) == "name      n\na         5\nlong  1,000"


BENCH = ("bench", "--tests", "pp512,tg128", "--depth", "0,3584", "--kv", "oct3,bf16", "--batch", "2")


@pytest.mark.slow
def test_bench_measures_every_format_depth_and_test(octo: Callable[..., Any], engine: Any) -> None:
    report = json.loads(octo(*BENCH, "-r", "3", "--output", "json").out)
    tests = [("pp", 512), ("tg", 128)]
    assert engine.runs == [(kv, *test, n, 2) for kv in ("oct3", "bf16") for n in (0, 3584) for test in tests]
    assert engine.loaded.ctx == 3584 + 512, "no more context than the tests need"
    assert engine.cache == {"sequences": 2, "random_weights": None}
    assert report["repetitions"] == 3 and report["copy_gb_per_s"] == 100.0
    assert [row["test"] for row in report["rows"][:2]] == ["pp512", "tg128"]
    assert report["rows"][0]["gb_per_s"] is None and report["rows"][1]["of_bandwidth"] == 0.8
    assert report["memory"]["fp32 oct3"]["plan"]["total"] == 1239
    assert report["memory"]["fp32 bf16"]["now"] == {"process_peak": 4_000_000}


@pytest.mark.slow
def test_bench_compares_formats_of_weights(octo: Callable[..., Any], engine: Any) -> None:
    report = json.loads(octo(*BENCH, "--weights", "bf16, int4", "-o", "json").out)
    assert [*zip(engine.weights, engine.loads, strict=True)] == [
        ("bf16", "oct3"), ("bf16", "bf16"), ("int4", "oct3"), ("int4", "bf16"),
    ]  # fmt: skip
    assert [*report["memory"]] == ["bf16 oct3", "bf16 bf16", "int4 oct3", "int4 bf16"]
    assert [row["weights"] for row in report["rows"]] == ["bf16"] * 8 + ["int4"] * 8
    engine.weights.clear()
    refused = octo(*BENCH, "--weights", "bf16,int5")
    assert refused.code == 2 and "There is no format of weights 'int5': did you mean int8, of fp32, " in refused.err
    assert not engine.weights


@pytest.mark.slow
def test_bench_prints_tables_and_lines(octo: Callable[..., Any], engine: Any) -> None:
    table = octo(*BENCH).out
    assert "tokens/s" in table and "1,234.5" in table and "% of copy" in table
    assert (
        "weights fp32, oct3: 7 bytes per packed token; planned: weights 1 kB, KV arena 200 B" in table
        and "process peak 4 MB" in table
    )
    assert (
        "| fp32 | oct3 | tg128 | 3,584 | 2 | 1,234.5 | 1,240.0 | 33.0 | 1,200.0 | 1,300.0 | - | 0.810 | 80.0 | 80 |"
        in octo(*BENCH, "-o", "markdown").out
    )
    lines = octo(*BENCH, "-o", "csv").out.splitlines()
    assert "date,weights,kv,test,depth,batch,tokens_per_s,mean,stdev,least,most,first_token_ms" in lines[0]
    assert len(lines) == 9
    rows = [json.loads(line) for line in octo(*BENCH, "-o", "jsonl").out.splitlines()]
    assert len(rows) == 8 and rows[7]["kv"] == "bf16"
    facts = {"model": "octo-demo", "device": "cpu (1 threads)", "dtype": "float32", "octo_run_version": __version__}
    assert all({**row, **facts} == row and row["threads"] >= 1 for row in rows)
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d", row["date"]) and row["torch_version"] for row in rows)


def test_bench_checks_every_format_before_anything_runs(octo: Callable[..., Any], engine: Any) -> None:
    shown = octo("bench", "--kv", "oct3,nope")
    assert shown.code == 2 and "'nope'" in shown.err and not engine.loads and not engine.runs
    assert octo("bench", "--kv", "OCT3, oct3").code == 0 and engine.loads == ["oct3"]


def test_bench_checks_every_format_of_weights_before_anything_runs(
    octo: Callable[..., Any], engine: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert octo("quantize", "octo-demo", str(out), "--weights", "int8", "--device", "cpu").code == 0
    refused = octo("bench", "-m", str(out), "--weights", "auto,int8")
    assert refused.code == 1 and "quantised already (compressed-tensors) and cannot become int8" in refused.err
    narrow = octo("bench", "--weights", "auto,fp32", "--dtype", "bf16", "--device", "cpu")
    assert narrow.code == 2 and "--weights fp32 is for arithmetic in float32" in narrow.err
    assert not engine.loads


def test_bench_reads_then_writes(octo: Callable[..., Any], engine: Any) -> None:
    shown = octo("bench", "--tests", "pg512+1k", "--depth", "100", "-o", "jsonl")
    assert engine.runs == [("oct3", "pg", 512, 1024, 100, 1)] and engine.loaded.ctx == 100 + 1536
    assert json.loads(shown.out)["test"] == "pg512+1024" and json.loads(shown.out)["first_token_ms"] == 414.7
    assert "give its pp and its tg test" in octo("bench", "--tests", "pg8+8", "--profile").err
    for wrong in ("pg8", "pp8+8", "pg8+", "pg0+8"):
        assert f"'{wrong}' is no test" in octo("bench", "--tests", wrong).err


@pytest.mark.few(1)
@pytest.mark.parametrize("form", ["table", "markdown", "csv", "json", "jsonl"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OctoError("no room")])
def test_an_interrupted_bench_prints_what_it_has(
    octo: Callable[..., Any], engine: Any, form: str, failure: BaseException
) -> None:
    """Ctrl-C, or a failure, in the third of four cases: two rows come out, in any form."""

    def strike() -> None:
        if len(engine.runs) == 3:
            raise failure

    engine.on_round = strike
    shown = octo("bench", "--kv", "oct3,bf16", "-o", form)
    assert shown.code == (130 if failure is KeyboardInterrupt else 1), shown.err
    rows = {"json": 2, "jsonl": 2, "csv": 2, "table": 2, "markdown": 2}[form]
    assert shown.out.count("pp512") + shown.out.count("tg128") == rows, shown.out
    assert ("partial: 2 of 4 cases" in shown.out) == (form in ("table", "markdown"))
    if form == "json":
        report = json.loads(shown.out)
        assert report["cases"] == 4 and len(report["rows"]) == 2


def test_bench_interrupted_before_the_first_row_prints_nothing(octo: Callable[..., Any], engine: Any) -> None:
    def strike() -> None:
        raise KeyboardInterrupt

    engine.on_round = strike
    assert (octo("bench").code, octo("bench").out) == (130, "")


def test_bench_rows_are_told_as_they_come_with_the_time_left(octo: Callable[..., Any], engine: Any) -> None:
    seen: list[str] = []
    engine.on_round = lambda: seen.append("round")
    err = octo("bench", "--kv", "oct3,bf16", "--depth", "0,8", "-r", "2").err.splitlines()
    assert re.fullmatch(r"oct3 pp512 at depth 0: round 1 of 3, case 1 of 8, about \d+:\d\d left", err[0])
    assert len(err) == 9 and len(seen) == 24
    told = r"fp32 oct3 pp512 at depth 0: 1,234.5 tokens/s \(mean 1,240.0 ± 33.0\); case 2 of 8, about \d+:\d\d left"
    assert re.fullmatch(told, err[1]) and err[-1].endswith("± 33.0)")


def test_time_left_follows_the_most_similar_case(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(bench.time, "monotonic", lambda: clock[0])
    cases: Any = [(kv, 0, test) for kv in ("a", "b") for test in (("pp", 100), ("tg", 10))]
    pace = bench.Pace(cases, 2)

    def run(first: float, second: float) -> None:
        pace.begin()
        for seconds in (first, second):
            clock[0] += seconds
            pace.round_done()
        pace.case_done()
        clock[0] += 50  # what lies between cases counts for none

    run(30, 10)
    assert pace.left() == "case 2 of 4, about 0:24 left"  # 2 rounds of 10 tokens, 1 s each, and 2 of 100, and 2 of 10
    run(9, 8)
    assert pace.left() == "case 3 of 4, about 0:36 left"  # 2 * 10 + 2 * 8
    run(11, 11)
    assert pace.left() == "case 4 of 4, about 0:16 left"


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--tests", "pp512,xx"], "'xx' is no test; give a list like pp512,tg128,pg512+128"),
        (["--tests", "tg0"], "'tg0' is no test"),
        (["--depth", "1q"], "'1q' is no list of token counts"),
        (["--depth", "4000", "--ctx", "4096"], "are 4,512 tokens and --ctx says 4,096"),
    ],
)
def test_bench_refuses(octo: Callable[..., Any], engine: Any, argv: list[str], error: str) -> None:
    shown = octo("bench", *argv)
    assert shown.code == 2 and error in shown.err and not engine.runs


def test_show_json(octo: Callable[..., Any]) -> None:
    facts = json.loads(octo("show", "--json", "--device", "cpu").out)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["parameters"] == 18_880_896
    assert facts["weight_bytes"] == 4 * 18_880_896 and facts["dtype"] == "float32"
    weights = {row["weights"]: row for row in facts["weights"]}
    assert [*weights] == ["fp32", "bf16", "fp8", "int8", "int4", "int4-128"]
    assert weights["fp32"]["bytes_head_bf16"] == facts["weight_bytes"]
    assert weights["bf16"]["bytes_head_bf16"] < 0.51 * facts["weight_bytes"]
    assert weights["int4"]["bytes_head_bf16"] < 0.4 * facts["weight_bytes"]
    table = 8192 * 384
    for name, row in weights.items():
        saved = table if name == "bf16" else 3 * table
        assert row["bytes_head_bf16"] - row["bytes_head_int8"] == saved - 4 * 8192
    rows = {row["kv"]: row for row in facts["kv"]}
    assert rows["octopus3"]["bytes_per_token"] == 8 * 2 * (56 + 56)
    assert rows["bf16"]["bytes_per_token"] == 8 * 2 * 2 * 128 * 4
    assert rows["auto:56"]["bytes_per_token"] == rows["oct3"]["bytes_per_token"] == 8 * 2 * (56 + 56)
    assert rows["octopus3"]["tokens_that_fit"] > rows["bf16"]["tokens_that_fit"] > 0
    assert all(row["all_in_bytes_per_token"] > row["bytes_per_token"] for row in facts["kv"])
    assert {row["kv"] for row in facts["kv"] if row["conditioning"] == "off"} == {"bf16"}
    assert {row["conditioning"] for row in facts["kv"]} == {"off", "full"}


def test_show_says_no_setting_that_the_files_do_not_say(octo: Callable[..., Any], tmp_path: Path) -> None:
    for file in DEMO_PATH.iterdir():
        if file.is_file() and file.name != "generation_config.json":
            (tmp_path / file.name).symlink_to(file)
    says = tmp_path / "generation_config.json"
    for values, line in (
        ({}, "temperature 0, as the model's files ask for no chance"),
        ({"repetition_penalty": 1.0}, "temperature 0, as the model's files ask for no chance"),
        ({"repetition_penalty": 1.1}, "temperature 0, repetition_penalty 1.1 (the model's own"),
        ({"do_sample": True, "temperature": 0.6, "top_p": 1.0}, "temperature 0.6 (the model's own"),
    ):
        says.write_text(json.dumps(values))
        shown = octo("show", str(tmp_path), "--device", "cpu")
        assert shown.code == 0 and f"sampling      {line}" in shown.out, shown


@pytest.mark.slow
def test_show_text_has_a_row_for_every_format(octo: Callable[..., Any]) -> None:
    from octo_run.kernels import codec

    out = octo("show").out
    assert "18,880,896" in out
    assert "conditioning  full, of keys with a code; --conditioning off, mean or full chooses" in out
    assert {line.split()[0] for line in out.splitlines() if line.split()} >= {*codec.names(), "auto:56"}


@pytest.mark.slow
def test_show_tells_what_windows_take(octo: Callable[..., Any], make_checkpoint: Callable[..., Path]) -> None:
    """Bytes that grow with the context are those of the other layers."""
    kinds = {"use_sliding_window": True, "sliding_window": 300, "max_window_layers": 1, "num_hidden_layers": 3}
    path = make_checkpoint(architectures=["Qwen2ForCausalLM"], model_type="qwen2", **kinds)
    facts = json.loads(octo("show", str(path), "--json", "--device", "cpu").out)
    row = next(row for row in facts["kv"] if row["kv"] == "oct3")
    assert row["bytes_per_token"] == 2 * 2 * 30
    (window,) = row["windows"]
    assert window["layers"] == 2 and window["window"] == 300 and window["bytes_per_token"] == 2 * 2 * 2 * 30
    assert 0 < window["bytes"] < 2048 * window["bytes_per_token"] * 2
    out = octo("show", str(path), "--device", "cpu").out
    assert "windows       2 layers see 300 tokens: with bf16 2,048 bytes a token, " in out
    assert "however many there are" in out and "stored as with bf16" not in out
    assert "windows   " not in octo("show").out


def test_show_tells_which_windows_have_no_codes(octo: Callable[..., Any], make_checkpoint: Callable[..., Path]) -> None:
    kinds = {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1, "num_hidden_layers": 3}
    path = make_checkpoint(architectures=["Qwen2ForCausalLM"], model_type="qwen2", **kinds)
    rows = json.loads(octo("show", str(path), "--json", "--device", "cpu").out)["kv"]
    assert {row["kv"] for row in rows} >= {"bf16", "oct3", "auto:56"}
    assert all([one["bytes_per_token"] for one in row["windows"]] == [2 * 2 * 2 * 64 * 4] for row in rows)
    assert next(row["bytes_per_token"] for row in rows if row["kv"] == "oct3") == 2 * 2 * 30
    out = octo("show", str(path), "--device", "cpu").out
    assert "windows       2 layers see 128 tokens: without codes, whatever --kv says, 2,048 bytes a token, " in out
    assert "windows      of 256 tokens or fewer are stored as with bf16: " in out


@pytest.mark.slow
def test_which_factors_of_rope_are_on(octo: Callable[..., Any], make_checkpoint: Callable[..., Path]) -> None:
    """longrope has two lists, and the context decides: `show` says where, a run which."""
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "factor": 2.0,
               "original_max_position_embeddings": 256}  # fmt: skip
    path = make_checkpoint(rope_scaling=scaling)
    assert json.loads(octo("show", str(path), "--json", "--device", "cpu").out)["rope_switch"] == 256
    out = octo("show", str(path), "--device", "cpu").out
    assert "rope          the short factors with --ctx 256 or less, the long ones with more: long ones without" in out
    assert "rope  " not in octo("show").out
    for context, factors in (("256", "short"), ("257", "long")):
        told = octo("generate", "-m", str(path), "-p", "x", "-n", "1", "--ctx", context, "--conditioning", "off").err
        assert f"RoPE: the {factors} factors, as the context decides (short up to 256 tokens, long beyond)" in told


def test_show_of_a_model_that_does_not_fit(octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from octo_run.engine import plan

    monkeypatch.setattr(plan, "free_memory", lambda _device: 1_000_000)
    facts = json.loads(octo("show", "--json", "--device", "cpu").out)
    assert {(row["tokens_that_fit"], row["all_in_bytes_per_token"]) for row in facts["kv"]} == {(0, None)}
    assert octo("show", "--device", "cpu").code == 0


def test_list_and_rm(octo: Callable[..., Any], cache: Path) -> None:
    assert "octo-demo" in octo("list").out
    (demo,) = json.loads(octo("list", "--json").out)
    assert (demo["model"], demo["commit"], demo["complete"]) == ("octo-demo", None, True) and demo["bytes"] > 37e6
    for name, code, says in (("octo-demo", 2, "cannot be removed"), ("org/none", 1, "nothing to remove")):
        shown = octo("rm", "--yes", name)
        assert shown.code == code and says in shown.err and shown.err.count("\n") == 1


def test_list_names_incomplete_models(octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    entry = hub.ModelEntry("org/name", "v1", "0123456789abcdef" * 2 + "01234567", 5_000, Path("/x"), False)
    monkeypatch.setattr(hub, "list_models", lambda: [entry])
    out = octo("list").out
    assert "org/name@v1" in out and "0123456789ab " in out and "`octo-run pull org/name@v1` goes on" in out


def test_pull_is_quiet_in_a_pipe(octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pull(name: str, *, offline: bool, progress: Any, **named: Any) -> hub.ModelEntry:
        asked.append((name, offline, progress, named))
        return hub.ModelEntry("org/name", None, "a" * 40, 5_000, Path("/x"), True)

    monkeypatch.setattr(hub, "pull", pull)
    shown = octo("pull", "--offline", "org/name", "--revision", "v1", "--token", "hf_x")
    assert asked == [("org/name", True, None, {"revision": "v1", "token": "hf_x", "verify": False})]
    assert shown.out == "" and "org/name at aaaaaaaaaaaa: 5 kB in /x" in shown.err and "\x1b" not in shown.err


def test_pull_draws_a_bar_at_a_terminal(octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def pull(name: str, *, progress: Any, **_: Any) -> hub.ModelEntry:
        progress(hub.PullProgress("config.json", 0, 3, 0, 0))
        progress(hub.PullProgress("model.safetensors", 2, 3, 2_000, 5_000))
        return hub.ModelEntry("org/name", None, "a" * 40, 5_000, Path("/x"), True)

    monkeypatch.setattr(hub, "pull", pull)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert octo("pull", "org/name").code == 0


@pytest.mark.parametrize("name", ["octo-demo", "no-slash", "a/b/c", "../x"])
def test_pull_of_a_wrong_name(octo: Callable[..., Any], cache: Path, name: str) -> None:
    shown = octo("pull", name)
    assert shown.code == 2 and shown.err.count("\n") == 1


def test_doctor_finds_all_here(octo: Callable[..., Any], cache: Path) -> None:
    shown = octo("doctor", "--json", "--offline")
    report = json.loads(shown.out)
    assert shown.code == 0 and report["healthy"]
    subjects = {finding["subject"]: finding for finding in report["findings"]}
    assert {"python", "processor", "torch", "triton", "CUDA device", "model cache", "demo model"} <= set(subjects)
    assert str(cache) in subjects["model cache"]["detail"]
    assert "copies" in subjects["memory"]["detail"] and "tokens/s" in subjects["answer"]["detail"]
    assert subjects["Hub"]["status"] == "note" and "pull` fails" in subjects["Hub"]["instead"]
    notes = [finding for finding in report["findings"] if finding["status"] == "note"]
    assert all(finding["instead"] for finding in notes), "what is missing has something in its place"
    assert not cache.exists(), "looking changes nothing"


def test_doctor_says_what_it_finds_as_it_finds_it(octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = [doctor.Finding("a", "ok", "is here"), doctor.Finding("b", "note", "is not", "c is used")]
    monkeypatch.setattr(doctor, "examine", lambda _offline: found)
    shown = octo("doctor")
    assert shown.code == 0 and shown.out.splitlines() == [
        "ok     a              is here",
        "note   b              is not; instead: c is used",
        "everything needed is here",
    ]


def test_doctor_ends_with_1_if_the_main_job_cannot_run(
    octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded model is there, and its answer fails."""
    monkeypatch.setattr(doctor, "examine", lambda _offline: [*doctor._demo(), *doctor._answer()])
    monkeypatch.setattr("octo_run.engine.Engine.load", lambda *_args, **_named: 1 / 0)
    shown = octo("doctor", "--json")
    report = json.loads(shown.out)
    assert shown.code == 1 and not report["healthy"]
    assert [finding["status"] for finding in report["findings"]] == ["ok", "wrong"]
    assert "octo-demo cannot answer (division by zero)" in report["findings"][1]["detail"]


def neighbours() -> list[doctor.Finding]:
    return [*doctor._hugging_face(), *(one for name in doctor._GGUF_FOLDERS for one in doctor._gguf_files(name)),
            *doctor._ollama()]  # fmt: skip


def test_doctor_goes_on_where_a_look_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look in turn: of a home that may not be entered, and where there is none, others are told, too."""
    for name in ("_weights", "_bandwidth", "_answer", "_demo", "_cpu_kernels"):  # which take long
        monkeypatch.setattr(doctor, name, lambda: iter(()))

    def forbidden(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    def told() -> dict[str, doctor.Finding]:
        return {finding.subject: finding for finding in doctor.examine(offline=True)}

    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_dir", forbidden)
        found = told()
    assert found["llama.cpp"].status == "note" and "llama.cpp: Permission denied" in found["llama.cpp"].detail
    assert "Permission denied" in found["Jan"].detail and "Permission denied" in found["Ollama"].detail
    for variable in ("OCTO_RUN_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    found = told()
    assert found["model cache"].status == "wrong" and "There is no folder" in found["Hugging Face"].detail
    assert "home directory" in found["Jan"].detail and found["python"].status == "ok"
    for name, subject in (("_answer", "answer"), ("_python", "python"), ("_weights", "weights")):
        with monkeypatch.context() as patch:
            patch.setattr(doctor, name, homeless)
            assert told()[subject].status == "wrong"


def test_doctor_finds_what_other_programs_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("OLLAMA_MODELS", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert neighbours() == []
    for name in (".cache/llama.cpp/a.gguf", ".lmstudio/models/org/b/b.gguf", ".lmstudio/models/org/b/mmproj-b.gguf",
                 ".ollama/models/manifests/registry/library/qwen/latest", ".ollama/models/blobs/sha256-0"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True) if not path.parent.exists() else None
        path.write_text("GGUF")
    found = {finding.subject: finding.detail for finding in neighbours()}
    assert set(found) == {"llama.cpp", "LM Studio", "Ollama"}
    assert f"octo-run import {tmp_path}/.cache/llama.cpp/a.gguf" in found["llama.cpp"]
    assert found["LM Studio"].startswith("1 GGUF") and found["Ollama"].startswith("1 models")


@pytest.mark.parametrize(("switch", "status"), [(None, "ok"), ("0", "note")])
def test_doctor_says_whether_the_cpu_has_kernels(
    monkeypatch: pytest.MonkeyPatch, switch: str | None, status: str
) -> None:
    if switch is not None:
        monkeypatch.setenv("OCTO_RUN_CPU_KERNELS", switch)
    (found,) = doctor._cpu_kernels()
    assert found.status == status and ("PyTorch" in found.instead) == (status == "note")


def test_doctor_says_plainly_what_is_wrong(
    octo: Callable[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache.write_text("a file where the folder should be")
    monkeypatch.setattr("octo_run.models.hub.resolve", lambda _name: tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    looks = (doctor._triton, doctor._cache, doctor._demo)
    monkeypatch.setattr(doctor, "examine", lambda _offline: [finding for look in looks for finding in look()])
    shown = octo("doctor")
    assert shown.code == 1 and "something is wrong" in shown.out
    assert "cannot be written" in shown.out and "Reinstall octo-run" in shown.out and "interpreted" in shown.out


def test_doctor_without_torch_or_a_new_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert [finding.status for finding in (*doctor._torch(), *doctor._cuda())] == ["wrong"]
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 0))
    assert next(doctor._python()).status == "wrong"


def test_quantize_writes_a_model(octo: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = octo("quantize", "octo-demo", str(out), "--weights", "int8", "--device", "cpu")
    assert done.code == 0 and "weights int8" in done.err and (out / "model.safetensors").is_file()
    again = octo("quantize", "octo-demo", str(out))
    assert again.code == 2 and "is there already: name a folder that is not" in again.err
    refused = octo("quantize", "octo-demo", str(tmp_path / "other"), "--weights", "int5")
    assert refused.code == 2 and "there is no format of weights 'int5'" in refused.err
    assert [*tmp_path.iterdir()] == [out]
    spaced = octo("quantize", "octo-demo", str(tmp_path / "a b"), "--weights", "int8", "--device", "cpu")
    assert f"octo-run chat -m '{tmp_path}/a b'" in spaced.err


def test_doctor_tries_the_formats_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = doctor._weights()
    assert (found.status, found.detail) == ("ok", "products with fp8, int8, int4, int4-128 are right on cpu")
    from octo_run.kernels import linear

    monkeypatch.setattr(linear, "packed_linear", lambda _x, _weight, _bias, out: out.zero_())
    (broken,) = doctor._weights()
    assert broken.status == "wrong" and "fp8 (wrong by 100 %)" in broken.detail
