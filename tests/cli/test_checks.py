"""What is wrong with options, files and prompts is said before a weight is read, by ``chat`` as by ``generate``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octo_run.engine import engine as engine_module
from octo_run.models.cache import DEMO_PATH

WAYS = (("generate", "--chat", "-p", "Hello."), ("chat",), ("chat", "--single", "-p", "Hello."))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Files that are none of their kind, a long text, and a model without a chat template."""
    shutil.copytree(DEMO_PATH, tmp_path / "base")
    settings = json.loads((DEMO_PATH / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = {
        "schema": "{nope", "grammar": "start: {", "for": "{% for %}", "long": "one two three " * 5000,
        "refuses": "{{ raise_exception('only users') if messages[0].role == 'system' }}{{ messages[-1].content }}",
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return {name: str(tmp_path / name) for name in (*texts, "none", "base")}


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models whose weights are read."""
    found = list[str]()

    def read(path: Path, *_: Any) -> Any:
        found.append(str(path))
        raise AssertionError("weights are read")

    monkeypatch.setattr(engine_module.weight_files, "StoredWeights", read)
    return found


@pytest.mark.parametrize("at_a_terminal", [False, True])
def test_chat_and_generate_refuse_the_same_before_a_weight_is_read(
    octo: Callable[..., Any], terminal: Any, weights: list[str], files: dict[str, str], at_a_terminal: bool
) -> None:
    pytest.importorskip("llguidance")
    cases = (
        (("--json-schema", files["schema"]), "The JSON schema is no JSON"),
        (("--json-schema", files["none"]), "there is no such file"),
        (("--grammar", files["grammar"]), "The grammar cannot be used"),
        (("--regex", "(("), "The regular expression cannot be used"),
        (("--regex", "a", "--json-schema", files["schema"]), "an answer follows one of them"),
        (("--logit-bias", "9999=3"), "the model has the tokens 0 to"),
        (("--chat-template", files["for"]), "not valid Jinja"),
        (("--chat-template", files["refuses"], "--system", "x"), "only users"),
        (("--kv", "oct9"), "unknown KV format"),
        (("-m", files["none"]), "none"),
        (("-m", files["base"]), "has no chat template"),
        (("-f", files["none"]), "there is no such file"),
        (("-f", files["long"]), "tokens"),
    )
    for argv, says in cases:
        for way in WAYS:
            if at_a_terminal:
                terminal(["Hello."])
            done = octo(*way, *argv, data=b"Hello.\n")
            assert done.code in (1, 2) and says in done.err and not weights, (way, argv, done, weights)
            assert done.err.splitlines()[-1].startswith("octo-run: "), done.err
    long = Path(files["long"]).read_text()
    if not at_a_terminal:
        done = octo("chat", "--single", data=long.encode())
        assert done.code == 2 and "the message makes about" in done.err and not weights, done
    done = octo("chat", "-p", long)
    assert done.code == 2 and "the message makes about" in done.err and not weights, done
    if at_a_terminal:
        terminal(["Hello."])
    octo("chat", data=b"Hello.\n")
    assert weights, "what is right is loaded"


def test_a_prompt_that_is_too_long_is_refused_before_a_weight_is_read(
    octo: Callable[..., Any], weights: list[str], files: dict[str, str]
) -> None:
    for argv in ((), ("--n", "2"), ("--chat",)):
        done = octo("generate", "-f", files["long"], *argv)
        assert done.code == 2 and "and the context holds 4,096" in done.err and not weights, done


def test_prompts_of_a_measurement_are_made_before_a_weight_is_read(
    octo: Callable[..., Any], weights: list[str], files: dict[str, str], tmp_path: Path
) -> None:
    file, settings = tmp_path / "tasks", tmp_path / "base" / "tokenizer_config.json"
    template = Path(files["refuses"]).read_text()
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
    argv = ("eval", "tasks", str(file), "-m", files["base"])
    cases = (
        ("hello", ("--system", "x"), "refuses this conversation: only users"),
        (Path(files["long"]).read_text(), (), "line 1: The prompt has"),
    )
    for prompt, options, says in cases:
        file.write_text(json.dumps({"prompt": prompt, "answer": "1"}) + "\n")
        done = octo(*argv, *options)
        assert done.code in (1, 2) and says in done.err and not weights, done


def test_what_an_answer_must_be_is_no_setting_of_a_saved_conversation_by_another_name(
    octo: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for pattern in ("one", "two"):
        done = octo("chat", "--session", "kept", "--regex", pattern, "--device", "cpu", data=b"Hello.\n")
        assert done.code == 0 and done.out.strip() == pattern, done
