"""Chat templates: the text transformers renders, special ids from the template only, a tight sandbox, clear errors."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from octo_run.errors import OctoError, UsageError
from octo_run.tokenizer import ChatTemplate, Tokenizer, load_tokenizer
from octo_run.tokenizer.config import AddedToken, TokenizerConfig, load_config

TEMPLATES = sorted((Path(__file__).resolve().parents[3] / "shared/data/chat_templates").glob("*.jinja"))
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
Messages = list[dict[str, Any]]


def talk(*contents: str, system: str | None = None) -> Messages:
    """Contents of the user and the assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def calls() -> dict[str, Messages]:
    """Calls of tools and their results, in the spellings of several servers."""
    arguments = {"people": 2, "when": "8 pm <b>", "wishes": [1.5, None, True, "é"]}
    book = {"id": "abcdef123", "type": "function", "function": {"name": "book", "arguments": arguments}}
    now = {"id": "abcdef124", "type": "function", "function": {"name": "now", "arguments": {}}}
    text = {**book, "function": {"name": "book", "arguments": '{"people": 2}'}}

    def messages(content: Any, calls: list[Any], *results: Any) -> Messages:
        tools = [{"role": "tool", "content": r, "tool_call_id": c.get("id"), "name": "book"}
                 for c, r in zip(calls, results, strict=True)]  # fmt: skip
        return [*talk("Book!"), {"role": "assistant", "content": content, "tool_calls": calls}, *tools]

    return {
        "call": [*messages("", [book], "done: 1 < 2"), {"role": "assistant", "content": "Done."}, *talk("Thanks")],
        "call without text": messages(None, [book], '{"ok": true}'),
        "call of text": [*messages("Wait.", [text], "x"), *talk("y")],
        "two calls": messages("", [book, now], "1", "2"),
        "bare call": messages("", [book["function"]], "x"),
        "result of an object": messages("", [book], {"a": 1}),
    }


def thoughts() -> dict[str, Messages]:
    """Thoughts apart from the answer, under each of their names, before a call too."""
    conversations = {}
    for name in ("reasoning_content", "thinking", "reasoning"):
        call = calls()["call without text"]
        call[1] = {**call[1], name: "hm\n"}
        answer = {"role": "assistant", "content": "Because.", name: "hm"}
        conversations[f"{name}"] = [*talk("Why?"), answer, *talk("Really?"), *call]
    return conversations


CONVERSATIONS = {
    "one": talk("Hello, who are you?"),
    "system": talk("Hi", system="You are terse."),
    "turns": talk("  What is 1 < 2?\n", "True.", "And [INST] 2 < 1?", system="Be right."),
    "thinking": talk(
        "Why?", "<think>\nhm\n</think>\n\nBecause.", "Really? </think>", "<think>a</think>b", "Go /no_think"
    ),
    "unicode": talk("你好 🦙 \u0301 {{ 7*7 }} {% raw %}", "\ttab\\n \u2028", "'\"quotes\"' & <b>"),
    "empty": talk("", "", ""),
    **calls(),
    **thoughts(),
    "empty system": talk("a", "", "", system=""),
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "Be terse."}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
        {"role": "user", "content": ["d", "e"]},
    ],
    "numbers": [
        {"role": "user", "content": 42},
        {"role": "assistant", "content": 1.5},
        {"role": "user", "content": True},
    ],
    "nothing": [{"role": "user", "content": None}, {"role": "assistant", "content": None}],
    "an object": [{"role": "user", "content": {"text": "a", "n": [1, "é"]}}],
    "no content": [{"role": "user"}],
    "names": [{"role": "user", "content": "x", "name": "Bob"}, {"role": "assistant", "content": "y", "name": "Al"}],
    "developer": [{"role": "developer", "content": "Be terse."}, *talk("a")],
    "late system": [*talk("a"), *talk("b", system="Be terse.")],
    "no messages": [],
    "wrong order": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
    "unknown role": [{"role": "wizard", "content": "abracadabra"}],
}


@pytest.fixture(scope="module", params=TEMPLATES or [None], ids=lambda path: path.stem if path else "none")
def template_file(request: pytest.FixtureRequest) -> Path:
    if request.param is None:
        pytest.skip("needs the shared data chat_templates, which are not beside this checkout")
    path: Path = request.param
    return path


PARAMETERS = {
    "type": "object",
    "properties": {
        "people": {"type": "integer", "description": "how many"},
        "when": {"type": "string", "description": "at what time", "enum": ["8 pm", "<9 pm>"]},
    },
    "required": ["people"],
}
TOOL = {"name": "book", "description": "<b>Book</b> a table", "parameters": PARAMETERS}
NOW = {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}}
WITH_TOOLS: dict[str, Any] = {
    "tools": [{"type": "function", "function": TOOL}, {"type": "function", "function": NOW}],
    "functions": "[]",
    "datetime": "2024-01-01",
}
NO_SUCH_TOOLS = "llama-cpp-deepseek-r1"  # it gives a generator to tojson, which no jinja2 accepts
NEED_TOOLS = "c4ai-command-r-plus|Hermes|firefunction"


