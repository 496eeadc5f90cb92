"""Mutants of JSON documents: the tree is changed at random places, then written, some faults in ways no tree has."""

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from fuzzing import hostile


class _Twin(str):
    """A name that may stand in an object beside an equal one."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


Place = tuple[Any, Any]
"""A container and the index or name in it."""


class Document:
    """A JSON document that is changed by :meth:`change`; :meth:`data` writes it."""

    def __init__(self, rng: random.Random, data: bytes, donors: Sequence[Any], words: Sequence[str]) -> None:
        """``donors``: trees whose parts are put in; ``words``: names and short texts of this kind of file."""
        self.rng, self.donors, self.words = rng, donors, words
        self._holder: list[Any] = [json.loads(data)]
        self._raw: list[str] = []

    @property
    def root(self) -> Any:
        """The whole tree."""
        return self._holder[0]

    def change(self, times: int | None = None) -> None:
        """So many random changes (None: one to five, mostly few)."""
        if times is None:
            times = self.rng.choice((1, 1, 1, 1, 2, 2, 3, 5))
        for _ in range(times):
            self.rng.choice(_CHANGES)(self)

    def data(self) -> bytes:
        """The document, UTF-8; half surrogates as escapes or, rarely, as bytes that are no UTF-8."""
        rng = self.rng
        plain = rng.random() < 0.2
        text = json.dumps(self.root, ensure_ascii=not plain, indent=rng.choice((None, None, 1)))
        for number, raw in enumerate(self._raw):
            text = text.replace(f'"@raw{number}@"', raw)
        return text.encode("utf-8", "surrogatepass")

    def place(self) -> Place:
        """A random place: from the root downwards, with an even chance to stop at each level."""
        container: Any = self._holder
        key: Any = 0
        while True:
            value = container[key]
            if not isinstance(value, (dict, list)) or not value or self.rng.random() < 0.2:
                return container, key
            container, key = value, self._key(value)
            if self.rng.random() < 0.4:
                return container, key

    def container(self, kind: type) -> Any:
        """A random object (``dict``) or list, the one nearest to a random place; None where there is none."""
        for _ in range(8):
            container, key = self.place()
            for value in (container[key], container):
                if isinstance(value, kind) and value is not self._holder:
                    return value
        return None

    def _key(self, container: Any) -> Any:
        if isinstance(container, list):
            return self.rng.randrange(len(container))
        return self.rng.choice(list(container))

    def raw(self, text: str) -> str:
        """A value that is written as ``text``."""
        self._raw.append(text)
        return f"@raw{len(self._raw) - 1}@"

    def value(self) -> Any:
        """A value out of place."""
        rng = self.rng
        choice = rng.randrange(10)
        if choice == 0:
            return self.raw(rng.choice(hostile.RAW))
        if choice == 1:
            return rng.choice(hostile.REAL) * rng.choice((1, 1, 1, -1))
        if choice <= 3:
            return hostile.whole(rng)
        if choice == 4:
            return hostile.text(rng)
        if choice == 5 and self.words:
            return rng.choice(self.words)
        if choice == 6:
            return rng.choice(([], {}, [[]], [None], {"": ""}, [True], [[], {}], {"content": None}))
        if choice == 7:
            return self.donated()
        return rng.choice((None, True, False, 0, 1, -1, ""))

    def donated(self) -> Any:
        """A part of a donor, a copy."""
        part = self.rng.choice(self.donors)
        while isinstance(part, (dict, list)) and part and self.rng.random() < 0.6:
            part = part[self._key(part)]
        return json.loads(json.dumps(part))


def _replace(doc: Document) -> None:
    container, key = doc.place()
    container[key] = doc.value()


def _tweak(doc: Document) -> None:
    """A value near the one that is there: the next number, another type, a part of the text."""
    container, key = doc.place()
    value, rng = container[key], doc.rng
    near: list[Any] = [[value], {"value": value}, None]
    if isinstance(value, bool):
        near = [int(value), str(value), not value, None]
    elif isinstance(value, (int, float)):
        try:
            near = [value + 1, value - 1, -value, value * 2, value / 3, float(value), str(value), value == 1, [value]]
        except OverflowError:
            near = [-value, str(value)]
    elif isinstance(value, str):
        near = [value[1:], value[:-1], value + " ", value.upper(), value * 2, value + hostile.text(rng), [value], {}]
    container[key] = rng.choice(near)


def _extreme(doc: Document) -> None:
    """Another value of the type that is there."""
    container, key = doc.place()
    value, rng = container[key], doc.rng
    if isinstance(value, bool):
        container[key] = not value
    elif isinstance(value, int):
        container[key] = hostile.whole(rng)
    elif isinstance(value, float):
        container[key] = rng.choice((rng.choice(hostile.REAL), value * 10.0 ** rng.randrange(-50, 51)))
    elif isinstance(value, str):
        container[key] = rng.choice(doc.words) if doc.words and rng.random() < 0.5 else hostile.text(rng)
    elif isinstance(value, list):
        container[key] = value[: rng.randrange(len(value) + 1)] * rng.randrange(4)
    else:
        _add_name(doc)


def _delete(doc: Document) -> None:
    container, key = doc.place()
    if container is not doc._holder:
        del container[key]


def _duplicate_name(doc: Document) -> None:
    found = doc.container(dict)
    if found:
        key = doc._key(found)
        found[_Twin(key)] = found[key] if doc.rng.random() < 0.4 else doc.value()


def _rename(doc: Document) -> None:
    found = doc.container(dict)
    if found:
        value = found.pop(doc._key(found))
        name = doc.rng.choice(doc.words) if doc.words and doc.rng.random() < 0.5 else hostile.text(doc.rng)
        found[name] = value


def _add_name(doc: Document) -> None:
    found = doc.container(dict)
    if found is not None:
        name = doc.rng.choice(doc.words) if doc.words and doc.rng.random() < 0.8 else hostile.text(doc.rng)
        found[name] = doc.value()


def _add_item(doc: Document) -> None:
    found = doc.container(list)
    if found is not None:
        item = doc.rng.choice(found) if found and doc.rng.random() < 0.5 else doc.value()
        found.insert(doc.rng.randrange(len(found) + 1), item)


def _repeat_item(doc: Document) -> None:
    found = doc.container(list)
    if found:
        item, times = doc.rng.choice(found), doc.rng.choice((1, 10, 1_000))
        found.extend([item] * min(times, 1 + 500_000 // len(json.dumps(item))))


def _swap(doc: Document) -> None:
    (one, i), (two, j) = doc.place(), doc.place()
    # A container must not end up within itself: of two places on one path, only the inner one is copied outwards.
    first, second = json.dumps(one[i]), json.dumps(two[j])
    one[i] = json.loads(second)
    if (isinstance(two, list) and j >= len(two)) or (isinstance(two, dict) and j not in two):
        return
    two[j] = json.loads(first)


def _splice(doc: Document) -> None:
    container, key = doc.place()
    container[key] = doc.donated()


def _splice_alike(doc: Document) -> None:
    """A donor in the place of an object with a name in common, or of nothing."""
    for _ in range(8):
        container, key = doc.place()
        value = container[key]
        if value is None or isinstance(value, dict):
            some = doc.rng.sample(doc.donors, min(12, len(doc.donors)))
            alike = [part for part in some if isinstance(part, dict) and (value is None or part.keys() & value.keys())]
            if alike:
                container[key] = json.loads(json.dumps(doc.rng.choice(alike)))
                return


def _wrap(doc: Document) -> None:
    container, key = doc.place()
    value = container[key]
    for _ in range(doc.rng.choice((1, 1, 2, 50))):
        value = [value] if doc.rng.random() < 0.5 else {doc.rng.choice(doc.words or ("a",)): value}
    container[key] = value


def _empty(doc: Document) -> None:
    container, key = doc.place()
    if isinstance(container[key], (dict, list, str)):
        container[key] = type(container[key])()


def _shuffle(doc: Document) -> None:
    found = doc.container(list)
    if found:
        doc.rng.shuffle(found)


_CHANGES: tuple[Callable[[Document], None], ...] = (
    *(_replace,) * 5, *(_tweak,) * 4, *(_extreme,) * 5, *(_delete,) * 2, *(_add_name,) * 3, *(_splice,) * 2,
    *(_splice_alike,) * 2, _duplicate_name, _rename, _add_item, _repeat_item, _swap, _wrap, _empty, _shuffle,
)  # fmt: skip


def words_of(trees: Sequence[Any]) -> list[str]:
    """Names and short texts in these trees, in the order of their first occurrence, at most 2,000."""
    found: dict[str, None] = {}
    todo = list(trees)
    while todo and len(found) < 2_000:
        value = todo.pop(0)
        if isinstance(value, str) and len(value) <= 40:
            found[value] = None
        elif isinstance(value, dict):
            found.update(dict.fromkeys(name for name in value if len(name) <= 40))
            todo.extend(value.values())
        elif isinstance(value, list):
            todo.extend(value)
    return list(found)
