"""Templates that compute without end, take all memory, or are rubbish: one sentence, soon, in little memory."""

import json
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from octo_run.errors import OctoError
from octo_run.tokenizer import ChatTemplate

pytestmark = pytest.mark.slow  # as a whole half a minute or more

TEMPLATES = sorted((Path(__file__).resolve().parents[3] / "shared/data/chat_templates").glob("*.jinja"))
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}

GROW = "{% set ns = namespace(a=@, b=@) %}{% for i in range(70) %}"
PAIRS = GROW.replace("@", "[1]") + "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
DICTS = GROW.replace("@", "{}") + "{% set ns.a = {1: ns.a, 2: ns.a} %}{% set ns.b = {1: ns.b, 2: ns.b} %}{% endfor %}"
MANY = "{% set ns = namespace(a=[]) %}{% for i in range(99999) %}{% set ns.a = ns.a + [@] %}{% endfor %}"
BIG = "('a' * 1000000)"
TUPLES = PAIRS.replace("[", "(").replace("]", ",)").replace(",,", ",")
DEEP = "{% set ns = namespace(a=()) %}{% for i in range(99999) %}{% set ns.a = (ns.a,) %}{% endfor %}"
# fmt: off
STOPPED = {
    "loops": [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call f() %}" * 30 + "{% endcall %}" * 30,
    ],
    "padding": [
        "{{ 'a'.center(3*10**9) }}", "{{ 'a'.ljust(3*10**9) }}", "{{ 'a'.rjust(3*10**9) }}",
        "{{ 'a'.zfill(3*10**9) }}", "{{ 'a'|center(3*10**9) }}",
        "{{ ('\\t'*9).expandtabs(10**9) }}", "{{ 'a'|indent(10**10, true) }}",
        "{{ '{:3000000000}'.format('a') }}", "{{ '{:3000000000d}'.format(1) }}", "{{ '{:{}}'.format(1, 3*10**9) }}",
        "{{ '%3000000000s' % 'a' }}", "{{ '%*d' % (3*10**9, 1) }}", "{{ '%.3000000000f' % 1.5 }}",
        "{{ '%3000000000s'|format('a') }}", "{{ [1]|batch(10**10, 1)|list }}", "{{ [1]|slice(10**10)|list }}",
        "{{ [[1]]|tojson(indent=10**10) }}",
    ],
    "repetition": [
        "{{ 'a' * 10**10 }}", "{{ 10**10 * 'a' }}", "{{ [1] * 10**10 }}", "{{ (1,) * 10**10 }}",
        "{{ ([1] * 10**7)|list }}",
        "{% set ns = namespace(a='ab') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
        "{% set ns = namespace(a=[1]) %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
        "{% set ns = namespace(a='a') %}{% for i in range(99) %}{% set ns.a = [ns.a, ns.a]|join %}{% endfor %}",
        GROW.replace('@', "'a'") + "{% set ns.a %}{{ ns.a }}{{ ns.a }}{% endset %}{% endfor %}",
        "{% set a = " + BIG + " %}{% for i in range(99999) %}{{ a }}{% endfor %}",
        "{{ 'ab'" + "|replace('a','aa')|replace('b','bb')" * 60 + " }}",
    ],
    "texts": [
        "{{ " + BIG + "|replace('a', 'b'*10000) }}", "{{ " + BIG + ".replace('', 'b'*10000) }}",
        "{{ range(99999)|join('a'*100000) }}", "{{ ('a'*100000).join(['b']*99999) }}", "{{ ('a'*10**8)|list }}",
        "{{ ('\\n'*10**8).splitlines() }}", "{{ (' a'*10**7).split() }}", "{{ ('a'*10**7).split('a') }}",
        "{{ " + BIG + "|wordwrap(1) }}", "{{ 'a b'|wordwrap(1, true, 'x'*10**9) }}", "{{ ('é'*10**7)|urlencode }}",
        "{{ ('{0}'*100000).format('a'*100000) }}", "{{ ('%s'*100000) % (('a'*100000,)*100000) }}",
        "{{ ([1]*100000)|tojson(separators=('a'*10000, 'b')) }}", "{{ ([1]*100000)|tojson(indent=100000) }}",
        "{{ range(99999)|map('center', 100000)|list }}", "{{ strftime_now('%c'*100000) }}",
        "{% for i in range(99999) %}{% set x = " + BIG + "|upper %}{% endfor %}",
        "{{ ('a'*10**7).rfind('b' + 'a'*5000000) }}", "{{ ('a'*10**7).rsplit('b' + 'a'*500000) }}",
        "{{ ('a'*10**7).strip('b'*10**7) }}", "{{ ('a'*10**7).rpartition('b' + 'a'*500000) }}",
    ],
    "lists": [
        PAIRS + "{{ ns.a }}", PAIRS + "{{ ns.a|tojson }}", PAIRS + "{{ [ns.b].index(ns.a) }}",
        PAIRS + "{{ [ns.a, ns.b]|sort }}", DICTS + "{{ ns.a is eq ns.b }}",
        TUPLES + "{{ {ns.a: 1} }}",
        MANY.replace("@", "i"), MANY.replace("@", "namespace()"), MANY.replace("@", "'x'.join"),
        "{% set a = [1]*1000000 %}" + MANY.replace("@", "a[1:]"), "{{ ([[1]*10000]*10000)|sum(start=[]) }}",
        "{% for i in range(9999) %}{% set x = range(99999)|unique|list %}{% endfor %}",
        "{% set ns = namespace(a=[]) %}{% for i in range(99999) %}{% set ns.a = [ns.a] %}{% endfor %}{{ ns.a }}",
        "{{ range(10**18) }}", "{{ range(10**18)|list }}",
    ],
    "keys": [
        start + use for start in (TUPLES, DEEP) for use in (
            "{{ {}[ns.a] }}", "{{ ns.a in {} }}", "{{ {}.get(ns.a) }}", "{{ [1]|map(ns.a)|list }}",
            "{{ 1|round(1, ns.a) }}", "{{ ns.a is filter }}", "{{ [ns.a]|unique|list }}", "{{ dict([[ns.a, 1]]) }}",
            "{{ messages[ns.a].x }}", "{{ ns.a in ([ns.a]|map('list')) }}",
        )
    ],
    "kept": [
        "{% set b = " + BIG + " %}" + MANY.replace("@", what)
        for what in ("b.swapcase()", "b|urlencode", "b|e", "b[1:]", "b|list", "'%5s' % b", "b.zfill(1000009)")
    ] + [
        "{% set ns = namespace(a=[], n=0) %}{% block a %}{% set ns.a = [ns.a, [" + "1," * 2000 + "]] %}"
        "{% set ns.n = ns.n + 1 %}{% if ns.n < 99999 %}{{ self.a() }}{{ self.a() }}{% endif %}{% endblock %}",
        "{% set ns = namespace(a=[]) %}{% macro f() %}{% set ns.a = [ns.a, [" + "1," * 2000 + "]] %}{% endmacro %}"
        "{% for i in range(99999) %}{{ f() }}{% endfor %}",
    ],
    "numbers": [
        "{{ 2**(10**9) }}", "{{ (10**300)**(10**300) }}", "{{ 5|round(-10**9) }}", "{{ 5|round(10**9, 'ceil') }}",
        "{% set ns = namespace(a=3) %}{% for i in range(99) %}{% set ns.a = ns.a * ns.a %}{% endfor %}",
        "{{ 1" + "0" * 5000 + " }}", "{{ 0x1" + "0" * 5000 + " }}",
    ],
}
LARGE = 200_000
SOURCES = [
    "x" * 5_000_000, "{{ 1 }}" * 1_000_000, "{{ " + "(" * LARGE, "{{ " + "[" * LARGE, "{{ " + "-" * LARGE + "1 }}",
    "{{ " + "not " * 50_000 + "1 }}", "{{ " + "1+" * 90_000 + "1 }}", "{{ 1" + "|e" * 90_000 + " }}",
    "{{ a" + ".b" * 90_000 + " }}", "{{ a" + "()" * 90_000 + " }}", "{{ " + "a if b else " * 20_000 + "a }}",
    "{% if 1 %}" * 9000 + "{% endif %}" * 9000, "{% for i in [] %}" * 4000 + "{% endfor %}" * 4000,
    "{% macro a() %}" * 4000 + "{% endmacro %}" * 4000, "{{" * 90_000, "{#" * 90_000, "{% raw %}" * 20_000,
    *("".join(many.replace("@", str(i)) for i in range(7000)) for many in (
        "{%if a%}{%set b@=1%}{%endif%}", "{%set b@=1%}{%include a%}", "{%set b@=1%}{%block c@ scoped%}{%endblock%}",
    )),
    "{%if a%}" + "".join(f"{{%elif b{i}%}}x" for i in range(9000)) + "{%endif%}", "{%if a%}" + "{%elif a%}" * 20_000,
    "{% autoescape true %}{% endautoescape %}",
    "{{ '" + "a" * LARGE, "{{a}}" * 50_000, "{{ {" + "1:1," * 60_000 + "} }}", "{%-" * 60_000,
]
# fmt: on
RUN = """
import json, pathlib, re, sys, time
from octo_run.errors import OctoError
from octo_run.tokenizer.chat import ChatTemplate
for source in json.load(sys.stdin):
    start = time.thread_time()
    try:
        text = ChatTemplate(source, "here.jinja", {}, ["<s>"]).render([{"role": "user", "content": "x"}])
        answer = "rendered %d characters" % len(text)
    except OctoError as error:
        answer = str(error)
    # ru_maxrss would count what the test's own process had before the call of exec
    peak = int(re.search("VmHWM:\\s*([0-9]+)", pathlib.Path("/proc/self/status").read_text())[1])
    print(json.dumps([answer, time.thread_time() - start, peak * 1024]), flush=True)
"""


