"""How answers fall into what a model thinks and what it says, for each family's marks, however their text is cut."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octo_run.tokenizer import Tokenizer, load_tokenizer
from octo_run.tokenizer.thinking import Division, Part, Piece, written

HARMONY = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>"]
MARKS = {
    "channels": HARMONY,
    "mistral": ["[THINK]", "[/THINK]", "</s>"],
    "seed": ["<seed:bos>", "<seed:think>", "</seed:think>", "<seed:eos>"],
    "gemma": ["<|turn>", "<|channel>", "<channel|>", "<turn|>"],
    "cohere": ["<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<eos>"],
    "special": ["<think>", "</think>", "<eos>"],
    "text": ["<eos>"],
}
MISTRAL = (  # thoughts are parts of a message's content
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.content is string %}{{ m.content }}</s>"
    "{% else %}{% for part in m.content %}"
    "{% if part['type'] == 'thinking' %}[THINK]{{ part['thinking'] }}[/THINK]{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}</s>{% endif %}{% endfor %}"
)

Divided = tuple[str, str, str]


@pytest.fixture
def tokenizers(byte_tokenizer: Callable[..., Path]) -> Callable[..., Tokenizer]:
    return lambda kind, template="": load_tokenizer(byte_tokenizer(template, MARKS[kind]))


def divide(tok: Tokenizer, prompt: str, answer: str, size: int) -> Divided:
    """What of an answer is thought, what is said, and its text; ``size`` characters come at a time."""
    division = tok.thinking.division(tok.encode(prompt, allow_special=True))
    text, parts = "", list[Part]()

    def give(pieces: list[Piece], last: bool = False) -> None:
        nonlocal text, parts
        more, found = division.give(pieces, last=last)
        text, parts = text + more, parts + found

    marks = (tok.decode([token], skip_special=False) for token in tok.special_ids)
    special = "|".join(map(re.escape, sorted(marks, key=len, reverse=True)))
    for run in re.split(f"({special})", answer):
        if tok.special_id(run) is not None:
            give(division.special(run))
            continue
        for at in range(0, len(run), size):
            give(division.text(run[at : at + size]))
    give([], last=True)
    return "".join(t for thought, t in parts if thought), "".join(t for thought, t in parts if not thought), text


ASSISTANT = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
CASES = [
    (
        "channels",
        ASSISTANT,
        "<|channel|>analysis<|message|>Greet.<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|return|>",
        ("Greet.", "Hello!", "<think>\nGreet.\n</think>\n\nHello!"),
    ),
    ("channels", ASSISTANT, "<|channel|>final<|message|>Hello!<|return|>", ("", "Hello!", "Hello!")),
    ("channels", ASSISTANT + "<|channel|>final<|message|>", "Hello!", ("", "Hello!", "Hello!")),
    (
        "channels",
        ASSISTANT + "<|channel|>analysis<|message|>Well",
        ", hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
        (", hm.", "Yes.", ", hm.\n</think>\n\nYes."),
    ),
    (  # two thoughts, a word to the user between them
        "channels",
        ASSISTANT,
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>b<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Done.<|return|>",
        ("a\n\nb", "Wait.\n\nDone.", "<think>\na\n</think>\n\nWait.\n<think>\n\nb\n</think>\n\nDone."),
    ),
    (  # what is written to a tool
        "channels",
        ASSISTANT,
        "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary to=functions.now "
        "<|constrain|>json<|message|>{}<|call|>",
        ("Look.\n\n{}", "", "<think>\nLook.\n\n{}\n</think>"),
    ),
    (
        "channels",
        ASSISTANT,
        " to=functions.now<|channel|>commentary<|message|>{}<|call|>",
        ("{}", "", "<think>\n{}\n</think>"),
    ),
    ("channels", ASSISTANT, "<|channel|>analysis<|message|>cut", ("cut", "", "<think>\ncut")),
    ("channels", ASSISTANT, "<|channel|>anal", ("", "", "")),
    ("channels", ASSISTANT, '{"a": 1}<|return|>', ("", '{"a": 1}', '{"a": 1}')),  # without any marks, as grammars want
    ("channels", ASSISTANT, "assist me", ("", "assist me", "assist me")),
    ("channels", ASSISTANT, "<|channel|>" + "x" * 70, ("", "x" * 70, "x" * 70)),
    ("channels", "Once", " upon <think> a time", ("", " upon <think> a time", " upon <think> a time")),
    (  # its own words about marks are none
        "channels",
        ASSISTANT,
        "<|channel|>analysis<|message|>Is it </think>?<|end|><|start|>assistant<|channel|>final<|message|><think> is.",
        ("Is it </think>?", "<think> is.", "<think>\nIs it </think>?\n</think>\n\n<think> is."),
    ),
    ("mistral", "[INST]Hi[/INST]", "[THINK]Hm.[/THINK]Yes.</s>", ("Hm.", "Yes.", "<think>\nHm.\n</think>\n\nYes.")),
    ("mistral", "[INST]Hi[/INST]", "Yes.</s>", ("", "Yes.", "Yes.")),
    ("mistral", "a[THINK]b[/THINK]c[THINK]d", "e[/THINK]f", ("e", "f", "e\n</think>\n\nf")),
    (
        "mistral",
        "[INST]Hi[/INST]",
        "Let me see. [THINK]Hm.[/THINK]Yes.",
        ("Hm.", "Let me see. Yes.", "Let me see. \n<think>\nHm.\n</think>\n\nYes."),
    ),
    (
        "seed",
        "<seed:bos>assistant\n",
        "<seed:think>\nHm.\n</seed:think>\n\nYes.<seed:eos>",
        ("\nHm.\n", "\n\nYes.", "<think>\nHm.\n</think>\n\nYes."),
    ),
    (
        "gemma",
        "<|turn>model\n",
        "<|channel>thought\nHm.\n<channel|>Yes.<turn|>",
        ("Hm.\n", "Yes.", "<think>\nHm.\n</think>\n\nYes."),
    ),
    ("gemma", "<|turn>model\n", "<|channel>thought\n<channel|>Yes.", ("", "Yes.", "<think>\n</think>\n\nYes.")),
    ("gemma", "<|turn>model\n<|channel>thought\n<channel|>", "Yes.", ("", "Yes.", "Yes.")),
    ("gemma", "<|turn>model\n", "<|channel>thoughtful", ("thoughtful", "", "<think>\nthoughtful")),
    ("gemma", "<|turn>model\n", "<|channel>thou", ("", "", "<think>")),
    (
        "cohere",
        "",
        "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|><eos>",
        ("Hm.", "Yes.", "<think>\nHm.\n</think>\n\nYes."),
    ),
    ("special", "", "<think>\nHm.\n</think>\n\nYes.", ("\nHm.\n", "\n\nYes.", "<think>\nHm.\n</think>\n\nYes.")),
    ("text", "", "<think>\nhm <b> a < b\n</think>\n\nYes.", ("\nhm <b> a < b\n", "\n\nYes.", ...)),
    ("text", "<think>\n", "hm\n</think>\nYes.", ("hm\n", "\nYes.", ...)),
    ("text", "", "Yes. <think> is a mark.", ("", "Yes. <think> is a mark.", ...)),
    ("text", "", "\n<think></think>Yes", ("", "Yes", ...)),
    ("text", "", "<think>cut", ("cut", "", ...)),
    ("text", "", "<th", ("", "<th", ...)),
    ("text", "", "  ", ("", "  ", ...)),
    ("text", "", "<think>a</think>b<think>c</think>", ("a", "b<think>c</think>", ...)),
]


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_an_answer_falls_into_its_parts(size: int, tokenizers: Any) -> None:
    known: dict[str, Tokenizer] = {kind: tokenizers(kind) for kind in MARKS}
    for kind, prompt, answer, (thought, said, text) in CASES:
        expected = (thought, said, answer if text is ... else text)  # marks that are text stay as they are
        assert divide(known[kind], prompt, answer, size) == expected, (kind, prompt, answer)


def test_marks_of_a_template_that_the_tokenizer_has_as_text(tokenizers: Any) -> None:
    """As ``<think>``, but the text has the marks of all other models."""
    tok = tokenizers("text", "{{ '[THINK]' }}{{ '[/THINK]' }}")
    for size in (1, 2, 100):
        assert divide(tok, "", "[THINK]Hm.[/THINK]Yes [1].", size) == (
            "Hm.", "Yes [1].", "<think>\nHm.\n</think>\n\nYes [1].")  # fmt: skip


def test_a_template_that_writes_marks_as_text_decides(tokenizers: Any) -> None:
    """A vocabulary may have tokens that the model was never taught."""
    tok = tokenizers("mistral", "{{ '<think></think>' }}")
    assert divide(tok, "", "<think>a</think>b", 1) == ("a", "b", "<think>a</think>b") and tok.thinking.key is None


def test_what_ends_a_message_in_a_channel_ends_the_answer_or_not(tokenizers: Any) -> None:
    tok = tokenizers("channels")
    end, back, call = (tok.special_id(text) for text in ("<|end|>", "<|return|>", "<|call|>"))
    assert tok.thinking.ends([1, end]) == {1, back, call} and tok.thinking.ends([]) == {back, call}
    for channel, ends in (("analysis", False), ("commentary", False), ("final", True)):
        division = tok.thinking.division(tok.encode(ASSISTANT, allow_special=True))
        for mark, words in (("<|channel|>", channel), ("<|message|>", "Hm."), ("<|end|>", "")):
            division.special(mark)
            division.text(words)
        assert division.ended == ends, channel


def test_what_ends_a_thought_is_the_models_own(tokenizers: Any) -> None:
    closing = {kind: tokenizers(kind) for kind in MARKS}
    found = {kind: tok.decode(tok.thinking.closing(), skip_special=False) for kind, tok in closing.items()}
    assert found == {
        "channels": "<|end|><|start|>assistant<|channel|>final<|message|>",
        "mistral": "[/THINK]",
        "seed": "\n</seed:think>\n",
        "gemma": "\n<channel|>",
        "cohere": "<|END_THINKING|>",
        "special": "\n</think>\n\n",
        "text": "\n</think>\n\n",
    }
    assert len(closing["seed"].thinking.closing()) == 3, "the mark is one token"


def test_a_message_has_its_thought_under_the_name_that_the_template_reads(tokenizers: Any) -> None:
    parts: list[Part] = [(True, "Hm"), (True, "."), (False, "Yes.")]
    tok = tokenizers("seed", "{{ messages[0].reasoning_content }}")
    assert tok.thinking.message("...", parts) == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    tok.use_template("{{ messages[0].thinking }}", "here")
    message = tok.thinking.message("...", parts)
    assert message == {"role": "assistant", "content": "Yes.", "thinking": "Hm."}
    assert written(message) == "<think>\nHm.\n</think>\n\nYes."
    more = tok.thinking.message("...", [(False, " No.")], message)
    assert more == {"role": "assistant", "content": "Yes. No.", "thinking": "Hm."}
    assert tok.thinking.message("Yes.", [(False, "Yes.")]) == {"role": "assistant", "content": "Yes."}
    plain = tokenizers("text")
    text = "<think>Hm.</think>Yes."
    assert plain.thinking.message(text, parts) == {"role": "assistant", "content": text}


def test_a_template_that_reads_thoughts_as_parts_gets_them_so(tokenizers: Any) -> None:
    """The next turn's prompt goes on with the very tokens of the answer."""
    tok = tokenizers("mistral", MISTRAL)
    said = "[INST]Hi[/INST][THINK]Hm.[/THINK]Yes.</s>"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes.", "thinking": "Hm."}]
    assert tok.chat(talk) == tok.encode(said, allow_special=True)
    goes_on = tok.chat(talk, continue_final_message=True)
    assert goes_on == tok.encode(said.removesuffix("</s>"), allow_special=True)
    hostile = [talk[0], {"role": "assistant", "content": "[THINK]", "thinking": "[/THINK]"}]
    special = [i for i in tok.chat(hostile) if i in tok.special_ids]
    assert special == [tok.special_id(text) for text in MARKS["mistral"]]