@pytest.mark.few(12)
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "whole"])
@pytest.mark.parametrize("tools", [True, False], ids=["tools", "plain"])
def test_rendering_equals_transformers(template_file: Path, prompt: bool, tools: bool) -> None:
    if not tools and re.search(NEED_TOOLS, template_file.stem):
        pytest.skip("this template cannot be rendered without tools")
    if tools and template_file.stem == NO_SUCH_TOOLS:
        pytest.skip("this template itself fails with tools")
    variables = WITH_TOOLS if tools else {}
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = template_file.read_text(encoding="utf-8")
    template = ChatTemplate(source, str(template_file), NAMES, NAMES.values())
    compared = 0
    for name, messages in CONVERSATIONS.items():
        expected = oracle(utils, source, messages, add_generation_prompt=prompt, **variables)
        if expected is None:
            with pytest.raises(OctoError, match="chat template in"):
                template.render(messages, add_generation_prompt=prompt, **variables)
            continue
        compared += name not in ("no messages", "wrong order", "unknown role")
        assert template.render(messages, add_generation_prompt=prompt, **variables) == expected, name
        marked = template.render_marked(messages, add_generation_prompt=prompt, **variables)
        assert marked.text.replace(marked.mark, "") == expected, name
    assert compared >= 9 and len(CONVERSATIONS) >= 20


GOING_ON = {
    "plain": talk("Why?", "The answer is"),
    "space": talk("Why?", "The answer is "),
    "spaces around": talk("Why?", "\n  The answer is\n\n", system="Be terse."),
    "its own mark": talk("Why?", "END_OF_THE_LAST_MESSAGE END_OF_THE_LAST_MESSAGE"),
    "thought": talk("Why?", "<think>\nhm\n</think>\n\nBec"),
    "half a thought": talk("Why?", "<think>\nhm"),
    "empty": talk("Why?", ""),
    "question": talk("Why is"),
    "parts": [*talk("Why?"), {"role": "assistant", "content": [{"type": "text", "text": "a "}, {"type": "image"}]}],
    "no text": [*talk("Why?"), {"role": "assistant", "content": None}],
    "number": [*talk("Why?"), {"role": "assistant", "content": 42}],
    "no messages": [],
}


@pytest.mark.few(7)
def test_a_message_that_goes_on_equals_transformers(template_file: Path) -> None:
    variables = WITH_TOOLS if re.search(NEED_TOOLS, template_file.stem) else {}
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = template_file.read_text(encoding="utf-8")
    template = ChatTemplate(source, str(template_file), NAMES, NAMES.values())
    compared = 0
    for name, messages in GOING_ON.items():
        expected = oracle(utils, source, messages, continue_final_message=True, **variables)
        if expected is None:
            with pytest.raises((OctoError, UsageError), match=r"chat template in|No message can be continued"):
                template.render(messages, continue_final_message=True, **variables)
            continue
        compared += 1
        assert template.render(messages, continue_final_message=True, **variables) == expected, name
        marked = template.render_marked(messages, continue_final_message=True, **variables)
        assert marked.text.replace(marked.mark, "") == expected, name
    assert compared >= 3


#: As checkpoints that see have them; the last one for a role alone.
OF_PARTS = {
    "idefics": """<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}{% if
message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}{% for line in message['content']
%}{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor
%}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}""",
    "llava": """{% for message in messages %}{{ message.role.upper() + ': ' }}{% for part in message.content |
selectattr('type', 'equalto', 'text') %}{{ part.text + ' ' }}{% endfor %}{% endfor %}""",
    "without a system": """{% for message in messages %}{% if message.role == "system" %}{{ raise_exception("no") }}{%
endif %}{% if message.role == "user" %}{% for part in message.content %}{% if part.type == "text" %}<{{ part.text }}>{%
endif %}{% endfor %}{% else %}{{ message.content }}{% endif %}{% endfor %}""",
}


