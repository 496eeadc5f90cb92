"""Options: how values may be written, what is said about wrong ones, names that Python has too."""

import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest

from octo_run.cli import generate
from octo_run.cli.evaluate import codec

RUN = ("generate", "-p", "x", "-n", "1")


@pytest.mark.parametrize(
    ("written", "field", "meant"),
    [
        (("--dtype", "bf16"), "dtype", "bfloat16"),
        (("--dtype", "FP16"), "dtype", "float16"),
        (("--dtype", "Float32"), "dtype", "float32"),
        (("--ctx", "8k"), "ctx", 8192),
        (("--ctx", "2K"), "ctx", 2048),
        (("--max-context", "1m"), "ctx", 1 << 20),
        (("--ctx", "AUTO"), "ctx", None),
        (("--kv", "OCT3"), "kv", "oct3"),
        (("--kv", " Oct3:BF16"), "kv", "oct3:bf16"),
        (("--device", "CPU"), "device", "cpu"),
    ],
)
def test_values_are_understood_however_they_are_written(
    octo: Callable[..., Any], engine: Any, written: tuple[str, str], field: str, meant: Any
) -> None:
    engine.answers("y")
    shown = octo(*RUN, *written)
    assert shown.code == 0, shown.err
    assert getattr(engine.loaded, field) == meant


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--temp", "abc"), "'abc' is no number from 0 on"),
        (("--temp", "-1"), "'-1' is no number from 0 on"),
        (("--temp", "nan"), "'nan' is no number from 0 on"),
        (("--temp", "inf"), "'inf' is no number from 0 on"),
        (("--top-p", "0"), "'0' is no number above 0 and up to 1"),
        (("--top-p", "x"), "'x' is no number above 0 and up to 1"),
        (("--min-p", "1"), "'1' is no number from 0 below 1"),
        (("--repetition-penalty", "0"), "'0' is no number above 0"),
        (("--presence-penalty", "1e9"), "'1e9' is no number from -100 up to 100"),
        (("--stop", ""), "the text is empty"),
        (("--stop", "a", "--stop", ""), "the text is empty"),
        (("--ctx", "8q"), "'8q' is no number of tokens (like 8192 or 8k)"),
        (("--ctx", "0"), "'0' is no number of tokens"),
        (("--ctx", "0k"), "'0k' is no number of tokens"),
        (("--ctx", "9999999999k"), "is no number of tokens"),
        (("-n", "-1"), "'-1' is no whole number from 1 to 2,147,483,647; leave it out for no limit; "),
        (("--seed", "-1"), "; leave it out for a new one each time; "),
        (("--seed", "-2"), "from 0 to 9,223,372,036,854,775,807; `octo-run generate"),
        (("--threads", "0"), "from 1 to 512; leave it out for PyTorch's choice; "),
        (("--dtype", "int8"), "'int8' is no dtype; the dtypes are bfloat16, float16, float32, bf16, fp16, fp32"),
    ],
)
def test_wrong_values_are_explained_before_anything_is_loaded(
    octo: Callable[..., Any], engine: Any, argv: tuple[str, ...], says: str
) -> None:
    shown = octo(*RUN, *argv)
    assert shown.code == 2 and says in shown.err and shown.err.count("\n") == 1, shown.err
    assert "float range" not in shown.err and "('" not in shown.err and engine.loaded is None


def test_an_empty_stop_text_is_refused_by_tasks_too(octo: Callable[..., Any], tmp_path: Any) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps({"prompt": "1+1", "answer": "2"}))
    shown = octo("eval", "tasks", str(tasks), "--stop", "")
    assert shown.code == 2 and "the text is empty" in shown.err


def test_token_counts_of_all_commands_take_thousands(octo: Callable[..., Any], engine: Any) -> None:
    shown = octo("bench", "--tests", "pp1k,tg8", "--depth", "2k", "--json")
    assert shown.code == 0, shown.err
    assert [run[1:4] for run in engine.runs] == [("pp", 1024, 2048), ("tg", 8, 2048)]


def test_options_have_the_names_that_python_has() -> None:
    """One name for one thing: short names are beside it, none is instead of it."""
    from octo_run import Engine, SamplingParams

    options = {name for param in generate.command.params for name in param.opts}
    python = {*inspect.signature(Engine.load).parameters, *inspect.signature(SamplingParams).parameters}
    elsewhere = {
        "sink",
        "window",
        "sequences",
        "cache_bytes",
        "random_weights",
        "on_plan",
        "before_weights",
        "on_measure",
        "on_unkept",
        "stop_ids",
    }
    missing = {name for name in python - elsewhere if f"--{name.replace('_', '-')}" not in options}
    assert not missing


def test_limits_are_those_of_the_engine() -> None:
    from octo_run.cli import options, sampling_options
    from octo_run.engine import engine, sampling_rules
    from octo_run.engine.evaluation import capture

    limits = {param.name: param.type for param in codec.command.params}
    assert limits["tokens"].least == capture.LEAST_TOKENS
    assert options.MOST_SEQUENCES == engine.MAX_SEQUENCES and generate.MOST_LOGPROBS == sampling_rules.MAX_TOP
    assert sampling_options._HISTORY == sampling_rules.HISTORY


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("eval", "needle", "--lengths", "9999"), "--lengths 9999 is beyond the model's context: choose 4096"),
        (("eval", "ppl", "--ctx", "9999"), "--ctx 9999 is beyond the model's context: choose 4096"),
        (("bench", "--tests", "pp9999"), "9,999 tokens and the model's context has 4,096"),
        (("bench", "--tests", "tg8", "--depth", "4096"), "4,104 tokens and the model's context has 4,096"),
    ],
)
def test_advice_can_be_followed(octo: Callable[..., Any], argv: tuple[str, ...], says: str) -> None:
    """What the model cannot do is not to be asked for by an option, least of all by one that the command refuses."""
    shown = octo(*argv, "--device", "cpu")
    assert shown.code == 2 and says in shown.err, shown.err
    assert "give --ctx" not in shown.err and "raise --ctx" not in shown.err and "longer text" not in shown.err
