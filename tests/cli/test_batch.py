"""``generate --batch``: lines that are refused, answers that are kept, files that are not overwritten."""

import fcntl
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octo_run.cli import runtime
from octo_run.engine import SamplingParams
from octo_run.engine.batching import Completion

SEPARATORS = "one\u2028two\u2029three\x85four"


@pytest.fixture
def batching(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine that answers each prompt with its text, the second one first; ``engine.stop_after`` ends it early."""
    engine.stop_after, engine.made, engine.failure = 1000, [], KeyboardInterrupt

    def generate_batch(ids: list[list[int]], _rules: Any) -> Iterator[Completion]:
        order = [*range(len(ids))]
        order[:2] = reversed(order[:2])
        for count, index in enumerate(order):
            if count == engine.stop_after:
                raise engine.failure
            text = "".join(map(chr, ids[index][1:]))
            engine.made.append(text)
            yield Completion(index, [1], text, "stop", len(ids[index]), 0)

    engine.generate_batch, engine.check_prompt = generate_batch, lambda _ids: None
    monkeypatch.setattr(runtime, "sampling_params", lambda *_, **__: SamplingParams())
    return engine


def write(path: Path, *prompts: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts), "utf-8")
    return path


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text("utf-8").split("\n")[:-1]]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "x", "stop": 3}', "stop is 3; give a text or a list of texts"),
        ('{"prompt": "x", "stop": ["a", ""]}', "stop is ['a', '']; give a text or a list of texts"),
        ('{"prompt": "x", "temperature": "hot"}', "temperature is 'hot'; give a number"),
        ('{"prompt": "x", "temperature": -1}', "temperature is -1.0; give 0 (greedy) or more"),
        ('{"prompt": "x", "top_k": 1.5}', "top_k is 1.5; give a whole number"),
        ('{"prompt": "x", "seed": true}', "seed is True; give a whole number"),
        ('{"prompt": "x", "max_tokens": 0}', "max_tokens is 0; give 1 or more"),
        ('{"prompt": "x", "max_tokens": [1]}', "max_tokens is [1]; give a whole number"),
        ('{"prompt": "x", "top_p": NaN}', "top_p is nan; give above 0"),
        ('{"prompt": "x", "temprature": 1}', "did you mean 'temperature'?"),
        ('{"prompt": "x", "max_new_tokens": 1}', "did you mean 'max_tokens'?"),
        ('{"text": "x"}', "no line has 'text'; did you mean 'prompt'?"),
        ('{"prompt": "x", "prompt": "y"}', "'prompt' is there twice; give each name once"),
        ('{"prompt": ""}', "prompt is ''; give a text"),
        ('{"prompt": "a\\ud800"}', "half of a surrogate pair"),
        ('{"prompt": "x"', "this is no JSON (Expecting ',' delimiter, column 15)"),
        ('[{"prompt": "x"}]', "give an object like"),
        ('{"messages": []}', "messages is []; give a list like"),
        ('{"messages": ["x"]}', "message 1 is 'x'; give an object like"),
        ('{"messages": [{"content": "x"}]}', "the role of message 1 is None; give user"),
        ('{"messages": [{"role": "user", "content": 3}]}', "the content of message 1 is 3; give a text"),
    ],
)
def test_a_wrong_line_is_named(octo: Callable[..., Any], batching: Any, tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "in.jsonl").write_text('\ufeff{"prompt": "x"}\r\n\n' + line + "\n", "utf-8")
    shown = octo("generate", "--batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"))
    assert shown.code == 2 and f"line 3 of {tmp_path}/in.jsonl: " in shown.err and says in shown.err, shown.err
    assert shown.err.count("\n") == 1 and "tuple" not in shown.err and batching.loaded is None
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_a_batch_that_ended_early_goes_on(
    octo: Callable[..., Any], batching: Any, tmp_path: Path, failure: type[BaseException]
) -> None:
    """Answers with every separator of lines come back whole; none is made twice, and the order is that of the file."""
    batch, out = write(tmp_path / "in.jsonl", "a", SEPARATORS, "c", "d"), tmp_path / "out.jsonl"
    argv = ("generate", "--batch", str(batch), "-o", str(out))
    batching.stop_after, batching.failure = 2, failure
    assert octo(*argv).code == (130 if failure is KeyboardInterrupt else 1) and not out.exists()
    batching.stop_after = 1000
    again = octo(*argv, "--threads", "2", "--sequences", "3")
    assert again.code == 0 and "2 of 4 answers are there already" in again.err, again.err
    assert texts(out) == ["a", SEPARATORS, "c", "d"] and sorted(batching.made) == ["a", "c", "d", SEPARATORS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_system_prompt_is_that_of_conversations_without_one(
    octo: Callable[..., Any], batching: Any, tmp_path: Path
) -> None:
    batch, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked = {"role": "user", "content": "Q"}
    lines = [{"prompt": "P"}, {"messages": [asked]}, {"messages": [{"role": "system", "content": "own"}, asked]}]
    batch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert octo("generate", "--batch", str(batch), "-o", str(out), "--chat", "--system", "S").code == 0
    assert texts(out) == ["SP", "SQ", "ownQ"]


def test_answers_that_wait_are_printed_when_a_batch_is_stopped(
    octo: Callable[..., Any], batching: Any, tmp_path: Path
) -> None:
    batching.stop_after = 1
    shown = octo("generate", "--batch", str(write(tmp_path / "in.jsonl", "a", "b", "c")))
    assert shown.code == 130 and [json.loads(line)["text"] for line in shown.out.splitlines()] == ["b"]


def test_a_damaged_journal_keeps_what_is_good(octo: Callable[..., Any], batching: Any, tmp_path: Path) -> None:
    batch, out = write(tmp_path / "in.jsonl", "a", "b", "c", "d"), tmp_path / "out.jsonl"
    argv, kept = ("generate", "--batch", str(batch), "-o", str(out)), tmp_path / ".out.jsonl.part"
    batching.stop_after = 3
    assert octo(*argv).code == 130
    lines = kept.read_bytes().split(b"\n")
    kept.write_bytes(b"\n".join([*lines[:2], b"\0" * 20, *lines[3:]]) + b'{"index": 3, "te')
    batching.stop_after, batching.made = 1000, []
    again = octo(*argv)
    assert again.code == 0 and "is damaged: its last 2 answers are made again" in again.err
    assert texts(out) == ["a", "b", "c", "d"] and len(batching.made) == 3


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--temp", "0.5"), "--temperature was not given, and is 0.5"),
        (("--kv", "oct4"), "--kv was 'oct3', and is 'oct4'"),
        (("--chat",), "--chat was False, and is True"),
        (("--stop", "x"), "--stop was not given, and is ['x']"),
    ],
)
def test_another_batch_does_not_go_on(
    octo: Callable[..., Any], batching: Any, tmp_path: Path, more: tuple[str, ...], says: str
) -> None:
    batch, out = write(tmp_path / "in.jsonl", "a", "b"), tmp_path / "out.jsonl"
    argv = ("generate", "--batch", str(batch), "-o", str(out))
    batching.stop_after = 1
    octo(*argv)
    kept = (tmp_path / ".out.jsonl.part").read_bytes()
    refused = octo(*argv, *more)
    assert refused.code == 2 and says in refused.err and "--force" in refused.err, refused.err
    write(batch, "a", "other")
    assert "with other prompts" in octo(*argv).err
    assert (tmp_path / ".out.jsonl.part").read_bytes() == kept
    batching.stop_after = 1000
    assert octo(*argv, "--force").code == 0 and texts(out) == ["a", "other"]


def test_what_a_grammar_file_says_counts(octo: Callable[..., Any], batching: Any, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    batch, out, schema = write(tmp_path / "in.jsonl", "a", "b"), tmp_path / "out.jsonl", tmp_path / "s.json"
    argv = ("generate", "--batch", str(batch), "-o", str(out), "--json-schema", str(schema))
    schema.write_text('{"type": "object"}')
    batching.stop_after = 1
    assert octo(*argv).code == 130
    schema.write_text('{"type": "string"}')
    refused = octo(*argv)
    assert refused.code == 2 and "the grammar was" in refused.err


def test_a_file_that_is_there_is_not_replaced_unasked(octo: Callable[..., Any], batching: Any, tmp_path: Path) -> None:
    batch, out = write(tmp_path / "in.jsonl", "a", "b"), tmp_path / "out.jsonl"
    argv = ("generate", "--batch", str(batch), "-o", str(out))
    out.write_text("precious\n")
    refused = octo(*argv)
    assert refused.code == 2 and f"{out} is there already: give another -o, or --force" in refused.err
    assert out.read_text() == "precious\n" and batching.loaded is None and not [*tmp_path.glob(".*")]
    batching.stop_after = 1
    assert octo(*argv, "--force").code == 130 and out.read_text() == "precious\n"
    batching.stop_after = 1000
    assert octo(*argv).code == 0 and texts(out) == ["a", "b"], "--force was said when it began"
    own = octo("generate", "--batch", str(batch), "-o", str(batch), "--force")
    assert own.code == 2 and "has the prompts" in own.err and texts(out) == ["a", "b"]


def test_a_file_that_came_meanwhile_is_not_replaced(octo: Callable[..., Any], batching: Any, tmp_path: Path) -> None:
    batch, out = write(tmp_path / "in.jsonl", "a"), tmp_path / "out.jsonl"
    argv = ("generate", "--batch", str(batch), "-o", str(out))
    batching.check_prompt = lambda _ids: out.write_text("precious\n")
    refused = octo(*argv)
    assert refused.code == 2 and "is there already" in refused.err and out.read_text() == "precious\n"
    out.unlink()
    batching.made = []
    assert octo(*argv).code == 0 and texts(out) == ["a"] and not batching.made


def test_killed_between_the_result_and_the_end(octo: Callable[..., Any], batching: Any, tmp_path: Path) -> None:
    batch, out = write(tmp_path / "in.jsonl", "a", "b"), tmp_path / "out.jsonl"
    argv, kept = ("generate", "--batch", str(batch), "-o", str(out)), tmp_path / ".out.jsonl.part"
    batching.stop_after = 1
    octo(*argv)
    head = kept.read_bytes().split(b"\n")[0]
    batching.stop_after = 1000
    assert octo(*argv).code == 0
    kept.write_bytes(head + b"\n" + out.read_bytes())
    batching.loaded = None
    assert octo(*argv).code == 0 and texts(out) == ["a", "b"] and not kept.exists() and batching.loaded is None


def test_one_process_at_a_time_writes_a_result(octo: Callable[..., Any], batching: Any, tmp_path: Path) -> None:
    batch, out = write(tmp_path / "in.jsonl", "a"), tmp_path / "out.jsonl"
    with (tmp_path / ".out.jsonl.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused = octo("generate", "--batch", str(batch), "-o", str(out), "--force")
    assert refused.code == 1 and f"another process is writing {out} now" in refused.err and batching.loaded is None


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--batch", "none.jsonl"), "there is no such file"),
        (("--batch", "-"), "/dev/stdin is the path of standard input"),
        (("--batch", "in.jsonl", "-o", "no/folder.jsonl"), "there is no folder"),
        (("--batch", "in.jsonl", "-o", "/dev/null"), "is no file; leave -o out"),
        (("--batch", "empty.jsonl"), "is empty"),
        (("-p", "x", "--json-schema", "none.json"), "there is no such file"),
        (("-p", "x", "--force"), "--force needs -o"),
        (("-p", "x", "--chat-template", "in.jsonl"), "--chat-template needs --chat"),
        (("-p", "x", "--template-kwargs", "{}"), "--template-kwargs needs --chat"),
        (("-p", "x", "--sequences", "2"), "--sequences needs --batch or --n"),
        (("-p", "x", "--logit-bias", "9999=1"), "--logit-bias 9999=...: the model has the tokens 0 to 8191"),
        (("-p", "x", "--chat", "--chat-template", "wrong.jinja"), "not valid Jinja at line 1 of wrong.jinja"),
        (("-p", "x", "--kv", "oct3,oct4"), "--kv 'oct3,oct4' are several formats: give one"),
        (("-p", "x", "--max-tokns", "3"), "No such option '--max-tokns': did you mean --max-tokens"),
        (("-p", "x", "--penalty-range", "5000"), "'5000' is no whole number from 0 to 4,096"),
        (("-p", "x", "--device", "gpu"), "There is no device 'gpu'"),
        (("-p", "x", "-m", "octo-dmo"), "'octo-dmo'"),
        (("-p", "x", "--kv", "otc3"), "'otc3'"),
        (("-p", "x", "--weights", "itn4"), "'itn4'"),
    ],
)
def test_inputs_are_checked_before_a_model_is_loaded(
    octo: Callable[..., Any], batching: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...],
    says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write(Path("in.jsonl"), "a")
    Path("empty.jsonl").touch()
    Path("wrong.jinja").write_text("{% for %}")
    shown = octo("generate", *argv)
    assert shown.code == (1 if "wrong.jinja" in argv else 2) and says in shown.err and shown.err.count("\n") == 1, (
        shown.err
    )
    assert batching.loaded is None


@pytest.mark.parametrize(
    ("option", "text"),
    [("--regex", "("), ("--json-schema", "{"), ("--json-schema", '"x"'), ("--grammar", "start: (")],
)
def test_grammars_are_checked_before_a_model_is_loaded(
    octo: Callable[..., Any], batching: Any, tmp_path: Path, option: str, text: str
) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    file = tmp_path / "given"
    file.write_text(text)
    shown = octo("generate", "-p", "x", option, text if option == "--regex" else str(file))
    assert shown.code == 2 and shown.err.count("\n") == 1 and batching.loaded is None, shown.err
