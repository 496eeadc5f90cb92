"""Where the prompt of a chat's first question begins to be its own: what comes before, other chats begin with, too."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from octo_run.engine.kept_prefixes import common_length


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