SWITCHES = {
    "ByteDance-Seed-OSS": {"on": {"thinking_budget": -1}, "off": {"thinking_budget": 0}},
    "Qwen-Qwen3-0.6B": {"on": {"enable_thinking": True}, "off": {"enable_thinking": False}},
    "Qwen-QwQ-32B": {},
    "deepseek-ai-DeepSeek-V3.1": {"on": {"thinking": True}, "off": {"thinking": False}},
    "openai-gpt-oss-120b": {word: {"reasoning_effort": word} for word in ("low", "medium", "high")},
}


def test_how_much_a_model_thinks_is_switched_where_its_template_asks(tokenizers: Any, shared: Any) -> None:
    text, channels = tokenizers("text"), tokenizers("channels")
    for name, switches in SWITCHES.items():
        tok = channels if "gpt-oss" in name else text
        tok.use_template(shared(f"chat_templates/{name}.jinja").read_text(), name)
        assert tok.thinking.switches() == switches, name


#: What the templates do where nothing is said.
UNASKED = {
    "ByteDance-Seed-OSS": "on", "Qwen-Qwen3-0.6B": "on", "Qwen-QwQ-32B": None, "deepseek-ai-DeepSeek-V3.1": "off",
    "openai-gpt-oss-120b": "medium",
}  # fmt: skip


