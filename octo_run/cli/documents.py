"""Texts of files that go along with a message: ``--file``, ``/read``."""

from pathlib import Path
from typing import TYPE_CHECKING

from octo_run.cli import console
from octo_run.errors import UsageError, shown

if TYPE_CHECKING:
    from octo_run.cli.conversation import Conversation
    from octo_run.engine import MemoryPlan
    from octo_run.tokenizer import Tokenizer

#: Bytes of a document at most: more than the longest contexts hold.
_LONGEST = 16_000_000


def read(path: Path) -> str:
    """The text of a document.

    Raises:
        UsageError: There is none, or it is longer than any context.
    """
    if path.is_file() and path.stat().st_size > _LONGEST:
        raise UsageError(
            f"{path} has {console.human_bytes(path.stat().st_size)}, and a message takes "
            f"{console.human_bytes(_LONGEST)} at most."
        )
    return console.read_text(path).strip("\n")


def add(chat: "Conversation", name: str, text: str) -> None:
    """Let a document go with the next message.

    Raises:
        UsageError: The context does not hold it, with the documents that go already; nothing has changed then.
    """
    tokenizer, room = chat.engine.tokenizer, chat.session.room()
    before = sum(tokenizer.count(other, room) for other in chat.documents)
    _check(tokenizer, chat.engine.plan, name, text, room, before)
    chat.documents.append(text)


def check(tokenizer: "Tokenizer", plan: "MemoryPlan", name: str, text: str) -> None:
    """Check before a model is loaded that its context is not too short for a document.

    Raises:
        UsageError: It is.
    """
    _check(tokenizer, plan, name, text, plan.context, 0)


def _check(tokenizer: "Tokenizer", plan: "MemoryPlan", name: str, text: str, room: int, before: int) -> None:
    left = max(0, room - before)
    tokens = tokenizer.count(text, left)
    if tokens > left:
        others = f" beside the {before:,} of files that were read before" if before else ""
        raise UsageError(f"{shown(name)} makes about {tokens:,} tokens and {left:,} fit{others}: {plan.shorten}.")
