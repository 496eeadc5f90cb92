"""What the system leaves to this process on a CPU: the memory that is available, less what a container (cgroup v1 or
v2) or ``ulimit`` does not allow; and what the process holds of it."""

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
_DONTNEED = 4  # of madvise
_LARGE_CODE = 16 << 20  # bytes
#: Of the upper byte of a page's 64 bits in ``/proc/self/pagemap``: it is in memory or swapped; it is a file's.
_PRESENT, _IN_FILE = 0xC0, 0x20
#: Where the memory controllers are mounted, by the version of cgroups.
_MOUNTS = {1: ("sys/fs/cgroup/memory",), 2: ("sys/fs/cgroup", "sys/fs/cgroup/unified")}
#: Files of a cgroup: its limits and its usage in bytes, and what ``memory.stat`` calls cached files of it and its own.
_FILES = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    2: (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
}


def available(root: Path = _ROOT) -> int:
    """Bytes that the process can still take before the system, a cgroup that it is in, or ``ulimit`` stops it.

    Args:
        root: Where ``proc`` and ``sys`` lie.
    """
    return max(0, min([_of_system(root), *_of_cgroups(root), *_of_limits(root)]))


def _of_system(root: Path) -> int:
    """What the system calls available; half of all memory where it does not say."""
    found = _table(root / "proc/meminfo").get("MemAvailable:")
    if found is not None:
        return found * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _of_cgroups(root: Path) -> Iterator[int]:
    """What every cgroup from the process's own up to the root has left.

    Cached files do not count as used: they go when memory is short. A container may see its own cgroup as the mount's
    root and still be told its path on the host; folders that are not there are passed over.
    """
    for version, path in _cgroups(root):
        limits, usage, cached = _FILES[version]
        for mount in _MOUNTS[version]:
            for folder in {root / mount / part for part in (path, *path.parents)}:
                limit = min((size for name in limits if (size := _number(folder / name)) is not None), default=None)
                used = _number(folder / usage)
                if limit is not None and used is not None:
                    stat = _table(folder / "memory.stat")
                    yield limit - max(0, used - sum(stat.get(name, 0) for name in cached))


def _cgroups(root: Path) -> Iterator[tuple[int, PurePosixPath]]:
    """Version and path of the process's cgroups for memory; of none at all, the mounts' roots."""
    found = False
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if number == "0" and not controllers else 1 if "memory" in controllers.split(",") else 0
        if version:
            found = True
            outside = ".." in path.split("/")  # a cgroup that lies beyond what this namespace shows
            yield version, PurePosixPath("" if outside else path.strip("/"))
    if not found:
        yield from ((1, PurePosixPath()), (2, PurePosixPath()))


def _of_limits(root: Path) -> Iterator[int]:
    """What ``ulimit -v`` (address space) and ``ulimit -d`` (private memory) leave."""
    pages = next(iter(_lines(root / "proc/self/statm")), "").split()
    for limit, place in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY and len(pages) > place:
            yield soft - int(pages[place]) * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Give the system what is held and not needed: memory that was freed and the C library keeps (glibc), an earlier
    engine's, say, and code of libraries that ran once, while they were imported (Linux)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    if sys.platform == "linux":
        for first, size in _code():
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _DONTNEED)


def _code() -> Iterator[tuple[int, int]]:
    """Address and bytes of the code of large libraries, where it is nothing but what their files have.

    To let go of it takes nothing from anybody: the system has the files' pages in its cache, and what runs again is
    mapped again, sixteen pages at a time.
    """
    page, top = os.sysconf("SC_PAGE_SIZE"), 7 if sys.byteorder == "little" else 0
    with contextlib.suppress(OSError), Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
        for line in _lines(Path("/proc/self/maps")):
            place, rights, *_, name = line.split(maxsplit=5)
            first, last = (int(number, 16) for number in place.split("-"))
            if rights != "r-xp" or not name.startswith("/") or last - first < _LARGE_CODE:
                continue
            count = (last - first) // page
            states = os.pread(pages.fileno(), 8 * count, 8 * (first // page))[top::8]
            # What was changed, as a debugger does it, is the process's own page, not the file's.
            if len(states) == count and all(state & _IN_FILE or not state & _PRESENT for state in set(states)):
                yield first, last - first


@contextlib.contextmanager
def returning() -> Iterator[None]:
    """Give memory back to the system as soon as it is freed (glibc), as loading plans it.

    By default the library learns from large blocks to keep such blocks, and loading then held up to a sixth more, by
    chance. Afterwards it keeps blocks as large as it could have learnt to: steps ask for the same ones again and again.
    """
    options = getattr(ctypes.CDLL(None), "mallopt", None)
    if options is None or sys.platform != "linux":
        yield
        return
    trim, mapped = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
    try:
        options(mapped, 128 << 10), options(trim, 128 << 10)
        yield
    finally:
        options(mapped, 32 << 20), options(trim, 64 << 20)


def resident() -> int:
    """Bytes that the process holds in memory now; its peak where the system does not say."""
    held = _table(Path("/proc/self/status")).get("VmRSS:")
    return resident_peak() if held is None else held * 1024


def resident_peak() -> int:
    """Bytes that the process has held at most, since the last :func:`forget_peak` where the system knows that."""
    peak = _table(Path("/proc/self/status")).get("VmHWM:")
    if peak is not None:
        return peak * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Let :func:`resident_peak` begin at what is held now, if the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """The number in a file; None for "max" and where there is none."""
    text = "".join(_lines(path)[:1]).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _table(path: Path) -> dict[str, int]:
    """Name -> number of the lines of a file that begin with both."""
    words = (line.split() for line in _lines(path))
    return {part[0]: int(part[1]) for part in words if len(part) > 1 and part[1].isascii() and part[1].isdigit()}
