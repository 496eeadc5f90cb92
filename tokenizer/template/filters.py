"""The filters (``value | name``) and tests (``value is name``) of templates: those of jinja2 but for web pages
(``urlize``, ``striptags``, ``xmlattr``), ``random``, ``pprint`` and ``filesizeformat``.

Those that only pass values on, or work through the methods of `Text`, are jinja2's own; the others are written here.
"""

import json
import operator
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import jinja2.filters
import jinja2.tests
from jinja2 import Environment, pass_environment
from jinja2.sandbox import SandboxedEnvironment

from octo_run.tokenizer.template.budget import INTEGER_BITS, METER, OverBudget
from octo_run.tokenizer.template.text import Once, Safe, Text, Weight, escaped, given, is_own, lifted, text_of, written

# Operators


def each(value: Any, price: int = 0) -> Any:
    """The items of a value.

    Args:
        price: Operations to come for each item.

    Raises:
        TypeError: The value has no items.
    """
    items = value if isinstance(value, (list, tuple)) else list(lifted(value))
    METER.get().work(1 + (len(items) >> 4) + price * len(items))
    return items


OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "gt", "ge", "lt", "le")},
    "gteq": operator.ge,
    "lteq": operator.le,
    "in": lambda left, right: left in right,
    "notin": lambda left, right: left not in right,
}


def compare(left: Any, *more: Any) -> bool:
    """``left op right op right ...``, each ``op`` a name in `OPERATORS`."""
    meter = METER.get()
    for name, right in zip(more[::2], more[1::2], strict=True):
        meter.search(left)
        meter.search(right)
        if isinstance(left, (list, tuple, dict)) or isinstance(right, Once):
            Weight((left, right))
        elif isinstance(right, (list, tuple)):
            meter.work(len(right) * (16 + (len(left) if isinstance(left, str) else 0)) >> 8)
        if not OPERATORS[name](left, right):
            return False
        left = right
    return True


def arithmetic(name: str, left: Any, right: Any) -> Any:
    """``left + right`` etc."""
    meter = METER.get()
    meter.work(1)
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if not numbers:
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (list, tuple)):
                meter.items(len(value) * (times if isinstance(times, int) else 1))
    elif name == "**" and isinstance(left, int) and left.bit_length() * abs(right) > 2 * INTEGER_BITS:
        raise OverBudget("it computes with too large a number")
    result = SandboxedEnvironment.default_binop_table[name](lifted(left), lifted(right))
    return _as_given(result, left, right) if numbers else result


def negative(name: str, value: Any) -> Any:
    """``-value`` or ``+value``."""
    return _as_given(SandboxedEnvironment.default_unop_table[name](value), value)


def _as_given(result: Any, *sources: Any) -> Any:
    """A number computed from ``sources`` is the template's only if all of them are."""
    if isinstance(result, int) and result.bit_length() > INTEGER_BITS:
        raise OverBudget("it computes with too large a number")
    if isinstance(result, complex):
        raise TypeError("a root of a negative number is no number")
    return result if all(map(is_own, sources)) else given(result)


def cut(value: Any, start: Any, stop: Any, step: Any) -> Any:
    """``value[start:stop:step]``."""
    if isinstance(value, (list, tuple)):
        METER.get().make(64 + 8 * len(range(*slice(start, stop, step).indices(len(value)))))
    return lifted(value)[start:stop:step]


def key(value: Any) -> Any:
    """A value that something walks through, as one does who looks up the key of a dict.

    Raises:
        OverBudget: As `Weight`.
        RecursionError: As `Weight`.
    """
    Weight(value)
    return value


# Filters of our own


@pass_environment
def _join(environment: Environment, value: Any, d: Any = "", attribute: Any = None) -> Text:
    return text_of(d).join(map(text_of, _picked(environment, value, attribute)))


