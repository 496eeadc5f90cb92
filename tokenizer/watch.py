"""Native code that may not end: run where it can be left behind.

A regular expression of a tokenizer.json can take time that doubles with every character. The library's code cannot be
interrupted, but it lets go of Python's lock where it encodes a batch. So it runs in a thread that the program does not
wait for at its end, and whoever waits for the answer gives up after a while.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def run_watched(work: Callable[[], T], seconds: float) -> T:
    """What ``work`` returns or raises.

    Time in which this process did not run (a busy machine) does not count.

    Raises:
        TimeoutError: The work took more than ``seconds``. It may then run on until the program ends.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []
    done = threading.Event()

    def target() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # panics of Rust code are no Exception
            failure.append(error)
        finally:
            done.set()

    wall, cpu = time.monotonic(), time.process_time()
    threading.Thread(target=target, name="octo-run watched call", daemon=True).start()
    while not done.wait(0.1):
        if min(time.monotonic() - wall, time.process_time() - cpu) > seconds:
            raise TimeoutError(f"it took more than {seconds:.0f} seconds")
    if failure:
        raise failure[0]
    return outcome[0]
