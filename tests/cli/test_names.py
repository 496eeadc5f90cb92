"""Names that are misspelt, files that are no models: one sentence says what was meant, or which command takes it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octo_run.errors import nearest
from octo_run.models.cache import DEMO_PATH

OTHER = "imported/sea-tales"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, and a cache with one model."""
    from octo_run.models import store
    from octo_run.models.names import HubName

    monkeypatch.setenv("OCTO_RUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name, commit = HubName(OTHER), "a" * 40
    with store.writing(name, "do it again") as folder:
        shutil.copytree(DEMO_PATH, folder / "snapshots" / commit)
        files = {path.name: path.stat().st_size for path in (folder / "snapshots" / commit).glob("*.*")}
        store.write_manifest(folder, commit, name.ref, dict(files))
        store.write_ref(folder, name.ref, commit)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_nearest() -> None:
    names = ["oct2", "oct3", "bf16"]
    assert nearest("otc3", names) == "oct3" and nearest("OCT2", names) == "oct2" and nearest("fb16", names) == "bf16"
    assert nearest("zzz", names) is None and nearest("", names) is None
    assert nearest("ab", ["ba"]) == "ba"
    assert nearest("x" * 10_000, names) is None
    assert nearest("te", ["temperature", "top_k"]) == "temperature", "it begins so"
    assert nearest("t", ["temperature"]) is None and nearest("to", ["top_k_long", "top_p_long"]) is None


EVERY_FORMAT = "oct2, oct3, oct4, octopus2, octopus3, octopus4, bf16, K:V, auto:N"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("show", "octo-dmo"), "'octo-dmo' is no model name: did you mean 'octo-demo'?"),
        (("bench", "-m", "octodemo"), "did you mean 'octo-demo'?"),
        (("show", "sea-tales"), f"did you mean '{OTHER}'?"),
        (("show", "imported/sea-tale"), f"or did you mean '{OTHER}'?"),
        (("rm", "imported/sea-tale", "-y"), f"did you mean '{OTHER}'?"),
        (("rm", "sea-tales", "-y"), f"did you mean '{OTHER}'?"),
        (("rm", "./here", "-y"), "rm removes ORG/NAME[@REV] and imported/NAME only"),
        (("show", "./modle"), "There is no folder './modle': did you mean 'model'?"),
        (("show", "no.gguf"), "There is no file 'no.gguf'; `octo-run import FILE` makes a model of a GGUF file."),
        (("chat", "-m", "models/no.gguf"), "There is no file 'models/no.gguf'; `octo-run import FILE`"),
        (("chat", "-m", "./no.gguf"), "There is no file './no.gguf'; `octo-run import FILE`"),
        (("show", "zzz"), "give a folder, octo-demo, or ORG/NAME[@REV] of the Hub"),
        (("pull", "zzz"), "'zzz' is no model name: give ORG/NAME[@REV] of the Hub"),
        (("generate", "-p", "x", "--kv", "zzz"), "choose one of " + EVERY_FORMAT),
        (("generate", "-p", "x", "--kv", "otc3"), f"unknown KV format 'otc3': did you mean oct3, of {EVERY_FORMAT}?"),
        (("generate", "-p", "x", "--kv", "auto:x"), "give auto:N with N = 40 to 72"),
        (("generate", "-p", "x", "--weights", "zzz"), "give one of fp32, bf16, fp8, int8, int4, int4-128, auto."),
        (("generate", "-p", "x", "--device", "gpu"), "give --device cpu, cuda, cuda:N or auto."),
        (("generate", "-p", "x", "--kv", "oct3:fb16"), "unknown KV format 'fb16': did you mean bf16, of "),
        (("generate", "-p", "x", "--kv", "atuo:56"), "unknown KV format 'atuo': did you mean auto:N"),
        (("bench", "--kv", "oct3,otc4"), "did you mean oct4, of "),
        (("generate", "-p", "x", "--weights", "itn8"), "There is no format of weights 'itn8': did you mean int8, of"),
        (("bench", "--weights", "int8,itn4"), "There is no format of weights 'itn4': did you mean int4, of"),
        (("import", "x", "--weights", "fp32"), "give one of bf16, fp8, int8, int4, int4-128"),
        (("quantize", "octo-demo", "out", "--weights", "itn4"), "did you mean int4, of fp8, int8, int4, int4-128"),
        (("quantize", "octo-demo", "out", "--weights", "auto"), "give one of fp8, int8, int4, int4-128"),
        (("generate", "-p", "x", "--dtype", "folat16"), "did you mean float16?"),
        (("bench", "--random-weights", "lama-3.1-8b"), "did you mean llama-3.1-8b?"),
        (("bench", "--random-weights", "zzz"), "the shapes are llama-3.1-8b, "),
        (("eval", "codec", "--no-model", "--kv", "otc3"), "did you mean oct3?"),
        (("bnech",), "did you mean 'bench'?"),
        (("sessions", "lst"), "there is no command 'lst'; did you mean 'list'?"),
        (("version",), "did you mean '--version'?"),
        (("run", "octo-demo"), "did you mean 'chat'?"),
        (("perplexity",), "did you mean 'eval ppl'?"),
        (("eval", "perplexity"), "did you mean 'ppl'?"),
        (("generate", "--temprature", "1"), "'--temprature': did you mean --temperature?"),
        (("generate", "--top_k", "1"), "'--top_k': did you mean --top-k?"),
        (("generate", "-c", "4096"), "'-c': did you mean --max-context?"),
        (("chat", "-t", "4"), "'-t': did you mean --threads?"),
        (("chat", "--n-predict", "4"), "'--n-predict': did you mean --max-tokens?"),
        (("chat", "--system_prompt", "x"), "'--system_prompt': did you mean --system?"),
        (("bench", "--gpu"), "'--gpu': did you mean --device?"),
        (("list", "--gpu"), "'--gpu'; `octo-run list --help` lists"),
        (("chat", "--list"), "'--list'; `octo-run chat --help` lists"),
        (("-m", "octo-demo"), "'-m' before a command: options come behind it, as in `octo-run chat -m octo-demo`."),
        (("chat", "octo-demo"), "'octo-demo' belongs to no option: -m names a model, -p gives a text; `octo-run chat"),
        (("bench", "a", "b"), "'a b' belongs to no option: -m names a model; `octo-run bench"),
        (("list", "a"), "unexpected extra argument (a); `octo-run list"),
        (("generate", "--btach", "x"), "--batch"),
    ],
)
def test_what_was_meant_is_named(octo: Callable[..., Any], place: Path, argv: tuple[str, ...], says: str) -> None:
    (place / "model").mkdir()
    shown = octo(*argv)
    assert shown.code in (1, 2) and says in shown.err and shown.err.count("\n") == 1, shown.err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("show", "m-Q8_0.gguf"), "is a GGUF file: make a model of it with `octo-run import m-Q8_0.gguf`"),
        (("bench", "-m", "./m-Q8_0.gguf"), "`octo-run import m-Q8_0.gguf`"),
        (("show", "several"), "make a model of it with `octo-run import several/m-F16-00001-of-00002.gguf`"),
        (("show", "./with space"), "`octo-run import 'with space/m.gguf'`"),
        (("pull", "m-Q8_0.gguf"), "is a file here: make a model of it with `octo-run import m-Q8_0.gguf`"),
        (("pull", "several/m-q4_0.gguf"), "`octo-run import several/m-q4_0.gguf`"),
        (("pull", "./several"), "needs no pull: `octo-run chat -m ./several`"),
        (("import", "several"), "holds 2 GGUF models; give one of them: `octo-run import several/m-F16-00001-of-00002"),
        (("import", "empty"), "'empty' holds no GGUF file"),
        (("import", "model"), "is a model already: use it with `octo-run chat -m model`"),
        (("import", "none.gguf"), "There is no file 'none.gguf'."),
        (("import", "org/name"), "`octo-run pull org/name` fetches a model of the Hub"),
        (("import", "https://huggingface.co/org/name"), "`octo-run pull org/name` fetches a model of the Hub"),
        (("import", "https://huggingface.co/org/name/blob/main/q/m.gguf"), "`hf download org/name --include q/m.gguf"),
        (("pull", "https://huggingface.co/org/name/resolve/v1/m.gguf"), "--include m.gguf --revision v1 --local-dir"),
        (("import", "https://elsewhere.org/m.gguf"), "fetch it first, with `curl -LO ADDRESS` say"),
        (("show", "model/config.json"), "is a file: give the folder"),
    ],
)
def test_files_that_another_command_takes(
    octo: Callable[..., Any], place: Path, argv: tuple[str, ...], says: str
) -> None:
    for name in ("m-Q8_0.gguf", "several/m-q4_0.gguf", "several/m-F16-00001-of-00002.gguf",
                 "several/m-F16-00002-of-00002.gguf", "several/mmproj-f16.gguf", "with space/m.gguf"):  # fmt: skip
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(b"GGUF")
    (place / "empty").mkdir()
    shutil.copytree(DEMO_PATH, place / "model")
    shown = octo(*argv)
    assert shown.code == 2 and says in shown.err and shown.err.count("\n") == 1, shown.err


