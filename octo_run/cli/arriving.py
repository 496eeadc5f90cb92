"""A value that a thread makes while the person at the terminal already writes: a chat's engine and conversation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent import futures
from typing import Generic, TypeVar

T = TypeVar("T")


class Arriving(Generic[T]):
    """A value that is made on a thread of its own, which ends with the program, wherever it is then."""

    def __init__(self, make: Callable[[], T]) -> None:
        """Nothing is begun yet; ``make`` makes the value."""
        self._make = make
        self._future: futures.Future[T] = futures.Future()
        self._begun = False

    def begin(self, then: Callable[[], None] = lambda: None) -> None:
        """Begin, if that was not done before.

        Args:
            then: Called on the other thread when the value is there or could not be made.
        """
        if not self._begun:
            self._begun = True
            self._future.add_done_callback(lambda _future: then())
            threading.Thread(target=self._run, name="octo-run load", daemon=True).start()

    def _run(self) -> None:
        try:
            value = self._make()
        except BaseException as error:  # whoever asks for the value gets it
            self._future.set_exception(error)
        else:
            self._future.set_result(value)

    def over(self, seconds: float = 0.0) -> bool:
        """Whether there is a value, or will be none; that is waited for as long."""
        return bool(futures.wait([self._future], seconds).done)

    def failure(self) -> BaseException | None:
        """Why there will be no value, as far as that is known by now."""
        return self._future.exception() if self._future.done() else None

    def now(self) -> T | None:
        """The value if it is there."""
        return self._future.result() if self._future.done() and self.failure() is None else None

    def get(self) -> T:
        """The value; begun if it was not, and waited for.

        Raises:
            BaseException: Whatever making it raised.
        """
        self.begin()
        return self._future.result()
