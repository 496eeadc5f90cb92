"""The errors a user can cause or meet, and the one place that makes foreign text fit to be shown.

An error's text is one sentence: what is wrong, where, and what to do. Parts of it come from files and from the
network. So every error passes through :func:`shown`: nothing in it can steer a terminal, and it has at most ``LONGEST``
characters.
"""

import re
from collections.abc import Iterable
from pathlib import Path

#: Characters of an error's text at most.
LONGEST = 480
#: Characters of a quoted value at most (see :func:`quoted`).
LONGEST_QUOTE = 80

#: Controls (C0, DEL, C1), half surrogates, what turns the direction of text, and separators of lines.
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def shown(text: str, longest: int | None = None) -> str:
    """``text`` fit for a terminal: escapes (``\\x1b``) in place of what could steer one.

    Args:
        longest: Characters at most: the middle of a longer text is left out.
    """
    text = UNSAFE.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode("ascii"), text)
    if longest is None or len(text) <= longest:
        return text
    head = (longest - 5) * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (longest - 5 - head) :]}"


def quoted(value: object, longest: int = LONGEST_QUOTE) -> str:
    """A value of a foreign file as a message quotes it: its ``repr``, shortened before it is made where it is long."""
    if isinstance(value, str) and len(value) > 2 * longest:
        value = value[:longest] + value[-longest:]
    elif isinstance(value, (list, tuple, dict, set)):
        return f"a {type(value).__name__} of {len(value):,}" if len(value) > 8 else shown(_repr(value), longest)
    return shown(_repr(value), longest)


def _repr(value: object) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # a number of very many digits, a very deep list
        return f"a {type(value).__name__}"


def nearest(name: str, known: Iterable[str], alike: float = 0.6) -> str | None:
    """The one of some known names that ``name`` is a misspelling of; None where there is none.

    Two letters that changed places count as one fault, as does another case. The beginning of one name alone, two
    letters or more, means that name.

    Args:
        alike: The share of the letters that must be the same, at least.
    """
    from difflib import get_close_matches

    by_lower = {other.lower(): other for other in known}
    name = name[:200].lower()
    found = get_close_matches(name, by_lower, 1, alike)
    if not found:
        swaps = {name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in range(len(name) - 1)}
        found = [swap for swap in sorted(swaps) if swap in by_lower]
    if not found and len(name) > 1:
        begun = [other for other in by_lower if other.startswith(name)]
        found = begun if len(begun) == 1 else []
    return by_lower[found[0]] if found else None


class OctoError(Exception):
    """A failure that is explained to the user in one sentence; the command line ends with exit code 1."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(shown(message, LONGEST))


class UsageError(OctoError):
    """Wrong input (an argument, a name, an option); the command line ends with exit code 2."""

    exit_code = 2


def expect(what: str, value: object, *kinds: type, none: bool = False) -> None:
    """Check the type of a caller's argument.

    Args:
        kinds: The types that it may have; ``bool`` is no ``int``.
        none: Whether it may be None.

    Raises:
        UsageError: It is of no such type.
    """
    fits = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
    if not fits and not (none and value is None):
        names = [_KINDS.get(kind, kind.__name__) for kind in kinds] + ["None"] * none
        wanted = " or ".join([*filter(None, [", ".join(names[:-1])]), names[-1]])
        raise UsageError(f"{what} is {quoted(value)} ({type(value).__name__}); give {wanted}.")


_KINDS: dict[type, str] = {
    bool: "True or False", int: "a whole number", float: "a number", str: "a text", list: "a list", Path: "a path",
    dict: "a dict", tuple: "a tuple",
}  # fmt: skip
