"""What stands behind a dot or in brackets: the methods of strings, lists and dicts, and their items.

A name that Python's own object has and this list lacks (``append``, ``translate``) is there, but fails when used.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from octo_run.tokenizer.template import text as texts
from octo_run.tokenizer.template.format import braces
from octo_run.tokenizer.template.text import Meter, Safe
from octo_run.tokenizer.template.values import (
    Callee,
    Namespace,
    Undefined,
    equal,
    escaped,
    given,
    invoke,
    is_given,
    iterate,
    key,
    kind,
    safe,
)

Method = Callable[..., Any]


class Group(tuple[Any, list[Any]]):
    """What ``groupby`` gives: ``group.grouper`` and ``group.list``."""

    __slots__ = ()


def attribute(meter: Meter, value: Any, name: str) -> Any:
    """``value.name``: a method, else an item."""
    if isinstance(value, Namespace) and name in value.values:
        return value.values[name]
    found = own_attribute(meter, value, name)
    if found is not None:
        return found
    if isinstance(value, dict) and name in value:
        return value[name]
    return _missing(value, name)


def own_attribute(meter: Meter, value: Any, name: str) -> Any:
    """``value.name`` without items; None if there is none (no attribute is None)."""
    meter.work(1)
    if isinstance(value, Undefined):
        raise value.fail()
    if isinstance(value, Callee):
        return value.attribute(meter, name)
    if isinstance(value, Namespace):
        return value.values.get(name)
    if isinstance(value, Group) and name in ("grouper", "list"):
        return value[name == "list"]
    methods, python_type = _methods_of(value)
    method = methods.get(name)
    if method is not None:
        meter.make(256)
        return Callee(partial(_call_method, method, value, name))
    if not name.startswith("_") and hasattr(python_type, name):
        return Undefined(f"access to attribute {name!r} of {kind(value)!r} object is unsafe.", forbidden=True)
    return None


def _call_method(method: Method, value: Any, name: str, meter: Meter, /, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(value, Safe) or name not in _OF_SAFE:
        return invoke(f"{name}()", method, meter, value, *args, **kwargs)
    if name in ("join", "format", "replace"):
        args = tuple([_escaped_item(meter, arg) for arg in args])
        kwargs = {name: _escaped_item(meter, arg) for name, arg in kwargs.items()}
    result = invoke(f"{name}()", method, meter, value, *args, **kwargs)
    return [safe(part) for part in result] if isinstance(result, list) else safe(result)


# fmt: off
_OF_SAFE = frozenset({
    "strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "upper", "lower", "title", "capitalize", "swapcase",
    "casefold", "replace", "join", "format", "center", "ljust", "rjust", "zfill", "expandtabs", "removeprefix",
    "removesuffix",
})
# fmt: on


def _escaped_item(meter: Meter, value: Any) -> Any:
    if isinstance(value, str):
        return escaped(meter, value)
    if isinstance(value, (list, tuple)):
        meter.items(len(value))
        return [_escaped_item(meter, item) for item in value]
    return value


def item(meter: Meter, value: Any, name: Any) -> Any:
    """``value[name]``: an item, else a method."""
    meter.work(1)
    if isinstance(value, Undefined):
        raise value.fail()
    if isinstance(name, slice):
        return _sliced(meter, value, name)
    if isinstance(value, dict):
        with suppress(TypeError):  # no key
            if key(name) in value:
                return value[name]
    elif isinstance(value, (str, list, tuple, range)) and isinstance(name, int):
        try:
            return texts.piece(meter, value, name) if isinstance(value, str) else value[name]
        except IndexError:
            return _missing(value, name)
    if isinstance(name, str):
        found = own_attribute(meter, value, name)
        if found is not None:
            return found
    return _missing(value, name)


def _sliced(meter: Meter, value: Any, key: slice) -> Any:
    if isinstance(value, str):
        return texts.piece(meter, value, key)
    if isinstance(value, (list, tuple, range)):
        meter.make(64 + 8 * len(range(*key.indices(len(value)))))
        return value[key]
    raise TypeError(f"{kind(value)!r} object is not subscriptable")


def _missing(value: Any, name: Any) -> Undefined:
    owner = "None" if value is None else f"{kind(value)} object"
    if isinstance(name, str):
        return Undefined(f"{owner!r} has no attribute {str(name[:80])!r}")
    return Undefined(f"{owner} has no element {name if isinstance(name, int) else kind(name)}")


def _find(function: Callable[..., int], right: bool = False) -> Method:
    def find(meter: Meter, text: str, needle: str, *bounds: int | None) -> int:
        meter.search(text, needle if right and isinstance(needle, str) else "")
        return function(text, needle, *bounds)

    return find


def _look(function: Callable[..., bool]) -> Method:
    def look(meter: Meter, text: str, *args: Any) -> bool:
        meter.search(text)
        return function(text, *args)

    return look


def _change(function: Callable[[str], str], by_character: bool = True) -> Method:
    def change(meter: Meter, text: str) -> str:
        return texts.translated(meter, text, function, by_character=by_character)

    return change


def _join(meter: Meter, text: str, items: Any) -> str:
    parts = iterate(meter, items)
    for i, part in enumerate(parts):
        if not isinstance(part, str):
            raise TypeError(f"sequence item {i}: expected str instance, {kind(part)} found")
    return texts.join(meter, parts, text)


def _format(meter: Meter, text: str, /, *args: Any, **kwargs: Any) -> str:
    return braces(meter, text, list(args), kwargs, attribute, item)


def _items(meter: Meter, value: dict[Any, Any]) -> list[tuple[Any, Any]]:
    meter.items(3 * len(value))
    return list(value.items())


def _keys(meter: Meter, value: dict[Any, Any]) -> list[Any]:
    meter.items(len(value))
    return list(value)


def _values(meter: Meter, value: dict[Any, Any]) -> list[Any]:
    meter.items(len(value))
    return list(value.values())


def _copy(meter: Meter, value: Any) -> Any:
    meter.items(2 * len(value))
    return value.copy()


def _get(meter: Meter, value: dict[Any, Any], name: Any, default: Any = None) -> Any:
    return value.get(key(name), default)


def _index(meter: Meter, value: Any, wanted: Any) -> int:
    for i, entry in enumerate(value):
        if equal(meter, entry, wanted):
            return i
    raise ValueError(f"the value is not in the {kind(value)}")


def _count(meter: Meter, value: Any, wanted: Any) -> int:
    return sum(equal(meter, entry, wanted) for entry in value)


STRING: dict[str, Method] = {
    **{name: _find(getattr(str, name)) for name in ("find", "index", "count")},
    **{name: _find(getattr(str, name), right=True) for name in ("rfind", "rindex")},
    **{name: _look(getattr(str, name)) for name in dir(str) if name.startswith("is")},
    **{name: _look(getattr(str, name)) for name in ("startswith", "endswith")},
    **{name: _change(getattr(str, name)) for name in ("upper", "lower", "swapcase", "casefold")},
    **{name: _change(getattr(str, name), by_character=False) for name in ("title", "capitalize")},
    "strip": texts.strip,
    "lstrip": lambda meter, text, chars=None: texts.strip(meter, text, chars, "l"),
    "rstrip": lambda meter, text, chars=None: texts.strip(meter, text, chars, "r"),
    "split": texts.split,
    "rsplit": partial(texts.split, right=True),
    "splitlines": texts.lines,
    "partition": texts.partition,
    "rpartition": partial(texts.partition, right=True),
    "replace": texts.replace,
    "removeprefix": texts.without_prefix,
    "removesuffix": texts.without_suffix,
    "center": partial(texts.pad, left=0.5),
    "ljust": partial(texts.pad, left=0.0),
    "rjust": partial(texts.pad, left=1.0),
    "zfill": texts.zero_fill,
    "expandtabs": texts.expand_tabs,
    "join": _join,
    "format": _format,
    "format_map": lambda meter, text, values: _format(meter, text, **values),
}
LIST: dict[str, Method] = {"index": _index, "count": _count, "copy": _copy}
TUPLE: dict[str, Method] = {"index": _index, "count": _count}
DICT: dict[str, Method] = {"get": _get, "items": _items, "keys": _keys, "values": _values, "copy": _copy}
FLOAT: dict[str, Method] = {"is_integer": lambda meter, value: value.is_integer()}


def _methods_of(value: Any) -> tuple[dict[str, Method], type]:
    for python_type, methods in ((str, STRING), (dict, DICT), (list, LIST), (tuple, TUPLE), (float, FLOAT)):
        if isinstance(value, python_type):
            return methods, python_type
    return {}, type(value) if isinstance(value, (int, range)) else type(None)


# Functions that every template has


class Cycler(Callee):
    """``cycler(a, b)``: its ``next()`` gives a, b, a, b ..."""

    __slots__ = ("position", "values")
    kind = "cycler"

    def __init__(self, values: tuple[Any, ...]) -> None:
        if not values:
            raise TypeError("at least one item has to be provided")
        super().__init__(lambda meter: _no_call("Cycler"))
        self.values = values
        self.position = 0

    def attribute(self, meter: Meter, name: str) -> Any:
        if name == "current":
            return self.values[self.position]
        return {"next": Callee(self._next), "reset": Callee(self._reset)}.get(name)

    def _next(self, meter: Meter) -> Any:
        value = self.values[self.position]
        self.position = (self.position + 1) % len(self.values)
        return value

    def _reset(self, meter: Meter) -> None:
        self.position = 0


def _no_call(name: str) -> Any:
    raise TypeError(f"{name!r} object is not callable")


def _joiner(meter: Meter, sep: Any = ", ") -> Callee:
    used = False

    def join(meter: Meter) -> Any:
        nonlocal used
        used, before = True, used
        return sep if before else ""

    meter.make(512)
    return Callee(join)


def _cycler(meter: Meter, *values: Any) -> Cycler:
    meter.items(16 + len(values))
    return Cycler(values)


def _dict(meter: Meter, source: Any = (), /, **values: Any) -> dict[Any, Any]:
    if isinstance(source, dict):
        pairs = list(source.items())
    else:
        pairs = [tuple(iterate(meter, pair)) for pair in iterate(meter, source)]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("dictionary update sequence needs pairs")
    meter.items(3 * (len(pairs) + len(values)))
    return {**{key(name): value for name, value in pairs}, **values}


def _namespace(meter: Meter, source: Any = (), /, **values: Any) -> Namespace:
    meter.make(512)
    return Namespace(_dict(meter, source, **values))


def _range(meter: Meter, *bounds: Any) -> Any:
    numbers = range(*bounds)
    if len(numbers) > MAX_RANGE:
        raise OverflowError(f"a range of more than {MAX_RANGE:,} numbers")
    meter.make(512)
    if any(map(is_given, bounds)):
        meter.items(len(numbers))
        return [given(value) for value in numbers]
    return numbers


MAX_RANGE = 100_000
GLOBALS: dict[str, Callee] = {
    "range": Callee(_range),
    "dict": Callee(_dict),
    "namespace": Callee(_namespace),
    "cycler": Callee(_cycler),
    "joiner": Callee(_joiner),
}
