"""Large pages for what every step reads from end to end.

Weights that are read through pages of 4 KiB keep a core waiting for addresses: products of one row with 146 MB of int8
weights took 14.9 ms of a core, from pages of 2 MiB 10.5. Linux makes such pages of memory in use when it is asked
(``MADV_COLLAPSE``, since 6.1). Nothing is lost where it declines: an older kernel, memory that is mapped from a file,
no free large page.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import sys
import threading
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LARGE = 2 << 20
"""Bytes of a large page."""
_HUGEPAGE, _COLLAPSE = 14, 25  # of madvise


def tensors_of(thing: object) -> Iterator[Tensor]:
    """The tensors in objects, sequences and mappings of this package, however deep; one may come several times."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from tensors_of(part)
    elif isinstance(thing, dict):
        yield from tensors_of(list(thing.values()))
    elif dataclasses.is_dataclass(thing) or type(thing).__module__.startswith("octo_run."):
        yield from tensors_of(list(getattr(thing, "__dict__", {}).values()))


def regions(tensors: list[Tensor]) -> list[int]:
    """Where the large pages begin that hold the tensors, each once; for tensors on a CPU."""
    spans = {(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in tensors if x.is_cpu and x.numel()}
    return sorted(
        {first for at, size in spans for first in range(at // LARGE * LARGE, at + size, LARGE) if size >= LARGE // 16}
    )


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found.restype = ctypes.c_int
    return found


def collapse(starts: list[int]) -> int:
    """Ask for large pages in the place of small ones, one region after the other.

    Returns:
        How many the system made.
    """
    madvise = _madvise()
    if madvise is None:
        return 0
    made = 0
    for start in starts:
        madvise(start, LARGE, _HUGEPAGE)
        made += madvise(start, LARGE, _COLLAPSE) == 0
    return made


def collapse_later(thing: object) -> threading.Thread:
    """The same for all tensors in ``thing``, beside whatever is done meanwhile: half a second for 150 MB.

    Nothing keeps the tensors: what lies in a region when its turn comes stays as it is in any case.
    """
    thread = threading.Thread(
        target=collapse, args=(regions(list(tensors_of(thing))),), name="large pages", daemon=True
    )
    thread.start()
    return thread