def test_how_a_template_is_switched_is_known_from_what_it_writes(tokenizers: Any, shared: Any) -> None:
    text, channels = tokenizers("text"), tokenizers("channels")
    for name, unasked in UNASKED.items():
        tok = channels if "gpt-oss" in name else text
        tok.use_template(shared(f"chat_templates/{name}.jinja").read_text(), name)
        assert tok.thinking.switched({}) == unasked, name
        for word, variables in tok.thinking.switches().items():
            assert tok.thinking.switched({**variables, "other": 1}) == word, name
    text.use_template(shared("chat_templates/ByteDance-Seed-OSS.jinja").read_text(), "seed")
    assert text.thinking.switched({"thinking_budget": 512}) is None
    text.use_template("{{ messages[0].content }}{% if messages|length > 1 and thinking %}x{% endif %}", "late")
    assert text.thinking.switched({}) is None and text.thinking.switched({"thinking": False}) == "off"


def test_a_word_of_the_template_that_is_no_variable_is_no_switch(tokenizers: Any) -> None:
    tok = tokenizers("text", "{% for m in messages %}{{ m.thinking }}{% endfor %}")
    assert tok.thinking.switches() == {}


def test_a_model_without_marks_is_as_it_was(tokenizers: Any) -> None:
    tok = tokenizers("text")
    division: Division = tok.thinking.division([])
    for text in (" <", "th", "ought", " ", "</think>"):
        assert division.give(division.text(text))[0] == text, "nothing is held back"
    assert tok.thinking.ends([1, 2]) == {1, 2}
