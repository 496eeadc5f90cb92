"""The language of chat templates: what jinja2 writes, character for character, and nothing of Python's inside."""

import copy
import json
import random
import re
import warnings
from typing import Any

import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import pytest

from octo_run.errors import OctoError
from octo_run.tokenizer import ChatTemplate
from octo_run.tokenizer.template.filters import FILTERS, TESTS
from octo_run.tokenizer.template.sandbox import READABLE

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": " Hello <s>World \n x", "n": 3, "tags": ["b", "A", "c"], "meta": {"z": 1, "a": [1]}},
    {"role": "assistant", "content": "yes & no</think>\n ok'\"\\é", "n": 2, "tags": [], "meta": {}},
    {"role": "user", "content": "", "n": 2.5, "tags": ["x"], "meta": {"a": None}},
]


class _Generation(jinja2.ext.Extension):
    """As transformers' tag."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> Any:
        return caller()


def in_jinja(source: str) -> str | Exception:
    """What jinja2's sandbox, set up as transformers does, makes of the messages; or its error."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return environment.from_string(source).render(messages=copy.deepcopy(MESSAGES), bos_token="<s>")
    except Exception as error:
        return error


def here(source: str) -> str:
    return ChatTemplate(source, "here.jinja", {"bos_token": "<s>"}, ["<s>"]).render(MESSAGES)


