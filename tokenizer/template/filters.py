"""The filters (``value | name``) and tests (``value is name``) of templates: those of jinja2 but for web pages
(``urlize``, ``striptags``, ``xmlattr``), ``random``, ``pprint`` and ``filesizeformat``."""

import math
from collections.abc import Callable
from typing import Any

from jinja2.exceptions import FilterArgumentError, TemplateRuntimeError

from octo_run.tokenizer.template import text as texts
from octo_run.tokenizer.template import text_filters
from octo_run.tokenizer.template.format import percent, to_json, to_text
from octo_run.tokenizer.template.methods import STRING, Group, item, own_attribute
from octo_run.tokenizer.template.text import Meter, OverBudget, Safe, join, piece
from octo_run.tokenizer.template.values import (
    Callee,
    GivenFloat,
    OneTime,
    Undefined,
    arithmetic,
    compare,
    contains,
    equal,
    escaped,
    given,
    invoke,
    is_given,
    iterate,
    key,
    kind,
    length,
    less,
    ordered,
    safe,
)

Filter = Callable[..., Any]


def apply_filter(meter: Meter, name: str, value: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    meter.work(4)
    function = FILTERS.get(name)
    if function is None:
        raise TemplateRuntimeError(f"No filter named {name!r}.")
    result = invoke(f"the filter {name}", function, meter, value, *args, **kwargs)
    return safe(result) if isinstance(value, Safe) and name in _OF_SAFE else result


def apply_test(meter: Meter, name: str, value: Any, args: list[Any], kwargs: dict[str, Any]) -> bool:
    meter.work(2)
    function = TESTS.get(name)
    if function is None:
        raise TemplateRuntimeError(f"No test named {name!r}.")
    return bool(invoke(f"the test {name}", function, meter, value, *args, **kwargs))


_OF_SAFE = frozenset({"trim", "upper", "lower", "title", "capitalize", "center", "indent", "truncate", "reverse"})
Getter = Callable[[Any], Any]


def _getter(meter: Meter, path: Any, default: Any = None, lower: bool = False) -> Getter:
    """What finds ``a.b.0`` in a value; ``lower``: strings in small letters, for comparisons."""
    if isinstance(path, str):
        steps: list[Any] = [int(step) if step.isdecimal() else step for step in texts.split(meter, path, ".")]
    else:
        steps = [] if path is None else [path]

    def get(value: Any) -> Any:
        for step in steps:
            value = item(meter, value, step)
            if default is not None and isinstance(value, Undefined):
                value = default
        return STRING["lower"](meter, value) if lower and isinstance(value, str) else value

    return get


# Numbers


def _digits(value: str) -> str:
    if len(value) > 4000:
        raise ValueError("too many digits")
    return str(value)


def _number(value: Any, text: Any) -> Any:
    """A number read from ``text`` is the template's only if the whole text is."""
    return value if not isinstance(text, str) or 0 not in texts.mask_of(text) else given(value)


def _int(meter: Meter, value: Any, default: Any = 0, base: int = 10) -> Any:
    if isinstance(value, Undefined):
        raise value.fail()
    try:
        if isinstance(value, str):
            return _bounded(_number(int(_digits(value), base), value))
        return _bounded(given(int(value)) if is_given(value) else int(value))
    except (TypeError, ValueError):
        try:
            return _bounded(_number(int(float(_digits(value) if isinstance(value, str) else value)), value))
        except (TypeError, ValueError, OverflowError):
            return default


def _bounded(number: int) -> int:
    if number.bit_length() > texts.INTEGER_BITS:
        raise OverBudget("it computes with too large a number")
    return number


def _float(meter: Meter, value: Any, default: Any = 0.0) -> Any:
    if isinstance(value, Undefined):
        raise value.fail()
    try:
        if isinstance(value, str):
            return _number(float(_digits(value)), value)
        return GivenFloat(value) if is_given(value) else float(value)
    except (TypeError, ValueError):
        return default


def _round(meter: Meter, value: Any, precision: int = 0, method: str = "common") -> Any:
    if method not in ("common", "ceil", "floor"):
        raise FilterArgumentError("method must be common, ceil or floor")
    if abs(precision) > 400:
        raise OverBudget("it computes with too large a number")
    if not isinstance(value, (int, float)):
        raise TypeError(f"a number is needed, not {kind(value)}")
    if method == "common":
        result = round(value, precision)
    else:
        function = math.ceil if method == "ceil" else math.floor
        result = function(value * 10**precision) / 10**precision
    return given(result) if is_given(value) else result


def _abs(meter: Meter, value: Any) -> Any:
    if isinstance(value, Undefined):
        raise value.fail()
    if not isinstance(value, (int, float)):
        raise TypeError(f"bad operand type for abs(): {kind(value)!r}")
    return given(abs(value)) if is_given(value) else abs(value)


# Lists


def _join(meter: Meter, value: Any, d: Any = "", attribute: Any = None) -> str:
    items = iterate(meter, value)
    if attribute is not None:
        items = list(map(_getter(meter, attribute), items))
    return join(meter, [to_text(meter, entry) for entry in items], to_text(meter, d))


def _list(meter: Meter, value: Any) -> list[Any]:
    items = iterate(meter, value)
    meter.items(len(items))
    return list(items)


def _default(meter: Meter, value: Any, default_value: Any = "", boolean: bool = False) -> Any:
    return default_value if isinstance(value, Undefined) or (boolean and not value) else value


def _first(meter: Meter, value: Any) -> Any:
    if isinstance(value, OneTime) and value.items:
        meter.work(1 + (len(value.items) >> 4))
        first, value.items = value.items[0], value.items[1:]
        return first
    if isinstance(value, str):
        return piece(meter, value, slice(0, 1)) or Undefined("No first item, sequence was empty.")
    items = iterate(meter, value)
    return items[0] if items else Undefined("No first item, sequence was empty.")


def _last(meter: Meter, value: Any) -> Any:
    if isinstance(value, OneTime):
        raise TypeError("'generator' object is not reversible")
    if isinstance(value, str):
        return piece(meter, value, slice(-1, None)) or Undefined("No last item, sequence was empty.")
    items = iterate(meter, value)
    return items[-1] if items else Undefined("No last item, sequence was empty.")


def _reverse(meter: Meter, value: Any) -> Any:
    if isinstance(value, str):
        return piece(meter, value, slice(None, None, -1))
    items = _list(meter, value)[::-1]
    return items if isinstance(value, OneTime) else OneTime(items)


def _items(meter: Meter, value: Any) -> OneTime:
    if isinstance(value, Undefined):
        return OneTime([])
    if not isinstance(value, dict):
        raise TypeError("Can only get item pairs from a mapping.")
    meter.items(3 * len(value))
    return OneTime(list(value.items()))


def _dictsort(
    meter: Meter, value: Any, case_sensitive: bool = False, by: str = "key", reverse: bool = False
) -> list[Any]:
    if by not in ("key", "value"):
        raise FilterArgumentError('You can only sort by either "key" or "value"')
    if not isinstance(value, dict):
        raise value.fail() if isinstance(value, Undefined) else TypeError("Can only sort the items of a mapping.")
    pairs = _items(meter, value).items
    get = _getter(meter, int(by == "value"), lower=not case_sensitive)
    return ordered(meter, pairs, [get(pair) for pair in pairs], reverse=reverse)


def _sort(
    meter: Meter, value: Any, reverse: bool = False, case_sensitive: bool = False, attribute: Any = None
) -> list[Any]:
    paths = texts.split(meter, attribute, ",") if isinstance(attribute, str) else [attribute]
    getters = [_getter(meter, path, lower=not case_sensitive) for path in paths]
    items = _list(meter, value)
    return ordered(meter, items, [[get(entry) for get in getters] for entry in items], reverse=reverse)


def _unique(meter: Meter, value: Any, case_sensitive: bool = False, attribute: Any = None) -> OneTime:
    get = _getter(meter, attribute, lower=not case_sensitive)
    found: dict[Any, Any] = {}
    for entry in _list(meter, value):
        found.setdefault(key(get(entry)), entry)
    return OneTime(list(found.values()))


def _extreme(largest: bool) -> Filter:
    def extreme(meter: Meter, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Any:
        items = iterate(meter, value)
        if not items:
            return Undefined("No aggregated item, sequence was empty.")
        get = _getter(meter, attribute, lower=not case_sensitive)
        best, best_key = items[0], get(items[0])
        for entry in items[1:]:
            entry_key = get(entry)
            if less(meter, best_key, entry_key) if largest else less(meter, entry_key, best_key):
                best, best_key = entry, entry_key
        return best

    return extreme


def _sum(meter: Meter, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    if isinstance(start, str):
        raise TypeError("sum() can't sum strings")
    get = _getter(meter, attribute)
    for entry in iterate(meter, value):
        start = arithmetic(meter, "+", start, get(entry))
    return start


def _batch(meter: Meter, value: Any, linecount: int, fill_with: Any = None) -> OneTime:
    items = _list(meter, value)
    meter.make(128 * len(items))
    size = linecount if linecount > 0 else max(len(items), 1)
    rows = [items[i : i + size] for i in range(0, len(items), size)]
    if rows and fill_with is not None and len(rows[-1]) < linecount:
        meter.items(linecount)
        rows[-1] += [fill_with] * (linecount - len(rows[-1]))
    return OneTime(rows)


def _slice(meter: Meter, value: Any, slices: int, fill_with: Any = None) -> OneTime:
    items = _list(meter, value)
    size, longer = divmod(len(items), slices)
    meter.make(128 * max(slices, 0))
    rows, start = [], 0
    for i in range(slices):
        stop = start + size + (i < longer)
        fill = [fill_with] if fill_with is not None and i >= longer else []
        rows.append(items[start:stop] + fill)
        start = stop
    return OneTime(rows)


def _groupby(
    meter: Meter, value: Any, attribute: Any, default: Any = None, case_sensitive: bool = False
) -> list[Group]:
    get = _getter(meter, attribute, default, lower=not case_sensitive)
    shown = _getter(meter, attribute, default)
    items = _list(meter, value)
    groups: list[Group] = []
    last: Any = None
    for entry in ordered(meter, items, [get(entry) for entry in items]):
        if not groups or not equal(meter, last, get(entry)):
            last = get(entry)
            meter.make(256)
            groups.append(Group((shown(entry), [])))
        groups[-1][1].append(entry)
    return groups


def _map(meter: Meter, value: Any, /, *args: Any, **kwargs: Any) -> OneTime:
    if not value:
        return OneTime([])
    if not args and "attribute" in kwargs:
        function = _getter(meter, kwargs.pop("attribute"), kwargs.pop("default", None))
        if kwargs:
            raise FilterArgumentError(f"Unexpected keyword argument {next(iter(kwargs))!r}")
    elif args:
        name, *rest = args

        def function(entry: Any) -> Any:
            return apply_filter(meter, name, entry, rest, kwargs)

    else:
        raise FilterArgumentError("map requires a filter argument")
    return OneTime([function(entry) for entry in _list(meter, value)])


def _select(wanted: bool, by_attribute: bool) -> Filter:
    def select(meter: Meter, value: Any, /, *args: Any, **kwargs: Any) -> OneTime:
        if not value:
            return OneTime([])
        rest = list(args)
        if by_attribute and not rest:
            raise FilterArgumentError("Missing parameter for attribute name")
        get = _getter(meter, rest.pop(0) if by_attribute else None)

        def passes(entry: Any) -> bool:
            return apply_test(meter, rest[0], entry, rest[1:], kwargs) if rest else bool(entry)

        return OneTime([entry for entry in _list(meter, value) if passes(get(entry)) == wanted])

    return select


def _attr(meter: Meter, value: Any, name: str) -> Any:
    found = own_attribute(meter, value, text_filters.a_text(name))
    return Undefined(f"{kind(value)!r} has no attribute {str(name)[:80]!r}") if found is None else found


FILTERS: dict[str, Filter] = {
    "abs": _abs,
    "attr": _attr,
    "batch": _batch,
    "capitalize": text_filters.string_method("capitalize"),
    "center": text_filters.center,
    "count": lambda meter, value: length(value),
    "d": _default,
    "default": _default,
    "dictsort": _dictsort,
    "e": text_filters.escape,
    "escape": text_filters.escape,
    "first": _first,
    "float": _float,
    "forceescape": text_filters.force_escape,
    "format": text_filters.format_values,
    "groupby": _groupby,
    "indent": text_filters.indent,
    "int": _int,
    "items": _items,
    "join": _join,
    "last": _last,
    "length": lambda meter, value: length(value),
    "list": _list,
    "lower": text_filters.string_method("lower"),
    "map": _map,
    "max": _extreme(True),
    "min": _extreme(False),
    "reject": _select(False, False),
    "rejectattr": _select(False, True),
    "replace": text_filters.replace,
    "reverse": _reverse,
    "round": _round,
    "safe": lambda meter, value: safe(to_text(meter, value)),
    "select": _select(True, False),
    "selectattr": _select(True, True),
    "slice": _slice,
    "sort": _sort,
    "string": to_text,
    "sum": _sum,
    "title": text_filters.title,
    "tojson": to_json,
    "trim": text_filters.trim,
    "truncate": text_filters.truncate,
    "unique": _unique,
    "upper": text_filters.string_method("upper"),
    "urlencode": text_filters.urlencode,
    "wordcount": text_filters.wordcount,
    "wordwrap": text_filters.wordwrap,
}


# Tests


def _compared(operator: str) -> Filter:
    return lambda meter, value, other: compare(meter, operator, value, other)


def remainder(meter: Meter, value: Any, number: Any) -> Any:
    """``value % number``: of numbers, or a string with its conversions filled in."""
    if isinstance(value, Safe):
        return safe(percent(meter, value, _escaped_values(meter, number)))
    if isinstance(value, str):
        return percent(meter, value, number)
    return arithmetic(meter, "%", value, number)


def _escaped_values(meter: Meter, values: Any) -> Any:
    if isinstance(values, tuple):
        return tuple([_escaped_values(meter, value) for value in values])
    if isinstance(values, dict):
        return {name: _escaped_values(meter, value) for name, value in values.items()}
    return escaped(meter, values) if isinstance(values, str) else values


def _is_iterable(meter: Meter, value: Any) -> bool:
    return isinstance(value, (str, list, tuple, dict, range, OneTime, Undefined))


TESTS: dict[str, Filter] = {
    "boolean": lambda meter, value: isinstance(value, bool),
    "callable": lambda meter, value: isinstance(value, (Callee, Undefined)),
    "defined": lambda meter, value: not isinstance(value, Undefined),
    "divisibleby": lambda meter, value, num: remainder(meter, value, num) == 0,
    "escaped": lambda meter, value: isinstance(value, Safe),
    "even": lambda meter, value: remainder(meter, value, 2) == 0,
    "false": lambda meter, value: value is False,
    "filter": lambda meter, value: value in FILTERS,
    "float": lambda meter, value: isinstance(value, float),
    "in": lambda meter, value, seq: contains(meter, seq, value),
    "integer": lambda meter, value: isinstance(value, int) and not isinstance(value, bool),
    "iterable": _is_iterable,
    "lower": lambda meter, value: to_text(meter, value).islower(),
    "mapping": lambda meter, value: isinstance(value, dict),
    "none": lambda meter, value: value is None,
    "number": lambda meter, value: isinstance(value, (int, float)),
    "odd": lambda meter, value: remainder(meter, value, 2) == 1,
    "sameas": lambda meter, value, other: value is other,
    "sequence": lambda meter, value: isinstance(value, (str, list, tuple, dict, range, Undefined)),
    "string": lambda meter, value: isinstance(value, str),
    "test": lambda meter, value: value in TESTS,
    "true": lambda meter, value: value is True,
    "undefined": lambda meter, value: isinstance(value, Undefined),
    "upper": lambda meter, value: to_text(meter, value).isupper(),
    **{name: _compared("eq") for name in ("==", "eq", "equalto")},
    **{name: _compared("ne") for name in ("!=", "ne")},
    **{name: _compared("gt") for name in (">", "gt", "greaterthan")},
    **{name: _compared("lt") for name in ("<", "lt", "lessthan")},
    **{name: _compared("gteq") for name in (">=", "ge")},
    **{name: _compared("lteq") for name in ("<=", "le")},
}