@pytest.mark.parametrize("name", OF_PARTS)
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_text_is_a_part_for_templates_that_leave_it_out_otherwise(name: str, goes_on: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    system = None if name == "without a system" else "Be terse."
    messages = talk("Hello", "Hi", "", "  x <end_of_utterance>", "So", system=system)[: None if goes_on else -1]
    as_parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
    template = ChatTemplate(OF_PARTS[name], "a file", NAMES, ["<end_of_utterance>"])
    ours = template.render(messages, add_generation_prompt=not goes_on, continue_final_message=goes_on)
    assert "Hello" in ours and "x <end" in ours
    if name == "without a system":
        assert ours.startswith("<Hello>Hi<>") and ours.endswith("So") is goes_on
        return
    whole = oracle(utils, OF_PARTS[name], as_parts, add_generation_prompt=not goes_on)
    assert whole is not None and (whole.startswith(ours) and ours.endswith("So") if goes_on else ours == whole)
    marked = template.render_marked(messages, add_generation_prompt=False)
    assert marked.text.count(marked.mark) == 1, "a user's mark of an end is a text"


def test_a_message_goes_on_where_it_ends() -> None:
    turn = "<|{{ m.role }}|>{{ m.content @ }}<|end|>"
    loop = "{% for m in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    kept, stripped = (ChatTemplate(loop.replace("@", how), "here.jinja", {}, []) for how in ("", "| trim"))
    messages = talk("Why?", "So <|end|> ")
    before = [dict(message) for message in messages]
    assert kept.render(messages, continue_final_message=True) == "<|user|>Why?<|end|><|assistant|>So <|end|> "
    assert stripped.render(messages, continue_final_message=True) == "<|user|>Why?<|end|><|assistant|>So <|end|>"
    assert messages == before, "the messages of the caller stay as they are"
    tok = letters(loop.replace("@", ""), ["<|end|>"])
    assert len(specials_of(tok, tok.chat(messages, continue_final_message=True))) == 1, "the user's stays text"
    for source in ("{{ messages[-1].content[:3] }}", "{{ messages[0].content }}", "x"):
        with pytest.raises(OctoError, match=r"here\.jinja rewrites or leaves out the last message"):
            ChatTemplate(source, "here.jinja", {}, []).render(messages, continue_final_message=True)
    for wrong in ([], [{"role": "user"}], [{"role": "user", "content": [{"type": "image"}]}]):
        with pytest.raises(UsageError, match="No message can be continued"):
            kept.render(wrong, continue_final_message=True)


@pytest.mark.parametrize("given", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking"])
def test_a_thought_has_the_name_that_the_template_reads(given: str, read: str) -> None:
    """gpt-oss reads "thinking", Qwen "reasoning_content", and some servers write "reasoning"."""
    template = ChatTemplate("{{ messages[0]." + read + " }}", "here.jinja", {}, [])
    assert template.render([{"role": "assistant", "content": "", given: "hm"}]) == "hm"
    both = [{"role": "assistant", "reasoning_content": "a", "thinking": "b"}]
    assert template.render(both) == {"reasoning_content": "a", "thinking": "b"}[read]
    assert template.render([{"role": "assistant", given: None}]) in ("", "None")


def oracle(utils: Any, source: str, messages: Messages, **variables: Any) -> str | None:
    try:
        rendered, _ = utils.render_jinja_template([messages], chat_template=source, **NAMES, **variables)
    except Exception:  # templates raise what they like
        return None
    return str(rendered[0])


class Letters:
    """A vocabulary of all characters, and the special tokens given."""

    strips_space = strips_spaces = False
    bos, eos, unk, unk_id, opening = None, None, None, None, None
    beyond: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, special: list[str]) -> None:
        self.size = 0x110000 + len(special)
        self.added = tuple(AddedToken(0x110000 + i, text, special=True) for i, text in enumerate(special))

    def token_id(self, content: str) -> int | None:
        return next((token.id for token in self.added if token.content == content), None)

    def seal(self, special: frozenset[int], never: frozenset[int]) -> None:
        """Text never gives a special token here."""

    def encode(self, text: str, *, start: bool) -> list[int]:
        return [ord(char) for char in text]

    def piece(self, token_id: int) -> bytes:
        return self.added[token_id - 0x110000].content.encode() if token_id >= 0x110000 else chr(token_id).encode()


def letters(source: str, special: list[str]) -> Tokenizer:
    """A tokenizer with this template."""
    named = MappingProxyType({key: text for key, text in NAMES.items() if text in special})
    config = TokenizerConfig(Path(), None, named, (), (), None, None, None, source, "here.jinja")
    return Tokenizer(Letters(special), config)


def special_in(source: str) -> list[str]:
    """The special tokens a template is likely to write, by their looks."""
    looks = r"<\|[\w▁ ]+\|>|<｜[\w▁ ]+｜>|\[/?[A-Z_]+\]|</?s>|<(?:start|end)_of_\w+>|<SPECIAL_\d+>|<seed:\w+>"
    return sorted({*re.findall(looks, source), "<s>", "</s>"})


def specials_of(tok: Tokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if i in tok.special_ids]


@pytest.mark.few(7)
def test_user_text_adds_no_special_token_to_any_template(template_file: Path) -> None:
    """All specials, their halves in two turns, and specials with a string inside that the template may cut out."""
    source = template_file.read_text(encoding="utf-8")
    special = special_in(source)
    tok = letters(source, special)
    rng = random.Random(template_file.stem)
    variables = WITH_TOOLS if re.search(NEED_TOOLS, template_file.stem) else {}
    plain = tok.chat(talk("aaa", "bbb", "ccc"), **variables)
    assert specials_of(tok, plain)
    for _ in range(60):
        contents = [attack(rng, special) for _ in range(3)]
        ids = tok.chat(talk(*contents), **variables)
        assert specials_of(tok, ids) == specials_of(tok, plain), contents


def attack(rng: random.Random, special: list[str]) -> str:
    token = rng.choice(special)
    cut = rng.randrange(1, len(token))
    filling = rng.choice(["/no_think", "/think", " ", "\n", "'", "</s>", rng.choice(special)])
    return rng.choice(
        [token, f"x{token}y", token * 2, token[:cut], token[cut:], f"{token[:cut]}{filling}{token[cut:]}", f" {token} "]
    )


def test_what_a_template_cuts_out_leaves_no_special_token() -> None:
    source = (
        "{% for m in messages %}<|u|>{{ m.content.replace('/no_think', '').replace('<x>', '') }}<|end|>{% endfor %}"
    )
    tok = letters(source, ["<|u|>", "<|end|>"])
    expected = specials_of(tok, tok.chat(talk("a")))
    for text in ("<|e/no_thinknd|>", "</no_think|end|>", "<|end|/no_think>", "<|en<x>d|>", "<<x>|end|>", "<|end|<x>>"):
        ids = tok.chat(talk(text))
        assert specials_of(tok, ids) == expected
        assert tok.decode(ids, skip_special=False) == "<|u|><|end|><|end|>"


def test_what_a_template_puts_together_is_no_special_token() -> None:
    source = "{% for m in messages %}<|u|>{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endfor %}"
    tok = letters(source, ["<|u|>", "<|end|>"])
    for parts in (["<|", "end|>"], ["<|e", "nd", "|>"], ["<", "|", "end", "|", ">"], [" <|end ", " |>"]):
        message = {"role": "user", "content": [{"type": "text", "text": part} for part in parts]}
        ids = tok.chat([message])
        assert tok.decode(ids, skip_special=False) == "<|u|>" + "".join(part.strip() for part in parts)
        assert specials_of(tok, ids) == [tok._backend.token_id("<|u|>")]


def test_a_template_that_begins_a_token_before_the_text() -> None:
    tok = letters("<|e{{ messages[0].content }}", ["<|end|>"])
    assert specials_of(tok, tok.chat(talk("nd|>"))) == []


def test_tokens_that_a_template_builds_of_roles() -> None:
    """Phi-4-mini writes '<|' + role + '|>'."""
    tok = letters("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}", ["<|user|>"])
    assert specials_of(tok, tok.chat(talk("user|> <|user|> <|"))) == [tok._backend.token_id("<|user|>")]
    assert specials_of(tok, tok.chat([{"role": "<|user|>", "content": "x"}])) == []


def test_logic_that_looks_for_ordinary_strings_still_works() -> None:
    source = "{{ '<s>' }}{{ messages[0].content.split('</think>')[-1] }}"
    tok = letters(source, ["<s>", "</s>"])
    assert tok.decode(tok.chat(talk("<b></think>yes </s>")), skip_special=False) == "<s>yes </s>"
    assert len(specials_of(tok, tok.chat(talk("<b></think>yes </s>")))) == 1


def test_slices_and_lengths_see_the_text_itself() -> None:
    source = "{{ messages[0].content[:4] }}|{{ messages[0].content | length }}"
    tok = letters(source, ["<s>"])
    assert tok.decode(tok.chat(talk("a < b < c"))) == "a < |9"


def test_a_template_that_cuts_at_special_tokens() -> None:
    """It finds them in contents; what it does not cut out stays text."""
    tok = letters("{{ '<s>' }}{{ messages[0].content.split('<s>', 1)[1] }}", ["<s>"])
    ids = tok.chat(talk("a<s>b<s>c"))
    assert tok.decode(ids, skip_special=False) == "<s>b<s>c" and len(specials_of(tok, ids)) == 1


TOKENS = ["<s>", "</s>", "<|im_end|>", "<|im_start|>", "[INST]", "<SPECIAL_12>", "AB", "BA"]
REWRITES = [
    "c[1:]",
    "c[c.find('<'):]",
    "c[:-1]",
    "c[::-1]",
    "c[::2]",
    "c|tojson",
    "c|tojson|replace('\\x22', '')",
    "[c, {'k': c}]|tojson(indent=1)",
    "[c]",
    "{c: c}",
    "c|upper",
    "c|lower",
    "c|title",
    "c.capitalize()",
    "c.swapcase()",
    "c|replace('x', '')",
    "c|replace('', 'x')",
    "c.replace('x', '<|im_')",
    "c|reverse",
    "c.split('x')|join",
    "c.rsplit('x', 1)|join('<|im_')",
    "c.split()|join('')",
    "c.splitlines()|join('')",
    "c.partition('x')|last",
    "c|list|join",
    "c|list|sort|join",
    "c|list|unique|join",
    "c|map('string')|join",
    "c|batch(2)|map('join')|join",
    "c|trim('x<')",
    "c.strip('x')",
    "c.lstrip()|truncate(9, true, '')",
    "c|truncate(12)",
    "c|wordwrap(3, wrapstring='')",
    "c|indent(1, true)",
    "c|center(30)",
    "c.zfill(20)",
    "c.ljust(30, '<')",
    "c.expandtabs()",
    "c * 2",
    "c ~ c",
    "'<' ~ c",
    "'<|im_' + c",
    "'[INS' ~ c",
    "c + '<'",
    "'%s' % c",
    "'<%5s%s' % (c, c)",
    "'<{}{:>9}'.format(c, c)",
    "'<{0.content}'.format(m)",
    "'<|im_%s'|format(c)",
    "c|format",
    "c.format('end')",
    "'<|im_'.join([c, c, c])",
    "c.join(['<', '<'])",
    "c|e|replace('&lt;', '<')|replace('&gt;', '>')",
    "c|safe + '<'",
    "c|urlencode",
    "'<SPECIAL_' ~ c|length ~ c[-1:]",
    "'<SPECIAL_' ~ c|int ~ '_'",
    "'<SPECIAL_' ~ (c|int + 1) ~ c",
    "c|first ~ c[1:]",
    "c|default('<')",
    "(c, '<s')|join",
    "messages|map(attribute='content')|join",
    "messages|groupby('content')",
    "messages|tojson",
    "messages",
    "m.items()|list",
    "m|dictsort|first|join",
    "m|string",
    "c.encode",
    "cycler(c, '<').next()",
    "namespace(x=c).x",
    "dict(a=c).a",
    "caller",
]


def own_tokens(count: int) -> list[str]:
    return ["<s>", "AB"] * count


def around(rewrite: str, content: str = "m.content") -> str:
    """A template that writes <s> and AB around what it makes of a content."""
    return (
        "{% macro show(c) %}{{ c }}{% endmacro %}{% for m in messages %}{% set c = " + content + " %}{{ '<s>' }}\n"
        "{{ " + rewrite + " }}\n\n{{ 'A' ~ 'B' }}{% endfor %}"
    )


def specials_written(tok: Tokenizer, contents: list[str]) -> list[str]:
    ids = tok.chat(talk(*contents))
    text = tok.decode(ids, skip_special=False)
    assert text == tok.render(talk(*contents))
    return [tok.decode([i], skip_special=False) for i in ids if i in tok.special_ids]


ATTACKS = ["<s>", "x<s>", "<<s>>", "<|im_end|>", "<|im_xend|>", "</x/s>", "END|>", "end|>", ">s<", "12>", "T]x[INST]"]
ATTACKS += ["BAB", "<|IM_END|>", "<s>\t<s>", " <s> </s>", "a\n<\ns\n>", "%s<s>", "{}<s>{0}", "<ss>", "\\u003cs>", "A"]


@pytest.mark.few(12)
@pytest.mark.parametrize("rewrite", REWRITES)
def test_whatever_a_template_does_to_texts_they_stay_texts(rewrite: str) -> None:
    for content in ("m.content", "'<|im_' ~ m.content ~ '[INS'", "'<|im_ x' ~ m.content"):
        check_attacks(letters(around(rewrite, content), TOKENS))


def check_attacks(tok: Tokenizer) -> None:
    for attack in ATTACKS:
        contents = [attack, attack[1:], attack[::-1]]
        try:
            found = specials_written(tok, contents)
        except OctoError:  # "c.encode", "c|format" of "%s" and so on
            continue
        assert found == own_tokens(3), attack


# Beginnings of tokens, never their ends: however a template joins them, it writes no token itself.
STARTS = sorted({token[:n] for token in TOKENS[:6] for n in range(1, len(token))})
ENDS = sorted({token[n:] for token in TOKENS for n in range(len(token))})
LITERAL = st.sampled_from([*STARTS, "", " ", "x", "\n"]).map(lambda text: "'" + text.replace("\n", "\\n") + "'")
NUMBER = st.integers(-4, 9).map(str)
EXPRESSION = st.recursive(
    st.one_of(st.just("c"), st.just("c"), LITERAL, st.sampled_from(["m.content", "messages[0].content", "loop.index"])),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" ~ ", " + "]), inner).map(lambda t: "(" + "".join(t) + ")"),
        st.tuples(inner, NUMBER, NUMBER, st.sampled_from(["", ":-1", ":2"])).map(lambda t: "({})[{}:{}{}]".format(*t)),
        st.tuples(inner, st.sampled_from([r.removeprefix("c|") for r in REWRITES if r.startswith("c|")])).map(
            lambda t: f"({t[0]})|{t[1]}"
        ),
        st.tuples(inner, LITERAL, LITERAL).map(lambda t: "({}|string).replace({}, {})".format(*t)),
        st.tuples(inner, LITERAL, LITERAL).map(lambda t: "({}|string).split({} or '<')|join({})".format(*t)),
        st.tuples(inner, inner).map(lambda t: "'{}%s<'.format({}) % ({})".format("{}", *t)),
        st.tuples(inner, inner).map(lambda t: "[{}, {}]|join|string|trim".format(*t)),
        st.tuples(inner, inner, inner).map(lambda t: "({} if {} else {})".format(*t)),
        inner.map(lambda t: f"show({t})"),
    ),
    max_leaves=6,
)
PARTS = [*TOKENS, *STARTS, *ENDS, " ", "\n", "x", "é", "ŉ", "%s", "{}"]
USER_TEXT = st.lists(st.sampled_from(PARTS), max_size=6).map("".join)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(expression=EXPRESSION, contents=st.lists(USER_TEXT, min_size=1, max_size=3))
def test_no_special_id_ever_comes_from_a_text(expression: str, contents: list[str]) -> None:
    """Random programs over texts made of pieces of tokens; tokens that are the template's are all there."""
    tok = letters(around(expression), TOKENS)
    try:
        found = specials_written(tok, contents)
    except OctoError:
        reject()  # it fails for a reason of its own
    assert found == own_tokens(len(contents))