@pass_environment
def _sum(environment: Environment, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    for entry in _picked(environment, value, attribute):
        start = arithmetic("+", start, entry)
    return start


def _picked(environment: Environment, value: Any, attribute: Any) -> Any:
    get = jinja2.filters.make_attrgetter(environment, attribute)
    return each(value) if attribute is None else [get(entry) for entry in each(value)]


def _indent(value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> Text:
    indention = lifted(width) if isinstance(width, str) else written(" ") * width
    lines = (lifted(value) + written("\n")).splitlines()
    text = written("\n").join([lines[0], *(indention + line if line or blank else line for line in lines[1:])])
    return indention + text if first else text


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> Text:
    """``json.dumps`` as transformers calls it: unlike jinja2's own it escapes nothing for HTML."""
    weight = Weight((value, indent, separators))
    gaps = sum(map(len, separators or ())) + (len(indent) if isinstance(indent, str) else indent or 0) * weight.depth
    METER.get().room(5 * (6 * weight.characters + weight.count * (32 + gaps)))
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return written(text) if weight.own else Text(text)


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> Text:
    return text_of(value).replace(text_of(old), text_of(new), -1 if count is None else count)


def _safe(value: Any) -> Safe:
    text = text_of(value)
    return Safe(text, text.mask)


_OWN: dict[str, Callable[..., Any]] = {
    "capitalize": lambda value: text_of(value).capitalize(),
    "center": lambda value, width=80: text_of(value).center(width),
    "e": lambda value: escaped(text_of(value)),
    "escape": lambda value: escaped(text_of(value)),
    "format": lambda value, /, *args, **kwargs: text_of(value) % (kwargs or args),
    "indent": _indent,
    "join": _join,
    "lower": lambda value: text_of(value).lower(),
    "replace": _replace,
    "safe": _safe,
    "string": text_of,
    "sum": _sum,
    "title": lambda value: text_of(value).mapped(jinja2.filters.do_title, by_character=False),
    "tojson": _to_json,
    "trim": lambda value, chars=None: text_of(value).strip(chars),
    "upper": lambda value: text_of(value).upper(),
}

_JINJA = """abs attr batch count d default dictsort first float forceescape groupby int items last length list map max
min reject rejectattr reverse round select selectattr slice sort truncate unique urlencode wordcount wordwrap"""


def _check_cost(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
    """Before one of jinja2's own filters that costs more than its items."""
    if name in ("sort", "unique", "dictsort", "groupby", "max", "min"):
        weight = Weight(value)
        METER.get().work((weight.count + (weight.characters >> 10)) * weight.count.bit_length())
    if name in ("forceescape", "urlencode", "wordcount", "wordwrap"):
        characters = Weight(value).characters
        METER.get().room(128 * characters)
        METER.get().work(characters**2 >> 8 if name == "wordwrap" else characters >> 4)  # each part copies the rest
    for size in (*args, *kwargs.values()):
        if isinstance(size, tuple):
            key(size)
        if name == "batch" and isinstance(size, int):
            METER.get().items(size)
        if name == "round" and isinstance(size, int) and abs(size) > 400:
            raise OverBudget("it computes with too large a number")


def _counted(item: Any) -> Any:
    METER.get().make(64)
    return item


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = int(hasattr(function, "jinja_pass_arg"))  # it takes jinja2's environment or so before the value

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        METER.get().work(4)
        values = [*args[:first], *map(lifted, args[first:])]
        _check_cost(name, *values[first:], **kwargs)
        result = function(*values, **kwargs)
        if isinstance(result, Iterator):
            return Once(list(map(_counted, result)))
        if isinstance(result, list):
            METER.get().items(len(result))
        return _as_given(result, *values[first:]) if name in ("abs", "float", "int", "round") else lifted(result)

    return run


def _test(name: str, function: Any) -> Callable[..., Any]:
    operation = getattr(function, "__name__", "")
    return _TESTS.get(name) or (partial(_compared, operation) if function in OPERATORS.values() else function)


def _compared(operation: str, left: Any, right: Any) -> bool:
    return compare(left, operation, right)


_TESTS: dict[str, Callable[..., Any]] = {
    "in": lambda value, seq: compare(value, "in", seq),
    "divisibleby": lambda value, num: arithmetic("%", value, num) == 0,
    "even": lambda value: arithmetic("%", value, 2) == 0,
    "odd": lambda value: arithmetic("%", value, 2) == 1,
    "lower": lambda value: text_of(key(value)).islower(),
    "upper": lambda value: text_of(key(value)).isupper(),
    "filter": lambda value: key(value) in FILTERS,
    "test": lambda value: key(value) in TESTS,
}
FILTERS: dict[str, Callable[..., Any]] = {name: _filter(name, function) for name, function in _OWN.items()}
FILTERS |= {name: _filter(name, jinja2.filters.FILTERS[name]) for name in _JINJA.split()}
TESTS: dict[str, Callable[..., Any]] = {name: _test(name, jinja2.tests.TESTS[name]) for name in jinja2.tests.TESTS}