FILTER_USES = """
trim upper lower title capitalize length list string first last sort unique|list join('-') join(',',attribute='role')
replace('o','0') replace('','-') replace('l','LL',1) default('d') default('d',true) tojson tojson(indent=2) int float
abs round round(1,'ceil') items|list dictsort dictsort(by='value') sum min max center(12) indent indent(2,true)
reverse|list indent(width='>',blank=true) truncate(6) truncate(8,true,'~',0) wordwrap(5) wordcount batch(2)|list
batch(2,'f')|list slice(2)|list slice(2,'f')|list map('upper')|list map(attribute='role')|list
map(attribute='meta.a',default='q')|list selectattr('role','equalto','user')|list rejectattr('tags')|list
select('string')|list reject('none')|list select|list groupby('role')
groupby('n')|map(attribute='list')|map('length')|list escape safe urlencode format(1,'a') attr('content') count
sort(reverse=true) sort(attribute='n,role') unique(attribute='role')|list first|default('e') forceescape
tojson(sort_keys=true) tojson(ensure_ascii=true) tojson(separators=(',',':')) max(attribute='n') trim('x')
nosuchfilter
"""
METHOD_USES = """
strip() split() split(',') split('l',1) rsplit('l',1) splitlines() splitlines(true) upper() lower() title() casefold()
capitalize() startswith('H') endswith('x') replace('l','L') replace('l','',1) find('o') rfind('o') count('o')
index('o') items()|list keys()|list values()|list get('a') get('zz','d') join(['a','b']) format(1,2) center(9)
center(10) ljust(9,'.') rjust(29) zfill(25) expandtabs() partition('o') rpartition('o') removeprefix('y')
removesuffix('x') isdigit() isalpha() swapcase() lstrip('yH') rstrip('x') copy() append(1) pop() is_integer()
isspace() nosuchname
"""
TEST_USES = """
defined undefined none string number integer float boolean mapping iterable sequence true false odd even
divisibleby(3) equalto('a') eq(1) in('Hello') in(['a',1]) lower upper sameas(none) filter test escaped ne('x') gt(1)
le(2)
"""
ATOMS = """
m m.content m['content'] m.role m.n m.tags m.meta m.nope messages messages[0].content bos_token 'ab' '' 'ß_é' 'a,b,,c'
'%s-%s' 0 1 -7 2.5 true none [1,'b',none] ('t',) {'k':'v',1:2} undefd loop.index loop.previtem range(4)
"""
OPERATORS = "+ - * ~ / // % ** and or == != < > <= >= in"
FAILING = ["{% include 'x' %}", "{{ 1 / 0 }}", "{{ nosuch.x }}", "{{ messages|nosuch }}", "{% set messages.x = 1 %}"]
# fmt: off
STATEMENTS = [
    "{% for k, v in messages[0].meta.items() %}{{ loop.index }}{{ k }}={{ v }};{% else %}none{% endfor %}",
    "{% for m in messages if m.n > 2 %}{{ loop.length }}{{ loop.revindex }}{{ m.role }}{{ loop.last }}{% endfor %}",
    "{% for m in [] %}x{% else %}none{% endfor %}{% for m in undefd %}x{% else %}none{% endfor %}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i > 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for m in [[1,[2]],3] recursive %}({{ loop(m) if m is iterable else m }}{{ loop.depth }}){% endfor %}",
    "{% for m in messages %}{{ loop.cycle('a','b') }}{{ loop.changed(m.role) }}{{ loop.nextitem is none }}{% endfor %}",
    "{% set x = 1 %}{% for m in messages %}{% set x = x + m.n %}{{ x }} {% endfor %}{{ x }}",
    "{% set ns = namespace(x=1) %}{% for m in messages %}{% set ns.x = ns.x + m.n %}{% endfor %}{{ ns.x }}{{ ns.z }}",
    "{% set a, (b, c) = 1, 'xy' %}{{ a }}{{ b }}{{ c }}{% set x %} text {{ a }}{% endset %}[{{ x|trim }}]",
    "{% set x | upper | trim %} text {% endset %}[{{ x }}]{% filter replace('e','3')|upper %}text{% endfilter %}",
    "{% macro f(a, b=a, c='z') %}[{{ a }}{{ b }}{{ c }}{{ y }}]{% endmacro %}{% set y = 9 %}{{ f(1) }}{{ f(1, c=2) }}",
    "{% macro f(a, b) %}[{{ a }}{{ b }}{{ b is none }}]{% endmacro %}{{ f() }}{{ f(b=1) }}{{ f('x', 'y') }}",
    "{% macro f(a) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, 3, k=4) }}{{ f(*[1, 2], **{'z': 3}) }}",
    "{% macro f(a) %}<{{ caller(a, 2) }}>{% endmacro %}{% call(p, q) f(1) %}{{ p }}{{ q }}{% endcall %}",
    "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(5) }}{{ f.name }}{{ f.arguments }}",
    "{% with x = 1, y = 2 %}{{ x }}{{ y }}{% with x = 3 %}{{ x }}{% endwith %}{{ x }}{% endwith %}[{{ x }}]",
    "{% generation %}{% set q = 1 %}{{ q }}{% endgeneration %}[{{ q }}]{% if q %}{% elif not q %}e{% endif %}",
    "{% block a %}b{{ messages|length }}{% endblock %}{# comment #}{% raw %}{{ x }}{% endraw %}\n",
    "  {%- if true %}\n  a\n  {%- endif %}\n{{ 'x' if false }}|{{ 'x' if false else 'y' }}\n\n",
    "{{ '%s|%5s|%-4d|%.2f|%r|%%|%x' % ('a', true, 3, 1.5, 'q', 255) }}{{ '%(a)s' % {'a': 1} }}",
    "{{ '{}|{:>6}|{!r}|{:05.1f}|{{}}'.format('a', 'b', 'c', 2.25) }}{{ '{a.role}{a[n]}{0}'.format(1, a=messages[0]) }}",
    "{{ '<a>'|safe + '<b>' + '&' }}{{ '<a>' + '<b>'|e }}{{ ('<a>'|safe).join(['<', '>']) }}{{ '<%s>'|safe % '<' }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.current }}{% set j = joiner() %}{{ j() }}x{{ j() }}",
    "{{ dict(a=1, **{'b': 2}) }}{{ dict([(1, 2)]) }}{{ range(5, 0, -2)|list }}{{ [1, 2] == [1, 2.0] }}{{ 1 < 2 < 3 }}",
    "{{ messages[-1].role }}{{ messages[5] }}{{ 'abcdef'[1:4] }}{{ 'abcdef'[::-2] }}{{ messages[1:]|length }}",
]
# fmt: on


def check(source: str) -> bool:
    """Both write the same, or both fail."""
    expected = in_jinja(source)
    if isinstance(expected, str):
        assert here(source) == expected, source
        return True
    with pytest.raises(OctoError):
        pytest.fail(f"{source} gives {here(source)!r}, but {expected!r} in jinja2")
    return False


def test_statements_equal_jinja2() -> None:
    assert all(map(check, STATEMENTS))
    assert not any(map(check, FAILING))


