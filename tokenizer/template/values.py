"""The values of templates and what operators do with them.

A value is None, a bool, int, float, str, list, tuple, dict or range, or an object of a class below. Nothing else gets
into a template, and no attribute of Python's is within its reach. Lists, tuples and dicts are never changed once made,
but one list may stand in another several times, so that what walks through them counts its steps.
"""

from collections.abc import Callable, Iterator
from functools import cmp_to_key
from typing import Any

from jinja2.exceptions import SecurityError, UndefinedError
from markupsafe import escape

from octo_run.tokenizer.template.text import (
    INTEGER_BITS,
    Meter,
    OverBudget,
    Safe,
    characters,
    join,
    mask_of,
    repeat,
    translated,
)


class Undefined:
    """The value of what does not exist: empty and false; everything else that one does with it fails."""

    __slots__ = ("forbidden", "message")

    def __init__(self, message: str, *, forbidden: bool = False) -> None:
        self.message = message
        self.forbidden = forbidden

    def fail(self) -> Exception:
        return SecurityError(self.message) if self.forbidden else UndefinedError(self.message)

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Undefined)

    def __hash__(self) -> int:
        return 0


class GivenInt(int):
    """A number from a message, or computed with one: its digits are the message's."""


class GivenFloat(float):
    """As `GivenInt`."""


class OneTime:
    """What ``map``, ``select`` etc. give: items to go through once, of unknown number, true even if there are none."""

    __slots__ = ("items",)

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def take(self) -> list[Any]:
        items, self.items = self.items, []
        return items


class Callee:
    """A function, a method, a macro, a loop: something to call. Printed it is the name of its kind."""

    __slots__ = ("call",)
    kind = "function"

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def attribute(self, meter: Meter, name: str) -> Any:
        """What stands behind a dot, None if nothing does."""
        return None