GREEK, CYRILLIC = "αβγδ", "жшдф"
MIXED = st.lists(st.sampled_from(["m.content", "'жш'", "'д фш\\tд'", "'\\nж\\n'", "'x'"]), min_size=2, max_size=5)


#: What keeps the proof of a text that is the template's as a whole only.
FORGETFUL = ["c|tojson", "c|tojson|replace('\\x22', '')", "[c, {'k': c}]|tojson(indent=1)", "[c]", "{c: c}"]
FORGETFUL += ["c.swapcase()", "c|wordwrap(3, wrapstring='')", "c|center(30)", "c.zfill(20)", "c.ljust(30, '<')"]
FORGETFUL += ["c.expandtabs()", "'<%5s%s' % (c, c)", "'<{}{:>9}'.format(c, c)", "c.format('end')"]


@pytest.mark.few(12)
@pytest.mark.parametrize("rewrite", [r for r in REWRITES if r != "c|urlencode"])
@settings(max_examples=12, deadline=None)
@given(parts=MIXED, text=st.text(GREEK + " \nx'", max_size=8))
def test_each_character_knows_who_wrote_it(rewrite: str, parts: list[str], text: str) -> None:
    """Texts in Greek, the template's own words in Cyrillic: no operation changes one into the other."""
    template = ChatTemplate(around(rewrite, " ~ ".join(parts)), "here.jinja", {}, [])
    try:
        result = template._render(talk(text, text[1:]), True, False, {})
    except OctoError:
        return
    for char, mask in zip(result, result.mask, strict=True):
        assert char.lower() not in GREEK or not mask, "a text counts as the template's"
        assert char.lower() not in CYRILLIC or mask or rewrite in FORGETFUL, "the template's own counts as a text"