def expressions() -> list[str]:
    atoms, filters, operators = ATOMS.split(), FILTER_USES.split(), OPERATORS.split()
    assert set(FILTERS) <= {"d", "e"} | {re.split(r"\W", use)[0] for use in filters}, "each filter is compared"
    pairs = [(a, b) for a in atoms for b in ("'b'", "2", "m.content", "[1]", "none", "undefd")]
    return [
        *(f"{a}|{use}" for a in atoms for use in filters),
        *(f"({a}).{use}" for a in atoms for use in METHOD_USES.split()),
        *(f"{a} is {use}" for a in atoms for use in TEST_USES.split()),
        *(f"{a} {operator} {b}" for a, b in pairs for operator in operators),
        *(f"({a}){key}" for a in atoms for key in ("[0]", "[-1]", "['n']", "[1:]", "[::-1]", ".n")),
        *atoms,
    ]


# What jinja2 shows of its own inside, and what it does to constants or to ranges only.
INSIDE = re.compile(r"object at 0x|<function|<built-in|dict_\w+\(|Markup\(|<generator|\bslice\(")
DIFFERENT = re.compile(r"\(-?[\d.]+\)\[|\((true|none)\)\[|range\(4\)(\)\.count|\|urlencode)|[)}\]]\)?\|truncate|m\)?\[")


@pytest.mark.slow
def test_expressions_equal_jinja2() -> None:
    """A sample of all of them (they take minutes)."""
    compared = 0
    for expression in random.Random(5).sample(expressions(), 900):
        source = "{% for m in messages %}{{ " + expression + " }};{% endfor %}"
        expected = in_jinja(source)
        if isinstance(expected, str) and (INSIDE.search(expected) or DIFFERENT.search(expression)):
            continue
        compared += check(source)
    assert compared > 250


def things() -> list[str]:
    """Everything that a template can get hold of."""
    return [
        *(
            "range",
            "dict",
            "namespace",
            "cycler",
            "joiner",
            "raise_exception",
            "strftime_now",
            "nosuch",
            "ns",
            "f",
            "messages",
            "loop",
            "caller",
        ),
        *(f"'x'.{name}" for name in sorted(READABLE)),
        *(f"messages[0].{name}" for name in ("get", "items", "keys", "values", "copy", "pop", "update")),
        *(f"messages.{name}" for name in ("index", "append", "sort", "copy")),
        *("loop.cycle", "loop.changed", "ns.x", "f.name", "f.caller", "cycler(1)", "cycler(1).next", "joiner()"),
        *("range(3)", "range(3)|map('string')", "messages|groupby('role')", "messages|batch(2)", "'x'|safe"),
        *("1|attr('real')", "1.5.is_integer", "(1).__class__", "''.__class__.__mro__|default", "none.x", "dict(a=ns)"),
    ]


# fmt: off
WAYS = [
    "{{ @ }}", "{{ [@] }}", "{{ @|string }}", "{{ '' ~ @ }}", "{{ '%s' % [@] }}", "{{ {'a': @} }}", "{{ '%r' % (@,) }}",
    "{{ '{}{!r}'.format(@, @) }}", "{{ [@]|join }}", "{{ raise_exception(@) }}", "{{ @|list }}", "{{ -@ }}",
    "{{ @|pprint }}", "{{ @|tojson }}", "{{ @ + 1 }}", "{{ {@: 1} }}", "{{ @() }}", "{{ '%s'|format(@) }}",
    "{{ @(1, 2, 3) }}", "{{ (@,) }}",
    "{{ @|center(1, 2, 3) }}", "{{ @|length }}", "{{ @ < 1 }}", "{{ @|sort }}", "{{ @|indent }}", "{{ @ is odd }}",
]
# fmt: on


@pytest.mark.slow
def test_names_of_kinds_are_all_that_is_printed() -> None:
    """No address, class, module or signature: not in the text, not in an error."""
    inside = re.compile(
        r"0x[0-9a-f]{4}|<class|<function |<bound|<built|jinja2|octo_run|Callee|object at|lambda|\b_\w+\("
    )
    for thing in things():
        for way in WAYS:
            source = "{% set ns = namespace(x=1) %}{% macro f(a) %}{% endmacro %}{% for m in messages %}"
            source += way.replace("@", thing) + "{% endfor %}"
            try:
                text = here(source)
            except OctoError as error:
                text = str(error)
            assert not inside.search(text), (source, text)


def test_every_filter_and_test_of_jinja2_is_there_but_those_for_web_pages() -> None:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    left_out = {"filesizeformat", "pprint", "random", "striptags", "urlize", "xmlattr"}
    assert set(environment.filters) - set(FILTERS) == left_out
    assert set(environment.tests) == set(TESTS)
    with pytest.raises(OctoError, match="No filter named 'urlize'"):
        here("{{ 'x'|urlize }}")
