"""Work that is the same each time, recorded: a decode step is then one call of the compiled kernels, not hundreds.

What is recorded are the kernels' calls with their arguments, which are addresses. So it is right only if nothing but
these kernels computes, and if all memory stays where it is. The first is seen to here: PyTorch's operations are watched
while a recording is made, and one that does more than to look at a tensor in another way ends it. Such work runs as it
is. The second is the caller's affair: inputs and outputs are kept buffers.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from octo_run.kernels.cpu.native import Kernels, Long, Pointer, library, profiled

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

T = TypeVar("T")


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether PyTorch computes something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.computed: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch's own way to leave the mode as it is. Otherwise it would import its compiler to be kept out of it:
        two seconds of a core and 110 MB."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.computed = str(func)
        return func(*args, **(kwargs or {}))


class _Recorded(ctypes.Structure):
    _fields_ = (("kernel", Pointer), ("arguments", Pointer))


class _Program:
    """Calls of a library's kernels, and what the work returned."""

    def __init__(self, kernels: Kernels, calls: list[tuple[Any, ctypes.Structure]], result: object) -> None:
        self._run, self._arguments = kernels.functions.octo_run, [arguments for _, arguments in calls]
        self._calls = (_Recorded * len(calls))(
            *(_Recorded(ctypes.cast(function, Pointer), ctypes.addressof(arguments)) for function, arguments in calls)
        )
        self.result = result

    def run(self) -> None:
        self._run(ctypes.byref(self._calls), Long(len(self._calls)))


class Replays:
    """Recordings of work by key.

    Args:
        on_repeat: Called once, when work comes for the second time.
    """

    def __init__(self, on_repeat: Callable[[], object] | None = None) -> None:
        self._on_repeat = on_repeat
        self._known: dict[Hashable, _Program | None] = {}
        self._seen: set[Hashable] = set()
        #: For work that cannot be recorded, by its key the operation that PyTorch does in it.
        self.refused: dict[Hashable, str] = {}

    def run(self, key: Hashable, work: Callable[[], T]) -> T:
        """Do the work: the first time as it is, which makes what is made once, the second time it is recorded.

        Args:
            key: Of work that has the same inputs, outputs and calls each time.

        Returns:
            What the work returned when it was recorded.
        """
        kernels = library()
        if kernels is None or profiled():
            return work()
        key = (key, torch.get_num_threads(), id(kernels))
        program = self._known.get(key)
        if program is not None:
            program.run()
            return program.result  # type: ignore[return-value]
        if key not in self._seen or key in self.refused:
            self._seen.add(key)
            return work()
        if self._on_repeat is not None:
            self._on_repeat()
            self._on_repeat = None
        watch, calls = _Watch(), list[tuple[Any, ctypes.Structure]]()
        kernels.recorded = calls
        try:
            with watch:
                result = work()
        finally:
            kernels.recorded = None
        if watch.computed is None:
            self._known[key] = _Program(kernels, calls, result)
        else:
            self.refused[key] = watch.computed
        return result