class Namespace:
    """``namespace()``: the only value that a template can change."""

    __slots__ = ("values",)

    def __init__(self, values: dict[str, Any]) -> None:
        self.values: dict[str, Any] = {}
        for name, value in values.items():
            self.set(name, value)

    def set(self, name: str, value: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(f"a namespace cannot have the attribute {name!r}")
        self.values[str(name)] = value


_KINDS = {Undefined: "Undefined", OneTime: "generator", Namespace: "Namespace", GivenInt: "int", GivenFloat: "float"}


def kind(value: object) -> str:
    """The name of a value's type, as Python calls it."""
    if isinstance(value, str):
        return "str"
    if value is None or isinstance(value, Callee):
        return "None" if value is None else value.kind
    return _KINDS.get(type(value), type(value).__name__)


def given(value: Any) -> Any:
    """A number as one that a message gave; other values as they are."""
    if isinstance(value, bool):
        return value
    return GivenInt(value) if isinstance(value, int) else GivenFloat(value) if isinstance(value, float) else value


def is_given(value: object) -> bool:
    return isinstance(value, (GivenInt, GivenFloat))


def invoke(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call what a template names ``name``. Errors: TypeError, in the template's words, for wrong arguments."""
    try:
        return function(*args, **kwargs)
    except TypeError as error:
        if error.__traceback__ is None or error.__traceback__.tb_next is not None:
            raise
    raise TypeError(f"{name} is given wrong arguments")  # it was not even entered


def call(meter: Meter, callee: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    meter.work(4)
    if isinstance(callee, Callee):
        return invoke(f"a {callee.kind}", callee.call, meter, *args, **kwargs)
    if isinstance(callee, Undefined):
        raise callee.fail()
    raise TypeError(f"{kind(callee)!r} object is not callable")


def iterate(meter: Meter, value: Any) -> list[Any] | tuple[Any, ...]:
    """The items of a value. Errors: TypeError for one without."""
    if isinstance(value, (list, tuple)):
        meter.work(1 + (len(value) >> 4))
        return value
    if isinstance(value, str):
        return characters(meter, value)
    if isinstance(value, (dict, range)):
        meter.items(len(value))
        return list(value)
    if isinstance(value, OneTime):
        return value.take()
    if isinstance(value, Undefined):
        return []
    raise TypeError(f"{kind(value)!r} object is not iterable")


def length(value: Any) -> int:
    if isinstance(value, (str, list, tuple, dict, range)):
        return len(value)
    if isinstance(value, Undefined):
        return 0
    if isinstance(value, Namespace):
        raise TypeError("object of type 'Namespace' has no len()")
    raise TypeError(f"object of type {kind(value)!r} has no len()")


def key(value: Any) -> Any:
    """A value as the key of a dict: a scalar, or a tuple of scalars. Errors: TypeError for others."""
    for part in value if isinstance(value, tuple) else (value,):
        if part is not None and not isinstance(part, (str, int, float, Undefined)):
            raise TypeError(f"unhashable type: {kind(part)!r}")
    return value


# Comparison. Strings compare by their characters; masks do not count.


def equal(meter: Meter, left: Any, right: Any) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        meter.work(1 + len(left))
        return len(left) == len(right) and all(k in right and _same(meter, v, right[k]) for k, v in left.items())
    for sequence in (list, tuple):
        if isinstance(left, sequence) and isinstance(right, sequence):
            meter.work(1 + min(len(left), len(right)))
            return len(left) == len(right) and all(_same(meter, a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, str) and isinstance(right, str):
        meter.search(left)
    return bool(left == right)


def _same(meter: Meter, left: Any, right: Any) -> bool:
    return left is right or equal(meter, left, right)


def less(meter: Meter, left: Any, right: Any) -> bool:
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        return left < right
    if isinstance(left, str) and isinstance(right, str):
        meter.search(left)
        return left < right
    for sequence in (list, tuple):
        if isinstance(left, sequence) and isinstance(right, sequence):
            meter.work(1 + min(len(left), len(right)))
            for a, b in zip(left, right, strict=False):
                if not _same(meter, a, b):
                    return less(meter, a, b)
            return len(left) < len(right)
    _no_undefined(left, right)
    raise TypeError(f"'<' not supported between instances of {kind(left)!r} and {kind(right)!r}")


def compare(meter: Meter, operator: str, left: Any, right: Any) -> bool:
    meter.work(1)
    if operator in ("in", "notin"):
        return contains(meter, right, left) == (operator == "in")
    if operator in ("eq", "ne"):
        return equal(meter, left, right) == (operator == "eq")
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if operator == "lt":
        return less(meter, left, right)
    if operator == "gt":
        return less(meter, right, left)
    if operator == "lteq":
        return left <= right if numbers else not less(meter, right, left)
    return left >= right if numbers else not less(meter, left, right)


def contains(meter: Meter, container: Any, value: Any) -> bool:
    if isinstance(container, str):
        _no_undefined(value)
        if not isinstance(value, str):
            raise TypeError(f"'in <string>' requires string as left operand, not {kind(value)}")
        meter.search(container)
        return value in container
    if isinstance(container, dict):
        return key(value) in container
    return any(_same(meter, item, value) for item in iterate(meter, container))


def ordered(meter: Meter, items: list[Any], keys: list[Any], *, reverse: bool = False) -> list[Any]:
    """``items`` sorted by ``keys``, stable."""
    meter.items(2 * len(items))
    meter.work(len(items) * len(items).bit_length())

    def order(a: int, b: int) -> int:
        return -1 if less(meter, keys[a], keys[b]) else int(less(meter, keys[b], keys[a]))

    return [items[i] for i in sorted(range(len(items)), key=cmp_to_key(order), reverse=bool(reverse))]


# Arithmetic


def arithmetic(meter: Meter, operator: str, left: Any, right: Any) -> Any:
    """``+ - * / // **`` on numbers, ``+`` on strings and lists, ``*`` on one of them and a number."""
    meter.work(1)
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        result = _ARITHMETIC[operator](left, right)
        if isinstance(result, int) and result.bit_length() > INTEGER_BITS:
            raise OverBudget("it computes with too large a number")
        if not isinstance(result, (int, float)):
            raise TypeError("a root of a negative number is no number")
        return given(result) if is_given(left) or is_given(right) else result
    _no_undefined(left, right)
    if operator == "+":
        if isinstance(left, str) and isinstance(right, str):
            return add(meter, left, right)
        if isinstance(left, str):
            raise TypeError(f'can only concatenate str (not "{kind(right)}") to str')
        if isinstance(left, (list, tuple)) and isinstance(right, list if isinstance(left, list) else tuple):
            meter.items(len(left) + len(right))
            return [*left, *right] if isinstance(left, list) else (*left, *right)
    if operator == "*":
        times, value = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(value, str) and isinstance(times, int):
            return repeat(meter, value, times)
        if isinstance(value, (list, tuple)) and isinstance(times, int):
            meter.items(len(value) * max(times, 0))
            return value * times
    raise TypeError(f"unsupported operand type(s) for {operator}: {kind(left)!r} and {kind(right)!r}")


def add(meter: Meter, left: str, right: str) -> str:
    if not isinstance(left, Safe) and not isinstance(right, Safe):
        return join(meter, (left, right))
    return safe(join(meter, (escaped(meter, left), escaped(meter, right))))


def safe(text: str) -> Safe:
    return Safe(text, mask_of(text))


def escaped(meter: Meter, text: str) -> str:
    """``text`` with the special characters of HTML escaped, unless that is done already."""
    return text if isinstance(text, Safe) else translated(meter, text, _escape)


def _escape(text: str) -> str:
    return str(escape(str(text)))


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > 2 * INTEGER_BITS:
        raise OverBudget("it computes with too large a number")
    return left**right


_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": lambda left, right: left / right,
    "//": lambda left, right: left // right,
    "%": lambda left, right: left % right,
    "**": _power,
}


def _no_undefined(*values: Any) -> None:
    for value in values:
        if isinstance(value, Undefined):
            raise value.fail()


def scalars(value: Any) -> Iterator[Any]:
    """All values in messages or variables, keys too."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from scalars(item)
    elif isinstance(value, list):
        for item in value:
            yield from scalars(item)
    else:
        yield value