def test_a_pull_without_network_says_how(
    octo: Callable[..., Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = octo("pull", "org/name")
    assert shown.code == 1 and "fetch it with `octo-run pull org/name`, with HF_HUB_OFFLINE unset." in shown.err
    shown = octo("pull", "org/name", "--offline")
    assert "fetch it with `octo-run pull org/name`." in shown.err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("eval", "ppl", "--ctx", "1"), "--ctx is 1 and nothing stands before a window's only token: give 2 or more"),
        (("eval", "ppl", "--tokens", "100", "--ctx", "500"), "give more --tokens or a smaller --ctx."),
        (("eval", "ppl", "--ctx", "4000"), "give a longer --text or a smaller --ctx."),
        (("eval", "needle", "--lengths", "60"), "give longer --lengths or fewer --distractors."),
        (("eval", "needle", "--lengths", "60", "--distractors", "0"), "give longer --lengths."),
        (("eval", "codec", "--tokens", "2000"), "give a longer --text, or --tokens 1552."),
        (("eval", "codec", "--tokens", "9999"), "--tokens 9999 is beyond the model's context: choose 4096 or less"),
        (("eval", "tasks", "tasks", "--extract", "first-number"), "give another --extract"),
        (("eval", "tasks", "tasks", "-m", "base"), "base has no chat template: use --raw"),
    ],
)
def test_advice_names_what_the_command_has(
    octo: Callable[..., Any], place: Path, argv: tuple[str, ...], says: str
) -> None:
    (place / "tasks").write_text('{"prompt": "x", "answer": "no number"}\n')
    if "base" in argv:
        shutil.copytree(DEMO_PATH, place / "base")
        config = place / "base" / "tokenizer_config.json"
        config.write_text(config.read_text().replace('"chat_template"', '"other"'))
        (place / "tasks").write_text('{"prompt": "x", "answer": "1"}\n')
    shown = octo(*argv, *(("--device", "cpu") if argv[1] != "codec" else ()))
    assert shown.code == 2 and says in shown.err and shown.err.count("\n") == 1, shown.err


def test_a_repository_may_be_called_like_a_gguf_file(octo: Callable[..., Any], place: Path) -> None:
    from octo_run.models.cache import repo_folder
    from octo_run.models.names import HubName

    repo_folder(HubName("org/name.gguf", None)).mkdir(parents=True)
    assert "`octo-run pull org/name.gguf`" in octo("show", "org/name.gguf").err
    assert "There is no file 'org/other.gguf'" in octo("show", "org/other.gguf").err


def test_a_context_that_does_not_fit_is_explained_by_the_option_that_says_it(
    octo: Callable[..., Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octo_run.engine import plan

    monkeypatch.setattr(plan, "free_memory", lambda _device: 120_000_000)
    needle = octo("eval", "needle", "--lengths", "4096", "--device", "cpu", "--kv", "bf16", "--weights", "fp32")
    assert needle.code == 1 and "choose --lengths of " in needle.err
    bench = octo("bench", "--tests", "tg8", "--depth", "4000", "--device", "cpu", "--kv", "bf16", "--batch", "8")
    assert bench.code == 1 and "or a smaller --batch" in bench.err
