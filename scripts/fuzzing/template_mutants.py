"""Mutants of chat templates: their statements, expressions and texts moved, repeated, replaced by hostile ones."""

import random
import re
from collections.abc import Callable

from fuzzing import hostile

_NODE = re.compile(r"(\{%.*?%\}|\{\{.*?\}\}|\{#.*?#\})", re.DOTALL)
_NUMBER = re.compile(r"\b\d+\b")
_NAME = re.compile(r"\b[a-z_]{3,}\b")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")

#: What stands in the sandbox, what templates call, and what must lead nowhere.
NAMES = (
    "messages", "message", "tools", "add_generation_prompt", "bos_token", "loop", "loop.index0", "loop.previtem",
    "range", "dict", "cycler", "joiner", "namespace", "lipsum", "raise_exception", "strftime_now", "self", "caller",
    "varargs", "none", "missing", "messages[0]", "messages[-1].content", "''.join", "messages.append",
    "messages|length", "ns",
)  # fmt: skip
ATTRIBUTES = (
    "__class__", "__init__", "__globals__", "__mro__", "__subclasses__", "__dict__", "__builtins__", "__code__",
    "_private", "func_globals", "gi_frame", "format", "format_map", "append", "update", "pop", "clear", "mro", "items",
    "content", "role", "strip", "split", "upper", "index", "zfill", "ljust", "center", "replace", "join", "encode",
)  # fmt: skip
FILTERS = (
    "abs", "attr", "batch", "capitalize", "center", "count", "default", "dictsort", "e", "escape", "filesizeformat",
    "first", "float", "forceescape", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list",
    "lower", "map", "max", "min", "pprint", "random", "reject", "rejectattr", "replace", "reverse", "round", "safe",
    "select", "selectattr", "slice", "sort", "string", "striptags", "sum", "title", "tojson", "trim", "truncate",
    "unique", "upper", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr", "nothing",
)  # fmt: skip
OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and")
TESTS = ("defined", "none", "string", "mapping", "iterable", "divisibleby(0)", "in messages", "sameas(none)", "filter")
NUMBERS = ("0", "1", "-1", "2.5", "99999", "10**9", "3*10**9", "10**10**8", "1e308*10", "9" * 5_000, "2**62", "0.0")
#: Statements that ask for time, memory, depth, terminal control or what is inside.
STATEMENTS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "{% for a in range(10**12) %}x{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=2) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ raise_exception('\x1b]52;c;b2N0bw==\x07') }}",
    "{{ raise_exception('no ' * 9999) }}",
    "{{ raise_exception(messages) }}",
    "{{ raise_exception('\\x1b[2J\\u202e\\ud800') }}",
    "{{ raise_exception() }}",
    "{{ '\\ud800' }}",
    "{{ 'a'.center(3*10**9) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ 'a' * 10**10 }}",
    "{{ [0] * 10**9 }}",
    "{{ (9**9**7)|string|length }}",
    "{{ range(99999)|list * 9999 }}",
    "{{ ('a' * 30 ~ '!')|replace('', 'x' * 9999) }}",
    "{{ 'x'|indent(10**9) }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ ('x ' * 9999)|wordwrap(1) }}",
    "{{ ('http://' * 9999)|urlize }}",
    "{{ ('<' * 99999)|striptags }}",
    "{{ messages|batch(10**9, 'x')|list }}",
    "{{ messages|slice(10**9)|list }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages|attr('__class__') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ cycler }}{{ namespace }}{{ dict }}{{ range }}{{ strftime_now }}{{ joiner }}",
    "{{ cycler('a').next }}{{ messages.append }}{{ self }}{{ loop }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% set _x = 1 %}{{ _x }}{{ namespace(_a=1) }}",
    "{{ strftime_now('%Y' * 9999) }}",
    "{{ strftime_now('\\ud800') }}",
    "{{ strftime_now(1) }}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% import 'x' as y %}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% set x %}{% filter upper %}{{ messages }}{% endfilter %}{% endset %}",
    "{% generation %}{{ message }}{% endgeneration %}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% for m in messages %}{% continue %}{% endfor %}",
    "{% break %}",
    "{% call(x) f() %}{% endcall %}",
    "{% raw %}{{ x }}{% endraw %}",
    "{{ 1 / 0 }}",
    "{{ messages[10] }}",
    "{{ none.x.y }}",
    "{{ {}[[]] }}",
    "{{ messages < 1 }}",
    "{% trans %}x{% endtrans %}",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "{% endif %}",
    "{{",
    "{% if",
    "#}",
)


def mutate(rng: random.Random, source: str, others: list[str]) -> str:
    """A mutant of a template; parts of ``others`` are put in."""
    choice = rng.random()
    if choice < 0.08:
        return hostile.damage(rng, source.encode(), [other.encode() for other in others]).decode("utf-8", "replace")
    nodes = _NODE.split(source)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        rng.choice(_CHANGES)(rng, nodes, others)
    return "".join(nodes)


