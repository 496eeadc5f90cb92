"""Memory that a container or ``ulimit`` leaves, on made-up trees of ``/proc`` and ``/sys``."""

import ctypes
import mmap
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from octo_run.engine import system_memory

GB, MB = 10**9, 10**6
UNLIMITED_V1 = 9223372036854771712

Tree = Callable[[str, Mapping[str, Mapping[str, object]]], Path]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """``tree(cgroup, folders)``: a root with 24 GB available, these lines of /proc/self/cgroup, and folders of files
    below /sys/fs/cgroup."""
    monkeypatch.setattr(resource, "getrlimit", lambda _limit: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def make(cgroup: str, folders: Mapping[str, Mapping[str, object]]) -> Path:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/meminfo").write_text("MemTotal: 30000000 kB\nMemAvailable: 24000000 kB\nOdd\n")
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
        for folder, files in folders.items():
            place = tmp_path / "sys/fs/cgroup" / folder
            place.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (place / name).write_text(f"{content}\n")
        return tmp_path

    return make


def v1(limit: int, used: int, stat: str = "") -> dict[str, object]:
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


def v2(limit: object, used: int, stat: str = "", high: object = "max") -> dict[str, object]:
    return {"memory.max": limit, "memory.high": high, "memory.current": used, "memory.stat": stat}


@pytest.mark.parametrize(
    ("cgroup", "folders", "left"),
    [
        pytest.param("0::/\n", {"": v2(GB, 300 * MB)}, 700 * MB, id="v2, a container's own root"),
        pytest.param("0::/a/b\n", {"a/b": v2(GB, 300 * MB)}, 700 * MB, id="v2, nested"),
        pytest.param(
            *("0::/a/b\n", {"a": v2(GB, 600 * MB), "a/b": v2(2 * GB, 100 * MB)}, 400 * MB), id="v2, the parent has less"
        ),
        pytest.param(
            *("0::/a/b\n", {"a": v2("max", 6 * GB), "a/b": v2("max", GB, high=2 * GB)}, GB), id="v2, memory.high"
        ),
        pytest.param("0::/a\n", {"a": v2("max", 6 * GB)}, 24_576 * MB, id="v2, no limit"),
        pytest.param(
            *("0::/a\n", {"a": v2(GB, 900 * MB, "anon 100\ninactive_file 500000000\nactive_file 100000000")}, 700 * MB),
            id="v2, cached files go",
        ),
        pytest.param("0::/a\n", {"a": v2(GB, 2 * GB)}, 0, id="v2, more used than allowed"),
        pytest.param("0::/../x\n", {"": v2(GB, 0), "x": v2(1, 0)}, GB, id="v2, beyond the namespace"),
        pytest.param("0::/gone\n", {"": v2(GB, 0)}, GB, id="v2, the host's path in a container"),
        pytest.param("0::/a\n", {"a": {"memory.max": GB}}, 24_576 * MB, id="v2, no usage told"),
        pytest.param(
            "4:cpu,memory:/docker/abc\n0::/\n", {"memory": v1(GB, 300 * MB)}, 700 * MB, id="v1, a container's own root"
        ),
        pytest.param(
            *("4:memory:/a/b\n", {"memory/a": v1(GB, 600 * MB), "memory/a/b": v1(UNLIMITED_V1, 100 * MB)}, 400 * MB),
            id="v1, nested",
        ),
        pytest.param("4:memory:/\n", {"memory": v1(UNLIMITED_V1, GB)}, 24_576 * MB, id="v1, no limit"),
        pytest.param(
            *("4:memory:/\n", {"memory": v1(GB, 900 * MB, "total_inactive_file 300000000")}, 400 * MB),
            id="v1, cached files go",
        ),
        pytest.param(
            *("4:memory:/a\n0::/b\n", {"memory/a": v1(2 * GB, 0), "unified/b": v2(GB, 0)}, GB), id="v1 and v2 at once"
        ),
        pytest.param("", {"": v2(GB, 0)}, GB, id="no list of cgroups"),
        pytest.param("4:memory\nnonsense\n", {}, 24_576 * MB, id="damaged"),
    ],
)
def test_a_containers_limit_counts(
    cgroup: str, folders: Mapping[str, Mapping[str, object]], left: int, tree: Tree
) -> None:
    assert system_memory.available(tree(cgroup, folders)) == left


@pytest.mark.parametrize(("limit", "page"), [(resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)])
def test_ulimit_counts_what_is_taken_already(
    limit: int, page: int, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree("0::/\n", {})
    pages = ["9"] * 7
    pages[page] = "100"
    (root / "proc/self/statm").write_text(" ".join(pages))
    monkeypatch.setattr(resource, "getrlimit", lambda asked: (GB if asked == limit else resource.RLIM_INFINITY, -1))
    assert system_memory.available(root) == GB - 100 * resource.getpagesize()


def test_a_system_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _limit: (GB, -1))
    assert system_memory.available(tmp_path) > GB // 2


def test_peaks_are_forgotten() -> None:
    block = bytearray(b"x" * 80 * MB)
    high = system_memory.resident_peak()
    del block
    system_memory.forget_peak()
    assert system_memory.resident() - 5 * MB < system_memory.resident_peak() < high - 40 * MB


@pytest.mark.skipif(sys.platform != "linux", reason="madvise and pagemap are Linux's")
@pytest.mark.parametrize("changed", [False, True])
def test_code_is_given_back_unless_it_was_changed(tmp_path: Path, changed: bool) -> None:
    """A debugger's breakpoint in a library is in this process's own page: it must stay."""
    size, file = 32 << 20, tmp_path / "library"
    file.write_bytes(b"c" * size)
    everything = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    with file.open("rb") as opened:
        try:
            code = mmap.mmap(opened.fileno(), size, flags=mmap.MAP_PRIVATE, prot=everything)
        except PermissionError:
            pytest.skip("nothing is run from this folder")
    first = ctypes.addressof(ctypes.c_char.from_buffer(code))
    if changed:
        code[5000] = ord("x")
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_EXEC)
    assert code[:: mmap.PAGESIZE].count(b"c") == size // mmap.PAGESIZE  # all of it is in memory now
    system_memory.give_back()
    before = system_memory.resident()
    assert code[5000:5001] == (b"x" if changed else b"c")
    assert code[:: mmap.PAGESIZE].count(b"c") == size // mmap.PAGESIZE
    came_back = system_memory.resident() - before
    assert came_back < MB if changed else came_back > size - 2 * MB