@settings(max_examples=150, deadline=None)
@given(expression=EXPRESSION, contents=st.lists(st.text("xyzé \n.,", max_size=12), min_size=1, max_size=3))
def test_harmless_texts_are_never_refused(expression: str, contents: list[str]) -> None:
    """What the template alone writes becomes tokens as everywhere else."""
    tok = letters(around(expression), TOKENS)
    try:
        text = tok.render(talk(*contents))
    except OctoError as error:
        assert "fails here" in str(error) or "misses a value" in str(error) or "too deeply" in str(error)
        return
    assert tok.chat(talk(*contents)) == tok.encode(text, allow_special=True)


def test_numbers_that_a_text_gives_make_no_token() -> None:
    tok = letters("{{ '<SPECIAL_' ~ messages[0].content|int ~ '>' }}{{ '<SPECIAL_' ~ 4 * 3 ~ '>' }}", ["<SPECIAL_12>"])
    assert specials_written(tok, ["12"]) == ["<SPECIAL_12>"]
    ids = tok.chat([{"role": "user", "content": 12}])
    assert len(specials_of(tok, ids)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "{{ [1, 2]|tojson(separators=(c, ':')) }}",
        "{{ [1]|tojson(indent=c) }}",
        "{{ '{:{}}'.format('s>', c ~ '>3') }}",
        "{{ '%c' % (c|length + 59) ~ 's>' }}",
        "{{ '{:c}'.format(c|length + 59) ~ 's>' }}",
        "{{ 's>'.rjust(3, c) }}",
        "{{ 's>'|indent(c, true) }}",
        "{{ ['', 's>']|join(c) }}",
        "{{ '-s>'|replace('-', c) }}",
        "{{ 's->'|truncate(2, true, c, 0) ~ 's>' }}",
        "{{ joiner(c)() ~ c ~ 's>' }}",
        "{{ cycler(c).next() + 's>' }}",
        "{{ 's>'.join([c, '']) }}",
        "{{ dict(a=c).a ~ 's>' }}",
        "{{ '%s' % c ~ 's>' }}",
        "{{ ('x' ~ c).split('x')|last ~ 's>' }}",
    ],
)
def test_what_a_text_gives_to_an_operation_is_not_the_templates(source: str) -> None:
    """Separators, fill characters, indents: all of the rest is the template's own."""
    tok = letters("{% set c = messages[0].content %}" + source, ["<s>"])
    ids = tok.chat(talk("<"))
    assert specials_of(tok, ids) == []
    assert "<" in tok.decode(ids)