def expression(rng: random.Random, depth: int = 2) -> str:
    """A random expression."""
    if depth == 0 or rng.random() < 0.2:
        return rng.choice((rng.choice(NAMES), rng.choice(NUMBERS), _literal(rng)))
    inner = expression(rng, depth - 1)
    choice = rng.randrange(9)
    if choice <= 2:
        arguments = ", ".join(expression(rng, 0) for _ in range(rng.choice((0, 0, 1, 1, 2))))
        return f"({inner})|{rng.choice(FILTERS)}" + (f"({arguments})" if arguments else "")
    if choice == 3:
        return f"({inner}).{rng.choice(ATTRIBUTES)}"
    if choice == 4:
        return f"({inner}).{rng.choice(ATTRIBUTES)}({expression(rng, 0)})"
    if choice == 5:
        return f"({inner})[{expression(rng, 0)}]"
    if choice == 6:
        return f"({inner}) {rng.choice(OPERATORS)} ({expression(rng, depth - 1)})"
    if choice == 7:
        return f"({inner}) is {rng.choice(TESTS)}"
    return rng.choice(("[{}]", "{{'a': {}}}", "({0}, {0})", "not {}", "({})[::-1]", "-({})")).format(inner)


def _literal(rng: random.Random) -> str:
    text = hostile.text(rng)[:3_000].encode("unicode_escape", "surrogatepass").decode("ascii")
    return "'" + text.replace("'", "\\'") + "'"


def _statement(rng: random.Random) -> str:
    choice = rng.randrange(8)
    if choice <= 2:
        return rng.choice(STATEMENTS)
    if choice <= 5:
        return "{{ " + expression(rng, rng.choice((1, 2, 3))) + " }}"
    if choice == 6:
        return "{% set " + rng.choice(("x", "messages", "ns.x", "loop", "range")) + " = " + expression(rng) + " %}"
    return "{% for x in " + expression(rng) + " %}{{ x }}{% endfor %}"


def _insert(rng: random.Random, nodes: list[str], _others: list[str]) -> None:
    nodes.insert(rng.randrange(len(nodes) + 1), _statement(rng))


def _replace(rng: random.Random, nodes: list[str], _others: list[str]) -> None:
    if nodes:
        nodes[rng.randrange(len(nodes))] = _statement(rng)


def _delete(rng: random.Random, nodes: list[str], _others: list[str]) -> None:
    if nodes:
        begin = rng.randrange(len(nodes))
        del nodes[begin : begin + rng.choice((1, 1, 2, 3))]


def _repeat(rng: random.Random, nodes: list[str], _others: list[str]) -> None:
    if nodes:
        begin = rng.randrange(len(nodes))
        part = nodes[begin : begin + rng.choice((1, 1, 2, 5))]
        size = 1 + sum(map(len, part))
        nodes[begin:begin] = part * min(rng.choice((1, 2, 20, 1_000)), 1 + 200_000 // size)


def _swap(rng: random.Random, nodes: list[str], _others: list[str]) -> None:
    if nodes:
        i, j = rng.randrange(len(nodes)), rng.randrange(len(nodes))
        nodes[i], nodes[j] = nodes[j], nodes[i]


def _splice(rng: random.Random, nodes: list[str], others: list[str]) -> None:
    part = _NODE.split(rng.choice(others))
    begin, place = rng.randrange(len(part)), rng.randrange(len(nodes) + 1)
    nodes[place:place] = part[begin : begin + rng.choice((1, 2, 5, len(part)))]


def _nest(rng: random.Random, nodes: list[str], _others: list[str]) -> None:
    """A part within loops, conditions or parentheses, few or very many."""
    begin = rng.randrange(len(nodes) + 1)
    end = min(len(nodes), begin + rng.choice((1, 3, 9)))
    times = rng.choice((1, 2, 5, 30, 500))
    if rng.random() < 0.6:
        opening, closing = rng.choice(
            (
                ("{% for a in messages %}", "{% endfor %}"),
                ("{% for a in range(99) %}", "{% endfor %}"),
                ("{% if true %}", "{% endif %}"),
                ("{% filter upper %}", "{% endfilter %}"),
                ("{% set x %}", "{% endset %}"),
                ("{% generation %}", "{% endgeneration %}"),
            )
        )
        nodes.insert(end, closing * times)
        nodes.insert(begin, opening * times)
    else:
        opening, closing = rng.choice((("(", ")"), ("[", "]"), ("not ", ""), ("-", ""), ("{'a':", "}")))
        nodes.insert(begin, "{{ " + opening * times * 4 + "1" + closing * times * 4 + " }}")


def _within(pattern: re.Pattern[str], make: Callable[[random.Random], str]) -> Callable[..., None]:
    """A change of one match of ``pattern`` in one statement or expression."""

    def change(rng: random.Random, nodes: list[str], _others: list[str]) -> None:
        places = [i for i, node in enumerate(nodes) if node.startswith("{") and pattern.search(node)]
        if places:
            i = rng.choice(places)
            match = rng.choice(list(pattern.finditer(nodes[i])))
            nodes[i] = nodes[i][: match.start()] + make(rng) + nodes[i][match.end() :]

    return change


_number = _within(_NUMBER, lambda rng: rng.choice(NUMBERS))
_name = _within(_NAME, lambda rng: rng.choice((*NAMES, *ATTRIBUTES, *FILTERS)))
_quoted = _within(_QUOTED, _literal)
_expression = _within(_NAME, lambda rng: "(" + expression(rng) + ")")

_CHANGES: tuple[Callable[[random.Random, list[str], list[str]], None], ...] = (
    *(_insert,) * 4, _replace, _delete, _repeat, _swap, _splice, _nest, _number, _name, _quoted, _expression,
)  # fmt: skip