def run_apart(sources: list[str], timeout: float) -> list[Any]:
    """For each template (answer, seconds, peak bytes of the process so far), from a process that may take 2 GB."""
    child = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        timeout=timeout,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
    )
    assert child.returncode == 0 and not child.stderr, child.stderr
    return [json.loads(line) for line in child.stdout.splitlines()]


STOP = re.compile("is stopped because|nested too deeply|too large|unhashable|short text|more than|digits")


@pytest.mark.parametrize("kind", STOPPED)
def test_what_no_conversation_needs_is_stopped(kind: str) -> None:
    answers = run_apart(STOPPED[kind], timeout=120)
    assert len(answers) == len(STOPPED[kind])
    for source, (answer, seconds, peak) in zip(STOPPED[kind], answers, strict=True):
        assert STOP.search(answer), (source, answer)
        assert "MemoryError" not in answer
        assert seconds < 5, (source, seconds)
        assert peak < 1 << 30, (source, peak)


def test_sources_that_no_model_has_are_refused_soon() -> None:
    for source, (answer, seconds, peak) in zip(SOURCES, run_apart(SOURCES, timeout=120), strict=True):
        assert answer.startswith("The chat template") and len(answer) <= 480, (source[:40], answer)
        assert seconds < 5 and peak < 1 << 30, (source[:40], seconds, peak)