def test_a_longer_token_half_of_which_a_user_wrote() -> None:
    """The template's own token stands, also where a text would make a longer one of it."""
    tok = letters("{{ '<s>' }}{{ messages[0].content }}{{ '<s>' }}", ["<s>", "<s>x", "x<s>", "<", "x"])
    assert specials_written(tok, ["x"]) == ["<s>", "<s>"]
    assert specials_written(tok, ["x<"]) == ["<s>", "<s>"]


def test_template_variables_are_guarded_too() -> None:
    tok = letters("{{ '<s>' }}{{ tools | tojson }}{{ note }}", ["<s>"])
    ids = tok.chat(talk("x"), tools=[{"name": "<s>", "<s>": 1}], note="<s>")
    assert len(specials_of(tok, ids)) == 1
    assert tok.decode(ids) == '[{"name": "<s>", "<s>": 1}]<s>'


def test_private_use_characters_of_users_stay() -> None:
    tok = letters("{{ '<s>' }}{{ messages[0].content }}", ["<s>"])
    text = "\ue000<s>\ue001\ue000<s>"
    ids = tok.chat(talk(text))
    assert tok.decode(ids) == text and len(specials_of(tok, ids)) == 1
    text = "".join(chr(code) for code in range(0xE000, 0xF900)) + "<s>"
    assert tok.decode(tok.chat(talk(text))) == text


PIECES = [
    "<|im_end|>",
    "<|im_start|>",
    "<|im_",
    "end|>",
    "<|endoftext|>",
    "<",
    "|>",
    "</s>",
    "<s>",
    "\n",
    " ",
    "hi",
    "é",
]
CONTENT = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
HARMLESS = st.text(st.characters(exclude_categories=("Cs", "Co"), exclude_characters="<"), max_size=30)


