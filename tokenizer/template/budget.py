"""What a rendering may use: operations, bytes, seconds. Whatever works for a template counts on `METER`."""

import time
from contextvars import ContextVar

# The budget of one rendering. A conversation adds to it for each of its values and characters (see `Meter`), so that a
# long one has as much room as many short ones. The real templates need less than a tenth of this.
OPERATIONS = 8_000_000
OPERATIONS_PER_VALUE = 4_000
BYTES = 256 << 20
BYTES_PER_VALUE = 32 << 10
BYTES_PER_CHARACTER = 256
SECONDS = 2.0  # of computing time of the thread, so that a busy machine refuses nothing
SECONDS_PER_VALUE = 0.002
RESULT_CHARACTERS = 8 << 20
RESULT_CHARACTERS_PER_CHARACTER = 32
INTEGER_BITS = 2048
MAX_DEPTH = 200  # of lists in lists


class OverBudget(Exception):
    """A template computes more than a conversation can need."""


class Meter:
    """What a rendering has left.

    Attributes:
        operations: About one for each node of the template that runs.
        bytes: Those of all values that it makes, also of those already dropped.
        deadline: The thread's computing time, in seconds, at which it is stopped.
    """

    __slots__ = ("bytes", "deadline", "operations", "result", "unchecked")

    def __init__(self, values: float = 0, characters: float = 0) -> None:
        """``values``, ``characters``: how many the conversation has."""
        self.operations = OPERATIONS + OPERATIONS_PER_VALUE * values
        self.bytes = BYTES + BYTES_PER_VALUE * values + BYTES_PER_CHARACTER * characters
        self.deadline = time.thread_time() + SECONDS + SECONDS_PER_VALUE * values
        self.result = RESULT_CHARACTERS + RESULT_CHARACTERS_PER_CHARACTER * characters
        self.unchecked = 0

    def work(self, operations: int) -> None:
        """Count operations before they are done.

        Raises:
            OverBudget: No operations or no time are left.
        """
        self.operations -= operations
        if self.operations < 0:
            raise OverBudget("it takes too many steps")
        self.unchecked += operations
        if self.unchecked >= 1000:
            self.unchecked = 0
            if time.thread_time() > self.deadline:
                raise OverBudget("it takes too long")

    def room(self, size: int) -> None:
        """Check that there are bytes for what is about to be made, and counted then.

        Raises:
            OverBudget: There are too few.
        """
        if size > self.bytes:
            raise OverBudget("it makes too much text")

    def make(self, size: int) -> None:
        """Count bytes.

        Raises:
            OverBudget: No bytes, operations or time are left.
        """
        self.bytes -= size
        if self.bytes < 0:
            raise OverBudget("it makes too much text")
        self.work(1 + (size >> 10))

    def items(self, count: int) -> None:
        """Count a list of ``count`` items, each of them a small value."""
        self.make(64 + 48 * max(count, 0))

    def search(self, text: object, needle: object = "") -> None:
        """Count a look through ``text``.

        Args:
            needle: Given where the time grows with the lengths of both (``rfind``, ``strip``).
        """
        if isinstance(text, str):
            both = len(text) * len(needle) >> 8 if isinstance(needle, str) else 0
            self.work(1 + (len(text) >> 10) + both)


#: The meter of the rendering that runs in this thread; outside of one nothing is limited.
_UNLIMITED = Meter(float("inf"), float("inf"))
METER: ContextVar[Meter] = ContextVar("meter", default=_UNLIMITED)