@pytest.fixture(scope="module", params=TEMPLATES or [None], ids=lambda path: path.stem if path else "none")
def real_template(request: pytest.FixtureRequest) -> ChatTemplate:
    if request.param is None:
        pytest.skip("needs the shared data chat_templates, which are not beside this checkout")
    return ChatTemplate(request.param.read_text(encoding="utf-8"), str(request.param), NAMES, NAMES.values())


def test_a_very_long_conversation_is_no_such_template(real_template: ChatTemplate) -> None:
    """10,000 messages have their own budget; a tenth of them shows how it grows in a tenth of the time."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": "some text, 你好 " * 12} for i in range(1000)]
    tool = {"name": "book", "description": "d", "parameters": {"type": "object", "properties": {}}}
    variables: dict[str, Any] = {"tools": [{"type": "function", "function": tool}] * 9, "functions": "[]"}
    if "deepseek-r1" in real_template.file:
        variables = {}
    text = real_template.render(turns, datetime="2024-01-01", **variables)
    assert text.count("你好") >= 12_000 - 24


def test_ten_thousand_messages_and_a_million_characters_in_one() -> None:
    source = "{% for m in messages %}<s>{{ m.role }}{{ m.content|trim|replace('a', 'bb') }}{{ m|tojson }}{% endfor %}"
    template = ChatTemplate(source, "here.jinja", NAMES, NAMES.values())
    turns = [{"role": ("user", "assistant")[i % 2], "content": "some text, 你好 " * 12} for i in range(10_000)]
    assert template.render_marked(turns).text.count("<s>") == 10_000
    assert len(template.render([{"role": "user", "content": "a😀" * 1_000_000}])) > 5_000_000


# Mutants

# fmt: off
SEEDS = [
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role + m['content'] | trim }}<|im_end|>{% endfor %}",
    "{%- set ns = namespace(n=0) -%}{% for m in messages if m.role != 'x' %}{% set ns.n = ns.n + 1 %}{{ loop.index }}"
    "{% if loop.last and not tools %}{{ m.content.split('a')[-1] | tojson(indent=2) }}{% endif %}{% endfor %}",
    "{% macro f(a, b=1) %}{{ a ~ b }}{% endmacro %}{{ f('%s' % 1) }}{{ raise_exception('no') if messages|length > 9 }}",
]
SPICE = [
    "{{", "}}", "{%", "%}", "-%}", "{#", "#}", "'", "\"", "\\", "|", "~", "(", ")", "[", "]", "{", "}", ":", ",", ".",
    "*", "**", "{% for i in range(99999) %}", "{% endfor %}", "{% if x %}", "{% endif %}", "{% set a = ",
    "{% macro f() %}", "loop",
    "999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999", "10**9",
    "* 10**8", "|center(10**9)", "|list", "|join", "|tojson", "|replace('', 'xx')", ".format(", " % ", "[::-1]",
    "recursive", "messages", "namespace", "not ", " in ", " is ", "raise_exception", "{% endmacro %}", "\x1b]0;x\x07",
    "\ud83d", "\x00", "é", "\u2028", "{% raw %}", "{% call f() %}", "{% include 'x' %}", "__class__",
    "|attr('__class__')", "1e999", "true", "none", "-", "//", "%",
]
# fmt: on


def mutant(rng: random.Random, seeds: list[str]) -> str:
    source = rng.choice(seeds)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at, to = sorted(rng.randrange(len(source) + 1) for _ in range(2))
        to = min(to, at + rng.choice([1, 3, 30]))
        other = rng.choice(seeds)
        start = rng.randrange(len(other))
        rest = [
            source[to:],
            rng.choice(SPICE) + source[at:],
            rng.choice(SPICE) + source[to:],
            source[at:to] * rng.choice([2, 9]) + source[to:],
            other[start : start + rng.choice([5, 50])] + source[at:],
            chr(rng.choice([rng.randrange(128), rng.randrange(0x10FFFF)])) + source[to:],
        ]
        source = source[:at] + rng.choice(rest)
    return source


def try_mutants(count: int, seed: int) -> dict[str, int]:
    """Render mutants; what is no OctoError gets out of here. Returns how often which kind of answer came."""
    seeds = [*SEEDS, *(path.read_text(encoding="utf-8") for path in TEMPLATES)]
    rng = random.Random(seed)
    answers = {"rendered": 0, "refused": 0}
    turns = [{"role": "user", "content": "a b<s>"}, {"role": "assistant", "content": "c"}]
    for _ in range(count):
        source = mutant(rng, seeds)
        start = time.thread_time()
        try:
            marked = ChatTemplate(source, "here.jinja", NAMES, NAMES.values()).render_marked(turns, tools=[{"a": 1}])
            marked.text.replace(marked.mark, "").encode()
            answers["rendered"] += 1
        except OctoError as error:
            answers["refused"] += 1
            assert len(str(error)) <= 480 and str(error).isprintable(), (source, str(error))
        assert time.thread_time() - start < 5, source
    return answers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of escapes in strings, by jinja2
def test_mutants_of_templates_give_a_text_or_a_sentence() -> None:
    answers = try_mutants(500, seed=1)
    assert min(answers.values()) > 50


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_bytes_of_every_kind_are_no_template() -> None:
    rng = random.Random(2)
    for _ in range(200):
        source = rng.randbytes(rng.randrange(400)).decode("latin-1") + rng.choice(["", "{{", "{%"])
        with_marks = source + rng.randbytes(50).decode("utf-16-le", "surrogatepass")
        for text in (source, with_marks):
            try:
                ChatTemplate(text, "here.jinja", {}, ["<s>"]).render([])
            except OctoError as error:
                assert str(error).isprintable()