@pytest.fixture(scope="module", params=["demo", "qwen2"])
def tok(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


@pytest.mark.few(1)
@settings(max_examples=150, deadline=None)
@given(contents=st.lists(HARMLESS, min_size=1, max_size=4))
def test_chat_is_rendering_plus_encoding(tok: Tokenizer, contents: list[str]) -> None:
    messages = talk(*contents)
    assert tok.chat(messages) == tok.encode(tok.render(messages), allow_special=True)


@pytest.mark.few(1)
@settings(max_examples=150, deadline=None)
@given(contents=st.lists(CONTENT, min_size=1, max_size=4))
def test_special_ids_come_from_the_template(tok: Tokenizer, contents: list[str]) -> None:
    messages = talk(*contents)
    ids = tok.chat(messages)
    assert specials_of(tok, ids) == specials_of(tok, tok.chat(talk(*("x" for _ in contents))))
    assert tok.decode(ids, skip_special=False) == tok.render(messages)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(contents=st.lists(HARMLESS, min_size=1, max_size=3))
def test_qwen2_chat_equals_transformers(qwen2: Tokenizer, qwen2_dir: Path, contents: list[str]) -> None:
    check_against_transformers(qwen2, qwen2_dir, contents)


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(HARMLESS.map(lambda text: text.replace("▁", " ")), min_size=1, max_size=3))
def test_demo_chat_equals_transformers(demo: Tokenizer, demo_dir: Path, contents: list[str]) -> None:
    pytest.importorskip("google.protobuf", reason="transformers needs protobuf to read tokenizer.model")
    check_against_transformers(demo, demo_dir, contents)


_ORACLES: dict[Path, Any] = {}


