"""Where prompts begin to be their own: what comes before, others begin with, too."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from octo_run.engine.kept_prefixes import common_length

#: Lengths that :func:`shared_beginnings` gives for one prompt at most: each costs a little when it is read. Those that
#: most prompts want stay, and of these the longest.
MOST = 8


def shared_beginnings(prompts: Sequence[list[int]]) -> list[list[int]]:
    """Of each of some prompts, which are read in this order, the lengths at which later ones part from it.

    A later prompt counts for the one that reads the last token that it has in common with any before it.
    """
    before = list[tuple[list[int], int]]()  # in alphabetical order: most in common is with a neighbour
    #: Of each prompt what it has in common with any before it, at most, and with which one, the reader of that.
    lengths, readers = list[int](), list[int]()
    wanted = [Counter[int]() for _ in prompts]
    for number, ids in enumerate(prompts):
        place = bisect_left(before, (ids, number))
        length, reader = max(
            ((common_length(other, ids), one) for other, one in before[max(0, place - 1) : place + 1]), default=(-1, -1)
        )
        while length > 0 and lengths[reader] >= length:
            reader = readers[reader]
        if length > 0:
            wanted[reader][length] += 1
        lengths.append(length)
        readers.append(reader)
        before.insert(place, (ids, number))
    return [sorted(sorted(counts, key=lambda one: (counts[one], one))[-MOST:]) for counts in wanted]


def shared_beginning(
    ids: list[int], messages: Sequence[Mapping[str, Any]], render: Callable[[list[dict[str, Any]]], list[int]]
) -> int:
    """How many of the ids of rendered messages come before a chat's first question: those that another one leaves.

    Returns:
        0 if the last message is no first question, or if nothing but what the template writes comes before it.
    """
    roles = [message.get("role") for message in messages]
    if len(roles) < 2 or roles[-1] != "user" or not {"user", "assistant"}.isdisjoint(roles[:-1]):
        return 0
    *before, last = messages
    text = last.get("content")
    if not isinstance(text, str):
        return 0
    other = "!" if text.lstrip().startswith("?") else "?"
    return common_length(ids, render([*map(dict, before), {**last, "content": other}]))