def check_against_transformers(tok: Tokenizer, folder: Path, contents: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    if folder not in _ORACLES:
        _ORACLES[folder] = transformers.AutoTokenizer.from_pretrained(str(folder))
    expected = _ORACLES[folder].apply_chat_template(talk(*contents), add_generation_prompt=True)["input_ids"]
    assert tok.chat(talk(*contents)) == expected


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(HARMLESS, min_size=1, max_size=3))
def test_demo_chat_equals_sentencepiece(demo: Tokenizer, demo_dir: Path, contents: list[str]) -> None:
    """The demo model's markers are user-defined symbols, so SentencePiece itself encodes a conversation."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(demo_dir / "tokenizer.model"))
    assert demo.chat(talk(*contents)) == sp.encode(demo.render(talk(*contents)))


def test_no_second_bos(llama2: Tokenizer, shared: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((shared("tokenizers/llama2") / "tokenizer.model").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}[INST] {{ messages[0].content }} [/INST]")
    tok = load_tokenizer(tmp_path)
    ids = tok.chat(talk("<s>Hello"))
    assert ids.count(1) == 1 and ids[0] == 1


# The sandbox and the errors


def failure(source: str, messages: Messages | None = None) -> str:
    with pytest.raises(OctoError) as caught:
        letters(source, ["<s>"]).chat(talk("x") if messages is None else messages)
    text = str(caught.value)
    assert "\n" not in text and "here.jinja" in text and text.endswith(".")
    return text


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ strftime_now.__self__.__class__.x }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ messages.append('x') }}",
        "{{ messages[0].update(role='x') }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ dict.__subclasses__() }}",
        "{{ messages | attr('__class__') | string | length / 0 }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ range(10000000) | list | length }}",
    ],
)
def test_a_template_reaches_no_python_objects(source: str) -> None:
    assert "chat template" in failure(source)


def test_underscore_attributes_are_empty() -> None:
    source = "[{{ raise_exception.__globals__ }}{{ strftime_now.__self__ }}{{ '{0.__class__}'.format(messages) }}]"
    assert ChatTemplate(source, "here.jinja", {}, []).render(talk("x")) == "[]"


def test_errors_are_one_sentence() -> None:
    assert "refuses this conversation: Only users, please." in failure("{{ raise_exception('Only users,\n please.') }}")
    assert "line 2 of here.jinja" in failure("ok\n{% if %}")
    assert "misses a value: 'wizard' is undefined." in failure("{{ wizard.hat }}")
    assert "fails here (ZeroDivisionError)" in failure("{{ 1 / 0 }}")
    assert "list object has no element 0" in failure("{{ messages[0].content }}", [])


def test_an_error_shows_little_of_the_template_and_nothing_raw() -> None:
    """Escape sequences, long texts, line ends: the sentence stays one, short, with its advice at the end."""
    foreign = "\x1b]52;c;aGk=\x07 \u202e \x9b31m\r\n\0" + "long " * 2000
    sources = {
        "{{ raise_exception(messages[0].content) }}": "refuses this conversation: ",
        "{{ raise_exception('\x1b]52;c;aGk=\x07' * 5000) }}": "refuses this conversation: ",
        "{{ messages[messages[0].content].x }}": "misses a value: ",
        "{{ {}[messages[0].content] + 1 }}": "misses a value: ",
        "{{ ''|attr(messages[0].content) + 1 }}": "misses a value: ",
        "{{ 'x'|map(messages[0].content)|list }}": "No filter named",
        "{% set ns = namespace(**{'_' ~ messages[0].content: 1}) %}": "tries what is forbidden: ",
        "{{ '%(a)s' % {messages[0].content: 1} }}": "fails here (KeyError): ",
        "{% " + foreign + " %}": "not valid Jinja at line 1",
        "{% if x %}{% " + "e" * 5000 + " %}": "not valid Jinja at line 1",
        "{{ 'x' * 10**9 }}": ": use plain generation, or a model with another template.",
    }
    for source, words in sources.items():
        text = failure(source, talk(foreign))
        assert words in text and len(text) <= 480 and text.isprintable(), text


def test_an_error_of_unicode_names_the_message() -> None:
    """The position is one in what was typed, not in the rendered text."""
    tok = letters("{{ '<s>' * 9 }}{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}", ["<s>"])
    for run in (tok.chat, tok.render):
        with pytest.raises(UsageError, match=r"Message 3 \(user\) is not valid .* at position 4 of 'good\\ud83d'"):
            run(talk("good", "good", "good\ud83d"))
        with pytest.raises(UsageError, match=r"Message 1 \(\\udc00\) is not valid Unicode: .* position 0 "):
            run([{"role": "\udc00", "content": "x"}])
        with pytest.raises(UsageError, match=r"Message 2 .* position 1 of"):
            run([*talk("x"), {"role": "assistant", "content": [{"type": "text", "text": "x\udfff"}]}])
        with pytest.raises(UsageError, match=r'template variable "note" is not valid Unicode: .* position 2 '):
            run(talk("x"), note={"a": ["ab\ud800"]})
    assert "writes half a surrogate pair" in failure("{{ '\\ud83d' }}")
    assert "writes half a surrogate pair" in failure("\ud83d")


def test_messages_are_no_bottomless_pit() -> None:
    messages: Messages = talk("x")
    messages[0]["content"] = messages
    with pytest.raises(UsageError, match="nested too deeply"):
        letters("x", ["<s>"]).chat(messages)


def test_a_model_without_a_template(llama2: Tokenizer) -> None:
    assert not llama2.has_chat_template
    with pytest.raises(OctoError, match="has no chat template"):
        llama2.chat(talk("x"))


def test_messages_are_plain_data() -> None:
    with pytest.raises(UsageError, match="not object"):
        letters("x", ["<s>"]).chat([{"role": "user", "content": object()}])


def test_what_transformers_templates_may_use() -> None:
    source = (
        "{% generation %}{{ bos_token }}{% endgeneration %}"
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}\n"
        "{{ {'b': '<é>', 'a': [1]} | tojson }}{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}"
        "{{ strftime_now('%Y') | length }}{{ dict(a=1).a }}{{ tools is none }}"
        "{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    )
    template = ChatTemplate(source, "here.jinja", NAMES, ["<s>"])
    assert template.render([]) == '<s>01{"b": "<é>", "a": [1]}{\n "a": 2,\n "b": 1\n}41True2'


# The side files


def config_folder(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return folder


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    listed = '{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}'
    assert load_config(config_folder(tmp_path, tokenizer_config__json=listed)).chat_template == "D"
    assert load_config(config_folder(tmp_path, chat_template__json='{"chat_template": "O"}')).chat_template == "D"
    config = load_config(config_folder(tmp_path, tokenizer_config__json="{}"))
    assert config.chat_template == "O" and config.chat_template_file.endswith("chat_template.json")
    config = load_config(config_folder(tmp_path, chat_template__jinja="F"))
    assert config.chat_template == "F" and config.chat_template_file.endswith("chat_template.jinja")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "a JSON list where an object is needed"),
        ('{"chat_template": 1}', '"chat_template"'),
        ('{"chat_template": [{"name": "rag", "template": "T"}]}', r'\(rag\) have no "default"'),
        ('{"chat_template": ["x"]}', '"chat_template"'),
        ('{"bos_token": 7}', '"bos_token"'),
        ('{"bos_token": {"text": "<s>"}}', '"bos_token"'),
        ('{"bos_token": "<nowhere>"}', "bos_token '<nowhere>' .* not in its vocabulary"),
        ('{"add_bos_token": "yes"}', '"add_bos_token"'),
        ('{"additional_special_tokens": "<s>"}', '"additional_special_tokens"'),
        ('{"added_tokens_decoder": {"x": {"content": "<s>"}}}', '"added_tokens_decoder.x"'),
        ('{"added_tokens_decoder": {"1": {"content": "<s>", "special": 1}}}', "true or false"),
        ('{"added_tokens_decoder": {"' + "9" * 5000 + '": {"content": "<s>"}}}', '"added_tokens_decoder.9+ ... 9+"'),
        ('{"added_tokens_decoder": {"9000": {"content": ""}}}', "empty text"),
    ],
)
def test_faulty_side_files(tmp_path: Path, demo_dir: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes((demo_dir / "tokenizer.model").read_bytes())
    config_folder(tmp_path, tokenizer_config__json=content)
    with pytest.raises(OctoError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(OctoError, match=r"it needs tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(OctoError, match="is not a folder"):
        load_tokenizer(tmp_path / "nowhere")
